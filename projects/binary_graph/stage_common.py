"""What the stages of a build share: slices that one part has for another, and rows that lie in many parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.part_files import PartReader
from alimm.projects.binary_graph.store import RunFolder

Arrays = dict[str, NDArray[Any]]
Output = tuple[Arrays, dict[str, Any]]


def open_part(run: RunFolder, stage: str, part: int) -> PartReader:
    """The file of a finished part."""
    return PartReader(f"{run.path}/{stage}/part-{part:05d}.safetensors")


def slices_for(
    run: RunFolder, stage: str, parts: Iterable[int], target: int, names: Sequence[str], starts: str = "starts"
) -> list[Arrays]:
    """What each of the parts of a stage has for the part ``target`` of the next one.

    Args:
        run: the build.
        stage: whose parts hold, under ``starts``, where the rows for each target begin.
        parts: which, in this order.
        target: whose rows.
        names: arrays that are sliced so; where ``name + '.starts'`` exists, ``name`` holds several entries a row.
        starts: name of that array.

    Returns:
        For each part the slices, by name.
    """
    found = []
    for part in parts:
        with open_part(run, stage, part) as reader:
            first, last = (int(bound) for bound in reader.read(starts, target, target + 2))
            found.append({name: reader.read(name, first, last) for name in names})
    return found


def joined(pieces: Sequence[Arrays], name: str) -> NDArray[Any]:
    """One array of all pieces, one after the other."""
    return np.concatenate([piece[name] for piece in pieces])


def fetch_rows(run: RunFolder, stages: dict[str, str], bounds: NDArray[np.int64], nodes: NDArray[np.int32]) -> Arrays:
    """Rows of arrays that lie cut over the parts of a stage.

    Args:
        run: the build.
        stages: name of the array -> its stage; parts of all are cut at the same nodes.
        bounds: int64 (parts + 1,), first node of each part.
        nodes: int32, ascending, wanted nodes.
    """
    parts = np.searchsorted(bounds, nodes, side="right") - 1
    cuts = np.searchsorted(parts, np.arange(len(bounds)))
    pieces: dict[str, list[NDArray[Any]]] = {name: [] for name in stages}
    by_stage: dict[str, list[str]] = {}
    for name, stage in stages.items():
        by_stage.setdefault(stage, []).append(name)
    for part in range(len(bounds) - 1):
        if cuts[part] == cuts[part + 1] and not (part == 0 and len(nodes) == 0):
            continue
        rows = nodes[cuts[part] : cuts[part + 1]] - bounds[part]
        for stage, names in by_stage.items():
            with open_part(run, stage, part) as reader:
                for name in names:
                    if len(rows) and len(rows) == rows[-1] + 1 - rows[0]:
                        pieces[name].append(reader.read(name, int(rows[0]), int(rows[-1]) + 1))
                    else:
                        pieces[name].append(np.take(reader.map(name), rows, axis=0))
    return {name: np.concatenate(found) for name, found in pieces.items()}


def group_starts(sorted_keys: NDArray[Any], groups: int) -> NDArray[np.int64]:
    """Where each of the groups 0 to ``groups - 1`` begins in sorted keys, int64 (groups + 1,)."""
    return np.searchsorted(sorted_keys, np.arange(groups + 1)).astype(np.int64)


def ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers ``starts[i], ..., starts[i] + counts[i] - 1`` for every i, one after the other."""
    total = int(counts.sum())
    ends = np.cumsum(counts)
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)
