"""Two ranks: gradients are dequantised before they are added up, and each rank rounds with its own seeds."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from torch import nn

from alimm.projects.int8_training import Int8TrainingHook, layers_of
from tests.gloo_pool import GlooPool


class TwoBranches(nn.Module):
    """The second branch takes no part when ``only_first``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 4, 1, bias=False))
        self.second = nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor, only_first: bool = False) -> torch.Tensor:
        y = self.first(x)
        return y if only_first else y + self.second(x)


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 8, 7, 6, generator=generator), torch.randn(2, 4, 7, 6, generator=generator)


def hooked(model: Any) -> Int8TrainingHook:
    hook = Int8TrainingHook(planner=False, telemetry_interval=0)
    hook.before_train(SimpleNamespace(epoch=0, model=model, seed=7, logger=logging.getLogger("ddp")))
    assert hook.report is not None
    assert hook.report.converted == ["first.0", "first.2", "second"]
    return hook


def gradients(model: nn.Module) -> dict[str, np.ndarray | None]:
    return {
        name.removeprefix("module."): None if p.grad is None else p.grad.numpy() for name, p in model.named_parameters()
    }


def train_step(same_data: bool, only_first: bool) -> dict[str, Any]:
    rank = dist.get_rank()
    x, grad = inputs(0 if same_data else rank)
    alone = TwoBranches()
    hooked(alone)
    alone(x, only_first).backward(grad)
    wrapped = MMDistributedDataParallel(TwoBranches(), find_unused_parameters=only_first)
    hook = hooked(wrapped)
    for _ in range(2):  # a second step would complain if the first had not reduced every parameter
        wrapped.zero_grad()
        for _, state in layers_of(wrapped.module):
            state.last_step = -1
        nn.parallel.DistributedDataParallel.forward(wrapped, x, only_first).backward(grad)
    found = dict(alone=gradients(alone), together=gradients(wrapped))
    hook.after_train(SimpleNamespace(model=wrapped))
    assert type(wrapped.module.first[0]) is nn.Conv2d
    return found


def test_the_gradient_of_both_ranks_is_the_mean_of_what_each_computes(gloo: GlooPool) -> None:
    first, second = gloo.run(2, train_step, False, False, timeout=110)
    for name, value in first["together"].items():
        assert np.array_equal(value, second["together"][name]), name
        mean = (first["alone"][name] + second["alone"][name]) / 2
        np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-6 * np.abs(mean).max())


def test_ranks_round_with_different_seeds(gloo: GlooPool) -> None:
    first, second = gloo.run(2, train_step, True, False, timeout=110)
    for name in ("first.0.weight", "first.2.weight", "second.weight"):
        one, other = first["alone"][name], second["alone"][name]
        assert not np.array_equal(one, other), name
        assert np.linalg.norm(one - other) < 0.05 * np.linalg.norm(one)
    assert np.array_equal(first["alone"]["second.bias"], second["alone"]["second.bias"]), "which is never rounded"


def test_unused_parameters_are_found_as_ever(gloo: GlooPool) -> None:
    first, second = gloo.run(2, train_step, False, True, timeout=110)
    assert first["alone"]["second.weight"] is None
    for name, value in first["together"].items():
        if name.startswith("second."):
            assert value is None or not value.any()
        else:
            mean = (first["alone"][name] + second["alone"][name]) / 2
            np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-6 * np.abs(mean).max())
