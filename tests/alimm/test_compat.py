"""Each gap of the pinned packages, against the real package."""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

from alimm import compat
from alimm.apis import checkpoints

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
    )


@pytest.fixture(autouse=True)
def _closed_gaps(tmp_path: Path) -> None:
    compat.apply(tmp_path / "work_dir")


class RunsCode:
    """Unpickling this writes a file: the sign that code of the checkpoint was run."""

    def __init__(self, sign: Path):
        self.sign = sign

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.sign, "ran"))


class GetsAttribute:
    """Unpickling this calls getattr on a module."""

    def __reduce__(self) -> Any:
        return (getattr, (checkpoints.HistoryBuffer, "__subclasses__"))


def test_importing_alimm_patches_nothing() -> None:
    code = (
        "import sys, torch, mmengine.runner, mmengine.hooks; from mmengine.fileio import LocalBackend as B\n"
        "put, meta = B.put, list(sys.meta_path)\n"
        "import alimm, alimm.registry, alimm.compat\n"
        "assert B.put is put and sys.meta_path == meta\n"
        "alimm.compat.apply(); assert B.put is not put and sys.meta_path != meta\n"
        "assert not {'mmdet', 'mmseg', 'mmaction'} & sys.modules.keys()"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_what_mmengine_saves_is_read_without_a_full_unpickling(tmp_path: Path) -> None:
    history = HistoryBuffer()
    for value in (3.0, 1.0, 2.0):
        history.update(value)
    content = dict(history=history, best=np.float64(0.5), flag=np.bool_(True), array=np.arange(3), name=np.str_("a"))
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pth", weights_only=True)
    loaded = checkpoints.load_restricted(tmp_path / "a.pth")
    assert [loaded["history"].statistics(name) for name in ("min", "max", "current", "mean")] == [1.0, 3.0, 2.0, 2.0]
    assert (loaded["best"], loaded["flag"], loaded["name"]) == (0.5, True, "a")
    assert loaded["array"].tolist() == [0, 1, 2]


def test_the_stand_in_for_getattr_gives_nothing_else(tmp_path: Path) -> None:
    torch.save(dict(a=GetsAttribute()), tmp_path / "a.pth")
    with pytest.raises(pickle.UnpicklingError, match="not allowed"):
        checkpoints.load_restricted(tmp_path / "a.pth")
    assert getattr is not checkpoints._statistic
    assert HistoryBuffer not in torch.serialization.get_safe_globals(), "the list is open only while a file is read"


def test_a_foreign_file_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sign = tmp_path / "foreign.pth", tmp_path / "sign"
    torch.save(dict(state_dict={}, extra=RunsCode(sign)), path)
    with pytest.raises(ValueError, match="publish_model"):
        CheckpointLoader.load_checkpoint(str(path))
    assert not sign.exists()
    monkeypatch.setenv(checkpoints.TRUST_VARIABLE, str(path))
    CheckpointLoader.load_checkpoint(str(path))
    assert sign.exists()


def test_a_file_of_the_run_is_trusted_and_the_log_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work_dir = tmp_path / "work_dir"
    work_dir.mkdir()
    torch.save(dict(extra=RunsCode(tmp_path / "sign")), work_dir / "epoch_1.pth")
    checkpoints.make_local_loader(work_dir)(str(work_dir / "epoch_1.pth"), "cpu")
    assert (tmp_path / "sign").exists()
    # A link that leads out of the work dir is not inside it.
    torch.save(dict(extra=RunsCode(tmp_path / "other sign")), tmp_path / "foreign.pth")
    (work_dir / "link.pth").symlink_to(tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match="runs whatever code"):
        checkpoints.make_local_loader(work_dir)(str(work_dir / "link.pth"), "cpu")
    assert not (tmp_path / "other sign").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half() -> None:
        with checkpoints.atomic_open(path, "w") as file:
            file.write("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.glob(".*")) == []


def test_local_writes_go_through_links_and_keep_the_mode(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    LocalBackend().put(b"new", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    LocalBackend().put(b"deep", str(tmp_path / "a" / "b" / "c"))
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"deep"
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "a" / "b" / "c").stat().st_mode == (tmp_path / "plain").stat().st_mode
    LocalBackend().put(b"away", os.devnull)


def test_a_removal_spares_a_file_that_was_written_again(tmp_path: Path) -> None:
    for name in ("old", "again"):
        (tmp_path / name).write_text(name)
    later = compat._LaterRemoval(LocalBackend())
    later.remove(str(tmp_path / "old"))
    later.remove(str(tmp_path / "again"))
    assert (tmp_path / "old").exists()
    LocalBackend().put(b"new", str(tmp_path / "again"))
    later.flush()
    assert not (tmp_path / "old").exists()
    assert (tmp_path / "again").read_text() == "new"


@pytest.mark.parametrize("apply_first", [True, False])
def test_mmaction_models_import_without_its_missing_folder(apply_first: bool) -> None:
    pytest.importorskip("mmaction")
    code = "from alimm import compat; compat.apply(); " if apply_first else ""
    done = run_python(code + "import mmaction.models as m; assert m.localizers.DRN")
    missing = not (Path(importlib.import_module("mmaction").__file__).parent / "models" / "localizers" / "drn").exists()
    assert (done.returncode == 0) == (apply_first or not missing), done.stderr
    if apply_first and missing:
        use = run_python(code + "from mmaction.models.localizers import DRN; DRN()")
        assert "does not contain the localizer DRN" in use.stderr


def test_mmaction_finds_importlib_metadata_and_nobody_else_does() -> None:
    pytest.importorskip("mmaction")
    code = (
        "import sys; sys.path_hooks; from alimm import compat; compat.apply()\n"
        "had = __import__('importlib.util').util.find_spec('importlib_metadata') is not None\n"
        "import mmaction.utils.dependency as d; assert d.distribution('numpy').version\n"
        "assert had or 'importlib_metadata' not in sys.modules"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_removed_numpy_names_come_back_where_they_are_used() -> None:
    pytest.importorskip("mmaction")
    pytest.importorskip("mmdet")
    for module, names in compat.REMOVED_NUMPY_NAMES.items():
        source = Path(importlib.import_module(module).__file__).read_text()
        for name in names:
            assert f"np.{name}" in source, f"{module} does not use np.{name}: take it out of the table"
            assert hasattr(importlib.import_module(module).np, name)
    misc = importlib.import_module("mmaction.evaluation.functional.accuracy")
    recall, _, _, area = misc.average_recall_at_avg_proposals(
        {"v": np.array([[0.0, 1.0]])}, {"v": np.array([[0.0, 1.0, 0.9]])}, 1, temporal_iou_thresholds=np.array([0.5])
    )
    assert (float(recall[0, -1]), float(area) > 0) == (1.0, True)
    for name in ("Inf", "in1d", "trapz"):
        assert not hasattr(np, name), "NumPy itself is left alone"


def test_every_removed_numpy_name_in_the_packages_is_in_the_table() -> None:
    """Read the sources: a name that NumPy lacks is a crash that waits for its line."""
    import ast

    unknown = []
    for package in ("mmengine", "mmcv", "mmdet", "mmseg", "mmaction"):
        root = Path(pytest.importorskip(package).__file__).parent
        for path in root.rglob("*.py"):
            if ".mim" in path.parts:
                continue
            module = ".".join(path.relative_to(root.parent).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)):
                    continue
                if not (isinstance(node.value, ast.Name) and node.value.id == "np") or hasattr(np, node.attr):
                    continue
                if node.attr not in compat.REMOVED_NUMPY_NAMES.get(module, ()):
                    unknown.append(f"{module}: np.{node.attr}")
    # mmdet's own slip for np_boxes, no name of NumPy.
    assert set(unknown) <= {"mmdet.evaluation.metrics.flickr30k_metric: np.boxes"}


def test_package_paths_without_pkg_resources() -> None:
    code = (
        "import sys; sys.modules['pkg_resources'] = None\n"
        "from alimm import compat; compat.package_paths()\n"
        "import mmengine.config.config as c, mmengine.utils as u\n"
        "print(c.get_installed_path('mmengine')); assert u.is_installed('mmengine') and not u.is_installed('no-such')"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).name == "mmengine"


def test_a_config_keeps_its_own_model_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "init_gloo", lambda launcher, timeout_s: None)
    own = Config(dict(model_wrapper_cfg=dict(type="Own")))
    compat.cpu_distributed(own, "pytorch", "cpu")
    assert own.model_wrapper_cfg.type == "Own"
    plain = Config(dict(find_unused_parameters=True))
    compat.cpu_distributed(plain, "pytorch", "cpu")
    assert plain.model_wrapper_cfg == dict(type="alimm.CpuDistributedDataParallel", find_unused_parameters=True)
    cuda = Config({})
    compat.cpu_distributed(cuda, "pytorch", "cuda")
    compat.cpu_distributed(cuda, "none", "cpu")
    assert "model_wrapper_cfg" not in cuda


def test_chosen_device_is_undone() -> None:
    from mmengine.device import get_device

    before = get_device()
    with compat.chosen_device("cpu"):
        assert get_device() == "cpu"
    assert get_device() == before
