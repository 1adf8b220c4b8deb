"""The KNN softmax head: which classes a step computes, what it saves, and the hook that builds its graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from alimm.distributed import rank_and_size
from alimm.heads.sharded_state import shards_left_out
from alimm.projects.knn_softmax import KNNGraphHook, KNNSoftmaxHead
from alimm.registry import HOOKS, MODELS
from alimm.structures import ClsDataSample


def samples(labels: Sequence[int]) -> list[ClsDataSample]:
    return [ClsDataSample().set_gt_label(label) for label in labels]


def brute_lists(weight: torch.Tensor, k: int) -> torch.Tensor:
    similarity = F.normalize(weight.double()) @ F.normalize(weight.double()).T
    return similarity.fill_diagonal_(-2).topk(k, dim=1).indices


def active_rows(head: KNNSoftmaxHead, labels: list[int], dim: int = 8) -> set[int]:
    head.weight.grad = None
    head.loss(torch.randn(len(labels), dim), samples(labels))["loss"].backward()
    return set(head.weight.grad.coalesce().indices()[0].tolist())


@pytest.mark.parametrize("storage", ["edges", "lists"])
def test_active_classes_are_labels_and_their_nearest(storage: str) -> None:
    head = KNNSoftmaxHead(400, 8, neighbours=6, active=40, storage=storage)
    head.build_graph()
    lists = brute_lists(head.weight.detach(), 6)
    labels = [3, 77, 200]
    rows = head.permutation.rows(torch.tensor(labels))
    found = active_rows(head, labels)
    assert len(found) == 40
    assert set(rows.tolist()) | set(lists[rows].flatten().tolist()) <= found
    tight = KNNSoftmaxHead(400, 8, neighbours=6, active=9, storage=storage)
    tight.build_graph()
    found = active_rows(tight, labels)
    assert set(rows.tolist()) | set(lists[rows, :2].flatten().tolist()) >= found or len(found) == 9
    assert set(lists[rows, 0].tolist()) <= found, "first neighbours of all labels come before second ones"


def test_without_a_graph_and_with_another_method_classes_are_random() -> None:
    head = KNNSoftmaxHead(400, 8, neighbours=6, active=40)
    report = head.loss(torch.randn(2, 8), samples([1, 2]))
    assert int(report["active_random"]) == 38
    other = KNNSoftmaxHead(400, 8, "random", neighbours=6, active=40)
    other.build_graph()
    assert int(other.loss(torch.randn(2, 8), samples([1, 2]))["active_random"]) == 38


@pytest.mark.parametrize("method", ["knn", "random", "full", "fused"])
def test_one_word_chooses_the_method(method: str) -> None:
    head = MODELS.build(dict(type="alimm.KNNSoftmaxHead", num_classes=50, in_channels=8, method=method))
    head.loss(torch.randn(2, 8), samples([1, 2]))["loss"].backward()
    assert head.weight.grad.is_sparse == (method in ("knn", "random"))


def test_near_classes_hold_more_of_the_softmax_than_random_ones() -> None:
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(50, 16)).repeat_interleave(20, 0)
    weight = F.normalize(centres + 0.15 * torch.randn(1000, 16))
    coverage = {}
    for method in ("knn", "random"):
        head = KNNSoftmaxHead(1000, 16, method, neighbours=10, active=0.12, scale=64.0, permute="none",
                              coverage_interval=1, coverage_samples=32)  # fmt: skip
        with torch.no_grad():
            head.weight.copy_(weight)
        head.build_graph()
        labels = torch.arange(0, 1000, 125)
        features = weight[labels] + 0.05 * torch.randn(8, 16)
        coverage[method] = float(head.loss(features, samples(labels.tolist()))["coverage"])
    assert coverage["random"] < 0.25
    assert coverage["knn"] > 3 * coverage["random"]


def test_state_brings_the_graph_back_and_the_same_selection() -> None:
    head = KNNSoftmaxHead(300, 8, neighbours=5, active=30, seed=2)
    head.loss(torch.randn(2, 8), samples([1, 2]))
    head.build_graph()
    other = KNNSoftmaxHead(300, 8, neighbours=5, active=30, seed=2)
    other.load_state_dict(copy.deepcopy(head.state_dict()))
    assert other.graph_step == 1
    assert other.graph.lists().equal(head.graph.lists())
    assert active_rows(other, [5, 6]) == active_rows(head, [5, 6])
    with shards_left_out():
        assert "neighbours" not in head.state_dict()
    third = KNNSoftmaxHead(300, 8, neighbours=5, active=30, seed=2)
    third.load_shard({"weight": head.weight, **head.shard_arrays()}, head.shard_scalars())
    assert third.graph.lists().equal(head.graph.lists())
    longer = KNNSoftmaxHead(300, 8, neighbours=6, active=30, seed=2)
    longer.load_state_dict(copy.deepcopy(head.state_dict()))
    assert longer.graph is None, "lists of another length are built anew"


def test_a_row_that_is_not_finite_is_named_and_the_old_graph_stays() -> None:
    head = KNNSoftmaxHead(30, 4, neighbours=3)
    head.build_graph()
    before = head.graph
    with torch.no_grad():
        head.weight[7, 2] = torch.nan
    with pytest.raises(ValueError, match="7"):
        head.build_graph()
    assert head.graph is before


@pytest.mark.parametrize("arguments", [dict(neighbours=0), dict(storage="table")])
def test_wrong_settings(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        KNNSoftmaxHead(10, 4, **arguments)


def step_of_rank(sizes_ignored: None) -> dict[str, Any]:
    rank, size = rank_and_size()
    results = {}
    for storage in ("edges", "lists"):
        head = KNNSoftmaxHead(101, 8, neighbours=4, active=1.0, storage=storage, seed=3)
        head.build_graph()
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(8, 8, generator=generator), torch.randint(101, (8,), generator=generator)
        own = slice(rank * 8 // size, (rank + 1) * 8 // size)
        loss = head.loss(x[own], samples(y[own].tolist()))["loss"]
        loss.backward()
        neighbours = head.neighbours(head.permutation.rows(y).unique())
        results[storage] = dict(
            loss=float(loss.detach()),
            lists=head.graph.lists(),
            neighbours=[np.asarray(part).tolist() for part in neighbours],
        )
    return results


@pytest.mark.parametrize("ranks", [2, 4])
def test_graph_and_loss_do_not_depend_on_the_number_of_ranks(gloo: Any, ranks: int) -> None:
    alone = step_of_rank(None)
    results = gloo.run(ranks, step_of_rank, None)
    for storage in ("edges", "lists"):
        assert torch.cat([result[storage]["lists"] for result in results]).equal(alone[storage]["lists"])
        for result in results:
            assert result[storage]["loss"] == pytest.approx(alone[storage]["loss"], rel=1e-6)
            for one, other in zip(result["edges"]["neighbours"], result["lists"]["neighbours"], strict=True):
                assert one == other


def runner_of(model: torch.nn.Module) -> Any:
    scalars: list[tuple[str, float]] = []
    lines: list[str] = []
    return SimpleNamespace(
        model=model,
        iter=0,
        scalars=scalars,
        lines=lines,
        logger=SimpleNamespace(info=lines.append),
        message_hub=SimpleNamespace(update_scalar=lambda key, value: scalars.append((key, value))),
    )


def test_hook_builds_at_start_watches_the_recall_and_builds_anew_when_it_falls() -> None:
    model = torch.nn.ModuleDict(dict(head=KNNSoftmaxHead(200, 8, neighbours=5)))
    head = model["head"]
    hook = HOOKS.build(dict(type="alimm.KNNGraphHook", start=3, check_interval=2, recall_min=0.9, sample=200))
    assert isinstance(hook, KNNGraphHook)
    runner = runner_of(model)
    hook.before_train(runner)
    for iteration in range(3):
        assert head.graph is None
        head.step += 1
        runner.iter = iteration
        hook.after_train_iter(runner, iteration)
    assert head.graph_step == 3
    first = head.graph
    for iteration in range(3, 5):
        head.step += 1
        runner.iter = iteration
        hook.after_train_iter(runner, iteration)
    assert head.graph is first
    assert runner.scalars == [("train/head.graph_recall", 1.0)], "weights that stand still keep their graph"
    with torch.no_grad():
        head.weight.copy_(torch.randn(200, 8))
    for iteration in range(5, 7):
        head.step += 1
        runner.iter = iteration
        hook.after_train_iter(runner, iteration)
    assert runner.scalars[-1][1] < 0.5
    assert head.graph is not first
    assert any("recall" in line for line in runner.lines)


def test_hook_without_a_head_says_so() -> None:
    with pytest.raises(ValueError, match=r"no alimm\.KNNSoftmaxHead"):
        KNNGraphHook().before_train(runner_of(torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="sample at least 1"):
        KNNGraphHook(sample=0)
