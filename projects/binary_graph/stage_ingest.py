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
from alimm.projects.binary_graph.stage_common import Output, group_starts, joined, ranges, slices_for
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
    codes, ids, hashes, row_starts = group_codes(codes, ids, seed)
    # Both factors are below 2**32: the upper half of the hash picks the part, in order of the hash.
    owner = ((hashes >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)).astype(np.int64)
    starts = group_starts(owner, parts)
    return {
        "codes": codes,
        "counts": np.diff(row_starts),
        "ids": ids,
        "starts": starts,
        "id_starts": row_starts[starts],
    }, {}


def distinct(run: RunFolder, part: int, chunks: int, seed: int) -> Output:
    """The distinct codes whose hash lies in the part's range, and the ids of each, ascending."""
    pieces = slices_for(run, "ingest", range(chunks), part, ("codes", "counts"))
    id_pieces = slices_for(run, "ingest", range(chunks), part, ("ids",), starts="id_starts")
    codes, ids, _, row_starts = group_codes(
        joined(pieces, "codes"), joined(id_pieces, "ids"), seed, joined(pieces, "counts")
    )
    return {"codes": codes, "ids": ids, "row_starts": row_starts}, {
        "nodes": len(codes),
        "rows": len(ids),
        "largest": int(np.diff(row_starts).max(initial=0)),
    }


def group_codes(
    codes: NDArray[np.uint64], ids: NDArray[np.int64], seed: int, counts: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.uint64], NDArray[np.int64]]:
    """Put equal codes together.

    Args:
        codes: (N, W), in any order, with repetitions.
        ids: of the codes, one after the other.
        seed: of the hash.
        counts: how many ids each code has; None: one.

    Returns:
        Distinct codes sorted by (hash, code); all ids, ascending inside a code; hashes of the distinct codes; and where
        the ids of each begin, int64 (n + 1,).
    """
    hashes = hash_codes(codes, seed)
    order = np.argsort(hashes, kind="stable")
    same_hash = hashes[order[1:]] == hashes[order[:-1]]
    if same_hash.any():
        # Few at most, except where codes repeat: only they are sorted by all that they have.
        member = np.zeros(len(codes), bool)
        member[1:] |= same_hash
        member[:-1] |= same_hash
        places = np.flatnonzero(member)
        rows = order[places]
        order[places] = rows[np.lexsort([*codes[rows].T[::-1], hashes[rows]])]
    codes, hashes = codes[order], hashes[order]
    first = np.ones(len(codes), bool)
    first[1:] = (codes[1:] != codes[:-1]).any(axis=1)
    if counts is None:
        counts = np.ones(len(codes), np.int64)
    starts = np.append(0, np.cumsum(counts))[:-1]
    ids, counts = ids[ranges(starts[order], counts[order])], counts[order]
    row_starts = np.append(np.append(0, np.cumsum(counts))[:-1][first], len(ids)).astype(np.int64)
    if not first.all():
        group = np.repeat(np.arange(len(row_starts) - 1), np.diff(row_starts))
        ids = ids[np.lexsort((ids, group))]
    return codes[first], ids, hashes[first], row_starts
