"""From builds of two or more sizes to hours for a billion codes: a model, stated in full with its numbers.

For each stage a law says how the CPU seconds a point grow with the number of points n; it follows from what the stage
computes, and only its factor is measured. Tasks keep the size that they had, since a worker's memory bounds it: a stage
gets more of them, with the same spread of their costs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alimm.projects.binary_graph.makespan import Makespan, Stage, simulate

PUBLISHED_HOURS = 5.0
PUBLISHED = (
    "published (arXiv 2102.04656): a graph of 1 billion codes in under 5 hours. How many machines took part is not "
    "known to us,\nso the figures above can be set beside it, but neither confirm nor refute it."
)

CLUSTER_SIZE = 2000
FLAT_CENTRES = 4096
GROUPS_LOOKED_AT = 8


def _division(n: float) -> float:
    """Centres that a code is compared with: all n / 2000 of them, or their groups and those of the nearest groups."""
    centres = max(1.0, n / CLUSTER_SIZE)
    return centres if centres <= FLAT_CENTRES else math.sqrt(centres) * (1 + GROUPS_LOOKED_AT)


LAWS: dict[str, tuple[Callable[[float], float], str]] = {
    "fixed": (lambda n: 1.0 / n, "the same work at every size"),
    "constant": (lambda n: 1.0, "the same work for each point"),
    "log": (math.log, "work a point as log n: sorting, searching in what is sorted"),
    "sqrt": (math.sqrt, "work a point as sqrt n: each point with sqrt n centres"),
    "linear": (lambda n: n, "work a point as n: a share of the points with n / size centres"),
    "division": (_division, "each point with all centres up to 4,096, then with 9 sqrt(centres); 2,000 points each"),
}
"""Law -> growth of the CPU seconds a point, up to a factor; and why."""


@dataclass(frozen=True)
class Law:
    """How a stage grows.

    Attributes:
        growth: of the CPU seconds a point: a name in ``LAWS``.
        parallel: whether the stage gets more tasks as n grows; else it is one task at every size.
    """

    growth: str = "constant"
    parallel: bool = True

    def __post_init__(self) -> None:
        if self.growth not in LAWS:
            raise ValueError(f"a stage grows by one of {', '.join(LAWS)}, got {self.growth!r}")


BUILD_LAWS = {
    "centres": Law("division", parallel=False),  # 20 codes a centre, compared as all codes are
    "assign": Law("division"),
    "stitch": Law("constant", parallel=False),
}
"""The stages of this project's build that do not follow ``Law()``, the same work for each point in more tasks."""


@dataclass(frozen=True)
class Measurement:
    """A real build.

    Attributes:
        points: distinct codes of it, n.
        stages: its stages, in order. Those of one name, or that differ in a number at its end (``round-1``,
            ``round-2``), are one stage: so builds may differ in the number of rounds.
    """

    points: int
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class StageModel:
    """What was fitted for one stage.

    Attributes:
        name: of the stage.
        law: how it grows.
        factor: CPU seconds a point are ``factor * growth(n)``: the mean over the measurements.
        spread: largest over smallest of the factors of the single measurements; 1 is a perfect fit.
        tasks_per_point: of the largest measurement.
        bytes_per_point: of the largest measurement; taken as constant.
        serial_per_point: seconds of the driver, of the largest measurement; taken as constant.
        shape: costs of the tasks of the largest measurement, as multiples of their mean.
    """

    name: str
    law: Law
    factor: float
    spread: float
    tasks_per_point: float
    bytes_per_point: float
    serial_per_point: float
    shape: tuple[float, ...]

    def at(self, points: int) -> Stage:
        """The stage for so many points."""
        count = max(1, round(self.tasks_per_point * points)) if self.law.parallel else 1
        seconds = self.factor * LAWS[self.law.growth][0](points) * points
        # Repeated, not drawn: the same model for the same numbers. Scaled so that the sum is that of the law.
        costs = np.resize(np.array(self.shape), count)
        total = costs.sum()
        costs = costs * (seconds / total) if total else costs
        size = self.bytes_per_point * points / count
        return Stage(self.name, tuple(costs.tolist()), (size,) * count, self.serial_per_point * points)


