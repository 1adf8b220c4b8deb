"""Which layers of a model train in INT8: convert them in place, say what was left and why, and revert."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from alimm.projects.int8_training.geometry import Geometry
from alimm.projects.int8_training.layers import KINDS, STATE, Int8Layer, int8_class, is_int8, stock_class
from alimm.projects.int8_training.options import Int8Options
from alimm.projects.int8_training.state import Context, LayerState, products_for

PREDICTOR = re.compile(
    r"(^|\.)("
    r"fc_cls|fc_reg|cls_score|bbox_pred|(\w+_)?(cls|reg|obj|centerness)|conv_(seg|logits|pred)|fc_(logits|seg)|logits"
    r")(\.\d+)?$"
)
"""Names of the last layers of the heads of mmdet, mmsegmentation and mmaction2."""

_OWN_FORWARD = tuple(kind.forward for kind in KINDS)


@dataclass
class Report:
    """What `convert` did.

    Attributes:
        converted: names of the layers.
        left: name of every other convolution, linear layer and layer of their kind, and why it was left.
        context: shared by the converted layers; whoever runs the training loop sets its step.
        products: which products run in INT8 and what multiplies them.
        unmatched: patterns of ``exclude`` that no layer's name matches.
    """

    converted: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    context: Context = field(default_factory=Context)
    products: str = ""
    unmatched: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"INT8 training: {len(self.converted)} layers converted, {len(self.left)} left in floating point"]
        if self.converted:
            lines.append(f"  {self.products}")
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            lines.append(f"  left, {reason}: {shown}")
        lines += [f"  exclude: {pattern!r} matches no layer of the model" for pattern in self.unmatched]
        return "\n".join(lines)


def layers_of(model: nn.Module) -> Iterator[tuple[str, LayerState]]:
    """The converted layers, by name."""
    for name, module in model.named_modules():
        if is_int8(module):
            yield name, module.int8


def convert(
    model: nn.Module, options: Int8Options | None = None, context: Context | None = None, **choices: Any
) -> Report:
    """Turn the convolutions and linear layers of a model into INT8 ones, in place.

    Args:
        model: any model. Parameters stay the same objects, the state dict stays as it is.
        options: what to do; or give its fields as keywords.
        context: shared with other models; a new one if None.
        **choices: fields of `Int8Options`.

    Raises:
        ValueError: a choice is wrong, or ``include`` names patterns that no layer matches.
    """
    options = options or Int8Options(**choices)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    report = Report(context=context or Context(), products=_products_line(options, device))
    candidates = [(name, module) for name, module in model.named_modules() if _looks_like_layer(module)]
    if options.include is not None:
        for pattern in options.include:
            if not any(re.search(pattern, name) for name, _ in candidates):
                known = ", ".join(name for name, _ in candidates[:5])
                raise ValueError(
                    f"include: {pattern!r} matches no layer of the model. Layers are named like {known or '(none)'}"
                )
    names = [name for name, _ in candidates]
    report.unmatched = [p for p in options.exclude or () if not any(re.search(p, name) for name in names)]
    last = next((name for name, module in reversed(candidates) if isinstance(module, KINDS)), None)
    for name, module in candidates:
        reason = _why_left(name, module, options, name == last)
        if reason:
            report.left[name] = reason
            continue
        setattr(module, STATE, LayerState(name, len(report.converted), Geometry.of(module), options, report.context))
        module.__class__ = int8_class(type(module))
        report.converted.append(name)
    return report


def _products_line(options: Int8Options, device: torch.device) -> str:
    products = products_for(options.backend, device)
    if products.name == "fake":
        return f"{', '.join(options.products)} in float32 on the integers (fake quantisation, for comparison)"
    exact = "bytes up to 255 by 127" if products.wide else "bytes up to 127 by 127 or 255 by 63"
    chosen = ", where it is faster" if options.planner and options.backend != "fake" else ""
    return f"{', '.join(options.products) or 'no product'} by {products.name}, exact for {exact}{chosen}"


def revert(model: nn.Module) -> int:
    """Put back the classes that the layers had; return how many were converted."""
    count = 0
    for module in model.modules():
        if isinstance(module, Int8Layer):
            kind = stock_class(module)
            delattr(module, STATE)
            module.__class__ = kind  # type: ignore[assignment]
            count += 1
    return count


def _looks_like_layer(module: nn.Module) -> bool:
    return isinstance(module, (*KINDS, nn.modules.conv._ConvTransposeNd)) or "Deform" in type(module).__name__


def _why_left(name: str, module: nn.Module, options: Int8Options, last: bool) -> str:
    """Why a layer is not converted; empty where it is."""
    if is_int8(module):
        return "already converted"
    if not isinstance(module, KINDS):
        return f"{type(module).__name__} is not supported"
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "its weight is read by an attention operator, not by its own forward"
    # Wrappers of mmcv handle empty inputs and then call the stock forward; others may never reach ours.
    if type(module).forward not in _OWN_FORWARD and not type(module).__module__.startswith("mmcv.cnn.bricks.wrappers"):
        return f"{type(module).__name__} has a forward of its own"
    layer = Geometry.of(module)
    if not (layer.in_channels and layer.out_channels):
        return "it has no channels"
    if any(re.search(pattern, name) for pattern in options.exclude or ()):
        return "excluded"
    if options.include is not None:
        return "" if any(re.search(pattern, name) for pattern in options.include) else "not included"
    if options.strict_all:
        return ""
    if layer.ndim and layer.in_channels <= 4:
        return "it reads the picture itself (strict_all converts it)"
    if PREDICTOR.search(name) or (last and layer.ndim == 0):
        return "it makes the predictions (strict_all converts it)"
    return ""
