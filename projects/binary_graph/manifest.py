"""The folder of an index: what is in it, how a new generation replaces the old one, and how it is opened.

Layout::

    MANIFEST.json                      published last: everything that must be known to open the index
    segments/<name>/<array>.npy        immutable, mapped read-only
    deleted-<generation>-<n>.npy       external ids that are deleted as of the generation
    wal-<generation>-<n>.log           adds and deletes since then
    .lock                              held by a writer

The manifest is replaced by one rename, and no name is ever used again for other content. So whoever opens the folder
finds the old generation or the new one, wherever a writer was when it was killed.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.array_files import (
    ArrayEntry,
    DamagedIndexError,
    MissingFileError,
    check_verify,
    fresh_name,
    open_array,
    open_regular,
    replace_file,
    whole,
    write_array,
)
from alimm.projects.binary_graph.garbage import collect_garbage as collect_garbage
from alimm.projects.binary_graph.garbage import retire
from alimm.projects.binary_graph.segment import FOLDER, MOST_WORDS, Segment, check_table, open_segment
from alimm.projects.binary_graph.wal_records import Scan, WalRecord, scan

FORMAT, VERSION = "alimm.binary_graph", 1
MANIFEST = "MANIFEST.json"

_MOST_BYTES = 256 << 20
_MOST_ID = 1 << 63
_MOST_GENERATION = 10**18 - 1
_WAL = re.compile(r"wal-\d{8,18}-\d{3,6}\.log")
_DELETED = re.compile(r"deleted-\d{8,18}-\d{3,6}\.npy")
_ATTEMPTS = 5

_step_hook: Callable[[str], None] | None = None
"""For tests that kill the process between two steps of publishing."""


class IndexVersionError(ValueError):
    """The index has a format that this alimm does not know."""


class NoIndexError(ValueError):
    """The folder holds no index."""


@dataclass(frozen=True)
class Manifest:
    """One generation of an index.

    Attributes:
        generation: 1, 2, ...
        bits: of a code.
        segments: the tables of ``segment.write_segment``.
        wal: name of the log.
        next_id: the id after the largest that the index ever gave or got.
        config: JSON: how segments are built.
        deleted: the table of ``write_deleted``: ids whose rows are dead in every segment; None where there are none.
        deleted_in: by name of a segment, the tables of ids that are dead in that segment, and live elsewhere.
    """

    generation: int
    bits: int
    segments: list[dict[str, Any]]
    wal: str
    next_id: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    deleted: dict[str, Any] | None = None
    deleted_in: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def words(self) -> int:
        """Words of 64 bits of a code."""
        return self.bits // 64

    def names(self) -> set[str]:
        """The files and folders that the generation needs, relative to the index."""
        tables = [*([] if self.deleted is None else [self.deleted]), *self.deleted_in.values()]
        segments = (f"{FOLDER}/{table['name']}" for table in self.segments)
        return {self.wal, *segments, *(table["name"] for table in tables)}


class IndexFiles(NamedTuple):
    """What ``open_index_files`` found.

    Attributes:
        manifest: of the generation.
        segments: mapped, in the order of the manifest.
        records: of the log, in order.
        deleted: (D,) int64, ascending: dead in every segment.
        deleted_in: by name of a segment, further ids that are dead there, ascending.
        log: of the log, to read on from with ``scan(..., since=log)``.
    """

    manifest: Manifest
    segments: list[Segment]
    records: list[WalRecord]
    deleted: NDArray[np.int64]
    deleted_in: dict[str, NDArray[np.int64]]
    log: Scan


def _step(name: str) -> None:
    if _step_hook is not None:
        _step_hook(name)


def _dumps(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _encode(manifest: Manifest) -> bytes:
    content = vars(manifest)
    crc32 = zlib.crc32(_dumps(content).encode())
    return (_dumps(dict(format=FORMAT, version=VERSION, crc32=crc32, manifest=content)) + "\n").encode()


def _check_deleted(value: Any, what: str) -> ArrayEntry:
    if not isinstance(value, dict) or set(value) != {"name", "array"}:
        raise ValueError(f"{what} must have name and array, got {str(value)[:80]!r}")
    if not isinstance(value["name"], str) or not _DELETED.fullmatch(value["name"]):
        raise ValueError(f"{what} must be named deleted-<generation>-<number>.npy, got {str(value['name'])[:80]!r}")
    entry = ArrayEntry.from_json(value["array"], what)
    if entry.dtype != "<i8" or len(entry.shape) != 1:
        raise ValueError(f"{what} must be <i8 with 1 axis, got {entry.dtype} {entry.shape}")
    return entry


def _parse(content: Any) -> Manifest:
    """ValueError: the content is no manifest, whatever its checksum says."""
    fields = {"generation", "bits", "segments", "wal", "next_id", "config", "deleted", "deleted_in"}
    if not isinstance(content, dict) or set(content) != fields:
        raise ValueError(f"the manifest must have {', '.join(sorted(fields))}, got {str(content)[:80]!r}")
    whole(content["generation"], "generation", 1, _MOST_GENERATION)
    whole(content["next_id"], "next_id", 0, _MOST_ID)
    words, rest = divmod(whole(content["bits"], "bits", 64, 64 * MOST_WORDS), 64)
    if rest:
        raise ValueError(f"bits must be a multiple of 64, got {content['bits']}")
    for name, kind in dict(segments=list, config=dict, deleted_in=dict, wal=str).items():
        if not isinstance(content[name], kind):
            raise ValueError(f"{name} must be a {kind.__name__}, got {str(content[name])[:80]!r}")
    if not _WAL.fullmatch(content["wal"]):
        raise ValueError(f"wal must be named wal-<generation>-<number>.log, got {content['wal'][:80]!r}")
    names = set()
    for table in content["segments"]:
        found = check_table(table)["codes"].shape[1]
        if found != words:
            raise ValueError(f"{table['name']} has codes of {64 * found} bits, the index {content['bits']}")
        if table["name"] in names:
            raise ValueError(f"the segment {table['name']} is named twice")
        names.add(table["name"])
    if content["deleted"] is not None:
        _check_deleted(content["deleted"], "deleted")
    for name, table in content["deleted_in"].items():
        if name not in names:
            raise ValueError(f"deleted_in names {name[:80]!r}, which is none of the segments")
        _check_deleted(table, f"deleted_in {name}")
    return Manifest(**content)


def load(root: Path) -> Manifest:
    """Read the manifest of an index. Nothing in it is taken on trust.

    Raises:
        NoIndexError: there is no manifest.
        IndexVersionError: it was written by a newer or a much older alimm.
        DamagedIndexError: anything else is wrong with it.
    """
    path = root / MANIFEST
    try:
        with open_regular(path) as file:
            raw = file.read(_MOST_BYTES + 1)
    except MissingFileError:
        raise NoIndexError(f"{root} holds no {MANIFEST}: it is no index, or none was published there yet") from None
    if len(raw) > _MOST_BYTES:
        raise DamagedIndexError(path, f"has more than {_MOST_BYTES} bytes")
    try:
        content = json.loads(raw.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise DamagedIndexError(path, f"is no JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedIndexError(path, f"is no manifest of an index: its format is not {FORMAT!r}")
    version = content.get("version")
    if type(version) is int and version != VERSION:
        age = "a newer alimm: upgrade alimm" if version > VERSION else "an older alimm: build the index again"
        shown = version if version.bit_length() < 64 else "too large to show"
        raise IndexVersionError(f"{path} was written by {age} (format {shown}, known: {VERSION})")
    try:
        manifest = _parse(content.get("manifest"))
        # Compared as bytes: there is one way to write a manifest, so no changed byte passes.
        same = _encode(manifest) == raw
    except (ValueError, RecursionError) as error:
        raise DamagedIndexError(path, f"is damaged: {str(error)[:400]}") from None
    if not same:
        raise DamagedIndexError(path, "does not match its checksum")
    return manifest


def write_deleted(root: Path, generation: int, ids: NDArray[np.int64], durable: bool = True) -> dict[str, Any]:
    """Write deleted ids (D,) int64, ascending, for the generation that is being made; their table for the manifest."""
    assert ids.ndim == 1, ids.shape
    assert (ids[1:] > ids[:-1]).all(), "ids must ascend"
    name = fresh_name(root, "deleted", generation, ".npy")
    return dict(name=name, array=write_array(root / name, ids.astype(np.int64), durable).to_json())


def publish(root: Path, manifest: Manifest, durable: bool = True) -> None:
    """Make a generation the one that is opened; its files are written already. The caller holds the ``writer_lock``.

    Args:
        root: the folder of the index.
        manifest: its generation is larger than that of the folder.
        durable: wait until it is on the disk.

    Raises:
        ValueError: the folder has that generation or a newer one.
        DamagedIndexError: the manifest of the folder is damaged.
        OSError: it cannot be written; the old generation stays.
    """
    try:
        old = load(root)
    except NoIndexError:
        old = None
    if old is not None and old.generation >= manifest.generation:
        raise ValueError(
            f"{root} has generation {old.generation} already, got {manifest.generation}: refresh the index first"
        )
    raw = _encode(manifest)
    _parse(json.loads(raw)["manifest"])  # never publish what would not open
    for name in sorted(manifest.names()):
        assert (root / name).exists(), name
    _step("begin")
    replace_file(root / MANIFEST, [raw], durable, _step)
    _step("published")
    if old is not None:
        retire(root, old.names() - manifest.names())
    _step("retired")


def _open_deleted(root: Path, table: dict[str, Any], verify: str) -> NDArray[np.int64]:
    ids = open_array(root / table["name"], _check_deleted(table, "deleted"), verify)
    if len(ids) and (int(ids[0]) < 0 or (ids[1:] <= ids[:-1]).any()):
        raise DamagedIndexError(root / table["name"], "must hold ascending ids >= 0")
    return ids


def _open_once(root: Path, manifest: Manifest, verify: str) -> IndexFiles:
    segments = [open_segment(root, table, verify) for table in manifest.segments]
    deleted = np.empty(0, np.int64)
    if manifest.deleted is not None:
        deleted = _open_deleted(root, manifest.deleted, verify)
    deleted_in = {name: _open_deleted(root, table, verify) for name, table in manifest.deleted_in.items()}
    log = scan(root / manifest.wal, manifest.words)
    if log.generation > manifest.generation:
        raise DamagedIndexError(root / manifest.wal, f"is of generation {log.generation}, after the manifest's")
    return IndexFiles(manifest, segments, log.records, deleted, deleted_in, log)


def open_index_files(root: Path, verify: str = "header") -> IndexFiles:
    """Open all files of the newest generation; takes no lock and writes nothing.

    Args:
        root: the folder of the index.
        verify: ``'header'`` checks the log, and of the arrays what a search relies on; ``'full'`` every byte.

    Raises:
        NoIndexError: there is no index.
        IndexVersionError: another alimm wrote it.
        DamagedIndexError: a file is missing or wrong; the message names it and the mend.
    """
    check_verify(verify)
    for _ in range(_ATTEMPTS):
        manifest = load(root)
        try:
            return _open_once(root, manifest, verify)
        except MissingFileError:
            # A writer may have published and cleared away since; then there is a newer manifest.
            if load(root).generation == manifest.generation:
                raise
    raise DamagedIndexError(root, f"was published anew {_ATTEMPTS} times while it was opened", "Open it again")
