"""The libraries that the benchmark of binary graphs compares, behind one interface.

hnswlib and usearch are optional (``pip install hnswlib usearch``); what is missing is left out and said. hnswlib has no
Hamming distance: it searches the codes as vectors of +-1, whose squared L2 distance is 4 times the Hamming distance.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

OURS = "binary_graph"
M, EF_BUILD = 16, 80
"""Degree and width of building that every HNSW has where no sweep says otherwise."""

Codes = NDArray[np.uint64]


def as_bytes(codes: Codes) -> NDArray[np.uint8]:
    """The same codes as uint8 (N, 8 W)."""
    return np.ascontiguousarray(codes).view(np.uint8)


def as_signs(codes: Codes) -> NDArray[np.float32]:
    """Codes as float32 (N, B) of -1 and 1."""
    return np.unpackbits(as_bytes(codes), axis=1, bitorder="little").astype(np.float32) * 2 - 1


class Library:
    """One library with one configuration.

    Args:
        config: options of building; see the subclasses.
        threads: to build and search with.
    """

    module = ""
    widths: tuple[int, ...] | None = None
    """Widths of search to sweep, None for the usual ones."""
    batch_width = 1_024
    """Codes that a warm-up needs, so that all that is compiled or loaded lazily is."""

    def __init__(self, config: dict[str, Any], threads: int) -> None:
        self.config, self.threads, self.index = config, threads, None

    def build(self, base: Codes) -> None:
        """Build the index."""
        raise NotImplementedError

    def search(self, queries: Codes, k: int, width: int) -> NDArray[np.int64]:
        """Ids of the k nearest that it finds, (Q, k), -1 for none."""
        raise NotImplementedError

    def size(self) -> int:
        """Bytes of the index as the library stores it."""
        raise NotImplementedError

    def notes(self) -> dict[str, Any]:
        """What else the library says of the index."""
        return {}

    def save(self, path: Path) -> None:
        """Write the index there, for the cold start."""
        raise NotImplementedError


class BinaryGraphLibrary(Library):
    """This project. ``config``: fields of BuildConfig, and ``engine``."""

    module = "alimm.projects.binary_graph"
    batch_width = 16_384  # below about 10,000 codes there is no graph

    def build(self, base: Codes) -> None:
        """Build through the engine of the configuration, ``threads`` unless it says otherwise."""
        from alimm.projects.binary_graph import BinaryGraph, BuildConfig

        options = {key: value for key, value in self.config.items() if key not in ("engine", "run_dir")}
        self.index = BinaryGraph.build(
            base,
            config=BuildConfig(**options),
            engine=self.config.get("engine", "threads"),
            workers=self.threads,
            run_dir=self.config.get("run_dir"),
        )

    def search(self, queries: Codes, k: int, width: int) -> NDArray[np.int64]:
        """Ids."""
        return self.index.search(queries, k, ef=width, threads=self.threads)[1]

    def size(self) -> int:
        """Bytes of the folder."""
        with tempfile.TemporaryDirectory() as folder:
            self.index.save(Path(folder) / "index")
            return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())

    def save(self, path: Path) -> None:
        """Write the folder."""
        self.index.save(path)

    def notes(self) -> dict[str, Any]:
        """What the builder wrote down, and the mean degree."""
        segment = self.index._view.parts[0].segment
        return {**segment.info, "degree": len(segment.edges) / max(1, segment.num_nodes)}


class FaissLibrary(Library):
    """Common part of faiss's binary indexes."""

    module = "faiss"

    def _make(self, base: Codes) -> Any:
        raise NotImplementedError

    def _set_width(self, width: int) -> None:
        raise NotImplementedError

    def build(self, base: Codes) -> None:
        """Train where there is something to train, and add."""
        import faiss

        faiss.omp_set_num_threads(self.threads)
        self.index = self._make(base)
        self.index.add(as_bytes(base))

    def search(self, queries: Codes, k: int, width: int) -> NDArray[np.int64]:
        """Ids."""
        self._set_width(width)
        return self.index.search(as_bytes(queries), k)[1]

    def size(self) -> int:
        """Bytes of faiss's file, with the codes."""
        import faiss

        return int(faiss.serialize_index_binary(self.index).size)

    def save(self, path: Path) -> None:
        """Write faiss's file."""
        import faiss

        faiss.write_index_binary(self.index, str(path))


class FaissHNSW(FaissLibrary):
    """IndexBinaryHNSW. ``config``: ``M``, ``ef_build``."""

    def _make(self, base: Codes) -> Any:
        import faiss

        index = faiss.IndexBinaryHNSW(64 * base.shape[1], self.config.get("M", M))
        index.hnsw.efConstruction = self.config.get("ef_build", EF_BUILD)
        return index

    def _set_width(self, width: int) -> None:
        self.index.hnsw.efSearch = width


