"""INT8 training from a config alone: logged, saved, resumed, with everything else that a config may ask for."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from alimm.apis.checkpoints import load_restricted
from alimm.apis.config import parse_options
from alimm.apis.train import train
from alimm.projects.int8_training import Int8TrainingHook, layers_of, planner
from tests.alimm.tiny_run import same_bits, tiny_config

KEY = "int8_training"
PARTS = ("state_dict", "ema_state_dict", "optimizer", "param_schedulers")


def config(changes: dict[str, Any] | None = None, **hook: Any) -> Any:
    """The tiny run, whose only two layers read the picture and make the prediction."""
    hook = dict(type="alimm.Int8TrainingHook", strict_all=True, planner=False, telemetry_interval=1) | hook
    return tiny_config(custom_hooks=[dict(type="EMAHook"), hook], **(changes or {}))


def log_text(runner: Any) -> str:
    return "".join(path.read_text() for path in Path(runner.log_dir).glob("*.log"))


def final_state(folder: Path, name: str = "epoch_4.pth") -> dict[str, Any]:
    checkpoint = load_restricted(folder / name)
    return {part: checkpoint[part] for part in PARTS}


def without_nan(nest: Any) -> Any:
    """A channel that never had a gradient has no clip yet, and NaN equals nothing."""
    if isinstance(nest, torch.Tensor):
        return nest.nan_to_num(-1)
    if isinstance(nest, dict):
        return {key: without_nan(value) for key, value in nest.items()}
    return [without_nan(value) for value in nest] if isinstance(nest, list | tuple) else nest


def logged(runner: Any, key: str) -> list[float]:
    lines = [json.loads(line) for line in Path(runner.log_dir, "vis_data", "scalars.json").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def test_a_run_is_reported_watched_saved_and_reverted(tmp_path: Path) -> None:
    runner = train(config({"log_level": "INFO"}, clip="paper"), work_dir=tmp_path, device="cpu")
    text = log_text(runner)
    assert text.count("INT8 training: 2 layers converted, 0 left") == 1
    cosines = logged(runner, "int8_cosine_min")
    assert len(cosines) == 16
    assert all(0.9 < value <= 1.0001 for value in cosines)
    assert len(set(cosines)) > 8
    assert all(0 <= value <= 0.2 for value in logged(runner, "int8_clipped"))
    assert all(0 <= value <= 1 for value in logged(runner, "int8_zeros"))
    assert all(0 <= value <= 1 for value in logged(runner, "int8_bell_shaped"))
    assert set(logged(runner, "int8_sick_layers")) == {0.0}
    assert [type(module) for module in runner.model.body] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Dropout, nn.Linear]
    assert not list(layers_of(runner.model))
    checkpoint = load_restricted(tmp_path / "epoch_4.pth")
    assert checkpoint[KEY].keys() == {"body.0", "body.4"}
    assert not any("int8" in name for part in PARTS[:2] for name in checkpoint[part])
    runner.model.load_state_dict(checkpoint["state_dict"], strict=True)


def test_two_options_of_the_command_line_are_enough(tmp_path: Path) -> None:
    words = ["default_hooks.int8.type=alimm.Int8TrainingHook", "default_hooks.int8.strict_all=True"]
    options = parse_options([*words, "log_level=INFO"])
    runner = train(tiny_config(), work_dir=tmp_path, device="cpu", cfg_options=options)
    assert "INT8 training: 2 layers converted, 0 left" in log_text(runner)


def test_the_run_differs_from_float32_and_by_the_options(tmp_path: Path) -> None:
    train(tiny_config(), work_dir=tmp_path / "float", device="cpu")
    ends = {"float": final_state(tmp_path / "float")["state_dict"]}
    for name, hook in (("int8", {}), ("nearest", dict(rounding="nearest")), ("off", dict(products=[]))):
        train(config(**hook), work_dir=tmp_path / name, device="cpu")
        ends[name] = final_state(tmp_path / name)["state_dict"]
    assert same_bits(ends["float"], ends.pop("off"))
    assert not same_bits(ends["float"], ends["int8"])
    assert not same_bits(ends["int8"], ends["nearest"])
    for name, value in ends["float"].items():
        assert float((value - ends["int8"][name]).norm()) < 0.1 * float(value.norm()), name


def test_nothing_to_convert_is_said(tmp_path: Path) -> None:
    changes = {"log_level": "INFO", "train_cfg.max_epochs": 1}
    runner = train(config(changes, strict_all=False), work_dir=tmp_path, device="cpu")
    text = log_text(runner)
    assert "it reads the picture itself (strict_all converts it): body.0" in text
    assert "it makes the predictions (strict_all converts it): body.4" in text
    assert "no layer was converted, the model trains in floating point" in text


def test_a_later_start_leaves_the_epochs_before_it(tmp_path: Path) -> None:
    runner = train(config({"log_level": "INFO"}, start_epoch=2), work_dir=tmp_path / "late", device="cpu")
    train(tiny_config(), work_dir=tmp_path / "float", device="cpu")
    assert log_text(runner).count("INT8 training: 2 layers converted") == 1
    assert len(logged(runner, "int8_cosine_min")) == 8
    for epoch, equal in ((2, True), (3, False)):
        name = f"epoch_{epoch}.pth"
        states = [final_state(tmp_path / run, name) for run in ("late", "float")]
        assert same_bits(*states) == equal
        assert (KEY in load_restricted(tmp_path / "late" / name)) != equal


@pytest.mark.parametrize(
    "options",
    [
        dict(clip="paper"),
        dict(clip="max"),
        dict(clip="hindsight"),
        dict(clip="max", planner=True),
        dict(clip="paper", by_iterations=True),
        dict(clip="max", start_epoch=3),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_two_of_four_epochs_resumed_equal_four(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options.copy()
    by_iterations = options.pop("by_iterations", False)
    half, end = ("iter_8.pth", "iter_16.pth") if by_iterations else ("epoch_2.pth", "epoch_4.pth")
    whole = config(dict(by_epoch=not by_iterations), **options)
    train(copy.deepcopy(whole), work_dir=tmp_path / "whole", device="cpu")
    if options.get("planner"):
        # The resumed run keeps the plans that the first one made, whatever the machine measures now.
        monkeypatch.setattr(planner, "_measure", lambda *_: 1 / 0)
        monkeypatch.setattr(planner, "_measured", {})
    train(copy.deepcopy(whole), work_dir=tmp_path / "resumed", resume=tmp_path / "whole" / half, device="cpu")
    assert not (tmp_path / "resumed" / half).exists()
    assert same_bits(final_state(tmp_path / "whole", end), final_state(tmp_path / "resumed", end))
    kept = [without_nan(load_restricted(tmp_path / run / end)[KEY]) for run in ("whole", "resumed")]
    assert same_bits(*kept)


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Without what the hook saves, a rule with a memory goes on otherwise."""
    train(config(clip="hindsight"), work_dir=tmp_path / "whole", device="cpu")
    checkpoint = torch.load(tmp_path / "whole" / "epoch_2.pth", weights_only=False)
    del checkpoint[KEY]
    torch.save(checkpoint, tmp_path / "half.pth")
    train(config(clip="hindsight"), work_dir=tmp_path / "resumed", resume=tmp_path / "half.pth", device="cpu")
    assert not same_bits(final_state(tmp_path / "whole"), final_state(tmp_path / "resumed"))


