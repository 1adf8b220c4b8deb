"""What a benchmark hands back, and how it is shown: figures, claims, the machine.

A benchmark is a module with ``run(arguments) -> Outcome`` and, where it has options, ``add_arguments(parser)``. It
prints its rows itself, as they come; `show` prints the verdict. ``tools/benchmark.py`` finds and runs it.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from alimm.version import __version__


@dataclass(frozen=True)
class Claim:
    """A figure and the bound that it has to keep.

    Attributes:
        subject: what was measured, as ``'int8 on fashion_mnist'``.
        figure: as measured, with its unit and interval.
        bound: what it has to be, in words.
        met: whether it is. A claim that this run did not measure is not met.
    """

    subject: str
    figure: str
    bound: str
    met: bool

    def __str__(self) -> str:
        return f"{self.subject}: {self.figure} (claim: {self.bound})"


@dataclass(frozen=True)
class Outcome:
    """Result of a benchmark: its claims, at least one, and what JSON keeps besides."""

    claims: Sequence[Claim]
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.claims:
            raise ValueError("an Outcome needs at least one claim")

    @property
    def met(self) -> bool:
        """Whether every claim is met."""
        return all(claim.met for claim in self.claims)

    def last_line(self, name: str) -> str:
        """``NAME: <figure> (claim: <bound>)``; more than one claim are counted."""
        if len(self.claims) == 1:
            return f"{name}: {self.claims[0].figure} (claim: {self.claims[0].bound})"
        met = sum(claim.met for claim in self.claims)
        return f"{name}: {met} of {len(self.claims)} claims met (claim: all)"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"met": self.met, "claims": [asdict(claim) for claim in self.claims], "data": self.data}


def show(name: str, outcome: Outcome, judged: bool = True) -> None:
    """Print each claim with its verdict, then the last line.

    Args:
        name: of the benchmark.
        outcome: of it.
        judged: False under ``--quick``, which tests machinery.
    """
    for claim in outcome.claims:
        verdict = ("met    " if claim.met else "NOT MET") if judged else "-      "
        print(f"{verdict} {claim}")
    if not judged:
        print("--quick tries the machinery: the figures mean nothing and no claim is judged")
    print(outcome.last_line(name), flush=True)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on standard output; the first column is left, the others right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(header):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # Where output is no terminal rich would fold at 80 columns.
    console = Console()
    Console(width=None if console.is_terminal else max(160, console.width)).print(table)


def environment() -> dict[str, str]:
    """The machine and versions that figures belong to."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "cpu": _cpu_model(),
        "cores": f"{cores}, torch uses {torch.get_num_threads()} threads",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "alimm": __version__,
        "date": datetime.date.today().isoformat(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
