"""The properties that any correct quantiser has, checked on the NumPy oracle that the kernels are compared with."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from alimm_ops.quantize import reference

VALUES = arrays(np.float32, (7, 3), elements=st.floats(-8, 8, width=32))
CLIP = np.array([4.0, 0.37, 7.9], np.float32)
QMAX = st.sampled_from([127, 63])


def hash_in_plain_python(index: int, seed0: int, seed1: int) -> int:
    word = 0xFFFFFFFF
    x = (index + seed0) & word
    x ^= x >> 16
    x = (x * 0x7FEB352D) & word
    x ^= seed1
    x ^= x >> 15
    x = (x * 0x846CA68B) & word
    return x ^ (x >> 16)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_the_hash_equals_its_definition_in_plain_integers(index: int, seed0: int, seed1: int) -> None:
    bits = reference.counter_hash(np.array([index], np.uint32), seed0, seed1)
    assert bits.dtype == np.uint32
    assert int(bits[0]) == hash_in_plain_python(index, seed0, seed1)


def test_the_uniform_numbers_fill_the_interval_evenly() -> None:
    u = reference.uniform16(reference.counter_hash(np.arange(2**16, dtype=np.uint32), 1, 2))
    assert u.dtype == np.float32
    assert u.min() >= 0
    assert u.max() < 1
    cells = np.bincount((u * 64).astype(int), minlength=64)
    chi_square = np.sum((cells - 1024.0) ** 2 / 1024.0)
    assert chi_square < 63 + 5 * np.sqrt(2 * 63)


@given(VALUES, QMAX)
def test_nearest_is_within_half_a_step_and_clips_outside(x: np.ndarray, qmax: int) -> None:
    q = reference.quantize_nearest(x, reference.inverse_scale(CLIP, qmax), qmax)
    assert q.dtype == np.int8
    assert np.abs(q.astype(int)).max() <= qmax  # so -128 never appears
    error = np.abs(x.astype(float) - q * (CLIP.astype(float) / qmax))
    outside = np.abs(x) > CLIP
    bound = np.where(outside, np.abs(x) - CLIP, CLIP / (2 * qmax)).astype(float)
    slack = 2e-5 * CLIP  # a tie may fall to either side after the rounding of x * inv in float32
    assert (error <= bound + slack).all()
    assert (np.abs(q[outside].astype(int)) == qmax).all()


@given(VALUES, QMAX)
def test_nearest_is_odd_and_idempotent(x: np.ndarray, qmax: int) -> None:
    inverse = reference.inverse_scale(CLIP, qmax)
    q = reference.quantize_nearest(x, inverse, qmax)
    again = reference.dequantize(q, CLIP / np.float32(qmax))
    assert np.array_equal(reference.quantize_nearest(again, inverse, qmax), q)
    assert np.array_equal(reference.quantize_nearest(-x, inverse, qmax), -q)


def test_a_tie_goes_to_the_even_integer() -> None:
    x = np.array([[0.5], [1.5], [2.5], [-0.5], [-1.5], [-2.5]], np.float32)
    q = reference.quantize_nearest(x, np.ones(1, np.float32))
    assert q.ravel().tolist() == [0, 2, 2, 0, -2, -2]


@given(VALUES, st.integers(-40, 40), QMAX)
def test_a_power_of_two_on_both_value_and_clip_changes_nothing(x: np.ndarray, exponent: int, qmax: int) -> None:
    x = np.where(np.abs(x) < 1e-20, 0, x).astype(np.float32)  # what would leave the normal range loses bits
    scale = np.float32(2.0**exponent)
    for clip in (CLIP, CLIP * scale):
        assert np.isfinite(reference.inverse_scale(clip, qmax)).all()
    plain, scaled = reference.inverse_scale(CLIP, qmax), reference.inverse_scale(CLIP * scale, qmax)
    assert np.array_equal(
        reference.quantize_nearest(x, plain, qmax), reference.quantize_nearest(x * scale, scaled, qmax)
    )
    assert np.array_equal(
        reference.quantize_stochastic(x, plain, qmax, 3, 4),
        reference.quantize_stochastic(x * scale, scaled, qmax, 3, 4),
    )


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("base", [-5, 0, 100])
def test_stochastic_rounding_has_the_value_as_its_mean(fraction: float, base: int) -> None:
    count = 10**6
    x = np.full((count // 8, 8), base + fraction, np.float32)
    q = reference.quantize_stochastic(x, np.ones(8, np.float32), 127, 11, 12).astype(np.float64)
    assert np.isin(q, [base, base + 1]).all()
    # On top of the sampling error: float32 rounds base + fraction, and u has 16 bits.
    bound = 5 * np.sqrt(fraction * (1 - fraction) / count) + (2.0**-16 if fraction else 0)
    assert abs(q.mean() - base - fraction) <= bound
    if fraction == 0.0:
        return
    centred = q.ravel() - q.mean()
    for lag in (1, 8):  # along a row, and down a channel
        correlation = np.mean(centred[:-lag] * centred[lag:]) / np.var(centred)
        assert abs(correlation) <= 5 / np.sqrt(count)


def test_stochastic_rounding_never_moves_an_integer_nor_leaves_the_range() -> None:
    integers = np.repeat(np.arange(-127, 128, dtype=np.float32)[:, None], 512, axis=1)
    q = reference.quantize_stochastic(integers, np.ones(512, np.float32), 127, 5, 6)
    assert np.array_equal(q, integers)
    huge = np.full((64, 512), 1e30, np.float32)
    assert (reference.quantize_stochastic(huge, np.ones(512, np.float32), 127, 5, 6) == 127).all()
    assert (reference.quantize_stochastic(-huge, np.ones(512, np.float32), 127, 5, 6) == -127).all()


@given(VALUES, QMAX, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_stochastic_rounding_errs_by_less_than_a_step(x: np.ndarray, qmax: int, seed0: int, seed1: int) -> None:
    q = reference.quantize_stochastic(x, reference.inverse_scale(CLIP, qmax), qmax, seed0, seed1)
    error = np.abs(np.clip(x, -CLIP, CLIP).astype(float) - q * (CLIP.astype(float) / qmax))
    assert (error <= CLIP / qmax * (1 + 1e-4)).all()


def test_the_seeds_decide_the_draw_and_nothing_else_does() -> None:
    x = np.random.default_rng(0).normal(size=(512, 4)).astype(np.float32)
    inverse = reference.inverse_scale(np.full(4, 4.0, np.float32))
    words = [int(word) for word in np.random.SeedSequence(7).generate_state(6)]
    draws = {
        seeds: reference.quantize_stochastic(x, inverse, 127, *seeds)
        for seeds in itertools.product(words[:3], words[3:])
    }
    for (first, a), (second, b) in itertools.combinations(draws.items(), 2):
        # Two independent draws of a fraction p differ with probability 2 p (1 - p): 1/3 over all fractions.
        assert 0.28 < np.mean(a != b) < 0.39, (first, second)
    assert np.array_equal(reference.quantize_stochastic(x, inverse, 127, *words[2:4]), draws[words[2], words[3]])


def test_a_second_seed_does_not_shift_the_sequence_of_the_first() -> None:
    index = np.arange(4096, dtype=np.uint32)
    first, second = (reference.counter_hash(index, 9, seed1) for seed1 in (1, 2))
    assert not np.isin(second[:64], first[:128]).any()


def test_the_counter_is_the_flat_index_in_channels_last_order() -> None:
    x = np.full((5, 3), 0.5, np.float32)
    q = reference.quantize_stochastic(x, np.ones(3, np.float32), 127, 21, 22)
    for row, channel in np.ndindex(5, 3):
        u = (hash_in_plain_python(row * 3 + channel, 21, 22) >> 16) / 2**16
        assert q[row, channel] == int(np.floor(0.5 + u))


def test_a_channel_of_zeros_and_a_vanishing_clip_give_zeros() -> None:
    clip = np.array([0.0, 1e-38, 1e-36], np.float32)
    inverse = reference.inverse_scale(clip)
    assert inverse.dtype == np.float32
    assert inverse[:2].tolist() == [0, 0]
    assert np.isfinite(inverse[2])
    x = np.array([[0.0, 1e-38, 1e-36]], np.float32)
    assert reference.quantize_nearest(x, inverse).tolist() == [[0, 0, 127]]
    assert reference.quantize_stochastic(x, inverse, 127, 1, 2).tolist() == [[0, 0, 127]]


def test_range_of_a_tensor() -> None:
    assert reference.tensor_range(np.array([0.5, -0.0, 2.0], np.float32)) == (2.0, False, True)
    assert reference.tensor_range(np.array([[0.5], [-3.0]], np.float32)) == (3.0, True, True)
    assert reference.tensor_range(np.zeros(0, np.float32)) == (0.0, False, True)
    for broken in (np.nan, np.inf, -np.inf):
        assert not reference.tensor_range(np.array([1.0, broken], np.float32))[2]


def test_statistics_of_the_channels_against_a_loop() -> None:
    x = np.random.default_rng(1).normal(size=(37, 5)).astype(np.float32)
    threshold = np.array([0.1, 0.5, 1.0, 2.0, 0.0], np.float32)
    threshold[0] = abs(x[3, 0])  # a value that equals the threshold does not count
    amax, total, squares, count, finite = reference.channel_stats(x, threshold)
    assert finite
    assert [a.dtype for a in (amax, total, squares, count)] == [np.float32, np.float64, np.float64, np.int64]
    for channel in range(5):
        values = [float(v) for v in x[:, channel]]
        assert amax[channel] == max(abs(v) for v in values)
        assert count[channel] == sum(abs(v) > float(threshold[channel]) for v in values)
        assert total[channel] == pytest.approx(sum(values), rel=1e-12)
        assert squares[channel] == pytest.approx(sum(v * v for v in values), rel=1e-12)


def test_statistics_of_nothing_and_of_what_is_not_finite() -> None:
    amax, total, squares, count, finite = reference.channel_stats(np.zeros((0, 2), np.float32), np.ones(2, np.float32))
    assert finite
    assert not np.concatenate([amax, total, squares, count]).any()
    x = np.ones((4, 2), np.float32)
    x[2, 1] = np.inf
    assert not reference.channel_stats(x, np.ones(2, np.float32))[-1]


@settings(max_examples=30)
@given(st.data())
def test_im2col_against_a_loop(data: st.DataObject) -> None:
    triple = st.tuples(*[st.integers(1, 3)] * 3)
    size, kernel, stride, dilation = (data.draw(triple) for _ in range(4))
    padding = data.draw(st.tuples(*[st.integers(0, 2)] * 3))
    size = tuple(max(n, (k - 1) * d + 1 - 2 * p) for n, k, d, p in zip(size, kernel, dilation, padding, strict=True))
    samples, channels = data.draw(st.tuples(st.integers(0, 2), st.integers(1, 3)))
    q = np.random.default_rng(2).integers(0, 256, (samples, *size, channels)).astype(np.uint8)
    columns = reference.im2col(q, kernel, stride, padding, dilation, 64)
    rows = []
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    for sample, *position in np.ndindex(samples, *out):
        row = []
        for offset in np.ndindex(*kernel):
            at = [o * s - p + k * d for o, s, p, k, d in zip(position, stride, padding, offset, dilation, strict=True)]
            inside = all(0 <= a < n for a, n in zip(at, size, strict=True))
            row += q[(sample, *at)].tolist() if inside else [64] * channels
        rows.append(row)
    expected = np.array(rows, np.uint8).reshape(-1, int(np.prod(kernel)) * channels)
    assert columns.dtype == np.uint8
    assert np.array_equal(columns, expected)


def test_im2col_names_a_kernel_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        reference.im2col(np.zeros((1, 1, 2, 2, 1), np.uint8), (1, 3, 3), (1, 1, 1), (0, 0, 0), (1, 1, 1), 0)
