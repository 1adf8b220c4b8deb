"""Heads: logits, losses by target, predictions, and what a wrong input is told."""

import pytest
import torch

from alimm.heads import ContrastiveHead, CosineHead, LinearHead, MultiHead
from alimm.structures import ClsDataSample


def samples(*labels, identity=None):
    return [ClsDataSample(metainfo={"sample_id": f"s{i}"}).set_gt_label(label) for i, label in enumerate(labels)]


def test_linear_head_is_a_linear_map():
    head = LinearHead(num_classes=3, in_channels=4)
    x = torch.randn(2, 4)
    expected = [
        [sum(a * b for a, b in zip(row, w, strict=True)) for w in head.fc.weight.tolist()] for row in x.tolist()
    ]
    assert torch.allclose(head(x), torch.tensor(expected) + head.fc.bias, atol=1e-6)


def test_cosine_head_ignores_the_length_of_features_and_weights():
    head = CosineHead(num_classes=3, in_channels=4, scale=10.0)
    x = torch.randn(2, 4)
    before = head(x)
    with torch.no_grad():
        head.weight.mul_(7)
    assert torch.allclose(head(3 * x), before, atol=1e-5)
    cosine = torch.cosine_similarity(x[:, None], head.weight[None], dim=2)
    assert torch.allclose(before, 10 * cosine, atol=1e-5)
    assert not head.scale.requires_grad
    assert CosineHead(3, 4, learn_scale=True).scale.requires_grad


def test_loss_reads_the_target_field_and_logs_accuracy():
    head = LinearHead(num_classes=3, in_channels=3, target="gt_identity", topk=(1, 2), bias=False)
    with torch.no_grad():
        head.fc.weight.copy_(torch.eye(3))
    batch = [ClsDataSample().set_gt_label(0).set_gt_identity(identity) for identity in (2, 1)]
    features = torch.tensor([[0.0, 1.0, 5.0], [5.0, 1.0, 0.0]])
    losses = head.loss(features, batch)
    expected = torch.nn.functional.cross_entropy(features, torch.tensor([2, 1]))
    assert losses["loss"].item() == pytest.approx(expected.item())
    assert losses["accuracy_top1"].item() == 50
    assert losses["accuracy_top2"].item() == 100


def test_a_sample_without_label_is_named():
    with pytest.raises(ValueError, match="sample s0 has no gt_identity"):
        LinearHead(3, 4, target="gt_identity").loss(torch.zeros(1, 4), samples(1))


def test_predict_fills_the_samples():
    head = LinearHead(num_classes=3, in_channels=4)
    x = torch.randn(2, 4)
    given = samples(0, 1)
    predicted = head.predict(x, given)
    assert predicted[1] is given[1]
    assert torch.allclose(torch.stack([sample.pred_score for sample in predicted]), head(x).softmax(1))
    assert predicted[0].pred_label.item() == head(x)[0].argmax().item()
    assert torch.equal(predicted[1].feature, x[1])
    assert len(head.predict(x)) == 2


def test_multi_head_adds_the_losses_and_predicts_with_the_main_one():
    head = MultiHead(
        main="b",
        heads=dict(
            a=dict(type="alimm.LinearHead", num_classes=2, in_channels=4, target="gt_identity"),
            b=dict(type="alimm.CosineHead", num_classes=3, in_channels=4),
        ),
    )
    x = torch.randn(2, 4)
    batch = [ClsDataSample().set_gt_label(2).set_gt_identity(1) for _ in range(2)]
    losses = head.loss(x, batch)
    assert sorted(losses) == ["a.loss", "b.loss"]
    assert torch.equal(losses["a.loss"], head.heads["a"].loss(x, batch)["loss"])
    assert torch.equal(head(x), head.heads["b"](x))
    assert head.predict(x)[0].pred_score.shape == (3,)
    with pytest.raises(ValueError, match=r"main must be one of the heads \['a'\], got 'c'"):
        MultiHead(dict(a=dict(type="alimm.LinearHead", num_classes=2, in_channels=4)), main="c")


@pytest.mark.parametrize("arguments", [(0, 4), (3, 0)])
def test_impossible_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        LinearHead(*arguments)


def test_contrastive_head_trains_features_by_identity():
    batch = [ClsDataSample().set_gt_label(0).set_gt_identity(identity) for identity in (0, 0, 1, 1)]
    near = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.1]])
    head = ContrastiveHead()
    assert head.loss(near, batch)["loss"] < 0.1 < head.loss(near[[0, 2, 1, 3]], batch)["loss"]
    assert torch.equal(head.predict(near)[3].feature, near[3])
    with pytest.raises(ValueError, match="number 0 of the batch has no gt_identity"):
        head.loss(near[:1], [ClsDataSample().set_gt_label(0)])
