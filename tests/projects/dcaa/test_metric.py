from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.evaluator import Evaluator
from mmengine.structures import BaseDataElement, PixelData

from alimm.projects.dcaa import metric as metric_module
from alimm.projects.dcaa.metric import ConditionIoUMetric, confusion, iou, table_text
from tests.gloo_pool import GlooPool

CLASSES = ("road", "car", "sky")
IGNORE = 255


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the metric logs; MMEngine's loggers keep pytest's capture out."""
    lines: list[str] = []
    monkeypatch.setattr(metric_module, "print_log", lambda text, logger: lines.append(text))
    return lines


def make_sample(pred: Any, gt: Any, condition: str | None = "night", **meta: Any) -> dict[str, Any]:
    """What MMEngine's evaluator hands to a metric: a data sample as a dict."""
    sample: dict[str, Any] = {"img_path": "a.png", **meta}
    if pred is not None:
        sample["pred_sem_seg"] = {"data": torch.as_tensor(pred)[None]}
    if gt is not None:
        sample["gt_sem_seg"] = {"data": torch.as_tensor(gt)[None]}
    if condition is not None:
        sample["condition"] = condition
    return sample


def make_metric(**arguments: Any) -> ConditionIoUMetric:
    metric = ConditionIoUMetric(**arguments)
    metric.dataset_meta = {"classes": CLASSES}
    return metric


