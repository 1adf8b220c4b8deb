"""Margins against slow loops over their formulas, their derivatives against autograd, and the heads that use them."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from alimm.heads import CosineHead
from alimm.losses.margins import AdaFaceMargin, ArcFaceMargin, CombinedMargin, CosFaceMargin, margin_logits
from alimm.registry import MODELS
from alimm.structures import ClsDataSample

MARGINS = {
    "arc": lambda: ArcFaceMargin(0.5),
    "arc wide": lambda: ArcFaceMargin(3.0),
    "arc none": lambda: ArcFaceMargin(0.0),
    "cos": lambda: CosFaceMargin(0.35),
    "combined": lambda: CombinedMargin(1.0, 0.3, 0.2),
    "sphere": lambda: CombinedMargin(4.0),
    "all three": lambda: CombinedMargin(1.35, 0.3, 0.1),
    "ada": lambda: AdaFaceMargin(),
}


def slow_psi(margin, cosine, norm):
    """The formula in plain numbers, with the continuation of the module's docstring."""
    angle = math.acos(cosine)
    if isinstance(margin, AdaFaceMargin):
        mean, std = margin.norm_mean.item(), margin.norm_std.item()
        quality = max(-1.0, min(1.0, margin.h * (min(max(norm, 1e-3), 100.0) - mean) / (std + 1e-3)))
        factor, shift, less = 1.0, -margin.m * quality, margin.m * quality + margin.m
    else:
        factor, shift, less = margin.m1, margin.m2, margin.m3
    if factor * angle + shift < 0:
        return 1.0 - less
    if factor * angle + shift <= math.pi:
        return math.cos(factor * angle + shift) - less
    cut = math.pi - (math.pi - shift) / factor
    return cosine - max(cut * math.sin(cut), 1 - math.cos(cut)) - less


@pytest.mark.parametrize("name", MARGINS)
@given(st.lists(st.tuples(st.floats(-0.9999, 0.9999), st.floats(0, 400)), min_size=1, max_size=8))
def test_value_and_derivative_equal_the_formula(name, pairs):
    margin = MARGINS[name]()
    cosine, norms = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    value, slope = margin(cosine, norms)
    for index, (c, norm) in enumerate(pairs):
        assert value[index].item() == pytest.approx(slow_psi(margin, c, norm), abs=1e-9)
        step = 1e-7
        low, middle, high = (slow_psi(margin, c + shift, norm) for shift in (-step, 0, step))
        # Two points on one side of a corner or step of psi; there only one of the two one-sided differences fits.
        errors = [abs(difference / step - slope[index].item()) for difference in (middle - low, high - middle)]
        assert min(errors) < 1e-3 * max(1.0, slope[index].item())


