"""`Search` on the CPU: torch multiplies, Numba kernels look through the tiles while they are in the cache.

Where the queries are compared with themselves, similarity is symmetric: only the tiles on and above the diagonal are
computed, and each is looked through by rows and by columns. That halves the products.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from alimm.projects.knn_softmax.graph_search import Clock, Search
from alimm.projects.knn_softmax.graph_units import DTYPES, output_slack, tolerance
from alimm_ops.graph import topk_cpu

_KEYS = {"bf16": torch.int16, "fp16": torch.int16, "fp32": torch.int32}
_RANK_ROWS = 1 << 14


class CpuSearch(Search):
    """See `Search`."""

    def __init__(
        self,
        queries_QW: Tensor,
        query_ids_Q: Tensor,
        k: int,
        width: int,
        precision: str,
        largest_error: float,
        tile: tuple[int, int],
        clock: Clock,
        wide_ids: bool = False,
    ) -> None:
        super().__init__(queries_QW, query_ids_Q, k, width, precision, largest_error, tile, clock)
        key_type = np.int32 if precision == "fp32" else np.int16
        self.reservoir = topk_cpu.Reservoir.empty(len(queries_QW), width, key_type, np.int64 if wide_ids else np.int32)
        self._buffer = torch.empty(tile[0] * tile[1], dtype=DTYPES[precision])

    def visit(self, rows_NW: Tensor, first_id: int, same: bool) -> Iterator[float]:
        """See `Search`."""
        if not len(rows_NW) or not len(self.queries):
            return
        rounded = self.rounded if same else rows_NW.to(DTYPES[self.precision])
        ids = self.query_ids.numpy()
        for top in range(0, len(self.queries), self.tile[0]):
            bottom = min(top + self.tile[0], len(self.queries))
            if same:
                for left in range(top, bottom, self.tile[1]):
                    right = min(left + self.tile[1], bottom)
                    self._scan(rounded, top, bottom, left, right, ids, first_id, False)
            for left in range(bottom if same else 0, len(rows_NW), self.tile[1]):
                right = min(left + self.tile[1], len(rows_NW))
                self._scan(rounded, top, bottom, left, right, ids, first_id, same)
            yield bottom / len(self.queries)
        with self.clock.phase("rank"):
            self._rank(rows_NW, first_id)

    def _scan(
        self,
        rounded: Tensor,
        top: int,
        bottom: int,
        left: int,
        right: int,
        ids: np.ndarray,
        first_id: int,
        columns: bool,
    ) -> None:
        with self.clock.phase("product"):
            tile = self._buffer[: (bottom - top) * (right - left)].view(bottom - top, right - left)
            torch.mm(self.rounded[top:bottom], rounded[left:right].t(), out=tile)
        self.clock.flop += 2.0 * tile.numel() * rounded.shape[1]
        with self.clock.phase("scan"):
            bits = tile.view(_KEYS[self.precision]).numpy()
            self.reservoir.scan_rows(bits, top, ids, first_id + left)
            if columns:
                self.reservoir.scan_columns(bits, left, ids, first_id + top)

    def _values(self, keys: np.ndarray) -> Tensor:
        return torch.from_numpy(topk_cpu.key_bits(keys)).view(DTYPES[self.precision]).float()

    def _rank(self, rows_NW: Tensor, first_id: int) -> None:
        held = self.reservoir
        counts = np.where(self.is_zero.numpy(), 0, held.counts)
        for start in range(0, len(self.queries), _RANK_ROWS):
            part = slice(start, start + _RANK_ROWS)
            scores = self._values(held.keys[part])
            topk_cpu.rank(
                scores.numpy(),
                output_slack(scores, self.precision).numpy(),
                held.ids[part],
                counts[part],
                self.queries[part].numpy(),
                rows_NW.numpy(),
                first_id,
                self.tolerance[part].numpy(),
                self.ids[part].numpy(),
                self.similarity[part].numpy(),
                self.broken[part].numpy(),
            )

    def unseen(self) -> Tensor:
        """See `Search`."""
        thresholds = self.reservoir.thresholds
        scores = self._values(thresholds)
        bound = scores.double() + output_slack(scores, self.precision)
        return torch.where(torch.from_numpy(thresholds == np.iinfo(thresholds.dtype).min), -torch.inf, bound)

    def revisit(
        self, select: Tensor, rows_NW: Tensor, first_id: int, precision: str, floors: Tensor
    ) -> Iterator[float]:
        """See `Search`."""
        dtype = DTYPES[precision]
        width = rows_NW.shape[1]
        zero = torch.zeros(1, dtype=torch.float64)
        bound = float(tolerance(zero, 0.0, width, precision))
        queries = self.queries[select].to(dtype)
        for top, bottom, left, right in self.tiles(len(select), len(rows_NW)):
            scores = queries[top:bottom] @ rows_NW[left:right].to(dtype).t()
            self.clock.flop += 2.0 * scores.numel() * width
            topk_cpu.collect(
                scores.numpy(),
                select[top:bottom].numpy(),
                self.queries.numpy(),
                self.query_ids.numpy(),
                rows_NW[left:right].numpy(),
                first_id + left,
                bound,
                floors.numpy(),
                self.ids.numpy(),
                self.similarity.numpy(),
                self.broken.numpy(),
            )
            yield bottom / len(select)
