"""Checkpoints of a classifier cut over ranks: what is saved beside the .pth, and what a kill or damage leaves of it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alimm.apis.checkpoints import SHARDS_KEY, find_resumable, load_restricted
from alimm.apis.model import init_model
from alimm.apis.sharded import load_shards, save_module
from alimm.apis.test import test as run_test
from alimm.apis.train import keep_shards, train
from alimm.distributed.blocks import read_index
from alimm.heads import ShardedHead
from alimm.registry import HOOKS
from tests.alimm.sharded_run import (
    BLOCK_ROWS,
    CLASSES,
    TinyVectors,
    flip_a_weight,
    folder_digests,
    run_sharded,
    sharded_config,
)
from tests.alimm.tiny_run import same_bits

ROOT = Path(__file__).resolve().parents[2]


def test_folders_go_with_their_checkpoints(tmp_path: Path) -> None:
    changes = {
        "default_hooks.checkpoint.max_keep_ckpts": 1,
        "default_hooks.checkpoint.save_best": "accuracy",
        "default_hooks.checkpoint.rule": "greater",
        "val_dataloader": sharded_config().test_dataloader,
        "val_cfg": dict(),
        "val_evaluator": sharded_config().test_evaluator,
    }
    run_sharded(str(tmp_path), changes)
    checkpoints = sorted(path.name for path in tmp_path.glob("*.pth"))
    named = []
    for name in checkpoints:
        meta = load_restricted(tmp_path / name)["meta"]
        named += list(meta[SHARDS_KEY].values())
    assert sorted(path.name for path in tmp_path.glob("*.shards")) == sorted(named)
    assert len(checkpoints) == 2
    assert "epoch_4.pth" in checkpoints
    assert checkpoints[0].startswith("best_accuracy_epoch_")
    best = next(path for path in tmp_path.glob("best_*.shards"))
    assert sorted(read_index(best).arrays) == ["marks", "weight"], "as MMEngine's, the best has no optimizer state"
    assert not list(tmp_path.glob(".*.partial"))
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_4.pth")


def saver(folder: Path) -> tuple[Any, Any]:
    """A runner with a head that was not trained, and its hook."""
    runner = train(sharded_config(**{"train_cfg.max_epochs": 1}), work_dir=folder, device="cpu")
    return runner, next(hook for hook in runner.hooks if type(hook).__name__ == "ShardedCheckpointHook")


def test_a_checkpoint_written_again_keeps_the_old_folder_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, hook = saver(tmp_path)
    original = type(runner).save_checkpoint
    seen = []

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(sorted(path.name for path in tmp_path.glob("*.shards")))
        original(self, *args, **kwargs)

    monkeypatch.setattr(type(runner), "save_checkpoint", watched)
    for expected in ("epoch_1.again.shards", "epoch_1.shards", "epoch_1.again.shards"):
        hook._save_checkpoint_with_step(runner, 1, meta=dict(epoch=1, iter=4))
        assert seen[-1] == ["epoch_1.again.shards", "epoch_1.shards"]
        assert [path.name for path in tmp_path.glob("*.shards")] == [expected]
        assert find_resumable(str(tmp_path)) == str(tmp_path / "epoch_1.pth")


def test_a_failure_to_write_the_pth_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, hook = saver(tmp_path)

    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(runner), "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        hook._save_checkpoint_with_step(runner, 1, meta=dict(epoch=1, iter=4))
    assert [path.name for path in tmp_path.glob("*.shards")] == ["epoch_1.shards"]
    assert find_resumable(str(tmp_path)) == str(tmp_path / "epoch_1.pth")


CHILD = """
import builtins, sys, time
from alimm.apis import checkpoints
from alimm.distributed import block_writer
from tests.alimm.sharded_run import run_sharded

def stuck_open(path, *args, **kwargs):
    if all(name in str(path) for name in {names!r}):
        file = builtins.open(path, *args, **kwargs)
        file.write(b"half" if "b" in args[0] else "half")
        file.flush()
        print("HALF", flush=True)
        time.sleep(100)
    return builtins.open(path, *args, **kwargs)

