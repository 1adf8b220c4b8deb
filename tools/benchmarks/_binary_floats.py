"""The benchmark of binary graphs, with float vectors: how much of the float neighbours the codes find.

Codes choose r candidates, their float vectors put these in order: recall@10 against the exact float neighbours is what
a user of embeddings sees. Beside it faiss's HNSW on the float vectors, whole and in 8 bits a number.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _binary_measure as measure
import _binary_real as real
import numpy as np
from numpy.typing import NDArray

from alimm.report.benchmark import print_table

CANDIDATES = (10, 20, 50, 100, 200, 500)
HASHERS = ("srp", "pca", "itq", "lph")
WIDTHS = (16, 32, 64, 128, 256)


def run(cache: Path | None, repeats: int, limit: int | None, data: dict[str, Any]) -> None:
    """Print the curve of each hasher and those of faiss on the floats.

    Args:
        cache: folder of the sets; None takes alimm's.
        repeats: of each search; the median counts.
        limit: at most so many glosses; None takes all.
        data: gets the figures.
    """
    floats = real.gloss_floats(cache, limit)
    base, queries = np.ascontiguousarray(floats.load("base")), floats.load("queries")
    truth = floats.load("truth")
    candidates = [count for count in CANDIDATES if count <= len(base)]
    rows, found = [], {}
    for hasher in HASHERS:
        points = _curve(real.gloss_codes(hasher, cache, limit=limit), base, queries, truth, candidates, repeats)
        found[hasher] = points
        cells = [f"{point['recall']:.3f} ({point['ceiling']:.3f}) {point['qps']:,.0f}" for point in points]
        rows.append([hasher, *cells])
    print_table(
        f"glosses, {len(base):,} x {base.shape[1]} floats, codes of 256 bits: recall@{real.FLOAT_K} of the float "
        "neighbours after re-ranking r candidates (with exact candidates), queries/s",
        ["hasher", *(f"r = {count}" for count in candidates)],
        rows,
    )
    table = []
    for name, maker in (("IndexHNSWFlat", _hnsw_flat), ("IndexHNSWSQ, 8 bits", _hnsw_sq)):
        found[name] = _faiss(maker, base, queries, truth, repeats)
        cells = [f"{point['recall']:.3f} {point['qps']:,.0f}" for point in found[name]["search"]]
        table.append([name, f"{found[name]['build_cpu']:.1f}", f"{found[name]['bytes'] / len(base):.0f}", *cells])
    header = ["faiss on the floats", "build CPU s", "bytes/point", *(f"ef {width}: recall, q/s" for width in WIDTHS)]
    print_table("M = 16, efConstruction = 80, one thread", header, table)
    data["floats"] = found


def overlap(found_QK: NDArray[np.int64], truth_QK: NDArray[np.int64]) -> float:
    """Share of the true ids that were found; ties of float vectors are not worth a rule."""
    return float((found_QK[:, :, None] == truth_QK[:, None, :]).any(axis=1).mean())


def _curve(
    codes: Any, base: Any, queries: Any, truth: Any, candidates: list[int], repeats: int
) -> list[dict[str, float]]:
    import faiss

    from alimm.projects.binary_graph import BinaryGraph
    from alimm_ops.graph.rerank_cpu import rerank

    asked = codes.queries
    graph = BinaryGraph.build(np.ascontiguousarray(codes.base), workers=1)
    exact = faiss.IndexBinaryFlat(64 * asked.shape[1])
    exact.add(np.ascontiguousarray(codes.base).view(np.uint8))
    _, all_rows = exact.search(asked.view(np.uint8), candidates[-1])
    points = []
    for count in candidates:

        def search(count: int = count) -> NDArray[np.int64]:
            rows = graph.search(asked, count, ef=max(64, count))[1]
            return rerank(queries, base, rows, real.FLOAT_K, "ip")[1]

        search()  # the first call compiles
        taken, best = _timed(search, repeats)
        ceiling = rerank(queries, base, np.ascontiguousarray(all_rows[:, :count]), real.FLOAT_K, "ip")[1]
        points.append(
            {"r": count, "recall": overlap(best, truth), "ceiling": overlap(ceiling, truth), "qps": len(asked) / taken}
        )
    return points


def _timed(search: Callable[[], NDArray[np.int64]], repeats: int) -> tuple[float, NDArray[np.int64]]:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = search()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), found


def _hnsw_flat(dim: int) -> Any:
    import faiss

    return faiss.IndexHNSWFlat(dim, 16, faiss.METRIC_INNER_PRODUCT)


def _hnsw_sq(dim: int) -> Any:
    import faiss

    return faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_8bit, 16, faiss.METRIC_INNER_PRODUCT)


def _faiss(maker: Callable[[int], Any], base: Any, queries: Any, truth: Any, repeats: int) -> dict[str, Any]:
    import faiss

    faiss.omp_set_num_threads(1)
    index = maker(base.shape[1])
    index.hnsw.efConstruction = 80
    start = measure.cpu_seconds()
    if not index.is_trained:
        index.train(base)
    index.add(base)
    build = measure.cpu_seconds() - start
    points = []
    for width in WIDTHS:
        index.hnsw.efSearch = width
        taken, found = _timed(lambda: index.search(queries, real.FLOAT_K)[1], repeats)
        points.append({"width": width, "recall": overlap(found, truth), "qps": len(queries) / taken})
    return {"build_cpu": build, "bytes": int(faiss.serialize_index(index).size), "search": points}
