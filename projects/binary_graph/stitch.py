"""Holds the graph together: islands get bridges, and every node can be reached from where walks begin.

A graph of nearest neighbours over clustered codes falls apart into islands. Here each island's sample looks for its
nearest code elsewhere, and a minimum spanning forest of such pairs, both ways, makes one piece of all (what remains
apart looks again). Then, from the entry nodes, the edges are followed; a node that nobody leads to gets an
edge from the nearest of its own neighbours that is reached. These edges come on top of the others' cap.

This stage is one task: it holds five bytes a node, and reads the edges part by part.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.division import group_centres, nearest_centres
from alimm.projects.binary_graph.stage_common import Output, fetch_rows
from alimm.projects.binary_graph.stage_lists import read_bounds
from alimm.projects.binary_graph.store import RunFolder
from alimm_ops.graph.build_cpu import roots, spread, union_edges
from alimm_ops.graph.hamming_reference import hamming_matrix

SAMPLES = 4
"""Codes of an island that look for a bridge in one round."""

Pairs = NDArray[np.int32]


def entry_mask(cluster_starts: NDArray[np.int64], share: int) -> NDArray[np.bool_]:
    """Which nodes are entries: in each cluster the first and every ``share``-th after it."""
    nodes = np.arange(int(cluster_starts[-1]))
    first = np.repeat(cluster_starts[:-1], np.diff(cluster_starts))
    return (nodes - first) % share == 0


def stitch(run: RunFolder, part: int, entry_share: int) -> Output:
    """Edges that are missing, and entries of islands that have none."""
    bounds = read_bounds(run)
    num_nodes, parts = int(bounds[-1]), len(bounds) - 1
    parents = np.arange(num_nodes, dtype=np.int32)
    for source in range(parts):
        union_edges(parents, int(bounds[source]), run.map("links", source, "ids"))
    islands = roots(parents)
    bridges = _bridges(run, bounds, parents)
    cluster_starts = run.read("plan", 0, ["cluster_starts"])["cluster_starts"]
    entries = entry_mask(cluster_starts, entry_share)
    names = _names(islands)
    seen = np.zeros(num_nodes, bool)
    seen[islands[entries]] = True
    blind = names[~seen[names]]
    entries[blind] = True

    reached = entries.astype(np.uint8)
    reached[bridges[:, 1][reached[bridges[:, 0]] > 0]] = 1
    repairs = _reach(run, bounds, reached, bridges)
    extra = np.unique(np.concatenate([bridges, repairs]), axis=0)
    return {"edges": extra, "entries": blind.astype(np.int32)}, {
        "islands": len(names),
        "bridges": len(bridges),
        "repairs": len(repairs),
    }


def _names(islands: NDArray[np.int32]) -> NDArray[np.int32]:
    """The least node of each island; no sorting, since that is what an island is called by."""
    return np.flatnonzero(islands == np.arange(len(islands))).astype(np.int32)


def _bridges(run: RunFolder, bounds: NDArray[np.int64], parents: NDArray[np.int32]) -> Pairs:
    """Edges between islands, both ways, as pairs (source, target); ``parents`` is left with one root."""
    found: list[tuple[int, int]] = []
    while True:
        islands = roots(parents)
        if len(_names(islands)) <= 1:
            break
        names, members = np.unique(islands, return_inverse=True)
        order = np.argsort(members, kind="stable")
        starts = np.searchsorted(members[order], np.arange(len(names) + 1))
        picks = starts[:-1, None] + (np.arange(SAMPLES) * np.diff(starts)[:, None]) // SAMPLES
        sample = np.unique(order[picks.ravel()]).astype(np.int32)
        codes = fetch_rows(run, {"codes": "gather"}, bounds, sample)["codes"]
        near, far = nearest_centres(codes, codes, SAMPLES + 1, group_centres(codes))
        home = islands[sample]
        pairs = []
        for row in range(len(sample)):
            for place, distance in zip(near[row].tolist(), far[row].tolist(), strict=True):
                if place >= 0 and home[place] != home[row]:
                    pairs.append((distance, *sorted((int(sample[row]), int(sample[place])))))
                    break
        if not pairs:
            # No sample sees another island in its groups: a chain holds as well.
            first = [int(node) for node in names]
            gaps = hamming_matrix(*(fetch_rows(run, {"codes": "gather"}, bounds, names)["codes"],) * 2)[:1][0]
            pairs = [(int(gap), first[0], node) for gap, node in zip(gaps[1:], first[1:], strict=True)]
        for _, a, b in sorted(set(pairs)):
            # Each sample's pair stays: more ways from island to island than a tree has.
            found += [(a, b), (b, a)]
            union_edges(parents, a, np.array([[b]], np.int32))
    return np.unique(np.array(found, np.int32).reshape(-1, 2), axis=0)


def _reach(run: RunFolder, bounds: NDArray[np.int64], reached: NDArray[np.uint8], bridges: Pairs) -> Pairs:
    """Follow all edges; give nodes that stay unreached an edge from a neighbour that is not."""
    repairs: list[tuple[int, int]] = []
    parts = len(bounds) - 1
    while True:
        changed = 1
        while changed:
            changed = 0
            for source in range(parts):
                changed += spread(reached, int(bounds[source]), run.map("links", source, "ids"))
            new = bridges[:, 1][(reached[bridges[:, 0]] > 0) & (reached[bridges[:, 1]] == 0)]
            reached[new] = 1
            changed += len(new)
        if reached.all():
            return np.array(repairs, np.int32).reshape(-1, 2)
        before = len(repairs)
        for source in range(parts):
            first, last = int(bounds[source]), int(bounds[source + 1])
            missing = np.flatnonzero(reached[first:last] == 0)
            if not len(missing):
                continue
            targets = np.take(run.map("links", source, "ids"), missing, axis=0)
            for row, neighbours in zip(missing.tolist(), targets, strict=True):
                known = [int(node) for node in neighbours if node >= 0 and reached[node]]
                if known and not reached[first + row]:
                    repairs.append((known[0], first + row))
                    reached[first + row] = 1
        assert len(repairs) > before, "an island without an entry"
