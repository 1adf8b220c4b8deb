"""Models on vectors instead of pictures: features made elsewhere, or `alimm.HierarchyVectors`."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor, BaseModule
from torch import nn

from alimm.registry import MODELS


@MODELS.register_module()
class VectorPreprocessor(BaseDataPreprocessor):
    """Stack the vectors of a batch, on the model's device, as float32.

    Args:
        non_blocking: copy to the device without waiting.
    """

    def __init__(self, non_blocking: bool = False) -> None:
        super().__init__(non_blocking=non_blocking)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """A batch ``dict(inputs=..., data_samples=...)`` with its inputs, a list of (D,) or a tensor (B, D), as (B, D).

        Raises:
            ValueError: the inputs are no vectors of one length.
        """
        inputs = data["inputs"]
        shapes = {tuple(vector.shape) for vector in inputs}
        if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
            raise ValueError(
                f"VectorPreprocessor expects vectors of one length, got the shapes {sorted(shapes)}; pictures take "
                f"alimm.ClsDataPreprocessor"
            )
        if not isinstance(inputs, torch.Tensor):
            data = {**data, "inputs": torch.stack(list(inputs))}
        data = self.cast_data(data)
        return {**data, "inputs": data["inputs"].float()}


@MODELS.register_module()
class VectorBackbone(BaseModule):
    """A linear layer, or two with a ReLU between them.

    Args:
        in_channels: length of the vectors.
        out_channels: D, length of the features.
        hidden_channels: width of the hidden layer; None has one linear layer alone.
        init_cfg: initialisation, as in MMEngine.

    Raises:
        ValueError: a width is below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int | None = None,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        widths = [in_channels, *([] if hidden_channels is None else [hidden_channels]), out_channels]
        if min(widths) < 1:
            raise ValueError(
                f"in_channels, hidden_channels and out_channels must be at least 1, got {in_channels}, "
                f"{hidden_channels} and {out_channels}"
            )
        layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
        if hidden_channels is not None:
            layers += [nn.ReLU(inplace=True), nn.Linear(widths[1], widths[2])]
        self.layers = nn.Sequential(*layers)
        self.in_channels, self.out_channels = in_channels, out_channels

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (B, in_channels) to features (B, D).

        Raises:
            ValueError: the vectors have another length.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.in_channels:
            raise ValueError(
                f"VectorBackbone expects (B, {self.in_channels}), got {tuple(vectors.shape)}: set in_channels to the "
                f"length of the data set's vectors"
            )
        features: torch.Tensor = self.layers(vectors)
        return features
