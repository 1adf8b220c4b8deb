"""The demo: one epoch of it end to end, and the verdict on its claims."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alimm.apis.train import train

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", TOOLS / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demo"]


def figures(top1, recall):
    shot = {"accuracy/mean_class": 50.0, "shot/many": 1.0, "shot/medium": 2.0, "shot/few": 3.0}
    return {
        "recogniser": {"accuracy/top1": top1, **shot},
        "hog_color": {"accuracy/top1": 38.0, **shot},
        "recall": {1: recall, 5: 0.6, 10: 0.7},
        "color_recall": {1: 0.26, 5: 0.4, 10: 0.5},
    }


@pytest.mark.parametrize(
    ("top1", "recall", "verdict"),
    [(50.0, 0.52, [True, True]), (49.9, 0.52, [False, True]), (50.0, 0.519, [True, False])],
)
def test_claims_are_judged_at_their_bound(demo, top1, recall, verdict):
    header, rows, claims = demo.summary(figures(top1, recall))
    assert [met for _, met in claims] == verdict
    assert all(len(row) == len(header) for row in rows)


def test_baselines_equal_a_slow_loop(demo):
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    average = demo.demo_baselines.color_average(images).reshape(2, 8, 8, 3)
    assert average[1, 2, 3] == pytest.approx(images[1, 16:24, 24:32].reshape(-1, 3).mean(0) / 255, abs=1e-6)
    scores = demo.demo_baselines.accuracies(np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([0] * 150 + [1] * 3))
    assert scores["accuracy/top1"] == pytest.approx(200 / 3)
    assert scores["accuracy/mean_class"] == pytest.approx(75.0)
    assert scores["shot/many"] == 100.0
    assert scores["shot/few"] == 50.0


def test_int8_adds_its_hook_to_those_of_the_config(demo):
    plain = demo.demo_config([], seed=3, epochs=2, int8=False)
    int8 = demo.demo_config([], seed=3, epochs=2, int8=True)
    assert int8.custom_hooks[:-1] == plain.custom_hooks
    assert int8.custom_hooks[-1] == {"type": "alimm.Int8TrainingHook"}
    assert (int8.randomness.seed, int8.train_cfg.max_epochs) == (3, 2)


def test_knn_adds_the_products_as_classes(demo, tmp_path):
    config = demo.demo_config([], seed=3, epochs=1, knn=True)
    assert list(config.model.head.heads) == ["subgroup", "identity", "product"]
    config.train_dataloader.dataset.indices = 256
    config.custom_hooks[-1]["start"] = 1
    config.param_scheduler = []
    config.train_cfg.val_interval = 5
    runner = train(config, work_dir=tmp_path, device="cpu")
    head = runner.model.head.heads["product"]
    assert head.graph is not None
    assert int(head.step) == runner.iter > 1


def test_one_epoch_end_to_end(tmp_path):
    done = subprocess.run(
        [sys.executable, TOOLS / "demo.py", "--quick", "--work-dir", tmp_path / "my demo"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sub-group top-1" in done.stdout
    report = tmp_path / "my demo" / "report.html"
    assert str(report) in done.stdout
    html = report.read_text()
    assert len(re.findall(r"<td class=\"(?:right|wrong)\">", html)) == 24 * 5
    assert "<svg" in html
    assert "demo.py --quick" in html
    found = json.loads((tmp_path / "my demo" / "figures.json").read_text())
    assert found["hog_color"]["accuracy/top1"] > 30
    assert 0.2 < found["color_recall"]["1"] < 0.3


def test_the_catalogue_is_searched_with_the_index_asked_for(demo, tmp_path, monkeypatch):
    asked = []

    def embed(pictures):
        rng = np.random.default_rng(len(pictures))
        return rng.normal(size=(len(pictures), 32)).astype(np.float32)

    monkeypatch.setattr(demo, "EmbeddingInferencer", lambda *_, **__: embed)
    monkeypatch.setattr(demo.Page, "section", lambda self, title, text, *_: asked.append(text))
    side = demo.read_side("test")
    state = demo.Demo(None, tmp_path, demo.Page("", ""), side, side, index="BinaryGraphIndex")
    demo.search_step(state)
    assert "BinaryGraphIndex" in asked[0]
    assert state.figures["recall"][1] == pytest.approx(1.0)  # each picture finds itself
    assert (tmp_path / "catalogue.index").is_dir()


def test_an_index_that_there_is_not(demo, tmp_path):
    with pytest.raises(ValueError, match="there is no index 'Foo'"):
        demo.main(["--index", "Foo", "--work-dir", str(tmp_path)])
