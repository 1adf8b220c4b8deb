"""Softmax over one rank's classes, a block of classes at a time: what forward and backward need of each block.

Shapes: B samples of the global batch, A classes computed here (all local rows, or the active ones), D features. A block
is a slice ``[a, b)`` of the A classes:

    n_j = |w_j|,  z_ij = s x_i . w_j / n_j            (cosine; without it n_j = 1 and s = 1)
    z_iy = s psi(cos_iy) at the sample's own class     (margin, on the rank that holds the class)
    z_ij <- z_ij + correction_j elsewhere              (-log q of classes that were drawn at random)

Only a block of weights is gathered and normalised at a time, so beside the logits nothing grows with A but one number a
class. The logits are either kept for backward (4 bytes a sample and class) or computed again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

BLOCK = 2048
"""Classes in a block on the CPU: 256 samples by 2048 classes are 2 MB, which stays in the cache."""

CUDA_BLOCK = 32768
"""Classes in a block on a GPU, which needs larger products to be busy."""

EPS = 1e-12


class Workspace:
    """A buffer of logits that is used again from step to step; a second user at the same time gets its own memory."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._holder: Any = lambda: None

    def take(self, owner: Any, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised matrix that is ``owner``'s until it is collected."""
        if self._holder() is not None:
            return like.new_empty(shape)
        count = shape[0] * shape[1]
        buffer = self._buffer
        unfit = buffer is None or buffer.numel() < count or buffer.dtype != like.dtype or buffer.device != like.device
        # What inference mode has made cannot be written outside it.
        if buffer is None or unfit or (buffer.is_inference() and not torch.is_inference_mode_enabled()):
            buffer = self._buffer = like.new_empty(count)
        self._holder = weakref.ref(owner)
        return buffer[:count].view(shape)

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        # A copy starts with a buffer of its own.
        return Workspace, ()


@dataclass(eq=False)
class Classes:
    """The classes of one rank in one step, and where the samples' own classes are among them.

    Attributes:
        weight: rows of this rank, (n, D).
        active: local rows in use, int64 (A,), sorted; None is all of them.
        scale: s.
        cosine: whether rows are divided by their length.
        sample: samples whose class lies here, int64 (T,), ordered by column.
        column: their class, as a position among the A classes, int64 (T,), ascending.
        target: their logit with the margin, (T,).
        correction: added to the logits of the others, (A,) or None.
    """

    weight: torch.Tensor
    active: torch.Tensor | None
    scale: float
    cosine: bool
    sample: torch.Tensor
    column: torch.Tensor
    target: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    correction: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.weight) if self.active is None else len(self.active)

    @property
    def block(self) -> int:
        """Classes in a block."""
        return CUDA_BLOCK if self.weight.is_cuda else BLOCK

    def blocks(self) -> Iterator[tuple[int, int, int, int]]:
        """``(a, b, first, last)``: classes [a, b), whose samples are entries [first, last) of ``sample``."""
        starts = range(0, len(self), self.block)
        edges = torch.tensor([*starts, len(self)], device=self.column.device)
        split = torch.searchsorted(self.column, edges).tolist()
        for number, a in enumerate(starts):
            yield a, min(a + self.block, len(self)), split[number], split[number + 1]

    def rows(self, a: int, b: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights of a block, of length one under the cosine, (b - a, D); and one over their lengths, (b - a, 1)."""
        rows = self.weight[a:b] if self.active is None else self.weight.index_select(0, self.active[a:b])
        if not self.cosine:
            return rows, None
        inverse = rows.norm(dim=1, keepdim=True).clamp_min_(EPS).reciprocal_()
        return rows * inverse, inverse

    def target_rows(self) -> torch.Tensor:
        """Weights of the samples' own classes, of length one under the cosine, (T, D)."""
        local = self.column if self.active is None else self.active[self.column]
        rows = self.weight.index_select(0, local)
        return rows / rows.norm(dim=1, keepdim=True).clamp_min(EPS) if self.cosine else rows

    def logits(
        self, x_BD: torch.Tensor, rows: torch.Tensor, a: int, b: int, first: int, last: int, out: torch.Tensor
    ) -> None:
        """Write the logits of a block to ``out``, (B, b - a)."""
        torch.mm(x_BD, rows.T, out=out)
        if self.scale != 1:
            out *= self.scale
        if self.correction is not None:
            out += self.correction[a:b]
        if last > first:
            out[self.sample[first:last], self.column[first:last] - a] = self.target[first:last]


def softmax_statistics(
    x_BD: torch.Tensor, classes: Classes, keep: torch.Tensor | None, with_sum: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest logit m (B,), sum of exp(z - m) (B,) and, if asked for, sum of the logits (B,) over this rank's classes.

    Args:
        x_BD: features.
        classes: of this rank.
        keep: (B, A) where the logits are written; None forgets them.
        with_sum: whether label smoothing needs the sum of the logits.

    Returns:
        m is minus infinity and the sums are 0 where the rank has no class.
    """
    high = x_BD.new_full((len(x_BD),), -torch.inf)
    total, plain = torch.zeros_like(high), torch.zeros_like(high)
    scratch = x_BD.new_empty((len(x_BD), classes.block))
    for a, b, first, last in classes.blocks():
        z = scratch[:, : b - a] if keep is None else keep[:, a:b]
        classes.logits(x_BD, classes.rows(a, b)[0], a, b, first, last, z)
        if with_sum:
            plain += z.sum(1)
        higher = torch.maximum(high, z.amax(1))
        total *= torch.exp(high - higher)
        # A class that is not a number shows as such in the loss; it must not be hidden by the maximum.
        shifted = torch.sub(z, higher[:, None], out=scratch[:, : b - a] if keep is not None else z)
        total += shifted.exp_().sum(1)
        high = higher
    return high, total, plain


def softmax_gradients(
    x_BD: torch.Tensor,
    classes: Classes,
    keep: torch.Tensor | None,
    log_normaliser: torch.Tensor,
    weight_of_sample: torch.Tensor,
    smooth: tuple[float, int],
    derivative: torch.Tensor,
    need_scale: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the loss by this rank's classes.

    Args:
        x_BD: features.
        classes: as in `softmax_statistics`.
        keep: the kept logits, or None.
        log_normaliser: log sum exp over the classes of all ranks, (B,).
        weight_of_sample: factor of each sample's loss in the total, 0 for ignored ones, (B,).
        smooth: label smoothing e and the number of classes C over all ranks.
        derivative: psi' at the samples' own classes, (T,).
        need_scale: whether the gradient of s is wanted.

    Returns:
        dX (B, D), the share of this rank; dW (A, D), one row a class; ds, the share of this rank, a scalar.
    """
    share, count = smooth
    grad_x = torch.zeros_like(x_BD)
    grad_w = x_BD.new_empty((len(classes), x_BD.shape[1]))
    grad_s = x_BD.new_zeros(())
    scratch = x_BD.new_empty((len(x_BD), classes.block))
    second = torch.empty_like(scratch) if need_scale else None
    for a, b, first, last in classes.blocks():
        rows, inverse = classes.rows(a, b)
        z = scratch[:, : b - a] if keep is None else keep[:, a:b]
        if keep is None:
            classes.logits(x_BD, rows, a, b, first, last, z)
        plain = None if second is None else second[:, : b - a].copy_(z)
        p = torch.sub(z, log_normaliser[:, None], out=scratch[:, : b - a]).exp_()
        if share:
            p -= share / count
        sample, column = classes.sample[first:last], classes.column[first:last] - a
        if last > first:
            p[sample, column] -= 1 - share
        p *= weight_of_sample[:, None]
        if plain is not None:
            if classes.correction is not None:
                plain -= classes.correction[a:b]
                plain[sample, column] = classes.target[first:last]
            grad_s += (p * plain).sum() / classes.scale
        if last > first:
            p[sample, column] *= derivative[first:last]
        grad_x.addmm_(p, rows, alpha=classes.scale)
        out = grad_w[a:b]
        torch.mm(p.T, x_BD, out=out)
        if inverse is not None:
            # d(w/|w|): what points along w changes only the length.
            out.addcmul_(rows, (out * rows).sum(1, keepdim=True), value=-1)
            out *= inverse
        if classes.scale != 1:
            out *= classes.scale
    return grad_x, grad_w, grad_s
