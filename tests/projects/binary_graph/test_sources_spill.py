"""Arrays in memory that are written for other processes: what is left of a disk that was full is not trusted."""

from __future__ import annotations

import os

import numpy as np
import pytest

from alimm.projects.binary_graph import array_files
from alimm.projects.binary_graph.sources import ArraySource, open_source
from tests.projects.binary_graph.brute_force import random_codes

CODES, IDS = random_codes(50), np.arange(50)[::-1] * 3


def check(source: ArraySource, folder) -> None:
    opened = open_source(source.describe(folder))
    np.testing.assert_array_equal(opened.read(0, 50), CODES)
    np.testing.assert_array_equal(opened.ids(0, 50), IDS)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("which", ["codes", "ids"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: b"",
        lambda whole: whole[:60],
        lambda whole: whole[:-8],
        lambda whole: whole + b"x" * 16,
        lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
        lambda whole: b"x" + whole[1:],
        lambda whole: whole.replace(b"'fortran_order': False", b"'fortran_order': True "),
    ],
)
def test_a_file_that_is_not_whole_is_written_again(tmp_path, which, spoil):
    source = ArraySource(CODES, IDS)
    check(source, tmp_path)
    file = next(tmp_path.glob(f"{which}-*"))
    file.write_bytes(spoil(file.read_bytes()))
    check(source, tmp_path)


def test_a_whole_file_is_used_again(tmp_path):
    check(ArraySource(CODES, IDS), tmp_path)
    before = {file: file.stat().st_ino for file in tmp_path.iterdir()}
    check(ArraySource(CODES, IDS), tmp_path)
    assert {file: file.stat().st_ino for file in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(array_files.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        ArraySource(CODES).describe(tmp_path)
    assert os.listdir(tmp_path) == []
