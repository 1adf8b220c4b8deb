"""Training the arms that DCAA is compared with: one run, many runs with a cache, paired differences.

All arms of a seed share the pictures, the encoder, the kind of decoder, the number of steps and the batch. The
checkpoint that is judged is the last: one chosen by the target's labels would have used them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from alimm.apis.config import load_config
from alimm.apis.train import check_work_dir, train
from alimm.report.statistics import Interval, paired_interval

Row = dict[str, Any]
Change = Callable[[Config], None]


def _model(**options: Any) -> Change:
    return lambda config: config.model.update(options)


def _self_training(**options: Any) -> Change:
    return lambda config: config.model.self_training.update(options)


def _no_attention(config: Config) -> None:
    config.model.decode_head.attention = False


def _nothing_adversarial(config: Config) -> None:
    config.model.update(condition_adversarial=False, global_adversarial=False)


def _styled(config: Config) -> None:
    config.train_dataloader.source.dataset = config.styled_source_dataset


def _released(config: Config) -> None:
    config.model.release_compat = True
    config.model.self_training = dict(threshold=0.6)


def _as_published(config: Config) -> None:
    config.model.self_training = dict(threshold=0.6)


BASELINES = {
    "source_only": "source_only", "strong_augmentation": "strong_augmentation", "adabn": "adabn",
    "colour_matching": "colour_matching", "fda": "fda", "adaptsegnet": "adaptsegnet", "advent": "advent",
    "mean_teacher": "mean_teacher",
}  # fmt: skip
"""Arm -> config, without the data set's name."""
ARMS: dict[str, tuple[str, Change | None]] = {
    **{arm: (config, None) for arm, config in BASELINES.items()},
    "styled mean teacher": ("mean_teacher", _styled),
    "dcaa": ("dcaa", None),
    "dcaa + self-training": ("dcaa_self_training", None),
    "oracle": ("oracle", None),
}
ABLATIONS: dict[str, tuple[str, Change | None]] = {
    "dcaa - condition adversarial": ("dcaa", _model(condition_adversarial=False)),
    "dcaa - global adversarial": ("dcaa", _model(global_adversarial=False)),
    "dcaa - both adversarial": ("dcaa", _nothing_adversarial),
    "dcaa - attention": ("dcaa", _no_attention),
    "both stages as published": ("dcaa_self_training", _as_published),
    "both stages, release_compat": ("dcaa_self_training", _released),
    "self-training at weight 1": ("dcaa_self_training", _self_training(weight=1.0)),
    "self-training, student strong": ("dcaa_self_training", _self_training(student="strong")),
    "self-training - correlations": ("dcaa_self_training", _self_training(correlate=False)),
    "self-training - ambivalence": ("dcaa_self_training", _self_training(ambivalence=False)),
    "self-training, T_d the 30 % quantile": ("dcaa_self_training", _self_training(ambivalence_threshold="q30")),
}


@dataclass(frozen=True)
class Run:
    """One training: an arm of ``ARMS`` or ``ABLATIONS``, a data set, a seed, and how long."""

    arm: str
    data: str
    seed: int
    iters: int

    @property
    def key(self) -> str:
        """All that the result depends on, but for the code."""
        return json.dumps([self.arm, self.data, self.seed, self.iters])


def make_config(run: Run, tiny: bool = False) -> Config:
    """The config of a run, cut or stretched to its length.

    Args:
        run: which.
        tiny: few pictures, to try the machinery.
    """
    name, change = {**ARMS, **ABLATIONS}[run.arm]
    config = load_config(f"alimm::dcaa/{name}_{run.data}.py")
    if change is not None:
        change(config)
    before = config.max_iters
    for schedule in config.param_scheduler.values():
        for part in schedule:
            part.end = part.end * run.iters // before
    for hook in config.custom_hooks:
        for stage in hook.get("stages", ()):
            stage["begin"] = stage["begin"] * run.iters // before
    config.train_cfg.update(max_iters=run.iters, val_interval=run.iters)
    config.default_hooks.checkpoint.interval = run.iters
    config.env_cfg.mp_cfg.mp_start_method = multiprocessing.get_start_method()
    config.log_level = "ERROR"
    if tiny:
        _shrink(config.to_dict(), config)
    return config


