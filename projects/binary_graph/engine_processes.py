"""Worker processes on this machine. They need nothing but Python, and end with the process that started them.

A worker is a fresh interpreter (``sys.executable``) rather than a fork or a ``multiprocessing`` child: threads that
the caller has started do it no harm, the caller's script is not run a second time, and its environment can hold its
numbers of threads before any library reads them. Tasks and receipts are lines of JSON on one socket a worker; arrays go
through the run folder alone.

A worker that dies (killed for want of memory) is replaced, and its task given out again.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from alimm.projects.binary_graph.engine import BaseEngine, Task
from alimm.projects.binary_graph.engine_failures import DEATH, RETRIES, Attempts, Failure
from alimm.projects.binary_graph.engine_worker import WATCH_SECONDS
from alimm.projects.binary_graph.store import Receipt, RunFolder

log = logging.getLogger(__name__)

ONE_THREAD = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""What is 1 in a worker's environment: workers are the parallelism."""

SLACK = 1.3
"""A worker that needs so much more than it was planned to need is told of."""

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from alimm.projects.binary_graph.engine_worker import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection
    task: Task | None = None
    started: bool = False

    @classmethod
    def start(cls) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **dict.fromkeys(ONE_THREAD, "1")},
            )
        return cls(process, Connection(ours.detach()))

    def send(self, run: RunFolder, task: Task) -> None:
        self.task = task
        message = {"path": str(run.path.absolute()), "durable": run.durable, "fingerprint": run.fingerprint}
        with suppress(OSError):  # it has died, which is seen when its answer is waited for
            self.pipe.send_bytes(json.dumps([message, task]).encode())

    def receive(self) -> dict[str, Any] | None:
        """Its answer; None if it has died."""
        if not self.pipe.poll():
            return None
        try:
            answer = json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            return None
        self.started = True
        return answer

    def readable(self) -> bool:
        """Whether there is an answer, or will never be one."""
        # Its end of the socket may outlive it in a process that it has started, so that alone tells nothing.
        return self.pipe.poll() or self.process.poll() is not None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


class ProcessEngine(BaseEngine):
    """Processes of this machine, started with the first stage and kept until `close`.

    Args:
        workers: processes; None takes the CPUs that this process may use.
        worker_memory: bytes that a task is planned to need; a warning in the log names a part that needed more than 1.3
            times this beside what its worker had before.
        retries: how often a task is tried again after its worker's death or an OSError.
    """

    name = "processes"

    def __init__(self, workers: int | None = None, worker_memory: int | None = None, retries: int = RETRIES) -> None:
        super().__init__(workers, worker_memory, retries)
        self._workers: list[_Worker] = []

    def _run(self, run: RunFolder, tasks: list[Task]) -> Generator[Receipt, None, None]:
        attempts, queue = Attempts(self.retries), deque(tasks)
        waiting = len(tasks)
        try:
            while waiting:
                while len(self._workers) < min(self.workers, waiting):
                    self._workers.append(_Worker.start())
                for worker in self._workers:
                    if worker.task is None and queue:
                        worker.send(run, queue.popleft())
                busy = [worker for worker in self._workers if worker.task is not None]
                wait([worker.pipe for worker in busy], WATCH_SECONDS)
                for worker in busy:
                    if not worker.readable():
                        continue
                    task, answer = worker.task, worker.receive()
                    assert task is not None
                    if answer is None:
                        self._bury(worker)
                        attempts.failed(task, DEATH)
                        queue.appendleft(task)
                        continue
                    if "started" in answer:
                        continue
                    worker.task = None
                    if "failure" in answer:
                        attempts.failed(task, Failure(*answer["failure"]))
                        queue.append(task)
                        continue
                    self._check_memory(answer["receipt"], answer["base"])
                    waiting -= 1
                    yield answer["receipt"]
        except BaseException:
            # An idle worker would do for the next stage, but one in the middle of a task must not run on.
            self.close()
            raise

    def _bury(self, worker: _Worker) -> None:
        worker.end()
        self._workers.remove(worker)
        code = worker.process.returncode
        if not worker.started and code > 0:
            raise RuntimeError(
                f"a worker process could not start: {sys.executable} ended with code {code}; its error is on stderr"
            )
        cause = signal.Signals(-code).name if code < 0 else f"code {code}"
        log.warning("a worker process ended with %s and is replaced", cause)

    def _check_memory(self, receipt: Receipt, base: int) -> None:
        if self.worker_memory is not None and receipt["peak_rss_bytes"] > SLACK * self.worker_memory + base:
            log.warning(
                "stage %s, part %d took %.0f MB beside the %.0f MB of an idle worker; %.0f MB were planned",
                receipt["stage"],
                receipt["part"],
                (receipt["peak_rss_bytes"] - base) / 1e6,
                base / 1e6,
                self.worker_memory / 1e6,
            )

    def close(self) -> None:
        """End the worker processes, whatever they do."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()
