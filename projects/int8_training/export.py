"""For inference in INT8: the scales that training found as JSON, and the forward of the model as ONNX.

The ONNX file is in QDQ form, which ONNX Runtime and TensorRT read. Of each converted layer

    x -> QuantizeLinear -> DequantizeLinear -> Conv, Gemm or MatMul <- DequantizeLinear <- integers of the weight

with symmetric signed bytes, zero point 0, and the rest in float32. The weights are the integers that training
multiplies. Where inference differs from training:

- Training measures each batch and so never clips. Here an input's range is the one recorded
  (`LayerState.note_activation`); what lies beyond saturates, on the negative side at -128.
- A signed input always gets 8 bits, also where training gave it 7 (``signed='narrow'``).
- ONNX divides by the step, where we multiply by its inverse: a value between two integers may go to the other one.

A layer whose forward ran in floating point, by its plan or its health, is exported so. The model is traced by torch's
TorchScript exporter, which needs no package but onnx; the newer one needs onnxscript as well.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import DictAction
from torch import Tensor, nn

from alimm.apis.checkpoints import atomic_open
from alimm.apis.config import load_config
from alimm.apis.model import init_model
from alimm.extras import require
from alimm.projects.int8_training.conversion import convert, layers_of
from alimm.projects.int8_training.hook import CHECKPOINT_KEY, Int8TrainingHook
from alimm.projects.int8_training.options import Int8Options
from alimm.projects.int8_training.qdq import QMAX, integers, with_qdq
from alimm.projects.int8_training.state import LayerState
from alimm.zoo.download import load_weights

OPSETS = range(13, 21)
"""From one scale a channel to the last that the exporter knows."""


def scales(model: nn.Module, all_layers: bool = False) -> dict[str, dict[str, Any]]:
    """What each converted layer needs for inference, by name.

    ``forward`` is ``'int8'``, with ``activation_amax``, ``activation_step`` (the value of one step of the input),
    ``weight_per`` (``'tensor'`` or ``'channel'``) and ``weight_steps`` (one, or one an output channel); or it is
    ``'float'``, with the ``reason``.

    Args:
        model: converted, and run in INT8.
        all_layers: also take the layers whose forward ran in floating point as INT8.

    Raises:
        ValueError: the model is not converted, a layer has no range, or its weight is not finite.
    """
    states = dict(layers_of(model))
    if not states:
        raise ValueError(
            "the model has no INT8 layers. Int8TrainingHook puts the plain layers back after training: export its "
            "checkpoint with tools/export_int8.py, or call convert(model, ...) and run the model in INT8 first"
        )
    found: dict[str, dict[str, Any]] = {}
    for name, state in states.items():
        reason = "" if all_layers else _why_float(state)
        if reason:
            found[name] = dict(forward="float", reason=reason)
            continue
        step = float(np.float32(state.activation_amax / QMAX))
        if not step > 0:
            raise ValueError(
                f"layer {name!r} has no activation range: its input was never quantised, or was all zeros. Train in "
                "INT8 first, or run a few batches after convert(model.eval(), eval_int8=True, planner=False), or leave "
                "the layer out with exclude"
            )
        _, steps_O = integers(name, model.get_submodule(name), state)
        per_channel = state.options.weight == "channel"
        found[name] = dict(
            forward="int8",
            activation_amax=state.activation_amax,
            activation_step=step,
            weight_per=state.options.weight,
            weight_steps=[float(value) for value in (steps_O if per_channel else steps_O[:1])],
        )
    return found


def write_scales(model: nn.Module, path: str | os.PathLike[str], all_layers: bool = False) -> None:
    """Write `scales` as JSON; the file holds the old or the new content at every moment."""
    content = dict(scheme="symmetric signed bytes, zero point 0", qmax=QMAX, layers=scales(model, all_layers))
    with atomic_open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def export_onnx(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: str | os.PathLike[str],
    opset: int = 17,
    all_layers: bool = False,
) -> dict[str, dict[str, Any]]:
    """Write the forward of a converted model as ONNX with QDQ; the model stays as it is.

    Args:
        model: converted, and run in INT8. ``model(*example)`` must give tensors.
        example: what the forward takes, on any device. The first input is named ``input`` and takes any batch size.
        path: of the ONNX file.
        opset: of ONNX, 13 to 20.
        all_layers: as in `scales`.

    Returns:
        The `scales` that went into the file.

    Raises:
        ImportError: onnx is not installed.
        ValueError: as in `scales`, no layer is left in INT8, or the opset is unknown.
    """
    if opset not in OPSETS:
        raise ValueError(f"opset must lie in {OPSETS.start}..{OPSETS.stop - 1}, got {opset}")
    found = scales(model, all_layers)
    if all(entry["forward"] == "float" for entry in found.values()):
        raise ValueError(
            "the forward of every converted layer ran in floating point, so there is nothing to export in INT8. Train "
            "with planner=False, or export with all_layers=True (--all-layers) what has a range"
        )
    onnx = require("onnx", "the ONNX export")
    quantised = with_qdq(model, found)
    inputs = (example,) if isinstance(example, Tensor) else example
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)
        torch.onnx.export(
            quantised,
            tuple(x.detach().cpu().float() if x.is_floating_point() else x.cpu() for x in inputs),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=opset,
            input_names=["input"],
            dynamic_axes={"input": {0: "batch"}},
        )
    onnx.checker.check_model(buffer.getvalue(), full_check=True)
    with atomic_open(path) as file:
        file.write(buffer.getvalue())
    return found


def restore(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give the layers of a converted model the ranges, plans and health that the hook saved beside the weights.

    Args:
        model: converted with the options that it was trained with.
        checkpoint: content of a checkpoint of the training run.

    Raises:
        ValueError: the checkpoint holds none.
    """
    kept = checkpoint.get(CHECKPOINT_KEY)
    if not kept:
        raise ValueError(
            f"the checkpoint has no {CHECKPOINT_KEY!r} and so no activation ranges. A training run with "
            "alimm.Int8TrainingHook saves them; publish_model.py leaves them out: give the file of the run"
        )
    for name, state in layers_of(model):
        if name in kept:
            state.restore(kept[name])


