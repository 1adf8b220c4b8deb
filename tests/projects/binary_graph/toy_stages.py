"""Toy stages: one squares ranges, one sums the squares; some misbehave the first time they are run."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.engine import Task
from alimm.projects.binary_graph.store import RunFolder

HERE = "tests.projects.binary_graph.toy_stages"
Result = tuple[dict[str, NDArray[Any]], dict[str, Any]]


def _count(counter: str | None, part: int) -> None:
    """Note in a file, one byte a run, that a part was computed."""
    if counter is not None:
        with open(f"{counter}-{part}", "ab") as file:
            file.write(b".")


def squares(
    run: RunFolder, part: int, start: int, stop: int, counter: str | None = None, seconds: float = 0.0
) -> Result:
    _count(counter, part)
    time.sleep(seconds)
    values = np.arange(start, stop, dtype=np.uint64)
    return {"squares": values**2, "odd": values % 2 == 1}, {"rows": len(values)}


def sums(run: RunFolder, part: int, parts: list[int], rows: int) -> Result:
    total = [int(run.read("squares", other)["squares"].sum()) for other in parts]
    first = [run.rows("squares", other, "squares", 0, rows) for other in parts]
    return {"total": np.array(total, np.int64), "first": np.concatenate(first)}, {}


def dies_once(run: RunFolder, part: int, marker: str, start: int, stop: int) -> Result:
    """Kills its process in the middle of writing, the first time."""
    if not Path(marker).exists():
        Path(marker).touch()
        folder = run.path / "squares"
        folder.mkdir(exist_ok=True)
        (folder / f"part-{part:05d}.safetensors").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    return squares(run, part, start, stop)


def dies_always(run: RunFolder, part: int) -> Result:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def fails_at_first(run: RunFolder, part: int, counter: str, times: int) -> Result:
    """An OSError the first times."""
    _count(counter, part)
    if Path(f"{counter}-{part}").stat().st_size <= times:
        raise OSError(5, "a cable came loose", "disk.bin")
    return squares(run, part, 0, 4)


def refuses(run: RunFolder, part: int, counter: str | None = None) -> Result:
    _count(counter, part)
    raise ValueError("codes must have 64 bits or more, got 3")


def has_a_bug(run: RunFolder, part: int) -> Result:
    return {"x": np.zeros(1 // part)}, {}


def environment(run: RunFolder, part: int) -> Result:
    names = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS")
    return {"pid": np.array([os.getpid()])}, {"main": "torch" in sys.modules, **{n: os.environ.get(n) for n in names}}


def needs_memory(run: RunFolder, part: int, size: int) -> Result:
    print("a task may print")
    return {"sum": np.ones(size, np.uint8).sum(keepdims=True)}, {}


def spins(run: RunFolder, part: int, seconds: float) -> Result:
    """Uses so much CPU itself."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return {}, {}


def hangs_on_node(run: RunFolder, part: int, node: str, marker: str, start: int, stop: int) -> Result:
    """Never ends on one node of a Ray cluster; on the others it waits until that node has got a task."""
    import ray

    if ray.get_runtime_context().get_node_id() == node:
        Path(marker).write_text(str(os.getpid()))
        time.sleep(600.0)
    end = time.monotonic() + 60.0
    while not Path(marker).exists() and time.monotonic() < end:
        time.sleep(0.05)
    return squares(run, part, start, stop)


def sleeps(run: RunFolder, part: int, seconds: float, marker: str) -> Result:
    Path(f"{marker}-{part}").write_text(str(os.getpid()))
    time.sleep(seconds)
    return squares(run, part, 0, 1)


def squares_tasks(parts: int = 7, **payload: Any) -> list[Task]:
    """Parts of different size, so that the longest first are not the first."""
    starts = [part * (part + 3) for part in range(parts + 1)]
    return [
        Task("squares", part, f"{HERE}:squares", {"start": starts[part], "stop": starts[part + 1], **payload}, part % 3)
        for part in range(parts)
    ]


def sums_tasks(parts: int = 7) -> list[Task]:
    return [
        Task("sums", 0, f"{HERE}:sums", {"parts": list(range(parts)), "rows": 2}),
        Task("sums", 1, f"{HERE}:sums", {"parts": [1, 3], "rows": 4}),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every part of a run folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("*/*.safetensors"))}


def counts(counter: Path) -> dict[int, int]:
    """How often every part was computed."""
    return {int(f.name.rsplit("-", 1)[1]): f.stat().st_size for f in counter.parent.glob(f"{counter.name}-*")}


def drive(path: str, engine: str, workers: str, counter: str, seconds: str) -> None:
    """A whole build, as the main program of a process that the tests kill."""
    from alimm.projects.binary_graph.engine import make_engine

    run = RunFolder(path, {"data": 1})
    with make_engine(engine, int(workers)) as runner:
        runner.run_stage(run, squares_tasks(counter=counter, seconds=float(seconds)))
        runner.run_stage(run, sums_tasks())
