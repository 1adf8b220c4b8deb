from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.projects.binary_graph.extrapolation import LAWS, Law, Measurement, extrapolate
from alimm.projects.binary_graph.makespan import Stage, longest_first, simulate, stages_of, table
from alimm.projects.binary_graph.store import RunFolder

SECONDS = st.lists(st.integers(0, 1000).map(float), max_size=40)
STAGES = st.lists(st.builds(lambda s, serial: Stage("s", tuple(s), (), serial), SECONDS, st.floats(0, 50)), max_size=4)


def best_possible(tasks: list[float], workers: int) -> float:
    """Every assignment of the tasks."""
    ends = []
    for choice in itertools.product(range(workers), repeat=len(tasks)):
        loads = [0.0] * workers
        for task, worker in zip(tasks, choice, strict=True):
            loads[worker] += task
        ends.append(max(loads))
    return min(ends)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30).map(float), min_size=1, max_size=7), st.integers(1, 3))
def test_within_the_bound_of_the_best(tasks: list[float], workers: int) -> None:
    best = best_possible(tasks, workers)
    assert best <= longest_first(tasks, workers) <= (4 / 3 - 1 / (3 * workers)) * best + 1e-9


@given(SECONDS, st.integers(1, 50))
def test_between_the_mean_and_the_list_bound(tasks: list[float], workers: int) -> None:
    end = longest_first(tasks, workers)
    longest, mean = max(tasks, default=0.0), sum(tasks) / workers
    assert max(longest, mean) - 1e-9 <= end <= mean + (1 - 1 / workers) * longest + 1e-9


def test_the_known_worst_case() -> None:
    # Graham's example for two workers: 7 where 6 is possible.
    assert longest_first([3, 3, 2, 2, 2], 2) == 7
    assert longest_first([2, 2, 3, 2, 3], 2) == 7
    assert longest_first([5, 4, 3, 3, 3], 3) == 7
    assert longest_first([], 4) == 0


@given(STAGES, st.floats(0, 3))
def test_one_worker_is_the_sum(stages: list[Stage], overhead: float) -> None:
    result = simulate(stages, 1, overhead)
    tasks = sum(len(stage.cpu_seconds) for stage in stages)
    computing = sum(sum(stage.cpu_seconds) + stage.serial_seconds for stage in stages)
    assert result.seconds == pytest.approx(computing + overhead * tasks)
    assert result.cpu_seconds == pytest.approx(computing)
    if overhead == 0:
        assert result.efficiency == pytest.approx(1.0)


@given(STAGES, st.integers(1, 30))
def test_more_workers_never_take_longer(stages: list[Stage], workers: int) -> None:
    few, more = simulate(stages, workers, 0.5), simulate(stages, workers + 1, 0.5)
    assert more.seconds <= few.seconds + 1e-9
    assert 0 <= more.efficiency <= 1 + 1e-9


def test_a_barrier_separates_stages() -> None:
    # Without one, worker 2 would begin the second stage at 1, and all would end at 10.
    first, second = Stage("first", (9.0, 1.0)), Stage("second", (9.0, 1.0))
    result = simulate([first, second], 2)
    assert result.seconds == 18
    assert result.by_stage == {"first": 9, "second": 9}
    assert result.efficiency == pytest.approx(20 / 36)


def test_overhead_transfer_and_driver_by_hand() -> None:
    stage = Stage("s", (4.0, 2.0, 2.0), (100.0, 0.0, 50.0), serial_seconds=3.0)
    assert simulate([stage], 2).seconds == 3 + 4
    assert simulate([stage], 2, per_task_overhead=1.0).seconds == 3 + 6
    # 4 + 2 * 100 / 50 = 8; 2 + 2 * 50 / 50 = 4; 2.
    assert simulate([stage], 2, bandwidth_bytes_per_second=50.0).seconds == 3 + 8
    assert simulate([stage], 1, bandwidth_bytes_per_second=50.0).seconds == 3 + 14
    assert simulate([stage], 1, bandwidth_bytes_per_second=50.0).cpu_seconds == 3 + 8


def test_a_round_that_repeats_is_one_line() -> None:
    result = simulate([Stage("round", (1.0,)), Stage("round", (2.0,))], 4)
    assert result.by_stage == {"round": 3}
    assert result.seconds == 3


def test_mistakes() -> None:
    for stage in [("s", (-1.0,)), ("s", (float("nan"),)), ("s", (math.inf,)), ("s", (1.0,), (), -1.0)]:
        with pytest.raises(ValueError, match="finite and not negative"):
            Stage(*stage)
    with pytest.raises(ValueError, match="2 tasks and bytes of 1"):
        Stage("s", (1.0, 2.0), (5.0,))
    for workers in (0, -3):
        with pytest.raises(ValueError, match="at least one worker"):
            simulate([Stage("s", (1.0,))], workers)
    with pytest.raises(ValueError, match="overhead"):
        simulate([], 1, -1.0)
    with pytest.raises(ValueError, match="bandwidth"):
        simulate([], 1, 0.0, 0.0)
    with pytest.raises(ValueError, match="one of fixed, constant"):
        Law("cubic")


def test_table() -> None:
    text = table([Stage("local", (4.0,) * 8), Stage("merge", (1.0,))], (1, 4, 16), 0.0)
    lines = text.splitlines()
    assert lines[0].startswith("model, not measured")
    assert lines[2].split() == ["1", "33.00", "1.00", "100.0%", "local", "(97%)"]
    assert lines[3].split() == ["4", "9.00", "3.67", "91.7%", "local", "(89%)"]
    assert lines[4].split() == ["16", "5.00", "6.60", "41.2%", "local", "(80%)"]
    assert "slowest" in table([])


