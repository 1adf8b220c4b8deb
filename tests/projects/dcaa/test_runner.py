"""Every config for synthetic weather, shortened: it trains, validates, and its checkpoint is tested with the result."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmseg")

from alimm.apis.test import test as judge
from alimm.apis.train import train
from tests.projects.dcaa.tiny_configs import plain_texts, small_config

CONDITIONS = ("clear", "fog", "rain", "night", "snow")
CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "dcaa"
ARMS = sorted(path.stem.removesuffix("_synthetic") for path in CONFIGS.glob("*_synthetic.py"))


@pytest.fixture(autouse=True)
def _plain_texts() -> Iterator[None]:
    with plain_texts():
        yield


def last_validation(runner: Any) -> dict[str, float]:
    return {
        name.removeprefix("val/"): log.current()
        for name, log in runner.message_hub.log_scalars.items()
        if name.startswith("val/") and ("IoU" in name or "Acc" in name)
    }


def test_there_is_a_config_of_every_arm() -> None:
    assert {"source_only", "oracle", "adabn", "adaptsegnet", "mean_teacher", "dcaa"} <= set(ARMS)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_validates_and_is_tested_alike(arm: str, tmp_path: Path) -> None:
    runner = train(small_config(arm), work_dir=tmp_path, device="cpu")
    assert runner.iter == 2
    found = last_validation(runner)
    assert {f"mIoU/{name}" for name in (*CONDITIONS, "mean", "worst", "adverse")} | {"mIoU", "aAcc"} <= set(found)
    losses = runner.message_hub.get_scalar("train/loss").data[0]
    assert len(losses) == 2
    assert all(0 < float(loss) < 20 for loss in losses)
    names = {name for name in runner.message_hub.log_scalars if name.startswith("train/")}
    assert ("train/target.loss_pseudo" in names) == (arm == "mean_teacher")
    assert ("train/target.loss_easy" in names) == (arm == "dcaa_self_training")
    assert any("loss_d_" in name for name in names) == (arm in ("dcaa", "dcaa_self_training", "adaptsegnet", "advent"))
    tested = judge(small_config(arm), tmp_path / "iter_2.pth", work_dir=tmp_path / "test", device="cpu")
    assert {name: tested[name] for name in found} == pytest.approx(found, abs=1e-9)
