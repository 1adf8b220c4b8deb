"""Make a file for others from a training checkpoint: weights and plain facts only, named by its own digest.

What is kept: ``state_dict`` on the CPU, and of ``meta`` the keys of ``KEPT_META`` as plain values. What goes: the
optimizer, the message hub, the averaged model's twin, and the config's text, which names folders of the machine that
trained. The result loads with ``weights_only=True``, and the same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import io
import os
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEPT_META = ("dataset_meta", "epoch", "iter", "seed", "mmengine_version")


def publish(source: Path, out: Path, date: str, ema: bool = False, trust: bool = False) -> Path:
    """Write the published file.

    Args:
        source: a checkpoint, of a training run or plain.
        out: folder and stem of the result: ``zoo/name.pth`` gives ``zoo/name_<date>-<sha256[:8]>.pth``. A folder that
            exists keeps the stem of ``source``.
        date: eight digits, year to day.
        ema: insist on averaged weights. MMEngine's EMAHook saves these as ``state_dict`` and the raw weights beside
            them, so an averaged checkpoint is published averaged in any case; this refuses one that is not.
        trust: read a checkpoint that holds other objects than weights and MMEngine's logs; runs code of the file.

    Returns:
        The file that was written.

    Raises:
        ValueError: the source is missing or no checkpoint, or holds no averaged weights though ``ema`` is set.
    """
    from alimm.apis.checkpoints import SHARDS_KEY
    from alimm.zoo.download import load_weights

    if not source.is_file():
        raise ValueError(f"the checkpoint {source} does not exist")
    if len(date) != 8 or not date.isdigit():
        raise ValueError(f"--date must be eight digits such as 20260131, got {date!r}")
    content = load_weights(source, trust=trust)
    if ema and "ema_state_dict" not in content:
        raise ValueError(f"{source} has no averaged weights (no 'ema_state_dict'); was EMAHook among the custom_hooks?")
    if (content.get("meta") or {}).get(SHARDS_KEY):
        raise ValueError(
            f"{source} holds no classes: they are in the .shards folder beside it. Make one file of both first: "
            f"alimm merge-shards {source} whole.pth"
        )
    data = _serialise(_slim(content, source))
    stem, folder = (source.stem, out) if out.is_dir() else (out.stem, out.parent)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{stem}_{date}-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    part = target.with_name(f"{target.name}.part-{os.getpid()}")
    try:
        part.write_bytes(data)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _slim(content: dict[str, Any], source: Path) -> dict[str, Any]:
    import torch

    state = content.get("state_dict", content)
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{source} holds no state dict: expected tensors by name under 'state_dict'")
    # A clone, because a view would bring the whole storage that it looks into.
    weights = OrderedDict((key, value.detach().cpu().contiguous().clone()) for key, value in state.items())
    meta = content.get("meta") or {}
    kept = {key: plain for key in KEPT_META if (plain := _plain(meta.get(key))) is not None}
    return {"meta": kept, "state_dict": weights}


def _plain(value: Any) -> Any:
    """The value made of dict, list, str, int, float, bool and None only; anything else becomes None."""
    import numpy as np

    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return None


def _serialise(content: dict[str, Any]) -> bytes:
    import torch

    # Written to memory: torch puts the name of a file into the archive, which would change its digest.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Command line of ``tools/publish_model.py``."""
    parser = argparse.ArgumentParser(
        prog="publish_model.py", description="Keep the weights of a checkpoint, name the file by its sha256."
    )
    parser.add_argument("source", metavar="IN", type=Path, help="a checkpoint")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder, or folder and stem, of the result")
    parser.add_argument("--ema", action="store_true", help="refuse a checkpoint without averaged weights")
    parser.add_argument("--date", help="eight digits for the name; today by default")
    parser.add_argument("--trust", action="store_true", help="read other objects too; runs code from the file")
    args = parser.parse_args(argv)
    date = args.date or datetime.date.today().strftime("%Y%m%d")
    try:
        path = publish(args.source, args.out, date, args.ema, args.trust)
    except (ValueError, OSError) as error:
        print(f"publish_model.py: {error}", file=sys.stderr)
        return 1
    print("For the metafile:")
    print(f"    Weights: [{path.as_posix()}]")
    print(f"    Weights SHA256: {hashlib.sha256(path.read_bytes()).hexdigest()}")
    print(f"    Weights Size: {path.stat().st_size}")
    return 0
