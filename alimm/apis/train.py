"""Training from a config: ``alimm train``, ``tools/train.py`` and the function behind both."""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner

from alimm import compat
from alimm.apis import checkpoints
from alimm.apis.config import load_config, merge_options, parse_options
from alimm.apis.devices import resolve_device
from alimm.apis.errors import explain_build_errors
from alimm.hooks import ProgressHook
from alimm.registry import load_plugins
from alimm.zoo import download as zoo

AUTO = "auto"
SHARDED_CHECKPOINTS = "alimm.ShardedCheckpointHook"
SHARDED_HEADS = ("ShardedHead", "KNNSoftmaxHead")
"""How the types of heads that are cut over ranks end."""
_AMP_WRAPPERS = {"OptimWrapper": "AmpOptimWrapper", "ShardedOptimWrapper": "ShardedAmpOptimWrapper"}
"""Wrapper -> what ``--amp`` makes of it."""
_BF16_WRAPPERS = {"AmpOptimWrapper": "Bf16OptimWrapper", "ShardedAmpOptimWrapper": "ShardedBf16OptimWrapper"}
"""Wrapper -> what stands in for it on the CPU."""
_runs = itertools.count()


def train(
    config: str | os.PathLike[str] | Config,
    *,
    work_dir: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    cfg_options: dict[str, Any] | None = None,
    launcher: str = "none",
    seed: int | None = None,
    device: str | None = None,
) -> Runner:
    """Train what a config describes.

    Args:
        config: a path, ``package::path`` or a Config.
        work_dir: where checkpoints and logs go; by default that of the config, else ``work_dirs/<name>``.
        resume: ``'auto'`` continues from the newest checkpoint of the work dir that can be read, a path from that one.
        amp: mixed precision; bfloat16 on the CPU.
        auto_scale_lr: scale the learning rate with the batch size, from ``auto_scale_lr.base_batch_size``.
        cfg_options: changes by dotted key. They win over every other option.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.
        seed: the run's seed; None keeps the config's.
        device: ``'cpu'``, ``'cuda'`` or ``'cuda:N'``; None takes CUDA where there is one.

    Returns:
        The runner, after training.

    Raises:
        ValueError: an option or the config is wrong; the message says what to change.
        FileNotFoundError: there is no such config or checkpoint.
        ImportError: something that the config needs is not installed.
    """
    place = resolve_device(device, launcher)
    merged = merge_train_options(
        load_config(config), work_dir, resume, amp, auto_scale_lr, cfg_options, launcher, seed, place
    )
    check_parts(merged, "train")
    check_work_dir(merged.work_dir)
    compat.apply(merged.work_dir)
    zoo.register()
    load_plugins()
    kind = place.partition(":")[0]
    with compat.chosen_device(place), explain_build_errors(merged):
        compat.cpu_distributed(merged, launcher, kind)
        _check_resumable(merged)
        _keep_seed(merged)
        changed = keep_shards(merged)
        runner = Runner.from_cfg(merged)
        if changed:
            runner.logger.info(f"the model has a sharded head: default_hooks.checkpoint is {SHARDED_CHECKPOINTS}")
        if runner.rank == 0:
            for leftover in checkpoints.remove_leftovers(runner.work_dir):
                runner.logger.warning(f"removed {leftover}, which a killed run left half written")
        try:
            runner.train()
        finally:
            _close(runner)
    return runner


def _close(runner: Runner) -> None:
    """Give the terminal back and stop the data workers: left to the garbage collector, each takes five seconds."""
    for hook in runner.hooks:
        if isinstance(hook, ProgressHook):
            hook.close()
    loop = runner._train_loop
    if isinstance(loop, BaseLoop):
        loop.dataloader._iterator = None
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = None


def merge_train_options(
    config: Config,
    work_dir: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    cfg_options: dict[str, Any] | None = None,
    launcher: str = "none",
    seed: int | None = None,
    device: str = "cpu",
) -> Config:
    """Put the options of ``train`` into a config, changed in place, in OpenMMLab's order: ``cfg_options`` last."""
    set_work_dir(config, work_dir)
    config.launcher = launcher
    if resume is not None:
        config.resume = True
        config.load_from = None if resume == AUTO else _existing(resume)
    if auto_scale_lr:
        if not (config.get("auto_scale_lr") or {}).get("base_batch_size"):
            raise ValueError(
                "--auto-scale-lr needs to know for which batch size the learning rate was set: put "
                "auto_scale_lr = dict(base_batch_size=N) into the config"
            )
        config.auto_scale_lr.enable = True
    if seed is not None:
        config.randomness = {**(config.get("randomness") or {}), "seed": seed}
    if amp:
        _use_amp(config)
    merge_options(config, cfg_options)
    if device == "cpu":
        _amp_on_cpu(config)
    _add_default_hooks(config)
    return config


