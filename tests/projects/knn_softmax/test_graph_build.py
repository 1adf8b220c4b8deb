"""The KNN lists: equal to brute force bit for bit, whatever the ranks, tiles, threads, precision; proofs that hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import permutations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from torch import Tensor

from alimm.distributed import RowShards, Sharding
from alimm.projects.knn_softmax import graph_build, graph_cpu, graph_torch
from alimm.projects.knn_softmax.graph_build import build_lists, exact_lists
from alimm.projects.knn_softmax.graph_cpu import CpuSearch
from alimm.projects.knn_softmax.graph_search import Clock, Search
from alimm.projects.knn_softmax.graph_torch import TorchSearch
from alimm.projects.knn_softmax.graph_units import (
    DTYPES,
    choose_precision,
    output_slack,
    plain_arithmetic,
    rounding_errors,
    similarity,
    tolerance,
    unit_rows,
)
from alimm_ops.graph import topk_reference as reference
from tests.gloo_pool import GlooPool

BOTH = pytest.mark.parametrize("backend", ["exact", "torch"])
PRECISIONS = pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])


def hard_rows(rows: int, dim: int, seed: int = 0) -> Tensor:
    """Clusters, some so tight that bf16 cannot tell their members apart, copies, multiples and zero rows."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(1, rows // 20), dim, generator=generator)
    member = torch.randint(len(centres), (rows,), generator=generator)
    spread = torch.tensor([1.0, 0.1, 1e-3, 1e-5])[member % 4, None]
    weight = (centres[member] + spread * torch.randn(rows, dim, generator=generator)) * 3
    if rows > 60:
        weight[5] = weight[50] = 0
        weight[20:30] = weight[20]
        weight[31] = 2 * weight[30]
        weight[40] = -weight[41]
    return weight


