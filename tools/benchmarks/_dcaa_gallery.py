"""The gallery of DCAA's benchmark: predictions of several arms, attention and ambivalence, one picture a condition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _dcaa_runs as runs
import numpy as np

from alimm.apis.model import init_model
from alimm.registry import DATASETS

SHOWN = ("source_only", "colour_matching", "mean_teacher", "dcaa")


def write(work_dir: Path, arms: list[str], iters: int, tiny: bool = False, seed: int = 0) -> list[Path]:
    """Write ``gallery.png``, and attention and ambivalence of every condition, from the checkpoints of one seed.

    Returns:
        The files.
    """
    from alimm.projects.dcaa.inference import explain
    from alimm.projects.dcaa.visualise import ambivalence_png, attention_png, gallery_png

    models: dict[str, Any] = {}
    for arm in arms:
        config = runs.make_config(runs.Run(arm, "synthetic", seed, iters), tiny)
        checkpoint = work_dir / "runs" / f"synthetic_{arm}_{seed}" / f"iter_{iters}.pth"
        models[arm] = init_model(config, str(checkpoint), device="cpu")
    data = DATASETS.build({**config.val_dataloader.dataset, "pipeline": []})
    names, palette = data.metainfo["classes"], data.metainfo["palette"]
    rows, written = [], []
    for number, condition in enumerate(data.conditions):
        item = data[int(np.flatnonzero(data.condition_ids() == number)[0])]
        picture = np.ascontiguousarray(item["img"][..., ::-1])
        maps = [picture, item["gt_seg_map"]]
        for arm, model in models.items():
            found = explain(model, picture) if arm == "dcaa" else None
            maps.append(found.prediction if found is not None else _predict(model, item))
            if found is None:
                continue
            path = work_dir / f"attention_{condition}.png"
            path.write_bytes(attention_png(picture, found.attention, data.conditions))
            written.append(path)
            if found.ambivalence is not None:
                path = work_dir / f"ambivalence_{condition}.png"
                path.write_bytes(
                    ambivalence_png(picture, found.ambivalence, found.easy, found.hard, found.pseudo_labels, palette)
                )
                written.append(path)
        rows.append((condition, maps))
    path = work_dir / "gallery.png"
    path.write_bytes(gallery_png(rows, ["picture", "ground truth", *arms], palette, names))
    return [path, *written]


def _predict(model: Any, item: dict[str, Any]) -> np.ndarray:
    import torch

    inputs = torch.from_numpy(np.ascontiguousarray(item["img"].transpose(2, 0, 1)))
    batch = model.data_preprocessor(dict(inputs=[inputs]), False)
    with torch.no_grad():
        logits = model.encode_decode(batch["inputs"], [dict(img_shape=item["img_shape"])])
    return logits[0].argmax(dim=0).numpy().astype(np.uint8)
