"""Plot any figure of MMEngine's logs, several runs together, and show where the training time went."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
"""Told apart by readers who do not see red and green alike; a ninth run starts again, dashed."""
POSITION_KEYS = ("iter", "epoch", "step")
MARKER_LIMIT = 40


@dataclass(frozen=True)
class Record:
    """One line of a log.

    Attributes:
        values: the figures, all numbers.
        iteration: of the training, as far as it was when the line was written.
        epoch: likewise; None in a run that does not count epochs.
        is_train: written by the training loop, not by a validation.
    """

    values: dict[str, float]
    iteration: int
    epoch: int | None
    is_train: bool


@dataclass(frozen=True)
class Run:
    """One training, put together from the logs of all its starts."""

    name: str
    source: Path
    records: tuple[Record, ...]

    @property
    def by_epoch(self) -> bool:
        """Whether the run counts epochs."""
        return any(record.epoch is not None for record in self.records)

    @property
    def iterations_per_epoch(self) -> float:
        """As far as the log shows it: exact where the last iteration of some epoch was logged."""
        shares = [record.iteration / record.epoch for record in self.records if record.is_train and record.epoch]
        return max(shares, default=1.0)

    def keys(self) -> list[str]:
        """What can be plotted, in order of the first appearance."""
        return list(dict.fromkeys(key for record in self.records for key in record.values))

    def is_training(self, key: str) -> bool:
        """Whether the training loop writes ``key``. A validation may write it too: its ``time`` is another figure."""
        return any(record.is_train and key in record.values for record in self.records)

    def series(self, key: str, by_epoch: bool) -> tuple[np.ndarray, np.ndarray]:
        """Positions (epochs or iterations) and values of one key, those of the training where it has any."""
        from_training = self.is_training(key)
        chosen = [record for record in self.records if key in record.values and record.is_train == from_training]
        positions = []
        for record in chosen:
            if not by_epoch:
                positions.append(float(record.iteration))
            elif record.is_train:
                positions.append(record.iteration / self.iterations_per_epoch)
            else:
                positions.append(float(record.epoch or 0))
        return np.array(positions), np.array([record.values[key] for record in chosen], dtype=float)


def find_logs(path: Path) -> list[Path]:
    """The scalar files behind ``path``, oldest first: the file itself, or those of a work_dir, one for each start.

    Raises:
        ValueError: there is none.
    """
    if path.is_file():
        return [path]
    folders = [path, path / "vis_data", *sorted(path.glob("*/vis_data"))]
    # MMEngine writes each line twice: into scalars.json and into <timestamp>.json. One of them is enough.
    # Other files of a work dir are none of ours.
    names = ("scalars.json", "[0-9]*_[0-9]*.json")
    found = [next((log for name in names for log in sorted(folder.glob(name))), None) for folder in folders]
    logs = [log for log in found if log is not None]
    if not logs:
        what = "holds no vis_data/*.json" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}; expected a work_dir of a training, or the .json file in its vis_data folder")
    return logs


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON lines of one file. A last line that was cut short is left out, with a notice.

    Raises:
        ValueError: another line is no JSON object. The message gives file and line.
    """
    raw = path.read_bytes()
    lines = raw.split(b"\n")
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    objects = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"expected an object, got {type(value).__name__}")
        except ValueError as error:
            if number == last and not raw.endswith(b"\n"):
                print(f"notice: {path}:{number} is cut short and left out", file=sys.stderr)
                continue
            raise ValueError(f"{path}:{number}: no line of a log: {error}") from error
        objects.append(value)
    if not objects:
        raise ValueError(f"{path} holds no figures; the run may have stopped before its first log line")
    return objects


