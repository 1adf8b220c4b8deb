"""Iterative quantisation, ITQ (Gong and Lazebnik, CVPR 2011): rotate the principal components so that signs fit them.

    min ||Y - V R||^2  over Y in {-1, 1}^(n, B), R^T R = I

by turns: Y = sign(V R) is the best Y for R; R = A B^T with V^T Y = A S B^T the best R for Y. Neither step can raise the
objective. V are the first B principal components. Ours: V is scaled as a whole to a mean variance of 1, which changes
no step but the objective's unit; blocks of bits beyond the number of components start from further random rotations.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from alimm.projects.binary_graph.linear_hasher import (
    Float64,
    LinearHasher,
    haar,
    principal_directions,
    random_directions,
    stream,
)

ROUNDS = 50


def signs(values: Float64) -> Float64:
    """-1 and 1, as the codes have it: 0 counts as -1."""
    return np.where(values > 0, 1.0, -1.0)


def itq_rotation(v: Float64, rotation: Float64, rounds: int = ROUNDS) -> tuple[Float64, list[float]]:
    """Improve a rotation.

    Args:
        v: (n, B), centred.
        rotation: where to start, (B, B).
        rounds: how often both steps are done.

    Returns:
        The rotation (B, B), and ||Y - V R||^2 / (n B) after each step for Y, rounds + 1 values.
    """
    rotated = v @ rotation
    y = signs(rotated)
    objective = [float(np.mean((y - rotated) ** 2))]
    for _ in range(rounds):
        left, _, right = np.linalg.svd(v.T @ y)
        rotation = left @ right
        rotated = v @ rotation
        y = signs(rotated)
        objective.append(float(np.mean((y - rotated) ** 2)))
    return rotation, objective


def learn_blocks(
    centred: Float64,
    bits: int,
    rng: np.random.Generator,
    learn: Callable[[Float64, Float64], tuple[Float64, list[float]]],
) -> tuple[Float64, list[float]]:
    """Directions in blocks of at most as many bits as the data have directions.

    Args:
        centred: training data (n, D).
        bits: how many directions.
        rng: draws the start of each block.
        learn: principal components (n, r), mean variance 1, and a rotation (r, r) to start from, to a matrix (r, r)
            and its objectives.

    Returns:
        Directions (D, bits), and the objectives summed over the blocks, each padded with its last value.
    """
    dim = centred.shape[1]
    basis = principal_directions(centred, bits)
    # A short sample says nothing of the directions that it does not have: those of further bits are then random.
    known = basis.shape[1] == dim or len(centred) > dim
    parts: list[Float64] = []
    curves: list[list[float]] = []
    left = bits
    while left and basis.shape[1] and (known or not parts):
        block = basis[:, :left]
        v = centred @ block
        scale = np.sqrt(np.mean(v * v))
        matrix, curve = learn(v / scale, haar(rng, block.shape[1]))
        parts.append(block @ matrix)
        curves.append(curve)
        left -= block.shape[1]
    parts.append(random_directions(rng, dim, left))
    rounds = max((len(curve) for curve in curves), default=0)
    padded = [curve + curve[-1:] * (rounds - len(curve)) for curve in curves]
    return np.concatenate(parts, axis=1), [float(value) for value in np.sum(padded, axis=0)] if padded else []


class ITQ(LinearHasher):
    """Signs of the rotated principal components; ``objective`` is recorded. Arguments as of `LinearHasher`."""

    name = "itq"

    def _learn(self, centred: Float64) -> tuple[Float64, list[float]]:
        return learn_blocks(centred, self.bits, stream(self.seed, "binary_graph.hash.itq"), itq_rotation)
