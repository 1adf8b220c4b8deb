"""Codes that the benchmark of binary graphs searches: made ones with a known structure, kept as .npy in a cache folder.

A made code is ``sign(z P)`` with ``z = centre + noise * N(0, I)`` in ``intrinsic`` dimensions and a Gaussian projection
P onto the bits: the neighbours of a code lie on a surface of few dimensions, as those of learned codes do.
``clustered`` has many small islands, ``diffuse`` none. The local intrinsic dimension (LID) says how hard a set is and
stands beside each result. Sets from photographs and texts are in ``_binary_real.py``; both keep a set as a folder of
``base.npy``, ``queries.npy`` and ``truth.npy``.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.paths import cache_dir

BITS, QUERIES, BLOCK = 256, 10_000, 50_000
TRUTH_K, LID_K, LID_SAMPLE = 10, 20, 2_000
VERSION = 1
"""Part of a folder's name: raise it where the same arguments give other codes."""


@dataclass(frozen=True)
class Recipe:
    """How a made set is drawn.

    Attributes:
        intrinsic: dimensions of z.
        cluster_size: points that share a centre on average; 0 gives ``clusters`` centres whatever the size.
        clusters: see there.
        noise: standard deviation around a centre, of which each coordinate has 1.
    """

    intrinsic: int
    cluster_size: int
    clusters: int
    noise: float


RECIPES = {"clustered": Recipe(32, 125, 0, 0.5), "diffuse": Recipe(16, 0, 16, 3.0)}


@dataclass(frozen=True)
class CodeSet:
    """Codes to index, codes to search for, and the exact distances of the nearest.

    Attributes:
        name: of the set, with its size.
        folder: where ``base.npy``, ``queries.npy`` and ``truth.npy`` lie.
        notes: what is to know about it (LID, distinct codes, images); JSON.
    """

    name: str
    folder: Path
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> NDArray[np.uint64]:
        """(n, W), mapped."""
        return np.load(self.folder / "base.npy", mmap_mode="r")

    @property
    def queries(self) -> NDArray[np.uint64]:
        """(Q, W)."""
        return np.load(self.folder / "queries.npy")

    @property
    def truth(self) -> NDArray[np.int32]:
        """Exact distances of the nearest TRUTH_K codes of each query, ascending, (Q, TRUTH_K)."""
        return np.load(self.folder / "truth.npy")

    def line(self) -> str:
        """One line that says what the set is."""
        return f"{self.name}: " + ", ".join(f"{key} {value}" for key, value in self.notes.items())


def data_folder(cache: Path | None) -> Path:
    """Where sets are kept: `cache`, or a folder of this benchmark in alimm's cache folder."""
    return cache if cache is not None else cache_dir() / "binary_graph"


