"""What happens when a task fails: which failures are worth another attempt, and what is said of those that are not.

A worker that dies and an error of the file system may be bad luck. Anything else a task raises comes from its input or
our code, and would come again.
"""

from __future__ import annotations

import errno
import logging
import traceback
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from alimm.projects.binary_graph.engine import Task

log = logging.getLogger(__name__)

RETRIES = 3
"""How often a task is tried again after its worker's death or an OSError."""


class Failure(NamedTuple):
    """Why a task failed, in a form that travels between processes."""

    kind: str
    message: str
    errno: int | None
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """That of an exception: ``'value'``, ``'os'`` or ``'other'``."""
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        if isinstance(error, OSError):
            where = "" if error.filename is None else f": {error.filename}"
            return cls("os", f"{error.strerror or error or type(error).__name__}{where}", error.errno, trace)
        if isinstance(error, ValueError):
            return cls("value", str(error), None, trace)
        return cls("other", repr(error), None, trace)

    def exception(self, task: Task) -> Exception:
        """What to raise where the stage was run."""
        text = f"stage {task.stage}, part {task.part} ({task.function}): {self.message}"
        if self.kind == "value":
            return ValueError(text)
        if self.kind == "os":
            return OSError(self.errno or errno.EIO, text)
        return RuntimeError(f"{text}\n{self.trace}" if self.trace else text)


DEATH = Failure("death", "", None, "")


class Attempts:
    """Counts the failures of tasks, and says when one is enough."""

    def __init__(self, retries: int = RETRIES) -> None:
        self.retries = retries
        self._failed: dict[tuple[str, int], int] = {}

    def failed(self, task: Task, failure: Failure) -> None:
        """Note a failure; raise unless the task is to be tried again."""
        key = (task.stage, task.part)
        self._failed[key] = self._failed.get(key, 0) + 1
        if failure.kind in ("os", "death") and self._failed[key] <= self.retries:
            what = "its worker died" if failure.kind == "death" else failure.message
            log.warning("stage %s, part %d: %s; attempt %d follows", *key, what, self._failed[key] + 1)
            return
        if failure.kind == "death":
            failure = Failure(
                "other",
                f"its worker died {self._failed[key]} times, most likely for want of memory: "
                "use fewer workers, or give each a smaller share of the work (worker_memory)",
                None,
                "",
            )
        raise failure.exception(task)
