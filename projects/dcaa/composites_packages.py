"""Where the pictures of the composite set come from: Debian packages, pinned, and what scikit-image carries.

openclipart's drawings and Tux Paint's photographic stamps lie in folders by subject; a table maps the folders of both
to the same classes. A package's chosen files are checked together, by one digest over all of theirs.
"""

from __future__ import annotations

import importlib.util
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from alimm.datasets import fetch
from alimm.datasets.fetch import DebianPackage, FetchError, sha256_of

DOMAINS = ("source", "target")

FOLDERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "animal": {"source": ("animals",), "target": ("animals",)},
    "food": {"source": ("food",), "target": ("food",)},
    "household": {
        "source": ("tools", "containers", "buildings/furniture", "recreation/music"),
        "target": ("household", "hobbies", "medical"),
    },
    "plant": {"source": ("plants",), "target": ("plants",)},
    "building": {"source": ("buildings",), "target": ("town/houses", "town/monuments")},
    "person": {"source": ("people",), "target": ("people",)},
    "vehicle": {
        "source": ("transportation/vehicles", "transportation/boating"),
        "target": ("vehicles", "military/vehicles"),
    },
}
"""Candidate class -> domain -> folders of that domain's package; the first class that matches a file has it."""

SKIP = {
    "source": (
        "/fantasy/", "/bodypart/", "/clothing/", "/smilies/", "/stickmen/", "/weapons/", "/toys/", "note", "clef",
        "croche", "quaver", "bach_", "beethov", "handel_", "piano_theory",
    ),
    "target": ("/cartoon/", "/toys/", "/plastic/", "/body_parts/", "_mirror", "_flip", "hedgehog", "pizza", "tooth"),
}  # fmt: skip
"""Parts of paths that rule a file out: no drawings among the stamps, no letters and notes among the drawings."""


@dataclass(frozen=True)
class CutOutPackage:
    """A package with a tree of cut-outs.

    Attributes:
        package: name, version and digest; its ``files`` is empty.
        folder: path of the tree inside the package.
        listing: sha256 over the chosen files, see `listing_of`.
        licence: for the data card.
    """

    package: DebianPackage
    folder: str
    listing: str
    licence: str


PACKAGES: Mapping[str, CutOutPackage] = {
    "source": CutOutPackage(
        DebianPackage(
            "openclipart-png", "1:0.18+dfsg-19", "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02", {}
        ),
        "usr/share/openclipart/png",
        "4b69ad9330bd4db42dab58b2807fbc4c707528cf0265318f2633a2c306a182a5",
        "public domain (Creative Commons Public Domain Dedication of each author)",
    ),
    "target": CutOutPackage(
        DebianPackage(
            "tuxpaint-stamps-default",
            "2022.06.04-1",
            "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
            {},
        ),
        "usr/share/tuxpaint/stamps",
        "b78e9c010ac25555fbf2114ffb786e411ab978e90f84054cf56437701081e557",
        "GPL-2, Copyright 2002-2022 Bill Kendrick and the contributors to Tux Paint",
    ),
}

TEMPLATES = DebianPackage(
    "tuxpaint-data",
    "1:0.9.28-sdl2-1",
    "f5d0de8f9a70d2efc1241d19f26168cb8bf279f1b77abd3631e7a1a55c40e5e5",
    {
        f"usr/share/tuxpaint/templates/{name}.jpg": digest
        for name, digest in {
            "burnt_bark": "14f3d6ad3fa5dd2cc0a2a996ed95d09e07f858269a0c90564d8f6f09d679f3b8",
            "cliff": "ff8da5b7a4eb5f5558a9768764871330ba245dc54ff55d5766129f47a45e7392",
            "lighthouse": "bf92c1139da97690208a3948c9d1051649deb44bb51baa288820f5c64f9e6365",
            "mossy_bark": "153b9d8eb33c6f0f6c4a8014039606ccbf1a89677209877de64ab3645324edbb",
            "mossy_log": "02ba4842fcf5f48f000d8325da89d85bedd8edc0d8cf551603dfdcfca12064e2",
            "mudstone": "ce1d13d3b66155bea3bc28db56694ade9ed27bd8814814672a0d58cd1b0d93f5",
            "ocean_splash": "a6c1697ed8dc06c72136041363b0808f5092625a466e8f9c5f7752375a398404",
            "ocean_waves": "b99c24c7148cb2935c7a9cfde12b81f368f8162e32349e554a8cb2dd44c5624e",
            "rocks": "f3ddf517f26bc77a3f6a98010fc0bfa0ccac431869388755e0032a4f7bb6d748",
            "sun_behind_clouds": "a76583449fb6cf58ca3fd88deac57932f5e0623df8f6ca733258a2ceab3abf91",
            "wool_mill_machine": "e66d36c482d32cc5bfd001923e584cf6398ef95039d92e9d2e65f64c33274a18",
        }.items()
    },
)
"""Photographs that show nothing of the classes: no animals, plants or food."""