{where}.open = stuck_open
run_sharded(sys.argv[1], {{"default_hooks.checkpoint.max_keep_ckpts": 1}})
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> dict[str, str]:
    """The digests that a run of four epochs ends with when nothing stops it."""
    folder = tmp_path_factory.mktemp("whole")
    run_sharded(str(folder), {})
    return folder_digests(folder / "epoch_4.shards")


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("block_writer", (".epoch_3.shards.", "marks-000000000004")),
        pytest.param("block_writer", (".epoch_3.shards.", "index.json"), marks=pytest.mark.slow),
        ("checkpoints", (".epoch_3.pth.", "")),
    ],
    ids=["block", "index", "pth"],
)
def test_kill_in_the_middle_of_a_save_keeps_the_last_checkpoint(
    tmp_path: Path, whole: dict[str, str], where: str, names: tuple[str, str]
) -> None:
    work_dir = tmp_path / "killed"
    text = CHILD.format(names=names, where=where)
    child = subprocess.Popen(
        [sys.executable, "-c", text, str(work_dir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "HALF":
            break
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (work_dir / "epoch_3.pth").exists()
    assert find_resumable(str(work_dir)) == str(work_dir / "epoch_2.pth")
    assert list(work_dir.glob(".*.partial")), "the kill came in the middle"

    run_sharded(str(work_dir), {}, "auto")
    assert folder_digests(work_dir / "epoch_4.shards") == whole
    assert not list(work_dir.glob(".*.partial")), "what the killed run left is cleared away"
    for folder in work_dir.glob("*.shards"):
        assert folder.with_suffix(".pth").exists()


def remove(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def lose_a_block(folder: Path) -> None:
    (folder / "weight-000000000004.safetensors").unlink()


@pytest.mark.parametrize("damage", [remove, lose_a_block, flip_a_weight])
def test_auto_resume_passes_over_broken_shards(tmp_path: Path, damage: Any) -> None:
    run_sharded(str(tmp_path), {"train_cfg.max_epochs": 2})
    damage(tmp_path / "epoch_2.shards")
    assert find_resumable(str(tmp_path)) == str(tmp_path / "epoch_1.pth")
    with pytest.raises(ValueError, match=r"cannot resume from .*epoch_2"):
        run_sharded(str(tmp_path), {}, str(tmp_path / "epoch_2.pth"))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (dict(num_classes=12, in_channels=5, seed=4), "set num_classes=11"),
        (dict(num_classes=CLASSES, in_channels=6, seed=4), "width"),
        (dict(num_classes=CLASSES, in_channels=5, seed=5), "permutation"),
        (dict(num_classes=CLASSES, in_channels=5, seed=4, permute="none"), "merge-shards"),
    ],
)
def test_shards_of_another_classifier_are_refused(tmp_path: Path, head: dict[str, Any], message: str) -> None:
    save_module(ShardedHead(CLASSES, 5, seed=4), tmp_path / "a", (), BLOCK_ROWS)
    module = ShardedHead(**head)
    before = module.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        load_shards(module, {"": tmp_path / "a"})
    assert torch.equal(module.weight, before)


def test_weights_alone_bring_no_optimizer_state(tmp_path: Path) -> None:
    result = run_sharded(str(tmp_path / "a"), {"train_cfg.max_epochs": 1})
    source = str(tmp_path / "a" / "epoch_1.pth")
    loaded = run_sharded(str(tmp_path / "b"), {"train_cfg.max_epochs": 0, "load_from": source})
    assert torch.equal(loaded["weight"], result["weight"])
    assert loaded["momentum"] is None
    assert bool(result["momentum"].any())


def test_folders_without_their_checkpoint_are_cleared_away(tmp_path: Path) -> None:
    names = [
        "epoch_9.shards",
        "epoch_9.again.shards",
        "best_accuracy_epoch_2.shards",
        "mine.shards",
        "epoch_9.x.shards",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "epoch_1.shards").touch()
    run_sharded(str(tmp_path), {"train_cfg.max_epochs": 0})
    left = sorted(path.name for path in tmp_path.glob("*.shards"))
    assert left == ["epoch_1.shards", "epoch_9.x.shards", "mine.shards"]


def test_testing_and_init_model_take_the_folder(tmp_path: Path) -> None:
    result = run_sharded(str(tmp_path), {"train_cfg.max_epochs": 2})
    model = init_model(sharded_config(), tmp_path / "epoch_2.pth")
    assert torch.equal(model.head.weight, result["weight"])
    metrics = run_test(sharded_config(), tmp_path / "epoch_2.pth", work_dir=tmp_path / "test", device="cpu")
    loader = torch.utils.data.DataLoader(TinyVectors(), batch_size=24)
    batch = next(iter(loader))
    predicted = torch.tensor([int(sample.pred_label) for sample in model(**batch, mode="predict")])
    assert metrics["accuracy"] == pytest.approx(float((predicted == batch["target"]).float().mean()))
    remove(tmp_path / "epoch_2.shards")
    with pytest.raises(ValueError, match=r"epoch_2\.shards holds no index\.json"):
        init_model(sharded_config(), tmp_path / "epoch_2.pth")


def test_a_checkpoint_cannot_name_a_folder_elsewhere(tmp_path: Path) -> None:
    run_sharded(str(tmp_path), {"train_cfg.max_epochs": 1})
    content = load_restricted(tmp_path / "epoch_1.pth")
    for name in ("../epoch_1.shards", "/tmp", "..", "", 3):
        content["meta"][SHARDS_KEY] = {"head": name}
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match="name beside the checkpoint"):
            init_model(sharded_config(), tmp_path / "bad.pth")


def test_train_takes_the_hook_that_keeps_all_shards(tmp_path: Path) -> None:
    runner = train(sharded_config(log_level="INFO"), work_dir=tmp_path, device="cpu")
    assert (tmp_path / "epoch_4.shards" / "index.json").is_file()
    log = "".join(path.read_text() for path in Path(runner.log_dir).glob("*.log"))
    assert "default_hooks.checkpoint is alimm.ShardedCheckpointHook" in log
    averaged = {"custom_hooks": [dict(type="EMAHook")]}
    dense = {"optim_wrapper.optimizer.rows": "dense"}
    with pytest.raises(ValueError, match="rows to 'dense'"):
        keep_shards(sharded_config(**averaged))
    for change, changed in [
        ({}, True),
        ({"default_hooks.checkpoint": None}, False),
        ({"default_hooks": None}, True),
        ({"default_hooks.checkpoint.type": "MyCheckpointHook"}, False),
        ({"model.head.type": "alimm.CosineHead"}, False),
        ({"model.head.type": "alimm.KNNSoftmaxHead"}, True),
        ({**averaged, **dense}, False),
        ({**averaged, **dense, "launcher": "pytorch"}, True),
    ]:
        config = sharded_config(**change)
        assert keep_shards(config) is changed, change
        if changed:
            assert config.default_hooks.checkpoint.type == "alimm.ShardedCheckpointHook"
            assert config.default_hooks.checkpoint.interval == 1


def test_one_process_with_the_plain_hook_saves_a_complete_file(tmp_path: Path) -> None:
    """With an average of the weights, which shards do not have, MMEngine's hook stays."""
    changes = {"custom_hooks": [dict(type="EMAHook")], "train_cfg.max_epochs": 2}
    changes["optim_wrapper.optimizer.rows"] = "dense"
    train(sharded_config(**changes), work_dir=tmp_path, device="cpu")
    assert load_restricted(tmp_path / "epoch_2.pth")["state_dict"]["head.weight"].shape == (CLASSES, 5)
    assert not list(tmp_path.glob("*.shards"))
    with pytest.raises(ValueError, match="EMAHook"):
        run_sharded(str(tmp_path / "b"), changes)


def test_a_model_without_shards_is_saved_as_ever(tmp_path: Path) -> None:
    from tests.alimm.tiny_run import tiny_config

    options = {"default_hooks.checkpoint.type": "alimm.ShardedCheckpointHook"}
    for name, change in [("plain", {}), ("sharded", options)]:
        train(tiny_config(**change), work_dir=tmp_path / name, device="cpu")
    ends = [load_restricted(tmp_path / name / "epoch_4.pth") for name in ("plain", "sharded")]
    for part in ("state_dict", "optimizer"):
        assert same_bits(*(end[part] for end in ends))
    with pytest.raises(ValueError, match="block_rows"):
        HOOKS.build(dict(type="alimm.ShardedCheckpointHook", block_rows=0))
