"""``alimm index build``, ``merge`` and ``compact``: the commands that build segments."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alimm.projects.binary_graph.cli_common import (
    at_least_one,
    build_config,
    claim,
    open_index,
    print_pairs,
    segment_infos,
    shown_size,
    size,
)

if TYPE_CHECKING:
    from alimm.projects.binary_graph.graph import BinaryGraph


def build(argv: Sequence[str] | None = None) -> int:
    """``alimm index build``: read codes, build their graph, publish the index in a folder."""
    parser = argparse.ArgumentParser(
        prog="alimm index build",
        description="Build an index of binary codes: uint64 of shape (rows, words), or their bytes.",
        epilog="Float vectors are hashed first, with `alimm index hash`.",
    )
    add_input(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the index is published")
    parser.add_argument("--overwrite", action="store_true", help="replace the index that is there")
    parser.add_argument(
        "--engine", choices=("threads", "processes", "ray"), default="threads", help="who runs the tasks"
    )
    parser.add_argument("--workers", type=at_least_one, metavar="N", help="tasks at a time (default: one for each CPU)")
    parser.add_argument("--worker-memory", type=size, metavar="SIZE", help="that a task is planned to need, as 256MB")
    parser.add_argument("--run-dir", type=Path, metavar="FOLDER", help="keep the parts of the build here, to resume it")
    parser.add_argument("--resume", action="store_true", help="go on with the build that --run-dir holds")
    parser.add_argument("--neighbours", type=at_least_one, metavar="K", help="length of the neighbour lists")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help="a field of BuildConfig"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_args(argv)
    out = Path(given.out)
    if (out / "MANIFEST.json").exists() and not given.overwrite:
        raise ValueError(f"{out} holds an index: name another folder, or give --overwrite to replace it")
    _check_place(out)
    _check_run(given.run_dir, given.resume)
    config = build_config(given.settings, neighbours=given.neighbours)

    from alimm.projects.binary_graph.graph import BinaryGraph

    usage = _Usage()
    source = source_of(given)
    with BinaryGraph.build(
        source,
        path=out,
        config=config,
        engine=given.engine,
        workers=given.workers,
        worker_memory=given.worker_memory,
        run_dir=given.run_dir,
        progress=not given.quiet,
    ) as index:
        print_pairs([("index", str(out)), *_summary(index), *usage.pairs(given.engine)])
    return 0


def add_input(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``source_of`` reads."""
    parser.add_argument("input", nargs="+", metavar="INPUT", help="files, folders or patterns: .npy or .parquet")
    parser.add_argument(
        "--ids", nargs="+", metavar="FILE", help="external ids in .npy files, one a row (default: rows are numbered)"
    )
    parser.add_argument("--column", help="of the codes, in Parquet files")
    parser.add_argument("--id-column", help="of the external ids, in Parquet files")


def source_of(given: argparse.Namespace) -> Any:
    """The source that the arguments of ``add_input`` name."""
    from alimm.projects.binary_graph.sources import source_from

    return source_from(given.input, column=given.column, id_column=given.id_column, ids=given.ids)


def _check_place(out: Path) -> None:
    """Refuse a folder inside an index: what does not belong to the index may be cleared away, or goes with it."""
    from alimm.projects.binary_graph.manifest import FORMAT, MANIFEST

    for parent in out.resolve().parents[:3]:
        try:
            if not (parent / MANIFEST).is_file():
                continue
            with (parent / MANIFEST).open("rb") as stream:
                # Not parsed: a damaged index is one all the same.
                ours = f'"format":"{FORMAT}"'.encode() in stream.read(256)
        except OSError:
            continue
        if ours:
            raise ValueError(f"{out} lies inside the index {parent}: name a folder outside it")


def _check_run(folder: Path | None, resume: bool) -> None:
    if resume and folder is None:
        raise ValueError("--resume goes on with the build in --run-dir: name that folder")
    there = folder is not None and (folder / "run.json").exists()
    if resume and not there:
        raise ValueError(f"{folder} holds no build to resume: leave --resume out to begin one")
    if there and not resume:
        raise ValueError(f"{folder} holds a build: give --resume to go on with it, or name another folder")


