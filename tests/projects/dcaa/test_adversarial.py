from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed
from torch import nn

from alimm.projects.dcaa import adversarial
from alimm.projects.dcaa.adversarial import SOURCE, TARGET
from alimm.projects.dcaa.discriminator import PixelDiscriminator
from tests.gloo_pool import GlooPool


def bce(logit: float, label: float) -> float:
    """Binary cross entropy by its definition."""
    p = 1 / (1 + math.exp(-logit))
    return -label * math.log(p) - (1 - label) * math.log(1 - p)


def logits_of(*images: list[list[float]]) -> torch.Tensor:
    return torch.tensor(images)[:, None]


@pytest.mark.parametrize("label", [SOURCE, TARGET])
def test_domain_loss_is_the_mean_over_the_patches_of_each_image(label: float) -> None:
    grids = [[[0.5, -1.0], [2.0, 0.0]], [[3.0, 3.0], [-2.0, 1.0]]]
    expected = [np.mean([bce(x, label) for row in grid for x in row]) for grid in grids]
    np.testing.assert_allclose(adversarial.domain_loss(logits_of(*grids), label), expected, rtol=1e-5)


def test_source_is_one_and_target_is_zero() -> None:
    source_like = torch.full((1, 1, 2, 2), 8.0)
    assert adversarial.domain_loss(source_like, SOURCE).item() < 0.01
    assert adversarial.domain_loss(source_like, TARGET).item() > 7
    assert adversarial.domain_accuracy(source_like, SOURCE) == 1
    assert adversarial.domain_accuracy(source_like, TARGET) == 0
    assert adversarial.domain_accuracy(logits_of([[1.0, -1.0], [-2.0, -3.0]]), TARGET) == 0.75


def test_signs_of_both_players() -> None:
    torch.manual_seed(0)
    net = PixelDiscriminator(3, (8, 8), num_strides=1)
    source = torch.randn(2, 3, 6, 6)
    target = torch.randn(2, 3, 6, 6, requires_grad=True)
    before = net(target.softmax(1)).mean().item()
    with adversarial.frozen(net):
        adversarial.domain_loss(net(target.softmax(1)), SOURCE).sum().backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert target.grad is not None
    moved = (target - target.grad).detach()
    assert net(moved.softmax(1)).mean().item() > before

    def gap() -> torch.Tensor:
        return net(source.softmax(1)).mean() - net(moved.softmax(1)).mean()

    gap_before = gap().item()
    loss_source = adversarial.domain_loss(net(source.softmax(1)), SOURCE).mean()
    loss_target = adversarial.domain_loss(net(moved.softmax(1)), TARGET).mean()
    (loss_source + loss_target).backward()
    with torch.no_grad():
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    assert gap().item() > gap_before


def test_masked_loss_uses_the_mean_weight_of_each_patch() -> None:
    logits = logits_of([[0.5, -1.0]], [[2.0, 0.25]])
    mask = torch.tensor([[[1.0, 1, 0, 0], [1, 0, 0, 1]], [[0.0, 0, 0, 0], [0, 0, 0, 0]]])
    first = (bce(0.5, 1) * 0.75 + bce(-1.0, 1) * 0.25) / (0.75 + 0.25 + 1)
    np.testing.assert_allclose(adversarial.masked_domain_loss(logits, SOURCE, mask), [first, 0], rtol=1e-6)


def test_masked_loss_on_one_grid_is_the_plain_sum() -> None:
    logits = logits_of([[0.5, -1.0], [2.0, 0.0]])
    mask = torch.tensor([[[0.2, 1.0], [0.0, 0.5]]])
    expected = (0.2 * bce(0.5, 0) + bce(-1.0, 0) + 0.5 * bce(0.0, 0)) / (1.7 + 1)
    np.testing.assert_allclose(adversarial.masked_domain_loss(logits, TARGET, mask), [expected], rtol=1e-6)


def test_release_divides_by_the_sum_over_the_finer_grid() -> None:
    torch.manual_seed(1)
    factor = 16
    logits = torch.randn(2, 1, 3, 4)
    coarse = torch.tensor([[[1.0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]], [[0.0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]])
    mask = coarse.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    ours = adversarial.masked_domain_loss(logits, SOURCE, mask)
    release = adversarial.masked_domain_loss(logits, SOURCE, mask, release=True)
    count = coarse.sum((1, 2))
    torch.testing.assert_close(release * (factor**2 * count + 1), ours * (count + 1))
    full = adversarial.masked_domain_loss(logits, SOURCE, torch.ones_like(mask), release=True)
    torch.testing.assert_close(full, adversarial.domain_loss(logits, SOURCE) * 12 / (12 * factor**2 + 1))


def test_release_takes_the_nearest_pixel() -> None:
    logits = logits_of([[0.5, -1.0]])
    mask = torch.tensor([[[0.0, 1, 1, 0], [1, 1, 0, 0]]])
    expected = bce(-1.0, 1) / (4 + 1)
    np.testing.assert_allclose(
        adversarial.masked_domain_loss(logits, SOURCE, mask, release=True), [expected], rtol=1e-6
    )


def test_masked_loss_of_a_wrong_mask() -> None:
    with pytest.raises(ValueError, match=r"expected a mask \(2, H, W\)"):
        adversarial.masked_domain_loss(torch.zeros(2, 1, 2, 2), SOURCE, torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match=r"\(N, 1, h, w\), got shape \(2, 3, 2, 2\)"):
        adversarial.domain_loss(torch.zeros(2, 3, 2, 2), SOURCE)


def test_mean_by_condition_sums_the_means_of_the_conditions_that_are_there() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    ids = torch.tensor([2, 0, 2, 2])
    assert adversarial.condition_counts(ids, 4).tolist() == [1, 0, 3, 0]
    assert adversarial.mean_by_condition(values, ids, 4).item() == pytest.approx(2 + (1 + 4 + 8) / 3)
    counts = torch.tensor([4.0, 0.0, 2.0, 1.0])
    assert adversarial.mean_by_condition(values, ids, 4, counts).item() == pytest.approx(2 / 4 + (1 + 4 + 8) / 2)


def test_mean_by_condition_of_nothing_is_a_zero_with_a_graph() -> None:
    values = torch.zeros(0, requires_grad=True)
    total = adversarial.mean_by_condition(values, torch.zeros(0, dtype=torch.long), 3)
    assert total.item() == 0
    total.backward()
    assert values.grad is not None


def test_a_condition_reaches_only_its_own_images() -> None:
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    adversarial.mean_by_condition(values, torch.tensor([0, 1, 0]), 2).backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 1.0, 0.5]


