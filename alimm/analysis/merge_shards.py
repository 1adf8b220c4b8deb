"""One ordinary file of a checkpoint whose classifier is cut over ranks, and the other way from InsightFace's files.

``merge`` puts the rows of the classes, in the order of the class ids, into the state dict of an ordinary checkpoint,
which loads on any number of ranks and whatever the order of rows there. ``export_npy`` writes them as a plain matrix
for a search index, row block by row block. ``import_insightface`` makes a checkpoint of the files that InsightFace's
Partial FC leaves, one a rank, in their order.
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alimm.apis.checkpoints import SHARDS_KEY, atomic_open, load_restricted, make_local_loader
from alimm.apis.sharded import folder_names, folders_of
from alimm.distributed.block_writer import write_blocks
from alimm.distributed.blocks import BLOCK_ROWS, DTYPES, BlockIndex, read_index, read_rows, verify
from alimm.distributed.permutation import KINDS, ClassPermutation
from alimm.distributed.shards import RowShards, Sharding

KEPT = ("meta", "state_dict")
IN_CLASS_ORDER = "none"


def _permutation(folder: Path, index: BlockIndex) -> ClassPermutation:
    saved = index.scalars.get("permutation")
    if not isinstance(saved, dict) or type(saved.get("seed")) is not int or saved.get("kind") not in KINDS:
        raise ValueError(f"{folder} does not say in which order its rows are: it is not the folder of a sharded head")
    return ClassPermutation(index.num_rows, saved["seed"], saved["kind"])


def _shards_of(source: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    if not source.is_file():
        raise ValueError(f"the checkpoint {source} does not exist")
    checkpoint = make_local_loader(None)(str(source), "cpu")
    folders = folders_of(checkpoint, source) if isinstance(checkpoint, dict) else {}
    if not folders:
        raise ValueError(f"{source} names no folder of shards (meta[{SHARDS_KEY!r}]): it is complete as it is")
    for folder in folders.values():
        verify(folder)
        if "weight" not in read_index(folder).arrays:
            raise ValueError(f"{folder} holds no 'weight': it is not the folder of a sharded head")
    return checkpoint, folders


def merge(source: Path, out: Path) -> None:
    """Write the weights of a checkpoint and its shards to one ordinary file.

    Args:
        source: a ``.pth`` with its folder beside it.
        out: the file to write. It holds ``meta`` and ``state_dict``: weights, nothing to resume from.

    Raises:
        ValueError: there is no such checkpoint, it has no shards, or they are damaged.
    """
    checkpoint, folders = _shards_of(source)
    state = OrderedDict(checkpoint["state_dict"])
    for path, folder in folders.items():
        index, prefix = read_index(folder), f"{path}." if path else ""
        permutation = _permutation(folder, index)
        weight = index.arrays["weight"]
        merged = torch.empty((index.num_rows, *weight.row_shape), dtype=DTYPES[weight.dtype])
        for block in range(index.num_blocks):
            start, stop = index.rows_of(block)
            classes = permutation.classes(torch.arange(start, stop))
            merged[classes] = read_rows(folder, "weight", start, stop, index=index)
        state[f"{prefix}weight"] = merged
        # A sharded head reads here that class c is row c.
        state[f"{prefix}layout"] = torch.tensor([index.num_rows, KINDS.index(IN_CLASS_ORDER), 0])
    meta = {key: value for key, value in checkpoint["meta"].items() if key not in (SHARDS_KEY, "alimm_path")}
    with atomic_open(out) as file:
        torch.save(dict(meta=meta, state_dict=state), file)


def export_npy(source: Path, out: Path, normalize: bool = False) -> None:
    """Write the rows of the classes as a NumPy matrix (classes, D), row c of class c.

    The file is mapped and filled block by block, so that memory for one block is enough.

    Args:
        source: a ``.pth`` with its folder beside it, of one sharded head.
        out: the ``.npy`` to write. float32, unless the weights are float64.
        normalize: divide each row by its length, for an index of inner products.

    Raises:
        ValueError: there is no such checkpoint, it has no shards or several sharded heads, or they are damaged.
    """
    _, folders = _shards_of(source)
    if len(folders) != 1:
        raise ValueError(f"{source} has sharded heads at {', '.join(folders)}; one matrix needs one head")
    (folder,) = folders.values()
    index = read_index(folder)
    permutation, weight = _permutation(folder, index), index.arrays["weight"]
    dtype = np.float64 if weight.dtype == "F64" else np.float32
    shape = (index.num_rows, *weight.row_shape)
    partial = out.with_name(f".{out.name}.partial.npy")
    try:
        matrix = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=shape)
        for block in range(index.num_blocks):
            start, stop = index.rows_of(block)
            rows = read_rows(folder, "weight", start, stop, index=index)
            rows = rows if weight.dtype == "F64" else rows.float()
            rows = torch.nn.functional.normalize(rows) if normalize else rows
            matrix[permutation.classes(torch.arange(start, stop)).numpy()] = rows.numpy()
        matrix.flush()
        del matrix
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _insightface_weight(path: Path) -> torch.Tensor:
    content = load_restricted(path)
    if isinstance(content, dict):
        content = content.get("state_dict_softmax_fc", content.get("state_dict", content))
    if isinstance(content, dict):
        named = {key: value for key, value in content.items() if str(key).rsplit(".", 1)[-1] == "weight"}
        content = next(iter(named.values())) if len(named) == 1 else content
    if not isinstance(content, torch.Tensor) or content.ndim != 2:
        raise ValueError(f"{path} holds no classifier: expected a tensor (classes, D), or a dict with one 'weight'")
    return content


def import_insightface(
    sources: Sequence[Path], out: Path, head: str = "head", block_rows: int = BLOCK_ROWS
) -> BlockIndex:
    """Make a checkpoint with shards of InsightFace's files, one a rank.

    Args:
        sources: the files in the order of the ranks: tensors, or state dicts with one ``weight``, also under
            ``state_dict_softmax_fc``.
        out: the ``.pth`` to write; its folder goes beside it. A head that loads it needs ``permute='none'``, since
            InsightFace has class c in row c; ``merge`` makes a file for every order.
        head: path of the head in the model.
        block_rows: rows of a block on the disk.

    Raises:
        ValueError: a file is no classifier, widths differ, or the folder exists.
    """
    if not sources:
        raise ValueError("name the files of all ranks, in their order")
    parts = [_insightface_weight(path) for path in sources]
    for path, part in zip(sources, parts, strict=True):
        if part.shape[1] != parts[0].shape[1] or part.dtype != parts[0].dtype:
            raise ValueError(
                f"{path} has rows of {part.shape[1]} {part.dtype}, {sources[0]} of {parts[0].shape[1]} "
                f"{parts[0].dtype}: they are not of one classifier"
            )
    weight = torch.cat(parts)
    names = folder_names(out.stem, [head])
    sharding = Sharding(RowShards((len(weight),)), 0, None)
    layout = dict(kind=IN_CLASS_ORDER, seed=0)
    own = dict(num_classes=len(weight), dim=weight.shape[1], permute=IN_CLASS_ORDER, permute_seed=0, step=0)
    index = write_blocks(
        out.with_name(names[head]), {"weight": weight}, sharding, dict(head=own, permutation=layout), block_rows
    )
    state = {f"{head}.layout": torch.tensor([len(weight), KINDS.index(IN_CLASS_ORDER), 0])}
    with atomic_open(out) as file:
        torch.save(dict(meta={SHARDS_KEY: names}, state_dict=state), file)
    return index


def main(argv: list[str] | None = None) -> int:
    """Command line of ``tools/merge_shards.py``."""
    parser = argparse.ArgumentParser(
        prog="merge_shards.py",
        description="Make one ordinary file of a checkpoint with a folder of shards, its rows in class order.",
    )
    parser.add_argument("source", metavar="IN", nargs="+", type=Path, help="a .pth with its .shards folder beside it")
    parser.add_argument("out", metavar="OUT", type=Path, help="the .pth (or .npy) to write")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--npy", action="store_true", help="write the classes as a matrix for a search index")
    kind.add_argument(
        "--insightface", action="store_true", help="IN are InsightFace's files, one a rank; OUT gets a folder of shards"
    )
    parser.add_argument("--normalize", action="store_true", help="with --npy: rows of length 1")
    parser.add_argument("--head", default="head", help="with --insightface: path of the head in the model")
    args = parser.parse_args(argv)
    try:
        if args.insightface:
            import_insightface(args.source, args.out, args.head)
        elif len(args.source) != 1:
            raise ValueError("give one checkpoint, or --insightface with the files of all ranks")
        elif args.npy:
            export_npy(args.source[0], args.out, args.normalize)
        else:
            merge(args.source[0], args.out)
    except (ValueError, OSError) as error:
        print(f"merge_shards.py: {error}", file=sys.stderr)
        return 1
    print(args.out)
    return 0
