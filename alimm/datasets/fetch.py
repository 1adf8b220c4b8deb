"""Files out of Debian packages, without root and without installing anything, each checked against its sha256.

A package carries data that its makers packed; the pinned version is asked for first. Another version is taken too, as
long as the files inside are the same ones. A file is looked for, in this order: in ``source`` (a package, a folder with
packages, or a folder with the files), on this machine where the package is installed, and on Debian's mirrors through
``apt-get``, which reads the machine's own list of sources; it needs no root to download.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class DebianPackage:
    """A package and the files of interest in it.

    Attributes:
        name: as apt knows it.
        version: the pinned version.
        sha256: digest of that version's package file.
        files: path inside the package (``usr/share/...``) -> its digest.
    """

    name: str
    version: str
    sha256: str
    files: Mapping[str, str]


class FetchError(RuntimeError):
    """A package cannot be had here; the message says how to bring it."""


def sha256_of(data: bytes) -> str:
    """Digest of some bytes, as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def fetch_files(package: DebianPackage, source: Path | None = None, root: Path = Path("/")) -> dict[str, bytes]:
    """Return the files of a package: path inside the package -> content.

    Args:
        package: what to fetch.
        source: a package file, a folder with package files, or a folder with the files themselves; nothing else is then
            looked at.
        root: where an installed package's files lie.

    Raises:
        FetchError: the package cannot be had.
        ValueError: a file is not the right one. The message shows both digests.
    """
    if source is not None:
        if not source.exists():
            raise FetchError(f"--from {source}: there is no such file or folder")
        deb = source if source.is_file() else find_deb(package, source)
        found = _read_deb(package, deb) if deb is not None else _read_folder(package, source)
        if found is None:
            names = ", ".join(PurePosixPath(name).name for name in package.files)
            raise FetchError(f"{source} holds neither a package {package.name}_*.deb nor all of {names}")
        return _checked(package, found, str(source))
    found = _read_folder(package, root)
    if found is not None and not _faults(package, found):
        return found
    with tempfile.TemporaryDirectory(prefix="alimm-apt-") as folder:
        deb = apt_download(package, Path(folder))
        return _checked(package, _read_deb(package, deb), deb.name)


def find_deb(package: DebianPackage, folder: Path) -> Path | None:
    """The newest file of a package in a folder, or None."""
    found = sorted(folder.glob(f"{package.name}_*.deb"))
    return found[-1] if found else None


def _read_folder(package: DebianPackage, folder: Path) -> dict[str, bytes] | None:
    """The files below ``folder``, at their full path or directly in it; None if one is missing."""
    found = {}
    for name in package.files:
        path = next((path for path in (folder / name, folder / PurePosixPath(name).name) if path.is_file()), None)
        if path is None:
            return None
        found[name] = path.read_bytes()
    return found


def _faults(package: DebianPackage, found: Mapping[str, bytes]) -> list[str]:
    digests = {name: sha256_of(data) for name, data in found.items()}
    return [
        f"{name}: expected sha256 {package.files[name]}, got {digest}"
        for name, digest in digests.items()
        if digest != package.files[name]
    ]


def _checked(package: DebianPackage, found: dict[str, bytes], where: str) -> dict[str, bytes]:
    if faults := _faults(package, found):
        raise ValueError(
            f"{where} does not hold the files of {package.name} {package.version}: {'; '.join(faults)}. Fetch that "
            f"version and give it with --from"
        )
    return found


def _read_deb(package: DebianPackage, path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    _, _, rest = path.name.partition("_")
    # apt writes the colon of an epoch as %3a.
    is_pinned = rest.replace("%3a", ":").rsplit("_", 1)[0] == package.version
    if is_pinned and sha256_of(data) != package.sha256:
        raise ValueError(f"{path} is damaged: expected sha256 {package.sha256}, got {sha256_of(data)}. Fetch it again")
    found = {}
    try:
        with open_data(path, data) as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                content = archive.extractfile(member) if name in package.files else None
                if content is not None:
                    found[name] = content.read()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a Debian package: {error}. Fetch it again") from error
    if missing := [name for name in package.files if name not in found]:
        raise ValueError(f"{path} has no {', '.join(missing)}; expected the package {package.name} {package.version}")
    return found


@contextmanager
def open_data(path: Path, data: bytes) -> Iterator[tarfile.TarFile]:
    """Open the archive of files inside a package, which is an ``ar`` archive of members with 60-byte headers."""
    if not data.startswith(b"!<arch>\n"):
        raise ValueError("it does not start as a package does")
    position = 8
    while position + 60 <= len(data):
        name, size = (
            data[position : position + 16].decode("ascii").strip(" /"),
            int(data[position + 48 : position + 58]),
        )
        body = data[position + 60 : position + 60 + size]
        if len(body) < size:
            raise ValueError("it is cut off")
        if name == "data.tar.zst":
            # Ubuntu's packages; Python reads this compression from 3.14 only.
            if shutil.which("dpkg-deb") is None:
                raise ValueError("it is compressed with zstd, which needs the command dpkg-deb")
            body = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], check=True, stdout=subprocess.PIPE).stdout
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(body), mode="r:*") as archive:
                yield archive
            return
        position += 60 + size + size % 2
    raise ValueError("it has no data.tar inside")


def apt_download(package: DebianPackage, folder: Path) -> Path:
    """Download with apt: the pinned version, else with fresh lists in ``folder``, else whatever version there is."""
    advice = (
        f"On a machine with Debian's mirrors, run `apt-get download {package.name}={package.version}`, bring the file "
        f"here and give it with --from PATH"
    )
    if shutil.which("apt-get") is None:
        raise FetchError(f"{package.name} comes from Debian and this machine has no apt-get. {advice}")
    private = _private_state(folder)
    update = ["apt-get", "-q", *private, "update"]
    pinned = ["download", f"{package.name}={package.version}"]
    attempts = [
        ["apt-get", "-q", *pinned],
        update,
        ["apt-get", "-q", *private, *pinned],
        ["apt-get", "-q", *private, "download", package.name],
    ]
    last = ""
    for command in attempts:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
        deb = find_deb(package, folder)
        if command is not update and done.returncode == 0 and deb is not None:
            return deb
        last = (done.stderr or done.stdout).strip() or last
    raise FetchError(f"apt-get cannot download {package.name}: {' '.join(last.splitlines()[-2:])}. {advice}")


def _private_state(folder: Path) -> list[str]:
    """Options that keep apt's lists and caches in ``folder``, so that a user without rights can update them."""
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "1",
    }
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder to fill; when all went well it takes the place of ``target``, else nothing changes.

    Raises:
        ValueError: ``target`` cannot be written, or is a folder with other things in it.
    """
    if target.exists() and not (target / "README.md").is_file() and any(target.iterdir()):
        raise ValueError(f"{target} holds other files and would be replaced: give an empty or new folder with --out")
    new, old = (target.with_name(f".{target.name}.{kind}.{os.getpid()}") for kind in ("new", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
    except OSError as error:
        raise ValueError(
            f"cannot write to {target.parent}: {error.strerror}. Give another folder with --out"
        ) from error
    try:
        yield new
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
