"""Which channels are bells, how the clip follows the maximum, and that the exact solvers are exact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alimm_ops.quantize import clipping

COUNT = 25_088  # 8 pictures of 56 x 56


def draw(family: str, channels: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    shape = (COUNT, channels)
    if family == "gaussian":
        return generator.normal(size=shape).astype(np.float32)
    if family == "uniform":
        return generator.uniform(-1, 1, shape).astype(np.float32)
    if family == "laplace":
        return generator.laplace(size=shape).astype(np.float32)
    if family == "t3":
        return generator.standard_t(3, shape).astype(np.float32)
    assert family == "inverted T"
    spike = generator.normal(0, 0.05, shape)
    return np.where(generator.random(shape) < 0.99, spike, generator.uniform(-1, 1, shape)).astype(np.float32)


def rms(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=0))


def weighted_error(x: np.ndarray, clip: np.ndarray, alpha: np.ndarray, qmax: int = 127) -> np.ndarray:
    """The objective of each channel with the real quantiser to nearest, in float64; the largest weight is 1."""
    x = x.astype(np.float64)
    quantised = np.rint(np.clip(x * qmax / clip, -qmax, qmax)) * clip / qmax
    weight = np.exp(alpha * (np.abs(x) - np.abs(x).max(axis=0)))
    return np.mean(np.abs(x - quantised) * weight, axis=0)


def model_error(x: np.ndarray, clip: float, alpha: float, c: float = 0.25, qmax: int = 127) -> float:
    """The objective of one channel as it is derived, each value for itself: c steps inside, the difference beyond."""
    magnitude = np.abs(x.astype(np.float64))
    error = np.where(magnitude <= clip, c * clip / qmax, magnitude - clip)
    error[magnitude == clip] = 0.0
    return float(np.sum(error * np.exp(alpha * (magnitude - magnitude.max()))))


# --- the families


@pytest.mark.parametrize(
    ("family", "bell"),
    [("gaussian", True), ("uniform", True), ("laplace", False), ("t3", False), ("inverted T", False)],
)
def test_the_families_are_told_apart(family: str, bell: bool) -> None:
    x = draw(family, 150) * np.float32(1e-6)
    beyond = np.count_nonzero(np.abs(x) > rms(x), axis=0)
    assert (clipping.is_bell(beyond, COUNT) == bell).all()


def test_few_values_make_a_bell_and_the_share_decides_otherwise() -> None:
    assert clipping.is_bell(np.array([0, 5]), 1023).all()
    assert clipping.is_bell(np.array([300, 301, 600]), 2000, lam=0.15).tolist() == [False, True, True]
    assert clipping.is_bell(np.array([600, 601]), 2000).tolist() == [False, True]


# --- the recursion


@given(st.floats(0.5, 1.5), st.floats(0.2, 0.9), st.floats(0.01, 100), st.floats(0, 100))
def test_the_recursion_tends_to_the_maximum_over_k(k: float, a: float, amax: float, start: float) -> None:
    clip, inverted_t = np.array([start]), np.array([False])
    for step in range(1, 6):
        clip = clipping.recursion(clip, np.array([amax]), inverted_t, k, a)
        expected = amax / k + (1 - k * a) ** step * (start - amax / k)
        assert clip[0] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.lists(st.floats(1e-12, 1e3), min_size=1, max_size=8))
def test_the_papers_constants_never_clip_below_four_fifths_of_the_maximum(maxima: list[float]) -> None:
    clip = np.array([np.nan])
    for amax in maxima:
        before = clip[0]
        clip = clipping.recursion(clip, np.array([amax]), np.array([False]))
        assert clip[0] >= 0.8 * amax * (1 - 1e-12)
        assert clip[0] <= amax + 0.2 * np.nan_to_num(before) + 1e-12


def test_the_start_the_bells_and_the_zeros() -> None:
    previous = np.array([np.nan, -1.0, 2.0, 2.0, 2.0, 0.0])
    amax = np.array([4.0, 4.0, 4.0, 4.0, 0.0, 4.0])
    bell = np.array([False, False, True, False, False, False])
    clip = clipping.recursion(previous, amax, bell)
    assert clip.dtype == np.float64
    np.testing.assert_allclose(clip, [4.0, 4.0, 4.0, 3.6, 0.0, 3.2])


def test_one_spike_in_time_is_forgotten_within_a_few_steps() -> None:
    clip = np.array([1.0])
    history = []
    for amax in (100.0, 1.0, 1.0, 1.0, 1.0):
        clip = clipping.recursion(clip, np.array([amax]), np.array([False]))
        history.append(clip[0])
    np.testing.assert_allclose(history, [80.2, 16.84, 4.168, 1.6336, 1.12672])


@pytest.mark.parametrize(("k", "a"), [(1.0, 2.0), (0.0, 0.8), (3.0, 0.8)])
def test_an_unstable_recursion_is_refused(k: float, a: float) -> None:
    with pytest.raises(ValueError, match="stable for"):
        clipping.recursion(np.ones(1), np.ones(1), np.array([False]), k, a)


# --- the closed form


def model_of_inverted_t(
    s: np.ndarray, alpha: float, a: float, b: float, eps: float, m: float, kappa: float
) -> np.ndarray:
    """``E(s) / 2`` by quadrature on a fine grid, weights scaled by ``exp(-alpha m)``."""
    edges = np.concatenate([np.linspace(0, eps, 20_001), np.linspace(eps, m, 20_001)[1:]]) if eps else None
    edges = np.linspace(0, m, 40_001) if edges is None else edges
    centre, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    mass = np.where(centre < eps, a, b) * np.exp(alpha * (centre - m)) * width
    inside = centre <= s[:, None]
    return np.sum(np.where(inside, s[:, None] / kappa, centre - s[:, None]) * mass, axis=1)


def derivative(s: float, alpha: float, a: float, b: float, eps: float, m: float, kappa: float) -> float:
    """``F(s) + s f p - kappa T(s)`` of a clip in the tail, integrals written out, scaled by ``exp(-alpha m)``."""
    e = lambda x: np.exp(alpha * (x - m))
    inside = (a * (e(eps) - e(0)) + b * (e(s) - e(eps))) / alpha
    return inside + s * b * e(s) - kappa * b * (1 - e(s)) / alpha


def bisect(low: float, high: float, *model: float) -> float:
    assert derivative(low, *model) < 0 < derivative(high, *model)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if derivative(middle, *model) < 0 else (low, middle)
    return low


@pytest.mark.parametrize("kappa", [508.0, 381.0, 254.0])
@pytest.mark.parametrize(
    ("alpha", "a", "b", "eps", "m"),
    [
        (1.0, 5.0, 0.5, 0.1, 1.0),
        (13.0, 9.0, 0.1, 0.1, 1.0),
        (0.01, 1.0, 1.0, 0.0, 2.0),
        (3.0, 4.0, 0.05, 0.2, 4.0),
        (300.0, 9.0, 0.05, 0.1, 1.0),
        (2e6, 5e6, 0.3e6, 1e-7, 3e-6),
    ],
)
def test_the_closed_form_is_the_root_of_the_derivative(alpha, a, b, eps, m, kappa) -> None:
    clip = clipping.closed_form(alpha, a, b, eps, m, kappa)
    assert eps < clip < m
    assert clip == pytest.approx(bisect(max(eps, 1e-9 * m), m, alpha, a, b, eps, m, kappa), rel=1e-8)


def test_the_closed_form_does_not_overflow_and_tends_to_the_maximum() -> None:
    clips = [clipping.closed_form(alpha, 9.0, 0.1, 0.1, 1.0) for alpha in (1.0, 1e2, 1e4, 1e6, 1e300)]
    assert np.all(np.diff(clips[:4]) > 0)
    # alpha s <= alpha m - ln(1 + (alpha m + 1) / kappa): the bound leaves max as the limit.
    assert 1 - 1e-4 < clips[3] < 1
    assert clips[4] == 1.0


@pytest.mark.parametrize("alpha", [0.0, 1e-13, 1e-9, 1e-4])
def test_a_small_alpha_tends_to_the_plain_error(alpha: float) -> None:
    kappa, a, b, eps, m = 508.0, 3.0, 0.5, 0.2, 1.0
    # alpha = 0: a eps + b (s - eps) + s b = kappa b (m - s).
    expected = (kappa * b * m + (b - a) * eps) / (b * (kappa + 2))
    assert clipping.closed_form(alpha, a, b, eps, m, kappa) == pytest.approx(expected, abs=2 * alpha + 1e-13)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 4.0, 20.0])
@pytest.mark.parametrize(("a", "b", "eps"), [(5.0, 0.5, 0.1), (1e4, 1e-3, 0.1), (9.9, 1e-3, 0.1), (300.0, 1e-2, 0.01)])
@pytest.mark.parametrize("kappa", [508.0, 5.0])
def test_the_closed_form_is_the_least_of_a_fine_grid(
    alpha: float, a: float, b: float, eps: float, kappa: float
) -> None:
    """In a strong spike too, where the tail's root is no minimum or not the lower one."""
    grid = np.concatenate([np.linspace(0, eps, 41)[1:], np.linspace(eps, 1.0, 60)[1:]])
    clip = clipping.closed_form(alpha, a, b, eps, 1.0, kappa)
    errors = model_of_inverted_t(np.append(grid, clip), alpha, a, b, eps, 1.0, kappa)
    assert errors[-1] <= errors[:-1].min() * (1 + 1e-6)


