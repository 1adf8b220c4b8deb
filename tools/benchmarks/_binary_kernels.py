"""How near the kernel of all pairs of codes comes to the machine's limit: exclusive-or, count bits, add.

The limit is measured: a loop that does nothing else, on words that stay in the first cache, and keeps one sum. It is
written twice, once over the words of one code and once over one word of many codes (as the kernel reads them, which the
compiler can turn into vectors); the faster one counts. The kernel also stores each distance, and selects the nearest
where a search wants them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, uint64

from alimm.report.benchmark import Claim, print_table
from alimm.report.statistics import interleave
from alimm_ops.graph import hamming_cpu
from alimm_ops.graph.intrinsics import popcount

LIMIT_BOUND = 1.2
PUBLISHED_NS = {128: 0.94, 256: 1.45, 512: 2.74}
"""Nanoseconds a pair of a blocked kernel on a Zen 3, for comparison."""
WORDS = (2, 4, 8)
QUERIES, SELECT_QUERIES, KEEP = 256, 512, 24


@njit(nogil=True, error_model="numpy")
def _count_rows(queries, base):
    """Words of a code one after the other; ``base`` is (N, W)."""
    total = uint64(0)
    for query in range(queries.shape[0]):
        for row in range(base.shape[0]):
            for word in range(base.shape[1]):
                total += popcount(base[row, word] ^ queries[query, word])
    return total


@njit(nogil=True, error_model="numpy")
def _count_columns(queries, base):
    """One word of many codes at a time; ``base`` is (W, N)."""
    total = uint64(0)
    for query in range(queries.shape[0]):
        for word in range(base.shape[0]):
            value = queries[query, word]
            for column in range(base.shape[1]):
                total += popcount(base[word, column] ^ value)
    return total


def measure(quick: bool, rounds: int, data: dict[str, Any]) -> list[Claim]:
    """Time the limit and the kernel for codes of 128, 256 and 512 bits; the claim is on the width of the tables, 256.

    Args:
        quick: fewer pairs.
        rounds: of which the fastest counts, on both sides: what disturbs a loop only ever slows it.
        data: gets the figures.
    """
    table, claims = [], []
    for words in WORDS:
        found = _one(words, 1 if quick else 8, rounds)
        excluded, included = found["kernel"] / found["limit"], found["selected"] / found["limit"]
        bits = 64 * words
        figures = [found["limit"], found["kernel"], found["selected"]]
        table.append(
            [f"{bits} bits", *(f"{value:.2f}" for value in figures), f"{excluded:.2f}", f"{included:.2f}",
             f"{PUBLISHED_NS[bits]:.2f}"]
        )  # fmt: skip
        data[f"kernel_{bits}"] = found
        if words == 4:
            claims.append(
                Claim("all pairs of 256-bit codes, time over the popcount limit", f"{excluded:.2f}x",
                      f"at most {LIMIT_BOUND:g}x", excluded <= LIMIT_BOUND)
            )  # fmt: skip
    print_table(
        f"Nanoseconds a pair, one thread, k = {KEEP} where the nearest are selected",
        ["code", "limit", "kernel", "with selection", "kernel / limit", "with selection", "Zen 3, blocked"],
        table,
    )
    return claims


def _one(words: int, times: int, rounds: int) -> dict[str, Any]:
    """Nanoseconds a pair."""
    rng = np.random.default_rng(0)

    def codes(count: int) -> np.ndarray:
        return rng.integers(0, 2**63, (count, words), np.uint64)

    small = 512 if words <= 4 else 256  # 16 kB: half of a first cache
    queries, base = codes(QUERIES), codes(small)
    columns = hamming_cpu.word_major(base)
    out = np.empty((QUERIES, small), np.uint16)
    pairs = QUERIES * small

    def repeated(function: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
        def run() -> None:
            for _ in range(20 * times):
                function(*arguments)

        return run

    many, asked = codes(8_192), codes(SELECT_QUERIES)
    seconds = interleave(
        {
            "rows": repeated(_count_rows, queries, base),
            "columns": repeated(_count_columns, queries, columns),
            "kernel": repeated(hamming_cpu._matrix, queries, columns, out),
            "selected": repeated(lambda: hamming_cpu.nearest(asked, many, KEEP)),
        },
        rounds,
        1,
    )
    each = {name: 1e9 * min(taken) / (20 * times * pairs) for name, taken in seconds.items()}
    each["selected"] *= pairs / (SELECT_QUERIES * len(many))
    return {
        "limit": min(each["rows"], each["columns"]),
        "fastest_loop": "rows" if each["rows"] < each["columns"] else "columns",
        **each,
        "median_kernel": 1e9 * statistics.median(seconds["kernel"]) / (20 * times * pairs),
        "measured": time.strftime("%Y-%m-%d"),
    }
