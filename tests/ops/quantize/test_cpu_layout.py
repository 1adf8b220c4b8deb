"""The layout kernels for the CPU against the NumPy oracle and plain loops."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from alimm_ops.quantize import cpu_layout, reference

# Size, channels, kernel, stride, padding, dilation.
CASES: list[tuple[Any, int, Any, Any, Any, Any]] = [
    ((1, 5, 7), 3, (1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1)),
    ((1, 6, 5), 8, (1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1)),
    ((1, 9, 8), 16, (1, 2, 3), (1, 3, 1), (0, 0, 2), (1, 2, 1)),
    ((4, 3, 5), 2, (3, 1, 2), (2, 1, 1), (1, 0, 1), (1, 1, 2)),
    ((1, 1, 11), 1, (1, 1, 4), (1, 1, 3), (0, 0, 3), (1, 1, 1)),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fill", [0, 64, 128])
def test_im2col_equals_the_oracle_whole_and_in_parts(case: tuple[Any, ...], fill: int) -> None:
    size, channels, *geometry = case
    q = np.random.default_rng(0).integers(0, 256, (3, *size, channels), dtype=np.uint8)
    true = reference.im2col(q, *geometry, fill)
    whole = np.full_like(true, 99)
    cpu_layout.im2col(q, *geometry, fill, 0, whole)
    assert np.array_equal(whole, true)
    for first, count in ((1, 1), (len(true) // 2, 3), (len(true) - 2, 2)):
        part = np.full((count, true.shape[1]), 99, np.uint8)
        cpu_layout.im2col(q, *geometry, fill, first, part)
        assert np.array_equal(part, true[first : first + count])


def fold_by_hand(
    weight_OIK: np.ndarray, fold_O: np.ndarray, inverse_I: np.ndarray, taps_PJ: np.ndarray, groups: int
) -> np.ndarray:
    outputs, inputs = len(weight_OIK) // groups, weight_OIK.shape[1]
    phases, places = taps_PJ.shape
    out = np.zeros((groups, phases, inputs, outputs, places), np.int8)
    for group, phase, channel, output, place in np.ndindex(*out.shape):
        tap = taps_PJ[phase, place]
        if tap >= 0:
            value = weight_OIK[group * outputs + output, channel, tap] * fold_O[group * outputs + output]
            scaled = value * inverse_I[group * inputs + channel]
            out[group, phase, channel, output, place] = int(np.rint(np.clip(scaled, -127, 127)))
    return out.reshape(groups * phases * inputs, outputs, places)


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("inputs", [1, 3, 33])
def test_folded_weights_equal_a_plain_loop(groups: int, inputs: int) -> None:
    generator = np.random.default_rng(groups + inputs)
    weight_OIK = generator.normal(size=(groups * 4, inputs, 6)).astype(np.float32)
    fold_O = generator.random(groups * 4, dtype=np.float32)
    fold_O[0] = 0
    taps_PJ = np.array([[0, -1, 5], [4, 2, -1]])
    amax_I = cpu_layout.weight_range(weight_OIK, fold_O, groups)
    by_hand = np.abs(weight_OIK * fold_O[:, None, None]).reshape(groups, 4, inputs, 6).max((1, 3)).reshape(-1)
    assert np.array_equal(amax_I, by_hand)
    inverse_I = reference.inverse_scale(amax_I)
    found = cpu_layout.transpose_weight(weight_OIK, fold_O, inverse_I, 127, taps_PJ, groups)
    assert np.array_equal(found, fold_by_hand(weight_OIK, fold_O, inverse_I, taps_PJ, groups))


def test_rows_are_quantised_each_with_its_own_scale() -> None:
    x_RL = np.random.default_rng(0).normal(size=(9, 37)).astype(np.float32) * np.arange(9, dtype=np.float32)[:, None]
    inverse_R = reference.inverse_scale(np.abs(x_RL).max(1))
    true = reference.quantize_nearest(x_RL.T, inverse_R).T
    assert np.array_equal(cpu_layout.quantize_rows(x_RL, inverse_R, 127), true)
    assert cpu_layout.quantize_rows(x_RL[:0], inverse_R[:0], 127).shape == (0, 37)


@pytest.mark.parametrize("groups", [1, 2, "depthwise", "multiplier"])
@pytest.mark.parametrize("case", [CASES[1], CASES[2], ((4, 3, 5), 8, (3, 1, 2), (2, 1, 1), (1, 0, 1), (1, 1, 2))])
def test_grouped_weight_gradient_equals_the_product_with_the_patches(case: tuple[Any, ...], groups: Any) -> None:
    size, channels, kernel, stride, padding, dilation = case
    parts = groups if isinstance(groups, int) else channels
    outputs = 2 * channels if groups == "multiplier" else channels
    generator = np.random.default_rng(0)
    q = generator.integers(1, 256, (3, *size, channels), dtype=np.uint8)
    zero_point = 128
    columns = reference.im2col(q, kernel, stride, padding, dilation, zero_point).astype(np.int64) - zero_point
    volume = int(np.prod(kernel))
    gradient_RO = generator.integers(-127, 128, (len(columns), outputs), dtype=np.int8)
    found = cpu_layout.grouped_weight_gradient(q, zero_point, gradient_RO, kernel, stride, padding, dilation, parts)
    per_in, per_out = channels // parts, outputs // parts
    split = columns.reshape(len(columns), volume, channels)
    assert found.shape == (outputs, per_in, volume)
    for output in range(outputs):
        first = output // per_out * per_in
        true = np.einsum("rvc,r->cv", split[:, :, first : first + per_in], gradient_RO[:, output].astype(np.int64))
        assert np.array_equal(found[output], true)


def test_grouped_weight_gradient_does_not_overflow_nor_depend_on_threads() -> None:
    size = (1, 500, 600)
    q = np.full((1, *size, 2), 255, np.uint8)
    gradient_RO = np.full((300_000, 2), 127, np.int8)
    kernel, none, one = (1, 1, 1), (0, 0, 0), (1, 1, 1)
    before = numba.get_num_threads()
    for count in sorted({1, before}):
        numba.set_num_threads(count)
        found = cpu_layout.grouped_weight_gradient(q, 0, gradient_RO, kernel, one, none, one, 2)
        assert (found == 300_000 * 255 * 127).all()
    numba.set_num_threads(before)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 17, 65), (4, 3, 130)])
def test_the_finish_scales_and_transposes(shape: tuple[int, int, int], kind: type) -> None:
    generator = np.random.default_rng(0)
    sums = generator.integers(-(2**30), 2**30, shape).astype(kind)
    scale_O = generator.random(shape[2], dtype=np.float32)
    found = cpu_layout.finish_weight_gradient(sums, scale_O)
    assert np.array_equal(found, (sums.astype(np.float32) * scale_O).transpose(2, 1, 0))
