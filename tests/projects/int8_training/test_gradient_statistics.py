"""What holds of the gradients on average: no bias, and which scale structure errs least."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.projects.int8_training.single_layer import Pass, converted, error, run

DRAWS = 300


def draw(module: nn.Module, x: Tensor, grad: Tensor, **options: Any) -> list[Pass]:
    layer, report = converted(module, **options)
    passes = []
    for step in range(DRAWS):
        report.context.step = step
        passes.append(run(layer, x, grad))
    return passes


def straight_through(module: nn.Module, x: Tensor, grad: Tensor, folded: bool) -> tuple[Tensor, Tensor]:
    """Gradients by the quantised input and weights, with the gradient of the output as it is."""
    step = float(x.abs().max()) / 127
    x_q = (x.double() / step).round() * step
    weight = module.weight.detach()
    if folded:
        clip_O = grad.abs().amax((0, 2, 3))
        fold_O = (clip_O / clip_O.max()).view(-1, 1, 1, 1)
        top_I = (weight * fold_O).abs().amax((0, 2, 3), keepdim=True).double() / 127
        w_q = (weight * fold_O / top_I).round() * top_I / fold_O
    else:
        top = float(weight.abs().max()) / 127
        w_q = (weight.double() / top).round() * top
    size = dict(stride=module.stride, padding=module.padding, groups=module.groups)
    dw = torch.nn.grad.conv2d_weight(x_q, weight.shape, grad.double(), **size)
    dx = torch.nn.grad.conv2d_input(x.shape, w_q.double(), grad.double(), **size)
    return dx, dw


@pytest.mark.parametrize("grad_input", ["folded", "global"])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradients_are_unbiased(grad_input: str, stride: int) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, stride, 1, bias=False)
    x = torch.randn(2, 4, 7, 6)
    grad = torch.randn_like(module(x)) * torch.tensor([0.01, 0.1, 1, 1, 3, 0.5]).view(1, -1, 1, 1)
    options = dict(grad_input=grad_input, grad_weight="channel", signed="split")
    dx, dw = straight_through(module, x, grad, grad_input == "folded")
    passes = draw(module, x, grad, **options)
    for drawn, true in ((torch.stack([p.dx for p in passes]), dx), (torch.stack([p.dw for p in passes]), dw)):
        off = (drawn.double().mean(0) - true).abs()
        # Where nothing is drawn at all (a channel's largest element) only the float32 of the result is left.
        bound = 5 * drawn.double().std(0) / DRAWS**0.5 + 1e-6 * true.abs().max()
        assert float((off <= bound).float().mean()) >= 0.999
        noise = float((drawn.double().var(0).sum() / true.square().sum()).sqrt())
        assert float(off.norm() / true.norm()) < 2 * noise / DRAWS**0.5, "the mean comes closer with every draw"


def test_rounding_to_nearest_is_biased_where_a_value_never_reaches_half_a_step() -> None:
    """What stochastic rounding is for; shows that the test above can fail."""
    module, x = nn.Conv2d(1, 1, 1, bias=False), torch.ones(1, 1, 8, 8)
    grad = torch.full((1, 1, 8, 8), 0.4 / 127)
    grad[0, 0, 0, 0] = 1.0
    true = run(module, x, grad).dw
    nearest = run(converted(module, rounding="nearest")[0], x, grad).dw
    assert float(nearest) == pytest.approx(1.0, rel=1e-5)
    drawn = torch.stack([p.dw for p in draw(module, x, grad)])
    assert float(drawn.mean()) == pytest.approx(float(true), abs=5 * float(drawn.std()) / DRAWS**0.5)
    assert float(true) > 1.19


def test_the_draw_repeats_by_step_and_differs_by_step_rank_seed_and_layer() -> None:
    torch.manual_seed(0)
    module, x, grad = nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 7, 6), torch.randn(2, 6, 7, 6)
    found: dict[str, Tensor] = {}
    for name in ("first", "again", "step", "rank", "seed", "index"):
        layer, report = converted(module)
        if name == "index":
            layer.int8.index = 1
        elif name not in ("first", "again"):
            setattr(report.context, name, 1)
        found[name] = run(layer, x, grad).dw
    assert torch.equal(found["first"], found.pop("again"))
    names = list(found)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            assert not torch.equal(found[one], found[other]), (one, other)


def test_two_backward_passes_within_a_step_draw_differently() -> None:
    """A head shared by the levels of a pyramid, or gradient accumulation."""
    torch.manual_seed(0)
    layer, _ = converted(nn.Conv2d(4, 6, 3, padding=1))
    x, grad = torch.randn(2, 4, 7, 6), torch.randn(2, 6, 7, 6)
    first, second = run(layer, x, grad).dw, run(layer, x, grad).dw
    assert not torch.equal(first, second)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_which_scale_structure_errs_least(rounding: str) -> None:
    torch.manual_seed(0)
    module, x = nn.Conv2d(16, 64, 3, padding=1, bias=False), torch.randn(4, 16, 14, 14)
    even = torch.randn(4, 64, 14, 14)
    uneven = even * torch.exp(2 * torch.randn(64)).view(1, -1, 1, 1)
    found: dict[tuple[str, str, str], tuple[float, float]] = {}
    for kind, grad in (("even", even), ("uneven", uneven)):
        true = run(module, x, grad)
        for grad_input in ("folded", "global"):
            for grad_weight in ("channel", "tensor"):
                options = dict(grad_input=grad_input, grad_weight=grad_weight, rounding=rounding, signed="split")
                one = run(converted(module, **options)[0], x, grad)
                found[kind, grad_input, grad_weight] = error(one.dx, true.dx), error(one.dw, true.dw)
    assert found["uneven", "folded", "channel"][0] < 0.7 * found["uneven", "global", "channel"][0]
    assert found["uneven", "folded", "channel"][1] < 0.5 * found["uneven", "folded", "tensor"][1]
    assert found["uneven", "global", "channel"][1] < 0.5 * found["uneven", "global", "tensor"][1]
    # With alike channels there is nothing to gain but the scales of the weights.
    assert found["even", "folded", "channel"][0] == pytest.approx(found["even", "global", "channel"][0], rel=0.35)
    assert found["even", "folded", "channel"][1] == pytest.approx(found["even", "folded", "tensor"][1], rel=0.35)


def test_fewer_bits_err_more() -> None:
    torch.manual_seed(0)
    module, x, grad = nn.Linear(32, 24), torch.randn(300, 32), torch.randn(300, 24)
    true = run(module, x, grad)
    errors = [error(run(converted(module, grad_bits=bits)[0], x, grad).dw, true.dw) for bits in (8, 6, 4, 3, 2)]
    for fine, coarse in itertools.pairwise(errors):
        assert coarse > 1.5 * fine
    assert errors[0] < 0.04


def test_a_channel_of_an_inverted_t_is_followed_by_the_recursion_and_one_of_a_bell_by_its_maximum() -> None:
    generator = torch.Generator().manual_seed(0)
    module, x = nn.Conv2d(3, 2, 1, bias=False), torch.randn(4, 3, 40, 40, generator=generator)
    bell = torch.randn(4, 1, 40, 40, generator=generator)
    spiked = torch.rand(4, 1, 40, 40, generator=generator) < 0.01
    layer, report = converted(module, clip="paper")
    clip_C = None
    # The share beyond sigma takes sigma from the step before, so the bulk changes little here.
    for step, (size, spike) in enumerate([(1.0, 20), (1.05, 6), (1.1, 6)]):
        report.context.step = step
        grad = torch.cat([size * bell, torch.where(spiked, bell * spike, bell)], 1)
        run(layer, x, grad)
        amax_C = grad.abs().amax((0, 2, 3)).double().numpy()
        clip_C = amax_C if clip_C is None else np.array([amax_C[0], 0.2 * clip_C[1] + 0.8 * amax_C[1]])
        np.testing.assert_allclose(layer.int8.ranges[1, 40, 40].clip_C, clip_C, rtol=1e-6)
        assert layer.int8.ranges[1, 40, 40].bell_share == 0.5
    assert clip_C[1] > 1.03 * amax_C[1], "the tracker still remembers the first step"


@pytest.mark.parametrize("clip", ["closed_form", "histogram", "hindsight"])
def test_the_other_clipping_rules_train_too(clip: str) -> None:
    torch.manual_seed(0)
    module, x, grad = nn.Conv2d(8, 8, 3, padding=1), torch.randn(4, 8, 12, 12), torch.randn(4, 8, 12, 12)
    grad[:, 3] = 0
    layer, report = converted(module, clip=clip)
    for step in range(2):
        report.context.step = step
        found = run(layer, x, (1 + step) * grad)
        true = run(module, x, (1 + step) * grad)
        # The maximum of the step before is half of what it takes in the second.
        assert error(found.dw, true.dw) < (0.5 if clip == "hindsight" and step else 0.1)
        assert not found.dw[3].any()
    if clip == "hindsight":
        assert error(found.dw, true.dw) > 0.02
