"""The CUDA kernels in Numba's simulator: bit for bit what the NumPy oracle gives."""

from __future__ import annotations

import numpy as np
import pytest
from numba import cuda

from alimm_ops.quantize import cuda as kernels
from alimm_ops.quantize import cuda_kernels, reference

pytestmark = [
    pytest.mark.cudasim,
    pytest.mark.filterwarnings("ignore:overflow encountered in scalar:RuntimeWarning"),  # the hash wraps on purpose
]

SEEDS = (0x9E3779B9, 0x7F4A7C15)
ROWS = [(0, 5), (1, 1), (17, 5), (4, 4), (3, 9)]
PLANES = [(0, 3, 4), (2, 3, 0), (1, 1, 1), (2, 5, 7), (1, 9, 4)]


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each simulated thread is one of the system: small blocks are quick, and small arrays span several of them."""
    if "real_blocks" not in request.fixturenames:
        for name, value in dict(THREADS=8, LANES=2, TILE=4, PITCH=5).items():
            monkeypatch.setattr(cuda_kernels, name, value)


@pytest.fixture
def real_blocks() -> None:
    """Asked for by a test that runs the kernels as they are."""
    assert cuda_kernels.THREADS == cuda_kernels.LANES * cuda_kernels.TILE == 256


def values(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Normal numbers with the awkward ones among them: zeros of both signs, subnormals, ties and huge ones."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=shape).astype(np.float32)
    awkward = np.array([0.0, -0.0, 1e-40, -1e-40, 0.5, -2.5, 1e30, -1e30], np.float32)
    flat = x.reshape(-1)
    flat[::5] = generator.choice(awkward, flat[::5].size)
    return x


def as_rows(x: np.ndarray) -> np.ndarray:
    """The oracle's view (R, C) of rows or planes, made in NumPy."""
    if x.ndim == 2:
        return x
    return np.ascontiguousarray(x.transpose(0, 2, 1)).reshape(x.shape[0] * x.shape[2], x.shape[1])


def inverse_for(channels: int, qmax: int) -> np.ndarray:
    clip = np.random.default_rng(1).uniform(0.5, 3.0, channels).astype(np.float32)
    clip[0] = 0.0 if channels > 1 else qmax  # a channel of zeros; alone: a step of 1, which makes ties
    return reference.inverse_scale(clip, qmax)


def test_this_process_simulates() -> None:
    assert "simulator" in cuda.jit.__module__


@pytest.mark.parametrize(("stochastic", "qmax"), [(False, 127), (True, 127), (True, 63)])
@pytest.mark.parametrize("shape", ROWS + PLANES)
def test_quantise(shape: tuple[int, ...], stochastic: bool, qmax: int) -> None:
    x = values(shape)
    x_RC = as_rows(x)
    inverse = inverse_for(shape[1], qmax)
    if stochastic:
        expected = reference.quantize_stochastic(x_RC, inverse, qmax, *SEEDS)
    else:
        expected = reference.quantize_nearest(x_RC, inverse, qmax)
    signed, unsigned = np.full(x_RC.shape, 99, np.int8), np.full(x_RC.shape, 99, np.uint8)
    zero_point = qmax + 1
    kernels.quantize(x, inverse, qmax, signed, unsigned, zero_point, SEEDS if stochastic else None)
    assert np.array_equal(signed, expected)
    assert np.array_equal(unsigned, (expected.astype(int) + zero_point).astype(np.uint8))


@pytest.mark.usefixtures("real_blocks")
@pytest.mark.parametrize("shape", [(9, 33), (1, 33, 34)])
def test_blocks_of_the_real_size(shape: tuple[int, ...]) -> None:
    x = values(shape)
    x_RC = as_rows(x)
    inverse = inverse_for(33, 127)
    signed = np.full(x_RC.shape, 99, np.int8)
    kernels.quantize(x, inverse, 127, signed, seeds=SEEDS)
    assert np.array_equal(signed, reference.quantize_stochastic(x_RC, inverse, 127, *SEEDS))
    few = np.ascontiguousarray(x[..., :2, :]) if x.ndim == 3 else x
    amax, *_, count = channel_stats(few, np.full(few.shape[1], 0.5, np.float32))
    expected = reference.channel_stats(as_rows(few), np.full(few.shape[1], 0.5, np.float32))
    assert np.array_equal(amax, expected[0])
    assert np.array_equal(count, expected[3])


@pytest.mark.parametrize("shape", [(11, 3), (2, 3, 5)])
def test_quantise_writes_the_one_output_that_was_asked_for(shape: tuple[int, ...]) -> None:
    x = values(shape)
    x_RC = as_rows(x)
    inverse = inverse_for(3, 127)
    expected = reference.quantize_nearest(x_RC, inverse)
    signed, unsigned = np.empty(x_RC.shape, np.int8), np.empty(x_RC.shape, np.uint8)
    kernels.quantize(x, inverse, 127, signed_RC=signed)
    kernels.quantize(x, inverse, 127, unsigned_RC=unsigned, zero_point=128)
    assert np.array_equal(signed, expected)
    assert np.array_equal(unsigned, (expected.astype(int) + 128).astype(np.uint8))
    kernels.quantize(x, inverse, 127)  # nothing to write


def test_stochastic_rounding_turns_at_the_same_value_to_the_last_bit() -> None:
    """``v + u`` just at 1, and just below: where any other u, or a rounding of its own, would show."""
    u = reference.uniform16(reference.counter_hash(np.arange(32, dtype=np.uint32), *SEEDS)).reshape(8, 4)
    for below, expected in ((0.0, 1), (2.0**-20, 0)):
        signed = np.full((8, 4), 99, np.int8)
        kernels.quantize(1 - u - np.float32(below), np.ones(4, np.float32), 127, signed, seeds=SEEDS)
        assert (signed == expected).all()


