"""Fashion-MNIST: 70,000 grey product photos of 28 x 28 pixels in 10 classes, in the idx format of MNIST."""

from __future__ import annotations

import gzip
import os
import shlex
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from numpy.typing import NDArray

from alimm.paths import data_root as default_data_root
from alimm.paths import resource_root
from alimm.registry import DATASETS

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
FOLDER = "fashion_mnist"


def prepare_command(script: str, folder: Path, default: Path) -> str:
    """The command that fetches a data set into ``folder``."""
    command = f"python {shlex.quote(str(resource_root() / 'tools' / 'data' / script))}"
    return command if folder == default else f"{command} --out {shlex.quote(str(folder))}"


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read a gzipped idx file of bytes.

    The header is the magic number 0, 0, 8 (unsigned byte), ``dimensions``, then the length of each dimension as a
    big-endian 32-bit number.

    Raises:
        ValueError: the file is no such file, or is cut off or too long. The message names it.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error, struct.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}; fetch it again") from error
    magic = bytes([0, 0, 8, dimensions])
    start = 4 + 4 * dimensions
    if data[:4] != magic or len(data) < start:
        raise ValueError(
            f"{path} is not an idx file of {dimensions} dimensions: expected the first bytes {magic.hex()}, got "
            f"{data[:4].hex() or 'nothing'}"
        )
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    expected = start + int(np.prod(shape, dtype=np.int64))
    if len(data) != expected:
        raise ValueError(
            f"{path} is damaged: its header promises {' x '.join(map(str, shape))}, {expected} bytes in all, it has "
            f"{len(data)}; fetch it again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


@DATASETS.register_module()
class FashionMNIST(BaseDataset):
    """Fashion-MNIST as an MMEngine data set.

    Items carry ``img`` (uint8, 28 x 28, light on black), ``gt_label``, ``gt_identity`` (the row: each picture is a
    product of its own) and ``sample_id`` (``train/000017``). ``metainfo`` holds ``classes`` and ``class_counts``.

    Args:
        split: ``'train'`` (60,000 pictures) or ``'test'`` (10,000).
        data_root: the folder with the four files; by default ``fashion_mnist`` in alimm's data folder, where
            ``tools/data/prepare_fashion_mnist.py`` puts them.
        channels: 3 repeats the grey values, 1 does not.
        **kwargs: of MMEngine's BaseDataset.

    Raises:
        FileNotFoundError: the files are not there. The message holds the command that fetches them.
        ValueError: an argument or a file is wrong.
    """

    def __init__(
        self,
        split: str = "train",
        data_root: str | os.PathLike[str] | None = None,
        channels: int = 3,
        metainfo: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if split not in FILES:
            raise ValueError(f"FashionMNIST: split must be train or test, got {split!r}")
        if channels not in (1, 3):
            raise ValueError(f"FashionMNIST: channels must be 1 or 3, got {channels!r}")
        self.split, self.channels = split, channels
        default = default_data_root() / FOLDER
        folder = default if data_root is None else Path(data_root).expanduser()
        paths = [folder / name for name in FILES[split]]
        for path in paths:
            if not path.is_file():
                command = prepare_command("prepare_fashion_mnist.py", folder, default)
                raise FileNotFoundError(f"FashionMNIST: {path} is missing. Fetch the data (31 MB) with: {command}")
        self.images, self.labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"{paths[0]} holds {len(self.images)} pictures and {paths[1]} {len(self.labels)} labels: the files do "
                f"not belong together"
            )
        if self.labels.size and self.labels.max() >= len(CLASSES):
            row = int(self.labels.argmax())
            raise ValueError(f"{paths[1]}: label {row} is {self.labels[row]}, expected 0 to {len(CLASSES) - 1}")
        counts = np.bincount(self.labels, minlength=len(CLASSES)).tolist()
        super().__init__(
            data_root=os.fspath(folder),
            metainfo={"classes": CLASSES, "class_counts": counts, **(metainfo or {})},
            **kwargs,
        )

    def load_data_list(self) -> list[dict[str, Any]]:
        """One dict a picture; the picture itself is added when it is asked for."""
        return [
            dict(row=row, gt_label=label, gt_identity=row, sample_id=f"{self.split}/{row:06d}")
            for row, label in enumerate(self.labels.tolist())
        ]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """The item ``idx`` with its picture."""
        item: dict[str, Any] = super().get_data_info(idx)
        item["img"] = np.repeat(self.images[item["row"]][..., None], self.channels, axis=2)
        item["img_shape"] = item["ori_shape"] = item["img"].shape[:2]
        return item

    def get_cat_ids(self, idx: int) -> list[int]:
        """The class of item ``idx``, as MMEngine's dataset wrappers ask for it."""
        return [int(super().get_data_info(idx)["gt_label"])]
