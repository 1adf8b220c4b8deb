"""Benchmark of DCAA: a quick run of the whole, what it judges and how it pairs, on made-up scores, and its runs."""

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mmseg")

import numpy as np
from mmengine.optim import build_optim_wrapper
from PIL import Image

from alimm.apis.config import load_config
from alimm.registry import MODELS
from tests.projects.dcaa.tiny_configs import plain_texts

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NAMES = ("_dcaa_runs", "_dcaa_cost", "_dcaa_gallery")
CONDITIONS = ("clear", "fog", "rain", "night", "snow")


@pytest.fixture(scope="module")
def modules():
    """The benchmark, imported as tools/benchmark.py does."""
    folder = TOOLS / "benchmarks"
    sys.path.insert(0, str(folder))
    found = {name: importlib.import_module(name) for name in NAMES}
    # Other folders have its name too.
    spec = importlib.util.spec_from_file_location("dcaa_benchmark", folder / "dcaa.py")
    found["dcaa"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found["dcaa"])
    yield found
    sys.path.remove(str(folder))
    for name in NAMES:
        sys.modules.pop(name, None)


def row(arm, seed, adverse, worst=None, data="synthetic"):
    scores = dict(adverse=adverse, worst=adverse if worst is None else worst)
    return dict(arm=arm, data=data, seed=seed, iters=10, scores=scores, seconds=2.0 + seed)


def rows_of(modules, gain=25.0, lead=3.0, worst_lead=1.0, seeds=5, noise=0.1, left_out=()):
    """Scores of all arms. Seeds differ more than arms do, but alike in every arm."""
    made = []
    for seed in range(seeds):
        base = 30.0 + 3 * seed
        jitter = noise * (-1) ** seed
        made.append(row("dcaa", seed, base + gain + jitter, base + 10 + worst_lead + jitter))
        for arm in modules["_dcaa_runs"].BASELINES:
            best = arm == "mean_teacher"
            adverse = base if arm == "source_only" else base + gain - lead - (0 if best else 1)
            made.append(row(arm, seed, adverse, base + (10 if arm == "fda" else 9)))
    return [entry for entry in made if entry["arm"] not in left_out]


def judged(modules, **made):
    return [claim.met for claim in modules["dcaa"].accuracy_claims(rows_of(modules, **made))]


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        ({}, [True, True, True]),
        ({"gain": 19.5, "lead": 3.0}, [False, True, True]),
        ({"lead": -0.5}, [True, False, True]),
        ({"lead": 0.05, "noise": 2.0}, [True, False, True]),  # above on average, but not surely
        ({"worst_lead": -0.5}, [True, True, False]),
        ({"seeds": 4}, [False, False, False]),
        ({"left_out": ("advent",)}, [True, True, False]),  # of the baselines, but not of the rivals
        ({"left_out": ("adabn",)}, [True, False, False]),
        ({"left_out": ("source_only",)}, [False, True, False]),
        ({"left_out": ("dcaa",)}, [False, False, False]),
    ],
)
def test_accuracy_needs_the_uplift_the_lead_and_every_arm(modules, made, verdict):
    assert judged(modules, **made) == verdict


def test_a_baseline_that_lacks_a_seed_is_no_complete_one(modules):
    rows = [entry for entry in rows_of(modules) if (entry["arm"], entry["seed"]) != ("adabn", 4)]
    assert [claim.met for claim in modules["dcaa"].accuracy_claims(rows)] == [True, False, False]


def test_claims_name_what_was_measured(modules):
    claims = modules["dcaa"].accuracy_claims(rows_of(modules))
    assert "5 seeds" in claims[0].figure
    assert "mean_teacher" in claims[1].subject
    assert "fda" in claims[2].subject
    nothing = modules["dcaa"].accuracy_claims([])
    assert [claim.figure for claim in nothing] == ["not measured"] * 3
    assert not any(claim.met for claim in nothing)


