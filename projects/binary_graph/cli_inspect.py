"""``alimm index verify`` and ``info``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alimm.projects.binary_graph.cli_build import flat
from alimm.projects.binary_graph.cli_common import open_index, print_pairs, segment_infos, shown_size


def verify(argv: Sequence[str] | None = None) -> int:
    """``alimm index verify``: check the files of an index, and mend its log."""
    parser = argparse.ArgumentParser(
        prog="alimm index verify",
        description="Check the files of an index: sizes, headers and all numbers that a search relies on.",
    )
    parser.add_argument("folder", help="the index")
    parser.add_argument("--full", action="store_true", help="also read every byte and compare the checksums")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="cut a damaged log where the damage begins: changes after that are lost. Files of segments cannot be "
        "mended; build them again",
    )
    given = parser.parse_args(argv)

    from alimm.projects.binary_graph.graph import BinaryGraph

    if not Path(given.folder).is_dir():
        raise FileNotFoundError(f"there is no index folder {given.folder}")
    if given.repair:
        kept = _repair(Path(given.folder))
        print(f"the log of {given.folder} has {kept:,} sound records; what followed is cut off")
    with BinaryGraph.open(given.folder, verify="full" if given.full else "header", read_only=True) as index:
        stats = index.stats()
    depth = "every byte" if given.full else "sizes, headers and bounds; --full compares the checksums"
    print(f"{given.folder} is sound ({depth}): {stats['rows']:,} rows in {stats['segments']} segments")
    return 0


def _repair(folder: Path) -> int:
    from alimm.projects.binary_graph import manifest, wal

    manifest.load(folder)  # to lock a folder leaves a file in it: not where there is no index
    lock = wal.writer_lock(folder)
    try:
        found = manifest.load(folder)
        return wal.repair(folder / found.wal, found.bits // 64, found.generation)
    finally:
        lock.release()


def info(argv: Sequence[str] | None = None) -> int:
    """``alimm index info``: print what an index holds."""
    parser = argparse.ArgumentParser(prog="alimm index info", description="Print what an index holds.")
    parser.add_argument("folder", help="the index")
    parser.add_argument("--json", action="store_true", help="print JSON, with all that the builder noted")
    given = parser.parse_args(argv)
    with open_index(given.folder) as index:
        stats, infos = index.stats(), segment_infos(index)
    if given.json:
        print(json.dumps({"folder": given.folder, **stats, "built": infos}, indent=2, sort_keys=True, default=str))
        return 0
    rows = stats["rows"]
    print_pairs(
        [
            ("index", given.folder),
            *((name, stats[name]) for name in ("rows", "bits", "generation")),
            ("deleted, still stored", stats["deleted"]),
            ("recent, in no segment", stats["delta"]),
            ("segments", f"{stats['segments']} ({', '.join(f'{count:,}' for count in stats['segment_rows'])} rows)"),
            ("distinct codes", stats["nodes"]),
            ("edges", stats["edges"]),
            ("size", f"{shown_size(stats['bytes'])}, {stats['bytes'] / rows if rows else 0:.1f} bytes a row"),
        ]
    )
    for number, built in enumerate(infos):
        pairs: list[tuple[str, Any]] = list(flat(built))
        if pairs:
            print(f"segment {number}:")
            print_pairs((f"  {name}", value) for name, value in pairs)
    return 0
