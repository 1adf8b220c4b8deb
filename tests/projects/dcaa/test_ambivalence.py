from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from alimm.projects.dcaa import ambivalence
from alimm.projects.dcaa.discriminator import PixelDiscriminator

IGNORE = 255


def softmax(x: NDArray[Any], axis: int = 0) -> NDArray[Any]:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def random_outputs(seed: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    shape = (2, 4, 3, 5)
    logits = [2 * torch.randn(shape, generator=make) for _ in range(3)]
    mask = torch.randn(2, 3, 3, 5, generator=make).softmax(1)
    return logits, 2 * torch.randn(shape, generator=make), mask


@pytest.mark.parametrize("correlate", [True, False])
def test_pseudo_labels_pixel_by_pixel(correlate: bool) -> None:
    logits, fused, mask = random_outputs(0)
    tau = [0.3, 0.5, 0.6, 0.4]
    labels, prob = ambivalence.pseudo_labels(logits, fused, mask, tau, IGNORE, correlate)
    assert labels.dtype == torch.long
    kept = 0
    for n, y, x in np.ndindex(2, 3, 5):
        p = softmax(fused[n, :, y, x].numpy())
        if correlate:
            p = 0.5 * (sum(float(mask[n, k, y, x]) * softmax(logits[k][n, :, y, x].numpy()) for k in range(3)) + p)
        np.testing.assert_allclose(prob[n, :, y, x], p, rtol=1e-5)
        best = int(p.argmax())
        assert labels[n, y, x] == (best if p[best] > tau[best] else IGNORE)
        kept += p[best] > tau[best]
    assert 0 < kept < 30


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), order=st.permutations(range(3)), threshold=st.floats(0, 0.99))
def test_probabilities_sum_to_one_and_the_order_of_conditions_is_free(
    seed: int, order: list[int], threshold: float
) -> None:
    logits, fused, mask = random_outputs(seed)
    labels, prob = ambivalence.pseudo_labels(logits, fused, mask, threshold, IGNORE)
    torch.testing.assert_close(prob.sum(1), torch.ones(2, 3, 5))
    _, swapped = ambivalence.pseudo_labels([logits[k] for k in order], fused, mask[:, order], threshold, IGNORE)
    torch.testing.assert_close(swapped, prob)
    assert torch.equal(swapped.argmax(1), prob.argmax(1))
    assert bool(((prob.amax(1) > threshold) == (labels != IGNORE)).all())


def test_pseudo_labels_have_no_graph() -> None:
    logits, fused, mask = random_outputs(1)
    labels, prob = ambivalence.pseudo_labels(logits, fused.requires_grad_(), mask, torch.full((4,), 0.2), IGNORE)
    assert not prob.requires_grad
    assert not labels.requires_grad


def test_pseudo_labels_of_wrong_inputs() -> None:
    logits, fused, mask = random_outputs(2)
    with pytest.raises(ValueError, match=r"expected a mask \(2, 3, 3, 5\)"):
        ambivalence.pseudo_labels(logits, fused, mask[:, :2], 0.6, IGNORE)
    with pytest.raises(ValueError, match="one for each of the 4 classes"):
        ambivalence.pseudo_labels(logits, fused, mask, [0.6, 0.6], IGNORE)
    for wrong in [1.0, -0.1, [0.6, 0.6, math.nan, 0.6]]:
        with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
            ambivalence.pseudo_labels(logits, fused, mask, wrong, IGNORE)


def test_class_thresholds_are_quantiles_within_bounds() -> None:
    # Best class 0 with .62 .7 .8, class 1 with .95 .99, class 2 with .5, class 3 never.
    best = [(0, 0.62), (0, 0.8), (0, 0.7), (1, 0.95), (1, 0.99), (2, 0.5)]
    prob = torch.zeros(1, 4, 1, len(best))
    for x, (c, p) in enumerate(best):
        prob[0, :, 0, x] = (1 - p) / 3
        prob[0, c, 0, x] = p
    assert ambivalence.class_thresholds(prob, 0.5).tolist() == pytest.approx([0.7, 0.9, 0.6, 0.6])
    own = np.quantile([0.62, 0.8, 0.7], 0.8)
    result = ambivalence.class_thresholds(prob, 0.8, low=0.1, high=0.98)
    assert result.tolist() == pytest.approx([own, 0.98, 0.5, 0.1])
    for wrong in [dict(quantile=1.5), dict(low=0.9, high=0.6), dict(high=1.0)]:
        with pytest.raises(ValueError, match="expected a quantile"):
            ambivalence.class_thresholds(prob, **wrong)


def first_class_logit(prob: torch.Tensor) -> torch.Tensor:
    """A discriminator that works pixel by pixel: logit of the first class's probability."""
    return (prob[:, :1] / (1 - prob[:, :1])).log()


