"""Registries: scopes, plugins found by their entry points, near matches."""

import subprocess
import sys

import pytest
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry as MmengineRegistry

from alimm import registry
from alimm.registry import DATASETS, HOOKS, INDEXES, MODELS, near_matches

REGISTRIES = [value for value in vars(registry).values() if isinstance(value, registry.Registry)]


def test_parts_are_reached_from_mmengine_by_scope():
    assert MMENGINE_MODELS.get("alimm.LinearHead") is MODELS.get("LinearHead")
    assert MODELS.get("mmengine.BaseModel") is None
    assert MODELS.get("SGD") is None
    assert INDEXES.build(dict(type="ExactIndex", dim=4)).dim == 4


def test_every_registry_imports_its_locations():
    for one in REGISTRIES:
        one.import_from_location()


def test_a_plugin_is_found_by_name_alone_in_a_new_process():
    code = (
        "from mmengine.registry import HOOKS; import sys;"
        "assert 'alimm.projects.example_project' not in sys.modules;"
        "print(HOOKS.get('alimm.ClassCoverageHook').__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "alimm.projects.example_project.class_coverage_hook"


def test_a_broken_plugin_is_named(monkeypatch):
    class Broken:
        name, value = "broken", "nowhere.at_all"

        def load(self):
            raise ModuleNotFoundError("No module named 'nowhere'")

    monkeypatch.setattr(registry, "entry_points", lambda group: [Broken()])
    monkeypatch.setattr(registry, "_loaded_plugins", set())
    for _ in range(2):
        with pytest.raises(ImportError, match=r"plugin 'broken' \(nowhere.at_all\) .* No module named 'nowhere'"):
            HOOKS.get("alimm.NoSuchHook")


@pytest.mark.parametrize(
    ("name", "kind", "best"),
    [
        ("alimm.LinarHead", "model", "alimm.LinearHead"),
        ("EpochSeedHok", "hook", "alimm.EpochSeedHook"),
        ("CheckpointHok", "hook", "CheckpointHook"),
        ("alimm.EmojiProduct", "dataset", "alimm.EmojiProducts"),
    ],
)
def test_near_matches_are_written_as_a_config_writes_them(name, kind, best):
    assert near_matches(name, kind)[0] == best


def test_a_broken_registry_of_others_does_not_hide_the_hint():
    child = MmengineRegistry("hook", parent=MMENGINE_HOOKS, scope="broken_scope", locations=["nowhere.at_all"])
    try:
        with pytest.raises(ImportError):
            child.import_from_location()
        assert near_matches("alimm.EpochSeedHok", "hook")[0] == "alimm.EpochSeedHook"
    finally:
        del MMENGINE_HOOKS.children["broken_scope"]


def test_nothing_near_gives_nothing():
    assert near_matches("qqqqqqqqq") == []
    assert near_matches("LinearHead", "hook") == []
    assert len(near_matches("Hook", "hook", count=3)) <= 3


def test_mmengines_own_lookup_is_unharmed():
    assert MMENGINE_HOOKS.get("NoSuchHook") is None
    assert DATASETS.get("mmdet.NoSuchDataset") is None
