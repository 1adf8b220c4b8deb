"""A training run of under a second: a convolution with dropout on noise, drawn from all three generators."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset.utils import worker_init_fn
from mmengine.dist import all_reduce
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, FUNCTIONS, HOOKS, METRICS, MODELS
from torch import nn
from torch.utils.data import Dataset


@DATASETS.register_module()
class TinyNoise(Dataset):
    def __init__(self, count: int = 16, augment: bool = True):
        self.metainfo = dict(classes=("even", "odd"))
        self.images_NCHW = np.random.default_rng(0).random((count, 1, 6, 6), dtype=np.float32)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_CHW = torch.from_numpy(self.images_NCHW[index].copy())
        if self.augment:
            image_CHW = image_CHW * random.random() + np.random.rand() + 0.1 * torch.randn(1)
        return dict(inputs=image_CHW, target=index % 2)


@MODELS.register_module()
class TinyNet(BaseModel):
    def __init__(self, dropout: float = 0.5):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, 2))

    def forward(self, inputs: torch.Tensor, target: torch.Tensor, mode: str = "tensor") -> Any:
        logits = self.body(inputs)
        if mode == "loss":
            return dict(loss=nn.functional.cross_entropy(logits, target))
        if mode == "predict":
            return [dict(pred_score=p, target=t) for p, t in zip(logits.softmax(1), target, strict=True)]
        return logits


FUNCTIONS.register_module(name="stock_worker_init_fn", module=worker_init_fn)


@HOOKS.register_module()
class TinyCollect(Hook):
    """Keeps the inputs of every training batch in ``batches``."""

    batches: ClassVar[list[torch.Tensor]] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.batches.append(data_batch["inputs"])


@HOOKS.register_module()
class TinyMeanLoss(Hook):
    """Writes the loss of every iteration, averaged over the ranks, to ``losses.json`` in the work dir."""

    def before_train(self, runner: Any) -> None:
        self.losses: list[float] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        loss = outputs["loss"].detach().clone()
        all_reduce(loss, op="mean")
        self.losses.append(float(loss))

    def after_train(self, runner: Any) -> None:
        if runner.rank == 0:
            Path(runner.work_dir, "losses.json").write_text(json.dumps(self.losses))


@METRICS.register_module()
class TinyAccuracy(BaseMetric):
    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [int(s["pred_score"].argmax()) == int(s["target"]) for s in data_samples]

    def compute_metrics(self, results: list[bool]) -> dict[str, float]:
        return dict(accuracy=float(np.mean(results)))


def tiny_config(by_epoch: bool = True, num_workers: int = 0, persistent: bool = False, **changes: Any) -> Config:
    """Four epochs of four iterations, SGD with momentum, a schedule, an exponential average of the weights."""
    loader = dict(
        dataset=dict(type="TinyNoise"),
        sampler=dict(type="DefaultSampler" if by_epoch else "InfiniteSampler", shuffle=True),
        batch_size=4,
        num_workers=num_workers,
        persistent_workers=persistent,
        collate_fn=dict(type="default_collate"),
    )
    test_loader = dict(
        dataset=dict(type="TinyNoise", augment=False),
        sampler=dict(type="DefaultSampler", shuffle=False),
        batch_size=4,
        collate_fn=dict(type="default_collate"),
    )
    config = dict(
        custom_imports=dict(imports=["tests.alimm.tiny_run"]),
        model=dict(type="TinyNet"),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=4) if by_epoch else dict(by_epoch=False, max_iters=16),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1, momentum=0.9)),
        param_scheduler=dict(type="MultiStepLR", milestones=[2, 3], by_epoch=by_epoch),
        custom_hooks=[dict(type="EMAHook")],
        default_hooks=dict(
            checkpoint=dict(type="CheckpointHook", interval=1 if by_epoch else 4, by_epoch=by_epoch),
            logger=dict(type="LoggerHook", interval=1),
        ),
        test_dataloader=test_loader,
        test_cfg=dict(),
        test_evaluator=dict(type="TinyAccuracy"),
        randomness=dict(seed=3),
        log_level="WARNING",
    )
    merged = Config(config)
    merged.merge_from_dict(changes)
    return merged


def same_bits(one: Any, other: Any) -> bool:
    """Whether two nests of tensors and plain values are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return bool(one == other)
