"""The inside of a worker process: it runs the tasks that its driver sends, one at a time, until that is gone.

Importing this module is what an idle worker costs; a task's own module comes with its first task.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from alimm.projects.binary_graph.engine import Task, execute_task, resolve
from alimm.projects.binary_graph.engine_failures import Failure
from alimm.projects.binary_graph.store import RunFolder

WATCH_SECONDS = 1.0
"""How often a worker looks whether its driver is still its parent, and a driver whether its workers live."""


def serve(descriptor: int, driver: int) -> None:
    """Take tasks from a socket and answer with receipts; does not return.

    Args:
        descriptor: the socket.
        driver: the process id of the driver.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver decides
    pipe = Connection(descriptor)
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, driver, tasks), daemon=True).start()
    pipe.send_bytes(b'{"started": true}')
    runs: dict[str, RunFolder] = {}
    base = 0
    while True:
        message = json.loads(tasks.get())
        try:
            task = Task(*message[1])
            run = _attach(runs, message[0])
            resolve(task.function)
            base = base or resident()
            reset_peak()
            answer: dict[str, Any] = {"receipt": execute_task(run, task), "base": base}
        except BaseException as error:  # also SystemExit: only a death is a death
            answer = {"failure": Failure.of(error)}
        pipe.send_bytes(json.dumps(answer).encode())


def _listen(pipe: Connection, driver: int, tasks: queue.SimpleQueue[bytes]) -> None:
    """Pass tasks on, and end the process in the middle of whatever it does when the driver has ended."""
    try:
        while True:
            # The socket closes with the driver, unless a fork of the driver holds it too.
            while not pipe.poll(WATCH_SECONDS):
                if os.getppid() != driver:
                    os._exit(1)
            tasks.put(pipe.recv_bytes())
    except (EOFError, OSError):
        os._exit(1)


def _attach(runs: dict[str, RunFolder], folder: dict[str, Any]) -> RunFolder:
    key = json.dumps(folder)
    if key not in runs:
        runs.clear()
        runs[key] = RunFolder.attach(folder["path"], folder["fingerprint"], durable=folder["durable"])
    return runs[key]


def resident() -> int:
    """The resident memory of this process now, in bytes; 0 where the system does not tell."""
    try:
        found = re.search(r"^VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def reset_peak() -> None:
    """Let the peak of resident memory begin anew, so that it is that of the next task; where the system permits it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
