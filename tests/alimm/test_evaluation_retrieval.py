"""Retrieval figures against the mean over every order of the tied items."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.evaluation import RetrievalMetric, retrieval_from_features, retrieval_from_scores
from alimm.structures import ClsDataSample


def by_permutations(scores: list[float], relevant: list[bool], k: int) -> tuple[float, float, float]:
    """Mean of (hit@k, AP, AP@R) over all orders of the items, each stably sorted by score."""
    sums = np.zeros(3)
    orders = list(itertools.permutations(range(len(scores))))
    total = sum(relevant)
    for order in orders:
        found = [relevant[item] for item in sorted(order, key=lambda item: -scores[item])]
        precisions = [sum(found[: place + 1]) / (place + 1) for place in range(len(found)) if found[place]]
        inside = [sum(found[: place + 1]) / (place + 1) for place in range(total) if found[place]]
        sums += (any(found[:k]), sum(precisions) / total, sum(inside) / total)
    return tuple(sums / len(orders))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(-1, 2), st.booleans()), min_size=1, max_size=6), st.integers(1, 7))
def test_ties_count_the_mean_over_all_orders(items, k):
    scores, relevant = [s for s, _ in items], [r for _, r in items]
    labels = np.array([1 if r else 0 for r in relevant])
    if not any(relevant):
        with pytest.raises(ValueError, match="none of the 1 queries has a relevant item"):
            retrieval_from_scores(np.array([scores], dtype=np.float32), np.array([1]), labels, topk=(k,))
        return
    found = retrieval_from_scores(np.array([scores], dtype=np.float32), np.array([1]), labels, topk=(k,))
    hit, ap, ap_at_r = by_permutations(scores, relevant, k)
    assert found.recall[k] == pytest.approx(hit, abs=1e-12)
    assert found.mean_average_precision == pytest.approx(ap, abs=1e-12)
    assert found.mean_average_precision_at_r == pytest.approx(ap_at_r, abs=1e-12)


def slow_features(query, labels, gallery, gallery_labels, topk, similarity, self_match):
    """Loops in double precision, no ties expected."""
    rows = []
    for i, q in enumerate(query.astype(np.float64)):
        scored = []
        for j, g in enumerate(gallery.astype(np.float64)):
            if self_match and i == j:
                continue
            value = {
                "ip": lambda q=q, g=g: q @ g,
                "cosine": lambda q=q, g=g: q @ g / np.linalg.norm(q) / np.linalg.norm(g),
                "l2": lambda q=q, g=g: -np.sum((q - g) ** 2),
            }[similarity]()
            scored.append((-value, gallery_labels[j] == labels[i]))
        right = [r for _, r in sorted(scored)]
        if any(right):
            ap = sum(sum(right[: p + 1]) / (p + 1) for p in range(len(right)) if right[p]) / sum(right)
            rows.append([*(any(right[:k]) for k in topk), ap])
    return np.mean(rows, axis=0), len(rows)


@pytest.mark.parametrize("similarity", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 27])
def test_features_equal_a_loop(similarity, separate, block_bytes):
    rng = np.random.default_rng(3)
    query, labels = rng.normal(size=(23, 5)).astype(np.float32) + 1.0, rng.integers(0, 12, 23)
    gallery, gallery_labels = (rng.normal(size=(31, 5)).astype(np.float32) + 1.0, rng.integers(0, 9, 31))
    sets = (gallery, gallery_labels) if separate else (None, None)
    found = retrieval_from_features(query, labels, *sets, topk=(1, 4), similarity=similarity, block_bytes=block_bytes)
    loops = (gallery, gallery_labels) if separate else (query, labels)
    expected, counted = slow_features(query, labels, *loops, (1, 4), similarity, not separate)
    assert [found.recall[1], found.recall[4], found.mean_average_precision] == pytest.approx(expected.tolist())
    assert (found.num_queries, found.num_skipped) == (counted, 23 - counted)


def test_a_query_does_not_find_itself_but_finds_its_twin():
    features = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.6, 0.8]], dtype=np.float32)
    lonely = retrieval_from_features(features, np.array([0, 0, 1, 1]), topk=(1,))
    # 0's nearest is 2 (wrong), 1's nearest is 3 (wrong), 2's is 0 (wrong), 3's is 1 (wrong).
    assert lonely.recall[1] == 0.0
    assert retrieval_from_features(features, np.array([0, 1, 0, 1]), topk=(1,)).recall[1] == 1.0


@pytest.mark.parametrize("similarity", ["cosine", "ip", "l2"])
def test_equal_features_are_tied_wherever_they_stand(similarity):
    # 67 copies of one vector: the first is right. Any rounding that depends on the place would break the tie.
    rng = np.random.default_rng(0)
    one = rng.normal(size=(1, 37)).astype(np.float32)
    found = retrieval_from_features(
        np.repeat(one, 5, axis=0), np.zeros(5, int), np.repeat(one, 67, axis=0), np.arange(67), (1, 10), similarity
    )
    assert found.hits_QK == pytest.approx(np.tile([1 / 67, 10 / 67], (5, 1)))


def test_zero_vectors_have_cosine_zero_to_everything():
    found = retrieval_from_features(
        np.zeros((1, 3)), np.array([0]), np.array([[1.0, 0, 0], [0, 0, 0], [0, -1.0, 0]]), np.array([0, 1, 2]), (1,)
    )
    assert found.recall[1] == pytest.approx(1 / 3)


def test_scores_are_not_changed_and_exclude_takes_the_column_out():
    scores = np.array([[9.0, 1.0, 2.0], [3.0, 9.0, 4.0]], dtype=np.float32)
    before = scores.copy()
    labels = np.array([0, 1, 0])
    found = retrieval_from_scores(scores, np.array([0, 1]), labels, topk=(1,), exclude=np.array([0, -1]))
    assert found.hits_QK.tolist() == [[1.0], [1.0]]
    found = retrieval_from_scores(scores, np.array([0, 1]), labels, topk=(1,), exclude=np.array([0, 1]))
    assert found.num_skipped == 1
    assert np.isnan(found.hits_QK[1, 0])
    assert (scores == before).all()


def test_infinite_scores_are_scores():
    scores = np.array([[np.inf, 1.0, -np.inf]])
    found = retrieval_from_scores(scores, np.array([1]), np.array([0, 0, 1]), topk=(1, 3))
    assert found.recall == {1: 0.0, 3: 1.0}
    assert found.mean_average_precision == pytest.approx(1 / 3)


def test_many_items_do_not_allocate_the_matrix():
    features = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
    labels = np.arange(2000) // 2
    tracemalloc.start()
    retrieval_from_features(features, labels, block_bytes=1 << 19)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20  # the matrix alone is 16 MB in float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"similarity": "dot"}, "similarity must be one of cosine, ip, l2, got 'dot'"),
        ({"query_features_QD": np.ones((2, 3), dtype=int)}, "query_features must be floating"),
        ({"query_features_QD": np.ones((2, 4))}, "queries have 4 dimensions, the gallery has 3"),
        ({"query_features_QD": np.array([[0.0, 1, 2], [0, np.nan, 0]])}, "query_features row 1 holds NaN"),
        ({"gallery_features_ND": np.array([[0.0, 1, np.inf], [0, 0, 0]])}, "gallery_features row 0 holds NaN or inf"),
        ({"query_labels": np.zeros(3)}, r"query_labels must have the shape \(2,\)"),
        ({"gallery_labels": None}, "give both"),
        ({"topk": ()}, "topk must be"),
        ({"topk": (0,)}, "topk must be"),
    ],
)
def test_bad_features_are_named(change, message):
    good = {
        "query_features_QD": np.ones((2, 3)),
        "query_labels": np.zeros(2, int),
        "gallery_features_ND": np.ones((2, 3)),
        "gallery_labels": np.zeros(2, int),
    }
    retrieval_from_features(**good)
    with pytest.raises(ValueError, match=message):
        retrieval_from_features(**{**good, **change})


def test_nan_in_scores_names_the_row():
    scores = np.zeros((5, 4))
    scores[3, 2] = np.nan
    with pytest.raises(ValueError, match="query row 3 hold NaN"):
        retrieval_from_scores(scores, np.zeros(5, int), np.zeros(4, int))
    with pytest.raises(ValueError, match="exclude names the column 4"):
        retrieval_from_scores(np.zeros((1, 4)), np.zeros(1, int), np.zeros(4, int), exclude=np.array([4]))


def samples_of(features, identities=None, labels=None, is_query=None) -> list[dict]:
    samples = []
    for i, feature in enumerate(features):
        sample = ClsDataSample(metainfo={"sample_id": f"s{i}"})
        if identities is not None:
            sample.set_gt_identity(int(identities[i]))
        if labels is not None:
            sample.set_gt_label(int(labels[i]))
        if is_query is not None and is_query[i] is not None:
            sample.set_metainfo({"is_query": bool(is_query[i])})
        samples.append(sample.set_feature(torch.as_tensor(feature)).to_dict())
    return samples


def test_metric_splits_by_is_query():
    rng = np.random.default_rng(1)
    features, identities = rng.normal(size=(20, 4)).astype(np.float32), rng.integers(0, 6, 20)
    mask = np.arange(20) % 3 == 0
    metric = RetrievalMetric(topk=(1, 2), similarity="l2")
    metric.process({}, samples_of(features, identities, labels=np.zeros(20), is_query=mask))
    result = metric.evaluate(20)
    direct = retrieval_from_features(features[mask], identities[mask], features[~mask], identities[~mask], (1, 2), "l2")
    assert result == {
        "retrieval/recall@1": pytest.approx(100 * direct.recall[1]),
        "retrieval/recall@2": pytest.approx(100 * direct.recall[2]),
        "retrieval/mAP": pytest.approx(100 * direct.mean_average_precision),
        "retrieval/mAP@R": pytest.approx(100 * direct.mean_average_precision_at_r),
        "retrieval/skipped": direct.num_skipped,
    }


def test_metric_takes_the_label_where_there_is_no_identity_and_drops_padding():
    features = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1.0], [0.1, 0.9], [1.0, 0]], dtype=torch.bfloat16)
    metric = RetrievalMetric(topk=1)
    metric.process({}, samples_of(features, labels=[0, 0, 1, 1, 0]))
    assert metric.evaluate(4)["retrieval/recall@1"] == 100.0
    # With both, the identity counts, unless the config says otherwise.
    both = {"identities": [0, 1, 0, 1], "labels": [0, 0, 1, 1]}
    for key, recall in ((None, 0.0), ("gt_label", 100.0)):
        metric = RetrievalMetric(topk=1, identity_key=key)
        metric.process({}, samples_of(features[:4], **both))
        assert metric.evaluate(4)["retrieval/recall@1"] == recall


def test_metric_mistakes_are_named():
    features = np.eye(2, dtype=np.float32)
    mixed = RetrievalMetric()
    mixed.process({}, samples_of(features, [0, 0], is_query=[True, None]))
    with pytest.raises(ValueError, match="some samples have is_query and some do not"):
        mixed.evaluate(2)
    one_sided = RetrievalMetric()
    one_sided.process({}, samples_of(features, [0, 0], is_query=[True, True]))
    with pytest.raises(ValueError, match="is_query is True for all 2 samples"):
        one_sided.evaluate(2)
    with pytest.raises(ValueError, match="needs gt_label, the sample s0"):
        RetrievalMetric().process({}, samples_of(features))
    with pytest.raises(ValueError, match="similarity"):
        RetrievalMetric(similarity="dot")


def metric_on_rank(count: int, folder: str) -> dict:
    """Judge the samples that a sampler gives this rank: every second one, filled up from the start."""
    import torch.distributed as dist

    rng = np.random.default_rng(7)
    samples = samples_of(rng.normal(size=(count, 4)).astype(np.float32), rng.integers(0, 3, count))
    rank, size = dist.get_rank(), dist.get_world_size()
    padded = [*samples, *samples][: -(-count // size) * size]
    metric = RetrievalMetric(topk=(1, 3), collect_dir=f"{folder}/{size}")
    metric.process({}, padded[rank::size])
    return metric.evaluate(count)


def test_ranks_gather_and_drop_what_fills_the_last_batch(gloo, tmp_path):
    alone = gloo.run(1, metric_on_rank, 11, str(tmp_path))[0]
    two = gloo.run(2, metric_on_rank, 11, str(tmp_path))
    assert two[0] == two[1] == alone
