"""Real ranks: started by ``run_ranks``, by tools/dist_train.sh and by a stub of srun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alimm.apis.checkpoints import load_restricted
from alimm.apis.train import train
from alimm.distributed import CpuDistributedDataParallel
from alimm.distributed.launch import first_slurm_host, rendezvous, run_ranks
from tests.alimm.tiny_run import tiny_config

ROOT = Path(__file__).resolve().parents[2]

# No dropout, no augmentation and no shuffling, so that the ranks together see what one rank sees.
PLAIN: dict[str, Any] = {
    "model.dropout": 0.0,
    "train_dataloader.dataset.augment": False,
    "train_dataloader.sampler.shuffle": False,
    "custom_hooks": [dict(type="TinyMeanLoss")],
}


def write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.py"
    tiny_config(**changes).dump(path)
    return path


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    return {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **more}


def run_script(script: str, *words: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "tools" / script), *words]
    return subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=110)


def scaled_sum(rank: int, ranks: int, scale: float) -> tuple[int, float, str]:
    value = torch.tensor(scale * (rank + 1))
    torch.distributed.all_reduce(value)
    model = CpuDistributedDataParallel(torch.nn.Sequential(torch.nn.SyncBatchNorm(2)), device_ids=[rank])
    model(torch.ones(3, 2, 1, 1)).sum().backward()
    return rank, float(value), type(model.module[0]).__name__


def fail_on_rank_1(rank: int, ranks: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 is unwell")


def test_run_ranks_and_the_model_wrapper_of_the_cpu() -> None:
    assert run_ranks(scaled_sum, 2, 10.0) == [(rank, 30.0, "_BatchNormXd") for rank in (0, 1)]


@pytest.mark.slow
def test_run_ranks_tells_which_rank_failed() -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="rank 1 is unwell"):
        run_ranks(fail_on_rank_1, 2)


def test_two_ranks_by_dist_train_equal_one_rank_with_the_doubled_batch(tmp_path: Path) -> None:
    config = write_config(tmp_path, **PLAIN, **{"train_dataloader.batch_size": 2})
    words = [str(config), "2", "--work-dir", "two", "--device", "cpu"]
    done = run_script("dist_train.sh", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    train(tiny_config(**PLAIN), work_dir=tmp_path / "one", device="cpu")

    # Rank r of 2 takes samples r, r+2, ...; the doubled batch of one rank holds the same four samples.
    one = load_restricted(tmp_path / "one" / "epoch_4.pth")["state_dict"]
    two = load_restricted(tmp_path / "two" / "epoch_4.pth")["state_dict"]
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-6, rtol=0)
    losses = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("two", "one")]
    assert len(losses[0]) == 16
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.slow
def test_dist_test_and_a_given_port(tmp_path: Path) -> None:
    config = write_config(tmp_path, **{"train_cfg.max_epochs": 1})
    port = dict(PORT="29613")
    done = run_script("dist_train.sh", str(config), "1", "--work-dir", "w", "--device", "cpu", cwd=tmp_path, **port)
    assert done.returncode == 0, done.stderr[-3000:]
    words = [str(config), "w/epoch_1.pth", "2", "--out", "m.json", "--device", "cpu", "--work-dir", "t"]
    done = run_script("dist_test.sh", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0.0 <= json.loads((tmp_path / "m.json").read_text())["accuracy"] <= 1.0


SRUN = """#!/usr/bin/env bash
# Runs the command of srun as two tasks of one node, and notes its options.
options=()
while [[ $1 == -* ]]; do
    if [[ $1 == -p ]]; then options+=("$1 $2"); shift 2; else options+=("$1"); shift; fi
done
printf '%s\\n' "${options[@]}" > options.txt
export SLURM_NTASKS=2 SLURM_NODELIST=localhost MASTER_PORT=%PORT%
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" &
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
wait -n && wait -n
"""


def test_slurm_train_with_a_stub_of_srun(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN.replace("%PORT%", str(port)))
    (tmp_path / "bin" / "srun").chmod(0o755)
    config = write_config(tmp_path, **{"train_cfg.max_epochs": 1})
    more = dict(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", GPUS="0", TASKS="2", SRUN_ARGS="--qos=low --quiet")
    done = run_script("slurm_train.sh", "part", "job", str(config), "w", "--device", "cpu", cwd=tmp_path, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "w" / "epoch_1.pth").exists()
    options = (tmp_path / "options.txt").read_text().split("\n")
    assert {"-p part", "--job-name=job", "--ntasks=2", "--qos=low", "--quiet"} <= set(options)
    assert not any(option.startswith("--gres") for option in options)


@pytest.mark.parametrize("script", ["dist_train.sh", "dist_test.sh", "slurm_train.sh", "slurm_test.sh"])
def test_scripts_without_arguments_say_how_they_are_called(script: str, tmp_path: Path) -> None:
    done = run_script(script, cwd=tmp_path)
    assert (done.returncode, "usage:" in done.stderr) == (2, True)


@pytest.mark.slow
def test_train_py_from_another_folder(tmp_path: Path) -> None:
    config = write_config(tmp_path, **{"train_cfg.max_epochs": 1})
    command = [sys.executable, str(ROOT / "tools" / "train.py"), str(config), "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "work_dirs" / "tiny" / "epoch_1.pth").exists()


def test_rendezvous() -> None:
    slurm = dict(SLURM_PROCID="3", SLURM_NTASKS="4", SLURM_LOCALID="1", SLURM_NODELIST="gpu[03-05,9],cpu1")
    expected = dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="gpu03", MASTER_PORT="29500")
    assert rendezvous("slurm", slurm) == expected
    assert rendezvous("slurm", {**slurm, "MASTER_ADDR": "x", "MASTER_PORT": "1"})["MASTER_ADDR"] == "x"
    with pytest.raises(ValueError, match=r"dist_train\.sh"):
        rendezvous("pytorch", {})
    with pytest.raises(ValueError, match="launcher"):
        rendezvous("no", {})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[7,9]", "n7"), ("n[07-09]-ib,m", "n07-ib"), ("a,n[1-2]", "a"), ("", "127.0.0.1")],
)
def test_first_slurm_host(nodes: str, first: str) -> None:
    assert first_slurm_host(nodes) == first
