from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from alimm.projects.dcaa.loop import JointLoader, seed_part_worker
from tests.projects.dcaa.tiny_runner import TinyNumbers, assert_equal_weights, loader, run, weights

IN_ORDER = dict(type="DefaultSampler", shuffle=False)


def indices(runner: Any, name: str) -> list[list[int]]:
    return [[index for index, _ in batch[name]] for batch in runner.model.seen]


def noises(runner: Any, name: str) -> list[float]:
    return [noise for batch in runner.model.seen for _, noise in batch[name]]


def test_each_part_starts_again_by_itself(tmp_path: Any) -> None:
    parts = dict(source=loader(sampler=IN_ORDER, size=4), target=loader(sampler=IN_ORDER, batch=3, size=9))
    runner = run(tmp_path, max_iters=7, train_dataloader=parts)
    assert list(runner.model.seen[0]) == ["source", "target"]
    assert indices(runner, "source") == [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]
    assert indices(runner, "target") == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 1, 2]]


def test_a_part_that_starts_again_is_shuffled_again(tmp_path: Any) -> None:
    parts = dict(source=loader(sampler=dict(type="DefaultSampler", shuffle=True), size=4), target=loader())
    runner = run(tmp_path, max_iters=6, train_dataloader=parts)
    expected = []
    for epoch in range(3):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(5 + epoch)).tolist()
        expected += [order[:2], order[2:]]
    assert indices(runner, "source") == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("endless", [True, False])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Any, workers: int, endless: bool) -> None:
    sampler = None if endless else dict(type="DefaultSampler", shuffle=True)
    parts = dict(
        source=loader(workers, sampler=sampler, size=8), target=loader(workers, batch=3, sampler=sampler, size=9)
    )
    whole = run(tmp_path / "whole", max_iters=6, train_dataloader=parts)
    run(tmp_path / "halves", max_iters=4, train_dataloader=parts)
    resumed = run(tmp_path / "halves", max_iters=6, train_dataloader=parts, resume="auto")
    assert resumed.model.seen == whole.model.seen[4:]
    assert_equal_weights(weights(resumed), weights(whole))
    one, other = resumed.optim_wrapper.state_dict(), whole.optim_wrapper.state_dict()
    for name in ("seg", "disc"):
        for key, state in other[name]["state"].items():
            for entry, value in state.items():
                assert torch.equal(torch.as_tensor(one[name]["state"][key][entry]), torch.as_tensor(value)), entry


@pytest.mark.parametrize("workers", [0, 2])
def test_parts_and_passes_make_their_own_random_choices(tmp_path: Any, workers: int) -> None:
    parts = dict(source=loader(workers, sampler=IN_ORDER, size=4), target=loader(workers, sampler=IN_ORDER, size=4))
    runner = run(tmp_path, max_iters=6, train_dataloader=parts)
    drawn = noises(runner, "source") + noises(runner, "target")
    assert len(drawn) == 24
    assert len(set(drawn)) == 24


def test_workers_of_parts_and_ranks_are_seeded_apart() -> None:
    drawn = set()
    state = torch.get_rng_state()
    for part, rank in (("source", 0), ("target", 0), ("source", 1), ("source", 0)):
        torch.manual_seed(11)
        seed_part_worker(0, part, rank)
        drawn.add(torch.rand(()).item())
    torch.set_rng_state(state)
    assert len(drawn) == 3  # the first and the last are the same


def test_no_worker_outlives_training(tmp_path: Any) -> None:
    before = set(multiprocessing.active_children())
    parts = dict(source={**loader(2), "persistent_workers": True}, target=loader(1))
    runner = run(tmp_path, max_iters=2, train_dataloader=parts)
    assert not set(multiprocessing.active_children()) - before
    assert runner.train_dataloader._iterator is None


def test_forgetting_the_iterator_stops_the_workers() -> None:
    before = set(multiprocessing.active_children())
    joint = JointLoader({"source": DataLoader(TinyNumbers(), batch_size=2, num_workers=2, collate_fn=list)})
    batches = iter(joint)
    assert not set(multiprocessing.active_children()) - before, "workers start with the first batch"
    assert len(next(batches)["source"]) == 2
    assert len(set(multiprocessing.active_children()) - before) == 2
    joint._iterator = None
    assert not set(multiprocessing.active_children()) - before


def test_what_hooks_ask_of_a_joint_loader(tmp_path: Any) -> None:
    runner = run(tmp_path, max_iters=2)
    joint = runner.train_dataloader
    assert joint.dataset is joint.loaders["source"].dataset
    assert joint.dataset.metainfo == {"classes": ("a", "b", "c")}
    assert len(joint) == 6  # 12 source pictures two by two; 9 target pictures three by three are fewer

    class Recorder:
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Any:
            return iter(range(2))

        def __len__(self) -> int:
            return 2

    samplers = Recorder(), Recorder()
    both = JointLoader({name: DataLoader(TinyNumbers(), sampler=s) for name, s in zip("ab", samplers, strict=True)})
    both.sampler.set_epoch(4)
    assert [sampler.epoch for sampler in samplers] == [4, 4]


def test_an_empty_pass_is_an_error_instead_of_an_endless_loop() -> None:
    joint = JointLoader({"target": DataLoader(TinyNumbers(size=2), batch_size=3, drop_last=True)})
    with pytest.raises(
        ValueError, match=r"'target' gives no batch: its dataset has 2 pictures and its batch size is 3"
    ):
        next(iter(joint))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (loader(), r"one loader for each name, got the config of a single one \(it has dataset, batch_size"),
        ({}, "got an empty dict: write train_dataloader = dict"),
        (dict(source=loader(), target=None), r"train_dataloader.target must be the config of a loader.* got None"),
        (dict(source=dict(batch_size=2)), r"train_dataloader.source .* got the keys batch_size"),
    ],
)
def test_mistakes_in_the_loaders(tmp_path: Any, parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, train_dataloader=parts)


SCHEDULE = [dict(type="PolyLR", power=0.9, begin=0, end=2, by_epoch=False)]


def test_an_optimiser_without_a_schedule(tmp_path: Any) -> None:
    for given, missing in ((dict(seg=SCHEDULE), "disc"), (dict(disc=SCHEDULE), "seg")):
        with pytest.raises(ValueError, match=rf"'{missing}' has none. Write param_scheduler.{missing} = \[dict\("):
            run(tmp_path, max_iters=2, param_scheduler=given)
    alone = dict(type="alimm.TinyPlayers", adversarial=False)
    for accepted in (
        dict(param_scheduler=dict(seg=SCHEDULE, disc=[])),
        dict(param_scheduler=SCHEDULE),
        dict(param_scheduler=SCHEDULE[0]),
        dict(param_scheduler=dict(seg=SCHEDULE), model=alone),
    ):
        assert run(tmp_path, max_iters=2, **accepted).iter == 2


def test_scaling_by_the_batch_size_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="auto_scale_lr scales with the batch size"):
        run(tmp_path, auto_scale_lr=dict(enable=True, base_batch_size=4))
