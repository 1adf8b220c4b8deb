"""``alimm doctor``: what is installed, what works, and the command that mends what does not.

Every check runs in a process of its own with a time limit, so a crash in a compiled operator is a line of the table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from alimm.paths import cache_dir, data_root, resource_root
from alimm.version import __version__

PACKAGES = [
    "torch", "mmengine", "mmcv", "mmdet", "mmsegmentation", "mmaction2", "numpy", "numba", "numba-cuda", "faiss-cpu",
    "faiss-gpu", "setuptools", "opencv-python-headless", "rich",
]  # fmt: skip
NEEDED_GB = 2.0


@dataclass(frozen=True)
class Check:
    """One thing to try.

    ``code`` runs in a new interpreter and prints one line about what it found; it fails by raising. ``mend`` is the
    command to run then. Without a ``core`` check alimm itself does not work.
    """

    name: str
    code: str
    mend: str
    core: bool = False
    environ: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: Check
    works: bool
    detail: str


_PLUGIN = "from alimm import compat; compat.apply(); import {0}, {0}.models; print({0}.__version__)"
# mmcv's own build needs the torch that is installed, which an isolated build does not see.
_EXTRA = "make setup  (in a checkout), else: pip install ninja && pip install --no-build-isolation 'alimm[{0}]'"

CHECKS = (
    Check(
        "torch",
        "import torch; c = torch.version.cuda; n = torch.cuda.device_count()\n"
        "names = ', '.join(torch.cuda.get_device_name(i) for i in range(n)) or 'no CUDA device'\n"
        "assert float(torch.ones(3) @ torch.ones(3)) == 3.0\n"
        "print(torch.__version__, 'CUDA ' + c if c else 'CPU build', '|', names)",
        "pip install 'torch>=2.4'",
        core=True,
    ),
    Check("mmengine", "import mmengine.runner as r; print(r.Runner.__module__)", "pip install mmengine", core=True),
    Check(
        "pkg_resources",
        "import warnings; warnings.simplefilter('ignore'); import pkg_resources; print('mmengine may use it')",
        "pip install 'setuptools<81'",
    ),
    Check(
        "alimm", "import alimm.apis.train, alimm.apis.test as t; print('train, test')", "pip install alimm", core=True
    ),
    Check(
        "gloo, 2 ranks",
        "from alimm.doctor import sum_over_ranks as f; from alimm.distributed.launch import run_ranks as r\n"
        "assert r(f, 2) == [3.0, 3.0]; print('all_reduce is right')",
        "check that no firewall blocks the loopback device",
        core=True,
    ),
    Check(
        "faiss",
        "import faiss, numpy as np; x = np.eye(8, dtype='float32'); i = faiss.IndexFlatIP(8); i.add(x)\n"
        "assert (i.search(x, 1)[1][:, 0] == np.arange(8)).all(); print(faiss.__version__, 'exact search')",
        "pip install faiss-cpu",
        core=True,
    ),
    Check(
        "numba",
        "import numba, numpy as np; f = numba.njit(lambda a: a.sum()); assert f(np.arange(5)) == 10\n"
        "print(numba.__version__, 'compiles')",
        "pip install numba",
        core=True,
    ),
    Check(
        "numba CUDA, GPU",
        "from numba import cuda; assert cuda.is_available(), 'no GPU or driver'; print(cuda.gpus.lst)",
        "needs an NVIDIA GPU, its driver, and: pip install 'alimm[cuda]'",
    ),
    Check(
        "numba CUDA, simulator",
        "import numpy as np; from numba import cuda\n"
        "k = cuda.jit(lambda a: cuda.atomic.add(a, 0, 1)); a = np.zeros(1, dtype='int32'); k[1, 4](a)\n"
        "assert a[0] == 4; print('runs kernels')",
        "pip install 'alimm[cuda]'",
        environ=(("NUMBA_ENABLE_CUDASIM", "1"),),
    ),
    Check(
        "mmcv operators",
        "import torch, mmcv; from mmcv.ops import nms\n"
        "b = torch.tensor([[0., 0, 9, 9], [0, 0, 9, 8], [20, 20, 30, 30]])\n"
        "assert len(nms(b, torch.tensor([.9, .8, .7]), 0.5)[1]) == 2; print(mmcv.__version__, 'nms')",
        "make setup  (in a checkout), else: pip install ninja && pip install --no-build-isolation 'mmcv==2.1.0'",
    ),
    Check("mmdet", _PLUGIN.format("mmdet"), _EXTRA.format("det")),
    Check("mmseg", _PLUGIN.format("mmseg"), _EXTRA.format("seg")),
    Check("mmaction", _PLUGIN.format("mmaction"), _EXTRA.format("video")),
)


def sum_over_ranks(rank: int, ranks: int) -> float:
    """The sum of 1 .. ranks by an all_reduce."""
    import torch

    value = torch.tensor(float(rank + 1))
    torch.distributed.all_reduce(value)
    return float(value)


def run_check(check: Check, timeout_s: float = 120.0) -> Finding:
    """Try one thing in a new interpreter."""
    environ = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", **dict(check.environ)}
    root = str(Path(__file__).resolve().parents[1])
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-c", check.code], capture_output=True, text=True, timeout=timeout_s, env=environ
        )
    except subprocess.TimeoutExpired:
        return Finding(check, False, f"no answer in {timeout_s:.0f} s")
    if done.returncode == 0:
        return Finding(check, True, done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "")
    if done.returncode < 0:
        return Finding(check, False, f"crashed with signal {-done.returncode}")
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return Finding(check, False, lines[-1] if lines else f"exit code {done.returncode}")


def check_folder(name: str, folder: Path, core: bool) -> Finding:
    """Whether a folder can be written, and the space that is left there. Makes the folder."""
    mend = f"make {folder} writable, or set " + ("ALIMM_DATA" if name == "data" else "MMENGINE_HOME") + " to another"
    check = Check(f"{name} folder", "", mend, core)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        return Finding(check, False, f"{folder}: {error.strerror}")
    enough = free >= NEEDED_GB
    return Finding(check, enough, f"{folder}, {free:.1f} GB free" + ("" if enough else f", {NEEDED_GB} GB wanted"))


def check_compiler() -> Finding:
    """Whether there is a C++ compiler, for mmcv's operators."""
    check = Check("C++ compiler", "", "apt-get install g++  (or set CXX)")
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if path := shutil.which(name):
            shown = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.splitlines()
            return Finding(check, True, f"{path}: {shown[0] if shown else ''}")
    return Finding(check, False, "none found")


