"""Time and memory of a classifier's step: plain softmax, full, fused, random classes, KNN softmax; on the CPU.

A step is forward, backward (with the gradient of the features) and update with momentum and weight decay. All methods
run in turn in one process; a ratio is the median over the rounds, with its quartiles. The full softmax to beat is the
fastest of the three. Peak memory is measured in processes of their own, in rows of D float32 numbers a class, with
weights, momentum, graph and everything that a step holds. The curve over the number of classes has a fixed budget.
"""

from __future__ import annotations

import argparse
from typing import Any

import _head_steps as heads
import numpy as np
import torch

from alimm.report.benchmark import Claim, Outcome, print_table
from alimm.report.statistics import Ratio, interleave, ratio

SPEEDUP_BOUND, ROWS_BOUND, FLAT_BOUND = 5.0, 2.6, 1.5
ACTIVE = ("random", "knn")
NOISE = 0.03
"""What two runs of one method differ by here."""
FULL = (heads.PLAIN, "full", "fused")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--classes", type=int, default=1_000_000, help="N of the comparison")
    parser.add_argument("--dim", type=int, default=128, help="D")
    parser.add_argument("--batch", type=int, default=256, help="samples of a step")
    parser.add_argument("--active", type=float, default=0.1, help="share of the classes that are active")
    parser.add_argument("--neighbours", type=int, default=16, help="K of the graph")
    parser.add_argument("--curve", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 4_000_000])
    parser.add_argument("--curve-active", type=int, default=10_000, help="active classes along the curve")
    parser.add_argument("--repeats", type=int, default=7, help="rounds that count")
    parser.add_argument("--threads", type=int, default=2)


def run(arguments: argparse.Namespace) -> Outcome:
    """Compare the methods at one size, then follow the active-set methods over the number of classes."""
    if arguments.quick:
        arguments.classes, arguments.repeats = 20_000, 2
        arguments.curve, arguments.curve_active = [5_000, 20_000], 2_000
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    heads.keep_memory()
    data: dict[str, Any] = {}
    claims = _compare(arguments, data)
    claims += _curve(arguments, data)
    return Outcome(claims, data)


def _span(found: Ratio) -> str:
    return f"{found.median:.2f} ({found.q1:.2f} to {found.q3:.2f})"


def _compare(given: argparse.Namespace, data: dict[str, Any]) -> list[Claim]:
    shape = (given.classes, given.dim, given.batch, given.active, given.neighbours)
    steps = {method: heads.stepper(method, *shape) for method in heads.METHODS}
    times = interleave(steps, given.repeats, 2)
    # Side by side and in both orders: which method comes after a large one must not decide.
    pair = [interleave({arm: steps[arm] for arm in order}, given.repeats, 1) for order in (ACTIVE, ACTIVE[::-1])]
    side = {arm: [*pair[0][arm], *pair[1][arm]] for arm in ACTIVE}
    steps.clear()
    heads.give_back()
    row = 4 * given.dim * given.classes
    peaks = {method: heads.peak_bytes(method, *shape, given.threads) for method in heads.METHODS}
    table = []
    for method, taken in times.items():
        gain = ratio(times[heads.PLAIN], taken)
        milliseconds = 1e3 * float(np.median(taken))
        table.append(
            [method, f"{milliseconds:.0f}", _span(gain), f"{peaks[method] / 1e6:.0f}", f"{peaks[method] / row:.2f}"]
        )
        data[method] = dict(seconds=taken, peak_bytes=peaks[method], rows=peaks[method] / row)
    title = (
        f"N = {given.classes:,}, D = {given.dim}, batch {given.batch}, {given.active:.0%} active, K = "
        f"{given.neighbours}, {given.threads} threads"
    )
    print_table(title, ["method", "ms a step", "times plain torch", "peak MB", "rows a class"], table)
    best = min(FULL, key=lambda method: float(np.median(times[method])))
    gain, against = ratio(times[best], times["knn"]), ratio(side["random"], side["knn"])
    rows = peaks["knn"] / row
    return [
        Claim(f"knn, without building the graph, against the fastest full softmax ({best})", f"{_span(gain)}x",
              f"at least {SPEEDUP_BOUND:g}x", gain.median >= SPEEDUP_BOUND),
        Claim("time of random over time of knn", _span(against), f"at least 1, less {NOISE:.0%} of noise",
              against.median >= 1 - NOISE),
        Claim("peak memory of knn", f"{rows:.2f} float32 rows a class", f"at most {ROWS_BOUND:g}", rows <= ROWS_BOUND),
    ]  # fmt: skip


def _curve(given: argparse.Namespace, data: dict[str, Any]) -> list[Claim]:
    """Cost of a step with a fixed number of active classes, as N grows."""
    table, medians, memory = [], {}, {}
    for classes in given.curve:
        shape = (classes, given.dim, given.batch, min(given.curve_active, classes), given.neighbours)
        steps = {method: heads.stepper(method, *shape) for method in ("random", "knn")}
        times = interleave(steps, 2 * given.repeats, 3)
        steps.clear()
        heads.give_back()
        memory[classes] = heads.peak_bytes("knn", *shape, given.threads)
        medians[classes] = {method: float(np.median(taken)) for method, taken in times.items()}
        table.append(
            [
                f"{classes:,}",
                *(f"{1e3 * medians[classes][method]:.1f}" for method in times),
                f"{memory[classes] / 1e6:.0f}",
                f"{memory[classes] / (4 * given.dim * classes):.2f}",
            ]
        )
    print_table(
        f"{given.curve_active:,} active classes whatever N",
        ["classes", "random, ms a step", "knn, ms a step", "knn, peak MB", "rows a class"],
        table,
    )
    sizes = sorted(given.curve)
    slope = (memory[sizes[-1]] - memory[sizes[0]]) / (sizes[-1] - sizes[0])
    growth = medians[sizes[-1]]["knn"] / medians[sizes[0]]["knn"]
    print(f"memory: {slope:.0f} bytes a class, {slope / (4 * given.dim):.2f} float32 rows")
    data["curve"] = dict(seconds=medians, peak_bytes=memory, bytes_per_class=slope)
    return [
        Claim(
            f"a step at N = {sizes[-1]:,} over one at N = {sizes[0]:,}, same active classes",
            f"{growth:.2f}x",
            f"at most {FLAT_BOUND:g}x",
            growth <= FLAT_BOUND,
        )
    ]
