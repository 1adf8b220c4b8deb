"""The device of a run."""

from __future__ import annotations

import re

import torch
from mmengine.device import get_device


def resolve_device(device: str | None, launcher: str = "none") -> str:
    """Check a device name, or choose one.

    Args:
        device: ``'cpu'``, ``'cuda'``, ``'cuda:N'`` or None.
        launcher: with one, each rank has its own GPU, so ``'cuda:N'`` is refused.

    Raises:
        ValueError: the name is wrong, or this machine has no such device.
    """
    if device is None:
        return str(get_device())
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {device!r}")
    if device == "cpu":
        return device
    count = torch.cuda.device_count()
    index = int(match[1] or 0)
    if index >= count:
        build = "a CPU build of torch" if torch.version.cuda is None else f"{count} CUDA devices visible"
        raise ValueError(f"--device {device} is not there: {build}. Use --device cpu, or see `alimm doctor`")
    if match[1] and launcher != "none":
        raise ValueError(f"--device {device} does not go with --launcher {launcher}, which gives each rank its own GPU")
    return device
