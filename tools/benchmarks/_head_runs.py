"""Training one config with several methods of the head, seed by seed; finished runs are kept.

All arms of a seed have the same first weights, pictures and order; every run records a checksum of both, and a pair
that differs is refused.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from alimm.apis.config import load_config
from alimm.apis.train import check_work_dir, train
from alimm.registry import HOOKS
from alimm.report.statistics import Interval, paired_interval

Row = dict[str, Any]


@dataclass(frozen=True)
class HeadRun:
    """One training: a config, an arm (its name, and the method of its head), other changes, a seed."""

    config: str
    arm: str
    method: str
    seed: int
    changes: tuple[tuple[str, Any], ...] = ()
    threads: int = 1

    @property
    def key(self) -> str:
        """All that the result depends on, but for the code."""
        return json.dumps([self.config, self.method, self.seed, sorted(self.changes), self.threads])


@HOOKS.register_module(name="HeadRunWatchHook", force=True)
class HeadRunWatchHook(Hook):
    """Checksums of the first weights and of all pictures, and the mean of what the head logs."""

    priority = "VERY_LOW"

    def __init__(self) -> None:
        self.weights = self.data = 0
        self.logged: dict[str, list[float]] = {}

    def before_train(self, runner: Runner) -> None:
        """Take the checksum of the weights."""
        for value in runner.model.parameters():
            self.weights = zlib.crc32(value.detach().contiguous().numpy().tobytes(), self.weights)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Add the batch to the checksum of the data."""
        for value in data_batch["inputs"]:
            self.data = zlib.crc32(value.contiguous().numpy().tobytes(), self.data)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Keep coverage and counts."""
        for name in ("coverage", "active", "active_random"):
            if outputs and name in outputs:
                self.logged.setdefault(name, []).append(float(outputs[name]))


def train_once(run: HeadRun, work_dir: Path) -> Row:
    """Train and return a row: top-1 in percent, coverage, checksums, seconds."""
    torch.set_num_threads(run.threads)
    config = load_config(run.config)
    config.model.head.method = run.method
    hooks = [hook for hook in config.get("custom_hooks") or [] if run.method == "knn" or "KNNGraph" not in _name(hook)]
    config.custom_hooks = [*hooks, dict(type="alimm.HeadRunWatchHook")]
    config.merge_from_dict(dict(run.changes))
    config.default_hooks.checkpoint = None
    config.env_cfg.mp_cfg.mp_start_method = multiprocessing.get_start_method()
    config.log_level = "WARNING"
    start = time.perf_counter()
    folder = work_dir / "runs" / f"{Path(run.config).stem}_{run.arm.replace(' ', '_')}_{run.seed}"
    runner = train(config, work_dir=folder, seed=run.seed, device="cpu")
    watch = next(hook for hook in runner.hooks if isinstance(hook, HeadRunWatchHook))
    logged = {name: sum(values) / len(values) for name, values in watch.logged.items()}
    return dict(
        config=run.config,
        arm=run.arm,
        seed=run.seed,
        score=float(runner.message_hub.get_scalar("val/accuracy/top1").current()),
        loss=float(runner.message_hub.get_scalar("train/loss").mean(20)),
        steps=runner.iter,
        weights=watch.weights,
        data=watch.data,
        seconds=round(time.perf_counter() - start, 1),
        **logged,
    )


def _name(hook: Mapping[str, Any]) -> str:
    return str(hook["type"] if isinstance(hook["type"], str) else hook["type"].__name__)


def train_all(runs: Sequence[HeadRun], work_dir: Path, jobs: int) -> list[Row]:
    """The rows of all runs, in their order; each is printed and kept in ``rows.json`` as soon as it is there."""
    check_work_dir(str(work_dir))
    store = work_dir / "rows.json"
    kept: dict[str, Row] = json.loads(store.read_text()) if store.is_file() else {}
    todo = [run for run in runs if run.key not in kept]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are in {store}")
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(train_once, run, work_dir): run for run in todo}
        for future in as_completed(futures):
            row = kept[futures[future].key] = future.result()
            temporary = store.with_suffix(".tmp")
            temporary.write_text(json.dumps(kept, indent=1))
            os.replace(temporary, store)
            print(
                f"{row['arm']:<14} seed {row['seed']}  top-1 {row['score']:.2f} %  {row['seconds']:.0f} s", flush=True
            )
    # The name of the arm is no part of the key: two names may stand for the same options.
    return [kept[run.key] | {"arm": run.arm} for run in runs]


def interval(rows: Sequence[Row], arm: str, base: str) -> Interval | None:
    """95 % interval of the paired differences in points; None where there is no pair.

    Raises:
        RuntimeError: two rows of one seed did not start alike or did not see the same data.
    """
    found = {(row["arm"], row["seed"]): row for row in rows}
    differences = []
    for name, seed in sorted(found):
        if name != arm or (base, seed) not in found:
            continue
        ours, theirs = found[name, seed], found[base, seed]
        for what in ("weights", "data", "steps"):
            if ours[what] != theirs[what]:
                raise RuntimeError(f"{arm} and {base}, seed {seed}, are no pair: their {what} differ")
        differences.append(ours["score"] - theirs["score"])
    return paired_interval(differences) if differences else None
