"""A classifier cut over ranks resumes on any number of ranks with every bit, and ranks fail together."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from alimm.apis.checkpoints import SHARDS_KEY, find_resumable, load_restricted
from alimm.apis.sharded import check_shards, load_module, load_module_optimizer, load_shards, save_module
from alimm.distributed import block_writer
from alimm.distributed.blocks import read_index, read_rows
from alimm.heads import ShardedHead
from alimm.optim import RowSparseSGD
from tests.alimm.sharded_run import BLOCK_ROWS, CLASSES, flip_a_weight, folder_digests, run_sharded
from tests.alimm.tiny_run import same_bits


def rows_of(results: list[dict[str, Any]], key: str) -> torch.Tensor:
    return torch.cat([result[key] for result in sorted(results, key=lambda result: result["start"])])


def test_two_of_four_epochs_resumed_equal_four_on_two_ranks(tmp_path: Path, gloo: Any) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    gloo.run(2, run_sharded, str(whole), {})
    gloo.run(2, run_sharded, str(resumed), {}, str(whole / "epoch_2.pth"))
    assert not (resumed / "epoch_2.pth").exists(), "the second run must not have repeated the first half"
    ends = [load_restricted(folder / "epoch_4.pth") for folder in (whole, resumed)]
    assert same_bits(*(end["state_dict"] for end in ends))
    assert same_bits(*(end["optimizer"]["state"] for end in ends))
    assert folder_digests(whole / "epoch_4.shards") == folder_digests(resumed / "epoch_4.shards")
    assert folder_digests(whole / "epoch_4.shards") != folder_digests(whole / "epoch_2.shards")
    assert ends[0]["meta"][SHARDS_KEY] == {"head": "epoch_4.shards"}
    index = read_index(whole / "epoch_4.shards")
    assert sorted(index.arrays) == ["marks", "optimizer.momentum_buffer", "weight"]
    assert "head.weight" not in ends[0]["state_dict"]
    sizes = [value.numel() for state in ends[0]["optimizer"]["state"].values() for value in state.values()
             if isinstance(value, torch.Tensor)]  # fmt: skip
    assert max(sizes) == 30, "the optimizer's part holds the backbone's momentum and no rows of classes"


def test_another_number_of_ranks_resumes(tmp_path: Path, gloo: Any) -> None:
    """Resumed at its last epoch a run trains no more: what it holds is what it loaded."""
    gloo.run(2, run_sharded, str(tmp_path), {"train_cfg.max_epochs": 1})
    folder = tmp_path / "epoch_1.shards"
    for ranks in (1, 3):
        results = gloo.run(
            ranks, run_sharded, str(tmp_path), {"train_cfg.max_epochs": 1}, str(tmp_path / "epoch_1.pth")
        )
        assert [result["epoch"] for result in results] == [1] * ranks
        for key, name in [("weight", "weight"), ("momentum", "optimizer.momentum_buffer"), ("marks", "marks")]:
            assert torch.equal(rows_of(results, key), read_rows(folder, name, 0, CLASSES)), (ranks, key)
    assert bool(read_rows(folder, "optimizer.momentum_buffer", 0, CLASSES).any())


def resave(source: str | None, out: str, num_classes: int) -> tuple[int, int]:
    """A head that loads `source` (or is trained a little without one) and saves to `out`."""
    torch.manual_seed(0)
    head = ShardedHead(num_classes, 5, "full", seed=4)
    optimizer = RowSparseSGD([head.weight], lr=0.1, momentum=0.9)
    if source is None:
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            grad = torch.randn(num_classes, 5, generator=generator)
            head.weight.grad = grad[head.sharding.start : head.sharding.stop].clone()
            optimizer.step()
    else:
        with torch.no_grad():
            head.weight.zero_()
        check_shards(head, {"": Path(source)})
        load_module(head, Path(source))
        load_module_optimizer(head, Path(source), [optimizer])
    save_module(head, out, [optimizer], BLOCK_ROWS)
    return head.sharding.size, head.sharding.start


@pytest.mark.parametrize("num_classes", [CLASSES, 2], ids=["uneven", "empty shards"])
def test_four_two_three_one_ranks_keep_every_bit(tmp_path: Path, gloo: Any, num_classes: int) -> None:
    source, found = None, []
    for ranks in (4, 2, 3, 1):
        out = tmp_path / f"{ranks}.shards"
        sizes = gloo.run(ranks, resave, source, str(out), num_classes)
        assert sum(size for size, _ in sizes) == num_classes
        found.append(folder_digests(out))
        source = str(out)
    # The index notes the step count, which is in the state dict of the optimizer and was not loaded here.
    arrays = [{name: digest for name, digest in files.items() if name != "index.json"} for files in found]
    assert arrays[0] == arrays[1] == arrays[2] == arrays[3]
    assert len(arrays[0]) == 2 * -(-num_classes // BLOCK_ROWS)


def test_one_rank_and_two_ranks_start_with_the_same_bytes(tmp_path: Path, gloo: Any) -> None:
    for ranks in (1, 2, 4):
        gloo.run(ranks, resave, None, str(tmp_path / str(ranks)), CLASSES)
    assert folder_digests(tmp_path / "1") == folder_digests(tmp_path / "2") == folder_digests(tmp_path / "4")


def train_with_a_full_disk(work_dir: str) -> str:
    calls = 0

    def full(path: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += "epoch_2" in str(path)
        if calls > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, *args, **kwargs)

    if dist.get_rank() == 1:
        block_writer.open = full  # type: ignore[attr-defined]
    try:
        with pytest.raises(OSError, match="No space left on device") as error:
            run_sharded(work_dir, {})
    finally:
        vars(block_writer).pop("open", None)
    return str(error.value)


def test_a_full_disk_on_one_rank_ends_all_and_keeps_the_last_checkpoint(tmp_path: Path, gloo: Any) -> None:
    assert all("rank 1 of 2" in message for message in gloo.run(2, train_with_a_full_disk, str(tmp_path)))
    assert sorted(path.name for path in tmp_path.glob("*epoch*")) == ["epoch_1.pth", "epoch_1.shards"]
    assert find_resumable(str(tmp_path)) == str(tmp_path / "epoch_1.pth")


def load_damaged(folder: str) -> tuple[str, bool]:
    head = ShardedHead(CLASSES, 5, seed=4)
    before = head.weight.detach().clone()
    with pytest.raises(ValueError, match="weight-000000000004") as error:
        load_shards(head, {"": Path(folder)})
    return str(error.value), torch.equal(head.weight, before)


def test_nothing_is_loaded_from_broken_shards_on_any_rank(tmp_path: Path, gloo: Any) -> None:
    resave(None, str(tmp_path / "a"), CLASSES)
    flip_a_weight(tmp_path / "a")
    assert all(same for _, same in gloo.run(2, load_damaged, str(tmp_path / "a")))
