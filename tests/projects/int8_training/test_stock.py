"""Stock configs of mmdet and mmaction train in INT8 by one option, and a shared head keeps its levels apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from alimm.apis.checkpoints import load_restricted
from alimm.apis.train import train
from alimm.projects.int8_training import convert, layers_of
from tests.alimm import stock_data

RETINANET = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
FASTER = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
TSN = "mmaction::recognition/tsn/tsn_imagenet-pretrained-r50_8xb32-1x1x3-100e_kinetics400-rgb.py"
R2PLUS1D = "mmaction::recognition/r2plus1d/r2plus1d_r34_8xb8-8x8x1-180e_kinetics400-rgb.py"


def run(config: str, options: dict[str, Any], folder: Path, **hook: Any) -> tuple[Any, dict[str, Any]]:
    hook = dict(type="alimm.Int8TrainingHook", telemetry_interval=1, planner=False) | hook
    options = {**options, "custom_hooks": [hook], "train_cfg.max_epochs": 1, "train_cfg.val_interval": 10}
    runner = train(config, work_dir=folder, device="cpu", cfg_options=options)
    assert runner.iter >= 2
    losses = runner.message_hub.get_scalar("train/loss").data[0]
    assert all(0 < loss < 1e3 for loss in losses)
    assert runner.message_hub.get_scalar("train/int8_cosine_min").current() > 0.9
    return runner, load_restricted(folder / "epoch_1.pth")["int8_training"]


def test_retinanet_keeps_one_range_a_level(tmp_path: Path) -> None:
    pytest.importorskip("mmdet")
    _, kept = run(RETINANET, stock_data.coco(tmp_path / "data"), tmp_path / "run")
    assert len(kept) == 35
    sizes = [size for size, _ in kept["bbox_head.cls_convs.0.conv"]["ranges"]]
    assert sorted(sizes) == [[1, 1, 1], [1, 2, 2], [1, 4, 4], [1, 8, 8]], "the two smallest of five have one size here"
    assert len(kept["backbone.layer2.0.conv1"]["ranges"]) == 1
    assert "backbone.layer1.0.conv1" in kept
    assert not kept["backbone.layer1.0.conv1"]["ranges"], "frozen, and nothing before it is trained"


@pytest.mark.slow
def test_faster_rcnn_trains(tmp_path: Path) -> None:
    pytest.importorskip("mmdet")
    options = stock_data.coco(tmp_path / "data", count=4)
    _, kept = run(FASTER, options, tmp_path / "run", planner=True, clip="paper")
    assert "roi_head.bbox_head.shared_fcs.0" in kept
    assert "roi_head.bbox_head.fc_cls" not in kept
    assert any(layer["plans"] for layer in kept.values())


def test_tsn_trains(tmp_path: Path) -> None:
    pytest.importorskip("mmaction")
    _, kept = run(TSN, stock_data.videos(tmp_path / "data"), tmp_path / "run")
    assert len(kept) == 52
    assert all(layer["ranges"] for layer in kept.values())


@pytest.mark.slow
def test_r2plus1d_trains(tmp_path: Path) -> None:
    pytest.importorskip("mmaction")
    options = stock_data.videos(tmp_path / "data")
    del options["train_dataloader.dataset.pipeline.4.input_size"]  # a RandomResizedCrop, which has none
    runner, kept = run(R2PLUS1D, options, tmp_path / "run")
    kinds = {str(module.kernel_size) for module in runner.model.modules() if isinstance(module, torch.nn.Conv3d)}
    assert {"(1, 3, 3)", "(3, 1, 1)"} <= kinds
    assert len(kept) > 60


def head() -> tuple[Any, list[torch.Tensor]]:
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    import mmdet
    from mmdet.registry import MODELS

    settings = Config.fromfile(f"{mmdet.__path__[0]}/.mim/configs/_base_/models/retinanet_r50_fpn.py").model.bbox_head
    settings.update(num_classes=3, in_channels=16, feat_channels=16, stacked_convs=2)
    init_default_scope("mmdet")
    torch.manual_seed(0)
    built = MODELS.build(settings)
    init_default_scope("alimm")
    sizes = ((12, 13), (6, 7), (3, 4), (2, 2), (1, 1))
    # Levels of very different scale, as a pyramid has them.
    return built, [4.0**-level * torch.randn(2, 16, *size) for level, size in enumerate(sizes)]


@pytest.mark.parametrize("backend", ["auto", "fake"])
def test_the_weight_gradient_of_a_shared_head_is_the_sum_over_its_levels(backend: str) -> None:
    pytest.importorskip("mmdet")
    built, levels = head()
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(9 * 3, generator=generator) for _ in levels]

    def gradient(model: Any, which: list[int]) -> torch.Tensor:
        model.zero_grad()
        cls_scores, _ = model([levels[index] for index in which])
        losses = [(s * weights[i].view(1, -1, 1, 1)).square().sum() for s, i in zip(cls_scores, which, strict=True)]
        sum(losses).backward()
        return model.cls_convs[0].conv.weight.grad.clone()

    options = dict(planner=False, rounding="nearest", backend=backend, signed="split", clip="hindsight")
    together, apart = copy.deepcopy(built), copy.deepcopy(built)
    convert(together, **options)
    convert(apart, **options)
    for _ in range(2):  # the second step reads the ranges of the first
        every = list(range(5))
        found = gradient(together, every)
        parts = [gradient(apart, [level]) for level in every]
    torch.testing.assert_close(found, sum(parts), rtol=1e-4, atol=1e-5 * float(found.abs().max()))
    states = dict(layers_of(together))
    ranges = states["cls_convs.0.conv"].ranges
    assert len(ranges) == 5
    clips = [float(memory.clip_C.max()) for memory in ranges.values()]
    assert max(clips) > 30 * min(clips), "one range for all would serve the largest level only"
    true = gradient(built, every)
    assert float((found - true).norm() / true.norm()) < 0.15
