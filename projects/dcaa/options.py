"""Options of DCAA's self-training."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class SelfTraining:
    """How the target teaches itself.

    Attributes:
        threshold: tau, the confidence from which a pseudo label counts; one, one a class, or ``'q50'`` (ours): what
            half of the batch's pixels of a class reach, within 0.6 to 0.9.
        correlate: labels from all decoders through the attention, not from the fused head alone.
        ambivalence: weigh pixels by how much their prediction looks like one of the source.
        ambivalence_threshold: T_d between 0 and 1, or ``'q30'`` for the 30 % quantile of the batch. 0 keeps every pixel
            with a label, as released.
        hard_only: align the hard pixels alone; False aligns them all.
        weight: of the loss on pseudo labels.
        pseudo_on: ``'global'``: the fused head learns from pseudo labels; ``'all'``: the condition's decoder too.
        student: ``'weak'``: sees what the teacher sees; ``'strong'``: sees it strongly augmented; ``'mixed'``: sees it
            under half the classes of a source picture, strongly augmented.
        momentum: of the teacher, the weight of the new value; None and no interval freeze it.
        interval: copy the teacher anew every so many steps.
        batch_statistics: the teacher normalises by the batch, not by its running statistics.
    """

    threshold: float | Sequence[float] | str = 0.6
    correlate: bool = True
    ambivalence: bool = True
    ambivalence_threshold: float | str = 0.0
    hard_only: bool = True
    weight: float = 1.0
    pseudo_on: str = "global"
    student: str = "weak"
    momentum: float | None = None
    interval: int | None = None
    batch_statistics: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any], release_compat: bool = False) -> SelfTraining:
        """From a config.

        Raises:
            ValueError: an unknown option, or a value out of range.
        """
        known = [item.name for item in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(f"self_training has no option {name!r}.{hint} There are: {', '.join(known)}")
        made = cls(**options)
        made.check()
        if release_compat:
            if isinstance(made.threshold, str):
                raise ValueError("release_compat takes self_training.threshold as a number, not a quantile")
            for name in ("pseudo_on", "student", "momentum", "interval", "batch_statistics", "ambivalence_threshold"):
                if getattr(made, name) != getattr(cls, name):
                    raise ValueError(
                        f"release_compat trains as the released code does, where self_training.{name} is "
                        f"{getattr(cls, name)!r}: leave one of the two out"
                    )
        return made

    def check(self) -> None:
        """Raise ValueError for a value out of range."""
        if isinstance(self.threshold, str):
            if not re.fullmatch(r"q(\d{1,2}|100)", self.threshold):
                raise ValueError(
                    f"self_training.threshold is a number, one a class, or a quantile such as 'q50', got "
                    f"{self.threshold!r}"
                )
            values = []
        else:
            values = [self.threshold] if isinstance(self.threshold, (int, float)) else list(self.threshold)
        if not all(0 <= value < 1 for value in values):
            raise ValueError(f"self_training.threshold lies in [0, 1), got {self.threshold}")
        if self.pseudo_on not in ("global", "all"):
            raise ValueError(f"self_training.pseudo_on is 'global' or 'all', got {self.pseudo_on!r}")
        if self.student not in ("weak", "strong", "mixed"):
            raise ValueError(f"self_training.student is 'weak', 'strong' or 'mixed', got {self.student!r}")
        if self.weight < 0:
            raise ValueError(f"self_training.weight is at least 0, got {self.weight}")
