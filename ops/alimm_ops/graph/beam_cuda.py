"""Search in a graph of binary codes and re-ranking on an NVIDIA GPU, in Numba CUDA: what ``beam_reference.py`` gives.

The functions launch the kernels of ``beam_cuda_kernels.py`` and wait for nothing. They take arrays of the device
(anything with ``__cuda_array_interface__``, so torch tensors too; NumPy arrays in Numba's simulator) and write into
arrays that the caller made and that overlap no other. Ids are trusted: one outside the arrays that it indexes does no
harm, but is silently passed over. They have never run on a GPU: their tests are the simulator and the compiler.

Nodes, distances, counts and the order of equal scores are those of the oracle. A score is a sum in double precision in
the order of the coordinates, rounded once; where the oracle adds in another order, or the compiler fuses a product and
a sum, a last bit of the double may differ, and then, rarely, that of the float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from alimm_ops.graph import hamming_cuda  # the first of them: it says what to install

# isort: split
from alimm_ops.graph import beam_cuda_kernels as kernels
from alimm_ops.graph.beam_reference import METRICS

MAX_EF = 1024
"""Both beams and both lists of results of a block are in 48 kB of shared memory."""
MAX_CANDIDATES = 8192
"""That are re-ranked for a query."""
MAX_BLOCKS = 512
"""That walk at a time, unless the caller says otherwise: each has a bit a node of scratch memory."""


class BeamPlan(NamedTuple):
    """Sizes of a search on the device.

    Attributes:
        blocks: that walk at a time, each for one query after the other.
        work: int32 elements of scratch memory.
    """

    blocks: int
    work: int


def beam_plan(num_queries: int, num_nodes: int, max_blocks: int = MAX_BLOCKS) -> BeamPlan:
    """How much scratch memory a search needs: a bit a node and a little more for each block.

    Args:
        num_queries: Q.
        num_nodes: N.
        max_blocks: that walk at a time, at least 1; fewer need less memory and give the same results.

    Raises:
        ValueError: a size is out of range.
    """
    if not 0 <= num_nodes < 2**31:
        raise ValueError(f"a graph has at most 2**31 - 1 nodes, got {num_nodes}: use shards")
    if max_blocks < 1:
        raise ValueError(f"max_blocks must be at least 1, got {max_blocks}")
    blocks = min(max(num_queries, 1), max_blocks, hamming_cuda.MAX_BLOCKS)
    return BeamPlan(blocks, blocks * (-(-num_nodes // 32) + kernels.LOG))


def beam_search(
    queries: Any,
    codes: Any,
    indptr: Any,
    edges: Any,
    starts: Any,
    ef: int,
    allowed: Any | None,
    work: Any,
    ids: Any,
    dists: Any,
    counts: Any,
    max_blocks: int = MAX_BLOCKS,
    stream: int | None = None,
) -> None:
    """Walk from the start nodes of each query; see `alimm_ops.graph.beam_reference.beam_search`.

    Args:
        queries: uint64 (Q, W).
        codes: uint64 (N, W).
        indptr: int64 (N + 1,), where the out-edges of each node begin.
        edges: int32 (E,), targets in [0, N).
        starts: int32 (Q, S), nodes to begin with; -1 pads; may repeat.
        ef: width of the beam, from 1 to 1024.
        allowed: uint8 (N,), where not None only nodes that are not 0 are results.
        work: int32, at least ``beam_plan(Q, N, max_blocks).work`` elements: scratch memory.
        ids: int32 (Q, ef), written: nodes sorted by (distance, node), padded with -1.
        dists: uint16 (Q, ef), written, padded with 65535.
        counts: int64 (Q,), written: distances computed for each query.
        max_blocks: that walk at a time.
        stream: address of the CUDA stream.

    Raises:
        ValueError: a size or dtype is wrong.
    """
    if not 1 <= ef <= MAX_EF:
        raise ValueError(f"ef must be from 1 to {MAX_EF} on the device, got {ef}: use the CPU kernels")
    queries, codes = hamming_cuda.as_pair("queries", queries, "codes", codes)
    num_queries, num_nodes, words = len(queries), len(codes), queries.shape[1]
    blocks, size = beam_plan(num_queries, num_nodes, max_blocks)
    indptr = hamming_cuda.as_array("indptr", indptr, np.int64, (num_nodes + 1,))
    edges = hamming_cuda.as_array("edges", edges, np.int32, (None,))
    starts = hamming_cuda.as_array("starts", starts, np.int32, (num_queries, None))
    if allowed is not None:
        allowed = hamming_cuda.as_array("allowed", allowed, np.uint8, (num_nodes,))
    work = hamming_cuda.as_work(work, size)
    ids = hamming_cuda.as_array("ids", ids, np.int32, (num_queries, ef))
    dists = hamming_cuda.as_array("dists", dists, np.uint16, (num_queries, ef))
    counts = hamming_cuda.as_array("counts", counts, np.int64, (num_queries,))
    if not num_queries:
        return
    # An array of no elements has no address: others, from which nothing is read, stand in for such.
    filtered, num_starts = allowed is not None, starts.shape[1]
    allowed = allowed if filtered and num_nodes else work[:1].view(np.uint8)
    codes, edges = codes if num_nodes else queries, edges if edges.size else work[:1]
    starts = starts if num_starts else ids
    shared = 8 * ((4 if filtered else 2) * ef + 2 * kernels.THREADS + words)
    graph = (codes, num_nodes, indptr, edges, starts, num_starts)
    launch = kernels.beam_kernel[blocks, kernels.THREADS, hamming_cuda.as_stream(stream), shared]
    launch(queries, *graph, ef, allowed, filtered, work.view(np.uint32), ids, dists, counts)


def rerank(
    queries: Any,
    features: Any,
    rows: Any,
    k: int,
    metric: str,
    scores: Any,
    chosen: Any,
    stream: int | None = None,
) -> None:
    """Order candidates by their float features; see `alimm_ops.graph.beam_reference.rerank`.

    Args:
        queries: float32 (Q, D).
        features: float32 or float16 (N, D), D at least 1.
        rows: int64 (Q, R), candidates of each query, R up to 8192; -1 pads.
        k: how many to return, at least 1.
        metric: ``'cosine'``, ``'ip'`` or ``'l2'``.
        scores: float32 (Q, k), written: best first, padded with minus infinity.
        chosen: int64 (Q, k), written: their rows, padded with -1.
        stream: address of the CUDA stream.

    Raises:
        ValueError: the metric is unknown, or a size or dtype is wrong.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    queries = hamming_cuda.as_array("queries", queries, np.float32, (None, None))
    num_queries, dim = queries.shape
    if dim < 1:
        raise ValueError("queries must have at least one coordinate, got none")
    interface = getattr(features, "__cuda_array_interface__", None)
    half = (interface["typestr"] if interface else features.dtype.str).endswith("f2")
    features = hamming_cuda.as_array("features", features, np.float16 if half else np.float32, (None, dim))
    rows = hamming_cuda.as_array("rows", rows, np.int64, (num_queries, None))
    num_rows, num_features = rows.shape[1], len(features)
    if num_rows > MAX_CANDIDATES:
        raise ValueError(f"at most {MAX_CANDIDATES} candidates are re-ranked for a query, got {num_rows}")
    scores = hamming_cuda.as_array("scores", scores, np.float32, (num_queries, k))
    chosen = hamming_cuda.as_array("chosen", chosen, np.int64, (num_queries, k))
    if not num_queries:
        return
    rows, features = rows if num_rows else chosen, features if num_features else scores  # as above
    grid = hamming_cuda.grid_of(num_queries)[0], kernels.THREADS, hamming_cuda.as_stream(stream)
    launch = kernels.rerank_kernel[(*grid, 4 * max(num_rows, 1))]
    launch(queries, features, num_features, rows, num_rows, METRICS.index(metric), scores, chosen)
