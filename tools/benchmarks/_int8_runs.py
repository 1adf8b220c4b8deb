"""Training the same recipe in FP32 and INT8: arms, one run, many runs with a cache, paired differences.

Two arms of one seed are a pair only if they start from the same weights and see the same pictures in the same order;
every run records a checksum of both, and `pairs` refuses rows that differ. An INT8 arm in which no layer was converted
would compare FP32 with itself; such a run is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import multiprocessing
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from alimm.apis.train import check_work_dir, train
from alimm.registry import HOOKS
from alimm.report.statistics import Interval, paired_interval

Row = dict[str, Any]

# Nothing may depend on timing (planner) or leave INT8 on the way (min_cosine): an arm is what its name says.
_FIXED: dict[str, Any] = dict(planner=False, min_cosine=-1.0)
ARMS: dict[str, dict[str, Any] | None] = {
    "fp32": None,
    "int8": {},
    "int8_paper": dict(clip="paper", grad_input="global", grad_weight="channel"),
    "int8_tensor": dict(clip="max", grad_input="global", grad_weight="tensor"),
    "int8_3bit": dict(grad_bits=3),
}
"""Arm -> options of Int8TrainingHook; ``int8_tensor`` is the negative control, ``int8_3bit`` an injected fault."""


@dataclass(frozen=True)
class Recipe:
    """What is trained.

    Attributes:
        name: shown in the tables.
        make: epochs -> config. A function at the top level of a module, since worker processes look it up there.
        epochs: how many by default; None leaves the config's length as it is and passes None.
        metric: name of the score in the log, without ``val/``.
        scale: factor to percent.
        seeds: how many runs of each arm by default.
    """

    name: str
    make: Callable[[int | None], Config]
    epochs: int | None
    metric: str
    scale: float = 1.0
    seeds: int = 1


@dataclass(frozen=True)
class Run:
    """One training."""

    recipe: Recipe
    arm: str
    seed: int
    epochs: int | None
    threads: int

    @property
    def key(self) -> str:
        """All that the result depends on, but for the code."""
        return json.dumps([self.recipe.name, self.epochs, ARMS[self.arm], self.seed, self.threads])


@HOOKS.register_module(name="BenchmarkWatchHook", force=True)
class WatchHook(Hook):
    """Checksums of the first weights and of all pictures, and how many layers run in INT8."""

    priority = "VERY_LOW"

    def __init__(self) -> None:
        self.weights = self.data = self.layers = 0

    def before_train(self, runner: Runner) -> None:
        """Take the checksum of the weights."""
        for value in runner.model.parameters():
            self.weights = zlib.crc32(value.detach().contiguous().numpy().tobytes(), self.weights)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Add the batch to the checksum of the data; count the layers once."""
        for value in data_batch["inputs"]:
            self.data = zlib.crc32(value.contiguous().numpy().tobytes(), self.data)
        if runner.iter == 0:
            self.layers = sum(
                any(".int8_training." in kind.__module__ for kind in type(module).__mro__)
                for module in runner.model.modules()
            )


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def add_arguments(parser: argparse.ArgumentParser, work_dir: str) -> None:
    """The options that the benchmarks of training share."""
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds 0 to N-1, instead of the recipe's number")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="ARM", help=f"some of {', '.join(ARMS)}")
    parser.add_argument("--epochs", type=positive, help="train for so many epochs instead of the recipe's")
    parser.add_argument("--threads", type=positive, default=1, help="threads of each run (default %(default)s)")
    parser.add_argument(
        "--jobs", type=positive, default=os.cpu_count() or 1, help="runs at a time (default: the cores, %(default)s)"
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path(work_dir),
        help="finished runs are kept in rows.json there and not repeated; delete it when the code has changed",
    )


def make_config(run: Run) -> Config:
    """The config of a run: the recipe's, with the hook of the arm in place of any other."""
    config = run.recipe.make(run.epochs)
    hooks = [hook for hook in config.get("custom_hooks") or [] if "Int8TrainingHook" not in str(hook["type"])]
    options = ARMS[run.arm]
    if options is not None:
        importlib.import_module("alimm.projects.int8_training")  # FP32 must not need it
        hooks.append(dict(type="alimm.Int8TrainingHook", **_FIXED, **options))
    config.custom_hooks = [*hooks, dict(type="alimm.BenchmarkWatchHook")]
    config.default_hooks.checkpoint = None
    # A worker process was spawned; MMEngine warns where its config says otherwise.
    config.env_cfg.mp_cfg.mp_start_method = multiprocessing.get_start_method()
    config.log_level = "ERROR"
    return config


