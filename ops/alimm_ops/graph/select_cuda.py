"""The active classes of a batch on an NVIDIA GPU, in Numba CUDA: exactly the ids of ``select_reference.py``.

`select_active` launches the kernels of ``select_cuda_kernels.py`` and waits for nothing: how many ids come out is known
from the sizes that go in. It takes contiguous arrays of the device (anything with ``__cuda_array_interface__``, so
torch tensors too; NumPy arrays in Numba's simulator) and writes into arrays that the caller made. It has never run on a
GPU: its tests are the simulator and the compiler. Nothing is sorted::

    hash table of the neighbours with their smallest rank  ->  ids a level  ->  the level that is cut
    the cut level: hashes counted by their upper bits      ->  one bin is divided by comparing its ids in pairs
    fill: the first A positions of the permutation side by side, of which the first free ones are taken
    bitmaps of the shard (two bits an id)                  ->  sorted ids by counting bits
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    # The simulator replaces the global name "cuda" while a kernel runs: it is imported at the top of a module.
    from numba import cuda
except (ImportError, RuntimeError) as error:  # numba-cuda without a CUDA runtime to load is a RuntimeError
    raise ImportError(
        "alimm_ops.graph.select_cuda needs numba_cuda and the CUDA libraries it loads, which are not installed. "
        "Install it with: pip install 'alimm[cuda]'",
        name="numba_cuda",
    ) from error

from alimm_ops.graph import select_cuda_kernels as kernels
from alimm_ops.graph.permute import MAX_SIZE, domain_bits, key_words
from alimm_ops.graph.select_reference import SelectionStats

MAX_LEVELS = 1 << 16
MAX_BLOCKS = 1024
"""Of kernels that stride over their input."""


class Plan(NamedTuple):
    """Sizes of a selection on the device.

    Attributes:
        target: A, the number of active ids.
        table: slots of the hash table, a power of two.
        words: of 32 bits in a bitmap of the shard.
        work: 32-bit words of scratch memory.
    """

    target: int
    table: int
    words: int
    work: int


def plan(num_neighbours: int, num_labels: int, num_local: int, budget: int, levels: int) -> Plan:
    """How many ids a selection gives, and how much scratch memory it needs.

    Args:
        num_neighbours: E.
        num_labels: L.
        num_local: rows of the shard.
        budget: ids wanted.
        levels: K, above every rank.

    Raises:
        ValueError: a size is out of range.
    """
    if not 0 <= num_local <= MAX_SIZE:
        raise ValueError(f"num_local must be from 0 to {MAX_SIZE}, got {num_local}: cut the classes over more ranks")
    if budget < 0:
        raise ValueError(f"budget must be at least 0, got {budget}")
    if not 0 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels must be from 0 to {MAX_LEVELS}, got {levels}")
    if num_neighbours >= 1 << 29:
        raise ValueError(f"a selection takes fewer than 2**29 neighbours, got {num_neighbours}: use a shorter list")
    if num_labels > num_local or (num_neighbours and not num_local):
        raise ValueError(
            f"own_labels must be distinct ids, and neighbours ids, below num_local = {num_local}, got "
            f"{num_labels} labels and {num_neighbours} neighbours"
        )
    target = min(max(budget, num_labels), num_local)
    table = 1 << (2 * num_neighbours - 1).bit_length() if num_neighbours else 0
    return Plan(target, table, -(-num_local // 32), sum(_lengths(target, table, num_local, num_neighbours, levels)))


def _lengths(target: int, table: int, num_local: int, num_neighbours: int, levels: int) -> tuple[int, ...]:
    """Keys and ranks of the table, two bitmaps, counts of levels, of bins, of blocks; ids of a bin."""
    words = -(-num_local // 32)
    blocks = max(-(-target // kernels.THREADS), -(-words // kernels.THREADS))
    return table, table, words, words, levels + 1, (1 << kernels.BIN_BITS) + 1, blocks, blocks, num_neighbours


def select_active(
    neighbours: Any,
    ranks: Any,
    own_labels: Any,
    num_local: int,
    budget: int,
    key: int,
    levels: int,
    work: Any,
    active: Any,
    filled: Any,
    state: Any,
    stream: int | None = None,
) -> None:
    """Choose the active ids of a shard; see `alimm_ops.graph.select_reference.select_active`.

    Args:
        neighbours: int32 (E,), local ids of the neighbours in this shard, in any order.
        ranks: uint16 (E,), rank of each in the list of its label.
        own_labels: int32 (L,), distinct local ids of the labels in this shard.
        num_local: rows of the shard.
        budget: ids wanted.
        key: in [0, 2**64).
        levels: K, above every rank.
        work: int32, at least ``plan(...).work`` elements: scratch memory.
        active: int32 (A,), written: local ids, ascending. A is ``plan(...).target``.
        filled: uint8 (A,), written: 1 where the id was filled in at random.
        state: int32 (8,), written: what `decode_stats` reads.
        stream: address of the CUDA stream.

    Raises:
        ValueError: a size is out of range. Values out of range are found on the device: `decode_stats` raises.
    """
    num_neighbours, num_labels = math.prod(neighbours.shape), math.prod(own_labels.shape)
    sizes = plan(num_neighbours, num_labels, num_local, budget, levels)
    words, bits = key_words(key), np.uint32(domain_bits(num_local))
    target, expected = sizes.target, dict(ranks=num_neighbours, active=sizes.target, filled=sizes.target, state=8)
    for (name, length), array in zip(expected.items(), (ranks, active, filled, state), strict=True):
        if tuple(array.shape) != (length,):
            raise ValueError(f"{name} must be of shape {(length,)}, got {tuple(array.shape)}")
    if math.prod(work.shape) < sizes.work:
        raise ValueError(f"work must have at least {sizes.work} elements, got {math.prod(work.shape)}")

    on: Any = cuda.external_stream(stream) if stream else 0
    work, active, filled, state, own_labels = (_array(x) for x in (work, active, filled, state, own_labels))
    ends = np.cumsum(_lengths(target, sizes.table, num_local, num_neighbours, levels)).tolist()
    parts = [work[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    keys, best, marked, random, level_counts, bins, fill_counts, pack_counts, candidates = parts
    marked, random = marked.view(np.uint32), random.view(np.uint32)
    size, room = np.int32(num_local), np.int32(max(min(budget, num_local) - num_labels, 0))
    one = (1, kernels.THREADS, on)

    kernels.clear_kernel[(*_grid(sizes.work), on)](work[: sizes.work], active, filled, state)
    if not target and not num_neighbours:
        return
    if num_labels:
        kernels.label_kernel[(*_grid(num_labels), on)](own_labels, size, marked, state)
    if num_neighbours:
        edges = (_array(neighbours), _array(ranks))
        grid = (*_grid(sizes.table), on)
        depth = np.int32(levels)
        kernels.insert_kernel[(*_grid(num_neighbours), on)](*edges, size, depth, words, marked, keys, best, state)
        kernels.level_kernel[grid](depth, keys, best, level_counts)
        kernels.scan_kernel[one](level_counts)
        kernels.cut_kernel[(*_grid(levels), on)](level_counts, room, state)
        kernels.mark_kernel[grid](depth, words, keys, best, state, marked, bins)
        kernels.scan_kernel[one](bins)
        kernels.bin_kernel[(*_grid(bins.size), on)](bins, state)
        kernels.take_kernel[grid](depth, words, keys, best, state, marked, candidates)
        kernels.divide_kernel[(*_grid(num_neighbours), on)](words, candidates, state, marked)
    if not target:
        return
    if target > num_labels:
        blocks, wanted = -(-target // kernels.THREADS), np.int32(target)
        network = (np.uint32(num_local), bits, words, wanted)
        counts = fill_counts[:blocks]
        kernels.fill_count_kernel[blocks, kernels.THREADS, on](*network, marked, counts)
        kernels.scan_kernel[one](counts)
        kernels.fill_kernel[blocks, kernels.THREADS, on](*network, np.int32(num_labels), marked, counts, state, random)
    blocks = -(-sizes.words // kernels.THREADS)
    counts = pack_counts[:blocks]
    kernels.pack_count_kernel[blocks, kernels.THREADS, on](marked, random, counts)
    kernels.scan_kernel[one](counts)
    kernels.pack_kernel[blocks, kernels.THREADS, on](marked, random, counts, active, filled)


def decode_stats(state: NDArray[np.int32], num_labels: int, num_local: int, budget: int) -> SelectionStats:
    """Read what `select_active` left in ``state``.

    Args:
        state: on the host.
        num_labels: L.
        num_local: rows of the shard.
        budget: ids wanted.

    Raises:
        ValueError: ids or ranks were out of range, or labels repeated. The active ids are void then, though in range.
    """
    invalid = int(state[kernels.INVALID])
    if invalid:
        raise ValueError(
            f"{invalid} neighbours or labels are no local ids in [0, {num_local}), or repeat as a label, or have a "
            "rank that is not below levels: take the start of the shard off, and use the K of the graph"
        )
    num_neighbours = int(state[kernels.NEIGHBOURS])
    num_random = min(max(budget, num_labels), num_local) - num_labels - num_neighbours
    overflow = max(num_labels - budget, 0)
    return SelectionStats(num_labels, num_neighbours, num_random, overflow, int(state[kernels.CUT]) - 1)


def _grid(size: int) -> tuple[int, int]:
    return min(max(-(-size // kernels.THREADS), 1), MAX_BLOCKS), kernels.THREADS


def _array(x: Any) -> Any:
    """The array as Numba sees it, without waiting for its stream: which stream is in order, the caller knows."""
    return cuda.as_cuda_array(x, sync=False) if hasattr(x, "__cuda_array_interface__") else x
