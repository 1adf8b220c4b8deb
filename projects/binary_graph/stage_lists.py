"""Stages that make the neighbour lists: inside the cores, across clusters, and by propagation.

Stage 1 of the paper compares the members of a cluster, core and guests, with its core. The core goes first: a guest
then asks only for codes that are nearer than what it has. Cores do not overlap, so no candidate comes twice.

Stage 2, the breadth-first propagation: a node looks into the lists of its neighbours, and of those that have it for a
neighbour. A part works on its own nodes; of the others it fetches the lists and codes that its lists name (the halo),
and of lists only the edges that cross parts are sent.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.stage_common import (
    Arrays,
    Output,
    fetch_rows,
    group_starts,
    joined,
    open_part,
    slices_for,
)
from alimm.projects.binary_graph.store import RunFolder
from alimm_ops.graph.build_cpu import Renumbering, insert_blocks, insert_edges
from alimm_ops.graph.hamming_cpu import nearest_into, word_major
from alimm_ops.graph.hamming_reference import NO_DISTANCE, NO_ID
from alimm_ops.graph.lists_cpu import merge_lists, propagate

PROBED = 10
"""k of the recall that a build measures."""


def read_bounds(run: RunFolder) -> NDArray[np.int64]:
    """First node of each part, int64 (parts + 1,)."""
    return run.read("plan", 0, ["bounds"])["bounds"]


def empty_lists(rows: int, k: int) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """Lists without entries."""
    return np.full((rows, k), NO_ID, np.int32), np.full((rows, k), NO_DISTANCE, np.uint16)


def core(run: RunFolder, part: int, k: int) -> Output:
    """Lists inside the core of each cluster of the part."""
    plan = run.read("plan", 0, ["bounds", "cluster_starts", "part_clusters"])
    codes = run.read("gather", part, ["codes"])["codes"]
    ids, dists = empty_lists(len(codes), k)
    first_node = int(plan["bounds"][part])
    for first, last in _clusters(plan, part):
        own = codes[first:last]
        bounds = np.full(len(own), NO_DISTANCE - 1, np.uint16)
        nearest_into(own, word_major(own), first_node + first, 0, bounds, ids[first:last], dists[first:last])
    fresh = np.ones(ids.shape, np.uint8)
    return {"ids": ids, "dists": dists, "fresh": fresh, "farthest": dists[:, -1].copy()}, {}


def _clusters(plan: Arrays, part: int) -> list[tuple[int, int]]:
    """Rows of each cluster of a part."""
    clusters = plan["part_clusters"][part : part + 2]
    starts = plan["cluster_starts"][clusters[0] : clusters[1] + 1] - plan["bounds"][part]
    return list(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))


def across(run: RunFolder, part: int, k: int, sources: int, wave: int, stage: str) -> Output:
    """What a wave's guests of the part's clusters find in their cores, sorted by the part of the guest.

    A guest knows from the lists of ``stage`` how far its farthest neighbour is.
    """
    plan = run.read("plan", 0, ["bounds", "cluster_starts", "part_clusters"])
    bounds, first_node = plan["bounds"], int(plan["bounds"][part])
    codes = run.read("gather", part, ["codes"])["codes"]
    names = ("guest_clusters", "guest_nodes", "guest_codes")
    pieces = slices_for(run, f"guests-{wave}", range(sources), part, names)
    clusters, nodes, guests = (joined(pieces, name) for name in names)
    by_node = np.argsort(nodes, kind="stable")
    distinct, first = np.unique(nodes[by_node], return_index=True)
    farthest = np.empty(len(nodes), np.uint16)
    known = fetch_rows(run, {"farthest": stage}, bounds, distinct)["farthest"]
    farthest[by_node] = np.repeat(known, np.diff(np.append(first, len(nodes))))

    order = np.argsort(clusters, kind="stable")
    first_cluster = int(plan["part_clusters"][part])
    rows = _clusters(plan, part)
    starts = group_starts(clusters[order] - first_cluster, len(rows))
    ids, dists = empty_lists(len(nodes), k)
    for index, (begin, end) in enumerate(rows):
        members = order[starts[index] : starts[index + 1]]
        if not len(members) or begin == end:
            continue
        found, far = empty_lists(len(members), k)
        limits = np.minimum(farthest[members], NO_DISTANCE - 1)
        nearest_into(guests[members], word_major(codes[begin:end]), first_node + begin, -1, limits, found, far)
        ids[members], dists[members] = found, far
    ids, dists, nodes = ids[by_node], dists[by_node], nodes[by_node]
    there = ids >= 0
    counts = there.sum(axis=1)
    keep = counts > 0
    entries = np.append(0, np.cumsum(counts[keep])).astype(np.int64)
    target = np.searchsorted(bounds, nodes[keep], side="right") - 1
    block_starts = group_starts(target, len(bounds) - 1)
    return {
        "owners": nodes[keep],
        "counts": counts[keep],
        "ids": ids[there],
        "dists": dists[there],
        "starts": block_starts,
        "entry_starts": entries[block_starts],
    }, {}


def merge(run: RunFolder, part: int, stage: str, wave: int) -> Output:
    """The lists of ``stage`` with what a wave found."""
    bounds = read_bounds(run)
    own = run.read(stage, part, ["ids", "dists", "fresh"])
    for source in range(len(bounds) - 1):
        with open_part(run, f"across-{wave}", source) as reader:
            blocks, entries = (reader.read(name, part, part + 2).tolist() for name in ("starts", "entry_starts"))
            if blocks[0] == blocks[1]:
                continue
            counts = reader.read("counts", *blocks)
            owners = (reader.read("owners", *blocks) - bounds[part]).astype(np.int32)
            ids, dists = reader.read("ids", *entries), reader.read("dists", *entries)
        starts = np.append(0, np.cumsum(counts)).astype(np.int64)
        insert_blocks(owners, starts, ids, dists, own["ids"], own["dists"], own["fresh"])
    return with_crossing(bounds, part, own["ids"], own["dists"], own["fresh"]), {}


def with_crossing(
    bounds: NDArray[np.int64],
    part: int,
    ids: NDArray[np.int32],
    dists: NDArray[np.uint16],
    fresh: NDArray[np.uint8] | None = None,
) -> Arrays:
    """Lists, and those of their edges that end in another part, sorted by it: target, source, distance, fresh."""
    first, last = bounds[part], bounds[part + 1]
    rows, columns = np.nonzero((ids >= 0) & ((ids < first) | (ids >= last)))
    targets = ids[rows, columns]
    order = np.argsort(targets, kind="stable")
    rows, columns, targets = rows[order], columns[order], targets[order]
    result = {
        "ids": ids,
        "dists": dists,
        "farthest": dists[:, -1].copy(),
        "edge_targets": targets,
        "edge_sources": (rows + first).astype(np.int32),
        "edge_dists": dists[rows, columns],
        "starts": np.searchsorted(targets, bounds).astype(np.int64),
    }
    if fresh is not None:
        result["fresh"], result["edge_fresh"] = fresh, fresh[rows, columns]
    return result


def incoming(
    run: RunFolder, stage: str, part: int, keep: int, own: Arrays, with_fresh: bool
) -> tuple[NDArray[np.int32], NDArray[np.uint16], NDArray[np.uint8]]:
    """Who has each node of the part in its list, nearest first: (R, keep) sources, distances and fresh flags."""
    bounds = read_bounds(run)
    first, size = int(bounds[part]), int(bounds[part + 1] - bounds[part])
    local = np.where((own["ids"] >= first) & (own["ids"] < first + size), own["ids"] - first, NO_ID).astype(np.int32)
    names = ["edge_targets", "edge_sources", "edge_dists", *(["edge_fresh"] if with_fresh else [])]
    pieces = slices_for(run, stage, (other for other in range(len(bounds) - 1) if other != part), part, names)
    rows, columns = np.nonzero(local >= 0)
    targets = np.concatenate([local[rows, columns], *(piece["edge_targets"] - first for piece in pieces)])
    sources = np.concatenate([(rows + first).astype(np.int32), *(piece["edge_sources"] for piece in pieces)])
    dists = np.concatenate([own["dists"][rows, columns], *(piece["edge_dists"] for piece in pieces)])
    flags = np.zeros(len(targets), np.uint8)
    if with_fresh:
        flags = np.concatenate([own["fresh"][rows, columns], *(piece["edge_fresh"] for piece in pieces)])
    return insert_edges(targets.astype(np.int32), sources, dists, flags, size, keep)


def propagation(run: RunFolder, part: int, stage: str, width: int, first_round: bool, block: int) -> Output:
    """One round for the nodes of the part, ``block`` of them at a time: their halo is far larger than they are."""
    bounds = read_bounds(run)
    own = run.read(stage, part, ["ids", "dists", "fresh"])
    back, _, back_fresh = incoming(run, stage, part, width, own, not first_round)
    hops = np.concatenate([own["ids"][:, :width], back], axis=1)
    hop_fresh = np.concatenate([own["fresh"][:, :width], back_fresh | np.uint8(first_round)], axis=1)
    found, halo = [], 0
    for first in range(0, len(hops), block):
        rows = slice(first, min(first + block, len(hops)))
        lists, known = _propagated(run, stage, bounds, own, rows, part, hops[rows], hop_fresh[rows], width)
        found.append(lists)
        halo = max(halo, known)
    ids, dists, fresh = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return with_crossing(bounds, part, ids, dists, fresh), {"fresh": int(fresh.sum()), "halo": halo}


def _propagated(
    run: RunFolder,
    stage: str,
    bounds: NDArray[np.int64],
    own: Arrays,
    rows: slice,
    part: int,
    hops: NDArray[np.int32],
    hop_fresh: NDArray[np.uint8],
    width: int,
) -> tuple[tuple[NDArray[np.int32], NDArray[np.uint16], NDArray[np.uint8]], int]:
    """The new lists of some rows of a part, and how many other nodes had to be known for that."""
    nodes = np.arange(bounds[part] + rows.start, bounds[part] + rows.stop, dtype=np.int32)
    neighbours = Renumbering(int(bounds[-1]))
    neighbours.add(nodes)
    neighbours.add(hops)
    near = neighbours.finish()
    outside = near[(near < nodes[0]) | (near > nodes[-1])]
    halo = fetch_rows(run, {name: stage for name in ("ids", "dists", "fresh")}, bounds, outside)
    own_ids, own_dists, own_fresh = own["ids"][rows], own["dists"][rows], own["fresh"][rows]
    everything = Renumbering(int(bounds[-1]))
    everything.add(near)
    everything.add(own_ids)
    everything.add(halo["ids"][:, :width])
    known = everything.finish()
    codes = fetch_rows(run, {"codes": "gather"}, bounds, known)["codes"]

    ids, dists = empty_lists(len(known), own_ids.shape[1])
    fresh = np.zeros(ids.shape, np.uint8)
    own_places, halo_places = everything.places(nodes), everything.places(outside)
    ids[own_places], dists[own_places], fresh[own_places] = everything.places(own_ids), own_dists, own_fresh
    ids[halo_places, :width] = everything.places(halo["ids"][:, :width])
    dists[halo_places, :width], fresh[halo_places, :width] = halo["dists"][:, :width], halo["fresh"][:, :width]
    found, far, new = propagate(codes, ids, dists, fresh, own_places, everything.places(hops), hop_fresh, width)
    found = np.where(found >= 0, known[found], NO_ID).astype(np.int32)
    return (found, far, new), len(known) - len(nodes)


def truth(run: RunFolder, part: int) -> Output:
    """The nearest codes of this part to each probe."""
    bounds = read_bounds(run)
    probes = run.read("probes", 0, ["codes"])["codes"]
    codes = run.read("gather", part, ["codes"])["codes"]
    ids, dists = empty_lists(len(probes), PROBED + 1)
    limits = np.full(len(probes), NO_DISTANCE - 1, np.uint16)
    nearest_into(probes, word_major(codes), int(bounds[part]), -1, limits, ids, dists)
    return {"ids": ids, "dists": dists}, {}


def sampled_recall(run: RunFolder, stage: str) -> float:
    """Tie-aware recall@10 of the lists of a stage, on the probes."""
    bounds = read_bounds(run)
    nodes = run.read("probes", 0, ["nodes"])["nodes"]
    parts = [run.read("truth", part) for part in range(len(bounds) - 1)]
    ids, dists = merge_lists(
        np.concatenate([part["ids"] for part in parts], axis=1),
        np.concatenate([part["dists"] for part in parts], axis=1),
        PROBED + 1,
    )
    others = ids != nodes[:, None]
    others[:, -1] &= ~others[:, :-1].all(axis=1)  # the probe itself was beyond: drop the last
    true = np.where(others & (ids >= 0), dists, 0).max(axis=1)
    count = (others & (ids >= 0)).sum(axis=1)
    found = fetch_rows(run, {"dists": stage}, bounds, nodes)["dists"][:, :PROBED]
    hits = ((found <= true[:, None]) & (found < NO_DISTANCE)).sum(axis=1)
    return float(np.mean(np.minimum(hits, count) / np.maximum(count, 1)))
