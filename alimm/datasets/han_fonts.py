"""The font families that HanGlyphs is rendered from: Debian packages, pinned, with the digest of every file."""

from __future__ import annotations

from dataclasses import dataclass

from alimm.datasets.fetch import DebianPackage


@dataclass(frozen=True)
class Family:
    """A font family and where it comes from. A character is drawn by the first of its files that has it."""

    name: str
    package: DebianPackage
    licence: str


def _family(name: str, package: str, version: str, sha256: str, licence: str, files: dict[str, str]) -> Family:
    paths = {f"usr/share/{path}": digest for path, digest in files.items()}
    return Family(name, DebianPackage(package, version, sha256, paths), licence)


FAMILIES = (
    _family(
        "arphic-uming", "fonts-arphic-uming", "0.2.20080216.2-11",
        "2676b21b90df94f23418610291b71b43720c95cdccb420b97ab56edfd3ce4cf5", "Arphic Public License",
        {"fonts/truetype/arphic/uming.ttc": "fe952e55617275142d9cefd4d79eade4df446517b0478b2567d9bc7df49f70e2"},
    ),
    _family(
        "arphic-ukai", "fonts-arphic-ukai", "0.2.20080216.2-5",
        "b9db73184895b067f7911f9adbf3b137df99c2d4ec5425b4ad779a9834b7110b", "Arphic Public License",
        {"fonts/truetype/arphic/ukai.ttc": "cfc758e69386a21bade8cb3b373fda20d7f2fac6e8904ced2ded98588b63e274"},
    ),
    _family(
        "babelstone-han", "fonts-babelstone-han", "15.0.5-2",
        "c7b7f9b5b78ad14c94d7e6d2b103307a7a643844c7db856fb97611d9d8a80589",
        "Arphic Public License (Han characters); CC-BY-SA 3.0 or 4.0 (some symbols)",
        {
            "fonts/truetype/babelstone/BabelStoneHan.ttf":
            "a2027ca3606907f6a628e9cd869605e3879beaaa38b37c7fec95b372130628c8",
        },
    ),
    _family(
        "droid-fallback", "fonts-droid-fallback", "1:6.0.1r16-1.1",
        "d2096d4edde128fedf6749be2dd204a5810210a6201126d99b8d412344f71056", "Apache-2.0",
        {
            "fonts/truetype/droid/DroidSansFallbackFull.ttf":
            "acb6440a713d880a13a21b468ba7cd43f5a2b2934972e51be791c880730777b8",
            "fonts-droid-fallback/truetype/DroidSansFallback.ttf":
            "56d3edfb377a8bc3c4b77f4476405c770173c0e31221ad7c77d0a8e1f3039a3e",
        },
    ),
    _family(
        "vlgothic", "fonts-vlgothic", "20220612-1",
        "81b0a42456747e7ec2f801028b254c33f8c720a99e15140c23f0861329687448",
        "M+ FONTS License, Sazanami font licence and BSD-3-Clause",
        {
            "fonts/truetype/vlgothic/VL-Gothic-Regular.ttf":
            "cccbbd1a228566007b2e1771bb7ebeda829cc106d4327a924b1c50a47245ea33",
            "fonts/truetype/vlgothic/VL-PGothic-Regular.ttf":
            "9c32cc9cff2d04ac95b0e8fce51ba439083e473581b71cae69aeaa8729e881b3",
        },
    ),
    _family(
        "wqy-zenhei", "fonts-wqy-zenhei", "0.9.45-8",
        "cfed2c29164ff2f133e40ed2046610b172b8618d174840936ac4ec9b6fd668e7",
        "GPL-2 with font embedding exception; M+ FONTS License (some glyphs)",
        {"fonts/truetype/wqy/wqy-zenhei.ttc": "79c18ebe7b811951e8311bad7103ebeae8c337ed9988ea69e8a78a66cfe029b9"},
    ),
)  # fmt: skip
