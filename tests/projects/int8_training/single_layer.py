"""One layer, its FP32 twin, and one forward and backward pass of either."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alimm.projects.int8_training import Report, convert


@dataclass
class Pass:
    """What came out; gradients are None where there are none."""

    y: Tensor
    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None


def converted(module: nn.Module, **options: Any) -> tuple[nn.Module, Report]:
    """A converted copy; every layer is taken and nothing is timed."""
    model = nn.Sequential(copy.deepcopy(module))
    report = convert(model, **{"strict_all": True, "planner": False, **options})
    return model[0], report


def run(module: nn.Module, x: Tensor, grad: Tensor, need_x: bool = True) -> Pass:
    """Forward, and backward with a given gradient of the output. The layout of ``x`` is kept."""
    x = x.detach().requires_grad_(need_x)
    module.zero_grad()
    y = module(x)
    if y.requires_grad:
        y.backward(grad)
    bias = None if module.bias is None else module.bias.grad
    return Pass(y.detach(), x.grad, module.weight.grad, bias)


def error(found: Tensor | None, true: Tensor | None) -> float:
    """Relative, in the Euclidean norm."""
    assert found is not None
    assert true is not None
    assert found.shape == true.shape
    return float((found.double() - true.double()).norm() / true.double().norm())


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (3, 6, 9, 8)),
    "stride and groups": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), (3, 6, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), (3, 6, 9, 8)),
    "1x1": (lambda: nn.Conv2d(6, 8, 1, bias=False), (3, 6, 9, 8)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 5, stride=2, dilation=2, padding=3), (3, 6, 30)),
    "conv3d": (lambda: nn.Conv3d(6, 8, (3, 1, 3), padding=(1, 0, 1)), (2, 6, 4, 5, 6)),
    "linear": (lambda: nn.Linear(6, 8), (40, 6)),
    "linear of sequences": (lambda: nn.Linear(6, 8), (5, 9, 6)),
}


def example(name: str, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, an input, and a gradient of the output whose channels differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    make, shape = LAYERS[name]
    module = make()
    x = torch.randn(shape, generator=generator)
    y = module(x)
    grad = torch.randn(y.shape, generator=generator)
    channel = y.dim() - 1 if isinstance(module, nn.Linear) else 1
    scale = torch.exp(torch.randn(y.shape[channel], generator=generator))
    return module, x, grad * scale.view([-1 if d == channel else 1 for d in range(y.dim())])
