"""Ray runs the tasks, on this machine or on the nodes of a cluster.

Ray carries tasks there and receipts back. Arrays go through the run folder, which must lie on a file system that every
node mounts: so its object store stays small, a node that dies takes nothing with it, and a later run can go on where
this one stopped. Attempts are counted here and not by Ray, so that they are the same with every engine.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from typing import Any

from alimm.extras import require
from alimm.projects.binary_graph.engine import BaseEngine, Task, execute_task
from alimm.projects.binary_graph.engine_failures import DEATH, RETRIES, Attempts, Failure
from alimm.projects.binary_graph.engine_worker import reset_peak
from alimm.projects.binary_graph.store import Receipt, RunFolder

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 << 20
"""Shared memory of a Ray that is started here; it takes no less than about 80 MB."""

IN_FLIGHT = 2
"""Tasks that Ray holds for each worker, so that none waits for the next."""

PATIENCE_SECONDS = 60.0
"""After so long without a receipt the log tells if no node can run a task."""

CANCEL_SECONDS = 30.0
"""How long the tasks of a failed stage are waited for."""


def _execute(folder: dict[str, Any], fields: list[Any]) -> dict[str, Any]:
    """On a worker: run one task; gives its receipt or why it failed."""
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # before the task's module brings Numba
    try:
        run = RunFolder.attach(folder["path"], folder["fingerprint"], durable=folder["durable"])
        reset_peak()
        return {"receipt": execute_task(run, Task(*fields))}
    except Exception as error:
        return {"failure": Failure.of(error)}


class RayEngine(BaseEngine):
    """Tasks of a Ray cluster.

    Args:
        workers: tasks at a time; None takes the CPUs of the cluster, or those that this process may use.
        worker_memory: bytes that a task is planned to need; Ray puts no more tasks on a node than fit its memory.
        retries: how often a task is tried again after the death of its worker or node, or an OSError.
        address: of a cluster; ``'auto'`` finds one on this machine; None takes the one that this process has joined, or
            that ``RAY_ADDRESS`` names, else starts a Ray on this machine alone, which ends with `close`.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
        ValueError: no node has the memory for a task.
    """

    name = "ray"

    def __init__(
        self,
        workers: int | None = None,
        worker_memory: int | None = None,
        retries: int = RETRIES,
        address: str | None = None,
    ) -> None:
        super().__init__(workers, worker_memory, retries)
        self._ray: Any = require("ray", "the Ray engine")
        self._owned = not self._ray.is_initialized()
        address = address or os.environ.get("RAY_ADDRESS") or None
        if self._owned and address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a build on one machine tells nobody
            self._ray.init(
                address="local",
                num_cpus=self.workers,
                include_dashboard=False,
                log_to_driver=False,
                object_store_memory=OBJECT_STORE_BYTES,
            )
        elif self._owned:
            self._ray.init(address=address, log_to_driver=False)
        try:
            if workers is None:
                self.workers = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
            if not self._node_fits():
                raise ValueError(
                    f"no node of the Ray cluster has a CPU and {worker_memory or 0} bytes of memory for a task: plan "
                    "with less memory for a worker (worker_memory), or join larger nodes"
                )
        except BaseException:
            self.close()
            raise
        needs = {} if worker_memory is None else {"memory": worker_memory}
        self._remote = self._ray.remote(num_cpus=1, max_retries=0, **needs)(_execute)

    def _node_fits(self) -> bool:
        """Whether some live node could ever run a task."""
        resources = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return any(node.get("CPU", 0) >= 1 and node.get("memory", 0) >= (self.worker_memory or 0) for node in resources)

    def _run(self, run: RunFolder, tasks: list[Task]) -> Generator[Receipt, None, None]:
        attempts, queue = Attempts(self.retries), deque(tasks)
        folder = {"path": str(run.path.absolute()), "durable": run.durable, "fingerprint": run.fingerprint}
        running: dict[Any, Task] = {}
        try:
            while queue or running:
                while queue and len(running) < IN_FLIGHT * self.workers:
                    task = queue.popleft()
                    running[self._remote.remote(folder, list(task))] = task
                ready, _ = self._ray.wait(list(running), timeout=PATIENCE_SECONDS)
                if not ready and not self._node_fits():
                    log.warning("the Ray cluster has no node left that could run a task; waiting for one to join")
                for reference in ready:
                    task = running.pop(reference)
                    answer = self._answer(reference)
                    if "failure" in answer:
                        attempts.failed(task, Failure(*answer["failure"]))
                        queue.append(task)
                    else:
                        yield answer["receipt"]
        finally:
            self._cancel(list(running))

    def _answer(self, reference: Any) -> dict[str, Any]:
        errors = self._ray.exceptions
        deaths = (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.LocalRayletDiedError)
        try:
            return self._ray.get(reference)
        except deaths as error:
            log.warning("Ray lost a worker: %s", str(error).partition("\n")[0])
            return {"failure": DEATH}
        except errors.RayError as error:
            return {"failure": Failure("other", f"Ray could not run it: {error}", None, "")}

    def _cancel(self, references: list[Any]) -> None:
        end = time.monotonic() + CANCEL_SECONDS
        while references and time.monotonic() < end:
            with suppress(Exception):  # what failed before must be told, not this
                for reference in references:
                    self._ray.cancel(reference, force=True)
                # Ray may lose the request for a task that is just on its way to a worker: ask until it is heard.
                _, references = self._ray.wait(references, num_returns=len(references), timeout=1.0)
        if references:
            log.warning("Ray has not ended %d tasks in %.0f s; they may run on", len(references), CANCEL_SECONDS)

    def close(self) -> None:
        """Leave the cluster if this engine has joined it, and end it if this engine has started it."""
        if self._owned:
            self._ray.shutdown()
            self._owned = False
