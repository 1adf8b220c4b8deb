"""Top-k accuracy from lists, against counting by hand and against the metric that sees all scores."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from alimm.evaluation import Accuracy, TopKAccuracy
from alimm.registry import METRICS
from alimm.structures import ClsDataSample


def listed(labels, lists, field="gt_label"):
    samples = []
    for index, (label, found) in enumerate(zip(labels, lists, strict=True)):
        sample = ClsDataSample(metainfo={"sample_id": f"s{index}"})
        sample.set_field(torch.tensor([label]), field)
        found = torch.tensor(found)
        samples.append(sample.set_pred_topk(found, torch.linspace(1, 0, len(found))).to_dict())
    return samples


def evaluate(metric, samples, size=None, batch=3):
    for start in range(0, len(samples), batch):
        metric.process({}, samples[start : start + batch])
    return metric.evaluate(len(samples) if size is None else size)


def test_counts_by_hand():
    samples = listed([7, 8, 9, 4], [[7, 1, 2], [1, 8, 2], [1, 2, 3], [2, 3, 4]])
    assert evaluate(TopKAccuracy(topk=(1, 2, 3)), samples) == {
        "accuracy/top1": 25.0,
        "accuracy/top2": 50.0,
        "accuracy/top3": 75.0,
    }
    assert evaluate(TopKAccuracy(topk=1, prefix="seen"), samples) == {"seen/top1": 25.0}


@given(st.integers(1, 8), st.integers(1, 20), st.integers(0, 999))
def test_lists_of_the_best_scores_equal_the_metric_of_all_scores(classes, count, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (count,), generator=generator).tolist()
    topk = tuple(range(1, classes + 1))
    full = [
        ClsDataSample().set_gt_label(label).set_pred_score(row).to_dict()
        for label, row in zip(labels, scores, strict=True)
    ]
    short = listed(labels, scores.argsort(dim=1, descending=True).tolist())
    expected = evaluate(Accuracy(topk=topk), full)
    assert evaluate(TopKAccuracy(topk=topk), short) == pytest.approx(expected)
    assert evaluate(TopKAccuracy(topk=topk), full) == expected


def test_ties_in_scores_count_their_share():
    samples = [ClsDataSample().set_gt_label(1).set_pred_score(torch.full((4,), 0.25)).to_dict()]
    assert evaluate(TopKAccuracy(topk=(1, 2)), samples) == {"accuracy/top1": 25.0, "accuracy/top2": 50.0}


def test_the_list_is_preferred_to_scores():
    sample = ClsDataSample().set_gt_label(2).set_pred_score(torch.tensor([0.1, 0.7, 0.2]))
    sample.set_pred_topk(torch.tensor([2, 1]), torch.tensor([0.6, 0.4]))
    assert sample.pred_label.tolist() == [2]
    assert evaluate(TopKAccuracy(topk=1), [sample.to_dict()]) == {"accuracy/top1": 100.0}


def test_minus_one_fills_the_list_and_is_never_a_hit():
    samples = listed([0, 5], [[0, -1, -1], [1, 0, -1]])
    assert evaluate(TopKAccuracy(topk=(1, 3)), samples) == {"accuracy/top1": 50.0, "accuracy/top3": 50.0}
    with pytest.raises(ValueError, match="sample s0 has gt_label -1"):
        TopKAccuracy().process({}, listed([-1], [[0, -1]]))


def test_target_field_and_large_class_ids():
    samples = listed([2**40, 3], [[2**40, 1], [2**40 + 1, 4]], field="gt_identity")
    assert evaluate(TopKAccuracy(topk=(1, 2), target="gt_identity"), samples)["accuracy/top2"] == 50.0
    with pytest.raises(ValueError, match="TopKAccuracy needs gt_label"):
        TopKAccuracy().process({}, samples)


def test_repeated_samples_are_cut():
    samples = listed([0, 1, 1, 0], [[0, 1], [0, 1], [0, 1], [0, 1]])
    assert evaluate(TopKAccuracy(topk=1), samples, size=3)["accuracy/top1"] == pytest.approx(100 / 3)


def metric_of_a_rank():
    """Three samples over two ranks: the sampler gives rank 1 the first one once more."""
    rank = dist.get_rank()
    every = listed([0, 1, 1], [[0, 1], [1, 0], [0, 1]])
    return evaluate(TopKAccuracy(topk=1), [every[0], every[2]] if rank == 0 else [every[1], every[0]], size=3)


def test_over_ranks_each_sample_counts_once(gloo):
    assert gloo.run(2, metric_of_a_rank)[0]["accuracy/top1"] == pytest.approx(200 / 3)


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="at least 1"):
        TopKAccuracy(topk=())
    with pytest.raises(ValueError, match="at least 1"):
        TopKAccuracy(topk=(1, 0))
    with pytest.raises(ValueError, match="no sample to judge"):
        TopKAccuracy().evaluate(0)
    with pytest.raises(ValueError, match="name 2 classes: set topk of the head to at least 5"):
        evaluate(TopKAccuracy(), listed([0], [[0, 1]]))
    bare = ClsDataSample(metainfo={"sample_id": "s7"}).set_gt_label(0).to_dict()
    with pytest.raises(ValueError, match=r"sample s7 .* set_pred_topk"):
        TopKAccuracy().process({}, [bare])
    scored = ClsDataSample().set_gt_label(0).set_pred_score(torch.ones(1)).to_dict()
    with pytest.raises(ValueError, match="for some samples of a batch only"):
        TopKAccuracy().process({}, [*listed([0], [[0]]), scored])
    for wrong in (torch.tensor([0.0]), torch.tensor(0), torch.zeros(0, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"pred_topk of shape \(k,\)"):
            TopKAccuracy().process({}, [{**bare, "pred_topk": wrong}])
    with pytest.raises(ValueError, match="are of classes 0 to 0"):
        TopKAccuracy().process({}, [{**scored, "gt_label": torch.tensor([3])}])
    TopKAccuracy().process({}, [])


@pytest.mark.parametrize(
    ("labels", "scores"),
    [
        (torch.tensor([1, 2]), torch.tensor([0.5])),
        (torch.tensor([[1]]), torch.tensor([[0.5]])),
        (torch.tensor([1.0]), torch.tensor([0.5])),
        (torch.zeros(0, dtype=torch.int64), torch.zeros(0)),
    ],
)
def test_a_list_that_is_none_is_refused(labels, scores):
    with pytest.raises(ValueError, match="pred_topk must be int64 labels"):
        ClsDataSample().set_pred_topk(labels, scores)


def test_found_by_name():
    assert isinstance(METRICS.build(dict(type="alimm.TopKAccuracy", topk=(1, 5))), TopKAccuracy)
