"""A converted layer computes what its definition says, without bias, with the noise that theory predicts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alimm_ops.quantize import reference
from tests.projects.int8_training.single_layer import LAYERS, converted, error, example, run

# Every processor stores the same bytes then.
SPLIT = dict(signed="split")
PAPER = dict(clip="paper", grad_input="global", grad_weight="channel")
MODES = {
    "default": {},
    "paper": PAPER,
    "control": dict(grad_input="global", grad_weight="tensor"),
    "folded tensor": dict(grad_weight="tensor"),
    "weight channel": dict(weight="channel"),
    "nearest": dict(rounding="nearest"),
    "3 bits": dict(grad_bits=3),
}


def stock(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    return module._conv_forward(x, weight, bias)


def channels_last_rows(module: nn.Module, t: Tensor) -> np.ndarray:
    last = t if isinstance(module, nn.Linear) else t.movedim(1, -1)
    return last.reshape(-1, last.shape[-1]).contiguous().numpy()


def back(module: nn.Module, rows: np.ndarray, like: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return torch.from_numpy(rows).reshape(like.shape)
    return torch.from_numpy(rows).reshape(like.movedim(1, -1).shape).movedim(-1, 1)


def quantised(values: Tensor, clip: np.ndarray, qmax: int, seeds: tuple[int, int] | None, module: nn.Module) -> Tensor:
    """Values after quantisation by channel, float64, by the NumPy oracle."""
    rows, inverse = channels_last_rows(module, values), reference.inverse_scale(clip.astype(np.float32), qmax)
    q = (
        reference.quantize_nearest(rows, inverse, qmax)
        if seeds is None
        else reference.quantize_stochastic(rows, inverse, qmax, *seeds)
    )
    return back(module, q * (clip.astype(np.float64) / qmax), values)


def by_definition(
    module: nn.Module, x: Tensor, grad: Tensor, options: dict[str, Any], draws: list[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, dX, dW as written in the docstrings, in float64."""
    qmax = 2 ** (options.get("grad_bits", 8) - 1) - 1
    weight, bias = module.weight.detach(), module.bias
    x_q = quantised(x, np.full(x.shape[-1 if isinstance(module, nn.Linear) else 1], x.abs().max()), 127, None, module)
    flat = weight.reshape(len(weight), -1).numpy()
    clip = np.abs(flat).max(1) if options.get("weight") == "channel" else np.full(len(flat), np.abs(flat).max())
    inverse = reference.inverse_scale(clip.astype(np.float32))
    w_q = torch.from_numpy(reference.quantize_nearest(flat.T, inverse).T * (clip[:, None].astype(np.float64) / 127))
    y = stock(module, x_q, w_q.reshape(weight.shape), None if bias is None else bias.detach().double())

    by_channel = np.abs(channels_last_rows(module, grad)).max(0)  # bell-shaped or at the first step: the maximum
    common = np.full_like(by_channel, by_channel.max())
    for_w = common if options.get("grad_weight") == "tensor" else by_channel
    g_w = quantised(grad, for_w, qmax, draws[0], module)
    if options.get("grad_input") == "global":
        # The scales of both are the same only where the weight's is one a tensor; then the draw is shared too.
        g_x = g_w if options.get("grad_weight") == "tensor" else quantised(grad, common, qmax, draws[1], module)
        inverse = reference.inverse_scale(np.full(len(flat), np.abs(flat).max(), np.float32))
        step = float(np.abs(flat).max()) / 127
        effective = torch.from_numpy(reference.quantize_nearest(flat.T, inverse).T.astype(np.float64) * step)
    else:
        g_x = g_w
        fold = (for_w / for_w.max()).astype(np.float32)
        groups = getattr(module, "groups", 1)
        # (groups, O / groups, I / groups, taps), one scale an input channel.
        folded = (flat * fold[:, None]).reshape(groups, len(flat) // groups, weight.shape[1], -1)
        top = np.abs(folded).max((1, 3), keepdims=True)
        q = np.rint(np.clip(folded * reference.inverse_scale(top), -127, 127))
        effective = torch.from_numpy((q * (top.astype(np.float64) / 127)).reshape(flat.shape) / fold[:, None])
    x_ = x_q.clone().requires_grad_()
    w_ = weight.double().requires_grad_()
    (dw,) = torch.autograd.grad(stock(module, x_, w_, None), w_, g_w)
    (dx,) = torch.autograd.grad(stock(module, x_, effective.reshape(weight.shape), None), x_, g_x)
    return y, dx, dw


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_its_definition(name: str, mode: str) -> None:
    module, x, grad = example(name)
    layer, _ = converted(module, **SPLIT, **MODES[mode])
    draws = [layer.int8.seeds(), layer.int8.seeds()]
    layer.int8.last_step = -1  # so that the layer draws the same again
    y, dx, dw = by_definition(module, x, grad, MODES[mode], draws)
    found = run(layer, x, grad)
    assert error(found.y, y) < 1e-6
    assert error(found.dx, dx) < 1e-6
    assert error(found.dw, dw) < 1e-6
    if found.db is not None:
        assert error(found.db, torch.from_numpy(channels_last_rows(module, grad).sum(0, dtype=np.float64))) < 1e-6


@pytest.mark.parametrize("backend", ["auto", "int_mm"])
@pytest.mark.parametrize("mode", ["default", "paper"])
@pytest.mark.parametrize("name", LAYERS)
def test_integers_equal_fake_quantisation(name: str, mode: str, backend: str) -> None:
    module, x, grad = example(name, seed=1)
    passes = [run(converted(module, backend=b, **SPLIT, **MODES[mode])[0], x, grad) for b in (backend, "fake")]
    for field in ("y", "dx", "dw"):
        assert error(getattr(passes[0], field), getattr(passes[1], field)) < 1e-6, field


@pytest.mark.parametrize("name", LAYERS)
def test_with_every_product_off_the_bits_are_those_of_float32(name: str) -> None:
    module, x, grad = example(name)
    found, true = run(converted(module, products=())[0], x, grad), run(module, x, grad)
    for field in ("y", "dx", "dw", "db"):
        one, other = getattr(found, field), getattr(true, field)
        assert (one is None and other is None) or torch.equal(one, other), field


@pytest.mark.parametrize("product", ["output", "grad_input", "grad_weight"])
@pytest.mark.parametrize("name", ["stride and groups", "conv3d", "linear"])
def test_each_product_has_its_switch(name: str, product: str) -> None:
    module, x, grad = example(name)
    only = run(converted(module, products=[product], rounding="nearest")[0], x, grad)
    every = run(converted(module, rounding="nearest")[0], x, grad)
    true = run(module, x, grad)
    for field, owner in (("y", "output"), ("dx", "grad_input"), ("dw", "grad_weight")):
        if owner == product:
            assert torch.equal(getattr(only, field), getattr(every, field))
            assert error(getattr(only, field), getattr(true, field)) > 1e-4
        else:
            assert error(getattr(only, field), getattr(true, field)) < 1e-6


def test_a_float32_gradient_beside_integer_ones_reads_the_stored_bytes() -> None:
    """Without the input gradient in INT8 the weight gradient still reads bytes, and no float input is kept."""
    module, x, grad = example("conv2d")
    kept: list[int] = []
    layer, _ = converted(module, products=["output", "grad_weight"])
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        run(layer, x, grad)
    assert x.numel() in kept
    assert 4 * x.numel() not in kept


def kappa_squared(x: Tensor, dims: tuple[int, ...] | None = None) -> float:
    """(max / rms)^2, averaged over the channels if ``dims`` are those within a channel."""
    x, dims = x.detach(), dims or tuple(range(x.dim()))
    return float((x.abs().amax(dims) ** 2 / x.square().mean(dims)).mean())


@pytest.mark.parametrize(("rounding", "share"), [("nearest", 1 / 12), ("stochastic", 1 / 6)])
def test_the_noise_is_what_theory_predicts(rounding: str, share: float) -> None:
    torch.manual_seed(0)
    module, x, grad = (
        nn.Conv2d(24, 32, 3, padding=1, bias=False),
        torch.randn(8, 24, 14, 14),
        torch.randn(8, 32, 14, 14),
    )
    nn.init.normal_(module.weight)
    true = run(module, x, grad)
    found = run(converted(module, rounding=rounding, **SPLIT)[0], x, grad)
    k_x, k_g = kappa_squared(x), kappa_squared(grad, (0, 2, 3))
    k_w = kappa_squared(module.weight)
    k_w_input = kappa_squared(module.weight, (0, 2, 3))
    assert error(found.y, true.y) == pytest.approx(math.sqrt((k_x + k_w) / 12) / 127, rel=0.25)
    assert error(found.dw, true.dw) == pytest.approx(math.sqrt(k_g * share + k_x / 12) / 127, rel=0.25)
    assert error(found.dx, true.dx) == pytest.approx(math.sqrt(k_g * share + k_w_input / 12) / 127, rel=0.25)
