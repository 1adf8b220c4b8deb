"""What is published opens as it was; what anybody wrote into the files of an index is not trusted."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alimm.projects.binary_graph import array_files
from alimm.projects.binary_graph import manifest as module
from alimm.projects.binary_graph.array_files import DamagedIndexError, MissingFileError
from alimm.projects.binary_graph.manifest import (
    IndexVersionError,
    Manifest,
    NoIndexError,
    load,
    open_index_files,
    publish,
    write_deleted,
)
from alimm.projects.binary_graph.segment import ARRAYS
from alimm.projects.binary_graph.wal import WriteAheadLog
from tests.projects.binary_graph.small_index import environment, files_of, small_segment, write_generation


def dumps(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def forge(root: Path, content: Any, **head: Any) -> None:
    """Write a manifest with a right checksum, whatever it says."""
    found = dict(format="alimm.binary_graph", version=1, crc32=zlib.crc32(dumps(content).encode()), manifest=content)
    (root / "MANIFEST.json").write_text(dumps({**found, **head}) + "\n")


@pytest.mark.parametrize("verify", ["header", "full"])
def test_what_is_published_opens(tmp_path, verify):
    manifest = write_generation(tmp_path)
    assert load(tmp_path) == manifest
    files = open_index_files(tmp_path, verify)
    assert files.manifest == manifest
    for number, segment in enumerate(files.segments):
        expected = small_segment(300 - 100 * number, number + 10, 10_000 * number)
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(segment, name), getattr(expected, name))
    assert files.deleted.tolist() == [3, 7, 10_002]
    assert {name: ids.tolist() for name, ids in files.deleted_in.items()} == {manifest.segments[0]["name"]: [9]}
    assert [record.ids.tolist() for record in files.records] == [[20_000, 20_001, 20_002], [20_001, 5], [2**63 - 1]]
    assert files.log.sequence == 3


def test_an_index_without_segments(tmp_path):
    log = WriteAheadLog.create(tmp_path, 16, 1)
    publish(tmp_path, Manifest(1, 1024, [], log.name))
    files = open_index_files(tmp_path, "full")
    assert (files.segments, files.records, files.deleted.dtype, len(files.deleted)) == ([], [], np.int64, 0)


def test_the_same_index_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        write_generation(tmp_path / folder)
    left, right = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert [path.name for path in left] == [path.name for path in right]
    assert [path.read_bytes() for path in left] == [path.read_bytes() for path in right]


def test_a_changed_byte_anywhere_is_found(tmp_path):
    write_generation(tmp_path)
    path = tmp_path / "MANIFEST.json"
    raw = path.read_bytes()
    for where in range(0, len(raw), 3):
        path.write_bytes(raw[:where] + bytes([raw[where] ^ (1 << where % 8)]) + raw[where + 1 :])
        with pytest.raises((DamagedIndexError, IndexVersionError), match=r"MANIFEST\.json"):
            load(tmp_path)
    for size in range(0, len(raw), 5):
        path.write_bytes(raw[:size])
        with pytest.raises(DamagedIndexError):
            load(tmp_path)
    for other in (raw + b"\n", b" " + raw, b"\xff\xfe" + raw, raw.decode().encode("utf-16"), raw[:-1], raw + raw):
        path.write_bytes(other)
        with pytest.raises(DamagedIndexError):
            load(tmp_path)


def test_no_manifest(tmp_path):
    for root in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(NoIndexError, match=r"holds no MANIFEST\.json"):
            open_index_files(root)
    (tmp_path / "file").touch()
    with pytest.raises(NoIndexError):
        load(tmp_path / "file")
    (tmp_path / "MANIFEST.json").mkdir()
    with pytest.raises(DamagedIndexError, match="no regular file"):
        load(tmp_path)


def test_versions(tmp_path):
    manifest = write_generation(tmp_path)
    forge(tmp_path, vars(manifest))
    assert load(tmp_path) == manifest
    for version, message in [
        (2, "newer alimm: upgrade"),
        (10**30, "newer alimm"),
        (0, "older alimm: build"),
        (-1, "older"),
    ]:
        forge(tmp_path, vars(manifest), version=version)
        with pytest.raises(IndexVersionError, match=message):
            load(tmp_path)
    for head in (
        dict(version="1"),
        dict(version=True),
        dict(version=1.0),
        dict(format="other"),
        dict(crc32=0),
        dict(x=1),
    ):
        forge(tmp_path, vars(manifest), **head)
        with pytest.raises(DamagedIndexError):
            load(tmp_path)


def changed(content: Any, path: str, value: Any) -> Any:
    content = json.loads(json.dumps(content))
    *parents, last = path.split("/")
    place = content
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if isinstance(place, list):
        place[int(last)] = value
    else:
        place[last] = value
    return content


HOSTILE = [
    *((name, value) for name in ("generation", "bits", "next_id") for value in (-1, 1.5, "1", None, True, 10**30, [1])),
    ("generation", 0), ("bits", 0), ("bits", 100), ("bits", 64), ("bits", 1088), ("next_id", 2**63 + 1),
    ("wal", "../wal-00000001-000.log"), ("wal", "/etc/passwd"), ("wal", ""), ("wal", 5),
    ("wal", "wal-00000001-000.log\n"), ("wal", "MANIFEST.json"), ("segments", {}), ("segments", [5]),
    ("segments", None), ("config", []), ("config", None), ("deleted", []), ("deleted", 5),
    ("deleted/name", "../deleted-00000001-000.npy"), ("deleted/name", None), ("deleted/array/shape", [-3]),
    ("deleted/array/shape", [3, 1]), ("deleted/array/dtype", "<u8"), ("deleted/array/bytes", 10**30),
    ("deleted/more", 1), ("deleted_in", []), ("deleted_in", {"../x": {}}), ("deleted_in", {"seg-00000001-000": 5}),
    ("more", 1), ("segments/0/name", "../../tmp"), ("segments/0/name", "/tmp"),
    ("segments/0/name", "seg-00000001-001"), ("segments/0/info", 5), ("segments/0/arrays/codes/shape", [300, -2]),
    ("segments/0/arrays/codes/shape", [2**40, 2]), ("segments/0/arrays/edges/dtype", "|O"),
    ("segments/0/arrays/edges/crc32", [2**32]), ("segments/0/arrays/ids/bytes", 10**400),
]  # fmt: skip


def test_hostile_manifests_with_right_checksums(tmp_path):
    content = vars(write_generation(tmp_path))
    for path, value in HOSTILE:
        forge(tmp_path, changed(content, path, value))
        with pytest.raises(DamagedIndexError, match=r"MANIFEST\.json is damaged"):
            load(tmp_path)
    for field in content:
        forge(tmp_path, {name: value for name, value in content.items() if name != field})
        with pytest.raises(DamagedIndexError, match="the manifest must have"):
            load(tmp_path)
    for other in (5, None, [], "x", {}):
        forge(tmp_path, other)
        with pytest.raises(DamagedIndexError):
            load(tmp_path)


def test_hostile_json(tmp_path):
    write_generation(tmp_path)
    path = tmp_path / "MANIFEST.json"
    raw = path.read_text()
    for text in (
        raw.replace('"links":8', '"links":NaN'),
        raw.replace('"links":8', '"links":1e999'),
        raw.replace('"links":8', '"links":' + "9" * 5000),
        raw.replace('"links":8', '"links":' + "[" * 100_000 + "]" * 100_000),
        raw.replace('"links":8', '"links":' + "[" * 900 + "]" * 900),
        raw.replace('"links":8', '"links":8,"links":9'),
        raw.replace('"links":8', '"links":8.0'),
        "[" * 1_000_000,
        "{" * 1000,
        "5",
        "null",
        '"alimm.binary_graph"',
        "",
        "\0" * 1000,
    ):
        path.write_text(text)
        with pytest.raises(DamagedIndexError, match=r"MANIFEST\.json"):
            load(tmp_path)


def test_a_manifest_without_end_is_not_read(tmp_path, monkeypatch):
    write_generation(tmp_path)
    monkeypatch.setattr(module, "_MOST_BYTES", 1000)
    with pytest.raises(DamagedIndexError, match="more than 1000 bytes"):
        load(tmp_path)


def test_deleted_ids_and_log_that_cannot_be(tmp_path):
    manifest = write_generation(tmp_path)
    for ids in ([-1, 3], [3, 3], [4, 3]):
        path = tmp_path / "deleted-00000001-009.npy"
        entry = array_files.write_array(path, np.array(ids, np.int64))
        forge(tmp_path, vars(replace(manifest, deleted=dict(name=path.name, array=entry.to_json()))))
        with pytest.raises(DamagedIndexError, match=r"deleted-00000001-009\.npy must hold ascending"):
            open_index_files(tmp_path)
    forge(tmp_path, vars(replace(manifest, wal=WriteAheadLog.create(tmp_path, 2, 2).name)))
    with pytest.raises(DamagedIndexError, match=r"wal-.* is of generation 2"):
        open_index_files(tmp_path)
    forge(tmp_path, vars(replace(manifest, wal=WriteAheadLog.create(tmp_path, 1, 1).name)))
    with pytest.raises(DamagedIndexError, match=r"codes of 64 bits, the index has 128"):
        open_index_files(tmp_path)


def test_a_file_that_is_lost_is_named(tmp_path):
    manifest = write_generation(tmp_path)
    for name in sorted(manifest.names()):
        path = tmp_path / name
        path.rename(tmp_path / "elsewhere")
        with pytest.raises(MissingFileError, match=path.name):
            open_index_files(tmp_path)
        (tmp_path / "elsewhere").rename(path)
    open_index_files(tmp_path)


def test_read_only_and_unicode_folders_open(tmp_path):
    root = tmp_path / "\u7d22\u5f15 \u00fc"
    write_generation(root)
    before = files_of(root)
    for path in [root, *root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert len(open_index_files(root, "full").records) == 3
        assert files_of(root) == before
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)


def test_opening_loads_no_framework(tmp_path):
    write_generation(tmp_path)
    script = (
        "import sys; from pathlib import Path; from alimm.projects.binary_graph.manifest import open_index_files;"
        "open_index_files(Path(sys.argv[1])); print({'torch', 'mmengine', 'numba', 'filelock'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment(), capture_output=True, text=True, check=True
    )
    assert found.stdout == "set()\n"


def test_deleted_tables(tmp_path):
    table = write_deleted(tmp_path, 4, np.arange(0, 9, 3))
    assert table["name"] == "deleted-00000004-000.npy"
    assert write_deleted(tmp_path, 4, np.empty(0, np.int64))["name"] == "deleted-00000004-001.npy"
    with pytest.raises(AssertionError, match="ascend"):
        write_deleted(tmp_path, 4, np.array([3, 3]))
