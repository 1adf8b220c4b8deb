"""Pictures restyled without a network: colour statistics and the low frequencies of the spectrum.

Colour statistics: Reinhard, Ashikhmin, Gooch and Shirley, "Color Transfer between Images", 2001. Per channel c of a
decorrelated colour space, with the mean m and the standard deviation s of the picture and of the wanted style:

    y_c = (x_c - m_c) * s'_c / s_c + m'_c

We follow the equation. We differ in the space, CIE L*a*b* instead of l-alpha-beta; in `strength`, which walks only a
part of the way; and in that a channel without contrast (s_c ~ 0) is moved and not stretched.

Spectrum: Yang and Soatto, "FDA: Fourier Domain Adaptation for Semantic Segmentation", CVPR 2020 (arXiv:2004.05498).
With the discrete Fourier transform F = A * exp(i P) of a channel,

    x_(s->t) = F^-1( (M_beta * A_t + (1 - M_beta) * A_s) * exp(i P_s) )

M_beta is 1 in the centred square |u|, |v| <= b, b = floor(beta * min(H, W)), and 0 elsewhere. We follow the equation.
We differ in that beta = 0 leaves the picture alone, where the square of one frequency would still move its mean, and in
that only the half of the spectrum is computed that a real picture needs.

Nothing here reads or moves a label. Pictures are RGB of shape (H, W, 3), uint8 or float32, of 0 to 255; the answer has
the picture's own type and is cut to that range, uint8 rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Picture = TypeVar("Picture", NDArray[np.uint8], NDArray[np.float32])
FLAT = 0.1
"""A channel whose standard deviation in Lab is at most this has no contrast to stretch, only rounding: a grey picture
has about 0.02 in a* and b*."""


@dataclass(frozen=True)
class ColourStats:
    """Mean and standard deviation of L*, a*, b*, float64 (3,) each; L* of 0 to 100, a* and b* of about -110 to 110."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ColourStats):
            return NotImplemented
        return bool(np.array_equal(self.mean, other.mean) and np.array_equal(self.std, other.std))

    def __hash__(self) -> int:
        return hash((self.mean.tobytes(), self.std.tobytes()))


def check_picture(image: NDArray[Any], name: str = "image") -> None:
    """Refuse what is no RGB picture.

    Raises:
        ValueError: it is not uint8 or float32 of shape (H, W, 3).
    """
    if not isinstance(image, np.ndarray) or image.dtype not in (np.uint8, np.float32):
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"{name} must be an array of uint8 or float32, got {kind}: convert it with astype")
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(
            f"{name} must be an RGB picture of shape (H, W, 3), got {image.shape}: "
            "bring grey and RGBA pictures to three channels first (alimm.datasets.loading.to_rgb)"
        )


