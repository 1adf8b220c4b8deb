"""What the linear hashes share: bit b of x is 1 where (x - mean) . w_b > 0, with the mean and directions of a fit.

Features are centred with the training mean before the product, and everything is summed in double precision: a bit
then depends on the vector alone, not on the batch it came in, but for values within rounding of the threshold.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.packing import pack_bits, words_of

T = TypeVar("T", bound="LinearHasher")
Float64 = NDArray[np.float64]

TRAINING_ROWS = 20_000
"""A fit uses at most so many vectors, drawn by the seed."""
RANK_TOLERANCE = 1e-10
"""Directions whose variance is below this share of the largest one are rounding noise."""
_BLOCK_BYTES = 32 << 20


def stream(seed: int, name: str, *indices: int) -> np.random.Generator:
    """The generator of ``alimm.seeding.numpy_stream``, without importing torch."""
    text = f"{seed}/{name}/" + "/".join(str(index) for index in indices)
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1)


def check_features(name: str, x: NDArray[Any], dim: int | None = None) -> NDArray[np.float32]:
    """Return features as float32 of shape (N, D); no copy if they are that already.

    Raises:
        ValueError: another shape or type, a width that is not ``dim``, or a row with NaN or beyond float32.
    """
    x = np.asarray(x)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} must have the shape (count, dim), got {x.shape}; one vector is {name}[None]")
    if x.dtype.kind != "f":
        raise ValueError(f"{name} must be of a floating type, got {x.dtype}; convert with .astype(numpy.float32)")
    if dim is not None and x.shape[1] != dim:
        raise ValueError(f"{name} have {x.shape[1]} dimensions, the hasher was fitted on {dim}")
    with np.errstate(over="ignore"):
        x = x.astype(np.float32, copy=False)
    rows = max(1, _BLOCK_BYTES // (4 * x.shape[1]))
    for start in range(0, len(x), rows):
        bad = np.flatnonzero(~np.isfinite(x[start : start + rows]).all(axis=1))
        if len(bad):
            raise ValueError(f"{name} row {start + bad[0]} holds NaN or a value beyond float32; drop or mend such rows")
    return x


def haar(rng: np.random.Generator, size: int) -> Float64:
    """A random rotation or reflection, uniform over all, (size, size)."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def random_directions(rng: np.random.Generator, dim: int, count: int) -> Float64:
    """``count`` random unit vectors as columns, (dim, count), orthogonal within each block of ``dim``."""
    blocks = [haar(rng, dim) for _ in range(-(-count // dim))]
    return np.concatenate([np.empty((dim, 0)), *blocks], axis=1)[:, :count]


def principal_directions(centred: Float64, limit: int) -> Float64:
    """The first principal directions as columns, (D, r), largest variance first, r <= limit, without noise ones."""
    count, dim = centred.shape
    if count > dim:
        variances, vectors = np.linalg.eigh(centred.T @ centred)
        variances, vectors = variances[::-1], vectors[:, ::-1]
    else:
        _, values, rows = np.linalg.svd(centred, full_matrices=False)
        variances, vectors = values**2, rows.T
    rank = int((variances > RANK_TOLERANCE * variances.max(initial=0.0)).sum())
    vectors = vectors[:, : min(rank, limit)]
    # An eigenvector has no sign of its own: the largest entry is made positive.
    largest = np.abs(vectors).argmax(axis=0)
    return vectors * np.where(np.take_along_axis(vectors, largest[None], axis=0) < 0, -1.0, 1.0)


class LinearHasher:
    """Base of the linear hashes; a subclass gives ``_learn``, centred training data (n, D) to directions (D, bits).

    Args:
        bits: length of the codes, a multiple of 64 from 64 to 1024.
        seed: of the sample of training vectors and of every random direction.
    """

    name: ClassVar[str] = ""

    def __init__(self, bits: int = 256, seed: int = 0) -> None:
        self.words = words_of(bits)
        self.bits, self.seed = int(bits), int(seed)
        self.objective: list[float] = []
        self._mean: Float64 | None = None
        self._directions: Float64 | None = None

    @property
    def dim(self) -> int | None:
        """Width of the vectors, None before the fit."""
        return None if self._mean is None else len(self._mean)

    def fit(self: T, x: NDArray[np.floating[Any]]) -> T:
        """Learn from vectors of shape (N, D); of many, a sample is used. Returns the hasher itself.

        Raises:
            ValueError: no vectors, or vectors that do not fit; the hasher stays as it was.
        """
        x = check_features("x", x)
        if len(x) == 0:
            raise ValueError("a hasher cannot be fitted on no vectors; give at least some thousand")
        if len(x) > TRAINING_ROWS:
            rows = stream(self.seed, "binary_graph.hash.sample").choice(len(x), TRAINING_ROWS, replace=False)
            x = x[np.sort(rows)]
        wide = x.astype(np.float64)
        # Exact where a column does not move: sums of equal float32 values fit a double.
        mean = wide.mean(axis=0)
        wide -= mean
        directions, objective = self._learn(wide)
        assert directions.shape == (x.shape[1], self.bits)
        self._mean, self._directions, self.objective = mean, np.ascontiguousarray(directions), objective
        return self

    def _learn(self, centred: Float64) -> tuple[Float64, list[float]]:
        """Directions (D, bits) as columns, and the objective after each round where there is one."""
        raise NotImplementedError

    def encode(self, x: NDArray[np.floating[Any]]) -> NDArray[np.uint64]:
        """Codes of vectors: (N, D) to uint64 (N, W), in blocks of bounded memory.

        Raises:
            ValueError: the hasher is not fitted, or the vectors do not fit.
        """
        if self._mean is None or self._directions is None:
            raise ValueError(f"the hasher {self.name} is not fitted: call fit(x) with training vectors first")
        x = check_features("x", x, self.dim)
        codes = np.empty((len(x), self.words), np.uint64)
        rows = max(1, _BLOCK_BYTES // (8 * (x.shape[1] + self.bits)))
        for start in range(0, len(x), rows):
            block = x[start : start + rows] - self._mean
            codes[start : start + rows] = pack_bits(block @ self._directions > 0)
        return codes

    def state(self) -> dict[str, Any]:
        """What ``from_state`` needs: arrays, whole numbers and strings."""
        if self._mean is None or self._directions is None:
            raise ValueError(f"the hasher {self.name} is not fitted: there is no state to keep")
        return dict(
            hasher=self.name, bits=self.bits, seed=self.seed, mean=self._mean, directions=self._directions,
            objective=np.asarray(self.objective, np.float64),
        )  # fmt: skip

    @classmethod
    def from_state(cls: type[T], state: dict[str, Any]) -> T:
        """A hasher from its state.

        Raises:
            ValueError: the state is of another class, or its parts do not fit together.
        """
        try:
            if str(state["hasher"]) != cls.name:
                raise ValueError(f"it is of the hasher {str(state['hasher'])!r}, not {cls.name!r}")
            hasher = cls(bits=int(state["bits"]), seed=int(state["seed"]))
            mean = np.array(state["mean"], np.float64)
            directions = np.array(state["directions"], np.float64, order="C")
            if mean.ndim != 1 or len(mean) == 0 or directions.shape != (len(mean), hasher.bits):
                raise ValueError(f"mean {mean.shape} and directions {directions.shape} do not fit {hasher.bits} bits")
            if not (np.isfinite(mean).all() and np.isfinite(directions).all()):
                raise ValueError("it holds values that are not finite")
            hasher.objective = [float(value) for value in np.asarray(state["objective"], np.float64)]
        except (KeyError, TypeError) as error:
            raise ValueError(f"the state of a hasher lacks or spoils {error}") from error
        hasher._mean, hasher._directions = mean, directions
        return hasher

    def save(self, path: str | Path) -> None:
        """Write the state to an ``.npz`` file, whole or not at all."""
        path = Path(path)
        state = self.state()
        arrays = {key: value for key, value in state.items() if isinstance(value, np.ndarray)}
        rest = json.dumps({key: value for key, value in state.items() if key not in arrays})
        temporary = path.with_name(f"{path.name}.part-{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, rest=np.frombuffer(rest.encode("ascii"), np.uint8), **arrays)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def read_state(path: str | Path) -> dict[str, Any]:
    """The state that ``save`` wrote. The file's own checksums are checked, nothing in it is executed.

    Raises:
        ValueError: the file is missing, of another kind or damaged.
    """
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return {**json.loads(arrays.pop("rest").tobytes()), **arrays}
    except FileNotFoundError as error:
        raise ValueError(f"there is no file of a hasher {path}") from error
    except (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no file of a hasher or is damaged: {error}") from error
