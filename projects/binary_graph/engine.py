"""Who runs the tasks of a stage: threads here; processes and Ray in modules of their own.

A task is a pure function of the files that it reads, and writes one part of its stage (see `store`). So the files come
out the same whichever worker runs it, in whatever order and however often; an engine only decides when and where.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from importlib import import_module
from typing import Any, NamedTuple, Protocol, TypeVar

from numpy.typing import NDArray

from alimm.projects.binary_graph.engine_failures import RETRIES, Attempts, Failure
from alimm.projects.binary_graph.store import Receipt, RunFolder

Progress = Callable[[str, int, int], None]
"""Called with the stage, the parts that are done and all its parts."""

TaskFunction = Callable[..., tuple[dict[str, NDArray[Any]], dict[str, Any]]]
Self = TypeVar("Self", bound="BaseEngine")


class Task(NamedTuple):
    """What computes one part.

    Attributes:
        stage: its stage.
        part: its number in the stage.
        function: ``'package.module:function'``, called as ``function(run, part, **payload)``; gives arrays and meta.
        payload: its further arguments, as JSON takes them.
        cost: how long it takes, in any unit; the longest tasks are started first.
    """

    stage: str
    part: int
    function: str
    payload: dict[str, Any]
    cost: float = 1.0


class Engine(Protocol):
    """Runs stages; a context manager.

    Attributes:
        name: as `make_engine` takes it.
        workers: how many tasks run at a time.
        skipped: stage -> parts that an earlier run had finished.
        computed: stage -> parts that were computed.
    """

    name: str
    workers: int
    skipped: dict[str, int]
    computed: dict[str, int]

    def run_stage(self, run: RunFolder, tasks: Sequence[Task], progress: Progress | None = None) -> list[Receipt]:
        """Run those tasks of one stage whose parts are not finished; gives the receipts of all, by part.

        Raises:
            ValueError: a task's function raised it: nothing mends that but another input.
            OSError: a task could not read or write, tried again or not.
            RuntimeError: a task failed otherwise, or its worker died too often.
        """
        ...

    def close(self) -> None:
        """End the workers."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, *error: object) -> None: ...


def execute_task(run: RunFolder, task: Task, cpu_clock: Callable[[], float] = time.process_time) -> Receipt:
    """Run a task in this thread and write its part.

    Args:
        run: the folder of the build.
        task: what to run.
        cpu_clock: seconds of CPU that are the task's: of the thread where others run beside it, else of the process.
    """
    function = resolve(task.function)
    cpu, wall = cpu_clock(), time.perf_counter()
    arrays, meta = function(run, task.part, **task.payload)
    return run.write(task.stage, task.part, arrays, meta, clock=lambda: (cpu_clock() - cpu, time.perf_counter() - wall))


def resolve(function: str) -> TaskFunction:
    """The function that ``'package.module:function'`` names."""
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)


