"""Changes of an index as functions: a view in, another view out. None of them touches a file.

Rows move in one direction: delta -> small segments -> larger ones. A flush builds one segment of the delta and of
every segment that has become a burden: one with more than ``DEAD_SHARE`` deleted rows, and, past ``max_segments``, the
smallest ones, as far up as the next is no larger than all the smaller ones together. So segments grow geometrically,
and a row is built anew a number of times that is logarithmic in the size of the index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.delta import Delta
from alimm.projects.binary_graph.parts import Part, gather
from alimm.projects.binary_graph.segment import Segment
from alimm.projects.binary_graph.view import View

DEAD_SHARE = 0.2
"""A segment with a larger share of deleted rows is built anew at the next flush."""
LARGEST_ID = np.iinfo(np.int64).max

Build = Callable[[NDArray[np.uint64], NDArray[np.int64]], Segment]


def check_ids(ids: Any, count: int | None = None) -> NDArray[np.int64]:
    """Ids as a caller gives them, as int64 that shares no memory with them.

    Args:
        ids: whole numbers from 0 to 2**63 - 1, shape (count,).
        count: how many are expected; None: any number.

    Raises:
        ValueError: another type, shape or range.
    """
    ids = np.asarray(ids)
    wanted = "whole numbers" if count is None else f"{count} whole numbers"
    if ids.ndim != 1 or (count is not None and len(ids) != count) or (len(ids) and ids.dtype.kind not in "iu"):
        raise ValueError(f"ids must be {wanted}, got {ids.dtype} of shape {ids.shape}")
    if len(ids) and (ids.min() < 0 or ids.max() > LARGEST_ID):
        raise ValueError(f"ids must be from 0 to 2**63 - 1, got {ids.min()} to {ids.max()}")
    return ids.astype(np.int64)


def check_unique(ids: NDArray[np.int64]) -> None:
    """Refuse ids that repeat."""
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        twice = values[counts > 1]
        raise ValueError(f"ids must be unique; {len(twice)} of them are given more than once, e.g. {some(twice)}")


def some(ids: NDArray[np.int64]) -> str:
    """The first few ids, for a message."""
    return ", ".join(map(str, ids[:3].tolist())) + (", ..." if len(ids) > 3 else "")


def new_ids(view: View, ids: Any, count: int) -> NDArray[np.int64]:
    """The ids of rows to add: those given, checked against the index, or the next ones.

    Raises:
        ValueError: ids of a wrong kind, given twice, or live in the index.
    """
    if ids is None:
        if not count:
            return np.empty(0, np.int64)
        if view.next_id + count - 1 > LARGEST_ID:
            raise ValueError(f"there are no {count} numbers after id {view.next_id - 1}: give ids of your own")
        return np.arange(count, dtype=np.int64) + view.next_id
    ids = check_ids(ids, count)
    check_unique(ids)
    taken = ids[view.is_live(ids)]
    if len(taken):
        raise ValueError(f"{len(taken)} ids are in the index already, e.g. {some(taken)}: delete them first")
    return ids


def added(view: View, codes: NDArray[np.uint64], ids: NDArray[np.int64]) -> View:
    """The view with rows added to its delta."""
    return replace(
        view,
        delta=view.delta.with_added(codes, ids),
        next_id=max(view.next_id, int(ids.max(initial=-1)) + 1),
        logged=view.logged + len(ids),
    )


def deleted(view: View, ids: NDArray[np.int64], ignore_missing: bool) -> tuple[View, NDArray[np.int64]]:
    """The view without some rows, and the ids (ascending) of those that were live.

    Raises:
        ValueError: ids are not live, unless that is to be ignored.
    """
    ids = np.unique(ids)
    live = view.delta.find(ids)
    others, parts = np.flatnonzero(~live), []  # no id is live twice
    for part in view.parts:
        rows = part.find_live(ids[others])
        here = rows >= 0
        live[others[here]] = True
        parts.append(part.without(rows[here]))
    if not ignore_missing and not live.all():
        missing = ids[~live]
        raise ValueError(
            f"{len(missing)} ids are not in the index, e.g. {some(missing)}: nothing was deleted; "
            "missing='ignore' deletes the others"
        )
    ids = ids[live]
    if not len(ids):
        return view, ids
    delta = view.delta.without(ids)
    return replace(view, parts=tuple(parts), delta=delta, logged=view.logged + len(ids)), ids


def live_rows(parts: tuple[Part, ...], delta: Delta) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Codes and ids of all live rows of some parts and a delta, ascending by id."""
    blocks = [(delta.codes, delta.ids)]
    for part in parts:
        rows = np.arange(part.segment.num_rows) if part.live is None else np.flatnonzero(part.live)
        blocks.extend(gather(part.segment, rows))
    codes, ids = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    order = np.argsort(ids, kind="stable")
    return codes[order], ids[order]


