"""analyze_logs on logs that MMEngine wrote, and on damaged ones."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from PIL import Image

from alimm.analysis.analyze_logs import find_logs, main, read_lines, read_run, smooth, train_times


class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs, mode="tensor"):
        loss = (self.weight * torch.stack(list(inputs)) - 1).square().mean()
        return {"loss": loss} if mode == "loss" else [{"loss": float(loss)}] * len(inputs)


class Share(BaseMetric):
    default_prefix = "accuracy"

    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return {"top1": 10.0 * len(results)}


def train(work_dir, by_epoch: bool, length: int, resume: bool = False):
    loader = {
        "dataset": [{"inputs": torch.ones(1)}] * 8,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "batch_size": 2,
        "num_workers": 0,
    }
    lengths = {"max_epochs": length} if by_epoch else {"max_iters": length}
    Runner(
        Line(),
        str(work_dir),
        train_dataloader=loader,
        val_dataloader=loader,
        val_evaluator=[Share()],
        val_cfg={},
        train_cfg={"by_epoch": by_epoch, "val_interval": 1 if by_epoch else 4, **lengths},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        default_hooks={"logger": {"type": "LoggerHook", "interval": 2}, "checkpoint": None},
        log_processor={"by_epoch": by_epoch},
        experiment_name=f"{work_dir.name}{by_epoch}",
    ).train()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    train(root / "epochs", True, 3)
    train(root / "iters", False, 8)
    return root


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def epoch_lines(epochs, first=1, loss=1.0):
    """Two iterations an epoch, one validation after each."""
    lines = []
    for epoch in range(first, epochs + 1):
        lines += [
            {"loss": loss / iteration, "time": 0.1 * epoch, "epoch": epoch, "iter": iteration, "step": iteration}
            for iteration in (2 * epoch - 1, 2 * epoch)
        ]
        lines.append({"accuracy/top1": 10.0 * epoch * loss, "time": 5.0, "step": epoch})
    return lines


@pytest.mark.parametrize(
    ("name", "by_epoch", "loss_at", "top1_at"),
    [
        ("epochs", True, [0.5, 1, 1.5, 2, 2.5, 3], [1, 2, 3]),
        ("epochs", False, [2, 4, 6, 8, 10, 12], [4, 8, 12]),
        ("iters", False, [2, 4, 6, 8], [4, 8]),
    ],
)
def test_a_real_log_is_placed_on_the_axis(runs, name, by_epoch, loss_at, top1_at):
    run = read_run(runs / name)
    assert run.name == name
    assert run.by_epoch == (name == "epochs")
    x, y = run.series("loss", by_epoch)
    assert x.tolist() == loss_at
    assert (np.diff(y) < 0).all()
    x, y = run.series("accuracy/top1", by_epoch)
    assert x.tolist() == top1_at
    assert (y == 80.0).all()
    # A validation has a time too; it is another figure and does not mix with that of the training.
    assert len(run.series("time", by_epoch)[0]) == len(loss_at)


def test_plots_several_runs(runs, tmp_path, capsys):
    out = tmp_path / "deep" / "curves.png"
    log = next((runs / "iters").glob("*/vis_data/scalars.json"))
    command = ["plot_curve", str(runs / "epochs"), str(log), "--keys", "loss", "accuracy/top1", "--out", str(out)]
    assert main([*command, "--legend", "a", "b", "--title", "T", "--smooth", "0.5"]) == 0
    assert str(out) in capsys.readouterr().out
    pixels = np.asarray(Image.open(out).convert("RGB"))
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # both runs are there, in both panels
        columns = np.flatnonzero((pixels == colour).all(axis=2).any(axis=0))
        assert columns.min() < pixels.shape[1] / 2 < columns.max()


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_other_formats(runs, tmp_path, suffix):
    out = tmp_path / f"curves{suffix}"
    assert main(["plot_curve", str(runs / "epochs"), "--keys", "lr", "loss", "time", "--out", str(out)]) == 0
    assert out.stat().st_size > 1000


def test_a_wrong_key_lists_those_there_are(runs, tmp_path, capsys):
    out = tmp_path / "x.png"
    assert main(["plot_curve", str(runs / "iters"), "--keys", "accuracy_top1", "--out", str(out)]) == 1
    message = capsys.readouterr().err
    assert "no key 'accuracy_top1'. Did you mean accuracy/top1?" in message
    assert "loss" in message
    assert str(runs / "iters") in message
    assert not out.exists()


def test_a_work_dir_is_read_in_order_and_a_later_start_counts(tmp_path):
    (tmp_path / "figures.json").write_text('{\n  "of": "another tool"\n}')
    write(tmp_path / "20260101_000000/vis_data/scalars.json", epoch_lines(3))
    write(tmp_path / "20260101_000000/vis_data/20260101_000000.json", epoch_lines(3))
    write(tmp_path / "20260102_000000/vis_data/20260102_000000.json", epoch_lines(4, first=3, loss=2.0))
    assert [log.name for log in find_logs(tmp_path)] == ["scalars.json", "20260102_000000.json"]
    run = read_run(tmp_path)
    x, y = run.series("loss", False)
    assert x.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert y.tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 2 / 5, 2 / 6, 2 / 7, 2 / 8])
    x, y = run.series("accuracy/top1", True)
    assert list(zip(x.tolist(), y.tolist(), strict=True)) == [(1, 10), (2, 20), (3, 60), (4, 80)]


def test_names_of_runs(tmp_path):
    log = write(tmp_path / "resnet/20260101/vis_data/scalars.json", epoch_lines(1))
    assert read_run(log).name == "resnet/20260101"
    assert read_run(tmp_path / "resnet").name == "resnet"
    assert read_run(write(tmp_path / "old.json", epoch_lines(1))).name == "old"
    assert read_run(log, "mine").name == "mine"


def test_a_log_of_validations_only_is_placed_by_its_steps(tmp_path):
    lines = [{"accuracy/top1": 5.0, "step": 100}, {"accuracy/top1": 6.0, "step": 200}]
    assert read_run(write(tmp_path / "val.json", lines)).series("accuracy/top1", False)[0].tolist() == [100, 200]


def test_a_cut_last_line_is_left_out_with_a_notice(tmp_path, capsys):
    path = write(tmp_path / "log.json", epoch_lines(2))
    whole = len(read_lines(path))
    path.write_bytes(path.read_bytes()[:-10])
    assert len(read_lines(path)) == whole - 1
    assert f"{path}:{whole} is cut short" in capsys.readouterr().err


@pytest.mark.parametrize("line", [b'{"loss": 0.1, "it', b"[1, 2]", b"\xff\xfe", b"null"])
def test_another_damaged_line_names_file_and_line(tmp_path, capsys, line):
    path = write(tmp_path / "log.json", epoch_lines(1))
    lines = path.read_bytes().split(b"\n")
    # Neither end of the file excuses it: one is whole, one was cut short as well.
    path.write_bytes(b"\n".join([*lines[:1], line, *lines[1:]])[: -1 if line == b"null" else None])
    assert main(["plot_curve", str(path), "--out", str(tmp_path / "x.png")]) == 1
    assert f"{path}:2: no line of a log" in capsys.readouterr().err


def test_values_that_are_no_numbers_are_no_keys_and_nan_is_drawn_as_a_gap(tmp_path):
    lines = [{"loss": math.nan, "note": "x", "list": [1], "flag": True, "epoch": 1, "iter": 1}, *epoch_lines(3)[1:]]
    path = write(tmp_path / "log.json", lines)
    assert read_run(path).keys() == ["loss", "time", "accuracy/top1"]
    assert main(["plot_curve", str(path), "--smooth", "0.9", "--out", str(tmp_path / "x.png")]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--legend", "a", "b"], "--legend gives 2 names for 1 logs"),
        (["--smooth", "1"], "--smooth takes a weight"),
        (["--out", "x.txt"], "--out must end in"),
        (["--x", "epoch"], "does not count epochs"),
    ],
)
def test_wrong_options_are_named(runs, capsys, options, message):
    assert main(["plot_curve", str(runs / "iters"), *options]) == 1
    assert message in capsys.readouterr().err


def test_missing_and_empty_logs_are_named(tmp_path, capsys):
    assert main(["cal_train_time", str(tmp_path / "gone")]) == 1
    assert "gone does not exist" in capsys.readouterr().err
    assert main(["cal_train_time", str(tmp_path)]) == 1
    assert "holds no vis_data/*.json" in capsys.readouterr().err
    empty = tmp_path / "empty.json"
    empty.touch()
    assert main(["cal_train_time", str(empty)]) == 1
    assert "empty.json holds no figures" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])


def test_train_time_is_that_of_the_training(tmp_path, capsys):
    path = write(tmp_path / "log.json", epoch_lines(3))
    assert train_times(read_run(path)) == [(str(e), 2, pytest.approx(0.1 * e)) for e in (1, 2, 3)]
    assert main(["cal_train_time", str(path)]) == 0
    out = capsys.readouterr().out
    assert "mean 0.2000 s/iteration, slowest epoch 3 (0.3000), fastest epoch 1 (0.1000)" in out
    val_only = write(tmp_path / "val.json", [{"accuracy/top1": 5.0, "time": 1.0, "step": 1}])
    assert main(["cal_train_time", str(val_only)]) == 1
    assert "no 'time' of training lines" in capsys.readouterr().err


def test_smoothing_is_a_weighted_mean_of_what_came_before():
    values = np.array([1.0, 5.0, np.nan, 2.0])
    expected = [1.0, (0.5 * 1 + 5) / 1.5, np.nan, (0.25 * 1 + 0.5 * 5 + 2) / 1.75]
    np.testing.assert_allclose(smooth(values, 0.5), expected)
    np.testing.assert_array_equal(smooth(values, 0.0), values)
