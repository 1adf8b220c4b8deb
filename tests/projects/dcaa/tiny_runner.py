"""A model of three layers with two players, numbers as pictures, and a run of a few iterations."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import alimm.projects.dcaa  # noqa: F401  (names its parts to the registries)
from alimm.apis.train import train
from alimm.projects.dcaa.wrapper import average_gradients
from alimm.registry import DATASETS, METRICS, MODELS


@DATASETS.register_module(force=True)
class TinyNumbers(Dataset):
    """Four numbers a picture, with the noise of an augmentation, drawn from every global generator."""

    def __init__(self, size: int = 12, shift: float = 0.0, conditions: tuple[str, ...] = ("fog", "night")) -> None:
        self.values = torch.randn(size, 4, generator=torch.Generator().manual_seed(3)) + shift
        self.conditions = tuple(conditions)
        self.metainfo = {"classes": ("a", "b", "c")}

    def condition_ids(self) -> np.ndarray:
        return np.arange(len(self.values)) % len(self.conditions)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return {"inputs": self.values[index] + 0.1 * noise, "index": index, "noise": noise}


@MODELS.register_module(force=True)
class TinyPlayers(BaseModel):
    """A backbone with batch norm and a head, a discriminator, and a teacher that needs no gradient."""

    STAGES = ("source", "align", "self_train")

    def __init__(self, stage: str = "source", adversarial: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.decode_head = nn.Linear(8, 3)
        self.discriminators = nn.ModuleList([nn.Linear(3, 1)]) if adversarial else None
        self.teacher = copy.deepcopy(self.decode_head).requires_grad_(False)
        self.register_buffer("stage_index", torch.tensor(self.STAGES.index(stage)))
        self.entered: list[str] = []
        self.seen: list[dict[str, list[tuple[int, float]]]] = []

    @property
    def stage(self) -> str:
        return self.STAGES[int(self.stage_index)]

    def enter_stage(self, stage: str) -> None:
        self.entered.append(stage)
        self.stage_index.fill_(self.STAGES.index(stage))
        if stage == "self_train":
            self.teacher.load_state_dict(self.decode_head.state_dict())

    def forward(self, inputs: Any, mode: str = "tensor", **rest: Any) -> Any:
        logits = self.decode_head(self.backbone(torch.stack(list(inputs))))
        return logits if mode == "tensor" else list(logits)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        self.seen.append({name: list(zip(part["index"], part["noise"], strict=True)) for name, part in data.items()})
        seg = optim_wrapper["seg"]
        outputs = {}
        with seg.optim_context(self):
            for name, part in data.items():
                x = F.dropout(torch.stack(part["inputs"]), 0.2)
                outputs[name] = self.decode_head(self.backbone(x))
            labels = torch.tensor([index % 3 for index in data["source"]["index"]])
            loss = F.cross_entropy(outputs["source"].float(), labels)
            if self.discriminators is not None:
                loss = loss - 0.1 * self.discriminators[0](outputs["target"]).float().mean()
            if self.stage == "self_train":
                loss = loss + (self.teacher.weight - self.decode_head.weight).pow(2).sum()
        seg.backward(loss)
        average_gradients(p for p in self.parameters() if p.requires_grad)
        seg.step()
        optim_wrapper.zero_grad()
        if "disc" in optim_wrapper:
            disc = optim_wrapper["disc"]
            with disc.optim_context(self):
                fooled = sum(self.discriminators[0](o.detach().float()).mean() for o in outputs.values())
            disc.backward(fooled)
            average_gradients(self.discriminators.parameters())
            disc.step()
            optim_wrapper.zero_grad()
        return {"loss": loss.detach()}


@METRICS.register_module(force=True)
class TinySum(BaseMetric):
    """The sum of all outputs."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.extend(float(sample.sum()) for sample in data_samples)

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return {"sum": sum(results)}


def loader(workers: int = 0, batch: int = 2, sampler: dict[str, Any] | None = None, **dataset: Any) -> dict[str, Any]:
    return dict(
        batch_size=batch,
        num_workers=workers,
        dataset=dict(type="alimm.TinyNumbers", **dataset),
        sampler=sampler or dict(type="alimm.ConditionSampler"),
    )


def config(work_dir: Path, max_iters: int = 6, workers: int = 0, val: bool = False, **changes: Any) -> Config:
    """A run; ``changes`` replace or add whole parts."""
    parts: dict[str, Any] = dict(
        model=dict(type="alimm.TinyPlayers"),
        train_dataloader=dict(source=loader(workers), target=loader(workers, batch=3, size=9, shift=1.0)),
        train_cfg=dict(type="alimm.MultiLoaderTrainLoop", max_iters=max_iters, val_interval=2),
        optim_wrapper=dict(
            type="OptimWrapper",
            constructor="alimm.AlternatingOptimWrapperConstructor",
            optimizer=dict(type="SGD", lr=0.1, momentum=0.9),
            discriminator=dict(type="Adam", lr=0.01),
        ),
        default_hooks=dict(
            checkpoint=dict(type="CheckpointHook", interval=2, by_epoch=False, save_last=True),
            logger=dict(type="LoggerHook", interval=2),
        ),
        log_processor=dict(by_epoch=False),
        log_level="ERROR",
        work_dir=str(work_dir),
        randomness=dict(seed=5),
    )
    if val:
        parts.update(
            val_dataloader=loader(batch=3, sampler=dict(type="DefaultSampler", shuffle=False), size=6, shift=1.0),
            val_cfg=dict(),
            val_evaluator=dict(type="alimm.TinySum"),
        )
    return Config({**parts, **changes})


def run(work_dir: Path, **options: Any) -> Any:
    """Train on the CPU; return the runner."""
    resume, launcher = options.pop("resume", None), options.pop("launcher", "none")
    return train(config(work_dir, **options), device="cpu", resume=resume, launcher=launcher)


def weights(runner: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in runner.model.state_dict().items()}


def assert_equal_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
