"""Ray runs the same tasks to the same files, on a real cluster of two raylets on this machine."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from alimm.projects.binary_graph.engine import Task, execute_task, make_engine
from alimm.projects.binary_graph.store import RunFolder
from tests.projects.binary_graph.toy_stages import HERE, contents, counts, squares_tasks, sums_tasks

ray = pytest.importorskip("ray", reason="the extra 'cluster' is not installed")
STORE_BYTES = 80 << 20
RUNNERS = ("raylet/raylet", "gcs_server", "ray::_execute", "ray::IDLE")


@pytest.fixture(scope="module", autouse=True)
def settings(tmp_path_factory) -> Iterator[None]:
    """No report of use, and a token of our own: else Ray makes one in the home folder."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def cluster(settings) -> Iterator[Any]:
    """Two nodes with one CPU each, the head and another; this process has joined them."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "_system_config": {"health_check_period_ms": 1000}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, memory=1 << 30)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", {"data": 1}, durable=False)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, bytes]:
    run = RunFolder(tmp_path_factory.mktemp("plain"), {"data": 1}, durable=False)
    for task in [*squares_tasks(), *sums_tasks()]:
        execute_task(run, task)
    return contents(run.path)


def test_the_files_are_the_same_and_nothing_is_computed_again(cluster, run, expected, tmp_path):
    counter = tmp_path / "count"
    with make_engine("ray") as engine:
        assert (engine.name, engine.workers) == ("ray", 2)
        engine.run_stage(run, squares_tasks(counter=str(counter))[:3])
        receipts = engine.run_stage(run, squares_tasks(counter=str(counter))[::-1])
        engine.run_stage(run, sums_tasks())
        assert engine.skipped == {"squares": 3, "sums": 0}
    assert ray.is_initialized()  # it was not the engine that joined the cluster
    assert contents(run.path) == expected
    assert receipts == run.receipts("squares")
    assert counts(counter) == dict.fromkeys(range(7), 1)


def test_a_killed_worker_is_replaced_and_errors_are_tried_again(cluster, run, expected, tmp_path):
    tasks, marker = squares_tasks(), str(tmp_path / "died")
    payload = {"marker": marker, "start": tasks[2].payload["start"], "stop": tasks[2].payload["stop"]}
    tasks[2] = tasks[2]._replace(function=f"{HERE}:dies_once", payload=payload)
    with make_engine("ray", 2, worker_memory=1 << 20) as engine:
        engine.run_stage(run, tasks)
        engine.run_stage(run, sums_tasks())
        assert contents(run.path) == expected
        flaky = {"counter": str(tmp_path / "count"), "times": 2}
        engine.run_stage(run, [Task("flaky", 0, f"{HERE}:fails_at_first", flaky)])
    assert Path(marker).exists()
    assert counts(tmp_path / "count") == {0: 3}


def test_failures_name_their_task_and_leave_nothing_running(cluster, run, tmp_path):
    marker = str(tmp_path / "pid")
    tasks = [Task("a", part, f"{HERE}:sleeps", {"seconds": 60.0, "marker": marker}) for part in range(5)]
    with make_engine("ray", 2, retries=1) as engine:
        with pytest.raises(ValueError, match=r"stage a, part 9 .*refuses.*got 3"):
            engine.run_stage(run, [*tasks, Task("a", 9, f"{HERE}:refuses", {}, 2.0)])
        started = time.monotonic()
        with pytest.raises(RuntimeError, match=r"part 3 .*its worker died 2 times"):
            engine.run_stage(run, [Task("b", 3, f"{HERE}:dies_always", {})])
        engine.run_stage(run, squares_tasks())
    assert time.monotonic() - started < 50.0, "the sleepers held the CPUs"


def test_a_folder_that_the_nodes_do_not_see_is_told_of(cluster, run):
    with make_engine("ray", 2) as engine:
        (run.path / "run.json").unlink()
        with pytest.raises(ValueError, match="every node mounts"):
            engine.run_stage(run, squares_tasks())


def test_a_task_that_no_node_can_hold_is_refused(cluster):
    with pytest.raises(ValueError, match="no node of the Ray cluster"):
        make_engine("ray", 2, worker_memory=1 << 50)


def test_a_node_that_dies_in_the_middle_changes_nothing(cluster, run, expected, tmp_path):
    doomed = next(node for node in cluster.list_all_nodes() if not node.head)
    marker, killed = tmp_path / "pid", []

    def kill() -> None:
        while not (marker.exists() and marker.read_text()):
            time.sleep(0.05)
        cluster.remove_node(doomed, allow_graceful=False)
        killed.append(doomed)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    tasks = [
        task._replace(
            function=f"{HERE}:hangs_on_node", payload={**task.payload, "node": doomed.node_id, "marker": str(marker)}
        )
        for task in squares_tasks()
    ]
    with make_engine("ray", 2) as engine:
        engine.run_stage(run, tasks)  # it ends only if the task of the dead node is given to the other
        killer.join(60.0)
        assert killed
        engine.run_stage(run, sums_tasks())
    assert contents(run.path) == expected


@pytest.mark.slow
def test_a_ray_of_our_own_ends_with_us_and_another_run_goes_on(expected, tmp_path):
    folder, counter = tmp_path / "run", tmp_path / "count"
    script = (
        "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
        f"from {HERE} import drive; drive(*sys.argv[1:]); import ray; assert not ray.is_initialized()"
    )
    command = [sys.executable, "-c", script, json.dumps(sys.path), str(folder), "ray", "2", str(counter)]
    driver = subprocess.Popen([*command, "0.5"], start_new_session=True)
    try:
        end = time.monotonic() + 60.0
        while len(list(folder.glob("squares/*.json"))) < 2:
            assert time.monotonic() < end, "it did not begin in time"
            assert driver.poll() is None
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.wait()
    finished = {receipt["part"] for receipt in RunFolder.attach(folder).receipts("squares")}
    assert len(finished) < 7
    try:
        end = time.monotonic() + 30.0
        while any(name in command for command in processes_of(driver.pid).values() for name in RUNNERS):
            assert time.monotonic() < end, "Ray did not end with its driver"
            time.sleep(0.1)
    finally:  # its agents, which run no tasks, take a minute
        for pid in processes_of(driver.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    subprocess.run([*command, "0"], timeout=100, check=True)
    assert contents(folder) == expected
    again = counts(counter)
    assert all(again[part] == 1 for part in finished)


def processes_of(session: int) -> dict[int, str]:
    """The live processes of a session with their commands."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_text()
    return found
