"""The CUDA kernels on a GPU, on torch tensors and a stream of their own: bit for bit what the NumPy oracle gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alimm_ops.quantize import reference

pytestmark = pytest.mark.gpu

SEEDS = (0x9E3779B9, 0x7F4A7C15)
SHAPES = [(0, 5), (4099, 3), (70_001, 65), (3, 0, 4), (2, 67, 131), (5, 33, 3136)]


@pytest.fixture
def stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def as_rows(x: np.ndarray) -> np.ndarray:
    if x.ndim == 2:
        return x
    return np.ascontiguousarray(x.transpose(0, 2, 1)).reshape(x.shape[0] * x.shape[2], x.shape[1])


@pytest.mark.parametrize("seeds", [None, SEEDS])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantise(shape: tuple[int, ...], seeds: tuple[int, int] | None, stream: torch.cuda.Stream) -> None:
    from alimm_ops.quantize import cuda

    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x_RC = as_rows(x)
    inverse = reference.inverse_scale(np.linspace(0, 3, shape[1]).astype(np.float32))
    signed = torch.empty(x_RC.shape, dtype=torch.int8, device="cuda")
    unsigned = torch.empty(x_RC.shape, dtype=torch.uint8, device="cuda")
    values, factors = torch.from_numpy(x).cuda(), torch.from_numpy(inverse).cuda()
    torch.cuda.synchronize()
    cuda.quantize(values, factors, 127, signed, unsigned, 128, seeds, stream.cuda_stream)
    stream.synchronize()
    if seeds is None:
        expected = reference.quantize_nearest(x_RC, inverse)
    else:
        expected = reference.quantize_stochastic(x_RC, inverse, 127, *seeds)
    assert np.array_equal(signed.cpu().numpy(), expected)
    assert np.array_equal(unsigned.cpu().numpy(), (expected.astype(int) + 128).astype(np.uint8))


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(shape: tuple[int, ...], stream: torch.cuda.Stream) -> None:
    from alimm_ops.quantize import cuda

    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    x_RC = as_rows(x)
    threshold = np.full(shape[1], 0.75, np.float32)
    chunks, _ = cuda.stats_chunks(len(x_RC))
    work = torch.empty((4, max(chunks, 1), shape[1]), dtype=torch.float64, device="cuda")
    kinds = (torch.float32, torch.float64, torch.float64, torch.int64)
    outs = [torch.full((shape[1],), 9, dtype=kind, device="cuda") for kind in kinds]
    words = torch.zeros(2, dtype=torch.int32, device="cuda")
    values, limits = torch.from_numpy(x).cuda(), torch.from_numpy(threshold).cuda()
    torch.cuda.synchronize()
    cuda.channel_stats(values, limits, work, *outs, stream=stream.cuda_stream)
    cuda.tensor_range(values, words, stream.cuda_stream)
    stream.synchronize()
    amax, total, squares, count = (out.cpu().numpy() for out in outs)
    expected = reference.channel_stats(x_RC, threshold)
    assert np.array_equal(amax, expected[0])
    assert np.array_equal(count, expected[3])
    np.testing.assert_allclose(total, expected[1], rtol=0, atol=1e-8)
    np.testing.assert_allclose(squares, expected[2], rtol=1e-12)
    assert cuda.decode_range(words.cpu().numpy()) == reference.tensor_range(x)


def test_dequantise_and_im2col(stream: torch.cuda.Stream) -> None:
    from alimm_ops.quantize import cuda

    generator = np.random.default_rng(2)
    q = generator.integers(-(2**31), 2**31, (1001, 67), dtype=np.int64).astype(np.int32)
    rows, columns = (generator.uniform(1e-6, 1e-3, n).astype(np.float32) for n in q.shape)
    out = torch.empty(q.shape, dtype=torch.float32, device="cuda")
    picture = generator.integers(0, 256, (2, 3, 9, 11, 5)).astype(np.uint8)
    geometry = ((2, 3, 3), (1, 2, 1), (1, 1, 2), (1, 1, 2))
    expected = reference.im2col(picture, *geometry, 64)
    patches = torch.empty(expected.shape, dtype=torch.uint8, device="cuda")
    inputs = [torch.from_numpy(array).cuda() for array in (q, rows, columns, picture)]
    torch.cuda.synchronize()
    cuda.dequantize(*inputs[:3], out, stream.cuda_stream)
    cuda.im2col(inputs[3], patches, *geometry, 64, stream.cuda_stream)
    stream.synchronize()
    assert np.array_equal(out.cpu().numpy(), q.astype(np.float32) * rows[:, None] * columns)
    assert np.array_equal(patches.cpu().numpy(), expected)
