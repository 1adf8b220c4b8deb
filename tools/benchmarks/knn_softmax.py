"""KNN softmax: softmax mass that the active classes hold, accuracy against full and random softmax, graph build.

Coverage: a two-level hierarchy of classes with noisy features; the share of the non-target softmax mass that 12 % of
the classes hold, chosen by the graph and at random. Accuracy: 20,000 Han characters from the training fonts, tested on
a font that no method saw; all methods of a seed share weights, pictures, order, steps and the number of active classes.
Graph: exact neighbours of 200,000 rows against faiss's IndexFlatIP on the same threads.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import _head_runs as runs
import _head_steps as heads
import _knn_graph as graph
import torch
import torch.nn.functional as F

from alimm.projects.knn_softmax.head import KNNSoftmaxHead
from alimm.report.benchmark import Claim, Outcome, print_table
from alimm.structures import ClsDataSample

COVERAGE_BOUND, PARITY_BOUND, MIN_SEEDS = 3.0, 0.5, 3
NOISE = 1.0
"""Length of the noise on a feature; the plain softmax then names the right class of about 95 %."""
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "knn": ("knn", {}),
    "random": ("random", {"model.head.logq": False}),
    "random, logQ": ("random", {"model.head.logq": True}),
}
"""Arm -> method and changes to the config; ``random`` is the rule of Partial FC, without a correction."""
PARTS = ("coverage", "accuracy", "graph")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--config", default="alimm::knn_softmax/glyphs_20k.py", help="of the accuracy part")
    parser.add_argument("--seeds", type=int, default=MIN_SEEDS)
    parser.add_argument("--active", type=float, default=0.12, help="share of active classes in the accuracy part")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--threads", type=int, default=2, help="of the other parts")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("work_dirs/benchmarks/knn_softmax"),
        help="finished runs are kept in rows.json there and not repeated; delete it when the code has changed",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Run the parts that are asked for; ``--quick`` leaves out the training."""
    torch.set_num_threads(arguments.threads)
    claims: list[Claim] = []
    data: dict[str, Any] = {}
    if "coverage" in arguments.parts:
        claims += coverage(arguments.quick, data)
    if "accuracy" in arguments.parts and not arguments.quick:
        claims += accuracy(arguments, data)
    if "graph" in arguments.parts:
        heads.keep_memory()
        claims += graph.measure(arguments.quick, 0)
    return Outcome(claims, data)


def hierarchy(coarse: int, fine: int, dim: int, seed: int) -> torch.Tensor:
    """Centres of coarse * fine classes, of length one, (N, dim); the classes of a coarse class are near each other."""
    generator = torch.Generator().manual_seed(seed)
    top = F.normalize(torch.randn(coarse, dim, generator=generator)).repeat_interleave(fine, 0)
    return F.normalize(top + 0.6 * F.normalize(torch.randn(coarse * fine, dim, generator=generator)))


