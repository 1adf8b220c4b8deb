"""Every config loads, its types resolve, its model builds, its dump reads back to the same, and it names a result."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

from alimm import compat
from alimm.apis.config import load_config
from alimm.apis.errors import explain_build_errors
from alimm.paths import resource_root
from alimm.registry import MODELS, load_plugins

CONFIGS = sorted(
    path.relative_to(resource_root() / "configs").as_posix()
    for path in (resource_root() / "configs").rglob("*.py")
    if "_base_" not in path.parts and path.name != "__init__.py"
)


def types_in(node):
    if isinstance(node, dict):
        if "type" in node:
            yield node["type"]
        for value in node.values():
            yield from types_in(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from types_in(value)


def test_there_are_configs():
    assert "emoji_products/resnet_tiny_style.py" in CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name, tmp_path):
    compat.apply_to_imports()
    config = load_config(f"alimm::{name}")
    load_plugins()
    for kind in types_in(config.to_dict()):
        assert kind is not None
    dump = tmp_path / Path(name).name
    config.dump(dump)
    again = Config.fromfile(dump)
    assert again.pretty_text == Config.fromfile(dump).pretty_text
    with explain_build_errors(config), DefaultScope.overwrite_default_scope(config.get("default_scope")):
        model = MODELS.build(config.model)
        assert sum(parameter.numel() for parameter in model.parameters()) > 0
        assert type(MODELS.build(again.model)) is type(model)
    assert config.expected, "a config carries the result that is expected of it, by metric"
    assert all(isinstance(bound, float) for bound in config.expected.values())