def _why_float(state: LayerState) -> str:
    """Why the forward of a layer ran in floating point; empty where it ran in INT8."""
    if state.sick:
        return "its gradient did not survive quantisation"
    if "output" not in state.options.products:
        return "products has no 'output'"
    if state.plans and not any(plan[0] for plan in state.plans.values()):
        return "the planner found floating point faster"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``tools/export_int8.py``."""
    parser = argparse.ArgumentParser(
        prog="export_int8.py",
        description="Write the forward of a model that alimm.Int8TrainingHook trained as ONNX (QDQ), and its scales.",
    )
    parser.add_argument("config", metavar="CONFIG", help="the config of the training run, with the hook")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint of that run")
    parser.add_argument("out", metavar="OUT", type=Path, help="the ONNX file; the scales go beside it as .json")
    parser.add_argument(
        "--shape", type=int, nargs="+", required=True, metavar="N", help="of one input, without the batch: 3 224 224"
    )
    parser.add_argument("--opset", type=int, default=17, help="of ONNX, 13 to 20")
    parser.add_argument(
        "--all-layers", action="store_true", help="take layers whose forward ran in floating point as INT8 too"
    )
    parser.add_argument(
        "--trust", action="store_true", help="read a checkpoint of other objects; runs code of the file"
    )
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes to the config, key=value")
    args = parser.parse_args(argv)
    if min(args.shape) < 1:
        raise ValueError(f"--shape must be positive, got {' '.join(map(str, args.shape))}")
    if not args.out.parent.is_dir():
        raise ValueError(f"the folder {args.out.parent} does not exist: make it first")
    require("onnx", "the ONNX export")
    config = load_config(args.config, args.cfg_options)
    options = _options(config)
    if not args.checkpoint.is_file():
        raise FileNotFoundError(f"there is no checkpoint {args.checkpoint}")
    model = init_model(config, args.checkpoint, trust=args.trust)
    convert(model, options)
    restore(model, load_weights(args.checkpoint, trust=args.trust))
    # Two samples: a batch of one may be squeezed away while it is traced.
    found = export_onnx(model, torch.zeros(2, *args.shape), args.out, args.opset, args.all_layers)
    listed = args.out.with_suffix(".json")
    write_scales(model, listed, args.all_layers)
    left = [f"{name} ({entry['reason']})" for name, entry in found.items() if entry["forward"] == "float"]
    print(f"{args.out}: {len(found) - len(left)} of {len(found)} converted layers in INT8; scales in {listed}")
    if left:
        print(f"in floating point: {', '.join(left)}")
    return 0


def _options(config: Mapping[str, Any]) -> Int8Options:
    """Those of the hook in a config."""
    for entry in config.get("custom_hooks") or ():
        kind = entry["type"]
        if (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2] == Int8TrainingHook.__name__:
            return Int8TrainingHook(**{key: entry[key] for key in entry if key not in ("type", "priority")}).options
    raise ValueError(
        "the config has no alimm.Int8TrainingHook among its custom_hooks: give the one in the work dir of the run"
    )
