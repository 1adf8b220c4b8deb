"""Whole trainings from a config: any number of ranks, resumed runs, bfloat16, backbones of the other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alimm.apis.config import load_config
from alimm.apis.test import test as judge
from alimm.apis.train import train

SMALL = {
    "model.head.num_classes": 60,
    "model.head.active": 0.3,
    "model.head.neighbours": 4,
    "model.head.permute": "hash",
    "model.backbone.in_channels": 16,
    "model.backbone.out_channels": 16,
    "model.head.in_channels": 16,
    "train_dataloader.batch_size": 16,
    "test_dataloader.batch_size": 16,
    "val_dataloader.batch_size": 16,
    "default_hooks.checkpoint.interval": 1,
    "optim_wrapper.clip_grad": dict(max_norm=1.0),
    "custom_hooks": [dict(type="alimm.KNNGraphHook", start=3, check_interval=2, recall_min=1.0, sample=60)],
    "train_cfg.val_interval": 2,
    "param_scheduler.0.end": 1,
    "param_scheduler.1.begin": 1,
    "log_level": "WARNING",
    "randomness": dict(seed=5),
}


def config_of(batch: int) -> Any:
    config = load_config("alimm::knn_softmax/million_classes.py")
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.dataset.update(coarse=10, fine=6, dim=16)
        loader.dataset.pop("num_samples", None)
    config.merge_from_dict({**SMALL, "train_dataloader.batch_size": batch})
    return config


def run(work_dir: str, batch: int, changes: dict[str, Any], resume: bool = False, amp: bool = False) -> dict[str, Any]:
    distributed = torch.distributed.is_initialized()
    runner = train(
        config_of(batch),
        work_dir=work_dir,
        cfg_options=changes,
        launcher="pytorch" if distributed else "none",
        resume="auto" if resume else None,
        amp=amp,
        device="cpu",
    )
    model = runner.model.module if distributed else runner.model
    return dict(
        rows=model.head.settled_weight().clone(),
        backbone={name: value.detach().clone() for name, value in model.backbone.named_parameters()},
        top1=runner.message_hub.get_scalar("val/accuracy/top1").current(),
        lists=model.head.graph.lists() if model.head.graph is not None else None,
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_run_over_several_ranks_equals_that_of_one(gloo: Any, tmp_path: Path, ranks: int) -> None:
    """All classes active, so that the same are computed; graph, clipping, validation and checkpoints take part."""
    everything = {"model.head.active": 1.0}
    alone = run(str(tmp_path / "one"), 12, everything)
    results = gloo.run(ranks, run, str(tmp_path / "many"), 12 // ranks, everything, timeout=100.0)
    torch.testing.assert_close(torch.cat([r["rows"] for r in results]), alone["rows"], rtol=1e-4, atol=1e-5)
    for result in results:
        for name, value in alone["backbone"].items():
            torch.testing.assert_close(result["backbone"][name], value, rtol=1e-4, atol=1e-5)
        assert result["top1"] == pytest.approx(alone["top1"], abs=1.7)
    assert torch.cat([r["lists"] for r in results]).shape == alone["lists"].shape


def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path: Path) -> None:
    """The graph of the checkpoint, the step of the draws and the lazy rows all go on where they were."""
    whole = run(str(tmp_path / "whole"), 16, {})
    run(str(tmp_path / "parts"), 16, {"train_cfg.max_epochs": 1, "train_cfg.val_interval": 1})
    parts = run(str(tmp_path / "parts"), 16, {}, resume=True)
    assert parts["rows"].equal(whole["rows"])
    assert parts["lists"].equal(whole["lists"])
    for name, value in whole["backbone"].items():
        assert parts["backbone"][name].equal(value)


def test_a_checkpoint_of_two_ranks_is_tested_by_one(gloo: Any, tmp_path: Path) -> None:
    trained = gloo.run(2, run, str(tmp_path), 8, {}, timeout=100.0)
    metrics = judge(config_of(16), tmp_path / "epoch_2.pth", work_dir=tmp_path / "test", device="cpu")
    assert metrics["accuracy/top1"] == pytest.approx(trained[0]["top1"])


def test_bfloat16_keeps_the_softmax_in_float32(tmp_path: Path) -> None:
    plain, half = run(str(tmp_path / "a"), 16, {}), run(str(tmp_path / "b"), 16, {}, amp=True)
    assert half["rows"].dtype == torch.float32
    difference = (half["rows"] - plain["rows"]).norm() / plain["rows"].norm()
    assert 0 < difference < 0.1


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        (dict(type="mmdet.ResNet", depth=18, base_channels=8, norm_cfg=dict(type="BN")), 64),
        (dict(type="mmseg.MixVisionTransformer", embed_dims=8, num_layers=[1, 1, 1, 1], num_heads=[1, 1, 1, 1]), 8),
        (dict(type="mmaction.ResNet", depth=18, pretrained=None, norm_eval=False), 512),
    ],
    ids=["mmdet", "mmseg", "mmaction2"],
)
def test_it_stands_behind_backbones_of_the_other_libraries(backbone: dict[str, Any], channels: int) -> None:
    from alimm import compat
    from alimm.optim import RowSparseSGD
    from alimm.registry import MODELS
    from alimm.structures import ClsDataSample

    compat.apply_to_imports()
    model = MODELS.build(
        dict(
            type="alimm.ImageClassifier",
            backbone=backbone,
            neck=dict(type="alimm.GlobalPoolNeck"),
            head=dict(type="alimm.KNNSoftmaxHead", num_classes=200, in_channels=channels, active=0.2, neighbours=4),
        )
    )
    model.head.build_graph()
    optimizer = RowSparseSGD(model.parameters(), lr=0.05, momentum=0.9)
    samples = [ClsDataSample().set_gt_label(label) for label in (3, 77, 150, 199)]
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(4):
        loss = model(images, samples, mode="loss")["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert len(model.predict(images)[0].pred_topk) == 5
