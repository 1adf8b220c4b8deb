"""The config that comes with the example project, trained for real: what a newcomer copies must work."""

from __future__ import annotations

from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from alimm import compat
from alimm.paths import resource_root

CONFIG = resource_root() / "configs/example_project/class_coverage_toy.py"


def run(work_dir: Path, epochs: int, resume: bool = False) -> tuple[Runner, dict[str, float]]:
    config = Config.fromfile(CONFIG)
    config.work_dir, config.resume, config.train_cfg.max_epochs = str(work_dir), resume, epochs
    config.experiment_name = f"{work_dir.name}_{epochs}"
    runner = Runner.from_cfg(config)
    runner.train()
    return runner, runner.val_loop.run()


def counts(checkpoint: Path) -> list[int]:
    return torch.load(checkpoint, weights_only=False)["class_coverage"].tolist()


def test_training_reaches_what_the_config_expects(tmp_path: Path) -> None:
    config = Config.fromfile(CONFIG)
    runner, metrics = run(tmp_path / "work", config.train_cfg.max_epochs)
    for name, floor in config.expected.items():
        assert metrics[name] >= floor
    assert runner.message_hub.get_scalar("train/class_coverage").current() == 1.0
    assert counts(tmp_path / "work/epoch_12.pth") == [12 * count for count in (64, 32, 16, 8)]


def test_a_resumed_run_has_counted_every_epoch(tmp_path: Path) -> None:
    compat.apply()
    run(tmp_path / "resumed", 1)
    run(tmp_path / "resumed", 2, resume=True)
    assert counts(tmp_path / "resumed/epoch_2.pth") == [2 * count for count in (64, 32, 16, 8)]


def test_the_dump_of_the_config_gives_the_same_config(tmp_path: Path) -> None:
    config = Config.fromfile(CONFIG)
    config.dump(tmp_path / "dumped.py")
    assert Config.fromfile(tmp_path / "dumped.py").to_dict() == config.to_dict()


def test_the_config_inherits_the_base() -> None:
    config = Config.fromfile(CONFIG)
    assert config.randomness.seed == 0
    assert "checkpoint" in config.default_hooks
