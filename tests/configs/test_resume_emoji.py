"""The demo's own config, stopped and resumed, ends at the same bits: sampler, augmentation and averages included."""

import torch

from alimm.apis.checkpoints import load_restricted
from alimm.apis.train import train

CONFIG = "alimm::emoji_products/resnet_tiny_style.py"


def run(folder, epochs, resume=None):
    options = {
        "train_dataloader.dataset.indices": 256,
        "train_dataloader.batch_size": 64,
        "train_cfg.max_epochs": epochs,
        "train_cfg.val_interval": 100,
        "model.backbone.width": 8,
        "model.neck.in_channels": 64,
        "model.head.heads.subgroup.in_channels": 64,
        "log_level": "WARNING",
    }
    train(CONFIG, work_dir=folder, resume=resume, cfg_options=options, device="cpu")
    return load_restricted(folder / f"epoch_{epochs}.pth")


def test_resume_equals_an_uninterrupted_run(tmp_path):
    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    parts = run(tmp_path / "parts", 4, resume="auto")
    for part in ("state_dict", "ema_state_dict"):
        assert whole[part].keys() == parts[part].keys()
        for name, value in whole[part].items():
            assert torch.equal(value, parts[part][name]), f"{part} {name}"
    start = load_restricted(tmp_path / "parts" / "epoch_3.pth")["state_dict"]
    assert any(not torch.equal(value, whole["state_dict"][name]) for name, value in start.items())
