from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from alimm.apis.devices import resolve_device
from alimm.apis.train import merge_train_options, train
from tests.alimm.tiny_run import TinyCollect, tiny_config


def test_options_have_openmmlabs_meaning(tmp_path: Path) -> None:
    (tmp_path / "a.pth").touch()
    config = tiny_config(auto_scale_lr=dict(base_batch_size=64))
    merged = merge_train_options(
        config, work_dir="w", resume=tmp_path / "a.pth", amp=True, auto_scale_lr=True, seed=5, device="cuda"
    )
    assert (merged.work_dir, merged.resume, merged.load_from) == ("w", True, str(tmp_path / "a.pth"))
    assert merged.auto_scale_lr == dict(base_batch_size=64, enable=True)
    assert (merged.optim_wrapper.type, merged.optim_wrapper.loss_scale) == ("AmpOptimWrapper", "dynamic")
    assert merged.randomness == dict(seed=5)
    auto = merge_train_options(tiny_config(load_from="b.pth"), resume="auto")
    assert (auto.resume, auto.load_from) == (True, None)
    assert not merge_train_options(tiny_config()).get("resume")


def test_cfg_options_win(tmp_path: Path) -> None:
    options = {"work_dir": "from options", "randomness.seed": 9}
    merged = merge_train_options(tiny_config(), work_dir="from flag", seed=1, cfg_options=options)
    assert (merged.work_dir, merged.randomness.seed) == ("from options", 9)


def test_work_dir_defaults_to_the_name_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "my_run.py").write_text("a = 1\n")
    assert merge_train_options(Config.fromfile(tmp_path / "my_run.py")).work_dir == "work_dirs/my_run"
    assert merge_train_options(tiny_config(work_dir="own")).work_dir == "own"


def test_own_hooks_come_and_can_be_left_out() -> None:
    merged = merge_train_options(tiny_config(num_workers=2))
    assert merged.default_hooks.epoch_seed.type == "alimm.EpochSeedHook"
    assert merged.train_dataloader.worker_init_fn.type == "alimm.seed_worker"
    without = merge_train_options(tiny_config(num_workers=2), cfg_options={"default_hooks.epoch_seed": None})
    assert "epoch_seed" not in without.default_hooks
    assert "worker_init_fn" not in without.train_dataloader
    own = tiny_config(num_workers=2, **{"train_dataloader.worker_init_fn": dict(type="default_worker_init_fn")})
    assert merge_train_options(own).train_dataloader.worker_init_fn.type == "default_worker_init_fn"


def test_amp_on_the_cpu_trains_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.alimm.tiny_run import TinyNet

    seen = []
    forward = TinyNet.forward

    def spy(self: TinyNet, inputs: torch.Tensor, target: torch.Tensor, mode: str = "tensor") -> object:
        seen.append(self.body(inputs).dtype)
        return forward(self, inputs, target, mode)

    monkeypatch.setattr(TinyNet, "forward", spy)
    runner = train(tiny_config(), work_dir=tmp_path, amp=True, device="cpu", cfg_options={"train_cfg.max_epochs": 1})
    assert set(seen) == {torch.bfloat16}
    assert type(runner.optim_wrapper).__name__ == "Bf16OptimWrapper"
    assert {parameter.dtype for parameter in runner.model.parameters()} == {torch.float32}
    values = runner.message_hub.get_scalar("train/loss").data[0]
    assert len(values) == 4
    assert bool((values > 0).all())


def test_amp_refuses_an_unknown_wrapper() -> None:
    with pytest.raises(ValueError, match="OtherWrapper"):
        merge_train_options(tiny_config(**{"optim_wrapper.type": "OtherWrapper"}), amp=True)