def random_samples(count: int, conditions: tuple[str, ...], seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(count):
        gt = rng.integers(0, 3, (5, 7))
        gt[rng.random((5, 7)) < 0.2] = IGNORE
        samples.append(make_sample(rng.integers(0, 3, (5, 7)), gt, conditions[index % len(conditions)]))
    return samples


def slow_iou(pairs: list[tuple[Any, Any]], num_classes: int) -> list[float | None]:
    """Pixel by pixel; None for a class that is in neither."""
    result: list[float | None] = []
    for c in range(num_classes):
        intersection = union = 0
        for pred, gt in pairs:
            for p, t in zip(np.asarray(pred).flat, np.asarray(gt).flat, strict=True):
                if t == IGNORE:
                    continue
                intersection += int(p == c and t == c)
                union += int(p == c or t == c)
        result.append(intersection / union if union else None)
    return result


def slow_mean(values: list[float | None]) -> float:
    present = [value for value in values if value is not None]
    return 100 * sum(present) / len(present)


def pairs_of(samples: list[dict[str, Any]], condition: str | None = None) -> list[tuple[Any, Any]]:
    return [
        (sample["pred_sem_seg"]["data"].numpy(), sample["gt_sem_seg"]["data"].numpy())
        for sample in samples
        if condition in (None, sample["condition"])
    ]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_confusion_and_iou_equal_loops_over_the_pixels(data: st.DataObject) -> None:
    num_classes = data.draw(st.integers(1, 4))
    labels = st.sampled_from([*range(num_classes), IGNORE])
    pixels = data.draw(st.lists(st.tuples(st.integers(0, num_classes - 1), labels), max_size=12))
    pred = np.array([p for p, _ in pixels], np.int64)
    gt = np.array([t for _, t in pixels], np.uint8)
    expected = [[0] * num_classes for _ in range(num_classes)]
    for p, t in pixels:
        if t != IGNORE:
            expected[t][p] += 1
    counts_CC = confusion(pred, gt, num_classes, IGNORE)
    assert counts_CC.dtype == np.int64
    assert counts_CC.tolist() == expected
    slow = [np.nan if value is None else value for value in slow_iou([(pred, gt)], num_classes)]
    np.testing.assert_allclose(iou(counts_CC), slow, rtol=1e-12)


def test_what_is_predicted_on_ignored_pixels_does_not_matter() -> None:
    gt = np.array([[0, IGNORE]])
    np.testing.assert_array_equal(confusion(np.array([[0, 77]]), gt, 2), [[1, 0], [0, 0]])
    np.testing.assert_array_equal(
        confusion(np.array([[0, 3]]), np.array([[0, 9]]), 2, ignore_index=9), [[1, 0], [0, 0]]
    )


def test_metrics_equal_loops_over_the_pixels() -> None:
    conditions = ("clear", "night", "fog")
    samples = random_samples(7, conditions)
    metric = make_metric(conditions=conditions, source_miou=60.0)
    metric.process(None, samples[:3])
    metric.process(None, samples[3:])
    metrics = metric.evaluate(len(samples))
    means = {name: slow_mean(slow_iou(pairs_of(samples, name), 3)) for name in conditions}
    pooled = slow_mean(slow_iou(pairs_of(samples), 3))
    right = [p == t for pred, gt in pairs_of(samples) for p, t in zip(pred.flat, gt.flat, strict=True) if t != IGNORE]
    expected = {
        "mIoU": pooled,
        "mIoU/clear": means["clear"],
        "mIoU/night": means["night"],
        "mIoU/fog": means["fog"],
        "mIoU/mean": sum(means.values()) / 3,
        "mIoU/worst": min(means.values()),
        "mIoU/adverse": (means["night"] + means["fog"]) / 2,
        "aAcc": 100 * sum(right) / len(right),
        "gap": 60.0 - pooled,
    }
    assert list(metrics) == list(expected)
    assert metrics == pytest.approx(expected, rel=1e-12)
    assert abs(metrics["mIoU"] - metrics["mIoU/mean"]) > 0.05


def test_pooled_hides_what_the_worst_shows() -> None:
    day = make_sample([[0] * 50 + [1] * 50], [[0] * 50 + [1] * 50], "clear")
    night = make_sample([[1, 0]], [[0, 1]], "night")
    metric = make_metric()
    metric.process(None, [day, night])
    metrics = metric.evaluate(2)
    assert metrics["mIoU"] == pytest.approx(100 * 50 / 52)
    assert metrics["mIoU/worst"] == metrics["mIoU/night"] == metrics["mIoU/adverse"] == 0
    assert metrics["mIoU/mean"] == pytest.approx(50)


def test_a_class_that_a_condition_lacks_does_not_count_there(log: list[str]) -> None:
    metric = make_metric(print_table=False)
    metric.process(None, [make_sample([[0, 0, 1]], [[0, 0, 1]], "clear"), make_sample([[0, 2]], [[0, 0]], "night")])
    metrics = metric.evaluate(2)
    assert metrics["mIoU/clear"] == 100  # sky is nowhere
    assert metrics["mIoU/night"] == pytest.approx(25)  # sky was called once, wrongly: road 1/2, sky 0
    assert metrics["mIoU"] == pytest.approx(100 * (3 / 4 + 1 + 0) / 3)
    assert "clear 100.00 (2 of 3 classes), night 25.00 (2 of 3 classes), pooled 58.33 (3 of 3 classes)" in "".join(log)


def test_the_adverse_conditions_can_be_named() -> None:
    samples = random_samples(6, ("clear", "night", "fog"))
    metric = make_metric(adverse=["fog"])
    metric.process(None, samples)
    metrics = metric.evaluate(6)
    assert metrics["mIoU/adverse"] == metrics["mIoU/fog"] != metrics["mIoU/night"]
    metric = make_metric(clear_names=["clear", "night", "fog"])
    metric.process(None, samples)
    assert "mIoU/adverse" not in metric.evaluate(6)


def test_the_conditions_of_the_data_set_give_the_order_and_absent_ones_are_named(
    log: list[str],
) -> None:
    metric = ConditionIoUMetric()
    metric.dataset_meta = {"classes": CLASSES, "conditions": ("clear", "fog", "night", "snow")}
    blank = make_sample([[0]], [[IGNORE]], "snow")
    metric.process(None, [make_sample([[0, 0]], [[0, 1]], "night"), make_sample([[0]], [[0]], "clear"), blank])
    metrics = metric.evaluate(3)
    assert [key for key in metrics if key.startswith("mIoU/")] == [
        "mIoU/clear", "mIoU/night", "mIoU/mean", "mIoU/worst", "mIoU/adverse",
    ]  # fmt: skip
    assert "no labelled pixel of fog, snow" in "".join(log)
    assert metrics["mIoU/mean"] == pytest.approx((100 + 25) / 2)
    assert metric.confusions["night"].tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_data_samples_and_the_evaluator_are_served() -> None:
    sample = BaseDataElement(metainfo={"condition": "night", "cond_id": 0})
    sample.pred_sem_seg = PixelData(data=torch.tensor([[[0, 1]]]))
    sample.gt_sem_seg = PixelData(data=torch.tensor([[[0, 1]]], dtype=torch.uint8))
    metric = make_metric()
    metric.process(None, [sample])
    evaluator = Evaluator([metric, make_metric(prefix="again")])
    evaluator.dataset_meta = {"classes": CLASSES}
    evaluator.process([sample])
    metrics = evaluator.evaluate(2)
    assert metrics["mIoU/night"] == metrics["again/mIoU/night"] == 100


def test_the_table_has_a_row_a_class_and_counts_them() -> None:
    text = table_text(CLASSES, {"night": np.array([50.0, np.nan, 25.0]), "pooled": np.array([100.0, 1.0, 1.0])})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0] == "|"]
    cells = [row for row in rows if len(row) == 3]
    assert cells[0] == ["class", "night", "pooled"]
    assert ["road", "50.00", "100.00"] in cells
    assert ["car", "-", "1.00"] in cells
    assert cells[-2:] == [["mIoU", "37.50", "34.00"], ["classes counted", "2", "3"]]


