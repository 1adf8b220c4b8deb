"""The report on codes, against sums written out."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.projects.binary_graph.balance import balance_report
from alimm.projects.binary_graph.packing import pack_bits


@settings(max_examples=20)
@given(st.integers(1, 30), st.integers(1, 64), st.integers(0, 2**32), st.sampled_from([0.05, 0.5, 0.9]))
def test_the_figures_are_those_of_the_definition(count, bits, seed, chance):
    rows = np.zeros((count, 64), bool)
    rows[:, :bits] = np.random.default_rng(seed).random((count, bits)) < chance
    report = balance_report(pack_bits(rows), bits)
    means = [sum(column) / count for column in rows[:, :bits].T.tolist()]
    np.testing.assert_allclose(report.means, means)
    assert report.unbalanced == pytest.approx(sum(not 0.3 <= mean <= 0.7 for mean in means) / bits)
    assert report.constant == sum(min(mean, 1 - mean) < 0.02 for mean in means)
    entropy = sum(-p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in means if 0 < p < 1)
    assert report.effective_bits == pytest.approx(entropy, abs=1e-9)
    assert report.duplicates == pytest.approx(1 - len({tuple(row) for row in rows.tolist()}) / count)
    moving = [column for column in rows[:, :bits].T.astype(float) if column.min() < column.max()]
    pairs = [abs(np.corrcoef(a, b)[0, 1]) for a, b in combinations(moving, 2)]
    assert report.correlation == pytest.approx(sum(pairs) / len(pairs) if pairs else 0.0, abs=1e-5)


def test_good_codes_are_called_good():
    report = balance_report(np.random.default_rng(0).integers(0, 2**64, (30_000, 2), dtype=np.uint64))
    assert report.verdict == "the bits are balanced"
    assert report.effective_bits > 127.9
    assert report.correlation < 0.02
    text = str(report)
    assert "effective bits" in text
    assert "30,000" in text
    assert text.splitlines()[-1] == "verdict: the bits are balanced"
    assert max(map(len, text.splitlines())) <= 60


def test_each_defect_is_named_with_its_mend():
    rng = np.random.default_rng(1)
    bits = rng.random((2000, 256)) < 0.5
    bits[:, :31] = False
    assert "31 of 256 bits are nearly constant: centre the data or use ITQ" in balance_report(pack_bits(bits)).verdict
    bits = rng.random((2000, 64)) < 0.85
    assert "64 of 64 bits have a mean outside [0.3, 0.7]" in balance_report(pack_bits(bits)).verdict
    bits = np.repeat(rng.random((2000, 4)) < 0.5, 16, axis=1)
    report = balance_report(pack_bits(bits))
    assert "the bits are correlated" in report.verdict
    assert "99% of the codes are duplicates" in report.verdict


def test_small_cases_and_mistakes():
    assert balance_report(np.empty((0, 1), np.uint64)).verdict == "there are no codes to judge"
    assert "codes" in str(balance_report(np.empty((0, 1), np.uint64)))
    one = balance_report(np.array([[5]], np.uint64))
    assert (one.effective_bits, one.duplicates, one.correlation) == (0, 0, 0)
    assert balance_report(np.array([[7], [0]], np.uint64), bits=3).bits == 3
    for bits in (0, 65):
        with pytest.raises(ValueError, match=f"from 1 to 64 .* got {bits}"):
            balance_report(np.array([[5]], np.uint64), bits)
