"""What the channels of a gradient are clipped to, from step to step.

    max           the largest magnitude of the step
    paper         the paper's rule: the largest magnitude for a bell-shaped channel, a tracker of it for an inverted T
    closed_form   the exact minimiser of the paper's objective for an inverted T (our derivation)
    histogram     the exact minimiser for the channel as it is, no family assumed (our derivation)
    hindsight     the largest magnitude of the step before (Fournarakis and Nagel, 2021)

A layer that is called with several input sizes (the levels of a detector's shared head) keeps one state a size. With a
loss scale the state is kept in units of the unscaled gradient, so that a change of the scale leaves it right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alimm.projects.int8_training import quantized
from alimm.projects.int8_training.options import Int8Options
from alimm_ops.quantize import clipping

HISTOGRAM_BINS = 512
# Mean rounding error in steps, the constant c of the objective: 1/3 for stochastic rounding, 1/4 for nearest.
ROUNDING_ERROR = {"stochastic": 1 / 3, "nearest": 1 / 4}


@dataclass
class GradientRange:
    """The memory of one layer at one input size.

    Attributes:
        clip_C: what each channel was clipped to, in units of the unscaled gradient; None before the first step.
        sigma_C: root mean square of each channel at the step before.
        bell_share: share of bell-shaped channels at the last step; NaN where the rule does not ask.
    """

    clip_C: NDArray[np.float64] | None = None
    sigma_C: NDArray[np.float64] | None = None
    bell_share: float = float("nan")

    def update(
        self, gradient: torch.Tensor, options: Int8Options, loss_scale: float = 1.0
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]] | None:
        """Take in the gradient of a step.

        Args:
            gradient: (N, D, H, W, C), contiguous.
            options: which rule, and its constants.
            loss_scale: what the gradient is multiplied with.

        Returns:
            What to clip each channel to, in the gradient's own units, and the sum of each channel; None if an element
            is not finite, and then the state is as before.
        """
        if options.clip in ("max", "hindsight"):
            amax_C, sum_C, finite = quantized.channel_range(gradient)
            if not finite:
                return None
            now_C = amax_C.astype(np.float64) / loss_scale
            clip_C = now_C
            if options.clip == "hindsight" and self.clip_C is not None:
                # A channel that had no gradient says nothing of how large it is now.
                clip_C = np.where(self.clip_C > 0, self.clip_C, now_C)
            self.clip_C = now_C
            return (clip_C * loss_scale).astype(np.float32), sum_C
        return self._update_shape(gradient, options, loss_scale)

    def _update_shape(
        self, gradient: torch.Tensor, options: Int8Options, loss_scale: float
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]] | None:
        """The rules that look at the shape of the distribution.

        The share beyond sigma needs sigma first. That of the step before serves, which saves a pass; the first step
        takes two.
        """
        count = gradient.numel() // gradient.shape[-1]
        first = self.sigma_C is None
        threshold_C = np.zeros(gradient.shape[-1]) if self.sigma_C is None else self.sigma_C * loss_scale
        stats = quantized.channel_stats(gradient, threshold_C.astype(np.float32))
        if not stats[-1]:
            return None
        amax_C, sum_C, square_C = stats[0], stats[1], stats[2]
        sigma_C = np.sqrt(square_C / max(1, count))
        above_C = quantized.channel_stats(gradient, sigma_C.astype(np.float32))[3] if first else stats[3]
        now_C = amax_C.astype(np.float64) / loss_scale
        bell_C = clipping.is_bell(above_C, count, options.bell_share)
        previous_C = np.full_like(now_C, np.nan) if self.clip_C is None else self.clip_C
        if options.clip == "paper":
            clip_C = clipping.recursion(previous_C, now_C, bell_C, options.clip_k, options.clip_a)
        else:
            clip_C = self._solve(gradient, options, amax_C, sigma_C, bell_C) / loss_scale
        self.clip_C = np.where(now_C > 0, clip_C, previous_C)
        self.sigma_C = sigma_C / loss_scale
        self.bell_share = float(bell_C.mean())
        return (clip_C * loss_scale).astype(np.float32), sum_C

    @staticmethod
    def _solve(
        gradient: torch.Tensor,
        options: Int8Options,
        amax_C: NDArray[np.float32],
        sigma_C: NDArray[np.float64],
        bell_C: NDArray[np.bool_],
    ) -> NDArray[np.float64]:
        """The exact minimiser of the objective, in the gradient's units."""
        values_RC = quantized.rows(gradient.detach()).cpu().numpy()
        hist_CB = clipping.histogram(values_RC, HISTOGRAM_BINS)
        error = ROUNDING_ERROR[options.rounding]
        if options.clip == "histogram":
            return np.asarray(
                clipping.histogram_clip(hist_CB, amax_C, options.clip_alpha, sigma_C, error, options.grad_qmax)
            )
        clip_C = amax_C.astype(np.float64)
        for channel in np.flatnonzero(~bell_C & (amax_C > 0)):
            a, b, eps = clipping.fit_inverted_t(hist_CB[channel])
            # In units of the largest magnitude, as the histogram is.
            alpha = options.clip_alpha * amax_C[channel] / sigma_C[channel]
            clip_C[channel] *= clipping.closed_form(alpha, a, b, eps, 1.0, kappa=options.grad_qmax / error)
        return clip_C

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain tensors, which load with ``weights_only``."""
        return {
            name: None if value is None else torch.from_numpy(value.copy())
            for name, value in (("clip", self.clip_C), ("sigma", self.sigma_C))
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> GradientRange:
        """The reverse of `state`."""
        clip, sigma = (None if state[name] is None else state[name].numpy() for name in ("clip", "sigma"))
        return cls(clip, sigma)
