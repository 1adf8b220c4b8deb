"""A copy of a trained INT8 model that ONNX can hold: its layers quantise their input and carry integer weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from alimm.projects.int8_training.conversion import layers_of, revert
from alimm.projects.int8_training.state import LayerState
from alimm.projects.int8_training.weights import quantize_weight

QMAX = 127


def integers(name: str, layer: nn.Module, state: LayerState) -> tuple[Tensor, NDArray[np.float32]]:
    """Int8 weight as training multiplies it, and positive steps (O,), since TensorRT refuses 0."""
    weight: Tensor = layer.weight.detach().cpu().float()  # type: ignore[operator]
    quantised = quantize_weight(weight, state.options.weight == "channel", QMAX)
    if quantised is None:
        raise ValueError(f"the weight of layer {name!r} holds NaN or infinity: export a checkpoint from before that")
    q, step_O = quantised
    return q, np.where(step_O > 0, step_O, np.float32(1))


def with_qdq(model: nn.Module, found: Mapping[str, dict[str, Any]]) -> nn.Module:
    """A plain copy of the model whose INT8 layers quantise their input and carry their weight as integers."""
    states = dict(layers_of(model))
    plain = copy.deepcopy(model).cpu().float().eval()
    revert(plain)
    for name, entry in found.items():
        if entry["forward"] == "float":
            continue
        q, step_O = integers(name, model.get_submodule(name), states[name])
        layer = plain.get_submodule(name)
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
        layer._parameters.pop("weight", None)
        layer.register_buffer("weight_int8", q)
        layer.register_buffer("weight_step", torch.tensor(step_O if entry["weight_per"] == "channel" else step_O[0]))
        layer.weight = _Dequantise.apply(layer.weight_int8, layer.weight_step)
        layer.register_forward_pre_hook(_quantise_both(entry["activation_step"]))
    return plain


def _quantise_both(step: float) -> Any:
    # Before the layer pads its input: padding and quantisation by one scale commute.
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        layer.weight = _Dequantise.apply(layer.weight_int8, layer.weight_step)
        return (_QuantiseDequantise.apply(inputs[0], step),)

    return hook


class _QuantiseDequantise(torch.autograd.Function):
    """Fake quantisation of an input, two nodes in ONNX."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, step, 0, -128, QMAX)

    @staticmethod
    def symbolic(g: Any, x: Any, step: float) -> Any:
        scale = g.op("Constant", value_t=torch.tensor(step))
        zero = g.op("Constant", value_t=torch.zeros((), dtype=torch.int8))
        stored = g.op("QuantizeLinear", x, scale, zero)
        return g.op("DequantizeLinear", stored, scale, zero).setType(x.type())


class _Dequantise(torch.autograd.Function):
    """A weight from its integers (O, ...) and one step, or one an output channel (O,)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, step: Tensor) -> Tensor:
        return q.float() * (step.view(-1, *[1] * (q.dim() - 1)) if step.dim() else step)

    @staticmethod
    def symbolic(g: Any, q: Any, step: Any) -> Any:
        zero = g.op("Constant", value_t=torch.zeros(step.type().sizes(), dtype=torch.int8))
        axis = {"axis_i": 0} if step.type().sizes() else {}
        return g.op("DequantizeLinear", q, step, zero, **axis).setType(q.type().with_dtype(torch.float32))