def coverage(quick: bool, data: dict[str, Any]) -> list[Claim]:
    """Share of the non-target softmax mass on 12 % of the classes."""
    coarse, fine, dim, size = (40, 50, 64, 64) if quick else (400, 50, 64, 256)
    weight = hierarchy(coarse, fine, dim, 0)
    classes, batches = len(weight), 2 if quick else 8
    generator = torch.Generator().manual_seed(1)
    labels = [torch.randint(classes, (size,), generator=generator) for _ in range(batches)]
    noise = [NOISE * F.normalize(torch.randn(size, dim, generator=generator)) for _ in range(batches)]
    rows, found = [], {}
    for scale in (64.0, 32.0, 16.0):
        for method, k in (("random", 0), ("knn", 10), ("knn", 50)):
            head = KNNSoftmaxHead(
                classes, dim, method, neighbours=max(k, 1), active=0.12, scale=scale, permute="none",
                coverage_interval=1, coverage_samples=size,
            )  # fmt: skip
            with torch.no_grad():
                head.weight.copy_(weight)
            if method == "knn":
                head.build_graph()
            shares, right = [], []
            for label, shift in zip(labels, noise, strict=True):
                features = weight[label] + shift
                samples = [ClsDataSample().set_gt_label(int(one)) for one in label]
                shares.append(float(head.loss(features, samples)["coverage"]))
                right.append(float(((features @ weight.T).argmax(1) == label).float().mean()))
            found[method, k, scale] = sum(shares) / batches
            rows.append([
                f"s = {scale:g}, {method}" + (f", K = {k}" if k else ""),
                f"{100 * sum(right) / batches:.1f}", f"{100 * found[method, k, scale]:.1f}",
                f"{found[method, k, scale] / found['random', 0, scale]:.2f}",
            ])  # fmt: skip
    title = f"{classes:,} classes ({coarse} x {fine}), D = {dim}, batch {size}, 12 % active"
    print_table(title, ["", "top-1 of the features, %", "coverage, %", "times random"], rows)
    data["coverage"] = [dict(zip(("case", "accuracy", "coverage", "times"), row, strict=True)) for row in rows]
    gain = found["knn", 10, 64.0] / found["random", 0, 64.0]
    return [
        Claim(
            "coverage of the non-target softmax mass over random's (s = 64, K = 10)",
            f"{gain:.2f}x ({100 * found['knn', 10, 64.0]:.1f} % against {100 * found['random', 0, 64.0]:.1f} %)",
            f"at least {COVERAGE_BOUND:g}x",
            gain >= COVERAGE_BOUND,
        )
    ]


def accuracy(given: argparse.Namespace, data: dict[str, Any]) -> list[Claim]:
    """Top-1 on the unseen font by method."""
    common = {"model.head.active": given.active, "model.head.coverage_interval": 100}
    todo = [
        runs.HeadRun(given.config, arm, method, seed, tuple({**common, **changes}.items()))
        for seed in range(given.seeds)
        for arm, (method, changes) in ARMS.items()
    ]
    rows = runs.train_all(todo, given.work_dir, given.jobs)
    data["accuracy"] = rows
    return judge(rows, given.active)


def judge(rows: list[runs.Row], active: float) -> list[Claim]:
    """Print the table, and what the rows say: knn within half a point of full, and above random."""
    table = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        scores = [row["score"] for row in mine]
        shares = [row["coverage"] for row in mine if "coverage" in row]
        to_full = "" if arm == "full" else str(runs.interval(rows, arm, "full"))
        table.append([
            arm, "  ".join(f"{score:.2f}" for score in scores), f"{sum(scores) / len(scores):.2f}", to_full,
            f"{100 * sum(shares) / len(shares):.1f}" if shares else "",
            f"{sum(row['seconds'] for row in mine) / len(mine):.0f}",
        ])  # fmt: skip
    print_table(
        f"Top-1 on the unseen font in %, {active:.0%} of the classes active, {rows[0]['steps']} steps",
        ["arm", "by seed", "mean", "to full, points, 95 %", "coverage, %", "s a run"],
        table,
    )
    to_full, to_random = runs.interval(rows, "knn", "full"), runs.interval(rows, "knn", "random")
    seeds = len({row["seed"] for row in rows})
    assert to_full is not None
    assert to_random is not None
    return [
        Claim(
            "knn less full softmax, top-1 on the unseen font",
            f"{to_full} points, {seeds} seeds",
            f"mean above -{PARITY_BOUND:g}, at least {MIN_SEEDS} seeds",
            to_full.mean > -PARITY_BOUND and seeds >= MIN_SEEDS,
        ),
        Claim(
            "knn less random, top-1 on the unseen font",
            f"{to_random} points, {seeds} seeds",
            f"mean above 0, at least {MIN_SEEDS} seeds",
            to_random.mean > 0 and seeds >= MIN_SEEDS,
        ),
    ]
