"""Benchmarks of classifier heads: machinery on small sizes, and what they judge, on made-up scores."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NAMES = ("sharded_head", "knn_softmax", "_head_steps", "_head_runs", "_knn_graph")


@pytest.fixture(scope="module")
def modules():
    """The benchmarks, imported as tools/benchmark.py does."""
    folder = str(TOOLS / "benchmarks")
    sys.path.insert(0, folder)
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path.remove(folder)
    for name in NAMES:
        sys.modules.pop(name, None)


def row(arm, seed, score, data=1, **more):
    return dict(arm=arm, seed=seed, score=score, weights=seed, data=data, steps=10, seconds=1.0, **more)


def judged(modules, knn, random, seeds=3):
    rows = []
    for seed in range(seeds):
        base = 70.0 + 2 * seed  # the seeds differ more than the methods do
        rows += [row("full", seed, base), row("knn", seed, base + knn, coverage=0.4)]
        rows.append(row("random", seed, base + random, coverage=0.1))
    return [claim.met for claim in modules["knn_softmax"].judge(rows, 0.1)]


@pytest.mark.parametrize(
    ("knn", "random", "seeds", "verdict"),
    [
        (-0.3, -2.0, 3, [True, True]),
        (-0.6, -2.0, 3, [False, True]),
        (-0.3, -0.2, 3, [True, False]),
        (0.2, -2.0, 2, [False, False]),  # too few seeds
    ],
)
def test_accuracy_judges_parity_with_full_and_gain_over_random(modules, knn, random, seeds, verdict):
    assert judged(modules, knn, random, seeds) == verdict


def test_runs_that_did_not_see_the_same_pictures_are_no_pair(modules):
    rows = [row("full", 0, 70.0), row("knn", 0, 70.0, data=2)]
    with pytest.raises(RuntimeError, match="seed 0, are no pair: their data differ"):
        modules["_head_runs"].interval(rows, "knn", "full")


def test_every_method_steps_and_starts_at_the_same_kind_of_loss(modules):
    for method in modules["_head_steps"].METHODS:
        step = modules["_head_steps"].stepper(method, 3000, 16, 8, 0.1, 4)
        first = step()
        assert torch.isfinite(torch.tensor(first))
        assert step() < first, f"{method} learns the batch"


def test_made_graph_names_others_of_the_same_group(modules):
    lists = modules["_head_steps"].made_graph(1000, 4)
    assert lists.shape == (1000, 4)
    assert (lists.sort(1).values.diff(dim=1) > 0).all()
    assert (lists != torch.arange(1000)[:, None]).all()
    groups = 1000 // 32
    assert ((lists - torch.arange(1000)[:, None]) % groups % 1000 % groups).unique().numel() <= 2


def test_peak_memory_is_that_of_a_process_of_its_own(modules):
    peak = modules["_head_steps"].peak_bytes("knn", 50_000, 32, 16, 0.1, 4, 1)
    assert 2 * 4 * 32 * 50_000 < peak < 4 * 4 * 32 * 50_000


def test_coverage_finds_more_of_the_mass_by_the_graph(modules):
    data = {}
    (claim,) = modules["knn_softmax"].coverage(True, data)
    assert claim.met
    assert len(data["coverage"]) == 9


def test_curve_and_comparison_run_on_small_sizes(modules, monkeypatch):
    monkeypatch.setattr(modules["_head_steps"], "peak_bytes", lambda method, classes, dim, *_: 4 * classes * dim * 2.5)
    given = argparse.Namespace(
        quick=False, classes=4000, dim=16, batch=16, active=0.1, neighbours=4, curve=[2000, 4000], curve_active=500,
        repeats=1, threads=1,
    )  # fmt: skip
    threads = torch.get_num_threads()
    try:
        outcome = modules["sharded_head"].run(given)
    finally:
        torch.set_num_threads(threads)
    assert len(outcome.claims) == 4
    assert outcome.data["knn"]["rows"] == 2.5
    assert outcome.claims[2].met
    assert outcome.data["curve"]["bytes_per_class"] == 160
