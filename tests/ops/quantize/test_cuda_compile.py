"""Every CUDA kernel compiles to PTX for three generations of GPUs, without a GPU, and holds no harmful contraction."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAPABILITIES = [(7, 5), (8, 0), (9, 0)]
KERNELS = (
    "range_kernel",
    "stats_rows_kernel",
    "stats_planes_kernel",
    "stats_finish_kernel",
    "quantize_rows_kernel",
    "quantize_planes_kernel",
    "dequantize_kernel",
    "im2col_kernel",
)


def missing_compiler() -> str | None:
    """The shared library that compiling lacks here, of the CUDA runtime, NVVM and NVRTC."""
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        return "the simulator has no compiler"
    try:
        from cuda.bindings import nvrtc
        from numba.cuda.cudadrv import nvvm

        nvvm.NVVM()
        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # a missing shared library is a RuntimeError
        return f"{str(error).splitlines()[0]}; the extra 'cuda' brings it: pip install 'alimm[cuda]'"
    return None


MISSING = missing_compiler()
needs_compiler = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def signature(name: str) -> tuple[Any, ...]:
    from numba import boolean, float32, float64, int8, int32, int64, types, uint8, uint32

    triple = types.UniTuple(int64, 3)
    stats = (float32[::1], float64[:, :, ::1], int64)
    quantise = (float32[::1], float32, int8[:, ::1], uint8[:, ::1], boolean, boolean, int32, boolean, uint32, uint32)
    return {
        "range_kernel": (uint32[::1], uint32[::1]),
        "stats_rows_kernel": (float32[:, ::1], uint32[:, ::1], *stats),
        "stats_planes_kernel": (float32[:, :, ::1], uint32[:, :, ::1], *stats),
        "stats_finish_kernel": (float64[:, :, ::1], int64, uint32[::1], float64[::1], float64[::1], int64[::1]),
        "quantize_rows_kernel": (float32[:, ::1], *quantise),
        "quantize_planes_kernel": (float32[:, :, ::1], *quantise),
        "dequantize_kernel": (int32[:, ::1], float32[::1], float32[::1], float32[:, ::1]),
        "im2col_kernel": (uint8[:, :, :, :, ::1], uint8[:, ::1], *[triple] * 5, int32),
    }[name]


@needs_compiler
@pytest.mark.parametrize("capability", CAPABILITIES, ids="sm_{0[0]}{0[1]}".format)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles(name: str, capability: tuple[int, int], tmp_path: Path) -> None:
    from numba import cuda

    from alimm_ops.quantize import cuda_kernels

    kernel = getattr(cuda_kernels, name)
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature(name), cc=capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx
    assert ".entry" in ptx
    # A product that is then added keeps its bits only where it is exact: n * 2**-16, and squares in float64.
    fused = re.findall(r"fma\.\S+\s[^;]*", ptx)
    assert all("0f37800000" in line or line.startswith("fma.rn.f64") for line in fused)
    assert ("fma.rn.f64" in ptx) <= name.startswith("stats_")
    assert ".ftz" not in ptx  # subnormals stay
    ptxas = shutil.which("ptxas")
    if ptxas:
        (tmp_path / "kernel.ptx").write_text(ptx)
        arch = f"-arch=sm_{capability[0]}{capability[1]}"
        run = subprocess.run(
            [ptxas, "-v", arch, "kernel.ptx", "-o", "out"], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        registers, spilt = re.search(r"Used (\d+) reg", run.stderr), re.findall(r"(\d+) bytes spill", run.stderr)
        assert registers is not None
        assert int(registers[1]) <= 128  # two blocks of 256 threads a multiprocessor
        assert spilt == ["0", "0"]


def test_the_list_of_kernels_is_complete() -> None:
    from alimm_ops.quantize import cuda_kernels

    assert set(KERNELS) == {name for name in vars(cuda_kernels) if name.endswith("_kernel")}


HIDE_THE_MODULE = "sys.modules['numba.cuda'] = None"
HIDE_A_LIBRARY = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numba.cuda":
            raise RuntimeError("no libcudart")
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("hide", [HIDE_THE_MODULE, HIDE_A_LIBRARY])
def test_without_numba_cuda_the_import_names_the_extra(hide: str) -> None:
    code = f"import sys\n{hide}\nimport alimm_ops.quantize.cuda"
    ops = Path(__file__).parents[3] / "ops"
    run = subprocess.run([sys.executable, "-c", code], cwd=ops, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "Install it with: pip install 'alimm[cuda]'" in run.stderr.splitlines()[-1]
