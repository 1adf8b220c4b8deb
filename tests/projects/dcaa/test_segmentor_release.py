"""``release_compat``: what the released code does otherwise, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmseg")

from alimm.projects.dcaa.options import SelfTraining
from tests.projects.dcaa.tiny import batch, dcaa, moved, note_backward, read, teaching, weights
from tests.projects.dcaa.tiny_segmentor import CLASSES, SIZE, alternating

RELEASE = dict(release_compat=True)
WEIGHTS = (1.0, 2.0, 20.0)


def test_alignment_steps_the_global_discriminator_alone() -> None:
    model = teaching(2, align=RELEASE)
    model.enter_stage("align")
    wrapper = alternating(model)
    for stage, expected in (("align", [False, False, True]), ("self_train", [True, True, True])):
        model.enter_stage(stage)
        before = [weights(judge) for judge in model.discriminators]
        logs = [model.train_step(batch(), wrapper) for _ in range(2)]
        assert [moved(judge, b) for judge, b in zip(model.discriminators, before, strict=True)] == expected
        assert "source.loss_d_cond" in logs[0]


def test_hard_loss_is_divided_on_the_grid_of_the_mask() -> None:
    found = []
    for options in ({}, RELEASE):
        model = teaching(2, align=options, threshold=0.99)  # no label, so all pixels are hard
        logs = model.train_step(batch(), alternating(model))
        assert (logs["target.loss_easy"], logs["target.easy"]) == (0, 0)
        found.append(logs)
    patches, pixels = 2 * 4, 8 * 16
    for name in ("target.loss_adv_cond", "target.loss_adv_global"):
        native, release = (float(logs[name]) for logs in found)
        assert release / native == pytest.approx((patches + 1) / (pixels + 1), rel=1e-4)


def test_ambivalence_reads_enlarged_logits() -> None:
    model = teaching(2, align=RELEASE)
    sizes: list[Any] = []
    model.teacher.parts["discriminator"].register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[2:]))
    model.train_step(batch(), alternating(model))
    assert set(sizes) == {(8 * 4, 16 * 4)}  # the discriminator's stride is 4


@pytest.mark.parametrize("release", [True, False])
def test_class_weights(release: bool) -> None:
    """Of the source in either mode, with a weighted mean and aligned corners; of pseudo labels in the release alone."""
    model = teaching(2, align=dict(class_weight=WEIGHTS, release_compat=release), threshold=0.34)
    slow = copy.deepcopy(model)
    data = read(slow, batch())
    outputs = slow.decode_head.forward_all(slow.extract_feat(data.source.inputs))
    above, below = 0.0, 0.0
    for i, k in enumerate((0, 1)):
        label = data.source.samples[i].gt_sem_seg.data[0]
        for logits in (outputs.cond[k][i], outputs.att[i]):
            large = F.interpolate(logits[None], SIZE, mode="bilinear", align_corners=True)[0].log_softmax(0)
            for c in range(CLASSES):
                above -= WEIGHTS[c] * float(large[c][label == c].sum())
                below += WEIGHTS[c] * int((label == c).sum())
    _, (labels, easy, _) = slow.lesson(data.target)
    slow.extract_feat(data.source.inputs)
    log_p = slow.decode_head(slow.extract_feat(data.target.inputs)).log_softmax(1)
    own = torch.tensor(WEIGHTS if release else [1.0] * CLASSES)
    loss_easy = 0.0
    for c in range(CLASSES):
        loss_easy -= float((easy * own[c] * log_p[:, c])[labels == c].sum())
    logs = model.train_step(batch(), alternating(model))
    assert float(logs["source.loss_ce"]) == pytest.approx(above / below, rel=1e-4)
    assert float(logs["target.loss_easy"]) == pytest.approx(loss_easy / (1 + int((easy > 0).sum())), rel=1e-3)


def test_one_backward_pass() -> None:
    model = dcaa(2, **RELEASE, split_backward=True)
    wrapper = alternating(model)
    passes = note_backward(wrapper["seg"])
    logs = model.train_step(batch(), wrapper)
    names = ("source.loss_ce", "target.loss_adv_cond", "target.loss_adv_global")
    assert passes == [pytest.approx(sum(float(logs[name]) for name in names), rel=1e-5)]


@pytest.mark.parametrize(
    "option",
    [dict(pseudo_on="all"), dict(student="strong"), dict(momentum=0.1), dict(interval=5),
     dict(ambivalence_threshold=0.5)],
)  # fmt: skip
def test_refuses_what_the_release_has_not(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=f"where self_training.{name} is .* leave one of the two out"):
        dcaa(2, self_training=option, **RELEASE)
    dcaa(2, self_training=option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(thresh=0.5), "no option 'thresh'. Did you mean threshold?"),
        (dict(threshold=1.0), r"threshold lies in \[0, 1\), got 1.0"),
        (dict(threshold=[0.5, -0.1]), r"threshold lies in \[0, 1\)"),
        (dict(pseudo_on="fused"), "'global' or 'all', got 'fused'"),
        (dict(student="mild"), "'weak', 'strong' or 'mixed', got 'mild'"),
        (dict(weight=-1), "at least 0, got -1"),
    ],
)
def test_options_say_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfTraining.of(options)
