"""A frozen or slowly moving copy of parts of a model: the teacher of self-training.

    frozen      copied when self-training starts, and left (the released DCAA)
    ema         theta_T <- (1 - m_t) theta_T + m_t theta,   m_t = max(m, 1 / (t + 1))     (Tarvainen and Valpola, 2017)
    interval    copied anew every so many steps

The copy is a child of the model, so that it is saved and resumed with it; no optimiser sees it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Teacher(nn.Module):
    """Copies of some modules, in evaluation mode for good.

    Args:
        modules: name -> module to copy.
        momentum: m, the weight of the new value; None freezes the copy.
        interval: copy anew every so many steps, instead of ``momentum``.

    Raises:
        ValueError: both are given, or one is out of range.
    """

    steps: Tensor

    def __init__(
        self, modules: Mapping[str, nn.Module], momentum: float | None = None, interval: int | None = None
    ) -> None:
        super().__init__()
        if momentum is not None and interval is not None:
            raise ValueError("a teacher has a momentum or an interval, not both")
        if momentum is not None and not 0 < momentum <= 1:
            raise ValueError(f"momentum is the weight of the new value and lies in (0, 1], got {momentum}")
        if interval is not None and interval < 1:
            raise ValueError(f"interval is at least 1 step, got {interval}")
        self.parts = nn.ModuleDict({name: copy.deepcopy(module) for name, module in modules.items()})
        self.momentum, self.interval = momentum, interval
        self.register_buffer("steps", torch.tensor(0))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation: no dropout, no batch statistics."""
        return super().train(False)

    @contextlib.contextmanager
    def batch_statistics(self, wanted: bool = True) -> Iterator[None]:
        """Inside, batch norm normalises by the batch at hand and leaves its running statistics as they are.

        A teacher that was trained on the source alone has statistics of the source.
        """
        norms = [m for m in self.modules() if wanted and isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        try:
            yield
        finally:
            for norm in norms:
                norm.training, norm.track_running_stats = False, True

    @torch.no_grad()
    def copy_from(self, modules: Mapping[str, nn.Module]) -> None:
        """Take over all weights and statistics, and start to count anew."""
        for name, part in self.parts.items():
            part.load_state_dict(modules[name].state_dict())
        self.steps.zero_()

    @torch.no_grad()
    def follow(self, modules: Mapping[str, nn.Module]) -> None:
        """Count a step, and move or copy where it is due. Buffers such as batch statistics are copied."""
        self.steps += 1
        if self.interval is not None and int(self.steps) % self.interval == 0:
            for name, part in self.parts.items():
                part.load_state_dict(modules[name].state_dict())
        if self.momentum is None:
            return
        weight = max(self.momentum, 1.0 / (int(self.steps) + 1))
        for name, part in self.parts.items():
            for mine, theirs in zip(part.parameters(), modules[name].parameters(), strict=True):
                mine.lerp_(theirs.to(mine.dtype), weight)
            for kept, new in zip(part.buffers(), modules[name].buffers(), strict=True):
                kept.copy_(new)
