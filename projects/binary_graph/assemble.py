"""Last step of a build: the parts become the arrays of a segment."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.segment import Segment
from alimm.projects.binary_graph.stage_common import group_starts
from alimm.projects.binary_graph.stage_lists import read_bounds
from alimm.projects.binary_graph.stitch import entry_mask
from alimm.projects.binary_graph.store import RunFolder
from alimm_ops.graph.hamming_cpu import majority

Maker = Callable[[str, tuple[int, ...], Any], NDArray[Any]]


def maker(folder: Path | None) -> Maker:
    """Makes the arrays: in memory, or as files in a folder where they need not fit into it."""

    def make(name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        if folder is None or 0 in shape:
            return np.zeros(shape, dtype)
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.npy"
        path.unlink(missing_ok=True)  # an index in use may still be mapped from the old file
        return np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)

    return make


def assemble_graph(run: RunFolder, entry_share: int, info: dict[str, Any], make: Maker) -> Segment:
    """The segment of a build whose stages are done."""
    bounds = read_bounds(run)
    plan = run.read("plan", 0, ["cluster_starts"])
    extra = run.read("stitch", 0)
    parts, num_nodes = len(bounds) - 1, int(bounds[-1])
    degrees = np.concatenate(
        [(run.map("links", part, "ids") >= 0).sum(axis=1, dtype=np.int64) for part in range(parts)]
    )
    extra_starts = group_starts(extra["edges"][:, 0], num_nodes)
    indptr = make("indptr", (num_nodes + 1,), np.int64)
    np.cumsum(degrees + np.diff(extra_starts), out=indptr[1:])
    edges = make("edges", (int(indptr[-1]),), np.int32)
    for part in range(parts):
        first, last = bounds[part], bounds[part + 1]
        links = run.map("links", part, "ids")
        added = extra["edges"][extra_starts[first] : extra_starts[last]]
        rows, columns = np.nonzero(links >= 0)
        owners = np.concatenate([rows, added[:, 0] - first])
        targets = np.concatenate([links[rows, columns], added[:, 1]])
        order = np.argsort(owners, kind="stable")
        edges[indptr[first] : indptr[last]] = targets[order]
    codes, row_indptr, ids = copy_nodes(run, "gather", range(parts), make)

    cluster_starts = plan["cluster_starts"]
    entry = entry_mask(cluster_starts, entry_share)
    entry[extra["entries"]] = True
    entry_nodes = np.flatnonzero(entry).astype(np.int32)
    # A cluster without codes has no entries, so it does not matter where it lies.
    centres = np.zeros((len(cluster_starts) - 1, codes.shape[1]), np.uint64)
    for cluster, (first, last) in enumerate(pairwise(cluster_starts.tolist())):
        own = np.asarray(codes[first:last])
        if not len(own):
            continue
        centres[cluster] = majority(own, np.zeros(len(own), np.int32), own[:1])[0]
    return Segment(
        codes=codes,
        indptr=indptr,
        edges=edges,
        row_indptr=row_indptr,
        ids=ids,
        centres=centres,
        entry_indptr=np.searchsorted(entry_nodes, cluster_starts).astype(np.int64),
        entry_nodes=entry_nodes,
        entry_codes=np.take(codes, entry_nodes, axis=0),
        info=info,
    )


def assemble_exact(run: RunFolder, parts: int, words: int, info: dict[str, Any], make: Maker) -> Segment:
    """A segment without a graph, of the distinct codes in the order of their hashes."""
    codes, row_indptr, ids = copy_nodes(run, "distinct", range(parts), make, "row_starts")
    return exact_segment(codes.reshape(-1, words), row_indptr, ids, info)


def exact_segment(
    codes: NDArray[np.uint64], row_indptr: NDArray[np.int64], ids: NDArray[np.int64], info: dict[str, Any]
) -> Segment:
    """A segment whose search compares all codes."""
    words = codes.shape[1]
    return Segment(
        codes=codes,
        indptr=np.zeros(len(codes) + 1, np.int64),
        edges=np.empty(0, np.int32),
        row_indptr=row_indptr,
        ids=ids,
        centres=np.empty((0, words), np.uint64),
        entry_indptr=np.zeros(1, np.int64),
        entry_nodes=np.empty(0, np.int32),
        entry_codes=np.empty((0, words), np.uint64),
        info=info,
    )


def copy_nodes(
    run: RunFolder, stage: str, parts: range, make: Maker, starts_name: str = "row_indptr"
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Codes, starts of rows and ids of all parts, one after the other."""
    pieces = [(run.map(stage, part, "codes"), run.map(stage, part, starts_name)) for part in parts]
    num_nodes = sum(len(codes) for codes, _ in pieces)
    num_rows = sum(int(starts[-1]) for _, starts in pieces)
    codes = make("codes", (num_nodes, pieces[0][0].shape[1]), np.uint64)
    row_indptr = make("row_indptr", (num_nodes + 1,), np.int64)
    ids = make("ids", (num_rows,), np.int64)
    node = row = 0
    for part, (own, starts) in zip(parts, pieces, strict=True):
        codes[node : node + len(own)] = own
        row_indptr[node : node + len(own) + 1] = row + starts
        ids[row : row + int(starts[-1])] = run.map(stage, part, "ids")
        node, row = node + len(own), row + int(starts[-1])
    return codes, row_indptr, ids
