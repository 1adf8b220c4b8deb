"""Tiny data sets in the layouts that stock configs of mmdet, mmseg and mmaction read, and options that name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

NO_WORKERS = {
    f"{split}_dataloader.{key}": value
    for split in ("train", "val", "test")
    for key, value in (("num_workers", 0), ("persistent_workers", False), ("batch_size", 2))
}
SMALL_SGD = {"optim_wrapper.optimizer.lr": 1e-3, "log_level": "WARNING", "randomness": dict(seed=0)}


def _picture(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def coco(folder: Path, count: int = 4) -> dict[str, Any]:
    """Pictures with one box each, for ``mmdet::retinanet/retinanet_r18_fpn_1x_coco.py``."""
    generator = np.random.default_rng(0)
    (folder / "pictures").mkdir(parents=True)
    images, boxes = [], []
    for index in range(count):
        cv2.imwrite(str(folder / "pictures" / f"{index}.png"), _picture(generator, 64, 64))
        images.append(dict(id=index, file_name=f"{index}.png", height=64, width=64))
        boxes.append(dict(id=index, image_id=index, category_id=1, bbox=[8, 8, 40, 40], area=1600, iscrowd=0))
    content = dict(images=images, annotations=boxes, categories=[dict(id=1, name="person")])
    (folder / "boxes.json").write_text(json.dumps(content))
    options: dict[str, Any] = {"model.backbone.init_cfg": None, "train_dataloader.dataset.pipeline.2.scale": (64, 64)}
    for split in ("train", "val", "test"):
        options[f"{split}_dataloader.dataset.data_root"] = f"{folder}/"
        options[f"{split}_dataloader.dataset.ann_file"] = "boxes.json"
        options[f"{split}_dataloader.dataset.data_prefix.img"] = "pictures/"
        options[f"{split}_evaluator.ann_file"] = str(folder / "boxes.json")
    del options["train_evaluator.ann_file"]
    for split in ("val", "test"):
        options[f"{split}_dataloader.dataset.pipeline.1.scale"] = (64, 64)
    return {**NO_WORKERS, **SMALL_SGD, **options}


def cityscapes(folder: Path, count: int = 4) -> dict[str, Any]:
    """Pictures and label maps, for ``mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py``."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / "leftImg8bit" / split).mkdir(parents=True)
        (folder / "gtFine" / split).mkdir(parents=True)
        for index in range(count):
            picture = folder / "leftImg8bit" / split / f"{index}_leftImg8bit.png"
            labels = folder / "gtFine" / split / f"{index}_gtFine_labelTrainIds.png"
            cv2.imwrite(str(picture), _picture(generator, 64, 128))
            cv2.imwrite(str(labels), generator.integers(0, 19, (64, 128), dtype=np.uint8))
    options: dict[str, Any] = {
        "model.pretrained": None,
        "model.data_preprocessor.size": (64, 64),
        "train_dataloader.dataset.pipeline.2.scale": (128, 64),
        "train_dataloader.dataset.pipeline.3.crop_size": (64, 64),
        "train_cfg.val_interval": 2,
        "default_hooks.checkpoint.interval": 2,
    }
    for split in ("train", "val", "test"):
        options[f"{split}_dataloader.dataset.data_root"] = f"{folder}/"
    for split in ("val", "test"):
        options[f"{split}_dataloader.dataset.pipeline.1.scale"] = (128, 64)
    return {**NO_WORKERS, **SMALL_SGD, **options}


def videos(folder: Path, count: int = 4) -> dict[str, Any]:
    """Short videos, for the TSN R-50 config of mmaction for Kinetics-400."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(count):
        writer = cv2.VideoWriter(str(folder / f"{index}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 64))
        for _ in range(8):
            writer.write(_picture(generator, 64, 64))
        writer.release()
    (folder / "list.txt").write_text("".join(f"{index}.mp4 {index % 2}\n" for index in range(count)))
    options: dict[str, Any] = {
        "model.backbone.pretrained": None,
        "train_dataloader.dataset.pipeline.3.scale": (-1, 64),
        "train_dataloader.dataset.pipeline.4.input_size": 32,
        "train_dataloader.dataset.pipeline.5.scale": (32, 32),
        "default_hooks.checkpoint.interval": 1,
    }
    for split in ("train", "val", "test"):
        options[f"{split}_dataloader.dataset.ann_file"] = str(folder / "list.txt")
        options[f"{split}_dataloader.dataset.data_prefix.video"] = str(folder)
    options["val_dataloader.dataset.pipeline.3.scale"] = (-1, 32)
    options["val_dataloader.dataset.pipeline.4.crop_size"] = 32
    return {**NO_WORKERS, **SMALL_SGD, **options}