def brute_force(weight: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair in double precision, rounded once; sorted by (similarity descending, row ascending)."""
    units = reference.unit_rows(weight.numpy())
    count = len(units)
    ids, best = np.full((count, k), -1, np.int64), np.full((count, k), -np.inf, np.float32)
    for row in range(count):
        found = reference.similarity(units[row], units)
        others = np.delete(np.arange(count), row)
        order = others[np.lexsort((others, -found[others]))][:k]
        ids[row, : len(order)], best[row, : len(order)] = order, found[order]
    return ids, best


def alone(rows: int) -> Sharding:
    return Sharding(RowShards((rows,)))


def check(lists: graph_build.KNNLists, true: tuple[np.ndarray, np.ndarray], part: slice = slice(None)) -> None:
    assert lists.neighbours.dtype == torch.int32
    assert lists.similarity.dtype == torch.float32
    assert np.array_equal(lists.neighbours.numpy(), true[0][part])
    assert np.array_equal(lists.similarity.numpy().view(np.int32), true[1][part].view(np.int32))


@BOTH
@PRECISIONS
@pytest.mark.parametrize("candidates", [None, 7])
def test_equals_brute_force(backend: str, precision: str, candidates: int | None) -> None:
    weight = hard_rows(300, 20)
    true = brute_force(weight, 7)
    for tile in [None, (64, 33), (400, 50), (7, 301)]:
        lists = build_lists(weight, alone(300), 7, backend, candidates, precision, tile)
        check(lists, true)
        assert lists.report.precision == precision
        assert lists.report.redone == round((1 - lists.report.certified) * 300)
        assert (lists.report.redone > 0) == (candidates is not None)  # such rows need room, or a second look


@BOTH
@pytest.mark.parametrize(("rows", "dim", "k"), [(0, 3, 2), (1, 3, 2), (2, 1, 1), (3, 4, 5), (33, 2, 32), (40, 1, 60)])
def test_few_rows(backend: str, rows: int, dim: int, k: int) -> None:
    weight = hard_rows(rows, dim)
    lists = build_lists(weight, alone(rows), k, backend)
    check(lists, brute_force(weight, k))
    assert lists.neighbours.shape == (rows, k)


@BOTH
def test_copies_and_zeros(backend: str) -> None:
    weight = torch.ones(90, 4)
    weight[70:] = 0
    weight[:3] = torch.tensor([1.0, 2.0, -1.0, 0.5])
    lists = build_lists(weight, alone(90), 4, backend, 4, "bf16", (32, 16))
    check(lists, brute_force(weight, 4))
    assert lists.neighbours[0].tolist()[:2] == [1, 2]
    assert lists.neighbours[50].tolist() == [3, 4, 5, 6]
    assert (lists.similarity[50] == 1).all()
    assert lists.neighbours[89].tolist() == [0, 1, 2, 3]
    assert (lists.similarity[70:] == 0).all()


def test_other_types_and_strides() -> None:
    weight = hard_rows(80, 9)
    true = brute_force(weight, 3)
    check(build_lists(weight.t().contiguous().t(), alone(80), 3), true)
    check(build_lists(weight.double(), alone(80), 3), true)
    half = weight.bfloat16()
    check(build_lists(half, alone(80), 3), brute_force(half.float(), 3))
    parameter = torch.nn.Parameter(weight)
    check(build_lists(parameter, alone(80), 3), true)


def test_wide_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = hard_rows(100, 9)
    true = brute_force(weight, 3)
    monkeypatch.setattr(graph_build, "INT32_ROWS", 100)
    lists = build_lists(weight, alone(100), 3)
    assert lists.neighbours.dtype == torch.int64
    assert np.array_equal(lists.neighbours.numpy(), true[0])


def test_threads_do_not_matter() -> None:
    weight = hard_rows(700, 33)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(build_lists(weight, alone(700), 9, tile=(128, 256)))
    finally:
        torch.set_num_threads(before)
    assert found[0].neighbours.equal(found[1].neighbours)
    assert found[0].similarity.equal(found[1].similarity)


def _on_ranks(sizes: tuple[int, ...], k: int, backend: str, tile: tuple[int, int]) -> tuple[Tensor, Tensor, float, int]:
    sharding = Sharding(RowShards(sizes), dist.get_rank(), None)
    weight = hard_rows(sum(sizes), 12)[sharding.start : sharding.stop]
    lists = build_lists(weight, sharding, k, backend, k + 4, "bf16", tile)
    return lists.neighbours, lists.similarity, lists.report.certified, lists.report.redone


@pytest.mark.parametrize(
    ("sizes", "backend", "tile"),
    [
        ((101, 100), "exact", (64, 32)),
        ((150, 0), "torch", (500, 70)),
        ((40, 0, 90, 71), "exact", (30, 50)),
        ((0, 0, 1, 2), "exact", (8, 8)),
        ((60, 60, 60, 60), "torch", (33, 100)),
    ],
)
def test_ranks_do_not_matter(gloo: GlooPool, sizes: tuple[int, ...], backend: str, tile: tuple[int, int]) -> None:
    true = brute_force(hard_rows(sum(sizes), 12), 5)
    results = gloo.run(len(sizes), _on_ranks, sizes, 5, backend, tile)
    shards = RowShards(sizes)
    for rank, (ids, best, certified, redone) in enumerate(results):
        part = slice(shards.start(rank), shards.stop(rank))
        assert np.array_equal(ids.numpy(), true[0][part])
        assert np.array_equal(best.numpy(), true[1][part])
        assert (certified, redone) == results[0][2:]


def _bad_row() -> str:
    sharding = Sharding(RowShards((4, 5)), dist.get_rank(), None)
    weight = torch.ones(sharding.size, 3)
    if dist.get_rank() == 1:
        weight[2, 1] = torch.nan
    with pytest.raises(ValueError, match="row 6 of the weight is not finite") as caught:
        build_lists(weight, sharding, 2)
    return str(caught.value)


def test_every_rank_raises(gloo: GlooPool) -> None:
    assert "(on rank 1 of 2)" in gloo.run(2, _bad_row)[0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite(value: float) -> None:
    weight = torch.ones(9, 3)
    weight[7, 0] = value
    with pytest.raises(ValueError, match="row 7 of the weight is not finite"):
        build_lists(weight, alone(9), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(k=0), "k must be at least 1"),
        (dict(k=3, candidates=2), "candidates at least k"),
        (dict(k=2, tile=(0, 5)), "tile positive"),
        (dict(k=2, backend="cuvs"), "backend must be one of exact"),
        (dict(k=2, precision="int8"), "precision must be 'auto'"),
    ],
)
def test_mistakes(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_lists(torch.ones(5, 2), alone(5), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("shape (6, D)")):
        build_lists(torch.ones(5, 2), alone(6), 2)


@pytest.mark.parametrize("kind", [CpuSearch, TorchSearch])
@settings(max_examples=25)
@given(
    precision=st.sampled_from(["bf16", "fp16", "fp32"]),
    spread=st.sampled_from([1.0, 0.05, 3e-3, 1e-4]),
    width=st.integers(4, 30),
    seed=st.integers(0, 999),
)
def test_a_certificate_is_never_wrong(kind: type[Search], precision: str, spread: float, width: int, seed: int) -> None:
    """Without the second look: a list that is called proven is exact, whatever the ties."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, 6, generator=generator)[torch.randint(5, (120,), generator=generator)]
    units = unit_rows(rows + spread * torch.randn(120, 6, generator=generator))
    ids, best = reference.nearest_rows(units.numpy(), np.arange(120), units.numpy(), 4)
    with plain_arithmetic():
        error = float(rounding_errors(units, precision).max())
        search = kind(units, torch.arange(120), 4, width, precision, error, (50, 40), Clock())
        assert list(search.visit(units, 0, True))[-1] == 1
        proven = search.certified(4)
    assert not search.broken.any()
    assert np.array_equal(search.ids[proven].numpy(), ids[proven.numpy()])
    assert np.array_equal(search.similarity[proven].numpy(), best[proven.numpy()])


def test_most_lists_are_certified_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 64, generator=generator)
    weight = centres[torch.randint(40, (2000,), generator=generator)] + 0.7 * torch.randn(2000, 64, generator=generator)
    report = build_lists(weight, alone(2000), 16, precision="bf16").report
    assert report.certified > 0.99
    assert report.gflop == pytest.approx(2 * 64 * 2000**2 / 2e9, rel=0.55)  # about half of all pairs
    assert set(report.seconds) >= {"units", "product", "scan", "rank", "total"}


