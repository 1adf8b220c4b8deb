"""Pack a picture of a condition: what mmsegmentation packs, and the domain and the condition beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmseg.datasets.transforms import PackSegInputs

from alimm.registry import TRANSFORMS

META_KEYS = (
    "img_path",
    "seg_map_path",
    "ori_shape",
    "img_shape",
    "pad_shape",
    "scale_factor",
    "flip",
    "flip_direction",
    "reduce_zero_label",
    "domain",
    "condition",
    "cond_id",
)
"""Those of mmsegmentation's ``PackSegInputs``, then those of an item that knows its condition."""


@TRANSFORMS.register_module()
class PackConditionInputs(PackSegInputs):
    """mmsegmentation's ``PackSegInputs`` with ``domain``, ``condition`` and ``cond_id`` in the meta information.

    Args:
        meta_keys: what of an item becomes meta information of the sample; keys that an item has not are passed over.

    Raises:
        ValueError: ``meta_keys`` is one text or lacks ``cond_id``.
    """

    def __init__(self, meta_keys: Sequence[str] = META_KEYS) -> None:
        if isinstance(meta_keys, str):
            raise ValueError(f"PackConditionInputs: meta_keys must be a list of names, got the text {meta_keys!r}")
        if "cond_id" not in meta_keys:
            raise ValueError(
                f"PackConditionInputs: meta_keys must contain 'cond_id', got {tuple(meta_keys)}: add it, or use "
                f"PackSegInputs where no condition is wanted"
            )
        super().__init__(meta_keys=tuple(meta_keys))

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Pack one item.

        Args:
            results: ``img`` (H, W, 3), ``cond_id`` and, where it has a label, ``gt_seg_map`` (H, W).

        Returns:
            ``inputs``, a tensor (3, H, W), and ``data_samples``, a SegDataSample.

        Raises:
            ValueError: the item has no ``cond_id``.
        """
        if "cond_id" not in results:
            raise ValueError(
                f"PackConditionInputs found no 'cond_id' in the item of {results.get('img_path', 'a picture')}: use a "
                f"data set that knows conditions, such as ConditionSegDataset, or pack with mmseg.PackSegInputs"
            )
        packed: dict[str, Any] = super().transform(results)
        return packed
