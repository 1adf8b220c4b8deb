"""The measurements behind `alimm advise`: rates of this machine, and real steps of the head at a size that fits.

Memory of a step on the CPU is the growth of the resident set: the peak that Linux keeps (``VmHWM``, set back before the
steps by writing 5 to ``/proc/self/clear_refs``) less what was resident before the head was built, so that temporaries
inside operators and the memory of NumPy and Numba count too. It is taken in a process of its own, in which glibc hands
every freed block above 128 KB back (``MALLOC_MMAP_THRESHOLD_``); else what malloc keeps for later would count. On CUDA
it is what torch allocated. Elsewhere it is not measured.
"""

from __future__ import annotations

import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from alimm.analysis.head_cost import HeadShape, Rates

PROBE_BATCH = 4096
"""Most samples in a probe: it bounds the memory of all probes to about 200 MB for 1,024 features."""

PROBE_BLOCKS = 4
"""Blocks of kept logits that the probe of the softmax walks over, so that they do not stay in a cache."""


@dataclass(frozen=True)
class MeasuredStep:
    """A step of a real head.

    Attributes:
        seconds: median over steps.
        spread: slowest less fastest of them, seconds.
        peak_bytes: memory of head and optimizer at its highest, or None where it cannot be read.
    """

    seconds: float
    spread: float
    peak_bytes: int | None


def machine_rates(shape: HeadShape, device: torch.device, budget_s: float = 4.0) -> Rates:
    """Measure products, softmax and copies at the shapes of the head's blocks.

    Args:
        shape: of the head.
        device: where.
        budget_s: seconds in all, about; each of the eight probes runs at least three times whatever it takes.
    """
    batch, dim, block = min(shape.batch, PROBE_BATCH), shape.dim, min(shape.block, shape.rows)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, dim, generator=generator).to(device)
    rows = torch.randn(block, dim, generator=generator).to(device)
    kept = torch.randn(batch, PROBE_BLOCKS * block, generator=generator).to(device)
    scratch, grad_x, grad_rows = torch.empty(batch, block, device=device), torch.zeros_like(x), torch.empty_like(rows)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    half_a, half_b = rows.to(half)[: min(block, 1024)], rows.to(half)
    half_out = torch.empty(len(half_a), len(half_b), dtype=half, device=device)
    source = torch.empty(1 << 24, device=device).fill_(1)
    target = torch.empty_like(source)
    parts = [kept[:, number * block : (number + 1) * block] for number in range(PROBE_BLOCKS)]
    each = budget_s / 8

    def forward() -> None:
        for z in parts:
            z *= 1.0
            high = z.amax(1, keepdim=True)
            torch.sub(z, high, out=scratch).exp_().sum(1)

    def backward() -> None:
        for z in parts:
            torch.sub(z, x[:, :1], out=scratch).exp_().mul_(x[:, :1])

    product = 2.0 * batch * dim * block
    return Rates(
        logits=product / _seconds(lambda: torch.mm(x, rows.T, out=scratch), device, each),
        grad_features=product / _seconds(lambda: grad_x.addmm_(scratch, rows, beta=0), device, each),
        grad_rows=product / _seconds(lambda: torch.mm(scratch.T, x, out=grad_rows), device, each),
        softmax_forward=_seconds(forward, device, each) / kept.numel(),
        softmax_backward=_seconds(backward, device, each) / kept.numel(),
        copy=2.0 * source.numel() * 4 / _seconds(lambda: target.copy_(source), device, each),
        fresh=source.numel() * 4 / _seconds(lambda: torch.empty_like(source).fill_(0), device, each),
        graph=2.0 * half_out.numel() * dim / _seconds(lambda: torch.mm(half_a, half_b.T, out=half_out), device, each),
        sample=_steps(HeadShape(min(64, shape.classes), dim, batch, active=1.0), "random", device, 5).seconds / batch,
    )


