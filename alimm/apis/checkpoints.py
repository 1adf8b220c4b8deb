"""Checkpoints on the local disk: written whole or not at all, read without running what is inside, found again.

What MMEngine saves holds its ``HistoryBuffer`` objects, which torch's restricted unpickler refuses. They need a few
NumPy functions and ``getattr``; allowing ``getattr`` would open the whole interpreter, so here that name resolves to a
function that gives the four statistics of a ``HistoryBuffer`` and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log

TRUST_VARIABLE = "ALIMM_TRUST_CHECKPOINT"
SHARDS_KEY = "alimm_shards"
"""In the meta of a checkpoint: module -> the folder of its shards, a name beside the file."""
PATH_KEY = "alimm_path"
"""Put into such a meta when it is loaded: the file."""
_TEMPORARY = re.compile(r"^\..+\.(?P<host>[^.]+)-(?P<process>\d+)\.partial$")
_STATISTICS = {name: getattr(HistoryBuffer, name) for name in ("min", "max", "current", "mean")}


def _statistic(owner: Any, name: str) -> Any:
    """Stand in for ``getattr`` while a checkpoint is read: the statistics of ``HistoryBuffer``, nothing else."""
    if owner is HistoryBuffer and name in _STATISTICS:
        return _STATISTICS[name]
    raise pickle.UnpicklingError(f"the checkpoint asks for attribute {name!r} of {owner!r}, which is not allowed")


def _safe_names() -> list[Any]:
    """What a checkpoint of MMEngine may name beyond torch's own list: plain numbers and arrays, and their history."""
    reconstruct = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdFDSU"}
    return [
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        *sorted(dtypes, key=lambda kind: kind.__name__),
        (_statistic, "builtins.getattr"),
        *((reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("_core", "core")),
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    ]


def load_restricted(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """Read a checkpoint with torch's restricted unpickler and the names above.

    Raises:
        pickle.UnpicklingError: the file names something else; nothing of it was run.
        ValueError: the file is no checkpoint, or is cut off or damaged. The message names it.
    """
    with open(path, "rb") as file:
        start = file.read(2)
    # A zip archive, or the pickle of torch before 1.6.
    if start != b"PK" and start[:1] != b"\x80":
        raise ValueError(f"{path} is not a checkpoint: it {f'starts with {start!r}' if start else 'is empty'}")
    # torch 2.4 has no safe_globals: there only plain weights load this way.
    safe_globals = getattr(torch.serialization, "safe_globals", None)
    try:
        with safe_globals(_safe_names()) if safe_globals else contextlib.nullcontext():
            return torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}. Is the file complete?") from error


def make_local_loader(work_dir: str | os.PathLike[str] | None) -> Callable[..., Any]:
    """Build the loader of local files for a run.

    Args:
        work_dir: the run's own folder. A file inside it may be unpickled in full when it cannot be read otherwise,
            because the run itself wrote it. None trusts no folder.
    """

    def load_from_local(filename: str, map_location: Any = None) -> Any:
        path = Path(filename).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no checkpoint {filename}")
        try:
            return _note_path(load_restricted(path, map_location), path)
        except pickle.UnpicklingError as error:
            trusted = os.environ.get(TRUST_VARIABLE)
            inside = work_dir is not None and path.resolve().is_relative_to(Path(work_dir).resolve())
            if not inside and (not trusted or Path(trusted).expanduser().resolve() != path.resolve()):
                raise ValueError(
                    f"{filename} holds Python objects beyond weights and numbers, and loading those runs whatever code "
                    f"the file brings ({str(error).splitlines()[0]}). If you trust where it comes from, set "
                    f"{TRUST_VARIABLE}={path.resolve()}, or convert it once: "
                    "python tools/publish_model.py IN OUT --trust"
                ) from error
        reason = "it lies in the work dir of this run" if inside else f"{TRUST_VARIABLE} names it"
        print_log(f"{filename} is unpickled in full: {reason}", logger="current", level=logging.WARNING)
        return _note_path(torch.load(path, map_location=map_location, weights_only=False), path)

    return load_from_local


def _note_path(checkpoint: Any, path: Path) -> Any:
    """Tell who loads the shards of a sharded head where the checkpoint was: their folder lies beside it."""
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("meta"), dict) and SHARDS_KEY in checkpoint["meta"]:
        checkpoint["meta"][PATH_KEY] = str(path)
    return checkpoint


