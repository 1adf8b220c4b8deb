"""Steps of a classifier alone, as the benchmarks of heads time them: forward, backward, update.

Every method gets the same features and labels. The KNN graph is a made one (each class's neighbours are K classes of a
group of its own), so that no graph has to be built first: the cost of a step depends on its size and not on which
classes it names. Run as a program, the file measures the peak memory of one method in a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from alimm.heads import ShardedHead
from alimm.optim.row_sparse_sgd import RowSparseSGD
from alimm.projects.knn_softmax.head import KNNSoftmaxHead
from alimm.structures import ClsDataSample

SCALE = 32.0
PLAIN = "plain torch"
METHODS = (PLAIN, "full", "fused", "random", "knn")


def keep_memory() -> None:
    """Tell glibc to keep large blocks: each is else mapped anew, which costs every arm page faults by chance."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 30)
        ctypes.CDLL(None).mallopt(trim_threshold, (1 << 31) - 1)


def give_back() -> None:
    """Give free memory back to the system, which `keep_memory` has kept."""
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def made_graph(classes: int, k: int) -> torch.Tensor:
    """Lists of k neighbours, int32 (classes, k): the others of a group of 8 k classes that are spread over all rows."""
    groups = max(1, classes // (8 * k))
    step = torch.arange(1, k + 1, dtype=torch.int64)[None] * groups
    lists = torch.empty((classes, k), dtype=torch.int32)
    for start in range(0, classes, 1 << 18):
        rows = torch.arange(start, min(start + (1 << 18), classes))[:, None]
        lists[start : start + len(rows)] = ((rows + step) % classes).int()
    return lists


def batch(classes: int, dim: int, size: int) -> tuple[torch.Tensor, list[ClsDataSample]]:
    """Features (size, dim) that want a gradient, and labels."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(size, dim, generator=generator).requires_grad_()
    labels = torch.randint(classes, (size,), generator=generator).tolist()
    return features, [ClsDataSample().set_gt_label(label) for label in labels]


@dataclass(frozen=True)
class Step:
    """Takes one step when it is called, and returns the loss."""

    take: Callable[[], float]
    weight: torch.Tensor
    optimizer: torch.optim.Optimizer

    def __call__(self) -> float:
        return self.take()

    def commit(self) -> None:
        """Write to all of the optimizer's state: what was never written is not resident, but in time it will be."""
        for tensor in self.optimizer.state[self.weight].values():
            if isinstance(tensor, torch.Tensor) and tensor.ndim:
                tensor.view(-1)[::512] += 0


def stepper(method: str, classes: int, dim: int, size: int, active: float | int, k: int) -> Step:
    """A step of a method."""
    features, samples = batch(classes, dim, size)
    if method == PLAIN:
        return plain_stepper(classes, dim, features, samples)
    kind = KNNSoftmaxHead if method == "knn" else ShardedHead
    more = dict(neighbours=k) if method == "knn" else {}
    head = kind(classes, dim, method, active=active, scale=SCALE, permute="none", **more)
    if isinstance(head, KNNSoftmaxHead):
        head.set_graph(made_graph(classes, k))
    optimizer = RowSparseSGD([head.weight], lr=0.1, momentum=0.9, weight_decay=1e-4)

    def step() -> float:
        optimizer.zero_grad()
        features.grad = None
        loss = head.loss(features, samples)["loss"]
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Step(step, head.weight, optimizer)


def plain_stepper(classes: int, dim: int, features: torch.Tensor, samples: list[ClsDataSample]) -> Step:
    """What one writes without a library: normalised weights, linear, cross entropy, torch's SGD."""
    labels = torch.cat([sample.gt_label for sample in samples])
    weight = (torch.randn(classes, dim) / dim**0.5).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=1e-4)

    def step() -> float:
        optimizer.zero_grad()
        features.grad = None
        logits = SCALE * F.linear(F.normalize(features), F.normalize(weight))
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return Step(step, weight, optimizer)


def peak_bytes(method: str, classes: int, dim: int, size: int, active: float | int, k: int, threads: int) -> int:
    """Peak resident memory that a method adds to a process with everything imported and warmed up, in bytes; Linux."""
    command = [sys.executable, str(Path(__file__)), method, *map(str, (classes, dim, size, active, k, threads))]
    # Blocks that were given back shall not count: glibc keeps them otherwise.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {method} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def _status(name: str) -> int:
    """A line of this process's status in bytes: ``VmRSS``, memory now, or ``VmHWM``, its peak."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    """Take three steps and print the growth of the peak."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=METHODS)
    for name in ("classes", "dim", "size"):
        parser.add_argument(name, type=int)
    parser.add_argument("active", type=float)
    parser.add_argument("k", type=int)
    parser.add_argument("threads", type=int)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    active = int(given.active) if given.active > 1 else given.active
    for _ in range(2):
        stepper(given.method, 1000, given.dim, given.size, min(active, 1000), given.k)()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    before = _status("VmRSS")
    step = stepper(given.method, given.classes, given.dim, given.size, active, given.k)
    for _ in range(3):
        step()
    step.commit()
    step()
    print(_status("VmHWM") - before)


if __name__ == "__main__":
    main()
