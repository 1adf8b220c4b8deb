"""A whole build on a real Ray cluster of two raylets gives the bytes of a build in this process, whoever dies."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alimm.projects.binary_graph.engine import make_engine
from alimm.projects.binary_graph.pipeline import build_segment
from tests.projects.binary_graph.synthetic import clustered_codes
from tests.projects.binary_graph.test_pipeline import LITTLE, SMALL, same

ray = pytest.importorskip("ray", reason="the extra 'cluster' is not installed")
STORE_BYTES = 80 << 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE_BYTES})
        try:
            cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            ray.init(address=cluster.address, log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def workers() -> list[int]:
    """Processes of Ray that run a task."""
    found = subprocess.run(["pgrep", "-f", "ray::_execute"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def test_a_build_on_a_cluster_whose_workers_are_killed(cluster: Any, tmp_path: Path) -> None:
    codes = clustered_codes(3000)
    expected = build_segment(codes, config=SMALL)
    killed: list[int] = []
    done = threading.Event()

    def kill_some() -> None:
        while not done.is_set() and len(killed) < 2:
            time.sleep(0.3)
            for pid in workers()[:1]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                killed.append(pid)
                time.sleep(1.0)

    killer = threading.Thread(target=kill_some)
    killer.start()
    try:
        with make_engine("ray") as engine:
            built = build_segment(codes, config=SMALL, engine=engine, run_dir=tmp_path / "run", worker_memory=LITTLE)
            assert engine.workers == 2
    finally:
        done.set()
        killer.join()
    assert killed
    assert same(expected, built)
    assert np.array_equal(expected.ids, built.ids)
