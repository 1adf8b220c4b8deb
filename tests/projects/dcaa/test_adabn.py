from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from alimm.projects.dcaa.adabn import AdaBNHook, _one_pass, reestimate_bn, restore, statistics
from tests.projects.dcaa.tiny_runner import TinyNumbers, TinyPlayers, assert_equal_weights, loader, run, weights


def hook(**options: Any) -> list[dict[str, Any]]:
    target = loader(batch=3, size=9, shift=1.0, sampler=dict(type="DefaultSampler", shuffle=True))
    return [dict(type="alimm.AdaBNHook", dataloader=target, **options)]


def norm(x: torch.Tensor, layer: nn.BatchNorm2d) -> torch.Tensor:
    """Batch norm by the batch's own statistics, written out."""
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        values = x[:, c]
        mean, var = values.mean(), values.var(unbiased=False)
        out[:, c] = layer.weight[c] * (values - mean) / torch.sqrt(var + layer.eps) + layer.bias[c]
    return out


def test_statistics_are_means_over_the_pictures_layer_after_layer() -> None:
    torch.manual_seed(0)
    first, second = nn.BatchNorm2d(2), nn.BatchNorm2d(3)
    for layer in (first, second):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        layer.running_mean.fill_(7.0)
        layer.num_batches_tracked.fill_(5)
    conv = nn.Conv2d(2, 3, 1)
    model = nn.Sequential(first, nn.Dropout(0.9), conv, second).double()
    sizes = 2, 3, 1
    batches = [torch.randn(size, 2, 4, 5, dtype=torch.float64) for size in sizes]
    assert reestimate_bn(model, iter(batches)) == 3

    inputs = {first: batches, second: [conv(norm(x, first)) for x in batches]}
    for layer, values in inputs.items():
        for c in range(layer.num_features):
            means = [x[:, c].mean().item() for x in values]
            variances = [x[:, c].var(unbiased=True).item() for x in values]
            mean, variance = (sum(n * x for n, x in zip(sizes, xs, strict=True)) / 6 for xs in (means, variances))
            assert layer.running_mean[c].item() == pytest.approx(mean, rel=1e-9)
            assert layer.running_var[c].item() == pytest.approx(variance, rel=1e-9)
        assert layer.momentum == 0.1
        assert not layer._forward_pre_hooks


def test_momentum_goes_on_from_what_was_there() -> None:
    layer = nn.BatchNorm1d(1)
    layer.running_mean.fill_(4.0)
    batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [5.0]])]
    reestimate_bn(layer, batches, momentum=0.25)
    assert layer.running_mean.item() == pytest.approx((4 * 0.75 + 1 * 0.25) * 0.75 + 4 * 0.25)
    assert layer.momentum == 0.1


def test_nothing_else_of_the_model_changes() -> None:
    model = TinyPlayers().train()
    model.teacher.eval()
    model.unused = nn.BatchNorm1d(8)
    model.unused.running_mean.fill_(3.0)
    before, modes = weights_of(model), [module.training for module in model.modules()]
    data = TinyNumbers(size=6)
    reestimate_bn(model, [{"inputs": [data[i]["inputs"] for i in range(6)]}])
    changed = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert changed == {"backbone.1.running_mean", "backbone.1.running_var", "backbone.1.num_batches_tracked"}
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_frozen_scale_and_shift_are_no_hindrance() -> None:
    layer = nn.BatchNorm1d(2).eval().requires_grad_(False)
    reestimate_bn(layer, [torch.tensor([[1.0, 5.0], [3.0, 9.0]])])
    assert layer.running_mean.tolist() == [2.0, 7.0]
    assert not layer.training


def test_a_measurement_can_be_taken_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    saved = statistics(model)
    reestimate_bn(model, [torch.randn(4, 2)])
    assert not torch.equal(model[0].running_mean, saved["0.running_mean"])
    restore(model, saved)
    assert_equal_weights(statistics(model), saved)
    with pytest.raises(ValueError, match="there is no batch"):
        reestimate_bn(model, [])
    assert_equal_weights(statistics(model), saved)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="Linear has no batch norm layer"):
        reestimate_bn(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="Sequential has no batch norm layer"):
        reestimate_bn(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), [])
    with pytest.raises(ValueError, match=r"momentum must be None or in \(0, 1\], got 2"):
        reestimate_bn(nn.BatchNorm1d(2), [], momentum=2)
    with pytest.raises(ValueError, match=r"dataloader is the config of a loader"):
        AdaBNHook({"batch_size": 2})
    with pytest.raises(ValueError, match="num_batches must be at least 1"):
        AdaBNHook({"dataset": {}}, num_batches=0)


def _by_rank() -> list[float]:
    import torch.distributed as dist

    layer = nn.BatchNorm1d(1)
    reestimate_bn(layer, [torch.tensor([[0.0], [2.0]]) + 10 * dist.get_rank()])
    return [layer.running_mean.item(), layer.running_var.item()]


def test_ranks_share_their_statistics(gloo: Any) -> None:
    assert gloo.run(2, _by_rank) == [[6.0, 2.0], [6.0, 2.0]]