def test_new_weights_alone_start_afresh(tmp_path: Path) -> None:
    train(config({"train_cfg.max_epochs": 1}, clip="hindsight"), work_dir=tmp_path / "first", device="cpu")
    hook = Int8TrainingHook()
    checkpoint = {KEY: {"body.0": {}}}
    for resume in (False, True):
        hook.after_load_checkpoint(type("Runner", (), dict(_resume=resume)), checkpoint)
        assert (hook._loaded is not None) == resume
    loaded = {"load_from": str(tmp_path / "first" / "epoch_1.pth"), "train_cfg.max_epochs": 1}
    runner = train(config(loaded, clip="hindsight"), work_dir=tmp_path / "second", device="cpu")
    assert runner.iter == 4


@pytest.mark.parametrize(
    "wrapper",
    [
        dict(accumulative_counts=2),
        dict(clip_grad=dict(max_norm=0.01)),
        dict(accumulative_counts=4, clip_grad=dict(max_norm=1)),
    ],
)
def test_accumulation_and_clipping_of_gradients(tmp_path: Path, wrapper: dict[str, Any]) -> None:
    changes = {f"optim_wrapper.{key}": value for key, value in wrapper.items()}
    train(config(changes), work_dir=tmp_path / "int8", device="cpu")
    train(tiny_config(**changes), work_dir=tmp_path / "float", device="cpu")
    found, true = (final_state(tmp_path / run)["state_dict"] for run in ("int8", "float"))
    assert not same_bits(found, true)
    for name, value in true.items():
        assert float((value - found[name]).norm()) < 0.05 * float(value.norm()), name


