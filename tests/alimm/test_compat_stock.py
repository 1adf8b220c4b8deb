"""Stock configs of mmdet, mmseg and mmaction: built, trained for two iterations, saved, resumed for two more."""

from __future__ import annotations

from pathlib import Path

import pytest

from alimm.apis.checkpoints import load_restricted
from alimm.apis.train import train
from tests.alimm import stock_data

RETINANET = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
DEEPLAB = "mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py"
TSN = "mmaction::recognition/tsn/tsn_imagenet-pretrained-r50_8xb32-1x1x3-100e_kinetics400-rgb.py"


def test_retinanet_r18_trains_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("mmdet")
    options = stock_data.coco(tmp_path / "data")
    run = dict(work_dir=tmp_path / "run", device="cpu")
    first = train(RETINANET, cfg_options={**options, "train_cfg.max_epochs": 1}, **run)
    assert first.iter == 2
    assert load_restricted(tmp_path / "run" / "epoch_1.pth")["meta"]["iter"] == 2, "no full unpickling is needed"
    second = train(RETINANET, cfg_options={**options, "train_cfg.max_epochs": 2}, resume="auto", **run)
    assert second.iter == 4
    assert len(second.message_hub.get_scalar("train/loss").data[0]) == 4, "the history of the first half is there"


def test_deeplabv3plus_r18_trains_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("mmseg")
    options = stock_data.cityscapes(tmp_path / "data")
    run = dict(work_dir=tmp_path / "run", device="cpu")
    first = train(DEEPLAB, cfg_options={**options, "train_cfg.max_iters": 2}, **run)
    assert first.iter == 2
    assert load_restricted(tmp_path / "run" / "iter_2.pth")["meta"]["iter"] == 2
    second = train(DEEPLAB, cfg_options={**options, "train_cfg.max_iters": 4}, resume="auto", **run)
    assert second.iter == 4
    assert len(second.message_hub.get_scalar("train/loss").data[0]) == 4


def test_tsn_r50_trains_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("mmaction")
    options = stock_data.videos(tmp_path / "data")
    run = dict(work_dir=tmp_path / "run", device="cpu")
    first = train(TSN, cfg_options={**options, "train_cfg.max_epochs": 1}, **run)
    assert first.iter == 2
    assert load_restricted(tmp_path / "run" / "epoch_1.pth")["meta"]["iter"] == 2
    second = train(TSN, cfg_options={**options, "train_cfg.max_epochs": 2}, resume="auto", **run)
    assert second.iter == 4
    assert len(second.message_hub.get_scalar("train/loss").data[0]) == 4
