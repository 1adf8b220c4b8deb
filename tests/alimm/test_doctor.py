from __future__ import annotations

from pathlib import Path

import pytest

from alimm import doctor
from alimm.doctor import Check, Finding


def test_a_check_that_works_fails_crashes_or_hangs() -> None:
    works = doctor.run_check(Check("a", "print('noise'); print('found')", "mend"))
    assert (works.works, works.detail) == (True, "found")
    fails = doctor.run_check(Check("a", "raise ValueError('why')", "mend"))
    assert (fails.works, fails.detail) == (False, "ValueError: why")
    crashes = doctor.run_check(Check("a", "import os; os.kill(os.getpid(), 11)", "mend"))
    assert (crashes.works, crashes.detail) == (False, "crashed with signal 11")
    hangs = doctor.run_check(Check("a", "import time; time.sleep(50)", "mend"), timeout_s=0.5)
    assert (hangs.works, "no answer" in hangs.detail) == (False, True)


def test_environment_of_a_check() -> None:
    check = Check("a", "import os, alimm; print(os.environ['X'])", "mend", environ=(("X", "7"),))
    assert doctor.run_check(check).detail == "7"


@pytest.mark.parametrize(
    ("core", "code", "exit_code"), [(True, "raise ValueError", 1), (False, "raise ValueError", 0), (True, "", 0)]
)
def test_exit_code_and_the_command_that_mends(
    core: bool,
    code: str,
    exit_code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("MMENGINE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "CHECKS", (Check("part", code, "pip install part", core),))
    monkeypatch.setattr(doctor.examine, "__defaults__", (doctor.CHECKS, 60.0))
    assert doctor.main([]) == exit_code
    shown = capsys.readouterr().out
    assert ("    pip install part" in shown) == (code != "")
    assert "\x1b" not in shown, "no colours where the output is not a terminal"


def test_folders(tmp_path: Path) -> None:
    assert doctor.check_folder("cache", tmp_path / "new", core=True).works
    (tmp_path / "file").touch()
    found = doctor.check_folder("cache", tmp_path / "file" / "x", core=True)
    assert not found.works
    assert "MMENGINE_HOME" in found.check.mend


def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED_GB", 1e9)
    assert not doctor.check_folder("cache", tmp_path, core=True).works


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert doctor.check_compiler() == Finding(doctor.check_compiler().check, False, "none found")


@pytest.mark.parametrize("name", ["torch", "mmengine", "faiss", "pkg_resources"])
def test_the_real_checks_work_here(name: str) -> None:
    found = doctor.run_check(next(check for check in doctor.CHECKS if check.name == name))
    assert found.works, found.detail


@pytest.mark.slow
def test_all_of_the_real_checks() -> None:
    found = {finding.check.name: finding for finding in doctor.examine()}
    assert all(finding.works for finding in found.values() if finding.check.core)
