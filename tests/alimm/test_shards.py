"""Row shards, the permutation of classes, collectives with uneven lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from alimm.distributed import (
    ClassPermutation,
    RowShards,
    Sharding,
    all_gather_uneven,
    exclude_from_ddp,
    gather_counts,
    gather_features,
    mark_sharded,
    raise_together,
    rank_and_size,
    sharding_of,
    sum_over_ranks,
)


@given(st.integers(0, 1000), st.integers(1, 20))
def test_balanced_shards_cover_all_rows_and_differ_by_one(rows: int, ranks: int) -> None:
    shards = RowShards.balanced(rows, ranks)
    assert shards.num_rows == rows
    assert max(shards.sizes) - min(shards.sizes) <= 1
    assert [shards.stop(rank) for rank in range(ranks)] == list(shards.bounds[1:])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_owner_is_the_rank_whose_range_holds_the_row(sizes: list[int]) -> None:
    shards = RowShards(tuple(sizes))
    expected = [rank for rank, size in enumerate(sizes) for _ in range(size)]
    assert shards.owner(torch.arange(shards.num_rows)).tolist() == expected


def test_shards_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="size of at least 0"):
        RowShards((2, -1))
    with pytest.raises(ValueError, match="world_size >= 1"):
        RowShards.balanced(5, 0)


@given(st.integers(1, 3000), st.integers(0, 5))
def test_permutation_is_a_bijection_with_its_inverse(classes: int, seed: int) -> None:
    permutation, ids = ClassPermutation(classes, seed), torch.arange(classes)
    rows = permutation.rows(ids)
    assert rows.sort().values.equal(ids)
    assert permutation.classes(rows).equal(ids)


def test_permutation_far_beyond_32_bits() -> None:
    permutation = ClassPermutation(10**12 + 39)
    ids = torch.randint(10**12 + 39, (1000,))
    rows = permutation.rows(ids)
    assert int(rows.min()) >= 0
    assert int(rows.max()) < 10**12 + 39
    assert permutation.classes(rows).equal(ids)


def test_permutation_spreads_classes_that_follow_each_other() -> None:
    shards, count = RowShards.balanced(80_000, 8), 2000
    for start in range(0, 80_000, 16_000):
        owners = shards.owner(ClassPermutation(80_000).rows(torch.arange(start, start + count)))
        assert torch.bincount(owners, minlength=8).max() < 1.3 * count / 8
    identity = shards.owner(ClassPermutation(80_000, kind="none").rows(torch.arange(count)))
    assert torch.bincount(identity, minlength=8).max() == count


def test_permutation_is_pinned() -> None:
    """A checkpoint stores the seed alone, so the bijection may never change."""
    assert ClassPermutation(10, 0).rows(torch.arange(10)).tolist() == [9, 0, 5, 7, 2, 4, 1, 8, 6, 3]
    with pytest.raises(ValueError, match="hash, none"):
        ClassPermutation(10, kind="feistel")


def test_marking_a_shard_keeps_it_out_of_ddp() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    assert exclude_from_ddp(model) == []
    mark_sharded(model[1].weight, Sharding.over(3))
    assert sharding_of(model[1].weight) == Sharding(RowShards((3,)))
    assert sharding_of(model[0].weight) is None
    assert exclude_from_ddp(model) == ["1.weight"]
    assert model._ddp_params_and_buffers_to_ignore == ["1.weight"]


def gather_everything(counts: list[int]) -> dict[str, Any]:
    rank, _ = rank_and_size()
    own = torch.arange(counts[rank] * 2).reshape(-1, 2) + 100 * rank
    parts = all_gather_uneven(own)
    known = gather_counts(counts[rank], torch.device("cpu"))
    x = torch.full((counts[rank], 3), float(rank), dtype=torch.float64, requires_grad=True)
    gathered = gather_features(x, known)
    weight = torch.arange(gathered.numel(), dtype=torch.float64).reshape(gathered.shape) + 1000 * rank
    (gathered * weight).sum().backward()
    exact = torch.full((counts[rank], 3), 0.0, dtype=torch.float64, requires_grad=True)
    (gather_features(exact, known, ddp_average=False) * weight).sum().backward()
    total = sum_over_ranks(torch.tensor([0.1 * (rank + 1)], dtype=torch.float32))
    return dict(parts=parts, counts=known, gathered=gathered.detach(), grad=x.grad, exact=exact.grad, total=total)


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0], [1, 1, 1]])
def test_gathers_of_uneven_lengths_and_their_gradients(gloo: Any, counts: list[int]) -> None:
    results = gloo.run(3, gather_everything, counts)
    bounds = [0, *torch.tensor(counts).cumsum(0).tolist()]
    for rank, result in enumerate(results):
        assert result["counts"] == counts
        for other, part in enumerate(result["parts"]):
            assert part.equal(torch.arange(counts[other] * 2).reshape(-1, 2) + 100 * other)
        assert result["gathered"][:, 0].tolist() == [float(r) for r in range(3) for _ in range(counts[r])]
        # Each rank weighs the gathered features by its own factors: the gradient is their sum.
        rows = torch.arange(sum(counts) * 3, dtype=torch.float64).reshape(-1, 3)
        expected = (3 * rows + 1000 * (0 + 1 + 2))[bounds[rank] : bounds[rank + 1]]
        torch.testing.assert_close(result["exact"], expected)
        torch.testing.assert_close(result["grad"], 3 * expected)
        assert result["total"].equal(results[0]["total"])


def say(words: dict[int, str]) -> str:
    try:
        raise_together(words.get(dist.get_rank()))
    except ValueError as error:
        return str(error)
    return "silent"


def test_an_error_of_one_rank_reaches_all(gloo: Any) -> None:
    assert gloo.run(3, say, {}) == ["silent"] * 3
    assert gloo.run(3, say, {1: "\u5b57 missing"}) == [
        "\u5b57 missing (on rank 1 of 3)",
        "\u5b57 missing",
        "\u5b57 missing (on rank 1 of 3)",
    ]
    with pytest.raises(ValueError, match="alone"):
        raise_together("alone")