@dataclass(frozen=True)
class Extrapolation:
    """Fitted stages, and the builds that they give.

    Attributes:
        measured: sizes of the measurements, ascending.
        models: the stages.
        results: size -> one simulated build for each number of workers.
        bytes: size -> bytes that all tasks write.
        tasks: size -> number of tasks.
        overhead: seconds a task.
        bandwidth: bytes a second of each worker, None if transfers take no time.
    """

    measured: tuple[int, ...]
    models: tuple[StageModel, ...]
    results: dict[int, list[Makespan]]
    bytes: dict[int, float]
    tasks: dict[int, int]
    overhead: float
    bandwidth: float | None

    def __str__(self) -> str:
        wire = "transfers take no time" if self.bandwidth is None else f"{self.bandwidth / 1e6:.0f} MB/s a worker"
        sizes = ", ".join(f"{size:,}" for size in self.measured)
        lines = [
            "MODEL, NOT MEASURED: extrapolated from builds of " + sizes + f" codes; {wire}, {self.overhead:g} s a task",
            f"{'stage':<16} {'us/point at':>14} {'spread':>7} {'B/point':>8}  law",
            f"{'':<16} {f'{self.measured[-1]:,}':>14}",
        ]
        for model in self.models:
            growth, why = LAWS[model.law.growth]
            more = "" if model.law.parallel else "; in one task"
            lines.append(
                f"{model.name:<16} {1e6 * model.factor * growth(self.measured[-1]):>14.3f} {model.spread:>7.2f} "
                f"{model.bytes_per_point:>8.0f}  {model.law.growth}: {why}{more}"
            )
        for size, results in self.results.items():
            lines.append(f"{size:,} codes: {self.tasks[size]:,} tasks write {self.bytes[size] / 1e9:,.0f} GB (model)")
            lines.append(f"{'workers':>10} {'hours':>10} {'efficiency':>11}")
            lines += [f"{r.workers:>10} {r.seconds / 3600:>10.2f} {r.efficiency:>11.1%}" for r in results]
            fast = [result.workers for result in results if result.seconds < 3600 * PUBLISHED_HOURS]
            lines.append(
                f"  under {PUBLISHED_HOURS:g} hours: {f'{min(fast)} workers' if fast else 'none of these'} (model)"
            )
        return "\n".join([*lines, PUBLISHED])


def extrapolate(
    measurements: Sequence[Measurement],
    points: Sequence[int] = (10**9, 3 * 10**9),
    workers: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024),
    laws: Mapping[str, Law] | None = None,
    per_task_overhead: float = 0.05,
    bandwidth_bytes_per_second: float | None = 1e8,
) -> Extrapolation:
    """Fit the factors of the laws to measured builds, and simulate larger ones.

    Args:
        measurements: builds of at least two sizes, by the same stages and configuration.
        points: sizes to simulate, in distinct codes.
        workers: numbers of workers to simulate.
        laws: stage -> how it grows; None: ``BUILD_LAWS``. A stage that is not named does the same work for each point,
            in more tasks.
        per_task_overhead: seconds to start a task and to take its receipt.
        bandwidth_bytes_per_second: of each worker's link; None: transfers take no time.

    Raises:
        ValueError: fewer than two sizes, other stages in one than in another, or a law for a stage that is not there.
    """
    merged = sorted(((m.points, _merged(m.stages)) for m in measurements), key=lambda pair: pair[0])
    sizes = tuple(size for size, _ in merged)
    if len(set(sizes)) < 2 or min(sizes) < 2:
        raise ValueError(f"measure builds of at least two sizes above 1, got {list(sizes)}")
    names = list(merged[-1][1])
    for size, stages in merged:
        if set(stages) != set(names):
            odd = ", ".join(sorted(set(stages) ^ set(names)))
            raise ValueError(f"the builds of {size:,} and {sizes[-1]:,} codes do not have the same stages: {odd}")
    unknown = sorted(set(laws or ()) - set(names))
    laws = BUILD_LAWS if laws is None else laws
    if unknown:
        raise ValueError(f"there is no stage {unknown[0]!r}; there are {', '.join(names)}")
    models = tuple(
        _fit(name, laws.get(name, Law()), [(size, stages[name]) for size, stages in merged]) for name in names
    )
    results, size_bytes, tasks = {}, {}, {}
    for size in points:
        grown = [model.at(size) for model in models]
        results[size] = [simulate(grown, count, per_task_overhead, bandwidth_bytes_per_second) for count in workers]
        size_bytes[size] = sum(model.bytes_per_point for model in models) * size
        tasks[size] = sum(len(stage.cpu_seconds) for stage in grown)
    return Extrapolation(sizes, models, results, size_bytes, tasks, per_task_overhead, bandwidth_bytes_per_second)


def _merged(stages: Sequence[Stage]) -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for stage in stages:
        name = re.sub(r"-\d+$", "", stage.name)
        old = found.get(name, Stage(name, ()))
        found[name] = Stage(
            name,
            old.cpu_seconds + stage.cpu_seconds,
            (old.bytes or (0.0,) * len(old.cpu_seconds)) + (stage.bytes or (0.0,) * len(stage.cpu_seconds)),
            old.serial_seconds + stage.serial_seconds,
        )
    return found


def _fit(name: str, law: Law, builds: Sequence[tuple[int, Stage]]) -> StageModel:
    growth = LAWS[law.growth][0]
    factors = [sum(stage.cpu_seconds) / (size * growth(size)) for size, stage in builds]
    size, stage = builds[-1]
    mean = sum(stage.cpu_seconds) / max(1, len(stage.cpu_seconds))
    return StageModel(
        name,
        law,
        factor=sum(factors) / len(factors),
        spread=max(factors) / min(factors) if min(factors) > 0 else math.inf if max(factors) > 0 else 1.0,
        tasks_per_point=len(stage.cpu_seconds) / size,
        bytes_per_point=sum(stage.bytes) / size,
        serial_per_point=stage.serial_seconds / size,
        shape=tuple(seconds / mean if mean else 1.0 for seconds in stage.cpu_seconds) or (1.0,),
    )