@PRECISIONS
@pytest.mark.parametrize("dim", [3, 64, 512])
def test_the_bound_holds_and_is_tight(precision: str, dim: int) -> None:
    units = unit_rows(hard_rows(400, dim))
    with plain_arithmetic():
        rounded = units.to(DTYPES[precision])
        scores = (rounded @ rounded.t()).float()
        errors = rounding_errors(units, precision)
        bound = tolerance(errors, float(errors.max()), units.shape[1], precision)[:, None]
    share = (scores.double() - similarity(units[:, None], units[None])).abs() / (
        bound + output_slack(scores, precision)
    )
    assert share.max() <= 1
    if precision != "fp32":  # whose bound admits truncation
        assert share.max() > 0.25


def test_slack_is_half_the_distance_to_the_neighbour() -> None:
    for precision in ("bf16", "fp16"):
        values = torch.linspace(-1, 1, 4998).to(DTYPES[precision])  # none so small that fp16 has no more digits
        above = (values.view(torch.int16) + 1).view(values.dtype)  # further from zero
        distance = (above.double() - values.double()).abs() / 2
        assert torch.equal(output_slack(values.float(), precision).double(), distance)
    assert not output_slack(torch.randn(5), "fp32").any()


@pytest.mark.parametrize("module", [graph_cpu, graph_torch])
def test_a_product_that_breaks_its_bound_is_found_out(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library whose half precision is worse than anyone promised: all lists are done again, and are exact."""
    weight = hard_rows(150, 8)
    true = brute_force(weight, 4)
    bad = (0.4 * torch.rand(150, 150, generator=torch.Generator().manual_seed(0))).bfloat16()
    if module is graph_cpu:
        product = torch.mm

        def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
            return product(a, b, out=out).add_(bad)

        monkeypatch.setattr(torch, "mm", mm)
        lists = build_lists(weight, alone(150), 4, "exact", 8, "bf16")
    else:

        class Worse(TorchSearch):
            def visit(self, rows_NW: Tensor, first_id: int, same: bool) -> Iterator[float]:
                self.rounded = (self.rounded.float() + 0.3 * torch.rand(self.rounded.shape)).bfloat16()
                return super().visit(rows_NW, first_id, same)

        monkeypatch.setattr(graph_build, "TorchSearch", Worse)
        lists = build_lists(weight, alone(150), 4, "torch", 8, "bf16")
    check(lists, true)
    assert lists.report.redone == 148  # all but the zero rows


def test_exact_lists_of_some_queries() -> None:
    weight = hard_rows(200, 9)
    ids, best = brute_force(weight, 6)
    units, chosen = unit_rows(weight), torch.tensor([5, 22, 199])
    got_ids, got = exact_lists(units[chosen], chosen, units, 0, 6, Clock())
    assert np.array_equal(got_ids.numpy(), ids[chosen])
    assert np.array_equal(got.numpy(), best[chosen])


def test_units_equal_the_reference() -> None:
    weight = torch.cat([hard_rows(100, 11) * 10.0**e for e in (-30, 0, 30)])
    assert np.array_equal(unit_rows(weight).numpy(), reference.unit_rows(weight.numpy()))
    units = unit_rows(weight)
    true = reference.similarity(units[:50, None].numpy(), units[None].numpy())
    assert np.array_equal(similarity(units[:50, None], units[None]).numpy().view(np.int32), true.view(np.int32))
    # One, minus one and a trifle: what is left of the trifle tells the order of the sum.
    places = torch.tensor(list(permutations(range(16), 3)))
    x = torch.zeros(len(places), 16).scatter_(1, places, torch.tensor([[1, -1, 2.0**-30]]).expand(len(places), 3))
    assert np.array_equal(similarity(x, x.abs()).numpy(), reference.similarity(x.numpy(), x.abs().numpy()))


def test_settings_come_back() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with plain_arithmetic():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_progress_and_precision() -> None:
    seen: list[tuple[str, float]] = []
    build_lists(hard_rows(300, 20), alone(300), 7, "exact", 7, "bf16", (64, 64), lambda *now: seen.append(now))
    assert [share for phase, share in seen if phase == "search"] == pytest.approx(
        [64 / 300, 128 / 300, 192 / 300, 256 / 300, 1]
    )
    assert seen[-1] == ("redo in fp32", 1)
    assert choose_precision("auto", torch.device("cuda")) == "fp16"
    assert choose_precision("auto", torch.device("cpu")) in ("bf16", "fp32")


@pytest.mark.parametrize("backend", ["faiss_flat", "faiss_ivf"])
def test_faiss(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(30, 16, generator=generator)
    weight = centres[torch.randint(30, (1500,), generator=generator)] + 0.5 * torch.randn(1500, 16, generator=generator)
    weight[7] = 0
    ids, best = brute_force(weight, 5)
    lists = build_lists(weight, alone(1500), 5, backend)
    same = (lists.neighbours.numpy() == ids).all(1)
    assert lists.report.recall == pytest.approx(np.mean(lists.neighbours.numpy() == ids), abs=0.05)
    if backend == "faiss_flat":
        check(lists, (ids, best))
        assert lists.report.recall == 1
    assert same.mean() > 0.8
    assert np.array_equal(lists.similarity.numpy()[same], best[same])
    assert (lists.neighbours >= 0).all()
    assert (lists.neighbours != torch.arange(1500)[:, None]).all()
    check(build_lists(weight[:1], alone(1), 2, backend), brute_force(weight[:1], 2))


def test_faiss_needs_one_rank() -> None:
    with pytest.raises(ValueError, match="row"):
        build_lists(torch.full((3, 2), torch.nan), alone(3), 1, "faiss_flat")
    sharding = Sharding(RowShards((3, 0)))
    message = graph_build._mistake(torch.ones(3, 2), sharding, 1, "faiss_ivf", 4, (8, 8))
    assert message is not None
    assert "one rank" in message
