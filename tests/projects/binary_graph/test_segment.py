"""A segment comes back as it was; one that would lead a kernel out of its arrays does not open."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alimm.projects.binary_graph import array_files
from alimm.projects.binary_graph import segment as module
from alimm.projects.binary_graph.array_files import DamagedIndexError, MissingFileError, write_array
from alimm.projects.binary_graph.segment import (
    ARRAYS,
    Segment,
    check_table,
    fresh_segment_name,
    open_segment,
    validate,
    write_segment,
)
from tests.projects.binary_graph.small_index import empty_segment, small_segment

NAME = "seg-00000001-000"


def assert_same(left: Segment, right: Segment) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name, strict=True)
    assert left.info == right.info


@pytest.mark.parametrize("words", [1, 2, 16])
@pytest.mark.parametrize("verify", ["header", "full"])
def test_segments_come_back(tmp_path, words, verify):
    for segment in (small_segment(words=words), small_segment(1, words=words), empty_segment(words)):
        name = fresh_segment_name(tmp_path, 1)
        found = open_segment(tmp_path, write_segment(tmp_path, name, segment), verify)
        assert_same(found, segment)
        assert (found.num_nodes, found.num_rows, found.bits) == (len(segment.codes), len(segment.ids), 64 * words)


def test_an_exact_segment_has_neither_edges_nor_centres(tmp_path):
    full, none = small_segment(), empty_segment()
    exact = replace(none, codes=full.codes, indptr=np.zeros(301, np.int64), row_indptr=full.row_indptr, ids=full.ids)
    validate(exact, full=True)
    assert_same(open_segment(tmp_path, write_segment(tmp_path, NAME, exact), "full"), exact)


def test_the_same_segment_gives_the_same_bytes(tmp_path):
    tables = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        tables.append(write_segment(tmp_path / folder, NAME, small_segment()))
    assert tables[0] == tables[1]
    for array in ARRAYS:
        a, b = (tmp_path / folder / "segments" / NAME / f"{array}.npy" for folder in "ab")
        assert a.read_bytes() == b.read_bytes()


def with_value(name: str, where: int, value: int):
    def change(segment: Segment) -> Segment:
        array = getattr(segment, name).copy()
        array[where] = value
        return replace(segment, **{name: array})

    return change


def with_array(name: str, make):
    return lambda segment: replace(segment, **{name: make(getattr(segment, name))})


BIG = np.iinfo(np.int64).max
WRONG = {
    "indptr start": (with_value("indptr", 0, 1), "indptr must start with 0"),
    "indptr end": (with_value("indptr", -1, 10**6), "indptr must start with 0 and end with"),
    "indptr falls": (with_value("indptr", 7, 0), "indptr must not fall"),
    "indptr wraps": (with_value("indptr", 7, -BIG - 1), "indptr must not fall"),
    "indptr jumps": (with_value("indptr", 7, BIG), "indptr must not fall"),
    "indptr wraps twice": (
        lambda s: with_value("indptr", 8, 10**6 - BIG)(with_value("indptr", 7, BIG)(s)),
        "indptr must not fall",
    ),
    "indptr short": (with_array("indptr", lambda a: a[:-1].copy()), "indptr must have the shape"),
    "edge negative": (with_value("edges", 11, -1), r"edges must lie in \[0, 300\), got -1"),
    "edge beyond": (with_value("edges", -1, 300), r"edges must lie in \[0, 300\), got 300"),
    "rows start": (with_value("row_indptr", 0, -1), "row_indptr must start"),
    "node without rows": (lambda s: with_value("row_indptr", 9, s.row_indptr[8])(s), "row_indptr must rise"),
    "rows end": (with_array("ids", lambda a: a[:-1].copy()), "row_indptr must start with 0 and end"),
    "id negative": (with_value("ids", 5, -1), "ids must be >= 0"),
    "first id negative": (with_value("ids", 0, -1), "ids must be >= 0"),
    "entry start": (with_value("entry_indptr", 1, 10**9), "entry_indptr must not fall"),
    "entry end": (with_value("entry_indptr", -1, 10**9), "entry_indptr must start"),
    "entry negative": (with_value("entry_nodes", 0, -2), "entry_nodes must lie"),
    "entry beyond": (with_value("entry_nodes", -1, 300), "entry_nodes must lie"),
    "entry codes short": (with_array("entry_codes", lambda a: a[:-1].copy()), "entry_codes must have the shape"),
    "centres wider": (with_array("centres", lambda a: np.tile(a, 2)), "centres must have the shape"),
    "centres more": (with_array("centres", lambda a: np.tile(a, (2, 1))), "entry_indptr must have the shape"),
    "no words": (with_array("codes", lambda a: a[:, :0].copy()), "1 to 16 words"),
    "dtype": (with_array("edges", lambda a: a.astype(np.int64)), "edges must be an array of <i4"),
    "unsigned": (with_array("indptr", lambda a: a.astype(np.uint64)), "indptr must be an array of <i8"),
    "byte order": (with_array("codes", lambda a: a.astype(">u8")), "codes must be an array of <u8"),
    "axes": (with_array("edges", lambda a: a[:, None]), "edges must be an array of <i4 with 1 axes"),
    "list": (with_array("edges", lambda a: a.tolist()), "got list"),
    "strided": (with_array("codes", np.asfortranarray), "codes must be contiguous"),
}
FULL_ONLY = {
    "id twice": (lambda s: with_value("ids", -1, s.ids[0])(s), "ids must be unique"),
    "entry code": (with_value("entry_codes", 3, 5), "entry_codes must be the codes"),
}


@pytest.mark.parametrize("steps", [7, 1 << 20])
@pytest.mark.parametrize("case", [*WRONG, *FULL_ONLY])
def test_validate_finds(case, steps, monkeypatch):
    # Steps of 7 put every fault at another place of a block, its ends included.
    monkeypatch.setattr(module, "_STEP", steps)
    change, message = {**WRONG, **FULL_ONLY}[case]
    segment = small_segment()
    if case == "id twice":  # in a node of one row, or the order inside the node shows it
        last = int(np.flatnonzero(np.diff(segment.row_indptr) == 1)[-1])
        change = with_value("ids", segment.row_indptr[last], segment.ids[0])
    validate(segment, full=True)
    with pytest.raises(ValueError, match=message):
        validate(change(segment), full=True)
    if case in FULL_ONLY:
        validate(change(segment))
    else:
        with pytest.raises(ValueError, match=message):
            validate(change(segment))


@pytest.mark.parametrize("steps", [1, 7, 1 << 20])
def test_order_inside_a_node(steps, monkeypatch):
    monkeypatch.setattr(module, "_STEP", steps)
    segment = small_segment()
    validate(segment)
    many = np.flatnonzero(np.diff(segment.row_indptr) > 1)
    for node in (many[0], many[len(many) // 2], many[-1]):
        ids = segment.ids.copy()
        first = segment.row_indptr[node]
        for pair in (ids[first : first + 2][::-1].copy(), np.repeat(ids[first], 2)):
            ids[first : first + 2] = pair
            with pytest.raises(ValueError, match="ascend inside a node"):
                validate(replace(segment, ids=ids))


@pytest.mark.parametrize("verify", ["header", "full"])
@pytest.mark.parametrize(
    "case", [name for name in WRONG if name not in ("dtype", "unsigned", "byte order", "axes", "list", "strided")]
)
def test_hostile_arrays_with_right_checksums_do_not_open(tmp_path, case, verify):
    segment = small_segment()
    table = write_segment(tmp_path, NAME, segment, durable=False)
    wrong = WRONG[case][0](segment)
    for name in ARRAYS:
        entry = write_array(tmp_path / "segments" / NAME / f"{name}.npy", getattr(wrong, name), durable=False)
        table["arrays"][name] = entry.to_json()
    with pytest.raises(DamagedIndexError, match=WRONG[case][1]):
        open_segment(tmp_path, table, verify)


def test_full_finds_a_changed_byte_of_every_array(tmp_path):
    table = write_segment(tmp_path, NAME, small_segment())
    for name in ARRAYS:
        path = tmp_path / "segments" / NAME / f"{name}.npy"
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        with pytest.raises(DamagedIndexError, match=rf"{name}\.npy"):
            open_segment(tmp_path, table, "full")
        path.write_bytes(raw)
    open_segment(tmp_path, table, "full")


def test_missing_array_and_links(tmp_path):
    table = write_segment(tmp_path, NAME, small_segment())
    folder = tmp_path / "segments" / NAME
    (folder / "edges.npy").rename(tmp_path / "edges.npy")
    with pytest.raises(MissingFileError, match=r"edges\.npy is missing"):
        open_segment(tmp_path, table)
    (folder / "edges.npy").symlink_to(tmp_path / "edges.npy")
    with pytest.raises(DamagedIndexError, match="is a link"):
        open_segment(tmp_path, table)
    (folder / "edges.npy").unlink()
    (tmp_path / "edges.npy").rename(folder / "edges.npy")
    open_segment(tmp_path, table)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedIndexError, match="is a link"):
        open_segment(tmp_path, table)
    folder.unlink()
    (tmp_path / "elsewhere").rename(folder)
    (tmp_path / "segments").rename(tmp_path / "other")
    (tmp_path / "segments").symlink_to(tmp_path / "other")
    with pytest.raises(DamagedIndexError, match="is a link"):
        open_segment(tmp_path, table)


def test_hostile_tables(tmp_path):
    good = write_segment(tmp_path, NAME, small_segment())
    check_table(good)

    def refused(change, message: str) -> None:
        table = copy.deepcopy(good)
        changed = change(table)
        table = changed if changed == 5 else table
        with pytest.raises(ValueError, match=message):
            check_table(table)
        with pytest.raises(DamagedIndexError):
            open_segment(tmp_path, table)

    for name in (
        "../x",
        "/etc",
        "seg-00000001-000/../../x",
        "seg-00000001-000\n",
        "",
        "seg-1-1",
        5,
        None,
        ["a"],
        "seg-\u0661" * 4,
    ):
        refused(lambda t, name=name: t.update(name=name), "named seg-")
    refused(lambda t: 5, "must have name")
    refused(lambda t: t.pop("info"), "must have name")
    refused(lambda t: t.update(more=1), "must have name")
    refused(lambda t: t.update(info=[1]), "info of")
    refused(lambda t: t.update(arrays=[]), "must have the arrays")
    refused(lambda t: t["arrays"].pop("edges"), "must have the arrays")
    refused(lambda t: t["arrays"].update({"../edges": 1}), "must have the arrays")
    refused(lambda t: t["arrays"].update(edges=t["arrays"]["indptr"]), "edges of .* must be <i4")
    refused(lambda t: t["arrays"].update(indptr=t["arrays"]["ids"]), "indptr must have the shape")
    refused(lambda t: t["arrays"].update(edges=None), "entry of edges")


def test_a_wrong_segment_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="edges must lie"):
        write_segment(tmp_path, NAME, WRONG["edge beyond"][0](small_segment()))
    for info in ({"x": float("nan")}, {"x": object()}, {"x": np.int64(3)}):
        with pytest.raises(ValueError, match="info of a segment must be JSON"):
            write_segment(tmp_path, NAME, replace(small_segment(), info=info))
    assert not list(tmp_path.rglob("*.npy"))
    write_segment(tmp_path, NAME, small_segment())
    with pytest.raises(FileExistsError):
        write_segment(tmp_path, NAME, small_segment())


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 9:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(array_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_segment(tmp_path, NAME, small_segment())
    assert not list((tmp_path / "segments").iterdir())


def test_unicode_folder(tmp_path: Path):
    root = tmp_path / "\u7d22\u5f15 \u00fc"
    root.mkdir()
    assert_same(open_segment(root, write_segment(root, NAME, small_segment()), "full"), small_segment())
