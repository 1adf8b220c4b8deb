"""Self-training with adversarial ambivalence: pseudo labels, how sure a discriminator is of them, and their losses.

Cai et al., Exploiting Diverse Characteristics and Adversarial Ambivalence for Domain Adaptive Segmentation, AAAI 2021
(arXiv:2012.05608). A frozen segmentor gives logits p_k of each condition, p_g of the fused branch and the fusion's
weights A_k, which sum to one over the conditions; a frozen discriminator D says how much a patch looks like source.

    P      = 1/2 ( sum_k A_k softmax(p_k) + softmax(p_g) )
    y      = argmax_c P_c where it exceeds tau_c, else ignored
    d      = sigmoid(D(softmax(p_g)))                                    high: looks like source, easy
    w_easy = d [d > T] [y not ignored],   m_hard = [d < T] or [y ignored]
    L_easy = sum w_easy CE(p_g(x^t), y) / (1 + #{w_easy > 0})

Easy pixels learn from their labels; hard ones are aligned, see `adversarial.masked_domain_loss`.

Where we differ: the release has T = 0, so that every pixel with a label is easy, and feeds D with logits that are
enlarged 16 times, so that its patches are the pixels of the logits; both can be had. By default D reads the
probabilities in their own size, which takes 1/256 of the memory, and its answer is enlarged; a patch then covers
16 times as much of the picture on each side. `class_thresholds` is ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("native", "release")


@torch.no_grad()
def pseudo_labels(
    cond_logits: Sequence[Tensor],
    att_logits: Tensor,
    mask_NKHW: Tensor,
    threshold: float | Sequence[float] | Tensor,
    ignore_index: int,
    correlate: bool = True,
) -> tuple[Tensor, Tensor]:
    """Labels that all conditions agree on: (N, H, W) integers, and the probabilities P (N, C, H, W) behind them.

    Args:
        cond_logits: p_k, (N, C, H, W) for each condition.
        att_logits: p_g, (N, C, H, W).
        mask_NKHW: A, the weight of each condition at each pixel.
        threshold: tau, of all classes or of each; a pixel gets the most probable class if P exceeds its threshold.
        ignore_index: label of the other pixels.
        correlate: if False, P is softmax(p_g) alone.

    Raises:
        ValueError: shapes do not fit, or a threshold is not in [0, 1).
    """
    prob = att_logits.float().softmax(1)
    if correlate:
        expected = (len(att_logits), len(cond_logits), *att_logits.shape[2:])
        if mask_NKHW.shape != expected or any(logits.shape != att_logits.shape for logits in cond_logits):
            raise ValueError(
                f"pseudo_labels: expected a mask {expected} and logits {tuple(att_logits.shape)} of each condition, "
                f"got {tuple(mask_NKHW.shape)} and {[tuple(logits.shape) for logits in cond_logits]}"
            )
        for k, logits in enumerate(cond_logits):
            prob = prob + mask_NKHW[:, k : k + 1].float() * logits.float().softmax(1)
        prob = prob / 2
    best, labels = prob.max(1)
    thresholds_C = _thresholds(threshold, prob)
    return torch.where(best > thresholds_C[labels], labels, ignore_index), prob


def _thresholds(threshold: float | Sequence[float] | Tensor, like_NCHW: Tensor) -> Tensor:
    classes = like_NCHW.shape[1]
    values = torch.as_tensor(threshold, dtype=torch.float32, device=like_NCHW.device)
    if values.shape not in [(), (classes,)]:
        raise ValueError(
            f"expected one threshold, or one for each of the {classes} classes, got shape {tuple(values.shape)}"
        )
    if not bool(((values >= 0) & (values < 1)).all()):
        raise ValueError(f"thresholds of a probability must be in [0, 1), got {values.tolist()}")
    return values.expand(classes)


@torch.no_grad()
def class_thresholds(prob_NCHW: Tensor, quantile: float = 0.5, low: float = 0.6, high: float = 0.9) -> Tensor:
    """Thresholds (C,) that let each class keep a share of its pixels, for `pseudo_labels`. Ours, not the paper's.

    That of a class is the quantile of the probabilities of the pixels where the class is the most probable, moved
    into [low, high]; of a class without pixels it is ``low``.

    Args:
        prob_NCHW: probabilities, as of `pseudo_labels`.
        quantile: share of a class's pixels below its threshold.
        low: least threshold.
        high: largest threshold, below 1.

    Raises:
        ValueError: the quantile is not in [0, 1], or not 0 <= low <= high < 1.
    """
    if not (0 <= quantile <= 1 and 0 <= low <= high < 1):
        raise ValueError(
            "class_thresholds: expected a quantile in [0, 1] and 0 <= low <= high < 1, got "
            f"quantile={quantile}, low={low}, high={high}"
        )
    best, labels = prob_NCHW.max(1)
    result_C = prob_NCHW.new_full((prob_NCHW.shape[1],), low)
    for c in range(len(result_C)):
        own = best[labels == c]
        if len(own):
            result_C[c] = _quantile(own, quantile)
    return result_C.clamp(low, high)


def _quantile(values_P: Tensor, q: float) -> Tensor:
    # torch.quantile refuses more than 16 million values.
    ordered = values_P.flatten().float().sort().values
    at = q * (len(ordered) - 1)
    below, above = ordered[math.floor(at)], ordered[math.ceil(at)]
    return below + (at - math.floor(at)) * (above - below)


@torch.no_grad()
def ambivalence(
    logits_NChw: Tensor,
    discriminator: Callable[[Tensor], Tensor],
    mode: str = "native",
    upsample: int = 16,
) -> Tensor:
    """How much each pixel looks like source to a discriminator, d in (0, 1), on the logits' grid (N, h, w).

    Args:
        logits_NChw: p_g.
        discriminator: class probabilities to logits (N, 1, ., .).
        mode: ``'native'``: D reads the probabilities in their own size, and d is enlarged (bilinear, without aligned
            corners: a patch stands for its share of the map). ``'release'``: the logits are enlarged
            ``upsample`` times (bilinear, with aligned corners) before the softmax.
        upsample: the discriminator's stride, so that its grid becomes that of the logits; only for ``'release'``.

    Raises:
        ValueError: the mode is unknown, or ``upsample`` is not positive.
    """
    if mode not in MODES or upsample < 1:
        raise ValueError(
            f"ambivalence: mode must be one of {', '.join(MODES)} and upsample positive, got {mode!r} and {upsample}"
        )
    size = logits_NChw.shape[2:]
    logits_NChw = logits_NChw.float()
    if mode == "native":
        d = discriminator(logits_NChw.softmax(1)).float().sigmoid()
    else:
        large = (size[0] * upsample, size[1] * upsample)
        # One image at a time: the enlarged maps are the largest tensors of a training step.
        enlarged = (
            F.interpolate(one, large, mode="bilinear", align_corners=True).softmax(1) for one in logits_NChw.split(1)
        )
        d = torch.cat([discriminator(one).float().sigmoid() for one in enlarged])
    if d.shape[2:] != size:
        d = F.interpolate(d, size, mode="bilinear", align_corners=False)
    return d[:, 0]


@torch.no_grad()
def resolve_threshold(d_Nhw: Tensor, threshold: float | str) -> Tensor:
    """The threshold T as a number.

    Args:
        d_Nhw: of `ambivalence`.
        threshold: a number in [0, 1], or ``'q30'`` for the value that 30 % of this rank's batch lie below.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(threshold, str):
        found = re.fullmatch(r"q(\d+(?:\.\d+)?)", threshold)
        if found and float(found[1]) <= 100:
            return _quantile(d_Nhw, float(found[1]) / 100)
    elif not isinstance(threshold, bool) and 0 <= threshold <= 1:
        return torch.tensor(float(threshold), device=d_Nhw.device)
    raise ValueError(
        "the threshold of ambivalence must be a number in [0, 1], or a percentage such as 'q30' for the value that "
        f"30 % of the pixels of a batch lie below, got {threshold!r}"
    )


