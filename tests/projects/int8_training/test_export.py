"""The exported model, run by ONNX Runtime, gives what the layers' own integer products give; the scales are complete.

The error of an output is counted in its LSB: the largest magnitude of the layer's output / 127, one step of the bytes
that would hold it. A layer is judged on the very input that the integer products read: no output is off by more than
one LSB, and most by far less, unless a value next to the middle of two integers was rounded to the other one. Through a
whole network each such value moves others in the layers behind it; so there the mean is judged.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor, nn

from alimm.paths import resource_root
from alimm.projects.int8_training import convert, layers_of, revert
from alimm.projects.int8_training.export import export_onnx, main, restore, scales, write_scales
from alimm.projects.int8_training.weights import quantize_weight

TOY = resource_root() / "configs/example_project/class_coverage_toy.py"
AS_WRITTEN = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
REWRITTEN = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
LAYERS = ["stem", "down", "side", "mix", "even", "head", "fc"]


class Net(nn.Module):
    """Strides, groups, dilation, paddings, a residual, a linear layer on vectors and on maps; shows every output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2, bias=False)
        self.side = nn.Conv2d(8, 16, 1, stride=2)
        self.norm = nn.BatchNorm2d(16)
        self.mix = nn.Conv2d(16, 16, 3, padding=2, dilation=2, padding_mode="reflect")
        self.even = nn.Conv2d(16, 16, 2, padding="same", groups=16)
        self.head = nn.Linear(16, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        stem = self.stem(x)
        down, side = self.down(stem.relu()), self.side(stem)
        mix = self.mix(self.norm(down + side).relu())
        even = self.even(mix)
        head = self.head((even + side).flatten(2).transpose(1, 2))
        return stem, down, side, mix, even, head, self.fc(head.relu().mean(1))


class Apart(nn.Module):
    """The layers of a model, each on an input of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([model.get_submodule(name) for name in LAYERS])

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


def trained(per: str = "tensor", **options: Any) -> tuple[nn.Module, Tensor, tuple[Tensor, ...]]:
    """A model with ranges, its input, and the outputs of its layers in INT8. One batch: its ranges are the recorded."""
    torch.manual_seed(0)
    model = Net()
    choices: dict[str, Any] = dict(strict_all=True, planner=False, eval_int8=True, signed="split", weight=per)
    convert(model, **choices | options)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        return model, x, model.eval()(x)


def run(path: Path, *inputs: Tensor, level: Any = AS_WRITTEN) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads = level, 1
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    assert names[0] == "input"
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


def errors(outputs: list[np.ndarray], expected: tuple[Tensor, ...], reduce: Any = np.max) -> list[float]:
    """Errors of each output in LSB: the largest, or what else ``reduce`` makes of them."""
    pairs = zip(outputs, expected, strict=True)
    return [float(reduce(np.abs(y - true.numpy())) / (true.abs().max() / 127)) for y, true in pairs]


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_each_layer_gives_what_the_integer_products_give(per: str, tmp_path: Path) -> None:
    model, x, _ = trained(per)
    inputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0].clone())
        )
        for name in LAYERS
    ]
    with torch.no_grad():
        y = model(x)
    for handle in handles:
        handle.remove()
    apart, ordered = Apart(model).eval(), tuple(inputs[name] for name in LAYERS)
    export_onnx(apart, ordered, tmp_path / "net.onnx")
    for level in (AS_WRITTEN, REWRITTEN):
        outputs = run(tmp_path / "net.onnx", *ordered, level=level)
        assert max(errors(outputs, y)) <= 1
        assert max(errors(outputs, y, np.median)) < 0.01
    # What the comparison can tell apart: the same layers in floating point are further away.
    revert(model)
    with torch.no_grad():
        assert min(errors([out.numpy() for out in apart(*ordered)], y, np.median)) > 0.05


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_the_network_gives_what_it_gives_in_integers(per: str, tmp_path: Path) -> None:
    model, x, y = trained(per)
    export_onnx(model, x[:2], tmp_path / "net.onnx")
    for level in (AS_WRITTEN, REWRITTEN):
        outputs = run(tmp_path / "net.onnx", x, level=level)
        assert max(errors(outputs, y, np.mean)) < 0.1
    revert(model)
    with torch.no_grad():
        assert max(errors([out.numpy() for out in model(x)], y, np.mean)) > 0.2


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_the_file_holds_the_integers_and_the_scales_of_training(per: str, tmp_path: Path) -> None:
    model, x, _ = trained(per)
    found = export_onnx(model, x, tmp_path / "net.onnx")
    graph = onnx.load(tmp_path / "net.onnx").graph
    held = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    for name in LAYERS:
        q, step_O = quantize_weight(model.get_submodule(name).weight, per == "channel")
        assert np.array_equal(held[f"{name}.weight_int8"], q)
        assert np.array_equal(held[f"{name}.weight_step"], step_O if per == "channel" else step_O[0])
        assert found[name]["weight_steps"] == [float(v) for v in (step_O if per == "channel" else step_O[:1])]
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == len(LAYERS)
    assert kinds.count("DequantizeLinear") == 2 * len(LAYERS)


def test_values_beyond_the_range_saturate(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    nn.init.ones_(model[0].weight)
    convert(model, strict_all=True, planner=False, eval_int8=True, signed="split")
    with torch.no_grad():
        model.eval()(torch.tensor([-12.7, 3.0]).view(1, 1, 1, 2))
    export_onnx(model, torch.zeros(1, 1, 1, 4), tmp_path / "one.onnx")
    (y,) = run(tmp_path / "one.onnx", torch.tensor([-99.0, 99.0, 0.04, 0.26]).view(1, 1, 1, 4))
    assert y.ravel() == pytest.approx([-12.8, 12.7, 0.0, 0.3], abs=1e-5)


def test_the_model_and_its_training_stay_as_they_are(tmp_path: Path) -> None:
    model, x, y = trained()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    export_onnx(model, x, tmp_path / "net.onnx")
    assert model.training
    assert [name for name, _ in layers_of(model)] == LAYERS
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model.eval()(x), y, strict=True))


def test_the_json_holds_every_layer_at_a_path_beyond_ascii(tmp_path: Path) -> None:
    model, x, y = trained("channel")
    dict(layers_of(model))["mix"].sick = True
    folder = tmp_path / "mod\u00e8le \u7db2"
    folder.mkdir()
    (folder / "skala.json").write_text("old")
    write_scales(model, folder / "skala.json")
    content = json.loads((folder / "skala.json").read_text(encoding="utf-8"))
    assert content["qmax"] == 127
    layers = content["layers"]
    assert list(layers) == LAYERS
    assert layers.pop("mix") == dict(forward="float", reason="its gradient did not survive quantisation")
    assert all(entry["forward"] == "int8" and entry["weight_per"] == "channel" for entry in layers.values())
    assert [len(entry["weight_steps"]) for entry in layers.values()] == [8, 16, 16, 16, 12, 5]
    assert layers["stem"]["activation_amax"] == float(x.abs().max())
    assert layers["side"]["activation_amax"] == float(y[0].abs().max())
    assert layers["side"]["activation_step"] == pytest.approx(float(y[0].abs().max()) / 127, rel=1e-6)
    export_onnx(model, x, folder / "r\u00e9seau.onnx")
    assert sorted(path.name for path in folder.iterdir()) == ["r\u00e9seau.onnx", "skala.json"]
    kinds = [node.op_type for node in onnx.load_from_string((folder / "r\u00e9seau.onnx").read_bytes()).graph.node]
    assert kinds.count("QuantizeLinear") == len(LAYERS) - 1


def test_weights_of_zeros_get_a_positive_step(tmp_path: Path) -> None:
    for per in ("tensor", "channel"):
        model = nn.Sequential(nn.Conv2d(2, 3, 1))
        nn.init.zeros_(model[0].weight)
        convert(model, strict_all=True, planner=False, eval_int8=True, weight=per)
        x = torch.ones(1, 2, 2, 2)
        with torch.no_grad():
            y = model.eval()(x)
        found = export_onnx(model, x, tmp_path / "zero.onnx")
        assert min(found["0"]["weight_steps"]) > 0
        np.testing.assert_allclose(run(tmp_path / "zero.onnx", x)[0], y.numpy())


# ---- what cannot be exported ----


def test_a_plain_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for call in (scales, lambda model: export_onnx(model, torch.zeros(1, 3, 8, 8), tmp_path / "net.onnx")):
        with pytest.raises(ValueError, match=r"no INT8 layers.*tools/export_int8\.py, or call convert"):
            call(Net())
    assert not any(tmp_path.iterdir())


def test_a_layer_that_never_ran_is_named_with_the_way_out(tmp_path: Path) -> None:
    model, x, _ = trained()
    dict(layers_of(model))["side"].activation_amax = 0.0
    with pytest.raises(ValueError, match=r"layer 'side' has no activation range.*eval_int8=True, planner=False"):
        export_onnx(model, x, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="layer 'side' has no activation range"):
        write_scales(model, tmp_path / "net.json")
    assert not any(tmp_path.iterdir())


def test_a_weight_that_is_not_finite_is_named() -> None:
    model, _, _ = trained()
    with torch.no_grad():
        model.mix.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="weight of layer 'mix' holds NaN or infinity"):
        scales(model)


def test_layers_that_the_plan_left_in_floating_point_are_exported_so(tmp_path: Path) -> None:
    model, x, _ = trained()
    states = dict(layers_of(model))
    for name in LAYERS[1:]:
        states[name].plans[1, 2, 3] = (False, True, True)
    states["down"].plans[4, 5, 6] = (True, False, False)
    found = export_onnx(model, x, tmp_path / "net.onnx")
    assert [name for name in LAYERS if found[name]["forward"] == "int8"] == ["stem", "down"]
    assert found["fc"]["reason"] == "the planner found floating point faster"
    assert {entry["forward"] for entry in scales(model, all_layers=True).values()} == {"int8"}
    states["down"].plans[4, 5, 6] = states["stem"].plans[1, 2, 3] = (False, True, True)
    with pytest.raises(ValueError, match=r"every converted layer ran in floating point.*planner=False.*all_layers"):
        export_onnx(model, x, tmp_path / "net.onnx")
    model, x, _ = trained(products=("grad_input", "grad_weight"))
    assert {entry["reason"] for entry in scales(model).values()} == {"products has no 'output'"}


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = trained()
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"the ONNX export needs onnx.*pip install 'alimm\[export\]'"):
        export_onnx(model, x, tmp_path / "net.onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [12, 21])
def test_an_opset_that_cannot_be_written_is_refused(opset: int, tmp_path: Path) -> None:
    model, x, _ = trained()
    with pytest.raises(ValueError, match=rf"opset must lie in 13\.\.20, got {opset}"):
        export_onnx(model, x, tmp_path / "net.onnx", opset=opset)


# ---- ranges ----


def test_the_range_is_the_largest_of_a_step_and_shrinks_once_a_step() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    report = convert(model, strict_all=True, planner=False)
    ((_, state),) = layers_of(model)
    seen = []
    for step, tops in enumerate([(8.0, 2.0, 1.0), (4.0,), (16.0, 1.0)]):
        report.context.step = step
        for top in tops:
            model(torch.tensor([[top]]))
        seen.append(state.activation_amax)
    assert seen == pytest.approx([8.0, 8.0 * 0.99, 16.0])


# ---- from a training run ----


@pytest.fixture(scope="module")
def run_of_training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work dir of one epoch of the toy config with the hook."""
    folder = tmp_path_factory.mktemp("toy")
    config = Config.fromfile(TOY)
    config.work_dir, config.train_cfg.max_epochs, config.experiment_name = str(folder), 1, "int8_export"
    config.train_dataloader.dataset.head_count, config.val_cfg = 8, None
    config.val_dataloader = config.val_evaluator = None
    config.custom_hooks = [dict(type="alimm.Int8TrainingHook", planner=False, weight="channel", priority=60)]
    runner = Runner.from_cfg(config)
    runner.train()
    config.dump(folder / "config.py")
    return folder


def test_the_tool_exports_a_run(run_of_training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, checkpoint = run_of_training / "config.py", run_of_training / "epoch_1.pth"
    out = tmp_path / "toy.onnx"
    assert main([str(config), str(checkpoint), str(out), "--shape", "3", "32", "32"]) == 0
    saved = torch.load(checkpoint, weights_only=False)["int8_training"]
    layers = json.loads(out.with_suffix(".json").read_text())["layers"]
    assert {name: entry["activation_amax"] for name, entry in layers.items()} == {
        name: entry["activation_amax"] for name, entry in saved.items()
    }
    assert {entry["weight_per"] for entry in layers.values()} == {"channel"}
    assert f"{len(saved)} of {len(saved)} converted layers in INT8" in capsys.readouterr().out
    (logits,) = run(out, torch.randn(7, 3, 32, 32))
    assert logits.shape == (7, 4)
    assert np.isfinite(logits).all()


def test_the_tool_names_what_is_missing(run_of_training: Path, tmp_path: Path) -> None:
    config, checkpoint = str(run_of_training / "config.py"), run_of_training / "epoch_1.pth"
    out, shape = str(tmp_path / "toy.onnx"), ["--shape", "3", "32", "32"]
    with pytest.raises(ValueError, match=r"no alimm\.Int8TrainingHook among its custom_hooks"):
        main([str(TOY), str(checkpoint), out, *shape])
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        main([config, str(tmp_path / "none.pth"), out, *shape])
    with pytest.raises(ValueError, match=r"folder .* does not exist"):
        main([config, str(checkpoint), str(tmp_path / "none/toy.onnx"), *shape])
    plain = tmp_path / "plain.pth"
    torch.save({"state_dict": torch.load(checkpoint, weights_only=False)["state_dict"]}, plain)
    with pytest.raises(ValueError, match="no 'int8_training' and so no activation ranges"):
        main([config, str(plain), out, *shape])
    assert not (tmp_path / "toy.onnx").exists()


def test_restoring_takes_up_health_and_plans() -> None:
    model, _, _ = trained()
    saved = dict(layers_of(model))["stem"].saved()
    saved.update(activation_amax=3.5, sick=True, plans=[([1, 3, 8, 8], [False, True, True])])
    restore(model, {"int8_training": {"stem": saved}})
    states = dict(layers_of(model))
    assert (states["stem"].activation_amax, states["stem"].sick) == (3.5, True)
    assert states["stem"].plans[1, 3, 8, 8] == (False, True, True)
    assert not states["down"].sick
