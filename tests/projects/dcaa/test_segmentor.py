"""A training step of DCAA against slow oracles: who learns what from whom."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("mmseg")

from tests.projects.dcaa.tiny import (
    batch,
    dcaa,
    gradients_before_steps,
    moved,
    note_backward,
    read,
    teaching,
    weights,
)
from tests.projects.dcaa.tiny_segmentor import SIZE, alternating, assert_equal_weights, sgd


def bce(answer: Tensor, label: float) -> Tensor:
    share = torch.sigmoid(answer)
    return -(label * torch.log(share) + (1 - label) * torch.log(1 - share))


def outputs_of(model: Any, domain: Any) -> tuple[Any, list[Tensor]]:
    """All outputs, and for each picture (1, C, h, w) the probabilities by the decoder of its condition."""
    outputs = model.decode_head.forward_all(model.extract_feat(domain.inputs))
    return outputs, [outputs.cond[int(k)][i : i + 1].softmax(1) for i, k in enumerate(domain.cond_ids)]


def slow_segmentation(outputs: Any, source: Any) -> Tensor:
    losses = []
    for i, k in enumerate(source.cond_ids.tolist()):
        for logits in (outputs.cond[k][i : i + 1], outputs.att[i : i + 1]):
            large = F.interpolate(logits, SIZE, mode="bilinear", align_corners=False)
            losses.append(F.cross_entropy(large, source.samples[i].gt_sem_seg.data))
    return torch.stack(losses).mean()


def slow_domain(judges: Any, matched: Sequence[Tensor], att: Tensor, cond_ids: Tensor, label: float) -> Any:
    """Sum over the conditions that are there of the mean over their pictures, and the mean of D_g."""
    of_conditions = torch.tensor(0.0)
    for k in range(len(judges) - 1):
        values = [bce(judges[k](p), label).mean() for p, c in zip(matched, cond_ids.tolist(), strict=True) if c == k]
        if values:
            of_conditions = of_conditions + sum(values) / len(values)
    return of_conditions, bce(judges[-1](att.softmax(1)), label).mean()


@pytest.mark.parametrize(
    ("conditions", "ids", "split"),
    [(2, ((0, 1, 1), (1, 0, 1)), True), (3, ((2, 0), (1, 1)), False), (1, ((0,), (0, 0)), True)],
)
def test_step_of_alignment(conditions: int, ids: Any, split: bool) -> None:
    model = dcaa(conditions, split_backward=split)
    slow = copy.deepcopy(model)
    data = read(slow, batch(*ids))
    source, of_source = outputs_of(slow, data.source)
    target, of_target = outputs_of(slow, data.target)
    ids_s, ids_t = data.source.cond_ids, data.target.cond_ids
    judges = copy.deepcopy(slow.discriminators)  # the copy takes the gradients that must not arrive
    total = slow_segmentation(source, data.source)
    total = total + 0.5 * sum(slow_domain(judges, of_target, target.att, ids_t, 1.0))
    detached = [[p.detach() for p in of] for of in (of_source, of_target)]
    of_judges = 0.25 * sum(slow_domain(slow.discriminators, detached[0], source.att.detach(), ids_s, 1.0))
    of_judges = of_judges + 0.25 * sum(slow_domain(slow.discriminators, detached[1], target.att.detach(), ids_t, 0.0))
    total.backward()
    of_judges.backward()
    with torch.no_grad():
        for parameter in slow.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    logs = model.train_step(batch(*ids), sgd(model))
    assert logs["loss"].item() == pytest.approx((total + of_judges).item(), rel=1e-4)
    assert not any(value.requires_grad for value in logs.values())
    slow.stage_steps += 1
    assert_equal_weights(model, slow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hard_only", [True, False])
@pytest.mark.parametrize("pseudo_on", ["global", "all"])
def test_losses_of_self_training(hard_only: bool, pseudo_on: str) -> None:
    options: dict[str, Any] = dict(ambivalence_threshold="q50", hard_only=hard_only, pseudo_on=pseudo_on, weight=0.7)
    model = teaching(2, align=dict(adversarial_weight=1.0), **options)
    with torch.no_grad():  # a surer teacher, and a discriminator that is of two minds
        model.decode_head.conv_seg.weight *= 8
        model.discriminators[-1].layers[0].weight *= 20
    slow = copy.deepcopy(model)
    slow.teacher.copy_from(slow._taught())
    data = read(slow, batch())
    with torch.no_grad():
        parts = slow.teacher.parts
        outputs = parts["decode_head"].forward_all(parts["backbone"](data.target.inputs))
        P = outputs.att.softmax(1) / 2
        for k in range(2):
            P = P + outputs.mask[:, k : k + 1] * outputs.cond[k].softmax(1) / 2
        torch.testing.assert_close(P.sum(1), torch.ones_like(P[:, 0]))
        best, labels = P.max(1)
        threshold = float(best.flatten().sort().values[90:92].mean())
        model.self_training = dataclasses.replace(model.self_training, threshold=threshold)
        sure = best > threshold
        d = torch.sigmoid(parts["discriminator"](outputs.att.softmax(1)))
        d = F.interpolate(d, (8, 16), mode="bilinear", align_corners=False)[:, 0]
        middle = d.flatten().sort().values[127:129].mean()
        easy = sure & (d > middle)
        hard = ~easy if hard_only else torch.ones_like(easy)
    assert 0.1 < easy.float().mean() < 0.5  # both kinds, and labels that do not count
    outputs_of(slow, data.source)  # batch norm sees the source first
    target, matched = outputs_of(slow, data.target)
    learners = [target.att.softmax(1)] + ([torch.cat(matched)] if pseudo_on == "all" else [])
    loss_easy = 0.0
    for probabilities in learners:
        own = probabilities.gather(1, labels[:, None])[:, 0]
        loss_easy = loss_easy + (d * -own.log())[easy].sum() / (1 + easy.sum())

    def judged(judge: Any, probabilities: Tensor, i: int) -> Tensor:
        patches = bce(judge(probabilities), 1.0)[0, 0]
        if not hard_only:
            return patches.mean()
        shares = hard[i].float().reshape(2, 4, 4, 4).mean((1, 3))  # a patch for 4 x 4 pixels
        return (patches * shares).sum() / (shares.sum() + 1)

    ids = data.target.cond_ids.tolist()
    expected = {
        "target.easy": easy.float().mean(),
        "target.loss_easy": 0.7 * loss_easy,
        "target.loss_adv_cond": sum(judged(slow.discriminators[k], matched[i], i) for i, k in enumerate(ids)),
        "target.loss_adv_global": sum(
            judged(slow.discriminators[-1], target.att[i : i + 1].softmax(1), i) for i in range(2)
        )
        / 2,
    }
    logs = model.train_step(batch(), alternating(model))
    for name, value in expected.items():
        assert logs[name].item() == pytest.approx(float(value), rel=1e-4), name


def test_every_discriminator_learns() -> None:
    model = dcaa(3)
    before = [weights(judge) for judge in model.discriminators]
    model.train_step(batch((0, 1, 2), (2, 1, 0)), alternating(model))
    assert [moved(judge, b) for judge, b in zip(model.discriminators, before, strict=True)] == [True] * 4


@pytest.mark.parametrize("stage", ["align", "self_train"])
def test_an_absent_condition_rests(stage: str) -> None:
    model = teaching(3)
    model.enter_stage(stage)
    before = [weights(judge) for judge in model.discriminators]
    logs = model.train_step(batch((0, 2), (0, 0)), alternating(model))
    assert [moved(judge, b) for judge, b in zip(model.discriminators, before, strict=True)] == [True, False, True, True]
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert all(torch.isfinite(value) for value in logs.values())


def test_a_discriminator_sees_its_own_condition_alone() -> None:
    model = dcaa(3, freeze_bn=True)
    with torch.no_grad():  # predictions that differ from picture to picture
        for classify in [*model.decode_head.classifiers, model.decode_head.conv_seg]:
            classify.weight *= 30
    found = []
    for change in (False, True):
        one = copy.deepcopy(model)
        data = batch((0, 1, 2), (0, 1, 2))
        if change:
            for domain in ("source", "target"):
                data[domain]["inputs"][1] = data[domain]["inputs"][1].flip(1)
        wrapper = alternating(one)
        with gradients_before_steps(one, wrapper) as seen:
            one.train_step(data, wrapper)
        found.append(seen["disc"])
    for k, same in enumerate([True, False, True, False]):
        names = [name for name in found[0] if name.startswith(f"discriminators.{k}.")]
        assert len(names) == 6
        for name in names:
            close = torch.allclose(found[0][name], found[1][name], rtol=1e-5, atol=1e-8)
            assert close == same, name


def test_players_do_not_touch_each_other() -> None:
    model = teaching(2)
    wrapper = alternating(model)
    judges = weights(model.discriminators)
    seen: list[Any] = []
    step = model.after_segmentor_step

    def look(data: Any) -> None:
        seen.append((moved(model.discriminators, judges), [p.grad for p in model.discriminators.parameters()]))
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        step(data)

    model.after_segmentor_step = look
    with gradients_before_steps(model, wrapper) as gradients:
        model.train_step(batch(), wrapper)
    (changed, grads), segmentor = seen
    assert not changed
    assert all(gradient is None for gradient in grads)
    assert gradients["seg"]
    assert not [name for name in gradients["seg"] if name.startswith(("discriminators", "teacher"))]
    assert {name.split(".")[0] for name in gradients["disc"]} == {"discriminators"}
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.discriminators.parameters())
    for name, value in segmentor.items():
        if not name.startswith("discriminators"):
            assert torch.equal(value, model.get_parameter(name)), name


def mean_answers(model: Any, judges: Any, domain: str) -> list[float]:
    data = getattr(read(model, batch()), domain)
    with torch.no_grad():
        outputs, matched = outputs_of(model, data)
        maps = [*matched, outputs.att.softmax(1)]  # picture k has condition k
        return [float(judge(one).mean()) for judge, one in zip(judges, maps, strict=True)]


def mean_errors(model: Any, judges: Any) -> list[float]:
    """Of each discriminator, on both domains."""
    total = [0.0] * len(judges)
    for domain, label in (("source", 1.0), ("target", 0.0)):
        data = getattr(read(model, batch()), domain)
        with torch.no_grad():
            outputs, matched = outputs_of(model, data)
            for k, probabilities in enumerate([*matched, outputs.att.softmax(1)]):  # picture k has condition k
                total[k] += float(bce(judges[k](probabilities), label).mean())
    return total


def test_players_move_against_each_other() -> None:
    model = dcaa(2, adversarial_weight=100.0, freeze_bn=True)
    judges = copy.deepcopy(model.discriminators)
    before = mean_answers(model, judges, "target")
    errors = mean_errors(model, judges)
    after: list[float] = []
    model.after_segmentor_step = lambda _: after.extend(mean_answers(model, judges, "target"))
    same = copy.deepcopy(model)
    model.train_step(batch(), alternating(model, lr=1e-4, disc_lr=1e-4))
    assert all(new > old for new, old in zip(after, before, strict=True))  # the target looks more like the source
    for new, old in zip(mean_errors(same, model.discriminators), errors, strict=True):
        assert new < old  # and they tell the domains apart better


@pytest.mark.parametrize("stage", ["align", "self_train"])
def test_split_backward_has_the_same_gradients(stage: str) -> None:
    model = teaching(2, align=dict(freeze_bn=True), ambivalence_threshold="q50")
    model.enter_stage(stage)
    found = []
    for split in (True, False):
        one = copy.deepcopy(model)
        one.split_backward = split
        wrapper = alternating(one)
        passes = note_backward(wrapper["seg"])
        with gradients_before_steps(one, wrapper) as seen:
            logs = one.train_step(batch(), wrapper)
        assert len(passes) == (2 if split else 1)
        found.append((seen, logs))
    (split_seen, split_logs), (joint_seen, joint_logs) = found
    torch.testing.assert_close(split_logs, joint_logs)
    assert split_seen["seg"].keys() == joint_seen["seg"].keys()
    for key in ("seg", "disc"):
        torch.testing.assert_close(split_seen[key], joint_seen[key], rtol=1e-5, atol=1e-6)
