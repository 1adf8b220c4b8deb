"""A training run of under a second with a classifier cut over the ranks: vectors of 11 classes, lazy row-sparse SGD."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import nn
from torch.utils.data import Dataset

from alimm.apis.train import train
from alimm.heads import ShardedHead
from alimm.structures import ClsDataSample

CLASSES, BLOCK_ROWS = 11, 4


@DATASETS.register_module()
class TinyVectors(Dataset):
    def __init__(self, count: int = 24):
        self.metainfo = dict(classes=tuple(f"class {number}" for number in range(CLASSES)))
        self.vectors = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(inputs=self.vectors[index], target=index * 5 % CLASSES)


@MODELS.register_module()
class TinyShardedHead(ShardedHead):
    """With an array of three whole numbers a row beside the weight."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.marks: torch.Tensor | None = None

    def shard_arrays(self) -> dict[str, torch.Tensor]:
        rows = torch.arange(self.sharding.start, self.sharding.stop, dtype=torch.int32)
        marks = rows[:, None] * 10 + torch.arange(3, dtype=torch.int32) if self.marks is None else self.marks
        return {**super().shard_arrays(), "marks": marks}

    def load_shard(self, arrays: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
        self.marks = arrays.get("marks")
        super().load_shard(arrays, scalars)


@MODELS.register_module()
class TinyShardedNet(BaseModel):
    def __init__(self, head: dict[str, Any]):
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.head = MODELS.build(head)

    def forward(self, inputs: torch.Tensor, target: torch.Tensor, mode: str = "tensor") -> Any:
        samples = [ClsDataSample().set_gt_label(int(label)) for label in target]
        features = self.body(inputs)
        if mode == "loss":
            return dict(loss=self.head.loss(features, samples)["loss"])
        return self.head.predict(features, samples) if mode == "predict" else features


@METRICS.register_module()
class TinyShardedAccuracy(BaseMetric):
    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [int(sample["pred_label"]) == int(sample["gt_label"]) for sample in data_samples]

    def compute_metrics(self, results: list[bool]) -> dict[str, float]:
        return dict(accuracy=sum(results) / len(results))


def sharded_config(**changes: Any) -> Config:
    """Four epochs of 24 samples over all ranks; the checkpoint hook is MMEngine's, as users write it."""

    def loader(shuffle: bool) -> dict[str, Any]:
        return dict(
            dataset=dict(type="TinyVectors"),
            sampler=dict(type="DefaultSampler", shuffle=shuffle),
            batch_size=6,
            collate_fn=dict(type="default_collate"),
        )

    head = dict(type="TinyShardedHead", num_classes=CLASSES, in_channels=5, method="random", active=4, seed=2)
    config = Config(
        dict(
            custom_imports=dict(imports=["tests.alimm.sharded_run"]),
            model=dict(type="TinyShardedNet", head=head),
            train_dataloader=loader(True),
            train_cfg=dict(by_epoch=True, max_epochs=4),
            optim_wrapper=dict(
                type="OptimWrapper",
                optimizer=dict(type="alimm.RowSparseSGD", lr=0.5, momentum=0.9, weight_decay=0.01, rows="lazy_exact"),
            ),
            default_hooks=dict(
                checkpoint=dict(type="CheckpointHook", interval=1), logger=dict(type="LoggerHook", interval=1)
            ),
            test_dataloader=loader(False),
            test_cfg=dict(),
            test_evaluator=dict(type="TinyShardedAccuracy"),
            randomness=dict(seed=3),
            log_level="WARNING",
        )
    )
    config.merge_from_dict(changes)
    return config


def run_sharded(work_dir: str, changes: dict[str, Any], resume: str | None = None) -> dict[str, Any]:
    """Train on the ranks that there are; the head's rows and their momentum at the end."""
    distributed = torch.distributed.is_initialized()
    options = {"default_hooks.checkpoint.type": "alimm.ShardedCheckpointHook"}
    options |= {"default_hooks.checkpoint.block_rows": BLOCK_ROWS, **changes}
    runner = train(
        sharded_config(),
        work_dir=work_dir,
        resume=resume,
        cfg_options=options,
        launcher="pytorch" if distributed else "none",
        device="cpu",
    )
    model = runner.model.module if distributed else runner.model
    head = model.head
    state = runner.optim_wrapper.optimizer.state[head.weight]
    return dict(
        weight=head.weight.detach().clone(),
        momentum=state["momentum_buffer"].clone() if state else None,
        marks=head.marks,
        start=head.sharding.start,
        epoch=runner.epoch,
    )


def folder_digests(folder: Path) -> dict[str, str]:
    """File -> sha256."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def flip_a_weight(folder: Path) -> None:
    """Change one byte of a weight: only the digest tells."""
    path = folder / "weight-000000000004.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
