"""Row blocks: the same bytes from any number of ranks, read back by any, and nothing damaged or hostile is taken."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.distributed import block_writer
from alimm.distributed.block_writer import write_blocks
from alimm.distributed.blocks import INDEX, read_index, read_rows, verify, why_broken
from alimm.distributed.shards import RowShards, Sharding

ROWS = 23
SCALARS = dict(step=3, rate=0.1, kind="hash", nested=dict(names=["a", "\u00e9"]))
SIZES = {
    "one": (23,),
    "two": (12, 11),
    "uneven": (3, 20),
    "empty-inside": (10, 0, 1, 12),
    "all-in-the-last": (0, 0, 0, 23),
}


def whole(rows: int = ROWS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(rows, 5, generator=generator),
        "neighbours": torch.randint(-1, rows or 1, (rows, 3), generator=generator, dtype=torch.int32),
        "optimizer.momentum_buffer": torch.randn(rows, 5, generator=generator).to(torch.bfloat16),
        "count": torch.arange(rows),
        "seen": torch.arange(rows) % 3 == 0,
        "none": torch.empty(rows, 0),
    }


def save(folder: str, sizes: tuple[int, ...], block_rows: int, piece_bytes: int = 64) -> int:
    """Writes this rank's part; pieces of 64 bytes, so that every block is sent in several."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    sharding = Sharding(RowShards(sizes), rank, None)
    arrays = {name: array[sharding.start : sharding.stop] for name, array in whole(sum(sizes)).items()}
    before, block_writer.PIECE_BYTES = block_writer.PIECE_BYTES, piece_bytes
    try:
        return len(write_blocks(folder, arrays, sharding, SCALARS, block_rows).arrays)
    finally:
        block_writer.PIECE_BYTES = before


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_same_bytes_from_any_number_of_ranks(tmp_path: Path, gloo: Any) -> None:
    expected = None
    for name, sizes in SIZES.items():
        folder = tmp_path / name
        assert gloo.run(len(sizes), save, str(folder), sizes, 7) == [6] * len(sizes)
        expected = expected or digests(folder)
        assert digests(folder) == expected, name
    gloo.run(4, save, str(tmp_path / "block"), (1, 1, 1, 20), 40)
    assert read_index(tmp_path / "block").num_blocks == 1
    for array, rows in whole().items():
        for folder in (tmp_path / "one", tmp_path / "block"):
            assert torch.equal(read_rows(folder, array, 0, ROWS), rows)
    assert len(expected or ()) == 6 * 4 + 1
    assert not list(tmp_path.glob(".*"))


def test_files_are_what_safetensors_writes(tmp_path: Path) -> None:
    save(str(tmp_path / "a"), (ROWS,), 7)
    for name, array in whole().items():
        data = (tmp_path / "a" / f"{name}-{14:012d}.safetensors").read_bytes()
        assert data == safetensors.torch.save({name: array[14:21].contiguous()})


