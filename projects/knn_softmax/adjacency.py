"""The graph of classes on many ranks: two ways to store it, one interface, the same answers.

A rank asks for the neighbours of the labels of the global batch that lie **in its own shard** (they become active
there). The lists are built by the owner of a label, so their edges point into all shards. Either

* `LocalEdges` exchanges them once: each rank keeps the edges that *end* in its shard, for all N labels (the compression
  for quick access of KNN softmax; Song et al., KDD 2020). Asking costs no communication. Bytes on a rank::

      2 N  +  8 (ceil(N / 256) + 1)  +  4 E  +  r E        E = edges into the shard, N K / P on average
      degree  offset every 256 labels   local id  rank     r = 0 with one rank, 1 for K <= 256, else 2

* `OwnerLists` keeps the lists where they are, ``b N K / P`` bytes (b = 4, or 8 where N >= 2**31), and exchanges the U K
  ids of a batch when asked. It holds nothing of length N, which counts once P is near K or above.

The full text of the paper was not at hand; that a rank keeps only edges into its shard is what is known of it. The
layout is ours: an offset of 8 bytes for each label would take more room than the edges once P is near K, so we keep
degrees of 2 bytes and one offset for 256 of them.

Shapes: N classes in all, P ranks, n = N / P own ones, K length of a list, U labels of the global batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from alimm.distributed.collectives import gather_counts, gather_known, raise_together
from alimm.distributed.shards import Sharding
from alimm_ops.graph import edges_cpu as kernels

CHUNK_IDS = 1 << 22
"""Ids of own lists that one exchange sends: it bounds the extra memory while edges are built."""

MAX_LENGTH = 2**16 - 1
"""Longest list: degrees are uint16."""


class Edges(NamedTuple):
    """Neighbours of U labels in the own shard, what `alimm_ops.graph.select_cpu.select_active` takes.

    Attributes:
        indptr: int64 (U + 1,), where the edges of each label begin.
        local_ids: int32 (E,), label after label, nearest first.
        ranks: uint16 (E,), rank of each in the list of its label, 0 for the nearest.
    """

    indptr: NDArray[np.int64]
    local_ids: NDArray[np.int32]
    ranks: NDArray[np.uint16]


class Adjacency(Protocol):
    """What both ways of storing have in common."""

    @property
    def nbytes(self) -> int:
        """Bytes that this rank keeps."""
        ...

    def neighbours(self, label_rows: torch.Tensor | NDArray[np.int64]) -> Edges:
        """The neighbours in the own shard of labels anywhere; every rank must ask for the same labels."""
        ...

    def lists(self) -> torch.Tensor:
        """The lists of the own labels (n, K), as they were given; every rank must call."""
        ...


class OwnerLists:
    """The lists stay with the owners of their labels; asking is collective.

    Args:
        neighbours: int32 or int64 (n, K), global rows, nearest first; -1 fills up at the end. Kept, not copied.
        sharding: the shards of the classes.

    Raises:
        ValueError: on all ranks, where the lists of any of them are malformed.
    """

    def __init__(self, neighbours: torch.Tensor, sharding: Sharding) -> None:
        _check_lists(neighbours, sharding)
        self._lists, self._sharding = neighbours.contiguous(), sharding

    @property
    def nbytes(self) -> int:
        """Bytes that this rank keeps."""
        return self._lists.numel() * self._lists.element_size()

    def neighbours(self, label_rows: torch.Tensor | NDArray[np.int64]) -> Edges:
        """The neighbours in the own shard of labels anywhere. Collective: one exchange of U K ids.

        Args:
            label_rows: int64 (U,), global rows, the same on every rank.

        Raises:
            ValueError: rows that are not int64, or outside [0, N).
        """
        rows = torch.from_numpy(_check_rows(label_rows, self._sharding.shards.num_rows))
        shards, rank = self._sharding.shards, self._sharding.rank
        owners = shards.owner(rows)
        own = (rows[owners == rank] - shards.start(rank)).to(self._lists.device)
        counts = torch.bincount(owners, minlength=shards.world_size).tolist()
        by_owner = torch.cat(gather_known(self._lists[own], counts, self._sharding.group)).cpu()
        in_order = torch.empty_like(by_owner)
        in_order[torch.argsort(owners, stable=True)] = by_owner
        return Edges(*kernels.own_edges(in_order.numpy(), shards.start(rank), shards.stop(rank)))

    def lists(self) -> torch.Tensor:
        """The lists of the own labels, (n, K)."""
        return self._lists


class LocalEdges:
    """The edges into the own shard, on the host; asking needs no communication.

    Building is collective. Where lists are on a GPU, the exchanges go through it (NCCL), and edges come to the host.

    Args:
        neighbours: int32 or int64 (n, K), global rows, nearest first; -1 fills up at the end. Not kept.
        sharding: the shards of the classes.
        chunk_ids: ids of own lists that one exchange sends.

    Raises:
        ValueError: on all ranks, where the lists of any of them are malformed.
    """

    def __init__(self, neighbours: torch.Tensor, sharding: Sharding, chunk_ids: int = CHUNK_IDS) -> None:
        _check_lists(neighbours, sharding)
        self._sharding, self._device, self._dtype = sharding, neighbours.device, neighbours.dtype
        self._length = int(neighbours.shape[1])
        self._chunk_rows = max(1, chunk_ids // self._length)
        shards, bounds = sharding.shards, np.array(sharding.shards.bounds)
        own = neighbours.detach()

        counted = [kernels.count_edges(self._host(own[part]), bounds) for part in self._own_parts()]
        empty = np.zeros((shards.world_size, 0), np.uint16)
        degree = np.concatenate([empty, *counted], axis=1)
        del counted
        self._degree = self._exchange(degree.reshape(-1), [sharding.size] * shards.world_size, list(shards.sizes))
        self._before = kernels.block_offsets(self._degree)
        self._ids = np.empty(self._before[-1], np.int32)
        self._ranks = np.empty(self._before[-1] if shards.world_size > 1 else 0, self._rank_type)
        for number in range(self._num_parts()):
            part = self._host(own[self._part(sharding.rank, number, local=True)])
            ids, ranks = np.empty(part.size, np.int32), np.empty(part.size, self._rank_type)
            sent = kernels.pack_edges(part, bounds, ids, ranks).tolist()
            places = [self._edge_range(self._part(source, number)) for source in range(shards.world_size)]
            received = [place.stop - place.start for place in places]
            self._store(self._ids, self._exchange(ids[: sum(sent)], sent, received), places)
            if shards.world_size > 1:
                self._store(self._ranks, self._exchange(ranks[: sum(sent)], sent, received), places)

    @property
    def nbytes(self) -> int:
        """Bytes that this rank keeps; see `edge_bytes`."""
        return self._degree.nbytes + self._before.nbytes + self._ids.nbytes + self._ranks.nbytes

    @property
    def num_edges(self) -> int:
        """E, the edges into the own shard."""
        return len(self._ids)

    def neighbours(self, label_rows: torch.Tensor | NDArray[np.int64]) -> Edges:
        """The neighbours in the own shard of labels anywhere; without communication.

        Args:
            label_rows: int64 (U,), global rows.

        Raises:
            ValueError: rows that are not int64, or outside [0, N).
        """
        rows = _check_rows(label_rows, self._sharding.shards.num_rows)
        return Edges(*kernels.find_edges(rows, self._degree, self._before, self._ids, self._ranks))

    def lists(self) -> torch.Tensor:
        """The lists of the own labels (n, K), as they were given, on their device. Collective; for checkpoints."""
        shards, rank = self._sharding.shards, self._sharding.rank
        kind = np.int32 if self._dtype == torch.int32 else np.int64
        result = np.full((self._sharding.size, self._length), -1, kind)
        for number in range(self._num_parts()):
            asked = [self._part(owner, number) for owner in range(shards.world_size)]
            edges = [self.neighbours(np.arange(part.start, part.stop)) for part in asked]
            rows = [part.stop - part.start for part in asked]
            degree = self._exchange(
                np.concatenate([self._degree[part] for part in asked]), rows, [rows[rank]] * shards.world_size
            ).reshape(shards.world_size, rows[rank])
            sent, received = [len(part.ranks) for part in edges], degree.sum(axis=1, dtype=np.int64).tolist()
            ids = self._exchange(np.concatenate([part.local_ids for part in edges]), sent, received)
            ranks = self._exchange(
                np.concatenate([part.ranks for part in edges]).astype(self._rank_type), sent, received
            )
            part, first = result[self._part(rank, number, local=True)], 0
            for source, count in enumerate(received):
                end = first + count
                kernels.place_edges(part, degree[source], ids[first:end], ranks[first:end], shards.start(source))
                first = end
        return torch.from_numpy(result).to(self._device)

    @property
    def _rank_type(self) -> type[np.unsignedinteger[Any]]:
        return np.uint8 if self._length <= 256 else np.uint16

    def _num_parts(self) -> int:
        """Exchanges that the longest shard needs; every rank takes part in all of them."""
        return -(-max(self._sharding.shards.sizes) // self._chunk_rows)

    def _part(self, rank: int, number: int, local: bool = False) -> slice:
        """The labels of a rank that an exchange is about, as global rows or as local ids; perhaps none."""
        size, start = self._sharding.shards.size(rank), 0 if local else self._sharding.shards.start(rank)
        first = min(number * self._chunk_rows, size)
        return slice(start + first, start + min(first + self._chunk_rows, size))

    def _own_parts(self) -> list[slice]:
        return [self._part(self._sharding.rank, number, local=True) for number in range(self._num_parts())]

    def _edge_range(self, labels: slice) -> slice:
        """Where the edges of consecutive labels are stored."""
        first, last = (kernels.edge_offset(self._degree, self._before, row) for row in (labels.start, labels.stop))
        return slice(int(first), int(last))

    @staticmethod
    def _store(array: NDArray[Any], values: NDArray[Any], places: list[slice]) -> None:
        first = 0
        for place in places:
            end = first + place.stop - place.start
            array[place] = values[first:end]
            first = end

    @staticmethod
    def _host(tensor: torch.Tensor) -> NDArray[Any]:
        array: NDArray[Any] = tensor.contiguous().cpu().numpy()
        return array

    def _exchange(self, values: NDArray[Any], sent: list[int], received: list[int]) -> NDArray[Any]:
        """Send consecutive pieces to the ranks; return what they sent, by rank. As bytes: gloo knows no uint16."""
        if self._sharding.world_size == 1:
            return values
        width = values.itemsize
        source = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8)).to(self._device)
        target = torch.empty(sum(received) * width, dtype=torch.uint8, device=self._device)
        lengths = [count * width for count in received], [count * width for count in sent]
        dist.all_to_all_single(target, source, *lengths, group=self._sharding.group)
        array: NDArray[Any] = target.cpu().numpy().view(values.dtype)
        return array


def edge_bytes(num_rows: int, num_edges: int, length: int, world_size: int) -> int:
    """Bytes of `LocalEdges` on a rank.

    Args:
        num_rows: N.
        num_edges: E, edges into the shard.
        length: K.
        world_size: P.
    """
    rank_bytes = 0 if world_size == 1 else 1 if length <= 256 else 2
    return 2 * num_rows + 8 * (-(-num_rows // kernels.BLOCK) + 1) + (4 + rank_bytes) * num_edges


def _check_lists(neighbours: torch.Tensor, sharding: Sharding) -> None:
    """Refuse lists that kernels cannot work with, on all ranks at once."""
    shards, message = sharding.shards, None
    if neighbours.dtype not in (torch.int32, torch.int64) or neighbours.dim() != 2:
        message = f"neighbours must be int32 or int64 (n, K), got {neighbours.dtype} {tuple(neighbours.shape)}"
    elif len(neighbours) != sharding.size:
        message = f"neighbours must have a list for each of the {sharding.size} own rows, got {len(neighbours)}"
    elif not 1 <= neighbours.shape[1] <= MAX_LENGTH:
        message = f"lists must have 1 to {MAX_LENGTH} neighbours, got {neighbours.shape[1]}"
    elif max(shards.sizes) >= 2**31:
        message = f"a shard must have fewer than 2**31 rows, got {max(shards.sizes)}: use more ranks"
    else:
        bad = int(kernels.first_bad_list(neighbours.detach().contiguous().cpu().numpy(), shards.num_rows))
        if bad >= 0:
            message = (
                f"a list must hold rows in [0, {shards.num_rows}), and -1 only behind them, "
                f"got {neighbours[bad].tolist()} for row {sharding.start + bad}"
            )
    raise_together(message, sharding.group, neighbours.device)
    if sharding.world_size > 1:
        lengths = gather_counts(int(neighbours.shape[1]), neighbours.device, sharding.group)
        if len(set(lengths)) > 1:
            raise ValueError(f"lists must have the same length K on every rank, got {lengths} by rank")


def _check_rows(label_rows: torch.Tensor | NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    rows = label_rows.detach().cpu().numpy() if isinstance(label_rows, torch.Tensor) else label_rows
    if rows.dtype != np.int64 or rows.ndim != 1:
        raise ValueError(f"label_rows must be int64 with one dimension, got {rows.dtype} {rows.shape}")
    if len(rows) and not (rows.min() >= 0 and rows.max() < num_rows):
        raise ValueError(f"label_rows must lie in [0, {num_rows}), got rows from {rows.min()} to {rows.max()}")
    return np.ascontiguousarray(rows)
