"""A stock config of MMSegmentation becomes one of DCAA: DeepLab V3+ on Cityscapes, adapted to fog and rain.

What has to be changed, here as options and in a config of its own alike:

    _base_ = 'mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py'
    conditions = ('fog', 'rain')
    model = dict(type='alimm.DCAASegmentor', conditions=conditions, self_training=dict())
    train_dataloader = dict(_delete_=True, source=dict(...), target=dict(...))  # see `stock_config`
    train_cfg = dict(_delete_=True, type='alimm.MultiLoaderTrainLoop', max_iters=80000, val_interval=8000)
    optim_wrapper = dict(
        constructor='alimm.AlternatingOptimWrapperConstructor', discriminator=dict(type='Adam', lr=1e-4))
    custom_hooks = [dict(type='alimm.StageHook', stages=[
        dict(begin=0, stage='align'), dict(begin=40000, stage='self_train')])]
    val_dataloader = dict(dataset=...)
    val_evaluator = dict(_delete_=True, type='alimm.ConditionIoUMetric', conditions=conditions)

Heads, the optimiser and its schedule stay; every condition gets a copy of the decode head.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import pytest

pytest.importorskip("mmseg")

from mmengine.config import Config

from alimm.apis.config import load_config
from alimm.apis.test import test as judge
from alimm.apis.train import train
from alimm.paths import resource_root
from tests.alimm import stock_data
from tests.projects.dcaa.tiny_configs import plain_texts

STOCK = "mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py"
CONDITIONS = ("fog", "rain")
RAIN = "alpha_0.01_beta_0.005_dropsize_0.01_pattern_1"


def foggy_and_rainy(folder: Path) -> dict[str, Any]:
    """Trees of Cityscapes, Foggy and Rain Cityscapes with four pictures of 64 x 128 a split; options of the first."""
    options = stock_data.cityscapes(folder)
    for picture in sorted((folder / "leftImg8bit").rglob("*.png")):
        split, stem = picture.parent.name, picture.name.removesuffix("_leftImg8bit.png")
        for name in (f"foggy/{split}/{stem}_leftImg8bit_foggy_beta_0.01.png",
                     f"foggy/{split}/{stem}_leftImg8bit_foggy_beta_0.02.png",
                     f"rain/{split}/{stem}_leftImg8bit_rain_{RAIN}.png"):  # fmt: skip
            path = folder / f"leftImg8bit_{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, path)
    return options


def stock_config(root: Path) -> Config:
    """The stock config with what DCAA needs: loaders, a loop, two optimisers, stages, a metric by condition."""
    config = load_config(STOCK)
    config.merge_from_dict(foggy_and_rainy(root))
    pack = dict(type="alimm.PackConditionInputs")
    load, labels, *augment, _ = config.train_dataloader.dataset.pipeline
    # A crop that looks for many classes reads labels.
    unlabelled = [{**step, "cat_max_ratio": 1.0} if step["type"] == "RandomCrop" else step for step in augment]

    def weather(split: str, **options: Any) -> dict[str, Any]:
        return dict(
            type="alimm.ConcatConditionDataset",
            conditions=CONDITIONS,
            datasets=[
                dict(type=f"alimm.{kind}CityscapesDataset", data_root=str(root), split=split, **options)
                for kind in ("Foggy", "Rain")
            ],
        )

    target = weather("train", with_labels=False, pipeline=[load, *unlabelled, pack])
    source = dict(
        type="alimm.StyledDataset",
        dataset=dict(
            type="alimm.CityscapesConditionDataset",
            domain="source",
            data_root=str(root),
            split="train",
            pipeline=[load, labels, *augment, dict(type="alimm.StyliseSource"), pack],
        ),
        styles=weather("train", with_labels=False, pipeline=[]),
    )
    config.model.update(type="alimm.DCAASegmentor", conditions=CONDITIONS, self_training=dict(threshold=0.06))
    common = dict(batch_size=2, num_workers=0, sampler=dict(type="alimm.ConditionSampler"))
    config.train_dataloader = dict(source=dict(**common, dataset=source), target=dict(**common, dataset=target))
    config.train_cfg = dict(type="alimm.MultiLoaderTrainLoop", max_iters=2, val_interval=2)
    config.optim_wrapper.update(
        constructor="alimm.AlternatingOptimWrapperConstructor", discriminator=dict(type="Adam", lr=1e-4)
    )
    config.custom_hooks = [
        dict(type="alimm.StageHook", stages=[dict(begin=0, stage="align"), dict(begin=1, stage="self_train")])
    ]
    judged = [*config.val_dataloader.dataset.pipeline[:-1], pack]
    config.val_dataloader.dataset = config.test_dataloader.dataset = weather("val", pipeline=judged)
    config.val_evaluator = config.test_evaluator = dict(type="alimm.ConditionIoUMetric", conditions=CONDITIONS)
    return config


def test_deeplab_on_cityscapes_is_adapted_to_fog_and_rain(tmp_path: Path) -> None:
    config = stock_config(tmp_path / "data")
    with plain_texts():
        runner = train(config, work_dir=tmp_path / "run", device="cpu")
    assert runner.iter == 2
    assert [len(loader.dataset) for loader in runner.train_dataloader.loaders.values()] == [4 * 2, 4 + 4]
    model = runner.model
    assert model.stage == "self_train"
    assert [type(branch).__name__ for branch in model.decode_head.branches] == ["DepthwiseSeparableASPPHead"] * 2
    assert len(model.discriminators) == 3
    logs = {name.removeprefix("train/") for name in runner.message_hub.log_scalars}
    assert {"source.loss_ce", "aux.loss_ce", "target.loss_easy", "target.loss_adv_cond", "target.loss_d_global"} <= logs
    found = {name: runner.message_hub.get_scalar(f"val/mIoU/{name}").current() for name in (*CONDITIONS, "adverse")}
    tested = judge(config, tmp_path / "run" / "iter_2.pth", work_dir=tmp_path / "test", device="cpu")
    assert found == pytest.approx({name: tested[f"mIoU/{name}"] for name in found})


def test_the_config_in_the_readme_trains_and_validates(tmp_path: Path) -> None:
    foggy_and_rainy(tmp_path)
    for kind in ("images", "labels"):
        (tmp_path / "gta5" / kind).mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "leftImg8bit" / "train").rglob("*.png"))):
        picture = cv2.imread(str(path))
        cv2.imwrite(str(tmp_path / "gta5" / "images" / f"{number}.png"), picture)
        cv2.imwrite(str(tmp_path / "gta5" / "labels" / f"{number}.png"), picture[..., 0] % 20 + 7)
    readme = (resource_root() / "projects" / "dcaa" / "README.md").read_text()
    text = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "_base_" in block)
    for old, new in (
        ('"data/cityscapes"', repr(str(tmp_path))),
        ('"data/gta5"', repr(str(tmp_path / "gta5"))),
        ("(512, 1024)", "(64, 128)"),
        ("max_iters=80000, val_interval=8000", "max_iters=2, val_interval=2"),
        ("begin=50000", "begin=1"),
        ("num_workers=2", "num_workers=0"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    text += "model.update(pretrained=None, data_preprocessor=dict(size=(64, 128)))\n"
    (tmp_path / "config.py").write_text(text)
    runner = train(tmp_path / "config.py", work_dir=tmp_path / "work", device="cpu")
    assert runner.model.stage == "self_train"
    assert {"val/mIoU/clear", "val/mIoU/fog", "val/mIoU/worst"} <= set(runner.message_hub.log_scalars)
