"""Where an index is written: what is found out before a build begins, and what a killed one left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alimm.projects.binary_graph import BinaryGraph, BuildConfig, pipeline
from alimm.projects.binary_graph.array_files import DamagedIndexError
from alimm.projects.binary_graph.manifest import IndexVersionError
from alimm.projects.binary_graph.wal import writer_lock
from tests.projects.binary_graph.brute_force import exact_segment, random_codes


@pytest.fixture
def no_build(monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "build_segment", lambda *_, **__: pytest.fail("a build was begun"))


def test_a_held_lock_is_found_before_the_build(tmp_path, no_build):
    with BinaryGraph.build(np.empty((0, 2), np.uint64), path=tmp_path / "a") as writer:
        writer.add(random_codes(1))
        with pytest.raises(ValueError, match="another writer"):
            BinaryGraph.build(random_codes(5), path=tmp_path / "a")
        assert len(writer) == 1


@pytest.mark.parametrize("name", ["file/index", "file/deep/index", "x" * 256])
def test_a_place_that_cannot_be_is_found_before_the_build(tmp_path, no_build, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"Not a directory|File exists|File name too long"):
        BinaryGraph.build(random_codes(5), path=tmp_path / name)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_others_wait_while_an_index_is_built_anew(tmp_path, monkeypatch):
    BinaryGraph.build(random_codes(5), path=tmp_path / "a").close()

    def slow(*arguments, **options):
        with pytest.raises(ValueError, match="another writer"):
            writer_lock(tmp_path / "a")
        return exact_segment(*arguments, **options)

    monkeypatch.setattr(pipeline, "build_segment", slow)
    BinaryGraph.build(random_codes(7), path=tmp_path / "a")
    writer_lock(tmp_path / "a").release()
    assert len(BinaryGraph.open(tmp_path / "a")) == 7


def test_a_build_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def broken(*_, **__):
        assert list((tmp_path / "deep" / "er").iterdir())
        raise OSError("no space left")

    monkeypatch.setattr(pipeline, "build_segment", broken)
    with pytest.raises(OSError, match="no space left"):
        BinaryGraph.build(random_codes(5), path=tmp_path / "deep" / "er" / "index")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys
import numpy as np
from alimm.projects.binary_graph import BinaryGraph, pipeline
pipeline.build_segment = lambda *_, **__: os._exit(9)
BinaryGraph.build(np.zeros((3, 2), np.uint64), path=sys.argv[1])
"""


def test_what_a_killed_build_left_goes_with_the_next_one(tmp_path, monkeypatch):
    path = tmp_path / "in[d]ex \u00e9"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=os.getcwd())
    assert done.returncode == 9
    (left,) = tmp_path.iterdir()
    # Those of a process that lives, of another machine, of another index, and what only looks alike.
    start = left.name.split("-")
    others = ["-".join([start[0], start[1], str(os.getpid()), start[3]]), "-".join([start[0], "0" * 8, *start[2:]])]
    others += [f".other{left.name}", f"{left.name}-2"]
    for name in others:
        (tmp_path / name).mkdir()
    BinaryGraph.build(random_codes(5), path=path).close()
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, *others}


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda text: text[:-5], DamagedIndexError),
        (lambda text: text.replace('"bits":128', '"bits":192'), DamagedIndexError),
        (lambda text: "{}", DamagedIndexError),
        (lambda text: json.dumps({**json.loads(text), "version": 0}), IndexVersionError),
        (lambda text: json.dumps({**json.loads(text), "version": 99}), IndexVersionError),
    ],
)
@pytest.mark.parametrize("call", ["build", "save"])
def test_a_damaged_index_is_not_replaced_and_the_message_says_what_to_do(tmp_path, damage, error, call):
    path = tmp_path / "a"
    index = BinaryGraph.build(random_codes(5))
    index.save(path)
    file = path / "MANIFEST.json"
    file.write_text(damage(file.read_text()))
    before = {entry: entry.read_bytes() for entry in path.rglob("*") if entry.is_file()}

    def write() -> None:
        BinaryGraph.build(random_codes(5), path=path).close() if call == "build" else index.save(path)

    with pytest.raises(error, match="remove it, or name another one, then build the index again"):
        write()
    assert {entry: entry.read_bytes() for entry in path.rglob("*") if entry.is_file()} == before
    shutil.rmtree(path)
    write()
    assert len(BinaryGraph.open(path)) == 5


def test_settings_may_be_a_dict(tmp_path):
    index = BinaryGraph.build(random_codes(5), config={"degree": 7, "seed": 3})
    assert index.config == BuildConfig(degree=7, seed=3)
    with pytest.raises(ValueError, match="no setting degre"):
        BinaryGraph.build(random_codes(5), config={"degre": 7})
    with pytest.raises(ValueError, match="must be a BuildConfig or a dict of its settings, got list"):
        BinaryGraph.build(random_codes(5), config=[7])


@pytest.mark.parametrize("name", ["x.npy", Path("x.npy"), ["x.npy", "y.npy"]])
def test_the_name_of_a_file_is_no_array(name):
    with pytest.raises(ValueError, match=r"x\.npy.* source_from of alimm\.projects\.binary_graph\.sources"):
        BinaryGraph.build(name)


def test_no_rows_can_be_added_after_the_largest_id():
    index = BinaryGraph.build(random_codes(1), [2**63 - 1])
    assert index.add(np.empty((0, 2), np.uint64)).shape == (0,)
    assert len(index) == 1
