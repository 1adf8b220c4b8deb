"""Strong augmentation of pictures that leaves their geometry, and so their labels, alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.datasets.photometry import ColorJitter, RandomErasing, RandomGrayscale
from alimm.datasets.transforms import check_number, check_range, happens, log_uniform
from alimm.registry import TRANSFORMS

CHANNEL_ORDERS = ("bgr", "rgb")


@TRANSFORMS.register_module()
class StrongAugment:
    """Change colours, brightness and sharpness of ``img``, and blot parts out.

    For pipelines of MMSegmentation, after the loading: reads and writes ``img`` alone, uint8 (H, W, 3). In this order,
    each with its own probability: colour jitter, gamma, grey, blur, noise, blots. Blots cover the picture and not its
    label, so that the network must guess from what is around. Draws from Python's ``random``.

    Args:
        jitter: brightness, contrast, saturation and hue of `alimm.ColorJitter`.
        jitter_prob: of the jitter.
        gamma: range of the exponent of the brightness, drawn on a logarithmic scale; above 1 is darker.
        gamma_prob: of the gamma.
        grey_prob: of taking the colours away.
        sigma: range of the standard deviation of the blur in pixels.
        blur_prob: of the blur.
        noise: range of the standard deviation of the noise, in steps of 255.
        noise_prob: of the noise.
        blots: number of blots that are tried.
        blot_prob: of each blot.
        blot_area: range of a blot's share of the picture.
        fill: RGB colour of the blots, or ``'random'`` for noise.
        channel_order: of ``img``, ``'bgr'`` as MMSegmentation loads it or ``'rgb'``.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1),
        jitter_prob: float = 0.8,
        gamma: Sequence[float] = (0.5, 2.0),
        gamma_prob: float = 0.3,
        grey_prob: float = 0.1,
        sigma: Sequence[float] = (0.15, 1.15),
        blur_prob: float = 0.5,
        noise: Sequence[float] = (2.0, 12.0),
        noise_prob: float = 0.3,
        blots: int = 0,
        blot_prob: float = 0.5,
        blot_area: Sequence[float] = (0.005, 0.03),
        fill: Sequence[int] | str = (124, 116, 104),
        channel_order: str = "bgr",
    ) -> None:
        shares = tuple(jitter)
        if len(shares) != 4:
            raise ValueError(
                f"StrongAugment: jitter must be four numbers (brightness, contrast, saturation, hue), got {jitter!r}"
            )
        if isinstance(blots, bool) or not isinstance(blots, int) or blots < 0:
            raise ValueError(f"StrongAugment: blots must be a whole number of at least 0, got {blots!r}")
        if channel_order not in CHANNEL_ORDERS:
            raise ValueError(f"StrongAugment: channel_order must be 'bgr' or 'rgb', got {channel_order!r}")
        self.jitter = ColorJitter(shares[0], shares[1], shares[2], shares[3], jitter_prob)
        self.gamma = check_range(gamma, "StrongAugment: gamma", 0.01, 100.0)
        self.gamma_prob = check_number(gamma_prob, "StrongAugment: gamma_prob")
        self.grey = RandomGrayscale(grey_prob)
        self.sigma = check_range(sigma, "StrongAugment: sigma", 0.01, 100.0)
        self.blur_prob = check_number(blur_prob, "StrongAugment: blur_prob")
        self.noise = check_range(noise, "StrongAugment: noise", 0.0, 255.0)
        self.noise_prob = check_number(noise_prob, "StrongAugment: noise_prob")
        self.blots, self.blot = blots, RandomErasing(blot_prob, blot_area, fill=fill)
        self.channel_order = channel_order

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Change ``results['img']``.

        Raises:
            ValueError: there is no picture, or it is not uint8 of shape (H, W, 3).
        """
        img = results.get("img")
        if not isinstance(img, np.ndarray) or img.dtype != np.uint8 or img.ndim != 3 or img.shape[2] != 3:
            what = f"{img.dtype} of shape {img.shape}" if isinstance(img, np.ndarray) else type(img).__name__
            raise ValueError(
                f"StrongAugment: img must be uint8 of shape (H, W, 3), got {what}: put it after the loading, "
                "and before transforms that make floats"
            )
        rgb = self.apply(img if self.channel_order == "rgb" else np.ascontiguousarray(img[..., ::-1]))
        results["img"] = rgb if self.channel_order == "rgb" else np.ascontiguousarray(rgb[..., ::-1])
        return results

    def apply(self, img: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Change a picture, RGB uint8 (H, W, 3); ``img`` itself stays."""
        img = self._gamma(self.jitter.apply(img))
        img = self._noise(self._blur(self.grey.apply(img)))
        for _ in range(self.blots):
            img = self.blot.apply(img)
        return img

    def _gamma(self, img: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not happens(self.gamma_prob):
            return img
        table = 255 * (np.arange(256) / 255) ** log_uniform(*self.gamma)
        return np.rint(table).astype(np.uint8)[img]

    def _blur(self, img: NDArray[np.uint8]) -> NDArray[np.uint8]:
        import cv2

        if not happens(self.blur_prob):
            return img
        sigma = random.uniform(*self.sigma)
        return np.asarray(cv2.GaussianBlur(img, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE), np.uint8)

    def _noise(self, img: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if not happens(self.noise_prob):
            return img
        spread = random.uniform(*self.noise)
        noise = np.random.default_rng(random.getrandbits(63)).standard_normal(img.shape, np.float32)
        return np.clip(np.rint(img + spread * noise), 0, 255).astype(np.uint8)

    def __repr__(self) -> str:
        return (
            f"StrongAugment(jitter={self.jitter}, gamma={self.gamma}, gamma_prob={self.gamma_prob}, grey={self.grey}, "
            f"sigma={self.sigma}, blur_prob={self.blur_prob}, noise={self.noise}, noise_prob={self.noise_prob}, "
            f"blots={self.blots}, blot={self.blot}, channel_order={self.channel_order!r})"
        )
