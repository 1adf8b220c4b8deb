"""Hooks that two or more methods share."""

from alimm.hooks.class_counts import ClassCountsHook
from alimm.hooks.epoch_seed import EpochSeedHook, seed_worker
from alimm.hooks.progress import ProgressHook
from alimm.hooks.sharded_checkpoint import ShardedCheckpointHook
from alimm.hooks.show_predictions import ShowPredictionsHook

__all__ = [
    "ClassCountsHook",
    "EpochSeedHook",
    "ProgressHook",
    "ShardedCheckpointHook",
    "ShowPredictionsHook",
    "seed_worker",
]