def test_ambivalence_of_a_pixelwise_discriminator_is_its_probability() -> None:
    logits = torch.tensor([[[0.3, 2.0], [-1.0, 0.0]], [[0.0, 0.5], [1.0, 0.0]]])[None].requires_grad_()
    d = ambivalence.ambivalence(logits, first_class_logit)
    expected = [[1 / (1 + math.exp(-x)) for x in row] for row in [[0.3, 1.5], [-2.0, 0.0]]]
    assert not d.requires_grad
    np.testing.assert_allclose(d[0], expected, rtol=1e-5)


def test_native_enlarges_what_the_discriminator_says() -> None:
    torch.manual_seed(0)
    net = PixelDiscriminator(3, (4, 4), num_strides=2)
    logits = torch.randn(2, 3, 12, 20)
    patches = torch.sigmoid(net(torch.softmax(logits, 1)))
    assert patches.shape == (2, 1, 3, 5)
    d = ambivalence.ambivalence(logits, net)
    torch.testing.assert_close(d, F.interpolate(patches, (12, 20), mode="bilinear", align_corners=False)[:, 0])
    # Pixel 2 of 4 a patch lies an eighth of the way from the first patch's centre to the second's.
    weight = 0.125
    row = patches[0, 0, 0] * (1 - weight) + patches[0, 0, 1] * weight
    np.testing.assert_allclose(d[0, 2, 2].item(), (row[0] * (1 - weight) + row[1] * weight).item(), rtol=1e-5)


def test_release_enlarges_the_logits_first() -> None:
    torch.manual_seed(0)
    net = PixelDiscriminator(3, (4, 4), num_strides=2)
    logits = 3 * torch.randn(2, 3, 4, 6)
    large = F.interpolate(logits, (16, 24), mode="bilinear", align_corners=True)
    expected = torch.sigmoid(net(torch.softmax(large, 1)))[:, 0]
    assert expected.shape == (2, 4, 6)
    torch.testing.assert_close(ambivalence.ambivalence(logits, net, "release", upsample=4), expected)
    assert not torch.allclose(ambivalence.ambivalence(logits, net), expected, atol=1e-4)
    other = ambivalence.ambivalence(logits, net, "release", upsample=8)
    assert other.shape == (2, 4, 6)


def test_ambivalence_is_high_for_source() -> None:
    logits = torch.zeros(1, 2, 4, 4)
    assert bool((ambivalence.ambivalence(logits, lambda prob: 4 + 0 * prob[:, :1]) > 0.9).all())
    with pytest.raises(ValueError, match="mode must be one of native, release"):
        ambivalence.ambivalence(logits, first_class_logit, "fast")


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), low=st.integers(0, 100), high=st.integers(0, 100))
def test_quantile_threshold(seed: int, low: int, high: int) -> None:
    d = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(seed))
    low, high = sorted((low, high))
    at = [ambivalence.resolve_threshold(d, f"q{q}").item() for q in (low, high)]
    assert at == pytest.approx([np.quantile(d.numpy(), q / 100) for q in (low, high)], abs=1e-6)
    assert at[0] <= at[1]
    labels = torch.zeros(2, 3, 5, dtype=torch.long)
    hard = [ambivalence.split(d, labels, t, IGNORE)[1] for t in at]
    assert bool((hard[0] <= hard[1]).all())


def test_thresholds_that_are_numbers_or_nonsense() -> None:
    d = torch.rand(1, 2, 2)
    for good in (0, 0.0, 0.25, 1):
        assert ambivalence.resolve_threshold(d, good).item() == good
    assert ambivalence.resolve_threshold(d, "q100").item() == d.max().item()
    for wrong in ("q101", "30", "q", "median", "q-3", -0.1, 1.5, math.nan, True):
        with pytest.raises(ValueError, match=r"number in \[0, 1\], or a percentage such as 'q30'"):
            ambivalence.resolve_threshold(d, wrong)


D = torch.tensor([[[0.9, 0.2], [0.5, 0.8]]])
LABELS = torch.tensor([[[1, 0], [0, IGNORE]]])


