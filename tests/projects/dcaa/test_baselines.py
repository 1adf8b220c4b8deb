"""The baselines that know no conditions: source only, one discriminator, minimum entropy."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine import dist

pytest.importorskip("mmseg")

from alimm.projects.dcaa.baselines import AdversarialSegmentor, SourceSegmentor
from tests.projects.dcaa.tiny_segmentor import (
    CLASSES,
    SIZE,
    alternating,
    assert_equal_weights,
    both,
    build,
    head,
    pictures,
    ready,
    sgd,
)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_source_steps_as_a_stock_segmentor_does(auxiliary: bool) -> None:
    extra: dict[str, Any] = dict(auxiliary_head=head("mmseg.FCNHead")) if auxiliary else {}
    model = build("SourceSegmentor", **extra)
    from mmseg.models import EncoderDecoder

    stock = copy.deepcopy(model)
    batch = ready(stock, pictures("source"))
    total, _ = stock.parse_losses(EncoderDecoder.loss(stock, batch["inputs"], batch["data_samples"]))
    total.backward()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter -= 0.1 * parameter.grad
    logs = model.train_step(both(), sgd(model))
    assert logs["loss"].item() == pytest.approx(total.item())
    assert {"source.loss_ce", "source.acc_seg"} <= logs.keys()
    assert ("aux.loss_ce" in logs) == auxiliary
    assert_equal_weights(model, stock)


def test_source_reads_every_form_of_a_batch() -> None:
    first = build("SourceSegmentor")
    others = [copy.deepcopy(first), copy.deepcopy(first)]
    first.train_step(both(), sgd(first))
    for other, data in zip(others, [dict(source=pictures("source")), pictures("source")], strict=True):
        other.train_step(data, sgd(other))
        assert_equal_weights(first, other, rtol=0, atol=0)


def test_source_is_the_oracle_on_a_labelled_target_without_conditions() -> None:
    model = build("SourceSegmentor")
    data = pictures("target", labels=True, cond_id=17)
    assert model.train_step(data, sgd(model))["loss"] > 0
    for sample in data["data_samples"]:
        del sample.cond_id
    assert model.train_step(data, sgd(model))["loss"] > 0


def test_source_refuses_what_it_cannot_learn_from() -> None:
    model = build("SourceSegmentor")
    with pytest.raises(ValueError, match="has no labels"):
        model.train_step(pictures("source", labels=False), sgd(model))
    with pytest.raises(ValueError, match="got target, other"):
        model.train_step(dict(target=pictures("target"), other=0), sgd(model))
    with pytest.raises(ValueError, match="SourceSegmentor has the stages source, got 'align'"):
        build("SourceSegmentor", stage="align")


def maps(logits: torch.Tensor, kind: str) -> torch.Tensor:
    """What a discriminator reads, with loops over the classes."""
    large = F.interpolate(logits, SIZE, mode="bilinear", align_corners=False)
    shares = torch.exp(large) / torch.exp(large).sum(1, keepdim=True)
    if kind == "softmax":
        return shares
    return torch.stack([-shares[:, c] * torch.log2(shares[:, c]) / math.log2(CLASSES) for c in range(CLASSES)], 1)


def bce(answer: torch.Tensor, label: float) -> torch.Tensor:
    share = torch.sigmoid(answer)
    return -(label * torch.log(share) + (1 - label) * torch.log(1 - share)).mean()


@pytest.mark.parametrize("kind", ["softmax", "entropy"])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_adversarial_step(kind: str, auxiliary: bool) -> None:
    extra: dict[str, Any] = dict(auxiliary_head=head("mmseg.FCNHead"), auxiliary_weight=0.3) if auxiliary else {}
    narrow = dict(channels=(4, 4, 4, 4))
    model = build("AdversarialSegmentor", input=kind, adversarial_weight=0.7, min_entropy=0.2, discriminator=narrow,
                  **extra)  # fmt: skip
    assert [judge.layout for judge in model.discriminators] == ["adaptsegnet"] * (1 + auxiliary)
    slow = copy.deepcopy(model)
    source, target = ready(slow, pictures("source")), ready(slow, pictures("target"))
    labels = torch.cat([sample.gt_sem_seg.data for sample in source["data_samples"]])
    heads = [(slow.decode_head, 1.0, 0.7)] + ([(slow.auxiliary_head, 1.0, 0.3)] if auxiliary else [])
    of_source = slow.extract_feat(source["inputs"])
    source_logits = [decode(of_source) for decode, *_ in heads]
    of_target = slow.extract_feat(target["inputs"])
    target_logits = [decode(of_target) for decode, *_ in heads]
    total = torch.tensor(0.0)
    for level, (_, weight, adversarial) in enumerate(heads):
        large = F.interpolate(source_logits[level], SIZE, mode="bilinear", align_corners=False)
        total = total + weight * F.cross_entropy(large, labels)
        judge = copy.deepcopy(slow.discriminators[level])  # the copy takes the gradients that must not arrive
        total = total + adversarial * bce(judge(maps(target_logits[level], kind)), 1.0)
    total = total + 0.2 * maps(target_logits[0], "entropy").sum(1).mean()
    of_judges = torch.tensor(0.0)
    for level, judge in enumerate(slow.discriminators):
        of_judges = of_judges + 0.5 * bce(judge(maps(source_logits[level].detach(), kind)), 1.0)
        of_judges = of_judges + 0.5 * bce(judge(maps(target_logits[level].detach(), kind)), 0.0)
    total.backward()
    of_judges.backward()
    with torch.no_grad():
        for parameter in slow.parameters():
            parameter -= 0.1 * parameter.grad

    logs = model.train_step(both(), sgd(model))

    assert logs["loss"].item() == pytest.approx((total + of_judges).item(), rel=1e-4)
    assert_equal_weights(model, slow, rtol=1e-4, atol=1e-6)


def target_answer(model: Any, judge: Any, domain: str = "target") -> float:
    inputs = ready(model, pictures(domain))["inputs"]
    with torch.no_grad():
        return float(judge(maps(model.decode_head(model.extract_feat(inputs)), model.input)).mean())


def test_players_move_against_each_other() -> None:
    model = build("AdversarialSegmentor", adversarial_weight=100.0)
    judge = copy.deepcopy(model.discriminators[0])
    before = [target_answer(model, judge)]
    seen: list[Any] = []
    model.after_segmentor_step = lambda _: seen.append(
        ([p.grad for p in model.discriminators.parameters()], target_answer(model, judge))
    )
    wrapper = alternating(model, lr=1e-4)
    model.train_step(both(), wrapper)
    (gradients, after), = seen  # fmt: skip
    assert all(gradient is None for gradient in gradients)
    assert after > before[0]  # the segmentor makes its target look like the source
    moved = model.discriminators[0]
    gap = [target_answer(model, d, "source") - target_answer(model, d) for d in (judge, moved)]
    assert gap[1] > gap[0]  # and the discriminator tells them apart better
    assert all(p.requires_grad for p in moved.parameters())


def test_entropy_alone_has_no_discriminator_and_falls() -> None:
    model = build("AdversarialSegmentor", adversarial_weight=0.0, min_entropy=100.0)
    assert model.discriminators is None
    wrapper = alternating(model, lr=1e-3)
    assert list(wrapper.keys()) == ["seg"]
    values = [model.train_step(both(), wrapper)["target.loss_entropy"].item() for _ in range(4)]
    assert values[-1] < values[0]


def test_small_maps_where_the_papers_enlarge() -> None:
    model = build("AdversarialSegmentor", enlarge=False, discriminator=dict(layout="dcaa", num_strides=2))
    sizes: list[Any] = []
    model.discriminators[0].register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    model.train_step(both(), alternating(model))
    assert sizes == [(2, CLASSES, 8, 16)] * 3


def test_source_stage_leaves_the_target_alone() -> None:
    model = build("AdversarialSegmentor", stage="source")
    plain = build("SourceSegmentor")
    plain.load_state_dict(model.state_dict(), strict=False)
    judges = copy.deepcopy(model.discriminators)
    logs = model.train_step(both(), sgd(model))
    plain.train_step(both(), sgd(plain))
    assert not any(name.startswith("target") for name in logs)
    assert_equal_weights(model.discriminators, judges, rtol=0, atol=0)
    assert_equal_weights(model.decode_head, plain.decode_head, rtol=0, atol=0)
    model.enter_stage("align")
    assert "target.loss_adv_decode" in model.train_step(both(), sgd(model))


@pytest.mark.parametrize("kind", ["SourceSegmentor", "AdversarialSegmentor"])
@pytest.mark.parametrize("optimiser", [sgd, alternating])
def test_learns(kind: str, optimiser: Any) -> None:
    options: dict[str, Any] = {} if kind == "SourceSegmentor" else dict(discriminator=dict(channels=(8, 8, 8, 8)))
    model = build(kind, **options)
    wrapper = optimiser(model, lr=0.05)
    values = [model.train_step(both(i % 2), wrapper)["source.loss_ce"].item() for i in range(12)]
    assert sum(values[-2:]) < 0.8 * sum(values[:2])
    prediction = model.eval().test_step(pictures("target", n=1))[0]
    assert prediction.pred_sem_seg.data.shape == (1, *SIZE)


def test_target_labels_stay_outside() -> None:
    model = build("AdversarialSegmentor")
    data = dict(source=pictures("source"), target=pictures("target", labels=True))
    with pytest.raises(ValueError, match="must not see"):
        model.train_step(data, sgd(model))
    with pytest.raises(ValueError, match="loaders swapped"):
        model.train_step(dict(source=pictures("target"), target=pictures("source")), sgd(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(input="logits"), "input is one of softmax, entropy"),
        (dict(adversarial_weight=-1.0), "weight of decode is at least 0"),
        (dict(min_entropy=-1.0), "weight of entropy is at least 0"),
        (dict(auxiliary_weight=0.1), "and there is none"),
        (dict(auxiliary_weight=0.1, auxiliary_head=[head("mmseg.FCNHead")]), "a list of them"),
        (dict(decode_head=head("mmseg.FCNHead") | dict(num_classes=2, out_channels=1, threshold=0.3,
              loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=True))), "softmax over 2 classes"),
        (dict(stage="self_train"), "stages source, align"),
    ],
)  # fmt: skip
def test_adversarial_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("AdversarialSegmentor", **options)


def test_init_weights_reaches_the_discriminators() -> None:
    model = build("AdversarialSegmentor", discriminator=dict(init_cfg=dict(type="Constant", val=0.25, layer="Conv2d")))
    model.init_weights()
    assert all((p == 0.25).all() for p in model.discriminators.parameters() if p.ndim == 4)


def test_names() -> None:
    assert isinstance(build("SourceSegmentor", conditions=["fog", "night"]), SourceSegmentor)
    assert isinstance(build("AdversarialSegmentor", conditions=2), AdversarialSegmentor)


def step_of_two(kind: str) -> dict[str, torch.Tensor]:
    """Weights after a step on two pictures of either domain, or on those of this rank; one target picture is cut."""
    options: dict[str, Any] = dict(strong=False, batch_statistics=False)
    if kind == "AdversarialSegmentor":
        options = dict(discriminator=dict(channels=(8, 8, 8, 8)))
    model = build(kind, freeze_bn=True, **options)
    data = both()
    data["target"]["inputs"][0] = data["target"]["inputs"][0][:, :20]
    if dist.get_world_size() == 2:
        mine = slice(dist.get_rank(), dist.get_rank() + 1)
        data = {domain: {name: items[mine] for name, items in part.items()} for domain, part in data.items()}
    if kind == "MeanTeacherSegmentor":
        model.threshold, model.pseudo_weight = 0.0, 5.0
    model.train_step(data, sgd(model))
    return dict(model.state_dict())


@pytest.mark.parametrize("kind", ["AdversarialSegmentor", "MeanTeacherSegmentor"])
def test_two_ranks_step_as_one_with_both_batches(gloo: Any, kind: str) -> None:
    whole = step_of_two(kind)
    for shared in gloo.run(2, step_of_two, kind):
        for name, value in whole.items():
            torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-6, msg=name)
