"""The folder of one build: parts of stages, each written whole or not at all, each with a receipt.

A task reads parts and writes one part, ``<stage>/part-00012.safetensors``; its receipt, ``<stage>/part-00012.json``,
follows once the part is there. So a part with a receipt is finished, whatever happened to the process that wrote it.
Two processes that write the same part do no harm: both write the same bytes, and name them in one step.

``run.json`` holds the fingerprint of the build (of its data, its configuration, the version of the code). The tasks of
a stage must follow from the fingerprint alone; then the parts that an earlier run left are those of this one.
"""

from __future__ import annotations

import json
import re
import resource
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.part_files import PartReader, clean, encode, file_crc, publish

FORMAT = 1
"""Version of the layout of a run folder."""

_RECEIPT = re.compile(r"part-(\d{5,})\.json")
_STAGE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TYPES: dict[str, type | tuple[type, ...]] = {
    "bytes": int,
    "crc32": int,
    "peak_rss_bytes": int,
    "cpu_seconds": (int, float),
    "wall_seconds": (int, float),
    "arrays": dict,
    "meta": dict,
}

Receipt = dict[str, Any]
"""What is known of a finished part.

``stage``, ``part``, ``bytes``, ``crc32``, ``arrays`` (name -> dtype, shape), ``cpu_seconds``, ``wall_seconds``,
``peak_rss_bytes`` (of the process), ``meta`` (what its task said).
"""


