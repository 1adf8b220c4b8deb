"""The MMEngine metric of an embedding: recall@k and mean average precision over a test set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log

from alimm.evaluation.retrieval import SIMILARITIES, retrieval_from_features
from alimm.evaluation.samples import single_label, stacked
from alimm.registry import METRICS


@METRICS.register_module()
class RetrievalMetric(BaseMetric):
    """Recall@k, mAP and mAP@R in per cent, keys ``retrieval/recall@1``, ..., ``retrieval/mAP``, ``retrieval/mAP@R``.

    Samples with the meta field ``is_query`` are split by it: the true ones are searched among the others. Without the
    field every sample is searched among all others. ``retrieval/skipped`` counts the queries without a relevant item,
    which no figure includes. Ties count their expected value (see ``alimm.evaluation.retrieval``).

    Args:
        topk: which k for recall@k.
        similarity: ``'cosine'``, ``'ip'`` or ``'l2'``.
        identity_key: what makes two samples relevant to each other. None takes ``gt_identity``, or ``gt_label`` for
            samples that have no identity.
        collect_device: see BaseMetric.
        prefix: put before the keys.
        collect_dir: see BaseMetric.
    """

    default_prefix = "retrieval"

    def __init__(
        self,
        topk: int | Sequence[int] = (1, 5, 10),
        similarity: str = "cosine",
        identity_key: str | None = None,
        collect_device: str = "cpu",
        prefix: str | None = None,
        collect_dir: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix, collect_dir=collect_dir)
        self.topk = (topk,) if isinstance(topk, int) else tuple(topk)
        if not self.topk or min(self.topk) < 1:
            raise ValueError(f"topk must be one or more numbers of at least 1, got {topk}")
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
        self.similarity = similarity
        self.identity_key = identity_key

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Take one batch of predictions (``feature``, the identity, and ``is_query`` where there is one)."""
        features = stacked(data_samples, "feature", "RetrievalMetric").detach().to("cpu", torch.float32).numpy()
        for feature, sample in zip(features, data_samples, strict=True):
            key = self.identity_key
            if key is None:
                key = "gt_label" if sample.get("gt_identity") is None else "gt_identity"
            is_query = sample.get("is_query")
            self.results.append(
                (
                    feature,
                    single_label(sample, key, "RetrievalMetric"),
                    key,
                    None if is_query is None else bool(is_query),
                )
            )

    def compute_metrics(self, results: list[tuple[np.ndarray, int, str, bool | None]]) -> dict[str, float]:
        """Search the queries and average."""
        if not results:
            raise ValueError("RetrievalMetric has no sample to judge: is the test set empty?")
        for column, what in ((2, "gt_identity"), (3, "is_query")):
            if len({entry[column] if column == 2 else entry[column] is None for entry in results}) > 1:
                raise ValueError(f"RetrievalMetric: some samples have {what} and some do not")
        features = np.stack([entry[0] for entry in results])
        labels = np.array([entry[1] for entry in results], dtype=np.int64)
        if results[0][3] is None:
            found = retrieval_from_features(features, labels, topk=self.topk, similarity=self.similarity)
        else:
            is_query = np.array([entry[3] for entry in results], dtype=bool)
            if is_query.all() or not is_query.any():
                raise ValueError(
                    f"RetrievalMetric: is_query is {bool(is_query[0])} for all {len(is_query)} samples; "
                    "expected queries and items to search"
                )
            found = retrieval_from_features(
                features[is_query], labels[is_query], features[~is_query], labels[~is_query], self.topk, self.similarity
            )
        if found.num_skipped:
            print_log(
                f"RetrievalMetric: {found.num_skipped} of {found.num_skipped + found.num_queries} queries have no "
                "relevant item and are left out",
                logger="current",
            )
        metrics = {f"recall@{k}": 100.0 * value for k, value in found.recall.items()}
        metrics["mAP"] = 100.0 * found.mean_average_precision
        metrics["mAP@R"] = 100.0 * found.mean_average_precision_at_r
        metrics["skipped"] = float(found.num_skipped)
        return metrics
