from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.projects.dcaa.stylise import (
    ColourStats,
    colour_statistics,
    fda,
    half_width,
    low_frequency_amplitude,
    match_colour,
    pool_statistics,
    resize_to,
    to_lab,
)


def picture(seed: int, height: int = 12, width: int = 17, low: int = 60, high: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (height, width, 3)).astype(np.uint8)


def lab_by_hand(rgb: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b* of sRGB under D65, from the definition."""
    share = rgb.astype(np.float64) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    xyz = linear @ np.array(to_xyz).T / np.array([0.950456, 1.0, 1.088754])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def fda_by_hand(image: np.ndarray, reference: np.ndarray, half: int) -> np.ndarray:
    """Both whole spectra, the centred square found by the frequency of each bin."""
    result = np.zeros(image.shape)
    height, width = image.shape[:2]
    rows = np.fft.fftfreq(height, 1 / height)
    columns = np.fft.fftfreq(width, 1 / width)
    for channel in range(3):
        own = np.fft.fft2(image[..., channel].astype(np.float64))
        other = np.fft.fft2(reference[..., channel].astype(np.float64))
        amplitude = np.abs(own)
        for y in range(height):
            for x in range(width):
                if abs(rows[y]) <= half and abs(columns[x]) <= half:
                    amplitude[y, x] = np.abs(other[y, x])
        result[..., channel] = np.fft.ifft2(amplitude * np.exp(1j * np.angle(own))).real
    return np.clip(result, 0, 255)


def test_lab_is_that_of_the_definition() -> None:
    image = picture(0, low=0, high=256)
    assert np.abs(to_lab(image) - lab_by_hand(image)).max() < 1.0
    assert to_lab(np.full((1, 1, 3), 255, np.uint8)).ravel() == pytest.approx([100, 0, 0], abs=0.2)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_statistics_are_those_of_all_pixels(dtype: type) -> None:
    images = [picture(1).astype(dtype), picture(2, 5, 9, 0, 90).astype(dtype)]
    pixels = np.concatenate([to_lab(image).reshape(-1, 3) for image in images]).astype(np.float64)
    stats = colour_statistics(images)
    np.testing.assert_allclose(stats.mean, pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(stats.std, pixels.std(0), rtol=1e-9)
    assert colour_statistics(images[0]) == colour_statistics(image for image in images[:1])


def test_pooled_statistics_weigh_pictures_by_their_pixels() -> None:
    images = [picture(1), picture(2, 5, 9, 0, 90), picture(3, 2, 3)]
    pooled = pool_statistics(
        [colour_statistics(one) for one in images], [one.shape[0] * one.shape[1] for one in images]
    )
    assert pooled == colour_statistics(images)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_matched_picture_has_the_statistics_of_the_style(seed: int) -> None:
    # of low contrast, so that nothing is cut at black or white
    image, style = picture(seed, 16, 16, 110, 150), picture(seed + 1, 9, 20, 90, 160)
    wanted = colour_statistics(style)
    found = colour_statistics(match_colour(image.astype(np.float32), wanted))
    np.testing.assert_allclose(found.mean, wanted.mean, atol=0.3)
    np.testing.assert_allclose(found.std, wanted.std, rtol=0.03)


def test_match_is_the_equation() -> None:
    image = picture(4, low=100, high=150).astype(np.float32)
    wanted = ColourStats(np.array([40.0, 5.0, -10.0]), np.array([8.0, 4.0, 3.0]))
    lab = to_lab(image).astype(np.float64)
    full = (lab - lab.mean((0, 1))) * wanted.std / lab.std((0, 1)) + wanted.mean
    for strength in (0.25, 1.0):
        expected = (1 - strength) * lab + strength * full
        found = to_lab(match_colour(image, wanted, strength=strength))
        assert np.abs(found - expected).max() < 1.0


def test_match_uses_the_given_statistics_of_the_source() -> None:
    image = picture(4, low=100, high=150).astype(np.float32)
    own = colour_statistics(image)
    domain = ColourStats(own.mean + 3, own.std)
    target = ColourStats(own.mean + 10, own.std)
    moved = colour_statistics(match_colour(image, target, domain)).mean - own.mean
    assert moved == pytest.approx([7, 7, 7], abs=0.3)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_match_that_changes_nothing_changes_not_a_bit(dtype: type) -> None:
    image = picture(5, low=0, high=256).astype(dtype)
    stats = ColourStats(np.array([10.0, 0.0, 0.0]), np.ones(3))
    for same in (
        match_colour(image, stats, strength=0.0),
        match_colour(image, colour_statistics(image)),
        fda(image, picture(6), 0.0),
    ):
        assert same.dtype == dtype
        assert same is not image
        np.testing.assert_array_equal(same, image)


def test_channel_without_contrast_is_moved_and_not_stretched() -> None:
    image = np.full((4, 6, 3), 90, np.uint8)
    wanted = ColourStats(np.array([70.0, 0.0, 0.0]), np.array([20.0, 20.0, 20.0]))
    matched = match_colour(image, wanted)
    assert (matched == matched[0, 0]).all()
    assert colour_statistics(matched).mean == pytest.approx(wanted.mean, abs=0.5)


def test_grey_picture_gets_a_tint_and_no_coloured_noise() -> None:
    grey = np.repeat(picture(3, low=0, high=256)[..., :1], 3, axis=2)
    matched = match_colour(grey, ColourStats(np.array([60.0, 5.0, -5.0]), np.array([20.0, 20.0, 20.0])))
    inside = ((matched > 0) & (matched < 255)).all(-1)
    assert to_lab(matched)[inside].std(0)[1:].max() < 1.0


@pytest.mark.parametrize("size", [(12, 17), (16, 16), (9, 8), (8, 9)])
@pytest.mark.parametrize("beta", [0.001, 0.13, 0.26, 0.5])
def test_fda_equals_the_slow_one(size: tuple[int, int], beta: float) -> None:
    image, reference = picture(7, *size), picture(8, *size, 0, 120)
    half = int(beta * min(size))
    found = fda(image.astype(np.float32), reference, beta)
    np.testing.assert_allclose(found, fda_by_hand(image, reference, half), atol=2e-3)
    assert np.abs(fda(image, reference, beta).astype(float) - found).max() <= 0.5 + 1e-6
    amplitude = low_frequency_amplitude(reference, beta)
    assert amplitude.shape == (2 * half + 1, half + 1, 3)
    np.testing.assert_allclose(amplitude[half, 0], reference.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(fda(image.astype(np.float32), beta=beta, amplitude=amplitude), found, atol=2e-3)


def test_fda_keeps_phases_and_the_high_frequencies() -> None:
    image = picture(9, 16, 16, 110, 140).astype(np.float32)
    reference = picture(10, 16, 16, 100, 150).astype(np.float32)
    before, after = (np.fft.fft2(one, axes=(0, 1)) for one in (image, fda(image, reference, 0.2)))
    np.testing.assert_allclose(after[4:13, 4:13], before[4:13, 4:13], atol=0.05)
    ratio = after[0:4, 0:4] / before[0:4, 0:4]
    np.testing.assert_allclose(ratio.imag, 0, atol=1e-3)
    assert (ratio.real > 0).all()
    assert np.abs(ratio.real - 1).max() > 0.05


def test_fda_resizes_a_reference_of_another_size() -> None:
    image, reference = picture(11, 12, 16), picture(12, 24, 32, 0, 100)
    np.testing.assert_array_equal(fda(image, reference, 0.2), fda(image, resize_to(reference, (12, 16)), 0.2))
    assert resize_to(reference, (12, 16))[0, 0, 0] == pytest.approx(reference[:2, :2, 0].mean(), abs=0.51)


def test_fda_of_itself_is_itself() -> None:
    image = picture(13, low=0, high=256)
    np.testing.assert_array_equal(fda(image, image, 0.3), image)


def test_half_width_is_not_short_by_rounding() -> None:
    assert [half_width((100, 200), beta) for beta in (0.29, 0.005, 0.5)] == [29, 0, 50]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"shape \(H, W, 3\), got \(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), r"got \(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"got \(0, 4, 3\)"),
        (np.zeros((4, 4, 3), np.float64), "uint8 or float32, got float64"),
        ("a.png", "got str"),
    ],
)
def test_what_is_no_rgb_picture_is_refused(bad: object, message: str) -> None:
    stats = ColourStats(np.zeros(3), np.ones(3))
    for call in (
        lambda: colour_statistics([bad]),
        lambda: match_colour(bad, stats),
        lambda: fda(bad, picture(0), 0.1),
        lambda: fda(picture(0), bad, 0.1),
        lambda: low_frequency_amplitude(bad, 0.1),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_wrong_arguments_are_refused() -> None:
    stats = ColourStats(np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match="at least one picture, got none"):
        colour_statistics([])
    with pytest.raises(ValueError, match=r"strength must be between 0 and 1, got 1\.5"):
        match_colour(picture(0), stats, strength=1.5)
    with pytest.raises(ValueError, match=r"beta must be between 0 and 0\.5.*got 0\.6"):
        fda(picture(0), picture(1), 0.6)
    with pytest.raises(ValueError, match="not both"):
        fda(picture(0), picture(1), 0.1, low_frequency_amplitude(picture(1), 0.1))
    with pytest.raises(ValueError, match="not both"):
        fda(picture(0))
    with pytest.raises(ValueError, match=r"needs an amplitude of shape \(3, 2, 3\), got \(7, 4, 3\)"):
        fda(picture(0), beta=0.1, amplitude=low_frequency_amplitude(picture(1, 30, 30), 0.1))
