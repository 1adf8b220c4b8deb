"""Cross entropy over classes that are cut by rows over ranks; only numbers per sample cross between them.

Song et al., Large-Scale Training System for 100-Million Classification at Alibaba, KDD 2020 (hybrid parallelism). With
the logits z of the classes S_p of rank p (or of the active ones among them), target distribution t:

    m_i = max_p max_{j in S_p} z_ij      s_i = sum_p sum_{j in S_p} exp(z_ij - m_i)
    L = 1/V sum_{i valid} [ m_i + log s_i - sum_j t_ij z_ij ],      t_ij = (1 - e) [j = y_i] + e / C
    dL/dz_ij = (exp(z_ij - m_i) / s_i - t_ij) / V

How ranks are combined is ours: one all-gather of six numbers a sample (largest logit, sum, target term, how many ranks
hold the class, sum of logits, classes of the rank), folded in rank order, so that every rank has the same bits.
Probabilities are never clamped: a label that no rank holds is an error and not a constant loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from alimm.distributed.collectives import rank_and_size
from alimm.distributed.shards import Sharding
from alimm.losses.class_blocks import Classes, Workspace, softmax_gradients, softmax_statistics

Margin = Callable[[torch.Tensor, "torch.Tensor | None"], "tuple[torch.Tensor, torch.Tensor]"]


@dataclass
class SoftmaxOptions:
    """What does not change from step to step.

    Attributes:
        cosine: logits are s cos(x, w); the caller hands over features of length one.
        margin: psi and its derivative at the sample's own class, or None.
        label_smooth: e, in [0, 1).
        recompute: compute the logits again in backward: memory does not grow with the number of classes, at 4/3 of the
            arithmetic.
        workspace: buffer of the kept logits.
    """

    cosine: bool = True
    margin: Margin | None = None
    label_smooth: float = 0.0
    recompute: bool = False
    workspace: Workspace | None = None


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        rows_B: torch.Tensor,
        norms_B: torch.Tensor | None,
        active: torch.Tensor | None,
        correction: torch.Tensor | None,
        sharding: Sharding,
        options: SoftmaxOptions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        local = rows_B - sharding.start
        sample = ((local >= 0) & (local < sharding.size)).nonzero()[:, 0]
        column = local[sample]
        if active is not None:
            found = torch.searchsorted(active, column)
            there = found < len(active)
            there[there.clone()] = active[found[there]] == column[there]
            sample, column = sample[there], found[there]
        column, order = torch.sort(column, stable=True)
        classes = Classes(weight, active, float(scale), options.cosine, sample[order], column)
        classes.correction = correction
        own = (x_BD[classes.sample] * classes.target_rows()).sum(1)
        derivative = torch.ones_like(own)
        if options.margin is not None:
            own, derivative = options.margin(own, None if norms_B is None else norms_B[classes.sample])
        classes.target = own * classes.scale

        keep = None
        if not options.recompute:
            workspace = options.workspace or Workspace()
            keep = workspace.take(classes, (len(x_BD), len(classes)), x_BD)
        high, total, plain = softmax_statistics(x_BD, classes, keep, options.label_smooth > 0)
        fields = x_BD.new_zeros((5, len(x_BD)))
        fields[0], fields[1], fields[4] = high, total, plain
        fields[2, classes.sample] = classes.target
        fields[3, classes.sample] = 1
        log_normaliser, target, plain, count = _combine(fields, len(classes), sharding, rows_B)
        valid = rows_B >= 0
        share = options.label_smooth
        loss_B = log_normaliser - (1 - share) * target
        if share:
            loss_B = loss_B - share / count * plain
        loss_B = torch.where(valid, loss_B, torch.zeros_like(loss_B))
        ctx.classes, ctx.keep, ctx.options, ctx.smooth, ctx.group = (
            classes,
            keep,
            options,
            (share, count),
            sharding.group,
        )
        ctx.save_for_backward(x_BD, log_normaliser, valid, derivative)
        ctx.mark_non_differentiable(log_normaliser)
        return loss_B.sum() / valid.sum().clamp_min(1), log_normaliser

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_BD, log_normaliser, valid, derivative = ctx.saved_tensors
        classes: Classes = ctx.classes
        if classes is None:
            raise RuntimeError("backward ran a second time: the kept logits were given back. Call forward again")
        factor = valid.to(x_BD.dtype) * grad / valid.sum().clamp_min(1)
        grad_x, grad_w, grad_s = softmax_gradients(
            x_BD, classes, ctx.keep, log_normaliser, factor, ctx.smooth, derivative, ctx.needs_input_grad[2]
        )
        # Logs may keep the loss, and with it this context, until the next step: the buffer has to be free before.
        ctx.classes = ctx.keep = None
        if ctx.needs_input_grad[2] and rank_and_size(ctx.group)[1] > 1:
            dist.all_reduce(grad_s, group=ctx.group)
        return grad_x, _as_rows(grad_w, classes), grad_s, None, None, None, None, None, None


def _as_rows(grad: torch.Tensor, classes: Classes) -> torch.Tensor:
    """The gradient of the active rows as a sparse tensor of the weight's shape; dense where all rows are active."""
    if classes.active is None:
        return grad
    return torch.sparse_coo_tensor(
        classes.active[None], grad, classes.weight.shape, check_invariants=False, is_coalesced=True
    )