@pytest.mark.parametrize("name", MARGINS)
def test_gradcheck_of_the_logits(name):
    generator = torch.Generator().manual_seed(3)
    cosine = (torch.rand(6, 5, generator=generator, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()
    labels = torch.tensor([0, 4, 2, 2, -100, 9])
    norms = torch.rand(6, generator=generator, dtype=torch.float64) * 100
    scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    margin = MARGINS[name]()
    assert torch.autograd.gradcheck(lambda c, s: margin_logits(c, labels, margin, s, norms), (cosine, scale))


def test_arcface_equals_autograd_of_the_plain_formula():
    cosine = torch.linspace(-0.8, 0.99, 101, dtype=torch.float64, requires_grad=True)
    expected = torch.cos(torch.acos(cosine) + 0.5)
    (derivative,) = torch.autograd.grad(expected.sum(), cosine)
    value, slope = ArcFaceMargin(0.5)(cosine)
    assert torch.allclose(value, expected, atol=1e-14)
    assert torch.allclose(slope, derivative, atol=1e-12)
    beyond = torch.tensor([-0.95], dtype=torch.float64)
    value, slope = ArcFaceMargin(0.5)(beyond)
    assert value.item() == pytest.approx(-0.95 - 0.5 * math.sin(0.5))
    assert slope.item() == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MARGINS)
def test_finite_and_never_falling_on_the_whole_range(name, dtype):
    """Also a little outside of it, where rounding puts the cosine of a vector with itself."""
    cosine = torch.cat([-1 - torch.logspace(-7, -12, 6), torch.linspace(-1, 1, 4001), 1 + torch.logspace(-12, -7, 6)])
    cosine = cosine.to(dtype).sort().values
    margin = MARGINS[name]()
    lengths = (0.0, 20.0, 60.0, 1e4) if margin.needs_norms else (1.0,)
    for length in lengths:
        norms = torch.full_like(cosine, length)
        value, slope = margin(cosine, norms)
        assert value.dtype == slope.dtype == torch.promote_types(dtype, torch.float32)
        assert bool(value.isfinite().all())
        assert bool(slope.isfinite().all())
        assert bool((value.diff() >= -1e-6).all())
        # Only AdaFace is flat, where a long feature is nearer to its class than its margin.
        assert bool((slope >= 0).all() if margin.needs_norms else (slope > 0).all())


@given(st.floats(1, 3), st.floats(0, 3.1), st.floats(0, 1), st.integers(0, 999))
def test_a_margin_never_raises_the_logit_and_never_turns_back(m1, m2, m3, seed):
    margin = CombinedMargin(m1, m2, m3)
    cosine = torch.rand(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(2).sub(1)
    cosine = torch.cat([cosine, torch.tensor([-1.0, 1.0], dtype=torch.float64)]).sort().values
    value, slope = margin(cosine)
    assert bool((value <= cosine + 1e-5).all())
    assert bool((value.diff() >= -1e-12).all())
    assert bool((slope > 0).all())


def test_ends_are_tangents_with_a_derivative_that_fits():
    for end in (1.0, -1.0):
        cosine = torch.tensor([end - 5e-7 * end, end], dtype=torch.float64)
        value, slope = ArcFaceMargin(0.5)(cosine)
        assert ((value[1] - value[0]) / (cosine[1] - cosine[0])).item() == pytest.approx(slope[1].item(), rel=1e-6)
    assert ArcFaceMargin(0.5)(torch.tensor([1.0]))[0].item() == pytest.approx(math.cos(0.5), abs=1.5e-3)


def test_names_of_one_family_agree():
    cosine = torch.linspace(-1, 1, 77)
    for one, other in [
        (ArcFaceMargin(0.4), CombinedMargin(1, 0.4, 0)),
        (CosFaceMargin(0.4), CombinedMargin(m3=0.4)),
    ]:
        assert all(torch.equal(a, b) for a, b in zip(one(cosine), other(cosine), strict=True))
    value, slope = CombinedMargin()(cosine)
    assert torch.equal(value, cosine)
    assert torch.equal(slope, torch.ones(77))


def test_easy_margin_leaves_far_classes_alone():
    cosine = torch.tensor([-0.5, 0.0, 0.5])
    value, slope = ArcFaceMargin(0.5, easy=True)(cosine)
    hard = ArcFaceMargin(0.5)(cosine)
    assert value.tolist()[:2] == [-0.5, 0.0]
    assert slope.tolist()[:2] == [1.0, 1.0]
    assert value[2] == hard[0][2]
    assert slope[2] == hard[1][2]


def test_adaface_turns_from_arcface_to_cosface_with_quality():
    """q = 0 is CosFace with m; q = -1 is cos(t + m), a margin on the angle alone."""
    margin, cosine = AdaFaceMargin(m=0.4), torch.linspace(-0.8, 0.9, 9, dtype=torch.float64)
    margin.norm_mean.fill_(50.0)
    margin.norm_std.fill_(1.0)
    average = margin(cosine, torch.full_like(cosine, 50.0))[0]
    assert torch.allclose(average, cosine - 0.4)
    blurred = margin(cosine, torch.full_like(cosine, 1.0))[0]
    assert torch.allclose(blurred, torch.cos(torch.acos(cosine) + 0.4))
    clear = margin(cosine, torch.full_like(cosine, 99.0))[0]
    assert torch.allclose(clear, torch.cos((torch.acos(cosine) - 0.4).clamp(min=0)) - 0.8)


@given(st.lists(st.lists(st.floats(0, 200), max_size=6), max_size=5), st.floats(0.01, 1))
def test_adaface_keeps_moving_averages(batches, alpha):
    margin, mean, std = AdaFaceMargin(t_alpha=alpha), 20.0, 100.0
    for batch in batches:
        margin.update(torch.tensor([*batch, math.nan, math.inf]))
        clipped = [min(max(norm, 1e-3), 100.0) for norm in batch]
        if clipped:
            average = sum(clipped) / len(clipped)
            mean = alpha * average + (1 - alpha) * mean
        if len(clipped) > 1:
            spread = math.sqrt(sum((norm - average) ** 2 for norm in clipped) / (len(clipped) - 1))
            std = alpha * spread + (1 - alpha) * std
    assert margin.norm_mean.item() == pytest.approx(mean, abs=1e-4)
    assert margin.norm_std.item() == pytest.approx(std, abs=1e-4)
    copy = AdaFaceMargin()
    copy.load_state_dict(margin.state_dict())
    assert torch.equal(copy.norm_mean, margin.norm_mean)


@pytest.mark.parametrize("name", MARGINS)
def test_no_sample_is_no_error(name):
    margin = MARGINS[name]()
    margin.update(torch.zeros(0))
    value, slope = margin(torch.zeros(0), torch.zeros(0))
    assert value.shape == slope.shape == (0,)
    assert margin_logits(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), margin, 2.0, torch.zeros(0)).shape == (
        0,
        3,
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda: ArcFaceMargin(-0.1),
        lambda: ArcFaceMargin(4.0),
        lambda: ArcFaceMargin(math.nan),
        lambda: CosFaceMargin(-1),
        lambda: CombinedMargin(0.5),
        lambda: AdaFaceMargin(m=2.0),
        lambda: AdaFaceMargin(h=0.0),
        lambda: AdaFaceMargin(t_alpha=1.5),
    ],
)
def test_impossible_constants_are_refused(build):
    with pytest.raises(ValueError, match="needs m"):
        build()


