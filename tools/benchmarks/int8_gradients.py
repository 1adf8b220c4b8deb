"""Error of INT8 gradients of a 3 x 3 convolution: one scale a tensor, a sample, a channel, and scales folded into W.

Relative error ||INT8 - FP32|| / ||FP32|| of both products of the backward pass,

    dX = sum_c G[c] * W[c]      contracts the output channel c, so a scale of c cannot be taken out of the sum
    dW[c] = G[c] * X            does not, so there it can

on five kinds of G (16, 64, 14, 14). *folded* quantises G by channel with the scale s_c, and in place of W the tensor
W[c] s_c / s_max by input channel, whose scale is no part of the sum. The first line of each row is simulated here, from
the formulas alone; the others are what layers of the plugin give on the same numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from alimm.report.benchmark import Claim, Outcome, print_table
from alimm.seeding import stream_seed

QMAX = 127
SHAPE_G, SHAPE_X, SHAPE_W = (16, 64, 14, 14), (16, 64, 14, 14), (64, 64, 3, 3)
COLUMNS = ("dX global", "dX per sample", "dX folded", "dW global", "dW per channel")
FORMULAS, EXACT = "formulas", "plugin, 8 bits"
SOURCES: dict[str, str | None] = {FORMULAS: None, EXACT: "split", "plugin, default": "auto"}
"""Where errors come from -> option ``signed`` of the plugin, whose default takes 7 bits where bytes would saturate."""
Errors = dict[str, dict[str, list[dict[str, float]]]]
"""Source -> kind -> for each draw, column -> error."""
AGREE = 0.05
"""Share by which the plugin's error may differ from the simulated one; stochastic rounding draws other numbers."""


def homogeneous(generator: torch.Generator) -> Tensor:
    """Gaussian, every channel alike."""
    return torch.randn(SHAPE_G, generator=generator)


def lognormal(spread: float) -> Callable[[torch.Generator], Tensor]:
    """Gaussian channels whose scales are lognormal."""

    def draw(generator: torch.Generator) -> Tensor:
        scale = torch.exp(spread * torch.randn(SHAPE_G[1], generator=generator))
        return homogeneous(generator) * scale.view(1, -1, 1, 1)

    return draw


