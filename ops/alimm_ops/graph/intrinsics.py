# mypy: allow-untyped-defs
"""Instructions that Numba does not offer by itself: population count, comparison of many values at once, prefetch.

LLVM translates them for the processor it runs on: vectors of any width, and by a few plain instructions where there is
no single one.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 32
"""Distances that are held against a bound at a time."""


@intrinsic
def popcount(_context, word):
    """Number of bits that are 1, by one instruction."""
    if not isinstance(word, types.Integer):
        return None

    def generate(_context, builder, _signature, arguments):
        return builder.ctpop(arguments[0])

    return word(word), generate


@intrinsic
def within(_context, row, start, bound):
    """Bit j of the result says whether ``row[start + j] <= bound``, for 32 places that must be there (uint16)."""
    if not (isinstance(row, types.Array) and row.ndim == 1 and row.layout == "C" and row.dtype == types.uint16):
        return None

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(array.data, [arguments[1]])
        lanes = ir.VectorType(ir.IntType(16), LANES)
        values = builder.load(builder.bitcast(place, lanes.as_pointer()), align=2)
        single = builder.insert_element(ir.Constant(lanes, ir.Undefined), arguments[2], cgutils.int32_t(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        bounds = builder.shuffle_vector(single, ir.Constant(lanes, ir.Undefined), zeros)
        mask = builder.bitcast(builder.icmp_unsigned("<=", values, bounds), ir.IntType(LANES))
        return builder.zext(mask, ir.IntType(64))

    return types.uint64(row, types.int64, types.uint16), generate


@intrinsic
def lowest_bit(_context, word):
    """Place of the lowest bit that is 1; the word is not 0."""

    def generate(_context, builder, _signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@intrinsic
def prefetch(_context, array, index):
    """Ask for the first bytes of ``array[index]``, of a C-contiguous array; the index must be there."""
    if not (isinstance(array, types.Array) and array.ndim in (1, 2) and array.layout == "C"):
        return None

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        offset = arguments[1]
        if signature.args[0].ndim == 2:
            offset = builder.mul(offset, builder.extract_value(array.shape, 1))
        place = builder.gep(array.data, [offset])
        byte = builder.bitcast(place, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [byte.type, *[ir.IntType(32)] * 3])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [byte, *(ir.Constant(ir.IntType(32), value) for value in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate
