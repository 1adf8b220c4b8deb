"""Hamming distances on an NVIDIA GPU, in Numba CUDA: bit by bit what ``hamming_reference.py`` gives.

The functions launch the kernels of ``hamming_cuda_kernels.py`` and wait for nothing. They take arrays of the device
(anything with ``__cuda_array_interface__``, so torch tensors too; NumPy arrays in Numba's simulator) and write into
arrays that the caller made. They have never run on a GPU: their tests are the simulator and the compiler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

try:
    # The simulator replaces the global name "cuda" while a kernel runs: it is imported at the top of a module.
    from numba import cuda
except (ImportError, RuntimeError) as error:  # numba-cuda without a CUDA runtime to load is a RuntimeError
    raise ImportError(
        "alimm_ops.graph.hamming_cuda needs numba_cuda and the CUDA libraries it loads, which are not installed. "
        "Install it with: pip install 'alimm[cuda]'",
        name="numba_cuda",
    ) from error

from alimm_ops.graph import hamming_cuda_kernels as kernels
from alimm_ops.graph.hamming_reference import MAX_WORDS

MAX_BLOCKS = 1 << 16
"""Of any launch: kernels stride over their input."""


def hamming_matrix(queries: Any, base: Any, distances: Any, stream: int | None = None) -> None:
    """All distances.

    Args:
        queries: uint64 (Q, W).
        base: uint64 (N, W).
        distances: uint16 (Q, N), written.
        stream: address of the CUDA stream.

    Raises:
        ValueError: a shape or dtype is wrong.
    """
    queries, base = as_pair("queries", queries, "base", base)
    distances = as_array("distances", distances, np.uint16, (len(queries), len(base)))
    _launch_matrix(queries, base, distances, as_stream(stream))


def nearest(
    queries: Any,
    base: Any,
    k: int,
    first_own: int,
    work: Any,
    ids: Any,
    dists: Any,
    stream: int | None = None,
) -> None:
    """The k nearest codes of each query, exactly; see `alimm_ops.graph.hamming_reference.nearest`.

    Args:
        queries: uint64 (Q, W).
        base: uint64 (N, W), fewer than 2**31 codes.
        k: from 1 to 256; more than N pads with (-1, 65535).
        first_own: where not -1, query q is code ``first_own + q`` of the base and is left out of its own row.
        work: uint16, at least max(N, 1) elements: scratch memory for the distances of as many queries at a time as fit.
        ids: int32 (Q, k), written.
        dists: uint16 (Q, k), written.
        stream: address of the CUDA stream.

    Raises:
        ValueError: a size or dtype is wrong.
    """
    queries, base = as_pair("queries", queries, "base", base)
    num_queries, num_base = len(queries), len(base)
    check_k("k", k)
    if num_base >= 2**31:
        raise ValueError(f"base holds {num_base} codes, at most 2**31 - 1 fit an index: use shards")
    work = as_array("work", work, np.uint16, (None,))
    if work.size < max(num_base, 1):
        raise ValueError(f"work must have at least {max(num_base, 1)} elements, got {work.size}")
    ids = as_array("ids", ids, np.int32, (num_queries, k))
    dists = as_array("dists", dists, np.uint16, (num_queries, k))
    on = as_stream(stream)
    chunk = work.size // num_base if num_base else num_queries
    for start in range(0, num_queries, max(chunk, 1)):
        end = min(start + chunk, num_queries)
        if num_base:
            distances = work[: (end - start) * num_base].reshape(end - start, num_base)
            _launch_matrix(queries[start:end], base, distances, on)
        own = first_own + start if first_own >= 0 else -1
        kernels.nearest_kernel[(*grid_of(end - start), on)](work, num_base, k, own, ids[start:end], dists[start:end])


def majority_work(num_centres: int, words: int) -> int:
    """Elements of scratch memory that `majority` needs.

    Args:
        num_centres: M.
        words: W.
    """
    return num_centres * (words * 64 + 1)


def majority(
    codes: Any,
    labels: Any,
    old_centres: Any,
    work: Any,
    new_centres: Any,
    counts: Any,
    stream: int | None = None,
) -> None:
    """One step of binary k-means; see `alimm_ops.graph.hamming_reference.majority`.

    Args:
        codes: uint64 (N, W), fewer than 2**31 codes.
        labels: int32 (N,), centre of each; a code whose label is not in [0, M) belongs to none.
        old_centres: uint64 (M, W); a tie keeps the old bit, an empty centre all of them.
        work: int32, at least ``majority_work(M, W)`` elements: scratch memory.
        new_centres: uint64 (M, W), written; may be ``old_centres``.
        counts: int64 (M,), written: how many codes each has.
        stream: address of the CUDA stream.

    Raises:
        ValueError: a size or dtype is wrong.
    """
    codes, old_centres = as_pair("codes", codes, "old_centres", old_centres)
    num_centres, words = old_centres.shape
    if len(codes) >= 2**31:
        raise ValueError(f"a step takes fewer than 2**31 codes, got {len(codes)}: use a sample of them")
    labels = as_array("labels", labels, np.int32, (len(codes),))
    new_centres = as_array("new_centres", new_centres, np.uint64, (num_centres, words))
    counts = as_array("counts", counts, np.int64, (num_centres,))
    work, on = as_work(work, majority_work(num_centres, words)), as_stream(stream)
    if not num_centres:
        return
    sizes, ones = work[:num_centres], work[num_centres:]
    kernels.clear_kernel[(*threads_of(work.size), on)](work)
    if len(codes):
        grid = (*threads_of(len(codes) * words * 64), on)
        kernels.ones_kernel[grid](codes, labels, num_centres, ones, sizes)
    kernels.majority_kernel[(*threads_of(num_centres * words), on)](old_centres, ones, sizes, new_centres, counts)


def _launch_matrix(queries: Any, base: Any, distances: Any, on: Any) -> None:
    tiles = -(-len(queries) // kernels.TILE) * -(-len(base) // kernels.TILE)
    if tiles:
        kernels.matrix_kernel[(*grid_of(tiles), on)](queries, base, distances)


def as_array(name: str, x: Any, dtype: DTypeLike, shape: tuple[int | None, ...]) -> Any:
    """The array as Numba sees it, without waiting for its stream: which stream is in order, the caller knows.

    Args:
        name: for the message.
        x: an array of the device, or of NumPy in the simulator.
        dtype: it must have.
        shape: it must have; None stands for any length.

    Raises:
        ValueError: the dtype or shape is another.
    """
    array = cuda.as_cuda_array(x, sync=False) if hasattr(x, "__cuda_array_interface__") else x
    fits = len(array.shape) == len(shape) and all(b in (a, None) for a, b in zip(array.shape, shape, strict=True))
    if array.dtype != dtype or not fits:
        wanted = "(" + ", ".join("any" if length is None else str(length) for length in shape) + ")"
        raise ValueError(
            f"{name} must be {np.dtype(dtype)} of shape {wanted}, got {array.dtype} of shape {tuple(array.shape)}"
        )
    return array


def as_pair(name: str, x: Any, other_name: str, other: Any) -> tuple[Any, Any]:
    """Two arrays of codes of one width.

    Raises:
        ValueError: they are not.
    """
    first, second = as_codes(name, x), as_codes(other_name, other)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"{name} have {first.shape[1]} words, {other_name} has {second.shape[1]}: encode both alike")
    return first, second


def as_codes(name: str, x: Any) -> Any:
    """An array of codes.

    Raises:
        ValueError: it is not uint64 of shape (count, 1 to 16).
    """
    codes = as_array(name, x, np.uint64, (None, None))
    if not 1 <= codes.shape[1] <= MAX_WORDS:
        raise ValueError(f"{name} must have 1 to {MAX_WORDS} words of 64 bits, got {codes.shape[1]}")
    return codes


def as_work(x: Any, size: int) -> Any:
    """The first ``size`` elements of scratch memory, int32.

    Raises:
        ValueError: it is too small.
    """
    work = as_array("work", x, np.int32, (None,))
    if work.size < size:
        raise ValueError(f"work must have at least {size} elements, got {work.size}")
    return work[:size]


def as_stream(address: int | None) -> Any:
    """The stream for a launch."""
    return cuda.external_stream(address) if address else 0


def check_k(name: str, k: int) -> None:
    """Raise ValueError unless a block can keep k entries."""
    if not 1 <= k <= kernels.MAX_K:
        raise ValueError(f"{name} must be from 1 to {kernels.MAX_K} on the device, got {k}: use the CPU kernels")


def grid_of(tasks: int) -> tuple[int, int]:
    """Blocks and threads of a launch in which a block does a task at a time."""
    return min(max(tasks, 1), MAX_BLOCKS), kernels.THREADS


def threads_of(tasks: int) -> tuple[int, int]:
    """Blocks and threads of a launch in which a thread does a task at a time."""
    return grid_of(-(-tasks // kernels.THREADS))
