"""Pictures of what a classifier predicted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner

from alimm.registry import HOOKS


@HOOKS.register_module()
class ShowPredictionsHook(Hook):
    """Writes each tested picture with its true and its predicted class below it.

    Args:
        out_dir: the folder, made if it is not there.
        max_count: at most so many pictures a rank.
        min_width: small pictures are enlarged by a whole factor to at least so many pixels.
    """

    def __init__(self, out_dir: str, max_count: int = 200, min_width: int = 192) -> None:
        self.out_dir = Path(out_dir)
        self.max_count = max_count
        self.min_width = min_width
        self._written = 0

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Draw one batch."""
        classes = (getattr(runner.test_dataloader.dataset, "metainfo", None) or {}).get("classes")
        for index, (image, sample) in enumerate(zip(data_batch["inputs"], outputs, strict=True)):
            if self._written >= self.max_count:
                return
            self._written += 1
            self.out_dir.mkdir(parents=True, exist_ok=True)
            lines, right = _caption(sample, classes)
            name = str(sample.get("sample_id", f"{runner.rank}_{batch_idx}_{index}"))
            path = self.out_dir / (re.sub(r"[^\w.-]+", "_", name) + ".png")
            picture = _draw(image.cpu().numpy().transpose(1, 2, 0), lines, right, self.min_width)
            if not cv2.imwrite(str(path), picture[:, :, ::-1]):
                raise OSError(f"{path} could not be written")


def _caption(sample: Any, classes: Any) -> tuple[list[str], bool]:
    def name(label: int) -> str:
        return str(classes[label]) if classes is not None else str(label)

    predicted = int(sample.pred_label)
    lines = [f"predicted {name(predicted)} ({float(sample.pred_score[predicted]):.2f})"]
    if "gt_label" not in sample:
        return lines, True
    true = int(sample.gt_label[0])
    return [*lines, f"true {name(true)}"], true == predicted


def _draw(image_HWC: np.ndarray, lines: list[str], right: bool, min_width: int) -> np.ndarray:
    factor = max(1, -(-min_width // image_HWC.shape[1]))
    enlarged = image_HWC.repeat(factor, axis=0).repeat(factor, axis=1)
    strip = np.full((16 * len(lines) + 4, enlarged.shape[1], 3), 255, dtype=np.uint8)
    colour = (0, 110, 0) if right else (180, 0, 0)
    for row, line in enumerate(lines):
        cv2.putText(strip, line, (2, 13 + 16 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.38, colour, 1, cv2.LINE_AA)
    # A picture of one channel becomes grey of three.
    rgb = np.broadcast_to(enlarged.astype(np.uint8), (*enlarged.shape[:2], 3))
    return np.concatenate([rgb, strip])
