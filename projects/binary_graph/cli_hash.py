"""``alimm index hash``: codes of float vectors, in blocks, so that the vectors need not fit into memory."""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from alimm.projects.binary_graph.cli_common import at_least_one

if TYPE_CHECKING:
    from alimm.projects.binary_graph.source_npy import NpyRows

_BLOCK_BYTES = 64 << 20
_REPORT_ROWS = 200_000


def hash_vectors(argv: Sequence[str] | None = None) -> int:
    """``alimm index hash``: fit a hash or take a fitted one, encode, and report on the codes."""
    from alimm.projects.binary_graph.hashers import HASHERS, load_hasher, make_hasher
    from alimm.projects.binary_graph.linear_hasher import TRAINING_ROWS

    parser = argparse.ArgumentParser(
        prog="alimm index hash",
        description="Make binary codes of float vectors. Queries must be hashed with the state that the rows were.",
    )
    parser.add_argument("input", nargs="+", metavar="INPUT", help=".npy files of floats, (rows, dimensions)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npy", help="the codes, uint64 (rows, words)")
    parser.add_argument("--hasher", choices=list(HASHERS), help="the hash to fit (default: itq)")
    parser.add_argument("--bits", type=at_least_one, help="length of the codes, a multiple of 64 (default: 256)")
    parser.add_argument("--seed", type=int, help="of the fit (default: 0)")
    parser.add_argument(
        "--fit-on", type=at_least_one, metavar="N", help=f"rows to fit on, at most {TRAINING_ROWS} (the default)"
    )
    parser.add_argument(
        "--state", type=Path, metavar="FILE.npz", help="the fitted hash: used if the file is there, else written"
    )
    given = parser.parse_args(argv)
    if given.out.suffix != ".npy":
        raise ValueError(f"--out names a .npy file, got {given.out}")
    if given.fit_on is not None and given.fit_on > TRAINING_ROWS:
        raise ValueError(f"--fit-on is at most {TRAINING_ROWS}, what a fit uses; got {given.fit_on}")
    fitted = given.state is not None and given.state.exists()
    # A fit and a long encoding must not end at a folder that is not there.
    _check_target("--out", given.out)
    if given.state is not None and not fitted:
        _check_target("--state", given.state)
    vectors = _vectors(given.input)
    if fitted:
        options = {"hasher": given.hasher, "bits": given.bits, "seed": given.seed, "fit-on": given.fit_on}
        named = [f"--{name}" for name, value in options.items() if value is not None]
        if named:
            raise ValueError(
                f"{given.state} holds a fitted hash, so {', '.join(named)} would have no effect: leave that out, or "
                "name another file to fit a hash anew"
            )
        hasher = load_hasher(given.state)
        print(f"hash: {hasher.name}, {hasher.bits} bits, from {given.state}")
    else:
        hasher = make_hasher(given.hasher or "itq", given.bits or 256, given.seed or 0)
        sample = _sample(vectors, given.fit_on or TRAINING_ROWS, given.seed or 0)
        hasher.fit(sample)
        print(f"hash: {hasher.name}, {hasher.bits} bits, fitted on {len(sample):,} rows")
        if given.state is None:
            print("state: not kept; queries can be hashed only with --state FILE.npz given here")
    kept = _encode(vectors, hasher, given.out)

    from alimm.projects.binary_graph.balance import balance_report

    print(f"codes: {vectors.count:,} in {given.out}")
    if given.state is not None and not fitted:
        # Last: the state of a run that failed would be taken for that of the codes.
        hasher.save(given.state)
        print(f"state: {given.state}; hash the queries with --state {given.state}")
    print(balance_report(kept))
    if len(kept) < vectors.count:
        print(f"(of {len(kept):,} rows, evenly spaced)")
    return 0


def _check_target(option: str, path: Path) -> None:
    """Refuse a file that cannot be written."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}, make it first")
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path}: the folder {path.parent} cannot be written to, name another one")


def _vectors(names: Sequence[str]) -> NpyRows:
    from alimm.projects.binary_graph.source_npy import NpyRows

    vectors = NpyRows.scan([Path(name) for name in names])
    if vectors.dtype.kind != "f" or len(vectors.row_shape) != 1:
        raise ValueError(
            f"{names[0]} holds {vectors.dtype.name} with rows of shape {vectors.row_shape}; expected floats of shape "
            "(rows, dimensions)"
        )
    if vectors.count == 0:
        raise ValueError(f"{names[0]} has no rows")
    return vectors


def _sample(vectors: NpyRows, count: int, seed: int) -> NDArray[Any]:
    """Rows drawn without replacement, in their order; read one run of neighbours at a time."""
    if count >= vectors.count:
        return vectors.read(0, vectors.count)
    # Runs of 16: single rows would mean as many reads as rows.
    run = 16 if count >= 1600 else 1
    rng = np.random.default_rng(seed)
    starts = np.sort(rng.choice(-(-vectors.count // run), -(-count // run), replace=False)) * run
    blocks = [vectors.read(int(start), min(int(start) + run, vectors.count)) for start in starts]
    return np.concatenate(blocks)[:count]


def _encode(vectors: NpyRows, hasher: Any, out: Path) -> NDArray[np.uint64]:
    """Write the codes of all rows; return those of some, evenly spaced."""
    block = max(1, _BLOCK_BYTES // max(1, vectors.dtype.itemsize * vectors.row_shape[0]))
    step = -(-vectors.count // _REPORT_ROWS)
    kept = []
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as stream:
            shape = (vectors.count, hasher.bits // 64)
            npy_format.write_array_header_1_0(stream, {"descr": "<u8", "fortran_order": False, "shape": shape})
            for start in range(0, vectors.count, block):
                stop = min(start + block, vectors.count)
                try:
                    codes = hasher.encode(vectors.read(start, stop))
                except ValueError as error:
                    raise ValueError(f"rows {start:,} to {stop - 1:,} of the input: {error}") from error
                stream.write(codes.astype("<u8", copy=False).data)
                kept.append(codes[-start % step :: step].copy())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return np.concatenate(kept)
