"""Samplers: frequencies, partitions over real ranks, and the promise of each batch."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmengine.dataset import BaseDataset, DefaultSampler, RepeatDataset
from mmengine.registry import DATASETS

from alimm.datasets import ClassBalancedSampler, IdentityBatchSampler
from alimm.datasets.samplers import field_of, most_batches
from alimm.registry import DATA_SAMPLERS


@DATASETS.register_module(force=True)
class Labelled(BaseDataset):
    """Item i has the label ``labels[i]``."""

    def __init__(self, labels, **kwargs):
        self.values = list(labels)
        super().__init__(serialize_data=False, **kwargs)  # serialising collects garbage, 0.1 s each time

    def load_data_list(self):
        return [dict(gt_label=int(v), gt_identity=int(v) * 10) for v in self.values]


class WithoutItems:
    def __len__(self):
        return 3


def long_tail(*counts):
    rng = np.random.default_rng(0)
    return rng.permutation(np.repeat(np.arange(len(counts)), counts))


def rank_parts(cls, labels, epoch, options):
    """Runs on every rank of a gloo group."""
    dataset = Labelled(labels)
    if cls == "class":
        sampler = ClassBalancedSampler(dataset, seed=5, **options)
    else:
        sampler = IdentityBatchSampler(DefaultSampler(dataset, seed=5), **options)
    sampler.set_epoch(epoch)
    return len(sampler), list(sampler)


# -- class-balanced -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_frequencies_follow_the_formula(gamma):
    from scipy import stats  # the gloo workers import this file, and are spared it

    counts = np.array([400, 100, 25, 4, 1])
    labels = long_tail(*counts)
    sampler = ClassBalancedSampler(Labelled(labels), gamma=gamma, num_samples=20000, seed=1)
    seen = np.bincount(labels[list(sampler)], minlength=5)
    expected = counts**gamma / (counts**gamma).sum() * 20000
    assert stats.chisquare(seen, expected).pvalue > 1e-4
    # Another gamma must not pass.
    other = counts**0.7 / (counts**0.7).sum() * 20000
    assert stats.chisquare(seen, other).pvalue < 1e-9


def test_items_of_a_class_come_equally_often():
    labels = long_tail(30, 7, 1)
    drawn = Counter(ClassBalancedSampler(Labelled(labels), gamma=0, num_samples=1000, seed=0))
    for label in range(3):
        times = [drawn[row] for row in np.flatnonzero(labels == label)]
        assert max(times) - min(times) <= 1


def test_epochs_and_seeds_differ_and_repeat():
    dataset = Labelled(long_tail(20, 10, 5))
    sampler = ClassBalancedSampler(dataset, seed=3)
    draws = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        draws.append(list(sampler))
    assert draws[0] == draws[2] != draws[1]
    assert list(ClassBalancedSampler(dataset, seed=4)) != draws[0]
    resumed = ClassBalancedSampler(dataset, seed=3)
    resumed.set_epoch(1)
    assert list(resumed) == draws[1]
    assert len(sampler) == len(draws[0]) == 35


@pytest.mark.parametrize("num_samples", [None, 41])
def test_ranks_share_one_draw(gloo, num_samples):
    labels = long_tail(20, 10, 5).tolist()
    options = dict(gamma=0.3, num_samples=num_samples)
    [(_, whole)] = gloo.run(1, rank_parts, "class", labels, 2, options)
    length = num_samples or 35
    assert len(whole) == length
    for ranks in (2, 4):
        parts = gloo.run(ranks, rank_parts, "class", labels, 2, options)
        assert {(promised, len(part)) for promised, part in parts} == {(-(-length // ranks),) * 2}
        merged = [row for rows in zip(*(part for _, part in parts), strict=True) for row in rows]
        assert merged[:length] == whole
        assert merged[length:] == whole[: len(merged) - length]


# -- batches of identities ------------------------------------------------------------------------------------------


def brute_most_batches(groups, identities):
    """The largest B for which dealing works, by trying every B."""
    best = 0
    for batches in range(1, sum(groups) + 1):
        if sum(min(count, batches) for count in groups) >= batches * identities:
            best = batches
    return best


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 6))
def test_most_batches(groups, identities):
    assert most_batches(np.array(groups, np.int64), identities) == brute_most_batches(groups, identities)


@given(st.lists(st.integers(1, 11), min_size=4, max_size=15), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_every_batch_keeps_its_promise(counts, identities, images, epoch):
    labels = long_tail(*counts)
    sampler = IdentityBatchSampler(
        DefaultSampler(Labelled(labels), seed=7), identities * images, images, field="gt_label"
    )
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler) == brute_most_batches([-(-n // images) for n in counts], identities)
    used = Counter(itertools.chain(*batches))
    for batch in batches:
        groups = np.array(batch).reshape(identities, images)
        of_group = labels[groups]
        assert (of_group == of_group[:, :1]).all()
        assert len(set(of_group[:, 0])) == identities
        for group, label in zip(groups, of_group[:, 0], strict=True):
            assert len(set(group)) == min(images, counts[label])
    # A filled-up group repeats a picture at most once more than the others of its identity, unless there are too few.
    for row, times in used.items():
        if counts[labels[row]] >= images:
            assert times <= 2


def test_all_pictures_come_where_the_identities_are_even():
    labels = np.repeat(np.arange(12), 8)
    sampler = IdentityBatchSampler(DefaultSampler(Labelled(labels), seed=0), 16, images=4)
    assert sorted(itertools.chain(*sampler)) == list(range(96))


def test_batches_repeat_by_seed_and_epoch():
    base = DefaultSampler(Labelled(long_tail(9, 8, 7, 6, 5)), seed=1)
    sampler = IdentityBatchSampler(base, 6, images=2)
    draws = []
    for epoch in (0, 1, 0):
        base.set_epoch(epoch)  # as MMEngine's hook does
        draws.append(list(sampler))
    assert draws[0] == draws[2] != draws[1]


def test_small_identities_can_be_left_out():
    labels = long_tail(6, 5, 4, 1, 1)
    sampler = IdentityBatchSampler(DefaultSampler(Labelled(labels), seed=0), 4, images=2, min_images=2)
    assert set(labels[list(itertools.chain(*sampler))]) == {0, 1, 2}


def test_ranks_share_the_batches(gloo):
    labels = long_tail(*range(2, 14)).tolist()
    options = dict(batch_size=6, images=2)
    [(count, whole)] = gloo.run(1, rank_parts, "identity", labels, 1, options)
    assert count == len(whole)
    for ranks in (2, 4):
        parts = gloo.run(ranks, rank_parts, "identity", labels, 1, options)
        assert {(promised, len(part)) for promised, part in parts} == {(count // ranks,) * 2}
        merged = [batch for batches in zip(*(part for _, part in parts), strict=True) for batch in batches]
        assert merged == whole[: len(merged)]


def test_runner_builds_the_loader():
    from mmengine.runner import Runner

    config = dict(
        batch_size=6,
        num_workers=0,
        dataset=dict(type="Labelled", labels=long_tail(9, 8, 7, 6, 5).tolist()),
        sampler=dict(type="DefaultSampler", shuffle=True),
        batch_sampler=dict(type="alimm.IdentityBatchSampler", images=2),
        collate_fn=dict(type="pseudo_collate"),
    )
    loader = Runner.build_dataloader(config, seed=4)
    batches = [batch["gt_identity"] for batch in loader]
    assert len(batches) == len(loader) > 3
    assert all(sorted(Counter(batch).values()) == [2, 2, 2] for batch in batches)


# -- fields and mistakes --------------------------------------------------------------------------------------------


def test_fields_of_data_sets_and_wrappers():
    assert field_of(Labelled([3, 1]), "gt_identity").tolist() == [30, 10]
    assert field_of(RepeatDataset(Labelled([3, 1]), 2), "gt_label").tolist() == [3, 1, 3, 1]
    with pytest.raises(ValueError, match=r"no gt_colour.*gt_identity"):
        field_of(Labelled([1]), "gt_colour")
    with pytest.raises(ValueError, match="WithoutItems has no get_data_info"):
        field_of(WithoutItems(), "gt_label")


def test_registered():
    assert DATA_SAMPLERS.get("alimm.ClassBalancedSampler") is ClassBalancedSampler


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassBalancedSampler(Labelled([1]), gamma=2), "gamma must be between 0 and 1, got 2"),
        (lambda: ClassBalancedSampler(Labelled([1]), num_samples=0), "at least 1, got 0"),
        (lambda: IdentityBatchSampler(DefaultSampler(Labelled([1]), seed=0), 6, images=4), "multiple of images"),
        (lambda: IdentityBatchSampler(DefaultSampler(Labelled([1, 2]), seed=0), 12, images=4), "0 batches of 3"),
        (lambda: IdentityBatchSampler([1, 2], 4), "list has no dataset, seed, epoch"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
