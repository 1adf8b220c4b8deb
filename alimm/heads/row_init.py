"""Random rows of a sharded classifier that do not depend on how it is cut.

A seed a rank would give other weights on another number of ranks, one seed for all ranks the same rows on each. So rows
are drawn in fixed blocks, each from a stream of its own, and a rank keeps its part of them.
"""

from __future__ import annotations

import torch

from alimm.seeding import stream_seed

ROWS = 4096


def normal_rows(start: int, stop: int, dim: int, std: float, seed: int) -> torch.Tensor:
    """Rows [start, stop) of a matrix of normal numbers, float32 (stop - start, dim).

    Args:
        start: first row.
        stop: the row after the last one.
        dim: columns.
        std: standard deviation.
        seed: of the matrix.
    """
    result = torch.empty((stop - start, dim))
    generator = torch.Generator()
    for block in range(start // ROWS, -(-stop // ROWS)):
        first = block * ROWS
        drawn = torch.empty((ROWS, dim)).normal_(0, std, generator=generator.manual_seed(_block_seed(seed, block)))
        low, high = max(first, start), min(first + ROWS, stop)
        result[low - start : high - start] = drawn[low - first : high - first]
    return result


def _block_seed(seed: int, block: int) -> int:
    return stream_seed(seed, "classifier_rows", block)
