from __future__ import annotations

import io
import logging
import random
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from alimm.hooks import ProgressHook, ShowPredictionsHook, seed_worker
from alimm.registry import FUNCTIONS, HOOKS
from alimm.structures import ClsDataSample


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class FakeRunner:
    def __init__(self, stream: Any):
        self.logger = logging.Logger("fake")
        self.logger.addHandler(logging.StreamHandler(stream))
        self.max_iters, self.iter, self.rank = 3, 0, 0
        self.val_dataloader = self.test_dataloader = type("L", (), {"__len__": lambda s: 2, "dataset": None})()


def test_seed_worker_follows_torch_and_differs_from_seed_to_seed() -> None:
    def draw(seed: int) -> tuple[float, float]:
        torch.manual_seed(seed)
        seed_worker(0)
        return random.random(), float(np.random.rand())

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    assert draw(1) == draw(1)
    assert draw(1)[0] != draw(2)[0]
    assert draw(1)[1] != draw(2)[1]
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def test_registered() -> None:
    assert HOOKS.get("alimm.ProgressHook") is ProgressHook
    assert FUNCTIONS.get("alimm.seed_worker") is seed_worker


def test_progress_is_silent_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    runner, hook = FakeRunner(out), ProgressHook()
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)
    hook.after_train(runner)
    assert out.getvalue() == ""


def test_log_lines_stay_whole_beside_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    runner, hook = FakeRunner(terminal), ProgressHook()
    hook.before_train(runner)
    hook.before_val_epoch(runner)
    line = "a line of the log " * 12 + "[3/4] ends here"
    runner.logger.warning(line)
    hook.after_val_iter(runner, 0)
    hook.after_val_epoch(runner)
    hook.after_train_iter(runner, 0)
    hook.after_train(runner)
    text = terminal.getvalue()
    assert "train" in text
    assert f"{line}\n" in text
    assert runner.logger.handlers[0].stream is terminal, "the log has its stream back"


def test_progress_shows_nothing_on_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("alimm.hooks.progress.is_main_process", lambda: False)
    hook = ProgressHook()
    hook.before_train(FakeRunner(terminal))
    hook.after_train(FakeRunner(terminal))
    assert terminal.getvalue() == ""


def test_close_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    runner, hook = FakeRunner(terminal), ProgressHook()
    hook.before_train(runner)
    hook.close()
    hook.close()
    assert runner.logger.handlers[0].stream is terminal


def test_pictures_of_predictions(tmp_path: Path) -> None:
    runner = FakeRunner(io.StringIO())
    images = [torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (10, 20, 30)]
    images[0][0] = 200
    samples = []
    for index in range(3):
        sample = ClsDataSample(metainfo=dict(sample_id=f"a/{index}")).set_gt_label(1)
        samples.append(sample.set_pred_score(torch.tensor([0.2, 0.8])))
    hook = ShowPredictionsHook(str(tmp_path / "out"), max_count=2, min_width=32)
    hook.after_test_iter(runner, 0, dict(inputs=images), samples)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_0.png", "a_1.png"]
    picture_BGR = cv2.imread(str(tmp_path / "out" / "a_0.png"))
    assert picture_BGR.shape[1] == 32
    assert picture_BGR[0, 0].tolist() == [10, 10, 200], "RGB in, right colours out"


def test_a_picture_of_one_channel_is_drawn_grey(tmp_path: Path) -> None:
    sample = ClsDataSample(metainfo=dict(sample_id="a")).set_pred_score(torch.tensor([0.2, 0.8]))
    hook = ShowPredictionsHook(str(tmp_path), min_width=8)
    image = torch.full((1, 8, 8), 50, dtype=torch.uint8)
    hook.after_test_iter(FakeRunner(io.StringIO()), 0, dict(inputs=[image]), [sample])
    assert cv2.imread(str(tmp_path / "a.png"))[0, 0].tolist() == [50, 50, 50]
