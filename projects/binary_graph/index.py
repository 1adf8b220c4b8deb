"""The index of the registry: float vectors are hashed, found by their codes, and ranked anew by their features.

Codes are short and coarse, so the graph is asked for more candidates than wanted, and the candidates are compared with
the query in full: Binary Distributed Graph (CIKM 2019) wins back by that what the codes lose.
"""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph import index_files
from alimm.projects.binary_graph.array_files import MissingFileError, check_verify
from alimm.projects.binary_graph.feature_table import FEATURE_TYPES, FeatureTable, as_features, unit_length
from alimm.projects.binary_graph.hashers import HASHERS, Hasher, load_hasher, make_hasher
from alimm.projects.binary_graph.linear_hasher import LinearHasher
from alimm.projects.binary_graph.packing import words_of
from alimm.registry import INDEXES
from alimm.search.exact import METRICS
from alimm.search.index import PADDING_ID, check_vectors

if TYPE_CHECKING:
    from alimm.projects.binary_graph.graph import BinaryGraph

FEW_VECTORS = 1000
"""A hash that was learned on fewer is warned of."""
_BLOCK_BYTES = 64 << 20


@INDEXES.register_module()
class BinaryGraphIndex:
    """Approximate search of float vectors by binary codes. Keeps the contract of ``alimm.search.Index``.

    With ``candidates`` of at least the number of vectors the result is that of `alimm.ExactIndex`. Otherwise it depends
    on the hash how near the codes of near vectors are: `balance_report` judges codes, ``candidates`` buys recall. Codes
    know angles about the mean, not lengths: under ``'ip'`` vectors of very different lengths need many candidates.

    Args:
        dim: width of the vectors; None takes that of the first ones added.
        metric: ``'cosine'``, ``'ip'`` (inner product) or ``'l2'`` (scores are minus the squared distance).
        hasher: ``'itq'``, ``'lph'``, ``'pca'`` or ``'srp'``, which is learned from the first vectors added or by `fit`;
            the path of the ``.npz`` file of a hasher; or a hasher, which is learned only if it has not been yet.
        bits: length of the codes; of no effect where a hasher is given.
        seed: of the hasher; of no effect where a hasher is given.
        candidates: neighbours by code that are compared in full, for each query; raised to k.
        ef: width of the beam in the graph; None and what is less: the number of candidates.
        feature_dtype: ``'float32'``, or ``'float16'`` to halve the memory of the features, which rounds the scores.
        threads: queries are split among so many in the graph.
        graph: options of `BuildConfig`.
        workers: threads that build the graph; None takes the CPUs that this process may use.
    """

    def __init__(
        self,
        dim: int | None = None,
        metric: str = "cosine",
        hasher: str | Hasher = "itq",
        bits: int = 256,
        seed: int = 0,
        candidates: int = 100,
        ef: int | None = None,
        feature_dtype: str = "float32",
        threads: int = 1,
        graph: dict[str, Any] | None = None,
        workers: int | None = None,
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if feature_dtype not in FEATURE_TYPES:
            raise ValueError(f"feature_dtype must be one of {', '.join(FEATURE_TYPES)}, got {feature_dtype!r}")
        for name, value in (("dim", dim), ("candidates", candidates), ("ef", ef), ("threads", threads)):
            if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        words_of(bits)
        if isinstance(hasher, str):
            hasher = load_hasher(hasher) if hasher.endswith(".npz") else make_hasher(hasher, bits, seed)
        elif not isinstance(hasher, Hasher):
            raise ValueError(f"hasher must be a name ({', '.join(HASHERS)}), a path or a Hasher, got {hasher!r}")
        if None not in (dim, hasher.dim) and dim != hasher.dim:
            raise ValueError(f"the hasher was fitted on {hasher.dim} dimensions, the index is to have {dim}")
        self.dim = hasher.dim if dim is None else int(dim)
        self.metric, self.hasher, self.feature_dtype = metric, hasher, feature_dtype
        self.candidates, self.ef, self.threads, self.workers = candidates, ef, threads, workers
        self.graph_options = dict(graph or {})
        self._graph: BinaryGraph | None = None
        self._table = FeatureTable.empty(self.dim or 1, feature_dtype)
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._table)

    @property
    def ids(self) -> NDArray[np.int64]:
        """The ids, ascending."""
        return self._table.rows()[1].copy()

    def fit(self, vectors: NDArray[Any]) -> None:
        """Learn the hash from a sample (count, dim) before any vector is added, e.g. where they come in small parts.

        Raises:
            ValueError: vectors that do not fit, or the index holds some already.
        """
        with self._lock:
            if len(self):
                raise ValueError("the hash cannot change once vectors are in the index: make a new index")
            vectors = self._prepared("vectors", vectors)
            hasher = copy.deepcopy(self.hasher)
            hasher.fit(vectors)
            self.hasher, self.dim = hasher, vectors.shape[1]

    def add(self, vectors: NDArray[Any], ids: NDArray[Any] | None = None) -> None:
        """Add vectors.

        Args:
            vectors: floating, shape (count, dim).
            ids: whole numbers of at least 0, none of them in the index yet; None numbers on from the largest so far.

        Raises:
            ValueError: vectors or ids that do not fit. Nothing is added then.
        """
        with self._lock:
            vectors = self._prepared("vectors", vectors)
            features = as_features(vectors, self.feature_dtype)
            new_ids = self._table.new_ids(ids, len(vectors))
            if not len(vectors):
                self.dim = vectors.shape[1]
                return
            hasher = self.hasher
            if hasher.dim is None:
                if len(vectors) < FEW_VECTORS:
                    warnings.warn(
                        f"the hash is learned from {len(vectors)} vectors only; call fit() with a sample of some "
                        "thousand before the first add() for a better recall",
                        stacklevel=2,
                    )
                hasher = copy.deepcopy(hasher)
                hasher.fit(vectors)
            codes = hasher.encode(vectors)
            if self._graph is None:
                self._graph = self._build(codes, new_ids)
            else:
                self._graph.add(codes, new_ids)
            self.hasher, self.dim = hasher, vectors.shape[1]
            self._table.add(features, new_ids)

    def _build(self, codes: NDArray[np.uint64], ids: NDArray[np.int64] | None) -> BinaryGraph:
        from alimm.projects.binary_graph.config import BuildConfig
        from alimm.projects.binary_graph.graph import BinaryGraph

        return BinaryGraph.build(codes, ids, config=BuildConfig(**self.graph_options), workers=self.workers)

    def _prepared(self, name: str, vectors: NDArray[Any]) -> NDArray[np.float32]:
        vectors = check_vectors(name, vectors, self.dim)
        return unit_length(vectors) if self.metric == "cosine" else vectors

    def search(self, queries: NDArray[Any], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find about the k nearest of each query.

        Args:
            queries: floating, shape (Q, dim).
            k: at least 1; may be more than the index holds.

        Returns:
            Scores (float32, larger is nearer) and ids (int64), both (Q, k), best first, equal scores by id. Where fewer
            were found, the id is -1 and the score minus infinity.

        Raises:
            ValueError: queries of another width or type or with NaN, or a k below 1.
        """
        if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1:
            raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
        queries = self._prepared("queries", queries)
        with self._lock:
            (features, ids), graph = self._table.rows(), self._graph
        scores = np.full((len(queries), k), -np.inf, np.float32)
        found = np.full((len(queries), k), PADDING_ID, np.int64)
        wanted = min(int(k), len(ids))
        if not wanted or not len(queries):
            return scores, found
        width = min(len(ids), max(self.candidates, wanted))
        rows = max(1, _BLOCK_BYTES // (8 * width))
        for start in range(0, len(queries), rows):
            block = slice(start, start + rows)
            found_rows = self._candidates(graph, queries[block], ids, width)
            scores[block, :wanted], best = self._ranked(queries[block], features, found_rows, wanted)
            found[block, :wanted] = np.where(best < 0, PADDING_ID, ids[best])
        return scores, found

    def _candidates(
        self, graph: BinaryGraph | None, queries: NDArray[np.float32], ids: NDArray[np.int64], width: int
    ) -> NDArray[np.int64]:
        """Rows to compare with each query, (Q, width), -1 pads."""
        if width == len(ids):
            return np.tile(np.arange(width, dtype=np.int64), (len(queries), 1))
        assert graph is not None
        ef = max(width, self.ef or 0)
        _, near = graph.search(self.hasher.encode(queries), width, ef=ef, threads=self.threads)
        rows = np.searchsorted(ids, near).clip(max=len(ids) - 1)
        # The graph is a moment newer where another thread adds: what is not in the table is left out.
        return np.where(ids[rows] == near, rows, -1)

    def _ranked(
        self, queries: NDArray[np.float32], features: NDArray[Any], rows: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        from alimm_ops.graph.rerank_cpu import rerank

        # In float32 the features have length one already, as those of ExactIndex; rounded to float16 no longer.
        metric = "ip" if self.metric == "cosine" and self.feature_dtype == "float32" else self.metric
        scores, best = rerank(queries, features, rows, k, metric)
        return scores, best

    def save(self, path: str | Path) -> None:
        """Write the index to a folder of its own, whole or not at all.

        Args:
            path: new or empty, or an index of this kind, which is replaced.

        Raises:
            ValueError: the folder holds something else; or the hasher is of a class of your own, which cannot be read.
        """
        hasher = self.hasher
        if not isinstance(hasher, LinearHasher) or HASHERS.get(hasher.name) is not type(hasher):
            raise ValueError(f"a hasher of class {type(hasher).__name__} cannot be saved, only {', '.join(HASHERS)}")
        with self._lock:
            options = dict(
                dim=self.dim, metric=self.metric, candidates=self.candidates, ef=self.ef, threads=self.threads,
                feature_dtype=self.feature_dtype, graph=self.graph_options, workers=self.workers, hasher=hasher.name,
                bits=hasher.bits, seed=hasher.seed,
            )  # fmt: skip
            index_files.write_index(Path(path), options, self._fill)

    def _fill(self, data: Path) -> dict[str, Any]:
        files: dict[str, Any] = {}
        if self.hasher.dim is not None:
            self.hasher.save(data / "hasher.npz")
            files["hasher"] = index_files.checksum(data / "hasher.npz")
        if self._graph is not None:
            files |= index_files.write_features(data, *self._table.rows())
            self._graph.save(data / "graph")
        return files

    @classmethod
    def open(cls, path: str | Path, verify: str = "full") -> BinaryGraphIndex:
        """Read an index. Its arrays are mapped; what is added later stays in memory until it is saved.

        Args:
            path: what was given to `save`.
            verify: ``'full'`` reads every byte; ``'header'`` checks only what a search relies on, and opens at once.

        Raises:
            ValueError: there is no index, or it is damaged. The message names the file.
        """
        check_verify(verify)
        path = Path(path)
        for attempt in range(3):
            try:
                return cls._open(path, verify)
            except MissingFileError:
                # Another process may have saved anew, and removed the former data, while they were opened.
                if attempt == 2:
                    raise
        raise AssertionError

    @classmethod
    def _open(cls, path: Path, verify: str) -> BinaryGraphIndex:
        from alimm.projects.binary_graph.graph import BinaryGraph

        with index_files.reading(path) as (data, options, files):
            hasher: Any = options.pop("hasher")
            bits, seed = options.pop("bits"), options.pop("seed")
            if "hasher" in files:
                index_files.check_file(data / "hasher.npz", files["hasher"])
                hasher = load_hasher(data / "hasher.npz")
            index = cls(hasher=hasher, bits=bits, seed=seed, **options)
            if "ids" in files:
                index._table = FeatureTable(
                    *index_files.read_features(data, files, index.feature_dtype, index.dim or 1, verify)
                )
                saved = BinaryGraph.open(data / "graph", verify=verify, read_only=True)
                if saved.bits != index.hasher.bits or len(saved) != len(index):
                    raise ValueError(f"its graph has {len(saved)} rows of {saved.bits} bits, not {len(index)}")
                # The folder is as it was saved; what is added to the index must not be written to it.
                index._graph = index._build(np.empty((0, saved.bits // 64), np.uint64), None)
                index._graph.merge(saved)
            return index
