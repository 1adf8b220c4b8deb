"""``alimm index search``: the nearest rows of queries in a file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alimm.projects.binary_graph.cli_common import at_least_one, at_most_rows, open_index, print_table, read_ids

SHOWN = 5
"""Queries whose result is printed where no file is named."""


def search(argv: Sequence[str] | None = None) -> int:
    """``alimm index search``: search, and print or save the result."""
    parser = argparse.ArgumentParser(
        prog="alimm index search",
        description="Find the nearest rows of queries by Hamming distance.",
        epilog="The file of --out holds 'distances' int32 and 'ids' int64, both (queries, k), -1 past the end. More "
        "than the live rows is no k: it is lowered to their number.",
    )
    parser.add_argument("folder", help="the index")
    parser.add_argument("--queries", required=True, metavar="FILE", help="codes, .npy or .parquet")
    parser.add_argument("--column", help="of the codes, in a Parquet file")
    parser.add_argument("-k", type=at_least_one, default=10, help="rows for each query (default: 10)")
    parser.add_argument("--ef", type=at_least_one, default=64, help="width of the beam: more finds more (default: 64)")
    parser.add_argument("--threads", type=at_least_one, default=1, help="queries are split among so many (default: 1)")
    parser.add_argument("--allowed", nargs="+", metavar="ID", help="return only these ids: numbers, ranges or files")
    parser.add_argument("--out", type=Path, metavar="FILE.npz", help="where to save; else the first few are printed")
    given = parser.parse_args(argv)
    if given.out is not None and given.out.suffix != ".npz":
        raise ValueError(f"--out names a .npz file, got {given.out}")

    from alimm.projects.binary_graph.sources import source_from

    source = source_from(given.queries, column=given.column)
    queries = source.read(0, source.count)
    allowed = None if given.allowed is None else read_ids(given.allowed)
    with open_index(given.folder) as index:
        k = at_most_rows(given.k, index)
        start = time.perf_counter()
        distances, ids = index.search(queries, k, ef=given.ef, allowed=allowed, threads=given.threads)
        seconds = time.perf_counter() - start
    note = f"{len(queries):,} queries in {seconds:.3f} s, the compilation of kernels included"
    if given.out is not None:
        _save(given.out, distances=distances, ids=ids)
        print(f"{note}; saved as {given.out}")
        return 0
    rows = [
        [str(query), str(place + 1), str(ids[query, place]), str(distances[query, place])]
        for query in range(min(SHOWN, len(queries)))
        for place in range(k)
        if ids[query, place] >= 0
    ]
    print_table(["query", "rank", "id", "distance"], rows)
    more = f" (the first {SHOWN} are shown; --out FILE.npz saves all)" if len(queries) > SHOWN else ""
    print(f"{note}{more}")
    return 0


def _save(path: Path, **arrays: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
