"""The search and re-ranking on a GPU, on torch tensors and a stream of their own: what the CPU gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alimm_ops.graph import beam_cpu, rerank_cpu

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize(("words", "ef"), [(1, 1), (4, 64), (4, 1000), (16, 100)])
@pytest.mark.parametrize("max_blocks", [3, 512])
def test_search(words: int, ef: int, filtered: bool, max_blocks: int) -> None:
    from alimm_ops.graph import beam_cuda

    rng = np.random.default_rng(words)
    codes = rng.integers(0, 2**64, (20_000, words), np.uint64)
    degrees = rng.integers(0, 100, 20_000)
    indptr = np.append(0, np.cumsum(degrees))
    edges = rng.integers(0, 20_000, indptr[-1]).astype(np.int32)
    queries, starts = codes[:300] ^ np.uint64(3), rng.integers(-1, 20_000, (300, 70)).astype(np.int32)
    allowed = (rng.random(20_000) < 0.3).astype(np.uint8) if filtered else None
    expected = beam_cpu.beam_search(queries, codes, indptr, edges, starts, ef, allowed)

    plan, stream = beam_cuda.beam_plan(300, 20_000, max_blocks), torch.cuda.Stream()
    inputs = [torch.from_numpy(array).cuda() for array in (queries, codes, indptr, edges, starts)]
    mask = None if allowed is None else torch.from_numpy(allowed).cuda()
    work = torch.full((plan.work,), 77, dtype=torch.int32, device="cuda")
    outputs = [torch.from_numpy(np.full_like(array, 77)).cuda() for array in expected]
    torch.cuda.synchronize()
    beam_cuda.beam_search(*inputs, ef, mask, work, *outputs, max_blocks, stream.cuda_stream)
    stream.synchronize()
    for found, array in zip(outputs, expected, strict=True):
        assert np.array_equal(found.cpu().numpy(), array)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_rerank(metric: str, kind: type) -> None:
    from alimm_ops.graph import beam_cuda

    rng = np.random.default_rng(0)
    features = rng.standard_normal((5_000, 100)).astype(kind)
    queries = rng.standard_normal((200, 100)).astype(np.float32)
    rows = np.array([rng.permutation(5_000)[:300] for _ in range(200)])
    rows[:, 7] = -1
    expected = rerank_cpu.rerank(queries, features, rows, 50, metric)
    outputs = [torch.from_numpy(np.full_like(array, 77)).cuda() for array in expected]
    inputs = [torch.from_numpy(array).cuda() for array in (queries, features, rows)]
    beam_cuda.rerank(*inputs, 50, metric, *outputs)
    torch.cuda.synchronize()
    np.testing.assert_array_max_ulp(outputs[0].cpu().numpy(), expected[0], 1)
    assert np.array_equal(outputs[1].cpu().numpy(), expected[1])
