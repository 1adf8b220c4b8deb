"""The CUDA simulator itself: kernels' tests rely on shared memory, barriers and atomics working in it."""

from __future__ import annotations

import numpy as np
import pytest
from numba import cuda, int64

pytestmark = pytest.mark.cudasim

BLOCK = 8


# The simulator replaces the global name "cuda" while a kernel runs: import it at the top of a module, as here.
@cuda.jit
def block_sum(values, total):
    shared = cuda.shared.array(BLOCK, int64)
    lane = cuda.threadIdx.x
    index = cuda.grid(1)
    shared[lane] = values[index] if index < values.size else 0
    cuda.syncthreads()
    if lane == 0:
        partial = 0
        for other in range(BLOCK):
            partial += shared[other]
        cuda.atomic.add(total, 0, partial)


def test_a_block_sum_with_shared_memory_and_atomics() -> None:
    values = np.arange(21, dtype=np.int64)
    total = np.zeros(1, np.int64)
    block_sum[3, BLOCK](values, total)
    assert total[0] == 210


def test_this_process_simulates() -> None:
    assert "simulator" in cuda.jit.__module__