@settings(max_examples=15)
@given(
    rows=st.integers(0, 30),
    block_rows=st.integers(1, 35),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_any_rows_come_back(tmp_path_factory: Any, rows: int, block_rows: int, bounds: list[float]) -> None:
    folder = tmp_path_factory.mktemp("rows") / "blocks"
    save(str(folder), (rows,), block_rows)
    start, stop = (round(bound * rows) for bound in bounds)
    for name, array in whole(rows).items():
        found = read_rows(folder, name, start, stop)
        assert found.dtype == array.dtype
        assert torch.equal(found, array[start:stop])
    assert read_index(folder).scalars == SCALARS
    assert why_broken(folder) is None


def test_rows_go_into_a_given_tensor_of_another_type(tmp_path: Path) -> None:
    save(str(tmp_path / "a"), (ROWS,), 7)
    out = torch.zeros(10, 5, dtype=torch.float64)
    assert read_rows(tmp_path / "a", "weight", 4, 14, out) is out
    assert torch.equal(out, whole()["weight"][4:14].double())


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    save(str(tmp_path / "a"), (ROWS,), 7)
    with pytest.raises(ValueError, match="exists"):
        save(str(tmp_path / "a"), (ROWS,), 7)
    with pytest.raises(ValueError, match="no array 'bias'"):
        read_rows(tmp_path / "a", "bias", 0, 1)
    with pytest.raises(ValueError, match=r"\[0, 23\)"):
        read_rows(tmp_path / "a", "weight", 5, 24)
    sharding = Sharding(RowShards((ROWS,)), 0, None)
    for arrays, scalars, message in [
        ({"../weight": torch.zeros(ROWS)}, {}, "named by words"),
        ({"weight": torch.zeros(ROWS - 1, 2)}, {}, "one row for each"),
        ({"weight": torch.zeros(ROWS, dtype=torch.complex64)}, {}, "complex64"),
        ({"weight": torch.zeros(ROWS)}, {"step": torch.zeros(1)}, "JSON"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_blocks(tmp_path / "b", arrays, sharding, scalars)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "message"), [(Path.unlink, "is missing"), (cut, "bytes, its index says"), (flip, "sha256")]
)
def test_damage_is_found_and_named(tmp_path: Path, damage: Any, message: str) -> None:
    save(str(tmp_path / "a"), (ROWS,), 7)
    verify(tmp_path / "a")
    damage(tmp_path / "a" / "weight-000000000014.safetensors")
    with pytest.raises(ValueError, match=rf"weight-000000000014.safetensors.*{message}"):
        verify(tmp_path / "a")
    assert (why_broken(tmp_path / "a", full=False) is None) == (damage is flip)


def check_together(folder: str) -> str:
    with pytest.raises(ValueError, match="sha256") as error:
        verify(folder)
    return str(error.value)


def test_ranks_share_the_reading_and_agree(tmp_path: Path, gloo: Any) -> None:
    save(str(tmp_path / "a"), (ROWS,), 7)
    flip(tmp_path / "a" / "weight-000000000014.safetensors")
    messages = gloo.run(2, check_together, str(tmp_path / "a"))
    assert all("weight-000000000014" in message for message in messages)
    blind = [why_broken(tmp_path / "a", part=(number, 2)) for number in (0, 1)]
    assert sum(reason is None for reason in blind) == 1, "each file is read by one rank"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["arrays"].update({"../../etc": c["arrays"]["weight"]}), "named by words"),
        (lambda c: c.update(num_rows=-1), "num_rows"),
        (lambda c: c.update(num_rows=True), "num_rows"),
        (lambda c: c.update(block_rows=0), "block_rows"),
        (lambda c: c.update(block_rows="7"), "block_rows"),
        (lambda c: c.update(num_rows=1 << 50), "files"),
        (lambda c: c.update(version=2), "version"),
        (lambda c: c.update(arrays=[]), "arrays"),
        (lambda c: c.update(scalars=None), "scalars"),
        (lambda c: c["arrays"]["weight"].update(dtype="F8"), "dtype"),
        (lambda c: c["arrays"]["weight"].update(row_shape=[-5]), "row_shape"),
        (lambda c: c["arrays"]["weight"].update(row_shape=[4]), "bytes"),
        (lambda c: c["arrays"]["weight"]["files"].pop(), "files"),
        (lambda c: c["arrays"]["weight"]["files"][0].update(sha256="../x"), "sha256"),
        (lambda c: c["arrays"]["weight"]["files"][0].update(size=None), "bytes"),
    ],
)
def test_a_hostile_index_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    save(str(tmp_path / "a"), (ROWS,), 7)
    path = tmp_path / "a" / INDEX
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_index(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "[" * 100_000, "\x00", "[]", '{"format": 1}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=r"index\.json"):
        read_index(tmp_path)


def save_with_a_full_disk(folder: str, sizes: tuple[int, ...], full_rank: int) -> tuple[str, list[str]]:
    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 150

        def write(self, data: Any) -> None:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    if dist.get_rank() == full_rank:
        block_writer.open = lambda *args, **kwargs: Full(open(*args, **kwargs))  # type: ignore[attr-defined]  # noqa: SIM115
    try:
        with pytest.raises(OSError, match="No space left on device") as error:
            save(folder, sizes, 7)
    finally:
        vars(block_writer).pop("open", None)
    return str(error.value), [path.name for path in Path(folder).parent.iterdir()]


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_full_disk_on_one_rank_reaches_all(tmp_path: Path, gloo: Any, full_rank: int) -> None:
    for message, _ in gloo.run(2, save_with_a_full_disk, str(tmp_path / "a"), (10, 13), full_rank):
        assert f"on rank {full_rank} of 2" in message
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def save_different(folder: str) -> str:
    rank = dist.get_rank()
    sharding = Sharding(RowShards((3, 3)), rank, None)
    with pytest.raises(ValueError, match="disagree") as error:
        write_blocks(folder, {"weight": torch.zeros(3, 2 + rank)}, sharding)
    return str(error.value)


def test_ranks_with_different_arrays_are_told(tmp_path: Path, gloo: Any) -> None:
    gloo.run(2, save_different, str(tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []
