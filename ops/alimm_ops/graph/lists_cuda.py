"""Neighbour lists of binary codes on an NVIDIA GPU, in Numba CUDA: entry by entry what ``lists_reference.py`` gives.

The functions launch the kernels of ``lists_cuda_kernels.py`` and wait for nothing. They take arrays of the device
(anything with ``__cuda_array_interface__``, so torch tensors too; NumPy arrays in Numba's simulator) and write into
arrays that the caller made and that overlap no other. Ids are trusted: one outside the arrays that it indexes does no
harm, but is silently passed over. They have never run on a GPU: their tests are the simulator and the compiler.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from alimm_ops.graph import hamming_cuda  # the first of them: it says what to install
from alimm_ops.graph import lists_cuda_kernels as kernels

NARROW = 32
"""Threads of a block whose work is one list after the other."""


def merge_lists(ids: Any, dists: Any, k: int, new_ids: Any, new_dists: Any, stream: int | None = None) -> None:
    """The k best entries of each row; see `alimm_ops.graph.lists_reference.merge_lists`.

    Args:
        ids: int32 (R, A), in any order; entries may repeat; negative is none.
        dists: uint16 (R, A).
        k: from 1 to 256.
        new_ids: int32 (R, k), written.
        new_dists: uint16 (R, k), written.
        stream: address of the CUDA stream.

    Raises:
        ValueError: a size or dtype is wrong.
    """
    hamming_cuda.check_k("k", k)
    ids, dists = _lists("ids", ids, "dists", dists, None, None)
    new_ids, new_dists = _lists("new_ids", new_ids, "new_dists", new_dists, len(ids), k)
    if len(ids):
        grid = (*hamming_cuda.grid_of(len(ids)), hamming_cuda.as_stream(stream))
        kernels.merge_kernel[grid](ids, dists, k, new_ids, new_dists)


def propagate(
    codes: Any,
    ids: Any,
    dists: Any,
    fresh: Any,
    rows: Any,
    hops: Any,
    hop_fresh: Any,
    width: int,
    new_ids: Any,
    new_dists: Any,
    new_fresh: Any,
    stream: int | None = None,
) -> None:
    """One breadth-first round; see `alimm_ops.graph.lists_reference.propagate`.

    Args:
        codes: uint64 (L, W).
        ids: int32 (L, K), neighbour lists, K from 1 to 256; where a list is not needed, -1.
        dists: uint16 (L, K), the true distances of the entries.
        fresh: uint8 (L, K), 1 where an entry came in the last round.
        rows: int32 (R,), the nodes to update.
        hops: int32 (R, H), the nodes whose lists a row looks into; -1 pads, at any place.
        hop_fresh: uint8 (R, H), 1 where that edge is fresh.
        width: how many entries of each list are looked at.
        new_ids: int32 (R, K), written.
        new_dists: uint16 (R, K), written.
        new_fresh: uint8 (R, K), written: 1 where an entry is not in the old list.
        stream: address of the CUDA stream.

    Raises:
        ValueError: a size or dtype is wrong.
    """
    codes = hamming_cuda.as_codes("codes", codes)
    ids, dists = _lists("ids", ids, "dists", dists, len(codes), None)
    k = ids.shape[1]
    hamming_cuda.check_k("the number of columns of ids", k)
    fresh = hamming_cuda.as_array("fresh", fresh, np.uint8, (len(codes), k))
    rows = hamming_cuda.as_array("rows", rows, np.int32, (None,))
    hops = hamming_cuda.as_array("hops", hops, np.int32, (len(rows), None))
    hop_fresh = hamming_cuda.as_array("hop_fresh", hop_fresh, np.uint8, tuple(hops.shape))
    new_ids, new_dists = _lists("new_ids", new_ids, "new_dists", new_dists, len(rows), k)
    new_fresh = hamming_cuda.as_array("new_fresh", new_fresh, np.uint8, (len(rows), k))
    _check_count("width", width)
    if len(rows):
        grid = (*hamming_cuda.grid_of(len(rows)), hamming_cuda.as_stream(stream))
        lists = (codes, ids, dists, fresh, rows, hops, hop_fresh, min(width, k))
        kernels.propagate_kernel[grid](*lists, new_ids, new_dists, new_fresh)


def reverse_work(num_rows: int, columns: int, num_nodes: int, width: int) -> int:
    """Elements of scratch memory that `reverse_lists` needs.

    Args:
        num_rows: lists that go in.
        columns: of each.
        num_nodes: lists that come out.
        width: places looked at.
    """
    return 1 + 2 * num_nodes + num_rows * min(width, columns)


def reverse_lists(
    ids: Any,
    dists: Any,
    num_nodes: int,
    width: int,
    keep: int,
    first_node: int,
    work: Any,
    new_ids: Any,
    new_dists: Any,
    stream: int | None = None,
) -> None:
    """Who has a node in its list; see `alimm_ops.graph.lists_reference.reverse_lists`.

    Args:
        ids: int32 (L, K), lists of the nodes from ``first_node`` on, no id twice in one; in [0, num_nodes), or -1.
        dists: uint16 (L, K).
        num_nodes: rows of the result.
        width: places looked at.
        keep: columns of the result, from 1 to 256.
        first_node: node of row 0.
        work: int32, at least ``reverse_work(...)`` elements: scratch memory.
        new_ids: int32 (num_nodes, keep), written.
        new_dists: uint16 (num_nodes, keep), written.
        stream: address of the CUDA stream.

    Raises:
        ValueError: a size or dtype is wrong.
    """
    hamming_cuda.check_k("keep", keep)
    _check_count("width", width)
    ids, dists = _lists("ids", ids, "dists", dists, None, None)
    width = min(width, ids.shape[1])
    entries = len(ids) * width
    if entries >= 2**31:
        raise ValueError(f"a call takes fewer than 2**31 entries, got {entries}: reverse fewer lists at a time")
    if first_node < 0 or first_node + len(ids) > 2**31:
        raise ValueError(f"nodes must be from 0 to 2**31 - 1, got {len(ids)} from {first_node} on: use shards")
    new_ids, new_dists = _lists("new_ids", new_ids, "new_dists", new_dists, num_nodes, keep)
    work = hamming_cuda.as_work(work, reverse_work(len(ids), ids.shape[1], num_nodes, width))
    on = hamming_cuda.as_stream(stream)
    if not num_nodes:
        return
    cursor, counts, places = work[:1], work[1 : 1 + num_nodes], work[1 + num_nodes : 1 + 2 * num_nodes]
    room = work[1 + 2 * num_nodes :]
    kernels.clear_kernel[(*hamming_cuda.threads_of(1 + 2 * num_nodes), on)](work[: 1 + 2 * num_nodes])
    if entries:
        kernels.count_kernel[(*hamming_cuda.threads_of(entries), on)](ids, width, counts)
        kernels.allot_kernel[(*hamming_cuda.threads_of(num_nodes), on)](counts, places, cursor)
        kernels.scatter_kernel[(*hamming_cuda.threads_of(entries), on)](ids, width, places, room)
    else:
        room = cursor  # nothing is read from it, but an array of no elements has no address
    lists = (dists, max(width, 1), first_node, counts, places, room)
    kernels.reverse_kernel[(*hamming_cuda.grid_of(num_nodes), on)](*lists, keep, new_ids, new_dists)


def diversify(
    codes: Any,
    rows: Any,
    ids: Any,
    dists: Any,
    max_degree: int,
    alpha_num: int,
    alpha_den: int,
    min_near: int,
    new_ids: Any,
    new_dists: Any,
    stream: int | None = None,
) -> None:
    """Drop the edges that another edge makes superfluous; see `alimm_ops.graph.lists_reference.diversify`.

    Args:
        codes: uint64 (L, W).
        rows: int32 (R,), the nodes; not read, since their distances are given.
        ids: int32 (R, C), candidates of each, as lists; they never hold the node. The first negative one ends a list.
        dists: uint16 (R, C), their distances to the node.
        max_degree: columns of the result, from 1 to 256.
        alpha_num: with ``alpha_den`` the relaxation, both from 0 to 2**31 - 1.
        alpha_den: see above.
        min_near: at least so many nearest stay.
        new_ids: int32 (R, max_degree), written.
        new_dists: uint16 (R, max_degree), written.
        stream: address of the CUDA stream.

    Raises:
        ValueError: a size or dtype is wrong.
    """
    hamming_cuda.check_k("max_degree", max_degree)
    for name, value in (("alpha_num", alpha_num), ("alpha_den", alpha_den), ("min_near", min_near)):
        _check_count(name, value)
    codes = hamming_cuda.as_codes("codes", codes)
    rows = hamming_cuda.as_array("rows", rows, np.int32, (None,))
    ids, dists = _lists("ids", ids, "dists", dists, len(rows), None)
    new_ids, new_dists = _lists("new_ids", new_ids, "new_dists", new_dists, len(rows), max_degree)
    if len(rows):
        grid = (hamming_cuda.grid_of(len(rows))[0], NARROW, hamming_cuda.as_stream(stream))
        limits = (max_degree, alpha_num, alpha_den, min_near)
        kernels.diversify_kernel[grid](codes, ids, dists, *limits, new_ids, new_dists)


def _lists(name: str, ids: Any, dists_name: str, dists: Any, rows: int | None, columns: int | None) -> tuple[Any, Any]:
    ids = hamming_cuda.as_array(name, ids, np.int32, (rows, columns))
    return ids, hamming_cuda.as_array(dists_name, dists, np.uint16, tuple(ids.shape))


def _check_count(name: str, value: int) -> None:
    if not 0 <= value < 2**31:
        raise ValueError(f"{name} must be from 0 to 2**31 - 1, got {value}")
