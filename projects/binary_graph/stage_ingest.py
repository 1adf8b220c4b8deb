"""First stages of a build: read and check the codes, then find those that are equal.

Rows are cut by ranges of a hash of their code, so equal codes meet in one part, whoever read them. Inside a part, codes
are sorted by (hash, code): the order of all distinct codes is the same however the rows were cut or ordered, and the
first of them are a random sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.sources import open_source
from alimm.projects.binary_graph.stage_common import Output, joined, slices_for
from alimm.projects.binary_graph.store import RunFolder
from alimm_ops.graph.build_cpu import hash_codes


def ingest(
    run: RunFolder, part: int, source: dict[str, Any], chunk_rows: int, count: int, parts: int, seed: int
) -> Output:
    """Rows ``part * chunk_rows`` and on, sorted by the part that their hash puts them in.

    Raises:
        ValueError: an id is negative.
    """
    opened = open_source(source)
    first, last = part * chunk_rows, min((part + 1) * chunk_rows, count)
    codes, ids = opened.read(first, last), opened.ids(first, last)
    if ids is None:
        ids = np.arange(first, last, dtype=np.int64)
    elif len(ids) and ids.min() < 0:
        row = int(np.argmin(ids))
        raise ValueError(f"ids must be at least 0, got {ids[row]} in row {first + row}")
    hashes = hash_codes(codes, seed)
    # Both factors are below 2**32: the upper half of the hash picks the part, in order of the hash.
    owner = ((hashes >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)).astype(np.int64)
    order = np.argsort(hashes, kind="stable")
    starts = np.searchsorted(owner[order], np.arange(parts + 1)).astype(np.int64)
    return {"codes": codes[order], "ids": ids[order], "hashes": hashes[order], "starts": starts}, {}


def distinct(run: RunFolder, part: int, chunks: int) -> Output:
    """The distinct codes whose hash lies in the part's range, and the ids of each, ascending."""
    pieces = slices_for(run, "ingest", range(chunks), part, ("codes", "ids", "hashes"))
    codes, ids, hashes = (joined(pieces, name) for name in ("codes", "ids", "hashes"))
    codes, ids, first = group_codes(codes, ids, hashes)
    row_starts = np.append(np.flatnonzero(first), len(codes)).astype(np.int64)
    return {"codes": codes[first], "ids": ids, "row_starts": row_starts}, {
        "nodes": int(first.sum()),
        "rows": len(ids),
        "largest": int(np.diff(row_starts).max(initial=0)),
    }


def group_codes(
    codes: NDArray[np.uint64], ids: NDArray[np.int64], hashes: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.bool_]]:
    """Sort by (hash, code, id); the third result is True at the first row of each code."""
    order = np.argsort(hashes, kind="stable")
    codes, ids, hashes = codes[order], ids[order], hashes[order]
    same_hash = hashes[1:] == hashes[:-1]
    if same_hash.any():
        # Few rows at most, except where codes repeat: only they are sorted by all that they have.
        member = np.zeros(len(codes), bool)
        member[1:] |= same_hash
        member[:-1] |= same_hash
        rows = np.flatnonzero(member)
        keys = [ids[rows], *codes[rows].T[::-1], hashes[rows]]
        sorted_rows = rows[np.lexsort(keys)]
        codes[rows], ids[rows] = codes[sorted_rows], ids[sorted_rows]
    first = np.ones(len(codes), bool)
    first[1:] = (codes[1:] != codes[:-1]).any(axis=1)
    return codes, ids, first
