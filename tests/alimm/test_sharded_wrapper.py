"""Wrappers for sharded parameters decide the same on every rank, and what one process with all rows decides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mmengine.logging import MessageHub
from torch import nn

from alimm.distributed.shards import RowShards, Sharding, mark_sharded
from alimm.optim import RowSparseSGD, ShardedGradScaler
from alimm.optim.sharded_clip import clip_grad_norm
from alimm.registry import OPTIM_WRAPPERS
from tests.gloo_pool import GlooPool

N, D = 9, 2
LAYOUTS = [(9,), (5, 4), (0, 9), (4, 0, 3, 2)]


def whole_gradients(fill: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the sharded weight, with two rows of zeros, and of a replicated one."""
    generator = torch.Generator().manual_seed(1)
    shard, replica = torch.randn(N, D, generator=generator), torch.randn(3, 3, generator=generator)
    shard[[2, 7]] = 0
    if fill is not None:
        shard[8, 1] = fill
    return shard, replica


def build(sizes: tuple[int, ...], kind: str, fill: float | None = None) -> tuple[nn.Parameter, nn.Parameter]:
    """Parameters of this rank, with gradients; dense, sparse, or sparse and listed twice and out of order."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    sharding = Sharding(RowShards(sizes), rank)
    shard, replica = whole_gradients(fill)
    weight, other = nn.Parameter(torch.ones(sharding.size, D)), nn.Parameter(torch.ones(3, 3))
    mark_sharded(weight, sharding)
    own = shard[sharding.start : sharding.stop]
    other.grad = replica
    if kind == "dense":
        weight.grad = own.clone()
    else:
        rows = own.abs().sum(1).nonzero().flatten() if fill is None else torch.arange(sharding.size)
        values = own[rows]
        if kind == "twice":
            rows, values = torch.cat([rows.flip(0), rows]), torch.cat([values.flip(0) * 0.25, values * 0.75])
        weight.grad = torch.sparse_coo_tensor(rows[None], values, (sharding.size, D), check_invariants=True)
    return weight, other


def clip_on_rank(sizes: tuple[int, ...], kind: str, clip: dict[str, Any], fill: float | None = None) -> Any:
    weight, other = build(sizes, kind, fill)
    optimizer = RowSparseSGD([{"params": [weight]}, {"params": [other]}], lr=0.1)
    wrapper = OPTIM_WRAPPERS.build(dict(type="alimm.ShardedOptimWrapper", optimizer=optimizer, clip_grad=dict(clip)))
    hub = MessageHub.get_current_instance()
    hub.log_scalars.pop("train/grad_norm", None)
    wrapper._clip_grad()
    assert weight.grad is not None
    assert other.grad is not None
    norm = hub.get_scalar("train/grad_norm").current() if "train/grad_norm" in hub.log_scalars else None
    return weight.grad.to_dense() if weight.grad.is_sparse else weight.grad, other.grad, norm


CLIPS = [
    dict(max_norm=0.5),
    dict(max_norm=0.5, norm_type="inf"),
    dict(max_norm=1.0, norm_type=3),
    dict(max_norm=1e6),
]


def clip_in_all_ways(sizes: tuple[int, ...]) -> list[Any]:
    return [clip_on_rank(sizes, kind, clip) for clip in CLIPS for kind in ("dense", "sparse", "twice")]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_clipping_by_norm_equals_torch_s_on_the_whole(sizes: tuple[int, ...], gloo: GlooPool) -> None:
    ways = zip(*gloo.run(len(sizes), clip_in_all_ways, sizes), strict=True)
    for number, results in enumerate(ways):
        clip = CLIPS[number // 3]
        whole = [nn.Parameter(torch.ones(N, D)), nn.Parameter(torch.ones(3, 3))]
        for parameter, grad in zip(whole, whole_gradients(), strict=True):
            parameter.grad = grad
        norm = torch.nn.utils.clip_grad_norm_(whole, clip["max_norm"], float(clip.get("norm_type", 2)))
        torch.testing.assert_close(torch.cat([part for part, _, _ in results]), whole[0].grad, rtol=1e-6, atol=1e-7)
        for _, replica, logged in results:
            torch.testing.assert_close(replica, whole[1].grad, rtol=1e-6, atol=1e-7)
            assert torch.equal(replica, results[0][1])
            assert logged == results[0][2] == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize("kind", ["dense", "sparse", "twice"])
def test_clipping_by_value(kind: str, gloo: GlooPool) -> None:
    results = gloo.run(2, clip_on_rank, (5, 4), kind, dict(type="value", clip_value=0.3))
    shard, replica = whole_gradients()
    torch.testing.assert_close(torch.cat([part for part, _, _ in results]), shard.clamp(-0.3, 0.3))
    for _, found, logged in results:
        assert torch.equal(found, replica.clamp(-0.3, 0.3))
        assert logged is None


@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm_type", [2.0, "inf"])
def test_what_is_not_finite_on_one_rank_reaches_all(fill: float, norm_type: Any, gloo: GlooPool) -> None:
    results = gloo.run(4, clip_on_rank, (4, 0, 3, 2), "sparse", dict(max_norm=1.0, norm_type=norm_type), fill)
    for _, replica, logged in results:
        assert math.isnan(logged) if math.isnan(fill) else math.isinf(logged)
        assert bool(replica.isnan().all() if math.isnan(fill) else (replica == 0).all())


def refuse_on_rank() -> str:
    parameters = build((5, 4), "sparse", float("nan"))
    try:
        clip_grad_norm(parameters, 1.0, error_if_nonfinite=True)
    except RuntimeError as error:
        return str(error)
    return ""


def test_an_error_is_raised_on_every_rank_and_settings_are_checked(gloo: GlooPool) -> None:
    assert all("cannot be clipped" in message for message in gloo.run(2, refuse_on_rank))
    with pytest.raises(ValueError, match="norm_type"):
        clip_grad_norm(build((N,), "dense"), 1.0, norm_type=0)


def missing_on_rank() -> float:
    weight, other = build((5, 4), "sparse")
    if dist.get_rank() == 1:
        weight.grad = None
    return clip_grad_norm([weight, other], 1.0)


def test_a_rank_without_a_gradient_takes_part(gloo: GlooPool) -> None:
    shard, replica = whole_gradients()
    expected = math.sqrt(float((shard[:5] ** 2).sum() + (replica**2).sum()))
    assert gloo.run(2, missing_on_rank) == [pytest.approx(expected, rel=1e-6)] * 2
    assert clip_grad_norm([nn.Parameter(torch.ones(2))], 1.0) == 0


def scale_on_rank(kind: str, bad_rank: int | None, clip: bool) -> tuple[list[bool], list[float]]:
    """Four steps; in the second one gradient of one rank is infinite. Who moved, and the scale after each step."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    sizes = (3, 0, 2, 4)[:world]
    sharding = Sharding(RowShards(sizes), rank)
    weight, other = nn.Parameter(torch.ones(sharding.size, D)), nn.Parameter(torch.ones(2))
    mark_sharded(weight, sharding)
    optimizer = RowSparseSGD([weight, other], lr=0.1)
    config = dict(
        type="alimm.ShardedAmpOptimWrapper",
        optimizer=optimizer,
        loss_scale=dict(init_scale=8.0, growth_interval=2, device="cpu"),
    )
    if clip:
        config["clip_grad"] = dict(max_norm=1.0)
    wrapper = OPTIM_WRAPPERS.build(config)
    moved, scales = [], []
    for step in range(4):
        before = other.detach().clone()
        with wrapper.optim_context(nn.Linear(1, 1)):
            rows = torch.arange(sharding.size)
            picked = torch.nn.functional.embedding(rows, weight, sparse=True) if kind == "sparse" else weight
            loss = picked.float().sum() + other.sum()
            if step == 1 and rank == bad_rank:
                loss = loss + float("inf") * picked[:1].sum()
        wrapper.update_params(loss)
        moved.append(not torch.equal(other, before))
        scales.append(wrapper.loss_scaler.get_scale())
    assert torch.isfinite(weight).all()
    return moved, scales


