"""Float features and their ids, ascending by id: then the order of the rows is the order of equal scores."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.updates import LARGEST_ID, check_ids, check_unique, some

FEATURE_TYPES = ("float32", "float16")


class FeatureTable:
    """Rows that are added in parts and joined when they are asked for.

    Args:
        features: (N, D), float32 or float16.
        ids: int64 (N,), ascending, unique.
    """

    def __init__(self, features: NDArray[Any], ids: NDArray[np.int64]) -> None:
        self._table = (features, ids)
        self._new: list[tuple[NDArray[Any], NDArray[np.int64]]] = []
        self._lock = threading.Lock()

    @classmethod
    def empty(cls, dim: int, dtype: str) -> FeatureTable:
        """No rows."""
        return cls(np.empty((0, dim), dtype), np.empty(0, np.int64))

    def __len__(self) -> int:
        with self._lock:
            return len(self._table[1]) + sum(len(ids) for _, ids in self._new)

    def rows(self) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Features and ids; neither is written again."""
        with self._lock:
            if self._new:
                parts = ([self._table] if len(self._table[1]) else []) + self._new
                features, ids = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
                if not (ids[1:] > ids[:-1]).all():
                    order = np.argsort(ids)
                    features, ids = features[order], ids[order]
                self._table, self._new = (features, ids), []
            return self._table

    def new_ids(self, ids: Any, count: int) -> NDArray[np.int64]:
        """Ids for rows to add: those given, checked, or numbers from the largest so far on.

        Raises:
            ValueError: ids of a wrong kind, given twice or in the table.
        """
        held = self.rows()[1]
        if ids is None:
            start = int(held[-1]) + 1 if len(held) else 0
            if start + count - 1 > LARGEST_ID:
                raise ValueError(f"there are no {count} numbers after id {start - 1}: give ids of your own")
            return np.arange(count, dtype=np.int64) + start
        ids = check_ids(ids, count)
        check_unique(ids)
        taken = np.intersect1d(ids, held)
        if len(taken):
            raise ValueError(f"ids must be unique; {len(taken)} are in the index already, e.g. {some(taken)}")
        return ids

    def add(self, features: NDArray[Any], ids: NDArray[np.int64]) -> None:
        """Add rows with ids from `new_ids`."""
        with self._lock:
            self._new.append((features, ids))


def as_features(vectors: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Vectors as they are kept.

    Raises:
        ValueError: a value that float16 does not reach.
    """
    with np.errstate(over="ignore"):
        features = vectors.astype(dtype, copy=False)
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ValueError(f"vectors row {bad[0]} holds a value beyond float16: scale them, or take float32")
    return features


def unit_length(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors scaled to length one in double precision, as `alimm.ExactIndex` does; zero vectors stay."""
    wide = vectors.astype(np.float64)
    length = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    return (wide / np.where(length > 0, length, 1.0)).astype(np.float32)
