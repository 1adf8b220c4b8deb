from __future__ import annotations

import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS

from alimm.apis.errors import explain_build_errors, places_of


def test_a_misspelt_type_lists_near_names_and_its_place() -> None:
    config = Config(dict(custom_hooks=[dict(type="NaNHook"), dict(type="EMAHok")]))
    with pytest.raises(ValueError, match=r"custom_hooks\.1\.type") as caught, explain_build_errors(config):
        HOOKS.build(config.custom_hooks[1])
    assert "EMAHook" in str(caught.value)
    assert "'EMAHok'" in str(caught.value)


def test_near_names_come_from_the_same_registry() -> None:
    with pytest.raises(ValueError, match="there is no model 'EMAHok'") as caught, explain_build_errors():
        MODELS.build(dict(type="EMAHok"))
    assert "EMAHook" not in str(caught.value)


@pytest.mark.parametrize("config", [dict(type="mmpose.TopDown"), dict(type="TopDown", default_scope="mmpose")])
def test_a_package_that_is_not_installed_is_named(config: dict[str, str]) -> None:
    with pytest.raises(ImportError, match="mmpose, which is not installed"), explain_build_errors(Config(config)):
        MODELS.build(dict(type=config["type"]))


def test_other_errors_go_through() -> None:
    with pytest.raises(KeyError, match="other"), explain_build_errors():
        raise KeyError("other")
    with pytest.raises(ModuleNotFoundError, match="xyz"), explain_build_errors():
        raise ModuleNotFoundError("No module named 'xyz'", name="xyz")


def test_missing_operators_point_to_doctor() -> None:
    with pytest.raises(ImportError, match="alimm doctor"), explain_build_errors():
        raise ModuleNotFoundError("No module named 'mmcv._ext'", name="mmcv._ext")


def test_places_of() -> None:
    nest = dict(type="A", b=[dict(type="B"), dict(c=dict(type="A"))], d=(dict(type="A"),))
    assert places_of("A", nest) == ["type", "b.1.c.type", "d.0.type"]


def test_a_misspelt_scope_lists_near_names_and_no_command() -> None:
    config = Config(dict(model=dict(type="alim.ResNetTiny")))
    with pytest.raises(ImportError, match=r"model\.type\) needs the package alim,") as caught:  # noqa: SIM117
        with explain_build_errors(config):
            MODELS.build(config.model)
    assert "alimm.ResNetTiny" in str(caught.value)
    assert "pip install" not in str(caught.value)


def test_an_argument_that_a_part_does_not_take_is_told_with_its_place() -> None:
    config = Config(dict(custom_hooks=[dict(type="EMAHook"), dict(type="mmengine.SyncBuffersHook", strict_lod=1)]))
    with pytest.raises(ValueError, match=r"no argument 'strict_lod' \(at custom_hooks\.1\.strict_lod\)"):  # noqa: SIM117
        with explain_build_errors(config):
            HOOKS.build(config.custom_hooks[1])
    with pytest.raises(TypeError, match="other"), explain_build_errors(config):
        raise TypeError("f() got an unexpected keyword argument 'other'")
