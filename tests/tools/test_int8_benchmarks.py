"""Benchmarks of INT8 training: pairing and keeping of runs, and what they judge, on made-up scores."""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def modules():
    """The benchmarks, imported as tools/benchmark.py does."""
    folder = str(TOOLS / "benchmarks")
    sys.path.insert(0, folder)
    names = ("int8_parity", "int8_overfit", "int8_gradients")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(folder)
    for name in (*names, "_int8_runs"):
        sys.modules.pop(name, None)


@pytest.fixture
def parity(modules):
    return modules["int8_parity"]


def row(arm, seed, score, weights=1, data=2, recipe="r"):
    return dict(
        recipe=recipe, arm=arm, seed=seed, score=score, loss=0.5, weights=weights, data=data, layers=3, seconds=1.0
    )


def judged(parity, int8, tensor, fault, seeds=5):
    rows = []
    for seed in range(seeds):
        base = 80 + seed  # the seeds differ more than the arms do
        wobble = 0.2 * (-1) ** seed
        rows += [row("fp32", seed, base), row("int8", seed, base + int8 + wobble)]
        rows.append(row("int8_tensor", seed, base + tensor + wobble / 2))
        rows.append(row("int8_3bit", seed, base + fault))
    return [claim.met for claim in parity.claims(rows, ["r"])]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.0, -0.5, -5.0), [True, True, True]),
        ((-0.9, -1.0, -5.0), [False, True, True]),  # the mean is inside, the interval is not
        ((0.9, 0.0, -5.0), [False, True, True]),  # better by as much is no parity either
        ((0.0, 0.8, -5.0), [True, False, True]),
        ((0.0, -0.5, -0.9), [True, True, False]),
    ],
)
def test_parity_judges_parity_control_and_fault(parity, values, verdict):
    assert judged(parity, *values) == verdict


def test_four_seeds_are_too_few(parity):
    assert judged(parity, 0.0, -0.5, -5.0, seeds=4) == [False, True, True]


def test_what_was_not_run_is_not_met(parity):
    found = parity.claims([row("fp32", 0, 80.0)], ["r"])
    assert [claim.met for claim in found] == [False] * 3
    assert {claim.figure for claim in found} == {"not measured"}


def test_rows_that_began_differently_are_no_pair(parity):
    runs = parity.runs
    good = [row("fp32", 0, 80.0), row("int8", 0, 79.0), row("int8", 1, 70.0)]
    assert runs.differences(good, "r", "int8") == [-1.0]
    for what in ("weights", "data"):
        with pytest.raises(RuntimeError, match=f"their {what} differ"):
            runs.differences([good[0], good[1] | {what: 9}], "r", "int8")


def test_finished_runs_are_not_repeated(parity, tmp_path, monkeypatch):
    runs, trained = parity.runs, []

    def train_once(run, work_dir):
        trained.append((run.arm, run.seed, run.epochs))
        return row(run.arm, run.seed, 80.0)

    monkeypatch.setattr(runs, "train_once", train_once)
    recipe = parity.RECIPES["fashion_mnist"]
    todo = [runs.Run(recipe, arm, seed, 2, 1) for seed in (0, 1) for arm in ("fp32", "int8")]
    first = runs.train_all(todo[:3], tmp_path, jobs=1)
    assert runs.train_all(todo, tmp_path, jobs=1)[:3] == first
    assert trained == [("fp32", 0, 2), ("int8", 0, 2), ("fp32", 1, 2), ("int8", 1, 2)]
    runs.train_all([runs.Run(recipe, "fp32", 0, 3, 1)], tmp_path, jobs=1)
    assert trained[-1] == ("fp32", 0, 3)


