"""``alimm index serve-bench``: speed of single queries and of batches, latencies, recall, and the first search.

Recall is tie-aware: a row found counts if it is no farther than the k-th true neighbour. The searches report exact
distances of distinct live rows, so the distances alone tell it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.cli_common import at_least_one, at_most_rows, numbers, open_index, print_table

if TYPE_CHECKING:
    from alimm.projects.binary_graph.graph import BinaryGraph

_COLD = """
import sys
import numpy as np
from alimm.projects.binary_graph import BinaryGraph
index = BinaryGraph.open(sys.argv[1], read_only=True)
index.search(np.frombuffer(bytes.fromhex(sys.argv[2]), '<u8')[None], 1)
"""


@dataclass(frozen=True)
class Measured:
    """One line of the benchmark.

    Attributes:
        ef: width of the beam.
        threads: that search at a time.
        single_qps: queries a second, one a call, all threads together.
        batch_qps: queries a second, all in one call.
        p50_us: median latency of a single query, microseconds; with the others the queue of other threads.
        p95_us: latency that 95 of 100 queries keep.
        p99_us: latency that 99 of 100 queries keep.
        recall: tie-aware, of the sample.
    """

    ef: int
    threads: int
    single_qps: float
    batch_qps: float
    p50_us: float
    p95_us: float
    p99_us: float
    recall: float


def serve_bench(argv: Sequence[str] | None = None) -> int:
    """``alimm index serve-bench``: measure a sweep of ef and threads, and print a table."""
    from alimm.projects.binary_graph.engine import usable_cpus

    parser = argparse.ArgumentParser(
        prog="alimm index serve-bench",
        description="Measure searches: speed, latencies, and tie-aware recall against a scan of all rows.",
    )
    parser.add_argument("folder", help="the index")
    parser.add_argument("--queries", required=True, metavar="FILE", help="codes, .npy or .parquet")
    parser.add_argument("--column", help="of the codes, in a Parquet file")
    parser.add_argument("-k", type=at_least_one, default=10, help="rows for each query (default: 10)")
    parser.add_argument("--ef", type=numbers, default=[16, 32, 64, 128, 256], help="as 16,64,256")
    parser.add_argument("--threads", type=numbers, default=sorted({1, usable_cpus()}), help="as 1,2,4")
    parser.add_argument("--sample", type=at_least_one, default=200, help="queries that recall is measured on")
    parser.add_argument(
        "--truth",
        type=Path,
        metavar="FILE.npz",
        help="true 'distances' of all queries, at least k; else rows are scanned",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(argv)

    from alimm.projects.binary_graph.sources import source_from

    source = source_from(given.queries, column=given.column)
    queries = source.read(0, source.count)
    rows = np.linspace(0, len(queries) - 1, min(given.sample, len(queries))).astype(np.int64)
    truth = _read_truth(given.truth, len(queries), given.k)[rows] if given.truth else None
    with open_index(given.folder) as index:
        if not len(index):
            raise ValueError(f"{given.folder} has no rows to search")
        if index.bits != 64 * source.words:
            raise ValueError(f"the queries have {64 * source.words} bits, the index has {index.bits}")
        k = at_most_rows(given.k, index)
        cold = cold_start(given.folder, queries[0])
        if truth is None:
            truth = true_distances(index, queries[rows], k)
        lines = [measure(index, queries, k, ef, threads, rows, truth) for ef in given.ef for threads in given.threads]
        stats = index.stats()
    if given.json:
        body = {"cold_start_seconds": cold, "k": k, "queries": len(queries), "recall_queries": len(rows)}
        print(json.dumps({**body, "index": stats, "measured": [asdict(line) for line in lines]}, indent=2))
        return 0
    print(f"{stats['rows']:,} rows of {stats['bits']} bits in {stats['segments']} segments; {len(queries):,} queries")
    print(f"cold start: {cold:.2f} s from a new process to the first result")
    head = ["ef", "threads", "queries/s", "batch queries/s", "p50 us", "p95 us", "p99 us", f"recall@{k}"]
    print_table(head, [_cells(line) for line in lines])
    by = f"file {given.truth}" if given.truth else "scan of all rows"
    print(f"recall: tie-aware, of {len(rows)} queries, against the {by}; queries/s and latencies: one query a call")
    return 0


def _cells(line: Measured) -> list[str]:
    speeds = [f"{value:,.0f}" for value in (line.single_qps, line.batch_qps, line.p50_us, line.p95_us, line.p99_us)]
    return [str(line.ef), str(line.threads), *speeds, f"{line.recall:.4f}"]


def measure(
    index: BinaryGraph,
    queries: NDArray[np.uint64],
    k: int,
    ef: int,
    threads: int,
    rows: NDArray[np.int64],
    truth: NDArray[np.int32],
) -> Measured:
    """Search all queries one by one in so many threads, then all in one call.

    Args:
        index: what is searched.
        queries: (Q, W).
        k: rows for each query.
        ef: width of the beam.
        threads: at least 1.
        rows: (S,), the queries that recall is measured on.
        truth: (S, k), their true distances; -1 past the end.
    """
    index.search(queries[:1], k, ef=ef)  # whatever is done once is not part of the speed
    nanoseconds = np.zeros(len(queries), np.int64)

    def run(first: int) -> None:
        for row in range(first, len(queries), threads):
            start = time.perf_counter_ns()
            index.search(queries[row : row + 1], k, ef=ef)
            nanoseconds[row] = time.perf_counter_ns() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(threads)))
    single = time.perf_counter() - start
    start = time.perf_counter()
    distances, _ = index.search(queries, k, ef=ef, threads=threads)
    batch = time.perf_counter() - start
    p50, p95, p99 = np.percentile(nanoseconds, [50, 95, 99]) / 1000
    recall = recall_by_distance(distances[rows], truth)
    count = len(queries)
    return Measured(ef, threads, count / single, count / batch, float(p50), float(p95), float(p99), recall)


def recall_by_distance(found: NDArray[np.int32], truth: NDArray[np.int32]) -> float:
    """Tie-aware recall of distances, both (Q, k), ascending, -1 past the end; a query without a truth counts as found.

    Equal to ``alimm.search.recall_at_k`` where the distances found are those of distinct rows.
    """
    there = truth >= 0
    counts = there.sum(axis=1)
    farthest = np.where(there, truth, -1).max(axis=1)
    hits = ((found >= 0) & (found <= farthest[:, None])).sum(axis=1)
    shares = np.minimum(hits, counts) / np.maximum(counts, 1)
    return float(np.where(counts > 0, shares, 1.0).mean())


def true_distances(index: BinaryGraph, queries: NDArray[np.uint64], k: int) -> NDArray[np.int32]:
    """Distances of the k nearest live rows of each query by a scan of all of them, (Q, k), -1 past the end."""
    from alimm.projects.binary_graph.delta import merge, scan
    from alimm.projects.binary_graph.parts import gather

    view = index._view
    best = merge([view.delta.search(queries, k)], len(queries), k)
    for part in view.parts:
        for codes, ids in gather(part.segment, part.live_rows()):
            best = merge([best, scan(queries, codes, ids, k)], len(queries), k)
    return best[0]


def _read_truth(path: Path, queries: int, k: int) -> NDArray[np.int32]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            distances = np.asarray(file["distances"])
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no .npz file with the array 'distances': {error}") from error
    if distances.dtype.kind == "f" and (distances == np.rint(distances)).all():
        raise ValueError(
            f"{path} must hold whole 'distances', got {distances.dtype}: save them as distances.astype(numpy.int32)"
        )
    if distances.ndim != 2 or len(distances) != queries or distances.shape[1] < k or distances.dtype.kind not in "iu":
        raise ValueError(
            f"{path} must hold whole 'distances' of {queries} queries, at least {k} each; got {distances.dtype} "
            f"{distances.shape}"
        )
    return distances[:, :k].astype(np.int32)


def cold_start(folder: str, query: NDArray[Any]) -> float:
    """Seconds that a new process takes to open the index and to search once.

    Raises:
        ValueError: it failed; with what it said last.
    """
    start = time.perf_counter()
    words = [sys.executable, "-c", _COLD, folder, query.astype("<u8").tobytes().hex()]
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"a search in a new process failed: {last}")
    return time.perf_counter() - start
