"""Seeds, data samples, extras, paths: the parts that everything stands on."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from alimm import extras, paths
from alimm.extras import require
from alimm.seeding import numpy_stream, seed_everything, stream_seed
from alimm.structures import ClsDataSample


def test_streams_are_fixed_and_independent():
    assert stream_seed(0, "a") == 4900040779018532298, "the streams of released runs must not move"
    seeds = {stream_seed(s, n, *i) for s in (0, 1) for n in ("a", "b") for i in ((), (0,), (1,), (0, 1), (1, 0), (11,))}
    assert len(seeds) == 24
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert np.array_equal(numpy_stream(3, "x", 1).random(4), numpy_stream(3, "x", 1).random(4))


def test_seeding_everything_resets_all_three_generators():
    import random

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(0, "x", 1)
    first = draw()
    assert draw() != first
    seed_everything(0, "x", 1)
    assert draw() == first
    seed_everything(0, "x", 2)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_data_sample_takes_labels_of_any_kind():
    for value in (3, [3], np.int64(3), np.array([3]), torch.tensor(3)):
        assert torch.equal(ClsDataSample().set_gt_label(value).gt_label, torch.tensor([3]))
    sample = ClsDataSample().set_pred_score(torch.tensor([0.2, 0.7, 0.1]))
    assert sample.pred_label.tolist() == [1]
    with pytest.raises(ValueError, match=r"one dimension \(num_classes,\), got shape \(1, 2\)"):
        ClsDataSample().set_pred_score(torch.zeros(1, 2))


def test_a_missing_extra_names_itself(monkeypatch):
    monkeypatch.setitem(extras.EXTRAS, "video", ("no_such_module",))
    with pytest.raises(ImportError, match=r"decoding needs no_such_module.*pip install 'alimm\[video\]'"):
        require("no_such_module.part", "decoding")
    with pytest.raises(ImportError, match="pip install other_missing"):
        require("other_missing", "this")
    assert require("json", "this").__name__ == "json"


def test_a_fault_inside_an_installed_module_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_broken.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all") as caught:
        require("half_broken", "this")
    assert "Install it with" not in str(caught.value)


def test_cache_and_data_folders_follow_the_environment(monkeypatch, tmp_path):
    for name in ("MMENGINE_HOME", "XDG_CACHE_HOME", "ALIMM_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.cache_dir() == tmp_path / ".cache" / "alimm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert paths.cache_dir() == tmp_path / "x" / "alimm"
    monkeypatch.setenv("MMENGINE_HOME", str(tmp_path / "m"))
    assert paths.data_root() == tmp_path / "m" / "alimm" / "data"
    monkeypatch.setenv("ALIMM_DATA", str(tmp_path / "d"))
    assert paths.data_root() == tmp_path / "d"


def test_importing_alimm_is_cheap_and_pulls_nothing_heavy():
    code = (
        "import sys, time; import torch, mmengine; start = time.perf_counter(); import alimm;"
        "print(time.perf_counter() - start, [m for m in ('mmcv', 'mmdet', 'faiss', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    seconds, _, modules = done.stdout.strip().partition(" ")
    assert float(seconds) < 0.3
    assert modules == "[]"
    light = "import sys, alimm; print([m for m in ('torch', 'mmengine', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_lazy_names_resolve():
    import alimm

    assert callable(alimm.init_model)
    assert "get_model" in dir(alimm)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = alimm.nothing
