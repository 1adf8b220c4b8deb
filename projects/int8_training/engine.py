"""One forward and one backward pass of a layer: measure, quantise, multiply; in float32 where the plan says so."""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alimm.projects.int8_training import quantized, telemetry
from alimm.projects.int8_training.geometry import Geometry
from alimm.projects.int8_training.products import Products
from alimm.projects.int8_training.quantized import Stored
from alimm.projects.int8_training.state import LayerState, products_for
from alimm.projects.int8_training.weights import quantize_weight, transposed_weight
from alimm_ops.quantize.cpu_layout import Triple

OUTPUT, GRAD_INPUT, GRAD_WEIGHT, TRAINED = 1, 2, 4, 8
NOT_FINITE = -1.0
"""Zero point that marks an input with NaN or Inf."""


def _start_threads() -> None:
    """Start Numba's threads: both use the same libgomp, so that changes torch's number of threads too; put it back."""
    threads = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(threads)


_start_threads()


def _match_threads() -> None:
    """Let Numba's kernels use as many threads as torch's operators: ranks that share a machine divide it so."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != threads:
        numba.set_num_threads(threads)


def storage(negative: bool, device: torch.device, products: Products, signed: str) -> tuple[int, int]:
    """Zero point and largest integer of an activation's bytes, see `quantized`."""
    if device.type != "cpu":
        return 0, 127
    if not negative:
        return 0, 127
    if products.wide or signed == "split":
        return 128, 127
    return 64, 63


def forward_products(
    state: LayerState, x: Tensor, weight: Tensor, bias: Tensor | None, flags: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``alimm::int8_layer`` computes, see `ops`."""
    layer, options = state.geometry, state.options
    _match_threads()
    products = products_for(options.backend, x.device)
    keep = flags & (GRAD_WEIGHT | TRAINED) == GRAD_WEIGHT | TRAINED
    empty = torch.empty(0, dtype=torch.uint8 if x.device.type == "cpu" else torch.int8, device=x.device)
    x_float = x if x.dtype == torch.float32 else x.float()
    y: Tensor | None = None
    info = torch.tensor([0.0, 0.0], dtype=torch.float64)
    kept = empty
    if flags & OUTPUT or keep:
        volume = quantized.volume_last(x_float, layer.ndim)
        amax, negative, finite = quantized.tensor_range(volume)
        quantised = quantize_weight(weight, options.weight == "channel")
        if not finite or quantised is None:
            info[1] = NOT_FINITE
            kept = empty.new_zeros(volume.shape) if keep else empty
        else:
            state.note_activation(amax)
            zero_point, qmax = storage(negative, x.device, products, options.signed)
            stored = quantized.quantize_activation(volume, amax, zero_point, qmax)
            info[0], info[1] = stored.scale, stored.zero_point
            kept = stored.bytes if keep else empty
            if flags & OUTPUT:
                b = None if bias is None else bias.detach().float()
                y = products.output(stored, *quantised, b, layer)
    if y is not None:
        shape = output_shape(layer, x.shape)
        return quantized.from_volume_last(y, layer.ndim, shape).to(x.dtype), kept, info
    return float_output(layer, x_float, weight.float(), bias).to(x.dtype), kept, info


def output_shape(layer: Geometry, shape: torch.Size) -> tuple[int, ...]:
    """Shape of a layer's output for that of its input."""
    if layer.ndim == 0:
        return *shape[:-1], layer.out_channels
    size = input_size(layer, shape)
    return shape[0], layer.out_channels, *layer.output_size(size)[3 - layer.ndim :]


def input_size(layer: Geometry, shape: torch.Size | list[int]) -> Triple:
    """(D, H, W) of an input; (1, 1, 1) of a linear layer's."""
    if layer.ndim == 0:
        return 1, 1, 1
    padded = (1,) * (3 - layer.ndim) + tuple(shape[2:])
    return padded[0], padded[1], padded[2]


def float_output(layer: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The stock operator in float32, on detached tensors."""
    x, weight = x.detach(), weight.detach()
    b = None if bias is None else bias.detach().float()
    if layer.ndim == 0:
        return torch.nn.functional.linear(x, weight, b)
    conv = (torch.conv1d, torch.conv2d, torch.conv3d)[layer.ndim - 1]
    stride, padding, dilation = (t[3 - layer.ndim :] for t in (layer.stride, layer.padding, layer.dilation))
    y: Tensor = conv(x, weight, b, stride, padding, dilation, layer.groups)
    return y


def float_backward(
    layer: Geometry, grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The stock operator's gradients in float32. Only the shape of ``x`` counts for the input's."""
    if layer.ndim == 0:
        flat_g = grad.reshape(-1, layer.out_channels)
        dx = (grad @ weight) if need_x else None
        return dx, (flat_g.t() @ x.reshape(-1, layer.in_channels)) if need_w else None
    stride, padding, dilation = (list(t[3 - layer.ndim :]) for t in (layer.stride, layer.padding, layer.dilation))
    dx, dw, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0] * layer.ndim, layer.groups, [need_x, need_w, False]
    )
    return dx, dw


