"""Coloured squares with a long tail: a data set that is made on the spot, for a config that runs in seconds."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from mmengine.dataset import BaseDataset

from alimm.registry import DATASETS
from alimm.seeding import numpy_stream

PALETTE = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "grey": (128, 128, 128)}


@DATASETS.register_module()
class ColouredSquares(BaseDataset):
    """Pictures of one colour with noise; class c has half as many as class c - 1.

    An item before the transforms: ``img`` (uint8, (size, size, 3), RGB), ``gt_label``, ``sample_id``.

    Args:
        head_count: pictures of the most frequent class.
        size: side of a picture in pixels.
        seed: of the noise; another seed gives other pictures of the same classes.
        **kwargs: as of MMEngine's BaseDataset, ``pipeline`` above all.
    """

    METAINFO: ClassVar[dict[str, Any]] = {"classes": tuple(PALETTE)}

    def __init__(self, head_count: int = 32, size: int = 16, seed: int = 0, **kwargs: Any) -> None:
        self.head_count, self.size, self.seed = head_count, size, seed
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Draw every picture from its own stream."""
        items = []
        for label, (name, colour) in enumerate(PALETTE.items()):
            for number in range(max(1, self.head_count >> label)):
                noise = numpy_stream(self.seed, "coloured_squares", label, number).normal(
                    0, 25, (self.size, self.size, 3)
                )
                image = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                items.append({"img": image, "gt_label": label, "sample_id": f"{name}-{number}"})
        return items
