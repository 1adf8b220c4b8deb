"""Adversarial alignment: what discriminators and segmentor minimise, and the gradients they must not see.

Cai et al., Exploiting Diverse Characteristics and Adversarial Ambivalence for Domain Adaptive Segmentation, AAAI 2021
(arXiv:2012.05608). With c(i) the condition of image i, s the softmax over classes, D_k the discriminator of condition
k, D_g that of the fused output, and BCE the mean over the patches of one image:

    L_adv = l ( sum_k mean_{i: c(i) = k} BCE(D_k(s(p_k(x_i^t))), 1) + mean_i BCE(D_g(s(p_g(x_i^t))), 1) )
    L_D   = l / 2 ( sum_k mean_{source, c = k} BCE(D_k, 1) + mean_{target, c = k} BCE(D_k, 0) + the same for D_g )

Source is 1 and target is 0, as in the authors' release; in AdaptSegNet it is the other way round. In the second stage
only hard pixels are aligned, per image with mask m

    sum(m BCE) / (sum(m) + 1)

Where we differ: both sums run over the discriminator's grid. The release takes the numerator there and the denominator
over the finer grid of the mask, which divides the loss by the square of the stride; ``release=True`` does that.
Losses come per image (N,), so that `mean_by_condition` can divide by counts of the whole batch over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from mmengine import dist
from torch import Tensor, nn

SOURCE = 1.0
TARGET = 0.0


def domain_loss(logits_N1hw: Tensor, label: float) -> Tensor:
    """Mean binary cross entropy of each image's patches, (N,).

    Args:
        logits_N1hw: of a discriminator.
        label: the domain it should say, `SOURCE` or `TARGET`.
    """
    return _bce(logits_N1hw, label).mean((1, 2))


def masked_domain_loss(logits_N1hw: Tensor, label: float, mask_NHW: Tensor, release: bool = False) -> Tensor:
    """Binary cross entropy of the patches in a mask, sum(m bce) / (sum(m) + 1) of each image, (N,).

    Args:
        logits_N1hw: of a discriminator.
        label: the domain it should say, `SOURCE` or `TARGET`.
        mask_NHW: weight of each pixel, on a grid of its own. A patch has the mean weight of its pixels.
        release: as the authors' release: a patch has the weight of its nearest pixel, and the denominator is the sum
            over the mask's own grid.

    Raises:
        ValueError: the mask is not one (H, W) an image.
    """
    if mask_NHW.ndim != 3 or len(mask_NHW) != len(logits_N1hw):
        raise ValueError(
            f"masked_domain_loss: expected a mask ({len(logits_N1hw)}, H, W), got shape {tuple(mask_NHW.shape)}"
        )
    bce = _bce(logits_N1hw, label)
    mask = mask_NHW.detach().to(bce.dtype)
    mode = "nearest" if release else "area"
    small = F.interpolate(mask[:, None], bce.shape[1:], mode=mode)[:, 0]
    total = (mask if release else small).sum((1, 2))
    return (bce * small).sum((1, 2)) / (total + 1)


def _bce(logits_N1hw: Tensor, label: float) -> Tensor:
    if logits_N1hw.ndim != 4 or logits_N1hw.shape[1] != 1:
        raise ValueError(f"a discriminator's logits are (N, 1, h, w), got shape {tuple(logits_N1hw.shape)}")
    logits = logits_N1hw[:, 0].float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label), reduction="none")


def condition_counts(cond_ids_N: Tensor, num_conditions: int) -> Tensor:
    """Images of each condition, float (K,).

    Raises:
        ValueError: an id is not in 0 .. K - 1.
    """
    _check_ids(cond_ids_N, num_conditions)
    return torch.bincount(cond_ids_N.long(), minlength=num_conditions).float()


def mean_by_condition(
    values_N: Tensor, cond_ids_N: Tensor, num_conditions: int, counts_K: Tensor | None = None
) -> Tensor:
    """Sum over the conditions of the mean of their images' values: sum_k sum_{i: c(i) = k} v_i / n_k.

    A condition without images adds nothing; without any image the result is a zero that still has a graph if the
    values have one.

    Args:
        values_N: a loss of each image.
        cond_ids_N: condition of each image, integers.
        num_conditions: K.
        counts_K: n_k, positive for each condition that has an image here. With several ranks give
            ``over_ranks(condition_counts(...))``: then the mean over the ranks of what this returns, and of its
            gradients, is that of the whole batch. By default the counts of ``cond_ids_N``.

    Raises:
        ValueError: an id is out of range, or shapes do not fit.
    """
    if values_N.shape != cond_ids_N.shape or values_N.ndim != 1:
        raise ValueError(
            "mean_by_condition: expected one value and one condition for each image, got shapes "
            f"{tuple(values_N.shape)} and {tuple(cond_ids_N.shape)}"
        )
    if counts_K is None:
        counts_K = condition_counts(cond_ids_N, num_conditions)
    elif counts_K.shape != (num_conditions,):
        raise ValueError(
            f"mean_by_condition: expected counts of {num_conditions} conditions, got shape {tuple(counts_K.shape)}"
        )
    else:
        _check_ids(cond_ids_N, num_conditions)
    return (values_N / counts_K.to(values_N)[cond_ids_N.long()]).sum()


def _check_ids(cond_ids_N: Tensor, num_conditions: int) -> None:
    if cond_ids_N.numel() and not 0 <= int(cond_ids_N.min()) <= int(cond_ids_N.max()) < num_conditions:
        raise ValueError(
            f"condition ids must be in 0 .. {num_conditions - 1}, got {sorted(set(cond_ids_N.tolist()))}. Is the "
            "number of conditions of the model that of the data?"
        )


def over_ranks(total: Tensor) -> Tensor:
    """Mean over the ranks, to divide a rank's sum by; zeros become ones.

    What is zero on all ranks counts nothing, so the sum above it is zero as well, and so is their quotient. Every rank
    must call this. The result has no graph.

    Args:
        total: counts or sums of weights, any shape; left as it is.
    """
    total = total.detach().clone().float()
    dist.all_reduce(total, op="mean")
    return torch.where(total == 0, torch.ones_like(total), total)


def self_information(prob_NCHW: Tensor) -> Tensor:
    """Weighted self-information maps -p log2(p) / log2(C) of AdvEnt (Vu et al., CVPR 2019), (N, C, H, W).

    Their sum over the classes is the entropy of a pixel as a share of the largest possible one.

    Raises:
        ValueError: there are fewer than two classes.
    """
    classes = prob_NCHW.shape[1]
    if classes < 2:
        raise ValueError(f"self_information: entropy needs at least two classes, got {classes}")
    # The base of the logarithm cancels. The clamp keeps the gradient finite where p has underflowed to 0.
    logs = prob_NCHW.clamp_min(torch.finfo(prob_NCHW.dtype).tiny).log()
    return -prob_NCHW * logs / math.log(classes)


def entropy_loss(prob_NCHW: Tensor) -> Tensor:
    """Mean entropy of the pixels in 0 .. 1, the loss of MinEnt (Vu et al., CVPR 2019)."""
    return self_information(prob_NCHW).sum(1).mean()


class GradientReversal(torch.autograd.Function):
    """Identity whose gradient is multiplied by -scale (Ganin and Lempitsky, ICML 2015)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """Return the input."""
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Turn the gradient round."""
        return -ctx.scale * grads[0], None


def reverse_gradient(x: Tensor, scale: float = 1.0) -> Tensor:
    """The input itself; on the way back its gradient is multiplied by -scale."""
    reversed_: Tensor = GradientReversal.apply(x, scale)
    return reversed_


@contextmanager
def frozen(modules: nn.Module | Iterable[nn.Module]) -> Iterator[None]:
    """Inside, no parameter of the modules asks for a gradient; afterwards each has its flag from before again.

    A loss that is computed inside still sends gradients through the modules to their inputs, but none to them.
    """
    listed = [modules] if isinstance(modules, nn.Module) else list(modules)
    flags = [(parameter, parameter.requires_grad) for module in listed for parameter in module.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@torch.no_grad()
def domain_accuracy(logits_N1hw: Tensor, label: float) -> Tensor:
    """Share of the patches that a discriminator assigns to the right domain, a number without a graph."""
    return ((logits_N1hw > 0) == (label > 0.5)).float().mean()
