"""Registries: scopes, plugins found by their entry points, near matches."""

import subprocess
import sys

import pytest
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import DefaultScope
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


def lazy_registry(tmp_path, monkeypatch, name):
    module = f"lazy_part_{name.lower()}"
    (tmp_path / f"{module}.py").write_text(
        f"from alimm.registry import HOOKS\n@HOOKS.register_module()\nclass {name}:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return module


def test_a_lazy_part_is_imported_when_it_is_asked_for(tmp_path, monkeypatch):
    module = lazy_registry(tmp_path, monkeypatch, "LateHook")
    HOOKS.register_lazy("LateHook", module, needs="numpy")
    assert HOOKS.get("ClassCountsHook") is not None
    assert not isinstance(object(), HOOKS.module_dict["LateHook"]), "is_model_wrapper asks this of every part"
    assert module not in sys.modules
    assert MMENGINE_HOOKS.get("alimm.LateHook").__module__ == module
    assert HOOKS.build(dict(type="alimm.LateHook")) is not None
    HOOKS.register_lazy("LateHook", "no.such.module", needs="numpy")
    assert HOOKS.get("LateHook").__module__ == module, "what is imported already stays"


def test_a_lazy_part_whose_package_is_missing_names_the_extra(tmp_path, monkeypatch):
    module = lazy_registry(tmp_path, monkeypatch, "LaterHook")
    HOOKS.register_lazy("LaterHook", module, needs="mmseg")
    monkeypatch.setitem(sys.modules, "mmseg", None)
    with pytest.raises(ImportError, match=r"alimm.LaterHook needs mmseg.*pip install 'alimm\[seg\]'"):
        HOOKS.get("LaterHook")


def test_a_second_part_of_one_name_is_still_refused(tmp_path, monkeypatch):
    module = lazy_registry(tmp_path, monkeypatch, "LatestHook")
    HOOKS.register_lazy("LatestHook", module, needs="numpy")
    assert HOOKS.get("LatestHook") is not None
    with pytest.raises(KeyError, match="already registered"):
        HOOKS.register_module(name="LatestHook", module=dict)


def test_a_heavy_plugin_is_not_imported_with_the_others():
    code = (
        "import sys; from alimm.registry import HOOKS, load_plugins; load_plugins();"
        "assert 'alimm.projects.dcaa' in sys.modules and 'mmseg' not in sys.modules;"
        "from mmengine.registry import MODELS; print(MODELS.get('alimm.ConditionDecoder').__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "alimm.projects.dcaa.decoder"


def test_the_dump_of_a_class_is_found_from_another_scope():
    from alimm.heads import LinearHead

    assert MODELS.get("alimm.heads.linear.LinearHead") is LinearHead
    assert MMENGINE_MODELS.get("alimm.heads.linear.LinearHead") is LinearHead
    with DefaultScope.overwrite_default_scope("mmengine"):
        assert MMENGINE_MODELS.get("alimm.heads.linear.LinearHead") is LinearHead
