"""KNN softmax: a step computes the labels of the batch and the classes nearest to them.

Song et al., Large-Scale Training System for 100-Million Classification at Alibaba, KDD 2020. The softmax mass that is
not the label's own lies with the classes whose weights are near the label's weight,

    z_ij = |x_i| |w_j| cos(x_i, w_j),   x_i near w_{y_i}   =>   large where cos(w_{y_i}, w_j) is large,

so the active classes are the union of the lists of the K nearest rows of each label, by rank, up to a budget M; what
is left of the budget is drawn at random. The lists are those of a KNN graph of the rows that is built anew from time to
time (`alimm.KNNGraphHook`). Selection needs the labels alone, so it runs beside the backbone.

From the paper: the graph of the weights, its compression to the edges of a rank, the budget. Ours, because the paper's
text was not at hand: priority by rank with a hashed cut, the random fill and its correction, when the graph is built.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from alimm.heads.sharded import ShardedHead
from alimm.projects.knn_softmax.adjacency import LocalEdges, OwnerLists
from alimm.projects.knn_softmax.graph_build import KNNLists, build_lists
from alimm.registry import MODELS

STORAGE = {"edges": LocalEdges, "lists": OwnerLists}


@MODELS.register_module()
class KNNSoftmaxHead(ShardedHead):
    """`alimm.ShardedHead` with the method ``'knn'``; ``'full'``, ``'fused'`` and ``'random'`` work as there.

    Until the graph is built (`alimm.KNNGraphHook`, or `build_graph`) the budget is filled at random.

    Args:
        num_classes: N.
        in_channels: D.
        method: ``'knn'``, or one of `alimm.ShardedHead`'s.
        neighbours: K, the length of a list.
        storage: ``'edges'``: each rank keeps the edges that end in its rows, and a step needs no communication;
            ``'lists'``: each rank keeps the lists of its rows, and a step exchanges those of the batch. ``'lists'``
            takes less memory with very many ranks.
        **kwargs: see `alimm.ShardedHead`.
    """

    METHODS: ClassVar[tuple[str, ...]] = ("knn", *ShardedHead.METHODS)

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        method: str = "knn",
        neighbours: int = 16,
        storage: str = "edges",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, in_channels, method, **kwargs)
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {neighbours}")
        if storage not in STORAGE:
            raise ValueError(f"storage must be one of {', '.join(STORAGE)}, got {storage!r}")
        self.k, self.storage = neighbours, storage
        self.graph: LocalEdges | OwnerLists | None = None
        self.graph_step = -1

    def build_graph(self, **options: Any) -> KNNLists:
        """Build the graph of the rows as they are now. Every rank must call it.

        Args:
            **options: of `alimm.projects.knn_softmax.graph_build.build_lists`, such as ``backend``.

        Raises:
            ValueError: a row is not finite. Every rank raises, and the old graph stays.
        """
        self._settle()
        lists = build_lists(self.weight.detach(), self.sharding, self.k, **options)
        self.set_graph(lists.neighbours)
        return lists

    def set_graph(self, neighbours: torch.Tensor, step: int | None = None) -> None:
        """Take lists as they are. Every rank must call it.

        Args:
            neighbours: global rows, (own rows, K), best first, -1 past the end.
            step: when they were built; now if None.
        """
        self.graph = STORAGE[self.storage](neighbours.to(self.weight.device), self.sharding)
        self.graph_step = int(self.step) if step is None else step

    def neighbours(self, rows: torch.Tensor) -> Any:
        """The neighbours of the batch's labels in this shard; None before the graph is built."""
        return None if self.graph is None or self.method != "knn" else self.graph.neighbours(rows)

    def shard_arrays(self) -> dict[str, torch.Tensor]:
        """The lists, so that a resumed run selects the same classes."""
        return {} if self.graph is None else {"neighbours": self.graph.lists()}

    def shard_scalars(self) -> dict[str, Any]:
        """Those of the parent, and when the graph was built."""
        return {**super().shard_scalars(), "graph_step": self.graph_step}

    def load_shard(self, arrays: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
        """Take rows and lists; lists of another length are left, and the graph is built anew when it is due."""
        super().load_shard(arrays, scalars)
        self._take_graph(arrays.get("neighbours"), int(scalars.get("graph_step", -1)))

    def _take_graph(self, neighbours: torch.Tensor | None, step: int) -> None:
        self.graph, self.graph_step = None, -1
        if neighbours is not None and neighbours.shape[1] == self.k and self.method == "knn":
            self.set_graph(neighbours, step)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.graph is not None and prefix + "weight" in destination:
            destination[prefix + "neighbours"] = self.graph.lists()
            destination[prefix + "graph_step"] = torch.tensor(self.graph_step)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        state = dict(state_dict)
        neighbours, step = state.pop(prefix + "neighbours", None), state.pop(prefix + "graph_step", None)
        layout = state.get(prefix + "layout")
        super()._load_from_state_dict(state, prefix, *arguments)
        if neighbours is not None and step is not None and layout is not None and layout.cpu().equal(self.layout):
            self._take_graph(neighbours[self.sharding.start : self.sharding.stop], int(step))
