"""The cost model against counts by hand, the sentences against the cases they are for, and a real measurement."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alimm.analysis.advise import main
from alimm.analysis.head_advice import advice, duration, human
from alimm.analysis.head_cost import METHODS, HeadShape, Rates, feasible, graph_share, head_cost, step_seconds
from alimm.analysis.head_probe import machine_rates, measure_steps

RATES = Rates(
    logits=1e11,
    grad_features=1e11,
    grad_rows=1e11,
    softmax_forward=1e-9,
    softmax_backward=1e-9,
    copy=1e10,
    fresh=1e10,
    graph=1e11,
    sample=1e-6,
)
SMALL = ["--classes", "5000", "--dim", "16", "--batch", "32"]


def test_one_rank_by_hand():
    shape = HeadShape(1000, 10, 20, active=0.1, neighbours=4, block=100)
    full, fused, random, knn = (head_cost(shape, method) for method in METHODS)
    assert (full.flop, fused.flop, random.flop) == (6 * 20 * 10 * 1000, 8 * 20 * 10 * 1000, 6 * 20 * 10 * 100)
    assert full.state_bytes == fused.state_bytes == 8 * 1000 * 10
    assert random.state_bytes == 8 * 1000 * 10 + 4 * 1000
    assert knn.state_bytes == random.state_bytes + 2 * 1000 + 8 * (4 + 1) + 4 * 1000 * 4
    assert [cost.logits_bytes for cost in (full, fused, random, knn)] == [80_000, 0, 8_000, 8_000]
    assert full.gradient_bytes == 40_000
    assert random.gradient_bytes == 4 * 100 * 10 + 20 * 100
    blocks = 4 * 20 * 100 + 12 * 100 * 10 + 24 * 20 * 10
    assert random.scratch_bytes == blocks
    assert full.scratch_bytes == max(blocks, 40_000)
    assert full.peak_bytes == 80_000 + 80_000 + 40_000 + 40_000
    assert full.message_bytes == 0


def test_ranks_share_the_rows_and_send_features_and_numbers():
    one, four = HeadShape(1003, 10, 20), HeadShape(1003, 10, 20, ranks=4)
    assert four.rows == 251
    assert head_cost(four, "full").state_bytes == 8 * 251 * 10
    assert head_cost(four, "full").flop == head_cost(one, "full").flop
    assert head_cost(four, "full").message_bytes == 20 * (8 + 12 * 10) * 3 // 4 + 24 * 20 * 3
    assert len({head_cost(four, method).message_bytes for method in METHODS}) == 1


@pytest.mark.parametrize(
    ("classes", "flop", "state", "graph"), [(10**4, 2.0e9, 10e6, 2.6e10), (10**6, 2.0e11, 1e9, 2.6e14)]
)
def test_orders_of_magnitude(classes, flop, state, graph):
    shape = HeadShape(classes, 128, 256)
    assert head_cost(shape, "full").flop == pytest.approx(flop, rel=0.03)
    assert head_cost(shape, "full").state_bytes == pytest.approx(state, rel=0.03)
    assert shape.graph_flop == pytest.approx(graph, rel=0.03)


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 9), st.floats(0.001, 1))
def test_active_sets_hold_the_labels_and_fit_the_shard(classes, batch, ranks, share):
    shape = HeadShape(classes, 8, batch, ranks, share)
    assert 1 <= shape.active_rows <= shape.rows
    assert shape.active_rows >= min(shape.rows, shape.distinct / ranks)
    assert shape.active_classes <= classes
    assert 1 <= shape.distinct <= min(classes, batch) + 1e-9
    assert head_cost(shape, "random").flop <= head_cost(shape, "full").flop
    assert head_cost(HeadShape(classes, 8, batch, ranks, 1.0), "random").flop == head_cost(shape, "full").flop


def test_distinct_labels_equal_a_simulation():
    draws = torch.randint(50, (4000, 80), generator=torch.Generator().manual_seed(0))
    average = sum(len(row.unique()) for row in draws) / len(draws)
    assert HeadShape(50, 8, 80).distinct == pytest.approx(average, rel=0.005)


def test_a_graph_is_one_third_of_an_epoch_with_one_sample_a_class():
    shape = HeadShape(10**6, 64, 100, active=0.1, samples_per_class=1)
    assert graph_share(shape) == pytest.approx(1 / 3)
    assert graph_share(shape, "knn") == pytest.approx(10 / 3)
    assert graph_share(HeadShape(10**6, 64, 100, samples_per_class=10)) == pytest.approx(1 / 30)
    assert graph_share(HeadShape(10**6, 64, 100)) is None


def test_time_is_the_sum_of_its_parts():
    shape = HeadShape(1000, 100, 50, active=0.5)
    expected = 50e-6 + 6 * 1000 * 100 * 50 / 1e11 + 1000 * 50 * 2e-9 + 4 * 1000 * 100 * (24 + 2) / 1e10
    assert step_seconds(shape, "full", RATES) == pytest.approx(expected)
    expected = 50e-6 + 6 * 500 * 100 * 50 / 1e11 + 500 * 50 * 2e-9 + 4 * 500 * 100 * (26 + 1) / 1e10
    assert step_seconds(shape, "random", RATES) == pytest.approx(expected)
    assert step_seconds(shape, "fused", RATES) > step_seconds(shape, "full", RATES)


@given(st.integers(1, 10**9), st.integers(1, 2048), st.integers(1, 20_000), st.integers(1, 64), st.floats(1e-6, 1))
def test_a_feasible_head_is_within_its_bounds(classes, dim, batch, ranks, active):
    small = feasible(HeadShape(classes, dim, batch, ranks, active), 1 << 28)
    assert small.ranks == 1
    assert small.classes <= min(classes, 200_000)
    assert small.batch <= batch
    assert all(head_cost(small, method).peak_bytes <= 1 << 28 for method in METHODS)
    assert head_cost(small, "fused").flop <= 6e10


def test_what_never_fits_is_told():
    with pytest.raises(ValueError, match="check --dim"):
        feasible(HeadShape(100, 10**6, 4), 1 << 26)


def said(shape, **options):
    return " ".join(advice(shape, **options))


def test_a_small_head_does_not_matter_in_time():
    text = said(HeadShape(10_000, 512, 256, backbone_gflop=24.6))
    assert "0.1% of a step's arithmetic (half at 8,007,812 classes)" in text
    assert "does not matter" in text
    assert "6." in said(HeadShape(10**8, 512, 16_384, backbone_gflop=24.6)).split("at most ")[1][:3]
    assert "does not matter" not in said(HeadShape(10**8, 512, 16_384, backbone_gflop=24.6))
    assert "--backbone-gflop" in said(HeadShape(10, 8, 4))


def test_the_first_method_that_fits_is_named():
    shape = HeadShape(1_000_000, 128, 1024)
    need = {method: head_cost(shape, method).peak_bytes for method in METHODS}
    assert need["knn"] < need["fused"] < need["full"]
    assert "All that full needs" in said(shape, memory=need["full"])
    assert "full does not fit" in said(shape, memory=need["full"] - 1)
    assert "neither full nor fused fits, but random and knn do: " in said(shape, memory=need["fused"] - 1)
    assert "fits, but random does: " in said(shape, memory=need["knn"] - 1)
    assert "No method fits" in said(shape, memory=need["random"] / 2)


def test_knn_is_judged_by_what_a_batch_can_use():
    assert "cannot pay" in said(HeadShape(20_000, 64, 2048, neighbours=16))
    assert "cannot pay" not in said(HeadShape(2_000_000, 64, 2048, neighbours=16))
    assert "no room for neighbours" in said(HeadShape(10**6, 64, 4096, active=0.004))
    assert "K = 50 are used to rank" in said(HeadShape(10**6, 64, 1024, active=0.01, neighbours=50))
    assert "drawn at random" in said(HeadShape(10**6, 64, 256, neighbours=8))


def test_ivf_is_named_where_exact_is_slow():
    assert "IVF" in said(HeadShape(10**6, 64, 256))
    assert "IVF" not in said(HeadShape(10**5, 64, 256, samples_per_class=100))
    assert "IVF" not in said(HeadShape(10**6, 64, 256), device="cuda", rates=Rates(**{**vars(RATES), "graph": 4e14}))
    assert "of an epoch" in said(HeadShape(10**5, 64, 256, samples_per_class=1)).split("IVF")[1]


def test_more_ranks_than_classes():
    assert "2 of 5 ranks hold no class" in said(HeadShape(3, 8, 4, ranks=5, active=1.0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--classes", "0", "--dim", "4", "--batch", "4"], "classes must be a whole number of at least 1, got 0"),
        ([*SMALL, "--ranks", "0"], "ranks must be"),
        ([*SMALL, "--active", "0"], "active must be a share"),
        ([*SMALL, "--active", "2.5"], "active must be a share"),
        ([*SMALL, "--active", "6000"], "up to 5,000, got 6000"),
        ([*SMALL, "--active", "nan"], "active must be a share"),
        ([*SMALL, "--neighbours", "-1"], "neighbours must be"),
        ([*SMALL, "--samples-per-class", "0"], "samples_per_class must be above 0"),
        ([*SMALL, "--backbone-gflop", "-3"], "leave it out"),
        ([*SMALL, "--memory-gb", "0"], "--memory-gb must be above 0"),
    ],
)
def test_nonsense_is_refused(words, message, capsys):
    assert main([*words, "--no-measure"]) == 1
    assert message in capsys.readouterr().err


def test_table_and_json_without_measurement(tmp_path, capsys):
    path = tmp_path / "advice.json"
    assert main([*SMALL, "--no-measure", "--device", "cuda", "--memory-gb", "1", "--json", str(path)]) == 0
    shown, told = capsys.readouterr().out, json.loads(path.read_text())
    assert all(f"{method} " in shown for method in METHODS)
    assert "model" in shown.lower()
    assert told["rates"] is None
    assert told["measured"] == {}
    assert told["model"]["full"]["flop"] == 6 * 5000 * 16 * 32
    assert told["advice"]
    assert all(line in shown for line in told["advice"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys):
    assert main([*SMALL, "--device", "cuda"]) == 1
    assert "--no-measure" in capsys.readouterr().err


def test_measured_steps_agree_with_the_model(tmp_path, capsys, monkeypatch):
    """Memory only: under load a time says nothing."""
    from alimm.analysis import advise

    monkeypatch.setattr(advise, "MEASURE_BYTES", 100e6)
    monkeypatch.setattr(machine_rates, "__defaults__", (0.2,))
    monkeypatch.setattr(measure_steps, "__defaults__", (("full", "fused", "random"), 2))
    path = tmp_path / "advice.json"
    assert main(["--classes", "200000", "--dim", "128", "--batch", "48", "--json", str(path)]) == 0
    told = json.loads(path.read_text())
    assert told["measured_at"]["classes"] < 200_000
    assert all(value > 0 for value in told["rates"].values())
    assert "Model beside a measured step" in capsys.readouterr().out
    for method in ("full", "fused", "random"):
        step, model = told["measured"][method], told["model_at_measured"][method]
        assert step["seconds"] > 0
        assert model["seconds"] > 0
        if sys.platform == "linux" and step["peak_bytes"] is not None:
            assert step["peak_bytes"] == pytest.approx(model["peak_bytes"], rel=0.1)


def test_sizes_and_times_for_people():
    assert [human(value) for value in (0, 999, 1500, 2.5e6, 1.2345e9, 2e13)] == [
        "0 B",
        "999 B",
        "1.5 KB",
        "2.5 MB",
        "1.23 GB",
        "20,000 GB",
    ]
    assert [duration(value) for value in (0.0123, 5, 180, 7200, 4e5)] == ["12.3 ms", "5 s", "3 min", "2 h", "4.63 d"]


def test_the_tool_is_a_door_to_it():
    done = subprocess.run([sys.executable, "tools/advise.py", "--help"], capture_output=True, text=True, check=True)
    assert "--samples-per-class" in done.stdout
