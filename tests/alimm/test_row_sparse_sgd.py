"""RowSparseSGD equals torch's SGD on dense gradients, in each of its meanings of a row without a gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alimm.optim import RowSparseSGD, row_kernels
from alimm.optim.row_state import catch_up_rows, coalesced_rows, flush_rows
from alimm.registry import OPTIMIZERS

N, D = 23, 3


def sparse(rows: np.ndarray, values: torch.Tensor, size: int = N) -> torch.Tensor:
    """A gradient as a head makes it."""
    indices = torch.from_numpy(np.asarray(rows, np.int64))[None]
    return torch.sparse_coo_tensor(indices, values, (size, *values.shape[1:]), is_coalesced=True, check_invariants=True)


def touches(seed: int, steps: int, dtype: torch.dtype = torch.float64, size: int = N) -> list[tuple[Any, torch.Tensor]]:
    """Row numbers and gradients of each step; sometimes none, sometimes all rows."""
    generator = np.random.default_rng(seed)
    out = []
    for _ in range(steps):
        count = int(generator.choice([0, 1, 3, size // 2, size]))
        rows = np.sort(generator.permutation(size)[: min(count, size)])
        out.append((rows, torch.from_numpy(generator.normal(size=(len(rows), D))).to(dtype)))
    return out


def start(dtype: torch.dtype = torch.float64, size: int = N) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.random.default_rng(7).normal(size=(size, D))).to(dtype))


def schedule(optimizer: torch.optim.Optimizer, step: int, steps: int, changing: bool) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.3 * (1 + math.cos(math.pi * step / steps))
        if changing:
            group["momentum"] = [0.9, 0.5, 0.0, 0.7][step // 7 % 4]
            group["weight_decay"] = [1e-3, 0.0, 5e-2][step // 5 % 3]


def dense_twin(
    weight: nn.Parameter, steps: list[tuple[Any, torch.Tensor]], changing: bool, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    twin = nn.Parameter(weight.detach().clone())
    optimizer = torch.optim.SGD([twin], lr=0.1, **settings)
    for number, (rows, values) in enumerate(steps):
        schedule(optimizer, number, len(steps), changing)
        twin.grad = torch.zeros_like(twin)
        twin.grad[rows] = values
        optimizer.step()
    return twin.detach(), optimizer.state[twin].get("momentum_buffer")


SETTINGS = [
    dict(),
    dict(weight_decay=0.02),
    dict(momentum=0.9),
    dict(momentum=0.9, weight_decay=0.02),
    dict(momentum=0.9, weight_decay=0.02, nesterov=True),
]


@pytest.mark.parametrize("path", ["numba", "torch"])
@pytest.mark.parametrize(("rows", "flush_every"), [("lazy_exact", 4096), ("lazy_exact", 11), ("dense", 1)])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_torch_on_dense_gradients(
    settings: dict[str, Any], rows: str, flush_every: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "torch":
        monkeypatch.setattr(row_kernels, "_in_numba", lambda weight: False)
        monkeypatch.setattr(row_kernels, "CHUNK", 7)
    steps = touches(1, 300)
    weight = start()
    expected, momentum = dense_twin(weight, steps, False, **settings)
    optimizer = RowSparseSGD([weight], lr=0.1, rows=rows, flush_every=flush_every, **settings)
    for number, (touched, values) in enumerate(steps):
        schedule(optimizer, number, len(steps), False)
        weight.grad = sparse(touched, values)
        optimizer.step()
    flush_rows(weight)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)
    if momentum is not None:
        torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], momentum, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_schedule_may_change_momentum_and_decay_and_pass_through_zero(nesterov: bool) -> None:
    steps = touches(2, 120)
    weight = start()
    settings = dict(momentum=0.9, weight_decay=1e-3, nesterov=nesterov)
    expected, momentum = dense_twin(weight, steps, True, **settings)
    optimizer = RowSparseSGD([weight], lr=0.1, **settings)
    for number, (touched, values) in enumerate(steps):
        schedule(optimizer, number, len(steps), True)
        weight.grad = sparse(touched, values)
        optimizer.step()
    optimizer.flush()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], momentum, rtol=1e-12, atol=1e-12)


@given(
    seed=st.integers(0, 2**31),
    momentum=st.sampled_from([0.0, 0.5, 0.99]),
    decay=st.sampled_from([0.0, 1e-4, 0.1]),
    nesterov=st.booleans(),
    size=st.sampled_from([0, 1, 2, 23]),
    reads=st.booleans(),
)
@settings(max_examples=30)
def test_rows_read_in_between_equal_those_of_torch_in_float32(
    seed: int, momentum: float, decay: float, nesterov: bool, size: int, reads: bool
) -> None:
    settings = dict(momentum=momentum, weight_decay=decay, nesterov=nesterov and momentum > 0)
    steps = touches(seed, 25, torch.float32, size)
    weight = start(torch.float32, size)
    optimizer = RowSparseSGD([weight], lr=0.1, **settings)
    twin = nn.Parameter(weight.detach().clone())
    other = torch.optim.SGD([twin], lr=0.1, **settings)
    for number, (touched, values) in enumerate(steps):
        for both in (optimizer, other):
            schedule(both, number, len(steps), False)
        weight.grad, twin.grad = sparse(touched, values, size), torch.zeros_like(twin)
        twin.grad[touched] = values
        if reads:
            rows = torch.from_numpy(np.asarray(touched, np.int64))
            catch_up_rows(weight, rows)
            torch.testing.assert_close(weight[rows], twin[rows], rtol=2e-6, atol=2e-6)
        optimizer.step()
        other.step()
    optimizer.flush()
    torch.testing.assert_close(weight, twin, rtol=2e-6, atol=2e-6)


def test_lazy_rows_are_behind_until_they_are_asked_for() -> None:
    weight = start()
    before = weight.detach().clone()
    optimizer = RowSparseSGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        weight.grad = sparse([2], torch.ones(1, D, dtype=torch.float64))
        optimizer.step()
    assert torch.equal(weight[3:], before[3:])
    catch_up_rows(weight, torch.tensor([3, 5]))
    moved = (weight != before).all(1).nonzero().flatten().tolist()
    assert moved == [2, 3, 5]
    once = weight.detach().clone()
    catch_up_rows(weight, torch.tensor([3, 5]))
    assert torch.equal(weight, once)
    flush_rows(weight)
    after = weight.detach().clone()
    assert (after != before).all()
    flush_rows(weight)
    assert torch.equal(weight, after)


@pytest.mark.parametrize("path", ["numba", "torch"])
def test_frozen_rows_keep_every_bit(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "torch":
        monkeypatch.setattr(row_kernels, "_in_numba", lambda weight: False)
    weight = start(torch.float32)
    optimizer = RowSparseSGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1, rows="frozen")
    weight.grad = sparse(np.arange(N), torch.ones(N, D))
    optimizer.step()
    before, buffer = weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone()
    for step in range(5):
        weight.grad = sparse([1, 4 + step], torch.ones(2, D))
        optimizer.step()
    still = torch.ones(N, dtype=torch.bool)
    still[[1, 4, 5, 6, 7, 8]] = False
    assert torch.equal(weight[still], before[still])
    assert torch.equal(optimizer.state[weight]["momentum_buffer"][still], buffer[still])
    assert (weight[~still] != before[~still]).all()


def test_a_touched_row_of_frozen_takes_the_step_of_torch() -> None:
    weight = start()
    twin = nn.Parameter(weight.detach()[[1, 4]].clone())
    optimizer = RowSparseSGD([weight], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True, rows="frozen")
    other = torch.optim.SGD([twin], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)
    for step in range(4):
        values = torch.full((2, D), 1.0 + step, dtype=torch.float64)
        weight.grad, twin.grad = sparse([1, 4], values), values.clone()
        optimizer.step()
        other.step()
    torch.testing.assert_close(weight[[1, 4]], twin, rtol=1e-13, atol=0)


def test_dense_and_sparse_parameters_and_gradients_in_one_optimizer() -> None:
    steps = touches(5, 20)
    weight, bias = start(), nn.Parameter(torch.ones(4, dtype=torch.float64))
    twins = [nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())]
    settings = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    optimizer = RowSparseSGD([{"params": [weight]}, {"params": [bias], "lr": 0.5}], **settings)
    other = torch.optim.SGD([{"params": twins[:1]}, {"params": twins[1:], "lr": 0.5}], **settings)
    for number, (rows, values) in enumerate(steps):
        twins[0].grad = torch.zeros_like(twins[0])
        twins[0].grad[rows] = values
        weight.grad = twins[0].grad.clone() if number % 4 == 2 else sparse(rows, values)
        for vector in (bias, twins[1]):
            vector.grad = torch.full_like(vector, float(number))
        if number % 5 == 3:  # without a gradient nothing moves, not even by momentum
            weight.grad = twins[0].grad = None
        optimizer.step()
        other.step()
    optimizer.flush()
    torch.testing.assert_close(weight, twins[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(bias, twins[1])


def test_gradients_that_autograd_made_and_added_up() -> None:
    table = nn.Embedding(N, D, sparse=True, dtype=torch.float64)
    twin = nn.Embedding(N, D, dtype=torch.float64)
    twin.load_state_dict(table.state_dict())
    optimizer = RowSparseSGD(table.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    generator = np.random.default_rng(3)
    for _ in range(8):
        for _ in range(2):
            labels = torch.from_numpy(generator.integers(0, N, 6))  # with duplicates, in any order
            catch_up_rows(table.weight, labels.unique())
            for model in (table, twin):
                (model(labels) ** 3).sum().backward()
        for both in (optimizer, other):
            both.step()
            both.zero_grad()
    optimizer.flush()
    torch.testing.assert_close(table.weight, twin.weight, rtol=1e-12, atol=1e-12)


def test_sorted_gradients_are_marked_and_not_sorted_again() -> None:
    weight = start()
    indices, values = torch.tensor([[1, 5, 9]]), torch.ones(3, D, dtype=torch.float64)
    weight.grad = torch.sparse_coo_tensor(indices, values, (N, D), check_invariants=True)
    rows, found = coalesced_rows(weight)
    assert found.data_ptr() == values.data_ptr()
    assert rows.tolist() == [1, 5, 9]
    weight.grad = torch.sparse_coo_tensor(torch.tensor([[5, 1, 5]]), values, (N, D), check_invariants=True)
    rows, found = coalesced_rows(weight)
    assert rows.tolist() == [1, 5]
    assert found[:, 0].tolist() == [1, 2]


def test_bfloat16_takes_the_path_of_torch() -> None:
    steps = touches(17, 10, torch.bfloat16)
    weight = start(torch.bfloat16)
    exact, _ = dense_twin(start(torch.bfloat16).double().detach().requires_grad_(), [(r, v.double()) for r, v in steps],
                          False, momentum=0.9, weight_decay=0.01)  # fmt: skip
    optimizer = RowSparseSGD([weight], lr=0.1, momentum=0.9, weight_decay=0.01)
    for number, (rows, values) in enumerate(steps):
        schedule(optimizer, number, len(steps), False)
        weight.grad = sparse(rows, values)
        optimizer.step()
    optimizer.flush()
    assert (weight.double() - exact).abs().max() < 0.05 * exact.abs().max()


def test_kernels_put_torch_s_threads_back_and_momentum_takes_no_memory_before_it_is_used() -> None:
    threads = torch.get_num_threads()
    row_kernels.gather_rows(torch.ones(3, 2), torch.tensor([0, 2]))
    assert torch.get_num_threads() == threads

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    weight = torch.empty(50_000_000)
    before = resident()
    buffer = row_kernels.zeros_like_rows(weight)
    assert resident() - before < 20_000_000
    assert buffer.dtype == torch.float32
    assert not buffer[::1_000_000].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rows="lazy"), "'lazy_exact', 'dense', 'frozen', got 'lazy'"),
        (dict(dampening=0.1, momentum=0.9), "dampening"),
        (dict(nesterov=True), "momentum"),
        (dict(lr=-1.0), "at least 0"),
        (dict(weight_decay=float("nan")), "at least 0"),
        (dict(flush_every=0), "flush_every"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS.build(dict(type="alimm.RowSparseSGD", params=[start()], **settings))


def test_gradients_and_rows_that_make_no_sense() -> None:
    weight = start()
    optimizer = RowSparseSGD([weight], lr=0.1)
    weight.grad = torch.sparse_coo_tensor(
        torch.tensor([[1], [2]]), torch.ones(1).double(), (N, D), check_invariants=True
    )
    with pytest.raises(ValueError, match="1 sparse dimension"):
        optimizer.step()
    weight.grad = sparse([1], torch.ones(1, D).double())
    optimizer.step()
    for rows in ([-1], [N], [2, 2], [3, 1]):
        with pytest.raises(ValueError, match="row numbers"):
            catch_up_rows(weight, torch.tensor(rows))
    strided = nn.Parameter(torch.ones(D, N).t())
    strided.grad = sparse([1], torch.ones(1, D))
    with pytest.raises(ValueError, match="contiguous"):
        RowSparseSGD([strided], lr=0.1).step()
