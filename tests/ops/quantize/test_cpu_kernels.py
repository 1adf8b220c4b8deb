"""The Numba kernels for the CPU equal the NumPy oracle bit for bit, whatever the shape and the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import numba
import numpy as np
import pytest

from alimm_ops.quantize import cpu, reference

SHAPES = [(0, 5), (1, 1), (7, 3), (40, 8), (33, 13), (70_001, 1), (3, 70_001), (2048, 67), (66_000, 2)]
"""Rows and channels: empty, odd, one of each, and of several blocks."""


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("this machine has one core")
    before = numba.get_num_threads()
    numba.set_num_threads(request.param)
    yield request.param
    numba.set_num_threads(before)


def values(rows: int, channels: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    spread_C = np.exp(generator.normal(size=channels) * 2)
    return (generator.standard_t(3, size=(rows, channels)) * spread_C).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("qmax", [127, 63, 1])
def test_quantise_equals_the_oracle(shape: tuple[int, int], qmax: int, threads: int) -> None:
    x_RC = values(*shape)
    clip_C = np.abs(x_RC).max(0, initial=0) * np.float32(0.8)
    clip_C[:: max(1, shape[1] // 3)] = 0
    inverse_C = reference.inverse_scale(clip_C, qmax)
    seeds = (0x9E3779B9, 0xDEADBEEF)
    for chosen in (None, seeds):
        if chosen is None:
            true = reference.quantize_nearest(x_RC, inverse_C, qmax)
        else:
            true = reference.quantize_stochastic(x_RC, inverse_C, qmax, *chosen)
        signed, unsigned = np.full(shape, 99, np.int8), np.full(shape, 99, np.uint8)
        for zero_point in (0, 128) if qmax == 127 else (64,):
            cpu.quantize(x_RC, inverse_C, qmax, signed, unsigned, zero_point, chosen)
            assert np.array_equal(signed, true)
            if zero_point:
                assert np.array_equal(unsigned, (true.astype(int) + zero_point).astype(np.uint8))
            only = np.full(shape, 99, np.int8)
            cpu.quantize(x_RC, inverse_C, qmax, signed_RC=only, seeds=chosen)
            assert np.array_equal(only, true), "signed alone"
            alone = np.full(shape, 99, np.uint8)
            cpu.quantize(np.abs(x_RC), inverse_C, qmax, unsigned_RC=alone, zero_point=zero_point, seeds=None)
            positive = reference.quantize_nearest(np.abs(x_RC), inverse_C, qmax)
            assert np.array_equal(alone, (positive.astype(int) + zero_point).astype(np.uint8)), "unsigned alone"


def test_ties_and_the_sign_of_zero_round_as_in_the_oracle() -> None:
    halves = np.arange(-130, 131, dtype=np.float32) * np.float32(0.5)
    x_RC = np.concatenate([halves, [-0.0, 0.0, 1e-42, -1e-42, 3.4e38, -3.4e38]]).astype(np.float32)[:, None]
    inverse_C = np.ones(1, np.float32)
    for seeds in (None, (5, 6)):
        found = np.empty(x_RC.shape, np.int8)
        cpu.quantize(x_RC, inverse_C, 127, found, seeds=seeds)
        true = (
            reference.quantize_nearest(x_RC, inverse_C)
            if seeds is None
            else reference.quantize_stochastic(x_RC, inverse_C, 127, *seeds)
        )
        assert np.array_equal(found, true)


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_equal_the_oracle(shape: tuple[int, int], threads: int) -> None:
    x_RC = values(*shape, seed=1)
    threshold_C = np.abs(x_RC).mean(0).astype(np.float32) if len(x_RC) else np.ones(shape[1], np.float32)
    amax_C, sum_C, square_C, count_C, finite = cpu.channel_stats(x_RC, threshold_C)
    true = reference.channel_stats(x_RC, threshold_C)
    assert np.array_equal(amax_C, true[0])
    assert np.array_equal(count_C, true[3])
    assert finite
    # Blocks are summed in float32.
    scale_C = np.abs(x_RC).sum(0, dtype=np.float64)
    assert (np.abs(sum_C - true[1]) <= 1e-4 * scale_C).all()
    np.testing.assert_allclose(square_C, true[2], rtol=2e-3)
    for found, expected in zip(cpu.channel_range(x_RC), (amax_C, sum_C, True), strict=True):
        assert np.array_equal(found, expected)
    found, true_range = cpu.tensor_range(x_RC), reference.tensor_range(x_RC)
    assert found == (float(true_range[0]), true_range[1], True)


def test_the_sums_do_not_depend_on_the_number_of_threads() -> None:
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("this machine has one core")
    x_RC = values(50_000, 5)
    found = []
    before = numba.get_num_threads()
    for count in (1, 2):
        numba.set_num_threads(count)
        found.append((*cpu.channel_range(x_RC), *cpu.channel_stats(x_RC, np.ones(5, np.float32))))
    numba.set_num_threads(before)
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("low", "negative"), [(0.0, False), (-0.0, False), (-1e-40, True), (-3.0, True)])
def test_a_sign_is_seen_wherever_it_is(low: float, negative: bool) -> None:
    for size, place in product((3, 70_001), (0, -1)):
        x = np.ones(size, np.float32)
        x[place] = low
        assert cpu.tensor_range(x) == (max(1.0, -low), negative, True)
        assert reference.tensor_range(x)[1] == negative


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(1, 1), (9, 7), (40_000, 3)])
def test_nan_and_inf_are_found_anywhere(bad: float, shape: tuple[int, int]) -> None:
    checks: list[Callable[[np.ndarray], bool]] = [
        lambda x: cpu.tensor_range(x)[2],
        lambda x: cpu.channel_range(x)[2],
        lambda x: cpu.channel_stats(x, np.ones(x.shape[1], np.float32))[4],
    ]
    for place in sorted({0, 1 % (shape[0] * shape[1]), shape[0] * shape[1] // 2, shape[0] * shape[1] - 1}):
        x_RC = values(*shape)
        assert all(check(x_RC) for check in checks)
        x_RC.reshape(-1)[place] = bad
        assert not any(check(x_RC) for check in checks), place


def test_the_counter_is_the_flat_index_in_the_whole_tensor() -> None:
    """Equal values draw differently everywhere, and rows may not be cut without shifting the draw."""
    x_RC = np.full((300, 7), 0.5, np.float32)
    one_C = np.ones(7, np.float32)
    found = np.empty(x_RC.shape, np.int8)
    cpu.quantize(x_RC, one_C, 127, found, seeds=(1, 2))
    assert 0.4 < found.mean() < 0.6
    bits = reference.counter_hash(np.arange(x_RC.size, dtype=np.uint32), 1, 2) >> np.uint32(16)
    assert np.array_equal(found.reshape(-1), (bits >= 2**15).astype(np.int8))
