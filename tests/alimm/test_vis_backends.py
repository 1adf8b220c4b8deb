"""MMEngine's log backends work by config: what is written is read back."""

import pytest

from alimm.apis.train import train
from tests.alimm.tiny_run import tiny_config


def test_tensorboard_gets_the_losses(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
    config = tiny_config(visualizer=dict(type="Visualizer", vis_backends=backends))
    train(config, work_dir=tmp_path, device="cpu", cfg_options={"default_hooks.logger.interval": 1})
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events.parent))
    read.Reload()
    losses = read.Scalars("loss")
    assert len(losses) >= 4
    assert [entry.step for entry in losses] == sorted(entry.step for entry in losses)
    assert all(entry.value > 0 for entry in losses)
    assert list(tmp_path.rglob("vis_data/scalars.json"))
