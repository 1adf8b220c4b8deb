"""DCAA on two ranks takes the steps of one rank with twice the batch, in every stage, whatever a rank sees."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("mmseg")

import torch
from mmengine.dataset import pseudo_collate
from mmengine.dist import get_dist_info
from mmengine.optim import build_optim_wrapper

from alimm.apis.test import test as judge
from alimm.apis.train import train
from alimm.projects.dcaa.sampler import ConditionSampler
from alimm.projects.dcaa.wrapper import SteppedDataParallel
from alimm.registry import DATASETS, MODELS
from tests.projects.dcaa.tiny_configs import plain_texts, small_config

NAMES = ("clear", "fog", "night")
TOLERANCE: dict[str, Any] = dict(rtol=1e-5, atol=1e-6)
PACK = dict(type="alimm.PackConditionInputs")
TARGET = dict(
    type="alimm.SyntheticWeatherDataset", domain="target", num=2, conditions=NAMES, with_labels=False, size=(32, 64)
)
SOURCE = dict(
    type="alimm.StyledDataset",
    dataset=dict(
        type="alimm.SyntheticWeatherDataset", domain="source", num=4, size=(32, 64),
        pipeline=[dict(type="alimm.StyliseSource"), PACK],
    ),
    styles=dict(**TARGET, pipeline=[]),
)  # fmt: skip
DATA = dict(source=SOURCE, target=dict(**TARGET, pipeline=[PACK]))
SGD = dict(type="SGD", lr=0.02, momentum=0.9)
OPTIM = dict(
    type="OptimWrapper",
    constructor="alimm.AlternatingOptimWrapperConstructor",
    optimizer=SGD,
    discriminator=SGD,
)


def model_config(**changes: Any) -> Any:
    """DCAA for three conditions: no dropout, no batch statistics, and adversarial losses that count."""
    model = small_config().model
    model.decode_head.num_conditions = len(NAMES)
    model.data_preprocessor.size = (32, 64)
    model.update(conditions=NAMES, freeze_bn=True, adversarial_weight=0.5)
    model.self_training = dict(threshold=0.15, pseudo_on="all", momentum=0.1)
    model.update(changes)
    return model


def draws(dataset: Any, batch: int, steps: int) -> list[Any]:
    """This rank's batches of a `ConditionSampler`; the styles depend on the place in all ranks' draws alone."""
    rank, size = get_dist_info()
    indices = iter(ConditionSampler(dataset, seed=3))
    batches = []
    for step in range(steps):
        items = []
        for place in range(batch):
            np.random.seed((step * batch + place) * size + rank)
            items.append(dataset[next(indices)])
        batches.append(pseudo_collate(items))
    return batches


def hide(samples: list[Any], step: int) -> None:
    """Leave most labels of the first picture out, as around the borders of a rotated picture."""
    samples[0].gt_sem_seg.data[:, : 20 + 2 * step] = 255


def take_steps(
    stage: str,
    batch: int,
    count: int = 3,
    averaged: bool = True,
    hidden: bool = False,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train on the ranks that there are.

    Args:
        stage: of all steps.
        batch: pictures of each domain, on this rank.
        count: steps.
        averaged: average gradients over the ranks.
        hidden: let rank 0 have a picture with few labels.
        changes: of the model.

    Returns:
        ``weights`` after and ``start`` before; of each step the conditions that this rank saw, and its share of easy
        pixels.
    """
    rank, size = get_dist_info()
    torch.manual_seed(rank)  # to make them equal is the wrapper's task
    model = MODELS.build(model_config(**(changes or {}))).train()
    with torch.no_grad():
        model.decode_head.conv_seg.weight *= 300  # sure enough of some pixels, and not of others
    wrapped = SteppedDataParallel(model) if size > 1 else model
    model.enter_stage(stage)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optim = build_optim_wrapper(wrapped, OPTIM)
    parts = {name: draws(DATASETS.build(kind), batch, count) for name, kind in DATA.items()}
    seen, easy = [], []
    skipped = mock.patch("alimm.projects.dcaa.base.average_gradients")
    with contextlib.nullcontext() if averaged else skipped:
        for source, target in zip(parts["source"], parts["target"], strict=True):
            seen.append([sample.cond_id for sample in target["data_samples"]])
            assert seen[-1] == [sample.cond_id for sample in source["data_samples"]]
            if hidden and rank == 0:
                hide(source["data_samples"], len(seen))
            logs = wrapped.train_step(dict(source=source, target=target), optim)
            easy.append(float(logs.get("target.easy", 0.0)))
    return dict(start=start, weights=model.state_dict(), seen=seen, easy=easy)