@contextlib.contextmanager
def atomic_open(path: str | os.PathLike[str], mode: str = "wb", encoding: str | None = None) -> Iterator[IO[Any]]:
    """Open ``path`` for writing so that it holds the old or the new content at every moment, never a part.

    The content goes to a hidden file in the same folder, is flushed to the disk, and replaces ``path`` when the block
    ends without an exception. What is not a regular file (a pipe, a device) is written directly.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with open(target, mode, encoding=encoding) as file:
            yield file
        return
    temporary = target.with_name(f".{target.name}.{_host()}-{os.getpid()}.partial")
    try:
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Delete the hidden files and folders that killed processes left in ``folder`` in the middle of a write."""
    leftovers = []
    for path in Path(folder).glob(".*.partial"):
        name = _TEMPORARY.match(path.name)
        if name is not None and not _still_writes(name["host"], int(name["process"])):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            leftovers.append(path)
    return leftovers


def _host() -> str:
    return socket.gethostname().replace(".", "_")


def _still_writes(host: str, process: int) -> bool:
    """Whether that process is alive. Of another machine's nothing is known; it is taken for dead."""
    if host != _host():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def why_unusable(path: str | os.PathLike[str], work_dir: str | os.PathLike[str] | None) -> str | None:
    """Why a run cannot resume from ``path``, or None if it can: the file is read and its checksums are verified.

    So are the shards of its classifier where it has some; every rank reads them, so that none waits for another here.
    """
    if not Path(path).is_file():
        return "there is no such file"
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                return f"its part {broken} does not match its checksum"
        checkpoint = make_local_loader(work_dir)(str(path), "cpu")
    except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        return f"it cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if not isinstance(checkpoint, dict) or not {"state_dict", "meta", "message_hub"} <= checkpoint.keys():
        return "it holds no training state (a published model?)"
    return _why_shards_unusable(checkpoint, path)


def _why_shards_unusable(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> str | None:
    from alimm.apis.sharded import folders_of
    from alimm.distributed.blocks import why_broken

    try:
        reasons = [why_broken(folder) for folder in folders_of(checkpoint, path).values()]
    except ValueError as error:
        return str(error)
    return next((reason for reason in reasons if reason is not None), None)


def _newest_first(folder: Path) -> list[Path]:
    found = [(path, re.fullmatch(r"(epoch|iter)_(\d+)\.pth", path.name)) for path in folder.glob("*_*.pth")]
    saved = [(path.stat().st_mtime_ns, int(match[2]), path) for path, match in found if match]
    return [path for _, _, path in sorted(saved, reverse=True)]


def find_resumable(work_dir: str) -> str | None:
    """The checkpoint that ``--resume auto`` continues from, or None when the run has none yet.

    It is what ``last_checkpoint`` names if that can be read whole, else the newest ``epoch_*.pth`` or ``iter_*.pth``
    that can. Every file that was passed over is named in the log with the reason.
    """
    pointer = Path(work_dir, "last_checkpoint")
    named = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
    folders = dict.fromkeys([Path(work_dir), *([Path(named).parent] if named else [])])
    candidates = [Path(named)] if named else []
    for folder in folders:
        candidates += [path for path in _newest_first(folder) if path not in candidates]
    for path in candidates:
        reason = why_unusable(path, work_dir)
        if reason is None:
            return str(path)
        print_log(f"not resumed from {path}: {reason}", logger="current", level=logging.WARNING)
    if candidates:
        raise ValueError(
            f"none of the {len(candidates)} checkpoints of {work_dir} can be read whole (the log says why). Remove "
            "them to start again, or name another one with --resume PATH"
        )
    print_log(f"{work_dir} holds no checkpoint: the run starts from the beginning", logger="current")
    return None