class FaissFlat(FaissLibrary):
    """IndexBinaryFlat, the exact scan."""

    widths = (0,)

    def _make(self, base: Codes) -> Any:
        import faiss

        return faiss.IndexBinaryFlat(64 * base.shape[1])

    def _set_width(self, width: int) -> None:
        pass


class FaissIVF(FaissLibrary):
    """IndexBinaryIVF with 4 sqrt(n) lists; the width is the number of lists that are scanned."""

    widths = (1, 2, 4, 8, 16, 32, 64)

    def _make(self, base: Codes) -> Any:
        import faiss

        lists = max(1, min(int(4 * len(base) ** 0.5), len(base) // 39))
        bits = 64 * base.shape[1]
        self._quantizer = faiss.IndexBinaryFlat(bits)  # the index does not keep it alive
        index = faiss.IndexBinaryIVF(self._quantizer, bits, lists)
        index.cp.niter, index.cp.seed = 10, 1
        rows = np.random.default_rng(0).permutation(len(base))[: 40 * lists]
        index.train(as_bytes(base[np.sort(rows)]))
        return index

    def _set_width(self, width: int) -> None:
        self.index.nprobe = width


class HnswlibSigns(Library):
    """hnswlib on vectors of +-1. ``config`` as of FaissHNSW."""

    module = "hnswlib"

    def build(self, base: Codes) -> None:
        """Add block by block: the vectors take 32 times the codes' memory."""
        import hnswlib

        self.index = hnswlib.Index(space="l2", dim=64 * base.shape[1])
        self.index.init_index(
            max_elements=len(base),
            M=self.config.get("M", M),
            ef_construction=self.config.get("ef_build", EF_BUILD),
            random_seed=1,
        )
        self.index.set_num_threads(self.threads)
        for start in range(0, len(base), 50_000):
            self.index.add_items(
                as_signs(base[start : start + 50_000]), np.arange(start, min(start + 50_000, len(base)))
            )

    def search(self, queries: Codes, k: int, width: int) -> NDArray[np.int64]:
        """Ids."""
        self.index.set_ef(max(width, k))
        return self.index.knn_query(as_signs(queries), k=k)[0].astype(np.int64)

    def size(self) -> int:
        """Bytes of its file."""
        return _file_size(self.save)

    def save(self, path: Path) -> None:
        """Write its file."""
        self.index.save_index(str(path))


class Usearch(Library):
    """usearch with bits and Hamming distance. ``config`` as of FaissHNSW."""

    module = "usearch"

    def build(self, base: Codes) -> None:
        """Add everything at once."""
        from usearch.index import Index

        self.index = Index(
            ndim=64 * base.shape[1],
            metric="hamming",
            dtype="b1",
            connectivity=self.config.get("M", M),
            expansion_add=self.config.get("ef_build", EF_BUILD),
        )
        self.index.add(np.arange(len(base)), as_bytes(base), threads=self.threads)

    def search(self, queries: Codes, k: int, width: int) -> NDArray[np.int64]:
        """Ids."""
        self.index.expansion_search = width
        found = self.index.search(as_bytes(queries), k, threads=self.threads)
        keys = np.asarray(found.keys).astype(np.int64).reshape(len(queries), -1)
        if keys.shape[1] < k:
            keys = np.pad(keys, ((0, 0), (0, k - keys.shape[1])), constant_values=-1)
        counts = np.asarray(getattr(found, "counts", keys.shape[1])).reshape(-1, 1)
        return np.where(np.arange(k)[None] < counts, keys, -1)

    def size(self) -> int:
        """Bytes of its file."""
        return int(self.index.serialized_length)

    def save(self, path: Path) -> None:
        """Write its file."""
        self.index.save(str(path))


LIBRARIES: dict[str, type[Library]] = {
    OURS: BinaryGraphLibrary,
    "faiss HNSW": FaissHNSW,
    "faiss IVF": FaissIVF,
    "faiss flat": FaissFlat,
    "hnswlib": HnswlibSigns,
    "usearch": Usearch,
}
"""Name -> class."""


def present(names: list[str]) -> list[str]:
    """Those libraries that are installed; says which are left out, and how to get them."""
    kept = []
    for name in names:
        if importlib.util.find_spec(LIBRARIES[name].module.split(".")[0]) is None:
            print(f"{name} is left out: pip install 'alimm[rivals]' brings {LIBRARIES[name].module}")
        else:
            kept.append(name)
    return kept


def _file_size(save: Callable[[Path], None]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "index")
        return (Path(folder) / "index").stat().st_size
