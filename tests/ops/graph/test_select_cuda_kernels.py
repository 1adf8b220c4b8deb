"""The CUDA kernels of the selection in Numba's simulator: exactly what the oracle gives."""

from __future__ import annotations

import numpy as np
import pytest
from numba import cuda

from alimm_ops.graph import select_cuda, select_cuda_kernels, select_reference
from tests.ops.graph.select_cases import Case, make_case

pytestmark = [
    pytest.mark.cudasim,
    pytest.mark.filterwarnings("ignore:overflow encountered in scalar:RuntimeWarning"),  # words wrap on purpose
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each simulated thread is one of the system: small blocks are quick, and small arrays span several of them."""
    monkeypatch.setattr(select_cuda_kernels, "THREADS", 8)
    monkeypatch.setattr(select_cuda_kernels, "BIN_BITS", 2)


def select(case: Case, levels: int) -> select_reference.Selection:
    """With scratch memory and outputs that hold rubbish, and more scratch memory than is needed."""
    sizes = len(case.neighbours), len(case.own_labels), case.num_local, case.budget
    plan = select_cuda.plan(*sizes, levels)
    work, state = np.full(plan.work + 3, 77, np.int32), np.full(8, 77, np.int32)
    active, filled = np.full(plan.target, -7, np.int32), np.full(plan.target, 77, np.uint8)
    select_cuda.select_active(*case[1:], levels, work, active, filled, state)
    assert (work[plan.work :] == 77).all()
    assert set(filled.tolist()) <= {0, 1}
    assert all(0 <= i < case.num_local for i in active.tolist())
    return select_reference.Selection(active, filled.astype(bool), select_cuda.decode_stats(state, *sizes[1:]))


def compare(case: Case, levels: int) -> select_reference.SelectionStats:
    found, expected = select(case, levels), select_reference.select_active(*case)
    assert found.active.tolist() == expected.active.tolist()
    assert found.filled.tolist() == expected.filled.tolist()
    assert found.stats == expected.stats
    return found.stats


def test_this_process_simulates() -> None:
    assert "simulator" in cuda.jit.__module__


@pytest.mark.parametrize("budget", [0, 3, 7, 12, 40, 99])
@pytest.mark.parametrize("seed", [1, 2])
def test_budgets(seed: int, budget: int) -> None:
    compare(make_case(seed, 70, budget=budget), 5)


def test_what_the_cases_cover() -> None:
    """A cut inside a level, one before its first id, none; labels above the budget; a shard filled to the brim."""
    cut = compare(make_case(1, 70, budget=10, own=3), 5)
    assert cut.cut_level >= 0
    assert cut.num_neighbours == 7
    over = compare(make_case(1, 70, budget=2, own=5), 5)
    assert over[:4] == (5, 0, 0, 3)
    assert over.cut_level >= 0
    full = compare(make_case(2, 30, budget=64), 5)
    assert sum(full[:3]) == 30
    assert full.cut_level == -1


def test_the_smallest_rank_of_an_id_counts() -> None:
    """Id 5 is nearest to one label and third to another, whichever comes first."""
    nothing = np.zeros(0, np.int32)
    for lists in ([5, 6, 7, 8, 9, 5], [8, 9, 5, 5, 6, 7]):
        case = Case(
            np.array([0, 3, 6]), np.array(lists, np.int32), np.array([0, 1, 2] * 2, np.uint16), nothing, 20, 2, 1
        )
        assert select(case, 3).active.tolist() == [5, 8]
        compare(case, 3)


def test_a_bin_is_divided() -> None:
    """All ids in one level: with four bins of hashes each holds several, and the bound falls inside one."""
    ids = np.random.default_rng(0).permutation(64)[:24].astype(np.int32)
    for budget in (1, 11, 23):
        case = Case(np.arange(25), ids, np.zeros(24, np.uint16), np.zeros(0, np.int32), 64, budget, 5)
        assert compare(case, 1).num_neighbours == budget


@pytest.mark.parametrize(
    "case",
    [
        make_case(0, 9, num_labels=0, budget=4),  # no neighbours, no labels
        make_case(0, 9, num_labels=3, budget=0, own=0),
        make_case(0, 1, num_labels=2, budget=1, own=1),
        make_case(0, 33, num_labels=2, length=1, budget=33, own=0),
        make_case(0, 5, num_labels=0, budget=4).with_(num_local=0),
    ],
)
def test_edges_of_the_range(case: Case) -> None:
    compare(case, 5)


def test_blocks_of_the_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_cuda_kernels, "THREADS", 256)
    monkeypatch.setattr(select_cuda_kernels, "BIN_BITS", 9)  # more than one block of bins, and not sixteen
    compare(make_case(3, 300, num_labels=4, budget=40), 5)


def test_levels_above_all_ranks_change_nothing() -> None:
    compare(make_case(4, 50, budget=9), 23)


def test_values_out_of_range_are_told_and_touch_no_memory() -> None:
    good = make_case(1, 40, budget=12, own=3)
    wrong = [
        (good.with_(neighbours=np.where(good.neighbours == good.neighbours[0], 40, good.neighbours)), 5),
        (good.with_(neighbours=np.where(good.neighbours == good.neighbours[0], -1, good.neighbours)), 5),
        (good.with_(own_labels=good.own_labels + np.int32(40)), 5),
        (good.with_(own_labels=good.own_labels[[0, 0, 1]]), 5),
        (good, int(good.ranks.max())),
    ]
    for case, levels in wrong:
        case = case.with_(neighbours=case.neighbours.astype(np.int32))
        with pytest.raises(ValueError, match=r"no local ids in \[0, 40\)"):
            select(case, levels)


def test_sizes_out_of_range() -> None:
    for arguments, message in (
        ((1, 1, 2**31, 1, 1), "num_local must be"),
        ((1, 1, 4, -1, 1), "budget must be"),
        ((1, 1, 4, 1, 2**16 + 1), "levels must be"),
        ((1, 5, 4, 1, 1), "distinct ids"),
        ((1, 0, 0, 1, 1), "distinct ids"),
        ((2**29, 0, 9, 1, 1), "fewer than"),
    ):
        with pytest.raises(ValueError, match=message):
            select_cuda.plan(*arguments)
    case = make_case(1, 40)
    arrays = np.zeros(20, np.int32), np.zeros(20, np.uint8), np.zeros(8, np.int32)
    with pytest.raises(ValueError, match="work must have at least"):
        select_cuda.select_active(*case[1:], 5, np.zeros(1, np.int32), *arrays)
    with pytest.raises(ValueError, match=r"active must be of shape \(20,\), got \(19,\)"):
        select_cuda.select_active(*case[1:], 5, np.zeros(9999, np.int32), arrays[0][1:], *arrays[1:])
