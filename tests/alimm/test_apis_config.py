from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.config import Config

from alimm.apis.config import find_config, load_config, merge_options, parse_options


def test_a_path_with_and_without_suffix(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text("a = dict(b=[1, 2])\n")
    assert load_config(tmp_path / "run.py").a.b == [1, 2]
    assert find_config(str(tmp_path / "run")) == tmp_path / "run.py"


def test_options_win_and_reach_into_lists(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text("a = dict(b=[dict(c=1), dict(c=2)], d=3)\n")
    config = load_config(tmp_path / "run.py", {"a.b.1.c": 5, "a.e.f": "new"})
    assert config.a == dict(b=[dict(c=1), dict(c=5)], d=3, e=dict(f="new"))


def test_a_config_object_is_copied() -> None:
    config = Config(dict(a=dict(b=1)))
    assert load_config(config, {"a.b": 2}).a.b == 2
    assert config.a.b == 1


def test_new_style_config(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text("from torch.nn import Linear\nmodel = dict(type=Linear, in_features=1)\n")
    (tmp_path / "run.py").write_text(
        "from mmengine.config import read_base\nwith read_base():\n    from .base import *\n"
    )
    assert load_config(tmp_path / "run.py").model.in_features == 1


def test_wrong_options_and_words(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text("a = [1, 2]\n")
    with pytest.raises(ValueError, match=r"a\.7=1"):
        load_config(tmp_path / "run.py", {"a.7": 1})
    assert parse_options(["a.b=1", "c=[x,2]", "d=None", "e=k=v"]) == {"a.b": 1, "c": ["x", 2], "d": None, "e": "k=v"}
    with pytest.raises(ValueError, match="KEY=VALUE"):
        parse_options(["lr"])


def test_a_config_that_is_not_there_lists_near_names(tmp_path: Path) -> None:
    (tmp_path / "resnet18_emoji.py").write_text("")
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "resnet18_emoji.py")):
        load_config(tmp_path / "resnet18_emojis.py")
    with pytest.raises(FileNotFoundError, match="no config with a name like it"):
        load_config(tmp_path / "zzzzzzz.py")


def test_a_config_with_a_mistake_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("a = (\n")
    with pytest.raises(ValueError, match=r"bad\.py"):
        load_config(tmp_path / "bad.py")


@pytest.mark.parametrize(
    "spec",
    [
        "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py",
        "mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py",
        "mmaction::recognition/tsn/tsn_imagenet-pretrained-r50_8xb32-1x1x3-100e_kinetics400-rgb.py",
    ],
)
def test_package_specs(spec: str) -> None:
    pytest.importorskip(spec.partition("::")[0])
    config = load_config(spec)
    assert config.default_scope == spec.partition("::")[0]
    with pytest.raises(FileNotFoundError, match=spec):
        load_config(spec.replace(".py", "_.py"))


def test_alimm_spec_finds_the_own_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs" / "x").mkdir(parents=True)
    (tmp_path / "configs" / "x" / "y.py").write_text("a = 1\n")
    monkeypatch.setattr("alimm.apis.config.resource_root", lambda: tmp_path)
    assert load_config("alimm::x/y").a == 1


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(ImportError, match="pip install no_such_package"):
        load_config("no_such_package::a.py")
    with pytest.raises(ValueError, match="ships no configs"):
        load_config("numpy::a.py")


def test_a_misspelt_package_is_not_offered_for_installation() -> None:
    with pytest.raises(ValueError, match=r"mmdt, which is not installed\. Did you mean mmdet\?"):
        find_config("mmdt::x.py")


@pytest.mark.parametrize("spec", ["", "."])
def test_a_spec_without_a_name(spec: str) -> None:
    with pytest.raises(FileNotFoundError, match="names no config file"):
        find_config(spec)


def test_an_option_that_looks_like_a_slip_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("alimm.apis.config.print_log", lambda text, **kwargs: said.append(text))
    config = Config(dict(model=dict(type="A"), seed=1))
    merge_options(config, {"model.depth": 3, "default_hooks.checkpoint.interval": 2})
    assert not said
    merge_options(config, {"models.depth": 3})
    assert len(said) == 1
    assert "Did you mean 'model'" in said[0]
    assert config.models.depth == 3