def pack(bits_NB: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Bits to words, bit b of word w being bit 64 w + b: uint64 (N, W)."""
    return np.packbits(bits_NB, axis=1, bitorder="little").view("<u8").astype(np.uint64, copy=False)


def draw(recipe: Recipe, count: int, bits: int, seed: int, centres_of: int, part: int) -> NDArray[np.uint64]:
    """Codes of a made set, block after block, so that memory does not follow `count`.

    Args:
        recipe: of the set.
        count: codes.
        bits: of a code.
        seed: of everything.
        centres_of: size of the set, which decides how many centres there are; the same for base and queries.
        part: 0 for the base, 1 for the queries: other draws around the same centres.
    """
    shared = np.random.default_rng([seed, 0])
    clusters = max(1, centres_of // recipe.cluster_size) if recipe.cluster_size else recipe.clusters
    centres = shared.standard_normal((clusters, recipe.intrinsic), np.float32)
    projection = shared.standard_normal((recipe.intrinsic, bits), np.float32)
    codes = np.empty((count, bits // 64), np.uint64)
    for start in range(0, count, BLOCK):
        rng = np.random.default_rng([seed, 1 + part, start // BLOCK])
        size = min(BLOCK, count - start)
        z = centres[rng.integers(clusters, size=size)]
        z += np.float32(recipe.noise) * rng.standard_normal((size, recipe.intrinsic), np.float32)
        codes[start : start + size] = pack(z @ projection > 0)
    return codes


def made(name: str, count: int, cache: Path | None, *, queries: int = QUERIES, same: float = 0.0) -> CodeSet:
    """A made set, from the cache folder or drawn anew.

    Args:
        name: of the recipe, ``'clustered'`` or ``'diffuse'``.
        count: codes of the base.
        cache: folder; None takes alimm's.
        queries: how many.
        same: share of the base that is replaced by one identical code.

    Raises:
        ValueError: no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no made set {name!r}; there are: {', '.join(RECIPES)}")
    label = f"{name}-{size_text(count)}" + (f"-same{round(100 * same)}" if same else "")

    def build() -> tuple[NDArray[np.uint64], NDArray[np.uint64], dict[str, Any]]:
        recipe = RECIPES[name]
        base = draw(recipe, count, BITS, 0, count, 0)
        if same:
            rng = np.random.default_rng([0, 9])
            rows = rng.permutation(count)[: round(same * count)]
            base[rows] = base[rows[0]]
        return base, draw(recipe, queries, BITS, 0, count, 1), {}

    return keep(f"{label}-q{queries}-v{VERSION}", label, cache, build)


def keep(
    key: str,
    label: str,
    cache: Path | None,
    build: Callable[[], tuple[NDArray[np.uint64], NDArray[np.uint64], dict[str, Any]]],
    extra: Callable[[Path], None] | None = None,
) -> CodeSet:
    """A set from its folder `key`, which is made by `build` where it is missing and appears there only when complete.

    Args:
        key: name of the folder: everything that the codes depend on.
        label: name of the set in tables.
        cache: folder of the folders.
        build: gives base, queries and notes.
        extra: writes more files into the folder.
    """
    folder = data_folder(cache) / key
    if not (folder / "notes.json").exists():
        base, queries, notes = build()
        partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        partial.mkdir(parents=True)
        try:
            np.save(partial / "base.npy", base)
            np.save(partial / "queries.npy", queries)
            np.save(partial / "truth.npy", exact_distances(base, queries, TRUTH_K))
            notes = {"codes": len(base), "bits": 64 * base.shape[1], **notes, **describe(base)}
            (partial / "notes.json").write_text(json.dumps(notes))
            if extra is not None:
                extra(partial)
            try:
                partial.rename(folder)
            except OSError:
                # Another process was first, with the same bytes.
                if not (folder / "notes.json").exists():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return CodeSet(label, folder, json.loads((folder / "notes.json").read_text()))


def describe(base_NW: NDArray[np.uint64], seed: int = 0) -> dict[str, Any]:
    """Distinct codes and LID of a set."""
    distinct = len(np.unique(np.ascontiguousarray(base_NW).view(f"V{8 * base_NW.shape[1]}")))
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(base_NW))[:LID_SAMPLE]
    distances = exact_distances(base_NW, base_NW[rows], min(LID_K + 1, len(base_NW)))[:, 1:]
    return {"distinct": distinct, "LID": round(intrinsic_dimension(distances), 1)}


def intrinsic_dimension(distances_NK: NDArray[np.int32]) -> float:
    """LID after Levina and Bickel: ``-1 / mean(ln(d_i / d_k))`` with the mean over neighbours, then over points.

    Identical codes have no logarithm and are left out; the inverses are averaged, as MacKay and Ghahramani correct it.
    NaN where no point has two different distances.
    """
    last = distances_NK[:, -1:].astype(np.float64)
    near = distances_NK[:, :-1].astype(np.float64)
    valid = near > 0
    logs = np.where(valid, np.log(np.where(valid, near, 1.0) / np.where(last > 0, last, 1.0)), 0.0)
    total = -logs[(last > 0)[:, 0]].sum()
    count = int(valid[(last > 0)[:, 0]].sum())
    return count / total if total > 0 else float("nan")


def exact_distances(base_NW: NDArray[np.uint64], queries_QW: NDArray[np.uint64], k: int) -> NDArray[np.int32]:
    """Distances of the k nearest codes by faiss's exhaustive scan, ascending, (Q, k); k is at most n."""
    import faiss

    index = faiss.IndexBinaryFlat(64 * base_NW.shape[1])
    index.add(np.ascontiguousarray(base_NW).view(np.uint8))
    distances, _ = index.search(np.ascontiguousarray(queries_QW).view(np.uint8), min(k, len(base_NW)))
    return distances


def size_text(count: int) -> str:
    """1000000 as ``1m``, 100000 as ``100k``."""
    for unit, scale in (("m", 1_000_000), ("k", 1_000)):
        if count >= scale and count % scale == 0:
            return f"{count // scale}{unit}"
    return str(count)
