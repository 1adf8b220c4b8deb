"""What a training step accepts, and what it says of batches and settings that it cannot use."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.structures import PixelData

pytest.importorskip("mmseg")

from alimm.projects.dcaa.base import AdaptationSegmentor
from alimm.projects.dcaa.segmentor import DCAASegmentor
from tests.projects.dcaa.tiny import batch, dcaa, read, teaching, weights
from tests.projects.dcaa.tiny_segmentor import alternating, build, head, sgd

Change = Callable[[dict[str, Any]], Any]


def sample(data: dict[str, Any], domain: str, i: int = 1) -> Any:
    return data[domain]["data_samples"][i]


def put(domain: str, **metainfo: Any) -> Change:
    return lambda data: sample(data, domain).set_metainfo(metainfo)


def put_first(data: dict[str, Any], **metainfo: Any) -> None:
    sample(data, "source", 0).set_metainfo(metainfo)


def without_condition(data: dict[str, Any]) -> None:
    del sample(data, "target").cond_id


def swapped(data: dict[str, Any]) -> None:
    data["source"], data["target"] = data["target"], data["source"]


def labelled_target(data: dict[str, Any]) -> None:
    sample(data, "target").gt_sem_seg = sample(data, "source").gt_sem_seg


def unlabelled_source(data: dict[str, Any]) -> None:
    del sample(data, "source").gt_sem_seg


def labels(value: Any) -> Change:
    def change(data: dict[str, Any]) -> None:
        sample(data, "source").gt_sem_seg = PixelData(data=value)

    return change


def one_label(value: int) -> Change:
    def change(data: dict[str, Any]) -> None:
        sample(data, "source").gt_sem_seg.data[0, 3, 5] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, "0.png of the source loader belongs to the domain 'target': are the loaders swapped?"),
        (without_condition, "1.png comes without its condition: end the target pipeline with dict(type="
         "'alimm.PackConditionInputs'), and use a data set that knows conditions"),
        (put("target", cond_id=2, condition="snow"), "1.png has condition 'snow' with number 2, and the model has 2: "
         "fog, night. Give model.conditions those of the data set"),
        (put("source", cond_id=-1, condition="none"), "1.png has condition 'none' with number -1, and the model has 2"),
        (put("target", cond_id=0), "1.png has condition 'night' as number 0, which the model calls 'fog': give model "
         "and data sets the conditions in one order"),
        (put("source", cond_id=0), "1.png has condition 'night' as number 0, which the model calls 'fog': give model "
         "and data sets the conditions in one order"),
        (labelled_target, "1.png of the target comes with labels, which training must not see: set with_labels=False"),
        (unlabelled_source, "1.png of the source has no labels: add dict(type='LoadAnnotations') to its pipeline"),
        (labels(torch.zeros(1, 32, 60, dtype=torch.long)),
         "the labels of 1.png are (32, 60) and the picture is (32, 64): resize both alike"),
        (one_label(3), "the labels of 1.png have the value 3; classes are 0 .. 2, and 255 is left out: set "
         "num_classes, reduce_zero_label or the data set's map of labels"),
        (one_label(-1), "the labels of 1.png have the value -1"),
    ],
)  # fmt: skip
def test_pictures_that_cannot_be_used(change: Change, message: str) -> None:
    model = dcaa(2)
    before = weights(model)
    data = batch()
    change(data)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.train_step(data, sgd(model))
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (batch()["source"], "inputs, data_samples"),
        (dict(source=batch()["source"]), "source"),
        ([batch()["source"], batch()["target"]], "list"),
    ],
)
def test_batches_that_are_not_of_two_domains(data: Any, found: str) -> None:
    model = dcaa(2)
    with pytest.raises(ValueError, match=rf"dict\(source=..., target=...\), got {found}\. Write train_dataloader ="):
        model.train_step(data, sgd(model))


def test_names_are_compared_where_the_model_has_names() -> None:
    data = batch()
    put("target", condition="dusk")(data)
    model = build("DCAASegmentor", conditions=2)
    assert model.conditions == ("condition0", "condition1")
    assert read(model, data).target.cond_ids.tolist() == [0, 1]
    put("source", condition="dusk")(data)
    assert read(model, data).source.cond_ids.tolist() == [0, 1]


def test_names_of_the_source_where_pictures_train_a_part_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batch()
    put("source", condition="gta")(data)
    monkeypatch.setattr(DCAASegmentor, "routes_by_condition", False)
    assert read(dcaa(2), data).source.cond_ids.tolist() == [0, 1]
    monkeypatch.setattr(DCAASegmentor, "routes_by_condition", True)
    message = (
        "1.png of the source has condition 'gta', and the model knows fog, night. DCAASegmentor needs each source "
        "picture in the style of a condition: wrap it in alimm.StyledDataset or give GTA5ConditionDataset styles"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        read(dcaa(2), data)
    assert read(build("DCAASegmentor", conditions=2), data).source.cond_ids.tolist() == [0, 1]
    one = batch((0,), (0,))
    put_first(one, condition="gta")
    assert read(dcaa(1), one).source.cond_ids.tolist() == [0]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ((), r"DCAASegmentor needs at least one condition, got \(\)"),
        (0, "DCAASegmentor needs at least one condition, got 0"),
        (("fog", "fog"), "DCAASegmentor got a condition twice: fog, fog"),
        ("fog", "DCAASegmentor takes a list of conditions or their number, got the text 'fog'"),
    ],
)
def test_conditions_that_are_none(conditions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("DCAASegmentor", conditions=conditions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(decode_head=dict(type="alimm.AttentiveFusionHead", num_conditions=3, branch=head())),
         "DCAASegmentor has 2 conditions, and its head is for 3: set decode_head.num_conditions"),
        (dict(decode_head=[head(), head()]), r"takes one decode_head=dict\(...\), not a cascade"),
        (dict(decode_head=head() | dict(num_classes=2, out_channels=1, threshold=0.3,
              loss_decode=dict(type="mmseg.CrossEntropyLoss", use_sigmoid=True))), "softmax over 2 classes"),
        (dict(adversarial_weight=-0.1), "adversarial_weight is at least 0, got -0.1"),
        (dict(class_weight=(1.0, 2.0)), "class_weight has 2 weights for 3 classes"),
        (dict(stage="warm_up"), "DCAASegmentor has the stages source, align, self_train, got 'warm_up'"),
        (dict(stage="self_train"), r"no stage self_train without self_training=dict\(...\)"),
        (dict(self_training=dict(momentum=0.1, interval=3)), "a momentum or an interval, not both"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dcaa(2, **options)


def test_optimisers_of_other_names() -> None:
    model = dcaa(2)
    other = OptimWrapperDict(generator=sgd(model))
    with pytest.raises(ValueError, match="named generator, and seg and disc are needed: set constructor="):
        model.train_step(batch(), other)


@pytest.mark.parametrize("two", [False, True])
def test_gradients_are_not_accumulated(two: bool) -> None:
    model = dcaa(2)
    wrapper = sgd(model)
    wrapper._accumulative_counts = 3
    with pytest.raises(ValueError, match=r"accumulative_counts is 3, but .*: leave it out of optim_wrapper"):
        model.train_step(batch(), OptimWrapperDict(seg=sgd(model), disc=wrapper) if two else wrapper)


def test_the_stage_of_another_class() -> None:
    model = build("AdversarialSegmentor")
    for number in (2, -1):
        model.stage_index.fill_(number)
        with pytest.raises(ValueError, match=f"the stages source, align, and the weights that were loaded are in stage "
                           f"number {number}"):  # fmt: skip
            _ = model.stage
    model.enter_stage("align")
    assert model.stage == "align"


def test_a_single_stage_is_not_saved() -> None:
    plain = build("SourceSegmentor")
    assert "stage_index" not in plain.state_dict()
    for kind in ("AdversarialSegmentor", "MeanTeacherSegmentor", "DCAASegmentor"):
        model = build(kind, conditions=2)
        stage = model.stage
        assert "stage_index" in model.state_dict()
        model.load_state_dict(plain.state_dict(), strict=False)
        assert model.stage == stage != "source"


@pytest.mark.parametrize("statistics", [True, False])
def test_augmentation_knows_no_autocast(statistics: bool) -> None:
    model = dcaa(2)
    if not statistics:
        model.data_preprocessor = torch.nn.Identity()
    inputs = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    made = []
    for autocast in (False, True):
        torch.manual_seed(0)  # with it the pictures are blurred
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            given = inputs.bfloat16() if autocast else inputs.bfloat16().float()
            made.append(model.augmented(given))
    assert made[1].dtype == torch.float32
    assert torch.equal(made[0], made[1])


@pytest.mark.parametrize("options", [dict(), dict(class_weight=(1.0, 2.0, 3.0)), dict(release_compat=True)])
def test_pictures_without_a_single_label(options: dict[str, Any]) -> None:
    model = teaching(2, align=options, threshold=0.9)
    for stage in ("align", "self_train"):
        model.enter_stage(stage)
        data = batch()
        for i in range(2):
            sample(data, "source", i).gt_sem_seg.data[:] = 255
        logs = model.train_step(data, alternating(model))
        assert float(logs["source.loss_ce"]) == 0
        assert all(torch.isfinite(value) for value in logs.values())
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_padding_of_smaller_pictures() -> None:
    model = dcaa(2)
    data = batch()
    data["target"]["inputs"][1] = data["target"]["inputs"][1][:, :20, :40]
    ready = read(model, data)
    assert ready.target.inputs.shape == (2, 3, 32, 64)
    assert (ready.target.inputs[1, :, 20:] == 0).all()
    assert float(model.train_step(data, sgd(model))["loss"]) > 0


def test_frozen_batch_norm_stays() -> None:
    model: AdaptationSegmentor = dcaa(2, freeze_bn=True)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    model.train()
    assert model.training
    assert not any(m.training or m.weight.requires_grad for m in norms)
    before = [weights(m) for m in norms]
    wrapper = alternating(model)
    assert isinstance(wrapper["seg"], OptimWrapper)
    model.train_step(batch(), wrapper)
    for norm, old in zip(norms, before, strict=True):
        torch.testing.assert_close(weights(norm), old, rtol=0, atol=0)
    free = dcaa(2)
    free.train_step(batch(), sgd(free))
    assert int(free.decode_head.fuse[0][1].num_batches_tracked) == 2  # each domain by itself