def test_auto_scale_lr(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base_batch_size"):
        train(tiny_config(), work_dir=tmp_path, auto_scale_lr=True, device="cpu")
    config = tiny_config(auto_scale_lr=dict(base_batch_size=16), param_scheduler=None, **{"train_cfg.max_epochs": 1})
    runner = train(config, work_dir=tmp_path, auto_scale_lr=True, device="cpu")
    assert runner.optim_wrapper.get_lr()["lr"] == [pytest.approx(0.1 * 4 / 16)]


def test_an_unwritable_work_dir_fails_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = tiny_config(**{"model.type": "NoSuchModel"})
    with pytest.raises(ValueError, match="--work-dir") as caught:
        train(config, work_dir=tmp_path / "file" / "run", device="cpu")
    assert str(tmp_path / "file" / "run") in str(caught.value)


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.pth"):
        train(tiny_config(), work_dir=tmp_path, resume=tmp_path / "no.pth", device="cpu")


def test_a_misspelt_type_says_where_and_what_is_near(tmp_path: Path) -> None:
    config = tiny_config(**{"model.type": "TinyNett"})
    with pytest.raises(ValueError, match=r"'TinyNett' \(at model\.type\).*TinyNet"):
        train(config, work_dir=tmp_path, device="cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:99"])
def test_wrong_devices(device: str) -> None:
    with pytest.raises(ValueError, match="--device"):
        resolve_device(device)


def test_each_epoch_of_fresh_workers_sees_other_augmentation(tmp_path: Path) -> None:
    """With MMEngine's own worker function it sees the same one: the reason for ours."""

    def epochs(**changes: object) -> tuple[torch.Tensor, torch.Tensor]:
        TinyCollect.batches.clear()
        base = {"train_cfg.max_epochs": 2, "custom_hooks": [dict(type="TinyCollect")]}
        config = tiny_config(num_workers=2, **base, **{"train_dataloader.sampler.shuffle": False}, **changes)
        train(config, work_dir=tmp_path, device="cpu")
        return torch.cat(TinyCollect.batches[:4]), torch.cat(TinyCollect.batches[4:])

    first, second = epochs()
    assert not torch.equal(first, second)
    stock = dict(type="stock_worker_init_fn", num_workers=2, rank=0, seed=0)
    first, second = epochs(**{"train_dataloader.worker_init_fn": stock})
    assert torch.equal(first, second)


def test_import_alimm_is_cheap_after_torch_and_mmengine() -> None:
    code = (
        "import torch, mmengine, mmengine.registry, time; t = time.perf_counter(); import alimm, alimm.registry\n"
        "print(time.perf_counter() - t)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    ]
    assert min(times) <= 0.3


@pytest.mark.parametrize("content", [b"", b"<html>not here</html>", b"PK\x03\x04 cut off", b"\x80\x02 cut off"])
def test_resuming_from_a_damaged_file_names_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot resume from .*bad\.pth"):
        train(tiny_config(tmp_path / "run"), resume=tmp_path / "bad.pth")
    assert not list(tmp_path.glob("run/*/*.log")), "it was refused before the runner was built"


def test_resuming_from_bare_weights_is_refused(tmp_path: Path) -> None:
    torch.save(dict(state_dict={}, meta={}), tmp_path / "published.pth")
    with pytest.raises(ValueError, match=r"no training state.*load_from="):
        train(tiny_config(tmp_path / "run"), resume=tmp_path / "published.pth")


@pytest.mark.parametrize("part", ["model", "train_dataloader", "train_cfg", "optim_wrapper"])
def test_a_config_without_a_part_is_refused_by_its_name(tmp_path: Path, part: str) -> None:
    config = tiny_config(tmp_path)
    config.pop(part)
    with pytest.raises(ValueError, match=f"has no {part}: `alimm train` needs it"):
        train(config)


def test_amp_without_an_optim_wrapper() -> None:
    with pytest.raises(ValueError, match="--amp changes the optim_wrapper"):
        merge_train_options(Config(dict(work_dir="w")), amp=True)


@pytest.mark.parametrize(
    ("device", "wrapper"), [("cpu", "alimm.ShardedBf16OptimWrapper"), ("cuda", "alimm.ShardedAmpOptimWrapper")]
)
def test_amp_of_a_sharded_wrapper_stays_sharded(device: str, wrapper: str) -> None:
    config = tiny_config(**{"optim_wrapper.type": "alimm.ShardedOptimWrapper"})
    assert merge_train_options(config, work_dir="w", amp=True, device=device).optim_wrapper.type == wrapper
    assert ("loss_scale" in config.optim_wrapper) == (device == "cuda")
