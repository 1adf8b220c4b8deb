"""Named random streams: every random choice is drawn from (run seed, stream name, indices), never from a shared state.

Two runs with the same seed make the same choices whatever was drawn in between, so a resumed run equals an
uninterrupted one, and rank r of N draws what it would draw alone.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def stream_seed(seed: int, name: str, *indices: int) -> int:
    """A 63-bit seed for the stream ``name`` at ``indices`` (epoch, iteration, rank, ...), equal on every platform."""
    text = f"{seed}/{name}/" + "/".join(str(index) for index in indices)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_stream(seed: int, name: str, *indices: int) -> np.random.Generator:
    """A NumPy generator of the stream."""
    return np.random.default_rng(stream_seed(seed, name, *indices))


def seed_everything(seed: int, name: str, *indices: int) -> None:
    """Set the global states of ``random``, NumPy and torch from the stream, for code that draws from those."""
    value = stream_seed(seed, name, *indices)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
