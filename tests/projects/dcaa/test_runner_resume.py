"""Training of DCAA that is resumed in any stage equals training that was never stopped, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmseg")

import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from alimm.apis.checkpoints import load_restricted
from alimm.apis.train import train
from alimm.registry import HOOKS
from tests.alimm.tiny_run import same_bits
from tests.projects.dcaa.tiny_configs import plain_texts, small_config, without_validation

PARTS = ("state_dict", "optimizer", "param_schedulers")


@pytest.fixture(autouse=True)
def _plain_texts() -> Iterator[None]:
    with plain_texts():
        yield


@HOOKS.register_module(force=True)
class StopBefore(Hook):
    """Ends the run before an iteration, as Ctrl-C does."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.iteration:
            raise KeyboardInterrupt


def config_of(workers: int = 0) -> Config:
    """Five steps, the last three in self-training, saved after each, with dropout and pseudo labels from the start."""
    config = without_validation(small_config(max_iters=5, second_stage=2))
    config.model.decode_head.dropouts = (0.5, 0.5, 0.1)
    config.model.self_training.threshold = 0.14  # of eight classes
    config.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)
    for part in config.train_dataloader.values():
        part.update(num_workers=workers, batch_size=2)
    return config


def differing(one: Path, other: Path) -> list[str]:
    """What is not the same at the end of two runs: names of weights, and other parts of the checkpoint."""
    ends = [load_restricted(folder / "iter_5.pth") for folder in (one, other)]
    weights = [checkpoint["state_dict"] for checkpoint in ends]
    names = [name for name in weights[0] if not same_bits(weights[0][name], weights[1].get(name))]
    return names + [part for part in PARTS if not same_bits(*(checkpoint[part] for checkpoint in ends))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> Any:
    """Folders of runs that nobody stopped, by number of workers."""
    folders: dict[int, Path] = {}

    def folder(workers: int = 0) -> Path:
        if workers not in folders:
            folders[workers] = tmp_path_factory.mktemp(f"whole{workers}")
            train(config_of(workers), work_dir=folders[workers], device="cpu")
        return folders[workers]

    return folder


def test_a_checkpoint_holds_both_players_and_the_teacher(whole: Any) -> None:
    saved = load_restricted(whole() / "iter_4.pth")
    weights, state = saved["state_dict"], saved["optimizer"]
    assert int(weights["stage_index"]) == 2
    assert int(weights["teacher.steps"]) == int(weights["stage_steps"]) == 2
    name = "decode_head.conv_seg.weight"
    assert not torch.equal(weights[name], weights[f"teacher.parts.{name}"])
    assert set(state) == set(saved["param_schedulers"]) == {"seg", "disc"}
    assert len(state["disc"]["state"]) == sum(name.startswith("discriminators.") for name in weights)
    # Those of conditions that no batch has shown have no state; the fused one learns in every step.
    assert max(float(entry["step"]) for entry in state["disc"]["state"].values()) == 4


@pytest.mark.parametrize(
    ("start", "workers"),
    [(1, 0), (1, 2), (2, 0), (3, 0), (3, 2)],
    ids=["align", "align, workers", "border", "self_train", "self_train, workers"],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(whole: Any, tmp_path: Path, start: int, workers: int) -> None:
    saved = whole(workers) / f"iter_{start}.pth"
    runner = train(config_of(workers), work_dir=tmp_path, resume=saved, device="cpu")
    assert runner.iter == 5
    assert not (tmp_path / f"iter_{start}.pth").exists(), "the second run must not have repeated the first part"
    assert differing(tmp_path, whole(workers)) == []


def test_an_interrupted_run_goes_on_by_itself(whole: Any, tmp_path: Path) -> None:
    config = config_of()
    config.custom_hooks.append(dict(type="alimm.StopBefore", iteration=4))
    with pytest.raises(KeyboardInterrupt):
        train(config, work_dir=tmp_path, device="cpu")
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [f"iter_{i}.pth" for i in range(1, 5)]
    assert train(config_of(), work_dir=tmp_path, resume="auto", device="cpu").iter == 5
    assert differing(tmp_path, whole()) == []


def without_seeds(config: Config) -> None:
    config.custom_hooks = [hook for hook in config.custom_hooks if "stages" in hook]
    config.default_hooks.epoch_seed = None


def another_seed(config: Config) -> None:
    config.randomness.seed = 1


@pytest.mark.parametrize("change", [without_seeds, another_seed])
def test_the_comparison_can_fail(whole: Any, tmp_path: Path, change: Any) -> None:
    config = config_of()
    change(config)
    train(config, work_dir=tmp_path, resume=whole() / "iter_3.pth", device="cpu")
    assert "backbone.stem.0.weight" in differing(tmp_path, whole())


def test_workers_and_the_main_process_draw_other_numbers(whole: Any) -> None:
    """So that the comparison with workers is one of its own."""
    assert "backbone.stem.0.weight" in differing(whole(), whole(2))