def flushed(view: View, build: Build, max_segments: int) -> View:
    """The view with its delta in a segment, and with burdens built anew. The same view where there is nothing to do."""
    rebuilt = {part for part in view.parts if part.num_dead > DEAD_SHARE * part.segment.num_rows}
    others = sorted((part for part in view.parts if part not in rebuilt), key=lambda part: part.num_live)
    total = len(view.delta) + sum(part.num_live for part in rebuilt)
    if len(others) + (total > 0) > max_segments:
        for number, part in enumerate(others):
            enough = len(others) - number + 1 <= max_segments
            if enough and part.num_live > total:
                break
            rebuilt.add(part)
            total += part.num_live
    if not rebuilt and not len(view.delta):
        return view
    return rebuild(view, rebuilt, build)


def rebuild(view: View, rebuilt: set[Part], build: Build) -> View:
    """The view with some parts and the delta in one new segment, which comes last; none where nothing is left."""
    codes, ids = live_rows(tuple(part for part in view.parts if part in rebuilt), view.delta)
    kept = tuple(part for part in view.parts if part not in rebuilt)
    fresh = (Part.of(build(codes, ids)),) if len(ids) else ()
    return replace(view, parts=kept + fresh, delta=Delta.empty(view.words))


def joined(view: View, other: View, build: Build) -> View:
    """The view and the live rows of another one; its segments are taken as they are.

    Raises:
        ValueError: codes of another width, or ids that both have.
    """
    if view.words != other.words:
        raise ValueError(f"the other index has codes of {64 * other.words} bits, this one of {64 * view.words}")
    for ids in (*(part.live_ids() for part in other.parts), other.delta.ids):
        both = ids[view.is_live(ids)]
        if len(both):
            raise ValueError(f"both indexes have {len(both)} or more ids in common, e.g. {some(both)}: ids must differ")
    # Another index may close or replace its files: the parts are in memory's hands until they are written here.
    parts = tuple(replace(part, table=None) for part in other.parts if part.num_live)
    delta = view.delta.with_added(other.delta.codes, other.delta.ids)
    both_views = replace(view, parts=view.parts + parts, delta=delta, next_id=max(view.next_id, other.next_id))
    return rebuild(both_views, set(), build) if len(delta) else both_views


def dead_tables(parts: tuple[Part, ...]) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """What is to be written of the deleted rows.

    Returns:
        The ids (ascending) that are deleted wherever a segment has them; and for each part those that are deleted in it
        but live in another part: an id may be deleted, and added again.
    """
    dead = [np.sort(part.dead_ids()) for part in parts]
    everywhere = np.unique(np.concatenate([np.empty(0, np.int64), *dead]))
    if not len(everywhere):
        return everywhere, dead
    live = np.zeros(len(everywhere), np.bool_)
    for part in parts:
        live |= part.find_live(everywhere) >= 0
    elsewhere = everywhere[live]
    return everywhere[~live], [ids[np.isin(ids, elsewhere)] for ids in dead]