def test_mean_by_condition_names_wrong_ids() -> None:
    for counts in [None, torch.ones(3)]:
        with pytest.raises(ValueError, match=r"0 \.\. 2, got \[0, 3\]"):
            adversarial.mean_by_condition(torch.ones(2), torch.tensor([0, 3]), 3, counts)
    with pytest.raises(ValueError, match="counts of 3 conditions"):
        adversarial.mean_by_condition(torch.ones(2), torch.tensor([0, 1]), 3, torch.ones(2))
    with pytest.raises(ValueError, match="one value and one condition"):
        adversarial.mean_by_condition(torch.ones(2), torch.tensor([0]), 3)


def test_over_ranks_alone_only_replaces_zeros() -> None:
    total = torch.tensor([3.0, 0.0, 0.25])
    assert adversarial.over_ranks(total).tolist() == [3, 1, 0.25]
    assert total.tolist() == [3, 0, 0.25]
    assert adversarial.over_ranks(torch.tensor(0)).item() == 1


RANKS = [([1.0, 2.0, 6.0], [0, 0, 2]), ([5.0], [0])]


def rank_mean() -> float:
    values, ids = RANKS[torch.distributed.get_rank()]
    id_tensor = torch.tensor(ids)
    counts = adversarial.over_ranks(adversarial.condition_counts(id_tensor, 3))
    return adversarial.mean_by_condition(torch.tensor(values), id_tensor, 3, counts).item()


def test_mean_of_the_ranks_is_that_of_the_whole_batch(gloo: GlooPool) -> None:
    expected = (1 + 2 + 5) / 3 + 6
    assert np.mean(gloo.run(2, rank_mean)) == pytest.approx(expected)


def test_self_information_and_entropy() -> None:
    prob = torch.tensor([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]]).T.reshape(1, 3, 1, 3)
    info = adversarial.self_information(prob)
    expected = [[-p * math.log2(p) / math.log2(3) if p else 0.0 for p in row] for row in prob[0, :, 0].T.tolist()]
    np.testing.assert_allclose(info[0, :, 0].T, expected, atol=1e-6)
    np.testing.assert_allclose(info.sum(1)[0, 0], np.sum(expected, 1), atol=1e-6)
    assert info.sum(1)[0, 0, 1].item() == pytest.approx(1)
    assert adversarial.entropy_loss(prob).item() == pytest.approx(np.mean(np.sum(expected, 1)), abs=1e-6)


def test_self_information_has_a_finite_gradient_where_probabilities_underflow() -> None:
    logits = torch.tensor([300.0, 0.0, -300.0]).reshape(1, 3, 1, 1).requires_grad_()
    prob = logits.softmax(1)
    assert prob.min() == 0
    adversarial.self_information(prob).sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    with pytest.raises(ValueError, match="at least two classes"):
        adversarial.self_information(torch.ones(1, 1, 2, 2))


def test_gradient_reversal_is_identity_forward_and_minus_scale_backward() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, dtype=torch.double)
    x = torch.randn(4, dtype=torch.double, requires_grad=True)

    def loss(point: torch.Tensor) -> torch.Tensor:
        return (weight * point).sin().sum()

    reversed_x = adversarial.reverse_gradient(x, 0.3)
    assert torch.equal(reversed_x, x)
    loss(reversed_x).backward()
    step = 1e-6
    plain = [(loss(x + step * unit) - loss(x - step * unit)).item() / (2 * step) for unit in torch.eye(4).double()]
    assert x.grad is not None
    np.testing.assert_allclose(x.grad, -0.3 * np.array(plain), rtol=1e-6)


def test_frozen_restores_each_flag() -> None:
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    shared = nn.Sequential(net, other)

    def flags() -> list[bool]:
        return [parameter.requires_grad for parameter in shared.parameters()]

    before = flags()
    assert before == [True, False, True, True]
    with adversarial.frozen([net, shared]):
        assert not any(flags())
        with adversarial.frozen(other):
            assert not any(flags())
        assert not any(flags())
    assert flags() == before
    with pytest.raises(RuntimeError, match="stop"), adversarial.frozen([shared]):
        raise RuntimeError("stop")
    assert flags() == before


def test_frozen_takes_a_generator_and_lets_gradients_through() -> None:
    net = nn.Linear(2, 1)
    x = torch.ones(1, 2, requires_grad=True)
    with adversarial.frozen(module for module in [net]):
        loss = net(x).sum()
    loss.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, net.weight.detach())
    assert net.weight.grad is None
    assert net.weight.requires_grad
