"""The integer products of every backend equal sums in exact arithmetic, bit for bit, for every shape of layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from alimm.projects.int8_training import onednn, products, state
from alimm.projects.int8_training.fake import FakeProducts
from alimm.projects.int8_training.geometry import Geometry
from alimm.projects.int8_training.int_mm import IntMmProducts
from alimm.projects.int8_training.onednn import OneDnnProducts
from alimm.projects.int8_training.products import Products
from alimm.projects.int8_training.quantized import Stored
from alimm_ops.quantize import cpu_layout

WIDE = onednn.self_test() == "wide"
BACKENDS = [
    *([pytest.param(lambda: OneDnnProducts(wide=True), id="onednn-wide")] if WIDE else []),
    pytest.param(lambda: OneDnnProducts(wide=False), id="onednn-narrow"),
    pytest.param(IntMmProducts, id="int_mm"),
    pytest.param(FakeProducts, id="fake"),
]
# Dimensions, kernel, stride, padding, dilation, size of the input.
SHAPES: dict[str, tuple[int, Any, Any, Any, Any, Any]] = {
    "linear": (0, (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), (1, 1, 1)),
    "1x1": (2, (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), (1, 5, 7)),
    "1x1 stride 2": (2, (1, 1, 1), (1, 2, 2), (0, 0, 0), (1, 1, 1), (1, 7, 8)),
    "1x1 stride 3 padded": (2, (1, 1, 1), (1, 3, 3), (0, 1, 1), (1, 1, 1), (1, 9, 9)),
    "2x2 stride 4": (2, (1, 2, 2), (1, 4, 4), (0, 0, 0), (1, 1, 1), (1, 9, 9)),
    "3x3": (2, (1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), (1, 9, 8)),
    "3x3 stride 2": (2, (1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1), (1, 9, 8)),
    "3x3 dilated": (2, (1, 3, 3), (1, 1, 1), (0, 2, 2), (1, 2, 2), (1, 9, 8)),
    "3x2 all different": (2, (1, 3, 2), (1, 2, 3), (0, 0, 1), (1, 1, 2), (1, 9, 8)),
    "5x5": (2, (1, 5, 5), (1, 1, 1), (0, 2, 2), (1, 1, 1), (1, 9, 8)),
    "7x7 stride 2": (2, (1, 7, 7), (1, 2, 2), (0, 3, 3), (1, 1, 1), (1, 13, 11)),
    "1d": (1, (1, 1, 3), (1, 1, 2), (0, 0, 1), (1, 1, 1), (1, 1, 15)),
    "3x3x3": (3, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), (4, 6, 5)),
    "3x1x1 stride 2": (3, (3, 1, 1), (2, 1, 1), (1, 0, 0), (1, 1, 1), (4, 6, 5)),
    "1x3x3 stride 2": (3, (1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1), (4, 6, 5)),
}
# Input channels, output channels, groups.
CHANNELS = [(8, 16, 1), (3, 5, 1), (1, 2, 1), (6, 10, 2), (8, 8, 8)]
# Zero point, and the lowest and the highest byte: without negatives, signed, and signed in 7 bits.
STORAGES = [(0, 0, 127), (128, 1, 255), (64, 1, 127)]


Case = tuple[Geometry, Any, Stored, torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]
"""Layer, size of the input, input, weight, gradient of the output, and what `oracle` says."""


def oracle(x: Stored, weight: torch.Tensor, grad: torch.Tensor, layer: Geometry) -> tuple[torch.Tensor, ...]:
    """Output, dX and dW of the integers, by torch in float64: exact, since no sum comes near 2^53."""
    x_ = (x.bytes.double() - x.zero_point).permute(0, 4, 1, 2, 3).requires_grad_()
    w_ = weight.double().reshape(*weight.shape[:2], *layer.kernel).requires_grad_()
    y = F.conv3d(x_, w_, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    y.backward(grad.double().permute(0, 4, 1, 2, 3))
    assert x_.grad is not None
    assert w_.grad is not None
    return y.detach().permute(0, 2, 3, 4, 1), x_.grad.permute(0, 2, 3, 4, 1), w_.grad.flatten(2)


def transposed(weight: torch.Tensor, layer: Geometry) -> torch.Tensor:
    """The same integers in the layout of the input gradient."""
    w_OIK = weight.float().reshape(*weight.shape[:2], -1).numpy()
    one_O, one_I = np.ones(layer.out_channels, np.float32), np.ones(layer.in_channels, np.float32)
    q = cpu_layout.transpose_weight(w_OIK, one_O, one_I, 127, layer.phases.taps_PJ, layer.groups)
    return torch.from_numpy(q)


def check(backend: Products, case: Case) -> None:
    layer, size, x, weight, grad, true = case
    one_O, one_I = np.ones(layer.out_channels, np.float32), np.ones(layer.in_channels, np.float32)
    stored = Stored((grad.short() + 128).to(torch.uint8), 128, 1.0)
    found = (
        backend.output(x, weight, one_O, None, layer),
        backend.grad_input(stored, transposed(weight, layer), one_I, size, layer),
        backend.grad_weight(x, grad.reshape(-1, layer.out_channels), one_O, layer),
    )
    for name, one, expected in zip(("output", "dX", "dW"), found, true, strict=True):
        assert one.dtype == torch.float32
        assert one.shape == expected.shape, name
        assert torch.equal(one, expected.float()), (name, layer, x.zero_point)


def integers(low: int, high: int, shape: Any, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def weight_shape(layer: Geometry) -> tuple[int, ...]:
    kernel = () if layer.ndim == 0 else layer.kernel[3 - layer.ndim :]
    return layer.out_channels, layer.in_channels // layer.groups, *kernel


@cache
def random_cases(name: str) -> list[Case]:
    ndim, kernel, stride, padding, dilation, size = SHAPES[name]
    cases: list[Case] = []
    for turn, (inputs, outputs, groups) in enumerate(CHANNELS[:3] if ndim == 0 else CHANNELS):
        layer = Geometry(ndim, inputs, outputs, kernel, stride, padding, dilation, groups)
        weight = integers(-127, 127, weight_shape(layer), torch.int8, 0)
        # Every storage for the commonest shapes; the others take turns.
        every = name in ("linear", "1x1", "3x3")
        for count, (zero_point, low, high) in list(zip((1, 3, 2), STORAGES, strict=True))[0 if every else turn % 3 :]:
            if len(cases) > turn and not every:
                break
            x = Stored(integers(low, high, (count, *size, inputs), torch.uint8, 1), zero_point, 1.0)
            grad = integers(-127, 127, (count, *layer.output_size(size), outputs), torch.int8, 2)
            cases.append((layer, size, x, weight, grad, oracle(x, weight, grad, layer)))
    return cases


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("make", BACKENDS)
def test_products_equal_exact_sums(make: Callable[[], Products], name: str) -> None:
    for case in random_cases(name):
        check(make(), case)


@pytest.mark.parametrize("make", BACKENDS)
def test_steps_and_bias_reach_the_right_channels(make: Callable[[], Products]) -> None:
    layer, size = Geometry(2, 6, 4, (1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1), 2), (1, 7, 6)
    x = Stored(integers(1, 255, (2, *size, 6), torch.uint8, 1), 128, 0.5)
    weight, bias = integers(-127, 127, (4, 3, 3, 3), torch.int8, 0), torch.tensor([1.0, -2.0, 4.0, 0.5])
    grad = integers(-127, 127, (2, *layer.output_size(size), 4), torch.int8, 2)
    step_O, step_I = np.float32([1, 2, 4, 8]), np.float32([1, 2, 4, 8, 16, 32])  # powers of two: nothing is rounded
    y, dx, dw = oracle(x, weight, grad, layer)
    backend = make()
    assert torch.equal(backend.output(x, weight, step_O, bias, layer), (y * 0.5 * torch.tensor(step_O)).float() + bias)
    stored = Stored((grad.short() + 128).to(torch.uint8), 128, 0.25)
    got = backend.grad_input(stored, transposed(weight, layer), step_I, size, layer)
    assert torch.equal(got, (dx * 0.25 * torch.tensor(step_I)).float())
    got = backend.grad_weight(x, grad.reshape(-1, 4), step_O, layer)
    assert torch.equal(got, (dw * 0.5 * torch.tensor(step_O)[:, None, None]).float())


def patterns(shape: Any, low: int, high: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """All high, all low, alternating along the channels, and pairs of each: what saturates an int16 first."""
    index = torch.arange(int(np.prod(shape))).reshape(shape)
    masks = (index >= 0, index < 0, index % 2 == 0, index % 4 < 2)
    return [torch.where(mask, high, low).to(dtype) for mask in masks]


@cache
def saturating_cases(name: str) -> list[Case]:
    ndim, kernel, stride, padding, dilation, size = SHAPES[name]
    layer = Geometry(ndim, 16, 8, kernel, stride, padding, dilation, 1)
    cases: list[Case] = []
    for zero_point, low, high in STORAGES:
        for bytes_, weight, grad in zip(
            patterns((1, *size, 16), low, high, torch.uint8),
            patterns(weight_shape(layer), -127, 127, torch.int8),
            patterns((1, *layer.output_size(size), 8), -127, 127, torch.int8),
            strict=True,
        ):
            x = Stored(bytes_, zero_point, 1.0)
            cases.append((layer, size, x, weight, grad, oracle(x, weight, grad, layer)))
            other = -weight
            cases.append((layer, size, x, other, grad, oracle(x, other, grad, layer)))
    return cases


@pytest.mark.parametrize("make", BACKENDS)
@pytest.mark.parametrize("name", ["linear", "1x1", "3x3", "3x1x1 stride 2"])
def test_the_patterns_that_saturate_first_are_exact(make: Callable[[], Products], name: str) -> None:
    for case in saturating_cases(name):
        check(make(), case)


def saturating_mm(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """``_int_mm`` as processors without VNNI compute it: neighbours are added in an int16 that saturates."""
    products = a_MK.int()[:, :, None] * b_KN.int()[None]
    pairs = F.pad(products, (0, 0, 0, products.shape[1] % 2)).unflatten(1, (-1, 2)).sum(2)
    return pairs.clamp(-32768, 32767).sum(1, dtype=torch.int32)


def test_the_self_test_refuses_what_is_inexact(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = onednn.self_test.__wrapped__
    assert fresh() in ("wide", "narrow")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_int_mm", saturating_mm)
        assert fresh() == "narrow"
        patch.setattr(torch, "_int_mm", lambda a, b: saturating_mm(a, b) + 1)
        assert fresh() == "none"
        patch.delattr(torch, "_int_mm")
        assert fresh() == "none"
    monkeypatch.setattr(state, "self_test", lambda: "none")
    with pytest.raises(ValueError, match="Use backend='int_mm'"):
        state._make_products("onednn", torch.device("cpu"))
    assert state._make_products("auto", torch.device("cpu")).name == "int_mm"


@pytest.mark.parametrize("make", [lambda: OneDnnProducts(wide=False), IntMmProducts], ids=["onednn-narrow", "int_mm"])
def test_no_operand_saturates_where_the_processor_would(
    make: Callable[[], Products], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrix products by an emulated processor; what the convolutions get is held against the bound."""
    seen: list[int] = []
    pack = torch.ops.onednn.qconv_prepack

    def packing(weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(int(weight.int().abs().max()))
        return pack(weight, *rest)

    def watched(operator: Any) -> Callable[..., torch.Tensor]:
        def run(source: torch.Tensor, *rest: Any) -> torch.Tensor:
            assert 2 * int(source.max()) * seen[-1] <= 32767
            return operator(source, *rest)

        return run

    monkeypatch.setattr(torch, "_int_mm", saturating_mm)
    monkeypatch.setattr(torch.ops.onednn, "qconv_prepack", packing)
    for name in ("qconv2d_pointwise", "qconv3d_pointwise"):
        monkeypatch.setattr(torch.ops.onednn, name, watched(getattr(torch.ops.onednn, name)))
    for name in ("linear", "1x1", "3x3", "3x1x1 stride 2"):
        for case in [*random_cases(name)[:3], *saturating_cases(name)]:
            check(make(), case)
    assert seen or make().name == "int_mm"


def test_a_convolution_whose_sums_may_overflow_is_not_offered() -> None:
    for wide, longest in ((False, 133_144), (True, 66_311)):
        assert products.longest_sum(wide) == longest
        assert longest * (255 if wide else 127) * 127 <= 2**31 - 1 < (longest + 1) * (255 if wide else 127) * 127
        for extra in (0, 1):
            layer = Geometry(2, longest + extra, 4, (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1)
            assert products.fits(layer, "output", wide) == (not extra)
            assert products.fits(layer, "grad_input", wide)
            assert products.fits(layer, "grad_weight", wide)
    grouped = Geometry(2, 8, 400_000, (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 4)
    assert products.fits(grouped, "output", True)
    assert not products.fits(grouped, "grad_input", True)
