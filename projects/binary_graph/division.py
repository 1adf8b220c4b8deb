"""Binary k-means: the centres of the division, and which of them are nearest.

Centres are codes; a code belongs to the centre at the least Hamming distance, and a centre's bit is that of most of its
codes (a tie keeps the old bit), so the sum of distances never grows. A centre without codes takes the place of the
farthest code of the largest cluster. From 4,096 centres on they are grouped in turn, and a code is compared with the
centres of its eight nearest groups.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alimm_ops.graph.hamming_cpu import majority, nearest, nearest_into, word_major
from alimm_ops.graph.hamming_reference import NO_DISTANCE, NO_ID
from alimm_ops.graph.lists_cpu import merge_lists

FLAT_CENTRES = 4096
GROUPS_LOOKED_AT = 8
ITERATIONS = 6


def binary_kmeans(
    sample_SW: NDArray[np.uint64], num_centres: int, iterations: int = ITERATIONS, history: list[int] | None = None
) -> NDArray[np.uint64]:
    """Centres of a sample.

    Args:
        sample_SW: distinct codes in random order; the first are the first centres.
        num_centres: M, at most S.
        iterations: steps of assignment and majority.
        history: the sum of distances before each step is appended.

    Returns:
        Centres, (M, W).

    Raises:
        ValueError: more centres than codes.
    """
    if not 1 <= num_centres <= len(sample_SW):
        raise ValueError(f"expected 1 to {len(sample_SW)} centres for so many codes, got {num_centres}")
    centres = sample_SW[:num_centres].copy()
    for _ in range(iterations):
        labels, distances = nearest_centres(sample_SW, centres, 1, group_centres(centres))
        if history is not None:
            history.append(int(distances.astype(np.int64).sum()))
        centres, counts = majority(sample_SW, labels[:, 0].copy(), centres)
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            _reseed(sample_SW, labels[:, 0], distances[:, 0], centres, counts, empty)
    return centres


def _reseed(
    sample: NDArray[np.uint64],
    labels: NDArray[np.int32],
    distances: NDArray[np.uint16],
    centres: NDArray[np.uint64],
    counts: NDArray[np.int64],
    empty: NDArray[np.int64],
) -> None:
    # The k-th empty centre goes into the k-th largest cluster: to its code farthest from the centre.
    largest = np.argsort(-counts, kind="stable")
    for place, centre in zip(largest, empty, strict=False):
        members = np.flatnonzero(labels == place)
        if len(members) > 1:
            centres[centre] = sample[members[np.argmax(distances[members])]]


def group_centres(centres_MW: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.int32]] | None:
    """Groups of the centres, (G, W), and the group of each centre, (M,); None where they are few."""
    if len(centres_MW) <= FLAT_CENTRES:
        return None
    groups = binary_kmeans(np.unique(centres_MW, axis=0), int(np.sqrt(len(centres_MW))))
    return groups, nearest(centres_MW, groups, 1)[0][:, 0]


def nearest_centres(
    codes_NW: NDArray[np.uint64],
    centres_MW: NDArray[np.uint64],
    t: int,
    groups: tuple[NDArray[np.uint64], NDArray[np.int32]] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """The t nearest centres of each code, (N, t), sorted by (distance, centre); -1 where there are no more.

    ``groups`` is what `group_centres` gave; without it every centre is compared.
    """
    if groups is None:
        return nearest(codes_NW, centres_MW, t)
    group_codes, group_of = groups
    order = np.argsort(group_of, kind="stable").astype(np.int32)
    starts = np.searchsorted(group_of[order], np.arange(len(group_codes) + 1))
    chosen, _ = nearest(codes_NW, group_codes, GROUPS_LOOKED_AT)
    width = chosen.shape[1]
    ids = np.full((len(codes_NW), width * t), NO_ID, np.int32)
    dists = np.full((len(codes_NW), width * t), NO_DISTANCE, np.uint16)
    for group in range(len(group_codes)):
        members = order[starts[group] : starts[group + 1]]
        rows, places = np.nonzero(chosen == group)
        if not len(rows) or not len(members):
            continue
        found = np.full((len(rows), t), NO_ID, np.int32)
        far = np.full((len(rows), t), NO_DISTANCE, np.uint16)
        bounds = np.full(len(rows), NO_DISTANCE - 1, np.uint16)
        nearest_into(codes_NW[rows], word_major(centres_MW[members]), 0, -1, bounds, found, far)
        columns = places[:, None] * t + np.arange(t)
        ids[rows[:, None], columns] = np.where(found >= 0, members[found], NO_ID)
        dists[rows[:, None], columns] = far
    return merge_lists(ids, dists, t)
