"""What DCAA costs: peak memory in either mode, and seconds a step by conditions and size of the picture."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from alimm import compat
from alimm.report.statistics import interleave

Row = dict[str, Any]
STAGES = ("align", "self_train")


def build(conditions: int, channels: int, compat_mode: bool, stage: str) -> tuple[Any, Any]:
    """A DCAA model on ResNet-18 with 19 classes, at a stage, and its optimisers.

    Args:
        conditions: K.
        channels: of the decoders.
        compat_mode: the released code's way; else the memory mode: parts of the loss run backward in turn, decoders are
            recomputed, discriminators judge predictions as they are.
        stage: of training.
    """
    compat.apply_to_imports()
    from mmengine.optim import OptimWrapper, OptimWrapperDict

    from alimm.registry import MODELS

    norm = dict(type="BN")
    branch = dict(
        type="alimm.ConditionDecoder",
        in_channels=(64, 512),
        channels=channels,
        low_channels=48,
        num_classes=19,
        loss_decode=dict(type="mmseg.CrossEntropyLoss", avg_non_ignore=True),
    )
    model = MODELS.build(
        dict(
            type="alimm.DCAASegmentor",
            conditions=conditions,
            data_preprocessor=dict(
                type="mmseg.SegDataPreProcessor", mean=(127.5,) * 3, std=(63.75,) * 3, size_divisor=32
            ),
            backbone=dict(
                type="mmseg.ResNetV1c", depth=18, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), norm_cfg=norm
            ),
            decode_head=dict(
                type="alimm.AttentiveFusionHead",
                num_conditions=conditions,
                branch=branch,
                checkpoint_branches=not compat_mode,
            ),
            self_training={},
            freeze_bn=True,
            release_compat=compat_mode,
        )
    )
    model.train()
    model.enter_stage(stage)
    judged = {id(parameter) for parameter in model.discriminators.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in judged]
    wrappers = OptimWrapperDict(
        seg=OptimWrapper(torch.optim.SGD(trained, lr=1e-4, momentum=0.9)),
        disc=OptimWrapper(torch.optim.Adam(model.discriminators.parameters(), lr=1e-4)),
    )
    return model, wrappers


def batch(conditions: int, size: tuple[int, int], pictures: int = 2) -> dict[str, Any]:
    """Noise in place of pictures, with labels for the source."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    parts: dict[str, Any] = {}
    for domain in ("source", "target"):
        inputs, samples = [], []
        for number in range(pictures):
            inputs.append(torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8))
            sample = SegDataSample(metainfo=dict(domain=domain, cond_id=number % conditions, img_shape=size))
            if domain == "source":
                labels = torch.randint(0, 19, (1, *size), generator=generator)
                sample.gt_sem_seg = PixelData(data=labels)
            samples.append(sample)
        parts[domain] = dict(inputs=inputs, data_samples=samples)
    return parts


def peak(mode: str, stage: str, size: tuple[int, int], conditions: int = 3) -> float:
    """Megabytes by which two steps raise the peak of a process of their own over the built model."""
    arguments = ["--measure", mode, stage, str(size[0]), str(size[1]), str(conditions)]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {mode} failed: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def memory_rows(size: tuple[int, int]) -> list[Row]:
    """Peak of both modes in both adapting stages."""
    rows = []
    for stage in STAGES:
        found = {mode: peak(mode, stage, size) for mode in ("compat", "memory")}
        rows.append(dict(stage=stage, size=size, **found, ratio=found["memory"] / found["compat"]))
    return rows


def time_rows(sizes: list[tuple[int, int]], counts: list[int], repeats: int) -> list[Row]:
    """Seconds a step of the memory mode, medians of interleaved rounds, by size, stage and K."""
    rows = []
    for size in sizes:
        arms = {}
        for stage in STAGES:
            for count in counts:
                model, wrappers = build(count, 64, False, stage)
                data = batch(count, size)
                arms[f"{stage} {count}"] = lambda m=model, d=data, w=wrappers: m.train_step(d, w)
        times = interleave(arms, repeats, warmup=1)
        for name, taken in times.items():
            stage, count = name.split()
            median = sorted(taken)[len(taken) // 2]
            rows.append(dict(size=size, stage=stage, conditions=int(count), seconds=median))
    return rows


def _measure(mode: str, stage: str, height: int, width: int, conditions: int) -> float:
    torch.set_num_threads(1)
    model, wrappers = build(conditions, 64, mode == "compat", stage)
    model.train_step(batch(conditions, (64, 64)), wrappers)  # optimiser states and libraries are there
    data = batch(conditions, (height, width))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    for _ in range(2):
        model.train_step(data, wrappers)
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """Kilobytes of this process: ``VmRSS``, resident now, or ``VmHWM``, at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", nargs=5)
    mode, stage, *numbers = parser.parse_args().measure
    print(json.dumps(_measure(mode, stage, *map(int, numbers))))