def test_a_wide_table_is_not_cut(log: list[str]) -> None:
    names = tuple(f"condition_{index}" for index in range(12))
    metric = make_metric(conditions=names)
    metric.process(None, random_samples(12, names))
    metric.evaluate(12)
    assert all(name in "".join(log) for name in names)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (make_sample([[0]], None), r"a\.png has no gt_sem_seg: load label maps"),
        (make_sample(None, [[0]]), r"has no pred_sem_seg"),
        (make_sample([[0]], [[0]], None), r"no 'condition' in its metainfo.*PackConditionInputs"),
        (make_sample([[0]], [[0]], "snow"), r"condition 'snow', known are clear, night"),
        (make_sample([[0, 0]], [[0], [0]]), r"is 1 x 2, its ground truth 2 x 1 pixels.*LoadAnnotations come after"),
        (make_sample([[0, 0, 0]], [[7, 0, 3]]), r"ground truth holds 3, 7, but the classes are 0 to 2 .* 255"),
        (make_sample([[3]], [[0]]), r"the prediction holds 3, .*num_classes of the model"),
        (make_sample([[0.5]], [[0]]), r"prediction must hold whole numbers.*float32"),
    ],
)
def test_mistakes_in_a_sample_are_named(sample: dict[str, Any], message: str) -> None:
    metric = make_metric(conditions=["clear", "night"])
    with pytest.raises(ValueError, match=message):
        metric.process(None, [sample])


def test_mistakes_in_the_arguments_are_named() -> None:
    for bad in ("worst", "mean", "adverse", ""):
        with pytest.raises(ValueError, match="cannot be part of a metric's key"):
            ConditionIoUMetric(conditions=["clear", bad])
        with pytest.raises(ValueError, match="cannot be part of a metric's key"):
            make_metric().process(None, [make_sample([[0]], [[0]], bad)])
    with pytest.raises(ValueError, match=r"write \['night'\]"):
        ConditionIoUMetric(adverse="night")
    with pytest.raises(ValueError, match="'rain night' and 'rain/night' would both be mIoU/rain_night: rename one"):
        ConditionIoUMetric(conditions=["rain night", "rain/night"])
    metric = make_metric()
    metric.process(None, [make_sample([[0]], [[0]], "rain night")])
    metric.process(None, [make_sample([[0]], [[0]], "rain night")])
    with pytest.raises(ValueError, match="would both be mIoU/rain_night"):
        metric.process(None, [make_sample([[0]], [[0]], "rain/night")])
    metric = make_metric()
    metric.results = [(name, np.ones((3, 3), np.int32)) for name in ("rain night", "rain/night")]  # of two ranks
    with pytest.raises(ValueError, match="would both be mIoU/rain_night"):
        metric.compute_metrics(metric.results)
    with pytest.raises(ValueError, match="twice"):
        ConditionIoUMetric(conditions=["night", "night"])
    with pytest.raises(ValueError, match="adverse names fog, but the conditions are clear, night"):
        ConditionIoUMetric(conditions=["clear", "night"], adverse=["fog"])
    with pytest.raises(ValueError, match="source_miou must be per cent"):
        ConditionIoUMetric(source_miou=0.62)


def test_an_empty_or_unlabelled_set_is_named() -> None:
    with pytest.raises(ValueError, match="no sample to judge"):
        make_metric().evaluate(0)
    metric = make_metric()
    metric.process(None, [make_sample([[0]], [[IGNORE]])])
    with pytest.raises(ValueError, match="no pixel of 1 samples is labelled, all are 255"):
        metric.evaluate(1)
    metric = make_metric(adverse=["fog"])
    metric.process(None, [make_sample([[0]], [[0]])])
    with pytest.raises(ValueError, match="adverse names fog"):
        metric.evaluate(1)
    with pytest.raises(ValueError, match="needs the classes"):
        ConditionIoUMetric().process(None, [make_sample([[0]], [[0]])])


def evaluate_on_rank(count: int) -> dict[str, float]:
    samples = random_samples(count, ("clear", "night"))
    mine = samples[dist.get_rank() :: 2]
    if len(mine) < (count + 1) // 2:  # a sampler repeats a sample so that all ranks have as many
        mine = [*mine, samples[0]]
    metric = make_metric()
    metric.process(None, mine)
    return metric.evaluate(count)


def test_two_ranks_say_what_one_says(gloo: GlooPool) -> None:
    metric = make_metric()
    metric.process(None, random_samples(5, ("clear", "night")))
    alone = metric.evaluate(5)
    for metrics in gloo.run(2, evaluate_on_rank, 5):
        assert metrics == pytest.approx(alone)


def test_the_keys_survive_the_log() -> None:
    """MMEngine joins the loop's name and the key with a slash and splits them again."""
    from mmengine.logging import MessageHub
    from mmengine.runner import LogProcessor

    names = ("clear", "night rain", "a/b", "Nebel-\u00fcber+2.5", "\u96e8", "x:y")
    keys = ("clear", "night_rain", "a_b", "Nebel-\u00fcber+2.5", "\u96e8", "x_y")
    metric = make_metric(conditions=names)
    metric.process(None, random_samples(6, names))
    hub = MessageHub.get_instance("dcaa_metric_keys")
    for key, value in metric.evaluate(6).items():
        hub.update_scalar(f"val/{key}", value)
    runner = SimpleNamespace(message_hub=hub, iter=1, epoch=0, val_loop=SimpleNamespace(dataloader=[1]))
    tag, _ = LogProcessor(by_epoch=False).get_log_after_epoch(runner, 1, "val", with_non_scalar=False)
    for key in keys:
        assert tag[f"mIoU/{key}"] == pytest.approx(hub.get_scalar(f"val/mIoU/{key}").current())
    assert list(metric.confusions) == list(names)
