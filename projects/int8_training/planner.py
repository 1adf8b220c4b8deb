"""Which products of a layer run in INT8: what is faster here, for this shape, measured once.

A plan is timed on the first training batch of a shape, quantisation included: the cost of quantising the input is
shared by the output and the weight gradient, that of the output's gradient by both gradients, so the eight
combinations are compared as wholes and not product by product. INT8 has to win by `MARGIN`, lest noise decides. Layers
of the same kind share one measurement.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from alimm.projects.int8_training import engine, quantized
from alimm.projects.int8_training.ranges import GradientRange
from alimm.projects.int8_training.state import LayerState, Plan, products_for
from alimm.projects.int8_training.weights import quantize_weight, transposed_weight

MARGIN = 1.03
REPEATS = 4

_measured: dict[tuple[object, ...], dict[str, float]] = {}


def plan(state: LayerState, x: Tensor, weight: Tensor, bias: Tensor | None) -> Plan:
    """The plan of a layer for an input of this shape.

    Without ``planner``, and while `torch.compile` traces a shape that was not timed before, all that may run in INT8
    does. The plans used longest ago go when there are more than ``max_shapes``.
    """
    allowed = state.allowed(x.device)
    if not state.options.planner or state.options.backend == "fake":
        return allowed
    shape = tuple(x.shape)
    if shape in state.plans:
        return state.plans[shape]
    if torch.compiler.is_compiling() or not any(allowed):
        return allowed
    times = measure(state, x, weight, bias)
    state.timings[shape] = times
    state.plans[shape] = choose(times, allowed)
    while len(state.plans) > state.options.max_shapes:
        state.plans.popitem(last=False)
    return state.plans[shape]


def choose(times: dict[str, float], allowed: Plan) -> Plan:
    """The fastest combination; float32 where nothing wins by the margin."""
    stock = total(times, (False, False, False))
    choices = [(False, True) if may else (False,) for may in allowed]
    best = min(itertools.product(choices[0], choices[1], choices[2]), key=lambda one: total(times, one))
    return best if total(times, best) * MARGIN < stock else (False, False, False)


def total(times: dict[str, float], which: Plan) -> float:
    """Seconds of one forward and backward pass."""
    seconds = sum(
        times[f"{name}_{'int8' if on else 'float'}"]
        for name, on in zip(("output", "grad_input", "grad_weight"), which, strict=True)
    )
    if which[0] or which[2]:
        seconds += times["quantize_input"]
    if which[1] or which[2]:
        seconds += times["quantize_gradient"]
    return seconds


def measure(state: LayerState, x: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, float]:
    """Seconds of each part, on the given input and a random gradient."""
    layer, options = state.geometry, state.options
    # Whether the input takes a gradient is not known yet where checkpointing runs without any.
    need_x = x.requires_grad or not torch.is_grad_enabled()
    key = (
        layer, tuple(x.shape), x.stride(), x.dtype, _stock_dtype(x), str(x.device), need_x, options.backend,
        options.clip, options.grad_input, options.weight, options.signed, torch.get_num_threads(),
    )  # fmt: skip
    if key in _measured:
        return _measured[key]
    with torch.no_grad():
        times = _measure(state, x.detach(), weight.detach(), None if bias is None else bias.detach(), need_x)
    _measured[key] = times
    return times


def _stock_dtype(x: Tensor) -> torch.dtype:
    """What the stock layer computes in: autocast's choice, or its input's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _measure(state: LayerState, x: Tensor, weight: Tensor, bias: Tensor | None, need_x: bool) -> dict[str, float]:
    layer, options = state.geometry, state.options
    products = products_for(options.backend, x.device)
    given, dtype = x, _stock_dtype(x)
    stock_x, stock_w = x.to(dtype), weight.to(dtype)
    x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    stock_b = bias if dtype == torch.float32 else None
    volume = quantized.volume_last(x, layer.ndim)
    amax, negative, _ = quantized.tensor_range(volume)
    zero_point, qmax = engine.storage(negative, x.device, products, options.signed)

    def quantize_input() -> quantized.Stored:
        last = quantized.volume_last(given.float(), layer.ndim)
        quantized.tensor_range(last)
        return quantized.quantize_activation(last, amax, zero_point, qmax)

    stored = quantize_input()
    quantised = quantize_weight(weight, options.weight == "channel")
    assert quantised is not None
    last = quantized.channels_last(given, weight, layer.ndim)

    def laid_out(volume: Tensor, shape: tuple[int, ...]) -> Tensor:
        tensor = quantized.from_volume_last(volume, layer.ndim, shape)
        return tensor if last else tensor.contiguous()

    out_shape = engine.output_shape(layer, x.shape)
    y = laid_out(products.output(stored, *quantised, bias, layer), out_shape)
    # Each side gets its gradient in the layout that its own output has.
    # Not drawn from the global generator: whether a plan is timed or known must not change the training.
    generator = torch.Generator(x.device).manual_seed(0)
    grad = torch.empty_like(y).normal_(generator=generator)
    stock_grad = torch.empty_like(engine.float_output(layer, stock_x, stock_w, stock_b)).normal_(generator=generator)
    grad_volume = quantized.volume_last(grad, layer.ndim)
    memory = GradientRange()
    found = memory.update(grad_volume, options)
    assert found is not None
    clip_O = found[0]
    size = engine.input_size(layer, x.shape)

    def quantize_gradient() -> tuple[Tensor, Tensor | None]:
        volume = quantized.volume_last(grad, layer.ndim)
        memory.update(volume, options)
        return quantized.quantize_gradient(volume, clip_O, options.grad_qmax, (1, 2), unsigned=True)

    signed, unsigned = quantize_gradient()
    assert unsigned is not None
    gradient = quantized.Stored(unsigned, 128 if unsigned.dtype == torch.uint8 else 0, 1.0)
    fold_O = clip_O / clip_O.max()
    narrow = 127 if products.wide or options.signed == "split" else 63

    def grad_input() -> None:
        q_w, step_I = transposed_weight(weight, fold_O, options.grad_input == "folded", layer, narrow)
        laid_out(products.grad_input(gradient, q_w, step_I, size, layer), tuple(x.shape))

    def output() -> None:
        both = quantize_weight(weight, options.weight == "channel")
        assert both is not None
        laid_out(products.output(stored, *both, bias, layer), out_shape)

    parts: dict[str, Callable[[], object]] = {
        "output_float": lambda: engine.float_output(layer, stock_x, stock_w, stock_b),
        "output_int8": output,
        "grad_weight_float": lambda: engine.float_backward(layer, stock_grad, stock_x, stock_w, False, True),
        "grad_weight_int8": lambda: products.grad_weight(stored, signed, clip_O, layer),
        "quantize_input": quantize_input,
        "quantize_gradient": quantize_gradient,
    }
    if need_x:
        parts["grad_input_float"] = lambda: engine.float_backward(layer, stock_grad, stock_x, stock_w, True, False)
        parts["grad_input_int8"] = grad_input
    times = {"grad_input_float": 0.0, "grad_input_int8": 0.0}
    runs: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(REPEATS + 1):
        for name, part in parts.items():
            if x.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            part()
            if x.is_cuda:
                torch.cuda.synchronize()
            if repeat:
                runs[name].append(time.perf_counter() - start)
    # The least: whatever else the machine does only adds.
    times.update({name: min(values) for name, values in runs.items()})
    return times