def to_records(lines: Sequence[dict[str, Any]]) -> list[Record]:
    """Place each line on the axis of the training.

    A validation line has only ``step``, which is an epoch or an iteration as the config says. So it is placed by the
    training line before it; only a log without training is placed by ``step``.
    """
    iteration, epoch = 0, None
    has_training = any("iter" in line for line in lines)
    records = []
    for line in lines:
        is_train = "iter" in line
        if is_train:
            iteration, epoch = int(line["iter"]), int(line["epoch"]) if "epoch" in line else None
        elif not has_training:
            iteration = int(line.get("step", 0))
        values = {
            key: float(value)
            for key, value in line.items()
            if key not in POSITION_KEYS and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        records.append(Record(values, iteration, epoch, is_train))
    return records


def read_run(path: Path, name: str | None = None) -> Run:
    """Read a log or a work_dir. Where a later start repeats iterations of an earlier one, the later counts."""
    records: list[Record] = []
    for log in find_logs(path):
        later = to_records(read_lines(log))
        first = next((record.iteration for record in later if record.is_train), None)
        if first is not None:
            records = [record for record in records if record.iteration < first]
        records += later
    if name is None:
        # work_dirs/NAME/TIMESTAMP/vis_data/scalars.json is known to its owner as NAME/TIMESTAMP.
        folder = path.resolve()
        if folder.is_file():
            folder = folder.parent.parent if folder.parent.name == "vis_data" else folder.with_suffix("")
            name = f"{folder.parent.name}/{folder.name}" if path.resolve().parent.name == "vis_data" else folder.name
        else:
            name = folder.name
    return Run(name, path, tuple(records))


def smooth(values: np.ndarray, weight: float) -> np.ndarray:
    """Exponential moving average without the pull towards its start; ``weight`` 0 changes nothing."""
    result, total, mass = np.empty_like(values), 0.0, 0.0
    for index, value in enumerate(values):
        if math.isfinite(value):
            total, mass = weight * total + (1 - weight) * value, weight * mass + (1 - weight)
            result[index] = total / mass
        else:
            result[index] = value
    return result


def check_keys(runs: Sequence[Run], keys: Sequence[str]) -> None:
    """Raise a ``ValueError`` that lists what there is, if a run has no such key."""
    for run in runs:
        known = run.keys()
        for key in keys:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
                hint = f" Did you mean {' or '.join(near)}?" if near else ""
                raise ValueError(f"{run.source} has no key {key!r}.{hint} It has: {', '.join(known)}")


def plot_curves(
    runs: Sequence[Run], keys: Sequence[str], out: Path, title: str = "", axis: str = "auto", weight: float = 0.0
) -> None:
    """Draw one panel a key, one line a run.

    Args:
        runs: what to compare.
        keys: figures of the logs, ``'loss'``, ``'accuracy/top1'``; every run must have them.
        out: the picture; its suffix chooses the format (png, svg, pdf).
        title: above the panels.
        axis: ``'epoch'``, ``'iter'``, or ``'auto'``: epochs if all runs count them.
        weight: of the moving average, 0 (none) to below 1; the values themselves stay visible, faint. Figures of a
            validation are few and exact, and are never averaged.
    """
    from matplotlib.figure import Figure

    by_epoch = axis == "epoch" or (axis == "auto" and all(run.by_epoch for run in runs))
    if axis == "epoch" and not all(run.by_epoch for run in runs):
        raise ValueError(f"--x epoch: {next(run.source for run in runs if not run.by_epoch)} does not count epochs")
    columns = min(len(keys), 2 if len(keys) in (2, 4) else 3)
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(max(6.4, 4.8 * columns), 3.6 * rows + (0.4 if title else 0.0)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    panels: list[Axes] = list(grid.flat)
    for key, panel in zip(keys, panels, strict=False):
        for number, run in enumerate(runs):
            _draw_line(panel, run, key, by_epoch, number, weight)
        _dress(panel, key, "epoch" if by_epoch else "iteration")
    for panel in panels[len(keys) :]:
        panel.remove()
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def _draw_line(panel: Axes, run: Run, key: str, by_epoch: bool, number: int, weight: float) -> None:
    x, y = run.series(key, by_epoch)
    colour, dash = COLOURS[number % len(COLOURS)], "--" if number >= len(COLOURS) else "-"
    marker = None if len(x) > MARKER_LIMIT or (run.is_training(key) and len(x) > 1) else "o"
    label = f"{run.name}  (last {y[-1]:.4g})"  # as logged, not as averaged
    if weight and run.is_training(key):
        panel.plot(x, y, color=colour, alpha=0.25, linewidth=1.0)
        y = smooth(y, weight)
    panel.plot(x, y, dash, color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=label)


def _dress(panel: Axes, key: str, axis: str) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_title(key, loc="left", fontsize=11)
    panel.set_xlabel(axis)
    panel.grid(color="#E4E4E4", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#888888")
    panel.tick_params(color="#888888")
    panel.tick_params(labelbottom=True)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    panel.set_xlim(left=0)
    panel.legend(frameon=False, fontsize=8.5)


def train_times(run: Run) -> list[tuple[str, int, float]]:
    """Mean seconds an iteration of each epoch: (epoch, logged lines, seconds); one line ``all`` without epochs."""
    groups: dict[str, list[float]] = {}
    for record in run.records:
        if record.is_train and "time" in record.values:
            groups.setdefault("all" if record.epoch is None else str(record.epoch), []).append(record.values["time"])
    if not groups:
        raise ValueError(f"{run.source} has no 'time' of training lines; MMEngine's IterTimerHook writes it")
    return [(epoch, len(times), float(np.mean(times))) for epoch, times in groups.items()]


def _runs(logs: Sequence[Path], names: Sequence[str] | None) -> list[Run]:
    if names is not None and len(names) != len(logs):
        raise ValueError(f"--legend gives {len(names)} names for {len(logs)} logs; give one a log, in their order")
    return [read_run(log, names[i] if names else None) for i, log in enumerate(logs)]


def _plot_command(args: argparse.Namespace) -> None:
    if not 0.0 <= args.smooth < 1.0:
        raise ValueError(f"--smooth takes a weight from 0 to below 1, got {args.smooth}")
    if args.out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--out must end in .png, .svg or .pdf, got {args.out}")
    runs = _runs(args.logs, args.legend)
    check_keys(runs, args.keys)
    plot_curves(runs, args.keys, args.out, args.title, args.x, args.smooth)
    print(f"wrote {args.out}")


def _time_command(args: argparse.Namespace) -> None:
    for run in _runs(args.logs, None):
        rows = train_times(run)
        print(f"{run.name}\n  {'epoch':>6}  {'log lines':>9}  {'s/iteration':>11}")
        for epoch, count, seconds in rows:
            print(f"  {epoch:>6}  {count:>9}  {seconds:>11.4f}")
        means = np.array([row[2] for row in rows])
        mean = np.average(means, weights=[row[1] for row in rows])
        print(f"  mean {mean:.4f} s/iteration", end="")
        if len(rows) > 1:
            slow, fast = rows[int(means.argmax())], rows[int(means.argmin())]
            print(f", slowest epoch {slow[0]} ({slow[2]:.4f}), fastest epoch {fast[0]} ({fast[2]:.4f})", end="")
            print(f", standard deviation over epochs {means.std():.4f}", end="")
        print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="analyze_logs.py", description="Plot and sum up the logs of trainings.")
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    logs = argparse.ArgumentParser(add_help=False)
    logs.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="a work_dir, or a .json file of its vis_data")

    plot = tasks.add_parser("plot_curve", parents=[logs], help="draw figures of one or more runs")
    plot.set_defaults(func=_plot_command)
    plot.add_argument("--keys", nargs="+", default=["loss"], metavar="KEY", help="what to plot: loss accuracy/top1 lr")
    plot.add_argument("--legend", nargs="+", metavar="NAME", help="a name for each log; by default that of its folder")
    plot.add_argument("--title", default="", help="above the panels")
    plot.add_argument("--x", choices=("auto", "iter", "epoch"), default="auto", help="the horizontal axis")
    plot.add_argument("--smooth", type=float, default=0.0, metavar="W", help="weight of a moving average, e.g. 0.9")
    plot.add_argument("--out", type=Path, default=Path("curves.png"), metavar="FILE", help=".png, .svg or .pdf")

    time = tasks.add_parser("cal_train_time", parents=[logs], help="seconds an iteration, epoch by epoch")
    time.set_defaults(func=_time_command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line of ``tools/analyze_logs.py``."""
    args = _parser().parse_args(argv)
    try:
        args.func(args)
    except (ValueError, OSError) as error:
        print(f"analyze_logs.py: {error}", file=sys.stderr)
        return 1
    return 0
