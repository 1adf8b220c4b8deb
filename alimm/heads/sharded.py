"""A classification head for very many classes: its rows are cut over ranks, all or some of them computed in a step.

Song et al., Large-Scale Training System for 100-Million Classification at Alibaba, KDD 2020: the backbone is data
parallel, the classifier is cut by classes (hybrid parallelism; `alimm.losses.sharded_cross_entropy` has the formulas).
``method`` is the one word that changes what a step computes:

    full    every class, logits kept                     4 N B bytes of logits
    fused   every class, logits computed again           memory of the logits does not grow with N
    random  the labels and classes drawn at random       (An et al., Partial FC, ICCVW 2021 / CVPR 2022)

The project knn_softmax adds ``knn``. What is ours: the rows of a class are found by a permutation, so that classes that
belong together do not load one rank; the weights drawn and the loss do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import nn

from alimm.distributed.collectives import gather_counts, gather_features, gather_known, raise_together
from alimm.distributed.permutation import ClassPermutation
from alimm.distributed.shards import Sharding, mark_sharded
from alimm.heads.active import ActiveSet, Selector, softmax_coverage
from alimm.heads.base import collect_labels
from alimm.heads.row_init import normal_rows
from alimm.heads.sharded_state import ShardedState
from alimm.heads.sharded_topk import sharded_topk
from alimm.losses.class_blocks import Classes, Workspace
from alimm.losses.sharded_cross_entropy import SoftmaxOptions, sharded_cross_entropy
from alimm.optim.row_state import catch_up_rows, flush_rows
from alimm.registry import MODELS
from alimm.structures import ClsDataSample


@MODELS.register_module()
class ShardedHead(ShardedState, BaseModule):
    """Cosine or linear classifier over the ranks of a process group; without one, over this process alone.

    The backbone is to be wrapped in DDP where there is more than one process (`alimm train` does): the gradient of the
    features is handed back times the number of ranks, which DDP's average takes out again. `loss` and `predict` are
    collective: all ranks need the same number of batches.

    Train it with `alimm.RowSparseSGD` (or ``RowSparseLARS``, ``RowSparseAdamW``): with an active set the gradient of
    the weight is a sparse tensor of the active rows. Clip with `alimm.ShardedOptimWrapper`, save with
    `alimm.ShardedCheckpointHook`.

    Args:
        num_classes: N.
        in_channels: D.
        method: ``'full'``, ``'fused'`` or ``'random'``.
        active: classes of a step, over all ranks: a share in (0, 1] or a number above 1. For methods with an active
            set.
        cosine: logits are scale * cos(x, w); otherwise x . w.
        scale: s, with cosine logits.
        learn_scale: whether s is trained.
        margin: config of a margin, e.g. ``dict(type='alimm.ArcFaceMargin')``; needs cosine logits.
        label_smooth: share of the target that is spread over the classes of the step, in [0, 1).
        ignore_index: label of samples to leave out.
        logq: correct the logits of classes drawn at random by -log of their chance, which makes the sum over the
            active classes an unbiased estimate of the sum over all.
        random_share: share of the active classes that is always drawn at random, in [0, 1], however many others a
            method names.
        target: field of the data samples that holds the label.
        topk: classes that a prediction names.
        dense_scores: whether predictions hold ``pred_score`` of all classes too; by default up to 4,096 classes.
        permute: ``'hash'`` or ``'none'``: how classes are laid out over rows.
        seed: of the weights, the permutation and the draws.
        init_std: standard deviation of the first weights; by default rows have about length one with cosine logits
            (the rate at which a row turns falls with the square of its length), else 0.01.
        coverage_interval: measure every so many steps which share of the softmax mass the active classes hold, on
            ``coverage_samples`` samples; 0 never does. It computes the logits of all classes for them.
        coverage_samples: see there.
        group: the process group; None is the default one.
        init_cfg: initialisation, as in MMEngine.
    """

    METHODS: ClassVar[tuple[str, ...]] = ("full", "fused", "random")

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        method: str = "full",
        active: float | int = 0.1,
        cosine: bool = True,
        scale: float = 32.0,
        learn_scale: bool = False,
        margin: dict[str, Any] | None = None,
        label_smooth: float = 0.0,
        ignore_index: int = -100,
        logq: bool = False,
        random_share: float = 0.0,
        target: str = "gt_label",
        topk: int = 5,
        dense_scores: bool | None = None,
        permute: str = "hash",
        seed: int = 0,
        init_std: float | None = None,
        coverage_interval: int = 0,
        coverage_samples: int = 16,
        group: Any = None,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if num_classes < 1 or in_channels < 1 or topk < 1:
            raise ValueError(
                f"num_classes, in_channels and topk must be at least 1, got {num_classes}, {in_channels}, {topk}"
            )
        if method not in self.METHODS:
            more = " (alimm.KNNSoftmaxHead has 'knn')" if method == "knn" else ""
            raise ValueError(f"method must be one of {', '.join(self.METHODS)}, got {method!r}{more}")
        if scale <= 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        if not 0 <= label_smooth < 1:
            raise ValueError(f"label_smooth must be in [0, 1), got {label_smooth}")
        if margin is not None and not cosine:
            raise ValueError("a margin is defined on the angle: leave out margin, or set cosine=True")
        self.num_classes, self.in_channels, self.method, self.cosine = num_classes, in_channels, method, cosine
        self.ignore_index, self.logq, self.target, self.topk = ignore_index, logq, target, min(topk, num_classes)
        self.dense_scores = num_classes <= 4096 if dense_scores is None else dense_scores
        self.seed, self.group = seed, group
        self.coverage_interval, self.coverage_samples = coverage_interval, coverage_samples
        self.sharding = Sharding.over(num_classes, group)
        self.permutation = ClassPermutation(num_classes, seed, permute)
        if init_std is None:
            init_std = in_channels**-0.5 if cosine else 0.01
        rows = normal_rows(self.sharding.start, self.sharding.stop, in_channels, init_std, seed)
        self.weight = nn.Parameter(rows)
        mark_sharded(self.weight, self.sharding)
        self.scale = nn.Parameter(torch.tensor(float(scale) if cosine else 1.0), requires_grad=learn_scale and cosine)
        self.margin = None if margin is None else MODELS.build(margin)
        self.options = SoftmaxOptions(cosine, self.margin, label_smooth, method == "fused", Workspace())
        self.selector = None
        if method not in ("full", "fused"):
            self.selector = Selector(self.sharding, active, seed, random_share)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._planned: tuple[Any, Any] | None = None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, D) to the logits of all classes, (B, N), in the order of the class ids. For small N.

        Every rank must call it; each gets the logits of its own features.
        """
        self._settle()
        x_BD, counts, start = self._gathered(features)
        logits_NB = self.weight.new_empty((self.sharding.size, len(x_BD)))
        classes = self._local_classes()
        for a, b, _, _ in classes.blocks():
            torch.mm(classes.rows(a, b)[0], x_BD.T, out=logits_NB[a:b])
        logits_NB = torch.cat(gather_known(logits_NB, list(self.sharding.shards.sizes), self.group))
        order = self.permutation.rows(torch.arange(self.num_classes, device=features.device))
        return self.scale.detach() * logits_NB[order, start : start + counts].T

    def prefetch(self, data_samples: Sequence[ClsDataSample]) -> None:
        """Gather the labels, begin to select the active classes and to bring their rows up to date.

        That needs labels only, so it runs in a thread beside the backbone. `loss` of the same data samples picks up the
        result. Every rank must call it, after the optimizer's step and not beside it.
        """
        self._planned = (data_samples, self._plan(data_samples))

    def loss(self, features: torch.Tensor, data_samples: Sequence[ClsDataSample]) -> dict[str, torch.Tensor]:
        """The loss over the global batch, the same on every rank, and what the step computed.

        Returns:
            ``loss``; with an active set also, of this rank, ``active`` (classes), ``active_random`` (of those, drawn at
            random) and ``overflow`` (labels beyond the budget), and at intervals, of all ranks, ``coverage`` and
            ``imbalance`` (labels and neighbours on the busiest rank over their mean).

        Raises:
            ValueError: a label names no class, or a sample has none; every rank raises. Or there are not as many
                features as data samples.
        """
        planned, self._planned = self._planned, None
        plan = planned[1] if planned is not None and planned[0] is data_samples else self._plan(data_samples)
        rows_B, counts, pending = plan
        if len(features) != counts[self.sharding.rank]:
            raise ValueError(
                f"there are {len(features)} features for {counts[self.sharding.rank]} data samples: with several views "
                "of a picture give the data samples once for each view"
            )
        active: ActiveSet | None = None if pending is None else pending()
        with torch.autocast(features.device.type, enabled=False):
            x_BD = self._wide(features)
            norms_B = x_BD.detach().norm(dim=1)
            if self.margin is not None and self.margin.needs_norms:
                norms_B = torch.cat(gather_known(norms_B, counts, self.group))
                if self.training:
                    self.margin.update(norms_B[rows_B >= 0])
            x_BD = F.normalize(x_BD) if self.cosine else x_BD
            x_BD = gather_features(x_BD, counts, self.group)
            local = None if active is None else active.rows
            if local is None:
                flush_rows(self.weight)
            else:
                # A second look costs little; the optimizer may have stepped since the thread brought them up to date.
                catch_up_rows(self.weight, local)
            correction = active.correction(x_BD) if active is not None and self.logq else None
            loss, _ = sharded_cross_entropy(
                x_BD, self.weight, rows_B, self.sharding, self.scale, local, correction, norms_B, self.options
            )
            result = dict(loss=loss)
            if active is not None:
                step = int(self.step)
                watch = self.training and self.coverage_interval and step % self.coverage_interval == 0
                result.update(active.telemetry(self.sharding, loss, bool(watch)))
                if watch:
                    flush_rows(self.weight)
                    result["coverage"] = softmax_coverage(
                        x_BD.detach()[: self.coverage_samples],
                        rows_B[: self.coverage_samples],
                        self._local_classes(),
                        active.rows,
                        self.sharding,
                    )
        if self.training:
            self.step += 1
        return result

    @torch.no_grad()
    def predict(
        self, features: torch.Tensor, data_samples: Sequence[ClsDataSample] | None = None
    ) -> list[ClsDataSample]:
        """Write ``pred_topk``, ``pred_label`` and ``feature`` into the samples (new ones if none are given).

        With few classes also ``pred_score``. Every rank must call it, also with an empty batch.
        """
        samples = [ClsDataSample() for _ in features] if data_samples is None else list(data_samples)
        if self.dense_scores:
            scores = self(features).float().softmax(1)
            for sample, score in zip(samples, scores, strict=True):
                sample.set_pred_score(score)
        self._settle()
        x_BD, count, start = self._gathered(features)
        logits, ids, normaliser = sharded_topk(x_BD, self._local_classes(), self.topk, self.sharding, self.permutation)
        own = slice(start, start + count)
        shares = torch.exp(logits[own] - normaliser[own, None])
        for sample, found, share, feature in zip(samples, ids[own], shares, features, strict=True):
            sample.set_pred_topk(found, share)
            sample.set_feature(feature)
        return samples

    def neighbours(self, rows: torch.Tensor) -> Any:
        """Neighbours of classes for the selection, None without a graph. A method with one overrides it.

        Args:
            rows: distinct global rows of the labels of the batch, int64, the same on every rank.
        """
        return None

    def settled_weight(self) -> torch.Tensor:
        """This rank's rows, all of them up to date, (n, D), without a gradient."""
        self._settle()
        return self.weight.detach()

    def _settle(self) -> None:
        """Before all rows are read: refuse rows that were never loaded, bring those that wait up to date."""
        self.check_loaded()
        flush_rows(self.weight)

    def _wide(self, features: torch.Tensor) -> torch.Tensor:
        return features.to(torch.promote_types(features.dtype, self.weight.dtype))

    def _gathered(self, features: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """Features of all ranks as the logits take them, the number of own ones and where they begin."""
        counts = gather_counts(len(features), features.device, self.group)
        x_BD = self._wide(features.detach())
        x_BD = torch.cat(gather_known(F.normalize(x_BD) if self.cosine else x_BD, counts, self.group))
        return x_BD, len(features), sum(counts[: self.sharding.rank])

    def _local_classes(self) -> Classes:
        empty = torch.empty(0, dtype=torch.int64, device=self.weight.device)
        return Classes(self.weight.detach(), None, float(self.scale.detach()), self.cosine, empty, empty)

    def _plan(self, data_samples: Sequence[ClsDataSample]) -> tuple[torch.Tensor, list[int], Any]:
        """Rows of the global batch's labels (-1: ignored), samples of each rank, and the selection under way."""
        self.check_loaded()
        device = self.weight.device
        labels, trouble = torch.empty(0, dtype=torch.int64, device=device), None
        if len(data_samples):
            try:
                labels = collect_labels(data_samples, self.target, device)
                if len(labels) != len(data_samples):
                    trouble = f"{len(data_samples)} data samples have {len(labels)} labels: give each one {self.target}"
            except Exception as error:  # whatever it is, the other ranks wait for this one
                trouble = str(error)
        # -1 tells the others that this rank has no labels to give: one collective serves both ends.
        counts = gather_counts(-1 if trouble else len(labels), device, self.group)
        if min(counts) < 0:
            raise_together(trouble, self.group, device)
        labels = torch.cat(gather_known(labels, counts, self.group))
        ignored = labels == self.ignore_index
        wrong = ((labels < 0) | (labels >= self.num_classes)) & ~ignored
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0])
            raise ValueError(
                f"label {int(labels[place])} in row {place} of the global batch is not in [0, {self.num_classes}): set "
                f"num_classes of the head to the number of classes of the data set, or give the sample the label "
                f"{self.ignore_index} to leave it out"
            )
        rows = self.permutation.rows(labels.where(~ignored, torch.zeros_like(labels)))
        rows = rows.where(~ignored, torch.full_like(rows, -1))
        if self.selector is None:
            return rows, counts, None
        distinct = rows[rows >= 0].unique()
        pending = self.selector.start(
            distinct, self.neighbours(distinct), int(self.step), device, lambda local: catch_up_rows(self.weight, local)
        )
        return rows, counts, pending
