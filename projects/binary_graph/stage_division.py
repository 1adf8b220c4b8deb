"""Stages that divide the codes: centres, the nearest clusters of each code, and the numbers of the nodes.

The division of the paper: every code is a core member of its nearest cluster and a guest of the next t - 1. Nodes are
numbered cluster by cluster, in the order of their hash inside one, so what is near lies near in every file and in
memory. A cluster that stays too large, however it is divided, is cut by the hash.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.division import binary_kmeans, group_centres, nearest_centres
from alimm.projects.binary_graph.stage_common import Output, group_starts, joined, open_part, ranges, slices_for
from alimm.projects.binary_graph.store import RunFolder
from alimm_ops.graph.build_cpu import hash_codes

SAMPLE_PER_CENTRE = 20


def centres(run: RunFolder, part: int, parts: int, num_centres: int) -> Output:
    """Centres by k-means on the codes with the least hashes."""
    wanted, pieces = SAMPLE_PER_CENTRE * num_centres, []
    for source in range(parts):
        with open_part(run, "distinct", source) as reader:
            pieces.append(reader.read("codes")[:wanted])
        wanted -= len(pieces[-1])
        if wanted <= 0:
            break
    sample = np.concatenate(pieces)
    return {"centres": binary_kmeans(sample, min(num_centres, len(sample)))}, {}


def assign(run: RunFolder, part: int, centre_stage: str, overlap: int) -> Output:
    """The nearest clusters of the part's codes, and how many codes have each for their nearest."""
    codes = run.read("distinct", part, ["codes"])["codes"]
    all_centres = run.read(centre_stage, 0, ["centres"])["centres"]
    labels, _ = nearest_centres(codes, all_centres, min(overlap, len(all_centres)), group_centres(all_centres))
    return {"labels": labels, "counts": np.bincount(labels[:, 0], minlength=len(all_centres))}, {}


def split(
    run: RunFolder, part: int, parts: int, centre_stage: str, assign_stage: str, large: list[int], pieces: list[int]
) -> Output:
    """The centres, those of the clusters ``large`` replaced by ``pieces`` centres of a sample of their codes."""
    old = run.read(centre_stage, 0, ["centres"])["centres"]
    wanted = {cluster: SAMPLE_PER_CENTRE * count for cluster, count in zip(large, pieces, strict=True)}
    samples: dict[int, list[NDArray[np.uint64]]] = {cluster: [] for cluster in large}
    for source in range(parts):
        with open_part(run, assign_stage, source) as reader:
            nearest_cluster = reader.read("labels")[:, 0]
        codes = run.map("distinct", source, "codes")
        for cluster in large:
            rows = np.flatnonzero(nearest_cluster == cluster)[: wanted[cluster]]
            wanted[cluster] -= len(rows)
            samples[cluster].append(codes[rows])
    fresh = [old[np.setdiff1d(np.arange(len(old)), large)]]
    for cluster, count in zip(large, pieces, strict=True):
        sample = np.concatenate(samples[cluster])
        fresh.append(binary_kmeans(sample, min(count, len(sample))))
    return {"centres": np.unique(np.concatenate(fresh), axis=0)}, {}


def clusters_of(
    labels: NDArray[np.int32], codes: NDArray[np.uint64], first_piece: NDArray[np.int64], seed: int
) -> NDArray[np.int32]:
    """Clusters instead of centres: those of a centre that was cut by the hash are told apart by it."""
    pieces = np.diff(first_piece)
    if (pieces == 1).all():
        return labels
    place = hash_codes(codes, seed + 1)[:, None] % pieces[labels].astype(np.uint64)
    return np.where(labels >= 0, first_piece[labels] + place.astype(np.int64), -1).astype(np.int32)


