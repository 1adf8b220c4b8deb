"""Accuracy functions and metrics against definitions written out as loops over random orders of the ties."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.evaluation import (
    Accuracy,
    PerClassAccuracy,
    ShotAccuracy,
    class_accuracy,
    confusion_matrix,
    label_place,
    shot_groups,
    top_confusions,
    topk_credit,
)
from alimm.registry import METRICS
from alimm.structures import ClsDataSample


def credit_by_permutations(scores: list[float], label: int, k: int) -> float:
    """Share of all orders of the classes, then stably sorted by score, that put the label among the first k."""
    orders = list(itertools.permutations(range(len(scores))))
    hits = sum(label in sorted(order, key=lambda c: -scores[c])[:k] for order in orders)
    return hits / len(orders)


def predictions(scores: torch.Tensor, labels: list[int]) -> list[dict]:
    samples = []
    for index, (score, label) in enumerate(zip(scores, labels, strict=True)):
        sample = ClsDataSample(metainfo={"sample_id": f"s{index}"})
        samples.append(sample.set_gt_label(label).set_pred_score(score).to_dict())
    return samples


def evaluate(metric, scores: torch.Tensor, labels: list[int], size: int | None = None, batch: int = 3) -> dict:
    samples = predictions(scores, labels)
    for start in range(0, len(samples), batch):
        metric.process({}, samples[start : start + batch])
    return metric.evaluate(len(samples) if size is None else size)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.data())
def test_topk_credit_is_the_mean_over_all_orders(scores, data):
    label = data.draw(st.integers(0, len(scores) - 1))
    k = data.draw(st.integers(1, len(scores)))
    above, tied = label_place(torch.tensor([scores], dtype=torch.float32), torch.tensor([label]))
    assert float(topk_credit(above, tied, k)) == pytest.approx(credit_by_permutations(scores, label, k), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_accuracy_without_ties_equals_topk(dtype):
    # A different permutation of 0..7 a row: no ties in any dtype.
    scores = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(s)) for s in range(50)]).to(dtype)
    labels = [s % 8 for s in range(50)]
    result = evaluate(Accuracy(topk=(1, 3)), scores, labels)
    for k in (1, 3):
        right = sum(label in row.topk(k).indices.tolist() for row, label in zip(scores, labels, strict=True))
        assert result[f"accuracy/top{k}"] == pytest.approx(100 * right / 50)
    assert result["accuracy/top3"] > result["accuracy/top1"]


def test_a_constant_model_gets_chance_and_not_all_or_nothing():
    result = evaluate(Accuracy(topk=(1, 2)), torch.full((6, 4), 0.25), [0, 0, 0, 3, 2, 1])
    assert result == {"accuracy/top1": pytest.approx(25.0), "accuracy/top2": pytest.approx(50.0)}


def test_large_class_numbers_survive_half_precision_scores():
    scores = torch.zeros(1, 5000, dtype=torch.float16)
    scores[0, 4097] = 1.0  # float16 cannot hold 4097
    assert evaluate(Accuracy(), scores, [4097])["accuracy/top1"] == 100.0


def test_samples_that_only_fill_the_last_batch_do_not_count():
    scores = torch.eye(3)[[0, 1, 2, 0]]
    assert evaluate(Accuracy(), scores, [0, 1, 1, 2], size=3)["accuracy/top1"] == pytest.approx(200 / 3)


def test_nan_scores_name_the_row_and_the_batch():
    scores = torch.rand(4, 3)
    scores[2, 1] = float("nan")
    with pytest.raises(ValueError, match="row 2 hold NaN"):
        label_place(scores, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"starts with sample s2.*row 0 hold NaN"):
        evaluate(Accuracy(), scores, [0, 0, 0, 0], batch=2)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.rand(2, 3), torch.tensor([0, 3]), "row 1 has the label 3.*0 to 2"),
        (torch.rand(2, 3), torch.tensor([-1, 0]), "row 0 has the label -1"),
        (torch.rand(2, 3), torch.tensor([0]), "expected scores of shape"),
    ],
)
def test_bad_labels_are_named(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        label_place(scores, labels)


def test_metric_mistakes_are_named():
    with pytest.raises(ValueError, match="topk=5 was asked for with 3 classes"):
        evaluate(Accuracy(topk=5), torch.rand(1, 3), [0])
    with pytest.raises(ValueError, match="topk must be"):
        Accuracy(topk=0)
    sample = predictions(torch.rand(1, 3), [0])[0]
    with pytest.raises(ValueError, match="Accuracy needs pred_score, the prediction for the sample s0"):
        Accuracy().process({}, [{k: v for k, v in sample.items() if k != "pred_score"}])
    with pytest.raises(ValueError, match="Accuracy needs gt_label, the sample s0"):
        Accuracy().process({}, [{k: v for k, v in sample.items() if k != "gt_label"}])
    with pytest.raises(ValueError, match="one label in gt_label, the sample s0 has"):
        Accuracy().process({}, [{**sample, "gt_label": torch.tensor([0, 1])}])
    with pytest.raises(ValueError, match="test set empty"):
        Accuracy().evaluate(0)


def test_class_accuracy_is_a_loop_over_classes():
    rng = np.random.default_rng(0)
    labels, credit = rng.integers(0, 6, 100), rng.random(100)
    labels[labels == 4] = 5
    accuracy, counts = class_accuracy(labels, credit, 7)
    for c in range(7):
        mine = [w for label, w in zip(labels, credit, strict=True) if label == c]
        assert counts[c] == len(mine)
        assert (np.isnan(accuracy[c]) and not mine) or accuracy[c] == pytest.approx(sum(mine) / len(mine))


def test_mean_class_accuracy_weighs_classes_alike_and_skips_absent_ones():
    # Class 0: 3 of 4 right; class 1: 0 of 1; class 2 and 3: no test samples.
    scores = torch.eye(4)[[0, 0, 0, 1, 0]]
    metric = PerClassAccuracy()
    metric.dataset_meta = {"classes": ("cat", "dog", "fish", "owl")}
    assert evaluate(metric, scores, [0, 0, 0, 0, 1])["accuracy/mean_class"] == pytest.approx(37.5)
    lines = metric.table(np.array([0.75, 0.0, np.nan, np.nan]), np.array([4, 1, 0, 0])).splitlines()
    assert [line.split() for line in lines[1:3]] == [["dog", "1", "0.00"], ["cat", "4", "75.00"]]
    assert lines[3] == "0 more classes with samples, 2 classes without"


def test_shot_groups_at_their_borders():
    counts = [0, 1, 19, 20, 100, 101]
    assert shot_groups(counts).tolist() == ["unseen", "few", "few", "medium", "medium", "many"]
    assert shot_groups(counts, many_above=10, few_below=2).tolist() == ["unseen", "few", *["many"] * 4]
    with pytest.raises(ValueError, match="few_below"):
        shot_groups(counts, many_above=5, few_below=20)
    with pytest.raises(ValueError, match="whole numbers"):
        shot_groups([0.5, 1.0])


def test_shot_accuracy_averages_over_the_classes_of_a_group(tmp_path):
    # Classes 0, 1 are many: 1/2 and 1/1; class 2 is medium without test samples; class 3 is few: 0/1; class 4 unseen.
    scores, labels = torch.eye(5)[[0, 1, 1, 0, 4]], [0, 0, 1, 3, 4]
    counts = [500, 101, 50, 3, 0]
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    np.save(tmp_path / "counts.npy", np.array(counts))
    expected = {"shot/many": pytest.approx(75.0), "shot/few": 0.0, "shot/unseen": 100.0}
    for source in (counts, str(tmp_path / "counts.json"), str(tmp_path / "counts.npy")):
        assert evaluate(ShotAccuracy(source), scores, labels) == expected
    metric = ShotAccuracy()
    metric.dataset_meta = {"class_counts": counts}
    assert evaluate(metric, scores, labels) == expected


def test_shot_accuracy_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="set train_counts"):
        evaluate(ShotAccuracy(), torch.rand(1, 3), [0])
    with pytest.raises(ValueError, match="train counts of 2 classes, the model has 3"):
        evaluate(ShotAccuracy([1, 2]), torch.rand(1, 3), [0])
    with pytest.raises(ValueError, match=r"cannot read .*none\.json"):
        ShotAccuracy(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*bad\.json"):
        ShotAccuracy(str(tmp_path / "bad.json"))
    (tmp_path / "text.json").write_text('["a"]')
    with pytest.raises(ValueError, match=r"text\.json must hold a list of whole numbers"):
        ShotAccuracy(str(tmp_path / "text.json"))


def test_metrics_are_built_from_a_config():
    assert isinstance(METRICS.build({"type": "alimm.Accuracy", "topk": (1, 5)}), Accuracy)
    assert METRICS.get("alimm.RetrievalMetric") is not None


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=30), st.integers(0, 8))
def test_confusions_are_counted_as_by_hand(pairs, count):
    labels = np.array([a for a, _ in pairs], dtype=np.int64)
    found = np.array([b for _, b in pairs], dtype=np.int64)
    matrix = confusion_matrix(labels, found, 5)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == [[pairs.count((a, b)) for b in range(5)] for a in range(5)]
    wrong = sorted({p for p in pairs if p[0] != p[1]}, key=lambda p: (-pairs.count(p), p))
    rows = [(a, b, pairs.count((a, b)), sum(x == a for x, _ in pairs)) for a, b in wrong[:count]]
    assert [tuple(row) for row in top_confusions(labels, found, count)] == rows


def test_top_confusions_needs_no_matrix():
    big = 10**9
    assert top_confusions(np.array([big, big, 5]), np.array([7, 7, 5]), 3) == [(big, 7, 2, 2)]


@pytest.mark.parametrize(
    ("labels", "found", "message"),
    [
        ([0, 1], [0], "one shape"),
        ([0, 3], [0, 0], "labels hold class 3 at row 1, there are 3"),
        ([0, 1], [0, -1], "predictions must be at least 0, got -1 at row 1"),
        ([0.5, 1], [0, 1], "labels must be whole numbers"),
    ],
)
def test_confusion_matrix_names_bad_input(labels, found, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(labels), np.array(found), 3)
