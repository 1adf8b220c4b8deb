"""A fixed permutation of class ids, so that classes which belong together do not lie on one rank.

Data sets number their classes by category; a batch and its neighbours would then keep one rank busy and leave the
others idle. A Feistel network on the next even power of two is a bijection that needs no table: four rounds of

    (L, R) -> (R, L xor f(R, key_r)),   f: multiply, xor-shift

and values outside [0, N) are sent through it again until they fall inside (cycle walking; Black and Rogaway, Ciphers
with Arbitrary Finite Domains, CT-RSA 2002). It is fixed by (num_classes, seed), so a checkpoint stores two numbers.
"""

from __future__ import annotations

import torch

from alimm.seeding import stream_seed

KINDS = ("hash", "none")
_ROUNDS = 4
_MASK31 = (1 << 31) - 1


class ClassPermutation:
    """Class ids to rows of the classifier and back; both are whole numbers in [0, num_classes).

    Args:
        num_classes: N, at least 1 and below 2**60.
        seed: chooses the permutation.
        kind: ``'hash'``, or ``'none'`` for the identity.
    """

    def __init__(self, num_classes: int, seed: int = 0, kind: str = "hash") -> None:
        if kind not in KINDS:
            raise ValueError(f"the permutation of classes must be one of {', '.join(KINDS)}, got {kind!r}")
        if not 1 <= num_classes < 1 << 60:
            raise ValueError(f"num_classes must be from 1 to 2**60 - 1, got {num_classes}")
        # The identity has no seed; two of them are equal.
        self.num_classes, self.seed, self.kind = num_classes, seed if kind == "hash" else 0, kind
        self._half = max(1, ((num_classes - 1).bit_length() + 1) // 2)
        self._keys = [stream_seed(seed, "class_permutation", index) & _MASK31 for index in range(_ROUNDS)]

    def rows(self, class_ids: torch.Tensor) -> torch.Tensor:
        """Rows of classes, int64, the shape of ``class_ids``. Values outside [0, num_classes) are not allowed."""
        return self._walk(class_ids, self._forward)

    def classes(self, rows: torch.Tensor) -> torch.Tensor:
        """Classes of rows: the inverse of `rows`."""
        return self._walk(rows, self._backward)

    def _walk(self, values: torch.Tensor, step: object) -> torch.Tensor:
        assert callable(step)
        values = values.to(torch.int64)
        if self.kind == "none":
            return values
        result = step(values)
        outside = result >= self.num_classes
        while bool(outside.any()):
            result[outside] = step(result[outside])
            outside = result >= self.num_classes
        return result

    def _round(self, right: torch.Tensor, key: int) -> torch.Tensor:
        # 31-bit factors: a product stays below 2**62, so int64 never overflows.
        mixed = ((right & _MASK31) ^ key) * 0x5BD1E995 & _MASK31
        mixed = (mixed ^ (mixed >> 15)) * 0x27D4EB2F & _MASK31
        mixed = mixed ^ (mixed >> 13)
        return mixed & ((1 << self._half) - 1)

    def _forward(self, values: torch.Tensor) -> torch.Tensor:
        left, right = values >> self._half, values & ((1 << self._half) - 1)
        for key in self._keys:
            left, right = right, left ^ self._round(right, key)
        return (left << self._half) | right

    def _backward(self, values: torch.Tensor) -> torch.Tensor:
        left, right = values >> self._half, values & ((1 << self._half) - 1)
        for key in reversed(self._keys):
            left, right = right ^ self._round(left, key), left
        return (left << self._half) | right