def test_worked_example() -> None:
    easy, hard = ambivalence.split(D, LABELS, 0.5, IGNORE)
    torch.testing.assert_close(easy, torch.tensor([[[0.9, 0.0], [0.0, 0.0]]]))
    assert hard.tolist() == [[[0, 1], [0, 1]]]
    easy, hard = ambivalence.split(D, LABELS, torch.tensor(0.3), IGNORE)
    torch.testing.assert_close(easy, torch.tensor([[[0.9, 0.0], [0.5, 0.0]]]))
    assert hard.tolist() == [[[0, 1], [0, 1]]]

    logits = torch.tensor([[[[0.0, 1.0], [2.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]]], requires_grad=True)
    total, count = ambivalence.easy_loss(logits, LABELS, easy)
    # -log softmax of class 1 in (0, 1), and of class 0 in (2, 0).
    expected = 0.9 * math.log(1 + math.exp(-1)) + 0.5 * math.log(1 + math.exp(-2))
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert count.item() == 2
    (total / (1 + count)).backward()
    assert logits.grad is not None
    assert (logits.grad.abs().sum(1) > 0).tolist() == [[[True, False], [True, False]]]


def test_threshold_zero_makes_hard_what_has_no_label() -> None:
    easy, hard = ambivalence.split(D, LABELS, 0.0, IGNORE)
    assert hard.tolist() == [[[0, 0], [0, 1]]]
    torch.testing.assert_close(easy, torch.tensor([[[0.9, 0.2], [0.5, 0.0]]]))


def test_all_ignored() -> None:
    labels = torch.full((1, 2, 2), IGNORE)
    easy, hard = ambivalence.split(D, labels, 0.5, IGNORE)
    assert easy.sum() == 0
    assert bool((hard == 1).all())
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    total, count = ambivalence.easy_loss(logits, labels, easy)
    assert total.item() == count.item() == 0
    (total / (1 + count)).backward()
    assert logits.grad is not None
    assert not logits.grad.any()
    with pytest.raises(ValueError, match="on one grid"):
        ambivalence.split(D, labels[:, :1], 0.5, IGNORE)


def test_easy_loss_weighs_classes_only_if_told() -> None:
    logits = torch.randn(1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    easy = torch.tensor([[[0.0, 0.0], [0.5, 0.0]]])
    plain, _ = ambivalence.easy_loss(logits, LABELS, easy)
    weighted, count = ambivalence.easy_loss(logits, LABELS, easy, class_weight=[20.0, 1.0])
    assert weighted.item() == pytest.approx(20 * plain.item())
    assert count.item() == 1
    with pytest.raises(ValueError, match="on one grid"):
        ambivalence.easy_loss(torch.zeros(1, 2, 4, 4), LABELS, easy)


@pytest.mark.parametrize("weight", [None, [1.0, 3.0, 0.5]])
def test_segmentation_loss_is_one_weighted_mean(weight: list[float] | None) -> None:
    torch.manual_seed(0)
    outputs = [torch.randn(2, 3, 3, 4), torch.randn(2, 3, 6, 7)]
    labels = torch.randint(0, 3, (2, 6, 7))
    labels[0, :3] = 250
    total, weights = ambivalence.segmentation_loss(outputs, labels, weight, ignore_index=250)
    per_class = weight or [1.0] * 3
    expected = expected_weights = 0.0
    for logits in outputs:
        large = F.interpolate(logits, (6, 7), mode="bilinear", align_corners=True).numpy()
        for n, y, x in np.ndindex(2, 6, 7):
            c = int(labels[n, y, x])
            if c != 250:
                expected -= per_class[c] * math.log(softmax(large[n, :, y, x])[c])
                expected_weights += per_class[c]
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert weights.item() == pytest.approx(expected_weights)
    stacked = torch.cat([F.interpolate(one, (6, 7), mode="bilinear", align_corners=True) for one in outputs])
    torch_mean = F.cross_entropy(
        stacked, torch.cat([labels, labels]), torch.tensor(per_class), ignore_index=250, reduction="mean"
    )
    assert (total / weights).item() == pytest.approx(torch_mean.item(), rel=1e-5)


@pytest.mark.parametrize("weight", [None, [1.0, 2.0]])
def test_segmentation_loss_of_ignored_pixels_is_a_zero_with_a_graph(weight: list[float] | None) -> None:
    logits = torch.randn(1, 2, 3, 3, requires_grad=True)
    total, weights = ambivalence.segmentation_loss([logits], torch.full((1, 6, 6), IGNORE), weight)
    assert total.item() == weights.item() == 0
    total.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_segmentation_loss_names_labels_that_are_no_class() -> None:
    logits = torch.zeros(1, 3, 2, 2)
    with pytest.raises(ValueError, match=r"in 0 \.\. 2 or 255 \(ignored\), got \[-1, 7, 250\]"):
        ambivalence.segmentation_loss([logits], torch.tensor([[[7, 250], [-1, 255]]]))
    with pytest.raises(ValueError, match="of the same images"):
        ambivalence.segmentation_loss([logits], torch.zeros(1, 1, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="a number for each of the 3 classes"):
        ambivalence.segmentation_loss([logits], torch.zeros(1, 2, 2, dtype=torch.long), [1.0])