def test_difference_pairs_by_seed_and_keeps_data_sets_apart(modules):
    difference = modules["_dcaa_runs"].difference
    rows = [row("dcaa", 0, 50.0), row("dcaa", 1, 70.0), row("dcaa", 2, 0.0), row("dcaa", 0, 99.0, data="composites")]
    rows += [row("fda", 1, 66.0), row("fda", 0, 48.0), row("fda", 3, 0.0)]
    found = difference(rows, "synthetic", "dcaa", "fda", "adverse")
    gains = np.array([50.0 - 48.0, 70.0 - 66.0])
    half = 12.706 * gains.std(ddof=1) / np.sqrt(2)  # Student's t of one degree of freedom
    assert found.mean == pytest.approx(gains.mean())
    assert (found.low, found.high) == pytest.approx((gains.mean() - half, gains.mean() + half), abs=1e-3)
    assert difference(rows, "synthetic", "dcaa", "oracle", "adverse") is None
    assert difference(rows, "composites", "dcaa", "fda", "adverse") is None


def test_table_has_a_row_for_every_arm_that_ran(modules):
    rows = rows_of(modules, left_out=("adabn",))
    cells = modules["_dcaa_runs"].table_rows(rows, "synthetic")
    measured = {entry["arm"] for entry in rows}
    arms = [line[0] for line in cells]
    assert arms == [arm for arm in modules["_dcaa_runs"].ARMS if arm in measured]
    to_base, to_dcaa = 4, 5  # after arm, seeds, adverse and worst
    by_arm = dict(zip(arms, cells, strict=True))
    assert by_arm["source_only"][1:3] == ["5", "36.0"]
    assert by_arm["source_only"][to_base] == by_arm["dcaa"][to_dcaa] == ""
    assert by_arm["dcaa"][to_base].startswith("+25.0")
    assert by_arm["mean_teacher"][to_dcaa].startswith("+3.0")
    assert by_arm["dcaa"][-1] == "4"
    assert modules["_dcaa_runs"].table_rows([], "synthetic") == []


def test_memory_is_judged_stage_by_stage(modules):
    rows = [dict(stage="align", ratio=0.6), dict(stage="self_train", ratio=0.61)]
    assert [claim.met for claim in modules["dcaa"].memory_claims(rows)] == [True, False]


def test_every_arm_and_ablation_has_a_config_of_its_length(modules):
    runs = modules["_dcaa_runs"]
    for arm in (*runs.ARMS, *runs.ABLATIONS):
        config = runs.make_config(runs.Run(arm, "synthetic", 3, 30), tiny=True)
        assert config.train_cfg.max_iters == config.train_cfg.val_interval == 30
        assert {part.end for schedule in config.param_scheduler.values() for part in schedule} == {30}
        begins = [stage["begin"] for hook in config.custom_hooks for stage in hook.get("stages", ())]
        assert begins in ([], [0]) or (begins[0] == 0 < begins[1] < 30 and len(begins) == 2)
        assert config.train_dataloader.source.dataset.get("num", 4) == 4
    full = load_config("alimm::dcaa/dcaa_synthetic.py")
    assert runs.make_config(runs.Run("dcaa", "synthetic", 0, 30)).model.to_dict() == full.model.to_dict()


def test_ablations_differ_from_what_they_leave_out_of(modules):
    runs = modules["_dcaa_runs"]
    models = {}
    for arm in ("dcaa", *runs.ABLATIONS):
        config = runs.make_config(runs.Run(arm, "synthetic", 0, 30))
        models[arm] = json.dumps(
            [config.model.to_dict(), config.custom_hooks, config.train_dataloader.source.dataset.to_dict()], default=str
        )
    assert len(set(models.values())) == len(models)


def test_every_arm_and_ablation_builds_one_decoder_a_condition(modules):
    runs = modules["_dcaa_runs"]
    for arm, (config_name, _) in {**runs.ARMS, **runs.ABLATIONS}.items():
        config = runs.make_config(runs.Run(arm, "synthetic", 0, 30), tiny=True)
        model = MODELS.build(config.model)
        if config_name.startswith("dcaa"):
            assert [type(branch).__name__ for branch in model.decode_head.branches] == ["ConditionDecoder"] * 5, arm
            assert model.decode_head.attention == (arm != "dcaa - attention")
        else:
            assert type(model.decode_head).__name__ == "ConditionDecoder", arm


def test_every_arm_and_ablation_builds_its_optimisers(modules):
    runs = modules["_dcaa_runs"]
    for arm in (*runs.ARMS, *runs.ABLATIONS):
        config = runs.make_config(runs.Run(arm, "synthetic", 0, 30), tiny=True)
        assert "seg" in build_optim_wrapper(MODELS.build(config.model), config.optim_wrapper), arm


