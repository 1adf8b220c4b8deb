"""Quantised weights of both products that read them.

The output takes the weights as they are, with one scale (the paper) or one an output channel, which factors out of the
sum as well.

The input gradient sums over output channels c, so a scale s_c of the gradient's channel cannot be taken out of the sum;
but it can be folded into the weights before these are quantised (our own addition):

    dX_i = sum_c s_c g_c W_ci = s_max sum_c g_c W'_ci,    W'_ci = W_ci s_c / s_max,

with W' quantised by input channel i, whose scale does factor out. One INT8 gradient then serves both products, and the
error falls where channels differ: a channel of small gradients gets weights of small magnitude instead of few steps.
With ``fold_O`` of ones and one scale this is the paper's product.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from alimm.projects.int8_training.geometry import Geometry
from alimm_ops.quantize import cpu, cpu_layout


def quantize_weight(
    weight: torch.Tensor, by_channel: bool, qmax: int = 127
) -> tuple[torch.Tensor, NDArray[np.float32]] | None:
    """To nearest.

    Args:
        weight: (O, I / groups, ...).
        by_channel: one scale an output channel instead of one in all.
        qmax: largest integer.

    Returns:
        int8 of the weight's shape, contiguous, and the step of each output channel (O,); None if not all are finite.
    """
    flat_OL = weight.detach().float().contiguous().reshape(len(weight), -1)
    if by_channel:
        amax_O = flat_OL.abs().amax(1).cpu().numpy()
        finite = bool(np.isfinite(amax_O).all())
    elif flat_OL.is_cuda:
        amax_O = np.repeat(flat_OL.abs().amax().cpu().numpy(), len(flat_OL))
        finite = bool(np.isfinite(amax_O).all())
    else:
        amax, _, finite = cpu.tensor_range(flat_OL.numpy())
        amax_O = np.full(len(flat_OL), amax, np.float32)
    if not finite:
        return None
    inverse_O = cpu.inverse_scale(amax_O, qmax)
    if flat_OL.is_cuda:
        steps_O = torch.from_numpy(inverse_O).to(flat_OL.device)
        q_OL = (flat_OL * steps_O[:, None]).clamp_(-qmax, qmax).round_().to(torch.int8)
    else:
        q_OL = torch.from_numpy(cpu_layout.quantize_rows(flat_OL.numpy(), inverse_O, qmax))
    step_O = (amax_O / np.float32(qmax)).astype(np.float32)
    return q_OL.view(weight.shape), step_O


def transposed_weight(
    weight: torch.Tensor, fold_O: NDArray[np.float32], by_channel: bool, layer: Geometry, qmax: int = 127
) -> tuple[torch.Tensor, NDArray[np.float32]]:
    """Quantised weights of the convolution that computes the input gradient (`Phases`).

    Args:
        weight: finite, (O, I / groups, ...).
        fold_O: what the weights of each output channel are multiplied with first.
        by_channel: one scale an input channel instead of one in all.
        layer: of the layer.
        qmax: largest integer.

    Returns:
        int8 (groups x P x I / groups, O / groups, J), contiguous, and the step of each input channel (I,).
    """
    detached = weight.detach().float()
    device = detached.device
    # Weights are few: what CUDA would gain over the CPU here it loses in launches.
    w_OIK = detached.cpu().contiguous().reshape(*weight.shape[:2], -1).numpy()
    amax_I = cpu_layout.weight_range(w_OIK, fold_O, layer.groups)
    if not by_channel:
        amax_I = np.full_like(amax_I, amax_I.max())
    taps_PJ = layer.phases.taps_PJ
    q = cpu_layout.transpose_weight(w_OIK, fold_O, cpu.inverse_scale(amax_I, qmax), qmax, taps_PJ, layer.groups)
    return torch.from_numpy(q).to(device), amax_I / np.float32(qmax)
