"""A converted layer under whatever a model does to it: odd inputs, bad numbers, checkpointing, compilation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from alimm.projects.int8_training import convert
from tests.projects.int8_training.single_layer import converted, error, example, run


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (9, 8)),
        (lambda: nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode="reflect", stride=2), (9, 8)),
        (lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="replicate", dilation=2), (9, 8)),
        (lambda: nn.Conv2d(4, 6, 3, padding="same"), (9, 8)),
        (lambda: nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(1, 3)), (9, 8)),
        (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (9, 8)),
        (lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"), (11,)),
        (lambda: nn.Conv3d(4, 6, 3, padding=1, padding_mode="replicate"), (4, 5, 6)),
    ],
)
def test_every_padding(make: Callable[[], nn.Module], size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, x = make(), torch.randn(3, 4, *size)
    grad = torch.randn_like(module(x))
    found, true = run(converted(module)[0], x, grad), run(module, x, grad)
    for field in ("y", "dx", "dw", "db"):
        assert error(getattr(found, field), getattr(true, field)) < 0.04, field
    assert error(found.y, true.y) > 1e-4, "it ran in INT8"


@pytest.mark.parametrize("products", [("output", "grad_input", "grad_weight"), ("grad_weight",), ()])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(5, 3), (0, 5)),
        (lambda: nn.Conv2d(5, 3, 3), (0, 5, 7, 7)),
        (lambda: nn.Linear(5, 3), (2, 0, 5)),
    ],
)
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(
    make: Callable[[], nn.Module], shape: tuple[int, ...], products: tuple[str, ...]
) -> None:
    module, x = make(), torch.zeros(shape)
    layer, _ = converted(module, products=products)
    grad = torch.zeros_like(module(x))
    found, true = run(layer, x, grad), run(module, x, grad)
    for field in ("y", "dx", "dw", "db"):
        assert torch.equal(getattr(found, field), getattr(true, field)), field
    assert not layer.int8.ranges


def test_channels_without_gradient_and_tensors_of_zeros() -> None:
    module, x, grad = example("conv2d")
    grad[:, 2] = 0
    layer, report = converted(module)
    first = run(layer, x, grad)
    assert not first.dw[2].any()
    assert first.db[2] == 0
    assert first.dw[3].any()
    report.context.step = 1
    for zero_x, zero_grad in ((0, 1), (1, 0), (0, 0)):
        found, true = run(layer, x * zero_x, grad * zero_grad), run(module, x * zero_x, grad * zero_grad)
        for field in ("y", "dx", "dw", "db"):
            one, other = getattr(found, field), getattr(true, field)
            assert torch.isfinite(one).all()
            assert float((one - other).norm()) <= 0.05 * float(other.norm()), field
    with torch.no_grad():
        layer.weight.zero_()
    found = run(layer, x, grad)
    assert not found.dx.any()
    assert torch.equal(found.y, layer.bias.detach().view(1, -1, 1, 1).expand_as(found.y))


@pytest.mark.parametrize("clip", ["max", "paper", "hindsight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["conv2d", "linear", "depthwise"])
def test_a_gradient_that_is_not_finite_passes_on_and_leaves_the_state(name: str, bad: float, clip: str) -> None:
    module, x, grad = example(name)
    layer, report = converted(module, clip=clip)
    run(layer, x, grad)
    before = copy.deepcopy(dict(layer.int8.ranges))
    report.context.step = 1
    broken = grad.clone()
    broken.view(-1)[5] = bad
    found, true = run(layer, x, broken), run(module, x, broken)
    for field in ("dx", "dw", "db"):
        one, other = getattr(found, field), getattr(true, field)
        if other is None:
            continue
        assert not torch.isfinite(one).all(), field
        if field != "dw":  # the loss scaler skips the step whatever else is in it
            assert torch.equal(torch.isfinite(one), torch.isfinite(other)), field
    after = layer.int8.ranges
    assert before.keys() == after.keys()
    for size in before:
        assert (before[size].clip_C == after[size].clip_C).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_input_or_weight_that_is_not_finite_passes_on(bad: float) -> None:
    module, x, grad = example("conv2d")
    layer, _ = converted(module)
    broken = x.clone()
    broken[0, 1, 2, 3] = bad
    found, true = run(layer, broken, grad), run(module, broken, grad)
    assert torch.equal(torch.isfinite(found.y), torch.isfinite(true.y))
    assert not torch.isfinite(found.dw).all()
    assert layer.int8.activation_amax == 0
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = bad
    found = run(layer, x, grad)
    assert not torch.isfinite(found.y).all()
    assert not torch.isfinite(found.dx).all()


def test_strides_do_not_change_a_bit() -> None:
    module, x, grad = example("conv2d")
    wide = torch.randn(3, 6, 18, 8)
    wide[:, :, ::2] = x
    turned = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    true = run(converted(module)[0], x, grad)
    inputs = [x.contiguous(memory_format=torch.channels_last), wide[:, :, ::2], turned]
    grads = [
        grad.contiguous(memory_format=torch.channels_last),
        grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ]
    for one in [x, *inputs]:
        for g in [grad, *grads]:
            found = run(converted(module)[0], one, g)
            for field in ("y", "dx", "dw", "db"):
                assert torch.equal(getattr(found, field), getattr(true, field)), field
    layer = converted(module)[0].to(memory_format=torch.channels_last)
    found = run(layer, x, grad)
    assert torch.equal(found.dw, true.dw)
    assert torch.equal(found.y, true.y)


def test_expanded_tensors_are_read_right() -> None:
    module, x, _ = example("conv2d")
    layer = converted(module, rounding="nearest")[0]
    one = x[:1, :, :1].expand(3, 6, 9, 8)
    y_shape = (3, 8, 9, 8)
    grad = torch.randn(1, 8, 1, 1).expand(y_shape)  # what a sum or a mean sends back
    found, true = run(layer, one, grad), run(layer, one.contiguous(), grad.contiguous())
    for field in ("y", "dx", "dw", "db"):
        assert torch.equal(getattr(found, field), getattr(true, field)), field


@pytest.mark.parametrize("name", ["conv2d", "conv1d", "conv3d"])
def test_one_picture_without_a_batch_goes_the_stock_way(name: str) -> None:
    module, x, grad = example(name)
    found, true = run(converted(module)[0], x[0], grad[0]), run(module, x[0], grad[0])
    assert torch.equal(found.y, true.y)
    assert torch.equal(found.dw, true.dw)


def test_one_vector_without_a_batch() -> None:
    module, x, grad = example("linear")
    found, true = run(converted(module)[0], x[0], grad[0]), run(module, x[0], grad[0])
    for field in ("y", "dx", "dw", "db"):
        assert getattr(found, field).shape == getattr(true, field).shape
        assert error(getattr(found, field), getattr(true, field)) < 0.04


def test_other_types_of_numbers() -> None:
    module, x, grad = example("conv2d")
    double = copy.deepcopy(module).double()
    found, true = run(converted(double)[0], x.double(), grad.double()), run(double, x.double(), grad.double())
    assert torch.equal(found.dw, true.dw), "float64 was asked for, so float64 it is"
    half = copy.deepcopy(module).bfloat16()
    found, true = run(converted(half)[0], x.bfloat16(), grad.bfloat16()), run(module, x, grad)
    for field in ("y", "dx", "dw", "db"):
        assert getattr(found, field).dtype == torch.bfloat16
        assert error(getattr(found, field), getattr(true, field)) < 0.04, field


def test_under_autocast_the_output_is_half_and_the_gradients_are_float32() -> None:
    module, x, grad = example("conv2d")
    layer, _ = converted(module)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(grad.bfloat16())
    true = run(module, x, grad)
    assert layer.weight.grad.dtype == x.grad.dtype == torch.float32
    assert error(layer.weight.grad, true.dw) < 0.04
    assert error(x.grad, true.dx) < 0.04


def test_evaluation_is_in_float32_unless_asked_for() -> None:
    module, x, _ = example("conv2d")
    layer = converted(module)[0].eval()
    with torch.no_grad():
        assert torch.equal(layer(x), module(x))
        int8 = converted(module, eval_int8=True)[0].eval()
        assert not torch.equal(int8(x), module(x))
        trained = converted(module, eval_int8=True)[0]
        assert torch.equal(int8(x), trained(x))
    assert not layer.int8.ranges
    assert layer.int8.activation_amax == 0


@pytest.mark.parametrize(("input_last", "weight_last"), [(False, False), (True, False), (False, True)])
def test_output_and_input_gradient_lie_in_memory_as_the_stock_layer_lays_them(input_last, weight_last) -> None:
    """mmcv's RoIAlign reads raw memory: a layout that the stock layer does not give scrambles what it sees."""
    strides = {}
    for kind in ("stock", "int8"):
        layer = torch.nn.Conv2d(8, 12, 3, stride=2, padding=1)
        layer = layer.to(memory_format=torch.channels_last) if weight_last else layer
        model = torch.nn.Sequential(torch.nn.Identity(), layer)
        if kind == "int8":
            assert convert(model, planner=False, strict_all=True).converted == ["1"]
        x = torch.randn(2, 8, 9, 7)
        x = (x.contiguous(memory_format=torch.channels_last) if input_last else x).requires_grad_()
        y = model(x)
        (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
        strides[kind] = y.stride(), grad.stride()
    assert strides["int8"] == strides["stock"]
