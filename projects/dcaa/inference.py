"""Why a model predicts what it predicts: the branches, the attention and the ambivalence of one picture.

`explain` runs the whole picture at once, also where the model tests in windows. `DCAAVisualizationHook` draws it while
a run validates.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from numpy.typing import NDArray

from alimm.projects.dcaa.ambivalence import resolve_threshold, split
from alimm.projects.dcaa.head import BranchOutputs
from alimm.projects.dcaa.lesson import labels_of
from alimm.projects.dcaa.options import SelfTraining
from alimm.projects.dcaa.visualise import ambivalence_png, attention_png, prediction_png
from alimm.registry import HOOKS


@dataclass(frozen=True)
class Explanation:
    """What lies behind a prediction; maps of the size of the picture.

    Attributes:
        prediction: classes (H, W), of the fused head or of the condition that was asked for.
        attention: (K, H, W), the weight of each condition; sums to 1 over K.
        branches: classes (K, H, W) by the decoder of each condition.
        pseudo_labels: classes (H, W) that self-training would take, or the index to ignore.
        ambivalence: (H, W), 0 to 1, how much the prediction looks like one of the source; None without discriminator.
        easy: (H, W), weights of the easy pixels; None without discriminator.
        hard: (H, W), 1 for hard pixels, else 0; None without discriminator.
    """

    prediction: NDArray[np.int64]
    attention: NDArray[np.float32]
    branches: NDArray[np.int64]
    pseudo_labels: NDArray[np.int64]
    ambivalence: NDArray[np.float32] | None
    easy: NDArray[np.float32] | None
    hard: NDArray[np.float32] | None


@torch.no_grad()
def explain(model: Any, image_rgb: NDArray[np.uint8], cond_id: int | None = None) -> Explanation:
    """Look behind the prediction for one picture. The model's mode is as before afterwards.

    Args:
        model: a `DCAASegmentor`, or what has its ``explain_tensors`` and a ``data_preprocessor`` for BGR pictures.
        image_rgb: (H, W, 3).
        cond_id: predict with the decoder of this condition; with the fused head if None.

    Raises:
        ValueError: the model has no ``explain_tensors``, it is no picture, or there is no such condition.
    """
    if not hasattr(model, "explain_tensors"):
        raise ValueError(f"{type(model).__name__} has no explain_tensors; explain is for a DCAASegmentor")
    if image_rgb.ndim != 3 or image_rgb.shape[2] != 3 or image_rgb.dtype != np.uint8:
        raise ValueError(f"expected RGB, uint8 (height, width, 3), got {image_rgb.dtype} of shape {image_rgb.shape}")
    bgr = torch.from_numpy(np.ascontiguousarray(image_rgb[:, :, ::-1].transpose(2, 0, 1)))
    training = model.training
    model.eval()
    try:
        data = model.data_preprocessor({"inputs": [bgr], "data_samples": [BaseDataElement()]}, False)
        parts = model.explain_tensors(data["inputs"])
    finally:
        model.train(training)
    names = range(len(parts["cond"]))
    if cond_id is not None and cond_id not in names:
        raise ValueError(f"cond_id is one of 0 to {len(names) - 1}, the model's conditions, got {cond_id}")
    padded, shown = tuple(data["inputs"].shape[2:]), image_rgb.shape[:2]
    align = bool(getattr(model, "align_corners", False))

    def smooth(values_NChw: torch.Tensor, align_corners: bool = align) -> torch.Tensor:
        large = F.interpolate(values_NChw.float(), padded, mode="bilinear", align_corners=align_corners)
        return large[0, :, : shown[0], : shown[1]].cpu()

    def blocks(values_Nhw: torch.Tensor) -> NDArray[Any]:
        # In double, so that no label is rounded.
        large = F.interpolate(values_Nhw[:, None].double(), padded, mode="nearest-exact")
        result: NDArray[Any] = large[0, 0, : shown[0], : shown[1]].cpu().numpy()
        return result

    branches = torch.stack([smooth(logits).argmax(dim=0) for logits in parts["cond"]]).numpy()
    options = getattr(model, "self_training", None) or SelfTraining()
    ignore = int(getattr(getattr(model, "decode_head", None), "ignore_index", 255))
    labels = labels_of(BranchOutputs(parts["cond"], parts["att"], parts["mask"]), options, ignore)
    d, easy, hard = parts.get("ambivalence"), None, None
    if d is not None:
        easy, hard = split(d, labels, resolve_threshold(d, options.ambivalence_threshold), ignore)
    return Explanation(
        prediction=smooth(parts["att"]).argmax(dim=0).numpy() if cond_id is None else branches[cond_id],
        attention=smooth(parts["mask"]).numpy(),
        branches=branches,
        pseudo_labels=blocks(labels).astype(np.int64),
        ambivalence=None if d is None else smooth(d[:, None], False)[0].numpy(),
        easy=None if easy is None else blocks(easy).astype(np.float32),
        hard=None if hard is None else blocks(hard).astype(np.float32),
    )


@HOOKS.register_module()
class DCAAVisualizationHook(Hook):
    """Draws the first pictures of each condition while a run validates.

    Writes ``<work_dir>/vis_dcaa/iter_<N>/<condition>_<i>_prediction.png`` and, for a model that can `explain`,
    ``..._attention.png`` and ``..._ambivalence.png``. Of several ranks the first draws, out of the pictures it tests.

    Args:
        interval: draw at every so many validations, the first one included.
        num: so many pictures of each condition.
        ignore_index: label of the pixels that do not count.

    Raises:
        ValueError: ``interval`` or ``num`` is not positive.
    """

    priority = "LOW"

    def __init__(self, interval: int = 1, num: int = 1, ignore_index: int = 255) -> None:
        if interval < 1 or num < 1:
            raise ValueError(f"interval and num are at least 1, got {interval} and {num}")
        self.interval = interval
        self.num = num
        self.ignore_index = ignore_index
        self._validations = 0
        self._draws = False
        self._drawn: Counter[str] = Counter()

    def before_val_epoch(self, runner: Runner) -> None:
        """Count the validation, and start with none drawn."""
        self._draws = self._validations % self.interval == 0 and is_main_process()
        self._validations += 1
        self._drawn.clear()

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """Draw the pictures of the batch that are still wanted."""
        if not self._draws:
            return
        for image, sample in zip(data_batch["inputs"], outputs or (), strict=True):
            condition = re.sub(r"[^\w.+-]+", "_", str(sample.get("condition", "all")))
            if self._drawn[condition] >= self.num:
                continue
            folder = Path(runner.work_dir) / "vis_dcaa" / f"iter_{runner.iter}"
            folder.mkdir(parents=True, exist_ok=True)
            stem = f"{condition}_{self._drawn[condition]}"
            self._drawn[condition] += 1
            image_rgb = np.ascontiguousarray(image.cpu().numpy()[::-1].transpose(1, 2, 0))
            for name, content in self._pictures(runner, image_rgb, sample).items():
                (folder / f"{stem}_{name}.png").write_bytes(content)

    def _pictures(self, runner: Runner, image_rgb: NDArray[np.uint8], sample: Any) -> dict[str, bytes]:
        classes, palette = _meta(runner.val_dataloader.dataset)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        prediction = sample.pred_sem_seg.data[0].cpu().numpy()
        truth = sample.get("gt_sem_seg")
        gt = None if truth is None else truth.data[0].cpu().numpy()
        size = (prediction.shape[1], prediction.shape[0])
        shown = image_rgb if image_rgb.shape[:2] == prediction.shape else cv2.resize(image_rgb, size)
        made = {"prediction": prediction_png(shown, gt, prediction, palette, classes, self.ignore_index)}
        if not hasattr(model, "explain_tensors"):
            return made
        found = explain(model, image_rgb)
        names = getattr(model, "conditions", None) or [str(k) for k in range(len(found.attention))]
        made["attention"] = attention_png(image_rgb, found.attention, names)
        if found.ambivalence is not None and found.easy is not None and found.hard is not None:
            made["ambivalence"] = ambivalence_png(
                image_rgb, found.ambivalence, found.easy, found.hard, found.pseudo_labels, palette, self.ignore_index
            )
        return made


def _meta(dataset: Any) -> tuple[Sequence[str], Sequence[Sequence[int]]]:
    meta = getattr(dataset, "metainfo", None) or {}
    if not meta.get("classes") or not meta.get("palette"):
        raise ValueError(
            "DCAAVisualizationHook needs the names and colours of the classes: give the validation set "
            "metainfo=dict(classes=..., palette=...)"
        )
    return meta["classes"], meta["palette"]
