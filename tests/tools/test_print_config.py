"""A config printed whole, saved and compared."""

import subprocess
import sys

import pytest
from mmengine.config import Config

from alimm.analysis.print_config import main


@pytest.fixture
def configs(tmp_path):
    (tmp_path / "base.py").write_text("lr = 0.1\nmodel = dict(type='A', depth=18)\n")
    (tmp_path / "child.py").write_text("_base_ = 'base.py'\nmodel = dict(depth=50)\n")
    return str(tmp_path / "base.py"), str(tmp_path / "child.py")


def test_prints_the_whole_config_with_changes(configs, capsys):
    assert main([configs[1], "--cfg-options", "lr=0.5", "model.type=B"]) == 0
    printed = Config.fromstring(capsys.readouterr().out, ".py")
    assert printed.to_dict() == {"lr": 0.5, "model": {"type": "B", "depth": 50}}


def test_saves_what_can_be_loaded_again(configs, tmp_path):
    target = tmp_path / "new" / "whole.py"
    assert main([configs[1], "--save", str(target)]) == 0
    assert Config.fromfile(target).to_dict() == {"lr": 0.1, "model": {"type": "A", "depth": 50}}


def test_diff_is_a_plain_unified_diff_in_a_pipe(configs, capsys):
    assert main([configs[0], "--diff", configs[1]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"--- {configs[0]}"
    assert lines[1] == f"+++ {configs[1]}"
    assert [line for line in lines[2:] if line[0] in "+-"] == [
        "-model = dict(depth=18, type='A')",
        "+model = dict(depth=50, type='A')",
    ]


def test_diff_is_coloured_on_a_terminal(configs, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main([configs[0], "--diff", configs[1]]) == 0
    out = capsys.readouterr().out
    assert "\x1b[31m-model" in out
    assert "\x1b[32m+model" in out


def test_equal_configs_are_said_to_be_equal(configs, capsys):
    assert main([configs[0], "--diff", configs[1], "--cfg-options", "model.depth=50"]) == 0
    assert "mean the same" in capsys.readouterr().out


def test_a_missing_config_is_named(tmp_path, configs, capsys):
    assert main([str(tmp_path / "childe.py")]) == 1
    assert "child.py" in capsys.readouterr().err


def test_the_tool_is_a_door_to_it(configs):
    command = [sys.executable, "tools/print_config.py", configs[1]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "depth=50" in done.stdout
