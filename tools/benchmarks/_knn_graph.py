"""Building the KNN graph of the classes: our certified half-precision build against faiss's exact search.

Rows in clusters of about fifty, as classes lie; both sides find the 16 nearest rows of every row with the same threads.
faiss's IndexFlatIP compares in float32 and finds one more, the row itself. The whole build is timed on both sides, one
after the other, `ROUNDS` times; the ratio of the times is the result. Memory and thread pools are warmed up before.

Recall is counted with regard to ties: a row that faiss lists is found if ours lists it, or if its similarity, computed
in double precision, does not exceed the last one of our list by more than float32's error. So a recall of one says
that faiss found nobody that we missed.
"""

from __future__ import annotations

from typing import Any

import faiss
import numba
import numpy as np
import torch

from alimm.distributed import RowShards, Sharding
from alimm.projects.knn_softmax.graph_build import KNNLists, build_lists
from alimm.projects.knn_softmax.graph_units import similarity, unit_rows
from alimm.report.benchmark import Claim, print_table
from alimm.report.statistics import interleave, ratio
from alimm.seeding import stream_seed

ROWS, QUICK_ROWS, DIM, K = 200_000, 4_000, 128, 16
CLUSTER, NOISE, ROUNDS = 50, 0.7, 2
FAISS_ERROR = 2.0**-24 * (DIM + 8)
"""Of a sum of DIM products in float32."""


def clustered(rows: int, seed: int) -> torch.Tensor:
    """Rows around random centres, float32 (rows, DIM)."""
    generator = torch.Generator().manual_seed(stream_seed(seed, "knn_graph"))
    centres = torch.randn(rows // CLUSTER, DIM, generator=generator)
    member = torch.randint(len(centres), (rows,), generator=generator)
    return centres[member] + NOISE * torch.randn(rows, DIM, generator=generator)


def measure(quick: bool, seed: int, threads: int = 2) -> list[Claim]:
    """Time both, compare their lists.

    Args:
        quick: few rows, to try the machinery.
        seed: of the rows.
        threads: of both sides.
    """
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    weight = clustered(QUICK_ROWS if quick else ROWS, seed)
    units = np.ascontiguousarray(unit_rows(weight).numpy())
    found: dict[str, Any] = {}

    def ours(rows: torch.Tensor = weight) -> None:
        found["ours"] = build_lists(rows, Sharding(RowShards((len(rows),))), K)

    def theirs(rows: np.ndarray = units) -> None:
        # As a user would: from rows of length one to ids. The time to normalise, which is ours alone, is negligible.
        index = faiss.IndexFlatIP(DIM)
        index.add(rows)
        found["faiss"] = index.search(rows, K + 1)[1]

    ours(weight[:QUICK_ROWS])
    theirs(units[:QUICK_ROWS])
    times = interleave({"ours": ours, "faiss": theirs}, 1 if quick else ROUNDS, 0)
    gain = ratio(times["faiss"], times["ours"])
    lists: KNNLists = found["ours"]
    recall = recall_of(lists, found["faiss"], torch.from_numpy(units))
    print_table(
        f"KNN graph of {len(units):,} rows, D = {DIM}, K = {K}, {threads} threads",
        ["", "median s", "GFLOP/s of all N^2 pairs"],
        [[name, f"{t:.1f}", f"{2e-9 * DIM * len(units) ** 2 / t:.0f}"] for name, t in _medians(times)],
    )
    print(f"{lists.report}\n")
    proven = lists.report.certified
    return [
        Claim(
            "KNN graph, time of faiss over ours",
            f"{gain.median:.2f}x ({gain.q1:.2f}-{gain.q3:.2f})",
            "at least 1x",
            gain.median >= 1,
        ),
        Claim(
            "KNN graph, recall of faiss's lists",
            f"{recall:.6f}, {proven:.4%} certified at once, {lists.report.redone} rows done again exactly",
            "recall 1, all rows certified or done again",
            recall == 1 and round((1 - proven) * len(units)) <= lists.report.redone,
        ),
    ]


def _medians(times: dict[str, list[float]]) -> list[tuple[str, float]]:
    return [(name, float(np.median(values))) for name, values in times.items()]


def recall_of(lists: KNNLists, other: np.ndarray, units: torch.Tensor, step: int = 4096) -> float:
    """The share of another side's neighbours that are in our lists or no nearer than the last of them.

    Args:
        lists: ours.
        other: ids (N, K + 1), the row itself perhaps among them.
        units: the unit rows.
        step: rows at a time.
    """
    good = count = 0
    theirs = torch.from_numpy(other)
    for start in range(0, len(units), step):
        ids = theirs[start : start + step]
        own = torch.arange(start, start + len(ids))[:, None]
        # Without the row itself; where copies crowded it out, without the last.
        order = (ids == own).int().argsort(dim=1, stable=True)[:, :K]
        ids = ids.gather(1, order)
        exact = similarity(units[start : start + step, None], units[ids.clamp(min=0)])
        listed = (ids[:, :, None] == lists.neighbours[start : start + step, None, :].long()).any(2)
        tied = exact <= lists.similarity[start : start + step, -1:] + FAISS_ERROR
        good += int(((listed | tied) & (ids >= 0)).sum())
        count += int((ids >= 0).sum())
    return good / max(1, count)
