"""RowSparseLARS equals the formula, in every mode of rows and on every number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from alimm.distributed.shards import RowShards, Sharding, mark_sharded
from alimm.optim import RowSparseLARS
from alimm.optim.row_state import flush_rows
from alimm.registry import OPTIMIZERS
from tests.gloo_pool import GlooPool

N, D, STEPS = 11, 3, 12
SETTINGS = dict(momentum=0.9, weight_decay=0.05, trust_coefficient=0.1)


def plan() -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """A weight, and rows and gradients of each step."""
    generator = np.random.default_rng(4)
    weight = generator.normal(size=(N, D))
    steps = []
    for _ in range(STEPS):
        rows = np.sort(generator.permutation(N)[: generator.integers(1, N)])
        steps.append((rows, generator.normal(size=(len(rows), D))))
    return weight, steps


def rate(step: int) -> float:
    return 2.0 / (1 + step)


def slowly(rows_mode: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
    """The formula, in NumPy: the weight, and the one that only ever sees whole gradients."""
    w, steps = plan()
    u = np.zeros_like(w)
    for step, (rows, g) in enumerate(steps):
        whole = np.zeros_like(w)
        whole[rows] = g
        counted = w[rows] if norm == "active" else w
        w_norm, g_norm = np.sqrt((counted**2).sum()), np.sqrt((g**2).sum())
        rho = rate(step) * 0.1 * w_norm / (g_norm + 0.05 * w_norm + 1e-8)
        moved = rows if rows_mode == "frozen" else np.arange(N)
        u[moved] = 0.9 * u[moved] + rho * (whole[moved] + 0.05 * w[moved])
        w[moved] -= u[moved]
    return w, u


def run_on_rank(rows_mode: str, norm: str, sizes: tuple[int, ...]) -> tuple[np.ndarray, list[float]]:
    """Train one shard; the whole weight is put together outside."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    sharding = Sharding(RowShards(sizes), rank)
    whole, steps = plan()
    weight = nn.Parameter(torch.from_numpy(whole[sharding.start : sharding.stop].copy()))
    mark_sharded(weight, sharding)
    optimizer = RowSparseLARS([weight], lr=1.0, rows=rows_mode, norm=norm, **SETTINGS)
    rates = []
    for step, (rows, g) in enumerate(steps):
        optimizer.param_groups[0]["lr"] = rate(step)
        own = (rows >= sharding.start) & (rows < sharding.stop)
        indices = torch.from_numpy(rows[own] - sharding.start)[None]
        values = torch.from_numpy(g[own])
        weight.grad = torch.sparse_coo_tensor(indices, values, weight.shape, check_invariants=True)
        optimizer.step()
        rates.append(optimizer._rates[weight])
    flush_rows(weight)
    return weight.detach().numpy(), rates


MODES = [("lazy_exact", "active"), ("dense", "active"), ("dense", "all"), ("frozen", "active")]


def run_in_all_modes(sizes: tuple[int, ...]) -> list[tuple[np.ndarray, list[float]]]:
    return [run_on_rank(*mode, sizes) for mode in MODES]


@pytest.mark.parametrize("sizes", [None, (11,), (7, 4), (0, 11), (3, 0, 6, 2)], ids=str)
def test_equals_the_formula_on_any_number_of_ranks(sizes: tuple[int, ...] | None, gloo: GlooPool) -> None:
    by_rank = [run_in_all_modes((N,))] if sizes is None else gloo.run(len(sizes), run_in_all_modes, sizes)
    for mode, results in zip(MODES, zip(*by_rank, strict=True), strict=True):
        assert all(rates == results[0][1] for _, rates in results), "the rate is the same on every rank"
        found = np.concatenate([part for part, _ in results])
        np.testing.assert_allclose(found, slowly(*mode)[0], rtol=1e-12, atol=1e-13, err_msg=str(mode))


def test_the_norm_counts_what_it_says() -> None:
    assert not np.allclose(slowly("dense", "active")[0], slowly("dense", "all")[0])


def one_rank_without_a_gradient() -> float:
    rank = dist.get_rank()
    weight = nn.Parameter(torch.ones(2, 2))
    mark_sharded(weight, Sharding(RowShards((2, 2)), rank))
    optimizer = RowSparseLARS([weight], lr=1.0)
    if rank == 0:
        weight.grad = torch.ones(2, 2)
    optimizer.step()
    return float(weight.sum())


def test_a_rank_without_a_gradient_takes_part(gloo: GlooPool) -> None:
    first, second = gloo.run(2, one_rank_without_a_gradient)
    assert first == pytest.approx(4 - 4 * 0.001, rel=1e-6)
    assert second == 4


def test_dense_gradients_vectors_and_zeros() -> None:
    matrix, bias, zero = (
        nn.Parameter(torch.full(shape, fill)) for shape, fill in (((2, 3), 2.0), ((3,), 1.0), ((2, 2), 0.0))
    )
    optimizer = RowSparseLARS([matrix, bias, zero], lr=0.5, momentum=0.5, weight_decay=0.1)
    w, u = np.full((2, 3), 2.0), np.zeros((2, 3))
    for _ in range(3):
        for parameter in (matrix, bias, zero):
            parameter.grad = torch.ones_like(parameter)
        first = bool((zero == 0).all())
        optimizer.step()
        rho = 0.5 * 0.001 * np.linalg.norm(w) / (np.sqrt(6) + 0.1 * np.linalg.norm(w) + 1e-8)
        u = 0.5 * u + rho * (1 + 0.1 * w)
        w = w - u
        if first:
            assert torch.equal(zero, torch.full((2, 2), -0.5)), "a weight of zeros leaves zero at the plain rate"
    np.testing.assert_allclose(matrix.detach().numpy(), w, rtol=1e-6)
    assert bias.tolist() == pytest.approx([1 - 0.5 - 0.75 - 0.875] * 3), "rate 1 and no decay"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(norm="all"), "pass over all"),
        (dict(norm="all", rows="frozen"), "rows='dense'"),
        (dict(norm="some"), "'active' or 'all'"),
        (dict(trust_coefficient=0.0), "trust_coefficient"),
        (dict(rows="no"), "got 'no'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS.build(dict(type="alimm.RowSparseLARS", params=[nn.Parameter(torch.ones(2, 2))], lr=1.0, **settings))
