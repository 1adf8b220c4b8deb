"""Unit rows, their similarity, and how far a matrix product in low precision may be from it.

The similarity s of two unit rows x, y is defined to the bit in ``alimm_ops.graph.topk_reference``; here it is in torch.
The score h that a matrix product gives for them is bounded as follows. Let x', y' be the rows rounded to bf16 or fp16
(float32: as they are), d_x = ||x - x'|| and d_y = ||y - y'|| the actual lengths of the rounding errors::

    |<x', y'> - <x, y>|  = |<x' - x, y> + <x', y' - y>|  <=  d_x ||y|| + ||x'|| d_y          Cauchy and Schwarz
    |a - <x', y'>|      <=  g ||x'|| ||y'||,   g = m u / (1 - m u)                           a: the sum in float32
    |h - a|             <=  half the distance of h to its neighbour in the output type       (`output_slack`)
    |s - <x, y>|        <=  2^-24 + 2^-40                                                    one rounding to float32

with m = W + 8 operations in any order and u = 2^-23, which admits truncation as well as rounding; products and sums
that are flushed to zero add less than 2^-100. `tolerance` is the sum of all but the third. The lengths d are those of
the rows at hand, for bf16 about 2^-9.3, where the largest error of a single number would give 2^-8.

A user cannot see how a library multiplies, so the bound is also checked on every pair whose similarity is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numba
import torch
from llvmlite import binding
from torch import Tensor

from alimm_ops.graph.topk_reference import LANES, padded_width

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
_DIGITS = {"bf16": 8, "fp16": 11}
_CHUNK = 1 << 15
ROUNDING = 2.0**-24 + 2.0**-40
"""The last line above."""


def lane_sum(products: Tensor) -> Tensor:
    """``topk_reference.lane_sum`` in torch: float64, last axis a multiple of eight."""
    lanes = products.new_zeros((*products.shape[:-1], LANES))
    for start in range(0, products.shape[-1], LANES):
        lanes += products[..., start : start + LANES]
    pairs = lanes[..., 0::2] + lanes[..., 1::2]
    fours = pairs[..., 0::2] + pairs[..., 1::2]
    return fours[..., 0] + fours[..., 1]


def similarity(x_NW: Tensor, y_NW: Tensor) -> Tensor:
    """``topk_reference.similarity`` in torch: float32, pair by pair; the shapes broadcast but for the last axis."""
    return lane_sum(x_NW.double() * y_NW.double()).float().clamp_(-1, 1) + 0.0


def unit_rows(rows_ND: Tensor) -> Tensor:
    """Rows of length one, float32 (N, W), as ``topk_reference.unit_rows``.

    Args:
        rows_ND: floating, finite.
    """
    width = padded_width(rows_ND.shape[1])
    units = rows_ND.new_zeros((len(rows_ND), width), dtype=torch.float32)
    for start in range(0, len(rows_ND), _CHUNK):
        wide = rows_ND.new_zeros((min(_CHUNK, len(rows_ND) - start), width), dtype=torch.float64)
        wide[:, : rows_ND.shape[1]] = rows_ND[start : start + _CHUNK]
        length = lane_sum(wide * wide).sqrt_()
        units[start : start + _CHUNK] = wide / torch.where(length > 0, length, 1.0)[:, None]
    return units


def first_bad_row(rows_ND: Tensor) -> int | None:
    """The first row with NaN or infinity; None where all are finite."""
    for start in range(0, len(rows_ND), _CHUNK):
        bad = ~torch.isfinite(rows_ND[start : start + _CHUNK]).all(1)
        if bad.any():
            return start + int(bad.nonzero()[0])
    return None


def rounding_errors(units_NW: Tensor, precision: str) -> Tensor:
    """``||x - x'||`` of each row, float64 (N,)."""
    errors = units_NW.new_zeros(len(units_NW), dtype=torch.float64)
    if precision in _DIGITS:
        for start in range(0, len(units_NW), _CHUNK):
            part = units_NW[start : start + _CHUNK]
            errors[start : start + _CHUNK] = (part.double() - part.to(DTYPES[precision]).double()).norm(dim=1)
    return errors


def tolerance(errors_Q: Tensor, largest: float, width: int, precision: str) -> Tensor:
    """How far a score may be from the similarity, the rounding of its output not counted; float64 (Q,).

    Args:
        errors_Q: `rounding_errors` of the queries.
        largest: the largest of all rows that they are compared with.
        width: of the unit rows.
        precision: of the product.
    """
    length = 1 + 2.0**-22  # of a unit row, and room for the rounding of this very formula
    unit = 2.0**-52 if precision == "fp64" else 2.0**-23
    growth = (width + 8) * unit / (1 - (width + 8) * unit)
    rounded_Q, rounded = length + errors_Q, length + largest
    # Below 2^-14 the steps of fp16 no longer shrink.
    least = 2.0**-25 if precision == "fp16" else 2.0**-100
    return length * (errors_Q * length + rounded_Q * largest + growth * rounded_Q * rounded) + ROUNDING + least


def output_slack(scores: Tensor, precision: str) -> Tensor:
    """Half the distance of each score to its neighbour in the type that the product was rounded to, float32."""
    if precision not in _DIGITS:
        return torch.zeros_like(scores)
    _, exponent = torch.frexp(scores)
    return torch.ldexp(torch.ones_like(scores), exponent - (_DIGITS[precision] + 1))


def choose_precision(precision: str, device: torch.device) -> str:
    """What ``'auto'`` stands for: fp16 on CUDA; on the CPU bf16 where it has instructions for it, else fp32."""
    if precision != "auto":
        if precision not in ("bf16", "fp16", "fp32"):
            raise ValueError(f"precision must be 'auto', 'bf16', 'fp16' or 'fp32', got {precision!r}")
        return precision
    if device.type == "cuda":
        return "fp16"
    features = binding.get_host_cpu_features()
    return "bf16" if features.get("avx512bf16") or features.get("amx-bf16") or features.get("bf16") else "fp32"


@contextlib.contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Float32 products are float32 (no TF32, no bf16 inside), sums of half products too; Numba uses torch's threads."""
    before = torch.get_float32_matmul_precision()
    half = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    brain = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    threads = numba.get_num_threads()
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = half
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = brain
        numba.set_num_threads(threads)
