"""Models from a config, a name or a checkpoint; each mistake with its mend."""

import hashlib
import io
import os

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import DefaultScope

import alimm
from alimm.zoo import index
from tests.alimm.toy_classifier import CONFIG, ToyClassifier


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(CONFIG)
    return path


def test_init_from_path_config_and_options(config):
    model = alimm.init_model(config, cfg_options={"model.scale": 0.25})
    assert isinstance(model, ToyClassifier)
    assert model.scale.item() == 0.25
    assert not model.training
    assert model.dataset_meta == {"classes": ["red", "green", "blue"]}
    again = alimm.init_model(model.cfg)
    assert again.scale.item() == 0.25
    assert alimm.init_model(str(config)).scale.item() == pytest.approx(0.1)


def test_the_data_set_brings_the_classes(config):
    config.write_text(CONFIG.replace("metainfo=dict(classes=['red', 'green', 'blue'])", "extra=1"))
    assert alimm.init_model(config).dataset_meta == {"classes": ["r", "g", "b"]}


def test_building_leaves_the_default_scope_as_it_was(config):
    def current():
        # MMEngine puts a copy back, so the names are what can be compared.
        scope = DefaultScope.get_current_instance()
        return None if scope is None else scope.scope_name

    before = current()
    alimm.init_model(config)
    assert current() == before


def test_the_checkpoint_brings_weights_and_classes(config, tmp_path):
    state = {f"module.{key}": value + 1 for key, value in ToyClassifier().state_dict().items()}
    torch.save({"state_dict": state, "meta": {"dataset_meta": {"classes": ["a", "b", "c"]}}}, tmp_path / "a.pth")
    model = alimm.init_model(config, tmp_path / "a.pth")
    assert model.scale.item() == pytest.approx(1.1)
    assert model.dataset_meta == {"classes": ["a", "b", "c"]}


def test_the_checkpoint_of_a_training_run_needs_no_trust(config, tmp_path):
    hub = {"log_scalars": {"loss": HistoryBuffer([1.0], [1])}}
    torch.save({"state_dict": {"scale": torch.tensor(7.0)}, "message_hub": hub}, tmp_path / "epoch_1.pth")
    assert alimm.init_model(config, tmp_path / "epoch_1.pth").scale.item() == 7


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_other_objects_need_trust(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"scale": torch.tensor(7.0)}, "extra": Bomb()}, "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth"):
        alimm.init_model(config, "bomb.pth")
    assert not os.path.exists("exploded")
    assert alimm.init_model(config, "bomb.pth", trust=True).scale.item() == 7


def test_mistakes_are_named(config, tmp_path):
    with pytest.raises(ValueError, match=r"gone\.pth does not exist.*alimm://NAME"):
        alimm.init_model(config, tmp_path / "gone.pth")
    torch.save({"state_dict": {"other.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit the model: none of its 1 weights"):
        alimm.init_model(config, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"ToyClasifier.*alimm\.ToyClassifier"):
        alimm.init_model(config, cfg_options={"model.type": "ToyClasifier"})
    with pytest.raises(ValueError, match="has no 'model'"):
        alimm.init_model(Config({"a": 1}))
    with pytest.raises(FileNotFoundError, match=r"gone\.py"):
        alimm.init_model(tmp_path / "gone.py")
    with pytest.raises(ValueError, match="cuda:99"):
        alimm.init_model(config, device="cuda:99")


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A resource root with two models, one of them with weights."""
    buffer = io.BytesIO()
    torch.save({"state_dict": {"scale": torch.tensor(3.0)}, "meta": {}}, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    weights = f"toy_a-{digest[:8]}.pth"
    (tmp_path / weights).write_bytes(buffer.getvalue())
    models = [
        {"Name": "toy_a", "Config": "toy_a.py", "Weights": weights, "Weights SHA256": digest},
        {"Name": "toy_b", "Config": "toy_b.py"},
    ]
    for item in models:
        (tmp_path / item["Config"]).write_text(CONFIG)
    (tmp_path / "metafile.yml").write_text(yaml.safe_dump({"Models": models}))
    (tmp_path / "model-index.yml").write_text("Import: [metafile.yml]")
    monkeypatch.setattr(index, "resource_root", lambda: tmp_path)
    monkeypatch.setenv("MMENGINE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ALIMM_OFFLINE", "1")
    monkeypatch.delenv("ALIMM_ZOO_DIR", raising=False)
    return tmp_path / weights


def test_models_of_the_zoo(zoo):
    assert alimm.list_models("toy*") == ["toy_a", "toy_b"]
    assert alimm.list_models(pretrained=True) == ["toy_a"]
    assert alimm.get_model("toy_a").scale.item() == pytest.approx(0.1)
    assert alimm.get_model("toy_a", pretrained=True).scale.item() == 3
    assert alimm.get_model("toy_a", pretrained=zoo).scale.item() == 3
    assert alimm.init_model("toy_b", "alimm://toy_a").scale.item() == 3
    assert alimm.init_model("toy_b").scale.item() == pytest.approx(0.1)
    with pytest.raises(ValueError, match="no checkpoint of toy_b"):
        alimm.get_model("toy_b", pretrained=True)
    for call in (alimm.get_model, alimm.init_model):
        with pytest.raises(ValueError, match=r"no model named 'toy_c'.*toy_a"):
            call("toy_c")
