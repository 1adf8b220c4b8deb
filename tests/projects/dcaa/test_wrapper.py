from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import mmengine.dist
import torch
import torch.distributed as dist
from mmengine.model import is_model_wrapper
from torch import nn

from alimm.projects.dcaa import wrapper as wrapper_module
from alimm.projects.dcaa.wrapper import SteppedDataParallel, average_gradients
from alimm.registry import MODEL_WRAPPERS
from tests.projects.dcaa.tiny_runner import TinyPlayers, loader, run, weights


def _gradients(bucket_bytes: int) -> list[Any]:
    wrapper_module.BUCKET_BYTES = bucket_bytes
    rank = dist.get_rank()
    own = [nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    own += [nn.Parameter(torch.zeros(4, dtype=torch.float64)), nn.Parameter(torch.zeros(()))]
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    own[0].grad = torch.full((2, 3), float(rank + 1))
    if rank == 1:
        own[1].grad = torch.arange(6.0).view(2, 3)
    own[3].grad = torch.full((4,), 10.0**rank, dtype=torch.float64)
    own[4].grad = torch.tensor(float(rank))
    average_gradients(iter([*own, frozen]))
    assert frozen.grad is None
    return [None if parameter.grad is None else parameter.grad.tolist() for parameter in own]


def test_gradients_are_averaged_and_absent_ones_count_as_zero(gloo: Any) -> None:
    for bucket_bytes in (1, 30, 2**20):
        one, other = gloo.run(2, _gradients, bucket_bytes)
        assert one == other
        assert one == [
            [[1.5] * 3] * 2,
            [[0.0, 0.5, 1.0], [1.5, 2.0, 2.5]],  # rank 0 has none: zero
            None,  # nobody has one
            [5.5] * 4,
            0.5,
        ]


def test_nothing_is_done_alone() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    gradient = torch.ones(2)
    parameter.grad = gradient
    average_gradients([parameter, nn.Parameter(torch.zeros(1))])
    assert parameter.grad is gradient


def _start() -> Any:
    torch.manual_seed(dist.get_rank())
    model = TinyPlayers()
    model.backbone[1].running_mean.normal_()
    model.register_buffer("flag", torch.tensor([dist.get_rank() == 0, True]))
    before = {name: value.tolist() for name, value in model.state_dict().items()}
    wrapped = SteppedDataParallel(model, device_ids=[0])
    after = {name: value.tolist() for name, value in wrapped.module.state_dict().items()}
    return before, after


def test_all_ranks_start_from_the_first(gloo: Any) -> None:
    (first, one), (second, other) = gloo.run(2, _start)
    assert first != second
    assert one == other == first


def _buffers(broadcast: bool) -> list[float]:
    class Counting(nn.Module):
        where: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("where", torch.zeros(1))

        def train_step(self, data: float, optim_wrapper: Any) -> float:
            self.where += 1.0
            return float(self.where)

    wrapped = SteppedDataParallel(Counting(), broadcast_buffers=broadcast)
    wrapped.module.where.fill_(dist.get_rank() + 1.0)
    seen = wrapped.train_step(0.0, optim_wrapper=None)
    return [seen, float(wrapped.module.where)]


def test_buffers_are_sent_after_a_step_if_wanted(gloo: Any) -> None:
    assert gloo.run(2, _buffers, False) == [[2.0, 2.0], [3.0, 3.0]]
    assert gloo.run(2, _buffers, True) == [[2.0, 2.0], [3.0, 2.0]]


def _buffers_of_kinds(bucket_bytes: int) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    wrapper_module.BUCKET_BYTES = bucket_bytes
    rank = dist.get_rank()

    class Moving(nn.Module):
        student: Any
        teacher: Any
        flags: torch.Tensor
        transposed: torch.Tensor
        unsaved: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.student = nn.BatchNorm2d(3)
            self.teacher = nn.BatchNorm2d(3).requires_grad_(False)
            self.register_buffer("flags", torch.tensor([False, False]))
            self.register_buffer("transposed", torch.zeros(2, 3).t())
            self.register_buffer("unsaved", torch.tensor(0), persistent=False)
            self.register_buffer("absent", None)

        def train_step(self, data: torch.Tensor, optim_wrapper: Any) -> None:
            self.student(data)
            self.teacher.running_var.mul_(0.5).add_(0.5 * self.student.running_var)
            self.teacher.num_batches_tracked += 5 + rank
            self.flags[rank] = True
            self.transposed += torch.arange(6.0).view(3, 2) + rank
            self.unsaved += 2 + rank

    torch.manual_seed(rank)
    wrapped = SteppedDataParallel(Moving())
    sent: list[tuple[str, int]] = []
    send = mmengine.dist.broadcast

    def note(flat: torch.Tensor) -> None:
        sent.append((str(flat.dtype), flat.numel()))
        send(flat)

    with mock.patch.object(wrapper_module, "broadcast", note):
        for _ in range(2):
            wrapped.train_step(torch.randn(2, 3, 4, 4), None)
    return {name: value.tolist() for name, value in wrapped.module.named_buffers()}, sent


def test_all_buffers_are_those_of_the_first_rank_after_a_step(gloo: Any) -> None:
    (first, sent), (second, _) = gloo.run(2, _buffers_of_kinds, 2**20)
    assert first == second
    assert first["student.num_batches_tracked"] == 2
    assert first["teacher.num_batches_tracked"] == 10
    assert first["teacher.running_var"] not in ([1.0] * 3, first["student.running_var"])
    assert first["flags"] == [True, False]
    assert first["transposed"] == [[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]]
    assert first["unsaved"] == 4
    kinds = [("torch.bool", 2), ("torch.float32", 18), ("torch.int64", 3)]
    assert [sorted(sent[:3]), sorted(sent[3:])] == [kinds, kinds]  # one message a type and step
    (small, sent), (other, _) = gloo.run(2, _buffers_of_kinds, 1)
    assert small == other == first
    assert len(sent) == 2 * 9


def test_calls_go_to_the_model() -> None:
    class Echo(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return "forward", args, kwargs

        def train_step(self, data: Any, optim_wrapper: Any) -> Any:
            return "train", data, optim_wrapper

        def val_step(self, data: Any) -> Any:
            return "val", data

        def test_step(self, data: Any) -> Any:
            return "test", data

    wrapped = SteppedDataParallel(Echo())
    assert is_model_wrapper(wrapped)
    assert MODEL_WRAPPERS.get("alimm.SteppedDataParallel") is SteppedDataParallel
    assert wrapped(1, mode="loss") == ("forward", (1,), {"mode": "loss"})
    assert wrapped.train_step(1, optim_wrapper=2) == ("train", 1, 2)
    assert wrapped.val_step(1) == ("val", 1)
    assert wrapped.test_step(1) == ("test", 1)
    assert not wrapped.eval().module.training


def test_synchronised_batch_norm_becomes_plain_on_the_cpu() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4))
    wrapped = SteppedDataParallel(copy.deepcopy(model))
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in wrapped.modules())
    wrapped(torch.zeros(1, 3, 2, 2))


