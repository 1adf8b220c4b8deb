from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from alimm.apis.train import merge_train_options, train
from alimm.optim import Bf16OptimWrapper
from alimm.projects.dcaa.optim import AlternatingOptimWrapper, AlternatingOptimWrapperConstructor
from alimm.projects.dcaa.wrapper import SteppedDataParallel
from tests.projects.dcaa.tiny_runner import TinyPlayers, config, run

SGD = dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=0.01)
ADAM = dict(type="Adam", lr=0.01)


def build(model: nn.Module, paramwise: Any = None, **changes: Any) -> AlternatingOptimWrapper:
    wrapper = {"optimizer": dict(SGD), "discriminator": dict(ADAM), **changes}
    return AlternatingOptimWrapperConstructor(wrapper, paramwise)(model)


def names(model: nn.Module, wrapper: OptimWrapper) -> list[set[str]]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{known[id(p)] for p in group["params"]} for group in wrapper.optimizer.param_groups]


def test_each_player_has_its_own_parameters() -> None:
    model = TinyPlayers()
    model.backbone[0].bias.requires_grad_(False)
    wrappers = build(model)
    assert list(wrappers.keys()) == ["seg", "disc"]
    assert names(model, wrappers["seg"]) == [
        {"backbone.0.weight", "backbone.1.weight", "backbone.1.bias", "decode_head.weight", "decode_head.bias"}
    ]
    assert names(model, wrappers["disc"]) == [{"discriminators.0.weight", "discriminators.0.bias"}]
    assert isinstance(wrappers["seg"].optimizer, torch.optim.SGD)
    assert isinstance(wrappers["disc"].optimizer, torch.optim.Adam)


def test_what_is_never_trained_is_not_warned_of(monkeypatch: Any) -> None:
    said: list[str] = []
    module = "mmengine.optim.optimizer.default_constructor"
    monkeypatch.setattr(f"{module}.print_log", lambda message, **_: said.append(message))
    model = TinyPlayers()
    build(model)
    assert not [message for message in said if "skipped" in message]
    model.backbone[0].bias.requires_grad_(False)
    build(model)
    assert len([message for message in said if "skipped" in message]) == 1  # a frozen layer of the student is


def test_without_discriminators_there_is_one_optimiser() -> None:
    wrappers = build(TinyPlayers(adversarial=False))
    assert list(wrappers.keys()) == ["seg"]
    assert list(build(TinyPlayers(adversarial=False), discriminator=None).keys()) == ["seg"]


def test_a_distributed_wrapper_is_looked_into() -> None:
    model = TinyPlayers()
    assert names(model, build(SteppedDataParallel(model))["disc"]) == [
        {"discriminators.0.weight", "discriminators.0.bias"}
    ]


def test_settings_of_single_parameters() -> None:
    model = TinyPlayers()
    wrappers = build(model, dict(custom_keys={"decode_head": dict(lr_mult=10.0)}, norm_decay_mult=0.0))
    found = {
        name: (group["lr"], group["weight_decay"])
        for group, members in zip(wrappers["seg"].optimizer.param_groups, names(model, wrappers["seg"]), strict=True)
        for name in members
    }
    assert found == {
        "backbone.0.weight": (0.1, 0.01),
        "backbone.0.bias": (0.1, 0.01),
        "backbone.1.weight": (0.1, 0.0),
        "backbone.1.bias": (0.1, 0.0),
        "decode_head.weight": (1.0, 0.01),
        "decode_head.bias": (1.0, 0.01),
    }
    assert len(wrappers["seg"].optimizer.param_groups) == 3  # equal settings share a group
    assert wrappers.get_lr() == {"seg.base_lr": [0.1], "seg.lr": [0.1, 0.1, 1.0], "disc.lr": [0.01]}


def test_a_shared_parameter_is_stepped_once() -> None:
    model = TinyPlayers()
    model.second_name = model.decode_head
    model.backbone.add_module("also_mine", model.discriminators[0])
    wrappers = build(model)
    counted = [p for wrapper in wrappers.values() for g in wrapper.optimizer.param_groups for p in g["params"]]
    assert len(counted) == len({id(parameter) for parameter in counted}) == 8


def test_options_of_the_wrapper_reach_both() -> None:
    model = TinyPlayers()
    wrappers = build(model, type="alimm.Bf16OptimWrapper", clip_grad=dict(type="norm", max_norm=0.5))
    for name, wrapper in wrappers.items():
        assert isinstance(wrapper, Bf16OptimWrapper)
        assert wrapper.clip_grad_kwargs == {"max_norm": 0.5}
        assert wrapper.grad_name == f"{name}.grad_norm"


