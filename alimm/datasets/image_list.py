"""A data set of picture files: a folder tree, or a list in a text, CSV or JSON lines file.

    shoes/a 1.jpg 3                                    text: path, white space, label (a tab allows spaces in the label)
    img,label,id,identity                              CSV with a header; img and label are needed
    {"img": "shoes/a 1.jpg", "label": "boot"}          JSON lines, the same keys; further keys stay in the item

A label is the name of a class or its number. Every mistake is told with file and line, before training starts.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset

from alimm.registry import DATASETS

SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
RESERVED = ("gt_identity", "gt_label", "img", "img_path", "img_shape", "ori_shape", "sample_id", "sample_idx")

Record = dict[str, Any]
"""One entry before its label is resolved: img, label, place, and perhaps id, identity and more."""


@DATASETS.register_module()
class ImageList(BaseDataset):
    """Pictures and their classes from a folder tree or a list.

    Without ``ann_file``, each folder in ``data_root`` is a class and all pictures below it belong to it. Order: classes
    by name, pictures by path; of a list, its own order. Items carry ``img_path``, ``gt_label``, ``sample_id`` (the path
    below the root, or the list's id), ``ann_place`` and, from a list with identities, ``gt_identity``. ``metainfo``
    holds ``classes`` and ``class_counts``.

    Args:
        data_root: the folder that paths are relative to.
        ann_file: the list, ``.csv``, ``.jsonl`` or any other name for text; relative to ``data_root``.
        classes: the names in the order of their numbers, or a file with one name a line. By default, those that the
            folders or the list have, sorted. Give the train side's to the test side: it may lack a class, and then its
            numbers would shift.
        check_files: look at the start that every listed picture exists.
        suffixes: what counts as a picture in a folder tree, in lower case.
        **kwargs: of MMEngine's BaseDataset, as ``pipeline``, ``indices`` and ``data_prefix=dict(img_path=...)``.

    Raises:
        FileNotFoundError: there is no such folder or list.
        ValueError: the folder or the list is empty or wrong. The message names the place and how to mend it.
    """

    def __init__(
        self,
        data_root: str | os.PathLike[str] = "",
        ann_file: str | os.PathLike[str] = "",
        classes: Sequence[str] | str | os.PathLike[str] | None = None,
        check_files: bool = True,
        suffixes: Sequence[str] = SUFFIXES,
        metainfo: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not data_root and not ann_file:
            raise ValueError("ImageList needs data_root (a folder with one folder a class), ann_file (a list), or both")
        given = classes if classes is not None else (metainfo or {}).get("classes")
        self.given_classes = None if given is None else _read_classes(given)
        self.check_files, self.suffixes = check_files, tuple(suffixes)
        metainfo = {key: value for key, value in (metainfo or {}).items() if key != "classes"}
        if self.given_classes is not None:
            metainfo["classes"] = self.given_classes
        super().__init__(ann_file=os.fspath(ann_file), data_root=os.fspath(data_root), metainfo=metainfo, **kwargs)

    def full_init(self) -> None:
        """Load the list, then count the classes of what is left after filters and ``indices``."""
        if self._fully_initialized:
            return
        super().full_init()
        labels = [self.get_cat_ids(row)[0] for row in range(len(self))]
        self._metainfo["class_counts"] = np.bincount(labels, minlength=len(self._metainfo["classes"])).tolist()

    def load_data_list(self) -> list[dict[str, Any]]:
        """Read the tree or the list, check it, and number the labels."""
        root = Path(self.data_prefix.get("img_path") or self.data_root or ".")
        if self.data_root and not root.is_dir():
            raise FileNotFoundError(f"ImageList: there is no folder {root}")
        if self.ann_file:
            where = str(self.ann_file)
            if not Path(where).is_file():
                raise FileNotFoundError(f"ImageList: there is no annotation file {where}")
            records = list(read_list(Path(where)))
            if not records:
                raise ValueError(f"{where} lists no picture: give each a line, path and label")
        else:
            where = str(root)
            records = list(walk_classes(root, self.suffixes))
        classes, labels = number_labels(records, self.given_classes, where)
        self._metainfo["classes"] = classes
        _check_unique(records)
        return [self._item(record, label, root) for record, label in zip(records, labels, strict=True)]

    def _item(self, record: Record, label: int, root: Path) -> dict[str, Any]:
        path = root / record["img"]
        place = record["place"]
        if self.check_files and not path.is_file():
            raise ValueError(
                f"{place}: there is no picture {path}. Mend the path (it is relative to {root}), restore the file or "
                f"remove the line"
            )
        item = {key: value for key, value in record.items() if key not in ("img", "label", "id", "identity", "place")}
        item.update(img_path=str(path), gt_label=label, sample_id=_sample_id(record), ann_place=place)
        if record.get("identity") is not None:
            item["gt_identity"] = _identity(record)
        return item

    def get_cat_ids(self, idx: int) -> list[int]:
        """The class of item ``idx``, as MMEngine's dataset wrappers ask for it."""
        return [int(self.get_data_info(idx)["gt_label"])]


def _read_classes(given: Sequence[str] | str | os.PathLike[str]) -> tuple[str, ...]:
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(f"ImageList: there is no file {path} with the names of the classes, one a line")
        names = [text for _, text in _lines(path)]
        where = f"the file {path}"
    else:
        names, where = [str(name) for name in given], "classes"
    if not names:
        raise ValueError(f"ImageList: {where} holds no names of classes")
    double = sorted({name for name in names if names.count(name) > 1})[:5] if len(set(names)) < len(names) else []
    if double:
        raise ValueError(f"ImageList: {where} names a class twice: {', '.join(double)}")
    return tuple(names)


def walk_classes(root: Path, suffixes: Sequence[str]) -> Iterator[Record]:
    """The pictures below each folder in ``root``, classes by name, pictures by path; hidden ones are passed over.

    Raises:
        ValueError: there are no folders, or one of them holds no picture.
    """
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise ValueError(f"{root} holds no folders: put the pictures of each class into a folder of its name there")
    for name in folders:
        found = []
        for folder, below, files in os.walk(root / name):
            below[:] = [entry for entry in below if not entry.startswith(".")]
            found += [
                (Path(folder) / file).relative_to(root).as_posix()
                for file in files
                if not file.startswith(".") and Path(file).suffix.lower() in suffixes
            ]
        if not found:
            raise ValueError(
                f"the class folder {root / name} holds no picture ({', '.join(suffixes)}): add some, or remove it"
            )
        for path in sorted(found):
            yield {"img": path, "label": name, "place": str(root / name)}


def read_list(path: Path) -> Iterator[Record]:
    """The entries of a list, by its suffix; empty lines are passed over.

    Raises:
        ValueError: a line is not what it should be. The message names file and line.
    """
    reader = {".csv": _read_csv, ".jsonl": _read_jsonl}.get(path.suffix.lower(), _read_text)
    for record in reader(path):
        for key in ("img", "label"):
            value = record.get(key)
            if value is None or value == "" or isinstance(value, bool | float | list | dict):
                raise ValueError(f"{record['place']}: the line has no usable {key!r}, got {value!r}")
        if not isinstance(record["img"], str):
            raise ValueError(f"{record['place']}: 'img' must be a path, got {record['img']!r}")
        if clash := [key for key in RESERVED if key in record and key != "img"]:
            raise ValueError(
                f"{record['place']}: the key {clash[0]!r} is reserved; the keys of a line are img, label, id, identity "
                f"and your own"
            )
        yield record


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text without blanks at its ends) of the lines that are not empty."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: the line is not UTF-8 ({error.reason}); convert the file") from None
            if text:
                yield number, text


