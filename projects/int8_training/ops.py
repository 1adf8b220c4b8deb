"""The two operators of a converted layer, known to torch: autograd and `torch.compile` see each of them as one.

    output:    X -> q_x, s_x;  W -> q_w, s_w;   Y = (q_x * q_w) s_x s_w + bias
    backward:  G -> q_g, s_c by channel;        dW = (q_g * q_x) s_c s_x,  dX: see `weights`,  db = sum of G

What backward keeps of the input are its bytes. A product that the plan leaves in float32 is the stock operator's.

A layer is named by the number of its `LayerState`, since operators take tensors and numbers only. ``flags`` is a sum of
the `Plan` (1 output, 2 input gradient, 4 weight gradient) and 8 where a weight gradient will be needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alimm.projects.int8_training import quantized
from alimm.projects.int8_training.engine import backward_products, forward_products
from alimm.projects.int8_training.state import state_of


@torch.library.custom_op("alimm::int8_layer", mutates_args=())
def int8_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, handle: int, flags: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, bytes of the input (empty where none are needed), and (scale, zero point) of these bytes."""
    return forward_products(state_of(handle), x, weight, bias, flags)


@int8_layer.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, handle: int, flags: int) -> tuple[Tensor, Tensor, Tensor]:
    layer = state_of(handle).geometry
    if layer.ndim == 0:
        y = x.new_empty(*x.shape[:-1], layer.out_channels)
        stored: tuple[int, ...] = (x.numel() // x.shape[-1], 1, 1, 1, x.shape[-1])
    else:
        padded = (1,) * (3 - layer.ndim) + tuple(x.shape[2:])
        out = layer.output_size((padded[0], padded[1], padded[2]))
        y = quantized.from_volume_last(
            x.new_empty(x.shape[0], *out, layer.out_channels),
            layer.ndim,
            (x.shape[0], layer.out_channels, *out[3 - layer.ndim :]),
        )
        stored = (x.shape[0], *padded, x.shape[1])
    kept = stored if flags & 12 == 12 else (0,)
    dtype = torch.uint8 if x.device.type == "cpu" else torch.int8
    return y, x.new_empty(kept, dtype=dtype), x.new_empty(2, dtype=torch.float64, device="cpu")


@torch.library.custom_op("alimm::int8_layer_backward", mutates_args=())
def int8_layer_backward(
    grad: Tensor,
    x: Tensor | None,
    stored: Tensor,
    info: Tensor,
    weight: Tensor,
    handle: int,
    flags: int,
    shape: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; empty where not needed."""
    return backward_products(state_of(handle), grad, x, stored, info, weight, flags, shape, needs)


@int8_layer_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor | None,
    stored: Tensor,
    info: Tensor,
    weight: Tensor,
    handle: int,
    flags: int,
    shape: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    layer = state_of(handle).geometry
    dx = grad.new_empty(shape if needs[0] else (0,))
    if needs[0] and layer.ndim:
        last = grad.new_empty(shape[0], *(1,) * (3 - layer.ndim), *shape[2:], shape[1])
        dx = quantized.from_volume_last(last, layer.ndim, tuple(shape))
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else weight.new_empty(0)
    return dx, dw, weight.new_empty(layer.out_channels if needs[2] else 0)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, ctx.handle, ctx.flags = inputs
    _, stored, info = output
    ctx.shape = list(x.shape)
    ctx.has_bias = bias is not None
    ctx.last = quantized.channels_last(x, weight, state_of(ctx.handle).geometry.ndim)
    # In float32 the weight gradient needs the input itself.
    in_float = ctx.flags & 12 == 8
    ctx.save_for_backward(x if in_float else None, stored, info, weight)
    ctx.mark_non_differentiable(stored, info)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None, None, None
    x, stored, info, weight = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    dx, dw, db = torch.ops.alimm.int8_layer_backward(
        grad, x, stored, info, weight, ctx.handle, ctx.flags, ctx.shape, needs
    )
    if needs[0] and not ctx.last:
        dx = dx.contiguous()
    return (dx if needs[0] else None), (dw if needs[1] else None), (db if needs[2] else None), None, None


int8_layer.register_autograd(_backward, setup_context=_keep)
