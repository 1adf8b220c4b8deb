"""The configs of large data sets, which are not trained here: they load, build, and step on made pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData

pytest.importorskip("mmseg")

from mmseg.structures import SegDataSample

from alimm import compat
from alimm.apis.config import load_config
from alimm.paths import resource_root
from alimm.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS

FOLDER = resource_root() / "projects" / "dcaa" / "configs"


def made_batch(config: Config, size: tuple[int, int]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for domain in ("source", "target"):
        samples = []
        for k in (0, 1):
            sample = SegDataSample(metainfo=dict(domain=domain, cond_id=k, condition=config.conditions[k]))
            if domain == "source":
                sample.gt_sem_seg = PixelData(data=torch.randint(0, 19, (1, *size)))
            samples.append(sample)
        inputs = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in samples]
        made[domain] = dict(inputs=inputs, data_samples=samples)
    return made


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.py")))
def test_config_steps_in_every_stage(name: str, tmp_path: Any) -> None:
    compat.apply_to_imports()
    config = load_config(FOLDER / name)
    dump = tmp_path / name
    config.dump(dump)
    assert Config.fromfile(dump).max_iters == config.max_iters
    config.model.backbone.pop("init_cfg", None)  # weights that would be downloaded
    if config.model.backbone.get("depth") == 101:
        config.model.backbone.depth = 50  # as wide, and faster
    size = (64, 64)
    config.model.data_preprocessor.size = size
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(config.model)
        constructor = dict(config.optim_wrapper)
        kind, paramwise = constructor.pop("constructor"), constructor.pop("paramwise_cfg")
        wrappers = OPTIM_WRAPPER_CONSTRUCTORS.build(
            dict(type=kind, optim_wrapper_cfg=constructor, paramwise_cfg=paramwise)
        )(model)
    rates = {group["lr"] for group in wrappers["seg"].param_groups}
    assert rates == {config.optim_wrapper.optimizer.lr, 10 * config.optim_wrapper.optimizer.lr}
    stages = next(hook for hook in config.custom_hooks if "stages" in hook)["stages"]
    HOOKS.build(dict(type="alimm.StageHook", stages=stages))
    model.train()
    torch.manual_seed(0)
    for stage in stages:
        model.enter_stage(stage["stage"])
        logs = model.train_step(made_batch(config, size), wrappers)
        assert torch.isfinite(logs["loss"]), stage
    assert "target.loss_easy" in logs
