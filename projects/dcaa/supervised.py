"""The loss on labelled pictures, by the head's own ``loss_decode``, so that N ranks weigh pixels as one rank would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn

from alimm.projects.dcaa.adversarial import over_ranks


def head_loss(head: BaseDecodeHead, logits_NChw: Tensor, samples: Sequence[Any]) -> dict[str, Tensor]:
    """What ``head.loss_by_feat`` gives, right on several ranks.

    A loss with ``avg_non_ignore`` is a mean over the labelled pixels of its own rank. Gradients are averaged over the
    ranks, so a rank with few labels would count as much as one with many; its loss is scaled by its share of them. A
    loss without it is a mean over all pixels, which are as many on every rank.

    Args:
        head: a decode head.
        logits_NChw: of the pictures, at any size.
        samples: N data samples with labels.
    """
    losses: dict[str, Tensor] = dict(head.loss_by_feat(logits_NChw, samples))
    if get_world_size() == 1:
        return losses
    labelled = sum((sample.gt_sem_seg.data != head.ignore_index).sum() for sample in samples)
    count = torch.as_tensor(labelled, device=logits_NChw.device).float()
    share = count / over_ranks(count)
    modules: Any = head.loss_decode if isinstance(head.loss_decode, nn.ModuleList) else [head.loss_decode]
    for name in {module.loss_name for module in modules if getattr(module, "avg_non_ignore", False)}:
        losses[name] = losses[name] * share
    return losses
