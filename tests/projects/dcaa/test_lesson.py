"""The lesson of a teacher by hand, and mixing it with source pictures."""

from __future__ import annotations

import pytest
import torch
from mmengine.structures import PixelData

pytest.importorskip("mmseg")

from mmseg.structures import SegDataSample

from alimm.projects.dcaa import lesson as lessons
from alimm.projects.dcaa.batch import DomainBatch
from alimm.projects.dcaa.head import BranchOutputs
from alimm.projects.dcaa.options import SelfTraining
from tests.projects.dcaa.tiny import batch, dcaa

IGNORE = 255


def outputs(prob_hw2: list[list[list[float]]]) -> BranchOutputs:
    logits = torch.tensor(prob_hw2).permute(2, 0, 1)[None].log()
    return BranchOutputs([logits], logits, torch.ones_like(logits[:, :1]))


def test_a_lesson_by_hand() -> None:
    taught = outputs([[[0.9, 0.1], [0.55, 0.45]], [[0.2, 0.8], [0.3, 0.7]]])
    d = torch.tensor([[[0.8, 0.9], [0.3, 0.6]]])
    inside = torch.tensor([[[True, True], [True, False]]])
    options = SelfTraining(threshold=0.6, ambivalence_threshold=0.5)
    labels, easy, hard = lessons.make_lesson(taught, d, inside, options, IGNORE)
    assert labels.tolist() == [[[0, IGNORE], [1, IGNORE]]]
    torch.testing.assert_close(easy, torch.tensor([[[0.8, 0.0], [0.0, 0.0]]]))
    assert hard.tolist() == [[[0, 1], [1, 0]]], "not sure: hard; unlike the source: hard; padding: neither"
    labels, easy, hard = lessons.make_lesson(taught, None, inside, options, IGNORE)
    assert easy.tolist() == [[[1, 0], [1, 0]]]
    assert hard.tolist() == [[[0, 1], [0, 0]]]


def test_a_quantile_as_threshold_is_taken_class_by_class() -> None:
    taught = outputs([[[0.95, 0.05], [0.7, 0.3]], [[0.2, 0.8], [0.35, 0.65]]])
    inside = torch.ones(1, 2, 2, dtype=torch.bool)
    labels, *_ = lessons.make_lesson(taught, None, inside, SelfTraining(threshold="q50"), IGNORE)
    # The medians are 0.825 and 0.725: of either class the surer pixel stays.
    assert labels.tolist() == [[[0, IGNORE], [1, IGNORE]]]
    with pytest.raises(ValueError, match="such as 'q50', got 'half'"):
        SelfTraining.of(dict(threshold="half"))


def domain(value: float, labels: torch.Tensor | None, ids: list[int], size: tuple[int, int] = (4, 8)) -> DomainBatch:
    samples = [SegDataSample() for _ in ids]
    for number, sample in enumerate(samples):
        if labels is not None:
            sample.gt_sem_seg = PixelData(data=labels[number][None])
    pictures = torch.arange(len(ids)).float()[:, None, None, None] + value
    return DomainBatch(pictures.expand(-1, 3, *size).clone(), samples, torch.tensor(ids))


def test_mixing_pastes_true_labels_with_weight_one() -> None:
    torch.manual_seed(0)
    left = torch.full((2, 4, 8), 3)
    left[:, :, 4:] = IGNORE
    source = domain(100.0, left, [1, 0])
    target = domain(0.0, None, [0, 1])
    labels = torch.full((2, 2, 4), 7)
    easy, hard = torch.full((2, 2, 4), 0.25), torch.zeros(2, 2, 4)
    easy[:, 0], hard[:, 0] = 0.0, 1.0
    pictures, mixed = lessons.mixed(source, target, lessons.Lesson(labels, easy, hard), IGNORE)
    # The one class with labels is pasted, from the picture in the style of the target's condition.
    assert pictures[0, 0].tolist() == [[101.0] * 4 + [0.0] * 4] * 4
    assert pictures[1, 0].tolist() == [[100.0] * 4 + [1.0] * 4] * 4
    assert mixed.labels[0].tolist() == [[3, 3, 7, 7]] * 2
    assert mixed.easy[0].tolist() == [[1, 1, 0, 0], [1, 1, 0.25, 0.25]]
    assert mixed.hard[0].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]


def test_partners_take_turns_and_fall_back_on_any_picture() -> None:
    found = lessons._partners(torch.tensor([2, 0, 2]), torch.tensor([2, 2, 2, 1, 0]))
    assert found.tolist() == [0, 2, 0, 0, 1]


def test_mixing_needs_one_size() -> None:
    source = domain(0.0, torch.zeros(1, 4, 8, dtype=torch.long), [0])
    target = domain(0.0, None, [0], (8, 8))
    empty = lessons.Lesson(*(torch.zeros(1, 4, 4, dtype=kind) for kind in (torch.long, torch.float, torch.float)))
    with pytest.raises(ValueError, match="same crop size"):
        lessons.mixed(source, target, empty, IGNORE)


def test_a_mixed_student_learns_and_the_judges_see_whole_pictures() -> None:
    model = dcaa(self_training=dict(threshold=0.0, student="mixed"))
    model.enter_stage("self_train")
    ready = model.read_batch(batch())
    taught, _ = model.lesson(ready.target)
    torch.manual_seed(1)
    parts = list(model.segmentor_losses(ready))
    assert float(parts[1]["target.loss_easy"].detach()) > 0
    torch.testing.assert_close(ready.kept["target"][1], taught.att.softmax(dim=1))
