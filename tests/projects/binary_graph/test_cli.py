from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alimm import cli as alimm_cli
from alimm.projects.binary_graph import BinaryGraph, cli
from alimm.projects.binary_graph.store import RunFolder

ROOT = Path(__file__).resolve().parents[3]


def codes_of(rows: int, words: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (rows, words), dtype=np.uint64)


def save(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


def assert_nearest(
    result: tuple[np.ndarray, np.ndarray], codes: np.ndarray, ids: np.ndarray, queries: np.ndarray
) -> None:
    """Compare with every pair, bit by bit. Which of several rows at the last distance are named is left open."""
    distances, found = result
    pairs = np.bitwise_count(queries[:, None] ^ codes[None]).sum(axis=2, dtype=np.int32)
    np.testing.assert_array_equal(distances, np.sort(pairs, axis=1)[:, : distances.shape[1]])
    order = np.argsort(ids)
    rows = order[np.minimum(np.searchsorted(ids, found, sorter=order), len(ids) - 1)]
    np.testing.assert_array_equal(ids[rows], found)
    np.testing.assert_array_equal(np.take_along_axis(pairs, rows, axis=1), distances)
    assert all(len(np.unique(row)) == len(row) for row in found)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """An index of 300 rows with ids from 1000, built by the command."""
    out = str(tmp_path / "inde\u00e7s")
    codes = save(tmp_path / "codes.npy", codes_of(300))
    ids = save(tmp_path / "ids.npy", np.arange(300) + 1000)
    assert cli.main(["build", codes, "--out", out, "--ids", ids, "--quiet", "--workers", "1"]) == 0
    return out


def found(folder: str, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    with BinaryGraph.open(folder, read_only=True) as index:
        return index.search(codes_of(4, seed=9), k, ef=400)


def check(folder: str, codes: np.ndarray, ids: np.ndarray) -> None:
    """The index holds these rows and no others."""
    with BinaryGraph.open(folder, read_only=True) as index:
        np.testing.assert_array_equal(index.ids, np.sort(ids))
    assert_nearest(found(folder), codes, ids, codes_of(4, seed=9))


def test_every_command_is_there_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"  {name} " in text
        with pytest.raises(SystemExit) as end:
            cli.main([name, "--help"])
        assert end.value.code == 0
        assert f"usage: alimm index {name} " in capsys.readouterr().out


def test_build_and_its_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = codes_of(200)
    names = [save(tmp_path / "a.npy", codes[:150]), save(tmp_path / "b.npy", codes[:150])]
    out = str(tmp_path / "index")
    assert cli.main(["build", *names, "--out", out, "--quiet", "--workers", "1"]) == 0
    text = capsys.readouterr().out
    for pattern in (
        r"^rows +300$", r"^distinct codes +150$", r"^duplicates +150 \(50\.0%\)$", r"^bits +128$", r"^seconds +\d",
        r"^CPU seconds +\d", r"^peak memory +\d+\.\d [MG]B$", r"^size .* bytes a row$",
    ):  # fmt: skip
        assert re.search(pattern, text, re.MULTILINE), (pattern, text)
    check(out, np.concatenate([codes[:150]] * 2), np.arange(300))


def test_an_index_is_not_overwritten_unasked(folder: str, tmp_path: Path) -> None:
    other = save(tmp_path / "other.npy", codes_of(50, seed=3))
    with pytest.raises(ValueError, match="--overwrite"):
        cli.main(["build", other, "--out", folder, "--quiet"])
    check(folder, codes_of(300), np.arange(300) + 1000)
    assert cli.main(["build", other, "--out", folder, "--quiet", "--overwrite", "--workers", "1"]) == 0
    check(folder, codes_of(50, seed=3), np.arange(50))


def test_options_reach_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alimm.projects.binary_graph import pipeline

    seen: dict[str, Any] = {}
    original = pipeline.build_segment

    def build(source: Any, ids: Any = None, **options: Any) -> Any:
        engine = options["engine"]
        seen.update(options, engine=engine.name, workers=engine.workers, worker_memory=engine.worker_memory)
        return original(source, ids, **options)

    monkeypatch.setattr(pipeline, "build_segment", build)
    codes, run = save(tmp_path / "codes.npy", codes_of(40)), str(tmp_path / "run")
    words = ["build", codes, "--out", str(tmp_path / "index"), "--workers", "3", "--worker-memory", "64MB"]
    cli.main([*words, "--neighbours", "9", "--set", "seed=7", "--run-dir", run, "--quiet"])
    assert (seen["engine"], seen["workers"], seen["worker_memory"]) == ("threads", 3, 64_000_000)
    assert (seen["config"].neighbours, seen["config"].seed) == (9, 7)
    assert str(seen["run_dir"]) == run
    assert not seen["progress"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "sed=7"], r"one of .*seed.*; got 'sed=7'"),
        (["--set", "seed"], "NAME=VALUE"),
        (["--set", "neighbours=5", "--neighbours", "6"], "neighbours is set twice"),
        (["--set", "neighbours=many"], "neighbours"),
        (["--resume"], "name that folder"),
        (["--resume", "--run-dir", "none"], "no build to resume"),
        (["--column", "c"], "no columns"),
        (["--ids", "none.npy"], "no file none.npy"),
    ],
)
def test_mistakes_of_a_build(tmp_path: Path, words: list[str], message: str) -> None:
    codes = save(tmp_path / "codes.npy", codes_of(40))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        cli.main(["build", codes, "--out", str(tmp_path / "index"), "--quiet", *words])
    assert not (tmp_path / "index").exists()


