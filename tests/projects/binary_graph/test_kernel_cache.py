from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numba
import pytest

from alimm.projects.binary_graph import kernel_cache

ROOT = Path(__file__).resolve().parents[3]
NOBODY = 65534


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is chosen yet, and nothing is writable but the folder of temporary files."""
    monkeypatch.setenv(kernel_cache.VARIABLE, "")
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(kernel_cache, "is_writable", lambda _: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"alimm-numba-{os.geteuid()}"


def test_a_private_folder_is_named_and_used_again(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        monkeypatch.setenv(kernel_cache.VARIABLE, "")
        monkeypatch.setattr(numba.config, "CACHE_DIR", "")
        assert kernel_cache.provide() == bare
        assert os.environ[kernel_cache.VARIABLE] == numba.config.CACHE_DIR == str(bare)
    assert bare.stat().st_mode & 0o777 == 0o700
    assert kernel_cache.provide() is None  # named already


@pytest.mark.parametrize("kind", ["link", "open to others", "file", "of another"])
def test_a_folder_of_somebody_else_is_not_used(bare: Path, kind: str, tmp_path: Path) -> None:
    if kind == "link":
        (tmp_path / "trap").mkdir(mode=0o700)
        bare.symlink_to(tmp_path / "trap")
    elif kind == "file":
        bare.touch(mode=0o700)
    else:
        bare.mkdir(mode=0o700)
        if kind == "open to others":
            bare.chmod(0o770)
        elif os.geteuid():
            pytest.skip("only root can give a folder away")
        else:
            os.chown(bare, NOBODY, NOBODY)
    given = kernel_cache.provide()
    assert given is not None
    assert given != bare
    assert not given.is_symlink()
    assert given.stat().st_uid == os.geteuid()
    assert given.stat().st_mode & 0o777 == 0o700
    kernel_cache._remove(given, os.getpid() + 1)  # a forked child ends
    assert given.exists()
    kernel_cache._remove(given, os.getpid())
    assert not given.exists()


@pytest.mark.parametrize("which", [0, 1])
def test_nothing_is_changed_where_numba_has_a_place(bare: Path, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False] * which + [True])
    monkeypatch.setattr(kernel_cache, "is_writable", lambda _: next(answers))
    assert kernel_cache.provide() is None
    assert os.environ[kernel_cache.VARIABLE] == ""
    assert not bare.exists()


def test_a_folder_that_is_named_already_stays(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", "/by/config")
    assert kernel_cache.provide() is None
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv(kernel_cache.VARIABLE, "/by/environment")
    assert kernel_cache.provide() is None
    assert not bare.exists()


def test_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert kernel_cache.is_writable(tmp_path)
    assert kernel_cache.is_writable(tmp_path / "not" / "yet")
    assert not kernel_cache.is_writable(tmp_path / "file")
    assert not kernel_cache.is_writable(tmp_path / "file" / "below")
    assert not any((tmp_path / "not").parent.glob("not*"))


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, and the program setpriv")
@pytest.mark.parametrize("imported", ["", "import numba; "])
def test_an_account_without_a_home_can_import_the_index(imported: str) -> None:
    place = Path(tempfile.mkdtemp())  # not tmp_path: that is closed to others
    place.chmod(0o777)
    code = f"{imported}from alimm.projects.binary_graph import BinaryGraph; from alimm_ops.graph import beam_cpu"
    path = os.pathsep.join([str(ROOT), str(ROOT / "ops")])
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "TMPDIR": str(place), "PYTHONPATH": path}

    def run(text: str) -> subprocess.CompletedProcess[str]:
        account = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        return subprocess.run(
            [*account, sys.executable, "-B", "-c", text], cwd="/", env=env, capture_output=True, text=True
        )

    try:
        if run("import alimm.version, numba").returncode:
            pytest.skip("the interpreter or the checkout is closed to other accounts")
        done = run(code)
        assert done.returncode == 0, done.stderr
        (made,) = place.iterdir()
        assert made.name == f"alimm-numba-{NOBODY}"
        assert (made.stat().st_uid, made.stat().st_mode & 0o777) == (NOBODY, 0o700)
    finally:
        shutil.rmtree(place)
