"""The project's own configs, shortened to a few pictures and steps."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from mmengine.config import Config

from alimm.apis.config import load_config


def small_config(
    arm: str = "dcaa_self_training", max_iters: int = 2, second_stage: int = 1, pictures: int = 2
) -> Config:
    """A config of synthetic weather; what has two stages enters the second at ``second_stage``.

    Args:
        arm: ``configs/dcaa/<arm>_synthetic.py``.
        max_iters: training steps; there is a validation at the end.
        second_stage: iteration.
        pictures: of each condition; the source has three times as many.
    """
    config = load_config(f"alimm::dcaa/{arm}_synthetic.py")
    _set_pictures(config.to_dict(), config, pictures)
    return shortened(config, max_iters, second_stage)


def shortened(config: Config, max_iters: int, second_stage: int = 1) -> Config:
    """Any config of the project, cut to so many steps."""
    for schedule in config.param_scheduler.values():
        for part in schedule:
            part.end = max_iters
    for hook in config.custom_hooks:
        if "stages" in hook:
            for stage in hook["stages"][1:]:
                stage["begin"] = second_stage
        if "num_batches" in hook:
            hook["num_batches"] = 2
    config.train_cfg.update(max_iters=max_iters, val_interval=max_iters)
    config.default_hooks.checkpoint.interval = max_iters
    config.default_hooks.logger.interval = 1
    config.log_level = "ERROR"
    return config


def _set_pictures(node: Any, live: Any, count: int) -> None:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key == "num" and isinstance(value, int):
            live[key] = 3 * count if node.get("domain") == "source" else count
        elif isinstance(value, dict | list):
            _set_pictures(value, live[key], count)


def without_validation(config: Config) -> Config:
    """The same run, training alone."""
    config.merge_from_dict({"val_cfg": None, "val_dataloader": None, "val_evaluator": None})
    return config


def plain_texts() -> AbstractContextManager[Any]:
    """Inside, configs are written as they are: to lay out the one of each checkpoint takes longer than to train."""
    return mock.patch("mmengine.config.config.FormatCode", lambda text, **_: (text, False))