def _read_text(path: Path) -> Iterator[Record]:
    for number, text in _lines(path):
        parts = text.rsplit("\t" if "\t" in text else None, maxsplit=1)
        if len(parts) != 2:
            raise ValueError(f"{path}:{number}: expected a path and a label, got {text!r}")
        yield {"img": parts[0].strip(), "label": parts[1].strip(), "place": f"{path}:{number}"}


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, text in _lines(path):
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: the line is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f'{path}:{number}: expected an object as {{"img": ..., "label": ...}}, got {text[:80]!r}')
        yield {**record, "place": f"{path}:{number}"}


def _read_csv(path: Path) -> Iterator[Record]:
    # Through _lines, so that broken text is told with its line; fields with line breaks inside are not supported.
    lines = list(_lines(path))
    rows = csv.reader((text for _, text in lines), strict=True)
    header: list[str] = []
    for number, _ in lines:
        try:
            row = [field.strip() for field in next(rows)]
        except (csv.Error, StopIteration) as error:
            raise ValueError(f"{path}:{number}: the line is not CSV: {error or 'a quoted field goes on'}") from None
        if not header:
            header = row
            if not {"img", "label"} <= set(header) or len(set(header)) < len(header):
                raise ValueError(
                    f"{path}:{number}: the first line must name the columns, each once, img and label among them, got "
                    f"{', '.join(header)}"
                )
            continue
        if len(row) != len(header):
            raise ValueError(
                f"{path}:{number}: expected {len(header)} fields ({', '.join(header)}), got {len(row)}; put a field "
                f"with a comma in double quotes"
            )
        filled = {key: value for key, value in zip(header, row, strict=True) if value or key in ("img", "label")}
        yield {**filled, "place": f"{path}:{number}"}


