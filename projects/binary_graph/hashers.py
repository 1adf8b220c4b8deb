"""Hashes of float features to binary codes, by name: ``srp``, ``pca``, ``itq`` and ``lph``.

- ``srp``, sign random projection: Charikar, Similarity estimation techniques from rounding algorithms, STOC 2002.
  P[bits differ] = theta / pi for each bit, so E[Hamming] = bits * theta / pi, theta the angle of the centred vectors.
  Directions come in orthogonal blocks, which keeps that expectation and lowers the variance.
- ``pca``: signs of the principal components.
- ``itq``, iterative quantisation: Gong and Lazebnik, Iterative quantization: a Procrustean approach to learning binary
  codes, CVPR 2011. min over Y in {-1, 1} and rotations R of ||Y - V R||^2, V the principal components, by turns:
  Y = sign(V R); R = A B^T, where A S B^T is the singular value decomposition of V^T Y.
- ``lph``, locality preserving hashing: see ``lph.py``.

More bits than the data have directions are ours: ``pca`` goes on with random directions, ``itq`` and ``lph`` learn
further blocks, each a rotation of all directions from a random start of its own.

Where one direction outweighs all others, as the brightness of grey patches does, the learned rotations repeat its sign
in many bits and find less than ``srp``. Take that direction out first, or scale vectors to length one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.itq import ITQ
from alimm.projects.binary_graph.linear_hasher import (
    Float64,
    LinearHasher,
    principal_directions,
    random_directions,
    read_state,
    stream,
)
from alimm.projects.binary_graph.lph import LPH


@runtime_checkable
class Hasher(Protocol):
    """Maps float vectors to binary codes."""

    bits: int

    @property
    def dim(self) -> int | None:
        """Width of the vectors, None before the fit."""

    def fit(self, x: NDArray[np.floating[Any]]) -> Any:
        """Learn from training vectors, (N, D)."""

    def encode(self, x: NDArray[np.floating[Any]]) -> NDArray[np.uint64]:
        """Codes uint64 (N, W) of vectors (N, D)."""

    def state(self) -> dict[str, Any]:
        """What ``from_state`` needs: arrays, whole numbers and strings."""

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Any:
        """A hasher from its state."""

    def save(self, path: str | Path) -> None:
        """Write the state to an ``.npz`` file that `load_hasher` reads."""


class SignRandomProjection(LinearHasher):
    """Signs of random projections. Learns the mean alone. Arguments as of `LinearHasher`."""

    name = "srp"

    def _learn(self, centred: Float64) -> tuple[Float64, list[float]]:
        return random_directions(stream(self.seed, "binary_graph.hash.srp"), centred.shape[1], self.bits), []


class PCASign(LinearHasher):
    """Signs of the principal components. Arguments as of `LinearHasher`."""

    name = "pca"

    def _learn(self, centred: Float64) -> tuple[Float64, list[float]]:
        found = principal_directions(centred, self.bits)
        more = random_directions(
            stream(self.seed, "binary_graph.hash.pca"), centred.shape[1], self.bits - found.shape[1]
        )
        return np.concatenate([found, more], axis=1), []


HASHERS: dict[str, type[LinearHasher]] = {cls.name: cls for cls in (SignRandomProjection, PCASign, ITQ, LPH)}
"""Name -> class."""


def make_hasher(name: str, bits: int = 256, seed: int = 0) -> LinearHasher:
    """A hasher by its name, not fitted yet.

    Raises:
        ValueError: no such name, or a length that codes cannot have.
    """
    if name not in HASHERS:
        raise ValueError(f"hasher must be one of {', '.join(HASHERS)}, got {name!r}")
    return HASHERS[name](bits=bits, seed=seed)


def load_hasher(path: str | Path) -> LinearHasher:
    """Read a hasher of any kind from the file that its ``save`` wrote.

    Raises:
        ValueError: the file is missing, damaged or of a kind that this version does not know.
    """
    state = read_state(path)
    name = str(state.get("hasher"))
    if name not in HASHERS:
        raise ValueError(f"{path} is of the hasher {name!r}, this version reads {', '.join(HASHERS)}")
    try:
        return HASHERS[name].from_state(state)
    except ValueError as error:
        raise ValueError(f"{path} is no file of a hasher or is damaged: {error}") from error
