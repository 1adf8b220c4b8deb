"""A decoder for each condition, and the attention that fuses them into the one head used at inference.

Paper: Cai et al., AAAI 2021 (arXiv:2012.05608). For the features f_1 .. f_K of the decoders of K conditions:

    p_k   = classifier_k(f_k)                                            condition-specific prediction
    A     = softmax_k(conv1x1(drop(relu(bn(conv3x3([f_1, ..., f_K]))))))  one weight a pixel and condition
    f_att = sum_k A_k * f_k
    p_g   = classifier(blocks([f_1, ..., f_K, f_att]))                    global prediction, the only one at inference

Any decode head of MMSegmentation that ends with ``cls_seg`` can be a decoder: its classifier is taken off, so that its
forward pass ends with f_k. The paper's own is `ConditionDecoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from mmengine.model import ModuleList
from mmseg.models.decode_heads.cascade_decode_head import BaseCascadeDecodeHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alimm.projects.dcaa.decoder import conv_block
from alimm.registry import MODELS

_SUGGESTED = (
    "Use a convolutional head such as FCNHead, ASPPHead, DepthwiseSeparableASPPHead, UPerHead, SegformerHead or "
    "alimm.ConditionDecoder"
)
_SHARED = ("loss_decode", "ignore_index", "align_corners", "norm_cfg", "sampler", "threshold", "out_channels")


class BranchOutputs(NamedTuple):
    """What the head makes of a batch.

    Attributes:
        cond: K tensors of logits (N, classes, h, w), one a condition.
        att: logits (N, classes, h, w) of the fused head.
        mask: attention (N, K, h, w); sums to 1 over K.
    """

    cond: list[Tensor]
    att: Tensor
    mask: Tensor

    def matched(self, cond_ids: Tensor) -> Tensor:
        """Logits (N, classes, h, w) of each picture by the decoder of its own condition."""
        return torch.stack([self.cond[k][i] for i, k in enumerate(cond_ids.tolist())])


@MODELS.register_module()
class AttentiveFusionHead(BaseDecodeHead):
    """K decoders and their attentive fusion.

    Args:
        num_conditions: K, at least 1.
        branch: config of the decode head that every condition gets a copy of. ``num_classes``, ``align_corners``,
            ``loss_decode`` and the like are read from it.
        fusion_channels: of the attention and the global blocks; by default those of the branch.
        dropouts: of the attention, and after each of the two global blocks.
        attention: False weighs all conditions alike (ablation).
        checkpoint_branches: recompute the decoders in the backward pass in place of keeping what is inside them. Batch
            norm must be frozen then, since each pass would update its statistics.
        init_cfg: as in ``BaseDecodeHead``.

    Raises:
        ValueError: ``num_conditions`` is less than 1, or the branch is not a single head that ends with ``cls_seg``,
            or is an `AttentiveFusionHead` itself.
    """

    def __init__(
        self,
        num_conditions: int,
        branch: dict[str, Any],
        fusion_channels: int | None = None,
        dropouts: Sequence[float] = (0.5, 0.5, 0.1),
        attention: bool = True,
        checkpoint_branches: bool = False,
        init_cfg: Any = None,
    ) -> None:
        if num_conditions < 1:
            raise ValueError(f"AttentiveFusionHead needs at least one condition, got num_conditions={num_conditions}")
        branches = [_without_classifier(MODELS.build(branch)) for _ in range(num_conditions)]
        width = branches[0].channels
        fused = fusion_channels or width
        shared = {name: branch[name] for name in _SHARED if name in branch}
        super().__init__(
            in_channels=1,  # the branches choose their inputs themselves
            channels=fused,
            num_classes=branches[0].num_classes,
            dropout_ratio=0.0,
            init_cfg=init_cfg or dict(type="Normal", std=0.01, override=dict(name="conv_seg")),
            **shared,
        )
        self.num_conditions = num_conditions
        self.attention = attention
        self.checkpoint_branches = checkpoint_branches
        self.branches = ModuleList(branches)  # MMEngine's: init_weights reaches them
        self.classifiers = nn.ModuleList(nn.Conv2d(width, self.out_channels, 1) for _ in branches)
        block = partial(conv_block, norm_cfg=self.norm_cfg)
        self.attend = nn.Sequential(
            block(width * num_conditions, fused, dropout=dropouts[0]),
            nn.Conv2d(fused, num_conditions, 1, bias=False),
        )
        self.fuse = nn.Sequential(
            block(width * (num_conditions + 1), fused, dropout=dropouts[1]),
            block(fused, fused, dropout=dropouts[2]),
        )

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits (N, classes, h, w) of the fused head, on the grid of the branches."""
        features, mask = self._attend(inputs)
        return self._fused(features, mask)

    def forward_all(self, inputs: Sequence[Tensor]) -> BranchOutputs:
        """The fused logits, those of every condition, and the attention."""
        features, mask = self._attend(inputs)
        cond = [classify(feature) for classify, feature in zip(self.classifiers, features, strict=True)]
        return BranchOutputs(cond, self._fused(features, mask), mask)

    def _attend(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        features = [self._decode(branch, inputs) for branch in self.branches]
        first = features[0]
        if not self.attention or self.num_conditions == 1:
            shape = (len(first), self.num_conditions, *first.shape[2:])
            return features, first.new_full(shape, 1.0 / self.num_conditions)
        return features, self.attend(torch.cat(features, dim=1)).softmax(dim=1)

    def _decode(self, branch: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        if not (self.checkpoint_branches and torch.is_grad_enabled()):
            return _single(branch, branch(inputs))
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in branch.modules()):
            raise ValueError(
                "checkpoint_branches runs the decoders twice, and batch norm would update its statistics twice: set "
                "freeze_bn=True in the segmentor, or checkpoint_branches=False in its head"
            )
        return _single(branch, checkpoint(lambda *tensors: branch(tensors), *inputs, use_reentrant=False))

    def _fused(self, features: list[Tensor], mask_NKhw: Tensor) -> Tensor:
        attended: Any = sum(mask_NKhw[:, k : k + 1] * feature for k, feature in enumerate(features))
        return self.cls_seg(self.fuse(torch.cat([*features, attended], dim=1)))


def _single(branch: nn.Module, decoded: Any) -> Tensor:
    if not isinstance(decoded, Tensor):
        raise ValueError(f"{_refused(branch)} it has several outputs. {_SUGGESTED}")
    return decoded


def _without_classifier(branch: nn.Module) -> Any:
    if isinstance(branch, AttentiveFusionHead):
        raise ValueError(f"{_refused(branch)} it has decoders itself. {_SUGGESTED}")
    classifier = getattr(branch, "conv_seg", None)
    if not isinstance(branch, BaseDecodeHead) or not isinstance(classifier, nn.Conv2d):
        raise ValueError(f"{_refused(branch)} it has no classifier `conv_seg` behind its features. {_SUGGESTED}")
    if isinstance(branch, BaseCascadeDecodeHead):
        raise ValueError(f"{_refused(branch)} it refines the output of another head. {_SUGGESTED}")
    branch.conv_seg = nn.Identity()
    return branch


def _refused(branch: nn.Module) -> str:
    return f"{type(branch).__name__} cannot be the decoder of a condition:"
