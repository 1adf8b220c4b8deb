"""Clearing away what no generation of an index needs any more, and nothing else."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from alimm.projects.binary_graph.segment import ARRAYS, FOLDER

GRACE_SECONDS = 600.0
"""How long files stay after they were replaced: readers that read the old manifest may not have opened them yet."""

_FILE = re.compile(r"(?:wal-\d{8,18}-\d{3,6}\.log|deleted-\d{8,18}-\d{3,6}\.npy|MANIFEST\.json)(?:\.part-[0-9a-f]{8})?")
_SEGMENT = re.compile(r"seg-\d{8,18}-\d{3,6}")
_ARRAY = re.compile(rf"(?:{'|'.join(ARRAYS)})\.npy(?:\.part-[0-9a-f]{{8}})?")


class Named(Protocol):
    """What names the files that stay: a ``Manifest``."""

    def names(self) -> set[str]:
        """Files and folders, relative to the index."""


def retire(root: Path, names: Collection[str]) -> None:
    """Set the time of files that a new generation does not need: the grace time counts from now."""
    for name in names:
        try:
            os.utime(root / name)
        except OSError:
            # Then it goes a little earlier; a reader that misses it reads the newer manifest.
            continue


def _is_old(path: Path, now: float, grace_seconds: float) -> bool:
    return grace_seconds <= 0 or now - path.stat(follow_symlinks=False).st_mtime >= grace_seconds


def _remove_segment(folder: Path) -> bool:
    for path in list(folder.iterdir()):
        if _ARRAY.fullmatch(path.name):
            path.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:
        return False  # somebody keeps a file of his own there
    return True


def collect_garbage(root: Path, keep: Named, grace_seconds: float = GRACE_SECONDS) -> list[str]:
    """Remove segments, logs and tables that the manifest does not name, and what an interrupted write left.

    Only names that an index gives are touched, and no links. Readers that have the files open keep them. The caller
    holds the ``writer_lock``, and is not in the middle of making another generation unless ``grace_seconds`` covers it.

    Args:
        root: the folder of the index.
        keep: the manifest of the folder.
        grace_seconds: age from which files go; 0: all of them, at once.

    Returns:
        What was removed, relative to ``root``, sorted.
    """
    needed, removed, now = keep.names(), [], time.time()
    for path in sorted(root.iterdir()):
        match = _FILE.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_file() or path.name in needed:
            continue
        if path.name != "MANIFEST.json" and _is_old(path, now, grace_seconds):
            path.unlink(missing_ok=True)
            removed.append(path.name)
    segments = root / FOLDER
    if segments.is_symlink() or not segments.is_dir():
        return removed
    for path in sorted(segments.iterdir()):
        name = f"{FOLDER}/{path.name}"
        if name in needed or path.is_symlink() or not _SEGMENT.fullmatch(path.name) or not path.is_dir():
            continue
        if _is_old(path, now, grace_seconds) and _remove_segment(path):
            removed.append(name)
    return removed
