"""RowSparseAdamW equals torch's AdamW on dense gradients, or leaves other rows alone."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from alimm.optim import RowSparseAdamW, row_kernels
from alimm.optim.row_state import load_row_arrays, row_arrays, row_scalars, without_row_arrays
from alimm.registry import OPTIMIZERS

N, D = 19, 4


def steps(count: int, dtype: torch.dtype, size: int = N) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = np.random.default_rng(0)
    out = []
    for _ in range(count):
        rows = np.sort(generator.permutation(size)[: generator.choice([0, 2, size])])
        out.append((torch.from_numpy(rows), torch.from_numpy(generator.normal(size=(len(rows), D))).to(dtype)))
    return out


def gradient(rows: torch.Tensor, values: torch.Tensor, size: int = N) -> torch.Tensor:
    return torch.sparse_coo_tensor(rows[None], values, (size, D), is_coalesced=True, check_invariants=True)


def start(dtype: torch.dtype, size: int = N) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.random.default_rng(1).normal(size=(size, D))).to(dtype))


@pytest.mark.parametrize("size", [N, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_equals_torch(dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernels, "CHUNK", 5)
    weight, twin = start(dtype, size), start(dtype, size)
    settings = dict(lr=0.05, betas=(0.8, 0.95), weight_decay=0.1)
    optimizer, other = RowSparseAdamW([weight], rows="dense", **settings), torch.optim.AdamW([twin], **settings)
    for rows, values in steps(40, dtype, size):
        weight.grad, twin.grad = gradient(rows, values, size), torch.zeros_like(twin)
        twin.grad[rows] = values
        optimizer.step()
        other.step()
    assert torch.equal(weight, twin)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(optimizer.state[weight][name], other.state[twin][name])


def test_frozen_steps_touched_rows_by_the_formula_and_no_other() -> None:
    weight = start(torch.float64)
    w = weight.detach().numpy().copy()
    m, v = np.zeros_like(w), np.zeros_like(w)
    optimizer = RowSparseAdamW([weight], lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for number, (rows, values) in enumerate(steps(12, torch.float64), 1):
        before, state = weight.detach().clone(), {k: t.clone() for k, t in optimizer.state.get(weight, {}).items()}
        weight.grad = gradient(rows, values)
        optimizer.step()
        still = torch.ones(N, dtype=torch.bool)
        still[rows] = False
        assert torch.equal(weight[still], before[still])
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                assert torch.equal(optimizer.state[weight][name][still], state[name][still])
        for row, g in zip(rows.tolist(), values.numpy(), strict=True):
            m[row] = 0.8 * m[row] + 0.2 * g
            v[row] = 0.95 * v[row] + 0.05 * g * g
            w[row] -= 0.05 * 0.1 * w[row]
            w[row] -= 0.05 * (m[row] / (1 - 0.8**number)) / (np.sqrt(v[row] / (1 - 0.95**number)) + 1e-6)
    np.testing.assert_allclose(weight.detach().numpy(), w, rtol=1e-11)


def test_the_first_step_of_a_late_row_is_as_large_as_documented() -> None:
    weight = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
    optimizer = RowSparseAdamW([weight], lr=0.1, weight_decay=0.0)
    one = torch.ones(1, 1, dtype=torch.float64)
    for row in (0, 1):
        rows = torch.tensor([[row]])
        weight.grad = torch.sparse_coo_tensor(rows, one, (2, 1), is_coalesced=True, check_invariants=True)
        optimizer.step()
        optimizer.state[weight]["step"].fill_(20_000)  # as after so many steps of other rows
    assert weight[1].item() == pytest.approx(-0.316, abs=1e-3)


def test_dense_parameters_are_torch_s_and_states_go_round() -> None:
    from alimm.distributed.shards import Sharding, mark_sharded

    def build() -> tuple[nn.Parameter, nn.Parameter, RowSparseAdamW]:
        weight, bias = start(torch.float32), nn.Parameter(torch.ones(3))
        mark_sharded(weight, Sharding.over(N))
        return weight, bias, RowSparseAdamW([weight, bias], lr=0.05)

    def train(weight: nn.Parameter, bias: nn.Parameter, optimizer: RowSparseAdamW, part: Any) -> None:
        for rows, values in part:
            weight.grad, bias.grad = gradient(rows, values), bias.detach() ** 2
            optimizer.step()

    plan = steps(20, torch.float32)
    weight, bias, optimizer = build()
    train(weight, bias, optimizer, plan)
    twin = nn.Parameter(torch.ones(3))
    other = torch.optim.AdamW([twin], lr=0.05)
    for _ in plan:
        twin.grad = twin.detach() ** 2
        other.step()
    assert torch.equal(bias, twin)

    for stripped in (False, True):
        half_weight, half_bias, half = build()
        train(half_weight, half_bias, half, plan[:10])
        state = half.state_dict()
        arrays = {name: value.clone() for name, value in row_arrays(half, half_weight).items()}
        assert sorted(arrays) == ["exp_avg", "exp_avg_sq"]
        assert row_scalars(half, half_weight) == {"step": 10}
        if stripped:
            state = without_row_arrays(half, state)
            assert list(state["state"][0]) == ["step"]
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        new_weight, new_bias, new = build()
        new_weight.data.copy_(half_weight.data)
        new_bias.data.copy_(half_bias.data)
        new.load_state_dict(torch.load(buffer, weights_only=True))
        if stripped:
            load_row_arrays(new, new_weight, arrays)
        train(new_weight, new_bias, new, plan[10:])
        assert torch.equal(new_weight, weight)
        assert torch.equal(new_bias, bias)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rows="lazy_exact"), "no closed form"),
        (dict(betas=(0.9, 1.0)), "betas"),
        (dict(eps=-1.0), "at least 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS.build(dict(type="alimm.RowSparseAdamW", params=[start(torch.float32)], **settings))
