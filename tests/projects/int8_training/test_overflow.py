"""Sums longer than an int32 holds, and matrices of one row or column, which torch's own product reads wrongly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from alimm.projects.int8_training import onednn
from alimm.projects.int8_training.geometry import Geometry
from alimm.projects.int8_training.int_mm import IntMmProducts, padded_mm
from alimm.projects.int8_training.onednn import OneDnnProducts
from alimm.projects.int8_training.products import Products, exact_mm
from alimm.projects.int8_training.quantized import Stored

WIDE = onednn.self_test() == "wide"
LENGTHS = [133_144, 133_145, 409_600, 500_000]
BACKENDS = [
    *([pytest.param(lambda: OneDnnProducts(wide=True), id="onednn-wide")] if WIDE else []),
    pytest.param(lambda: OneDnnProducts(wide=False), id="onednn-narrow"),
    pytest.param(IntMmProducts, id="int_mm"),
]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_product_of_the_largest_bytes_is_exact_at_any_length(length: int) -> None:
    a_MK = torch.full((2, length), 127, dtype=torch.uint8)
    b_KN = torch.full((length, 3), 127, dtype=torch.int8)
    b_KN[:, 1] = -127
    true = torch.tensor([[1, -1, 1]] * 2) * (length * 127 * 127)
    assert torch.equal(exact_mm(a_MK, b_KN, False).long(), true)
    assert torch.equal(exact_mm(a_MK.t().contiguous().t(), b_KN, False).long(), true), "of other strides"
    unsplit = torch._int_mm(a_MK, b_KN).long()
    assert torch.equal(unsplit, true) == (length == LENGTHS[0]), "the bound is sharp: one term more overflows"


@pytest.mark.skipif(not WIDE, reason="this processor takes no bytes above 127, which the tests above cover")
@pytest.mark.parametrize("length", [66_311, 66_312, 409_600])
def test_wide_bytes_are_split_sooner(length: int) -> None:
    a_MK = torch.full((2, length), 255, dtype=torch.uint8)
    b_KN = torch.full((length, 2), 127, dtype=torch.int8)
    assert (exact_mm(a_MK, b_KN, True).long() == length * 255 * 127).all()
    unsplit = torch._int_mm(a_MK, b_KN).long()
    assert bool((unsplit == length * 255 * 127).all()) == (length == 66_311)


@pytest.mark.parametrize("zero_point", [0, 64, 128])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("make", BACKENDS)
def test_the_weight_gradient_of_many_positions_is_exact(
    make: Callable[[], Products], length: int, zero_point: int
) -> None:
    layer = Geometry(2, 2, 3, (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1)
    top = 63 if zero_point == 64 else 127
    bytes_ = torch.full((1, 1, 1, length, 2), zero_point + top, dtype=torch.uint8)
    if zero_point:
        bytes_[..., 1] = 1  # stands for -top
    gradient = torch.full((length, 3), 127, dtype=torch.int8)
    gradient[:, 2] = -127
    dw = make().grad_weight(Stored(bytes_, zero_point, 1.0), gradient, np.ones(3, np.float32), layer)
    largest = length * top * 127
    second = -largest if zero_point else largest
    true = torch.tensor([[largest, second], [largest, second], [-largest, -second]])
    assert torch.equal(dw[:, :, 0], true.float())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("make", BACKENDS)
def test_the_weight_gradient_of_a_large_picture_is_exact(make: Callable[[], Products], groups: int) -> None:
    """A 3x3 kernel over 640 x 640: the borders make the sums of the taps differ."""
    height = width = 640
    layer = Geometry(2, 2, 2, (1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), groups)
    bytes_ = torch.full((1, 1, height, width, 2), 255, dtype=torch.uint8)
    gradient = torch.full((height * width, 2), -127, dtype=torch.int8)
    dw = make().grad_weight(Stored(bytes_, 128, 1.0), gradient, np.ones(2, np.float32), layer)
    rows = torch.tensor([height - 1, height, height - 1])
    columns = torch.tensor([width - 1, width, width - 1])
    true = (-127 * 127 * torch.outer(rows, columns)).reshape(-1)
    assert torch.equal(dw, true.float().expand(2, 2 // groups, 9))


def one_element_wide(strided: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((1, 9, 4), (9, 1, 4), (9, 4, 1), (1, 1, 4), (1, 9, 1), (9, 1, 1), (1, 1, 1), (16, 1, 16)):
        big_a = torch.randint(0, 128, (3 * m, 2 * k + 3), dtype=torch.uint8, generator=generator)
        big_b = torch.randint(-127, 128, (2 * k + 1, 3 * n), dtype=torch.int8, generator=generator)
        a, b = big_a[::3, 1 : k + 1], big_b[1 : k + 1, 2::3]
        found.append((a, b) if strided else (a.contiguous(), b.contiguous()))
        turned = big_a.t().contiguous().t()[::3, 1 : k + 1], big_b.t().contiguous().t()[1 : k + 1, 2::3]
        found.append(turned if strided else (a.t().contiguous().t(), b.t().contiguous().t()))
    return found


@pytest.mark.parametrize("strided", [False, True])
def test_matrices_of_one_row_or_column_are_read_right(strided: bool) -> None:
    for a_MK, b_KN in one_element_wide(strided):
        true = a_MK.long() @ b_KN.long()
        assert torch.equal(exact_mm(a_MK, b_KN, False).long(), true), (a_MK.shape, b_KN.shape)
        signed = (a_MK.short() - 64).to(torch.int8)
        assert torch.equal(padded_mm(signed, b_KN).long(), signed.long() @ b_KN.long())


def test_empty_matrices_multiply_to_zeros() -> None:
    for m, k, n in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        product = padded_mm(torch.zeros(m, k, dtype=torch.int8), torch.zeros(k, n, dtype=torch.int8))
        assert product.shape == (m, n)
        assert not product.any()


@pytest.mark.parametrize("make", BACKENDS)
@pytest.mark.parametrize(("count", "inputs", "outputs"), [(1, 1, 1), (1, 5, 1), (1, 1, 5), (7, 1, 1), (1, 3, 4)])
def test_layers_of_one_channel_or_one_row(make: Callable[[], Products], count: int, inputs: int, outputs: int) -> None:
    """What a linear layer gives for a batch of one, or a head with one output."""
    layer = Geometry(0, inputs, outputs, (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1)
    generator = torch.Generator().manual_seed(count + inputs + outputs)
    x = Stored(torch.randint(1, 256, (count, 1, 1, 1, inputs), dtype=torch.uint8, generator=generator), 128, 1.0)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    gradient = torch.randint(-127, 128, (count, outputs), dtype=torch.int8, generator=generator)
    signed = x.bytes.view(count, inputs).long() - 128
    one_O, one_I = np.ones(outputs, np.float32), np.ones(inputs, np.float32)
    backend = make()
    y = backend.output(x, weight, one_O, None, layer)
    assert torch.equal(y.view(count, outputs).long(), signed @ weight.t().long())
    dw = backend.grad_weight(x, gradient, one_O, layer)
    assert torch.equal(dw[:, :, 0].long(), gradient.t().long() @ signed)
    stored = Stored((gradient.short() + 128).to(torch.uint8).view(count, 1, 1, 1, outputs), 128, 1.0)
    dx = backend.grad_input(stored, weight.t().contiguous()[:, :, None], one_I, (1, 1, 1), layer)
    assert torch.equal(dx.view(count, inputs).long(), gradient.long() @ weight.long())
