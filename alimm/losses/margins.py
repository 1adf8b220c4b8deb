"""Margins on the cosine of a sample's own class: the logit s cos(t) becomes s psi(cos t), the others stay.

    ArcFace    psi = cos(t + m)                      Deng et al., CVPR 2019
    CosFace    psi = cos(t) - m                      Wang et al., CVPR 2018
    combined   psi = cos(m1 t + m2) - m3             InsightFace's margin loss, Deng et al., CVPR 2019, section 2.2
    AdaFace    psi = cos(t - m q) - m q - m          Kim et al., CVPR 2022
               q = clip(h (|x| - mean) / std, -1, 1), mean and std of the lengths |x| as moving averages

Every margin answers with psi and d psi / d cos in closed form, so that a loss that has no autograd graph of its logits
can use it. Where we follow and where we differ:

- Beyond the angle at which the cosine would rise again (m1 t + m2 > pi) psi goes on as cos(t) - c with the slope 1.
  With d = pi - (pi - m2) / m1, the part of the circle that is cut off, c = max(d sin d, 1 - cos d) + m3: for ArcFace
  this is InsightFace's ``cos - m sin m`` (m1 = 1, so d = m), and never a step up. AdaFace's own code holds the logit
  constant there, so that such a sample no longer pulls at its class; here it goes on in the same way, with d = -m q.
- Where AdaFace's angle would fall below 0 (a long feature near its class) psi is constant, as in its code.
- Near cos = 1 the derivative of acos has no bound. Within 1e-6 of the ends psi is its tangent at that distance, so
  value and derivative stay finite and consistent, also for a cosine of 1 + 1e-7 as rounding makes it.
- AdaFace's moving averages start at 20 and 100, as in its code.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from alimm.registry import MODELS

_EDGE = 1e-6
"""Distance from cos = +-1 within which psi is replaced by its tangent."""


def _shifted_cosine(cos_B: torch.Tensor, factor: float, shift_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos(factor t + shift) and its derivative by cos t, continued at both ends; all in float64.

    Args:
        cos_B: cos t, may leave [-1, 1] by rounding.
        factor: m1.
        shift_B: m2, a number a sample.
    """
    inner_B = cos_B.clamp(-1 + _EDGE, 1 - _EDGE)
    angle_B = factor * inner_B.acos() + shift_B
    value_B = angle_B.clamp(0, math.pi).cos()
    slope_B = factor * angle_B.sin() / ((1 - inner_B) * (1 + inner_B)).sqrt()
    slope_B = torch.where(angle_B < 0, torch.zeros_like(slope_B), slope_B)
    beyond_B = angle_B > math.pi
    cut_B = math.pi - (math.pi - shift_B) / factor
    offset_B = torch.maximum(cut_B * cut_B.sin(), 1 - cut_B.cos())
    value_B = torch.where(beyond_B, inner_B - offset_B, value_B)
    slope_B = torch.where(beyond_B, torch.ones_like(slope_B), slope_B)
    return value_B + (cos_B - inner_B) * slope_B, slope_B


