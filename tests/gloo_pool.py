"""A pool of worker processes for tests of collectives: real gloo process groups, started once for the whole run.

``pool.run(2, function, *arguments)`` calls the module-level ``function(*arguments)`` on two ranks of a fresh default
process group and returns the list of results, by rank. ``torch.distributed.get_rank()`` tells a function its rank.

Each worker is this file run by a new interpreter (nothing is inherited but the environment), connected by a
pipe. A worker that raises fails the call with its traceback; one that dies or hangs is replaced.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

GRACE_SECONDS = 2.0
"""How long the other ranks may go on after one has failed: they may wait for it in a collective."""

START_SECONDS = 60.0


class GlooError(RuntimeError):
    """A rank raised, died or hung."""


class _Worker:
    """One process, our end of the pipe to it, and the file that its output goes to."""

    def __init__(self) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in kill)
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            pass_fds=[theirs.fileno()],
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        theirs.close()

    def wait_until_ready(self) -> None:
        if not self.connection.poll(START_SECONDS):
            raise GlooError(f"a worker did not start within {START_SECONDS:g} s\n{self.log_tail()}")
        try:
            self.connection.recv()
        except EOFError:
            raise GlooError(f"a worker did not start\n{self.log_tail()}") from None

    def log_tail(self, size: int = 4000) -> str:
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - size))
        return self.log.read().decode(errors="replace").strip()

    def kill(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()
        self.log.close()


class GlooPool:
    """Workers that come up when first needed and are reused from call to call."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._store: Any = None
        self._calls = 0
        atexit.register(self.close)

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0) -> list[Any]:
        """Call ``function(*arguments)`` on every rank of a new gloo group; return the results by rank.

        Args:
            world_size: how many ranks.
            function: a function at the top level of a module; it is imported in the workers, not pickled.
            arguments: picklable, the same for every rank.
            timeout: seconds for the whole call, the start of missing workers not counted.

        Raises:
            GlooError: a rank raised (the message holds its traceback), died, or did not end in time.
        """
        self._start(world_size)
        workers = self._workers[:world_size]
        job = pickle.dumps(arguments)
        self._calls += 1
        for rank, worker in enumerate(workers):
            task = (self._store.port, f"call{self._calls}", rank, world_size, timeout, sys.path, _locate(function), job)
            # A broken pipe is a worker that died between two calls; the loop below reports it.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                worker.connection.send(task)

        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        lost: list[_Worker] = []
        deadline = time.monotonic() + timeout
        pending = dict(enumerate(workers))
        while pending and time.monotonic() < deadline:
            ready = wait([worker.connection for worker in pending.values()], deadline - time.monotonic())
            for rank, worker in list(pending.items()):
                if worker.connection not in ready:
                    continue
                del pending[rank]
                try:
                    succeeded, payload = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.wait()
                    lost.append(worker)
                    failures[rank] = f"died with exit code {worker.process.returncode}\n{worker.log_tail()}"
                    continue
                if succeeded:
                    results[rank] = pickle.loads(payload)
                else:
                    failures[rank] = payload
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for rank, worker in pending.items():
            failures[rank] = f"did not end{'' if failures else f' within {timeout:g} s'}\n{worker.log_tail()}"
            lost.append(worker)
        for worker in lost:
            worker.kill()
            self._workers.remove(worker)
        if failures:
            text = "\n".join(f"rank {rank} of {world_size}: {failure}" for rank, failure in sorted(failures.items()))
            raise GlooError(text)
        return [results[rank] for rank in range(world_size)]

    def process_ids(self) -> list[int]:
        """The processes of the workers that are up, by rank."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End every worker."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        self._store = None
        atexit.unregister(self.close)

    def _start(self, world_size: int) -> None:
        from torch.distributed import TCPStore

        if self._store is None:
            # Port 0: the system picks a free one, and we keep it open, so nobody can take it in between.
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for worker in [worker for worker in self._workers if worker.process.poll() is not None]:
            worker.kill()
            self._workers.remove(worker)
        new = [_Worker() for _ in range(world_size - len(self._workers))]
        try:
            for worker in new:
                worker.wait_until_ready()
        except GlooError:
            for worker in new:
                worker.kill()
            raise
        self._workers.extend(new)


def _locate(function: Callable[..., Any]) -> tuple[str, str | None, str]:
    """Where a worker finds the function: module, its file, qualified name."""
    module = sys.modules.get(getattr(function, "__module__", ""))
    name = getattr(function, "__qualname__", "<locals>")
    if module is None or "<" in name:
        raise ValueError(f"the gloo pool runs functions at the top level of a module, got {function!r}: move it there")
    return module.__name__, getattr(module, "__file__", None), name


def _load(name: str, file: str | None) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    try:
        module = importlib.import_module(name)
        if file is None or Path(module.__file__ or "").resolve() == Path(file).resolve():
            return module
    except ModuleNotFoundError as error:
        if file is None or error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _call(task: Sequence[Any]) -> Any:
    import torch.distributed as dist

    port, prefix, rank, world_size, timeout, path, (module, file, name), job = task
    sys.path[:] = path
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    function: Any = _load(module, file)
    for part in name.split("."):
        function = getattr(function, part)
    arguments = pickle.loads(job)
    store = dist.PrefixStore(prefix, dist.TCPStore("127.0.0.1", port, is_master=False))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    # A rank may end at once; wait until nobody is still connecting to it. By the store, which outlives every rank.
    if store.add("connected", 1) == world_size:
        store.set("go", "")
    store.wait(["go"])
    try:
        return function(*arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _worker_main(descriptor: int) -> None:
    sys.path.pop(0)  # this file's folder, put there by the interpreter; it holds folders named like packages
    import torch

    torch.set_num_threads(1)
    connection = Connection(descriptor)
    connection.send("ready")
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(max(task[4] - 1, 0.5), exit=False)
        try:
            answer = (True, pickle.dumps(_call(task)))
        except BaseException:
            answer = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        connection.send(answer)


if __name__ == "__main__":
    _worker_main(int(sys.argv[1]))
