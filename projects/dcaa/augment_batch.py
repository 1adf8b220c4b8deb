"""Changes of a whole batch on its device: strong colour augmentation, and ClassMix.

Both draw from a generator, by default torch's global one of the processor, and copy the numbers to the device of the
pictures: the choices are the same on every device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

LUMA = (0.299, 0.587, 0.114)
"""Share of red, green and blue in the brightness (ITU-R BT.601)."""


def strong_augment_batch(
    images_N3HW: Tensor,
    generator: Generator | None = None,
    jitter_prob: float = 0.8,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.05,
    blur_prob: float = 0.5,
    sigma: tuple[float, float] = (0.15, 1.15),
) -> Tensor:
    """Change colours and sharpness of each picture of its own; geometry and labels stay.

    In this order, for each picture: brightness times a factor, contrast about the mean brightness, saturation about the
    grey, hue as a rotation about the grey axis, blur. Differentiable in the pictures.

    Args:
        images_N3HW: RGB of 0 to 255, float (N, 3, H, W).
        generator: of the draws.
        jitter_prob: how often the colours of a picture change.
        brightness: b, the factor is of [1 - b, 1 + b]; likewise for contrast and saturation.
        contrast: see brightness.
        saturation: see brightness.
        hue: the colours turn by [-hue, hue] of the circle.
        blur_prob: how often a picture is blurred.
        sigma: range of the standard deviation of the blur in pixels.

    Returns:
        Pictures of the same shape and type, cut to 0 to 255.

    Raises:
        ValueError: the batch is not of that shape and type.
    """
    if images_N3HW.dim() != 4 or images_N3HW.shape[1] != 3 or not images_N3HW.is_floating_point():
        raise ValueError(
            f"strong_augment_batch needs float pictures (N, 3, H, W) of 0 to 255, got {images_N3HW.dtype} of shape "
            f"{tuple(images_N3HW.shape)}"
        )
    jittered = _jitter(images_N3HW, brightness, contrast, saturation, hue, jitter_prob, generator)
    return _blur(jittered, sigma, blur_prob, generator)


def class_mix(
    images_s: Tensor,
    labels_s: Tensor,
    images_t: Tensor,
    labels_t: Tensor,
    weights_t: Tensor,
    generator: Generator | None = None,
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor, Tensor]:
    """Paste half the classes of each source picture over the target picture of the same row.

    Tranheden et al., "DACS: Domain Adaptation via Cross-domain Mixed Sampling", WACV 2021 (arXiv:2007.08702). Of the n
    classes that a source label map shows, ceil(n / 2) are drawn, and with M = 1 on their pixels

        x = M x_s + (1 - M) x_t,    y = M y_s + (1 - M) y_t,    w = M + (1 - M) w_t

    We differ in that pixels without a label are never pasted; there the ignored label counts as a class.

    Args:
        images_s: (N, C, H, W).
        labels_s: ids of the classes, int64 (N, H, W).
        images_t: as ``images_s``.
        labels_t: pseudo labels, as ``labels_s``.
        weights_t: weight of each pixel, float (N, H, W).
        generator: of the draws.
        ignore_index: the label of pixels without one.

    Returns:
        Pictures, labels and weights, in the shapes of those of the target.

    Raises:
        ValueError: the shapes do not fit.
    """
    maps = (images_s.shape[0], *images_s.shape[2:])
    if images_s.shape != images_t.shape or any(one.shape != maps for one in (labels_s, labels_t, weights_t)):
        raise ValueError(
            "class_mix needs pictures (N, C, H, W) of one shape, and labels and weights (N, H, W); got "
            + ", ".join(str(tuple(one.shape)) for one in (images_s, labels_s, images_t, labels_t, weights_t))
        )
    pasted = torch.stack([_half_of_classes(labels, generator, ignore_index) for labels in labels_s])
    images = torch.where(pasted[:, None], images_s, images_t)
    return images, torch.where(pasted, labels_s, labels_t), weights_t.masked_fill(pasted, 1.0)


def _half_of_classes(labels_HW: Tensor, generator: Generator | None, ignore_index: int) -> Tensor:
    present = labels_HW.unique()
    present = present[present != ignore_index]
    turn = torch.randperm(len(present), generator=generator, device=_device(generator))
    chosen = present[turn[: (len(present) + 1) // 2].to(present.device)]
    return torch.isin(labels_HW, chosen)


def _device(generator: Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _uniform(like: Tensor, low: float, high: float, generator: Generator | None) -> Tensor:
    """One number a picture, (N, 1, 1, 1)."""
    drawn = torch.rand(len(like), generator=generator, device=_device(generator))
    return (low + (high - low) * drawn).to(like.device, like.dtype)[:, None, None, None]


def _grey(images: Tensor) -> Tensor:
    shares = images.new_tensor(LUMA)[None, :, None, None]
    return (images * shares).sum(dim=1, keepdim=True)


def _jitter(
    images: Tensor,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    prob: float,
    generator: Generator | None,
) -> Tensor:
    happens = _uniform(images, 0, 1, generator) < prob
    changed = (images * _uniform(images, 1 - brightness, 1 + brightness, generator)).clamp(0, 255)
    mean = _grey(changed).mean(dim=(2, 3), keepdim=True)
    changed = (mean + _uniform(images, 1 - contrast, 1 + contrast, generator) * (changed - mean)).clamp(0, 255)
    grey = _grey(changed)
    changed = (grey + _uniform(images, 1 - saturation, 1 + saturation, generator) * (changed - grey)).clamp(0, 255)
    turn = 2 * torch.pi * _uniform(images, -hue, hue, generator)
    return torch.where(happens, _turn_hue(changed, turn).clamp(0, 255), images)


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Rotate colours about the grey axis by an angle (N, 1, 1, 1): v cos + (k x v) sin + k (k v) (1 - cos)."""
    mean = images.mean(dim=1, keepdim=True)
    crossed = (images.roll(1, dims=1) - images.roll(-1, dims=1)) / 3**0.5
    return images * turn.cos() + crossed * turn.sin() + mean * (1 - turn.cos())


def _blur(images: Tensor, sigma: tuple[float, float], prob: float, generator: Generator | None) -> Tensor:
    count, channels, height, width = images.shape
    happens = _uniform(images, 0, 1, generator) < prob
    sigmas = _uniform(images, *sigma, generator).view(count, 1)
    radius = max(1, int(3 * sigma[1] + 0.5))
    steps = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernels = torch.exp(-0.5 * (steps / sigmas) ** 2)
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    stacked = images.reshape(1, count * channels, height, width)
    for shape, padding in (
        ((1, 2 * radius + 1), (radius, radius, 0, 0)),
        ((2 * radius + 1, 1), (0, 0, radius, radius)),
    ):
        padded = F.pad(stacked, padding, mode="replicate")
        stacked = F.conv2d(padded, kernels.view(count * channels, 1, *shape), groups=count * channels)
    return torch.where(happens, stacked.view_as(images), images)
