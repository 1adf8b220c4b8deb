from __future__ import annotations

from typing import Any

import pytest
import torch

from alimm.projects.dcaa.stage_hook import StageHook
from tests.projects.dcaa.tiny_runner import assert_equal_weights, run, weights

THREE = ((0, "source"), (2, "align"), (4, "self_train"))


def hook(*schedule: tuple[int, str]) -> list[dict[str, Any]]:
    stages = [dict(begin=begin, stage=stage) for begin, stage in schedule]
    return [dict(type="alimm.StageHook", stages=stages)]


def test_stages_begin_at_their_iterations(tmp_path: Any, monkeypatch: Any) -> None:
    from tests.projects.dcaa.tiny_runner import TinyPlayers

    seen = []
    step = TinyPlayers.train_step
    monkeypatch.setattr(
        TinyPlayers,
        "train_step",
        lambda self, data, optim_wrapper: (seen.append(self.stage), step(self, data, optim_wrapper))[1],
    )
    runner = run(tmp_path, max_iters=6, custom_hooks=hook(*THREE))
    assert seen == ["source", "source", "align", "align", "self_train", "self_train"]
    assert runner.model.entered == ["align", "self_train"]


@pytest.mark.parametrize(("half", "entered"), [(3, ["self_train"]), (4, ["self_train"]), (5, [])])
def test_a_resumed_run_enters_no_stage_twice(tmp_path: Any, half: int, entered: list[str]) -> None:
    hooks = dict(checkpoint=dict(type="CheckpointHook", interval=1, by_epoch=False))
    whole = run(tmp_path / "whole", max_iters=7, custom_hooks=hook(*THREE), default_hooks=hooks)
    run(tmp_path / "halves", max_iters=7, custom_hooks=hook(*THREE), default_hooks=hooks)
    path = tmp_path / "halves" / f"iter_{half}.pth"
    resumed = run(tmp_path / "resumed", max_iters=7, custom_hooks=hook(*THREE), default_hooks=hooks, resume=path)
    assert resumed.model.entered == entered
    assert_equal_weights(weights(resumed), weights(whole))


def test_a_new_model_goes_where_the_schedule_begins(tmp_path: Any) -> None:
    model = dict(type="alimm.TinyPlayers", stage="align")
    assert run(tmp_path, max_iters=1, model=model, custom_hooks=hook((0, "source"))).model.entered == ["source"]
    assert run(tmp_path, max_iters=1, model=model, custom_hooks=hook((0, "align"))).model.entered == []


def test_weights_of_a_stage_start_the_next(tmp_path: Any) -> None:
    run(tmp_path / "a", max_iters=2, custom_hooks=hook((0, "align")))
    path = str(tmp_path / "a" / "iter_2.pth")
    assert run(tmp_path / "b", max_iters=1, load_from=path, custom_hooks=hook((0, "self_train"))).model.entered == [
        "self_train"
    ]


@pytest.mark.parametrize("saved", ["source", "align", "self_train"])
def test_a_new_run_enters_its_first_stage_whatever_weights_it_starts_from(tmp_path: Any, saved: str) -> None:
    run(tmp_path / "a", max_iters=2, custom_hooks=hook((0, saved)))
    path = str(tmp_path / "a" / "iter_2.pth")
    runner = run(tmp_path / "b", max_iters=3, load_from=path, custom_hooks=hook((0, "align"), (1, "self_train")))
    assert runner.model.entered == ["align", "self_train"]


def test_a_new_run_starts_from_the_weights_of_another_class(tmp_path: Any) -> None:
    run(tmp_path / "a", max_iters=2)
    loaded = torch.load(tmp_path / "a" / "iter_2.pth", weights_only=False)
    loaded["state_dict"]["stage_index"].fill_(7)
    torch.save(loaded, tmp_path / "other.pth")
    runner = run(tmp_path / "b", max_iters=1, load_from=str(tmp_path / "other.pth"), custom_hooks=hook((0, "align")))
    assert runner.model.stage == "align"


def test_weights_without_a_stage_start_anywhere(tmp_path: Any) -> None:
    run(tmp_path / "a", max_iters=2)
    loaded = torch.load(tmp_path / "a" / "iter_2.pth", weights_only=False)
    del loaded["state_dict"]["stage_index"]
    torch.save(loaded, tmp_path / "plain.pth")
    model = dict(type="alimm.TinyPlayers", stage="self_train")
    runner = run(
        tmp_path / "b", max_iters=1, model=model, load_from=str(tmp_path / "plain.pth"), custom_hooks=hook((0, "align"))
    )
    assert runner.model.entered == ["align"]


def test_resuming_with_a_later_schedule_is_refused(tmp_path: Any) -> None:
    run(tmp_path, max_iters=4, custom_hooks=hook((0, "source"), (2, "align")))
    with pytest.raises(ValueError, match="in the stage 'align', but the schedule has 'source' at iteration 4"):
        run(tmp_path, max_iters=8, custom_hooks=hook((0, "source"), (6, "align")), resume="auto")


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([(0, "source"), (9, "align")], "'align' begins at iteration 9, but training ends at max_iters=6"),
        ([(0, "source"), (6, "align")], "begins at iteration 6, but training ends at max_iters=6"),
        ([(0, "warm_up")], "has the stages source, align, self_train, not 'warm_up'"),
        ([(0, "align"), (2, "source")], "only moves forward through source, align, self_train, got align, source"),
    ],
)
def test_schedules_that_do_not_fit_the_run(tmp_path: Any, schedule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, max_iters=6, custom_hooks=hook(*schedule))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "at least one stage"),
        ([dict(begin=1, stage="source")], "the first stage must begin at 0, got 1"),
        ([dict(begin=0, stage="source"), dict(begin=0, stage="align")], r"one after the other, got \[0, 0\]"),
        ([dict(begin=0, stage="a"), dict(begin=5, stage="b"), dict(begin=3, stage="c")], r"got \[0, 5, 3\]"),
        ([dict(begin=0, name="source")], r"a stage is dict\(begin=..., stage=...\), got"),
        ([dict(begin=0.5, stage="source")], "begin is the number of an iteration, got 0.5"),
    ],
)
def test_schedules_that_do_not_fit_themselves(stages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageHook(stages)


def test_a_model_without_stages(tmp_path: Any, monkeypatch: Any) -> None:
    from tests.projects.dcaa.tiny_runner import TinyPlayers

    monkeypatch.delattr(TinyPlayers, "enter_stage")
    with pytest.raises(ValueError, match="TinyPlayers has no stages"):
        run(tmp_path, custom_hooks=hook((0, "source")))
