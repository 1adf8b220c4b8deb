"""Publishing: what is kept, what goes, the name, the bytes, the averaged weights."""

import hashlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer

from alimm.analysis.publish_model import main

BASE = torch.arange(1000.0)


def checkpoint():
    return {
        "state_dict": {"a.weight": BASE[:10], "a.bias": torch.zeros(2, dtype=torch.float16)},
        "optimizer": {"state": {0: torch.zeros(10_000)}},
        "message_hub": {"log_scalars": {"loss": HistoryBuffer([1.0], [1])}},
        "meta": {
            "epoch": 3,
            "seed": np.int64(7),
            "cfg": "work_dir = '/home/me/secret'",
            "time": "now",
            "dataset_meta": {"classes": ("a", "b"), "palette": np.array([[1, 2]]), "what": object},
        },
    }


@pytest.fixture
def source(tmp_path):
    torch.save(checkpoint(), tmp_path / "epoch_3.pth")
    return tmp_path / "epoch_3.pth"


def published(folder):
    found = list(folder.glob("*.pth"))
    assert len(found) == 1
    return found[0]


def test_keeps_weights_and_plain_meta_only(source, tmp_path, capsys):
    assert main([str(source), str(tmp_path / "zoo" / "toy_r18.pth"), "--date", "20260131", "--trust"]) == 0
    path = published(tmp_path / "zoo")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"toy_r18_20260131-{digest[:8]}.pth"
    content = torch.load(path, weights_only=True)
    assert content["meta"] == {
        "epoch": 3,
        "seed": 7,
        "dataset_meta": {"classes": ["a", "b"], "palette": [[1, 2]], "what": None},
    }
    assert set(content) == {"meta", "state_dict"}
    assert torch.equal(content["state_dict"]["a.weight"], torch.arange(10.0))
    assert content["state_dict"]["a.bias"].dtype == torch.float16
    # The view's storage of 1000 numbers stayed behind.
    assert content["state_dict"]["a.weight"].untyped_storage().nbytes() == 40
    assert b"secret" not in path.read_bytes()
    out = capsys.readouterr().out
    assert f"Weights SHA256: {digest}" in out
    assert f"Weights Size: {path.stat().st_size}" in out


def test_the_same_input_gives_the_same_bytes_in_another_process(source, tmp_path):
    arguments = ["--date", "20260131", "--trust"]
    assert main([str(source), str(tmp_path / "one" / "m.pth"), *arguments]) == 0
    moved = tmp_path / "moved.pth"
    source.rename(moved)
    command = [sys.executable, "tools/publish_model.py", str(moved), str(tmp_path / "two" / "m.pth"), *arguments]
    subprocess.run(command, check=True, capture_output=True)
    one, two = published(tmp_path / "one"), published(tmp_path / "two")
    assert one.name == two.name
    assert one.read_bytes() == two.read_bytes()


def test_publishing_what_is_published_changes_no_byte(source, tmp_path):
    main([str(source), str(tmp_path / "one" / "m.pth"), "--date", "20260131", "--trust"])
    first = published(tmp_path / "one")
    main([str(first), str(tmp_path / "two" / "m.pth"), "--date", "20260131"])
    assert published(tmp_path / "two").read_bytes() == first.read_bytes()


def test_a_folder_keeps_the_stem_and_today_is_the_date(source, tmp_path):
    (tmp_path / "zoo").mkdir()
    assert main([str(source), str(tmp_path / "zoo"), "--trust"]) == 0
    assert re.fullmatch(r"epoch_3_20\d{6}-[0-9a-f]{8}\.pth", published(tmp_path / "zoo").name)


def test_ema_is_what_mmengines_hook_saves_as_state_dict(tmp_path):
    raw, averaged = torch.full((3,), 5.0), torch.full((3,), 2.0)
    content = {"state_dict": {"w": raw}, "ema_state_dict": {"module.w": averaged, "steps": torch.tensor(1)}}
    EMAHook()._swap_ema_state_dict(content)
    torch.save(content, tmp_path / "ema.pth")
    assert main([str(tmp_path / "ema.pth"), str(tmp_path / "zoo" / "m.pth"), "--ema"]) == 0
    saved = torch.load(published(tmp_path / "zoo"), weights_only=True)
    assert list(saved["state_dict"]) == ["w"]
    assert torch.equal(saved["state_dict"]["w"], averaged)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_foreign_objects_need_trust(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"w": BASE}, "bomb": Bomb()}, "bomb.pth")
    assert main(["bomb.pth", "zoo/m.pth"]) == 1
    assert "--trust" in capsys.readouterr().err
    assert not os.path.exists("exploded")
    assert main(["bomb.pth", "zoo/m.pth", "--trust"]) == 0
    assert os.path.exists("exploded")


@pytest.mark.parametrize(
    ("content", "extra", "message"),
    [
        (None, [], "does not exist"),
        ({"state_dict": {"w": BASE}}, ["--ema"], "no averaged weights"),
        ({"state_dict": {"w": BASE}}, ["--date", "2026-1-1"], "eight digits"),
        ({"epoch": 3}, [], "holds no state dict"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, content, extra, message):
    if content is not None:
        torch.save(content, tmp_path / "in.pth")
    assert main([str(tmp_path / "in.pth"), str(tmp_path / "zoo" / "m.pth"), *extra]) == 1
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "zoo").glob("*")) if (tmp_path / "zoo").exists() else True


def test_a_checkpoint_whose_classes_are_elsewhere_is_refused(tmp_path, capsys):
    source = tmp_path / "epoch_1.pth"
    torch.save({"meta": {"alimm_shards": {"head": "epoch_1.shards"}}, "state_dict": {"a": torch.ones(1)}}, source)
    assert main([str(source), str(tmp_path)]) == 1
    assert f"alimm merge-shards {source} whole.pth" in capsys.readouterr().err
