"""From the loader's batch to the model's input: stack, move, augment in training, normalise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor

from alimm.registry import MODELS

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@MODELS.register_module()
class ClsDataPreprocessor(BaseDataPreprocessor):
    """Data preprocessor of the image classifier.

    Args:
        mean: of each channel (RGB, 0 to 255).
        std: of each channel.
        to_rgb: swap the first and last channel first, for pipelines that load BGR as mmcv's do.
        batch_augments: configs of modules that map a float batch (N, 3, H, W) of 0 to 255 to such a batch; they run in
            training only, on the model's device, and cost a fraction of what augmenting picture by picture does.
        channels_last: hand the batch over in torch's channels_last layout, in which convolutions are faster on the CPU
            and under AMP.
        non_blocking: copy to the device without waiting.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        to_rgb: bool = False,
        batch_augments: Sequence[dict[str, Any]] = (),
        channels_last: bool = False,
        non_blocking: bool = False,
    ) -> None:
        super().__init__(non_blocking=non_blocking)
        if len(mean) != len(std) or any(value <= 0 for value in std):
            raise ValueError(f"mean and std must have the same length and std be above 0, got {mean!r} and {std!r}")
        self.to_rgb = to_rgb
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.batch_augments = torch.nn.ModuleList(MODELS.build(config) for config in batch_augments)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Normalise a batch ``dict(inputs=..., data_samples=...)``; inputs are a list of (3, H, W) or (N, 3, H, W).

        Raises:
            ValueError: the pictures of the batch differ in size.
        """
        data = self.cast_data(data)
        inputs = data["inputs"]
        if not isinstance(inputs, torch.Tensor):
            shapes = {tuple(picture.shape) for picture in inputs}
            if len(shapes) > 1:
                raise ValueError(
                    f"the pictures of a batch must have one size, got {sorted(shapes)}: add alimm.Resize or a crop to "
                    f"the pipeline"
                )
            inputs = torch.stack(list(inputs))
        if self.to_rgb:
            inputs = inputs.flip(1)
        inputs = inputs.float()
        if training:
            with torch.no_grad():
                for augment in self.batch_augments:
                    inputs = augment(inputs)
        inputs = (inputs - self.mean) / self.std
        return {**data, "inputs": inputs.contiguous(memory_format=self.layout)}
