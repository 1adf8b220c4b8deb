"""Build the embedded data set EmojiProducts from four npm packages, the same bytes each time.

    npm pack @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 \
             @iconify-json/fluent-emoji-flat@1.2.6 emojibase-data@17.0.0
    python tools/data/build_emoji_products.py --packages . --out alimm/datasets/assets/emoji_products.npz

Without ``--packages`` the packages are fetched with ``npm pack`` into a temporary folder. Every input is checked
against its sha256 before it is opened, and the pixels against theirs afterwards. Nothing is random: identities are
ordered by code point, pictures by vendor and identity. Needs the extra ``dev`` (resvg_py and Pillow draw the vectors).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 64
LANGUAGES = ("en", "de", "es", "fr", "hi", "it", "ja", "ko", "pt", "ru", "th", "zh")
VENDORS = (
    dict(
        name="noto", package="@iconify-json/noto", version="1.2.9", licence="Apache-2.0",
        author="Google Inc, Noto Emoji",
        sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    dict(
        name="twemoji", package="@iconify-json/twemoji", version="1.2.5", licence="CC-BY-4.0",
        author="Twitter, Inc and other contributors, Twemoji",
        sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    dict(
        name="fluent", package="@iconify-json/fluent-emoji-flat", version="1.2.6", licence="MIT",
        author="Microsoft Corporation, Fluent Emoji",
        sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
)  # fmt: skip
TEXT = dict(
    name="emojibase", package="emojibase-data", version="17.0.0", licence="MIT",
    author="Miles Johnson, Emojibase; names and keywords from Unicode CLDR",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)  # fmt: skip
PIXELS_SHA256 = "cb7ff4cc60acfa3ccae0c87abd42be02915bfe984648b1cace5dc6b6daf86693"
"""Of the RGBA pixels, shape (images, 64, 64, 4), rows in order; holds for any encoder of the file."""


def fetch(folder: Path) -> None:
    """Fetch the four packages with npm into ``folder``."""
    names = [f"{source['package']}@{source['version']}" for source in (*VENDORS, TEXT)]
    try:
        subprocess.run(["npm", "pack", "--silent", *names], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except FileNotFoundError as error:
        raise SystemExit("npm is not installed: apt-get install npm, or give --packages FOLDER") from error


def open_package(folder: Path, source: dict[str, str]) -> dict[str, bytes]:
    """Check and read one package: file name inside it -> bytes, JSON files only."""
    path = folder / f"{source['package'].lstrip('@').replace('/', '-')}-{source['version']}.tgz"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: run `npm pack {source['package']}@{source['version']}` there")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != source["sha256"]:
        raise SystemExit(f"{path} has sha256 {digest}, expected {source['sha256']}: remove it and fetch it again")
    with tarfile.open(path) as archive:
        members = (member for member in archive if member.isfile() and member.name.endswith(".json"))
        return {
            member.name.removeprefix("package/"): handle.read()
            for member in members
            if (handle := archive.extractfile(member)) is not None
        }


def code_point_key(hexcode: str) -> str:
    """The code points without the variation selector, which vendors write or leave out as they like."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def read_text(files: dict[str, bytes]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The identities (those with a sub-group; components such as skin tones are no products) and the group names."""
    groups = json.loads(files["meta/groups.json"])
    component = next(int(key) for key, name in groups["groups"].items() if name == "component")
    localised = {
        language: {row["hexcode"]: row for row in json.loads(files[f"{language}/data.json"])} for language in LANGUAGES
    }
    identities = []
    for hexcode, row in localised["en"].items():
        if row.get("group", component) == component:
            continue
        texts = {language: rows[hexcode] for language, rows in localised.items() if hexcode in rows}
        identities.append(
            dict(
                hexcode=hexcode,
                emoji=row["emoji"],
                group=groups["groups"][str(row["group"])],
                subgroup=groups["subgroups"][str(row["subgroup"])],
                names={language: text["label"] for language, text in texts.items()},
                tags={language: text.get("tags", []) for language, text in texts.items()},
            )
        )
    identities.sort(key=lambda identity: [int(part, 16) for part in identity["hexcode"].split("-")])
    order = dict(groups=list(groups["groups"].values()), subgroups=list(groups["subgroups"].values()))
    return identities, order