def _train(folder: str, batch: int) -> Any:
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    parts = {
        name: loader(batch=batch, sampler=dict(type="alimm.ConditionSampler", stream=name), size=8)
        for name in ("source", "target")
    }
    runner = run(
        Path(folder),
        max_iters=4,
        train_dataloader=parts,
        model=dict(type="alimm.TinyPlayers"),
        model_wrapper_cfg=dict(type="alimm.SteppedDataParallel"),
        launcher="pytorch" if distributed else "none",
    )
    model = runner.model.module if distributed else runner.model
    drawn = [[index for index, _ in part[name]] for part in model.seen for name in ("source", "target")]
    return drawn, {name: value.tolist() for name, value in model.state_dict().items()}


def test_ranks_train_on_the_draws_of_one_process_and_stay_equal(gloo: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (drawn0, weights0), (drawn1, weights1) = gloo.run(2, _train, folder, 2)
        assert weights0 == weights1
        alone, _ = _train(folder + "/alone", 4)
    for whole, first, second in zip(alone, drawn0, drawn1, strict=True):
        assert whole == [index for pair in zip(first, second, strict=True) for index in pair]


def test_a_run_of_one_process_needs_no_wrapper(tmp_path: Any) -> None:
    runner = run(tmp_path, max_iters=1, model_wrapper_cfg=dict(type="alimm.SteppedDataParallel"))
    assert not is_model_wrapper(runner.model)
    assert weights(runner)
