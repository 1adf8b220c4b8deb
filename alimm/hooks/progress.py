"""A progress bar on the terminal."""

from __future__ import annotations

import logging
import sys
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alimm.registry import HOOKS


@HOOKS.register_module()
class ProgressHook(Hook):
    """Shows how far training, validation and testing are, where standard error is a terminal; silent elsewhere.

    Log lines that would go to the same terminal are printed above the bar. Only the main rank shows anything.
    """

    priority = "VERY_LOW"

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []

    def _start(self, runner: Runner, name: str, total: int, done: int = 0) -> None:
        if not is_main_process() or not sys.stderr.isatty():
            return
        if self._progress is None:
            console = Console(stderr=True, soft_wrap=True)
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=console, transient=True)
            for handler in runner.logger.handlers:
                stream = getattr(handler, "stream", None)
                if isinstance(handler, logging.StreamHandler) and stream is not None and stream.isatty():
                    self._streams.append((handler, handler.setStream(FileProxy(console, stream))))
            self._progress.start()
        self._tasks[name] = self._progress.add_task(name, total=total, completed=done)

    def _step(self, name: str) -> None:
        if self._progress is not None and name in self._tasks:
            self._progress.advance(self._tasks[name])

    def _end(self, name: str) -> None:
        if self._progress is not None and name in self._tasks:
            self._progress.remove_task(self._tasks.pop(name))
        if not self._tasks:
            self.close()

    def close(self) -> None:
        """Take the bar away and give the log its terminal back; also after an error."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        for handler, stream in self._streams:
            handler.setStream(stream)
        self._streams.clear()
        self._tasks.clear()

    def before_train(self, runner: Runner) -> None:
        """Show the bar of the whole training."""
        self._start(runner, "train", runner.max_iters, runner.iter)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Move on by one batch."""
        self._step("train")

    def after_train(self, runner: Runner) -> None:
        """Take the bar away."""
        self._end("train")

    def before_val_epoch(self, runner: Runner) -> None:
        """Show the bar of this validation."""
        self._start(runner, "val", len(runner.val_dataloader))

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Move on by one batch."""
        self._step("val")

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Take the bar away."""
        self._end("val")

    def before_test_epoch(self, runner: Runner) -> None:
        """Show the bar of the test."""
        self._start(runner, "test", len(runner.test_dataloader))

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Move on by one batch."""
        self._step("test")

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Take the bar away."""
        self._end("test")