@torch.no_grad()
def split(d_Nhw: Tensor, labels_Nhw: Tensor, threshold: float | Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Weight of the easy pixels and mask of the hard ones, both float (N, h, w).

    A pixel with a label whose d is exactly the threshold is neither.

    Args:
        d_Nhw: of `ambivalence`.
        labels_Nhw: of `pseudo_labels`.
        threshold: T, of `resolve_threshold`.
        ignore_index: label of pixels without one.

    Raises:
        ValueError: shapes differ.
    """
    if d_Nhw.shape != labels_Nhw.shape:
        raise ValueError(
            f"split: expected d and labels on one grid, got {tuple(d_Nhw.shape)} and {tuple(labels_Nhw.shape)}"
        )
    valid = labels_Nhw != ignore_index
    easy = d_Nhw * ((d_Nhw > threshold) & valid)
    return easy, ((d_Nhw < threshold) | ~valid).to(d_Nhw.dtype)


def easy_loss(
    logits_NChw: Tensor,
    labels_Nhw: Tensor,
    w_easy_Nhw: Tensor,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor]:
    """Sum of the weighted cross entropies and the number of pixels with a positive weight.

    The loss is ``sum / (1 + count)``; with R ranks divide by ``over_ranks(count + 1 / R)``, so that the mean over the
    ranks is the loss of the whole batch.

    Args:
        logits_NChw: p_g of the trained segmentor.
        labels_Nhw: of `pseudo_labels`, on the same grid.
        w_easy_Nhw: of `split`.
        class_weight: of each class, on top. The paper's weights are for the source; here they amplify wrong labels of
            rare classes.
        ignore_index: label of pixels without one.

    Raises:
        ValueError: shapes do not fit, or a label is no class.
    """
    _check_labels("easy_loss", [logits_NChw], labels_Nhw, ignore_index)
    if logits_NChw.shape[2:] != labels_Nhw.shape[1:] or w_easy_Nhw.shape != labels_Nhw.shape:
        raise ValueError(
            f"easy_loss: expected logits, labels and weights on one grid, got {tuple(logits_NChw.shape)}, "
            f"{tuple(labels_Nhw.shape)} and {tuple(w_easy_Nhw.shape)}"
        )
    weight = _class_weight(class_weight, logits_NChw)
    ce = F.cross_entropy(logits_NChw.float(), labels_Nhw.long(), weight, ignore_index=ignore_index, reduction="none")
    return (w_easy_Nhw * ce).sum(), (w_easy_Nhw > 0).sum().float()


def segmentation_loss(
    logits_list: Sequence[Tensor],
    labels_NHW: Tensor,
    class_weight: Sequence[float] | Tensor | None = None,
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor]:
    """Sum of the class-weighted cross entropies of several outputs for the same labels, and the sum of their weights.

    The quotient is one weighted mean over all outputs; with several ranks divide by ``over_ranks(total)``. If every
    pixel is ignored both are 0, and the first still has a graph.

    Args:
        logits_list: outputs (N, C, h, w), enlarged to the labels' size (bilinear, aligned corners, as the release).
        labels_NHW: integers.
        class_weight: of each class; 1 by default.
        ignore_index: label of pixels to leave out.

    Raises:
        ValueError: shapes do not fit, or a label is no class.
    """
    _check_labels("segmentation_loss", logits_list, labels_NHW, ignore_index)
    labels = labels_NHW.long()
    size = labels.shape[1:]
    weight = _class_weight(class_weight, logits_list[0])
    total = logits_list[0].new_zeros((), dtype=torch.float32)
    for logits in logits_list:
        large = F.interpolate(logits.float(), size, mode="bilinear", align_corners=True)
        total = total + F.cross_entropy(large, labels, weight, ignore_index=ignore_index, reduction="sum")
    known = labels[labels != ignore_index]
    weights = float(len(known)) if weight is None else weight[known].sum()
    return total, len(logits_list) * torch.as_tensor(weights, dtype=torch.float32, device=labels.device)


def _class_weight(class_weight: Sequence[float] | Tensor | None, like_NCHW: Tensor) -> Tensor | None:
    if class_weight is None:
        return None
    weight = torch.as_tensor(class_weight, dtype=torch.float32, device=like_NCHW.device)
    if weight.shape != (like_NCHW.shape[1],):
        raise ValueError(
            f"class_weight: expected a number for each of the {like_NCHW.shape[1]} classes, got shape "
            f"{tuple(weight.shape)}"
        )
    return weight


def _check_labels(what: str, logits_list: Sequence[Tensor], labels_NHW: Tensor, ignore_index: int) -> None:
    shapes = [tuple(logits.shape) for logits in logits_list]
    if not shapes or labels_NHW.ndim != 3 or any(s[:2] != (len(labels_NHW), shapes[0][1]) for s in shapes):
        raise ValueError(
            f"{what}: expected outputs (N, C, h, w) and labels (N, H, W) of the same images, got {shapes} and "
            f"{tuple(labels_NHW.shape)}"
        )
    classes = shapes[0][1]
    wrong = ((labels_NHW < 0) | (labels_NHW >= classes)) & (labels_NHW != ignore_index)
    if bool(wrong.any()):
        values = sorted(set(labels_NHW[wrong].tolist()))
        raise ValueError(
            f"{what}: labels must be in 0 .. {classes - 1} or {ignore_index} (ignored), got {values[:10]}. Does the "
            "data set map its labels to training ids, and is ignore_index right?"
        )
