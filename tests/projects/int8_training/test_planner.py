"""What the planner chooses from given times, and that measuring changes nothing but the plan."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from alimm.projects.int8_training import convert, layers_of, planner
from alimm.projects.int8_training.planner import MARGIN, choose, total
from alimm.projects.int8_training.report import plan_table
from tests.projects.int8_training.single_layer import converted, error, example, run

NAMES = ("output", "grad_input", "grad_weight")
ALL = (True, True, True)


def times(quantize_input: float, quantize_gradient: float, **int8: float) -> dict[str, float]:
    """Float products take a second each; those named take what is given in INT8, the others two seconds."""
    found = {"quantize_input": quantize_input, "quantize_gradient": quantize_gradient}
    for name in NAMES:
        found[f"{name}_float"], found[f"{name}_int8"] = 1.0, int8.get(name, 2.0)
    return found


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_measured", {})


def test_the_cost_of_quantising_is_shared_by_the_products_that_need_it() -> None:
    one = times(0.6, 0.6, output=0.5, grad_input=0.5, grad_weight=0.5)
    assert total(one, (True, False, False)) == pytest.approx(0.5 + 2 + 0.6)
    assert total(one, (True, False, True)) == pytest.approx(0.5 + 1 + 0.5 + 0.6 + 0.6)
    assert total(one, ALL) == pytest.approx(1.5 + 1.2)
    assert choose(one, ALL) == ALL, "no single product pays, all three together do"
    assert choose(one, (True, False, False)) == (False, False, False)


def test_the_choice_is_the_least_of_all_combinations_that_are_allowed() -> None:
    grid = (0.2, 0.9, 1.4)
    for output, dx, dw, qx, qg in itertools.product(grid, grid, grid, (0.1, 0.5), (0.1, 0.5)):
        one = times(qx, qg, output=output, grad_input=dx, grad_weight=dw)
        for allowed in (ALL, (True, False, True), (False, False, False)):
            plans = [
                p
                for p in itertools.product((False, True), repeat=3)
                if all(a or not b for a, b in zip(allowed, p, strict=True))
            ]
            least = min(total(one, plan) for plan in plans)
            found = choose(one, allowed)
            assert found in plans
            if least * MARGIN < 3.0:
                assert total(one, found) == least
            else:
                assert found == (False, False, False)


def test_a_gain_within_the_noise_does_not_count() -> None:
    assert choose(times(0, 0, output=0.99), ALL) == (False, False, False)
    assert choose(times(0, 0, output=0.85), ALL) == (True, False, False)


def test_a_plan_is_made_once_a_shape_and_kept_for_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, grad = example("conv2d")
    measured: list[tuple[int, ...]] = []

    def fake(state: object, x: torch.Tensor, *_: object) -> dict[str, float]:
        measured.append(tuple(x.shape))
        return times(0.1, 0.1, output=0.1 if len(x) == 3 else 3)

    monkeypatch.setattr(planner, "_measure", fake)
    layer, _ = converted(module, planner=True, max_shapes=2)
    for count in (3, 2, 3, 1, 1):
        run(layer, x[:count], grad[:count])
    assert measured == [(3, 6, 9, 8), (2, 6, 9, 8), (1, 6, 9, 8)]
    assert list(layer.int8.plans) == [(2, 6, 9, 8), (1, 6, 9, 8)]
    run(layer, x, grad)
    assert measured[3:] == [], "timed before, by this layer or another of its kind"
    assert layer.int8.plans[3, 6, 9, 8] == (True, False, False)
    # Ranges are kept by size alone; no plan here reads a gradient.
    assert not layer.int8.ranges


def test_a_layer_planned_for_float32_gives_the_bits_of_the_stock_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, grad = example("conv2d")
    monkeypatch.setattr(planner, "_measure", lambda *_: times(9, 9))
    found, true = run(converted(module, planner=True)[0], x, grad), run(module, x, grad)
    assert torch.equal(found.y, true.y)
    assert torch.equal(found.dw, true.dw)


@pytest.mark.parametrize("kind", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("name", ["conv2d", "depthwise", "conv1d", "linear"])
def test_measuring_works_for_every_type_and_leaves_the_generator_and_the_ranges(name: str, kind: str) -> None:
    module, x, grad = example(name)
    true = run(module, x, grad)
    if kind == "bfloat16":
        module = module.bfloat16()
    if kind != "float32":
        x, grad = x.bfloat16(), grad.bfloat16()
    layer, _ = converted(module, planner=True)
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found = run(layer, x, grad)
    assert torch.equal(torch.get_rng_state(), before)
    assert error(found.dw, true.dw) < 0.04
    ((shape, timed),) = layer.int8.timings.items()
    assert shape == tuple(x.shape)
    assert set(timed) == {f"{n}_{k}" for n in NAMES for k in ("int8", "float")} | {
        "quantize_input",
        "quantize_gradient",
    }
    assert all(seconds > 0 for seconds in timed.values())


def test_the_table_names_layer_shape_and_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_measure", lambda *_: times(0.1, 0.1, output=0.1, grad_weight=0.2))
    model = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(72, 4))
    convert(model, strict_all=True, backend="int_mm")
    model(torch.randn(2, 8, 8, 8)).sum().backward()
    table = plan_table(dict(layers_of(model))).splitlines()
    assert len(table) == 4
    # 3 seconds in float32 against 0.1 + 1 + 0.2 + 0.2.
    assert table[2].split() == ["0", "2x8x8x8", "8", "->", "8", "3x3", "s2x2", "int_mm", "float", "int_mm", "2.00x"]
    assert table[3].split()[:2] == ["2", "2x72"]
