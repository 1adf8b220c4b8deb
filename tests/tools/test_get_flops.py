"""Multiply-adds against the count by hand."""

import json
import subprocess
import sys

import pytest

from alimm.analysis.get_flops import main
from tests.alimm.toy_classifier import CONFIG


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(CONFIG)
    return str(path)


def test_counts_a_convolution_as_by_hand(config, tmp_path, capsys):
    assert main([config, "--shape", "5", "7", "--json", str(tmp_path / "flops.json")]) == 0
    info = json.loads((tmp_path / "flops.json").read_text())
    assert info["shape"] == [1, 3, 5, 7]
    assert info["flops"] == 5 * 7 * 3 * 3
    assert info["params"] == 3 * 3 + 1
    assert info["activations"] == 3 * 5 * 7
    out = capsys.readouterr().out
    assert "head" in out
    assert "1 x 3 x 5 x 7" in out


def test_one_number_is_a_square_and_json_can_stand_alone(config, capsys):
    assert main([config, "--shape", "8", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["flops"] == 8 * 8 * 9


def test_mistakes_are_named(config, tmp_path, capsys):
    assert main([str(tmp_path / "gone.py")]) == 1
    assert "gone.py" in capsys.readouterr().err
    assert main([config, "--shape", "0", "4"]) == 1
    assert "must be positive" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([config, "--shape", "3", "4", "5"])


def test_the_tool_is_a_door_to_it():
    done = subprocess.run([sys.executable, "tools/get_flops.py", "--help"], capture_output=True, text=True, check=True)
    assert "--shape" in done.stdout
