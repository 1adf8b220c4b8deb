"""Process groups and what runs over them."""

from alimm.distributed.collectives import (
    all_gather_uneven,
    gather_counts,
    gather_features,
    raise_together,
    rank_and_size,
    sum_over_ranks,
)
from alimm.distributed.cpu import CpuDistributedDataParallel
from alimm.distributed.launch import LAUNCHERS, init_gloo, rendezvous, run_ranks
from alimm.distributed.permutation import ClassPermutation
from alimm.distributed.shards import RowShards, Sharding, exclude_from_ddp, mark_sharded, sharding_of

__all__ = [
    "LAUNCHERS",
    "ClassPermutation",
    "CpuDistributedDataParallel",
    "RowShards",
    "Sharding",
    "all_gather_uneven",
    "exclude_from_ddp",
    "gather_counts",
    "gather_features",
    "init_gloo",
    "mark_sharded",
    "raise_together",
    "rank_and_size",
    "rendezvous",
    "run_ranks",
    "sharding_of",
    "sum_over_ranks",
]