def environment() -> list[tuple[str, str]]:
    """Name and value of what a bug report needs."""
    rows = [
        ("alimm", f"{__version__} in {Path(__file__).resolve().parent}"),
        ("configs and tools", str(resource_root())),
        ("Python", f"{platform.python_version()} {sys.executable}"),
        ("platform", f"{platform.platform()}, {os.cpu_count()} CPUs"),
    ]
    return rows + [(package, _version(package)) for package in PACKAGES]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def examine(checks: Sequence[Check] = CHECKS, timeout_s: float = 120.0) -> list[Finding]:
    """Run the checks, two at a time, and look at the folders and the compiler."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        findings = list(pool.map(lambda check: run_check(check, timeout_s), checks))
    folders = [check_folder("cache", cache_dir(), core=True), check_folder("data", data_root(), core=False)]
    return [*findings, *folders, check_compiler()]


def report(rows: Sequence[tuple[str, str]], findings: Sequence[Finding]) -> None:
    """Print the environment and the findings: a table on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        for name, value in rows:
            print(f"{name}: {value}")
        for found in findings:
            mark = "ok  " if found.works else "FAIL" if found.check.core else "no  "
            print(f"{mark} {found.check.name}: {found.detail}")
    else:
        from rich.console import Console
        from rich.table import Table

        console = Console()
        versions = Table("part", "version", title="environment")
        table = Table("part", "works", "found", title="checks")
        for name, value in rows:
            versions.add_row(name, value)
        for found in findings:
            table.add_row(found.check.name, "[green]yes" if found.works else "[red]no", found.detail)
        console.print(versions, table)
    for found in findings:
        if not found.works:
            print(f"{found.check.name} does not work{' and alimm needs it' if found.check.core else ''}. To mend it:")
            print(f"    {found.check.mend}")


def main(argv: Sequence[str] | None = None) -> int:
    """``alimm doctor``: exit code 0 if what alimm itself needs works, else 1."""
    parser = argparse.ArgumentParser(
        prog="alimm doctor", description="Print the environment, what works, and how to mend what does not."
    )
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for each check (120)")
    arguments = parser.parse_args(argv)
    findings = examine(timeout_s=arguments.timeout)
    report(environment(), findings)
    core_works = all(found.works for found in findings if found.check.core)
    print("alimm works" if core_works else "alimm does not work here yet: see above")
    return 0 if core_works else 1
