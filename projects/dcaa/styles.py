"""A labelled source in the styles of the target's conditions, made while training runs.

The method needs its source once per target condition. Folders of translated pictures are one way; this is the other,
without a network: `StyledDataset` shows every source picture once in each style, and `StyliseSource` restyles it in the
pipeline after a picture of that condition, see ``stylise`` for the equations and ``style_bank`` for the pictures.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.datasets.transforms import check_range
from alimm.projects.dcaa.style_bank import POOLED, StyleBank, StyleReference, load_image, raw_results
from alimm.projects.dcaa.stylise import check_picture, fda, match_colour
from alimm.registry import DATASETS, TRANSFORMS

__all__ = ["METHODS", "POOLED", "StyleBank", "StyleReference", "StyledDataset", "StyliseSource", "load_image"]

METHODS = ("colour", "fda", "colour+fda", "none")
CHANNEL_ORDERS = ("bgr", "rgb")


@TRANSFORMS.register_module()
class StyliseSource:
    """Restyle ``img`` after the ``style_reference`` of a `StyledDataset`; where that is None, ``img`` stays.

    The picture may be uint8 or float32 of 0 to 255; its type and shape stay, and nothing else of the item changes. Put
    it after the loading of the picture. Draws from the global state of NumPy, twice a picture whatever the method.

    Args:
        method: ``'colour'`` matches mean and standard deviation in Lab, ``'fda'`` swaps low-frequency amplitudes,
            ``'colour+fda'`` does one after the other, ``'none'`` nothing.
        strength: range of how much of the colour match is done; 1 is all of it.
        beta: range of the half-width of the swapped square, as a share of the shorter side.
        per_image: match the colours of the drawn picture; False matches those of its whole condition.
        channel_order: of ``img``, ``'bgr'`` as MMSegmentation loads it or ``'rgb'``.

    Raises:
        ValueError: an argument is out of its range.
    """

    uses_style_reference = True

    def __init__(
        self,
        method: str = "colour",
        strength: Sequence[float] = (1.0, 1.0),
        beta: Sequence[float] = (0.01, 0.05),
        per_image: bool = True,
        channel_order: str = "bgr",
    ) -> None:
        for name, value, allowed in (
            ("method", method, METHODS),
            ("channel_order", channel_order, CHANNEL_ORDERS),
        ):
            if value not in allowed:
                raise ValueError(f"StyliseSource: {name} is one of {', '.join(allowed)}, got {value!r}")
        self.method, self.per_image, self.channel_order = method, per_image, channel_order
        self.strength = check_range(strength, "StyliseSource: strength", 0.0, 1.0)
        self.beta = check_range(beta, "StyliseSource: beta", 0.0, 0.5)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Restyle one item, and take its reference out.

        Raises:
            ValueError: the item has no picture or no reference, or the picture has not three channels.
        """
        if "style_reference" not in results:
            raise ValueError("StyliseSource found no style_reference in the item: wrap the source in StyledDataset")
        if not isinstance(results.get("img"), np.ndarray):
            raise ValueError("StyliseSource found no picture: put the transform that loads it before this one")
        reference: StyleReference | None = results.pop("style_reference")
        strength, beta = np.random.uniform(*self.strength), np.random.uniform(*self.beta)
        if reference is None or self.method == "none":
            return results
        check_picture(results["img"], "StyliseSource: img")
        image = results["img"] if self.channel_order == "rgb" else results["img"][..., ::-1]
        if self.method != "fda":
            image = match_colour(image, reference.stats if self.per_image else reference.pooled, strength=strength)
        if self.method != "colour":
            image = fda(image, reference.image, beta)
        results["img"] = np.ascontiguousarray(image if self.channel_order == "rgb" else image[..., ::-1])
        return results

    def __repr__(self) -> str:
        return (
            f"StyliseSource(method={self.method!r}, strength={self.strength}, beta={self.beta}, "
            f"per_image={self.per_image}, channel_order={self.channel_order!r})"
        )


