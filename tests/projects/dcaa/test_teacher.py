"""The teacher: a copy that is frozen, follows slowly, or is made anew now and then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from alimm.projects.dcaa.teacher import Teacher


def student(value: float = 1.0) -> Any:
    net: Any = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Dropout(0.5))
    put(net, value)
    return net


def put(net: Any, value: float) -> None:
    """Set all weights to a value, and the statistics to 100 and 200 times it."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
        net[1].running_mean.fill_(100 * value)
        net[1].running_var.fill_(200 * value)
        net[1].num_batches_tracked.fill_(int(value))


def values(teacher: Teacher) -> tuple[float, float, int]:
    part: Any = teacher.parts["net"]
    parameters = {round(float(p), 6) for p in part.parameters()}
    assert len(parameters) == 1
    return parameters.pop(), float(part[1].running_mean), int(part[1].num_batches_tracked)


def test_is_a_copy_without_gradients_or_dropout() -> None:
    net = student()
    holder = nn.ModuleDict(dict(net=net, teacher=Teacher(dict(net=net))))
    teacher: Any = holder["teacher"]
    holder.train()
    assert net[2].training
    assert not any(part.training for part in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    x = torch.randn(4, 1, 2, 2)
    assert torch.equal(teacher.parts["net"](x), teacher.parts["net"](x))
    teacher.parts["net"](x)
    put(net, 2.0)
    assert values(teacher) == (1.0, 100.0, 1)


@pytest.mark.parametrize("momentum", [0.3, 0.01])
def test_average_in_closed_form(momentum: float) -> None:
    net = student(1.0)
    teacher = Teacher(dict(net=net), momentum=momentum)
    seen = [1.0]
    for t in range(1, 7):
        put(net, float(t * t))
        seen.append(float(t * t))
        teacher.follow(dict(net=net))
        # theta_T = sum_s m_s prod_{r > s} (1 - m_r) theta_s, with m_0 = 1
        m = [1.0] + [max(momentum, 1 / (s + 1)) for s in range(1, t + 1)]
        expected = 0.0
        for s in range(t + 1):
            share = m[s]
            for r in range(s + 1, t + 1):
                share *= 1 - m[r]
            expected += share * seen[s]
        average, mean, tracked = values(teacher)
        assert average == pytest.approx(expected, rel=1e-5)
        assert (mean, tracked) == (100.0 * t * t, t * t)
    if momentum == 0.01:  # so far a plain mean
        assert average == pytest.approx(sum(seen) / 7, rel=1e-5)


def test_interval_and_frozen() -> None:
    net = student(1.0)
    anew, still = Teacher(dict(net=net), interval=3), Teacher(dict(net=net))
    found = []
    for t in range(2, 9):
        put(net, float(t))
        anew.follow(dict(net=net))
        still.follow(dict(net=net))
        found.append(values(anew)[0])
        assert values(still) == (1.0, 100.0, 1)
    assert found == [1.0, 1.0, 4.0, 4.0, 4.0, 7.0, 7.0]


def test_a_fresh_copy_counts_anew() -> None:
    net = student(1.0)
    teacher = Teacher(dict(net=net), momentum=0.01)
    for _ in range(5):
        teacher.follow(dict(net=net))
    put(net, 8.0)
    teacher.copy_from(dict(net=net))
    assert values(teacher) == (8.0, 800.0, 8)
    put(net, 4.0)
    teacher.follow(dict(net=net))
    assert values(teacher)[0] == 6.0


def test_is_saved_with_its_count() -> None:
    net = student(1.0)
    first, second = Teacher(dict(net=net), interval=3), Teacher(dict(net=student(5.0)), interval=3)
    put(net, 2.0)
    for _ in range(2):
        first.follow(dict(net=net))
    second.load_state_dict(first.state_dict())
    assert values(second)[0] == 1.0
    second.follow(dict(net=net))
    assert values(second)[0] == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(momentum=0.1, interval=2), "a momentum or an interval, not both"),
        (dict(momentum=0.0), r"lies in \(0, 1\], got 0.0"),
        (dict(momentum=1.5), r"lies in \(0, 1\], got 1.5"),
        (dict(interval=0), "at least 1 step, got 0"),
    ],
)
def test_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teacher(dict(net=student()), **options)


def test_batch_statistics_are_those_of_the_batch_and_leave_the_running_ones() -> None:
    teacher = Teacher(dict(net=student()))
    part: Any = teacher.parts["net"]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    x = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)) + 5
    by_running = part(x)
    with teacher.batch_statistics():
        by_batch = part(x)
    with teacher.batch_statistics(False):
        assert torch.equal(part(x), by_running)
    convolved = x + 1  # weight and bias are 1
    expected = (convolved - convolved.mean()) / (convolved.var(unbiased=False) + 1e-5).sqrt() + 1
    torch.testing.assert_close(by_batch, expected)
    assert torch.equal(part(x), by_running), "afterwards as before"
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module.training for module in part)
