"""The hash head: its loss terms against sums written out, and codes of a small problem."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alimm.projects.binary_graph.hash_head import HashHead, balance_loss, quantisation_loss
from alimm.projects.binary_graph.packing import unpack_bits
from alimm.registry import MODELS
from alimm.structures import ClsDataSample


def labelled(labels):
    return [ClsDataSample().set_gt_label(int(label)) for label in labels]


def test_terms_equal_sums_written_out():
    torch.manual_seed(0)
    head = HashHead(3, 5, bits=64, quantisation_weight=0.7, balance_weight=1.3, topk=(1,))
    features, labels = torch.randn(6, 5), [0, 1, 2, 2, 1, 0]
    codes = [
        [math.tanh(sum(a * b for a, b in zip(row, w, strict=True)) + c) for w, c in
         zip(head.hash.weight.tolist(), head.hash.bias.tolist(), strict=True)]
        for row in features.tolist()
    ]  # fmt: skip
    quantisation = sum((abs(h) - 1) ** 2 for row in codes for h in row) / (6 * 64)
    balance = sum((sum(row[bit] for row in codes) / 6) ** 2 for bit in range(64)) / 64
    losses = head.loss(features, labelled(labels))
    assert sorted(losses) == ["accuracy_top1", "loss", "loss_balance", "loss_quantisation"]
    assert losses["loss_quantisation"].item() == pytest.approx(0.7 * quantisation, rel=1e-4)
    assert losses["loss_balance"].item() == pytest.approx(1.3 * balance, rel=1e-4)
    logits = torch.tensor(codes) @ head.fc.weight.T + head.fc.bias
    assert torch.allclose(head(features), logits, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_gradients_of_the_terms():
    torch.manual_seed(1)
    relaxed = torch.tanh(torch.randn(5, 7, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(quantisation_loss, relaxed)
    assert torch.autograd.gradcheck(balance_loss, relaxed)
    assert quantisation_loss(torch.ones(3, 2) * torch.tensor([1.0, -1.0])) == 0
    assert balance_loss(torch.tensor([[1.0, -0.5], [-1.0, 0.5]])) == 0
    assert balance_loss(torch.ones(3, 2)) == 1


def test_codes_are_the_signs_in_the_order_of_the_packing():
    torch.manual_seed(2)
    head = HashHead(3, 5, bits=128)
    features = torch.randn(9, 5)
    codes = head.encode(features)
    assert codes.dtype == np.uint64
    assert codes.shape == (9, 2)
    np.testing.assert_array_equal(unpack_bits(codes), (head.relaxed(features) > 0).numpy())
    assert head.encode(features[:0]).shape == (0, 2)
    features[4, 0] = torch.nan
    with pytest.raises(ValueError, match="features row 4 gives NaN"):
        head.encode(features)


def problem(count=240, classes=6, dim=16):
    rng = np.random.default_rng(3)
    labels = np.arange(count) % classes
    centres = 2 * rng.standard_normal((classes, dim))
    return torch.tensor(centres[labels] + 0.5 * rng.standard_normal((count, dim)), dtype=torch.float32), labels


def test_codes_of_a_class_are_near_and_all_bits_are_used():
    torch.manual_seed(3)
    features, labels = problem()
    head = HashHead(6, 16, bits=64, topk=(1,))
    head.init_weights()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    samples, history = labelled(labels), []
    for _ in range(80):
        losses = head.loss(features, samples)
        total = losses["loss"] + losses["loss_quantisation"] + losses["loss_balance"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    for name in ("loss", "loss_quantisation"):
        assert history[-1][name] < 0.5 * history[0][name]
    assert history[-1]["accuracy_top1"] == 100
    bits = unpack_bits(head.encode(features))
    distances = (bits[:, None] != bits[None]).sum(axis=2)
    same = labels[:, None] == labels[None]
    np.fill_diagonal(distances, 10**6)  # a row is not its own neighbour
    assert same[np.arange(len(labels)), distances.argmin(axis=1)].all()
    np.fill_diagonal(distances, 0)
    assert distances[same].mean() < 0.2 * distances[~same].mean()
    means = bits.mean(axis=0)
    assert ((means > 0.02) & (means < 0.98)).all()


def test_it_works_in_the_classifier_from_a_config():
    torch.manual_seed(4)
    model = MODELS.build(
        dict(
            type="alimm.ImageClassifier",
            backbone=dict(type="alimm.ResNetTiny", width=8, depths=(1, 1, 1)),
            neck=dict(type="alimm.GlobalPoolNeck", in_channels=32, norm=True),
            head=dict(type="alimm.HashHead", num_classes=5, in_channels=32, bits=64),
        )
    )
    assert isinstance(model.head, HashHead)
    data = dict(
        inputs=[torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8) for _ in range(4)],
        data_samples=labelled([0, 1, 2, 3]),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(**model.data_preprocessor(data, True), mode="loss")
    total, logged = model.parse_losses(losses)
    assert total.item() == pytest.approx(sum(value.item() for value in losses.values()), rel=1e-4)
    assert losses["loss_quantisation"].dtype == torch.float32
    assert "loss_balance" in logged
    total.backward()
    assert model.head.hash.weight.grad.abs().sum() > 0
    optimizer.step()
    model.eval()
    prepared = model.data_preprocessor(data)
    predicted = model(**prepared, mode="predict")
    assert predicted[0].pred_score.shape == (5,)
    assert predicted[0].pred_score.sum().item() == pytest.approx(1, abs=1e-5)
    codes = model.head.encode(model.extract_feat(prepared["inputs"]))
    assert codes.shape == (4, 1)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="multiple of 64 bits from 64 to 1024, got 48"):
        HashHead(3, 4, bits=48)
    with pytest.raises(ValueError, match="weights must be at least 0, got -1 and 0"):
        HashHead(3, 4, bits=64, quantisation_weight=-1, balance_weight=0)
