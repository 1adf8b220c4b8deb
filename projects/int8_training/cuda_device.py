"""The kernels of ``alimm_ops.quantize.cuda`` on torch tensors, in torch's current stream. It has never run on a GPU."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from alimm_ops.quantize import cuda


def _stream(like: torch.Tensor) -> int:
    address: int = torch.cuda.current_stream(like.device).cuda_stream
    return address


def tensor_range(x: torch.Tensor) -> tuple[float, bool, bool]:
    """See `alimm_ops.quantize.cpu.tensor_range`; waits for the result."""
    out_2 = torch.zeros(2, dtype=torch.int32, device=x.device)
    cuda.tensor_range(x, out_2, _stream(x))
    amax, negative, finite = cuda.decode_range(out_2.cpu().numpy())
    return float(amax), negative, finite


def channel_stats(
    x_RC: torch.Tensor, threshold_C: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], bool]:
    """See `alimm_ops.quantize.cpu.channel_stats`; waits for the result."""
    rows, channels = x_RC.shape
    chunks, _ = cuda.stats_chunks(rows)
    place = x_RC.device
    work = torch.empty(4, max(1, chunks), channels, dtype=torch.float64, device=place)
    amax_C = torch.empty(channels, device=place)
    sum_C, squares_C = torch.empty(2, channels, dtype=torch.float64, device=place)
    count_C = torch.empty(channels, dtype=torch.int64, device=place)
    threshold = torch.from_numpy(np.ascontiguousarray(threshold_C, np.float32)).to(place)
    cuda.channel_stats(x_RC, threshold, work, amax_C, sum_C, squares_C, count_C, _stream(x_RC))
    amax = amax_C.cpu().numpy()
    return amax, sum_C.cpu().numpy(), squares_C.cpu().numpy(), count_C.cpu().numpy(), bool(np.isfinite(amax).all())


def quantize(
    x_RC: torch.Tensor,
    inverse_C: NDArray[np.float32],
    qmax: int,
    signed_RC: torch.Tensor,
    seeds: tuple[int, int] | None,
) -> None:
    """See `alimm_ops.quantize.cpu.quantize`; writes signed bytes."""
    inverse = torch.from_numpy(inverse_C).to(x_RC.device)
    cuda.quantize(x_RC, inverse, qmax, signed_RC=signed_RC, seeds=seeds, stream=_stream(x_RC))
