"""Both CUDA kernels of the search compile to PTX for three generations of GPUs, without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ops.quantize.test_cuda_compile import CAPABILITIES, HIDE_A_LIBRARY, HIDE_THE_MODULE, needs_compiler

KERNELS = ("beam_kernel", "rerank_kernel", "rerank_kernel of float16")
SHARED_MEMORY = 48 << 10  # bytes that a block has without asking


def signature(name: str) -> tuple[Any, ...]:
    from numba import boolean, float32, int32, int64, types, uint8, uint16, uint32, uint64

    codes, ids = uint64[:, ::1], int32[:, ::1]
    graph = (codes, int64, int64[::1], int32[::1], ids, int64)
    if name == "beam_kernel":
        return codes, *graph, int64, uint8[::1], boolean, uint32[::1], ids, uint16[:, ::1], int64[::1]
    features = types.Array(types.float16 if "float16" in name else float32, 2, "C")
    rows = int64[:, ::1]
    return float32[:, ::1], features, int64, rows, int64, int64, float32[:, ::1], rows


@needs_compiler
@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm_{0[0]}{0[1]}".format)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles(name: str, capability: tuple[int, int], tmp_path: Path) -> None:
    from numba import cuda

    from alimm_ops.graph import beam_cuda_kernels

    kernel = getattr(beam_cuda_kernels, name.split()[0])
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature(name), cc=capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx
    assert ".entry" in ptx
    if name == "beam_kernel":
        assert "popc.b64" in ptx
        assert not re.findall(r"\.f(?:32|64)\b", ptx)  # whole numbers only: nothing can be rounded
    else:
        assert "sqrt.rn.f64" in ptx
        assert "div.rn.f64" in ptx
        assert not re.findall(r"(?:add|sub|mul|fma|div)\.\S*f(?:16|32)\b", ptx)  # no sum in less than double precision
    ptxas = shutil.which("ptxas")
    if ptxas:
        (tmp_path / "kernel.ptx").write_text(ptx)
        arch = f"-arch=sm_{capability[0]}{capability[1]}"
        run = subprocess.run(
            [ptxas, "-v", arch, "kernel.ptx", "-o", "out"], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert re.findall(r"(\d+) bytes spill", run.stderr) == ["0", "0"]
        own = max(int(size) for size in re.findall(r"(\d+) bytes smem", run.stderr))
        assert own + dynamic_bytes(name) <= SHARED_MEMORY


def dynamic_bytes(name: str) -> int:
    """The most that a launch asks for."""
    from alimm_ops.graph import beam_cuda
    from alimm_ops.graph import beam_cuda_kernels as kernels
    from alimm_ops.graph.hamming_reference import MAX_WORDS

    if name == "beam_kernel":
        return 8 * (4 * beam_cuda.MAX_EF + 2 * kernels.THREADS + MAX_WORDS)
    return 4 * beam_cuda.MAX_CANDIDATES


def test_the_list_of_kernels_is_complete() -> None:
    from alimm_ops.graph import beam_cuda_kernels

    names = {name for name in vars(beam_cuda_kernels) if name.endswith("_kernel")}
    assert {name.split()[0] for name in KERNELS} == names


def test_the_constants_of_a_tile_fit_together() -> None:
    from alimm_ops.graph import beam_cuda_kernels as kernels
    from alimm_ops.graph.beam_reference import METRICS

    assert kernels.PITCH % 2 == 1
    assert kernels.PITCH >= kernels.TILE
    assert (METRICS[kernels.COSINE], METRICS[kernels.IP], METRICS[kernels.L2]) == ("cosine", "ip", "l2")


@pytest.mark.parametrize("hide", [HIDE_THE_MODULE, HIDE_A_LIBRARY])
def test_without_numba_cuda_the_import_names_the_extra(hide: str) -> None:
    code = f"import sys\n{hide}\nimport alimm_ops.graph.beam_cuda"
    ops = Path(__file__).parents[3] / "ops"
    run = subprocess.run([sys.executable, "-c", code], cwd=ops, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "Install it with: pip install 'alimm[cuda]'" in run.stderr.splitlines()[-1]