def peak_rss() -> int:
    """The most resident memory of this process so far, in bytes; mapped pages of files count."""
    try:
        # Not ru_maxrss: a process that was started by fork and exec inherits that of its parent.
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return 1024 * int(found[1])
    except OSError:
        pass
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class RunFolder:
    """The folder of one build, opened by its driver; workers `attach`.

    Attributes:
        path: where it is.
        fingerprint: what the build is of, as JSON gives it back.
        resumed: whether an earlier run has left it, so that the checksums of its parts are to be compared.
        durable: whether parts are flushed to the disk before they count; not worth it for a temporary folder.
    """

    def __init__(self, path: str | Path, fingerprint: Mapping[str, Any] | None = None, *, durable: bool = True) -> None:
        """Create the folder, or open that of an earlier run of the same build.

        Raises:
            ValueError: it is of another build, or it holds parts but no ``run.json`` that can be read.
        """
        self.path, self.durable = Path(path), durable
        self.fingerprint: dict[str, Any] = json.loads(json.dumps(dict(fingerprint or {}), default=_plain))
        self.path.mkdir(parents=True, exist_ok=True)
        self.resumed = (self.path / "run.json").exists()
        if self.resumed:
            _check_same(self.path, _read_fingerprint(self.path), self.fingerprint)
        elif any(self.path.glob("*/part-*.json")):
            raise ValueError(f"{self.path} holds parts of a build but no run.json: delete it, or name another folder")
        else:
            text = json.dumps({"format": FORMAT, "fingerprint": self.fingerprint}, sort_keys=True, indent=1)
            publish(self.path / "run.json", [text.encode()], durable=durable)
        clean(self.path)

    @classmethod
    def attach(
        cls, path: str | Path, fingerprint: Mapping[str, Any] | None = None, *, durable: bool = True
    ) -> RunFolder:
        """Open a folder that the driver of the build has made.

        Args:
            path: where it is.
            fingerprint: what the driver builds; None takes any.
            durable: as the driver's.

        Raises:
            ValueError: there is no such folder here, or it is of another build.
        """
        run = cls.__new__(cls)
        run.path, run.durable, run.resumed = Path(path), durable, True
        if not (run.path / "run.json").is_file():
            raise ValueError(
                f"a worker on {socket.gethostname()} finds no run folder at {run.path}. It must lie on a file system "
                "that every node mounts under the same path: name such a folder for the run"
            )
        run.fingerprint = _read_fingerprint(run.path)
        if fingerprint is not None:
            _check_same(run.path, run.fingerprint, dict(fingerprint))
        return run

    def write(
        self,
        stage: str,
        part: int,
        arrays: Mapping[str, NDArray[Any]],
        meta: Mapping[str, Any] | None = None,
        clock: Callable[[], tuple[float, float]] | None = None,
    ) -> Receipt:
        """Write a part and its receipt; earlier ones are replaced.

        Args:
            stage: letters, digits and ``_ . -``.
            part: >= 0.
            arrays: of bool, integers or floats; any order and byte order, stored little-endian in C order.
            meta: further entries of the receipt, as JSON takes them.
            clock: gives the CPU and wall seconds of the task so far; asked when the part is on the disk.

        Raises:
            OSError: it could not be written; nothing of it is left, and no receipt is made.
        """
        target = self._file(stage, part)
        target.parent.mkdir(exist_ok=True)
        size, crc = publish(target, encode(arrays), durable=self.durable)
        cpu, wall = clock() if clock is not None else (0.0, 0.0)
        shapes = {name: {"dtype": array.dtype.name, "shape": list(array.shape)} for name, array in arrays.items()}
        receipt = {
            "stage": stage,
            "part": part,
            "bytes": size,
            "crc32": crc,
            "arrays": dict(sorted(shapes.items())),
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            "peak_rss_bytes": peak_rss(),
            "meta": dict(meta or {}),
        }
        text = json.dumps(receipt, default=_plain)
        publish(target.with_suffix(".json"), [text.encode()], durable=self.durable)
        return json.loads(text)

    def done(self, stage: str, part: int, verify: bool = False) -> Receipt | None:
        """The receipt of a finished part; None where it must be computed.

        Args:
            stage: which stage.
            part: which part of it.
            verify: also read the file and compare its checksum.
        """
        target = self._file(stage, part)
        try:
            receipt = json.loads(target.with_suffix(".json").read_bytes())
            if (
                not isinstance(receipt, dict)
                or (receipt["stage"], receipt["part"]) != (stage, part)
                or not all(isinstance(receipt[key], kind) for key, kind in _TYPES.items())
                or target.stat().st_size != receipt["bytes"]
                or (verify and file_crc(target) != receipt["crc32"])
            ):
                return None
        except (OSError, ValueError, KeyError, RecursionError):
            return None
        return receipt

    def receipts(self, stage: str) -> list[Receipt]:
        """The receipts of the finished parts of a stage, by part; empty where it has not begun."""
        names = (_RECEIPT.fullmatch(file.name) for file in (self.path / stage).glob("part-*.json"))
        parts = sorted(int(name[1]) for name in names if name)
        return [receipt for part in parts if (receipt := self.done(stage, part)) is not None]

    def read(self, stage: str, part: int, names: Iterable[str] | None = None) -> dict[str, NDArray[Any]]:
        """Copies of the arrays of a part, or of those that are named.

        Raises:
            ValueError: the part is missing or damaged, or has no such array.
        """
        with PartReader(self._file(stage, part)) as reader:
            return {name: reader.read(name) for name in (reader.names if names is None else names)}

    def rows(self, stage: str, part: int, name: str, start: int, stop: int) -> NDArray[Any]:
        """Copy of the rows [start, stop) of one array of a part; the rest of the file is not read."""
        with PartReader(self._file(stage, part)) as reader:
            return reader.read(name, start, stop)

    def map(self, stage: str, part: int, name: str) -> NDArray[Any]:
        """One array of a part, mapped from its file, read-only."""
        with PartReader(self._file(stage, part)) as reader:
            return reader.map(name)

    def _file(self, stage: str, part: int) -> Path:
        assert _STAGE.fullmatch(stage), stage
        assert part >= 0, part
        return self.path / stage / f"part-{part:05d}.safetensors"


def _plain(value: Any) -> Any:
    """What JSON takes instead of NumPy's numbers and arrays."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _read_fingerprint(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / "run.json").read_bytes())
        version, fingerprint = content["format"], content["fingerprint"]
        if not isinstance(fingerprint, dict):
            raise ValueError(f"its fingerprint is of type {type(fingerprint).__name__}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path / 'run.json'} is damaged ({error!r}): delete {path}, or name another folder for the run"
        ) from error
    if version != FORMAT:
        raise ValueError(f"{path} has layout {version!r}, expected {FORMAT}: delete it, or name another folder")
    return fingerprint


def _check_same(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    there, here = _flat(found), _flat(expected)
    differing = [key for key in sorted({*there, *here}) if there.get(key, "nothing") != here.get(key, "nothing")]
    if differing:
        what = "; ".join(
            f"{key} is {there.get(key, 'nothing')!r} there, {here.get(key, 'nothing')!r} here" for key in differing
        )
        raise ValueError(f"{path} is the run folder of another build ({what}): name another folder, or delete this one")


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            flat.update(_flat(entry, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = entry
    return flat