def test_names_a_config_may_use(tmp_path: Any) -> None:
    named = OPTIM_WRAPPER_CONSTRUCTORS.get("alimm.AlternatingOptimWrapperConstructor")
    assert named is AlternatingOptimWrapperConstructor
    file = tmp_path / "new_style.py"
    file.write_text(
        "from mmengine.optim import OptimWrapper\n"
        "from torch.optim import SGD, Adam\n"
        "from alimm.projects.dcaa.optim import AlternatingOptimWrapperConstructor\n"
        "optim_wrapper = dict(type=OptimWrapper, constructor=AlternatingOptimWrapperConstructor,\n"
        "    optimizer=dict(type=SGD, lr=0.1), discriminator=dict(type=Adam, lr=0.1))\n"
    )
    new_style = Config.fromfile(file)
    for key, value in config(tmp_path, max_iters=1).items():
        if key != "optim_wrapper":
            new_style[key] = value
    runner = train(new_style, device="cpu")
    assert isinstance(runner.optim_wrapper, AlternatingOptimWrapper)


def test_state_goes_out_and_in() -> None:
    torch.manual_seed(0)
    model = TinyPlayers()
    wrappers = build(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for wrapper in wrappers.values():
        wrapper.step()
    state = wrappers.state_dict()
    other = build(model)
    other.load_state_dict(state)
    for name in ("seg", "disc"):
        first = other[name].optimizer.state_dict()["state"]
        assert first
        for key, entries in state[name]["state"].items():
            for entry, value in entries.items():
                assert torch.equal(torch.as_tensor(first[key][entry]), torch.as_tensor(value))


def test_loss_scales_are_saved_apart(monkeypatch: Any) -> None:
    module = "mmengine.optim.optimizer.amp_optimizer_wrapper"
    monkeypatch.setattr(f"{module}.is_cuda_available", lambda: True)
    monkeypatch.setattr(f"{module}.GradScaler", functools.partial(torch.amp.GradScaler, "cpu"))
    model = TinyPlayers()
    wrappers = build(model, type="AmpOptimWrapper", loss_scale="dynamic")
    assert all(isinstance(wrapper, AmpOptimWrapper) for wrapper in wrappers.values())
    wrappers["disc"].loss_scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))
    wrappers["disc"].loss_scaler.update(16.0)
    other = build(model, type="AmpOptimWrapper", loss_scale="dynamic")
    other.load_state_dict(wrappers.state_dict())
    assert other["disc"].loss_scaler.get_scale() == 16.0
    assert other["seg"].loss_scaler.get_scale() == 65536.0


def test_mixed_precision_on_the_command_line(tmp_path: Any) -> None:
    merged = merge_train_options(config(tmp_path), amp=True, device="cpu")
    assert merged.optim_wrapper.type == "alimm.Bf16OptimWrapper"
    on_gpu = merge_train_options(config(tmp_path), amp=True, device="cuda")
    assert (on_gpu.optim_wrapper.type, on_gpu.optim_wrapper.loss_scale) == ("AmpOptimWrapper", "dynamic")
    runner = run(tmp_path, max_iters=2, optim_wrapper=merged.optim_wrapper)
    assert all(isinstance(wrapper, Bf16OptimWrapper) for wrapper in runner.optim_wrapper.values())


@pytest.mark.parametrize("apart", [True, False])
def test_schedules_for_both_or_for_each(tmp_path: Any, apart: bool) -> None:
    poly = dict(type="PolyLR", power=1.0, eta_min=0.0, begin=0, end=8, by_epoch=False)
    constant = dict(type="ConstantLR", factor=1.0, by_epoch=False)
    schedule = dict(seg=[poly], disc=[constant]) if apart else [poly]
    runner = run(tmp_path, max_iters=4, param_scheduler=schedule)
    rates = runner.optim_wrapper.get_lr()
    share = 1 - 4 / 7  # MMEngine's poly schedule ends one iteration before its end
    assert rates["seg.lr"] == pytest.approx([0.1 * share])
    assert rates["disc.lr"] == pytest.approx([0.01 if apart else 0.01 * share])


def test_stock_distributed_training_is_refused_with_the_way_out() -> None:
    model = TinyPlayers()
    with pytest.raises(ValueError, match=r"TinyPlayers runs .* model_wrapper_cfg = dict\(type='alimm.SteppedDataPar"):
        build(model).optim_context(model)


def test_the_state_of_other_optimisers_is_refused() -> None:
    source_only = build(TinyPlayers(adversarial=False)).state_dict()
    with pytest.raises(ValueError, match="the state of the optimisers seg, and this run has seg, disc"):
        build(TinyPlayers()).load_state_dict(source_only)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(accumulative_counts=2), "accumulative_counts is 2, but"),
        (dict(optimizer=None), r"needs optimizer=dict\(type=...\).* got None"),
        (dict(discriminator=None), "TinyPlayers has discriminators: give their optimiser"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(TinyPlayers(), **changes)


def test_nothing_to_train() -> None:
    model = TinyPlayers()
    model.backbone.requires_grad_(False)
    model.decode_head.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that needs a gradient beside its discriminators"):
        build(model)
