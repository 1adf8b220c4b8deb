"""What a converted layer carries besides its parameters: options, ranges, plans, counters. Never in the state dict."""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch

from alimm.projects.int8_training.fake import FakeProducts
from alimm.projects.int8_training.geometry import Geometry
from alimm.projects.int8_training.int_mm import IntMmProducts
from alimm.projects.int8_training.onednn import OneDnnProducts, self_test
from alimm.projects.int8_training.options import PRODUCTS, Int8Options
from alimm.projects.int8_training.products import Products, fits
from alimm.projects.int8_training.ranges import GradientRange
from alimm.seeding import stream_seed

Plan = tuple[bool, bool, bool]
"""Whether the output, the gradient of the input, the gradient of the weight run in INT8."""

RANGE_DECAY = 0.99
"""How much the recorded range of an input shrinks a step: about the last hundred steps count."""

_handles = itertools.count(1)
_states: weakref.WeakValueDictionary[int, LayerState] = weakref.WeakValueDictionary()


@dataclass
class Context:
    """What all layers of a model share, set by the hook before every iteration.

    Attributes:
        seed: of the run.
        rank: of the process.
        step: number of the iteration.
        loss_scale: what the loss is multiplied with.
        watch: whether this step compares gradients with their quantised form.
    """

    seed: int = 0
    rank: int = 0
    step: int = 0
    loss_scale: float = 1.0
    watch: bool = False


@dataclass
class Health:
    """What was last measured of a layer's gradient.

    Attributes:
        cosine: between the gradient and its quantised form.
        clipped: share of the elements beyond their clip.
        zeros: share that was quantised to zero.
        bell: share of bell-shaped channels.
        sick_checks: checks in a row below the bound.
    """

    cosine: float = float("nan")
    clipped: float = float("nan")
    zeros: float = float("nan")
    bell: float = float("nan")
    sick_checks: int = 0


@dataclass(eq=False)
class LayerState:
    """See the module. ``handle`` is the number by which operators find it: they take no objects."""

    name: str
    index: int
    geometry: Geometry
    options: Int8Options
    context: Context
    ranges: OrderedDict[tuple[int, ...], GradientRange] = field(default_factory=OrderedDict)
    plans: OrderedDict[tuple[int, ...], Plan] = field(default_factory=OrderedDict)
    timings: dict[tuple[int, ...], dict[str, float]] = field(default_factory=dict)
    health: Health = field(default_factory=Health)
    sick: bool = False
    activation_amax: float = 0.0
    range_step: int = -1
    last_step: int = -1
    calls: int = 0
    handle: int = 0

    def __post_init__(self) -> None:
        self._register()

    def _register(self) -> None:
        self.handle = next(_handles)
        _states[self.handle] = self

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    def range_of(self, size: tuple[int, ...]) -> GradientRange:
        """The clips at an input size (D, H, W); those used longest ago go when there are more than ``max_shapes``."""
        found = self.ranges.setdefault(size, GradientRange())
        self.ranges.move_to_end(size)
        while len(self.ranges) > self.options.max_shapes:
            self.ranges.popitem(last=False)
        return found

    def allowed(self, device: torch.device) -> Plan:
        """What may run in INT8 at all: asked for by ``products``, and no sum too long."""
        wide = products_for(self.options.backend, device).wide
        output, grad_input, grad_weight = (
            name in self.options.products and fits(self.geometry, name, wide) for name in PRODUCTS
        )
        return output, grad_input, grad_weight

    def note_activation(self, amax: float) -> None:
        """Widen the recorded range of the input, which `export` writes, to that of one call.

        It shrinks once a step and not once a call: a shared head reads several levels in a step, each of its own range.
        """
        if self.context.step != self.range_step:
            self.range_step = self.context.step
            self.activation_amax *= RANGE_DECAY
        self.activation_amax = max(self.activation_amax, amax)

    def saved(self) -> dict[str, Any]:
        """For a checkpoint: plain values and tensors, which load with ``weights_only``."""
        return dict(
            ranges=[(list(size), found.state()) for size, found in self.ranges.items()],
            plans=[(list(shape), list(plan)) for shape, plan in self.plans.items()],
            sick=self.sick,
            sick_checks=self.health.sick_checks,
            activation_amax=self.activation_amax,
        )

    def restore(self, saved: dict[str, Any]) -> None:
        """The reverse of `saved`."""
        for size, found in saved["ranges"]:
            self.ranges[tuple(size)] = GradientRange.from_state(found)
        for shape, plan in saved["plans"]:
            self.plans[tuple(shape)] = (bool(plan[0]), bool(plan[1]), bool(plan[2]))
        self.sick = bool(saved["sick"])
        self.health.sick_checks = int(saved["sick_checks"])
        self.activation_amax = float(saved["activation_amax"])

    def seeds(self) -> tuple[int, int] | None:
        """Two words for the stochastic rounding of the next backward pass; None rounds to nearest."""
        if self.options.rounding == "nearest":
            return None
        context = self.context
        if context.step != self.last_step:
            self.last_step, self.calls = context.step, 0
        value = stream_seed(context.seed, "int8/round", context.rank, context.step, self.index, self.calls)
        self.calls += 1
        return value & 0xFFFFFFFF, value >> 31


def state_of(handle: int) -> LayerState:
    """The state with this number."""
    return _states[handle]


_products: dict[tuple[str, str], Products] = {}


def products_for(backend: str, device: torch.device) -> Products:
    """What multiplies on a device.

    Raises:
        ValueError: ``'onednn'`` was asked for where it does not work.
    """
    key = (backend, device.type)
    if key not in _products:
        _products[key] = _make_products(backend, device)
    return _products[key]


def _make_products(backend: str, device: torch.device) -> Products:
    if backend == "fake":
        return FakeProducts()
    if backend == "int_mm" or device.type != "cpu":
        if backend == "onednn":
            raise ValueError(f"backend='onednn' runs on the CPU, but the model is on {device}: use backend='auto'")
        return IntMmProducts()
    if self_test() == "none":
        if backend == "onednn":
            raise ValueError(
                "backend='onednn': this build of torch lacks oneDNN's integer operators, or they are inexact on this "
                "processor. Use backend='int_mm', which is exact everywhere and slow"
            )
        return IntMmProducts()
    return OneDnnProducts()
