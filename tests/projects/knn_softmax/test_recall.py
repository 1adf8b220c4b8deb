"""How stale a graph is: recall against slow sets, equal on all ranks; coverage against a loop; when to rebuild."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from alimm.distributed import RowShards, Sharding
from alimm.projects.knn_softmax.recall import RefreshPolicy, sampled_rows, softmax_coverage, stale_recall
from alimm_ops.graph import topk_reference as reference
from tests.gloo_pool import GlooPool

ROWS, K = 90, 4


def weights() -> tuple[Tensor, Tensor]:
    """The rows of a graph, and where they have moved since; copies and a zero row among them."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(ROWS, 7, generator=generator)
    before[10:18] = before[10]
    before[30] = 0
    return before, before + 0.3 * torch.randn(ROWS, 7, generator=generator)


def lists(weight: Tensor) -> Tensor:
    units = reference.unit_rows(weight.numpy())
    return torch.from_numpy(reference.nearest_rows(units, np.arange(len(units)), units, K)[0])


def _recall(sizes: tuple[int, ...], sample: int) -> list[float]:
    sharding = Sharding(RowShards(sizes), dist.get_rank() if len(sizes) > 1 else 0, None)
    before, now = weights()
    own = slice(sharding.start, sharding.stop)
    stored = lists(before)[own].int()
    return [stale_recall(stored, weight[own], sharding, sample, 3, 17) for weight in (before, now)]


def test_recall_against_sets() -> None:
    stored, true = lists(weights()[0]), lists(weights()[1])
    for sample in (1, 20, 1000):
        rows = sampled_rows(ROWS, sample, 3, 17).tolist()
        slow = [len(set(stored[row].tolist()) & set(true[row].tolist())) / K for row in rows]
        unchanged, recall = _recall((ROWS,), sample)
        assert unchanged == 1
        assert recall == pytest.approx(sum(slow) / len(slow))
        assert sample == 1 or 0.1 < recall < 0.95


@pytest.mark.parametrize("sizes", [(45, 45), (0, 60, 29, 1)])
def test_recall_is_the_same_on_all_ranks(gloo: GlooPool, sizes: tuple[int, ...]) -> None:
    results = gloo.run(len(sizes), _recall, sizes, 25)
    assert results == [_recall((ROWS,), 25)] * len(sizes)


def test_recall_of_short_lists() -> None:
    weight = torch.randn(3, 5)
    stored = torch.tensor([[1, 2, -1, -1], [0, 2, -1, -1], [0, -1, -1, -1]])
    assert stale_recall(stored, weight, Sharding(RowShards((3,))), 9, 0, 0) == pytest.approx(2.5 / 3)
    assert stale_recall(torch.full((1, 4), -1), weight[:1], Sharding(RowShards((1,))), 9, 0, 0) == 1
    assert stale_recall(torch.empty(0, 4), weight[:0], Sharding(RowShards((0,))), 9, 0, 0) == 1


def test_sampled_rows() -> None:
    first = sampled_rows(1000, 50, 0, 1)
    assert len(first.unique()) == 50
    assert first.equal(first.sort().values)
    assert first.equal(sampled_rows(1000, 50, 0, 1))
    assert not first.equal(sampled_rows(1000, 50, 0, 2))
    assert not first.equal(sampled_rows(1000, 50, 1, 1))
    assert sampled_rows(5, 50, 0, 0).tolist() == [0, 1, 2, 3, 4]


def test_mistakes() -> None:
    sharding = Sharding(RowShards((3,)))
    with pytest.raises(ValueError, match="own 3 rows"):
        stale_recall(torch.zeros(2, 1), torch.ones(3, 2), sharding, 5, 0, 0)
    with pytest.raises(ValueError, match="sample must be at least 1"):
        stale_recall(torch.zeros(3, 1), torch.ones(3, 2), sharding, 0, 0, 0)
    with pytest.raises(ValueError, match="row 1 of the weight is not finite"):
        stale_recall(torch.zeros(3, 1), torch.tensor([[1.0], [torch.nan], [0.0]]), sharding, 5, 0, 0)


def test_coverage_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(6, 9, generator=generator)
    labels = torch.tensor([0, 8, 3, -1, 3, 5])
    for active in (torch.rand(9, generator=generator) < 0.5, torch.rand(6, 9, generator=generator) < 0.5):
        shares = []
        for i, label in enumerate(labels.tolist()):
            if label >= 0:
                mass = {j: math.exp(logits[i, j]) for j in range(9) if j != label}
                held = active if active.ndim == 1 else active[i]
                shares.append(sum(value for j, value in mass.items() if held[j]) / sum(mass.values()))
        assert softmax_coverage(logits, active, labels) == pytest.approx(sum(shares) / len(shares))
    everyone = torch.ones(9, dtype=torch.bool)
    assert softmax_coverage(logits + 1e4, everyone, labels) == pytest.approx(1)
    assert softmax_coverage(logits, ~everyone, labels) == 0
    assert math.isnan(softmax_coverage(logits[3:4], everyone, labels[3:4]))
    with pytest.raises(ValueError, match="active must be bool of shape"):
        softmax_coverage(logits, torch.ones(8, dtype=torch.bool), labels)
    with pytest.raises(ValueError, match="classes below 9"):
        softmax_coverage(logits, everyone, torch.full((6,), 9))


def test_refresh_policy() -> None:
    policy = RefreshPolicy(interval_max=100, recall_min=0.7, interval_min=10)
    assert policy.due(0, None, None)
    assert policy.due(5, None, -1)
    assert not policy.due(50, None, 0)
    assert not policy.due(99, 0.7, 0)
    assert policy.due(99, 0.69, 0)
    assert policy.due(100, 1.0, 0)
    assert not policy.due(9, 0.0, 0)
    assert policy.due(10, math.nan, 0)
    assert not RefreshPolicy().due(10**9, 0.9, 0)
    assert not RefreshPolicy().due(7, 0.0, 7)  # just built
    due = [RefreshPolicy(30, 0.5).due(step, 1 - step / 40, 0) for step in range(1, 40)]
    assert due.index(True) == 20  # step 21: the recall falls below 0.5 before the graph is too old
    assert all(later >= now for now, later in pairwise(due))


@pytest.mark.parametrize("options", [dict(recall_min=1.1), dict(interval_max=-1), dict(interval_max=5, interval_min=6)])
def test_policy_mistakes(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="interval"):
        RefreshPolicy(**options)  # type: ignore[arg-type]