@DATASETS.register_module()
class StyledDataset:
    """A labelled source, each picture once in the style of every target condition.

    Item i is source picture ``i // K`` in style ``i % K``. It carries the name and id of its style as ``condition`` and
    ``cond_id``, whatever the source says of itself, and a ``style_reference`` for `StyliseSource`, which must be among
    the source's transforms. The reference is drawn anew at every access, from the global state of NumPy.

    Args:
        dataset: the source, or its config.
        styles: where the styles come from: the target dataset or its config, a `StyleBank`, or the file of one.
        conditions: names of the styles in the order of their ids; None takes those of ``styles``.
        identity_conditions: of these names the style is the source's own: no reference is given. They need not be among
            the styles.
        pooled: one condition, named ``'pooled'`` or as ``conditions`` says, with references of any: the source has its
            own length. For the methods that know one target domain.
        per_condition: pictures kept of each condition, where ``styles`` is a dataset.
        seed: of the choice of these pictures.
        lazy_init: read and load later.

    Raises:
        ValueError: a dataset is empty or misses a condition, a name is unknown or given twice, or no transform of the
            source uses the reference.
    """

    def __init__(
        self,
        dataset: Any,
        styles: Any,
        conditions: Sequence[str] | None = None,
        identity_conditions: Sequence[str] = (),
        pooled: bool = False,
        per_condition: int = 32,
        seed: int = 0,
        lazy_init: bool = False,
    ) -> None:
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.styles, self.pooled = styles, pooled
        self.per_condition, self.seed = per_condition, seed
        self.given_conditions = _names(conditions, "conditions") if conditions is not None else None
        self.identity_conditions = _names(identity_conditions, "identity_conditions")
        if pooled and (self.identity_conditions or len(self.given_conditions or (POOLED,)) != 1):
            raise ValueError(
                "StyledDataset: pooled=True is one style for all: give at most one name in conditions and no "
                f"identity_conditions, got {self.given_conditions} and {self.identity_conditions}"
            )
        self._fully_initialized = False
        if not lazy_init:
            self.full_init()

    def full_init(self) -> None:
        """Load the source and the styles."""
        if self._fully_initialized:
            return
        if hasattr(self.dataset, "full_init"):
            self.dataset.full_init()
        if len(self.dataset) == 0:
            raise ValueError("StyledDataset: the source has no pictures")
        self.bank = self._bank()
        self._conditions = self.given_conditions or ((POOLED,) if self.pooled else self.bank.conditions)
        if not self.pooled:
            self._check_conditions()
        if set(self._conditions) - set(self.identity_conditions) and not _uses_reference(self.dataset):
            raise ValueError(
                "StyledDataset: no transform of the source uses the style, so all styles would look alike: put "
                "dict(type='alimm.StyliseSource') into its pipeline, after the loading of the picture"
            )
        self._metainfo = {**copy.deepcopy(self.dataset.metainfo), "conditions": self._conditions}
        self._fully_initialized = True

    def _bank(self) -> StyleBank:
        if isinstance(self.styles, StyleBank):
            return self.styles
        if isinstance(self.styles, (str, os.PathLike)):
            return StyleBank.load(self.styles)
        target = DATASETS.build(self.styles) if isinstance(self.styles, dict) else self.styles
        return StyleBank(target, self.per_condition, self.seed)

    def _check_conditions(self) -> None:
        known = (*self.bank.conditions, *self.identity_conditions)
        if unknown := [name for name in self._conditions if name not in known]:
            raise ValueError(
                f"StyledDataset: the styles have no condition {', '.join(unknown)}, only "
                f"{', '.join(self.bank.conditions)}: name these, or add pictures of the others to the target"
            )
        if unused := [name for name in self.identity_conditions if name not in self._conditions]:
            raise ValueError(
                f"StyledDataset: identity_conditions names {', '.join(unused)}, but the conditions are "
                f"{', '.join(self._conditions)}"
            )

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the styles, in the order of their ids."""
        self.full_init()
        return self._conditions

    @property
    def metainfo(self) -> dict[str, Any]:
        """Meta information of the source, with ``conditions``."""
        self.full_init()
        return copy.deepcopy(self._metainfo)

    def condition_ids(self) -> NDArray[np.int64]:
        """The style of each item, int64 (len,)."""
        self.full_init()
        return np.tile(np.arange(len(self._conditions), dtype=np.int64), len(self.dataset))

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """The source's item under its style's name and id, without a reference."""
        index, style = self._place(idx)
        return self.dataset.get_data_info(index) | {"condition": self._conditions[style], "cond_id": style}

    def prepare_data(self, idx: int) -> Any:
        """One item after the source's pipeline; None where the pipeline gives that."""
        index, style = self._place(idx)
        name = self._conditions[style]
        results, pipeline = raw_results(self.dataset, index)
        results["condition"], results["cond_id"] = name, style
        if name in self.identity_conditions:
            results["style_reference"] = None
        else:
            results["style_reference"] = self.bank.draw(POOLED if self.pooled else name)
        return pipeline(results)

    def _place(self, idx: int) -> tuple[int, int]:
        size = len(self)
        if not -size <= idx < size:
            raise IndexError(f"StyledDataset has {size} items, there is no item {idx}")
        return divmod(int(idx) % size, len(self._conditions))

    def __len__(self) -> int:
        self.full_init()
        return len(self.dataset) * len(self._conditions)

    def __getitem__(self, idx: int) -> Any:
        data = self.prepare_data(idx)
        for _ in range(getattr(self.dataset, "max_refetch", 1000)):
            if data is not None:
                break
            # another picture in the same style, so that a sampler's turns hold
            other = np.random.randint(len(self.dataset))
            data = self.prepare_data(other * len(self._conditions) + idx % len(self._conditions))
        if data is None:
            raise ValueError("StyledDataset: the source's pipeline gives None for every picture that was tried")
        return data


def _names(names: Sequence[str], argument: str) -> tuple[str, ...]:
    kept = tuple(names)
    if isinstance(names, str) or len(set(kept)) < len(kept) or (argument == "conditions" and not kept):
        raise ValueError(f"StyledDataset: {argument} must be a list of different names, got {names!r}")
    return kept


def _uses_reference(dataset: Any) -> bool:
    """True if every source dataset below has a transform that uses the reference."""
    if hasattr(dataset, "datasets"):
        return all(_uses_reference(part) for part in dataset.datasets)
    if hasattr(dataset, "dataset"):
        return _uses_reference(dataset.dataset)
    return any(getattr(one, "uses_style_reference", False) for one in _flat(getattr(dataset, "pipeline", None)))


def _flat(transform: Any) -> Iterator[Any]:
    yield transform
    inner = getattr(transform, "transforms", ())
    for one in inner if isinstance(inner, (list, tuple)) else [inner]:
        yield from _flat(one)
