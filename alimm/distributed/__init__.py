"""Process groups and what runs over them."""

from alimm.distributed.cpu import CpuDistributedDataParallel
from alimm.distributed.launch import LAUNCHERS, init_gloo, rendezvous, run_ranks

__all__ = ["LAUNCHERS", "CpuDistributedDataParallel", "init_gloo", "rendezvous", "run_ranks"]