def number_labels(
    records: Sequence[Record], classes: tuple[str, ...] | None, where: str
) -> tuple[tuple[str, ...], list[int]]:
    """Turn the records' labels into numbers.

    A label that names a class counts as its name; else a whole number is the class's number. Without ``classes``, they
    are ``0`` to the largest number where every label is a number, else the names that occur, sorted.

    Returns:
        The names of the classes, and the label of each record.

    Raises:
        ValueError: a label is unknown or out of range.
    """
    if classes is None:
        if all(_as_number(record["label"]) is not None for record in records):
            count = max(int(record["label"]) for record in records) + 1
            classes = tuple(str(number) for number in range(max(count, 0)))
        else:
            classes = tuple(sorted({str(record["label"]) for record in records}))
    index = {name: number for number, name in enumerate(classes)}
    labels = []
    for record in records:
        value = record["label"]
        number = index.get(value) if isinstance(value, str) else None
        if number is None:
            number = _as_number(value)
        if number is None and not isinstance(value, str):
            number = index.get(str(value))
        if number is None or not 0 <= number < len(classes):
            known = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
            raise ValueError(
                f"{record['place']}: the label {value!r} is neither the name of a class ({known}) nor a number of 0 to "
                f"{len(classes) - 1}. Mend the label, or add the class to the classes given with {where}"
            )
        labels.append(number)
    return classes, labels


def _as_number(value: Any) -> int | None:
    if isinstance(value, int):
        return value
    text = str(value)
    return int(text) if text.isascii() and text.removeprefix("-").isdigit() else None


def _sample_id(record: Record) -> str:
    return str(record.get("id", record["img"]))


def _identity(record: Record) -> int:
    number = _as_number(record["identity"])
    if number is None or number < 0:
        raise ValueError(f"{record['place']}: the identity must be a whole number from 0, got {record['identity']!r}")
    return number


def _check_unique(records: Sequence[Record]) -> None:
    seen: dict[str, str] = {}
    for record in records:
        name, place = _sample_id(record), record["place"]
        if name in seen:
            raise ValueError(
                f"{place}: the id {name!r} is there already, at {seen[name]}. Remove one of the lines, or give them "
                f"different ids (the id is the path where a list has none)"
            )
        seen[name] = place
