"""Locality preserving hashing: its objective, its gradient and its graph, against the definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.projects.binary_graph.hashers import make_hasher
from alimm.projects.binary_graph.itq import itq_rotation, signs
from alimm.projects.binary_graph.linear_hasher import haar
from alimm.projects.binary_graph.lph import LPH, _Terms, lph_matrix, neighbour_pairs


def objective(x, w, y, pairs, mu, nu) -> float:
    """J as the module states it, with the Laplacian written out."""
    count = len(x)
    graph = np.zeros((count, count))
    for first, second in pairs.tolist():
        graph[first, second] += 1
    size = graph.sum()
    graph = (graph + graph.T) / 2
    laplacian = np.diag(graph.sum(axis=1)) - graph
    local = np.trace(w.T @ x.T @ laplacian @ x @ w) / size
    return local + mu / count * ((y - x @ w) ** 2).sum() + nu * ((w.T @ w - np.eye(w.shape[1])) ** 2).sum()


def toy(seed: int, count: int = 40, dim: int = 5):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, dim)) * np.linspace(2, 0.5, dim)
    x -= x.mean(axis=0)
    x /= np.sqrt(np.mean(x * x))
    return x, neighbour_pairs(x, 4, 30, rng), rng


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.floats(0, 3), st.floats(0, 3))
def test_terms_are_the_objective_and_its_gradient(seed, mu, nu):
    x, pairs, rng = toy(seed)
    w = rng.standard_normal((5, 5))
    y = signs(x @ w)
    apart = x[pairs[:, 0]] - x[pairs[:, 1]]
    terms = _Terms(apart.T @ apart / (2 * len(pairs)), x.T @ x / len(x), x.T @ y / len(x), mu, nu)
    assert terms.value(w) == pytest.approx(objective(x, w, y, pairs, mu, nu), rel=1e-9)
    gradient, numeric = terms.gradient(w), np.empty((5, 5))
    for row, column in np.ndindex(5, 5):
        step = np.zeros((5, 5))
        step[row, column] = 1e-5
        numeric[row, column] = (terms.value(w + step) - terms.value(w - step)) / 2e-5
    np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-5)


@settings(max_examples=15)
@given(st.integers(0, 2**32), st.floats(0.01, 3), st.floats(0.01, 3))
def test_the_objective_never_rises_and_is_the_recorded_one(seed, mu, nu):
    x, pairs, rng = toy(seed)
    rotation = haar(rng, 5)
    w, recorded = lph_matrix(x, rotation, pairs, mu, nu)
    assert (np.diff(recorded) <= 1e-9 * np.abs(recorded[:-1])).all()
    assert recorded[-1] == pytest.approx(objective(x, w, signs(x @ w), pairs, mu, nu), rel=1e-9)
    start, _ = itq_rotation(x, rotation)
    assert recorded[0] == pytest.approx(objective(x, start, signs(x @ start), pairs, mu, nu), rel=1e-9)
    assert recorded[-1] < recorded[0]
    assert len(recorded) <= 51


def test_the_end_comes_when_little_is_gained():
    x, pairs, rng = toy(3, count=300)
    _, recorded = lph_matrix(x, haar(rng, 5), pairs)
    assert len(recorded) < 51
    assert recorded[-2] - recorded[-1] < 1e-4 * recorded[-2]


def test_pairs_are_the_nearest_neighbours():
    x = np.random.default_rng(1).standard_normal((60, 7)) * 1e6
    pairs = neighbour_pairs(x, 5, 40, np.random.default_rng(2))
    assert len(pairs) == 200
    for row in np.unique(pairs[:, 0]):
        distance = ((x - x[row]) ** 2).sum(axis=1)
        distance[row] = np.inf
        assert set(pairs[pairs[:, 0] == row, 1]) == set(np.argsort(distance)[:5])
    assert neighbour_pairs(x[:1], 5, 40, np.random.default_rng(2)).shape == (0, 2)
    copies = neighbour_pairs(np.ones((30, 3)), 5, 40, np.random.default_rng(2))
    assert (copies[:, 0] != copies[:, 1]).all()


def test_neighbours_get_nearer_codes_than_from_itq():
    rng = np.random.default_rng(4)
    # Neighbours differ along wide directions that say nothing of who is near.
    centres = rng.standard_normal((60, 64))
    x = (np.repeat(centres, 20, axis=0) + rng.standard_normal((1200, 64)) * np.linspace(0, 1.5, 64)).astype(np.float32)
    pairs = neighbour_pairs(x - x.mean(axis=0, dtype=np.float64), 10, 1200, rng)
    share = {}
    for name in ("itq", "lph"):
        codes = make_hasher(name, 64).fit(x).encode(x)
        bits = np.unpackbits(codes.view(np.uint8), axis=1).astype(np.int64)
        near = (bits[pairs[:, 0]] != bits[pairs[:, 1]]).mean()
        share[name] = near / (bits[rng.integers(1200, size=5000)] != bits[rng.integers(1200, size=5000)]).mean()
    assert share["lph"] < share["itq"]


def test_blocks_beyond_the_dimensions_differ():
    x = np.random.default_rng(5).standard_normal((500, 32)).astype(np.float32)
    hasher = LPH(bits=128).fit(x)
    directions = hasher.state()["directions"]
    assert directions.shape == (32, 128)
    assert np.abs(directions[:, :32] - directions[:, 32:64]).max() > 0.1
    assert (np.diff(hasher.objective) <= 1e-9 * hasher.objective[0]).all()
