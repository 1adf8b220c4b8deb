from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from alimm import cli

ROOT = Path(__file__).resolve().parents[2]


def run_cli(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alimm.cli", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
    )


@pytest.mark.parametrize("words", [["--help"], ["list"], ["--version"]])
def test_quick_commands_import_neither_torch_nor_mmengine(words: list[str]) -> None:
    code = (
        "import sys; from alimm.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'mmengine', 'numpy'} & sys.modules.keys(), 'heavy'"
    )
    best = 9.0
    for _ in range(2):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        best = min(best, time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert best < 1.0


def test_help_names_every_command() -> None:
    shown = run_cli("--help").stdout
    assert all(f"  {name} " in shown for name in cli.COMMANDS)


def test_unknown_command() -> None:
    done = run_cli("trainx")
    assert done.returncode == 2
    assert "train" in done.stderr


def test_a_users_mistake_is_one_sentence_and_exit_code_2() -> None:
    done = run_cli("train", "no_such_config.py")
    assert done.returncode == 2
    assert done.stderr.startswith("alimm: error: there is no config no_such_config.py")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [ValueError("bad"), FileNotFoundError("bad"), ImportError("bad")])
def test_guard(error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: object) -> int:
        raise error

    monkeypatch.delenv("ALIMM_DEBUG", raising=False)
    monkeypatch.setattr(cli, "fail", fail, raising=False)
    assert cli.run_guarded("alimm.cli", "fail", []) == 2
    assert capsys.readouterr().err == "alimm: error: bad\n"
    monkeypatch.setenv("ALIMM_DEBUG", "1")
    with pytest.raises(type(error), match="bad"):
        cli.run_guarded("alimm.cli", "fail", [])


def test_our_own_errors_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "fail", fail, raising=False)
    with pytest.raises(ZeroDivisionError):
        cli.run_guarded("alimm.cli", "fail", [])


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_is_there(name: str) -> None:
    module, function, _ = cli.COMMANDS[name]
    if not (ROOT / (module.replace(".", "/") + ".py")).exists():
        pytest.skip(f"{module} is not written yet")
    assert callable(getattr(import_module(module), function))


def test_list_prints_models_and_methods(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "projects" / "some_method").mkdir(parents=True)
    (tmp_path / "projects" / "some_method" / "README.md").write_text("# What it does\n\nMore.\n")
    (tmp_path / "projects" / "some_method" / "metafile.yml").write_text(
        "Collections:\n  - Name: Some\nModels:\n  - Name: some_r18\n    In Collection: Some\n    Config: configs/a.py\n"
    )
    (tmp_path / "model-index.yml").write_text("Import:\n  - projects/some_method/metafile.yml\n")
    monkeypatch.setattr("alimm.zoo.index.resource_root", lambda: tmp_path)
    monkeypatch.setattr("alimm.paths.resource_root", lambda: tmp_path)
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "some_r18" in shown
    assert "some_method: What it does" in shown


def test_download_of_an_unknown_name_lists_near_names() -> None:
    done = run_cli("download", "no_such_model")
    assert done.returncode == 2
    assert "no_such_model" in done.stderr


def test_a_reader_that_stops_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "alimm.cli", "list"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
