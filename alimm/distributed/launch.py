"""Starting process groups: what a launcher tells each rank, and ranks spawned from one process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")


def init_gloo(launcher: str, timeout_s: float = 1800.0) -> None:
    """Join the gloo group that the launcher describes. Does nothing when this process already has a group.

    Args:
        launcher: ``'pytorch'``, ``'slurm'`` or ``'mpi'``.
        timeout_s: seconds after which a collective that hangs fails.
    """
    if torch.distributed.is_initialized():
        return
    os.environ.update(rendezvous(launcher, os.environ))
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))


def rendezvous(launcher: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that torch's ``env://`` start needs, read from those of the launcher.

    Raises:
        ValueError: the process was not started by that launcher.
    """
    sources = {
        "pytorch": dict(RANK="RANK", WORLD_SIZE="WORLD_SIZE", LOCAL_RANK="LOCAL_RANK"),
        "slurm": dict(RANK="SLURM_PROCID", WORLD_SIZE="SLURM_NTASKS", LOCAL_RANK="SLURM_LOCALID"),
        "mpi": dict(
            RANK="OMPI_COMM_WORLD_RANK",
            WORLD_SIZE="OMPI_COMM_WORLD_SIZE",
            LOCAL_RANK="OMPI_COMM_WORLD_LOCAL_RANK",
        ),
    }
    if launcher not in sources:
        raise ValueError(f"launcher must be one of {', '.join(LAUNCHERS)}, got {launcher!r}")
    missing = [source for source in sources[launcher].values() if source not in environ]
    if missing:
        raise ValueError(
            f"--launcher {launcher} needs the variables {', '.join(missing)}, which its launcher sets. Start the run "
            "with tools/dist_train.sh or tools/slurm_train.sh, or leave out --launcher"
        )
    found = {name: environ[source] for name, source in sources[launcher].items()}
    found["MASTER_PORT"] = environ.get("MASTER_PORT", "29500")
    if "MASTER_ADDR" in environ:
        found["MASTER_ADDR"] = environ["MASTER_ADDR"]
    elif launcher == "slurm":
        found["MASTER_ADDR"] = first_slurm_host(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", ""))
    else:
        found["MASTER_ADDR"] = "127.0.0.1"
    return found


def first_slurm_host(nodes: str) -> str:
    """The first host of Slurm's short form: ``'gpu[03-05,9],cpu1'`` gives ``'gpu03'``."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0] or "127.0.0.1"
    first = rest.split("]")[0].split(",")[0].split("-")[0]
    return head + first + rest.partition("]")[2].split(",")[0]


def _rank_main(
    rank: int, function: Callable[..., Any], ranks: int, folder: str, timeout_s: float, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    # A file in a fresh folder needs no port, so two runs on one machine cannot meet.
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        torch.save(function(rank, ranks, *arguments), f"{folder}/result_{rank}.pth")
    finally:
        torch.distributed.destroy_process_group()


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call ``function(rank, ranks, *arguments)`` in ``ranks`` new processes joined by gloo.

    Args:
        function: importable by name (not a lambda), and so its arguments.
        ranks: number of processes.
        *arguments: passed on to every rank.
        timeout_s: seconds after which a collective that hangs fails.

    Returns:
        What each rank returned, by rank. Tensors come back on the CPU.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; the message holds its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank_main, args=(function, ranks, folder, timeout_s, arguments), nprocs=ranks, join=True)
        # The files were written by this call's own processes, so they may hold any object.
        paths = [f"{folder}/result_{rank}.pth" for rank in range(ranks)]
        return [torch.load(path, map_location="cpu", weights_only=False) for path in paths]
