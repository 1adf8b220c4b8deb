"""When the KNN graph is built, and built anew.

The graph is that of weights which go on moving. How stale it is can be measured: the lists of a few rows are computed
exactly and compared with the stored ones. The hook does so at intervals, logs the recall, and builds the graph anew
where it has fallen too far or is too old; a fixed period alone is too early or too late.
"""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from alimm.projects.knn_softmax.head import KNNSoftmaxHead
from alimm.projects.knn_softmax.recall import RefreshPolicy, stale_recall
from alimm.registry import HOOKS


@HOOKS.register_module()
class KNNGraphHook(Hook):
    """Builds the graphs of all KNN softmax heads of a model.

    Args:
        start: iterations before the first build. Weights drawn at random have no neighbours worth the name.
        check_interval: iterations between two looks at the recall; 0 never looks.
        recall_min: build anew where the stale lists hold less than this share of the true ones.
        interval_max: build anew after so many iterations whatever the recall; 0 for no limit.
        sample: rows that a look compares, over all ranks.
        backend: how to build, see `alimm.projects.knn_softmax.graph_build.build_lists`.
        build: further options of ``build_lists``.
    """

    priority = "NORMAL"

    def __init__(
        self,
        start: int = 500,
        check_interval: int = 200,
        recall_min: float = 0.8,
        interval_max: int = 0,
        sample: int = 256,
        backend: str = "exact",
        build: dict[str, Any] | None = None,
    ) -> None:
        if start < 0 or check_interval < 0 or interval_max < 0 or sample < 1:
            raise ValueError(
                f"start, check_interval and interval_max must be at least 0 and sample at least 1, got {start}, "
                f"{check_interval}, {interval_max}, {sample}"
            )
        self.start, self.check_interval, self.sample = start, check_interval, sample
        self.policy = RefreshPolicy(interval_max=interval_max, recall_min=recall_min)
        self.build = dict(build or {}, backend=backend)

    def before_train(self, runner: Runner) -> None:
        """Find the heads; build at once where the start is past and no checkpoint brought a graph.

        Raises:
            ValueError: the model has no KNN softmax head.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        found = [(name, part) for name, part in model.named_modules() if isinstance(part, KNNSoftmaxHead)]
        if not found:
            raise ValueError(
                "KNNGraphHook found no alimm.KNNSoftmaxHead in the model: set the model's head, or leave out the hook"
            )
        self.heads = [(name, head) for name, head in found if head.method == "knn"]
        self._look(runner, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Build the first graph at ``start``; look at the recall when it is time to."""
        self._look(runner, runner.iter + 1)

    def _look(self, runner: Runner, iteration: int) -> None:
        for name, head in self.heads:
            if head.graph is None:
                if iteration >= self.start:
                    self._build(runner, name, head)
                continue
            age = int(head.step) - head.graph_step
            recall = None
            if self.check_interval and age > 0 and age % self.check_interval == 0:
                recall = stale_recall(
                    head.graph.lists(), head.settled_weight(), head.sharding, self.sample, head.seed, int(head.step)
                )
                runner.message_hub.update_scalar(f"train/{name}.graph_recall", recall)
                runner.logger.info(f"{name}: the graph of {age} steps ago has recall {recall:.3f}")
            if self.policy.due(int(head.step), recall, head.graph_step):
                self._build(runner, name, head)

    def _build(self, runner: Runner, name: str, head: KNNSoftmaxHead) -> None:
        lists = head.build_graph(**self.build)
        report = lists.report
        runner.logger.info(f"{name}: graph of {head.num_classes} classes, K = {head.k}: {report}")