def set_work_dir(config: Config, work_dir: str | os.PathLike[str] | None) -> None:
    """The option, else the config's own, else ``work_dirs/<name of the config>``."""
    if work_dir is not None:
        config.work_dir = os.fspath(work_dir)
    elif not config.get("work_dir"):
        config.work_dir = os.path.join("work_dirs", Path(config.filename).stem if config.filename else "unnamed")


def check_parts(config: Config, command: str) -> None:
    """Refuse a config that lacks what training or testing needs, with all that it lacks.

    Args:
        config: with every option merged.
        command: ``'train'`` or ``'test'``.

    Raises:
        ValueError: parts are missing.
    """
    last = "optim_wrapper" if command == "train" else "test_evaluator"
    needed = ("model", f"{command}_dataloader", f"{command}_cfg", last)
    # An empty dict is a test_cfg.
    if missing := [name for name in needed if config.get(name) is None]:
        raise ValueError(f"{config.filename or 'the config'} has no {', '.join(missing)}: `alimm {command}` needs it")


def check_work_dir(work_dir: str) -> None:
    """Make the work dir and try to write there, before hours of training end with nothing saved.

    Raises:
        ValueError: it cannot be made or written.
    """
    try:
        os.makedirs(work_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir):
            pass
    except OSError as error:
        raise ValueError(
            f"the work dir {os.path.abspath(work_dir)} cannot be written ({error.strerror}). Name a folder where you "
            "may write with --work-dir"
        ) from error


