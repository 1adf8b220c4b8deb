"""``alimm index add`` and ``delete``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from alimm.projects.binary_graph.cli_build import add_input, source_of
from alimm.projects.binary_graph.cli_common import claim, open_index, read_ids

if TYPE_CHECKING:
    from alimm.projects.binary_graph.graph import BinaryGraph
    from alimm.projects.binary_graph.sources import CodeSource

_BLOCK = 1 << 16


def add(argv: Sequence[str] | None = None) -> int:
    """``alimm index add``: add the rows of files."""
    parser = argparse.ArgumentParser(
        prog="alimm index add",
        description="Add rows to an index. Without ids they are numbered on from the largest id ever added.",
        epilog="Very many rows are added faster by building an index of them and merging it (alimm index merge).",
    )
    parser.add_argument("folder", help="the index")
    add_input(parser)
    given = parser.parse_args(argv)
    source = source_of(given)
    with open_index(given.folder, read_only=False) as index:
        if 64 * source.words != index.bits:
            raise ValueError(f"the input has codes of {64 * source.words} bits, the index of {index.bits}")
        claim(index)
        _check(source, index)
        first = last = None
        for _, codes, ids in source.chunks(_BLOCK):
            added = index.add(codes, ids)
            first = int(added[0]) if first is None else first
            last = int(added[-1])
        numbered = "" if source.has_ids or first is None else f", with the ids {first} to {last}"
        print(f"added {source.count:,} rows{numbered}; {given.folder} has {len(index):,}")
    return 0


def _check(source: CodeSource, index: BinaryGraph) -> None:
    """Read all of the input before any of it is added: what is wrong at its end must not leave half of it behind."""
    blocks = [ids for _, _, ids in source.chunks(_BLOCK) if ids is not None]
    if not source.has_ids:
        next_id = index.stats()["next_id"]
        if next_id + source.count > 2**63:
            raise ValueError(
                f"there are no {source.count:,} numbers after id {next_id - 1}: give ids; nothing was added"
            )
        return
    ids = np.sort(np.concatenate([np.empty(0, np.int64), *blocks]))
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise ValueError(f"ids must be unique, {twice[0]} comes more than once in the input; nothing was added")
    known = np.intersect1d(ids, index.ids, assume_unique=True)
    if len(known):
        few = ", ".join(map(str, known[:5].tolist()))
        raise ValueError(
            f"{len(known):,} ids of the input are in the index already ({few}{', ...' if len(known) > 5 else ''}): "
            "delete them first, or give others; nothing was added"
        )


def delete(argv: Sequence[str] | None = None) -> int:
    """``alimm index delete``: delete rows by their ids."""
    parser = argparse.ArgumentParser(
        prog="alimm index delete",
        description="Delete rows by their external ids. What they held stays on the disk until `alimm index compact`.",
    )
    parser.add_argument("folder", help="the index")
    parser.add_argument(
        "--ids", nargs="+", required=True, metavar="ID", help="ids, ranges like 10-19, .npy or text files of ids"
    )
    parser.add_argument("--missing", choices=("error", "ignore"), default="error", help="what to do about unknown ids")
    given = parser.parse_args(argv)
    ids = read_ids(given.ids)
    with open_index(given.folder, read_only=False) as index:
        count = index.delete(ids, missing=given.missing)
        print(f"deleted {count:,} rows; {given.folder} has {len(index):,}")
    return 0
