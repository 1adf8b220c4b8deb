from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.projects.dcaa.sampler import ConditionSampler


class Pictures:
    def __init__(self, ids: list[int], names: list[str] | None = None) -> None:
        self.ids = ids
        if names is not None:
            self.conditions = tuple(names)

    def condition_ids(self) -> np.ndarray:
        return np.array(self.ids)


def draw(sampler: ConditionSampler, count: int) -> list[int]:
    return list(itertools.islice(iter(sampler), count))


def conditions(dataset: Pictures, sampler: ConditionSampler, count: int) -> list[int]:
    return [dataset.ids[index] for index in draw(sampler, count)]


@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    seed=st.integers(0, 2**31 - 1),
    start=st.integers(0, 40),
)
@settings(max_examples=60, deadline=None)
def test_every_condition_within_2k_minus_1_draws(counts: list[int], seed: int, start: int) -> None:
    ids = [k for k, count in enumerate(counts) for _ in range(count)]
    dataset = Pictures(ids[::-1])
    drawn = conditions(dataset, ConditionSampler(dataset, seed=seed), start + 2 * len(counts) - 1)
    assert set(drawn[start:]) == set(range(len(counts)))


@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_each_picture_once_a_turn_of_its_condition(counts: list[int], seed: int) -> None:
    ids = [k for k, count in enumerate(counts) for _ in range(count)]
    dataset = Pictures(ids)
    drawn = draw(ConditionSampler(dataset, seed=seed), 3 * max(counts) * len(counts))
    for k, count in enumerate(counts):
        own = [index for index in drawn if ids[index] == k]
        for start in range(0, len(own) - count + 1, count):
            assert sorted(own[start : start + count]) == [index for index in range(len(ids)) if ids[index] == k]


def test_orders_differ_from_block_to_block_turn_to_turn_and_seed_to_seed() -> None:
    dataset = Pictures([0, 1, 2, 3] * 8)
    orders = conditions(dataset, ConditionSampler(dataset, seed=0), 40)
    assert len({tuple(orders[i : i + 4]) for i in range(0, 40, 4)}) > 3
    drawn = draw(ConditionSampler(dataset, seed=0), 64)
    own = [index for index in drawn if dataset.ids[index] == 2]
    assert own[:8] != own[8:16]
    assert own[:8] != sorted(own[:8])
    assert drawn != draw(ConditionSampler(dataset, seed=1), 64)


def test_source_and_target_draw_the_same_conditions() -> None:
    source = Pictures([0, 1, 2] * 20)
    target = Pictures([2] * 3 + [0] * 30 + [1] * 7)
    one = ConditionSampler(source, seed=7, stream="source")
    other = ConditionSampler(target, seed=7, stream="target")
    assert conditions(source, one, 60) == conditions(target, other, 60)
    assert conditions(source, one, 60) != conditions(source, ConditionSampler(source, seed=8), 60)


def test_streams_shuffle_the_pictures_apart() -> None:
    dataset = Pictures([0, 1] * 20)
    one, other = (draw(ConditionSampler(dataset, seed=7, stream=name), 40) for name in ("source", "target"))
    assert one != other
    assert one == draw(ConditionSampler(dataset, seed=7, stream="source"), 40)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_draws_of_one_process(monkeypatch: Any, world: int) -> None:
    dataset = Pictures([0, 1, 2] * 5)
    alone = draw(ConditionSampler(dataset, seed=3), 30)
    by_rank = []
    for rank in range(world):
        monkeypatch.setattr("alimm.projects.dcaa.sampler.get_dist_info", lambda rank=rank: (rank, world))
        by_rank.append(draw(ConditionSampler(dataset, seed=3), 30 // world))
    assert [index for draws in zip(*by_rank, strict=True) for index in draws] == alone


def test_every_iterator_starts_at_the_first_draw() -> None:
    sampler = ConditionSampler(Pictures([0, 1] * 4), seed=3)
    assert draw(sampler, 20) == draw(sampler, 20)


def test_without_shuffling_all_is_in_order() -> None:
    sampler = ConditionSampler(Pictures([1, 0, 1, 0, 0]), shuffle=False, seed=0)
    assert draw(sampler, 8) == [1, 0, 3, 2, 4, 0, 1, 2]
    assert len(sampler) == 5
    sampler.set_epoch(3)
    assert draw(sampler, 2) == [1, 0]


def test_probabilities() -> None:
    dataset = Pictures([0, 1, 2] * 5)
    drawn = conditions(dataset, ConditionSampler(dataset, cond_prob=[0.7, 0.3, 0.0], seed=0), 3000)
    assert drawn.count(2) == 0
    assert abs(drawn.count(0) / 3000 - 0.7) < 0.04  # over four standard deviations
    same = [a == b for a, b in itertools.pairwise(drawn)]
    assert abs(sum(same) / len(same) - 0.58) < 0.05  # drawn independently, not in blocks


def test_a_condition_without_pictures() -> None:
    dataset = Pictures([0, 2, 0, 2], ["fog", "night", "rain"])
    with pytest.raises(ValueError, match="no picture of the condition night in the dataset of 4 pictures"):
        ConditionSampler(dataset, seed=0)
    allowed = ConditionSampler(dataset, seed=0, allow_empty=True)
    assert set(conditions(dataset, allowed, 3)) == {0, 2}
    ConditionSampler(dataset, seed=0, cond_prob=[0.5, 0, 0.5])  # never drawn, so never missed
    with pytest.raises(ValueError, match="night"):
        ConditionSampler(dataset, seed=0, cond_prob=[0.5, 0.5, 0])
    renormalised = ConditionSampler(dataset, seed=0, cond_prob=[0.5, 0.4, 0.1], allow_empty=True)
    assert renormalised.probabilities == pytest.approx([5 / 6, 1 / 6])


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([1, 2], {}, r"with a method condition_ids\(\), got list"),
        (Pictures([]), {}, r"condition_ids\(\) of Pictures has the shape \(0,\)"),
        (Pictures([0, -1], ["fog"]), {}, r"1 conditions fog.* numbers from -1 to 0"),
        (Pictures([0, 1], ["fog"]), {}, r"numbers from 0 to 1"),
        (Pictures([0, 1]), dict(cond_prob=[1.0]), r"one probability for each of the 2 conditions 0, 1, got \[1.0\]"),
        (Pictures([0, 1]), dict(cond_prob=[0.5, 0.6]), "whose sum is 1"),
        (Pictures([0, 1]), dict(cond_prob=[1.5, -0.5]), "whose sum is 1"),
        (Pictures([0], ["fog", "night"]), dict(cond_prob=[0, 1], allow_empty=True), "leaves no condition with a"),
    ],
)
def test_mistakes(dataset: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConditionSampler(dataset, seed=0, **options)
