"""The benchmark command: finding, options, exit codes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from alimm.cli import run_guarded

TOOLS = Path(__file__).resolve().parents[2] / "tools"
FAKE = '''"""A fake benchmark.

More of it.
"""
import _fake_part
from alimm.report.benchmark import Claim, Outcome


def add_arguments(parser):
    parser.add_argument("--value", type=float, default=2.0)


def run(arguments):
    print("row", _fake_part.NAME, arguments.quick)
    if arguments.value < 0:
        raise ValueError("--value must be positive")
    claim = Claim("value", f"{arguments.value:.1f}", "above 1", arguments.value > 1)
    return Outcome([claim], {"value": arguments.value})
'''


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark():
    yield load(TOOLS / "benchmark.py", "benchmark_tool")
    del sys.modules["benchmark_tool"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "benchmarks"
    path.mkdir()
    (path / "fake.py").write_text(FAKE)
    (path / "_fake_part.py").write_text("NAME = 'part'\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield path
    for name in ("fake", "_fake_part"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("options", "code"), [([], 0), (["--value", "1.5"], 0), (["--value", "1"], 1), (["--value", "1", "--quick"], 0)]
)
def test_exit_code_follows_the_claim_but_not_when_quick(benchmark, folder, capsys, options, code):
    assert benchmark.main(["fake", *options], folder) == code
    out = capsys.readouterr().out.splitlines()
    assert f"row part {'--quick' in options}" in out
    assert out[0].startswith("cpu:")
    value = float(options[1]) if options else 2.0
    assert out[-1] == f"fake: {value:.1f} (claim: above 1)"
    assert any(line.startswith("NOT MET") for line in out) == (code == 1)


def test_json_holds_figures_claims_and_machine(benchmark, folder, tmp_path):
    path = tmp_path / "new" / "out.json"
    assert benchmark.main(["fake", "--value", "0.5", "--json", str(path)], folder) == 1
    record = json.loads(path.read_text())
    assert record["name"] == "fake"
    assert record["options"] == {"quick": False, "value": 0.5}
    assert record["environment"]["torch"] == torch.__version__
    assert record["met"] is False
    assert record["claims"] == [{"subject": "value", "figure": "0.5", "bound": "above 1", "met": False}]
    assert record["data"] == {"value": 0.5}


def test_names_are_listed_and_a_wrong_one_is_helped(benchmark, folder, capsys):
    assert benchmark.main([], folder) == 0
    assert capsys.readouterr().out == "fake: A fake benchmark.\n"
    with pytest.raises(ValueError, match=r"no benchmark 'fakes'. Did you mean fake\? There are: fake$"):
        benchmark.main(["fakes"], folder)
    with pytest.raises(ValueError, match="no benchmark '_fake_part'"):
        benchmark.main(["_fake_part"], folder)
    with pytest.raises(ValueError, match=r"no benchmark '../benchmarks/fake'"):
        benchmark.main(["../benchmarks/fake"], folder)


def test_mistakes_end_with_code_2_and_no_traceback(benchmark, capsys):
    assert run_guarded("benchmark_tool", "main", ["int8_paritty"]) == 2
    assert "Did you mean int8_parity?" in capsys.readouterr().err