SKIMAGE = {
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
    "gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
    "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
    "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
}
"""Photographs that scikit-image carries (CC0 or public domain), with their digests."""


def class_of(domain: str, name: str) -> str | None:
    """Class of a file by its path in the package's tree, None if it shows none of them or is ruled out."""
    path = f"/{name}"
    if not name.endswith(".png") or any(part in path for part in SKIP[domain]):
        return None
    for label, folders in FOLDERS.items():
        if any(path.startswith(f"/{folder}/") for folder in folders[domain]):
            return label
    return None


def listing_of(files: Mapping[str, bytes]) -> str:
    """One digest of many files: sha256 over the lines ``PATH SHA256`` in the order of the paths."""
    lines = "".join(f"{name} {sha256_of(files[name])}\n" for name in sorted(files))
    return sha256_of(lines.encode())


def fetch_tree(bundle: CutOutPackage, chosen: Callable[[str], bool], source: Path | None = None) -> dict[str, bytes]:
    """Chosen files of a package's tree: path in the tree -> content.

    Looked for as `alimm.datasets.fetch.fetch_files` does: in ``source`` (a package, a folder with packages or a folder
    with ``usr/share/...``), else on this machine, else on Debian's mirrors.

    Raises:
        FetchError: the package cannot be had.
        ValueError: the files are not those of the pinned version.
    """
    package = bundle.package
    if source is not None:
        if not source.exists():
            raise FetchError(f"--from {source}: there is no such file or folder")
        deb = source if source.is_file() else fetch.find_deb(package, source)
        files = _in_folder(bundle, chosen, source) if deb is None else _in_package(bundle, chosen, deb)
        if not files:
            raise FetchError(f"{source} holds neither a package {package.name}_*.deb nor a folder {bundle.folder}")
        return _checked(bundle, files, str(source))
    files = _in_folder(bundle, chosen, Path("/"))
    if files and listing_of(files) == bundle.listing:
        return files
    with tempfile.TemporaryDirectory(prefix="alimm-apt-") as folder:
        deb = fetch.apt_download(package, Path(folder))
        return _checked(bundle, _in_package(bundle, chosen, deb), deb.name)


def _in_folder(bundle: CutOutPackage, chosen: Callable[[str], bool], root: Path) -> dict[str, bytes]:
    tree = root / bundle.folder
    names = (path.relative_to(tree).as_posix() for path in sorted(tree.rglob("*.png")))
    return {name: (tree / name).read_bytes() for name in names if chosen(name)}


def _in_package(bundle: CutOutPackage, chosen: Callable[[str], bool], deb: Path) -> dict[str, bytes]:
    files = {}
    try:
        with fetch.open_data(deb, deb.read_bytes()) as archive:
            for member in archive:
                name = member.name.removeprefix("./").removeprefix(f"{bundle.folder}/")
                content = archive.extractfile(member) if member.isfile() and chosen(name) else None
                if content is not None:
                    files[name] = content.read()
    except (EOFError, OSError, ValueError, tarfile.TarError) as error:
        raise ValueError(f"{deb} cannot be read as a Debian package: {error}. Fetch it again") from error
    return files


def _checked(bundle: CutOutPackage, files: dict[str, bytes], where: str) -> dict[str, bytes]:
    if (digest := listing_of(files)) != bundle.listing:
        raise ValueError(
            f"{where} does not hold the pictures of {bundle.package.name} {bundle.package.version}: expected the "
            f"digest {bundle.listing} over the chosen files, got {digest} over {len(files)}. Fetch that version and "
            f"give it with --from"
        )
    return files


def skimage_photographs() -> list[bytes]:
    """Contents of the photographs of scikit-image, in the order of `SKIMAGE`.

    Raises:
        ValueError: scikit-image is missing or carries other files.
    """
    mend = "pip install scikit-image"
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ValueError(f"the backgrounds need scikit-image, which carries {', '.join(SKIMAGE)}: {mend}")
    contents = []
    for name, digest in SKIMAGE.items():
        path = Path(spec.origin).parent / "data" / name
        data = path.read_bytes() if path.is_file() else b""
        if sha256_of(data) != digest:
            raise ValueError(f"{path}: expected sha256 {digest}, got {sha256_of(data) if data else 'no file'}: {mend}")
        contents.append(data)
    return contents
