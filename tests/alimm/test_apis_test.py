from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import alimm.apis.test as api
from alimm.apis.train import train
from tests.alimm.tiny_run import tiny_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work_dir = tmp_path_factory.mktemp("run")
    train(tiny_config(custom_hooks=[], **{"train_cfg.max_epochs": 1}), work_dir=work_dir, device="cpu")
    return work_dir / "epoch_1.pth"


def expected(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Score the pictures one by one with the stored weights."""
    from tests.alimm.tiny_run import TinyNet, TinyNoise

    net = TinyNet()
    net.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    net.eval()
    data = TinyNoise(augment=False)
    with torch.no_grad():
        scores = [net(data[i]["inputs"][None], None).softmax(1)[0].numpy() for i in range(len(data))]
    return np.stack(scores), np.array([data[i]["target"] for i in range(len(data))])


@pytest.mark.parametrize("suffix", [".json", ".npz", ".pkl"])
def test_metrics_and_predictions(checkpoint: Path, tmp_path: Path, suffix: str) -> None:
    scores, targets = expected(checkpoint)
    out = tmp_path / ("out" + suffix)
    metrics = api.test(tiny_config(), checkpoint, work_dir=tmp_path / "w", out=out, device="cpu")
    assert metrics["accuracy"] == pytest.approx(float((scores.argmax(1) == targets).mean()))
    if suffix == ".json":
        assert json.loads(out.read_text()) == metrics
    elif suffix == ".npz":
        with np.load(out) as arrays:
            np.testing.assert_allclose(arrays["pred_score"], scores, atol=1e-6)
            assert arrays["target"].tolist() == targets.tolist()
        assert [path.name for path in tmp_path.glob("out*")] == ["out.npz"]
    else:
        rows = pickle.loads(out.read_bytes())
        np.testing.assert_allclose(np.stack([row["pred_score"] for row in rows]), scores, atol=1e-6)


def test_the_checkpoint_matters(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "none.npz"
    api.test(tiny_config(), None, work_dir=tmp_path / "w", out=out, device="cpu")
    with np.load(out) as arrays:
        assert not np.allclose(arrays["pred_score"], expected(checkpoint)[0], atol=1e-3)


def test_wrong_input(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.pth"):
        api.test(tiny_config(), tmp_path / "no.pth", work_dir=tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"\.npz"):
        api.test(tiny_config(), checkpoint, work_dir=tmp_path, out=tmp_path / "a.csv", device="cpu")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--work-dir"):
        api.test(tiny_config(), checkpoint, work_dir=tmp_path / "file" / "x", device="cpu")


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("mmdet.DetVisualizationHook", "test_out_dir"),
        ("mmaction.VisualizationHook", "out_dir"),
        ("SegVisualizationHook", "draw"),
        (None, "out_dir"),
    ],
)
def test_show_dir_uses_the_hook_of_the_library(kind: str | None, key: str) -> None:
    config = tiny_config()
    if kind:
        config.default_hooks.visualization = dict(type=kind)
    api.draw_into(config, "/folder")
    assert config.default_hooks.visualization[key] in ("/folder", True)
    config.default_hooks.visualization = dict(type="Other")
    with pytest.raises(ValueError, match="Other"):
        api.draw_into(config, "/folder")


@pytest.mark.parametrize("content", [b"", b"<html>not here</html>", b"PK\x03\x04 cut off", b"\x80\x02 cut off"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.pth"):
        api.test(tiny_config(), path, work_dir=tmp_path / "w", device="cpu")


def test_a_config_without_test_parts_is_refused_with_their_names(tmp_path: Path) -> None:
    config = tiny_config(work_dir=str(tmp_path))
    config.pop("test_dataloader")
    config.pop("test_evaluator")
    with pytest.raises(ValueError, match="has no test_dataloader, test_evaluator: `alimm test` needs"):
        api.test(config, None, device="cpu")
