"""Resuming equals not having stopped, and a kill in the middle of a save loses nothing but the part after it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alimm.apis.checkpoints import load_restricted, remove_leftovers
from alimm.apis.train import train
from tests.alimm.tiny_run import same_bits, tiny_config

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("state_dict", "ema_state_dict", "optimizer", "param_schedulers")


def final_state(folder: Path, name: str) -> dict[str, Any]:
    checkpoint = load_restricted(folder / name)
    return {part: checkpoint[part] for part in PARTS}


@pytest.mark.parametrize(
    "options",
    [
        dict(num_workers=0),
        dict(num_workers=2),
        dict(num_workers=2, persistent=True),
        dict(by_epoch=False, num_workers=0),
        dict(by_epoch=False, num_workers=2),
    ],
    ids=["main-process", "workers", "persistent", "iterations", "iterations-workers"],
)
def test_two_of_four_epochs_resumed_equal_four(tmp_path: Path, options: dict[str, Any]) -> None:
    by_epoch = options.get("by_epoch", True)
    half, end = ("epoch_2.pth", "epoch_4.pth") if by_epoch else ("iter_8.pth", "iter_16.pth")
    train(tiny_config(**options), work_dir=tmp_path / "whole", device="cpu")
    train(tiny_config(**options), work_dir=tmp_path / "resumed", resume=tmp_path / "whole" / half, device="cpu")
    assert not (tmp_path / "resumed" / half).exists(), "the second run must not have repeated the first half"
    assert same_bits(final_state(tmp_path / "whole", end), final_state(tmp_path / "resumed", end))


@pytest.mark.parametrize("changes", [{"default_hooks.epoch_seed": None}, {"randomness": dict(seed=4)}])
def test_the_comparison_can_fail(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Without the hook a resumed run draws other dropout masks; another seed does too."""
    train(tiny_config(), work_dir=tmp_path / "whole", device="cpu", cfg_options=changes)
    start = tmp_path / "whole" / "epoch_2.pth"
    if "randomness" in changes:
        train(tiny_config(), work_dir=tmp_path / "resumed", device="cpu")
    else:
        train(tiny_config(), work_dir=tmp_path / "resumed", resume=start, device="cpu", cfg_options=changes)
    ends = [final_state(tmp_path / name, "epoch_4.pth")["state_dict"] for name in ("whole", "resumed")]
    assert not same_bits(*ends)


def test_a_run_without_a_seed_resumes_with_the_order_of_its_first_half(tmp_path: Path) -> None:
    config = tiny_config(randomness=dict(seed=None))
    train(config, work_dir=tmp_path / "whole", device="cpu")
    train(config, work_dir=tmp_path / "resumed", resume=tmp_path / "whole" / "epoch_2.pth", device="cpu")
    ends = [final_state(tmp_path / name, "epoch_4.pth") for name in ("whole", "resumed")]
    assert same_bits(*ends)


CHILD = """
import builtins, sys, time
from alimm.apis import checkpoints
from alimm.apis.train import train
from tests.alimm.tiny_run import tiny_config

class Stuck:
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()
    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        print("HALF", flush=True)
        time.sleep(100)

def stuck_open(path, *args, **kwargs):
    file = builtins.open(path, *args, **kwargs)
    return Stuck(file) if "epoch_3" in str(path) else file

{where}.open = stuck_open
{more}
train(tiny_config(), work_dir=sys.argv[1], device="cpu", cfg_options={{"default_hooks.checkpoint.max_keep_ckpts": 1}})
"""


def kill_in_the_middle_of_a_save(work_dir: Path, where: str, more: str = "") -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(where=where, more=more), str(work_dir)],
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


def test_kill_in_the_middle_of_a_save_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    work_dir = tmp_path / "killed"
    kill_in_the_middle_of_a_save(work_dir, "checkpoints")
    assert not (work_dir / "epoch_3.pth").exists()
    assert (work_dir / "epoch_2.pth").exists(), "with max_keep_ckpts=1 the old one goes after the new one is there"
    assert (work_dir / "last_checkpoint").read_text() == str(work_dir / "epoch_2.pth")
    assert [path.name.startswith(".epoch_3.pth.") for path in work_dir.glob(".*.partial")] == [True]

    runner = train(tiny_config(log_level="INFO"), work_dir=work_dir, resume="auto", device="cpu")
    assert "resumed epoch: 2" in log_text(runner)
    assert not list(work_dir.glob(".*.partial")), "the half written file is cleared away"
    train(tiny_config(), work_dir=tmp_path / "whole", device="cpu")
    assert same_bits(final_state(tmp_path / "whole", "epoch_4.pth"), final_state(work_dir, "epoch_4.pth"))


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    host = socket.gethostname().replace(".", "_")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".a.pth.{host}-{os.getpid()}.partial", f".b.pth.{host}-{dead.pid}.partial", ".c.pth.elsewhere-1.partial"]
    for name in names:
        (tmp_path / name).touch()
    assert sorted(path.name for path in remove_leftovers(tmp_path)) == sorted(names[1:])
    assert [path.name for path in tmp_path.iterdir()] == names[:1]


def test_the_kill_does_harm_without_the_patch(tmp_path: Path) -> None:
    """MMEngine's own writer leaves half a file under the final name: the test above can fail."""
    work_dir = tmp_path / "killed"
    more = "from alimm import compat; compat.checkpoint_writing = compat.checkpoint_keeping = lambda: None"
    where = "import mmengine.fileio.backends.local_backend as backend\nbackend"
    kill_in_the_middle_of_a_save(work_dir, where, more)
    assert (work_dir / "epoch_3.pth").exists()
    assert not (work_dir / "epoch_2.pth").exists()
    with pytest.raises((OSError, RuntimeError)):
        torch.load(work_dir / "epoch_3.pth", weights_only=False)


def log_text(runner: Any) -> str:
    return "".join(path.read_text() for path in Path(runner.log_dir).glob("*.log"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def flip_a_weight(path: Path) -> None:
    """Change one byte of a stored tensor: the archive stays well formed, only its checksum tells."""
    content = bytearray(path.read_bytes())
    weight = load_restricted(path)["state_dict"]["body.4.weight"].numpy().tobytes()
    content[content.index(weight)] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_weight, empty, Path.unlink])
def test_auto_resume_passes_over_what_cannot_be_read(tmp_path: Path, damage: Any) -> None:
    train(tiny_config(), work_dir=tmp_path, device="cpu")
    damage(tmp_path / "epoch_4.pth")
    runner = train(tiny_config(log_level="INFO"), work_dir=tmp_path, resume="auto", device="cpu")
    text = log_text(runner)
    assert "resumed epoch: 3" in text
    assert f"not resumed from {tmp_path / 'epoch_4.pth'}: " in text


def test_auto_resume_with_nothing_there_starts_from_the_beginning(tmp_path: Path) -> None:
    assert train(tiny_config(), work_dir=tmp_path, resume="auto", device="cpu").iter == 16


def test_auto_resume_with_nothing_readable_says_so(tmp_path: Path) -> None:
    train(tiny_config(**{"train_cfg.max_epochs": 1}), work_dir=tmp_path, device="cpu")
    truncate(tmp_path / "epoch_1.pth")
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        train(tiny_config(), work_dir=tmp_path, resume="auto", device="cpu")