def test_a_run_folder_is_resumed_only_when_asked(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run", {"a": 1}, durable=False)
    codes = save(tmp_path / "codes.npy", codes_of(40))
    with pytest.raises(ValueError, match="give --resume"):
        cli.main(["build", codes, "--out", str(tmp_path / "index"), "--run-dir", str(tmp_path / "run"), "--quiet"])


@pytest.mark.parametrize("text", ["256MB", "1GiB", "4096", "1.5 kB", "2tb", "512 KiB", "7B"])
def test_sizes(text: str) -> None:
    from alimm.projects.binary_graph.cli_common import size

    expected = {"256MB": 256 * 10**6, "1GiB": 2**30, "4096": 4096, "1.5 kB": 1500, "2tb": 2 * 10**12}
    assert size(text) == {**expected, "512 KiB": 2**19, "7B": 7}[text]


@pytest.mark.parametrize("words", [["--worker-memory", "lots"], ["--worker-memory", "0MB"], ["--workers", "0"]])
def test_numbers_that_cannot_be(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["build", "x.npy", "--out", str(tmp_path / "index"), *words])
    assert end.value.code == 2
    assert words[1] in capsys.readouterr().err


def test_add(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, ids = codes_of(20, seed=1), np.arange(20) * 3
    assert cli.main(["add", folder, save(tmp_path / "m.npy", more), "--ids", save(tmp_path / "i.npy", ids)]) == 0
    assert "added 20 rows; " in capsys.readouterr().out
    last = codes_of(2, seed=2)
    assert cli.main(["add", folder, save(tmp_path / "l.npy", last)]) == 0
    assert "with the ids 1300 to 1301" in capsys.readouterr().out
    everything = np.concatenate([codes_of(300), more, last])
    check(folder, everything, np.concatenate([np.arange(300) + 1000, ids, [1300, 1301]]))


def test_add_refuses_before_it_adds(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alimm.projects.binary_graph import cli_change

    monkeypatch.setattr(cli_change, "_BLOCK", 4)
    more = save(tmp_path / "m.npy", codes_of(20, seed=1))
    for bad, message in [(1005, r"1 ids of the input .*\(1005\)"), (3, "3 comes more than once"), (-1, "row 19 is -1")]:
        ids = np.append(np.arange(19), bad)
        with pytest.raises(ValueError, match=message):
            cli.main(["add", folder, more, "--ids", save(tmp_path / "i.npy", ids)])
    with pytest.raises(ValueError, match="codes of 192 bits, the index of 128"):
        cli.main(["add", folder, save(tmp_path / "w.npy", codes_of(3, 3))])
    check(folder, codes_of(300), np.arange(300) + 1000)


def test_delete(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ids.txt").write_text("1030\n\n 1031 \r\n")
    words = ["1003", "1010-1019", str(tmp_path / "ids.txt"), save(tmp_path / "d.npy", np.array([1200, 1201]))]
    assert cli.main(["delete", folder, "--ids", *words]) == 0
    assert "deleted 15 rows" in capsys.readouterr().out
    gone = np.array([1003, *range(1010, 1020), 1030, 1031, 1200, 1201])
    keep = ~np.isin(np.arange(300) + 1000, gone)
    check(folder, codes_of(300)[keep], (np.arange(300) + 1000)[keep])
    with pytest.raises(ValueError, match="1003"):
        cli.main(["delete", folder, "--ids", "1003"])
    assert cli.main(["delete", folder, "--ids", "1003", "--missing", "ignore"]) == 0
    assert cli.main(["compact", folder]) == 0
    check(folder, codes_of(300)[keep], (np.arange(300) + 1000)[keep])


def test_ids_that_are_none(folder: str, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("12\nx1\n")
    cases = {
        "9-3": "goes up", str(2**63): "2\\*\\*63 - 1", "nothing": "neither an id", "0-9999999999": "1e9",
        str(tmp_path / "bad.txt"): "line 2", save(tmp_path / "f.npy", np.zeros(2)): "whole numbers",
    }  # fmt: skip
    for word, message in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            cli.main(["delete", folder, "--ids", word])
    assert len(found(folder)[1]) == 4


def test_search_prints_or_saves(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries = save(tmp_path / "q.npy", codes_of(300)[7:20])
    words = ["search", folder, "--queries", queries, "-k", "2", "--ef", "400"]
    capsys.readouterr()
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["query", "rank", "id", "distance"]
    assert lines[1].split() == ["0", "1", "1007", "0"]
    assert len(lines) == 1 + 5 * 2 + 1
    assert "the first 5 are shown" in lines[-1]
    out = tmp_path / "found.npz"
    assert cli.main([*words, "--threads", "2", "--out", str(out)]) == 0
    with np.load(out) as file:
        result = file["distances"], file["ids"]
    assert (result[0].dtype, result[1].dtype, result[1].shape) == (np.int32, np.int64, (13, 2))
    assert_nearest(result, codes_of(300), np.arange(300) + 1000, codes_of(300)[7:20])
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".tmp") == []
    assert cli.main([*words, "--allowed", "1100-1199", "--out", str(out)]) == 0
    with np.load(out) as file:
        assert_nearest(
            (file["distances"], file["ids"]), codes_of(300)[100:200], np.arange(100) + 1100, codes_of(300)[7:20]
        )
    with pytest.raises(ValueError, match=r"\.npz"):
        cli.main([*words, "--out", "found.npy"])


def test_info(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["delete", folder, "--ids", "1000-1009"])
    capsys.readouterr()
    assert cli.main(["info", folder]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^rows +290$", text, re.MULTILINE)
    assert re.search(r"^deleted, still stored +10$", text, re.MULTILINE)
    assert cli.main(["info", folder, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert (body["rows"], body["deleted"], body["bits"], len(body["built"])) == (290, 10, 128, 1)


def test_merge(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(tmp_path / "other")
    cli.main(["build", save(tmp_path / "o.npy", codes_of(50, seed=4)), "--out", other, "--quiet", "--workers", "1"])
    assert cli.main(["merge", folder, other]) == 0
    assert "50 rows" in capsys.readouterr().out
    everything, ids = (
        np.concatenate([codes_of(300), codes_of(50, seed=4)]),
        np.append(np.arange(300) + 1000, np.arange(50)),
    )
    check(folder, everything, ids)
    with pytest.raises(ValueError, match="ids"):
        cli.main(["merge", folder, other])
    with pytest.raises(ValueError, match="the index itself"):
        cli.main(["merge", folder, folder])
    check(folder, everything, ids)
    check(other, codes_of(50, seed=4), np.arange(50))


def test_verify_finds_damage_and_repairs_the_log(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", folder, "--full"]) == 0
    assert "is sound (every byte): 300 rows" in capsys.readouterr().out
    for number in range(3):
        cli.main(["add", folder, save(tmp_path / "m.npy", codes_of(5, seed=number + 1))])
    (log,) = Path(folder).glob("wal-*.log")
    content = bytearray(log.read_bytes())
    content[len(content) // 2] ^= 1  # in the second of three records
    log.write_bytes(content)
    with pytest.raises(ValueError, match="--repair"):
        cli.main(["verify", folder])
    assert cli.main(["verify", folder, "--repair"]) == 0
    assert "has 1 sound records" in capsys.readouterr().out
    check(folder, np.concatenate([codes_of(300), codes_of(5, seed=1)]), np.arange(305) + 1000)
    array = max(Path(folder).rglob("*.npy"), key=lambda path: path.stat().st_size)
    content = bytearray(array.read_bytes())
    content[-3] ^= 1
    array.write_bytes(content)
    with pytest.raises(ValueError, match=array.name):
        cli.main(["verify", folder, "--full"])


def test_a_folder_that_is_no_index(tmp_path: Path) -> None:
    queries = save(tmp_path / "q.npy", codes_of(3))
    commands = [["info"], ["verify"], ["compact"], ["search", "--queries", queries], ["delete", "--ids", "1"]]
    for name, *words in commands:
        with pytest.raises(FileNotFoundError, match="there is no index folder"):
            cli.main([name, str(tmp_path / "none"), *words])
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            cli.main([name, str(tmp_path), *words])


def test_a_folder_that_may_not_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(13, "Permission denied", "/x")

    monkeypatch.setattr("alimm.projects.binary_graph.cli_inspect.info", refuse)
    with pytest.raises(ValueError, match="Permission denied: '/x'"):
        cli.main(["info", "x"])


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alimm.cli", *words], cwd=ROOT, capture_output=True, text=True, timeout=100
    )


def test_through_the_command_alimm(tmp_path: Path) -> None:
    help_ = run("--help")
    assert "  index             build, change, search and check an index of binary codes\n" in help_.stdout
    done = run("index", "build", str(tmp_path / "none.npy"), "--out", str(tmp_path / "index"))
    assert (done.returncode, done.stderr) == (2, f"alimm: error: there is no file {tmp_path / 'none.npy'}\n")
    vectors = save(tmp_path / "v.npy", np.zeros((3, 2), np.float32))
    done = run("index", "build", vectors, "--out", str(tmp_path / "index"))
    assert done.returncode == 2
    assert "alimm index hash" in done.stderr
    assert run("index", "serve").returncode == 2


def test_no_command_imports_torch(folder: str, tmp_path: Path) -> None:
    queries = save(tmp_path / "q.npy", codes_of(3))
    vectors = save(tmp_path / "v.npy", np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32))
    out = str(tmp_path / "h.npy")
    code = (
        "import json, sys\nfrom alimm.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    assert main(words) == 0, words\n"
        "    assert not {'torch', 'mmengine', 'pyarrow', 'ray'} & sys.modules.keys(), words\n"
    )
    commands = [
        ["index", "info", folder], ["index", "search", folder, "--queries", queries], ["index", "verify", folder],
        ["index", "add", folder, queries], ["index", "hash", vectors, "--out", out, "--bits", "64"],
        ["index", "build", out, "--out", str(tmp_path / "n"), "--quiet", "--workers", "1"],
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_help_imports_no_plugin() -> None:
    code = (
        "import sys; from alimm.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not [m for m in sys.modules if m.startswith('alimm.projects') or m in ('numpy', 'torch', 'mmengine')]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plugins_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "foreign_plugin" / "inner"
    package.mkdir(parents=True)
    for name in (package.parent, package):
        (name / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "tool.py").write_text('"""Sing a song.\n\nMore."""\nraise RuntimeError("imported")\n')
    (tmp_path / "works.py").write_text("def main(argv):\n    print('got', argv)\n")
    meta = tmp_path / "foreign-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text(
        "[alimm.commands]\nsing = foreign_plugin.inner.tool:main\nlost = not_there.at_all:main\n"
        "train = foreign_plugin.inner.tool:main\nworks = works:main\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    commands = alimm_cli.plugin_commands()
    assert commands["sing"] == ("foreign_plugin.inner.tool", "main", "sing a song")
    assert commands["lost"][2] == "(of not_there.at_all, which is not found)"
    assert "train" not in commands
    assert "foreign_plugin" not in sys.modules
    assert alimm_cli.main(["works", "--far", "x"]) == 0
    assert "got ['--far', 'x']" in capsys.readouterr().out
    assert alimm_cli.main(["lost"]) == 2
