"""The selection on a GPU, on torch tensors and a stream of their own: exactly what the CPU gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alimm_ops.graph import select_cpu
from tests.ops.graph.select_cases import Case, make_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("budget", [0, 300, 3_000, 40_000, 1_000_000])
@pytest.mark.parametrize("num_local", [257, 5_000, 1_000_000])
def test_equals_the_cpu(num_local: int, budget: int) -> None:
    compare(make_case(0, num_local, num_labels=200, length=60, budget=budget), 60)


@pytest.mark.parametrize("budget", [1, 5_000, 99_999, 100_000])
def test_one_large_level(budget: int) -> None:
    ids = np.random.default_rng(0).permutation(1 << 20)[:100_000].astype(np.int32)
    nothing = np.zeros(0, np.int32)
    compare(Case(np.arange(100_001), ids, np.zeros(100_000, np.uint16), nothing, 1 << 20, budget, 7), 1)


def compare(case: Case, levels: int) -> None:
    from alimm_ops.graph import select_cuda

    sizes = len(case.neighbours), len(case.own_labels), case.num_local, case.budget
    plan = select_cuda.plan(*sizes, levels)
    expected = select_cpu.select_active(*case)
    stream = torch.cuda.Stream()
    inputs = [torch.from_numpy(array).cuda() for array in case[1:4]]
    work, active, state = (torch.full((n,), 77, dtype=torch.int32, device="cuda") for n in (plan.work, plan.target, 8))
    filled = torch.full((plan.target,), 77, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    select_cuda.select_active(
        *inputs, case.num_local, case.budget, case.key, levels, work, active, filled, state, stream.cuda_stream
    )
    stream.synchronize()
    assert np.array_equal(active.cpu().numpy(), expected.active)
    assert np.array_equal(filled.cpu().numpy().astype(bool), expected.filled)
    assert select_cuda.decode_stats(state.cpu().numpy(), *sizes[1:]) == expected.stats
