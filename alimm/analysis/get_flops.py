"""Count the multiply-adds, parameters and activations of a config's model for one input."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def complexity(config: str, shape: tuple[int, int], cfg_options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Measure the model of a config.

    Args:
        config: a path, ``package::path``, or a model of the zoo.
        shape: height and width of the input, three channels, batch of one.
        cfg_options: changes to the config.

    Returns:
        ``config``, ``shape`` (1, 3, height, width), the numbers ``flops`` (one multiply and add counts once),
        ``params`` and ``activations`` (values that the layers put out), and ``table`` (str), the same by module.

    Raises:
        FileNotFoundError: no such config.
        ValueError: the model cannot be built, or does not take this input.
    """
    from mmengine.analysis import get_model_complexity_info

    from alimm.apis.model import init_model

    if min(shape) < 1:
        raise ValueError(f"--shape must be positive, got {shape[0]} {shape[1]}")
    model = init_model(config, cfg_options=cfg_options)
    try:
        info = get_model_complexity_info(model, input_shape=(3, *shape), show_arch=False)
    except RuntimeError as error:
        raise ValueError(
            f"the model of {config} does not take an input of shape (1, 3, {shape[0]}, {shape[1]}): {error}"
        ) from error
    return {
        "config": config,
        "shape": [1, 3, *shape],
        "flops": int(info["flops"]),
        "params": int(info["params"]),
        "activations": int(info["activations"]),
        "table": info["out_table"].strip(),
    }


def main(argv: list[str] | None = None) -> int:
    """Command line of ``tools/get_flops.py``."""
    parser = argparse.ArgumentParser(
        prog="get_flops.py", description="Multiply-adds, parameters and activations of a model for one input."
    )
    parser.add_argument("config", metavar="CONFIG", help="path, package::path, or a model of the zoo")
    parser.add_argument(
        "--shape", type=int, nargs="+", default=[224, 224], metavar=("H", "W"), help="input size; one number: a square"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures as JSON ('-': print only them)"
    )
    _add_cfg_options(parser)
    args = parser.parse_args(argv)
    if len(args.shape) > 2:
        parser.error(f"--shape takes one or two numbers, got {len(args.shape)}")
    try:
        info = complexity(args.config, (args.shape[0], args.shape[-1]), args.cfg_options)
    except (ValueError, OSError, ImportError) as error:
        print(f"get_flops.py: {error}", file=sys.stderr)
        return 1
    table = info.pop("table")
    text = json.dumps(info, indent=2)
    if args.json == Path("-"):
        print(text)
        return 0
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(table)
    print(f"\ninput         1 x 3 x {args.shape[0]} x {args.shape[-1]}")
    print(f"multiply-adds {info['flops'] / 1e6:,.2f} M")
    print(f"parameters    {info['params'] / 1e6:,.3f} M")
    print(f"activations   {info['activations'] / 1e6:,.3f} M")
    return 0


def _add_cfg_options(parser: argparse.ArgumentParser) -> None:
    from mmengine.config import DictAction

    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes to the config, key=value")
