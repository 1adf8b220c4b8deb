"""Active classes of a batch: the rules of the selection, and the CPU kernel against the loops of the oracle."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from alimm_ops.graph import select_cpu, select_reference
from alimm_ops.graph.permute import id_hashes, positions
from tests.ops.graph.select_cases import Case, chosen_by_hand, make_case

cases = st.builds(
    make_case,
    seed=st.integers(0, 10**6),
    num_local=st.integers(1, 150),
    num_labels=st.integers(0, 9),
    length=st.integers(1, 7),
    budget=st.integers(0, 170),
)


def same(one: select_reference.Selection, other: select_reference.Selection) -> bool:
    return (
        one.stats == other.stats
        and one.active.dtype == other.active.dtype == np.int32
        and one.filled.dtype == other.filled.dtype == bool
        and np.array_equal(one.active, other.active)
        and np.array_equal(one.filled, other.filled)
    )


@given(cases)
def test_cpu_equals_the_oracle(case: Case) -> None:
    expected = select_reference.select_active(*case)
    assert same(select_cpu.select_active(*case), expected)


@given(cases)
def test_the_rules(case: Case) -> None:
    active, filled, counts = select_cpu.select_active(*case)
    labels, whole_levels = chosen_by_hand(case)
    ids, random = set(active.tolist()), set(active[filled].tolist())
    assert (np.diff(active) > 0).all()
    assert len(active) == min(max(case.budget, len(labels)), case.num_local)
    assert ids <= set(range(case.num_local))
    assert labels | whole_levels <= ids
    assert not random & (labels | set(case.neighbours.tolist()))  # a fill only when all neighbours are in
    neighbours = ids - labels - random
    assert neighbours <= set(case.neighbours.tolist())
    assert counts[:4] == (len(labels), len(neighbours), len(random), max(len(labels) - case.budget, 0))
    cut = neighbours - whole_levels
    if counts.cut_level < 0:
        assert neighbours | labels == set(case.neighbours.tolist()) | labels
        assert not cut
    else:
        level = set(case.neighbours[case.ranks == counts.cut_level].tolist()) - labels - whole_levels
        assert cut < level
        left = id_hashes(np.array(sorted(level - cut)), case.key)
        assert all(id_hashes(np.array(sorted(cut)), case.key) < left.min())


@given(cases)
def test_the_fill_is_the_walk_of_the_permutation(case: Case) -> None:
    active, filled, counts = select_cpu.select_active(*case)
    walk = positions(np.arange(case.num_local), case.num_local, case.key)
    free = walk[~np.isin(walk, active[~filled])]
    assert np.array_equal(np.sort(free[: counts.num_random]), active[filled])


@given(cases, st.integers(0, 40))
def test_a_larger_budget_keeps_labels_and_neighbours(case: Case, more: int) -> None:
    small, large = (
        select_cpu.select_active(*case.with_(budget=budget)) for budget in (case.budget, case.budget + more)
    )
    assert set(small.active[~small.filled]) <= set(large.active[~large.filled])
    assert set(small.active) <= set(large.active) | set(small.active[small.filled])


@given(cases, st.integers(0, 99))
def test_the_order_of_labels_does_not_matter(case: Case, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(case.indptr) - 1)
    parts = [slice(case.indptr[label], case.indptr[label + 1]) for label in order]
    shuffled = case.with_(
        indptr=np.cumsum([0, *(part.stop - part.start for part in parts)]).astype(np.int64),
        neighbours=np.concatenate([*(case.neighbours[part] for part in parts), []]).astype(np.int32),
        ranks=np.concatenate([*(case.ranks[part] for part in parts), []]).astype(np.uint16),
    )
    assert same(select_cpu.select_active(*shuffled), select_cpu.select_active(*case))


@pytest.mark.parametrize("select", [select_cpu.select_active, select_reference.select_active])
def test_a_case_by_hand(select: Any) -> None:
    """Labels 3 and 7; first neighbours 1 and 3, second ones 2 and 8, of which one fits."""
    arguments = (
        np.array([0, 2, 4]),
        np.array([1, 2, 3, 8], np.int32),
        np.array([0, 1, 0, 1], np.uint16),
        np.array([3, 7], np.int32),
        10,
    )
    smaller = 2 if id_hashes(np.array([2]), 5) < id_hashes(np.array([8]), 5) else 8
    active, filled, counts = select(*arguments, 4, 5)
    assert active.tolist() == sorted([3, 7, 1, smaller])
    assert not filled.any()
    assert counts == (2, 2, 0, 0, 1)
    active, filled, counts = select(*arguments, 1, 5)
    assert active.tolist() == [3, 7]
    assert counts == (2, 0, 0, 1, 0)
    active, filled, counts = select(*arguments, 99, 5)
    assert active.tolist() == list(range(10))
    assert active[filled].tolist() == [0, 4, 5, 6, 9]
    assert counts == (2, 3, 5, 0, -1)


@pytest.mark.parametrize("select", [select_cpu.select_active, select_reference.select_active])
def test_an_empty_shard(select: Any) -> None:
    nothing = np.zeros(0, np.int32)
    active, filled, counts = select(np.zeros(4, np.int64), nothing, nothing.astype(np.uint16), nothing, 0, 8, 1)
    assert len(active) == len(filled) == 0
    assert counts == (0, 0, 0, 0, -1)


def test_a_level_of_many_ids_is_cut_exactly() -> None:
    """Enough ids that each bin of hashes holds several, and bounds that fall inside bins and between them."""
    num_local, count = 60_000, 20_000
    ids = np.random.default_rng(0).permutation(num_local)[:count].astype(np.int32)
    by_hash = ids[np.argsort(id_hashes(ids, 9))]
    for budget in (0, 1, 17, 4_096, 9_999, 19_999):
        case = Case(np.arange(count + 1), ids, np.zeros(count, np.uint16), np.zeros(0, np.int32), num_local, budget, 9)
        active, _, counts = select_cpu.select_active(*case)
        assert np.array_equal(active, np.sort(by_hash[:budget]))
        assert counts == (0, budget, 0, 0, 0)


def test_the_fill_is_uniform_over_keys() -> None:
    """Each free id is as likely as any other, within the chi-square distribution over thousands of keys."""
    case, rounds = make_case(3, 40, own=4, budget=18), 6000
    count = np.zeros(40)
    for key in range(rounds):  # consecutive keys, as a step counter gives them
        active, filled, counts = select_cpu.select_active(*case.with_(key=key))
        count[active[filled]] += 1
    free = 40 - counts.num_labels - counts.num_neighbours
    share = counts.num_random / free
    assert (count > 0).sum() == free
    # Draws without replacement: the counts vary less than independent ones by (1 - share).
    chi_square = ((count[count > 0] - rounds * share) ** 2).sum() / (rounds * share * (1 - share)) * (free - 1) / free
    assert 0.0001 < stats.chi2.sf(chi_square, free - 1) < 0.9999


def test_the_cut_is_uniform_over_keys() -> None:
    ids = np.arange(3, 33, dtype=np.int32)
    case = Case(np.arange(31), ids, np.zeros(30, np.uint16), np.zeros(0, np.int32), 40, 10, 0)
    count, rounds = np.zeros(40), 6000
    for key in range(rounds):
        count[select_cpu.select_active(*case.with_(key=key)).active] += 1
    chi_square = ((count[3:33] - rounds / 3) ** 2).sum() / (rounds / 3 * (2 / 3)) * 29 / 30
    assert 0.0001 < stats.chi2.sf(chi_square, 29) < 0.9999


def test_memory_is_two_bits_an_id() -> None:
    num_local = 1 << 24
    case = make_case(0, 4000, num_labels=50, budget=5000).with_(num_local=num_local)
    select_cpu.select_active(*case)
    tracemalloc.start()
    try:
        select_cpu.select_active(*case)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < num_local / 4 + 64 * 5000  # NumPy's part; what Numba allocates is below
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case = case.with_(num_local=2**31 - 1)  # 512 MiB of bits; 8 GiB, were it an int32 an id
    active, _, counts = select_cpu.select_active(*case)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 600 * 1024
    assert len(active) == sum(counts[:3]) == 5000


BAD = {
    "indptr must be a NumPy array of int64": dict(indptr=np.array([0, 2], np.int32)),
    "neighbours must be a NumPy array of int32": dict(neighbours=[1, 2]),
    "ranks must be a NumPy array of uint16.*got uint16 \\(1, 2\\)": dict(ranks=np.zeros((1, 2), np.uint16)),
    "equally long, got 2 and 3": dict(ranks=np.arange(3, dtype=np.uint16)),
    "indptr must rise from 0 to 2, the number of neighbours": dict(indptr=np.array([0, 1])),
    r"indptr must rise .*got \[0 3 2\]": dict(indptr=np.array([0, 3, 2])),
    r"neighbours must be local ids in \[0, 10\), got ids from 1 to 10": dict(neighbours=np.array([1, 10], np.int32)),
    r"neighbours must be local ids in \[0, 10\), got ids from -1": dict(neighbours=np.array([-1, 1], np.int32)),
    r"own_labels must be local ids in \[0, 10\)": dict(own_labels=np.array([10], np.int32)),
    "own_labels must ascend": dict(own_labels=np.array([4, 4], np.int32)),
    "ranks must ascend within each label": dict(ranks=np.array([1, 1], np.uint16)),
    "budget must be at least 0": dict(budget=-1),
    "num_local must be from 0 to 2147483647": dict(num_local=2**31),
    "key of a selection must be from 0": dict(key=2**64),
}


@pytest.mark.parametrize("select", [select_cpu.select_active, select_reference.select_active])
@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments(message: str, select: Any) -> None:
    good = Case(
        np.array([0, 2]), np.array([1, 2], np.int32), np.array([0, 1], np.uint16), np.array([4], np.int32), 10, 5, 0
    )
    select(*good)
    with pytest.raises(ValueError, match=message):
        select(*good.with_(**BAD[message]))


def test_ranks_fall_between_labels_also_around_empty_ones() -> None:
    case = Case(
        np.array([0, 0, 2, 2, 3, 3]),
        np.array([1, 2, 3], np.int32),
        np.array([0, 1, 0], np.uint16),
        np.zeros(0, np.int32),
        10,
        3,
        0,
    )
    assert select_cpu.select_active(*case).active.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="ranks must ascend"):
        select_cpu.select_active(*case.with_(indptr=np.array([0, 0, 3, 3, 3, 3])))
