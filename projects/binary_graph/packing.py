"""Binary codes: bits packed into 64-bit words, and the check of what a user hands in as codes.

Bit ``b`` of word ``w`` is bit ``64 * w + b`` of the code, so the bytes of a little-endian word are the code's bytes in
order. Codes are uint64 of shape (N, W), C-contiguous, with 1 to 16 words: 64 to 1024 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 64
MAX_WORDS = 16

_BYTES = WORD_BITS // 8
_BLOCK = 65536  # rows packed at a time: their bytes stay in the cache


def words_of(bits: int) -> int:
    """Number of 64-bit words of a code.

    Raises:
        ValueError: ``bits`` is not a multiple of 64 from 64 to 1024.
    """
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer):
        raise ValueError(f"bits must be a whole number, got {bits!r}")
    if bits % WORD_BITS or not WORD_BITS <= bits <= WORD_BITS * MAX_WORDS:
        raise ValueError(
            f"a code has a multiple of {WORD_BITS} bits from {WORD_BITS} to {WORD_BITS * MAX_WORDS}, got {bits}; "
            "pad shorter codes with columns of zeros"
        )
    return int(bits) // WORD_BITS


def pack_bits(bits: NDArray[Any]) -> NDArray[np.uint64]:
    """Pack one bit per element into codes.

    Args:
        bits: shape (N, B), boolean or integers 0 and 1; B a multiple of 64 from 64 to 1024.

    Returns:
        Codes, uint64 of shape (N, B / 64).

    Raises:
        ValueError: another shape or type, or an integer that is neither 0 nor 1.
    """
    bits = np.asarray(bits)
    if bits.ndim != 2:
        raise ValueError(f"bits must have the shape (count, bits), got {bits.shape}; one code is bits[None]")
    if bits.dtype.kind not in "biu":
        raise ValueError(f"bits must be boolean or 0 and 1, got {bits.dtype}; threshold first, for example values > 0")
    count, width = bits.shape
    out = np.empty((count, words_of(width)), dtype="<u8")
    raw = out.view(np.uint8)
    for start in range(0, count, _BLOCK):
        block = bits[start : start + _BLOCK]
        if block.dtype.kind != "b":
            bad = np.flatnonzero(((block != 0) & (block != 1)).any(axis=1))
            if len(bad):
                raise ValueError(f"bits row {start + bad[0]} holds a value other than 0 and 1; threshold first")
        raw[start : start + _BLOCK] = np.packbits(block.astype(np.bool_, copy=False), axis=1, bitorder="little")
    return out.astype(np.uint64, copy=False)


def unpack_bits(codes: NDArray[Any], bits: int | None = None) -> NDArray[np.bool_]:
    """Unpack codes into one boolean per bit.

    Args:
        codes: what ``check_codes`` takes.
        bits: how many of the leading bits to return; None: all of them.

    Returns:
        Booleans of shape (N, bits).

    Raises:
        ValueError: bad codes, or ``bits`` not from 0 to 64 W.
    """
    codes = check_codes("codes", codes)
    limit = codes.shape[1] * WORD_BITS
    bits = limit if bits is None else int(bits)
    if not 0 <= bits <= limit:
        raise ValueError(f"bits must be from 0 to {limit} for codes of {codes.shape[1]} words, got {bits}")
    raw = codes.astype("<u8", copy=False).view(np.uint8)
    return np.unpackbits(raw, axis=1, count=bits, bitorder="little").view(np.bool_)


def check_codes(name: str, codes: NDArray[Any], words: int | None = None) -> NDArray[np.uint64]:
    """Return ``codes`` as the contiguous uint64 array of the conventions; no copy if they are one already.

    Args:
        name: what they are, for the message.
        codes: uint64 of shape (N, W) in any byte order and stride, or their bytes: uint8 of shape (N, 8 W), each word
            little-endian, the order of ``numpy.packbits(..., bitorder='little')``.
        words: the width that is required, None: any from 1 to 16.

    Returns:
        Codes in native byte order, uint64 of shape (N, W). They may share memory with the argument.

    Raises:
        ValueError: another shape, type or width.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2:
        raise ValueError(f"{name} must have the shape (count, words), got {codes.shape}; one code is {name}[None]")
    if codes.dtype == np.uint8:
        width, rest = divmod(codes.shape[1], _BYTES)
        if rest:
            raise ValueError(
                f"{name} given as bytes must have a multiple of {_BYTES} of them a row, got {codes.shape[1]}; "
                "pad with columns of zeros"
            )
    elif codes.dtype.kind == "u" and codes.dtype.itemsize == _BYTES:
        width = codes.shape[1]
    else:
        mend = "pack_bits makes them of booleans"
        if codes.dtype == np.int64:
            mend = f"if their bits are the codes, give {name}.view(np.uint64)"
        raise ValueError(
            f"{name} must be uint64 of shape (count, words) or uint8 of shape (count, 8 * words), got {codes.dtype}; "
            f"{mend}"
        )
    if words is not None and width != words:
        raise ValueError(f"{name} have {width * WORD_BITS} bits, the index has {words * WORD_BITS}")
    if not 1 <= width <= MAX_WORDS:
        raise ValueError(f"{name} must have 1 to {MAX_WORDS} words of {WORD_BITS} bits, got {width}")
    if codes.dtype == np.uint8:
        codes = np.ascontiguousarray(codes).view("<u8")
    return np.ascontiguousarray(codes, dtype=np.uint64)
