"""Every CUDA kernel of the selection compiles to PTX for three generations of GPUs, without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ops.quantize.test_cuda_compile import CAPABILITIES, HIDE_A_LIBRARY, HIDE_THE_MODULE, needs_compiler

KERNELS = (
    "clear_kernel",
    "label_kernel",
    "insert_kernel",
    "level_kernel",
    "scan_kernel",
    "cut_kernel",
    "mark_kernel",
    "bin_kernel",
    "take_kernel",
    "divide_kernel",
    "fill_count_kernel",
    "fill_kernel",
    "pack_count_kernel",
    "pack_kernel",
)


def signature(name: str) -> tuple[Any, ...]:
    from numba import int32, types, uint8, uint16, uint32

    ints, bitmap, words = int32[::1], uint32[::1], types.UniTuple(uint32, 6)
    table = (ints, ints)  # keys, best
    network = (uint32, uint32, words, int32)
    return {
        "clear_kernel": (ints, ints, uint8[::1], ints),
        "label_kernel": (ints, int32, bitmap, ints),
        "insert_kernel": (ints, uint16[::1], int32, int32, words, bitmap, *table, ints),
        "level_kernel": (int32, *table, ints),
        "scan_kernel": (ints,),
        "cut_kernel": (ints, int32, ints),
        "mark_kernel": (int32, words, *table, ints, bitmap, ints),
        "bin_kernel": (ints, ints),
        "take_kernel": (int32, words, *table, ints, bitmap, ints),
        "divide_kernel": (words, ints, ints, bitmap),
        "fill_count_kernel": (*network, bitmap, ints),
        "fill_kernel": (*network, int32, bitmap, ints, ints, bitmap),
        "pack_count_kernel": (bitmap, bitmap, ints),
        "pack_kernel": (bitmap, bitmap, ints, ints, uint8[::1]),
    }[name]


@needs_compiler
@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm_{0[0]}{0[1]}".format)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles(name: str, capability: tuple[int, int], tmp_path: Path) -> None:
    from numba import cuda

    from alimm_ops.graph import select_cuda_kernels

    kernel = getattr(select_cuda_kernels, name)
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature(name), cc=capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx
    assert ".entry" in ptx
    assert not re.findall(r"\.f(?:32|64)\b", ptx)  # whole numbers only: nothing can be rounded
    ptxas = shutil.which("ptxas")
    if ptxas:
        (tmp_path / "kernel.ptx").write_text(ptx)
        arch = f"-arch=sm_{capability[0]}{capability[1]}"
        run = subprocess.run(
            [ptxas, "-v", arch, "kernel.ptx", "-o", "out"], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert re.findall(r"(\d+) bytes spill", run.stderr) == ["0", "0"]


def test_the_list_of_kernels_is_complete() -> None:
    from alimm_ops.graph import select_cuda_kernels

    assert set(KERNELS) == {name for name in vars(select_cuda_kernels) if name.endswith("_kernel")}


@pytest.mark.parametrize("hide", [HIDE_THE_MODULE, HIDE_A_LIBRARY])
def test_without_numba_cuda_the_import_names_the_extra(hide: str) -> None:
    code = f"import sys\n{hide}\nimport alimm_ops.graph.select_cuda"
    ops = Path(__file__).parents[3] / "ops"
    run = subprocess.run([sys.executable, "-c", code], cwd=ops, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "Install it with: pip install 'alimm[cuda]'" in run.stderr.splitlines()[-1]
