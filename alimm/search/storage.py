r"""The file of a set of vectors: a line that names the format, a line of JSON, then the ids and the vectors.

Layout, little-endian: ``ALIMM VECTORS 1\n``, a JSON object and ``\n``, N int64 ids, N * dim float32. The object holds
``count``, ``width``, ``crc32`` of all bytes that follow it, and what the index wrote. Nothing in it is ever executed.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"ALIMM VECTORS 1\n"
HEADER_LIMIT = 1 << 20


def write_vectors(path: Path, header: dict[str, Any], ids_N: np.ndarray, vectors_ND: np.ndarray) -> None:
    """Write the file under another name, flush it to the disk, then give it its own.

    Args:
        path: where to; the folder must be there.
        header: further entries, as JSON takes them.
        ids_N: int64.
        vectors_ND: float32.
    """
    payload = [np.ascontiguousarray(ids_N, dtype="<i8"), np.ascontiguousarray(vectors_ND, dtype="<f4")]
    crc = zlib.crc32(payload[1].data, zlib.crc32(payload[0].data))
    head = {**header, "count": len(ids_N), "width": vectors_ND.shape[1], "crc32": crc}
    temporary = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(MAGIC + json.dumps(head).encode("ascii") + b"\n")
            for array in payload:
                file.write(array.data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_vectors(path: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Read the header, the ids (int64) and the vectors (float32).

    Raises:
        ValueError: there is no such file, it is of another format, cut short, too long or changed.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError("it does not start with the line of the format")
            line = file.readline(HEADER_LIMIT)
            header = json.loads(line)
            count, width, crc = (int(header[key]) for key in ("count", "width", "crc32"))
            if count < 0 or width < 1:
                raise ValueError(f"its header says {count} vectors of width {width}")
            expected = count * (8 + 4 * width)
            found = os.fstat(file.fileno()).st_size - file.tell()
            if found != expected:
                raise ValueError(f"expected {expected} bytes of vectors, found {found}: it was cut short or changed")
            payload = bytearray(expected)
            file.readinto(payload)
    except FileNotFoundError as error:
        raise ValueError(f"there is no index file {path}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no index file or is damaged: {error}") from error
    if zlib.crc32(payload) != crc:
        raise ValueError(f"{path} is damaged: the checksum of its vectors is not that of its header; save it again")
    ids = np.frombuffer(payload, dtype="<i8", count=count).astype(np.int64, copy=False)
    vectors = np.frombuffer(payload, dtype="<f4", offset=8 * count).reshape(count, width).astype(np.float32, copy=False)
    return header, ids, vectors
