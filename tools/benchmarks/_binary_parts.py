"""Parts of the benchmark of binary graphs beside the comparison: duplicates, scaling, engines, cold start."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import _binary_data as sets
import _binary_measure as measure
import _binary_rivals as rivals
import numpy as np
from numpy.typing import NDArray

from alimm.report.benchmark import Claim, print_table

DUPLICATE_BOUND, GROWTH_BOUND, EFFICIENCY_BOUND, COLD_BOUND = 0.99, 1.6, 0.8, 1.5
DUPLICATE_WIDTH = 64
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_COLD = """
import sys
import numpy as np
from alimm.projects.binary_graph import BinaryGraph
index = BinaryGraph.open(sys.argv[1], read_only=True)
index.search(np.load(sys.argv[2], mmap_mode="r")[:1], 10)
print("found", flush=True)
"""


def duplicates(size: int, given: Any, libraries: list[str], data: dict[str, Any]) -> list[Claim]:
    """Recall where 10 % and 50 % of the codes are one and the same."""
    claims = []
    for share in (0.1, 0.5):
        chosen = sets.made("clustered", size, given.cache, queries=given.queries, same=share)
        print(chosen.line())
        jobs = [measure.Job(name, str(chosen.folder), options(name, given), given.threads, (16, 64, 256), 1)
                for name in libraries]  # fmt: skip
        merged = [measure.merge(records) for records in measure.run_jobs(jobs, 1)]
        data[f"duplicates_{round(100 * share)}"] = merged
        print_table(
            f"{share:.0%} of the codes are one: recall@{measure.K}",
            ["library", "build CPU s", *(f"ef {point['width']}" for point in merged[0]["search"])],
            [
                [
                    record["label"],
                    f"{record['build_cpu']:.1f}",
                    *(f"{point['recall']:.4f}" for point in record["search"]),
                ]
                for record in merged
            ],
        )
        for record in merged:
            if record["library"] == rivals.OURS and share == 0.1:
                found = next(p["recall"] for p in record["search"] if p["width"] == DUPLICATE_WIDTH)
                claims.append(
                    Claim(f"recall with {share:.0%} identical codes, ef {DUPLICATE_WIDTH}", f"{found:.4f}",
                          f"at least {DUPLICATE_BOUND:g}", found >= DUPLICATE_BOUND)
                )  # fmt: skip
    return claims


def growth(found: dict[tuple[str, int], measure.Record], sizes: list[int]) -> list[Claim]:
    """CPU time a point at the largest size over that at the smallest, from the builds of the comparison."""
    claims = []
    for name in sorted({name for name, _ in found}):
        if len(sizes) < 2 or any((name, size) not in found for size in (sizes[0], sizes[-1])):
            continue
        small, large = (found[name, size]["build_cpu"] / size for size in (sizes[0], sizes[-1]))
        label = f"{sets.size_text(sizes[-1])} / {sets.size_text(sizes[0])}"
        claims.append(
            Claim(f"build CPU a point, {name}, {label}", f"{large / small:.2f}x", f"at most {GROWTH_BOUND:g}x",
                  large / small <= GROWTH_BOUND)
        )  # fmt: skip
    return claims


def makespan(chosen: sets.CodeSet, given: Any, data: dict[str, Any]) -> list[Claim]:
    """Efficiency of many workers, simulated from the receipts of a build; and a model of far larger builds."""
    from alimm.projects.binary_graph import extrapolation
    from alimm.projects.binary_graph import makespan as model

    base = np.ascontiguousarray(chosen.base)
    # Compile first: the seconds of the tasks are to be those of their work.
    _staged(base[: rivals.BinaryGraphLibrary.batch_width], given)
    info, stages, checked = _staged(base, given)
    stated = info.get("graph_recall")
    data["lists"] = {"checked": checked, "stated": stated}
    print(f"recall@{measure.K} of the neighbour lists, by an exact scan here: {checked:.4f}; the build says {stated}")
    if not stages:
        print(f"{chosen.name} is built without stages: no makespan")
        return []
    print(model.table(stages, WORKERS))
    clusters = int(info.get("clusters", 1))
    most = max(1, clusters // 20)
    within = [*(workers for workers in WORKERS if workers < most), most]
    results = {workers: model.simulate(stages, workers).efficiency for workers in sorted({*WORKERS, most})}
    data["makespan"] = {"efficiency": results, "clusters": clusters, "stages": [vars(stage) for stage in stages]}
    _, fewer, _ = _staged(base[: len(base) // 4], given)
    sizes = [(len(base) // 4, fewer), (len(base), stages)]
    try:
        print(extrapolation.extrapolate([extrapolation.Measurement(*pair) for pair in sizes]))
    except ValueError as error:  # too small a set has no graph, or other stages
        print(f"no extrapolation: {error}")
    worst = min(within, key=lambda workers: results[workers])
    return [
        Claim(f"simulated efficiency, up to {within[-1]} workers ({clusters} clusters)",
              f"{results[worst]:.2f} with {worst}", f"at least {EFFICIENCY_BOUND:g}",
              results[worst] >= EFFICIENCY_BOUND)
    ]  # fmt: skip


def _staged(base: NDArray[np.uint64], given: Any) -> tuple[dict[str, Any], list[Any], float]:
    """Build through files: what the build says of itself, its stages in order, the checked recall of its lists."""
    from alimm.projects.binary_graph import makespan as model
    from alimm.projects.binary_graph.pipeline import build_segment
    from alimm.projects.binary_graph.store import RunFolder

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        segment = build_segment(base, config=_config(given), engine=_engine("threads", 1), run_dir=run)
        receipts = {stage.name: sorted(stage.glob("*.json")) for stage in run.iterdir() if stage.is_dir()}
        # Stages come in the order in which they ended; nothing else in the folder tells it.
        names = sorted(
            (name for name, files in receipts.items() if files),
            key=lambda name: max(file.stat().st_mtime_ns for file in receipts[name]),
        )
        opened = RunFolder.attach(run)
        stages = [stage for stage in model.stages_of(opened, names) if stage.cpu_seconds] if names else []
        return segment.info, stages, list_recall(opened, names)


def list_recall(run: Any, names: list[str], sample: int = 500) -> float:
    """Tie-aware recall of the last neighbour lists of a build through files, by an exact scan; NaN where it has none.

    Args:
        run: folder of the build.
        names: of its stages, in order.
        sample: nodes that are checked.
    """
    wanted = {"ids", "dists", "fresh"}  # edges and links have no flags of what is new
    made = [name for name in names if wanted <= set(run.receipts(name)[0]["arrays"])]
    if not made:
        return float("nan")
    parts = [receipt["part"] for receipt in run.receipts(made[-1])]
    codes = np.concatenate([run.read("gather", part, ["codes"])["codes"] for part in parts])
    lists = np.concatenate([run.read(made[-1], part, ["ids"])["ids"][:, : measure.K] for part in parts])
    nodes = np.sort(np.random.default_rng(4).permutation(len(codes))[:sample])
    # Distinct codes: the nearest of each is itself, at 0.
    truth = sets.exact_distances(codes, codes[nodes], measure.K + 1)[:, 1:]
    own = lists[nodes].astype(np.int64)
    return measure.recall(np.where(own == nodes[:, None], -1, own), codes, codes[nodes], truth)


def engines(chosen: sets.CodeSet, given: Any, data: dict[str, Any]) -> list[Claim]:
    """Whether the engine of the command line builds the same arrays as threads do."""
    from alimm.projects.binary_graph.pipeline import build_segment
    from alimm.projects.binary_graph.segment import Segment

    base = np.ascontiguousarray(chosen.base)
    built: list[Segment] = []
    taken = []
    for name in ("threads", given.engine):
        start = time.perf_counter()
        built.append(build_segment(base, config=_config(given), engine=_engine(name, max(2, given.threads))))
        taken.append(time.perf_counter() - start)
    names = [part.name for part in fields(Segment) if part.name != "info"]
    other = [name for name in names if getattr(built[0], name).tobytes() != getattr(built[1], name).tobytes()]
    data["engines"] = {"seconds": dict(zip(("threads", given.engine), taken, strict=True)), "differ": other}
    figure = f"differ in {', '.join(other)}" if other else "equal"
    return [Claim(f"arrays built by {given.engine} and by threads", figure, "equal", not other)]


def cold_start(chosen: sets.CodeSet, given: Any, data: dict[str, Any]) -> list[Claim]:
    """From the start of a process to its first result, on a saved index; what is compiled is in Numba's cache."""
    from alimm.projects.binary_graph import BinaryGraph

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        BinaryGraph.build(
            np.ascontiguousarray(chosen.base), path=path, config=_config(given), workers=given.threads
        ).close()
        command = [sys.executable, "-c", _COLD, str(path), str(chosen.folder / "queries.npy")]
        taken = [_first_line(command) for _ in range(1 + 5)][1:]
    data["cold_start"] = taken
    median = statistics.median(taken)
    return [
        Claim(f"first search of a new process, {chosen.name}", f"{median:.2f} s ({min(taken):.2f} to {max(taken):.2f})",
              f"below {COLD_BOUND:g} s", median < COLD_BOUND)
    ]  # fmt: skip


def _first_line(command: list[str]) -> float:
    """Seconds until the program prints a line."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        process.stdout.read()
    if process.returncode or line.strip() != "found":
        raise RuntimeError(f"the first search failed with {process.returncode}")
    return seconds


def options(library: str, given: Any) -> dict[str, Any]:
    """Configuration of a library: ours takes engine and options of the command line, the others their defaults."""
    if library != rivals.OURS:
        return {}
    return {"engine": given.engine, **given.options} if given.engine != "threads" else dict(given.options)


def _config(given: Any) -> Any:
    from alimm.projects.binary_graph import BuildConfig

    return BuildConfig(**given.options)


def _engine(name: str, workers: int) -> Any:
    from alimm.projects.binary_graph.engine import make_engine

    return make_engine(name, workers)
