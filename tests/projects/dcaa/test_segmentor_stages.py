"""The stages of DCAA, what each switch takes away, and the models it is built from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.hub import get_config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner.checkpoint import load_checkpoint

pytest.importorskip("mmseg")

from alimm.projects.dcaa import base
from alimm.projects.dcaa.segmentor import DCAASegmentor
from alimm.registry import MODELS
from tests.projects.dcaa.tiny import batch, dcaa, moved, read, teaching, weights
from tests.projects.dcaa.tiny_segmentor import SIZE, alternating, assert_equal_weights, build, head, sgd

SOURCE = {"loss", "source.loss_ce", "source.acc_seg"}
CONDITIONS = {"target.loss_adv_cond", "source.loss_d_cond", "target.loss_d_cond"}
GLOBAL = {"source.loss_d_global", "target.loss_d_global", "source.acc_d_global", "target.acc_d_global"}
FUSED = {"target.loss_adv_global"}
EASY = {"target.loss_easy", "target.easy"}


@pytest.mark.parametrize("global_on", [True, False])
@pytest.mark.parametrize("conditions_on", [True, False])
def test_each_switch_takes_its_term_away(conditions_on: bool, global_on: bool) -> None:
    model = teaching(2, align=dict(condition_adversarial=conditions_on, global_adversarial=global_on))
    wrapper = alternating(model)
    alignment = (CONDITIONS if conditions_on else set()) | (GLOBAL | FUSED if global_on else set())
    for stage, expected in (
        ("source", SOURCE), ("align", SOURCE | alignment), ("self_train", SOURCE | alignment | EASY)
    ):  # fmt: skip
        model.enter_stage(stage)
        judges = [weights(judge) for judge in model.discriminators]
        assert set(model.train_step(batch(), wrapper)) == expected
        learnt = [moved(judge, before) for judge, before in zip(model.discriminators, judges, strict=True)]
        if stage == "source":
            assert learnt == [False, False, False]
        else:
            assert learnt == [conditions_on, conditions_on, global_on]


def test_progressive_alignment() -> None:
    model = teaching(2, align=dict(global_after=2, condition_adversarial=False))
    model.enter_stage("align")
    wrapper = alternating(model)
    found = [set(model.train_step(batch(), wrapper)) for _ in range(3)]
    assert found == [SOURCE | GLOBAL, SOURCE | GLOBAL, SOURCE | GLOBAL | FUSED]
    model.enter_stage("self_train")
    assert int(model.stage_steps) == 0
    assert set(model.train_step(batch(), wrapper)) == SOURCE | GLOBAL | FUSED | EASY


def test_attention_can_be_left_out() -> None:
    model = dcaa(2, decode_head=dict(type="alimm.AttentiveFusionHead", branch=head(), attention=False))
    before = weights(model.decode_head.attend)
    model.train_step(batch(), sgd(model))
    assert not moved(model.decode_head.attend, before)
    inputs = read(model, batch()).target.inputs
    assert (model.explain_tensors(inputs)["mask"] == 0.5).all()


def test_stage_is_saved_and_self_training_needs_its_options() -> None:
    model = dcaa(2, self_training=dict())
    assert model.stage == "align"
    model.enter_stage("self_train")
    other = dcaa(2, self_training=dict())
    other.load_state_dict(model.state_dict())
    assert other.stage == "self_train"
    plain = dcaa(2)
    message = r"no stage self_train without self_training=dict\(...\)"
    with pytest.raises(ValueError, match=message):
        plain.enter_stage("self_train")
    assert plain.stage == "align"
    with pytest.raises(ValueError, match="has the stages source, align, self_train, got 'selftrain'"):
        model.enter_stage("selftrain")
    plain.load_state_dict(model.state_dict(), strict=False)
    with pytest.raises(ValueError, match=message):
        plain.train_step(batch(), sgd(plain))


@pytest.mark.parametrize("way", ["enter", "build"])
def test_self_training_begins_with_what_is_there(way: str) -> None:
    options: dict[str, Any] = dict(stage="self_train") if way == "build" else {}
    model = dcaa(2, self_training=dict(threshold=0.4), **options)
    trained = dcaa(2, seed=1)
    weights_of_a_run = {k: v for k, v in trained.state_dict().items() if not k.startswith("stage")}
    model.load_state_dict(weights_of_a_run, strict=False)
    if way == "enter":
        model.enter_stage("self_train")
    model.train_step(batch(), alternating(model))
    parts = model.teacher.parts
    assert set(parts) == {"backbone", "decode_head", "discriminator"}
    assert_equal_weights(parts["backbone"], trained.backbone, rtol=0, atol=0)
    assert_equal_weights(parts["decode_head"], trained.decode_head, rtol=0, atol=0)
    assert_equal_weights(parts["discriminator"], trained.discriminators[-1], rtol=0, atol=0)
    model.train_step(batch(), alternating(model))
    assert_equal_weights(parts["decode_head"], trained.decode_head, rtol=0, atol=0)  # frozen


def test_teacher_follows_and_is_never_optimised() -> None:
    model = teaching(2, momentum=0.25)
    wrapper = alternating(model)
    optimised = {id(p) for key in ("seg", "disc") for g in wrapper[key].optimizer.param_groups for p in g["params"]}
    assert optimised == {id(p) for name, p in model.named_parameters() if not name.startswith("teacher")}
    expected = model.decode_head.conv_seg.weight.detach().clone()
    for t in range(1, 5):
        model.train_step(batch(seed=t), wrapper)
        m = max(0.25, 1 / (t + 1))
        expected = (1 - m) * expected + m * model.decode_head.conv_seg.weight.detach()
    torch.testing.assert_close(model.teacher.parts["decode_head"].conv_seg.weight, expected)
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert not any(part.training for part in model.teacher.modules())


@pytest.mark.parametrize("mean", [True, False])
def test_strong_student_sees_other_pictures_than_the_teacher(monkeypatch: pytest.MonkeyPatch, mean: bool) -> None:
    extra: dict[str, Any] = {} if mean else dict(data_preprocessor=dict(type="mmseg.SegDataPreProcessor", size=SIZE))
    model = teaching(2, align=extra, student="strong")
    raw: list[torch.Tensor] = []

    def augment(inputs: torch.Tensor) -> torch.Tensor:
        raw.append(inputs)
        return torch.full_like(inputs, 155.0)

    monkeypatch.setattr(base, "strong_augment_batch", augment)
    seen: dict[str, list[torch.Tensor]] = dict(student=[], teacher=[])
    model.backbone.register_forward_pre_hook(lambda _, args: seen["student"].append(args[0]))
    model.teacher.parts["backbone"].register_forward_pre_hook(lambda _, args: seen["teacher"].append(args[0]))
    data = batch()
    given = torch.stack(data["target"]["inputs"]).float()
    target = read(model, data).target.inputs
    model.train_step(data, alternating(model))
    torch.testing.assert_close(raw[0], given.flip(1) if mean else given)
    torch.testing.assert_close(seen["teacher"], [target])
    colours = [55 / 50, 45 / 55, 35 / 60] if mean else [155.0] * 3
    for channel, value in enumerate(colours):
        assert seen["student"][1][:, channel].flatten()[0].item() == pytest.approx(value, rel=1e-5)


def steps(model: Any, wrapper: Any, numbers: range) -> None:
    for i in numbers:
        if i == 1:
            model.enter_stage("self_train")
        torch.manual_seed(i)
        model.train_step(batch(seed=i), wrapper)


def test_resumes_exactly() -> None:
    options: dict[str, Any] = dict(
        self_training=dict(threshold=0.35, momentum=0.2, student="strong"),
        decode_head=dict(type="alimm.AttentiveFusionHead", branch=head()),  # with dropout
    )
    whole = dcaa(2, **options)
    first, second = copy.deepcopy(whole), dcaa(2, seed=1, **options)
    steps(whole, alternating(whole), range(4))
    wrapper = alternating(first)
    steps(first, wrapper, range(2))
    again = alternating(second)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    again.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    steps(second, again, range(2, 4))
    assert (int(second.teacher.steps), int(second.stage_steps)) == (3, 3)
    assert_equal_weights(second, whole, rtol=0, atol=0)


def test_prediction_needs_no_condition() -> None:
    model = dcaa(2).eval()
    data = batch()["target"]
    for sample in data["data_samples"]:
        del sample.cond_id, sample.condition, sample.domain
    inputs = model.data_preprocessor(copy.deepcopy(data), False)["inputs"]
    with torch.no_grad():
        att = model.decode_head.forward_all(model.extract_feat(inputs)).att
        expected = F.interpolate(att, SIZE, mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(inputs), att)
    for result, logits in zip(model.test_step(data), expected, strict=True):
        torch.testing.assert_close(result.seg_logits.data, logits)
        assert torch.equal(result.pred_sem_seg.data[0], logits.argmax(0))


def test_learns_in_half_precision() -> None:
    model = teaching(2)
    config = dict(
        type="alimm.Bf16OptimWrapper",
        constructor="alimm.AlternatingOptimWrapperConstructor",
        optimizer=dict(type="SGD", lr=0.05),
        discriminator=dict(type="Adam", lr=1e-3),
        clip_grad=dict(max_norm=10.0),
    )
    wrapper = build_optim_wrapper(model, config)
    for stage in ("align", "self_train"):
        model.enter_stage(stage)
        kinds: list[torch.dtype] = []
        hook = model.decode_head.branches[0].register_forward_hook(
            lambda *args, kinds=kinds: kinds.append(args[2].dtype)
        )
        before = weights(model)
        logs = model.train_step(batch(), wrapper)
        hook.remove()
        assert set(kinds) == {torch.bfloat16}
        assert all(torch.isfinite(value) for value in logs.values())
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
        assert moved(model.backbone, {k.removeprefix("backbone."): v for k, v in before.items()})


STOCK_ASPP = dict(
    type="mmseg.DepthwiseSeparableASPPHead", in_channels=64, in_index=3, channels=12, dilations=(1, 2),
    c1_in_channels=8, c1_channels=4, num_classes=3, align_corners=False, norm_cfg=dict(type="BN"),
)  # fmt: skip


@pytest.mark.parametrize("decode_head", [head(), STOCK_ASPP], ids=["ConditionDecoder", "DepthwiseSeparableASPPHead"])
@pytest.mark.parametrize("how", ["torch", "mmengine"])
def test_weights_of_a_plain_segmentor_fill_every_decoder(decode_head: Any, how: str, tmp_path: Any) -> None:
    from mmseg.models import EncoderDecoder

    plain = build("SourceSegmentor", decode_head=decode_head)
    stock = EncoderDecoder(
        backbone=dict(type="mmseg.ResNetV1c", depth=18, base_channels=8, stem_channels=8, strides=(1, 2, 1, 1),
                      dilations=(1, 1, 2, 4), norm_cfg=dict(type="BN")),
        decode_head=decode_head,
    ).eval()  # fmt: skip
    stock.load_state_dict(plain.state_dict(), strict=False)
    model = dcaa(3, seed=1, decode_head=decode_head).eval()
    state = stock.state_dict()
    names = set(state)
    if how == "torch":
        result = model.load_state_dict(state, strict=False)
        assert result.unexpected_keys == []
        groups = {".".join(name.split(".")[:2]) for name in result.missing_keys}
        fused = {"decode_head.attend", "decode_head.fuse", "decode_head.conv_seg"}
        assert groups == {"stage_index", "stage_steps"} | fused | {f"discriminators.{k}" for k in range(4)}
    else:
        torch.save(dict(state_dict=state), tmp_path / "plain.pth")
        load_checkpoint(model, str(tmp_path / "plain.pth"), map_location="cpu")
    assert set(state) == names
    inputs = read(model, batch()).target.inputs
    with torch.no_grad():
        expected = stock.decode_head(stock.extract_feat(inputs))
        outputs = model.decode_head.forward_all(model.extract_feat(inputs))
    for logits in outputs.cond:
        torch.testing.assert_close(logits, expected)
    again = dcaa(3, seed=2, decode_head=decode_head)
    assert again.load_state_dict(model.state_dict()).missing_keys == []
    assert_equal_weights(again, model, rtol=0, atol=0)


def test_init_weights_reaches_the_discriminators() -> None:
    model = dcaa(2, discriminator=dict(channels=(4, 8), init_cfg=dict(type="Constant", val=0.5, layer="Conv2d")))
    model.init_weights()
    for judge in model.discriminators:
        assert (judge.layers[0].weight == 0.5).all()


def test_a_stock_config_with_another_type() -> None:
    config = get_config("mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py").model
    config.update(type="alimm.DCAASegmentor", conditions=3, pretrained=None)
    config.data_preprocessor.size = (64, 64)
    config.decode_head.channels = config.auxiliary_head.channels = 16  # for the time of this test
    with DefaultScope.overwrite_default_scope("mmseg"):
        model: Any = MODELS.build(config)
    assert type(model) is DCAASegmentor
    judges: Any = model.discriminators
    assert [judge.in_channels for judge in judges] == [19] * 4
    model = revert_sync_batchnorm(model).train()
    data = batch((0, 2), (1, 1))
    logs = model.train_step(data, sgd(model))
    assert {"aux.loss_ce", "source.loss_ce", "target.loss_adv_global"} <= logs.keys()
    assert all(torch.isfinite(value) for value in logs.values())


def test_transformers_too() -> None:
    model = dcaa(
        2,
        backbone=dict(type="mmseg.MixVisionTransformer", embed_dims=8, num_layers=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
        decode_head=dict(type="mmseg.SegformerHead", in_channels=(8, 16, 32, 64), in_index=(0, 1, 2, 3), channels=8,
                         num_classes=3, align_corners=False, norm_cfg=dict(type="BN")),
    )  # fmt: skip
    before = weights(model.backbone)
    logs = model.train_step(batch(), alternating(model))
    assert logs.keys() == SOURCE | CONDITIONS | GLOBAL | FUSED
    assert moved(model.backbone, before)
