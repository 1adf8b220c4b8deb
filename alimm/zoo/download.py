"""How a checkpoint gets onto this machine, and how it is read without trusting it.

A name is looked for in this order; the first file whose sha256 is right is taken:

1. an explicit path given by the caller,
2. ``$ALIMM_ZOO_DIR``, a folder of checkpoints that is only read,
3. the cache, ``checkpoints`` under ``alimm.paths.cache_dir()``,
4. the locations of the metafile in their order: a path relative to the resource root (used where it lies), ``file://``,
   ``https://``, ``http://`` (copied into the cache).

A download is streamed to a temporary name beside its place, checked against the full digest, and moved into place in
one step under a lock, so that no other process ever sees half a file. ``ALIMM_OFFLINE=1`` forbids the network.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from filelock import FileLock

from alimm.paths import cache_dir
from alimm.version import __version__
from alimm.zoo.index import WEIGHTS_NAME, ModelEntry, get_entry, is_url, sha256_of

SCHEME = "alimm://"
_CHUNK = 1 << 18


class DownloadError(RuntimeError):
    """No location gave the right file; the message lists each with what was wrong."""


class _Advance(Protocol):
    def __call__(self, count: int, /) -> None: ...


def checkpoint_dir() -> Path:
    """Where downloads are kept. Not created here."""
    return cache_dir() / "checkpoints"


def download(name: str, dest: Path | None = None, timeout: float = 30.0) -> Path:
    """Fetch the checkpoint of a model, or find the copy that is here already.

    Args:
        name: a model of the zoo, with or without ``alimm://``.
        dest: also copy it into this folder, under its own name; the copy is what is returned.
        timeout: seconds that a server may stay silent.

    Returns:
        A file whose sha256 is the one in the index.

    Raises:
        ValueError: no such model, or it has no checkpoint.
        DownloadError: no location gave the right file, the network is needed and ``ALIMM_OFFLINE=1`` is set, or
            ``dest`` cannot be written.
    """
    entry = get_entry(name.removeprefix(SCHEME))
    path = fetch(entry, timeout=timeout)
    if dest is None:
        return path
    target = dest / entry.weights_name
    if not (target.is_file() and sha256_of(target) == entry.sha256):
        try:
            dest.mkdir(parents=True, exist_ok=True)
            _store(entry, path.resolve().as_uri(), target, timeout)
        except OSError as error:
            raise DownloadError(f"cannot write to {dest}: {error}") from error
    return target


def fetch(entry: ModelEntry, explicit: Path | None = None, timeout: float = 30.0) -> Path:
    """Return a verified checkpoint of ``entry``; the module's docstring has the order of the search.

    Args:
        entry: from :func:`alimm.zoo.index.get_entry`.
        explicit: a file that must be this checkpoint; nothing else is looked at.
        timeout: seconds that a server may stay silent.

    Raises:
        ValueError: the entry has no weights or no usable digest, or ``explicit`` is not the file it should be.
        DownloadError: as in :func:`download`.
    """
    _check_entry(entry)
    if explicit is not None:
        if fault := _fault(explicit, entry):
            raise ValueError(f"{explicit} is not the checkpoint of {entry.name}: {fault}")
        return explicit
    failures: list[str] = []
    if zoo_dir := os.environ.get("ALIMM_ZOO_DIR"):
        candidate = Path(zoo_dir).expanduser() / entry.weights_name
        fault = _fault(candidate, entry)
        if not fault:
            return candidate
        failures.append(f"$ALIMM_ZOO_DIR {candidate}: {fault}")
        if candidate.is_file():
            warnings.warn(f"{candidate} in $ALIMM_ZOO_DIR is passed over: {fault}", stacklevel=2)
    cached = checkpoint_dir() / entry.weights_name
    if cached.is_file():
        fault = _fault(cached, entry)
        if not fault:
            return cached
        failures.append(f"cache {cached}: {fault}")
    for location in entry.weights:
        if not is_url(location):
            fault = _fault(entry.root / location, entry)
            if not fault:
                return entry.root / location
            failures.append(f"{entry.root / location}: {fault}")
        elif _needs_network(location) and _offline():
            failures.append(f"{location}: not tried, ALIMM_OFFLINE=1 forbids the network")
        elif failure := _try_store(entry, location, cached, timeout):
            failures.append(f"{location}: {failure}")
        else:
            return cached
    raise DownloadError(_report(entry, cached, failures))


def load_weights(path: Path | str, map_location: Any = "cpu", trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint, of the zoo or of a training run, without running code that it may hold.

    Args:
        path: the file.
        map_location: as in ``torch.load``.
        trust: read a file that holds more than tensors, numbers and MMEngine's logs. Doing so runs code of the file.

    Raises:
        ValueError: the file is no checkpoint, or holds such objects and ``trust`` is False.
    """
    import pickle

    import torch

    from alimm.apis.checkpoints import load_restricted, make_local_loader

    try:
        try:
            content = load_restricted(path, map_location)
        except pickle.UnpicklingError:
            if trust:
                content = torch.load(path, map_location=map_location, weights_only=False)
            else:
                # Takes the files that the user has named as trusted, and refuses others with the way out.
                content = make_local_loader(None)(str(path), map_location)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}. Is the file complete?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict with 'state_dict', or a state dict, got {type(content).__name__}")
    return content


