"""Saving a `BinaryGraphIndex` beside others who save, over what is there, and after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest

from alimm.projects.binary_graph import index_files
from alimm.projects.binary_graph.index import BinaryGraphIndex
from alimm.projects.binary_graph.wal import writer_lock


def built(count: int = 20) -> BinaryGraphIndex:
    index = BinaryGraphIndex(bits=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index.add(np.random.default_rng(0).standard_normal((count, 8)))
    return index


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.name != ".lock")


def test_two_savers_do_not_destroy_each_other(tmp_path, monkeypatch):
    index, path = built(), tmp_path / "index"
    index.save(path)
    fill, refused = BinaryGraphIndex._fill, []

    def beside(self, data):
        files = fill(self, data)
        if not refused:
            refused.append(True)
            with pytest.raises(ValueError, match="another writer"):
                built(30).save(path)
        return files

    monkeypatch.setattr(BinaryGraphIndex, "_fill", beside)
    index.save(path)
    assert refused
    assert len(BinaryGraphIndex.open(path)) == 20
    built(30).save(path)
    assert len(BinaryGraphIndex.open(path)) == 30


def test_a_folder_that_another_one_has_just_made_is_left_to_him(tmp_path):
    (tmp_path / "index").mkdir()
    with writer_lock(tmp_path / "index"), pytest.raises(ValueError, match="another writer"):
        built().save(tmp_path / "index")
    assert (tmp_path / "index").is_dir()
    built().save(tmp_path / "index")
    assert len(BinaryGraphIndex.open(tmp_path / "index")) == 20


def test_only_data_that_the_index_names_is_removed(tmp_path):
    path = tmp_path / "index"
    built().save(path)
    former, other = next(path.glob("data-*")), path / ("data-" + "0" * 16)
    other.mkdir()
    (other / "thesis.txt").write_text("all I have")
    built(30).save(path)
    assert not former.exists()
    assert (other / "thesis.txt").read_text() == "all I have"


@pytest.mark.parametrize("content", ["{}", '{"name": "my site"}', "", "[" * 10_000, "newer", "damaged"])
def test_a_json_file_of_somebody_else_is_not_replaced(tmp_path, content):
    path = tmp_path / "site"
    path.mkdir()
    body = {"format": index_files.FORMAT, "version": 1, "data": "data-" + "0" * 16, "options": {}, "files": {}}
    if content == "newer":
        body["version"] = 2
    text = json.dumps(body, sort_keys=True)
    if content in ("newer", "damaged"):
        content = json.dumps({"crc32": zlib.crc32(text.encode()) + (content == "damaged"), "body": body})
    (path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json is not of an index that can be replaced .* remove it"):
        built().save(path)
    assert (path / "index.json").read_text() == content
    assert [entry.name for entry in path.iterdir()] == ["index.json"]


KILLED = """
import os, sys, types, warnings
import numpy as np
from alimm.projects.binary_graph import index_files
from alimm.projects.binary_graph.index import BinaryGraphIndex
warnings.simplefilter("ignore")
index = BinaryGraphIndex(bits=64)
index.add(np.random.default_rng(0).standard_normal((30, 8)))
path, name = sys.argv[1], sys.argv[2]
kill = lambda *arguments, **options: os._exit(9)
setattr(index_files, name, types.SimpleNamespace(rmtree=kill) if name == "shutil" else kill)
index.save(path)
"""


@pytest.mark.parametrize("step", ["replace_file", "write_array", "sync_folder", "shutil"])
def test_a_kill_leaves_one_index_and_the_next_save_tidies_up(tmp_path, step):
    """Before anything, amid the data, before they are published, and before the former ones go."""
    index, path = built(20), tmp_path / "index"
    index.save(path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), step], cwd=os.getcwd())
    assert done.returncode == 9
    assert len(names(path)) == (2 if step == "replace_file" else 4)
    assert len(BinaryGraphIndex.open(path)) == (30 if step == "shutil" else 20)
    index.save(path)
    assert len(names(path)) == 2
    assert len(BinaryGraphIndex.open(path)) == 20
