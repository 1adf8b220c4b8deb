"""The lists of the K nearest rows of every row of a sharded weight, exactly.

Song et al., Large-Scale Training System for 100-Million Classification at Alibaba, KDD 2020: the KNN graph of the
classes comes from a linear search over the normalised rows of the last layer, in half precision, with the shards going
round a ring of ranks::

    list(i) = the K rows j != i of largest <w_i, w_j> / (|w_i| |w_j|)

We follow this. Ours: a half-precision score only picks candidates; their similarity is computed exactly, and a bound of
the error of the scores certifies each list; lists that fail are done again in float32. So the result is exact and the
same bit for bit whatever the number of ranks, threads, the tile, the device and the precision. Ties go to the smaller
row. Where the paper's build stops (candidates, the redo) could not be read; see ``graph_units.py`` for the bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alimm.distributed import Sharding, raise_together
from alimm.projects.knn_softmax.graph_cpu import CpuSearch
from alimm.projects.knn_softmax.graph_ring import largest, ring, total
from alimm.projects.knn_softmax.graph_search import Clock, Search
from alimm.projects.knn_softmax.graph_torch import TorchSearch
from alimm.projects.knn_softmax.graph_units import (
    choose_precision,
    first_bad_row,
    plain_arithmetic,
    rounding_errors,
    unit_rows,
)

BACKENDS = ("exact", "torch", "faiss_flat", "faiss_ivf")
CPU_TILE, GPU_TILE = (1024, 2048), (8192, 32768)
"""Rows and columns of a product: a tile stays in the CPU's cache; a GPU wants large ones."""
INT32_ROWS = 2**31
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class BuildReport:
    """How a graph was built.

    Attributes:
        backend: which one.
        precision: of the products that picked the candidates.
        num_rows: rows of all ranks.
        certified: share of all rows whose list was proven exact at once; 0 for faiss, which proves nothing.
        redone: rows of all ranks whose lists were done again, in float32.
        gflop: operations of this rank's matrix products, 1e9.
        seconds: by phase, on this rank, and ``'total'``.
        recall: of faiss's lists, on a sample; 1 for exact lists.
    """

    backend: str
    precision: str
    num_rows: int
    certified: float
    redone: int
    gflop: float
    seconds: dict[str, float] = field(default_factory=dict)
    recall: float = 1.0

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        found = "" if self.recall == 1 else f", recall {self.recall:.3f}"
        return (
            f"{self.backend} in {self.precision}: {self.certified:.2%} of {self.num_rows} rows certified at once, "
            f"{self.redone} done again{found}; {self.gflop:.0f} GFLOP; {phases}"
        )


@dataclass(frozen=True)
class KNNLists:
    """The lists of the own rows.

    Attributes:
        neighbours: global rows, int32 (n_local, K), int64 from 2^31 rows on; best first, ties by row, -1 past the end.
        similarity: cosines, float32 (n_local, K); minus infinity past the end.
        report: how they were built.
    """

    neighbours: Tensor
    similarity: Tensor
    report: BuildReport


def build_lists(
    rows: Tensor,
    sharding: Sharding,
    k: int,
    backend: str = "exact",
    candidates: int | None = None,
    precision: str = "auto",
    tile: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> KNNLists:
    """Find the K nearest rows of each own row among the rows of all ranks. Every rank must call it.

    A zero row has the similarity 0 with everyone. A row is never its own neighbour, its copies are.

    Args:
        rows: the own shard of the weight, floating (n_local, D), finite; need not be normalised.
        sharding: which rows these are.
        k: length of the lists, at least 1.
        backend: ``'exact'``; ``'torch'`` is the same on a path that runs on any device (and is taken on CUDA);
            ``'faiss_flat'`` and ``'faiss_ivf'`` for a single rank on the CPU, whose recall is measured, not proven.
        candidates: how many rows to keep for the exact comparison, at least k; None chooses.
        precision: of the first product: ``'bf16'``, ``'fp16'``, ``'fp32'`` or ``'auto'``, the fastest here. The lists
            do not depend on it.
        tile: rows and columns of one product; None chooses. The lists do not depend on it.
        progress: called now and then with a phase and the share done, 0 to 1.

    Raises:
        ValueError: the shape does not fit the sharding, a row is not finite (the first is named), an option is unknown.
            Every rank raises.
    """
    start = time.perf_counter()
    precision = choose_precision(precision, rows.device)
    width = k + max(48, k) if candidates is None else candidates
    if tile is None:
        tile = GPU_TILE if rows.device.type == "cuda" else CPU_TILE
    raise_together(_mistake(rows, sharding, k, backend, width, tile), sharding.group, rows.device)
    clock = Clock()
    with torch.no_grad(), plain_arithmetic():
        with clock.phase("units"):
            units = unit_rows(rows)
        if backend.startswith("faiss"):
            from alimm.projects.knn_softmax.graph_faiss import faiss_lists

            ids, similarity, recall = faiss_lists(units, k, backend, width, clock)
            facts: dict[str, float] = dict(certified=0.0, redone=0, recall=recall)
            precision = "fp32"
        else:
            search = _search(units, sharding, k, width, precision, tile, backend, clock)
            facts = exact_search(search, lambda: _shards(units, sharding), sharding, progress)
            ids, similarity = search.ids, search.similarity
    if sharding.shards.num_rows < INT32_ROWS:
        ids = ids.int()
    seconds = {**clock.seconds, "total": time.perf_counter() - start}
    facts.setdefault("recall", 1.0)
    report = BuildReport(
        backend,
        precision,
        sharding.shards.num_rows,
        facts["certified"],
        int(facts["redone"]),
        clock.flop / 1e9,
        seconds,
        facts["recall"],
    )
    return KNNLists(ids, similarity, report)


def _mistake(rows: Tensor, sharding: Sharding, k: int, backend: str, width: int, tile: tuple[int, int]) -> str | None:
    if backend not in BACKENDS:
        return f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}"
    if backend.startswith("faiss") and (sharding.world_size > 1 or rows.device.type != "cpu"):
        return (
            f"{backend} works on one rank on the CPU, got {sharding.world_size} ranks on {rows.device.type}: "
            "use backend='exact'"
        )
    if rows.ndim != 2 or not rows.is_floating_point() or len(rows) != sharding.size or not rows.shape[1]:
        return (
            f"rows must be floating of shape ({sharding.size}, D), the own shard of the weight; "
            f"got {rows.dtype} of shape {tuple(rows.shape)}"
        )
    if k < 1 or width < k or min(tile) < 1:
        return f"k must be at least 1, candidates at least k, tile positive; got {k}, {width} and {tile}"
    bad = first_bad_row(rows)
    if bad is not None:
        return f"row {sharding.start + bad} of the weight is not finite (NaN or infinity); no graph can be built of it"
    return None


