"""How long a build takes on how many workers: a model on measured tasks, and what it gives for sizes nobody measured.

A build runs its stages one after the other; a stage begins when all tasks of the one before have ended. Within a stage
the longest task that waits goes to the worker that has the least to do (Graham, Bounds on multiprocessing timing
anomalies, 1969). The seconds of the tasks are those of the receipts of a real build; nothing else is measured.

What the model leaves out: stragglers, lost workers, contention for memory and disks, processors of another speed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from alimm.projects.binary_graph.store import RunFolder

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Stage:
    """What a stage of a build costs.

    Attributes:
        name: its name.
        cpu_seconds: of each task.
        bytes: that each task writes, one for each task, or empty.
        serial_seconds: of the driver, while all workers wait.
    """

    name: str
    cpu_seconds: tuple[float, ...]
    bytes: tuple[float, ...] = ()
    serial_seconds: float = 0.0

    def __post_init__(self) -> None:
        values = np.array([*self.cpu_seconds, *self.bytes, self.serial_seconds], dtype=float)
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"seconds and bytes of the stage {self.name!r} must be finite and not negative")
        if self.bytes and len(self.bytes) != len(self.cpu_seconds):
            raise ValueError(
                f"the stage {self.name!r} has {len(self.cpu_seconds)} tasks and bytes of {len(self.bytes)}; give one "
                "number for each task, or none"
            )


@dataclass(frozen=True)
class Makespan:
    """What a simulated build takes.

    Attributes:
        workers: how many.
        seconds: from start to end.
        cpu_seconds: that tasks and driver compute, without overhead and transfer.
        by_stage: stage -> seconds of it, in order.
    """

    workers: int
    seconds: float
    cpu_seconds: float
    by_stage: dict[str, float] = field(default_factory=dict)

    @property
    def efficiency(self) -> float:
        """Share of the workers' time that is spent computing; 1 for a build that takes no time."""
        return self.cpu_seconds / (self.workers * self.seconds) if self.seconds else 1.0


def stages_of(run: RunFolder, names: Iterable[str], serial_seconds: dict[str, float] | None = None) -> list[Stage]:
    """Stages of a build that has run, from its receipts.

    Args:
        run: the folder of the build.
        names: the stages, in order.
        serial_seconds: stage -> seconds of the driver; receipts do not hold them.

    Raises:
        ValueError: a stage has no receipts.
    """
    stages = []
    for name in names:
        receipts = run.receipts(name)
        if not receipts:
            raise ValueError(
                f"the run in {run.path} has no finished part of the stage {name!r}; let the build end first"
            )
        seconds = tuple(float(receipt["cpu_seconds"]) for receipt in receipts)
        size = tuple(float(receipt["bytes"]) for receipt in receipts)
        stages.append(Stage(name, seconds, size, (serial_seconds or {}).get(name, 0.0)))
    return stages


def longest_first(seconds: Iterable[float], workers: int) -> float:
    """When the last worker ends, if each task, the longest first, goes to the one with the least to do.

    At most 4/3 - 1/(3 workers) of the best possible; never below the longest task, nor the sum over the workers.

    Raises:
        ValueError: fewer than one worker.
    """
    if workers < 1:
        raise ValueError(f"a build needs at least one worker, got {workers}")
    tasks = sorted(seconds, reverse=True)
    loads = [0.0] * min(workers, len(tasks))
    for task in tasks:
        heapq.heapreplace(loads, loads[0] + task)
    return max(loads, default=0.0)


def simulate(
    stages: Sequence[Stage],
    workers: int,
    per_task_overhead: float = 0.0,
    bandwidth_bytes_per_second: float | None = None,
) -> Makespan:
    """Let the stages run on so many workers, with a barrier after each.

    Args:
        stages: in order.
        workers: at least 1; a task keeps one of them busy.
        per_task_overhead: seconds to start a task and to take its receipt.
        bandwidth_bytes_per_second: of each worker's own link to the common file system. What a task writes is carried
            twice, once there and once to who reads it; both are counted as the time of the task that writes. None: no
            time.

    Raises:
        ValueError: no worker, or an overhead or a bandwidth that cannot be.
    """
    if not per_task_overhead >= 0:
        raise ValueError(f"the overhead of a task must be at least 0 seconds, got {per_task_overhead}")
    if bandwidth_bytes_per_second is not None and not bandwidth_bytes_per_second > 0:
        raise ValueError(f"the bandwidth must be above 0 bytes a second, got {bandwidth_bytes_per_second}")
    by_stage: dict[str, float] = {}
    computing = 0.0
    for stage in stages:
        carried = stage.bytes if stage.bytes and bandwidth_bytes_per_second else (0.0,) * len(stage.cpu_seconds)
        per_byte = 2.0 / bandwidth_bytes_per_second if bandwidth_bytes_per_second else 0.0
        tasks = [
            cpu + per_task_overhead + size * per_byte for cpu, size in zip(stage.cpu_seconds, carried, strict=True)
        ]
        seconds = stage.serial_seconds + longest_first(tasks, workers)
        # A stage that comes twice, as a round does, is one line.
        by_stage[stage.name] = by_stage.get(stage.name, 0.0) + seconds
        computing += stage.serial_seconds + sum(stage.cpu_seconds)
    return Makespan(workers, sum(by_stage.values()), computing, by_stage)


def table(
    stages: Sequence[Stage],
    workers: Sequence[int] = WORKERS,
    per_task_overhead: float = 0.0,
    bandwidth_bytes_per_second: float | None = None,
) -> str:
    """Text: seconds, speed-up, efficiency and the slowest stage for several numbers of workers. Arguments as above."""
    one = simulate(stages, 1, per_task_overhead, bandwidth_bytes_per_second).seconds
    lines = [
        "model, not measured: CPU seconds of a real build's tasks, longest first, a barrier after each stage",
        f"{'workers':>8} {'seconds':>12} {'speed-up':>9} {'efficiency':>11}  slowest stage",
    ]
    for count in workers:
        result = simulate(stages, count, per_task_overhead, bandwidth_bytes_per_second)
        slowest = max(result.by_stage, key=lambda name: result.by_stage[name], default="-")
        share = result.by_stage.get(slowest, 0.0) / result.seconds if result.seconds else 0.0
        faster = one / result.seconds if result.seconds else 1.0
        lines.append(
            f"{count:>8} {result.seconds:>12.2f} {faster:>9.2f} {result.efficiency:>11.1%}  {slowest} ({share:.0%})"
        )
    return "\n".join(lines)