def _shrink(node: Any, live: Any) -> None:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key == "num" and isinstance(value, int):
            live[key] = 4
        elif isinstance(value, (dict, list)):
            _shrink(value, live[key])


def train_once(run: Run, work_dir: Path, tiny: bool = False) -> Row:
    """Train and return a row: mIoU by condition in percent, seconds."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    folder = work_dir / "runs" / f"{run.data}_{run.arm.replace(' ', '_').replace('%', '')}_{run.seed}"
    start = time.perf_counter()
    runner = train(make_config(run, tiny), work_dir=folder, seed=run.seed, device="cpu")
    scores = {
        name.rpartition("/")[2]: float(value.current())
        for name, value in runner.message_hub.log_scalars.items()
        if name.startswith("val/mIoU/")
    }
    seconds = round(time.perf_counter() - start, 1)
    used = [runner.model.backbone, runner.model.decode_head]
    parameters = sum(parameter.numel() for part in used for parameter in part.parameters())
    return dict(
        arm=run.arm, data=run.data, seed=run.seed, iters=run.iters, scores=scores, seconds=seconds,
        parameters=parameters,
    )  # fmt: skip


def train_all(runs: Sequence[Run], work_dir: Path, jobs: int, tiny: bool = False) -> list[Row]:
    """The rows of all runs, in their order; each is printed and kept in ``rows.json`` as soon as it is there."""
    check_work_dir(str(work_dir))
    store = work_dir / "rows.json"
    kept: dict[str, Row] = json.loads(store.read_text()) if store.is_file() else {}
    todo = [run for run in runs if run.key not in kept]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are in {store}")
    for run, row in _finished(todo, work_dir, jobs, tiny):
        kept[run.key] = row
        temporary = store.with_suffix(".tmp")
        temporary.write_text(json.dumps(kept, indent=1))
        os.replace(temporary, store)
        scores = "  ".join(f"{name} {value:5.1f}" for name, value in row["scores"].items())
        print(f"{run.data:<10} {run.arm:<28} seed {run.seed}  {scores}  {row['seconds']:.0f} s", flush=True)
    return [kept[run.key] for run in runs]


def _finished(runs: Sequence[Run], work_dir: Path, jobs: int, tiny: bool) -> Iterator[tuple[Run, Row]]:
    if jobs <= 1 or len(runs) < 2:
        for run in runs:
            yield run, train_once(run, work_dir, tiny)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(train_once, run, work_dir, tiny): run for run in runs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def values(rows: Sequence[Row], data: str, arm: str, score: str) -> dict[int, float]:
    """Seed -> score of an arm."""
    return {row["seed"]: row["scores"][score] for row in rows if row["data"] == data and row["arm"] == arm}


def difference(rows: Sequence[Row], data: str, arm: str, base: str, score: str) -> Interval | None:
    """Mean paired difference of two arms with its 95 % interval; None where they share no seed."""
    ours, theirs = values(rows, data, arm, score), values(rows, data, base, score)
    shared = sorted(ours.keys() & theirs.keys())
    return paired_interval([ours[seed] - theirs[seed] for seed in shared]) if shared else None


def table_rows(rows: Sequence[Row], data: str, base: str = "source_only") -> list[list[str]]:
    """Cells for ``print_table``.

    Arm, seeds, mean of every score, paired differences to the base and to ``dcaa``, thousands of parameters that answer
    a test picture, seconds.
    """
    cells = []
    for arm in (*ARMS, *ABLATIONS):
        found = [row for row in rows if row["data"] == data and row["arm"] == arm]
        if not found:
            continue
        means = [sum(row["scores"][name] for row in found) / len(found) for name in found[0]["scores"]]
        to_base = "" if arm == base else str(difference(rows, data, arm, base, "adverse") or "")
        to_dcaa = "" if arm == "dcaa" else str(difference(rows, data, "dcaa", arm, "adverse") or "")
        parameters = found[0].get("parameters", 0) / 1000
        seconds = sorted(row["seconds"] for row in found)[len(found) // 2]
        shown = [f"{value:.1f}" for value in means]
        cells.append([arm, str(len(found)), *shown, to_base, to_dcaa, f"{parameters:.0f}", f"{seconds:.0f}"])
    return cells
