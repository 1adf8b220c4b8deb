"""A writer that is killed leaves the old generation or the new one; what neither needs goes, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alimm.projects.binary_graph import array_files
from alimm.projects.binary_graph import manifest as module
from alimm.projects.binary_graph.array_files import DamagedIndexError
from alimm.projects.binary_graph.manifest import Manifest, collect_garbage, load, open_index_files, publish
from tests.projects.binary_graph.small_index import environment, files_of, small_segment, write_generation


def test_generations_only_grow(tmp_path):
    manifest = write_generation(tmp_path, 2)
    for generation in (1, 2):
        with pytest.raises(ValueError, match="has generation 2 already"):
            publish(tmp_path, replace(manifest, generation=generation))
    publish(tmp_path, replace(manifest, generation=3))
    assert load(tmp_path).generation == 3
    (tmp_path / "MANIFEST.json").write_text("{")
    with pytest.raises(DamagedIndexError):
        publish(tmp_path, replace(manifest, generation=4))


def test_what_would_not_open_is_not_published(tmp_path):
    manifest = write_generation(tmp_path)
    before = files_of(tmp_path)
    for wrong in (
        dict(bits=64),
        dict(next_id=-1),
        dict(config={"x": float("nan")}),
        dict(segments=manifest.segments * 2),
    ):
        with pytest.raises(ValueError, match=r"."):
            publish(tmp_path, replace(manifest, generation=2, **wrong))
    with pytest.raises(AssertionError):
        publish(tmp_path, replace(manifest, generation=2, wal="wal-00000002-000.log"))
    assert load(tmp_path) == manifest
    assert files_of(tmp_path) == before


def test_a_full_disk_leaves_the_old_generation(tmp_path, monkeypatch):
    manifest = write_generation(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(array_files.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            publish(tmp_path, replace(manifest, generation=2))
    assert load(tmp_path) == manifest
    assert not list(tmp_path.glob("*.part-*"))


STEPS = ["begin", "written", "flushed", "renamed", "published", "retired"]

KILLED = """
import os, sys
from pathlib import Path
from alimm.projects.binary_graph import manifest
from tests.projects.binary_graph.small_index import write_generation
def hook(name):
    if name == sys.argv[2]:
        os._exit(9)
manifest._step_hook = hook
write_generation(Path(sys.argv[1]), 2)
"""


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_between_any_two_steps_leaves_one_generation(tmp_path, step):
    write_generation(tmp_path, 1)
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), step], cwd=os.getcwd(), env=environment())
    assert process.returncode == 9
    files = open_index_files(tmp_path, "full")
    assert files.manifest.generation == (1 if step in STEPS[:3] else 2)
    assert len(files.segments) == 2
    # What it left goes, what is needed stays, and the next writer goes on.
    assert collect_garbage(tmp_path, files.manifest, 0)
    open_index_files(tmp_path, "full")
    assert not list(tmp_path.glob("*.part-*"))
    assert write_generation(tmp_path, 3) == open_index_files(tmp_path, "full").manifest


def test_all_steps_are_called_in_order(tmp_path, monkeypatch):
    seen = []
    write_generation(tmp_path, 1)
    monkeypatch.setattr(module, "_step_hook", seen.append)
    publish(tmp_path, replace(load(tmp_path), generation=2))
    assert seen == STEPS


def age(root: Path, seconds: float) -> None:
    for path in root.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2, follow_symlinks=False)


def test_garbage(tmp_path):
    old, new = write_generation(tmp_path, 1), write_generation(tmp_path, 2)
    mine = [
        "notes.txt",
        "wal.log",
        "wal-1-1.log",
        "deleted.npy",
        "segments/mine",
        "segments/seg-x",
        "MANIFEST.json.bak",
    ]
    for name in mine:
        (tmp_path / name).touch()
    (tmp_path / "segments" / "seg-00000001-777").symlink_to(tmp_path / "segments" / new.segments[0]["name"])
    (tmp_path / "wal-00000001-777.log").symlink_to(tmp_path / new.wal)
    kept = tmp_path / "segments" / old.segments[1]["name"]
    (kept / "notes.txt").touch()
    (tmp_path / "MANIFEST.json.part-0123abcd").touch()
    assert collect_garbage(tmp_path, new, 60) == []
    age(tmp_path, 100)
    removed = collect_garbage(tmp_path, new, 60)
    assert set(removed) == (old.names() | {"MANIFEST.json.part-0123abcd"}) - {f"segments/{kept.name}"}
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]
    assert open_index_files(tmp_path, "full").manifest == new
    for name in (*mine, "segments/seg-00000001-777", "wal-00000001-777.log"):
        assert (tmp_path / name).exists(), name
    assert collect_garbage(tmp_path, new, 0) == []


def test_grace_counts_from_when_files_were_replaced(tmp_path):
    old = write_generation(tmp_path, 1)
    age(tmp_path, 10_000)
    new = write_generation(tmp_path, 2)
    assert collect_garbage(tmp_path, new, 60) == []
    assert set(collect_garbage(tmp_path, new, 0)) == old.names()


def test_open_maps_outlive_their_generation(tmp_path):
    write_generation(tmp_path, 1)
    files = open_index_files(tmp_path)
    collect_garbage(tmp_path, write_generation(tmp_path, 2), 0)
    assert np.array_equal(files.segments[0].codes, small_segment(300, 10).codes)


def test_a_reader_that_comes_in_between_opens_the_newer_generation(tmp_path, monkeypatch):
    write_generation(tmp_path, 1)
    real, published = module.load, []

    def load_then_publish(root: Path) -> Manifest:
        found = real(root)
        if len(published) < 2:
            published.append(found.generation)
            monkeypatch.setattr(module, "load", real)
            collect_garbage(root, write_generation(root, found.generation + 1), 0)
            monkeypatch.setattr(module, "load", load_then_publish)
        return found

    monkeypatch.setattr(module, "load", load_then_publish)
    assert open_index_files(tmp_path, "full").manifest.generation == 3
