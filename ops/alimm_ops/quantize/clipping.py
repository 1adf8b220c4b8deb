"""Where a channel of an output gradient is clipped before it is quantised.

Zhao et al., Distribution Adaptive INT8 Quantization for Training CNNs, AAAI 2021, arXiv 2102.04782. The paper quantises
the gradient of each output channel with a clip of its own, and counts the error of a large gradient for more. For a
channel with density p and largest magnitude M, clipped to s::

    E(s) = integral |g - g'| f(g) p(g) dg,    f(g) = exp(alpha |g|)

It tells two families of channels apart by the share of values beyond the standard deviation, with lambda = 0.3::

    bell          P(|g| > sigma) >  lambda     s_t = M_t
    inverted T    otherwise                    s_t = (1 - k A) s_(t-1) + A M_t,    k = 1, A = 0.8

This much (:func:`is_bell`, :func:`recursion`) is the paper's. Ours: the floor on the number of values (below 1024 the
share says little), the start s_0 = M_0, and leaving a channel of zeros alone. The recursion is a tracker of M / k whose
error shrinks by 1 - k A a step; with k = 1 it never clips below A M. We do not claim that it minimises E.

The exact minimisers of E are our own derivation. With c the mean rounding error in steps (1/4 to nearest, 1/3
stochastically; the paper bounds it by 1/2), kappa = qmax / c, F(s) = integral_0^s f p and T(s) = integral_s^M f p::

    E(s) / 2 = s F(s) / kappa + integral_s^M (g - s) f(g) p(g) dg
    E'(s) = 0:    F(s) + s f(s) p(s) = kappa T(s)

:func:`closed_form` solves it for the paper's model of an inverted T, p = a on (0, eps) and b on (eps, M); in the tail::

    exp(alpha s) (kappa + 1 + alpha s) = kappa exp(alpha M) + exp(alpha eps) - (a / b) (exp(alpha eps) - 1) =: R
    s = (W(R exp(kappa + 1)) - (kappa + 1)) / alpha           W: Lambert's function, u + ln u = ln R + kappa + 1

:func:`histogram_clip` evaluates E at the edges of a histogram and assumes no family. It takes alpha in units of
1 / sigma: gradients are so small that a fixed alpha would weight all alike.

Shapes: R rows, C channels, B bins.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

MIN_COUNT = 1024
"""With fewer values the share beyond sigma is too noisy to tell the families apart (its error is 0.46 / sqrt(n))."""

_ROWS = 1 << 14


def is_bell(count_C: NDArray[np.int64], n: int, lam: float = 0.3) -> NDArray[np.bool_]:
    """Tell bell-shaped channels from inverted Ts.

    Args:
        count_C: the number of values beyond the standard deviation.
        n: the number of values of a channel; below ``MIN_COUNT`` every channel is taken for a bell.
        lam: the share above which a channel is a bell: 0.317 of a Gaussian is, 0.243 of a Laplacian.
    """
    count_C = np.asarray(count_C)
    if n < MIN_COUNT:
        return np.ones(count_C.shape, np.bool_)
    return count_C > lam * n


def recursion(
    previous_C: NDArray[np.floating],
    amax_C: NDArray[np.floating],
    bell_C: NDArray[np.bool_],
    k: float = 1.0,
    a: float = 0.8,
) -> NDArray[np.float64]:
    """The paper's rule for the clip of this step.

    Args:
        previous_C: the clips of the step before; below 0 or NaN where there is none yet.
        amax_C: the largest magnitudes of this step, finite.
        bell_C: which channels are bells.
        k: inverse of the share of M that the tracker tends to.
        a: speed of the tracker.

    Returns:
        The clips. A channel of zeros gets 0, which the caller must not keep as its previous clip.
    """
    if not 0 < k * a < 2:
        raise ValueError(f"the recursion is stable for 0 < k * a < 2 only, got k = {k} and a = {a}")
    previous_C, amax_C = np.asarray(previous_C, np.float64), np.asarray(amax_C, np.float64)
    follows_C = ~np.asarray(bell_C) & (previous_C >= 0) & (amax_C > 0)
    return np.where(follows_C, (1 - k * a) * previous_C + a * amax_C, amax_C)


def closed_form(alpha: float, a: float, b: float, eps: float, m: float, kappa: float = 508.0) -> float:
    """The clip that minimises E for an inverted T, exactly.

    E has at most two local minima, one in the tail and one in the spike; the lower one counts.

    Args:
        alpha: exponent of the weight, at least 0, in units of 1 / m's.
        a: density of the spike, on (0, eps).
        b: density of the tail, on (eps, m).
        eps: where the spike ends; 0 without one.
        m: the largest magnitude.
        kappa: ``qmax / c``: 508 for rounding 8 bits to nearest, 381 stochastically, 254 with the paper's bound.

    Returns:
        The clip in (0, m].
    """
    if not (alpha >= 0 and a >= 0 and b >= 0 and a + b > 0 and 0 <= eps <= m and m > 0 and kappa > 0):
        raise ValueError(f"not an inverted T: alpha {alpha}, a {a}, b {b}, eps {eps}, m {m}, kappa {kappa}")
    if b == 0 or eps == m:
        end = m if b else eps
        return _root(alpha, end, kappa, [(kappa, end)])
    tail = _root(alpha, m, kappa, [(kappa, m), (1 - a / b, eps)])
    candidates = [tail] if eps < tail <= m else []
    if eps > 0 and a > 0:
        spike = _root(alpha, m, kappa, [(kappa * b / a, m), (kappa * (1 - b / a), eps)])
        candidates += [spike] if 0 < spike < eps else [eps]
    return min(candidates, key=lambda s: _objective(s, alpha, a, b, eps, m, kappa), default=m)


def _root(alpha: float, m: float, kappa: float, terms: list[tuple[float, float]]) -> float:
    """Solve ``exp(alpha s) (kappa + 1 + alpha s) = R`` for s.

    In x = alpha s the equation is ``x + log1p(x / (kappa + 1)) = ln(R / (kappa + 1))``: ``u + ln u`` shifted by its
    constant, so that it neither overflows for a large alpha nor cancels for a small one.

    Args:
        alpha: as above.
        m: the largest position among the terms.
        kappa: as above.
        terms: (weight, position): R is ``kappa + 1`` plus the sum of ``weight * expm1(alpha * position)``.

    Returns:
        The solution; 0 where there is none above 0.
    """
    one = kappa + 1
    if alpha * m < 1e-12:
        return max(0.0, sum(weight * at for weight, at in terms) / (one + 1))
    if alpha * m < 1:
        ratio = sum(weight * math.expm1(alpha * at) for weight, at in terms) / one
        right = math.log1p(ratio) if ratio > -1 else -math.inf
    else:  # with the largest exponential taken out
        least = math.exp(-alpha * m)
        ratio = least + sum(weight * (math.exp(alpha * (at - m)) - least) for weight, at in terms) / one
        right = alpha * m + math.log(ratio) if ratio > 0 else -math.inf
    if right <= 0:
        return 0.0
    x = right
    for _ in range(20):  # Newton; five steps are usual
        step = (x + math.log1p(x / one) - right) / (1 + 1 / (one + x))
        x -= step
        if abs(step) <= 1e-15 * abs(x):
            break
    return x / alpha


def _objective(s: float, alpha: float, a: float, b: float, eps: float, m: float, kappa: float) -> float:
    """``E(s) / 2 * exp(-alpha m)``."""
    inside = a * _moments(0, min(s, eps), alpha, m)[0] + b * _moments(eps, max(s, eps), alpha, m)[0]
    beyond = 0.0
    for density, low, high in ((a, min(s, eps), eps), (b, max(s, eps), m)):
        zeroth, first = _moments(low, high, alpha, m)
        beyond += density * (first + (low - s) * zeroth)
    return s * inside / kappa + beyond


def _moments(low: float, high: float, alpha: float, m: float) -> tuple[float, float]:
    """Integrals of ``exp(alpha (g - m))`` and of ``(g - low) exp(alpha (g - m))`` over (low, high)."""
    width = high - low
    z = alpha * width
    top = math.exp(alpha * (high - m)) * width
    zeroth = -math.expm1(-z) / z if z > 0 else 1.0
    # The mean of t exp(-z t) over (0, 1): a series where the difference would cancel.
    first = (1 - (1 + z) * math.exp(-z)) / z / z if z > 1e-3 else 0.5 - z / 3 + z * z / 8
    return top * zeroth, top * width * (zeroth - first)


def histogram(x_RC: NDArray[np.float32], bins: int) -> NDArray[np.int64]:
    """Histogram of ``|x| / amax`` of each channel over ``bins`` equal bins of [0, 1].

    Args:
        x_RC: finite values (R, C).
        bins: the number of bins B.

    Returns:
        Counts (C, B); a channel of zeros has all in its first bin.
    """
    magnitude_RC = np.abs(np.asarray(x_RC, np.float32))
    channels = magnitude_RC.shape[1]
    amax_C = magnitude_RC.max(axis=0, initial=np.float32(0)).astype(np.float64)
    scale_C = np.divide(bins, amax_C, out=np.zeros_like(amax_C), where=amax_C > 0)
    first_C = np.arange(channels) * bins
    hist = np.zeros(channels * bins, np.int64)
    for start in range(0, len(magnitude_RC), _ROWS):  # in parts that stay in the cache
        index = np.minimum((magnitude_RC[start : start + _ROWS] * scale_C).astype(np.int64), bins - 1) + first_C
        hist += np.bincount(index.ravel(), minlength=hist.size)
    return hist.reshape(channels, bins)


def fit_inverted_t(hist_B: NDArray[np.int64]) -> tuple[float, float, float]:
    """Fit the two densities of an inverted T to the histogram of a channel by maximum likelihood.

    Args:
        hist_B: counts of ``|x| / amax``.

    Returns:
        a, b and eps of :func:`closed_form` for m = 1, the densities normalised: ``a eps + b (1 - eps) = 1``.
    """
    hist_B = np.asarray(hist_B)
    total, bins = int(hist_B.sum()), len(hist_B)
    if not total or bins < 2:
        return 1.0, 1.0, 0.0
    eps = np.arange(1, bins) / bins
    inside = np.cumsum(hist_B)[:-1] / total
    a, b = inside / eps, (1 - inside) / (1 - eps)
    likelihood = inside * np.log(np.maximum(a, 1e-300)) + (1 - inside) * np.log(np.maximum(b, 1e-300))
    best = int(np.argmax(likelihood))
    return float(a[best]), float(b[best]), float(eps[best])


def histogram_clip(
    hist_CB: NDArray[np.int64],
    amax_C: NDArray[np.floating],
    alpha_over_sigma: float,
    sigma_C: NDArray[np.floating],
    c: float = 0.25,
    qmax: int = 127,
) -> NDArray[np.float64]:
    """The clip that minimises E of each channel among the edges of its bins, in O(B).

    The largest value counts apart from its bin: clipped to itself it is met exactly, clipped to less it loses all of
    the difference. With a large alpha it decides alone, and the clip is ``amax``.

    Args:
        hist_CB: counts of ``|x| / amax`` (:func:`histogram`).
        amax_C: the largest magnitudes.
        alpha_over_sigma: alpha in units of ``1 / sigma``; 0 weights all alike.
        sigma_C: the standard deviations.
        c: mean rounding error in steps: 1/4 to nearest, 1/3 stochastic, 1/2 the paper's bound.
        qmax: the largest integer.

    Returns:
        The clips; 0 for a channel of zeros.
    """
    hist_CB = np.asarray(hist_CB)
    amax_C, sigma_C = np.asarray(amax_C, np.float64), np.asarray(sigma_C, np.float64)
    bins = hist_CB.shape[1]
    centre_B, edge_B = (np.arange(bins) + 0.5) / bins, np.arange(1, bins + 1) / bins
    # In units of amax, and with the largest weight taken out.
    alpha_C = alpha_over_sigma * np.divide(amax_C, sigma_C, out=np.zeros_like(amax_C), where=sigma_C > 0)
    count_CB = hist_CB.copy()
    count_CB[:, -1] = np.maximum(count_CB[:, -1] - 1, 0)  # without the largest value itself, whose weight is 1
    weight_CB = count_CB * np.exp(alpha_C[:, None] * (centre_B - 1))
    inside_CB = np.cumsum(weight_CB, axis=1)
    # Summed from the top: a difference to the total would leave the small tail to rounding.
    beyond0_CB = _from_the_top(weight_CB)
    beyond1_CB = _from_the_top(weight_CB * centre_B)
    error_CB = c * edge_B / qmax * inside_CB + beyond1_CB - edge_B * beyond0_CB + (1 - edge_B)
    return amax_C * edge_B[np.argmin(error_CB, axis=1)]


def _from_the_top(values_CB: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of all bins above each one."""
    return np.cumsum(values_CB[:, ::-1], axis=1)[:, ::-1] - values_CB
