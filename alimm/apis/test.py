"""Testing a checkpoint: ``alimm test``, ``tools/test.py`` and the function behind both."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import DumpResults
from mmengine.runner import Runner

from alimm import compat
from alimm.apis.checkpoints import atomic_open
from alimm.apis.config import load_config, merge_options, parse_options
from alimm.apis.devices import resolve_device
from alimm.apis.errors import explain_build_errors
from alimm.apis.train import (
    add_common_arguments,
    check_parts,
    check_work_dir,
    keep_shards,
    leave_group,
    name_experiment,
    set_work_dir,
)
from alimm.hooks import ProgressHook
from alimm.registry import load_plugins
from alimm.zoo import download as zoo

OUT_SUFFIXES = (".json", ".npz", ".pkl", ".pickle")


def test(
    config: str | os.PathLike[str] | Config,
    checkpoint: str | os.PathLike[str] | None,
    *,
    work_dir: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    show_dir: str | os.PathLike[str] | None = None,
    cfg_options: dict[str, Any] | None = None,
    launcher: str = "none",
    device: str | None = None,
) -> dict[str, float]:
    """Test what a config describes, with the weights of a checkpoint.

    Args:
        config: a path, ``package::path`` or a Config.
        checkpoint: a path, ``alimm://NAME``, or None for weights as the config makes them.
        work_dir: where logs go; by default that of the config, else ``work_dirs/<name>``.
        out: also write the metrics (``.json``) or the predictions (``.pkl``: a list of dicts; ``.npz``: arrays by
            field, in the order of the data set).
        show_dir: also draw the predictions into this folder.
        cfg_options: changes by dotted key.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.
        device: ``'cpu'``, ``'cuda'`` or ``'cuda:N'``; None takes CUDA where there is one.

    Returns:
        Metric -> value.

    Raises:
        ValueError: an option or the config is wrong; the message says what to change.
        FileNotFoundError: there is no such config or checkpoint.
        ImportError: something that the config needs is not installed.
    """
    place = resolve_device(device, launcher)
    merged = load_config(config)
    set_work_dir(merged, work_dir)
    name_experiment(merged)
    merged.launcher, merged.resume = launcher, False
    merged.load_from = _existing(checkpoint)
    if show_dir is not None:
        draw_into(merged, os.fspath(show_dir))
    merge_options(merged, cfg_options)
    if not isinstance(merged.get("default_hooks"), dict):
        merged.default_hooks = {}
    merged.default_hooks.setdefault("progress", dict(type="alimm.ProgressHook"))
    target = _out_path(out)
    check_parts(merged, "test")
    check_work_dir(merged.work_dir)
    compat.apply(merged.work_dir)
    zoo.register()
    load_plugins()
    with compat.chosen_device(place), explain_build_errors(merged):
        compat.cpu_distributed(merged, launcher, place.partition(":")[0])
        keep_shards(merged)
        runner = Runner.from_cfg(merged)
        dump = _dump_predictions(runner, target) if target is not None and target.suffix != ".json" else None
        try:
            metrics: dict[str, float] = runner.test()
        finally:
            for hook in runner.hooks:
                if isinstance(hook, ProgressHook):
                    hook.close()
    if runner.rank == 0 and target is not None:
        if dump is None:
            with atomic_open(target, "w", encoding="utf-8") as file:
                json.dump(metrics, file, indent=2, default=float)
        elif target.suffix == ".npz":
            _write_arrays(dump, target)
    return metrics


def _existing(checkpoint: str | os.PathLike[str] | None) -> str | None:
    if checkpoint is None:
        return None
    text = os.fspath(checkpoint)
    if "://" not in text and not Path(text).expanduser().is_file():
        raise FileNotFoundError(f"there is no checkpoint {text}. It must be a file, alimm://NAME, or `none`")
    return text


def _out_path(out: str | os.PathLike[str] | None) -> Path | None:
    if out is None:
        return None
    target = Path(out)
    if target.suffix not in OUT_SUFFIXES:
        raise ValueError(f"--out writes {', '.join(OUT_SUFFIXES)}, got {target.name!r}")
    check_work_dir(str(target.parent))
    return target


def _dump_predictions(runner: Runner, target: Path) -> Path:
    runner.test_loop.evaluator  # noqa: B018  (builds the loop, so that a metric can be added to it)
    path = target if target.suffix != ".npz" else target.with_suffix(".npz.pkl")
    metric = DumpResults(out_file_path=str(path))
    metric.dataset_meta = getattr(runner.test_dataloader.dataset, "metainfo", None)
    runner.test_evaluator.metrics.append(metric)
    return path


def _write_arrays(dump: Path, target: Path) -> None:
    """Stack the fields that every prediction has with one shape, and remove the list of dicts."""
    # The file was written by this very run.
    predictions = pickle.loads(dump.read_bytes())
    dump.unlink()
    arrays: dict[str, Any] = {}
    for key in predictions[0]:
        values = [prediction.get(key) for prediction in predictions]
        if all(isinstance(value, torch.Tensor) for value in values):
            if len({value.shape for value in values}) == 1:
                arrays[key] = torch.stack(values).float().numpy() if values[0].is_floating_point() else np.stack(values)
        elif all(isinstance(value, str | int | float) for value in values):
            arrays[key] = np.array(values)
    if not arrays:
        raise ValueError(f"{target}: these predictions are not arrays of one shape. Use --out with .pkl")
    with atomic_open(target) as file:
        np.savez_compressed(file, **arrays)


def draw_into(config: Config, folder: str) -> None:
    """Make a config draw its test predictions into a folder, with the hook of its own library where it has one.

    Raises:
        ValueError: the config's visualization hook is not one that is known here.
    """
    hooks = config.get("default_hooks") or {}
    hook = hooks.get("visualization")
    if hook is None:
        config.default_hooks = {**hooks, "visualization": dict(type="alimm.ShowPredictionsHook", out_dir=folder)}
        return
    kind = hook["type"] if isinstance(hook["type"], str) else hook["type"].__name__
    name = kind.rsplit(".", 1)[-1]
    if name == "DetVisualizationHook":
        hook.update(draw=True, test_out_dir=os.path.abspath(folder))
    elif name == "SegVisualizationHook":
        hook.update(draw=True)
        config.visualizer = {**(config.get("visualizer") or {}), "save_dir": folder}
    elif name == "VisualizationHook":
        hook.update(enable=True, out_dir=folder)
    elif name == "ShowPredictionsHook":
        hook.update(out_dir=folder)
    else:
        raise ValueError(f"--show-dir does not know the visualization hook {kind}: set it up with --cfg-options")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``alimm test``."""
    parser.add_argument("config", help="a path, or package::path")
    parser.add_argument("checkpoint", help="a file, alimm://NAME, or `none` for weights as the config makes them")
    parser.add_argument("--out", metavar="FILE", help="write the metrics (.json) or the predictions (.npz, .pkl)")
    parser.add_argument("--show-dir", metavar="DIR", help="draw the predictions into this folder")
    add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Test as the parsed options say; the metrics go to standard output as JSON."""
    os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    metrics = test(
        arguments.config,
        None if arguments.checkpoint == "none" else arguments.checkpoint,
        work_dir=arguments.work_dir,
        out=arguments.out,
        show_dir=arguments.show_dir,
        cfg_options=parse_options(arguments.cfg_options),
        launcher=arguments.launcher,
        device=arguments.device,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(metrics, indent=2, default=float))
    leave_group(arguments.launcher)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options of ``alimm test`` and test."""
    parser = argparse.ArgumentParser(prog="alimm test", description="Test a checkpoint.")
    add_arguments(parser)
    return run(parser.parse_args(argv))
