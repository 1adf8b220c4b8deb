"""DCAA against its baselines on synthetic weather and on composites: mIoU by condition, memory, seconds a step.

Every arm trains the same encoder and kind of decoder (DCAA has one a condition) for the same number of steps on the
same pictures, from several seeds; the last checkpoint is judged, on pictures of their own. Differences are paired by
seed, with 95 % intervals. The oracle trains on the target's labels. "styled mean teacher" is colour matching and mean
teacher together, the strongest recipe here without a discriminator. The gallery is written to the work dir.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import _dcaa_cost as cost
import _dcaa_gallery as gallery
import _dcaa_runs as runs

from alimm.report.benchmark import Claim, Outcome, print_table

PARTS = ("accuracy", "ablations", "memory", "time", "gallery")
UPLIFT = 20.0
"""Points of mIoU, mean of the adverse conditions, that DCAA gains over the source alone."""
RIVALS = ("colour_matching", "adabn", "adaptsegnet", "mean_teacher")
MIN_SEEDS = 5
MEMORY = 0.6
ITERS = {"synthetic": 1000, "composites": 1000}
COMPOSITE_ARMS = ("source_only", "colour_matching", "mean_teacher", "styled mean teacher", "dcaa", "oracle")
SIZES = [(64, 128), (256, 512)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, and how much of it."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--data", nargs="+", choices=list(ITERS), default=["synthetic"], help="data sets")
    parser.add_argument("--seeds", type=int, default=MIN_SEEDS, metavar="N", help="seeds 0 to N-1")
    parser.add_argument("--ablation-seeds", type=int, default=3, metavar="N")
    known = [*runs.ARMS, *runs.ABLATIONS]
    parser.add_argument(
        "--arms", nargs="+", choices=known, metavar="ARM", help=f"some of: {'; '.join(known).replace('%', '%%')}"
    )
    parser.add_argument("--iters", type=int, metavar="N", help="steps of every arm, instead of the config's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("work_dirs/benchmarks/dcaa"),
        help="finished runs are kept in rows.json there and not repeated; delete it when the code has changed",
    )


def run(arguments: argparse.Namespace) -> Outcome:
    """Train and measure, print every row, and judge."""
    quick = arguments.quick
    seeds, short = (2, 1) if quick else (arguments.seeds, arguments.ablation_seeds)
    todo = []
    if "accuracy" in arguments.parts:
        for name in arguments.data:
            arms = list(runs.ARMS) if name == "synthetic" else list(COMPOSITE_ARMS)
            arms = [arm for arm in arms if arm in (arguments.arms or arms)]
            arms = ("source_only", "dcaa") if quick else arms
            todo += [(arm, name, seed) for seed in range(seeds) for arm in arms]
    if "ablations" in arguments.parts and not quick and "synthetic" in arguments.data:
        arms = [arm for arm in runs.ABLATIONS if arm in (arguments.arms or runs.ABLATIONS)]
        todo += [(arm, "synthetic", seed) for seed in range(short) for arm in arms]
    work_dir = arguments.work_dir / "quick" if quick else arguments.work_dir
    planned = [runs.Run(arm, name, seed, 4 if quick else arguments.iters or ITERS[name]) for arm, name, seed in todo]
    rows = runs.train_all(planned, work_dir, arguments.jobs, tiny=quick)
    claims = []
    for name in dict.fromkeys(row["data"] for row in rows):
        scores = list(next(row for row in rows if row["data"] == name)["scores"])
        header = ("arm", "seeds", *scores, "adverse to source only", "dcaa less this", "1000 weights", "s")
        print_table(f"{name}: mIoU in %, means over the seeds; differences with 95 % intervals", header,
                    runs.table_rows(rows, name))  # fmt: skip
    if "accuracy" in arguments.parts and "synthetic" in arguments.data:
        claims += accuracy_claims(rows)
    data = {"rows": rows}
    if "memory" in arguments.parts:
        data["memory"] = memory = cost.memory_rows((64, 64) if quick else (256, 512))
        print_table(
            "Peak memory of a step over the built model, K = 3, batch 2 + 2, one thread",
            ("stage", "picture", "compat, MB", "memory mode, MB", "ratio"),
            [[r["stage"], f"{r['size'][0]} x {r['size'][1]}", f"{r['compat']:.0f}", f"{r['memory']:.0f}",
              f"{r['ratio']:.2f}"] for r in memory],
        )  # fmt: skip
        claims += memory_claims(memory)
    if "time" in arguments.parts:
        data["time"] = times = cost.time_rows(SIZES[:1] if quick else SIZES, [1, 2, 3, 4], 1 if quick else 5)
        print_table(
            "Seconds a step, memory mode, batch 2 + 2",
            ("picture", "stage", "K = 1", "2", "3", "4"),
            [[f"{size[0]} x {size[1]}", stage, *(f"{r['seconds']:.3f}" for r in times
              if r["size"] == size and r["stage"] == stage)] for size in SIZES for stage in cost.STAGES
             if any(r["size"] == size for r in times)],
        )  # fmt: skip
    if "gallery" in arguments.parts and "accuracy" in arguments.parts and "synthetic" in arguments.data:
        arms = [arm for arm in (arguments.arms or gallery.SHOWN) if not quick or arm in ("source_only", "dcaa")]
        for path in gallery.write(work_dir, arms, planned[0].iters, tiny=quick):
            print(f"wrote {path}")
    return Outcome(claims or [Claim("nothing", "not measured", "choose parts that are judged", False)], data)


def accuracy_claims(rows: Sequence[runs.Row]) -> list[Claim]:
    """Above the source alone by the uplift, above the best rival, and best in its worst condition."""
    found = []
    seeds = len(runs.values(rows, "synthetic", "dcaa", "adverse"))
    gain = runs.difference(rows, "synthetic", "dcaa", "source_only", "adverse")
    found.append(
        Claim(
            "adverse mean, dcaa less source only",
            f"{gain} points, {seeds} seeds" if gain else "not measured",
            f"at least {UPLIFT:g}, at least {MIN_SEEDS} seeds",
            gain is not None and seeds >= MIN_SEEDS and gain.mean >= UPLIFT,
        )
    )
    for subject, score, rivals, bound in (
        ("adverse mean", "adverse", RIVALS, "interval above 0"),
        ("worst condition", "worst", tuple(runs.BASELINES), "above 0"),
    ):
        means = {arm: runs.values(rows, "synthetic", arm, score) for arm in rivals}
        complete = all(len(by_seed) >= MIN_SEEDS for by_seed in means.values())
        known = {arm: sum(by_seed.values()) / len(by_seed) for arm, by_seed in means.items() if by_seed}
        best = max(known, key=lambda arm: known[arm]) if known else None
        lead = runs.difference(rows, "synthetic", "dcaa", best, score) if best else None
        found.append(
            Claim(
                f"{subject}, dcaa less the best of {len(rivals)} baselines ({best})",
                f"{lead} points" if lead else "not measured",
                f"{bound}, every baseline measured",
                lead is not None and complete and (lead.low if bound.startswith("interval") else lead.mean) > 0,
            )
        )
    return found


def memory_claims(rows: Sequence[runs.Row]) -> list[Claim]:
    """The memory mode needs at most so much of the released code's way."""
    return [
        Claim(
            f"peak memory in stage {row['stage']}, memory mode over compat mode",
            f"{row['ratio']:.2f}",
            f"at most {MEMORY:g}",
            row["ratio"] <= MEMORY,
        )
        for row in rows
    ]
