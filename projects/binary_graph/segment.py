"""One immutable part of an index: the distinct codes, their graph, and the rows behind each of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.array_files import (
    ArrayEntry,
    DamagedIndexError,
    check_verify,
    fresh_name,
    open_array,
    sync_folder,
    write_array,
)


@dataclass(frozen=True, eq=False)
class Segment:
    """Codes, edges, rows and entry points of one built graph; the arrays may be mapped read-only from files.

    A node is one distinct code; its rows are the external ids that have this code. An exact segment has no edges and
    no centres: a search scans all its codes.

    Attributes:
        codes: (n, W) distinct codes, ordered by cluster.
        indptr: (n + 1,) where each node's edges start.
        edges: (e,) out-neighbours, in [0, n).
        row_indptr: (n + 1,) where each node's rows start.
        ids: (N,) external ids, ascending inside a node.
        centres: (m, W) codes of the upper level of the entry layer; m = 0 in an exact segment.
        entry_indptr: (m + 1,) where each centre's entry nodes start.
        entry_nodes: (E,) nodes, in [0, n).
        entry_codes: (E, W) their codes, contiguous for the scan.
        info: JSON: how it was built (config, sampled recall, counts).
    """

    codes: NDArray[np.uint64]
    indptr: NDArray[np.int64]
    edges: NDArray[np.int32]
    row_indptr: NDArray[np.int64]
    ids: NDArray[np.int64]
    centres: NDArray[np.uint64]
    entry_indptr: NDArray[np.int64]
    entry_nodes: NDArray[np.int32]
    entry_codes: NDArray[np.uint64]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def num_nodes(self) -> int:
        """Number of distinct codes, n."""
        return int(self.codes.shape[0])

    @property
    def num_rows(self) -> int:
        """Number of external ids, N."""
        return int(self.ids.shape[0])

    @property
    def bits(self) -> int:
        """Bits of a code, 64 * W."""
        return 64 * int(self.codes.shape[1])


ARRAYS: dict[str, tuple[str, int]] = dict(
    codes=("<u8", 2),
    indptr=("<i8", 1),
    edges=("<i4", 1),
    row_indptr=("<i8", 1),
    ids=("<i8", 1),
    centres=("<u8", 2),
    entry_indptr=("<i8", 1),
    entry_nodes=("<i4", 1),
    entry_codes=("<u8", 2),
)
"""The arrays of a segment: dtype and number of axes."""

MOST_WORDS = 16
FOLDER = "segments"

_NAME = re.compile(r"seg-\d{8,18}-\d{3,6}")
_STEP = 1 << 20  # elements that a check looks at together: its temporaries stay small


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, _STEP):
        yield start, min(start + _STEP, length)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse sizes that contradict each other."""
    words = shapes["codes"][1]
    if not 1 <= words <= MOST_WORDS:
        raise ValueError(f"codes must have 1 to {MOST_WORDS} words of 64 bits, got {words}")
    nodes, centres, entries = shapes["codes"][0], shapes["centres"][0], shapes["entry_nodes"][0]
    if nodes > np.iinfo(np.int32).max:
        raise ValueError(f"codes must have less than 2**31 rows, got {nodes}: nodes are numbered by int32")
    expected = dict(
        indptr=(nodes + 1,),
        row_indptr=(nodes + 1,),
        centres=(centres, words),
        entry_indptr=(centres + 1,),
        entry_codes=(entries, words),
    )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(
                f"{name} must have the shape {shape}, as codes, centres and entry_nodes say: {shapes[name]}"
            )
    if centres and not entries:
        raise ValueError(f"entry_nodes must not be empty, there are {centres} centres")


def _check_starts(name: str, starts: NDArray[np.int64], end: int, least: int = 0) -> None:
    """Starts go from 0 to ``end`` by steps of at least ``least``."""
    if starts[0] != 0 or starts[-1] != end:
        raise ValueError(f"{name} must start with 0 and end with {end}, got {starts[0]} and {starts[-1]}")
    for first, last in _blocks(len(starts) - 1):
        here, following = starts[first:last], starts[first + 1 : last + 1]
        # Compared, not subtracted: a difference of hostile numbers may wrap around.
        if (following <= here).any() if least else (following < here).any():
            raise ValueError(f"{name} must {'rise' if least else 'not fall'} from element to element")


def _check_range(name: str, nodes: NDArray[np.int32], count: int) -> None:
    for first, last in _blocks(len(nodes)):
        low, high = int(nodes[first:last].min()), int(nodes[first:last].max())
        if low < 0 or high >= count:
            raise ValueError(f"{name} must lie in [0, {count}), got {low if low < 0 else high}")


def _check_ids(ids: NDArray[np.int64], row_indptr: NDArray[np.int64]) -> None:
    if len(ids) and int(ids[0]) < 0:
        raise ValueError(f"ids must be >= 0, got {ids[0]}")
    for first, last in _blocks(len(ids) - 1):
        here, following = ids[first:last], ids[first + 1 : last + 1]
        if (following < 0).any():
            raise ValueError(f"ids must be >= 0, got {following.min()}")
        # Where ids fall, another node must start.
        falls = np.flatnonzero(following <= here) + (first + 1)
        if (row_indptr[np.searchsorted(row_indptr, falls)] != falls).any():
            raise ValueError("ids must ascend inside a node")


