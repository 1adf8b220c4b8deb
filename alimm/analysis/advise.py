"""Advise on the classifier of very many classes: what each method costs, as a model and as measured here."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alimm.analysis.head_advice import advice, duration, human
from alimm.analysis.head_cost import METHODS, HeadShape, Rates, feasible, graph_share, head_cost, step_seconds

if TYPE_CHECKING:
    from alimm.analysis.head_probe import MeasuredStep

MEASURE_BYTES = 1 << 30
"""Memory that a measured step may take."""


def available_memory(device: str) -> float | None:
    """Bytes that are free on the device, None where there is none or the system does not say."""
    if device == "cuda":
        import torch

        return float(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``tools/advise.py``."""
    arguments = _parser().parse_args(argv)
    try:
        print(*_run(arguments), sep="\n")
    except (ValueError, OSError) as error:
        print(f"advise.py: {error}", file=sys.stderr)
        return 1
    return 0


def _run(arguments: argparse.Namespace) -> list[str]:
    device = arguments.device
    shape = HeadShape(
        arguments.classes,
        arguments.dim,
        arguments.batch,
        arguments.ranks,
        arguments.active,
        arguments.neighbours,
        arguments.samples_per_class,
        arguments.backbone_gflop,
        block=32768 if device == "cuda" else 2048,
    )
    if arguments.memory_gb is not None and not arguments.memory_gb > 0:
        raise ValueError(f"--memory-gb must be above 0, got {arguments.memory_gb:g}")
    memory = available_memory(device) if arguments.memory_gb is None else arguments.memory_gb * 1e9
    rates, small, measured = None, None, {}
    if arguments.measure:
        import torch

        from alimm.analysis.head_probe import machine_rates, measure_steps

        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device here; add --no-measure, or take --device cpu")
        small = feasible(shape, MEASURE_BYTES)
        rates = machine_rates(shape, torch.device(device))
        measured = measure_steps(small, torch.device(device))
    _show(shape, rates, small, measured)
    lines = advice(shape, memory, rates, device)
    if arguments.json is not None:
        document = to_dict(shape, memory, rates, small, measured)
        arguments.json.write_text(json.dumps({**document, "advice": lines}, indent=2) + "\n", encoding="utf-8")
    return lines


def to_dict(
    shape: HeadShape,
    memory: float | None,
    rates: Rates | None,
    small: HeadShape | None,
    measured: dict[str, MeasuredStep],
) -> dict[str, Any]:
    """All figures for JSON; seconds, bytes and FLOP."""

    def model(of: HeadShape) -> dict[str, Any]:
        table = {}
        for method in METHODS:
            cost = head_cost(of, method)
            seconds = None if rates is None else step_seconds(of, method, rates)
            table[method] = {**asdict(cost), "peak_bytes": cost.peak_bytes, "seconds": seconds}
        return table

    return {
        "shape": asdict(shape),
        "memory_bytes": memory,
        "rates": None if rates is None else asdict(rates),
        "model": model(shape),
        "graph": {
            "flop": shape.graph_flop,
            "of_full_epoch": graph_share(shape),
            "of_knn_epoch": graph_share(shape, "knn"),
        },
        "measured_at": None if small is None else asdict(small),
        "model_at_measured": None if small is None else model(small),
        "measured": {method: asdict(step) for method, step in measured.items()},
    }


def _show(shape: HeadShape, rates: Rates | None, small: HeadShape | None, measured: dict[str, MeasuredStep]) -> None:
    from alimm.report.benchmark import print_table

    rows = []
    for method in METHODS:
        cost = head_cost(shape, method)
        seconds = "-" if rates is None else duration(step_seconds(shape, method, rates))
        computed = min(shape.classes, shape.computed_rows(method) * shape.ranks)
        sizes = (cost.state_bytes, cost.logits_bytes, cost.peak_bytes, cost.message_bytes)
        rows.append((method, f"{computed:,}", f"{cost.flop / 1e9:,.4g}", *map(human, sizes), seconds))
    print_table(
        f"Model: {shape.classes:,} classes, {shape.dim} features, batch {shape.batch:,}, {shape.ranks} rank(s).\n"
        "GFLOP are of all ranks; memory, messages and time of one. Time is without sending and backbone.",
        ("method", "classes/step", "GFLOP/step", "state", "logits", "peak", "messages/step", "time/step"),
        rows,
    )
    if small is None or rates is None:
        return
    rows = []
    for method in METHODS:
        seconds_model, peak_model = step_seconds(small, method, rates), head_cost(small, method).peak_bytes
        step = measured.get(method)
        row = [method, duration(seconds_model), "-", "-", human(peak_model), "-", "-"]
        if step is not None:
            row[2], row[3] = duration(step.seconds), f"{seconds_model / step.seconds:.2f}"
            if step.peak_bytes:
                row[5], row[6] = human(step.peak_bytes), f"{peak_model / step.peak_bytes:.2f}"
        rows.append(tuple(row))
    print_table(
        f"Model beside a measured step: one rank, {small.classes:,} classes, batch {small.batch:,}.\n"
        "A step of knn is that of random, with a graph; it is modelled only.",
        ("method", "time, model", "measured", "model/measured", "peak, model", "measured", "model/measured"),
        rows,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="advise.py", description="What a classifier of very many classes costs, by method: model and measurement."
    )
    parser.add_argument("--classes", type=int, required=True, metavar="N", help="number of classes")
    parser.add_argument("--dim", type=int, required=True, metavar="D", help="dimension of the features")
    parser.add_argument("--batch", type=int, required=True, metavar="B", help="samples of a step over all ranks")
    parser.add_argument("--ranks", type=int, default=1, metavar="P", help="processes that the classes are cut over")
    parser.add_argument("--active", type=float, default=0.1, help="classes of a step: a share, or a number above 1")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what trains the head")
    parser.add_argument("--neighbours", type=int, default=16, metavar="K", help="length of the lists of KNN softmax")
    parser.add_argument("--samples-per-class", type=float, metavar="R", help="training samples of a class")
    parser.add_argument(
        "--backbone-gflop", type=float, metavar="G", help="GFLOP of the backbone a training sample, there and back"
    )
    parser.add_argument("--memory-gb", type=float, metavar="M", help="memory of a rank; what is free here by default")
    parser.add_argument(
        "--measure", action=argparse.BooleanOptionalAction, default=True, help="measure rates and real steps here"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures as JSON")
    return parser
