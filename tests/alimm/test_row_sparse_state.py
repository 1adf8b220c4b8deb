"""States of row-sparse optimizers: saving changes no bit, a resumed run goes on with the same ones, arrays go round."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from alimm.distributed.shards import Sharding, mark_sharded
from alimm.optim import RowSparseAdamW, RowSparseSGD
from alimm.optim.row_state import (
    catch_up_rows,
    flush_rows,
    load_row_arrays,
    row_arrays,
    row_scalars,
    without_row_arrays,
)

N, D = 23, 3


def sparse(rows: Any, values: torch.Tensor) -> torch.Tensor:
    indices = torch.from_numpy(np.asarray(rows, np.int64))[None]
    return torch.sparse_coo_tensor(indices, values, (N, D), is_coalesced=True, check_invariants=True)


def touches(seed: int, steps: int, dtype: torch.dtype = torch.float64) -> list[tuple[Any, torch.Tensor]]:
    """Row numbers and gradients of each step; sometimes none, sometimes all rows."""
    generator = np.random.default_rng(seed)
    out = []
    for _ in range(steps):
        rows = np.sort(generator.permutation(N)[: generator.choice([0, 1, 3, N // 2, N])])
        out.append((rows, torch.from_numpy(generator.normal(size=(len(rows), D))).to(dtype)))
    return out


def start(dtype: torch.dtype = torch.float64, size: int = N) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.random.default_rng(7).normal(size=(size, D))).to(dtype))


def train(optimizer: RowSparseSGD, weight: nn.Parameter, steps: list[Any]) -> None:
    for rows, values in steps:
        weight.grad = sparse(rows, values)
        optimizer.step()


@pytest.mark.parametrize("rows", ["lazy_exact", "dense", "frozen"])
@pytest.mark.parametrize("flushed", [False, True])
def test_saving_changes_no_bit_and_a_resumed_run_goes_on_with_the_same_ones(rows: str, flushed: bool) -> None:
    steps = touches(11, 30, torch.float32)
    settings = dict(lr=0.1, momentum=0.9, weight_decay=0.01, rows=rows, flush_every=9)
    whole = start(torch.float32)
    first = RowSparseSGD([whole], **settings)
    train(first, whole, steps[:15])
    if flushed:
        flush_rows(whole)
    buffer = io.BytesIO()
    torch.save((whole.detach(), first.state_dict()), buffer)
    train(first, whole, steps[15:])
    if not flushed:
        straight = start(torch.float32)
        second = RowSparseSGD([straight], **settings)
        train(second, straight, steps)
        assert torch.equal(straight, whole)

    buffer.seek(0)
    saved, state = torch.load(buffer, weights_only=True)
    resumed = nn.Parameter(saved)
    third = RowSparseSGD([resumed], **settings)
    third.load_state_dict(state)
    touched = torch.from_numpy(np.asarray(steps[15][0], np.int64))
    catch_up_rows(resumed, touched)  # before the first step, as a head does
    train(third, resumed, steps[15:])
    for both in (whole, resumed):
        flush_rows(both)
    assert torch.equal(resumed, whole)
    assert torch.equal(third.state[resumed]["momentum_buffer"], first.state[whole]["momentum_buffer"])


def test_counters_keep_their_type_when_a_state_is_loaded() -> None:
    weight = start(torch.float32)
    optimizer = RowSparseSGD([weight], lr=0.1, momentum=0.9)
    train(optimizer, weight, touches(1, 3, torch.float32))
    optimizer.state[weight]["last_step"][0] = 2**24 + 1
    other = RowSparseSGD([start(torch.float32)], lr=0.1, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    state = next(iter(other.state.values()))
    assert state["last_step"].dtype == torch.int32
    assert int(state["last_step"][0]) == 2**24 + 1
    assert state["products"].dtype == torch.float64
    assert torch.equal(state["products"], optimizer.state[weight]["products"])


def test_a_state_of_torch_and_one_of_other_shards() -> None:
    twin = start()
    other = torch.optim.SGD([twin], lr=0.1, momentum=0.9, weight_decay=0.1)
    twin.grad = torch.ones_like(twin)
    other.step()
    weight = nn.Parameter(twin.detach().clone())
    optimizer = RowSparseSGD([weight], lr=0.5)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    steps = touches(3, 10)
    train(optimizer, weight, steps)
    for rows, values in steps:
        twin.grad = torch.zeros_like(twin)
        twin.grad[rows] = values
        other.step()
    optimizer.flush()
    torch.testing.assert_close(weight, twin, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="sharded checkpoint"):
        RowSparseSGD([start(size=5)], lr=0.1).load_state_dict(optimizer.state_dict())


def test_row_arrays_go_round() -> None:
    steps = touches(13, 20, torch.float32)
    settings = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    weight = start(torch.float32)
    mark_sharded(weight, Sharding.over(N))
    plain = nn.Parameter(torch.ones(2, 2))
    first = RowSparseSGD([weight, plain], **settings)
    assert row_arrays(first, weight) == {}
    plain.grad = torch.ones(2, 2)
    train(first, weight, steps[:10])
    with pytest.raises(ValueError, match="flush_rows"):
        without_row_arrays(first, first.state_dict())
    arrays = {name: value.clone() for name, value in row_arrays(first, weight).items()}
    assert list(arrays) == ["momentum_buffer"]
    assert row_scalars(first, weight) == {"step": 10}
    small = without_row_arrays(first, first.state_dict())
    assert small["state"][0] == {"step": 10}
    assert small["state"][1]["momentum_buffer"].shape == (2, 2)
    assert "momentum_buffer" in first.state_dict()["state"][0]

    other = nn.Parameter(weight.detach().clone())
    second = RowSparseSGD([other, nn.Parameter(plain.detach().clone())], **settings)
    second.load_state_dict(small)
    load_row_arrays(second, other, arrays)
    for optimizer, one in ((first, weight), (second, other)):
        train(optimizer, one, steps[10:])
        flush_rows(one)
    assert torch.equal(weight, other)
    assert row_scalars(second, other) == {"step": 20}
    with pytest.raises(ValueError, match="shape"):
        load_row_arrays(second, other, {"momentum_buffer": torch.ones(2, D)})
    with pytest.raises(ValueError, match="not among"):
        load_row_arrays(second, weight, arrays)


def test_another_optimizer_takes_over_and_a_model_is_pickled_without_one() -> None:
    model = nn.Embedding(N, D, sparse=True)
    first = RowSparseSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(torch.tensor([1])).sum().backward()
    first.step()
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        flush_rows(copied.weight)
        assert torch.equal(copied.weight, model.weight)
    model(torch.tensor([1])).sum().backward()
    first.step()
    expected = copy.deepcopy(model)
    other = copy.deepcopy(first)  # its parameters are copies too
    parameter = other.param_groups[0]["params"][0]
    parameter.grad = sparse([1], torch.ones(1, D))
    other.step()
    assert other.state[parameter]["products"].shape[1] == 3
    assert first.state[model.weight]["products"].shape[1] == 2
    second = RowSparseAdamW(model.parameters(), lr=0.1)
    model.zero_grad()
    model(torch.tensor([4])).sum().backward()
    second.step()
    assert (model.weight[7:] != expected.weight[7:]).all(), "what the first left open is done"
    moved = model.weight.detach().clone()
    flush_rows(model.weight)
    assert torch.equal(moved, model.weight)


def test_a_state_of_another_number_of_rows_is_refused_before_a_kernel_sees_it() -> None:
    small, large = (torch.nn.Parameter(torch.ones(rows, 2)) for rows in (10, 1000))
    optimizers = [RowSparseSGD([parameter], lr=0.1, weight_decay=0.1) for parameter in (small, large)]
    for parameter, optimizer in zip((small, large), optimizers, strict=True):
        parameter.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), parameter.shape)
        optimizer.step()
    with pytest.raises(ValueError, match="state is of 10 rows, its parameter has 1000"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