def _existing(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if "://" not in text and not Path(text).expanduser().is_file():
        raise FileNotFoundError(f"there is no checkpoint {text} to resume from. --resume auto takes the newest one")
    return text if "://" in text else str(Path(text).expanduser())


def _check_resumable(config: Config) -> None:
    """Refuse a named checkpoint that training cannot go on from before anything is built.

    Raises:
        ValueError: it is damaged, or holds weights alone.
    """
    path = config.get("load_from")
    if not config.get("resume") or not path or "://" in path:
        return
    if reason := checkpoints.why_unusable(path, config.work_dir):
        raise ValueError(
            f"cannot resume from {path}: {reason}. Name another checkpoint, or start from its weights with "
            f"--cfg-options load_from={path}"
        )


def _wrapper_name(config: Config) -> str:
    kind = (config.get("optim_wrapper") or {}).get("type", "OptimWrapper")
    return str(kind if isinstance(kind, str) else kind.__name__).rsplit(".", 1)[-1]


def _use_amp(config: Config) -> None:
    if not config.get("optim_wrapper"):
        raise ValueError("--amp changes the optim_wrapper, and the config has none")
    name = _wrapper_name(config)
    if name not in (*_AMP_WRAPPERS, *_AMP_WRAPPERS.values(), *_BF16_WRAPPERS.values()):
        raise ValueError(
            f"--amp replaces the optim_wrapper {' or '.join(_AMP_WRAPPERS)}, but the config has {name}: leave out --amp"
        )
    if name in _AMP_WRAPPERS:
        config.optim_wrapper.type = _scoped(_AMP_WRAPPERS[name])
    if name not in _BF16_WRAPPERS.values():
        config.optim_wrapper.setdefault("loss_scale", "dynamic")


def _amp_on_cpu(config: Config) -> None:
    """MMEngine's AmpOptimWrapper refuses the CPU; bfloat16 needs no loss scale there."""
    if _wrapper_name(config) in _BF16_WRAPPERS:
        config.optim_wrapper.type = _scoped(_BF16_WRAPPERS[_wrapper_name(config)])
        for key in ("loss_scale", "dtype", "use_fsdp"):
            config.optim_wrapper.pop(key, None)


def _scoped(name: str) -> str:
    return name if name == "AmpOptimWrapper" else f"alimm.{name}"


def name_experiment(config: Config) -> None:
    """Name a run that has no name.

    MMEngine keeps loggers and message hubs by this name and the second of the start; two runs must not share them.
    """
    if not config.get("experiment_name"):
        config.experiment_name = f"{Path(config.work_dir).name}_{os.getpid()}_{next(_runs)}"


def _add_default_hooks(config: Config) -> None:
    """Add alimm's own default hooks; a config leaves one out with ``default_hooks = dict(epoch_seed=None)``."""
    name_experiment(config)
    hooks = dict(config.get("default_hooks") or {})
    own = {"epoch_seed": dict(type="alimm.EpochSeedHook"), "progress": dict(type="alimm.ProgressHook")}
    for name, hook in own.items():
        if hooks.setdefault(name, hook) is None:
            del hooks[name]
    config.default_hooks = hooks
    loader = config.get("train_dataloader") or {}
    if "epoch_seed" in hooks and loader.get("num_workers") and "worker_init_fn" not in loader:
        quiet = loader.pop("disable_subprocess_warning", False)
        loader["worker_init_fn"] = dict(type="alimm.seed_worker", disable_subprocess_warning=quiet)


def keep_shards(config: Config) -> bool:
    """Let the checkpoints of a model with a sharded head hold the rows of all ranks, which MMEngine's own hook loses.

    A hook of another type, and none (``checkpoint=None``), stay. So does MMEngine's where one process averages the
    model with EMAHook: there it has everything, and the average of the classes too.

    Args:
        config: changed in place where its model has a sharded head and its checkpoint hook is ``CheckpointHook``.

    Returns:
        Whether it was changed.

    Raises:
        ValueError: EMAHook would average rows that a lazy optimizer has left behind.
    """
    if not _has_sharded_head(config.get("model")):
        return False
    hooks = dict(config.get("default_hooks") or {})
    # What MMEngine takes where nothing is said.
    hook = hooks.get("checkpoint", dict(type="CheckpointHook", interval=1))
    averaged = any(_type_name(other) == "EMAHook" for other in config.get("custom_hooks") or ())
    optimizer = (config.get("optim_wrapper") or {}).get("optimizer") or {}
    lazy = _type_name(optimizer) in ("RowSparseSGD", "RowSparseLARS") and optimizer.get("rows", "lazy_exact")
    if averaged and lazy == "lazy_exact":
        raise ValueError(
            "EMAHook reads every row of the classifier at every step, and rows='lazy_exact' of the optimizer leaves "
            "them behind until they are needed: set optim_wrapper.optimizer.rows to 'dense' (the same result) or "
            "'frozen', or leave out EMAHook"
        )
    if _type_name(hook) != "CheckpointHook" or (averaged and config.get("launcher", "none") == "none"):
        return False
    config.default_hooks = {**hooks, "checkpoint": {**hook, "type": SHARDED_CHECKPOINTS}}
    return True


def _type_name(part: Any) -> str:
    kind = part.get("type", "") if isinstance(part, dict) else ""
    return str(kind if isinstance(kind, str) else getattr(kind, "__name__", kind)).rsplit(".", 1)[-1]


def _has_sharded_head(part: Any) -> bool:
    if isinstance(part, dict):
        return _type_name(part).endswith(SHARDED_HEADS) or any(map(_has_sharded_head, part.values()))
    return isinstance(part, list | tuple) and any(map(_has_sharded_head, part))


def _keep_seed(config: Config) -> None:
    """Take the seed from the checkpoint where a run without one resumes: MMEngine does so after it made the sampler."""
    if not config.get("resume") or (config.get("randomness") or {}).get("seed") is not None:
        return
    path = config.get("load_from") or checkpoints.find_resumable(config.work_dir)
    if path is not None and "://" not in path:
        seed = checkpoints.make_local_loader(config.work_dir)(path, "cpu")["meta"].get("seed")
        config.randomness = {**(config.get("randomness") or {}), "seed": seed}


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that ``train`` and ``test`` share, with OpenMMLab's names."""
    parser.add_argument("--work-dir", help="where checkpoints, logs and results go")
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="change the config; wins over other options"
    )
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    # torchrun sets LOCAL_RANK; older launchers pass it as an option.
    parser.add_argument("--local-rank", "--local_rank", type=int, default=0, help="set by some launchers")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default CUDA where there is one")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``alimm train``."""
    parser.add_argument("config", help="a path, or package::path such as mmdet::retinanet/retinanet_r18_fpn_1x_coco.py")
    parser.add_argument(
        "--resume", nargs="?", const=AUTO, metavar="PATH|auto", help="continue from a checkpoint; auto: the newest"
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision (bfloat16 on the CPU)")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    parser.add_argument("--seed", type=int, help="seed of the run")
    add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train as the parsed options say."""
    os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    train(
        arguments.config,
        work_dir=arguments.work_dir,
        resume=arguments.resume,
        amp=arguments.amp,
        auto_scale_lr=arguments.auto_scale_lr,
        cfg_options=parse_options(arguments.cfg_options),
        launcher=arguments.launcher,
        seed=arguments.seed,
        device=arguments.device,
    )
    leave_group(arguments.launcher)
    return 0


def leave_group(launcher: str) -> None:
    """End the process group that a launcher made: its threads must not outlive the interpreter, which aborts then."""
    if launcher != "none" and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options of ``alimm train`` and train."""
    parser = argparse.ArgumentParser(prog="alimm train", description="Train what a config describes.")
    add_arguments(parser)
    return run(parser.parse_args(argv))