def validate(segment: Segment, full: bool = False) -> None:
    """Check that no kernel can be led out of the arrays, and that the ids are in order.

    Kernels check no bounds, so all of this runs at every opening: it reads each array but the codes once.

    Args:
        segment: its arrays may be mapped.
        full: also that ids are unique and entry codes are those of their nodes; sorts a copy of the ids.

    Raises:
        ValueError: the first array that is wrong, what was expected and what came.
    """
    for name, (dtype, axes) in ARRAYS.items():
        array = getattr(segment, name)
        if not isinstance(array, np.ndarray) or array.dtype.str != dtype or array.ndim != axes:
            found = (
                f"{array.dtype.str} with {array.ndim} axes" if isinstance(array, np.ndarray) else type(array).__name__
            )
            raise ValueError(f"{name} must be an array of {dtype} with {axes} axes, got {found}")
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} must be contiguous: np.ascontiguousarray makes it so")
    _check_shapes({name: getattr(segment, name).shape for name in ARRAYS})
    nodes = segment.num_nodes
    _check_starts("indptr", segment.indptr, len(segment.edges))
    _check_range("edges", segment.edges, nodes)
    _check_starts("row_indptr", segment.row_indptr, len(segment.ids), least=1)
    _check_starts("entry_indptr", segment.entry_indptr, len(segment.entry_nodes))
    _check_range("entry_nodes", segment.entry_nodes, nodes)
    _check_ids(segment.ids, segment.row_indptr)
    if not full:
        return
    ids = np.sort(segment.ids)
    twice = np.flatnonzero(ids[1:] == ids[:-1])
    if len(twice):
        raise ValueError(f"ids must be unique in a segment, {ids[twice[0]]} is there more than once")
    for first, last in _blocks(len(segment.entry_nodes)):
        if not np.array_equal(segment.codes[segment.entry_nodes[first:last]], segment.entry_codes[first:last]):
            raise ValueError("entry_codes must be the codes of entry_nodes")


def check_table(table: Any) -> dict[str, ArrayEntry]:
    """Parse a segment's table of a manifest, which anybody may have written; the entries of the arrays.

    Raises:
        ValueError: a wrong type, a name that is none of ours, or sizes that contradict each other.
    """
    if not isinstance(table, dict) or set(table) != {"name", "arrays", "info"}:
        raise ValueError(f"a segment must have name, arrays and info, got {str(table)[:80]!r}")
    name, arrays = table["name"], table["arrays"]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"a segment must be named seg-<generation>-<number>, got {str(name)[:80]!r}")
    if not isinstance(table["info"], dict):
        raise ValueError(f"info of {name} must be an object, got {str(table['info'])[:80]!r}")
    if not isinstance(arrays, dict) or set(arrays) != set(ARRAYS):
        raise ValueError(f"{name} must have the arrays {', '.join(ARRAYS)}, got {str(arrays)[:80]!r}")
    entries = {}
    for array, (dtype, axes) in ARRAYS.items():
        entry = ArrayEntry.from_json(arrays[array], f"{array} of {name}")
        if entry.dtype != dtype or len(entry.shape) != axes:
            raise ValueError(f"{array} of {name} must be {dtype} with {axes} axes, got {entry.dtype} {entry.shape}")
        entries[array] = entry
    try:
        _check_shapes({array: entry.shape for array, entry in entries.items()})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return entries


def fresh_segment_name(root: Path, generation: int) -> str:
    """A name for a segment of the generation that is being made."""
    return fresh_name(root / FOLDER, "seg", generation)


def write_segment(root: Path, name: str, segment: Segment, durable: bool = True) -> dict[str, Any]:
    """Write a segment into a folder of its own; nothing names it until a manifest does.

    Args:
        root: the folder of the index.
        name: of ``fresh_segment_name``.
        segment: is validated first.
        durable: wait until it is on the disk.

    Returns:
        Its table for the manifest.

    Raises:
        ValueError: the segment is wrong, or its info is not JSON.
        FileExistsError: there is such a folder.
        OSError: it cannot be written; what was written is removed.
    """
    assert _NAME.fullmatch(name), name
    validate(segment)
    try:
        info = json.loads(json.dumps(segment.info, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"info of a segment must be JSON without NaN: {error}") from None
    folder = root / FOLDER / name
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir()
    try:
        arrays = {
            array: write_array(folder / f"{array}.npy", getattr(segment, array), durable).to_json() for array in ARRAYS
        }
        if durable:
            sync_folder(folder.parent)
            sync_folder(root)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return dict(name=name, arrays=arrays, info=info)


def open_segment(root: Path, table: Any, verify: str = "header") -> Segment:
    """Map a segment that a manifest names.

    Both ways of verification run all checks of ``validate`` that protect the kernels: they are cheap, and a wrong
    number in ``edges`` would otherwise read foreign memory.

    Args:
        root: the folder of the index.
        table: of ``write_segment``.
        verify: ``'header'``, or ``'full'`` to also compare all checksums and run the full ``validate``.

    Raises:
        DamagedIndexError: a file is missing or differs from the table, or what the files say cannot be.
    """
    check_verify(verify)
    try:
        entries = check_table(table)
    except ValueError as error:
        raise DamagedIndexError(root, f"has a damaged table of a segment: {error}") from None
    folder = root / FOLDER / table["name"]
    for path in (folder.parent, folder):
        if path.is_symlink():
            raise DamagedIndexError(path, "is a link: the files of an index lie in its folder")
    arrays = {array: open_array(folder / f"{array}.npy", entry, verify) for array, entry in entries.items()}
    segment = Segment(**arrays, info=table["info"])
    try:
        validate(segment, verify == "full")
    except ValueError as error:
        raise DamagedIndexError(folder, f"holds what no build writes: {error}") from None
    return segment