class BaseEngine:
    """What all engines have in common: which tasks run, in which order, and what is told of it.

    Args:
        workers: tasks at a time; None takes the CPUs that this process may use.
        worker_memory: bytes that a task is planned to need; None: unknown.
        retries: how often a task is tried again after a worker's death or an OSError.
    """

    name = ""

    def __init__(self, workers: int | None = None, worker_memory: int | None = None, retries: int = RETRIES) -> None:
        self.workers = usable_cpus() if workers is None else workers
        if self.workers < 1:
            raise ValueError(f"an engine needs 1 worker or more, got {workers}")
        if worker_memory is not None and worker_memory < 1:
            raise ValueError(f"the memory of a worker must be 1 byte or more, got {worker_memory}")
        self.worker_memory, self.retries = worker_memory, retries
        self.skipped: dict[str, int] = {}
        self.computed: dict[str, int] = {}

    def run_stage(self, run: RunFolder, tasks: Sequence[Task], progress: Progress | None = None) -> list[Receipt]:
        """See `Engine.run_stage`."""
        if not tasks:
            return []
        stage = tasks[0].stage
        assert all(task.stage == stage for task in tasks), "one stage at a time"
        assert len({task.part for task in tasks}) == len(tasks), "every part once"
        receipts: dict[int, Receipt] = {}
        for task in tasks:
            # A checksum is worth a read only of what an earlier run left.
            receipt = run.done(stage, task.part, verify=run.resumed)
            if receipt is not None:
                receipts[task.part] = receipt
        self.skipped[stage], self.computed[stage] = len(receipts), 0
        if progress is not None:
            progress(stage, len(receipts), len(tasks))
        pending = [task for task in tasks if task.part not in receipts]
        pending.sort(key=lambda task: (-task.cost, task.part))
        if pending:
            with closing(self._run(run, pending)) as arriving:
                for receipt in arriving:
                    receipts[receipt["part"]] = receipt
                    self.computed[stage] += 1
                    if progress is not None:
                        progress(stage, len(receipts), len(tasks))
        return [receipts[part] for part in sorted(receipts)]

    def _run(self, run: RunFolder, tasks: list[Task]) -> Generator[Receipt, None, None]:
        """Run tasks, the first first; yield each receipt as it comes. When it ends or is closed, nothing runs on."""
        raise NotImplementedError

    def close(self) -> None:
        """End the workers."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ThreadEngine(BaseEngine):
    """Threads of this process: nothing to start and nothing to send. The kernels release Python's lock."""

    name = "threads"

    def _run(self, run: RunFolder, tasks: list[Task]) -> Generator[Receipt, None, None]:
        attempts = Attempts(self.retries)
        stop = threading.Event()

        def execute(task: Task) -> Receipt:
            while True:
                try:
                    return execute_task(run, task, time.thread_time)
                except Exception as error:
                    try:
                        attempts.failed(task, Failure.of(error))
                    except Exception as final:
                        raise final from error
                    if stop.wait(0.05):
                        raise

        executor = ThreadPoolExecutor(self.workers, thread_name_prefix="binary_graph")
        waiting: set[Future[Receipt]] = {executor.submit(execute, task) for task in tasks}
        try:
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            stop.set()
            executor.shutdown(wait=True, cancel_futures=True)


def usable_cpus() -> int:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_ENGINES = {
    "threads": "alimm.projects.binary_graph.engine:ThreadEngine",
    "processes": "alimm.projects.binary_graph.engine_processes:ProcessEngine",
    "ray": "alimm.projects.binary_graph.engine_ray:RayEngine",
}


def make_engine(
    name: str = "threads", workers: int | None = None, worker_memory: int | None = None, **options: Any
) -> Engine:
    """The engine of that name.

    Args:
        name: ``'threads'``, ``'processes'`` or ``'ray'``.
        workers: tasks at a time; None takes the CPUs that this process may use.
        worker_memory: bytes that a task is planned to need.
        options: what else the class takes, e.g. ``retries`` or Ray's ``address``.
    """
    if name not in _ENGINES:
        raise ValueError(f"there is no engine {name!r}; there are {', '.join(_ENGINES)}")
    kind: Any = resolve(_ENGINES[name])
    return kind(workers=workers, worker_memory=worker_memory, **options)


class ProgressBars:
    """Bars on standard error, one a stage, which stay when they are full; nothing where that is no terminal.

    Args:
        force: draw them also where standard error is no terminal.
    """

    def __init__(self, force: bool = False) -> None:
        self._progress: Any = None
        self._bars: dict[str, Any] = {}
        if force or sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            console = Console(stderr=True, force_terminal=True if force else None)
            columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=console, transient=False)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move the bar of a stage; what `Engine.run_stage` calls."""
        if self._progress is None:
            return
        self._progress.start()
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._bars[stage], completed=done, total=total)

    def close(self) -> None:
        """Leave the bars as they are and give the terminal back."""
        if self._progress is not None:
            self._progress.stop()

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
