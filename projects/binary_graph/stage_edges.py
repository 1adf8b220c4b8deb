"""Stages that choose edges: from a node's neighbours and those that point at it, few that lead in all directions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.stage_common import Output, fetch_rows
from alimm.projects.binary_graph.stage_lists import incoming, read_bounds, with_crossing
from alimm.projects.binary_graph.store import RunFolder
from alimm_ops.graph.build_cpu import Renumbering
from alimm_ops.graph.hamming_reference import NO_ID
from alimm_ops.graph.lists_cpu import diversify, merge_lists

MIN_NEAR = 1


def edges(run: RunFolder, part: int, stage: str, degree: int, alpha_percent: int) -> Output:
    """Out-edges of the part's nodes: of the lists and of the lists that name the node, diversified."""
    own = run.read(stage, part, ["ids", "dists"])
    k = own["ids"].shape[1]
    back, back_dists, _ = incoming(run, stage, part, k, own, False)
    ids, dists = merge_lists(
        np.concatenate([own["ids"], back], axis=1), np.concatenate([own["dists"], back_dists], axis=1), 2 * k
    )
    ids, dists = _diversified(run, part, ids, dists, degree, alpha_percent)
    return with_crossing(read_bounds(run), part, ids, dists), {}


def links(run: RunFolder, part: int, degree: int, max_degree: int, alpha_percent: int) -> Output:
    """Final out-edges: those of `edges` and the way back of each, diversified again where they are too many."""
    own = run.read("edges", part, ["ids", "dists"])
    back, back_dists, _ = incoming(run, "edges", part, max_degree, own, False)
    ids, dists = merge_lists(
        np.concatenate([own["ids"], back], axis=1),
        np.concatenate([own["dists"], back_dists], axis=1),
        degree + max_degree,
    )
    many = np.flatnonzero((ids >= 0).sum(axis=1) > max_degree)
    if len(many):
        few, few_dists = _diversified(run, part, ids[many], dists[many], max_degree, alpha_percent, many)
        ids[many], dists[many] = NO_ID, np.uint16(65535)
        ids[many, :max_degree], dists[many, :max_degree] = few, few_dists
    return {"ids": ids[:, :max_degree].copy(), "dists": dists[:, :max_degree].copy()}, {}


def _diversified(
    run: RunFolder,
    part: int,
    ids: NDArray[np.int32],
    dists: NDArray[np.uint16],
    degree: int,
    alpha_percent: int,
    rows: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    bounds = read_bounds(run)
    numbering = Renumbering(int(bounds[-1]))
    nodes = np.arange(bounds[part], bounds[part + 1], dtype=np.int32)
    nodes = nodes if rows is None else nodes[rows]
    numbering.add(nodes)
    numbering.add(ids)
    known = numbering.finish()
    codes = fetch_rows(run, {"codes": "gather"}, bounds, known)["codes"]
    places, far = diversify(
        codes, numbering.places(nodes), numbering.places(ids), dists, degree, alpha_percent, 100, MIN_NEAR
    )
    return np.where(places >= 0, known[places], NO_ID).astype(np.int32), far
