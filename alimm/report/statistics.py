"""What benchmarks compare with: interleaved times and their ratio, paired differences and their interval.

Times of two programs on a busy machine drift together, so both sides run in turn, A B A B, and the ratio of each pair
is what counts. Accuracies of two trainings from one seed share start and data order, so their difference is taken seed
by seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Student's t, 97.5 % quantile, for 1 to 30 degrees of freedom.
_T_975 = (
    12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814,
    2.20099, 2.17881, 2.16037, 2.14479, 2.13145, 2.11991, 2.10982, 2.10092, 2.09302, 2.08596,
    2.07961, 2.07387, 2.06866, 2.06390, 2.05954, 2.05553, 2.05183, 2.04841, 2.04523, 2.04227,
)  # fmt: skip
_Z_975 = 1.9599640


class Ratio(NamedTuple):
    """How often longer A takes than B.

    Attributes:
        median: of the pairwise ratios A / B.
        q1: their first quartile.
        q3: their third quartile.
        of_medians: median of A over median of B.
    """

    median: float
    q1: float
    q3: float
    of_medians: float


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def within(self, bound: float) -> bool:
        """Whether the whole interval lies inside +-bound."""
        return -bound < self.low and self.high < bound

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def interleave(arms: Mapping[str, Callable[[], Any]], repeats: int, warmup: int) -> dict[str, list[float]]:
    """Time the arms in turn, A B C A B C.

    Args:
        arms: name -> what to time. On a GPU it must wait for its own work before it returns.
        repeats: rounds that count, at least 1.
        warmup: rounds before those.

    Returns:
        name -> seconds of each round. Entry i of two arms was taken in the same round.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"interleave needs repeats >= 1 and warmup >= 0, got {repeats} and {warmup}")
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(warmup + repeats):
        for name, arm in arms.items():
            start = time.perf_counter()
            arm()
            taken = time.perf_counter() - start
            if number >= warmup:
                times[name].append(taken)
    return times


def ratio(times_a: Sequence[float], times_b: Sequence[float]) -> Ratio:
    """The ratio A / B of times that `interleave` took, with the quartiles of the pairs."""
    a, b = _paired(times_a, times_b)
    q1, median, q3 = np.percentile(a / b, [25, 50, 75])
    return Ratio(float(median), float(q1), float(q3), float(np.median(a) / np.median(b)))


def paired_interval(differences: Sequence[float]) -> Interval:
    """Mean of paired differences with its 95 % interval after Student; one pair alone has an infinite interval."""
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"paired_interval needs a list of at least one difference, got shape {values.shape}")
    mean = float(values.mean())
    if values.size == 1:
        return Interval(mean, -math.inf, math.inf)
    half = t_quantile(values.size - 1) * float(values.std(ddof=1)) / math.sqrt(values.size)
    return Interval(mean, mean - half, mean + half)


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t: a table to 30 degrees of freedom, beyond it Cornish and Fisher's expansion."""
    if degrees < 1:
        raise ValueError(f"t_quantile needs at least one degree of freedom, got {degrees}")
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = _Z_975
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def _paired(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    left, right = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if left.shape != right.shape or left.ndim != 1 or not left.size:
        raise ValueError(f"pairs need two lists of the same length, at least 1; got {left.shape} and {right.shape}")
    return left, right
