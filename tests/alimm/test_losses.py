"""The losses against slow loops over their formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alimm.losses import BalancedSoftmaxLoss, CrossEntropyLoss, SupConLoss
from alimm.losses.cross_entropy import cross_entropy


def slow_cross_entropy(logits, labels, weight=None, smooth=0.0, ignore=-100):
    total = norm = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        if label == ignore:
            continue
        partition = math.log(sum(math.exp(value) for value in row))
        target = [smooth / len(row) + (1 - smooth) * (c == label) for c in range(len(row))]
        w = 1.0 if weight is None else weight[label]
        total += w * -sum(q * (value - partition) for q, value in zip(target, row, strict=True))
        norm += w
    return total / norm if norm else 0.0


@given(st.integers(1, 6), st.integers(2, 7), st.floats(0, 0.9), st.integers(0, 9999), st.booleans())
def test_cross_entropy_equals_the_formula(samples, classes, smooth, seed, weighted):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(classes, (samples,), generator=generator)
    labels[torch.rand(samples, generator=generator) < 0.3] = -100
    weight = (torch.rand(classes, generator=generator, dtype=torch.float64) + 0.1) if weighted else None
    expected = slow_cross_entropy(logits, labels, None if weight is None else weight.tolist(), smooth)
    assert cross_entropy(logits, labels, weight, smooth).item() == pytest.approx(expected, abs=1e-10)


def test_all_ignored_gives_zero_and_a_zero_gradient():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = CrossEntropyLoss()(logits, torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(3, 4))


def test_half_precision_is_computed_in_single():
    logits = torch.tensor([[60.0, 0.0]], dtype=torch.float16)
    loss = CrossEntropyLoss()(logits, torch.tensor([1]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(60.0)


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_that_names_no_class_is_refused(label):
    with pytest.raises(ValueError, match=rf"label {label} in row 1 .* \[0, 5\)"):
        CrossEntropyLoss()(torch.zeros(2, 5), torch.tensor([0, label]))


def test_class_weight_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 values, but the head gives 3"):
        CrossEntropyLoss(class_weight=[1, 2])(torch.zeros(1, 3), torch.tensor([0]))


@given(st.floats(0, 2), st.integers(0, 9999))
def test_balanced_softmax_equals_the_formula(exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 500, (6,), generator=generator)
    logits, labels = torch.randn(4, 6, generator=generator), torch.randint(6, (4,), generator=generator)
    shifted = logits.double() + exponent * counts.clamp(min=1).double().log()
    loss = BalancedSoftmaxLoss(class_counts=counts.tolist(), exponent=exponent)(logits, labels)
    assert loss.item() == pytest.approx(slow_cross_entropy(shifted, labels), abs=1e-4)


def test_balanced_softmax_with_equal_counts_is_cross_entropy():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert torch.allclose(BalancedSoftmaxLoss([7, 7, 7])(logits, labels), CrossEntropyLoss()(logits, labels))


def test_balanced_softmax_without_counts_says_how_to_give_them():
    with pytest.raises(ValueError, match="ClassCountsHook"):
        BalancedSoftmaxLoss()(torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="2 values"):
        BalancedSoftmaxLoss([1, 2])(torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match=">= 0"):
        BalancedSoftmaxLoss([1, -2])


def test_counts_stay_out_of_the_checkpoint():
    assert not BalancedSoftmaxLoss([1, 2]).state_dict()


@given(st.integers(2, 7), st.integers(1, 4), st.floats(0.05, 2), st.integers(0, 9999))
def test_sup_con_equals_the_formula(samples, classes, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator).tolist()
    unit = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in x.tolist()]
    similarity = [[sum(a * b for a, b in zip(p, q, strict=True)) / temperature for q in unit] for p in unit]
    terms = []
    for i, label in enumerate(labels):
        partners = [p for p in range(samples) if p != i and labels[p] == label]
        if partners:
            norm = math.log(sum(math.exp(similarity[i][a]) for a in range(samples) if a != i))
            terms.append(sum(norm - similarity[i][p] for p in partners) / len(partners))
    expected = sum(terms) / len(terms) if terms else 0.0
    loss = SupConLoss(temperature)(x, torch.tensor(labels))
    assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_sup_con_is_computed_in_single_precision_under_autocast():
    x, labels = torch.randn(8, 16), torch.arange(8) // 2
    with torch.autocast("cpu", torch.bfloat16):
        inside = SupConLoss()(x, labels)
    assert torch.equal(inside, SupConLoss()(x, labels))


def test_sup_con_without_partners_is_zero_with_a_finite_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    loss = SupConLoss()(x, torch.arange(3))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="above 0"):
        SupConLoss(temperature=0)
