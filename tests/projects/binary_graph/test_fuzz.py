"""Damage at random: a whole index opens as it was written, or the error is ours; never another array, never a crash."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from alimm.projects.binary_graph import wal_records
from alimm.projects.binary_graph.manifest import IndexFiles, open_index_files
from alimm.projects.binary_graph.segment import ARRAYS, validate
from tests.projects.binary_graph.small_index import environment, files_of, write_generation


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(wal_records.time, "sleep", lambda seconds: None)
    write_generation(tmp_path / "index")
    return tmp_path / "index"


@contextmanager
def content(path: Path, raw: bytes) -> Iterator[None]:
    """Another content of a file, for a while."""
    before = path.read_bytes()
    path.write_bytes(raw)
    try:
        yield
    finally:
        path.write_bytes(before)


def flips(files: list[Path], count: int, seed: int) -> Iterator[tuple[Path, bytes]]:
    """Each file as often as the others, however small it is; half of the places in the first 200 bytes."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        path = files[number % len(files)]
        raw = bytearray(path.read_bytes())
        where = int(generator.integers(len(raw) if generator.random() < 0.5 else min(200, len(raw))))
        raw[where] ^= int(generator.integers(1, 256))
        yield path, bytes(raw)


def touch(files: IndexFiles) -> int:
    """Read everything that a search could reach through the arrays."""
    total = len(files.deleted) + sum(len(record.ids) for record in files.records)
    for segment in files.segments:
        validate(segment)
        for name in ARRAYS:
            total += int(getattr(segment, name).astype(np.uint64).sum(dtype=np.uint64) % 7)
        total += len(segment.codes[segment.edges]) + len(segment.codes[segment.entry_nodes])
        total += len(segment.edges[segment.indptr[:-1].clip(0, len(segment.edges) - 1)])
    return total


def try_header_mode(root: Path, count: int, seed: int) -> tuple[int, int]:
    """Open a damaged index in the quick way: how often it opened, and how often it was refused."""
    opened = refused = 0
    for path, raw in flips(files_of(root), count, seed):
        with content(path, raw):
            try:
                touch(open_index_files(root, "header"))
                opened += 1
            except ValueError:
                refused += 1
    return opened, refused


def test_full_mode_finds_every_flipped_byte(root):
    for path, raw in flips(files_of(root), 1000, 0):
        with content(path, raw), warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match=r".{20}") as caught:
                open_index_files(root, "full")
            assert path.name in str(caught.value), (path, caught.value)
    touch(open_index_files(root, "full"))


def test_header_mode_never_crashes(root):
    """In a process of its own: a crash is an exit status there."""
    script = (
        "import sys; from pathlib import Path; from tests.projects.binary_graph import test_fuzz as fuzz;"
        "fuzz.wal_records.time.sleep = lambda seconds: None; print(*fuzz.try_header_mode(Path(sys.argv[1]), 500, 1))"
    )
    command = [sys.executable, "-X", "faulthandler", "-c", script, str(root)]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    opened, refused = map(int, found.stdout.split())
    assert opened > 20
    assert refused > 100


def test_truncation_at_many_places(root):
    records = [record.ids.tolist() for record in open_index_files(root).records]
    generator = np.random.default_rng(2)
    prefixes = set()
    for path in files_of(root):
        raw = path.read_bytes()
        sizes = {0, 1, 6, 10, 31, 32, 33, 56, 127, 128, len(raw) - 1, *generator.integers(0, len(raw), 6).tolist()}
        for number, size in enumerate(sorted(size for size in sizes if size < len(raw))):
            verify = ("header", "full")[number % 2]
            with content(path, raw[:size]):
                if path.suffix == ".log" and size >= 32:
                    found = [record.ids.tolist() for record in open_index_files(root, verify).records]
                    assert found == records[: len(found)]
                    assert len(found) < len(records)
                    prefixes.add(len(found))
                    continue
                with pytest.raises(ValueError, match=path.name):
                    open_index_files(root, verify)
    assert {0, 1} <= prefixes


def test_bytes_that_are_too_many(root):
    for path in files_of(root):
        for tail in (b"\0", b"\0" * 4096, b"x" * 4096):
            with content(path, path.read_bytes() + tail):
                if path.suffix == ".log" and not any(tail):
                    assert len(open_index_files(root, "full").records) == 3
                    continue
                with pytest.raises(ValueError, match=path.name):
                    open_index_files(root, "full")


def test_files_in_each_others_place(root):
    files = [path for path in files_of(root) if path.suffix == ".npy"]
    raws = {path: path.read_bytes() for path in files}
    for left, right in zip(files, files[1:] + files[:1], strict=True):
        if raws[left] != raws[right]:
            with content(left, raws[right]), pytest.raises(ValueError, match=left.name):
                open_index_files(root, "full")


# Renames of a generation: 18 arrays, the log, two tables of deleted ids, the manifest.
PLACES = [0, 1, 8, 9, 17, 18, 19, 20, 21]

KILLED = """
import os, sys
from pathlib import Path
from tests.projects.binary_graph.small_index import write_generation
real = Path.replace
for root in sys.argv[1:]:
    place, after = map(int, Path(root).name.split("-"))
    child = os.fork()
    if not child:
        calls = []
        def replace(self, target):
            calls.append(target)
            if len(calls) > place:
                if after:
                    real(self, target)
                os._exit(9)
            return real(self, target)
        Path.replace = replace
        write_generation(Path(root), 2)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_kill_before_or_after_any_rename_leaves_one_generation(root, tmp_path):
    copies = [tmp_path / f"{place}-{after}" for place in PLACES for after in (0, 1)]
    for copy in copies:
        shutil.copytree(root, copy)
    command = [sys.executable, "-c", KILLED, *map(str, copies)]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["9"] * len(copies)
    for copy in copies:
        files = open_index_files(copy, "full")
        touch(files)
        assert files.manifest.generation == (2 if copy == copies[-1] else 1)
        assert len(files.records) == 3