def assert_same_step(ranks: list[dict[str, Any]], alone: dict[str, Any], moving: set[str]) -> None:
    """Both ranks hold the same bits, and those of one rank but for rounding, of which they are far from where they
    were."""
    first, second = (result["weights"] for result in ranks)
    moved = set()
    for name, value in alone["weights"].items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, **TOLERANCE, msg=name)
        distance = float((value.double() - alone["start"][name].double()).abs().max())
        if distance > 1000 * float((value.double() - first[name].double()).abs().max()) + 1e-4:
            moved.add(name.partition(".")[0])
    assert moved - {"stage_steps", "stage_index"} == moving


STAGES = {
    "source": {"backbone", "decode_head"},
    "align": {"backbone", "decode_head", "discriminators"},
    "self_train": {"backbone", "decode_head", "discriminators", "teacher"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_take_the_steps_of_one_with_twice_the_batch(gloo: Any, stage: str) -> None:
    ranks = gloo.run(2, take_steps, stage, 2)
    alone = take_steps(stage, 4)
    for step, (one, other) in enumerate(zip(*(result["seen"] for result in ranks), strict=True)):
        assert [k for pair in zip(one, other, strict=True) for k in pair] == alone["seen"][step]
        assert set(one) != set(range(3)) != set(other), "a batch of two lacks a condition"
    assert any(set(one) != set(other) for one, other in zip(*(result["seen"] for result in ranks), strict=True))
    if stage == "self_train":
        assert all(0.02 < share < 0.98 for share in alone["easy"]), alone["easy"]
        assert all(abs(a - b) > 0.01 for a, b in zip(ranks[0]["easy"], ranks[1]["easy"], strict=True))
    assert_same_step(ranks, alone, STAGES[stage])


def test_the_comparison_can_fail(gloo: Any) -> None:
    ranks = gloo.run(2, take_steps, "align", 2, 3, False)
    with pytest.raises(AssertionError):
        assert_same_step(ranks, take_steps("align", 4), STAGES["align"])


@pytest.mark.parametrize("changes", [{}, {"class_weight": [1.0, 2.0] * 4}], ids=["the head's loss", "class weights"])
def test_pictures_with_few_labels_weigh_as_in_one_batch(gloo: Any, changes: dict[str, Any]) -> None:
    """Rank 0 has a picture most of whose labels are left out: its pixels must not weigh more than those of rank 1."""
    ranks = gloo.run(2, take_steps, "align", 2, 3, True, True, changes)
    assert_same_step(ranks, take_steps("align", 4, 3, True, True, changes), STAGES["align"])


def run(work_dir: str, batch: int) -> dict[str, Any]:
    """Six steps from the config on the ranks that there are, three of them in self-training, and a validation."""
    distributed = get_dist_info()[1] > 1
    config = small_config(max_iters=6, second_stage=3)
    config.model = model_config()
    for name, kind in DATA.items():
        config.train_dataloader[name].update(batch_size=batch, dataset=kind)
    # The styles are drawn from each rank's own generator.
    config.train_dataloader.source.dataset["dataset"]["pipeline"] = [
        dict(type="alimm.StyliseSource", method="none"),
        PACK,
    ]
    config.optim_wrapper = OPTIM
    config.model_wrapper_cfg = dict(type="alimm.SteppedDataParallel")
    config.val_dataloader.update(batch_size=2)
    config.val_dataloader.dataset.update(conditions=NAMES, size=(32, 64))
    config.val_evaluator.conditions = NAMES
    config.update(test_dataloader=config.val_dataloader, test_evaluator=config.val_evaluator)
    with plain_texts():
        runner = train(config, work_dir=work_dir, launcher="pytorch" if distributed else "none", device="cpu")
    assert isinstance(runner.model, SteppedDataParallel) == distributed
    return dict(
        weights=(runner.model.module if distributed else runner.model).state_dict(),
        scores={name: log.current() for name, log in runner.message_hub.log_scalars.items() if "val/mIoU" in name},
        config=config,
    )


def test_a_run_of_two_ranks_equals_that_of_one(gloo: Any, tmp_path: Path) -> None:
    ranks = gloo.run(2, run, str(tmp_path / "two"), 2, timeout=100.0)
    alone = run(str(tmp_path / "one"), 4)
    assert int(alone["weights"]["teacher.steps"]) == 3
    for result in ranks:
        for name, value in alone["weights"].items():
            torch.testing.assert_close(result["weights"][name], value, **TOLERANCE)
    assert len(alone["scores"]) == 7
    # A pixel may change sides.
    assert ranks[0]["scores"] == pytest.approx(alone["scores"], abs=0.1)
    tested = judge(alone["config"], tmp_path / "two" / "iter_6.pth", work_dir=tmp_path / "test", device="cpu")
    assert {f"val/{name}": tested[name] for name in tested if "mIoU" in name} == pytest.approx(ranks[0]["scores"])