def draw(icons: dict[str, Any], name: str) -> np.ndarray:
    """Draw one icon; uint8 RGBA of shape (64, 64, 4), black where it is transparent."""
    import resvg_py
    from PIL import Image

    icon = icons["icons"][name]
    box = [icon.get(key, icons.get(key, 0)) for key in ("left", "top", "width", "height")]
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(map(str, box))}" width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
    pixels = np.array(Image.open(io.BytesIO(png)).convert("RGBA"))
    pixels[pixels[..., 3] == 0] = 0
    return pixels


def encode(pixels: np.ndarray) -> bytes:
    """Lossless WebP, about half the size of PNG for flat drawings."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="WEBP", lossless=True, quality=100, method=6, exact=True)
    return stream.getvalue()


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Like numpy.savez_compressed, but with fixed time stamps, so that the same arrays give the same bytes."""
    temporary = path.with_name(path.name + ".part")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            stream = io.BytesIO()
            np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), stream.getvalue(),
                             zipfile.ZIP_DEFLATED)  # fmt: skip
    os.replace(temporary, path)


def build(packages: Path, out: Path) -> None:
    """Read the packages, draw every picture and write the file."""
    identities, order = read_text(open_package(packages, TEXT))
    digest, encoded, vendor_ids, identity_ids = hashlib.sha256(), [], [], []
    for vendor_id, vendor in enumerate(VENDORS):
        files = open_package(packages, vendor)
        icons = json.loads(files["icons.json"])
        names = {code_point_key(code): name for code, name in json.loads(files["chars.json"]).items()}
        for identity_id, identity in enumerate(identities):
            name = names.get(code_point_key(identity["hexcode"]))
            if name is None:
                continue
            pixels = draw(icons, name)
            digest.update(pixels.tobytes())
            encoded.append(encode(pixels))
            vendor_ids.append(vendor_id)
            identity_ids.append(identity_id)
    present = {identity["subgroup"] for identity in identities}
    meta = dict(
        format=1,
        size=SIZE,
        languages=LANGUAGES,
        pixels_sha256=digest.hexdigest(),
        groups=[name for name in order["groups"] if name in {identity["group"] for identity in identities}],
        subgroups=[name for name in order["subgroups"] if name in present],
        sources=[*VENDORS, TEXT],
        identities=identities,
    )
    text = json.dumps(meta, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_npz(
        out,
        dict(
            pictures=np.frombuffer(b"".join(encoded), np.uint8),
            offsets=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
            vendor=np.array(vendor_ids, np.uint8),
            identity=np.array(identity_ids, np.int32),
            meta=np.frombuffer(text, np.uint8),
        ),
    )
    print(f"{out}: {len(encoded)} pictures of {len(identities)} identities, {out.stat().st_size / 1e6:.1f} MB")
    print(f"sha256 of the file   {hashlib.sha256(out.read_bytes()).hexdigest()}")
    print(f"sha256 of the pixels {digest.hexdigest()}")
    if digest.hexdigest() != PIXELS_SHA256:
        raise SystemExit(f"the pixels differ from the released ones ({PIXELS_SHA256}): is resvg_py as pinned?")


def main() -> None:
    """Parse the arguments and build."""
    parser = argparse.ArgumentParser(description="Build alimm's embedded data set EmojiProducts.")
    parser.add_argument("--packages", type=Path, help="folder with the four npm packages; fetched if not given")
    parser.add_argument("--out", type=Path, default=Path("alimm/datasets/assets/emoji_products.npz"))
    arguments = parser.parse_args()
    if arguments.packages is not None:
        build(arguments.packages, arguments.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        fetch(Path(folder))
        build(Path(folder), arguments.out)


if __name__ == "__main__":
    main()