def inverted_t(generator: torch.Generator) -> Tensor:
    """N(0, 0.05^2); in half of the channels one value in a hundred is from U(-1, 1): a spike with long tails."""
    g = 0.05 * homogeneous(generator)
    tail = torch.rand(SHAPE_G, generator=generator) < 0.01
    tail[:, SHAPE_G[1] // 2 :] = False
    return torch.where(tail, 2 * torch.rand(SHAPE_G, generator=generator) - 1, g)


KINDS: dict[str, tuple[Callable[[torch.Generator], Tensor], bool]] = {
    "homogeneous": (homogeneous, False),
    "channel scale lognormal(1)": (lognormal(1.0), False),
    "channel scale lognormal(2)": (lognormal(2.0), False),
    "inverted-T on half the channels": (inverted_t, False),
    "lognormal(2), stochastic": (lognormal(2.0), True),
}
"""Kind -> how G is drawn, and whether G is rounded stochastically. W and X are always rounded to the nearest."""


def fake_quantize(x: Tensor, dims: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Quantise symmetrically to +-127 and back.

    Args:
        x: any shape.
        dims: axes that share a scale, the largest magnitude along them.
        generator: draws the stochastic rounding; None rounds to the nearest.
    """
    scale = x.abs().amax(dims, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) / QMAX
    v = x / scale
    q = torch.round(v) if generator is None else torch.floor(v + torch.rand(v.shape, generator=generator))
    return q * scale


def error(value: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def simulate(x: Tensor, w: Tensor, g: Tensor, generator: torch.Generator | None) -> Iterator[float]:
    """The errors of ``COLUMNS``, by the formulas."""
    every, sample, channel = (0, 1, 2, 3), (1, 2, 3), (0, 2, 3)
    dx, dw = conv2d_input(x.shape, w, g, padding=1), conv2d_weight(x, w.shape, g, padding=1)
    x_q, w_q = fake_quantize(x, every), fake_quantize(w, every)
    g_tensor, g_channel = (fake_quantize(g, dims, generator) for dims in (every, channel))
    yield error(conv2d_input(x.shape, w_q, g_tensor, padding=1), dx)
    yield error(conv2d_input(x.shape, w_q, fake_quantize(g, sample, generator), padding=1), dx)
    share = g.abs().amax(channel)
    share = (share / share.max()).view(-1, 1, 1, 1)
    # The layer convolves integers: G without its channel scales, and W with them. W has shape (out, in, 3, 3).
    folded = fake_quantize(w * share, channel)
    yield error(conv2d_input(x.shape, folded, g_channel / share.view(1, -1, 1, 1), padding=1), dx)
    yield error(conv2d_weight(x_q, w.shape, g_tensor, padding=1), dw)
    yield error(conv2d_weight(x_q, w.shape, g_channel, padding=1), dw)


def plugin(x: Tensor, w: Tensor, g: Tensor, stochastic: bool, signed: str) -> dict[str, float]:
    """The errors that converted layers give, for the columns that they have; ``signed`` is the plugin's option."""
    from alimm.projects.int8_training import convert

    exact = backward(nn.Sequential(layer(w)), x, g)
    found = {}
    for grad_input, grad_weight in (("global", "tensor"), ("folded", "channel")):
        model = nn.Sequential(layer(w))
        options: dict[str, Any] = dict(clip="max", planner=False, strict_all=True, min_cosine=-1.0, signed=signed)
        rounding = "stochastic" if stochastic else "nearest"
        convert(model, grad_input=grad_input, grad_weight=grad_weight, rounding=rounding, **options)
        dx, dw = backward(model, x, g)
        found[f"dX {grad_input}"] = error(dx, exact[0])
        found["dW global" if grad_weight == "tensor" else "dW per channel"] = error(dw, exact[1])
    return found


def layer(w: Tensor) -> nn.Conv2d:
    """The convolution with the weight ``w``."""
    conv = nn.Conv2d(w.shape[1], w.shape[0], w.shape[2], padding=1, bias=False)
    conv.weight.data.copy_(w)
    return conv


def backward(model: nn.Sequential, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients dX and dW of a model of one layer."""
    leaf = x.clone().to(memory_format=torch.channels_last).requires_grad_()
    model.train()
    model(leaf).backward(g.to(memory_format=torch.channels_last))
    weight = next(model.parameters())
    assert leaf.grad is not None
    assert weight.grad is not None
    return leaf.grad, weight.grad


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--draws", type=int, default=8, help="of every kind (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formulas-only", action="store_true", help="leave the plugin out")


def run(arguments: argparse.Namespace) -> Outcome:
    """Measure every kind, and judge."""
    draws = 1 if arguments.quick else arguments.draws
    if draws < 1:
        raise ValueError(f"--draws must be at least 1, got {draws}")
    found: Errors = {source: {kind: [] for kind in KINDS} for source in SOURCES}
    for kind, (draw, stochastic) in KINDS.items():
        for number in range(draws):
            generator = torch.Generator().manual_seed(stream_seed(arguments.seed, f"int8_gradients/{kind}", number))
            g = draw(generator)
            x, w = torch.randn(SHAPE_X, generator=generator), torch.randn(SHAPE_W, generator=generator)
            errors = simulate(x, w, g, generator if stochastic else None)
            found[FORMULAS][kind].append(dict(zip(COLUMNS, errors, strict=True)))
            if not arguments.formulas_only:
                for source, signed in SOURCES.items():
                    if signed is not None:
                        found[source][kind].append(plugin(x, w, g, stochastic, signed))
    rows = [
        [kind if source == FORMULAS else f"  {source}", *_cells(found[source][kind])]
        for kind in KINDS
        for source in SOURCES
        if found[source][kind]
    ]
    print_table(f"Relative error in %, mean of {draws} draws", ("gradient", *COLUMNS), rows)
    return Outcome(claims(found), dict(found))


def claims(found: Errors) -> list[Claim]:
    """Finer scales win in every draw of every kind but the first, and the plugin's errors are those of the formulas."""
    result = []
    for kind in list(KINDS)[1:]:
        for fine, coarse in (("dX folded", "dX global"), ("dW per channel", "dW global")):
            shares = [errors[fine] / errors[coarse] for source in SOURCES for errors in found[source][kind]]
            result.append(
                Claim(
                    f"{kind}, {fine} over {coarse}",
                    f"{_mean(shares):.2f}, {max(shares):.2f} at worst",
                    "below 1 in every draw",
                    max(shares) < 1,
                )
            )
    gaps = [
        abs(_mean([errors[key] for errors in draws]) / _mean([errors[key] for errors in found[FORMULAS][kind]]) - 1)
        for kind, draws in found[EXACT].items()
        if draws
        for key in draws[0]
    ]
    result.append(
        Claim(
            f"mean error of {EXACT} against the formulas'",
            f"{100 * max(gaps):.1f} % apart at worst" if gaps else "not measured",
            f"at most {100 * AGREE:g} %",
            bool(gaps) and max(gaps) <= AGREE,
        )
    )
    return result


def _cells(draws: list[dict[str, float]]) -> list[str]:
    return [f"{100 * _mean([errors[key] for errors in draws]):.2f}" if key in draws[0] else "" for key in COLUMNS]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
