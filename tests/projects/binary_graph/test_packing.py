"""Codes: which bit lies where, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alimm.projects.binary_graph.packing import check_codes, pack_bits, unpack_bits, words_of


def oracle(bits: np.ndarray) -> np.ndarray:
    codes = np.zeros((len(bits), bits.shape[1] // 64), np.uint64)
    for row, column in np.argwhere(bits).tolist():
        codes[row, column // 64] |= np.uint64(1) << np.uint64(column % 64)
    return codes


@given(st.integers(0, 20), st.integers(1, 16), st.integers(0, 2**32))
def test_bit_b_of_word_w_is_bit_64_w_plus_b(count, words, seed):
    bits = np.random.default_rng(seed).random((count, 64 * words)) < 0.5
    codes = pack_bits(bits)
    assert codes.dtype == np.uint64
    assert codes.flags.c_contiguous
    np.testing.assert_array_equal(codes, oracle(bits))
    np.testing.assert_array_equal(unpack_bits(codes), bits)
    np.testing.assert_array_equal(unpack_bits(codes, 64 * words - 3), bits[:, :-3])
    np.testing.assert_array_equal(pack_bits(np.asfortranarray(bits)), codes)


def test_many_rows_are_packed_in_blocks_and_integers_are_bits_too():
    bits = np.random.default_rng(0).random((70_001, 64)) < 0.3
    codes = pack_bits(bits)
    np.testing.assert_array_equal(unpack_bits(codes), bits)
    np.testing.assert_array_equal(pack_bits(bits.astype(np.int64)), codes)
    spoilt = bits.astype(np.int8)
    spoilt[66_000, 3] = -1
    with pytest.raises(ValueError, match="row 66000 holds a value other than 0 and 1"):
        pack_bits(spoilt)


def test_every_form_of_codes_is_the_same_codes():
    codes = np.random.default_rng(1).integers(0, 2**64, (9, 3), dtype=np.uint64)
    assert check_codes("codes", codes) is codes
    wide = np.zeros((18, 6), np.uint64)
    wide[::2, 1::2] = codes
    big = codes.astype(">u8")
    raw = codes.astype("<u8").view(np.uint8)
    for form in (
        wide[::2, 1::2],
        big,
        np.asfortranarray(codes),
        raw,
        np.asfortranarray(raw),
        np.repeat(raw, 2, 0)[::2],
    ):
        found = check_codes("codes", form, words=3)
        assert found.dtype == np.uint64
        assert found.dtype.isnative
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, codes)
    assert check_codes("codes", np.empty((0, 16), np.uint8)).shape == (0, 2)
    read_only = codes.copy()
    read_only.flags.writeable = False
    assert check_codes("codes", read_only) is read_only


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (
            np.zeros(4, np.uint64),
            r"queries must have the shape \(count, words\), got \(4,\); one .* queries\[None\]",
        ),
        (np.zeros((1, 2, 3), np.uint64), r"got \(1, 2, 3\)"),
        (np.zeros((3, 4), np.int64), "must be uint64 .* got int64"),
        (np.zeros((3, 4), np.float64), "got float64"),
        (np.zeros((3, 4), bool), "got bool; pack_bits makes them"),
        (np.zeros((3, 4), np.uint32), "got uint32"),
        (np.zeros((3, 12), np.uint8), "multiple of 8 of them a row, got 12"),
        (np.zeros((3, 0), np.uint64), "1 to 16 words of 64 bits, got 0"),
        (np.zeros((3, 0), np.uint8), "1 to 16 words of 64 bits, got 0"),
        (np.zeros((3, 17), np.uint64), "1 to 16 words of 64 bits, got 17"),
    ],
)
def test_other_codes_are_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        check_codes("queries", codes)


def test_another_width_is_named_in_bits():
    with pytest.raises(ValueError, match="queries have 128 bits, the index has 256"):
        check_codes("queries", np.zeros((1, 2), np.uint64), 4)
    with pytest.raises(ValueError, match="queries have 64 bits, the index has 256"):
        check_codes("queries", np.zeros((1, 8), np.uint8), 4)


def test_bits_that_cannot_be_packed_are_refused():
    with pytest.raises(ValueError, match=r"one code is bits\[None\]"):
        pack_bits(np.zeros(64, bool))
    with pytest.raises(ValueError, match="threshold first"):
        pack_bits(np.zeros((1, 64)))
    for width in (0, 63, 100, 1088):
        with pytest.raises(ValueError, match=f"multiple of 64 bits from 64 to 1024, got {width}"):
            pack_bits(np.zeros((1, width), bool))
    with pytest.raises(ValueError, match="whole number"):
        words_of(64.0)
    with pytest.raises(ValueError, match="from 0 to 64"):
        unpack_bits(np.zeros((1, 1), np.uint64), 65)