def test_a_strong_spike_clips_inside_itself_and_a_missing_tail_ends_there() -> None:
    assert clipping.closed_form(0.0, 1e6, 1e-6, 0.1, 1.0) < 0.1
    assert clipping.closed_form(1.0, 4.0, 0.0, 0.25, 1.0) == clipping.closed_form(1.0, 4.0, 4.0, 0.0, 0.25)


@pytest.mark.parametrize("broken", [dict(alpha=-1.0), dict(b=-1.0), dict(eps=2.0), dict(m=0.0), dict(kappa=0.0)])
def test_what_is_no_inverted_t_is_refused(broken: dict[str, float]) -> None:
    arguments = dict(alpha=1.0, a=1.0, b=1.0, eps=0.0, m=1.0, kappa=508.0)
    with pytest.raises(ValueError, match="not an inverted T"):
        clipping.closed_form(**{**arguments, **broken})


# --- histograms


def test_the_histogram_against_numpys() -> None:
    x = draw("laplace", 5)[:20_000]
    x[:, 3] = 0
    hist = clipping.histogram(x, 64)
    assert hist.dtype == np.int64
    assert hist.sum(axis=1).tolist() == [20_000] * 5
    for channel in (0, 1, 2, 4):
        magnitude = np.abs(x[:, channel]).astype(np.float64)
        assert np.array_equal(hist[channel], np.histogram(magnitude / magnitude.max(), 64, (0, 1))[0])
    assert hist[3, 0] == 20_000
    assert not clipping.histogram(np.zeros((0, 2), np.float32), 8).any()


