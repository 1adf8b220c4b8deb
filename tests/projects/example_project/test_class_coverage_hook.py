from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.logging import MessageHub
from mmengine.registry import init_default_scope

from alimm.projects.example_project import ClassCoverageHook, ColouredSquares
from alimm.registry import DATASETS, HOOKS
from alimm.structures import ClsDataSample
from tests.gloo_pool import GlooPool


def make_runner(name: str, resume: bool = False) -> SimpleNamespace:
    hub = MessageHub.get_instance(name)
    return SimpleNamespace(epoch=0, message_hub=hub, logger=logging.getLogger("coverage"), _resume=resume)


def batch(*labels: int) -> dict:
    return {"data_samples": [ClsDataSample().set_gt_label(label) for label in labels]}


def train_epoch(hook: ClassCoverageHook, runner: SimpleNamespace, batches: list[dict]) -> float:
    for index, data in enumerate(batches):
        hook.after_train_iter(runner, index, data)
    hook.after_train_epoch(runner)
    return runner.message_hub.get_scalar("train/class_coverage").current()


def count_on_rank(labels_by_rank: list[list[int]]) -> list[int]:
    hook = ClassCoverageHook(num_classes=5)
    train_epoch(hook, make_runner("rank"), [batch(*labels_by_rank[dist.get_rank()])])
    return hook.counts_C.tolist()


def test_counts_equal_a_plain_loop_over_epochs() -> None:
    rng = np.random.default_rng(0)
    hook, runner = ClassCoverageHook(num_classes=50), make_runner("loop")
    expected = [0] * 50
    for _ in range(3):
        epoch = [rng.integers(0, 40, size=7).tolist() for _ in range(4)]
        for labels in epoch:
            for label in labels:
                expected[label] += 1
        coverage = train_epoch(hook, runner, [batch(*labels) for labels in epoch])
        assert coverage == pytest.approx(sum(count > 0 for count in expected) / 50)
    assert hook.counts_C.tolist() == expected


def test_ranks_are_added_up(gloo: GlooPool) -> None:
    results = gloo.run(2, count_on_rank, [[0, 0, 3], [3, 4, 3]])
    assert results == [[2, 0, 0, 3, 1]] * 2


def test_the_log_names_unseen_classes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "coverage")
    train_epoch(ClassCoverageHook(num_classes=6, show=2), make_runner("log"), [batch(1, 1, 4)])
    assert "class coverage 33.3% after epoch 1; never seen: 0, 2, ..." in caplog.text


def test_a_resumed_run_goes_on_counting_and_a_finetuned_one_does_not() -> None:
    first = ClassCoverageHook(num_classes=3)
    train_epoch(first, make_runner("first"), [batch(0, 0, 2)])
    checkpoint: dict = {}
    first.before_save_checkpoint(make_runner("first"), checkpoint)
    for resume, expected in ((True, [2, 1, 1]), (False, [0, 1, 0])):
        hook, runner = ClassCoverageHook(num_classes=3), make_runner(f"resume {resume}", resume)
        hook.after_load_checkpoint(runner, checkpoint)
        train_epoch(hook, runner, [batch(1)])
        assert hook.counts_C.tolist() == expected
    assert checkpoint["class_coverage"].tolist() == [2, 0, 1]


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes_is_refused(label: int) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.2.*Set num_classes"):
        ClassCoverageHook(num_classes=3).after_train_iter(make_runner("outside"), 0, batch(0, label))
    with pytest.raises(ValueError, match="must be positive"):
        ClassCoverageHook(num_classes=0)


def test_the_toy_data_is_long_tailed_and_seeded() -> None:
    first, again, other = (ColouredSquares(head_count=8, seed=seed) for seed in (0, 0, 1))
    labels = [first[index]["gt_label"] for index in range(len(first))]
    assert [labels.count(label) for label in range(4)] == [8, 4, 2, 1]
    assert (first[3]["img"] == again[3]["img"]).all()
    assert (first[3]["img"] != other[3]["img"]).any()
    assert first[0]["img"].mean((0, 1)).argmax() == 0, "red comes first in RGB"


def test_a_config_finds_the_parts_by_name() -> None:
    init_default_scope("alimm")
    assert HOOKS.build({"type": "alimm.ClassCoverageHook", "num_classes": 2}).counts_C.shape == torch.Size([2])
    assert len(DATASETS.build({"type": "ColouredSquares", "head_count": 8})) == 15
