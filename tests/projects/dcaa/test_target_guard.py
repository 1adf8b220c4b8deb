"""Training reads no label of the target: neither a file of one is opened, nor does the result depend on any."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmseg")

import cv2
import numpy as np
import torch
from mmengine import fileio
from mmengine.config import Config
from PIL import Image

from alimm.apis.config import load_config
from alimm.apis.train import train
from alimm.paths import data_root
from alimm.projects.dcaa.synthetic import SyntheticWeatherDataset, export_dataset
from tests.projects.dcaa.tiny_configs import plain_texts, shortened, without_validation

NAMES = ("clear", "fog", "night")
ARMS = ("dcaa", "mean_teacher", "colour_matching")
_guarded: list[Path] = []
_installed: list[bool] = []


class LabelRead(RuntimeError):
    """A label that training must not see was opened."""


def _refuse(path: Any) -> None:
    if isinstance(path, str | bytes) and _guarded:
        text = path.decode() if isinstance(path, bytes) else path
        if any(Path(text).resolve().is_relative_to(folder) for folder in _guarded):
            raise LabelRead(text)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    # Raised by open(), io.open(), os.open(), and what is built on them: pathlib, PIL, np.fromfile, MMEngine's fileio.
    if event == "open" and _guarded:
        _refuse(arguments[0])


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Folders below which nothing may be opened, neither by Python nor by OpenCV."""
    if not _installed:  # an audit hook stays for good
        sys.addaudithook(_audit)
        _installed.append(True)
    imread = cv2.imread

    def watched(path: Any, *rest: Any) -> Any:
        _refuse(str(path))
        return imread(path, *rest)

    monkeypatch.setattr("cv2.imread", watched)
    yield _guarded
    _guarded.clear()


@pytest.fixture(autouse=True)
def _plain_texts() -> Iterator[None]:
    with plain_texts():
        yield


@pytest.fixture(scope="module")
def tree(tmp_path_factory: Any) -> Path:
    """A source, and a target that has labels beside its pictures."""
    folder: Path = tmp_path_factory.mktemp("weather")
    options: dict[str, Any] = dict(size=(32, 64), conditions=NAMES)
    export_dataset(SyntheticWeatherDataset("source", 4, **options), folder / "source" / "train")
    export_dataset(SyntheticWeatherDataset("target", 2, **options), folder / "target" / "train")
    export_dataset(SyntheticWeatherDataset("target", 1, split="val", **options), folder / "target" / "val")
    return folder


def config_of(arm: str, tree: Path) -> Config:
    """The config for composites with our pictures in place of those."""
    config = load_config(f"alimm::dcaa/{arm}_composites.py")
    _adapt(config.to_dict(), config, tree)
    config.model.data_preprocessor.size = (32, 64)
    if arm == "dcaa":  # both stages, so that what the teacher sees is watched as well
        config.model.self_training = dict(threshold=0.6)
        hook = next(hook for hook in config.custom_hooks if "stages" in hook)
        hook.stages.append(dict(begin=1, stage="self_train"))
    return shortened(config, 3)


def _adapt(node: Any, live: Any, tree: Path) -> None:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key == "data_root":
            live[key] = str(tree) + value.removeprefix(str(data_root() / "dcaa_composites"))
        elif key == "conditions":
            live[key] = NAMES
        elif key == "metainfo":
            live[key] = {name: SyntheticWeatherDataset.METAINFO[name] for name in ("classes", "palette")}
        elif key == "num_workers":
            live[key] = 0
        elif key in ("num_conditions", "num_classes"):
            live[key] = len(NAMES) if key == "num_conditions" else 8
        elif key == "batch_size":
            live[key] = 2
        elif isinstance(value, dict | list):
            _adapt(value, live[key], tree)


@pytest.mark.parametrize("arm", ARMS)
def test_training_opens_no_label_of_the_target(arm: str, tree: Path, guard: list[Path], tmp_path: Path) -> None:
    guard.append((tree / "target" / "train" / "labels").resolve())
    guard.append((tree / "target" / "val").resolve())
    runner = train(without_validation(config_of(arm, tree)), work_dir=tmp_path, device="cpu")
    assert runner.iter == 3


def test_the_target_is_trained_on_the_same_without_its_labels(tree: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tree, bare)
    shutil.rmtree(bare / "target" / "train" / "labels")
    ends = [
        train(without_validation(config_of("dcaa", folder)), work_dir=tmp_path / name, device="cpu").model.state_dict()
        for name, folder in (("with", tree), ("without", bare))
    ]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_the_guard_sees_validation_read_labels(tree: Path, guard: list[Path], tmp_path: Path) -> None:
    guard.append((tree / "target" / "val" / "labels").resolve())
    with pytest.raises(LabelRead, match="target/val/labels"):
        train(config_of("dcaa", tree), work_dir=tmp_path, device="cpu")
    guard.clear()
    runner = train(config_of("dcaa", tree), work_dir=tmp_path / "free", device="cpu")
    assert runner.message_hub.get_scalar("val/mIoU").current() >= 0


def test_the_guard_sees_a_target_with_labels(tree: Path, guard: list[Path], tmp_path: Path) -> None:
    guard.append((tree / "target" / "train" / "labels").resolve())
    config = without_validation(config_of("dcaa", tree))
    target = config.train_dataloader.target.dataset
    target.with_labels = True
    target.pipeline.insert(1, dict(type="LoadAnnotations"))
    with pytest.raises(LabelRead, match="target/train/labels"):
        train(config, work_dir=tmp_path, device="cpu")
    guard.clear()
    with pytest.raises(ValueError, match="comes with labels, which training must not see"):
        train(config, work_dir=tmp_path / "free", device="cpu")


@pytest.mark.parametrize("read", [Path.read_bytes, np.fromfile, Image.open, fileio.get, lambda path: cv2.imread(path)])
def test_the_guard_sees_every_way_to_read(tree: Path, guard: list[Path], read: Any) -> None:
    label = next((tree / "target" / "train" / "labels").rglob("*.png"))
    guard.append((tree / "target" / "train" / "labels").resolve())
    with pytest.raises(LabelRead):
        read(label)
    read(next((tree / "target" / "train" / "img").rglob("*.png")))