def test_missing_norms_are_told():
    with pytest.raises(ValueError, match=r"AdaFaceMargin needs the length of each feature, shape \(2,\), got none"):
        AdaFaceMargin()(torch.zeros(2))
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        AdaFaceMargin()(torch.zeros(2), torch.ones(3))


def samples(labels):
    return [ClsDataSample().set_gt_label(label) for label in labels]


@pytest.mark.parametrize("name", ["alimm.ArcFaceMargin", "alimm.CosFaceMargin", "alimm.AdaFaceMargin"])
def test_cosine_head_trains_with_a_margin_and_predicts_without(name):
    torch.manual_seed(0)
    head = CosineHead(5, 4, scale=8.0, margin=dict(type=name), topk=(1,))
    plain = CosineHead(5, 4, scale=8.0, topk=(1,))
    plain.load_state_dict(head.state_dict(), strict=False)
    x, labels = torch.randn(7, 4), [0, 1, 2, 3, 4, 0, 1]
    result = head.loss(x, samples(labels))
    cosine = F.cosine_similarity(x[:, None].double(), head.weight[None].double(), dim=2)
    logits = 8 * cosine
    for row, label in enumerate(labels):
        logits[row, label] = 8 * slow_psi(head.margin, cosine[row, label].item(), x[row].norm().item())
    assert result["loss"].item() == pytest.approx(F.cross_entropy(logits, torch.tensor(labels)).item(), abs=1e-4)
    reference = plain.loss(x, samples(labels))
    assert result["loss"] > reference["loss"]
    assert result["accuracy_top1"] == reference["accuracy_top1"]
    assert torch.equal(head(x), plain(x))
    result["loss"].backward()
    assert head.weight.grad.abs().sum() > 0


def test_cosine_head_updates_the_averages_in_training_only():
    head = CosineHead(3, 4, margin=dict(type="alimm.AdaFaceMargin", t_alpha=1.0)).eval()
    x = torch.randn(5, 4) * 30
    head.loss(x, samples([0, 1, 2, 0, 1]))
    assert head.margin.norm_mean.item() == 20
    head.train().loss(x, samples([0, 1, 2, 0, 1]))
    assert head.margin.norm_mean.item() == pytest.approx(x.norm(dim=1).clamp(max=100).mean().item(), rel=1e-5)


def averages_of_a_rank():
    rank = dist.get_rank()
    head = CosineHead(3, 4, margin=dict(type="alimm.AdaFaceMargin", t_alpha=1.0))
    x = torch.arange(1.0, 5.0)[: 3 - 2 * rank, None].repeat(1, 4) * (rank + 1)
    head.loss(x, samples([0] * len(x)))
    return head.margin.norm_mean.item(), head.margin.norm_std.item()


def test_averages_are_those_of_the_global_batch(gloo):
    """Rank 0 has vectors of length 2, 4 and 6, rank 1 one of length 4."""
    lengths = torch.tensor([2.0, 4.0, 6.0, 4.0])
    first, second = gloo.run(2, averages_of_a_rank)
    assert first == second
    assert first == pytest.approx((lengths.mean().item(), lengths.std().item()), rel=1e-6)


def test_margins_are_found_by_name():
    for name in ("ArcFaceMargin", "CosFaceMargin", "CombinedMargin", "AdaFaceMargin"):
        margin = MODELS.build(dict(type=f"alimm.{name}"))
        assert margin.needs_norms == (name == "AdaFaceMargin")


def test_logits_in_half_precision_are_computed_in_single():
    cosine = torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16)
    logits = margin_logits(cosine, torch.tensor([0]), CosFaceMargin(0.35), 64.0)
    assert logits.dtype == torch.float32
    assert logits.tolist()[0] == pytest.approx([64 * 0.15, 16.0], abs=1e-5)


def test_a_row_without_a_class_does_not_shift_the_norms_of_the_others():
    margin = AdaFaceMargin()
    cosine = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64)
    logits = margin_logits(cosine, torch.tensor([-100, 1]), margin, 1.0, torch.tensor([1e-3, 80.0]))
    assert logits[0].tolist() == cosine[0].tolist()
    assert logits[1, 1].item() == pytest.approx(slow_psi(margin, 0.4, 80.0))
