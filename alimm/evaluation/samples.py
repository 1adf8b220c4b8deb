"""What the metrics read from the dict of a data sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def single_label(sample: Mapping[str, Any], key: str, metric: str) -> int:
    """The one whole number at ``key``.

    Raises:
        ValueError: the key is missing or holds more than one label. The message names the sample.
    """
    name = sample.get("sample_id") or sample.get("img_path") or "without a sample_id"
    if sample.get(key) is None:
        raise ValueError(f"{metric} needs {key}, the sample {name} has only {sorted(sample)}")
    value = torch.as_tensor(sample[key])
    if value.numel() != 1:
        raise ValueError(f"{metric} needs one label in {key}, the sample {name} has {value.tolist()}")
    return int(value)


def stacked(samples: Sequence[Mapping[str, Any]], key: str, metric: str) -> torch.Tensor:
    """The vectors at ``key``, shape (batch, dim).

    Raises:
        ValueError: a sample has none, or they differ in length.
    """
    missing = [sample for sample in samples if sample.get(key) is None]
    if missing:
        name = missing[0].get("sample_id") or missing[0].get("img_path") or "without a sample_id"
        raise ValueError(f"{metric} needs {key}, the prediction for the sample {name} has only {sorted(missing[0])}")
    shapes = {tuple(torch.as_tensor(sample[key]).shape) for sample in samples}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"{metric} needs {key} of one shape (dim,) for all samples, got {sorted(shapes)}")
    return torch.stack([torch.as_tensor(sample[key]) for sample in samples])
