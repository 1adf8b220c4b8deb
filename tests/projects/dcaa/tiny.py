"""Tiny DCAA segmentors, batches whose pictures have given conditions, and a look at one step."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alimm.projects.dcaa.base import AdaptationSegmentor
from alimm.projects.dcaa.batch import StepBatch
from alimm.projects.dcaa.head import AttentiveFusionHead
from alimm.projects.dcaa.segmentor import DCAASegmentor
from alimm.registry import MODELS
from tests.projects.dcaa.tiny_segmentor import build, head, pictures

NAMES = ("fog", "night", "snow", "rain")
WIDTHS = (8, 16, 32, 64)


def fusion(conditions: int = 2, branch: dict[str, Any] | None = None, seed: int = 0, **options: Any) -> Any:
    """An `AttentiveFusionHead` without dropout, in training mode."""
    torch.manual_seed(seed)
    options = dict(dropouts=(0.0, 0.0, 0.0)) | options
    built = MODELS.build(
        dict(type="alimm.AttentiveFusionHead", num_conditions=conditions, branch=branch or head(), **options)
    )
    assert isinstance(built, AttentiveFusionHead)
    return built.train()


def features(height: int = 8, width: int = 16, n: int = 2, seed: int = 0, widths: Sequence[int] = WIDTHS) -> Any:
    """What a backbone with strides 4, 8, 8, 8 makes of N pictures; odd sizes round up."""
    torch.manual_seed(seed)
    half = (height + 1) // 2, (width + 1) // 2
    return [torch.randn(n, c, *((height, width) if i == 0 else half)) for i, c in enumerate(widths)]


def dcaa(conditions: int | Sequence[str] = 2, seed: int = 0, **options: Any) -> Any:
    """A `DCAASegmentor` for the first of `NAMES` or for others, without dropout, in training mode."""
    names = NAMES[:conditions] if isinstance(conditions, int) else conditions
    plain = dict(type="alimm.AttentiveFusionHead", branch=head(), dropouts=(0.0, 0.0, 0.0))
    defaults = dict(conditions=names, decode_head=plain, discriminator=dict(channels=(4, 8)), adversarial_weight=0.5)
    model = build("DCAASegmentor", seed, **(defaults | options))
    assert isinstance(model, DCAASegmentor)
    return model


def batch(source: Sequence[int] = (0, 1), target: Sequence[int] = (0, 1), seed: int = 0) -> dict[str, Any]:
    """A batch of a training step whose pictures have these conditions."""
    made = {}
    for domain, ids in (("source", source), ("target", target)):
        data = pictures(domain, len(ids), seed)
        for sample, k in zip(data["data_samples"], ids, strict=True):
            sample.set_metainfo(dict(cond_id=k, condition=NAMES[k]))
        made[domain] = data
    return made


def read(model: AdaptationSegmentor, data: dict[str, Any]) -> StepBatch:
    """The batch as the model's losses take it; the data stay as they are."""
    return model.read_batch(copy.deepcopy(data))


def teaching(
    conditions: int | Sequence[str] = 2, seed: int = 0, align: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A `dcaa` in stage ``self_train`` with these options of self-training, its teacher copied."""
    model = dcaa(conditions, seed, self_training=dict(threshold=0.35) | options, **(align or {}))
    model.enter_stage("self_train")
    return model


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether any weight has changed by a single bit."""
    return any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


@contextlib.contextmanager
def gradients_before_steps(model: Any, wrapper: Any) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Inside, note the gradients with which each wrapper steps: ``seg``, ``disc`` -> name -> gradient."""
    seen: dict[str, dict[str, Tensor]] = {}
    for key in ("seg", "disc"):
        step = wrapper[key].step

        def note(*args: Any, key: str = key, step: Any = step, **kwargs: Any) -> None:
            seen[key] = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
            step(*args, **kwargs)

        wrapper[key].step = note
    try:
        yield seen
    finally:
        for key in ("seg", "disc"):
            del wrapper[key].step


def note_backward(wrapper: Any) -> list[float]:
    """The losses that the wrapper is going to run backward."""
    passes: list[float] = []
    backward = wrapper.backward

    def note(loss: Tensor, **kwargs: Any) -> None:
        passes.append(float(loss))
        backward(loss, **kwargs)

    wrapper.backward = note
    return passes