def scale_in_all_ways(bad_rank: int) -> list[Any]:
    ways = [(kind, clip) for kind in ("sparse", "dense") for clip in (False, True)]
    return [scale_on_rank(kind, bad_rank, clip) for kind, clip in ways]


@pytest.mark.parametrize(("world", "bad_rank"), [(1, 0), (2, 0), (4, 3), (4, 2)])
def test_all_ranks_skip_a_step_that_one_cannot_take(world: int, bad_rank: int, gloo: GlooPool) -> None:
    expected = ([True, False, True, True], [8.0, 4.0, 4.0, 8.0])
    assert gloo.run(world, scale_in_all_ways, bad_rank) == [[expected] * 4] * world


def test_amp_without_a_process_group_and_its_settings() -> None:
    assert scale_on_rank("sparse", 0, True)[0] == [True, False, True, True]
    optimizer = RowSparseSGD([nn.Parameter(torch.ones(2))], lr=0.1)
    build = lambda **settings: OPTIM_WRAPPERS.build(
        dict(type="alimm.ShardedAmpOptimWrapper", optimizer=optimizer, **settings)
    )
    fixed = build(loss_scale=16, dtype="bfloat16")
    assert isinstance(fixed.loss_scaler, ShardedGradScaler)
    fixed.update_params((optimizer.param_groups[0]["params"][0] ** 2).sum())
    assert fixed.loss_scaler.get_scale() == 16
    restored = build()
    restored.load_state_dict(fixed.state_dict())
    assert restored.loss_scaler.get_scale() == 16
    with pytest.raises(ValueError, match="loss_scale"):
        build(loss_scale="much")
    with pytest.raises(ValueError, match="dtype"):
        build(dtype="int8")


def test_bf16_clips_over_shards_too() -> None:
    weight, other = build((N,), "sparse")
    optimizer = RowSparseSGD([weight, other], lr=0.1)
    wrapper = OPTIM_WRAPPERS.build(
        dict(type="alimm.ShardedBf16OptimWrapper", optimizer=optimizer, clip_grad=dict(max_norm=0.25))
    )
    with wrapper.optim_context(nn.Linear(1, 1)):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    wrapper.step()
    moved = math.sqrt(float(((weight - 1) ** 2).sum().detach() + ((other - 1) ** 2).sum().detach()))
    assert moved == pytest.approx(0.1 * 0.25, rel=1e-4)