class Margin(nn.Module):
    """Base of the margins; a subclass gives ``psi`` in float64.

    Attributes:
        needs_norms: whether `forward` needs the lengths of the features.
    """

    needs_norms = False

    def forward(self, cos_B: torch.Tensor, norms_B: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The value and derivative of psi at the cosine of each sample with its own class, without an autograd graph.

        Args:
            cos_B: (B,), any floating type; B may be 0.
            norms_B: lengths of the features before they were normalised, (B,), where ``needs_norms``.

        Returns:
            Two tensors (B,) of the type of ``cos_B``, half precision as float32.

        Raises:
            ValueError: a margin that needs norms got none, or not as many as cosines.
        """
        if self.needs_norms and (norms_B is None or norms_B.shape != cos_B.shape):
            got = "none" if norms_B is None else f"shape {tuple(norms_B.shape)}"
            raise ValueError(
                f"{type(self).__name__} needs the length of each feature, shape {tuple(cos_B.shape)}, got {got}: "
                "give norms= of the features before they are normalised"
            )
        with torch.no_grad():
            value_B, slope_B = self.psi(cos_B.double(), None if norms_B is None else norms_B.double())
        dtype = torch.promote_types(cos_B.dtype, torch.float32)
        return value_B.to(dtype), slope_B.to(dtype)

    def psi(self, cos_B: torch.Tensor, norms_B: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and derivative in float64, see `forward`."""
        raise NotImplementedError

    def update(self, norms_B: torch.Tensor) -> None:
        """Take the lengths of the features of one global batch, once a training step, the same on every rank."""


@MODELS.register_module()
class CombinedMargin(Margin):
    """cos(m1 t + m2) - m3, with ``(m1, m2, m3)`` as in InsightFace.

    Args:
        m1: factor of the angle, at least 1.
        m2: added to the angle, in radians, in [0, pi).
        m3: taken from the cosine, at least 0.
        easy: leave classes at an angle of more than 90 degrees as they are. psi then has a step at 90 degrees.
    """

    def __init__(self, m1: float = 1.0, m2: float = 0.0, m3: float = 0.0, easy: bool = False) -> None:
        super().__init__()
        if not (1 <= m1 < math.inf and 0 <= m2 < math.pi and 0 <= m3 < math.inf):
            raise ValueError(
                f"a margin cos(m1 t + m2) - m3 needs m1 >= 1, m2 in [0, pi) radians and m3 >= 0, got m1={m1}, m2={m2}, "
                f"m3={m3}; ArcFace is (1, 0.5, 0), CosFace (1, 0, 0.35)"
            )
        self.m1, self.m2, self.m3, self.easy = m1, m2, m3, easy

    def psi(self, cos_B: torch.Tensor, norms_B: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and derivative in float64, see `forward`."""
        if self.m1 == 1 and self.m2 == 0:
            value_B, slope_B = cos_B, torch.ones_like(cos_B)
        else:
            value_B, slope_B = _shifted_cosine(cos_B, self.m1, torch.full_like(cos_B, self.m2))
        value_B = value_B - self.m3
        if self.easy:
            near_B = cos_B > 0
            value_B = torch.where(near_B, value_B, cos_B)
            slope_B = torch.where(near_B, slope_B, torch.ones_like(slope_B))
        return value_B, slope_B

    def extra_repr(self) -> str:
        """The constants."""
        return f"m1={self.m1}, m2={self.m2}, m3={self.m3}, easy={self.easy}"


@MODELS.register_module()
class ArcFaceMargin(CombinedMargin):
    """cos(t + m).

    Args:
        m: radians, in [0, pi).
        easy: leave classes at an angle of more than 90 degrees as they are.
    """

    def __init__(self, m: float = 0.5, easy: bool = False) -> None:
        super().__init__(m2=m, easy=easy)


@MODELS.register_module()
class CosFaceMargin(CombinedMargin):
    """cos(t) - m.

    Args:
        m: at least 0.
    """

    def __init__(self, m: float = 0.35) -> None:
        super().__init__(m3=m)


@MODELS.register_module()
class AdaFaceMargin(Margin):
    """A margin by image quality: long features (clear pictures) get a margin like CosFace's, short ones like ArcFace's.

    The moving averages are buffers and go into checkpoints.

    Args:
        m: the margin, in (0, pi / 2).
        h: how strongly quality counts, above 0; 0.333 brings about 68 % of the lengths into [-1, 1] before the clip.
        t_alpha: weight of the newest batch in the moving averages, in (0, 1].
    """

    needs_norms = True
    norm_mean: torch.Tensor
    norm_std: torch.Tensor

    def __init__(self, m: float = 0.4, h: float = 0.333, t_alpha: float = 0.01) -> None:
        super().__init__()
        if not (0 < m < math.pi / 2 and 0 < h < math.inf and 0 < t_alpha <= 1):
            raise ValueError(
                f"AdaFaceMargin needs m in (0, pi/2), h above 0 and t_alpha in (0, 1], got m={m}, h={h}, "
                f"t_alpha={t_alpha}; the paper takes m=0.4, h=0.333, t_alpha=0.01"
            )
        self.m, self.h, self.t_alpha = m, h, t_alpha
        self.register_buffer("norm_mean", torch.tensor(20.0, dtype=torch.float64))
        self.register_buffer("norm_std", torch.tensor(100.0, dtype=torch.float64))

    def psi(self, cos_B: torch.Tensor, norms_B: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and derivative in float64, see `forward`."""
        assert norms_B is not None
        quality_B = (norms_B.clamp(1e-3, 100) - self.norm_mean) / (self.norm_std + 1e-3) * self.h
        quality_B = quality_B.clamp(-1, 1)
        value_B, slope_B = _shifted_cosine(cos_B, 1.0, -self.m * quality_B)
        return value_B - self.m * (quality_B + 1), slope_B

    @torch.no_grad()
    def update(self, norms_B: torch.Tensor) -> None:
        """Move the averages. Lengths that are not finite are left out, so that one overflow does not stay for ever."""
        norms_B = norms_B.detach().double()
        norms_B = norms_B[norms_B.isfinite()].clamp(1e-3, 100)
        if len(norms_B):
            self.norm_mean.lerp_(norms_B.mean().to(self.norm_mean), self.t_alpha)
        if len(norms_B) > 1:
            self.norm_std.lerp_(norms_B.std().to(self.norm_std), self.t_alpha)

    def extra_repr(self) -> str:
        """The constants."""
        return f"m={self.m}, h={self.h}, t_alpha={self.t_alpha}"


def margin_logits(
    cos_BC: torch.Tensor,
    labels: torch.Tensor,
    margin: Margin,
    scale: torch.Tensor | float = 1.0,
    norms: torch.Tensor | None = None,
) -> torch.Tensor:
    """The logits of an ordinary head: scale cos, and scale psi(cos) at each sample's own class. Differentiable once.

    Args:
        cos_BC: cosines, (B, C); half precision is computed in float32.
        labels: int64, (B,); a label outside [0, C) leaves its row as it is.
        margin: psi.
        scale: s; may be a tensor that is trained.
        norms: lengths of the features, (B,), where the margin needs them.
    """
    cos_BC = cos_BC.to(torch.promote_types(cos_BC.dtype, torch.float32))
    rows = ((labels >= 0) & (labels < cos_BC.shape[1])).nonzero()[:, 0]
    columns = labels[rows]
    own = cos_BC[rows, columns]
    value, slope = margin(own.detach(), None if norms is None else norms.detach()[rows])
    # Zero in value, the closed derivative in backward.
    moved = value + slope * (own - own.detach())
    return scale * cos_BC.index_put((rows, columns), moved)