def load_from_alimm(filename: str, map_location: Any = None) -> dict[str, Any]:
    """MMEngine's checkpoint loader for ``alimm://NAME``. Every rank calls it: the lock lets one of them download."""
    return load_weights(download(filename), map_location)


def register() -> None:
    """Make ``load_from='alimm://NAME'`` work in configs. May be called more than once."""
    from mmengine.runner.checkpoint import CheckpointLoader

    CheckpointLoader.register_scheme(prefixes=SCHEME, loader=load_from_alimm, force=True)


def _check_entry(entry: ModelEntry) -> None:
    if not entry.weights:
        raise ValueError(
            f"the zoo has no checkpoint of {entry.name}. Train one ({entry.command or 'see ' + entry.config}) and pass "
            "its path"
        )
    match = WEIGHTS_NAME.search(entry.weights_name)
    if len(entry.sha256) != 64 or match is None or not entry.sha256.startswith(match["digits"]):
        raise ValueError(
            f"{entry.metafile}: {entry.name}: expected Weights SHA256 with 64 hex digits, of which the weights name "
            f"carries the first eight, got {entry.sha256!r} and {entry.weights_name!r}"
        )


def _fault(path: Path, entry: ModelEntry) -> str:
    if not path.is_file():
        return "no such file"
    digest = sha256_of(path)
    return "" if digest == entry.sha256 else f"expected sha256 {entry.sha256}, got {digest}"


def _offline() -> bool:
    return os.environ.get("ALIMM_OFFLINE", "").lower() not in ("", "0", "false", "no")


def _needs_network(location: str) -> bool:
    return not location.startswith("file://")


def _report(entry: ModelEntry, cached: Path, failures: list[str]) -> str:
    tried = "\n".join(f"  - {failure}" for failure in failures)
    return (
        f"no checkpoint of {entry.name} could be had:\n{tried}\n"
        f"Put the file (sha256 {entry.sha256}) at {cached}, or into a folder that $ALIMM_ZOO_DIR names, as "
        f"{entry.weights_name}"
    )


def _try_store(entry: ModelEntry, location: str, target: Path, timeout: float) -> str:
    """Fetch one location to ``target``; return what went wrong, empty when nothing did."""
    try:
        _store_locked(entry, location, target, timeout)
    except (DownloadError, ValueError) as error:
        return str(error)
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return f"cannot be reached: {error.reason}"
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _store_locked(entry: ModelEntry, location: str, target: Path, timeout: float) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(target.name + ".lock"))
        lock.acquire()
    except OSError as error:
        raise DownloadError(f"cannot write to {target.parent} ({error}); the cache moves with MMENGINE_HOME") from error
    try:
        # Another process may have finished while this one waited.
        if _fault(target, entry):
            _store(entry, location, target, timeout)
    finally:
        lock.release()


def _store(entry: ModelEntry, location: str, target: Path, timeout: float) -> None:
    part = target.with_name(f"{target.name}.part-{os.getpid()}")
    digest = hashlib.sha256()
    count = 0
    try:
        with _open(location, timeout) as (source, length), part.open("wb") as sink, _progress(entry, length) as advance:
            try:
                while chunk := source.read(_CHUNK):
                    sink.write(chunk)
                    digest.update(chunk)
                    count += len(chunk)
                    advance(len(chunk))
            except http.client.IncompleteRead as error:
                sink.write(error.partial)
                digest.update(error.partial)
                count += len(error.partial)
        if digest.hexdigest() != entry.sha256:
            fault = f"truncated after {count} of {length} bytes: " if length is not None and count < length else ""
            raise DownloadError(
                f"{fault}expected sha256 {entry.sha256}, got {digest.hexdigest()}; what came was removed"
            )
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _open(location: str, timeout: float) -> Iterator[tuple[IO[bytes], int | None]]:
    """Open a ``file``, ``http`` or ``https`` location for reading; yields it and its length where known."""
    parts = urllib.parse.urlsplit(location)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"file:// must name a file of this machine, got the host {parts.netloc!r}")
        path = Path(urllib.request.url2pathname(parts.path))
        with path.open("rb") as file:
            yield file, path.stat().st_size
    elif parts.scheme in ("http", "https"):
        request = urllib.request.Request(location, headers={"User-Agent": f"alimm/{__version__}"})
        with urllib.request.build_opener(_DirectLoopback).open(request, timeout=timeout) as response:
            length = response.headers.get("Content-Length")
            yield response, int(length) if length else None
    else:
        raise ValueError(f"the scheme {parts.scheme!r} is not known; use https, http or file")


class _DirectLoopback(urllib.request.ProxyHandler):
    """The environment's proxies for every host but this machine, decided anew at each redirect."""

    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> Any:
        host = urllib.parse.urlsplit(req.full_url).hostname or ""
        return None if _is_loopback(host) else super().proxy_open(req, proxy, type)


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def _progress(entry: ModelEntry, length: int | None) -> Iterator[_Advance]:
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(entry.name, total=length)
        yield lambda count: bar.advance(task, count)