def count_clusters(run: RunFolder, part: int, assign_stage: str, seed: int) -> Output:
    """How many core members each cluster has in this part."""
    first_piece = run.read("pieces", 0)["first_piece"]
    labels = run.read(assign_stage, part, ["labels"])["labels"][:, :1]
    codes = run.read("distinct", part, ["codes"])["codes"]
    clusters = clusters_of(labels, codes, first_piece, seed)[:, 0]
    return {"counts": np.bincount(clusters, minlength=int(first_piece[-1]))}, {}


def number(run: RunFolder, part: int, assign_stage: str, seed: int) -> Output:
    """Node numbers of the part's codes; the codes sorted by the part that they go to."""
    plan = run.read("plan", 0, ["cluster_starts", "part_clusters", "first_piece"])
    before = run.rows("plan", 0, "before", part, part + 1)[0]
    content = run.read("distinct", part)
    labels = run.read(assign_stage, part, ["labels"])["labels"][:, :1]
    core = clusters_of(labels, content["codes"], plan["first_piece"], seed)[:, 0]
    order = np.argsort(core, kind="stable")
    own_starts = group_starts(core[order], len(before))
    nodes = np.empty(len(core), np.int32)
    rank = np.arange(len(core)) - np.repeat(own_starts[:-1], np.diff(own_starts))
    nodes[order] = plan["cluster_starts"][core[order]] + before[core[order]] + rank

    target = np.searchsorted(plan["part_clusters"], core[order], side="right") - 1
    rows = np.diff(content["row_starts"])
    row_order = ranges(content["row_starts"][:-1][order], rows[order])
    result = {
        "codes": content["codes"][order],
        "nodes": nodes[order],
        "node_of": nodes,
        "row_counts": rows[order],
        "ids": content["ids"][row_order],
        "starts": group_starts(target, len(plan["part_clusters"]) - 1),
    }
    result["row_starts"] = np.append(0, np.cumsum(rows[order]))[result["starts"]].astype(np.int64)
    return result, {}


def guests(run: RunFolder, part: int, assign_stage: str, seed: int, first: int, last: int) -> Output:
    """The part's codes as guests of their nearest clusters, from the ``first``-th to the ``last``-th, from 0 on."""
    plan = run.read("plan", 0, ["part_clusters", "first_piece"])
    codes = run.read("distinct", part, ["codes"])["codes"]
    nodes = run.read("number", part, ["node_of"])["node_of"]
    labels = run.read(assign_stage, part, ["labels"])["labels"][:, first:last]
    clusters = clusters_of(labels, codes, plan["first_piece"], seed)
    owner = np.repeat(np.arange(len(codes)), clusters.shape[1])
    cluster = clusters.ravel()
    owner, cluster = owner[cluster >= 0], cluster[cluster >= 0]
    order = np.argsort(cluster, kind="stable")
    owner, cluster = owner[order], cluster[order]
    target = np.searchsorted(plan["part_clusters"], cluster, side="right") - 1
    return {
        "guest_clusters": cluster,
        "guest_nodes": nodes[owner],
        "guest_codes": codes[owner],
        "starts": group_starts(target, len(plan["part_clusters"]) - 1),
    }, {}


def gather(run: RunFolder, part: int, sources: int) -> Output:
    """The nodes of a part, in order: codes, rows and ids."""
    pieces = slices_for(run, "number", range(sources), part, ("codes", "nodes", "row_counts"))
    row_pieces = slices_for(run, "number", range(sources), part, ("ids",), starts="row_starts")
    nodes, counts, ids = joined(pieces, "nodes"), joined(pieces, "row_counts"), joined(row_pieces, "ids")
    order = np.argsort(nodes, kind="stable")
    starts = np.append(0, np.cumsum(counts)).astype(np.int64)
    rows = ranges(starts[:-1][order], counts[order])
    row_indptr = np.append(0, np.cumsum(counts[order])).astype(np.int64)
    return {"codes": joined(pieces, "codes")[order], "row_indptr": row_indptr, "ids": ids[rows]}, {}