@pytest.mark.slow
def test_every_arm_and_ablation_trains(modules, tmp_path):
    runs = modules["_dcaa_runs"]
    for arm in (*runs.ARMS, *runs.ABLATIONS):
        found = runs.train_once(runs.Run(arm, "synthetic", 0, 4), tmp_path, tiny=True)
        assert set(found["scores"]) == {*CONDITIONS, "mean", "worst", "adverse"}, arm


def test_the_table_of_each_data_set_has_its_own_conditions(modules, tmp_path, monkeypatch):
    """Composites have other conditions than the synthetic set, and fewer."""
    benchmark, printed = modules["dcaa"], []
    names = {"synthetic": ("clear", "fog"), "composites": ("plain",)}

    def all_rows(planned, *_, **__):
        made = [row(run.arm, run.seed, 1.0, data=run.data) for run in planned]
        return [{**one, "scores": dict.fromkeys(names[one["data"]], 1.0) | one["scores"]} for one in made]

    monkeypatch.setattr(modules["_dcaa_runs"], "train_all", all_rows)
    monkeypatch.setattr(benchmark, "print_table", lambda title, header, cells: printed.append((header, cells)))
    benchmark.run(options(modules, "--parts", "accuracy", "--data", *names, "--work-dir", str(tmp_path)))
    for data, (header, cells) in zip(names, printed, strict=True):
        scores = (*names[data], "adverse", "worst")
        assert header[: 2 + len(scores)] == ("arm", "seeds", *scores)
        assert {len(line) for line in cells} == {len(header)}


def test_runs_are_kept_and_not_repeated(modules, tmp_path, monkeypatch, capsys):
    runs = modules["_dcaa_runs"]
    trained = []

    def once(run, work_dir, tiny=False):
        trained.append(run.key)
        return row(run.arm, run.seed, 1.0)

    monkeypatch.setattr(runs, "train_once", once)
    plan = [runs.Run(arm, "synthetic", 0, 10) for arm in ("dcaa", "fda")]
    first = runs.train_all(plan, tmp_path, 1)
    again = runs.train_all(
        [*plan, runs.Run("fda", "synthetic", 1, 10), runs.Run("fda", "synthetic", 0, 11)], tmp_path, 1
    )
    assert again[:2] == first
    assert len(trained) == len(set(trained)) == 4
    assert "2 of 4 runs are in" in capsys.readouterr().out


def options(modules, *given):
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    modules["dcaa"].add_arguments(parser)
    return parser.parse_args(given)


def check_rows_and_gallery(rows, folder):
    assert [(one["arm"], one["seed"]) for one in rows] == [(a, s) for s in (0, 1) for a in ("source_only", "dcaa")]
    assert all(set(one["scores"]) == {*CONDITIONS, "mean", "worst", "adverse"} for one in rows)
    with Image.open(folder / "gallery.png") as picture:
        assert picture.width > 4 * 128
        assert picture.height > len(CONDITIONS) * 64
    for condition in CONDITIONS:
        assert (folder / f"attention_{condition}.png").is_file()
        assert (folder / f"ambivalence_{condition}.png").is_file()


def test_quick_accuracy_trains_two_arms_and_draws_them(modules, tmp_path):
    given = options(modules, "--quick", "--parts", "accuracy", "gallery", "--work-dir", str(tmp_path), "--jobs", "1")
    with plain_texts():
        outcome = modules["dcaa"].run(given)
    check_rows_and_gallery(outcome.data["rows"], tmp_path / "quick")
    assert len(outcome.claims) == 3
    assert not outcome.met, "two seeds prove nothing"


def test_memory_is_measured_in_a_process_of_its_own(modules):
    assert 1 < modules["_dcaa_cost"].peak("memory", "align", (64, 64), 1) < 1000


@pytest.mark.slow
def test_quick_run_writes_json_and_gallery(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, TOOLS / "benchmark.py", "dcaa", "--quick", "--json", report, "--work-dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TOOLS.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(report.read_text())
    assert record["options"]["quick"] is True
    assert len(record["claims"]) == 5
    data = record["data"]
    check_rows_and_gallery(data["rows"], tmp_path / "quick")
    assert [one["stage"] for one in data["memory"]] == ["align", "self_train"]
    assert all(one["memory"] > 0 < one["compat"] for one in data["memory"])
    assert [(one["stage"], one["conditions"]) for one in data["time"]] == [
        (stage, count) for stage in ("align", "self_train") for count in (1, 2, 3, 4)
    ]
    assert all(one["seconds"] > 0 for one in data["time"])
