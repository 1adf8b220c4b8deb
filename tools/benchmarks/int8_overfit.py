"""Detectors and video recognisers in INT8 against FP32: can they learn a small training set by heart as well?

The configs are those of configs/int8_training on EmojiCoco (RetinaNet, Faster R-CNN; mAP at an IoU of 0.5) and
EmojiClips (TSN, R(2+1)D; top-1 accuracy). Scores are on the training pictures, on purpose: a gradient that leads
astray shows at once, and a run takes minutes. Nothing here says how well a model generalises; int8_parity does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import _int8_runs as runs
from mmengine.config import Config

from alimm.apis.config import load_config
from alimm.paths import data_root, resource_root
from alimm.report.benchmark import Claim, Outcome, print_table

BOUND = 1.0
"""Points that the mean of INT8 may lie below that of FP32."""
SETS = {
    "emoji_coco": ("coco/bbox_mAP_50", "train.json", "prepare_emoji_coco.py"),
    "emoji_clips": ("acc/top1", "train_motion.txt", "prepare_emoji_clips.py"),
}
"""Data set -> metric (a share of 1), a file that is there once the data is, the script that makes it."""


def configs() -> dict[str, Path]:
    """Name -> config, of all that train on one of ``SETS``."""
    folder = resource_root() / "configs" / "int8_training"
    return {path.stem: path for name in SETS for path in sorted(folder.glob(f"*_{name}.py"))}


def data_set(name: str) -> str:
    """Which of ``SETS`` a config trains on."""
    return next(key for key in SETS if name.endswith(key))


def make(path: Path, epochs: int | None) -> Config:
    """The config, of another length where one is given."""
    config = load_config(path)
    if epochs is not None:
        config.train_cfg.max_epochs = epochs
        for scheduler in config.param_scheduler:
            if "T_max" in scheduler:
                scheduler.T_max = epochs
    return config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options to cut the benchmark short."""
    names = list(configs())
    parser.add_argument("--configs", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    runs.add_arguments(parser, work_dir="work_dirs/benchmarks/int8_overfit")


def run(arguments: argparse.Namespace) -> Outcome:
    """Train every config in FP32 and INT8, and judge."""
    found = configs()
    names: list[str] = arguments.configs
    for key in {data_set(name): None for name in names}:
        _, file, script = SETS[key]
        if not (data_root() / key / file).is_file():
            raise FileNotFoundError(
                f"{data_root() / key} holds no {file}. Make the data with: "
                f"python {resource_root() / 'tools' / 'data' / script}"
            )
    epochs = arguments.epochs or (1 if arguments.quick else None)
    if arguments.quick:
        names = names[-1:]
    recipes = [runs.Recipe(name, partial(make, found[name]), None, SETS[data_set(name)][0], 100.0) for name in names]
    todo = [
        runs.Run(recipe, arm, seed, epochs, arguments.threads)
        for seed in range(arguments.seeds or 1)
        for recipe in recipes
        for arm in arguments.arms or ("fp32", "int8")
    ]
    rows = runs.train_all(todo, arguments.work_dir, arguments.jobs)
    print_table("Last epoch, on the training set", runs.TABLE_HEADER, runs.table_rows(rows, names))
    expected = {name: 100 * load_config(found[name]).expected[SETS[data_set(name)][0]] for name in names}
    return Outcome(claims(rows, expected), {"rows": rows})


def claims(rows: Sequence[runs.Row], expected: dict[str, float]) -> list[Claim]:
    """For each config: INT8 is not below FP32, and FP32 has learnt, else that would mean little.

    Args:
        rows: of all runs.
        expected: config -> score in percent that FP32 has to reach.
    """
    found = []
    for name, least in expected.items():
        base = [row["score"] for row in runs.select(rows, name, "fp32").values()]
        values = runs.differences(rows, name, "int8")
        mean = sum(values) / len(values) if values else float("nan")
        learnt = bool(base) and min(base) >= least
        found.append(
            Claim(
                f"{name}, int8 less fp32",
                f"{mean:+.2f} points, fp32 {min(base):.2f} % at worst" if values else "not measured",
                f"at least -{BOUND:g}, with fp32 at {least:g} % or above",
                bool(values) and learnt and mean >= -BOUND,
            )
        )
    return found