def _combine(
    fields: torch.Tensor, classes_here: int, sharding: Sharding, rows_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Fold the ranks: log normaliser (B,), target logit (B,), sum of logits (B,), number of classes."""
    _, size = rank_and_size(sharding.group)
    if size == 1:
        parts, count = [fields], classes_here
    else:
        own = torch.cat([fields, fields.new_full((1, fields.shape[1]), float(classes_here))])
        parts = [torch.empty_like(own) for _ in range(size)]
        if own.shape[1]:
            dist.all_gather(parts, own, group=sharding.group)
        count = int(sum(float(part[5, 0]) for part in parts)) if own.shape[1] else 1
    high = torch.stack([part[0] for part in parts]).amax(0)
    total, target, owners, plain = (torch.zeros_like(high) for _ in range(4))
    for part in parts:
        # An empty shard: exp(-inf - m) = 0. Its m must not meet another -inf.
        total += part[1] * torch.exp(torch.where(part[0] == -torch.inf, part[0], part[0] - high))
        target += part[2]
        owners += part[3]
        plain += part[4]
    wrong = (owners != 1) & (rows_B >= 0)
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise ValueError(
            f"row {int(rows_B[place])} of the classifier, the class of sample {place} of the global batch, is on "
            f"{int(owners[place])} ranks instead of one: its label must be in [0, {sharding.shards.num_rows}) and its "
            "row among the active ones"
        )
    return high + total.log(), target, plain, max(count, 1)


def sharded_cross_entropy(
    x_BD: torch.Tensor,
    weight: torch.Tensor,
    rows_B: torch.Tensor,
    sharding: Sharding,
    scale: torch.Tensor | float = 1.0,
    active: torch.Tensor | None = None,
    correction: torch.Tensor | None = None,
    norms_B: torch.Tensor | None = None,
    options: SoftmaxOptions | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross entropy of the global batch, equal on every rank. Every rank must call it.

    Args:
        x_BD: features of the global batch (`alimm.distributed.gather_features`), float32 or float64, the same on
            every rank; of length one for cosine logits.
        weight: this rank's rows, (n, D), n may be 0.
        rows_B: global row of each sample's class, int64; below 0 the sample is ignored.
        sharding: whose rows these are.
        scale: s; a tensor that requires a gradient gets the exact one on every rank.
        active: local rows to compute, int64, sorted and unique, with those of all labels in the shard; None computes
            all. The gradient of the weight is then a sparse tensor of these rows.
        correction: added to the logits of the active rows but the sample's own, (A,).
        norms_B: lengths of the features before they were normalised, for margins that ask for them.
        options: see `SoftmaxOptions`.

    Returns:
        The loss, and the log of the normaliser of each sample (B,), without a gradient.

    Raises:
        ValueError: a label lies on no rank (or is not among the active rows). Every rank raises.
    """
    scale = torch.as_tensor(scale, dtype=x_BD.dtype, device=x_BD.device)
    loss, log_normaliser = _ShardedCrossEntropy.apply(
        x_BD, weight, scale, rows_B, norms_B, active, correction, sharding, options or SoftmaxOptions()
    )
    return loss, log_normaliser