def backward_products(
    state: LayerState,
    grad: Tensor,
    x: Tensor | None,
    stored: Tensor,
    info: Tensor,
    weight: Tensor,
    flags: int,
    shape: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``alimm::int8_layer_backward`` computes, see `ops`."""
    layer = state.geometry
    _match_threads()
    g = grad.detach() if grad.dtype == torch.float32 else grad.detach().float()
    w = weight.detach().float()
    scale, zero_point = info.tolist()
    in_int8 = (bool(flags & GRAD_INPUT) and needs[0], bool(flags & GRAD_WEIGHT) and needs[1] and x is None)
    volume = quantized.volume_last(g, layer.ndim)
    size = input_size(layer, shape)
    dx: Tensor | None = None
    dw: Tensor | None = None
    clips = state.range_of(size).update(volume, state.options, state.context.loss_scale) if any(in_int8) else None
    sum_O = None if clips is None else clips[1]
    if clips is not None and zero_point != NOT_FINITE:
        kept = Stored(stored, int(zero_point), scale) if in_int8[1] else None
        dx, dw = _quantised_gradients(state, volume, clips[0], kept, w, size, in_int8)
        if dx is not None:
            dx = quantized.from_volume_last(dx, layer.ndim, tuple(shape))
        if dw is not None:
            dw = dw.view(weight.shape)
    missing = needs[0] and dx is None, needs[1] and dw is None
    if any(missing):
        source = x
        if source is None and missing[1]:
            last = Stored(stored, int(zero_point), scale).dequantize()
            if zero_point == NOT_FINITE:
                last.fill_(float("nan"))
            source = quantized.from_volume_last(last, layer.ndim, tuple(shape))
        if source is None:
            source = g.new_empty(1).expand(shape)
        float_dx, float_dw = float_backward(layer, g, source.detach().float(), w, *missing)
        dx, dw = (float_dx if missing[0] else dx), (float_dw if missing[1] else dw)
    db = g.new_empty(0)
    if needs[2]:
        summed = quantized.rows(volume).sum(0) if sum_O is None else torch.from_numpy(sum_O.astype(np.float32))
        db = summed.to(weight)
    return (
        g.new_empty(0) if dx is None else dx.to(grad.dtype),
        weight.new_empty(0) if dw is None else dw.to(weight.dtype).contiguous(),
        db,
    )


def _quantised_gradients(
    state: LayerState,
    volume: Tensor,
    clip_O: NDArray[np.float32],
    kept: Stored | None,
    weight: Tensor,
    size: Triple,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """DX as (N, D, H, W, C) and dW as (O, I, volume), each if wanted."""
    layer, options = state.geometry, state.options
    products = products_for(options.backend, volume.device)
    qmax = options.grad_qmax
    common_O = np.full_like(clip_O, clip_O.max())
    for_weight_O = common_O if options.grad_weight == "tensor" else clip_O
    folded = options.grad_input == "folded"
    # The paper's input gradient reads the gradient with one scale; the folded one reads the same bytes as the weight's.
    for_input_O = for_weight_O if folded else common_O
    shared = folded or options.grad_weight == "tensor"
    need_x, need_w = wanted
    dx: Tensor | None = None
    dw: Tensor | None = None
    signed, unsigned = quantized.quantize_gradient(
        volume, for_weight_O if need_w or shared else for_input_O, qmax, state.seeds(), unsigned=need_x
    )
    if state.context.watch:
        clipped_at_O = for_weight_O if need_w or shared else for_input_O
        telemetry.watch(state, quantized.rows(volume), signed, clipped_at_O / np.float32(qmax))
    if need_w:
        assert kept is not None
        dw = products.grad_weight(kept, signed, for_weight_O / np.float32(qmax), layer)
    if need_x:
        if need_w and not shared:
            signed, unsigned = quantized.quantize_gradient(volume, for_input_O, qmax, state.seeds(), unsigned=True)
        assert unsigned is not None
        top = float(for_input_O.max())
        fold_O = (for_input_O / np.float32(top)).astype(np.float32) if top > 0 else np.zeros_like(for_input_O)
        zero_point = 128 if unsigned.dtype == torch.uint8 else 0
        # Where bytes above 127 saturate, the weights of this product get 7 bits: the gradient needs its 8 more.
        narrow = zero_point == 128 and not products.wide and options.signed != "split"
        q_w, step_I = transposed_weight(weight, fold_O, folded, layer, 63 if narrow else 127)
        dx = products.grad_input(Stored(unsigned, zero_point, top / qmax), q_w, step_I, size, layer)
    return dx, dw