def best_config(**options: Any) -> dict[str, Any]:
    checkpoint = dict(type="CheckpointHook", interval=2, by_epoch=False, save_best="sum", rule="greater")
    return dict(max_iters=4, val=True, default_hooks=dict(checkpoint=checkpoint), **options)


def test_training_does_not_notice(tmp_path: Any) -> None:
    plain = run(tmp_path / "plain", **best_config())
    adapted = run(tmp_path / "adapted", **best_config(custom_hooks=hook()))
    assert_equal_weights(weights(plain), weights(adapted))
    assert adapted.model.seen == plain.model.seen
    one, other = (runner.message_hub.get_scalar("val/sum").data[0] for runner in (plain, adapted))
    assert one[-1] != other[-1]


def saved(folder: Any, name: str) -> dict[str, torch.Tensor]:
    (path,) = folder.glob(name)
    return torch.load(path, weights_only=False)["state_dict"]


@pytest.mark.parametrize("keep", [False, True])
def test_which_statistics_checkpoints_hold(tmp_path: Any, keep: bool) -> None:
    plain, adapted = tmp_path / "plain", tmp_path / "adapted"
    run(plain, **best_config())
    run(adapted, **best_config(custom_hooks=hook(keep=keep)))
    assert_equal_weights(saved(adapted, "iter_2.pth"), saved(plain, "iter_2.pth"))  # a run may go on from it
    (best,) = adapted.glob("best_*.pth")
    number = best.stem.rsplit("_", 1)[-1]
    for name, trained in ((best.name, f"iter_{number}.pth"), ("iter_4.pth", "iter_4.pth")):
        found, expected = saved(adapted, name), saved(plain, trained)
        if not keep:
            assert_equal_weights(found, expected)
            continue
        changed = {key for key, value in found.items() if not torch.equal(value, expected[key])}
        assert {"backbone.1.running_mean", "backbone.1.running_var"} <= changed
        assert all(key.startswith("backbone.1.") for key in changed)
        # They are what a measurement with these weights gives.
        own = AdaBNHook(hook()[0]["dataloader"])
        runner = run(tmp_path / f"measure_{name}", max_iters=1)
        runner.model.load_state_dict(expected)
        own.before_test(runner)
        assert_equal_weights(statistics(runner.model), {key: found[key] for key in statistics(runner.model)})


def test_a_kept_checkpoint_predicts_the_same_without_the_hook(tmp_path: Any) -> None:
    adapted = run(tmp_path / "adapted", **best_config(custom_hooks=hook(keep=True))).model
    plain = TinyPlayers()
    plain.load_state_dict(saved(tmp_path / "adapted", "iter_4.pth"))
    pictures = list(TinyNumbers(size=6, shift=1.0).values)
    assert torch.equal(plain.eval()(pictures), adapted.eval()(pictures))


def test_random_states_are_left_alone(tmp_path: Any) -> None:
    runner = run(tmp_path, max_iters=1)
    own = AdaBNHook(hook()[0]["dataloader"])
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    own.before_val(runner)
    first = statistics(runner.model)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
    own.after_val(runner)
    own.before_test(runner)
    assert_equal_weights(statistics(runner.model), first)  # measured again: the same


def test_only_so_many_batches(tmp_path: Any) -> None:
    runner = run(tmp_path, max_iters=1)
    own = AdaBNHook(hook()[0]["dataloader"], num_batches=2)
    own.before_test(runner)
    assert int(runner.model.backbone[1].num_batches_tracked) == 2
    own.after_test(runner)
    assert int(runner.model.backbone[1].num_batches_tracked) == 2  # that of one step on two domains


@pytest.mark.parametrize(("size", "batches"), [(9, 3), (8, 3), (5, 2), (2, 1)])
@pytest.mark.parametrize("sampler", ["alimm.ConditionSampler", "DefaultSampler"])
def test_all_batches_are_one_pass_also_where_the_sampler_has_no_end(
    tmp_path: Any, sampler: str, size: int, batches: int
) -> None:
    runner = run(tmp_path, max_iters=1)
    own = AdaBNHook(loader(batch=3, size=size, sampler=dict(type=sampler)))
    own.before_test(runner)
    assert int(runner.model.backbone[1].num_batches_tracked) == batches


def _batches_of_a_rank() -> int | None:
    return _one_pass(DataLoader(TinyNumbers(size=13), batch_size=3))


def test_ranks_share_a_pass(gloo: Any) -> None:
    assert _batches_of_a_rank() == 5
    assert gloo.run(2, _batches_of_a_rank) == [3, 3]


def test_other_averages_of_the_same_statistics_are_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="AdaBNHook and EMAHook exchange"):
        run(tmp_path, custom_hooks=[*hook(), dict(type="EMAHook")])
    endless = [dict(type="alimm.AdaBNHook", dataloader=loader(sampler=dict(type="InfiniteSampler")))]
    with pytest.raises(ValueError, match="InfiniteSampler gives other pictures"):
        run(tmp_path, max_iters=2, val=True, custom_hooks=endless)
