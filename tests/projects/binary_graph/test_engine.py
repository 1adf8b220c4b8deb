"""Whoever runs the tasks, in whatever order, dying or not: the files are the same, and nothing runs in vain."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from alimm.projects.binary_graph import engine as engine_module
from alimm.projects.binary_graph import engine_processes
from alimm.projects.binary_graph.engine import ProgressBars, Task, ThreadEngine, execute_task, make_engine, usable_cpus
from alimm.projects.binary_graph.engine_processes import ProcessEngine
from alimm.projects.binary_graph.store import RunFolder
from tests.projects.binary_graph.toy_stages import HERE, contents, counts, squares_tasks, sums_tasks

BOTH = pytest.mark.parametrize("name", ["threads", "processes"])


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", {"data": 1}, durable=False)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    """What the files must be: one task after the other, without an engine."""
    run = RunFolder(tmp_path_factory.mktemp("plain"), {"data": 1}, durable=False)
    for task in [*squares_tasks(), *sums_tasks()]:
        execute_task(run, task)
    assert run.read("sums", 1)["total"].tolist() == [
        sum(v * v for v in range(4, 10)),
        sum(v * v for v in range(18, 28)),
    ]
    return contents(run.path)


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@BOTH
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_files_are_the_same_with_every_engine(run, expected, name, workers):
    tasks = squares_tasks()
    random.Random(workers).shuffle(tasks)
    with make_engine(name, workers) as engine:
        receipts = engine.run_stage(run, tasks)
        engine.run_stage(run, sums_tasks()[::-1])
    assert contents(run.path) == expected
    assert [receipt["part"] for receipt in receipts] == list(range(7))
    assert receipts == run.receipts("squares")
    assert (engine.name, engine.workers) == (name, workers)


@BOTH
def test_finished_parts_are_not_computed_again(run, expected, name, tmp_path):
    counter = tmp_path / "count"
    tasks = squares_tasks(counter=str(counter))
    with make_engine(name, 2) as engine:
        engine.run_stage(run, tasks[2:5])
        assert (engine.skipped, engine.computed) == ({"squares": 0}, {"squares": 3})
        engine.run_stage(run, tasks)
        assert (engine.skipped, engine.computed) == ({"squares": 3}, {"squares": 4})
        engine.run_stage(run, sums_tasks())
        assert engine.computed == {"squares": 4, "sums": 2}
    assert contents(run.path) == expected
    assert counts(counter) == dict.fromkeys(range(7), 1)


def test_of_a_resumed_run_damaged_parts_alone_are_computed_again(run, expected, tmp_path):
    counter = tmp_path / "count"
    with ThreadEngine(2) as engine:
        engine.run_stage(run, squares_tasks(counter=str(counter)))
        files = sorted((run.path / "squares").glob("*.safetensors"))
        files[1].write_bytes(files[1].read_bytes()[:-1])
        flipped = bytearray(files[4].read_bytes())
        flipped[-3] ^= 4
        files[4].write_bytes(flipped)
        files[5].unlink()
        again = RunFolder(run.path, {"data": 1})
        engine.run_stage(again, squares_tasks(counter=str(counter)))
        engine.run_stage(again, sums_tasks())
        assert engine.skipped == {"squares": 4, "sums": 0}
    assert contents(run.path) == expected
    assert counts(counter) == {0: 1, 1: 2, 2: 1, 3: 1, 4: 2, 5: 2, 6: 1}


def test_the_longest_tasks_are_started_first(run, monkeypatch):
    order = []
    monkeypatch.setattr(
        engine_module, "execute_task", lambda run, task, clock: order.append(task.part) or {"part": task.part}
    )
    with ThreadEngine(1) as engine:
        engine.run_stage(run, squares_tasks()[::-1])
    costs = [task.cost for task in squares_tasks()]
    assert order == sorted(range(7), key=lambda part: (-costs[part], part)) != list(range(7))


@BOTH
def test_a_wrong_input_fails_at_once_and_names_its_task(run, name, tmp_path):
    counter = tmp_path / "count"
    tasks = [Task("squares", 3, f"{HERE}:refuses", {"counter": str(counter)}, cost=9.0)]
    with make_engine(name, 2) as engine, pytest.raises(ValueError, match=r"stage squares, part 3 .*refuses.*got 3$"):
        engine.run_stage(run, tasks)
    assert counts(counter) == {3: 1}
    assert run.receipts("squares") == []


@BOTH
def test_a_bug_is_shown_with_its_place(run, name):
    task = Task("squares", 2, f"{HERE}:has_a_bug", {})
    with make_engine(name, 1) as engine:
        engine.run_stage(run, [task])
        with pytest.raises(RuntimeError, match=r"(?s)part 0 .*ZeroDivisionError.*toy_stages\.py"):
            engine.run_stage(run, [task._replace(part=0)])


@BOTH
def test_a_function_that_does_not_exist_fails(run, name):
    with make_engine(name, 1) as engine, pytest.raises(RuntimeError, match=r"part 0 \(tests\.nowhere:f\)"):
        engine.run_stage(run, [Task("squares", 0, "tests.nowhere:f", {})])


@BOTH
def test_errors_of_the_file_system_are_tried_again(run, name, tmp_path, caplog):
    counter = tmp_path / "count"
    task = Task("squares", 0, f"{HERE}:fails_at_first", {"counter": str(counter), "times": 3})
    with make_engine(name, 2, retries=3) as engine:
        assert len(engine.run_stage(run, [task])) == 1
    assert counts(counter) == {0: 4}
    assert "a cable came loose: disk.bin; attempt 4 follows" in caplog.text


@BOTH
def test_errors_of_the_file_system_end_some_time(run, name, tmp_path):
    counter = tmp_path / "count"
    task = Task("squares", 0, f"{HERE}:fails_at_first", {"counter": str(counter), "times": 99})
    with make_engine(name, 2, retries=1) as engine, pytest.raises(OSError, match=r"part 0.*cable.*disk\.bin") as caught:
        engine.run_stage(run, [task])
    assert caught.value.errno == 5
    assert counts(counter) == {0: 2}


@BOTH
def test_after_a_failure_nothing_runs_on(run, name, tmp_path):
    marker = str(tmp_path / "pid")
    tasks = [
        Task("squares", part, f"{HERE}:sleeps", {"seconds": 0.3 if name == "threads" else 60.0, "marker": marker}, 2.0)
        for part in range(1, 9)
    ]
    engine = make_engine(name, 2)

    def interrupt(stage: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run_stage(run, [Task("squares", 0, f"{HERE}:squares", {"start": 0, "stop": 3}, 3.0), *tasks], interrupt)
    begun = sorted(tmp_path.glob("pid-*"))
    assert len(begun) <= 3
    if name == "processes":
        assert all(gone(int(file.read_text())) for file in begun if file.read_text())
    time.sleep(0.4)
    assert sorted(tmp_path.glob("pid-*")) == begun
    engine.close()


def test_a_killed_worker_is_replaced_and_its_task_done_again(run, expected, tmp_path, caplog):
    tasks = squares_tasks()
    for part in (2, 5):
        marker = str(tmp_path / f"died-{part}")
        tasks[part] = tasks[part]._replace(
            function=f"{HERE}:dies_once",
            payload={"marker": marker, **{key: tasks[part].payload[key] for key in ("start", "stop")}},
        )
    with make_engine("processes", 2) as engine:
        engine.run_stage(run, tasks)
        engine.run_stage(run, sums_tasks())
    assert (tmp_path / "died-2").exists()
    assert (tmp_path / "died-5").exists()
    assert contents(run.path) == expected
    assert caplog.text.count("ended with SIGKILL and is replaced") == 2


def test_a_task_that_always_kills_its_worker_fails(run):
    tasks = [*squares_tasks(), Task("squares", 7, f"{HERE}:dies_always", {}, 99.0)]
    with ProcessEngine(2, retries=2) as engine:
        with pytest.raises(RuntimeError, match=r"part 7 .*its worker died 3 times.*fewer workers"):
            engine.run_stage(run, tasks)
        engine.run_stage(run, tasks[:-1])  # it can be used again
    assert len(run.receipts("squares")) == 7


def test_a_worker_killed_between_stages_is_replaced(run, expected):
    with ProcessEngine(1) as engine:
        engine.run_stage(run, squares_tasks())
        os.kill(engine._workers[0].process.pid, signal.SIGKILL)
        engine.run_stage(run, sums_tasks())
    assert contents(run.path) == expected


def test_workers_that_cannot_start_are_told_of_at_once(run, monkeypatch):
    monkeypatch.setattr(engine_processes, "_START", "raise SystemExit(3)")
    with ProcessEngine(2) as engine, pytest.raises(RuntimeError, match=r"could not start.*code 3"):
        engine.run_stage(run, squares_tasks())


def test_workers_have_one_thread_and_no_framework(run, monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "7")
    with ProcessEngine(2) as engine:
        receipt = engine.run_stage(run, [Task("a", 0, f"{HERE}:environment", {})])[0]
    assert receipt["meta"] == {"main": False, "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    assert os.environ["NUMBA_NUM_THREADS"] == "7"
    assert run.read("a", 0)["pid"][0] != os.getpid()


def test_a_part_that_needed_more_than_planned_is_told_of(run, caplog):
    tasks = [Task("a", part, f"{HERE}:needs_memory", {"size": size}, part) for part, size in ((1, 60_000_000), (0, 10))]
    with ProcessEngine(1, worker_memory=20_000_000) as engine, caplog.at_level(logging.WARNING):
        receipts = engine.run_stage(run, tasks)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "stage a, part 1 took 6" in warnings[0]
    assert "20 MB were planned" in warnings[0]
    assert receipts[0]["peak_rss_bytes"] < receipts[1]["peak_rss_bytes"] - 40_000_000  # the peak is that of the task


def test_a_thread_is_charged_its_own_cpu(run):
    tasks = [
        Task("a", 0, f"{HERE}:spins", {"seconds": 0.2}),
        Task("a", 1, f"{HERE}:squares", {"start": 0, "stop": 1, "seconds": 0.2}),
    ]
    with ThreadEngine(2) as engine:
        spinning, sleeping = engine.run_stage(run, tasks)
    assert spinning["cpu_seconds"] >= 0.2
    assert sleeping["cpu_seconds"] < 0.1
    assert sleeping["wall_seconds"] >= 0.2


@BOTH
def test_a_full_disk_is_a_clean_error(run, name):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    task = Task("squares", 0, f"{HERE}:squares", {"start": 0, "stop": 100_000})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
    try:
        with make_engine(name, 1, retries=1) as engine, pytest.raises(OSError, match=r"part 0.*File too large"):
            engine.run_stage(run, [task])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list((run.path / "squares").iterdir()) == []


def start_driver(run: Path, name: str, counter: Path, seconds: float) -> subprocess.Popen[bytes]:
    script = (
        f"import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from {HERE} import drive; drive(*sys.argv[1:])"
    )
    arguments = [str(run), name, "2", str(counter), str(seconds)]
    return subprocess.Popen([sys.executable, "-c", script, json.dumps(sys.path), *arguments])


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@BOTH
def test_a_killed_driver_takes_its_workers_along_and_another_goes_on(expected, name, tmp_path):
    folder, counter = tmp_path / "run", tmp_path / "count"
    driver = start_driver(folder, name, counter, 0.4)
    try:
        wait_for(lambda: len(list(folder.glob("squares/*.json"))) >= 3)
        workers = children(driver.pid)
        assert len(workers) == (2 if name == "processes" else 0)
    finally:
        driver.kill()
        driver.wait()
    wait_for(lambda: all(gone(pid) for pid in workers), 10.0)
    finished = {receipt["part"] for receipt in RunFolder.attach(folder).receipts("squares")}
    before = counts(counter)
    assert 3 <= len(finished) < 7
    with make_engine("threads", 2) as engine:  # another engine may go on
        run = RunFolder(folder, {"data": 1})
        engine.run_stage(run, squares_tasks(counter=str(counter)))
        engine.run_stage(run, sums_tasks())
    assert engine.skipped == {"squares": len(finished), "sums": 0}
    assert contents(folder) == expected
    after = counts(counter)
    assert all(after[part] == before[part] == 1 for part in finished)
    assert not list(folder.glob("**/*.tmp"))


def test_workers_in_the_middle_of_a_long_task_end_with_their_driver(tmp_path):
    folder, counter = tmp_path / "run", tmp_path / "count"
    driver = start_driver(folder, "processes", counter, 600.0)
    try:
        wait_for(lambda: len(counts(counter)) == 2)
        workers = children(driver.pid)
    finally:
        driver.kill()
        driver.wait()
    assert len(workers) == 2
    try:
        wait_for(lambda: all(gone(pid) for pid in workers), 10.0)
    finally:
        for pid in workers:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_worker_of_another_build_is_refused(run):
    with ProcessEngine(1) as engine:
        engine.run_stage(run, squares_tasks()[:1])
        text = (run.path / "run.json").read_text().replace('"data": 1', '"data": 2')
        (run.path / "run.json").write_text(text)
        run.fingerprint["note"] = 1  # workers attach anew for another fingerprint
        with pytest.raises(ValueError, match="another build"):
            engine.run_stage(run, squares_tasks())


def test_progress_is_told_with_what_was_skipped(run):
    told = []
    with ThreadEngine(2) as engine:
        engine.run_stage(run, squares_tasks()[:2])
        engine.run_stage(run, squares_tasks(), lambda *state: told.append(state))
    assert told == [("squares", done, 7) for done in range(2, 8)]
    assert engine.run_stage(run, []) == []


def test_bars_are_drawn_on_a_terminal_only(run, capsys):
    for force in (False, True):
        with ProgressBars(force) as bars, ThreadEngine(1) as engine:
            engine.run_stage(run, squares_tasks(), bars)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("squares" in err, "7/7" in err) == (force, force)


def test_options_are_checked():
    with pytest.raises(ValueError, match="no engine 'spark'; there are threads, processes, ray"):
        make_engine("spark")
    with pytest.raises(ValueError, match="1 worker or more, got 0"):
        make_engine("threads", 0)
    with pytest.raises(ValueError, match="1 byte or more, got 0"):
        make_engine("processes", 1, worker_memory=0)
    assert make_engine("threads").workers == usable_cpus() >= 1
