"""Convolutions and linear layers that train in INT8, made of the model's own modules in place.

A module keeps its parameters, buffers, hooks and name; only its class changes, to a subclass of what it was. So the
state dict, the optimizer and ``isinstance`` see no difference, and `revert` puts the class back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alimm.projects.int8_training import ops, planner, quantized
from alimm.projects.int8_training.geometry import pads_outside
from alimm.projects.int8_training.state import LayerState

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
STATE = "int8"
"""Attribute of a converted module that holds its `LayerState`."""


class Int8Layer(_Base):
    """What the subclass of a convolution or linear layer adds; see `convert`."""

    int8: LayerState
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """The layer in INT8, or the stock one where its plan, its input or its health say so."""
        flags = self._flags(x)
        if not flags & 7:
            stock: Tensor = super().forward(x)
            return stock
        if self.int8.geometry.ndim and pads_outside(self):  # type: ignore[arg-type]
            mode = "constant" if self.padding_mode == "zeros" else str(self.padding_mode)
            x = F.pad(x, self._reversed_padding_repeated_twice, mode)  # type: ignore[arg-type]
        y, _, _ = ops.int8_layer(x, self.weight, self.bias, self.int8.handle, flags)
        if not quantized.channels_last(x, self.weight, self.int8.geometry.ndim):
            y = y.contiguous()
        kind = x.device.type
        converted: Tensor = y.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else y
        return converted

    def _flags(self, x: Tensor) -> int:
        """How this call runs, as `ops` writes it; 0 for the stock layer."""
        state = self.int8
        layer = state.geometry
        training = torch.is_grad_enabled() and (
            x.requires_grad or self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        )
        known = x.is_floating_point() and x.device.type in ("cpu", "cuda") and x.dtype != torch.float64
        # A convolution also takes one picture without a batch dimension; that goes the stock way.
        shaped = x.dim() == layer.ndim + 2 if layer.ndim else x.dim() >= 1
        if state.sick or not known or not shaped or not x.numel():
            return 0
        if not training:
            # Reentrant checkpointing runs a training forward without gradients first; both must give the same.
            infer = state.options.eval_int8 or self.training or torch.is_grad_enabled()
            if not (infer and state.allowed(x.device)[0]):
                return 0
            return int(not self.weight.requires_grad or planner.plan(state, x, self.weight, self.bias)[0])
        output, grad_input, grad_weight = planner.plan(state, x, self.weight, self.bias)
        trained = self.weight.requires_grad
        grad_input = grad_input and x.requires_grad
        grad_weight = grad_weight and trained
        return output + 2 * grad_input + 4 * grad_weight + 8 * trained if output or grad_input or grad_weight else 0

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the stock class, since the subclass is made on the fly."""
        return _rebuild, (stock_class(self), self.__dict__.copy())

    def extra_repr(self) -> str:
        """That of the stock layer, marked."""
        return f"{super().extra_repr()}, int8"


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def int8_class(stock: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer's class that trains in INT8."""
    if stock not in _classes:
        _classes[stock] = type(f"Int8{stock.__name__}", (Int8Layer, stock), {"__module__": stock.__module__})
    return _classes[stock]


def stock_class(module: nn.Module | Int8Layer) -> type[nn.Module]:
    """The class of a converted module before it was converted."""
    found: type[nn.Module] = type(module).__mro__[2]
    return found


def _rebuild(stock: type[nn.Module], attributes: dict[str, Any]) -> nn.Module:
    kind = int8_class(stock)
    module: nn.Module = kind.__new__(kind)
    module.__dict__.update(attributes)
    return module


def is_int8(module: nn.Module) -> bool:
    """Whether a module is converted."""
    return isinstance(module, Int8Layer)
