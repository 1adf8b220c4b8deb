"""How well a layer's gradient survives quantisation, measured now and then."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alimm.projects.int8_training.state import LayerState


def watch(state: LayerState, g_RC: Tensor, q_RC: Tensor, step_C: NDArray[np.float32]) -> None:
    """Compare a gradient with its quantised form and note the outcome in ``state.health``.

    A layer whose cosine stays below ``min_cosine`` for ``patience`` checks is marked sick: it runs in float32 from the
    next step on.

    Args:
        state: of the layer.
        g_RC: the gradient, (R, C).
        q_RC: its integers.
        step_C: value of one step of each channel.
    """
    steps_C = torch.from_numpy(step_C).to(g_RC.device)
    back_RC = q_RC * steps_C
    length = float(g_RC.double().norm() * back_RC.double().norm())
    health = state.health
    if length > 0:
        health.cosine = float((g_RC.double() * back_RC).sum()) / length
    else:
        health.cosine = 1.0 if not g_RC.any() else 0.0
    qmax = state.options.grad_qmax
    health.clipped = float((g_RC.abs() > steps_C * (qmax * (1 + 1e-6))).float().mean())
    health.zeros = float((q_RC == 0).float().mean())
    bells = [found.bell_share for found in state.ranges.values()]
    health.bell = float(np.nanmean(bells)) if bells and not np.all(np.isnan(bells)) else float("nan")
    health.sick_checks = health.sick_checks + 1 if health.cosine < state.options.min_cosine else 0
    if health.sick_checks >= state.options.patience:
        state.sick = True
