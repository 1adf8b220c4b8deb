"""The mean teacher: what it teaches, how it follows, and ClassMix."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmseg")

from alimm.projects.dcaa import augment_batch, base, mean_teacher
from tests.projects.dcaa.tiny_segmentor import (
    CLASSES,
    SIZE,
    alternating,
    assert_equal_weights,
    both,
    build,
    pictures,
    ready,
    sgd,
)

HEIGHT, WIDTH = SIZE
PADDED = dict(source=pictures("source"), target=pictures("target"))
PADDED["target"]["inputs"] = [picture[:, : HEIGHT - 4, : WIDTH - 6] for picture in PADDED["target"]["inputs"]]


def opinionated(**options: Any) -> tuple[Any, float]:
    """A model, and the threshold that about half its teacher's pixels reach."""
    model = build("MeanTeacherSegmentor", strong=False, batch_statistics=False, **options)
    with torch.no_grad():
        model.decode_head.conv_seg.weight.normal_(generator=torch.Generator().manual_seed(0))
    judge = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits = judge.encode_decode(ready(model, pictures("target"))["inputs"], [dict(img_shape=SIZE)])
    model.threshold = float(logits.softmax(1).amax(1).median())
    return model, model.threshold


def slow_lesson(model: Any, inputs: torch.Tensor, weighting: str, threshold: float) -> tuple[Any, Any]:
    """Labels and weights pixel by pixel, of a student that is its own teacher; padding 4 below and 6 at the right."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        logits = F.interpolate(model.decode_head(model.extract_feat(inputs)), SIZE, mode="bilinear")
    labels = torch.full((len(inputs), *SIZE), 255)
    weights = torch.zeros(len(inputs), *SIZE)
    for n in range(len(inputs)):
        sure = []
        for y in range(HEIGHT - 4):
            for x in range(WIDTH - 6):
                shares = logits[n, :, y, x].exp() / logits[n, :, y, x].exp().sum()
                labels[n, y, x] = int(shares.argmax())
                sure.append(bool(shares.max() > threshold))
                weights[n, y, x] = float(sure[-1])
        if weighting == "image":
            weights[n] = sum(sure) / len(sure)
    return labels, weights


@pytest.mark.parametrize("weighting", ["image", "pixel"])
def test_first_step_is_the_slow_one(weighting: str) -> None:
    model, threshold = opinionated(weighting=weighting, pseudo_weight=0.6)
    slow = copy.deepcopy(model)
    source, target = ready(slow, PADDED["source"]), ready(slow, PADDED["target"])
    labels, weights = slow_lesson(slow, target["inputs"], weighting, threshold)
    assert 0.05 < float(weights[:, : HEIGHT - 4, : WIDTH - 6].mean()) < 0.95  # else a weight would go unnoticed
    truth = torch.cat([sample.gt_sem_seg.data for sample in source["data_samples"]])
    large = F.interpolate(slow.decode_head(slow.extract_feat(source["inputs"])), SIZE, mode="bilinear")
    taught = F.interpolate(slow.decode_head(slow.extract_feat(target["inputs"])), SIZE, mode="bilinear")
    logs = taught.log_softmax(1)
    pseudo = torch.tensor(0.0)
    for c in range(CLASSES):
        pseudo = pseudo - (weights * logs[:, c])[labels == c].sum()
    pseudo = 0.6 * pseudo / (len(labels) * (HEIGHT - 4) * (WIDTH - 6))
    total = F.cross_entropy(large, truth) + pseudo
    total.backward()
    with torch.no_grad():
        for name, parameter in slow.named_parameters():
            if not name.startswith("teacher"):
                parameter -= 0.1 * parameter.grad

    logged = model.train_step(copy.deepcopy(PADDED), sgd(model))

    assert logged["target.loss_pseudo"].item() == pytest.approx(pseudo.item(), rel=1e-4)
    for part in ("backbone", "decode_head"):
        assert_equal_weights(getattr(model, part), getattr(slow, part), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.001, 0.4])
def test_teacher_follows_by_the_formula(momentum: float) -> None:
    model = build("MeanTeacherSegmentor", momentum=momentum, threshold=0.0)
    with torch.no_grad():
        model.decode_head.conv_seg.bias += 1.0  # as loaded weights differ from those the teacher was built with
    wrapper = sgd(model)
    students = [model.decode_head.conv_seg.weight.detach().clone(), None, None, None]
    for t in range(1, 4):
        model.train_step(both(t), wrapper)
        students[t] = model.decode_head.conv_seg.weight.detach().clone()
    expected = students[0]
    for t in range(1, 4):
        m = max(momentum, 1 / (t + 1))
        expected = (1 - m) * expected + m * students[t]
    taught = model.teacher.parts["decode_head"].conv_seg
    torch.testing.assert_close(taught.weight, expected)
    assert float(taught.bias.mean()) > 0.5
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    mine, theirs = model.backbone.stem[1].running_mean, model.teacher.parts["backbone"].stem[1].running_mean
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_student_sees_its_pictures_augmented_and_the_teacher_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("MeanTeacherSegmentor")
    raw: list[torch.Tensor] = []

    def white(images: torch.Tensor) -> torch.Tensor:
        raw.append(images)
        return torch.full_like(images, 155.0)

    monkeypatch.setattr(base, "strong_augment_batch", white)
    seen: dict[str, list[torch.Tensor]] = dict(student=[], teacher=[])
    model.backbone.register_forward_pre_hook(lambda _, args: seen["student"].append(args[0]))
    model.teacher.parts["backbone"].register_forward_pre_hook(lambda _, args: seen["teacher"].append(args[0]))
    data = both()
    given = torch.stack(data["target"]["inputs"]).flip(1).float()  # RGB
    inputs = ready(model, data["target"])["inputs"]
    model.train_step(data, sgd(model))
    torch.testing.assert_close(raw[0], given)
    torch.testing.assert_close(seen["teacher"][0], inputs)
    (_, student) = seen["student"]
    for channel, value in enumerate([55 / 50, 45 / 55, 35 / 60]):
        torch.testing.assert_close(student[:, channel], torch.full_like(student[:, channel], value))


def test_class_mix_pastes_pictures_labels_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, threshold = opinionated(class_mix=True)
    data = dict(source=pictures("source", n=1), target=pictures("target", n=2))
    source, target = ready(model, data["source"]), ready(model, data["target"])
    truth = source["data_samples"][0].gt_sem_seg.data[0]
    truth[:4] = 255
    data["source"]["data_samples"][0].gt_sem_seg.data[0, :4] = 255
    pseudo, _ = slow_lesson(model, target["inputs"], "image", threshold)
    results: list[Any] = []
    original = augment_batch.class_mix

    def spy(*args: Any, **options: Any) -> Any:
        results.append(original(*args, **options))
        return results[-1]

    monkeypatch.setattr(mean_teacher, "class_mix", spy)
    inputs: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.train_step(data, sgd(model))
    ((images, labels, weights),) = results
    assert images is inputs[1]
    inner = (slice(0, HEIGHT - 4), slice(0, WIDTH - 6))  # where slow_lesson has labels
    for n in range(2):
        pasted = (images[n] == source["inputs"][0]).all(0)
        torch.testing.assert_close(images[n], torch.where(pasted, source["inputs"][0], target["inputs"][n]))
        assert 0 < int(pasted.sum()) < pasted.numel()
        assert not pasted[:4].any()  # ignored pixels are no class
        assert len(truth[pasted].unique()) in (1, 2)
        for c in truth[pasted].unique():
            assert pasted[truth == c].all()
        assert torch.equal(labels[n][inner], torch.where(pasted, truth, pseudo[n])[inner])
        assert (weights[n][pasted] == 1).all()
        assert len(weights[n][~pasted].unique()) == 1
        assert 0 < float(weights[n][~pasted][0]) < 1


def test_class_mix_needs_one_size() -> None:
    model = build("MeanTeacherSegmentor", class_mix=True)
    model.data_preprocessor.size = None
    model.data_preprocessor.size_divisor = 8
    data = both()
    data["target"]["inputs"] = [picture[:, :, :48] for picture in data["target"]["inputs"]]
    with pytest.raises(ValueError, match=r"pictures \(32, 64\) into target pictures \(32, 48\)"):
        model.train_step(data, sgd(model))


def steps(model: Any, wrapper: Any, numbers: range) -> None:
    for i in numbers:
        torch.manual_seed(i)
        model.train_step(both(i), wrapper)


def test_resumes_exactly() -> None:
    whole = build("MeanTeacherSegmentor", class_mix=True, threshold=0.3)
    first, second = copy.deepcopy(whole), build("MeanTeacherSegmentor", seed=1, class_mix=True, threshold=0.3)
    steps(whole, alternating(whole), range(4))
    wrapper = alternating(first)
    steps(first, wrapper, range(2))
    again = alternating(second)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    again.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    steps(second, again, range(2, 4))
    assert int(second.teacher.steps) == 4
    assert_equal_weights(second, whole, rtol=0, atol=0)


def test_stages() -> None:
    model = build("MeanTeacherSegmentor", stage="source")
    wrapper = sgd(model)
    logs = model.train_step(both(), wrapper)
    assert not any(name.startswith("target") for name in logs)
    assert int(model.teacher.steps) == 0
    model.enter_stage("self_train")
    assert_equal_weights(model.teacher.parts["decode_head"], model.decode_head, rtol=0, atol=0)
    assert "target.loss_pseudo" in model.train_step(both(), wrapper)
    assert int(model.teacher.steps) == 1


@pytest.mark.parametrize("class_mix", [False, True])
def test_learns(class_mix: bool) -> None:
    model = build("MeanTeacherSegmentor", class_mix=class_mix, threshold=0.5)
    wrapper = alternating(model, lr=0.05)
    assert list(wrapper.keys()) == ["seg"]
    values = [model.train_step(both(i % 2), wrapper)["source.loss_ce"].item() for i in range(12)]
    assert sum(values[-2:]) < 0.8 * sum(values[:2])
    assert model.eval().test_step(pictures("target", n=1))[0].pred_sem_seg.data.shape == (1, *SIZE)


def test_target_labels_stay_outside() -> None:
    model = build("MeanTeacherSegmentor")
    with pytest.raises(ValueError, match="must not see"):
        model.train_step(dict(source=pictures("source"), target=pictures("target", labels=True)), sgd(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weighting="batch"), "weighting is one of image, pixel"),
        (dict(threshold=1.0), "threshold lies in"),
        (dict(pseudo_weight=-1.0), "pseudo_weight is at least 0"),
        (dict(momentum=0.0), "momentum"),
        (dict(stage="align"), "stages source, self_train"),
    ],
)
def test_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("MeanTeacherSegmentor", **options)


def test_by_default_the_teacher_normalises_by_the_batch() -> None:
    model = build("MeanTeacherSegmentor")
    inputs = ready(model, pictures("target"))["inputs"]
    student = copy.deepcopy(model).train()  # its only layers that behave otherwise in training are the batch norms
    with torch.no_grad():
        logits = student.decode_head(student.extract_feat(inputs))
        expected = F.interpolate(logits, SIZE, mode="bilinear").softmax(dim=1)
        found = model.teach(inputs)
        model.batch_statistics = False
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(model.teach(inputs), expected, atol=1e-3)
