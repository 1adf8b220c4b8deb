"""What every index of alimm can do, so that a pipeline takes one by its name in ``alimm.registry.INDEXES``.

The contract, which a method's own index keeps too:

- vectors and queries are floating NumPy arrays, one a row; ids are int64, at least 0, unique;
- scores are float32 and **larger is nearer** for every metric: cosine, inner product, minus squared distance;
- each row of a result is sorted by score, equal scores by id, smallest id first; where the index holds fewer than k
  vectors, the row ends with the id -1 and the score minus infinity;
- a mistake of the caller is a ``ValueError`` that names it, and leaves the index as it was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

T = TypeVar("T", bound="Index")

PADDING_ID = -1
"""The id where there is no further neighbour; its score is minus infinity."""


@runtime_checkable
class Index(Protocol):
    """A set of vectors that can be searched."""

    def add(self, vectors: np.ndarray, ids: np.ndarray | None = None) -> None:
        """Add vectors, shape (count, dim). Without ids they are numbered on from the largest id so far."""

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of each query: scores float32 (Q, k) and ids int64 (Q, k)."""

    def __len__(self) -> int:
        """Number of vectors."""

    def save(self, path: str | Path) -> None:
        """Write the index to a file or a folder of its own, whole or not at all."""

    @classmethod
    def open(cls: type[T], path: str | Path) -> T:
        """Read what ``save`` wrote; a ``ValueError`` names a file that is damaged."""


def check_vectors(name: str, vectors: np.ndarray, dim: int | None) -> np.ndarray:
    """Return ``vectors`` as contiguous float32 of shape (count, dim), not sharing memory that the caller may change.

    Args:
        name: what they are, for the message.
        vectors: what the user gave.
        dim: the width of the index, None if it has none yet.

    Raises:
        ValueError: another shape or type, a width that is not ``dim``, or a value that is not finite in float32.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise ValueError(f"{name} must have the shape (count, dim), got {vectors.shape}; one vector is vector[None]")
    if vectors.dtype.kind != "f":
        raise ValueError(f"{name} must be of a floating type, got {vectors.dtype}; convert with .astype(numpy.float32)")
    if dim is not None and vectors.shape[1] != dim:
        raise ValueError(f"{name} have {vectors.shape[1]} dimensions, the index has {dim}")
    with np.errstate(over="ignore"):
        result = np.array(vectors, dtype=np.float32, order="C", copy=True)
    bad = np.flatnonzero(~np.isfinite(result).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{name} row {bad[0]} holds NaN or a value beyond float32 ({len(bad)} of {len(result)} rows do)"
        )
    return result