def test_stages_of_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run", {"data": 1}, durable=False)
    for part, seconds in enumerate([3.0, 1.0]):
        run.write("local", part, {}, clock=lambda seconds=seconds: (seconds, 9.0))
    (stage,) = stages_of(run, ["local"], {"local": 2.0})
    assert (stage.cpu_seconds, stage.serial_seconds) == ((3.0, 1.0), 2.0)
    assert stage.bytes == tuple(receipt["bytes"] for receipt in run.receipts("local"))
    with pytest.raises(ValueError, match="no finished part of the stage 'merge'"):
        stages_of(run, ["local", "merge"])


def build(points: int, **seconds_per_point: float) -> Measurement:
    tasks = points // 1000
    stages = [
        Stage(name, tuple([seconds * points / tasks] * tasks), tuple([32.0 * points / tasks] * tasks))
        for name, seconds in seconds_per_point.items()
    ]
    return Measurement(points, tuple(stages))


def test_laws_are_recovered() -> None:
    sizes = (10_000, 40_000)
    builds = [build(n, assign=1e-6 * math.sqrt(n), local=2e-5, sort=1e-6 * math.log(n), centres=0.5 / n) for n in sizes]
    laws = {"assign": Law("sqrt"), "sort": Law("log"), "centres": Law("fixed", parallel=False)}
    result = extrapolate(builds, [10**6], [1, 8], laws, 0.0, None)
    assert [model.spread for model in result.models] == pytest.approx([1.0] * 4)
    n = 10**6
    expected = {"assign": 1e-3 * n, "local": 2e-5 * n, "sort": 1e-6 * math.log(n) * n, "centres": 0.5}
    assert result.results[n][0].by_stage == pytest.approx(expected)
    # 1000 points a task, and the stage that is one task.
    assert result.tasks[n] == 3 * 1000 + 1
    assert result.bytes[n] == pytest.approx(4 * 32.0 * n)
    assert result.results[n][1].seconds == pytest.approx(0.5 + (sum(expected.values()) - 0.5) / 8, rel=0.01)


def test_a_wrong_law_shows_in_the_spread() -> None:
    builds = [build(n, assign=1e-6 * math.sqrt(n)) for n in (10_000, 40_000)]
    assert extrapolate(builds, [], []).models[0].spread == pytest.approx(2.0)


def test_rounds_are_one_stage_and_the_build_has_laws_of_its_own() -> None:
    def rounds(n: int, count: int) -> Measurement:
        centres = Stage("centres", (1e-9 * n * n,))
        return Measurement(n, (centres, *(Stage(f"round-{r}", (1e-6 * n / count,)) for r in range(1, count + 1))))

    result = extrapolate([rounds(10_000, 2), rounds(40_000, 3)], [10**6], [64], None, 0.0, None)
    assert [model.name for model in result.models] == ["centres", "round"]
    assert [model.spread for model in result.models] == pytest.approx([1.0, 1.0])
    assert result.results[10**6][0].by_stage["centres"] == pytest.approx(1000.0)


def test_the_law_of_the_division() -> None:
    law = LAWS["division"][0]
    assert law(2000 * 100) == 100
    assert law(2000 * 4096) == 4096
    assert law(2000 * 10_000) == 9 * 100
    assert law(10) == 1


def test_a_stage_of_one_task_bounds_the_speed() -> None:
    builds = [Measurement(n, (Stage("centres", (1e-6 * n,)),)) for n in (1000, 2000)]
    result = extrapolate(builds, [10**9], [1, 1000], {"centres": Law(parallel=False)}, 0.0, None)
    assert [run.seconds for run in result.results[10**9]] == pytest.approx([1000.0, 1000.0])


def test_the_spread_of_the_tasks_and_the_driver_stay() -> None:
    builds = [Measurement(n, (Stage("local", (1.0 * n, 3.0 * n), (), n / 100),)) for n in (10, 20)]
    (stage,) = (model.at(2000) for model in extrapolate(builds, [], []).models)
    assert len(stage.cpu_seconds) == 200
    assert max(stage.cpu_seconds) == pytest.approx(3 * min(stage.cpu_seconds))
    assert sum(stage.cpu_seconds) == pytest.approx(4.0 * 2000)
    assert stage.serial_seconds == pytest.approx(20.0)


def test_text_says_that_it_is_a_model() -> None:
    text = str(extrapolate([build(n, local=1e-4) for n in (10_000, 20_000)], workers=[4, 16]))
    assert text.startswith("MODEL, NOT MEASURED: extrapolated from builds of 10,000, 20,000 codes; 100 MB/s a worker")
    assert "constant: the same work for each point" in text
    assert "1,000,000,000 codes: 1,000,000 tasks write 32 GB (model)" in text
    # 1e5 CPU seconds, 5e4 of overhead, 640 of transfer, on 4 and on 16 workers.
    assert "         4      10.46       66.4%" in text
    assert "under 5 hours: 16 workers (model)" in text
    assert "under 5 hours: none of these (model)" in text
    assert "1 billion codes in under 5 hours" in text
    assert "not known" in text


def test_measurements_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="at least two sizes"):
        extrapolate([build(1000, a=1.0), build(1000, a=1.0)])
    with pytest.raises(ValueError, match="same stages: b"):
        extrapolate([build(1000, a=1.0), build(2000, a=1.0, b=1.0)])
    with pytest.raises(ValueError, match="no stage 'c'; there are a"):
        extrapolate([build(1000, a=1.0), build(2000, a=1.0)], laws={"c": Law()})
