"""Statistics of benchmarks against slow formulas and known values; what an outcome says."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from alimm.report.benchmark import Claim, Outcome, environment, print_table, show
from alimm.report.statistics import Interval, interleave, paired_interval, ratio, t_quantile


def test_arms_run_in_turn_and_warm_up_does_not_count():
    calls = []
    times = interleave({name: (lambda name=name: calls.append(name)) for name in "AB"}, repeats=3, warmup=2)
    assert "".join(calls) == "AB" * 5
    assert {name: len(values) for name, values in times.items()} == {"A": 3, "B": 3}


def test_the_time_of_an_arm_is_its_own(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("alimm.report.statistics.time.perf_counter", lambda: clock[0])
    arms = {name: (lambda step=step: clock.__setitem__(0, clock[0] + step)) for name, step in (("A", 2.0), ("B", 5.0))}
    assert interleave(arms, repeats=2, warmup=0) == {"A": [2.0, 2.0], "B": [5.0, 5.0]}


def test_ratio_takes_pairs_and_medians():
    found = ratio([2.0, 9.0, 4.0, 40.0, 5.0], [1.0, 3.0, 2.0, 10.0, 5.0])
    assert found.median == 2.0  # of 2, 3, 2, 4, 1
    assert (found.q1, found.q3) == (2.0, 3.0)
    assert found.of_medians == pytest.approx(5.0 / 3.0)


def test_a_slow_machine_leaves_the_ratio_alone():
    drift = np.linspace(1, 10, 9)
    found = ratio(list(3.0 * drift), list(2.0 * drift))
    assert found == pytest.approx((1.5, 1.5, 1.5, 1.5))


@pytest.mark.parametrize("degrees", [*range(1, 41), 100, 1000])
def test_quantiles_of_student_equal_scipy(degrees):
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-5)


def test_interval_equals_scipy():
    values = [0.3, -0.2, 0.1, 0.5, -0.4, 0.05]
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert paired_interval(values) == pytest.approx((np.mean(values), low, high), rel=2e-5)


def test_one_pair_proves_nothing():
    found = paired_interval([0.2])
    assert found == (0.2, -math.inf, math.inf)
    assert not found.within(1000)


def test_the_whole_interval_has_to_lie_inside():
    assert Interval(0.0, -0.99, 0.99).within(1)
    assert not Interval(0.0, -1.0, 0.5).within(1)
    assert not Interval(0.0, -0.5, 1.0).within(1)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="repeats"):
        interleave({}, repeats=0, warmup=0)
    with pytest.raises(ValueError, match="same length"):
        ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one"):
        paired_interval([])
    with pytest.raises(ValueError, match="degree"):
        t_quantile(0)
    with pytest.raises(ValueError, match="claim"):
        Outcome([])


GOOD, BAD = Claim("speed", "1.40 x", "above 1.2", True), Claim("accuracy", "-3.0 points", "within 1 point", False)


def test_last_line_of_one_claim_and_of_two(capsys):
    show("one", Outcome([BAD]))
    assert capsys.readouterr().out.splitlines() == [
        "NOT MET accuracy: -3.0 points (claim: within 1 point)",
        "one: -3.0 points (claim: within 1 point)",
    ]
    outcome = Outcome([GOOD, BAD], {"rows": [1]})
    show("two", outcome)
    assert capsys.readouterr().out.splitlines() == [
        "met     speed: 1.40 x (claim: above 1.2)",
        "NOT MET accuracy: -3.0 points (claim: within 1 point)",
        "two: 1 of 2 claims met (claim: all)",
    ]
    assert not outcome.met
    assert Outcome([GOOD]).met
    kept = json.loads(json.dumps(outcome.to_dict()))
    assert kept["met"] is False
    assert kept["claims"][0] == {"subject": "speed", "figure": "1.40 x", "bound": "above 1.2", "met": True}
    assert kept["data"] == {"rows": [1]}


def test_a_quick_run_gives_no_verdict(capsys):
    show("one", Outcome([BAD]), judged=False)
    out = capsys.readouterr().out
    assert "NOT MET" not in out
    assert "no claim is judged" in out
    assert out.splitlines()[-1] == "one: -3.0 points (claim: within 1 point)"


def test_a_table_is_not_folded(capsys):
    print_table("Title", ["arm", "score"], [["a" * 90, 1.5], ["b", "2 [1, 3]"]])
    out = capsys.readouterr().out
    assert "a" * 90 in out
    assert "2 [1, 3]" in out


def test_environment_names_the_machine():
    import torch

    found = environment()
    assert found["torch"] == torch.__version__
    assert f"torch uses {torch.get_num_threads()} threads" in found["cores"]
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert all(found.values())
