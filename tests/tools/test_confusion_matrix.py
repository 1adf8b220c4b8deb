"""confusion_matrix from every kind of prediction file, and what it refuses to read."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import DumpResults
from mmengine.registry import DATASETS
from PIL import Image

from alimm.analysis import confusion_matrix as tool
from alimm.evaluation import confusion_matrix
from alimm.structures import ClsDataSample

LABELS = [0, 0, 0, 1, 1, 2]
FOUND = [0, 1, 1, 1, 2, 2]


@DATASETS.register_module()
class ThreeSpecies(BaseDataset):
    """Knows its classes only when it is built, and has no data to load."""

    def __init__(self, **kwargs):
        super().__init__(metainfo={"classes": ("cat", "dog", "sea lion")}, **kwargs)

    def load_data_list(self):
        raise AssertionError("the data was read")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text("test_dataloader = dict(dataset=dict(metainfo=dict(classes=('cat', 'dog', 'sea lion'))))\n")
    return str(path)


def samples() -> list[dict]:
    made = []
    for index, (label, found) in enumerate(zip(LABELS, FOUND, strict=True)):
        sample = ClsDataSample(metainfo={"sample_id": f"s{index}", "img_shape": (4, 4)}).set_gt_label(label)
        sample.set_pred_score(torch.eye(3)[found]).set_feature(torch.rand(4, dtype=torch.float16))
        made.append(sample.to_dict())
    return made


def write(path, kind: str):
    if kind == "pkl":  # as MMEngine writes it
        metric = DumpResults(str(path))
        metric.process({}, samples())
        metric.evaluate(len(LABELS))
    elif kind == "npz":  # as `alimm test` writes it
        np.savez_compressed(path, gt_label=np.array(LABELS)[:, None], pred_label=np.array(FOUND)[:, None])
    elif kind == "scores.npz":
        np.savez_compressed(path, gt_label=np.array(LABELS), pred_score=np.eye(3)[FOUND])
    elif kind == "json":
        path.write_text(json.dumps([{"gt_label": a, "pred_label": b} for a, b in zip(LABELS, FOUND, strict=True)]))
    else:
        path.write_bytes(
            pickle.dumps(
                [{"gt_label": np.int64(a), "pred_score": np.eye(3)[b]} for a, b in zip(LABELS, FOUND, strict=True)], 2
            )
        )
    return path


@pytest.mark.parametrize("kind", ["pkl", "numpy.pkl", "npz", "scores.npz", "json"])
@pytest.mark.parametrize("trust", [False, True])
def test_every_kind_of_file_gives_the_same_labels(tmp_path, kind, trust):
    labels, found = tool.read_predictions(write(tmp_path / f"p.{kind}", kind), trust)
    assert labels.tolist() == LABELS
    assert found.tolist() == FOUND
    assert confusion_matrix(labels, found, 3).tolist() == [[1, 2, 0], [0, 1, 1], [0, 0, 1]]


class Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def test_a_pickle_that_could_run_code_is_refused_without_trust(tmp_path, config, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps([{"gt_label": 0, "pred_label": 0, "x": Evil()}]))
    assert tool.main([config, str(path)]) == 1
    message = capsys.readouterr().err
    assert "evil.pkl holds a" in message
    assert "open" in message
    assert "--trust" in message
    assert not (tmp_path / "pwned").exists()
    assert tool.main([config, str(path), "--trust"]) == 0
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("kind", ["pkl", "npz", "json"])
def test_damaged_files_are_named(tmp_path, config, capsys, kind):
    path = write(tmp_path / f"p.{kind}", kind)
    data = path.read_bytes()
    for size in (0, 1, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        assert tool.main([config, str(path)]) == 1
        assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a list of dicts"),
        ({"gt_label": [0]}, "expected a list of dicts"),
        ([{"gt_label": 0}], "expected gt_label and pred_label or pred_score"),
        ([{"gt_label": [0, 1], "pred_label": 0}], "one whole number a sample in gt_label"),
        ([{"gt_label": 0, "pred_label": 0.5}], "one whole number a sample in pred_label"),
        ([{"gt_label": 0, "pred_label": 3}], "has the class 3"),
        ([{"gt_label": 0, "pred_label": -1}], "at least 0"),
    ],
)
def test_predictions_that_do_not_fit_are_named(tmp_path, config, capsys, content, message):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    assert tool.main([config, str(path)]) == 1
    assert message in capsys.readouterr().err


def test_lists_the_worst_by_name(tmp_path, config, capsys):
    path = write(tmp_path / "p.npz", "npz")
    assert tool.main([config, str(path), "--top-confusions", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 samples, 3 right (50.00 %)"
    assert lines[2].split() == ["2", "67", "%", "cat", "dog"]
    assert len(lines) == 3
    assert tool.main([config, str(path)]) == 0  # without any option: the list
    assert capsys.readouterr().out.splitlines()[3].split() == ["1", "50", "%", "dog", "sea", "lion"]


def test_draws_rows_as_true_classes(tmp_path, config, capsys):
    path, out = write(tmp_path / "p.npz", "npz"), tmp_path / "deep" / "matrix.png"
    assert tool.main([config, str(path), "--show-path", str(out), "--include-values"]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    assert Image.open(out).width > 300
    # The picture itself, without the words: the cell (true 0, predicted 1) is darker than (true 1, predicted 0).
    from matplotlib.figure import Figure

    drawn = {}
    original = Figure.savefig

    def keep(figure, *args, **kwargs):
        drawn["panel"] = figure.axes[0]
        return original(figure, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        tool.draw(np.array([[1, 2, 0], [0, 1, 1], [0, 0, 1]]), ["cat", "dog", "sea lion"], out, include_values=True)
    panel = drawn["panel"]
    np.testing.assert_allclose(panel.images[0].get_array(), [[1 / 3, 2 / 3, 0], [0, 1 / 2, 1 / 2], [0, 0, 1]])
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("predicted class", "true class")
    assert [t.get_text() for t in panel.get_yticklabels()] == ["cat", "dog", "sea lion"]
    values = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in panel.texts}
    assert values == {(0, 0): "1", (0, 1): "2", (1, 1): "1", (1, 2): "1", (2, 2): "1"}


def test_too_many_classes_are_for_the_list(tmp_path, capsys):
    config = tmp_path / "big.py"
    config.write_text("model = dict()\n")
    path = tmp_path / "p.npz"
    np.savez(path, gt_label=np.array([5000, 5000, 1]), pred_label=np.array([4, 4, 1]))
    assert tool.main([str(config), str(path), "--show-path", str(tmp_path / "x.png")]) == 1
    assert "--top-confusions" in capsys.readouterr().err
    assert tool.main([str(config), str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["2", "100", "%", "5000", "4"]
    np.savez(path, gt_label=np.array([99]), pred_label=np.array([4]))
    assert tool.main([str(config), str(path), "--show-path", str(tmp_path / "x.png"), "--include-values"]) == 1
    assert "--include-values is for at most" in capsys.readouterr().err
    assert tool.main([str(config), str(path), "--show-path", str(tmp_path / "x.txt")]) == 1
    assert "--show-path must end in" in capsys.readouterr().err


def test_class_names_without_reading_the_data():
    inner = {"type": "mmengine.BaseDataset", "metainfo": {"classes": ("a", "b")}}
    config = Config({"test_dataloader": {"dataset": {"type": "RepeatDataset", "times": 2, "dataset": inner}}})
    assert tool.class_names(config) == ["a", "b"]
    assert tool.class_names(Config({})) is None
    assert tool.class_names(Config({"test_dataloader": {"dataset": {"type": "mmengine.BaseDataset"}}})) is None
    config = Config({"test_dataloader": {"dataset": {"type": "mmengine.ThreeSpecies", "pipeline": [{"type": "Gone"}]}}})
    assert tool.class_names(config) == ["cat", "dog", "sea lion"]


def test_a_checkpoint_is_tested_first(tmp_path, config, capsys, monkeypatch):
    from alimm.apis import test as api

    def fake(config, checkpoint, *, out):
        assert checkpoint == "weights.pth"
        write(out, "npz")
        return {}

    monkeypatch.setattr(api, "test", fake)
    assert tool.main([config, "weights.pth"]) == 0
    assert "6 samples, 3 right" in capsys.readouterr().out