def to_lab(image: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
    """RGB of 0 to 255 to CIE L*a*b* (D65), float32 (H, W, 3)."""
    import cv2

    return np.asarray(cv2.cvtColor(image.astype(np.float32) / np.float32(255), cv2.COLOR_RGB2LAB), np.float32)


def from_lab(lab: NDArray[np.float32]) -> NDArray[np.float32]:
    """CIE L*a*b* to RGB of 0 to 255, float32 (H, W, 3), not rounded. Back and forth is off by at most about 1."""
    import cv2

    return np.asarray(cv2.cvtColor(lab.astype(np.float32), cv2.COLOR_LAB2RGB), np.float32) * np.float32(255)


def as_type_of(values: NDArray[Any], image: Picture) -> Picture:
    """Cut values to 0 to 255 and give them the type of ``image``."""
    values = np.clip(values, 0, 255)
    if image.dtype == np.uint8:
        values = np.rint(values)
    return values.astype(image.dtype)


def colour_statistics(images: Picture | Iterable[Picture]) -> ColourStats:
    """Mean and standard deviation in Lab over every pixel of one picture or of several.

    Args:
        images: one picture (H, W, 3) or any number of them, of any sizes; a larger one counts for more.

    Raises:
        ValueError: there is no picture, or one is not RGB.
    """
    pictures: Iterable[Any] = [images] if isinstance(images, np.ndarray) and images.ndim == 3 else images
    each, pixels = [], []
    for number, image in enumerate(pictures):
        check_picture(image, f"image {number}")
        lab = to_lab(image).reshape(-1, 3).astype(np.float64)
        each.append(ColourStats(lab.mean(axis=0), lab.std(axis=0)))
        pixels.append(len(lab))
    return pool_statistics(each, pixels)


def pool_statistics(each: Sequence[ColourStats], pixels: Sequence[int]) -> ColourStats:
    """The statistics of several pictures together, from those of each and its number of pixels.

    Raises:
        ValueError: there is no picture.
    """
    if len(each) == 0:
        raise ValueError("colour statistics need at least one picture, got none")
    if len(each) == 1:
        return each[0]
    means, stds = np.stack([stats.mean for stats in each]), np.stack([stats.std for stats in each])
    mean = np.average(means, axis=0, weights=pixels)
    variance = np.average(np.square(stds) + np.square(means - mean), axis=0, weights=pixels)
    return ColourStats(mean, np.sqrt(variance))


def match_colour(
    image: Picture, stats_target: ColourStats, stats_image: ColourStats | None = None, strength: float = 1.0
) -> Picture:
    """Give a picture the colour statistics of a style.

    Args:
        image: RGB (H, W, 3).
        stats_target: of the style.
        stats_image: what is brought onto ``stats_target``: by default the picture's own statistics. Those of a whole
            domain keep the differences between its pictures.
        strength: 0 leaves the picture alone, 1 matches fully; in between the shares mix in Lab.

    Raises:
        ValueError: the picture is not RGB, or the strength not of 0 to 1.
    """
    check_picture(image)
    if not 0 <= strength <= 1:
        raise ValueError(f"match_colour: strength must be between 0 and 1, got {strength!r}")
    if strength == 0:
        return image.copy()
    source = colour_statistics([image]) if stats_image is None else stats_image
    if source == stats_target:
        return image.copy()
    gain = np.where(source.std > FLAT, stats_target.std / np.maximum(source.std, FLAT), 1.0)
    gain = 1 + strength * (gain - 1)
    centre = source.mean + strength * (stats_target.mean - source.mean)
    lab = (to_lab(image) - source.mean.astype(np.float32)) * gain.astype(np.float32) + centre.astype(np.float32)
    return as_type_of(from_lab(lab), image)


def half_width(size: tuple[int, int], beta: float) -> int:
    """Half-width b of the swapped square for a picture of (height, width): floor(beta * min(height, width)).

    Raises:
        ValueError: beta is not of 0 to 0.5.
    """
    if not 0 <= beta <= 0.5:
        raise ValueError(f"beta must be between 0 and 0.5, the share of the shorter side, got {beta!r}")
    # floor(0.29 * 100) must be 29, although the product of these doubles is 28.999999999999996
    return int(np.floor(round(beta * min(size), 9)))


def low_frequency_amplitude(image: Picture, beta: float) -> NDArray[np.float32]:
    """Amplitudes of the frequencies |u|, |v| <= b, divided by H * W: at [b, 0] stands the channel's mean.

    Returns:
        float32 (2 b + 1, b + 1, 3): rows are v = -b to b, columns u = 0 to b. The other half mirrors it.

    Raises:
        ValueError: the picture is not RGB, or beta not of 0 to 0.5.
    """
    check_picture(image)
    height, width = image.shape[:2]
    half = half_width((height, width), beta)
    spectrum = np.fft.rfft2(image.astype(np.float32), axes=(0, 1))
    rows = np.arange(-half, half + 1) % height
    return (np.abs(spectrum[rows, : half + 1]) / (height * width)).astype(np.float32)


def fda(
    image: Picture,
    reference: NDArray[Any] | None = None,
    beta: float = 0.01,
    amplitude: NDArray[np.float32] | None = None,
) -> Picture:
    """Give a picture the low-frequency amplitudes of a style and keep its phases.

    Args:
        image: RGB (H, W, 3).
        reference: RGB picture of the style; one of another size is resized to that of ``image`` first.
        beta: half-width of the swapped square as a share of the shorter side, of 0 (nothing) to 0.5. Below one
            frequency only the mean is swapped.
        amplitude: in place of ``reference``, what `low_frequency_amplitude` gave for this beta; of shape
            (2 b + 1, b + 1, 3) with the b of ``image``.

    Raises:
        ValueError: neither or both of reference and amplitude are given, or one of them does not fit.
    """
    check_picture(image)
    height, width = image.shape[:2]
    half = half_width((height, width), beta)
    if (reference is None) == (amplitude is None):
        raise ValueError("fda needs either a reference picture or an amplitude, and not both")
    if beta == 0:
        return image.copy()
    if reference is not None:
        check_picture(reference, "reference")
        amplitude = low_frequency_amplitude(resize_to(reference, (height, width)), beta)
    assert amplitude is not None
    if amplitude.shape != (2 * half + 1, half + 1, 3):
        raise ValueError(
            f"beta={beta:g} on a picture of {height}x{width} needs an amplitude of shape "
            f"{(2 * half + 1, half + 1, 3)}, got {amplitude.shape}: take it at the same size, or give the reference"
        )
    spectrum = np.fft.rfft2(image.astype(np.float32), axes=(0, 1))
    rows = np.arange(-half, half + 1) % height
    phases = np.exp(1j * np.angle(spectrum[rows, : half + 1]))
    spectrum[rows, : half + 1] = amplitude * (height * width) * phases
    return as_type_of(np.fft.irfft2(spectrum, s=(height, width), axes=(0, 1)), image)


def resize_to(image: Picture, size: tuple[int, int]) -> Picture:
    """Resize a picture to (height, width), averaging where it shrinks; the picture itself where it fits."""
    import cv2

    if image.shape[:2] == size:
        return image
    shrinks = image.shape[0] >= size[0] and image.shape[1] >= size[1]
    way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized: Picture = np.asarray(cv2.resize(image, (size[1], size[0]), interpolation=way), image.dtype)
    return resized
