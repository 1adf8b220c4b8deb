"""What a sharded head saves and loads.

One process: the weight is in the state dict as always, (N, D), with a small record of how classes lie over its rows,
so an ordinary checkpoint is complete, and loads on any number of ranks. Several processes: no rank has the whole
weight; it goes to blocks on the disk (`alimm.ShardedCheckpointHook`), and a state dict that would silently hold one
shard alone is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from alimm.distributed.permutation import KINDS, ClassPermutation
from alimm.distributed.shards import Sharding, mark_sharded
from alimm.optim.row_state import flush_rows

_leave_out = False


@contextmanager
def shards_left_out() -> Iterator[None]:
    """Within it a sharded head leaves its weight out of the state dict: whoever enters saves the shards otherwise."""
    global _leave_out
    before, _leave_out = _leave_out, True
    try:
        yield
    finally:
        _leave_out = before


class ShardedState(nn.Module):
    """State of a head with ``weight``, ``sharding`` and ``permutation``; mixed into the head's class."""

    alimm_sharded = True
    """What the checkpoint hook looks for."""

    num_classes: int
    in_channels: int
    sharding: Sharding
    permutation: ClassPermutation
    weight: nn.Parameter
    step: torch.Tensor
    _waits_for_shards = False

    @property
    def layout(self) -> torch.Tensor:
        """How classes lie over rows: number of classes, kind of permutation, its seed; int64 (3,)."""
        kind = KINDS.index(self.permutation.kind)
        return torch.tensor([self.num_classes, kind, self.permutation.seed], dtype=torch.int64)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: rows up to date, since a copy has no optimizer that could bring them there."""
        flush_rows(self.weight)
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        mark_sharded(self.weight, self.sharding)

    def shard_arrays(self) -> dict[str, torch.Tensor]:
        """Arrays with one row a class beside the weight: what blocks on the disk hold besides. Every rank must call."""
        return {}

    def shard_scalars(self) -> dict[str, Any]:
        """Numbers and words that are the same on every rank and belong to the shards."""
        return dict(
            num_classes=self.num_classes,
            dim=self.in_channels,
            permute=self.permutation.kind,
            permute_seed=self.permutation.seed,
            step=int(self.step),
        )

    def load_shard(self, arrays: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
        """Take what `shard_arrays` and `shard_scalars` gave, and the own rows as ``arrays['weight']``.

        Every rank must call it.

        Raises:
            ValueError: they belong to another classifier. Nothing is changed then.
        """
        own = self.shard_scalars()
        for key in ("num_classes", "dim", "permute", "permute_seed"):
            if scalars.get(key) != own[key]:
                raise ValueError(
                    f"the saved classifier has {key} {scalars.get(key)}, this one {own[key]}. Set it in the head "
                    "(permute_seed is the head's seed) as it was in training, or start without the checkpoint"
                )
        with torch.no_grad():
            self.weight.copy_(arrays["weight"])
            self.step.fill_(int(scalars["step"]))
        self._waits_for_shards = False

    def check_loaded(self) -> None:
        """Refuse to work with rows that a checkpoint left out and nobody loaded.

        Raises:
            ValueError: the shards are missing.
        """
        if self._waits_for_shards:
            raise ValueError(
                "the checkpoint holds no weights of the classes: they are in the .shards folder beside it, which was "
                "not loaded. Train with default_hooks.checkpoint.type='alimm.ShardedCheckpointHook', test with `alimm "
                "test`, or make one file of both with `alimm merge-shards`"
            )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not _leave_out:
            if self.sharding.world_size > 1:
                raise ValueError(
                    f"this rank holds {self.sharding.size} of {self.num_classes} classes, and a state dict of one rank "
                    "would lose the others. Set default_hooks.checkpoint.type='alimm.ShardedCheckpointHook'"
                )
            flush_rows(self.weight)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "layout"] = self.layout
        if _leave_out:
            del destination[prefix + "weight"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        state = dict(state_dict)
        # What a lazy optimizer still owes belongs to the old rows and must not meet the new ones.
        flush_rows(self.weight)
        layout = state.pop(prefix + "layout", None)
        whole = state.get(prefix + "weight")
        if whole is not None:
            state[prefix + "weight"] = self._own_rows(whole, layout)
            self._waits_for_shards = False
        elif layout is not None:
            state[prefix + "weight"] = self.weight.detach()
            self._waits_for_shards = True
        if prefix + "step" not in state and whole is not None:
            # Weights of another head, a CosineHead's for instance.
            state[prefix + "step"] = self.step
            state.setdefault(prefix + "scale", self._parameters["scale"])
        super()._load_from_state_dict(state, prefix, *arguments)

    def _own_rows(self, whole: torch.Tensor, layout: torch.Tensor | None) -> torch.Tensor:
        """This rank's rows of a weight (N, D) that is laid out as ``layout`` says, in class order without one."""
        if tuple(whole.shape) != (self.num_classes, self.in_channels):
            raise ValueError(
                f"the checkpoint's classifier has the shape {tuple(whole.shape)}, this one "
                f"{(self.num_classes, self.in_channels)}: set num_classes and in_channels as they were in training"
            )
        saved = ClassPermutation(self.num_classes, kind="none")
        if layout is not None:
            saved = ClassPermutation(self.num_classes, int(layout[2]), KINDS[int(layout[1])])
        classes = self.permutation.classes(torch.arange(self.sharding.start, self.sharding.stop))
        return whole[saved.rows(classes).to(whole.device)]