@pytest.mark.parametrize("size", [0, 1, 3, 32, 70])
def test_range_of_a_tensor(size: int) -> None:
    positive = np.abs(values((size,)))
    negative = values((size,))
    for x in (positive, negative, np.full(min(size, 3), -0.0, np.float32)):
        out = np.zeros(2, np.int32)
        kernels.tensor_range(x, out)
        assert kernels.decode_range(out) == reference.tensor_range(x)


@pytest.mark.parametrize("broken", [np.nan, -np.inf])
def test_range_and_statistics_find_what_is_not_finite(broken: float) -> None:
    x = values((3, 7))
    x[2, 6] = broken
    out = np.zeros(2, np.uint32)
    kernels.tensor_range(x, out)
    assert not kernels.decode_range(out)[2]
    for layout in (x, x.T.reshape(1, 7, 3)):
        amax, *_ = channel_stats(np.ascontiguousarray(layout), np.ones(7, np.float32))
        assert np.isfinite(amax[:6]).all()
        assert not np.isfinite(amax[6])


def channel_stats(x: np.ndarray, threshold: np.ndarray) -> tuple[np.ndarray, ...]:
    chunks, _ = kernels.stats_chunks(x.shape[0] if x.ndim == 2 else x.shape[0] * x.shape[2])
    work = np.full((4, max(chunks, 1), x.shape[1]), np.nan)  # nothing may rely on what it holds
    outs = tuple(np.full(x.shape[1], 9, kind) for kind in (np.float32, np.float64, np.float64, np.int64))
    kernels.channel_stats(x, threshold, work, *outs)
    return outs


@pytest.mark.parametrize("shape", [*ROWS, *PLANES, (1030, 1), (2, 1, 520)])
def test_statistics_of_the_channels(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    x_RC = as_rows(x)
    threshold = np.full(shape[1], 0.75, np.float32)
    if x.size:
        threshold[-1] = abs(x_RC[0, -1])  # a value that equals the threshold does not count
    amax, total, squares, count = channel_stats(x, threshold)
    expected = reference.channel_stats(x_RC, threshold)
    assert np.array_equal(amax, expected[0])
    assert np.array_equal(count, expected[3])
    np.testing.assert_allclose(total, expected[1], rtol=0, atol=1e-11)
    np.testing.assert_allclose(squares, expected[2], rtol=1e-13)


def test_both_layouts_give_the_sums_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(3).normal(size=(26, 3)).astype(np.float32)
    monkeypatch.setattr(kernels, "CHUNK", 4)
    monkeypatch.setattr(kernels, "MAX_CHUNKS", 6)
    assert kernels.stats_chunks(26) == (6, 5)
    expected = reference.channel_stats(x, np.ones(3, np.float32))
    for layout in (x, np.ascontiguousarray(x.reshape(2, 13, 3).transpose(0, 2, 1))):
        amax, total, squares, count = channel_stats(layout, np.ones(3, np.float32))
        assert np.array_equal(amax, expected[0])
        assert np.array_equal(count, expected[3])
        np.testing.assert_allclose(total, expected[1], rtol=0, atol=1e-12)
        np.testing.assert_allclose(squares, expected[2], rtol=1e-13)


def test_statistics_name_the_shape_of_the_scratch_memory() -> None:
    outs = [np.zeros(3, kind) for kind in (np.float32, np.float64, np.float64, np.int64)]
    with pytest.raises(ValueError, match=r"work must be of shape \(4, 2, 3\)"):
        kernels.channel_stats(np.zeros((1025, 3), np.float32), outs[0], np.zeros((4, 1, 3)), *outs)


@pytest.mark.parametrize("shape", ROWS)
def test_dequantise_with_scales_of_rows_and_columns(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(4)
    q = generator.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32)
    scale_R, scale_C = (generator.uniform(1e-6, 1e-3, n).astype(np.float32) for n in shape)
    one = np.float32(0.37).reshape(1)
    for rows, columns in [(scale_R, scale_C), (one, scale_C), (scale_R, one)]:
        out = np.full(shape, np.nan, np.float32)
        kernels.dequantize(q, rows, columns, out)
        assert np.array_equal(out, q.astype(np.float32) * rows[:, None] * columns)
    out = np.full(shape, np.nan, np.float32)
    kernels.dequantize(q, np.ones(1, np.float32), scale_C, out)
    assert np.array_equal(out, reference.dequantize(q, scale_C))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [
        ((1, 1, 1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
        ((2, 1, 5, 6, 3), (1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1)),
        ((1, 3, 4, 5, 2), (3, 1, 2), (2, 1, 3), (1, 0, 2), (1, 1, 2)),
        ((2, 1, 1, 9, 40), (1, 1, 3), (1, 1, 1), (0, 0, 2), (1, 1, 2)),
        ((0, 1, 4, 4, 3), (1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("fill", [0, 64])
def test_im2col(size: tuple[int, ...], kernel, stride, padding, dilation, fill: int) -> None:
    q = np.random.default_rng(5).integers(0, 256, size).astype(np.uint8)
    expected = reference.im2col(q, kernel, stride, padding, dilation, fill)
    columns = np.full(expected.shape, 99, np.uint8)
    kernels.im2col(q, columns, kernel, stride, padding, dilation, fill)
    assert np.array_equal(columns, expected)


def test_im2col_names_the_shape_of_the_result() -> None:
    q = np.zeros((1, 1, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"shape \(4, 27\) for an output of \(1, 2, 2\)"):
        kernels.im2col(q, np.zeros((4, 26), np.uint8), (1, 3, 3), (1, 1, 1), (0, 0, 0), (1, 1, 1), 0)
