"""Ranges, health and seeds of a layer, without a training loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alimm.projects.int8_training import Int8Options, telemetry
from alimm.projects.int8_training.ranges import GradientRange
from tests.projects.int8_training.single_layer import converted, example, run

CLIPS = ["max", "paper", "closed_form", "histogram", "hindsight"]


def gradients(steps: int = 5) -> list[torch.Tensor]:
    """(2, 1, 30, 30, 4) of a bell, a Laplace, spikes, and nothing; smaller from step to step."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(steps):
        bell, side = (torch.randn(2, 1, 30, 30, generator=generator) for _ in range(2))
        laplace = -torch.log(torch.rand(2, 1, 30, 30, generator=generator)) * side.sign()
        spikes = torch.where(torch.rand(2, 1, 30, 30, generator=generator) < 0.01, 20 * bell, bell)
        found.append(torch.stack([bell, laplace, spikes, 0 * bell], -1) * 0.8**step)
    return found


@pytest.mark.parametrize("clip", CLIPS)
def test_the_state_does_not_depend_on_a_changing_loss_scale(clip: str) -> None:
    options = Int8Options(clip=clip)
    plain, scaled = GradientRange(), GradientRange()
    for gradient, scale in zip(gradients(), (2.0**16, 2.0**16, 2.0**15, 2.0**17, 1.0), strict=True):
        true, found = plain.update(gradient, options), scaled.update(gradient * scale, options, scale)
        assert true is not None
        assert found is not None
        np.testing.assert_allclose(found[0], true[0] * scale, rtol=1e-6)
        np.testing.assert_allclose(found[1], true[1] * scale, rtol=1e-5, atol=1e-3 * scale)
        assert plain.clip_C is not None
        assert scaled.clip_C is not None
        np.testing.assert_allclose(scaled.clip_C, plain.clip_C, rtol=1e-6)
    # A memory kept in units of the scaled gradient would be off by the scale.
    assert np.nanmax(scaled.clip_C) < 100


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_leaves_the_state(clip: str, bad: float) -> None:
    options, memory = Int8Options(clip=clip), GradientRange()
    first, second, third = gradients(3)
    memory.update(first, options)
    kept = memory.state()
    second[1, 0, 3, 4, 1] = bad
    assert memory.update(second, options) is None
    for name, value in memory.state().items():
        assert (value is None and kept[name] is None) or torch.equal(value.nan_to_num(-1), kept[name].nan_to_num(-1))
    assert memory.update(third, options) is not None


@pytest.mark.parametrize("clip", CLIPS)
def test_a_state_that_was_saved_goes_on_alike(clip: str) -> None:
    options, memory = Int8Options(clip=clip), GradientRange()
    steps = gradients()
    for gradient in steps[:2]:
        memory.update(gradient, options)
    loaded = GradientRange.from_state(memory.state())
    for gradient in steps[2:]:
        one, other = memory.update(gradient, options), loaded.update(gradient, options)
        assert one is not None
        assert other is not None
        assert np.array_equal(one[0], other[0])


def test_hindsight_takes_the_maximum_before_or_the_present_one_where_there_was_no_gradient() -> None:
    options, memory = Int8Options(clip="hindsight"), GradientRange()
    steps = [[1.0, 0.0, 2.0], [3.0, 4.0, 0.0], [5.0, 1.0, 1.0]]
    expected = [[1.0, 0.0, 2.0], [1.0, 4.0, 2.0], [3.0, 4.0, 1.0]]
    for values, clip in zip(steps, expected, strict=True):
        found = memory.update(torch.tensor(values).view(1, 1, 1, 1, 3), options)
        assert found is not None
        assert found[0].tolist() == clip


def test_ranges_are_kept_by_size_and_the_oldest_go() -> None:
    layer, _ = converted(example("1x1")[0], max_shapes=2)
    for size in (4, 5, 4, 6):
        x = torch.randn(2, 6, size, size)
        run(layer, x, torch.randn(2, 8, size, size))
    assert list(layer.int8.ranges) == [(1, 4, 4), (1, 6, 6)]


def test_health_is_what_was_measured() -> None:
    layer, report = converted(example("linear")[0], grad_bits=8, patience=2)
    state = layer.int8
    report.context.watch = True
    # Of four elements one is clipped (6 at 3.175), one is zero, and one is off by half a step.
    g_RC, step_C = torch.tensor([[6.0, 0.0], [1.0, 0.025 * 0.5]]), np.float32([0.025, 0.025])
    q_RC = torch.tensor([[127, 0], [40, 0]], dtype=torch.int8)
    telemetry.watch(state, g_RC, q_RC, step_C)
    back = np.array([127 * 0.025, 0, 1.0, 0])
    given = np.array([6.0, 0, 1.0, 0.0125])
    true = float(given @ back / np.linalg.norm(given) / np.linalg.norm(back))
    assert state.health.cosine == pytest.approx(true, rel=1e-6)
    assert state.health.clipped == 0.25
    assert state.health.zeros == 0.5
    telemetry.watch(state, g_RC, torch.zeros_like(q_RC), step_C)
    assert state.health.cosine == 0.0
    assert state.health.sick_checks == 1
    assert not state.sick
    telemetry.watch(state, g_RC, q_RC, step_C)
    assert state.health.sick_checks == 0, "in a row"
    telemetry.watch(state, 0 * g_RC, 0 * q_RC, step_C)
    assert state.health.cosine == 1.0, "nothing lost of nothing"
    for _ in range(2):
        telemetry.watch(state, g_RC, torch.zeros_like(q_RC), step_C)
    assert state.sick
    module, x, grad = example("linear")
    assert torch.equal(run(layer, x, grad).y, run(module, x, grad).y), "in floating point from now on"
