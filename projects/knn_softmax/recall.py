"""How good a stale graph still is: the recall of its lists, the softmax mass that active classes hold, when to rebuild.

    recall    mean over sampled rows of |stored list & exact list of now| / |exact list of now|
    coverage  mean over samples i of  sum_{j active, j != y_i} p_ij / sum_{j != y_i} p_ij

The first needs the weights only and is cheap: q rows are compared with all, q N D products. The second is what the
first is for: a class that is missing from the softmax gets no gradient. Both are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alimm.distributed import Sharding, all_gather_uneven, raise_together
from alimm.projects.knn_softmax.graph_build import exact_lists
from alimm.projects.knn_softmax.graph_search import Clock
from alimm.projects.knn_softmax.graph_units import first_bad_row, plain_arithmetic, unit_rows
from alimm.seeding import numpy_stream
from alimm_ops.graph.topk_reference import padded_width


def sampled_rows(num_rows: int, sample: int, seed: int, step: int) -> Tensor:
    """Sorted global rows, int64, drawn without repetition; the same on every rank and for any number of them.

    Args:
        num_rows: N.
        sample: how many; all rows if there are fewer.
        seed: of the run.
        step: at which another set is drawn.
    """
    if sample >= num_rows:
        return torch.arange(num_rows)
    chosen = numpy_stream(seed, "knn_softmax.recall", step).choice(num_rows, sample, replace=False, shuffle=False)
    return torch.from_numpy(chosen).sort().values


@torch.no_grad()
def stale_recall(neighbours: Tensor, weight: Tensor, sharding: Sharding, sample: int, seed: int, step: int) -> float:
    """The share of the true neighbours of some rows that the stored lists hold. Every rank must call it.

    Args:
        neighbours: the stored lists of the own rows, global rows (n_local, K), -1 past the end.
        weight: the own rows as they are now, floating (n_local, D), finite.
        sharding: which rows these are.
        sample: how many rows to look at, over all ranks.
        seed: of the run.
        step: of the training; another set of rows is drawn at each.

    Returns:
        0 to 1, the same on every rank; 1 where there is nothing to find. Equal similarities count by row, as in
        `build_lists`: lists of unchanged weights have the recall 1.

    Raises:
        ValueError: shapes that do not fit, a sample below 1, a row that is not finite. Every rank raises.
    """
    raise_together(_mistake(neighbours, weight, sharding, sample), sharding.group, weight.device)
    k, num_rows, group = neighbours.shape[1], sharding.shards.num_rows, sharding.group
    rows = sampled_rows(num_rows, sample, seed, step).to(weight.device)
    own = rows[(rows >= sharding.start) & (rows < sharding.stop)] - sharding.start
    # Shards are in the order of the ranks and the rows are sorted, so what the ranks give is in the order of the rows.
    stored = torch.cat(all_gather_uneven(neighbours[own].long(), group))
    with plain_arithmetic():
        units = unit_rows(weight)
        queries = torch.cat(all_gather_uneven(units[own], group))
        assert queries.shape == (len(rows), padded_width(weight.shape[1]))
        ids, similarity = exact_lists(queries, rows, units, sharding.start, k, Clock())
    ids = torch.cat(all_gather_uneven(ids, group), 1)
    similarity = torch.cat(all_gather_uneven(similarity, group), 1)
    # The ids of a rank rise with its number and each list is sorted, so a stable sort keeps the order of ties by row.
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    true = ids.gather(1, order)
    held = ((true[:, :, None] == stored[:, None, :]) & (true[:, :, None] >= 0)).any(2).sum(1)
    counts = (true >= 0).sum(1)
    return float(torch.where(counts > 0, held.double() / counts, 1.0).mean()) if len(rows) else 1.0


def _mistake(neighbours: Tensor, weight: Tensor, sharding: Sharding, sample: int) -> str | None:
    if weight.ndim != 2 or len(weight) != sharding.size or neighbours.ndim != 2 or len(neighbours) != len(weight):
        return (
            f"neighbours and weight must be the own {sharding.size} rows of a sharding, got shapes "
            f"{tuple(neighbours.shape)} and {tuple(weight.shape)}"
        )
    if sample < 1:
        return f"sample must be at least 1, got {sample}"
    bad = first_bad_row(weight)
    return None if bad is None else f"row {sharding.start + bad} of the weight is not finite (NaN or infinity)"


@dataclass(frozen=True)
class RefreshPolicy:
    """When to build the graph anew.

    Args:
        interval_max: build when the graph is so many steps old; 0 for no limit.
        recall_min: build when a measured recall is below it.
        interval_min: never build a graph that is not so many steps old, however low its recall.
    """

    interval_max: int = 0
    recall_min: float = 0.8
    interval_min: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.recall_min <= 1 or self.interval_max < 0 or self.interval_min < 0:
            raise ValueError(
                "RefreshPolicy needs 0 <= recall_min <= 1 and intervals of at least 0, "
                f"got {self.recall_min}, {self.interval_max}, {self.interval_min}"
            )
        if 0 < self.interval_max < self.interval_min:
            raise ValueError(f"interval_min {self.interval_min} must not exceed interval_max {self.interval_max}")

    def due(self, step: int, recall: float | None, built_at: int | None) -> bool:
        """Whether to build now. With the same arguments on every rank, all ranks decide alike.

        Args:
            step: of the training.
            recall: as measured at this step; None if it was not.
            built_at: the step of the graph in use; None, or a negative one, if there is none.
        """
        if built_at is None or built_at < 0:
            return True
        age = step - built_at
        if self.interval_max and age >= self.interval_max:
            return True
        # A NaN compares false either way: written so that it asks for a new graph.
        return recall is not None and age >= max(1, self.interval_min) and not recall >= self.recall_min


def softmax_coverage(logits_BN: Tensor, active: Tensor, labels_B: Tensor) -> float:
    """The share of the non-target softmax mass that the active classes hold, averaged over samples.

    For logits of all classes in one place; a head has its own way for shards.

    Args:
        logits_BN: of all classes, floating.
        active: which classes are active, bool (N,) or (B, N).
        labels_B: int64; samples with a negative label are left out.

    Returns:
        0 to 1; NaN without a sample, or with a single class.
    """
    if active.dtype != torch.bool or active.shape not in (logits_BN.shape, logits_BN.shape[1:]):
        raise ValueError(
            f"active must be bool of shape {tuple(logits_BN.shape[1:])} or {tuple(logits_BN.shape)}, "
            f"got {active.dtype} of shape {tuple(active.shape)}"
        )
    if labels_B.shape != logits_BN.shape[:1] or bool((labels_B >= logits_BN.shape[1]).any()):
        raise ValueError(f"labels must be {len(logits_BN)} classes below {logits_BN.shape[1]}, got {labels_B}")
    kept = labels_B >= 0
    logits = logits_BN[kept].double()
    if not len(logits) or logits.shape[1] < 2:
        return float("nan")
    mass = logits.scatter(1, labels_B[kept, None], -torch.inf).softmax(1)
    chosen = active if active.ndim == 1 else active[kept]
    return float((mass * chosen).sum(1).mean())