def _search(
    units: Tensor,
    sharding: Sharding,
    k: int,
    width: int,
    precision: str,
    tile: tuple[int, int],
    backend: str,
    clock: Clock,
) -> Search:
    error = float(rounding_errors(units, precision).max()) if len(units) else 0.0
    error = largest(error, units.device, sharding)
    ids = torch.arange(sharding.start, sharding.stop, device=units.device)
    if backend == "exact" and units.device.type == "cpu":
        wide = sharding.shards.num_rows >= INT32_ROWS
        return CpuSearch(units, ids, k, width, precision, error, tile, clock, wide)
    return TorchSearch(units, ids, k, width, precision, error, tile, clock)


def _shards(units: Tensor, sharding: Sharding) -> Iterable[tuple[int, Tensor]]:
    """First row and unit rows of every shard, the own one first."""
    return ((sharding.shards.start(owner), rows) for owner, rows in ring(units, sharding))


def exact_lists(
    queries_QW: Tensor, query_ids_Q: Tensor, rows_NW: Tensor, first_id: int, k: int, clock: Clock
) -> tuple[Tensor, Tensor]:
    """The exact lists of some queries among the rows of one shard, on this rank alone.

    Args:
        queries_QW: unit rows.
        query_ids_Q: their global rows, int64.
        rows_NW: unit rows of a shard.
        first_id: its first global row.
        k: length of the lists.
        clock: where the time goes.

    Returns:
        ids int64 (Q, K), similarities (Q, K), as in `KNNLists`.
    """
    kind = CpuSearch if rows_NW.device.type == "cpu" else TorchSearch
    tile = CPU_TILE if rows_NW.device.type == "cpu" else GPU_TILE
    search = kind(queries_QW, query_ids_Q, k, k, "fp32", 0.0, tile, clock)
    search.empty(select := torch.arange(len(queries_QW), device=queries_QW.device))
    for precision in ("fp32", "fp64"):
        search.broken[:] = False
        for _ in search.revisit(select, rows_NW, first_id, precision, search.similarity[:, 0].clone()):
            pass
        select = search.broken.nonzero()[:, 0]
        if not len(select):
            break
        search.empty(select)
    return search.ids, search.similarity


def exact_search(
    search: Search,
    shards: Callable[[], Iterable[tuple[int, Tensor]]],
    sharding: Sharding,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Fill the lists of a search; they are exact afterwards.

    Args:
        search: of this rank.
        shards: gives the first row and the unit rows of every shard, anew at each call.
        sharding: whose ranks work together.
        progress: as in `build_lists`.

    Returns:
        ``certified``: the share of all queries proven at once; ``redone``: how many were done again.
    """
    num_rows, device = sharding.shards.num_rows, search.ids.device
    for step, (first_id, rows) in enumerate(shards()):
        for share in search.visit(rows, first_id, rows is search.queries):
            if progress is not None:
                progress("search", (step + share) / sharding.world_size)
    neighbours = max(0, min(search.k, num_rows - 1))
    done = search.certified(neighbours)
    queries = total(len(done), device, sharding)
    open_rows = total(int((~done).sum()), device, sharding)
    redone = 0
    for precision in ("fp32", "fp64"):
        # A score beyond its bound would void the proofs of all rows, on every rank.
        if total(int(search.broken.sum()), device, sharding):
            done = search.is_zero.clone()
        waiting = total(int((~done).sum()), device, sharding)
        if not waiting:
            break
        redone = max(redone, waiting)
        with search.clock.phase("redo"):
            _redo(search, done, shards, precision, neighbours, sharding.world_size, progress)
        done[:] = True
    assert not total(int(search.broken.sum()), device, sharding), "a product in float64 missed its bound"
    search.fill_zero_rows(num_rows)
    return dict(certified=1 - open_rows / queries if queries else 1.0, redone=redone)


def _redo(
    search: Search,
    done: Tensor,
    shards: Callable[[], Iterable[tuple[int, Tensor]]],
    precision: str,
    neighbours: int,
    world_size: int,
    progress: Progress | None,
) -> None:
    select = (~done).nonzero()[:, 0]
    # What a list holds was computed exactly, so its end is a floor, whatever the list misses.
    floors = search.similarity[:, neighbours - 1].clone()
    search.broken[:] = False
    search.empty(select)
    for step, (first_id, rows) in enumerate(shards()):
        for share in search.revisit(select, rows, first_id, precision, floors):
            if progress is not None:
                progress(f"redo in {precision}", (step + share) / world_size)