def test_the_fit_finds_the_spike_and_the_tail() -> None:
    generator = np.random.default_rng(3)
    x = np.where(
        generator.random(100_000) < 0.8, generator.uniform(0, 0.125, 100_000), generator.uniform(0.125, 1, 100_000)
    )
    x[0] = 1.0
    a, b, eps = clipping.fit_inverted_t(clipping.histogram(x[:, None].astype(np.float32), 256)[0])
    assert eps == pytest.approx(0.125, abs=1 / 256)
    assert a == pytest.approx(6.4, rel=0.05)
    assert b == pytest.approx(0.2 / 0.875, rel=0.05)
    assert a * eps + b * (1 - eps) == pytest.approx(1)


def test_the_fit_of_nothing_is_flat() -> None:
    assert clipping.fit_inverted_t(np.zeros(16, np.int64)) == (1.0, 1.0, 0.0)


FAMILIES = ["gaussian", "uniform", "laplace", "t3", "inverted T"]


@pytest.mark.parametrize("c", [0.25, 0.5])
@pytest.mark.parametrize("alpha_over_sigma", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_histogram_solver_is_the_least_of_a_fine_grid(family: str, alpha_over_sigma: float, c: float) -> None:
    x, bins = draw(family, 2, seed=5), 512
    amax, sigma = np.abs(x).max(axis=0), rms(x)
    clips = clipping.histogram_clip(clipping.histogram(x, bins), amax, alpha_over_sigma, sigma, c)
    for channel in range(2):
        largest = float(amax[channel])
        alpha = alpha_over_sigma / sigma[channel]
        error = lambda s: model_error(x[:, channel], s, alpha, c)  # noqa: B023 (used at once)
        grid = [largest * j / 160 for j in range(1, 161)]
        # A bin has one weight and one place for all its values: as exact as the bins are narrow.
        tolerance = 1 + 3 * alpha * largest / bins + 0.01
        assert error(clips[channel]) <= min(map(error, grid)) * tolerance
        recursion = clipping.recursion(np.array([largest / 2]), np.array([largest]), np.array([False]))[0]
        assert error(clips[channel]) <= min(error(largest), error(recursion)) * (1 + 1e-3)


def test_how_hard_a_gaussian_is_clipped() -> None:
    x = draw("gaussian", 32)
    amax, sigma, hist = np.abs(x).max(axis=0), rms(x), clipping.histogram(x, 512)
    share = {alpha: np.mean(clipping.histogram_clip(hist, amax, alpha, sigma) / amax) for alpha in (0, 0.5, 1, 2, 1e3)}
    assert 0.62 < share[0] < 0.78
    assert share[0] < share[0.5] < share[1] < share[2]
    assert share[1e3] == 1


@pytest.mark.parametrize(
    ("family", "alpha_over_sigma", "least_gain"),
    [
        ("gaussian", 0.0, 0.15),
        ("gaussian", 0.5, 0.08),
        ("gaussian", 1.0, 0.01),
        ("t3", 0.0, 0.4),
        ("laplace", 0.0, 0.25),
    ],
)
def test_the_clip_beats_the_maximum_on_the_real_quantiser(
    family: str, alpha_over_sigma: float, least_gain: float
) -> None:
    x = draw(family, 64, seed=6)
    amax, sigma = np.abs(x).max(axis=0).astype(np.float64), rms(x)
    clip = clipping.histogram_clip(clipping.histogram(x, 512), amax, alpha_over_sigma, sigma)
    alpha = alpha_over_sigma / sigma
    assert weighted_error(x, clip, alpha).sum() <= (1 - least_gain) * weighted_error(x, amax, alpha).sum()


@pytest.mark.parametrize("alpha_over_sigma", [0.0, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_clip_does_not_lose_to_the_maximum_on_the_real_quantiser(family: str, alpha_over_sigma: float) -> None:
    x = draw(family, 32, seed=7)
    amax, sigma = np.abs(x).max(axis=0).astype(np.float64), rms(x)
    clip = clipping.histogram_clip(clipping.histogram(x, 512), amax, alpha_over_sigma, sigma)
    alpha = alpha_over_sigma / sigma
    ratio = weighted_error(x, clip, alpha) / weighted_error(x, amax, alpha)
    assert ratio.mean() <= 1.02  # where few values carry all weight, their rounding errors are no mean


def test_a_channel_of_zeros_has_the_clip_zero_and_the_unit_does_not_matter() -> None:
    x = draw("laplace", 3)
    x[:, 1] = 0
    hist, amax, sigma = clipping.histogram(x, 128), np.abs(x).max(axis=0), rms(x)
    clip = clipping.histogram_clip(hist, amax, 0.5, sigma)
    assert clip[1] == 0
    np.testing.assert_allclose(clipping.histogram_clip(hist, amax * 1e-6, 0.5, sigma * 1e-6), clip * 1e-6)


def test_fewer_bits_clip_harder() -> None:
    x = draw("gaussian", 4)
    hist, amax, sigma = clipping.histogram(x, 512), np.abs(x).max(axis=0), rms(x)
    eight, four = (clipping.histogram_clip(hist, amax, 0.0, sigma, qmax=qmax) for qmax in (127, 7))
    assert (four < eight).all()
