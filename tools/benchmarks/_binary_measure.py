"""Measures one library on one set of codes in a process of its own, and compares such measurements.

Run as a program with a job as JSON, the file builds the index, searches with growing width, and writes a record. CPU
time is that of the process and its children during the build alone; loading and compiling are paid before, in a build
of a few codes, and reported. Recall counts a found code as right where it is as near as the true k-th one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import _binary_rivals as rivals
import numpy as np
from numpy.typing import NDArray

K = 10
WIDTHS = (10, 16, 24, 32, 48, 64, 96, 128, 256)
TARGETS = (0.90, 0.95, 0.99)
SINGLE = 300
"""Queries that are asked one at a time, for the latency."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What a process measures.

    Attributes:
        library: key of ``rivals.LIBRARIES``.
        folder: of the set: ``base.npy``, ``queries.npy``, ``truth.npy``.
        config: of the library.
        threads: of the build; the search always takes one.
        widths: of the search; () takes the library's or the usual ones.
        repeats: of each search in the process; the median counts.
        queries: at most so many are asked.
        save_to: writes the index there as well.
    """

    library: str
    folder: str
    config: dict[str, Any] = field(default_factory=dict)
    threads: int = 1
    widths: tuple[int, ...] = ()
    repeats: int = 3
    queries: int = 10_000
    save_to: str = ""

    @property
    def label(self) -> str:
        """Library and configuration; ours has the one of the command line, which the record holds, in every row."""
        if self.library == rivals.OURS:
            return self.library
        options = " ".join(f"{key}={value}" for key, value in self.config.items() if key != "run_dir")
        return f"{self.library} {options}".strip()


def recall(found_QK: NDArray[np.int64], base: NDArray[np.uint64], queries: NDArray[np.uint64], truth: Any) -> float:
    """Tie-aware recall, from the codes themselves: what a library says of distances does not count, nor an id twice.

    Args:
        found_QK: ids, -1 for none.
        base: codes that the ids number.
        queries: codes.
        truth: exact distances of the nearest, ascending, at least K columns; fewer where the base is smaller.
    """
    k = min(found_QK.shape[1], truth.shape[1])
    found = np.sort(found_QK[:, :k], axis=1)
    valid = (found >= 0) & (found < len(base))
    valid[:, 1:] &= found[:, 1:] != found[:, :-1]
    distances = np.zeros(found.shape, np.int64)
    for word in range(base.shape[1]):
        column = np.asarray(base[:, word])
        distances += np.bitwise_count(column[np.where(valid, found, 0)] ^ queries[:, word : word + 1])
    return float((valid & (distances <= truth[:, k - 1 : k])).mean())


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # the peak then includes the warm-up, which is small
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def measure(job: Job) -> Record:
    """Build and search in this process."""
    folder = Path(job.folder)
    base = np.load(folder / "base.npy")
    queries, truth = np.load(folder / "queries.npy")[: job.queries], np.load(folder / "truth.npy")[: job.queries]
    make = rivals.LIBRARIES[job.library]

    start = time.perf_counter()
    warm = make({key: value for key, value in job.config.items() if key != "run_dir"}, job.threads)
    warm.build(base[: make.batch_width])
    warm.threads = 1
    warm.search(queries[:2], min(K, len(base)), K)
    del warm
    cold = time.perf_counter() - start

    library = make(job.config, job.threads)
    before = _status("VmRSS")
    _reset_peak()
    cpu, start = cpu_seconds(), time.perf_counter()
    library.build(base)
    record: Record = {
        "build_cpu": cpu_seconds() - cpu,
        "build_wall": time.perf_counter() - start,
        "warm_up": cold,
        "peak_bytes": _status("VmHWM"),
        "grown_bytes": _status("VmHWM") - before,
        "bytes": library.size(),
        "points": len(base),
        "notes": library.notes(),
    }
    if job.save_to:
        library.save(Path(job.save_to))
    library.threads = 1
    if make.module == "faiss":
        import faiss

        faiss.omp_set_num_threads(1)
    elif make.module == "hnswlib":
        library.index.set_num_threads(1)
    record["search"] = [_sweep(library, base, queries, truth, width, job.repeats) for width in _widths(job, make)]
    return record


def _widths(job: Job, make: type[rivals.Library]) -> tuple[int, ...]:
    return tuple(job.widths) or make.widths or WIDTHS


def _sweep(library: rivals.Library, base: Any, queries: Any, truth: Any, width: int, repeats: int) -> Record:
    k = min(K, truth.shape[1])
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = library.search(queries, k, width)
        taken.append(time.perf_counter() - start)
    single = []
    for number in range(min(SINGLE, len(queries))):
        start = time.perf_counter()
        library.search(queries[number : number + 1], k, width)
        single.append(time.perf_counter() - start)
    return {
        "width": width,
        "recall": recall(found, base, queries, truth),
        "qps": len(queries) / statistics.median(taken),
        "p50_us": 1e6 * float(np.percentile(single, 50)),
        "p99_us": 1e6 * float(np.percentile(single, 99)),
    }


def run_job(job: Job) -> Record:
    """Measure in a new process with its threads limited.

    Raises:
        RuntimeError: the process failed; the message holds the end of what it said.
    """
    threads = str(job.threads)
    limits = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        command = [sys.executable, str(Path(__file__).resolve()), json.dumps(asdict(job)), str(out)]
        done = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"measuring {job.label} failed with {done.returncode}:\n{done.stderr[-2000:]}")
        return dict(json.loads(out.read_text()), label=job.label, library=job.library, config=job.config)


def run_jobs(jobs: list[Job], rounds: int, say: Any = print) -> list[list[Record]]:
    """Measure all jobs in turn, in the opposite order each second round: A B B A.

    Returns:
        The records of each job, one a round.
    """
    records: list[list[Record]] = [[] for _ in jobs]
    for number in range(rounds):
        for place in range(len(jobs))[:: 1 if number % 2 == 0 else -1]:
            records[place].append(run_job(jobs[place]))
            found = records[place][-1]
            say(
                f"  {found['label']}: build {found['build_cpu']:.1f} CPU s (round {number + 1} of {rounds})", flush=True
            )
    return records


def merge(records: list[Record]) -> Record:
    """One record of several of one job: medians, with the range of the CPU time."""
    first = records[0]
    merged = {**first, "rounds": len(records)}
    for key in ("build_cpu", "build_wall", "warm_up", "peak_bytes", "grown_bytes", "bytes"):
        values = [record[key] for record in records]
        merged[key] = statistics.median(values)
        merged[f"{key}_range"] = [min(values), max(values)]
    merged["search"] = [
        {key: statistics.median(point[key] for point in points) for key in points[0]}
        for points in zip(*(record["search"] for record in records), strict=True)
    ]
    return merged


def rate_at(search: list[Record], target: float) -> tuple[float, str] | None:
    """Queries a second at a recall, between the measured points: log of the rate against log-odds of the recall.

    Returns:
        The rate and ``''``, or ``'at least '`` where even the narrowest search is better; None where none reaches it.
    """
    points = sorted(search, key=lambda point: point["width"])
    if points[0]["recall"] >= target:
        return max(point["qps"] for point in points if point["recall"] >= target), "at least "
    for left, right in pairwise(points):
        if left["recall"] < target <= right["recall"]:
            low, goal, high = (_odds(value) for value in (left["recall"], target, right["recall"]))
            share = (goal - low) / (high - low)
            return float(np.exp((1 - share) * np.log(left["qps"]) + share * np.log(right["qps"]))), ""
    return None


def _odds(value: float) -> float:
    value = min(max(value, 1e-5), 1 - 1e-5)
    return float(np.log(value / (1 - value)))


def main() -> None:
    """Measure the job of the first argument and write the record to the second."""
    job = json.loads(sys.argv[1])
    Path(sys.argv[2]).write_text(json.dumps(measure(Job(**{**job, "widths": tuple(job["widths"])})), default=str))


if __name__ == "__main__":
    main()
