"""Locality preserving hashing, LPH (Zhao, Lu and Mei, AAAI 2014): neighbours get near codes, signs lose little.

The abstract says that the average projected distance of neighbours and the quantisation loss are minimised jointly, by
relaxed coordinate descent. The formula and the solver here are our completion of that, not the authors':

    J(W, Y) = tr(W^T X^T L X W) / |S| + mu / n ||Y - X W||^2 + nu ||W^T W - I||^2,   Y in {-1, 1}^(n, B)

- X (n, r): the centred principal components, scaled as a whole to a mean variance of 1;
- S: each sampled vector with its K nearest neighbours in the data, L the Laplacian of (S + S^T) / 2, so that the first
  term is half the mean of ||W^T (x_i - x_j)||^2 over the pairs (i, j) of S;
- by turns: Y = sign(X W) is the best Y for W; W follows the gradient with a step that is halved until J falls. Neither
  can raise J. The end comes when J falls by less than 1e-4 of itself, or after 50 rounds;
- the start is the rotation of ITQ;
- more bits than directions: W has blocks of r columns, each with a J and a random start of its own. One W for all bits
  would not do: W^T W = I cannot hold for more columns than rows.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.itq import ROUNDS, itq_rotation, learn_blocks, signs
from alimm.projects.binary_graph.linear_hasher import Float64, LinearHasher, stream

NEIGHBOURS = 10
"""K, neighbours of each sampled vector."""
GRAPH_ROWS = 4000
"""So many vectors, at most, are sampled for S; their neighbours come from all training vectors."""
STEPS = 20
"""Steps along the gradient in a round, at most."""
TOLERANCE = 1e-4
"""The end comes when J falls by less than this share in a round."""
MU = 1.0
NU = 1.0


class LPH(LinearHasher):
    """Signs of projections that keep neighbours together; ``objective`` is recorded.

    Args:
        bits: length of the codes, a multiple of 64 from 64 to 1024.
        seed: of the samples and the starts.
    """

    name = "lph"

    def _learn(self, centred: Float64) -> tuple[Float64, list[float]]:
        rng = stream(self.seed, "binary_graph.hash.lph")
        pairs = neighbour_pairs(centred, NEIGHBOURS, GRAPH_ROWS, rng)
        return learn_blocks(centred, self.bits, rng, partial(lph_matrix, pairs=pairs))


def neighbour_pairs(x: Float64, neighbours: int, rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Pairs (i, j) of the graph S: j is one of the nearest to the sampled i by Euclidean distance, (P, 2)."""
    import faiss  # only a fit pays for it

    count = len(x)
    sample = np.sort(rng.choice(count, min(rows, count), replace=False))
    wanted = min(neighbours, count - 1)
    if wanted < 1:
        return np.empty((0, 2), np.int64)
    # Scaled, so that squares stay within float32 whatever the unit of the data.
    data = (x / (np.abs(x).max() or 1.0)).astype(np.float32)
    _, found = faiss.knn(data[sample], data, wanted + 1)
    first = np.repeat(sample, wanted + 1)
    pairs = np.stack([first, found.ravel()], axis=1)
    return pairs[(pairs[:, 0] != pairs[:, 1]) & (pairs[:, 1] >= 0)]


def lph_matrix(
    x: Float64, rotation: Float64, pairs: NDArray[np.int64], mu: float = MU, nu: float = NU
) -> tuple[Float64, list[float]]:
    """Minimise J.

    Args:
        x: (n, r), centred.
        rotation: from which ITQ makes the start, (r, r).
        pairs: the graph S, (P, 2).
        mu: weight of the quantisation.
        nu: weight of orthogonality.

    Returns:
        W (r, r), and J after each round, the start first.
    """
    apart = x[pairs[:, 0]] - x[pairs[:, 1]]
    local = apart.T @ apart / (2 * max(1, len(pairs)))
    square = x.T @ x / len(x)
    w, _ = itq_rotation(x, rotation)
    y = signs(x @ w)
    terms = _Terms(local, square, x.T @ y / len(x), mu, nu)
    objective = [terms.value(w)]
    step = 1.0 / float(2 * (np.linalg.norm(local, 2) + mu * np.linalg.norm(square, 2)) + 8 * nu)
    for _ in range(ROUNDS):
        w, step = _descend(terms, w, step)
        terms.cross = x.T @ signs(x @ w) / len(x)
        objective.append(terms.value(w))
        if objective[-2] - objective[-1] < TOLERANCE * abs(objective[-2]):
            break
    return w, objective


class _Terms:
    """J as a function of W for a fixed Y, from the second moments alone: the data are not needed again."""

    def __init__(self, local: Float64, square: Float64, cross: Float64, mu: float, nu: float) -> None:
        self.local, self.square, self.cross, self.mu, self.nu = local, square, cross, mu, nu

    def value(self, w: Float64) -> float:
        bits = w.shape[1]
        quantisation = np.sum(w * (self.square @ w)) - 2 * np.sum(w * self.cross) + bits
        apart = w.T @ w - np.eye(bits)
        return float(np.sum(w * (self.local @ w)) + self.mu * quantisation + self.nu * np.sum(apart * apart))

    def gradient(self, w: Float64) -> Float64:
        apart = w.T @ w - np.eye(w.shape[1])
        return 2 * (self.local @ w + self.mu * (self.square @ w - self.cross)) + 4 * self.nu * (w @ apart)


def _descend(terms: _Terms, w: Float64, step: float) -> tuple[Float64, float]:
    """Steps along the gradient, each of which lowers J (Armijo's rule); returns W and the step to go on with."""
    value = terms.value(w)
    for _ in range(STEPS):
        slope = terms.gradient(w)
        steepness = float(np.sum(slope * slope))
        while True:
            candidate = w - step * slope
            reached = terms.value(candidate)
            if reached <= value - 0.5 * step * steepness:
                break
            step /= 2
            if step * steepness < 1e-14 * max(abs(value), 1.0):
                return w, max(step, 1e-12)
        if value - reached < 1e-3 * TOLERANCE * abs(value):
            return candidate, 2 * step
        w, value, step = candidate, reached, 2 * step
    return w, step