def measure_steps(
    shape: HeadShape, device: torch.device, methods: Sequence[str] = ("full", "fused", "random"), repeats: int = 5
) -> dict[str, MeasuredStep]:
    """Run real training steps of `alimm.ShardedHead` with `alimm.RowSparseSGD`, momentum and weight decay.

    Args:
        shape: of one rank, made small by `feasible`.
        device: where.
        methods: of the head.
        repeats: steps that count, after two to warm up.

    Raises:
        RuntimeError: the process that measures memory failed; the message holds what it said.
    """
    _warm_up(shape, device, methods)
    if device.type == "cuda":
        return {method: _steps(shape, method, device, repeats) for method in methods}
    measured = {method: _steps(shape, method, device, repeats) for method in methods}
    peaks = _peaks_elsewhere(shape, methods)
    return {method: replace(step, peak_bytes=peaks[method]) for method, step in measured.items()}


def _peaks_elsewhere(shape: HeadShape, methods: Sequence[str]) -> dict[str, int | None]:
    job = json.dumps(dict(shape=asdict(shape), methods=list(methods), threads=torch.get_num_threads()))
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "alimm.analysis.head_probe", job], capture_output=True, text=True, env=environ
    )
    if done.returncode:
        raise RuntimeError(f"measuring memory failed with exit code {done.returncode}: {done.stderr[-2000:]}")
    peaks: dict[str, int | None] = json.loads(done.stdout.splitlines()[-1])
    return peaks


def _peaks_here(job: str) -> dict[str, int | None]:
    """What the process that `_peaks_elsewhere` starts does."""
    task = json.loads(job)
    torch.set_num_threads(task["threads"])
    shape, device = HeadShape(**task["shape"]), torch.device("cpu")
    _warm_up(shape, device, task["methods"])
    return {method: _steps(shape, method, device, 1).peak_bytes for method in task["methods"]}


def _warm_up(shape: HeadShape, device: torch.device, methods: Sequence[str]) -> None:
    """Compile and load what a first step needs, which is no memory and no time of the head."""
    tiny = HeadShape(min(64, shape.classes), shape.dim, min(8, shape.batch), active=1.0)
    for method in methods:
        _steps(tiny, method, device, 1)


def _steps(shape: HeadShape, method: str, device: torch.device, repeats: int) -> MeasuredStep:
    from alimm.heads.sharded import ShardedHead
    from alimm.optim.row_sparse_sgd import RowSparseSGD
    from alimm.structures import ClsDataSample

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(shape.classes, (shape.batch,), generator=generator).tolist()
    samples = [ClsDataSample().set_gt_label(label) for label in labels]
    source = torch.randn(shape.batch, shape.dim, generator=generator).to(device)
    gc.collect()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")
    head = ShardedHead(shape.classes, shape.dim, method=method, active=shape.active).to(device)
    optimizer = RowSparseSGD(head.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    # A step is to be seen without what drawing the first weights took.
    known = _reset_peak(device)
    times = []
    for number in range(repeats + 2):
        if number == 1:
            _commit(optimizer)
        features = source.clone().requires_grad_()
        _wait(device)
        start = time.perf_counter()
        loss: Tensor = head.loss(features, samples)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
    counted = times[2:]
    grown = None if before is None or peak is None or not known else max(0, peak - before)
    return MeasuredStep(statistics.median(counted), max(counted) - min(counted), grown)


def _commit(optimizer: torch.optim.Optimizer) -> None:
    """Write to all of the state: memory of rows that no step has met yet is not there, but a training will need it."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                value.add_(0)


def _seconds(function: Callable[[], object], device: torch.device, budget: float) -> float:
    """Median seconds of a call, over at least three and as many as fit the budget."""
    function()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 1000):
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - start)
    return max(statistics.median(times), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _reset_peak(device: torch.device) -> bool:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    print(json.dumps(_peaks_here(sys.argv[1])))
