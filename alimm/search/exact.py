"""Exact nearest neighbours: faiss finds candidates at full speed, double precision decides among them.

faiss computes in float32, and the last digits of a score depend on the batch, the block and the processor; equal scores
come in any order. So faiss is asked for a few more neighbours than wanted, their scores are computed again in double
precision and rounded once, and the rows are sorted by (score, id). The error of faiss has a bound: a row whose last
candidate comes within it of the k-th score may lack somebody, and is searched again over all vectors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from alimm.registry import INDEXES
from alimm.search.index import PADDING_ID, check_vectors
from alimm.search.storage import read_vectors, write_vectors

METRICS = ("cosine", "ip", "l2")
UNIT = 2.0**-24
"""Largest relative error of one rounding to float32."""
LEAST = 2.0**-149
"""Smallest positive float32: the error of a rounding near zero."""


@INDEXES.register_module()
class ExactIndex:
    """Compares a query with every vector. Keeps the contract of ``alimm.search.Index``.

    Results depend only on the vectors and the query: not on the batch, the number of threads or the order of adding.
    Under the cosine a zero vector, stored or asked for, has the score 0 with everything.

    Args:
        dim: width of the vectors; None takes that of the first ones added.
        metric: ``'cosine'``, ``'ip'`` (inner product) or ``'l2'`` (scores are minus the squared distance).
        block_bytes: memory for the second look, in bytes.
    """

    def __init__(self, dim: int | None = None, metric: str = "cosine", block_bytes: int = 64 << 20) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if dim is not None and dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim, self.metric, self.block_bytes = dim, metric, block_bytes
        self._parts: list[np.ndarray] = []
        self._ids = np.empty(0, dtype=np.int64)
        self._longest = 0.0  # length of the longest vector, for the bound of the error

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> np.ndarray:
        """The ids, in the order of adding."""
        return self._ids.copy()

    @property
    def vectors(self) -> np.ndarray:
        """The vectors as compared (of length one under the cosine), float32 (N, dim), in the order of adding."""
        return self._vectors().copy()

    def _vectors(self) -> np.ndarray:
        if len(self._parts) != 1:
            self._parts = [np.concatenate([np.empty((0, self.dim or 1), dtype=np.float32), *self._parts])]
        return self._parts[0]

    def add(self, vectors: np.ndarray, ids: np.ndarray | None = None) -> None:
        """Add vectors.

        Args:
            vectors: floating, shape (count, dim).
            ids: whole numbers of at least 0, none of them in the index yet; None numbers on from the largest so far.

        Raises:
            ValueError: vectors or ids that do not fit. Nothing is added then.
        """
        vectors = self._prepared("vectors", vectors)
        if ids is None:
            start = int(self._ids.max()) + 1 if len(self) else 0
            new_ids = np.arange(start, start + len(vectors), dtype=np.int64)
        else:
            new_ids = self._checked_ids(np.asarray(ids), len(vectors))
        self.dim = vectors.shape[1]
        self._parts = [part for part in self._parts if len(part)] + [vectors]
        self._ids = np.concatenate([self._ids, new_ids])
        self._longest = max(self._longest, _lengths(vectors).max(initial=0.0))

    def _checked_ids(self, ids: np.ndarray, count: int) -> np.ndarray:
        if ids.shape != (count,) or (count and ids.dtype.kind not in "iu"):
            raise ValueError(f"ids must be {count} whole numbers, got {ids.dtype} of shape {ids.shape}")
        if count and (ids.min() < 0 or ids.max() > np.iinfo(np.int64).max):
            raise ValueError(f"ids must be from 0 to 2**63 - 1, got {ids.min()} to {ids.max()}")
        ids = ids.astype(np.int64)
        values, counts = np.unique(ids, return_counts=True)
        taken = np.union1d(values[counts > 1], np.intersect1d(values, self._ids))
        if len(taken):
            raise ValueError(
                f"ids must be unique; {len(taken)} are given twice or in the index already, e.g. {taken[0]}"
            )
        return ids

    def _prepared(self, name: str, vectors: np.ndarray) -> np.ndarray:
        vectors = check_vectors(name, vectors, self.dim)
        if self.metric == "cosine":
            wide = vectors.astype(np.float64)
            length = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
            vectors = (wide / np.where(length > 0, length, 1.0)).astype(np.float32)
        return vectors

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest of each query.

        Args:
            queries: floating, shape (Q, dim).
            k: at least 1; may be more than the index holds.

        Returns:
            Scores (float32, larger is nearer) and ids (int64), both (Q, k), best first, equal scores by id. Past the
            end of the index the id is -1 and the score minus infinity.

        Raises:
            ValueError: queries of another width or type or with NaN, or a k below 1.
        """
        if not isinstance(k, (int, np.integer)) or k < 1:
            raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
        queries = self._prepared("queries", queries)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        ids = np.full((len(queries), k), PADDING_ID, dtype=np.int64)
        wanted = min(int(k), len(self))
        if wanted and len(queries):
            # faiss keeps a heap of the candidates: twice as many cost little, and leave room for ties.
            width = min(len(self), wanted + max(16, wanted))
            rows = max(1, self.block_bytes // (8 * width * queries.shape[1]))
            for start in range(0, len(queries), rows):
                block = slice(start, start + rows)
                scores[block, :wanted], ids[block, :wanted] = self._search_block(queries[block], wanted, width)
        return scores, ids

    def _search_block(self, queries: np.ndarray, k: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        import faiss  # 0.4 s: only who searches pays

        vectors = self._vectors()
        metric = faiss.METRIC_L2 if self.metric == "l2" else faiss.METRIC_INNER_PRODUCT
        rough, rows = faiss.knn(queries, vectors, width, metric=metric)
        rough = -rough if self.metric == "l2" else rough
        # Where a product overflowed in float32, faiss may have found no row at all: such queries are searched again.
        complete = np.isfinite(rough).all(axis=1) & (rows >= 0).all(axis=1)
        scores, ids = self._ranked(queries, np.where(rows < 0, 0, rows), k)
        if width < len(self):
            complete &= rough[:, -1] + 2 * self._error_bound(queries) < scores[:, -1]
        for row in np.flatnonzero(~complete):
            scores[row], ids[row] = self._search_all(queries[row], k)
        return scores, ids

    def _error_bound(self, queries: np.ndarray) -> np.ndarray:
        """How far a score of faiss can be from the true one, for each query (the bound of a sum of dim products)."""
        lengths = _lengths(queries)
        size = (lengths + self._longest) ** 2 if self.metric == "l2" else lengths * self._longest
        return (queries.shape[1] + 8) * (UNIT * size + LEAST)

    def _exact_scores(self, query: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Scores of the last two axes in double precision, rounded once to float32."""
        wide = vectors.astype(np.float64)
        if self.metric == "l2":
            wide -= query
            exact = 0.0 - np.einsum("...d,...d->...", wide, wide)  # never -0.0
        else:
            exact = np.einsum("...d,...d->...", wide, query.astype(np.float64))
        with np.errstate(over="ignore"):  # a score beyond float32 is infinite
            return exact.astype(np.float32)

    def _ranked(self, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        exact = self._exact_scores(queries[:, None, :], self._vectors()[rows])
        ids = self._ids[rows]
        order = np.lexsort((ids, -exact), axis=1)[:, :k]
        return np.take_along_axis(exact, order, axis=1), np.take_along_axis(ids, order, axis=1)

    def _search_all(self, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        vectors = self._vectors()
        rows = max(1, self.block_bytes // (8 * len(query)))
        blocks = [self._exact_scores(query, vectors[i : i + rows]) for i in range(0, len(vectors), rows)]
        exact = np.concatenate(blocks)
        kth = np.partition(exact, len(exact) - k)[len(exact) - k]
        near = np.flatnonzero(exact >= kth)
        near = near[np.lexsort((self._ids[near], -exact[near]))][:k]
        return exact[near], self._ids[near]

    def save(self, path: str | Path) -> None:
        """Write the index to one file. A kill leaves either the old file or the new one."""
        write_vectors(Path(path), {"metric": self.metric, "dim": self.dim}, self._ids, self._vectors())

    @classmethod
    def open(cls, path: str | Path) -> ExactIndex:
        """Read an index.

        Raises:
            ValueError: the file is missing, is no index or is damaged. The message names it.
        """
        header, ids, vectors = read_vectors(Path(path))
        try:
            index = cls(dim=header["dim"], metric=header["metric"])
            if index.dim not in (None, vectors.shape[1]):
                raise ValueError(f"its header says {index.dim} dimensions, its vectors have {vectors.shape[1]}")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no exact index that this version reads: {error}") from error
        index._ids = ids
        index._parts = [vectors]
        index._longest = _lengths(vectors).max(initial=0.0)
        return index


def _lengths(vectors_ND: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("nd,nd->n", vectors_ND, vectors_ND, dtype=np.float64))
