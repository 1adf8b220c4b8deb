"""The decoder of a condition, and the fusion of several of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("mmseg")

from alimm.projects.dcaa.decoder import ConditionDecoder
from alimm.projects.dcaa.head import AttentiveFusionHead, BranchOutputs
from alimm.registry import MODELS
from tests.projects.dcaa.tiny import WIDTHS, features, fusion
from tests.projects.dcaa.tiny_segmentor import CLASSES, head


def decoder(**options: Any) -> Any:
    torch.manual_seed(0)
    return MODELS.build(head() | options)


def shaken(module: Any) -> Any:
    """The module in evaluation, with statistics and scales of batch norm that are not those of the start."""
    for part in module.modules():
        if type(part) is nn.BatchNorm2d:
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.uniform_(-0.5, 0.5)
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 2)
            nn.init.uniform_(part.bias, -0.5, 0.5)
    return module.eval()


def slow_block(x: Tensor, block: Any, dilation: int = 1) -> Tensor:
    """relu(bn(conv)) with the convolution as a sum over shifts."""
    convolution, norm = block[0], block[1]
    kernel = convolution.weight
    reach = dilation * (kernel.shape[2] // 2)
    padded = F.pad(x, (reach,) * 4)
    out = torch.zeros(len(x), len(kernel), *x.shape[2:])
    for i in range(kernel.shape[2]):
        for j in range(kernel.shape[3]):
            shifted = padded[:, :, i * dilation :, j * dilation :][:, :, : x.shape[2], : x.shape[3]]
            out = out + torch.einsum("nchw,oc->nohw", shifted, kernel[:, :, i, j])
    per_channel = [value[:, None, None] for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    mean, variance, scale, shift = per_channel
    return torch.clamp((out - mean) / torch.sqrt(variance + norm.eps) * scale + shift, min=0)


def test_decoder_is_the_written_formula() -> None:
    net = shaken(decoder(align_corners=True))
    inputs = features(7, 13)
    low, high = inputs[0], inputs[3]
    levels = [slow_block(high, block, dilation) for block, dilation in zip(net.pyramid, [1, 1, 2], strict=True)]
    pooled = torch.einsum("nc,oc->no", high.mean((2, 3)), net.pool[1].weight[:, :, 0, 0]) + net.pool[1].bias
    levels.append(torch.relu(pooled)[:, :, None, None].expand(-1, -1, *high.shape[2:]))
    deep = F.interpolate(slow_block(torch.cat(levels, 1), net.reduce), (7, 13), mode="bilinear", align_corners=True)
    joined = torch.cat([slow_block(low, net.shallow), deep], 1)
    f = slow_block(slow_block(joined, net.refine[0]), net.refine[1])
    expected = torch.einsum("nchw,oc->nohw", f, net.conv_seg.weight[:, :, 0, 0]) + net.conv_seg.bias[:, None, None]
    torch.testing.assert_close(net(inputs), expected, rtol=1e-4, atol=1e-5)


def test_dropout_of_the_paper() -> None:
    def shares(module: nn.Module) -> list[float]:
        return [part.p for part in module.modules() if isinstance(part, nn.Dropout)]

    made = MODELS.build(dict(type="alimm.ConditionDecoder", in_channels=(4, 8), channels=4, num_classes=3))
    assert isinstance(made, ConditionDecoder)
    assert shares(made) == [0.5, 0.5, 0.1]
    fused = fusion(2, head("mmseg.FCNHead"), dropouts=(0.5, 0.4, 0.1))
    assert shares(fused.attend) == [0.5]
    assert shares(fused.fuse) == [0.4, 0.1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(in_channels=(64,)), "two features, shallow then deep"),
        (dict(in_index=(0, 1, 2)), "two features, shallow then deep"),
        (dict(dropouts=(0.5, 0.1)), "three dropouts, got"),
    ],
)
def test_decoder_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder(**options)


@pytest.mark.parametrize("size", [(8, 16), (7, 13)])
@pytest.mark.parametrize("conditions", [1, 2, 3, 4])
def test_shapes(conditions: int, size: tuple[int, int]) -> None:
    net = fusion(conditions).eval()
    inputs = features(*size, n=3)
    outputs = net.forward_all(inputs)
    assert [logits.shape for logits in outputs.cond] == [(3, CLASSES, *size)] * conditions
    assert outputs.att.shape == (3, CLASSES, *size)
    assert outputs.mask.shape == (3, conditions, *size)
    assert (outputs.mask > 0).all()
    torch.testing.assert_close(outputs.mask.sum(1), torch.ones(3, *size))
    assert torch.equal(net(inputs), outputs.att)


@pytest.mark.parametrize("attention", [True, False])
def test_fusion_is_the_written_formula(attention: bool) -> None:
    net = shaken(fusion(3, attention=attention))
    inputs = features(5, 6)
    f = [branch(inputs) for branch in net.branches]
    scores = torch.einsum("nchw,kc->nkhw", slow_block(torch.cat(f, 1), net.attend[0]), net.attend[1].weight[:, :, 0, 0])
    attended = torch.zeros_like(f[0])
    for n in range(2):
        for y in range(5):
            for x in range(6):
                parts = torch.exp(scores[n, :, y, x]) if attention else torch.ones(3)
                for k in range(3):
                    attended[n, :, y, x] += parts[k] / parts.sum() * f[k][n, :, y, x]
    fused = slow_block(slow_block(torch.cat([*f, attended], 1), net.fuse[0]), net.fuse[1])
    outputs = net.forward_all(inputs)
    torch.testing.assert_close(outputs.att, net.conv_seg(fused), rtol=1e-4, atol=1e-5)
    for k in range(3):
        torch.testing.assert_close(outputs.cond[k], net.classifiers[k](f[k]))
    assert torch.equal(outputs.mask, torch.full_like(outputs.mask, 1 / 3)) != attention


def test_one_condition_is_the_plain_decoder() -> None:
    plain, net = shaken(decoder()), fusion(1)
    state = plain.state_dict()
    kernel = {name.removeprefix("conv_seg."): state.pop(name) for name in list(state) if name.startswith("conv_seg.")}
    net.branches[0].load_state_dict(state)
    net.classifiers[0].load_state_dict(kernel)
    outputs = net.eval().forward_all(features())
    torch.testing.assert_close(outputs.cond[0], plain(features()))
    assert torch.equal(outputs.mask, torch.ones(2, 1, 8, 16))


def test_each_picture_by_the_decoder_of_its_condition() -> None:
    cond = [torch.full((3, 2, 1, 1), float(k)) + torch.arange(3)[:, None, None, None] / 10 for k in range(3)]
    outputs = BranchOutputs(cond, cond[0], cond[0])
    assert outputs.matched(torch.tensor([2, 0, 2]))[:, 0, 0, 0].tolist() == pytest.approx([2.0, 0.1, 2.2])


STOCK: dict[str, dict[str, Any]] = {
    "FCNHead": dict(),
    "ASPPHead": dict(dilations=(1, 2)),
    "DepthwiseSeparableASPPHead": dict(dilations=(1, 2), c1_in_channels=8, c1_channels=4),
    "PSPHead": dict(pool_scales=(1, 2)),
    "UPerHead": dict(in_channels=WIDTHS, in_index=(0, 1, 2, 3), pool_scales=(1, 2)),
    "SegformerHead": dict(in_channels=WIDTHS, in_index=(0, 1, 2, 3)),
}


@pytest.mark.parametrize("kind", STOCK)
def test_any_convolutional_head_can_be_a_branch(kind: str) -> None:
    branch = dict(
        type=f"mmseg.{kind}", in_channels=64, in_index=3, channels=12, num_classes=5, align_corners=True,
        norm_cfg=dict(type="BN"),
    )  # fmt: skip
    net = fusion(2, branch | STOCK[kind], fusion_channels=6)
    assert isinstance(net, AttentiveFusionHead)
    assert (net.num_classes, net.align_corners, net.channels) == (5, True, 6)
    outputs = net.forward_all(features())
    shape = outputs.att.shape
    assert shape[:2] == (2, 5)
    assert [logits.shape for logits in outputs.cond] == [shape] * 2
    outputs.att.sum().backward()
    for branch_net in net.branches:
        reached = [p.grad is not None and bool(p.grad.any()) for p in branch_net.parameters() if p.ndim == 4]
        assert all(reached)


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (dict(type="mmseg.SegmenterMaskTransformerHead", num_layers=1, num_heads=1, embed_dims=8),
         "SegmenterMaskTransformerHead cannot be the decoder of a condition: it has no classifier `conv_seg`"),
        (dict(type="mmseg.OCRHead", ocr_channels=4),
         "OCRHead cannot be the decoder of a condition: it refines the output of another head"),
        (dict(type="mmseg.DAHead", pam_channels=4),
         "DAHead cannot be the decoder of a condition: it has several outputs"),
    ],
)  # fmt: skip
def test_heads_that_are_refused(branch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*Use a convolutional head such as"):
        fusion(2, dict(in_channels=64, in_index=3, channels=8, num_classes=3) | branch).forward_all(features())


def test_recomputed_heads_with_several_outputs_are_refused() -> None:
    kind = dict(type="mmseg.DAHead", pam_channels=4, in_channels=64, in_index=3, channels=8, num_classes=3)
    net = fusion(2, kind, checkpoint_branches=True).eval()
    with pytest.raises(ValueError, match="DAHead cannot be the decoder of a condition: it has several outputs"):
        net.forward_all([x.requires_grad_() for x in features()])


def test_a_fusion_of_fusions_is_refused() -> None:
    with pytest.raises(ValueError, match="AttentiveFusionHead cannot be the decoder of a condition: it has dec"):
        fusion(2, dict(type="alimm.AttentiveFusionHead", num_conditions=2, branch=head()))


def test_needs_a_condition() -> None:
    with pytest.raises(ValueError, match="at least one condition, got num_conditions=0"):
        fusion(0)


def test_init_weights_reaches_the_decoders() -> None:
    net = fusion(2, head() | dict(init_cfg=dict(type="Constant", val=0.25, layer="Conv2d")))
    net.init_weights()
    for branch in net.branches:
        assert (branch.shallow[0].weight == 0.25).all()


def test_recomputed_decoders_have_the_same_gradients() -> None:
    plain = shaken(fusion(2))
    thrifty = copy.deepcopy(plain)
    thrifty.checkpoint_branches = True
    kept: list[int] = []
    for net in (plain, thrifty):
        inputs = [x.requires_grad_() for x in features()]
        saved: list[Tensor] = []

        def keep(x: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            outputs = net.forward_all(inputs)
        kept.append(sum(x.numel() for x in saved))
        (outputs.att.square().sum() + outputs.cond[1].sum()).backward()
        net.inputs_grad = [inputs[0].grad, inputs[3].grad]
    assert kept[1] < 0.7 * kept[0]
    for one, other in zip(plain.parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(plain.inputs_grad, thrifty.inputs_grad)
    with pytest.raises(ValueError, match="set freeze_bn=True in the segmentor"):
        thrifty.train().forward_all(features())
    with torch.no_grad():
        assert thrifty.forward_all(features()).att.shape == (2, CLASSES, 8, 16)