@pytest.mark.parametrize("planned", [False, True])
def test_mixed_precision(tmp_path: Path, planned: bool) -> None:
    runner = train(config(planner=planned), work_dir=tmp_path, device="cpu", amp=True)
    assert runner.iter == 16
    assert all(math.isfinite(loss) for loss in logged(runner, "loss"))
    assert all(value.dtype == torch.float32 for value in final_state(tmp_path)["state_dict"].values())


def test_a_sick_layer_falls_back_is_named_and_stays_so(tmp_path: Path) -> None:
    """Two bits do harm; the last layer is spared, since its two gradients differ in their sign only."""
    sick = dict(grad_bits=2, min_cosine=0.999, patience=2)
    runner = train(config({"log_level": "INFO"}, **sick), work_dir=tmp_path / "whole", device="cpu")
    text = log_text(runner)
    assert text.count("goes back to floating point") == 1
    assert "body.0 goes back to floating point: the cosine between its gradient and the quantised one was" in text
    assert "below 0.999, for 2 checks" in text
    counts = logged(runner, "int8_sick_layers")
    assert counts == sorted(counts)
    assert 0.0 in counts[:4]
    assert set(counts[8:]) == {1.0}
    kept = load_restricted(tmp_path / "whole" / "epoch_2.pth")[KEY]
    assert {name: layer["sick"] for name, layer in kept.items()} == {"body.0": True, "body.4": False}
    assert logged(runner, "int8_cosine_min")[-1] > 0.999, "of the layers that are left"
    resumed = train(
        config({"log_level": "INFO"}, **sick),
        work_dir=tmp_path / "resumed",
        resume=tmp_path / "whole" / "epoch_2.pth",
        device="cpu",
    )
    assert "goes back to floating point" not in log_text(resumed), "said once is enough"
    assert set(logged(resumed, "int8_sick_layers")) == {1.0}
    assert same_bits(final_state(tmp_path / "whole"), final_state(tmp_path / "resumed"))


def test_telemetry_every_so_often(tmp_path: Path) -> None:
    runner = train(config(telemetry_interval=6), work_dir=tmp_path / "six", device="cpu")
    assert len(runner.message_hub.get_scalar("train/int8_cosine_min").data[0]) == 3
    runner = train(config(telemetry_interval=0), work_dir=tmp_path / "never", device="cpu")
    assert "train/int8_cosine_min" not in runner.message_hub.log_scalars


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(clips="max"), "clips.*Its options are backend, .*start_epoch, telemetry_interval"),
        (dict(clip="mean"), "clip must be one of"),
        (dict(start_epoch=-1), "must not be negative"),
        (dict(grad_input="channel_off"), "grad_input must be one of 'folded', 'global'"),
    ],
)
def test_a_wrong_option_says_how_to_mend_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int8TrainingHook(**options)