def merge(argv: Sequence[str] | None = None) -> int:
    """``alimm index merge``: take the rows of other indexes into one."""
    parser = argparse.ArgumentParser(
        prog="alimm index merge",
        description="Take the live rows of other indexes into one. Their segments are copied, not built anew; the "
        "other indexes stay as they are. No id may be in two of them.",
    )
    parser.add_argument("folder", help="the index that takes the rows in")
    parser.add_argument("others", nargs="+", metavar="OTHER", help="indexes whose rows it takes")
    parser.add_argument("--compact", action="store_true", help="build one segment of everything afterwards")
    given = parser.parse_args(argv)
    usage = _Usage()
    for name in given.others:
        if Path(name).resolve() == Path(given.folder).resolve():
            raise ValueError(f"{name} is the index itself; name others")
    with ExitStack() as stack:
        index = stack.enter_context(open_index(given.folder, read_only=False))
        others = [(name, stack.enter_context(open_index(name))) for name in given.others]
        claim(index)
        _check_disjoint([(given.folder, index), *others])
        for name, other in others:
            before = len(index)
            index.merge(other)
            print(f"{name}: {len(index) - before:,} rows")
        if given.compact:
            index.compact()
        print_pairs([("index", given.folder), *_summary(index), *usage.pairs("threads")])
    return 0


def _check_disjoint(indexes: list[tuple[str, BinaryGraph]]) -> None:
    """Look at all indexes before the first is merged: what is wrong with the last must not leave half a merge."""
    (folder, first), *others = indexes
    for name, other in others:
        if other.bits != first.bits:
            raise ValueError(f"{name} has codes of {other.bits} bits, {folder} of {first.bits}; nothing was merged")
    seen = first.ids
    for number, (name, other) in enumerate(others, 1):
        ids = other.ids
        both = np.intersect1d(seen, ids, assume_unique=True)
        if len(both):
            owner = next(known for known, graph in indexes[:number] if np.isin(both[0], graph.ids))
            raise ValueError(
                f"{name} has {len(both):,} ids that {owner} or another index has too, as {both[0]}: ids must differ; "
                "nothing was merged"
            )
        seen = np.concatenate([seen, ids])


def compact(argv: Sequence[str] | None = None) -> int:
    """``alimm index compact``: one segment without what is deleted."""
    parser = argparse.ArgumentParser(
        prog="alimm index compact",
        description="Build everything anew as one segment. Afterwards nothing of the deleted rows is on the disk. The "
        "rows are gathered in memory.",
    )
    parser.add_argument("folder", help="the index")
    given = parser.parse_args(argv)
    usage = _Usage()
    with open_index(given.folder, read_only=False) as index:
        before = index.stats()["bytes"]
        index.compact()
        pairs = [*_summary(index), ("bytes before", shown_size(before)), *usage.pairs("threads")]
        print_pairs([("index", given.folder), *pairs])
    return 0


def _summary(index: BinaryGraph) -> Iterator[tuple[str, Any]]:
    stats = index.stats()
    rows = stats["rows"]
    yield "rows", rows
    if not stats["deleted"] and not stats["delta"]:
        # With deleted or recent rows the nodes are not those of the live rows.
        yield "distinct codes", stats["nodes"]
        if stats["segments"] <= 1:
            yield "duplicates", f"{rows - stats['nodes']:,} ({(1 - stats['nodes'] / rows if rows else 0):.1%})"
    yield "bits", stats["bits"]
    yield "segments", stats["segments"]
    if stats["nodes"]:
        yield "mean degree", f"{stats['edges'] / stats['nodes']:.1f}"
    infos = segment_infos(index)
    if len(infos) == 1:
        built = {name: value for name, value in infos[0].items() if name != "config"}
        yield from ((name, value) for name, value in flat(built) if "recall" in name)
    yield "size", f"{shown_size(stats['bytes'])}, {stats['bytes'] / rows if rows else 0:.1f} bytes a row"


def flat(info: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers, words and switches of nested JSON, named by their path."""
    for name, value in info.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:.4g}"
        elif isinstance(value, str | int | None):
            yield f"{prefix}{name}", value


class _Usage:
    """Seconds, CPU and memory since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _cpu_seconds()

    def pairs(self, engine: str) -> Iterator[tuple[str, Any]]:
        from alimm.projects.binary_graph.store import peak_rss

        yield "seconds", f"{time.perf_counter() - self._wall:.2f}"
        # The workers of Ray are not ours: the system counts neither their time nor their memory for us.
        workers = ", of the driver alone" if engine == "ray" else ""
        yield "CPU seconds", f"{_cpu_seconds() - self._cpu:.2f}{workers}"
        yield "peak memory", f"{shown_size(peak_rss())}{workers}"
        if engine == "processes":
            largest = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            yield "peak memory of a worker", shown_size(largest)


def _cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
