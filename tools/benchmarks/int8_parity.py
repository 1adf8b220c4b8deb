"""Accuracy of INT8 training against FP32 on EmojiProducts and Fashion-MNIST, seed by seed.

The arms of one seed share weights, data and their order. Beside INT8 as it comes run the paper's way (fidelity mode), a
negative control (one scale for every tensor, no clipping) and an injected fault, gradients of 3 bits: a benchmark that
does not see the fault could not have seen harm. The recipes are short versions of the configs of the same names.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import _int8_runs as runs
from mmengine.config import Config

from alimm.apis.config import load_config
from alimm.report.benchmark import Claim, Outcome, print_table

BOUND = 1.0
"""Points of top-1 accuracy that INT8 may differ from FP32, interval included."""
MIN_SEEDS = 5
"""Pairs that the claim of parity takes at least.

One pair differs by about a point by chance on the 1,594 test pictures of EmojiProducts, by 0.2 on the 10,000 of
Fashion-MNIST; so the first needs more of them for an interval that is short enough.
"""


def emoji_products(epochs: int | None) -> Config:
    """Pictures of 32 x 32, three quarters of the width, 12 epochs of the 36; of the augmentation the geometry alone."""
    assert epochs is not None
    config = load_config("alimm::emoji_products/resnet_tiny_style.py")
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.pipeline[0].size = 32
    config.train_dataloader.batch_size = 64
    del config.model.data_preprocessor.batch_augments[1:]  # colour and cut-outs take more epochs to pay
    config.model.backbone.width = 24
    config.model.neck.in_channels = 192
    for head in config.model.head.heads.values():
        if "in_channels" in head:
            head.in_channels = 192
    warmup, cosine = config.param_scheduler
    warmup.end = cosine.begin = max(1, epochs // 6) if epochs > 1 else 0
    cosine.end, cosine.T_max = epochs, epochs - warmup.end
    if not warmup.end:
        config.param_scheduler = [cosine]
    return _length(config, epochs)


def fashion_mnist(epochs: int | None) -> Config:
    """The stem halves the map, so that all 60,000 pictures are seen twice in half a minute."""
    assert epochs is not None
    config = load_config("alimm::fashion_mnist/resnet_tiny.py")
    config.model.backbone.stem_stride = 2
    config.param_scheduler[0].total_steps = epochs
    return _length(config, epochs)


def _length(config: Config, epochs: int) -> Config:
    config.train_cfg.max_epochs = config.train_cfg.val_interval = epochs
    return config


def quick(epochs: int | None) -> Config:
    """512 pictures of EmojiProducts, which need no download."""
    config = emoji_products(epochs)
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.indices = 512
    return config


RECIPES = {
    "emoji_products": runs.Recipe("emoji_products", emoji_products, 12, "accuracy/top1", seeds=16),
    "fashion_mnist": runs.Recipe("fashion_mnist", fashion_mnist, 2, "accuracy/top1", seeds=5),
}
QUICK = runs.Recipe("quick", quick, 1, "accuracy/top1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options to cut the benchmark short."""
    parser.add_argument("--datasets", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="NAME")
    parser.add_argument(
        "--side-seeds",
        type=int,
        default=MIN_SEEDS,
        metavar="N",
        help="of int8_paper, int8_tensor (default %(default)s)",
    )
    parser.add_argument("--fault-seeds", type=int, default=2, metavar="N", help="of int8_3bit (default %(default)s)")
    runs.add_arguments(parser, work_dir="work_dirs/benchmarks/int8_parity")


def run(arguments: argparse.Namespace) -> Outcome:
    """Train every arm from every seed, and judge."""
    arms = arguments.arms or list(runs.ARMS)
    recipes = [QUICK] if arguments.quick else [RECIPES[name] for name in arguments.datasets]
    seeds = {recipe.name: arguments.seeds or recipe.seeds for recipe in recipes}
    limits = dict(int8_paper=arguments.side_seeds, int8_tensor=arguments.side_seeds, int8_3bit=arguments.fault_seeds)
    todo = [
        runs.Run(recipe, arm, seed, arguments.epochs or recipe.epochs, arguments.threads)
        for seed in range(max(seeds.values()))
        for recipe in recipes
        for arm in arms
        if seed < min(seeds[recipe.name], limits.get(arm, seed + 1))
    ]
    rows = runs.train_all(todo, arguments.work_dir, arguments.jobs)
    names = [recipe.name for recipe in recipes]
    print_table(
        "Last epoch, mean over the seeds; differences are paired", runs.TABLE_HEADER, runs.table_rows(rows, names)
    )
    return Outcome(claims(rows, names), {"rows": rows})


def claims(rows: Sequence[runs.Row], recipes: Sequence[str]) -> list[Claim]:
    """For each recipe: INT8 is on a par, the control is no better, the fault is seen."""
    found = []
    for name in recipes:
        seeds = len(runs.differences(rows, name, "int8"))
        parity = runs.interval(rows, name, "int8")
        found.append(
            Claim(
                f"{name}, int8 less fp32",
                f"{parity} points, {seeds} seeds" if parity else "not measured",
                f"95 % interval inside +-{BOUND:g}, at least {MIN_SEEDS} seeds",
                parity is not None and seeds >= MIN_SEEDS and parity.within(BOUND),
            )
        )
        control = runs.interval(rows, name, "int8_tensor", base="int8")
        found.append(
            Claim(
                f"{name}, negative control less int8",
                f"{control} points" if control else "not measured",
                "not above 0 by more than chance",
                control is not None and control.low <= 0,
            )
        )
        fault = runs.interval(rows, name, "int8_3bit")
        found.append(
            Claim(
                f"{name}, gradients of 3 bits less fp32",
                f"{fault.mean:+.2f} points" if fault else "not measured",
                f"below -{BOUND:g}",
                fault is not None and fault.mean < -BOUND,
            )
        )
    return found
