"""Are binary codes worth their bits? Bits that are nearly constant, copies of each other or equal in many rows are not.

A bit with mean p carries -p log2 p - (1 - p) log2 (1 - p) bits of information at most; their sum, the effective bits,
bounds what the distances can tell apart. Correlated bits count the same difference twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.packing import WORD_BITS, check_codes, unpack_bits

LOW, HIGH = 0.3, 0.7
"""A mean of a bit outside of these is unbalanced."""
CONSTANT = 0.02
"""A bit whose rarer value is rarer than this is nearly constant."""
CORRELATED = 0.25
"""A mean absolute correlation above this is reported."""
DUPLICATES = 0.2
"""A share of duplicates above this is reported."""
SAMPLE = 20_000
"""Rows from which the correlation is estimated, at most; evenly spaced."""
_BLOCK = 65_536


@dataclass(frozen=True, eq=False)
class BalanceReport:
    """What `balance_report` found; ``str()`` gives a table with a verdict.

    Attributes:
        count: number of codes.
        bits: number of bits looked at.
        means: share of ones of each bit, (bits,); NaN where there are no codes.
        unbalanced: share of bits with a mean outside [0.3, 0.7].
        constant: number of bits whose rarer value has a share below 0.02.
        effective_bits: sum of the bits' entropies.
        correlation: mean absolute correlation over the pairs of bits that are not constant; 0 where there is no pair.
        duplicates: share of codes that an earlier row has already.
        verdict: one sentence for each defect with its mend, or that there is none.
    """

    count: int
    bits: int
    means: NDArray[np.float64]
    unbalanced: float
    constant: int
    effective_bits: float
    correlation: float
    duplicates: float
    verdict: str

    def __str__(self) -> str:
        span = f"{self.means.min():.3f} to {self.means.max():.3f}" if self.count else "-"
        lines = [
            ("codes", f"{self.count:,}"),
            ("bits", f"{self.bits}"),
            ("effective bits", f"{self.effective_bits:.1f}"),
            ("mean of a bit", span),
            (f"bits outside [{LOW}, {HIGH}]", f"{self.unbalanced:.1%}"),
            ("nearly constant bits", f"{self.constant}"),
            ("mean |correlation|", f"{self.correlation:.3f}"),
            ("duplicates", f"{self.duplicates:.1%}"),
        ]
        return "\n".join([*(f"{name:<24}{value:>16}" for name, value in lines), f"verdict: {self.verdict}"])


def balance_report(codes: NDArray[Any], bits: int | None = None) -> BalanceReport:
    """Judge codes by their bits.

    Args:
        codes: what ``check_codes`` takes.
        bits: how many of the leading bits carry data, None: all. Give it where codes were padded to a whole word.

    Raises:
        ValueError: bad codes, or ``bits`` not from 1 to 64 W.
    """
    codes = check_codes("codes", codes)
    limit = codes.shape[1] * WORD_BITS
    bits = limit if bits is None else bits
    if not 1 <= bits <= limit:
        raise ValueError(f"bits must be from 1 to {limit} for codes of {codes.shape[1]} words, got {bits}")
    count = len(codes)
    if count == 0:
        nothing = np.full(bits, np.nan)
        return BalanceReport(0, bits, nothing, 0.0, 0, 0.0, 0.0, 0.0, "there are no codes to judge")
    ones = np.zeros(bits, np.int64)
    for start in range(0, count, _BLOCK):
        ones += unpack_bits(codes[start : start + _BLOCK], bits).sum(axis=0, dtype=np.int64)
    means = ones / count
    unbalanced = float(((means < LOW) | (means > HIGH)).mean())
    constant = int((np.minimum(means, 1 - means) < CONSTANT).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -means * np.log2(means) - (1 - means) * np.log2(1 - means)
    effective = float(np.nan_to_num(entropy).sum())
    correlation = _mean_correlation(codes, bits)
    duplicates = 1 - _distinct(codes) / count
    verdict = _verdict(bits, constant, unbalanced, correlation, duplicates)
    return BalanceReport(count, bits, means, unbalanced, constant, effective, correlation, duplicates, verdict)


def _mean_correlation(codes: NDArray[np.uint64], bits: int) -> float:
    step = -(-len(codes) // SAMPLE)
    signs = unpack_bits(codes[::step], bits).astype(np.float32) * 2 - 1
    signs -= signs.mean(axis=0)
    deviation = np.sqrt((signs * signs).mean(axis=0))
    moving = deviation > 0
    signs = signs[:, moving] / deviation[moving]
    width = signs.shape[1]
    if width < 2:
        return 0.0
    matrix = np.abs(signs.T @ signs) / len(signs)
    return float((matrix.sum(dtype=np.float64) - np.trace(matrix)) / (width * (width - 1)))


def _distinct(codes: NDArray[np.uint64]) -> int:
    order = np.lexsort(codes.T)
    ordered = codes[order]
    return 1 + int((ordered[1:] != ordered[:-1]).any(axis=1).sum())


def _verdict(bits: int, constant: int, unbalanced: float, correlation: float, duplicates: float) -> str:
    found = []
    if constant:
        found.append(f"{constant} of {bits} bits are nearly constant: centre the data or use ITQ")
    elif unbalanced > 0.1:
        found.append(
            f"{round(unbalanced * bits)} of {bits} bits have a mean outside [{LOW}, {HIGH}]: centre the data, or fit "
            "the hash on a sample of what is encoded"
        )
    if correlation > CORRELATED:
        found.append(
            f"the bits are correlated ({correlation:.2f} on average): the data vary in few directions; normalise them "
            "(length one, or without their own mean), or use SRP or fewer bits"
        )
    if duplicates > DUPLICATES:
        found.append(f"{duplicates:.0%} of the codes are duplicates: use more bits, unless the data repeat")
    return "; ".join(found) if found else "the bits are balanced"
