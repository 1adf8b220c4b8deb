"""What a user can choose of INT8 training, in one place and checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

PRODUCTS = ("output", "grad_input", "grad_weight")
_CHOICES = {
    "clip": ("max", "paper", "closed_form", "histogram", "hindsight"),
    "grad_input": ("folded", "global"),
    "grad_weight": ("channel", "tensor"),
    "weight": ("tensor", "channel"),
    "rounding": ("stochastic", "nearest"),
    "signed": ("auto", "split", "narrow"),
    "backend": ("auto", "onednn", "int_mm", "fake"),
}


@dataclass
class Int8Options:
    """The switches of `alimm.Int8TrainingHook`; its docstring explains them.

    Raises:
        ValueError: a value is none of the choices, a pattern is no regular expression, or a number is out of range.
    """

    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    strict_all: bool = False
    products: Sequence[str] = PRODUCTS
    clip: str = "max"
    grad_input: str = "folded"
    grad_weight: str = "channel"
    weight: str = "tensor"
    rounding: str = "stochastic"
    grad_bits: int = 8
    signed: str = "auto"
    backend: str = "auto"
    planner: bool = True
    eval_int8: bool = False
    min_cosine: float = 0.5
    patience: int = 3
    bell_share: float = field(default=0.3)
    clip_k: float = 1.0
    clip_a: float = 0.8
    clip_alpha: float = 1.0
    max_shapes: int = 32

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):
                raise ValueError(
                    f"{name} is a list of regular expressions, got the string {patterns!r}: write [{patterns!r}]"
                )
            for pattern in patterns or ():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{name} holds {pattern!r}, which is no regular expression: {error}") from error
        unknown = [name for name in self.products if name not in PRODUCTS]
        if isinstance(self.products, str) or unknown:
            raise ValueError(f"products takes a list of {', '.join(map(repr, PRODUCTS))}, got {self.products!r}")
        if not 2 <= self.grad_bits <= 8:
            raise ValueError(f"grad_bits must lie in 2..8, got {self.grad_bits}")
        if not 0 < self.clip_k * self.clip_a < 2:
            raise ValueError(
                f"the recursion of the clip is stable for 0 < clip_k * clip_a < 2, got {self.clip_k} * {self.clip_a}"
            )
        if self.patience < 1 or self.max_shapes < 1:
            raise ValueError(f"patience and max_shapes must be at least 1, got {self.patience} and {self.max_shapes}")

    @property
    def grad_qmax(self) -> int:
        """Largest integer of a quantised gradient."""
        return 2 ** (self.grad_bits - 1) - 1
