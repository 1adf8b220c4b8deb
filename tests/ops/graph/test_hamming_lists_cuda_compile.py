"""Every CUDA kernel of the distances and lists compiles to PTX for three generations of GPUs, without a GPU."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ops.quantize.test_cuda_compile import CAPABILITIES, HIDE_A_LIBRARY, HIDE_THE_MODULE, needs_compiler

KERNELS = {
    "hamming": ("matrix_kernel", "nearest_kernel", "clear_kernel", "ones_kernel", "majority_kernel"),
    "lists": (
        "merge_kernel",
        "propagate_kernel",
        "clear_kernel",
        "count_kernel",
        "allot_kernel",
        "scatter_kernel",
        "reverse_kernel",
        "diversify_kernel",
    ),
}
# The oldest generation by default: inlined barriers and queues take seconds a kernel to compile.
GENERATIONS = [pytest.param(c, marks=[pytest.mark.slow] * (c != CAPABILITIES[0])) for c in CAPABILITIES]
SHARED_MEMORY = 48 << 10  # bytes that a block has without asking


def signature(name: str) -> tuple[Any, ...]:
    from numba import int32, int64, uint8, uint16, uint64

    codes, counters, flags = uint64[:, ::1], int32[::1], uint8[:, ::1]
    lists = (int32[:, ::1], uint16[:, ::1])
    return {
        "matrix_kernel": (codes, codes, uint16[:, ::1]),
        "nearest_kernel": (uint16[::1], int64, int64, int64, *lists),
        "clear_kernel": (counters,),
        "ones_kernel": (codes, counters, int64, counters, counters),
        "majority_kernel": (codes, counters, counters, codes, int64[::1]),
        "merge_kernel": (*lists, int64, *lists),
        "propagate_kernel": (codes, *lists, flags, counters, int32[:, ::1], flags, int64, *lists, flags),
        "count_kernel": (int32[:, ::1], int64, counters),
        "allot_kernel": (counters, counters, counters),
        "scatter_kernel": (int32[:, ::1], int64, counters, counters),
        "reverse_kernel": (uint16[:, ::1], int64, int64, counters, counters, counters, int64, *lists),
        "diversify_kernel": (codes, *lists, int64, int64, int64, int64, *lists),
    }[name]


@needs_compiler
@pytest.mark.parametrize("capability", GENERATIONS, ids="sm_{0[0]}{0[1]}".format)
@pytest.mark.parametrize(("family", "name"), [(family, name) for family in KERNELS for name in KERNELS[family]])
def test_a_kernel_compiles(family: str, name: str, capability: tuple[int, int], tmp_path: Path) -> None:
    from numba import cuda

    kernel = getattr(importlib.import_module(f"alimm_ops.graph.{family}_cuda_kernels"), name)
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature(name), cc=capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx
    assert ".entry" in ptx
    assert not re.findall(r"\.f(?:32|64)\b", ptx)  # whole numbers only: nothing can be rounded
    if name in ("matrix_kernel", "propagate_kernel", "diversify_kernel"):
        assert "popc.b64" in ptx
    ptxas = shutil.which("ptxas")
    if ptxas:
        (tmp_path / "kernel.ptx").write_text(ptx)
        arch = f"-arch=sm_{capability[0]}{capability[1]}"
        run = subprocess.run(
            [ptxas, "-v", arch, "kernel.ptx", "-o", "out"], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert re.findall(r"(\d+) bytes spill", run.stderr) == ["0", "0"]
        assert all(int(size) <= SHARED_MEMORY for size in re.findall(r"(\d+) bytes smem", run.stderr))


@pytest.mark.parametrize("family", KERNELS)
def test_the_list_of_kernels_is_complete(family: str) -> None:
    module = importlib.import_module(f"alimm_ops.graph.{family}_cuda_kernels")
    assert set(KERNELS[family]) == {name for name in vars(module) if name.endswith("_kernel")}


def test_the_constants_of_a_block_fit_together() -> None:
    """A step queues a key a thread, and a tile's codes are the longest, an odd number of words apart."""
    from alimm_ops.graph import hamming_cuda_kernels as kernels
    from alimm_ops.graph.hamming_reference import MAX_WORDS

    assert kernels.THREADS <= kernels.QUEUE
    assert kernels.TILE_WORDS >= kernels.TILE * (MAX_WORDS | 1)
    assert kernels.EMPTY > (65535 << 32 | 2**31 - 1)


@pytest.mark.parametrize("hide", [HIDE_THE_MODULE, HIDE_A_LIBRARY])
@pytest.mark.parametrize("family", KERNELS)
def test_without_numba_cuda_the_import_names_the_extra(family: str, hide: str) -> None:
    code = f"import sys\n{hide}\nimport alimm_ops.graph.{family}_cuda"
    ops = Path(__file__).parents[3] / "ops"
    run = subprocess.run([sys.executable, "-c", code], cwd=ops, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "Install it with: pip install 'alimm[cuda]'" in run.stderr.splitlines()[-1]
