"""Tiny segmentors of the baselines, batches of two domains, and optimisers for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.structures import PixelData

import alimm.projects.dcaa  # noqa: F401
from alimm.registry import MODELS

CLASSES = 3
SIZE = (32, 64)


def head(kind: str = "alimm.ConditionDecoder", **options: Any) -> dict[str, Any]:
    if kind == "alimm.ConditionDecoder":
        options = dict(
            in_channels=(8, 64), channels=8, low_channels=8, dilations=(1, 2), dropouts=(0.0, 0.0, 0.0), **options
        )
    else:
        options = dict(in_channels=32, in_index=2, channels=8, num_convs=1, dropout_ratio=0.0, **options)
    loss = dict(type="mmseg.CrossEntropyLoss")
    return dict(type=kind, num_classes=CLASSES, align_corners=False, loss_decode=loss) | options


def build(kind: str, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = MODELS.build(
        dict(
            type=f"alimm.{kind}",
            backbone=dict(
                type="mmseg.ResNetV1c", depth=18, base_channels=8, stem_channels=8, strides=(1, 2, 1, 1),
                dilations=(1, 1, 2, 4), norm_cfg=dict(type="BN"),
            ),
            data_preprocessor=dict(
                type="mmseg.SegDataPreProcessor", mean=[100.0, 110.0, 120.0], std=[50.0, 55.0, 60.0],
                bgr_to_rgb=True, size=SIZE,
            ),
        )
        | dict(decode_head=head(), test_cfg=ConfigDict(mode="whole"))
        | options
    )  # fmt: skip
    return model.train()


def pictures(domain: str, n: int = 2, seed: int = 0, labels: bool | None = None, **metainfo: Any) -> dict[str, Any]:
    """Boxes of one colour a class; the target is darker. Colours tell the class, so there is something to learn."""
    from mmseg.structures import SegDataSample

    draw = torch.Generator().manual_seed(seed + 100 * (domain == "target"))
    inputs, samples = [], []
    for i in range(n):
        coarse = torch.randint(CLASSES, (4, 8), generator=draw)
        label = coarse.repeat_interleave(SIZE[0] // 4, 0).repeat_interleave(SIZE[1] // 8, 1)
        colours = torch.tensor([[220, 40, 40], [40, 220, 40], [40, 40, 220]])
        picture = colours[label].permute(2, 0, 1) // (2 if domain == "target" else 1)
        noise = torch.randint(0, 30, picture.shape, generator=draw)
        sample = SegDataSample(metainfo=dict(domain=domain, cond_id=i % 2, condition="fog", img_path=f"{i}.png"))
        sample.set_metainfo(dict(img_shape=SIZE, ori_shape=SIZE))
        sample.set_metainfo(metainfo)
        if labels if labels is not None else domain == "source":
            sample.gt_sem_seg = PixelData(data=label[None])
        inputs.append((picture + noise).to(torch.uint8))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def both(seed: int = 0, n: int = 2) -> dict[str, Any]:
    return dict(source=pictures("source", n, seed), target=pictures("target", n, seed))


def sgd(model: Any, lr: float = 0.1) -> OptimWrapper:
    return OptimWrapper(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr))


def alternating(model: Any, lr: float = 0.05, disc_lr: float = 1e-3) -> Any:
    config = dict(
        type="OptimWrapper",
        constructor="alimm.AlternatingOptimWrapperConstructor",
        optimizer=dict(type="SGD", lr=lr, momentum=0.9),
        discriminator=dict(type="Adam", lr=disc_lr),
    )
    return build_optim_wrapper(model, config)


def ready(model: Any, data: dict[str, Any]) -> Any:
    return model.data_preprocessor(copy.deepcopy(data), True)


def assert_equal_weights(one: Any, other: Any, **tolerance: Any) -> None:
    others = other.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, others[name], **tolerance, msg=name)