def test_each_arm_gets_its_number_of_seeds(parity, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(parity.runs, "train_all", lambda todo, work_dir, jobs: seen.extend(todo) or [])
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parity.add_arguments(parser)

    def count(*options):
        seen.clear()
        parity.run(parser.parse_args(options))
        return {
            (recipe, arm): sum((run.recipe.name, run.arm) == (recipe, arm) for run in seen)
            for recipe, arm in {(run.recipe.name, run.arm) for run in seen}
        }

    found = count()
    assert found["emoji_products", "fp32"] == found["emoji_products", "int8"] == 16
    assert found["fashion_mnist", "fp32"] == found["fashion_mnist", "int8"] == 5
    assert {found[name, "int8_tensor"] for name in parity.RECIPES} == {5}
    assert {found[name, "int8_3bit"] for name in parity.RECIPES} == {2}
    assert set(count("--seeds", "3", "--arms", "fp32", "int8_3bit").values()) == {3, 2}
    assert set(count("--quick").items()) == {(("quick", arm), 1) for arm in parity.runs.ARMS}


def test_an_arm_brings_its_own_hook_alone(parity, monkeypatch):
    runs = parity.runs
    hooks = {}
    for arm in ("fp32", "int8_tensor"):
        config = runs.make_config(runs.Run(parity.QUICK, arm, 0, 1, 1))
        hooks[arm] = [hook for hook in config.custom_hooks if "Int8" in str(hook["type"])]
    assert hooks["fp32"] == []
    (hook,) = hooks["int8_tensor"]
    assert (hook["clip"], hook["grad_input"], hook["grad_weight"]) == ("max", "global", "tensor")
    assert hook["planner"] is False


def test_sets_of_pictures_are_seen_in_full(parity):
    """The length of a run changes with --epochs, and its schedule with it."""
    for name, recipe in parity.RECIPES.items():
        for epochs in (1, 4):
            config = recipe.make(epochs)
            assert config.train_cfg.max_epochs == config.train_cfg.val_interval == epochs, name
            last = config.param_scheduler[-1]
            assert last.get("end", last.get("total_steps")) == epochs


def test_overfitting_counts_only_where_fp32_has_learnt(modules):
    overfit = modules["int8_overfit"]

    def verdict(fp32, int8):
        return overfit.claims([row("fp32", 0, fp32), row("int8", 0, int8)], {"r": 90.0})[0].met

    assert verdict(95.0, 94.0)
    assert verdict(95.0, 99.0)
    assert not verdict(95.0, 93.9)
    assert not verdict(89.0, 89.0)
    assert [claim.met for claim in overfit.claims([row("fp32", 0, 95.0)], {"r": 90.0})] == [False]


def test_every_overfit_config_names_the_score_it_is_judged_by(modules):
    overfit = modules["int8_overfit"]
    found = overfit.configs()
    assert {overfit.data_set(name) for name in found} == set(overfit.SETS)
    for name, path in found.items():
        config = overfit.make(path, 3)
        assert overfit.SETS[overfit.data_set(name)][0] in config.expected, name
        assert config.train_cfg.max_epochs == 3


def test_missing_data_is_named_with_its_command(modules, tmp_path, monkeypatch):
    overfit = modules["int8_overfit"]
    monkeypatch.setenv("ALIMM_DATA", str(tmp_path))
    arguments = argparse.Namespace(configs=[next(iter(overfit.configs()))], quick=True, epochs=None, seeds=None)
    with pytest.raises(FileNotFoundError, match=r"Make the data with: python .*prepare_emoji_coco\.py"):
        overfit.run(arguments)


def test_fake_quantisation_equals_a_loop(modules):
    module = modules["int8_gradients"]
    x = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    quantized = module.fake_quantize(x, (0, 2, 3))
    for channel in range(4):
        step = float(x[:, channel].abs().max()) / 127
        for value, result in zip(x[:, channel].flatten(), quantized[:, channel].flatten(), strict=True):
            assert float(result) == pytest.approx(round(float(value) / step) * step if step else 0.0, abs=1e-6)


def test_folded_scales_cancel(modules, monkeypatch):
    """On a fine grid no product has an error: each formula puts back every scale that it took out."""
    module = modules["int8_gradients"]
    monkeypatch.setattr(module, "QMAX", 2**20)
    draw = torch.Generator().manual_seed(1)
    g, w, x = module.lognormal(2.0)(draw), torch.randn(module.SHAPE_W), torch.randn(module.SHAPE_X)
    assert max(module.simulate(x, w, g, None)) < 1e-4


def test_gradients_are_judged_by_their_worst_draw(modules):
    module = modules["int8_gradients"]

    def verdicts(worst, plugin):
        good = {column: 2.0 if column.endswith("global") else 1.0 for column in module.COLUMNS}
        found = {source: {kind: [dict(good)] for kind in module.KINDS} for source in module.SOURCES}
        found[module.FORMULAS]["lognormal(2), stochastic"].append(good | {"dX folded": worst})
        found[module.EXACT]["homogeneous"][0]["dW global"] = plugin
        return [claim.met for claim in module.claims(found)]

    assert verdicts(1.0, 2.09) == [True] * 9
    assert verdicts(1.0, 2.11) == [True] * 8 + [False]
    assert verdicts(2.01, 2.0)[6] is False


@pytest.mark.slow
def test_quick_parity_trains_in_both(tmp_path):
    command = [sys.executable, TOOLS / "benchmark.py", "int8_parity", "--quick", "--work-dir", tmp_path]
    done = subprocess.run([*command, "--arms", "fp32", "int8"], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "11 INT8 layers" in done.stdout
    assert done.stdout.splitlines()[-1] == "int8_parity: 0 of 3 claims met (claim: all)"
