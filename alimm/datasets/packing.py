"""The last transform of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from alimm.datasets.transforms import keep_grey
from alimm.registry import TRANSFORMS
from alimm.structures import ClsDataSample

META_KEYS = ("sample_id", "sample_idx", "img_path", "img_shape", "ori_shape")


@TRANSFORMS.register_module()
class PackInputs:
    """Pack an item into ``dict(inputs=uint8 tensor (C, H, W), data_samples=ClsDataSample)``.

    ``gt_label`` and ``gt_identity`` become data of the sample where the item has them.

    Args:
        meta_keys: what else of the item becomes meta information of the sample, beside sample_id, sample_idx, img_path,
            img_shape and ori_shape. Keys that an item has not are passed over.
    """

    def __init__(self, meta_keys: Sequence[str] = ()) -> None:
        if isinstance(meta_keys, str):
            raise ValueError(f"PackInputs: meta_keys must be a list of names, got the text {meta_keys!r}")
        self.meta_keys = tuple(meta_keys)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Pack one item.

        Raises:
            ValueError: it has no picture, or the picture is not uint8 of a known shape.
        """
        if results.get("img") is None:
            raise ValueError("PackInputs found no picture: put dict(type='alimm.LoadImage') before it")
        img = keep_grey(results["img"])
        # A copy in memory order: flips and crops are views, and the tensor must not share the data set's memory.
        inputs = torch.from_numpy(np.array(img.transpose(2, 0, 1), order="C"))
        meta = {key: results[key] for key in (*META_KEYS, *self.meta_keys) if key in results}
        sample = ClsDataSample(metainfo={"img_shape": img.shape[:2], **meta})
        if "gt_label" in results:
            sample.set_gt_label(results["gt_label"])
        if "gt_identity" in results:
            sample.set_gt_identity(results["gt_identity"])
        return {"inputs": inputs, "data_samples": sample}

    def __repr__(self) -> str:
        return f"PackInputs(meta_keys={self.meta_keys!r})"
