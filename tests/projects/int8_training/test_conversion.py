"""Which layers are converted, and that conversion changes nothing else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn
from torch.nn.utils import parametrizations

from alimm.projects.int8_training import Int8Options, convert, layers_of, revert


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def loss_of(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 8, 8, generator=generator)
    return nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3]))


def test_conversion_keeps_parameters_state_dict_and_kind() -> None:
    model, plain = small_net(), small_net()
    parameters, classes = list(model.parameters()), [type(module) for module in model]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    report = convert(model, planner=False)
    assert report.converted == ["3", "7"]
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert all(isinstance(module, kind) for module, kind in zip(model, classes, strict=True))
    mine, theirs = model.state_dict(), plain.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in theirs)
    assert "int8" in repr(model[3])
    loss_of(model).backward()
    optimizer.step()
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(small_net().state_dict(), strict=True)
    assert revert(model) == 2
    assert [type(module) for module in model] == classes
    assert not list(layers_of(model))
    assert torch.equal(loss_of(model.eval()), loss_of(small_net().eval()))


def test_a_model_in_int8_trains_otherwise_than_in_float32_and_close_to_it() -> None:
    """So that no test here passes because nothing was converted."""
    model, plain = small_net(), small_net()
    convert(model, planner=False)
    loss_of(model).backward(), loss_of(plain).backward()
    found, true = model[3].weight.grad, plain[3].weight.grad
    assert 1e-4 < float((found - true).norm() / true.norm()) < 0.1


def test_reasons_are_listed() -> None:
    model = nn.ModuleDict(
        dict(
            stem=nn.Conv2d(3, 8, 3),
            body=nn.Conv2d(8, 8, 3),
            up=nn.ConvTranspose2d(8, 8, 2),
            attention=nn.MultiheadAttention(8, 2),
            bbox_pred=nn.Conv2d(8, 4, 1),
            fc=nn.Linear(8, 2),
        )
    )

    class OwnForward(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class ModulatedDeformConv2d(nn.Module):
        pass

    model["own"], model["dcn"] = OwnForward(8, 8, 1), ModulatedDeformConv2d()
    model["none"] = nn.Conv2d(8, 0, 1)
    model["last"] = nn.Linear(8, 2)
    report = convert(model)
    assert report.converted == ["body", "fc"]
    expected = {
        "stem": "reads the picture",
        "up": "ConvTranspose2d is not supported",
        "attention.out_proj": "attention operator",
        "bbox_pred": "makes the predictions",
        "own": "forward of its own",
        "dcn": "ModulatedDeformConv2d is not supported",
        "none": "no channels",
        "last": "makes the predictions",
    }
    assert report.left.keys() == expected.keys()
    for name, part in expected.items():
        assert part in report.left[name]
    assert "2 layers converted, 8 left" in str(report)
    assert set(convert(model).left.values()) >= {"already converted"}
    revert(model)
    assert convert(model, strict_all=True).converted == ["stem", "body", "bbox_pred", "fc", "last"]


def test_include_and_exclude_are_regular_expressions() -> None:
    assert convert(small_net(), include=["^3$"]).converted == ["3"]
    assert convert(small_net(), include=["^0$", "9"]).converted == ["0", "9"], "naming a layer overrules the default"
    assert convert(small_net(), exclude=["3"]).converted == ["7"]
    assert convert(small_net(), strict_all=True, exclude=["3"]).converted == ["0", "7", "9"]
    with pytest.raises(ValueError, match=r"matches no layer of the model\. Layers are named like 0, 3"):
        convert(small_net(), include=["backbone"])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (dict(clip="mean"), "clip must be one of 'max', 'paper'.*got 'mean'"),
        (dict(include="head"), r"got the string 'head': write \['head'\]"),
        (dict(exclude=["("]), "no regular expression"),
        (dict(products="output"), "products takes a list of 'output', 'grad_input', 'grad_weight'"),
        (dict(products=["outputs"]), "products takes a list"),
        (dict(grad_bits=1), r"grad_bits must lie in 2\.\.8, got 1"),
        (dict(clip_k=3), "stable for 0 < clip_k"),
        (dict(patience=0), "must be at least 1"),
    ],
)
def test_a_wrong_option_says_how_to_mend_it(choice: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int8Options(**choice)


def test_retinanet_by_default_and_strict() -> None:
    """The stem, and the last convolution of either branch of the head, stay in floating point."""
    pytest.importorskip("mmdet")
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    import mmdet

    path = f"{mmdet.__path__[0]}/.mim/configs/retinanet/retinanet_r18_fpn_1x_coco.py"
    config = Config.fromfile(path).model
    config.backbone.init_cfg = None
    init_default_scope("mmdet")
    model = MODELS.build(config)
    init_default_scope("alimm")
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    left = {"backbone.conv1", "bbox_head.retina_cls", "bbox_head.retina_reg"}
    report = convert(model)
    assert set(report.left) == left
    assert report.converted == [name for name in layers if name not in left]
    assert sum(name.startswith("backbone.") for name in report.converted) == 19
    assert sum(name.startswith("neck.") for name in report.converted) == 8
    assert sum(name.startswith("bbox_head.") for name in report.converted) == 8
    assert revert(model) == 35
    assert convert(model, strict_all=True).converted == layers


def test_a_copy_and_a_pickle_are_converted_and_share_no_state() -> None:
    model = small_net()
    report = convert(model, planner=False)
    loss_of(model).backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for (name, mine), (other_name, theirs) in zip(layers_of(model), layers_of(other), strict=True):
            assert name == other_name
            assert theirs is not mine
            assert theirs.handle != mine.handle
            assert theirs.ranges.keys() == mine.ranges.keys()
        assert torch.equal(loss_of(other), loss_of(model))
        loss_of(other).backward()
        before = [state.ranges.copy() for _, state in layers_of(model)]
        assert [state.ranges for _, state in layers_of(model)] == before
        contexts = {id(state.context) for _, state in layers_of(other)}
        assert len(contexts) == 1, "the layers of the copy still share one context"
        assert contexts != {id(report.context)}
        revert(other)
        assert type(other[3]) is nn.Conv2d
    assert type(model[3]) is not nn.Conv2d


def test_a_parametrised_weight_is_read_as_it_is_in_effect() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(8, 6, 3)), nn.Flatten(), nn.Linear(6 * 36, 2))
    model = copy.deepcopy(plain)
    report = convert(model, planner=False)
    assert report.converted == ["0"]
    x = torch.randn(2, 8, 8, 8)
    found, true = model(x), plain(x)
    assert torch.allclose(found, true, atol=0.05 * float(true.detach().abs().max()))
    assert not torch.equal(found, true)
    found.sum().backward(), true.sum().backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        assert float((one.grad - other.grad).norm()) <= 0.1 * float(other.grad.norm()), name


def test_a_pattern_of_exclude_that_matches_nothing_is_named() -> None:
    report = convert(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), exclude=["^0$", "layr5"])
    assert report.unmatched == ["layr5"]
    assert "'layr5' matches no layer" in str(report)