def train_once(run: Run, work_dir: Path) -> Row:
    """Train and return a row: score in percent, training loss, checksums, INT8 layers, seconds.

    A run whose scores turn NaN has diverged and scores 0.
    """
    torch.set_num_threads(run.threads)
    numba.set_num_threads(min(run.threads, numba.config.NUMBA_NUM_THREADS))
    folder = work_dir / "runs" / f"{run.recipe.name}_{run.arm}_{run.seed}"
    config = make_config(run)
    start = time.perf_counter()
    row: Row = dict(recipe=run.recipe.name, arm=run.arm, seed=run.seed, epochs=run.epochs, threads=run.threads)
    try:
        # COCO's evaluation prints a page a time.
        with contextlib.redirect_stdout(io.StringIO()):
            runner = train(config, work_dir=folder, seed=run.seed, device="cpu")
    except ValueError as error:
        if "NaN" not in str(error) or ARMS[run.arm] is None:
            raise
        return row | dict(score=0.0, loss=math.nan, weights=None, data=None, layers=None, seconds=_since(start))
    watch = next(hook for hook in runner.hooks if isinstance(hook, WatchHook))
    if (ARMS[run.arm] is not None) != (watch.layers > 0):
        raise RuntimeError(f"{run.arm} on {run.recipe.name} ran with {watch.layers} INT8 layers")
    scalars = runner.message_hub
    return row | dict(
        score=run.recipe.scale * float(scalars.get_scalar(f"val/{run.recipe.metric}").current()),
        loss=float(scalars.get_scalar("train/loss").mean(20)),
        weights=watch.weights,
        data=watch.data,
        layers=watch.layers,
        seconds=_since(start),
    )


def train_all(runs: Sequence[Run], work_dir: Path, jobs: int) -> list[Row]:
    """The rows of all runs, in their order; each is printed and kept in ``rows.json`` as soon as it is there."""
    check_work_dir(str(work_dir))
    store = work_dir / "rows.json"
    kept: dict[str, Row] = json.loads(store.read_text()) if store.is_file() else {}
    todo = [run for run in runs if run.key not in kept]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are in {store}")
    for run, row in _finished(todo, work_dir, jobs):
        kept[run.key] = row
        temporary = store.with_suffix(".tmp")
        temporary.write_text(json.dumps(kept, indent=1))
        os.replace(temporary, store)
        print(
            f"{run.recipe.name:<24} {run.arm:<12} seed {run.seed:<3} {row['score']:6.2f} %  "
            f"train loss {row['loss']:.4f}  {row['layers']} INT8 layers  {row['seconds']:.0f} s",
            flush=True,
        )
    # The name of the arm is no part of the key: two names may stand for the same options.
    return [kept[run.key] | {"arm": run.arm} for run in runs]


def _finished(runs: Sequence[Run], work_dir: Path, jobs: int) -> Iterator[tuple[Run, Row]]:
    if jobs <= 1 or len(runs) < 2:
        for run in runs:
            yield run, train_once(run, work_dir)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(train_once, run, work_dir): run for run in runs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 1)


def select(rows: Sequence[Row], recipe: str, arm: str) -> dict[int, Row]:
    """Seed -> row of one recipe and arm."""
    return {row["seed"]: row for row in rows if row["recipe"] == recipe and row["arm"] == arm}


def differences(rows: Sequence[Row], recipe: str, arm: str, base: str = "fp32") -> list[float]:
    """Score of an arm less that of the base in percentage points, for each seed that both have.

    Raises:
        RuntimeError: two rows of one seed did not start alike or did not see the same data.
    """
    ours, theirs = select(rows, recipe, arm), select(rows, recipe, base)
    result = []
    for seed in sorted(ours.keys() & theirs.keys()):
        for what in ("weights", "data"):
            left, right = ours[seed][what], theirs[seed][what]
            if None not in (left, right) and left != right:
                raise RuntimeError(f"{arm} and {base} on {recipe}, seed {seed}, are no pair: their {what} differ")
        result.append(ours[seed]["score"] - theirs[seed]["score"])
    return result


def interval(rows: Sequence[Row], recipe: str, arm: str, base: str = "fp32") -> Interval | None:
    """95 % interval of the paired differences; None where there is no pair."""
    values = differences(rows, recipe, arm, base)
    return paired_interval(values) if values else None


def table_rows(rows: Sequence[Row], recipes: Sequence[str]) -> list[list[str]]:
    """Cells for ``print_table``: recipe, arm, seeds, score, difference to FP32, training loss."""
    cells = []
    for recipe in recipes:
        for arm in ARMS:
            found = list(select(rows, recipe, arm).values())
            if not found:
                continue
            score, loss = (sum(row[key] for row in found) / len(found) for key in ("score", "loss"))
            difference = "" if arm == "fp32" else str(interval(rows, recipe, arm) or "")
            cells.append([recipe, arm, str(len(found)), f"{score:.2f}", difference, f"{loss:.4f}"])
    return cells


TABLE_HEADER = ("recipe", "arm", "seeds", "score in %", "to FP32, points, 95 %", "train loss")
