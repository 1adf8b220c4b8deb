"""The lists by faiss, on one rank and the CPU: an index finds candidates, which are ranked exactly.

``faiss_flat`` (IndexFlatIP) compares every pair in float32. ``faiss_ivf`` (IndexIVFFlat) compares a row with those of
the nearest cells only: about 4 sqrt(N) cells, of which one in 32 is opened; for graphs of more than some 300,000 rows,
where N^2 products take too long. Neither proves its lists: the recall is measured on a sample, against exact lists.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alimm.projects.knn_softmax.graph_build import exact_lists
from alimm.projects.knn_softmax.graph_cpu import CpuSearch
from alimm.projects.knn_softmax.graph_search import Clock, Search
from alimm.seeding import numpy_stream
from alimm_ops.graph import topk_cpu

SAMPLE = 256
_BLOCK = 1 << 14
_TRAIN = 64
"""Rows a cell that the cells are trained with."""


def faiss_lists(units_NW: Tensor, k: int, backend: str, width: int, clock: Clock) -> tuple[Tensor, Tensor, float]:
    """Find lists with faiss.

    Args:
        units_NW: unit rows, float32.
        k: length of the lists.
        backend: ``'faiss_flat'`` or ``'faiss_ivf'``.
        width: candidates that faiss returns for a row.
        clock: where the time goes.

    Returns:
        ids int64 (N, K), similarities (N, K), padded and sorted as `build_lists` does, and the recall on a sample.
    """
    search = _empty_search(units_NW, torch.arange(len(units_NW)), k, clock)
    if len(units_NW) < 2:
        return search.ids, search.similarity, 1.0
    units = units_NW.numpy()
    with clock.phase("index"):
        index = _index(units, backend)
    for start in range(0, len(units), _BLOCK):
        part = slice(start, start + _BLOCK)
        with clock.phase("search"):
            # One more, for the row itself.
            _, found = index.search(units[part], min(width + 1, len(units)))
        with clock.phase("rank"):
            own = np.arange(start, start + len(found))[:, None]
            found[found == own] = -1
            _rank(search, part, found, units)
    search.fill_zero_rows(len(units))
    with clock.phase("recall"):
        recall = _recall(search, clock)
    return search.ids, search.similarity, recall


def _empty_search(queries_QW: Tensor, query_ids: Tensor, k: int, clock: Clock) -> Search:
    return CpuSearch(queries_QW, query_ids, k, k, "fp32", 0.0, (256, 4096), clock)


def _index(units: np.ndarray, backend: str) -> Any:
    import faiss

    count, width = units.shape
    index: Any
    if backend == "faiss_flat":
        index = faiss.IndexFlatIP(width)
    else:
        cells = max(1, min(int(4 * math.sqrt(count)), count // _TRAIN))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = max(min(cells, 8), cells // 32)
        chosen = numpy_stream(0, "knn_softmax.ivf", count).permutation(count)[: cells * _TRAIN]
        index.train(np.ascontiguousarray(units[np.sort(chosen)]))
    index.add(units)
    return index


def _rank(search: Search, part: slice, found: np.ndarray, units: np.ndarray) -> None:
    """Rank candidates of which nothing is known: no bound, no early end."""
    nothing = np.zeros(found.shape, np.float32)
    topk_cpu.rank(
        nothing,
        nothing,
        found,
        np.where(search.is_zero[part].numpy(), 0, found.shape[1]),
        units[part],
        units,
        0,
        np.full(len(found), np.inf),
        search.ids[part].numpy(),
        search.similarity[part].numpy(),
        search.broken[part].numpy(),
    )


def _recall(search: Search, clock: Clock) -> float:
    """The share of the true neighbours of some rows that their lists hold."""
    count = len(search.queries)
    rows = torch.from_numpy(np.sort(numpy_stream(0, "knn_softmax.recall", count).permutation(count)[:SAMPLE]))
    true, _ = exact_lists(search.queries[rows], rows, search.queries, 0, search.k, clock)
    held = (search.ids[rows][:, :, None] == true[:, None, :]) & (true[:, None, :] >= 0)
    return float(held.any(1).sum() / (true >= 0).sum())
