"""The classifier, its preprocessor and backbone."""

import copy
import pickle

import pytest
import torch

from alimm.models import ClsDataPreprocessor, GlobalPoolNeck, ImageClassifier, ResNetTiny
from alimm.models.backbones import MixStyle
from alimm.registry import MODELS
from alimm.structures import ClsDataSample

HEAD = dict(type="alimm.LinearHead", num_classes=5, in_channels=32)
TINY = dict(type="alimm.ResNetTiny", width=8, depths=(1, 1, 1))
POOL = dict(type="alimm.GlobalPoolNeck", in_channels=32, norm=True)


def classifier(**changes):
    return MODELS.build(dict(type="alimm.ImageClassifier", backbone=TINY, neck=POOL, head=HEAD) | changes)


def batch(count=4, size=16):
    return dict(
        inputs=[torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(count)],
        data_samples=[ClsDataSample().set_gt_label(i % 5) for i in range(count)],
    )


def test_the_three_modes_agree():
    model = classifier().eval()
    data = model.data_preprocessor(batch())
    logits = model(**data, mode="tensor")
    assert logits.shape == (4, 5)
    predicted = model(**data, mode="predict")
    assert torch.allclose(torch.stack([sample.pred_score for sample in predicted]), logits.softmax(1), atol=1e-6)
    loss = model(**data, mode="loss")["loss"]
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.arange(4)).item(), rel=1e-5)
    assert torch.allclose(model.embed(data["inputs"]).norm(dim=1), torch.ones(4), atol=1e-5)
    with pytest.raises(ValueError, match="'tensor', 'loss' or 'predict', got 'train'"):
        model(**data, mode="train")


def test_training_lowers_the_loss_and_survives_copies():
    torch.manual_seed(0)
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = batch(8)
    losses = []
    for _ in range(12):
        loss, _ = model.parse_losses(model(**model.data_preprocessor(data, True), mode="loss"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    inputs = model.data_preprocessor(data)["inputs"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(inputs), model(inputs))


def test_bfloat16_training_step_keeps_single_precision_weights():
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.head.fc.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(**model.data_preprocessor(batch(), True), mode="loss")
    assert losses["loss"].dtype == torch.float32
    losses["loss"].backward()
    optimizer.step()
    assert model.head.fc.weight.dtype == torch.float32
    assert not torch.equal(model.head.fc.weight, before)


def test_without_a_head_it_extracts_features():
    model = classifier(head=None)
    data = model.data_preprocessor(batch(2))
    assert model(**data).shape == (2, 32)
    assert model(**data, mode="predict")[0].feature.shape == (32,)
    with pytest.raises(ValueError, match="without a head has no loss"):
        model(**data, mode="loss")


def test_without_a_neck_it_says_which_to_add():
    with pytest.raises(ValueError, match="GlobalPoolNeck"):
        classifier(neck=None)(torch.zeros(1, 3, 16, 16))


def test_a_backbone_of_mmdet_fits():
    pytest.importorskip("mmdet")
    model = classifier(
        backbone=dict(type="mmdet.ResNet", depth=18),
        neck=dict(type="alimm.GlobalPoolNeck"),
        head=HEAD | dict(in_channels=512),
    )
    losses = model(**model.data_preprocessor(batch(2, 32), True), mode="loss")
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_preprocessor_normalises_and_swaps_channels():
    image = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)
    plain = ClsDataPreprocessor(mean=(1, 2, 3), std=(2, 4, 8))
    expected = (image.float() - torch.tensor([1.0, 2, 3])[:, None, None]) / torch.tensor([2.0, 4, 8])[:, None, None]
    assert torch.equal(plain(dict(inputs=[image]))["inputs"][0], expected)
    swapped = ClsDataPreprocessor(mean=(0, 0, 0), std=(1, 1, 1), to_rgb=True)
    assert torch.equal(swapped(dict(inputs=image[None]))["inputs"][0], image.float()[[2, 1, 0]])
    assert not plain.state_dict()


def test_channels_last_changes_the_layout_and_no_value():
    data = batch(2)
    last = ClsDataPreprocessor(channels_last=True)(data)["inputs"]
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, ClsDataPreprocessor()(data)["inputs"])


def test_preprocessor_augments_in_training_only():
    model = ClsDataPreprocessor(batch_augments=[dict(type="alimm.BatchCutout", prob=1.0, size=1.0)])
    data = dict(inputs=torch.full((2, 3, 8, 8), 100, dtype=torch.uint8))
    assert torch.equal(model(data)["inputs"], ClsDataPreprocessor()(data)["inputs"])
    assert not torch.equal(model(data, True)["inputs"], model(data)["inputs"])


def test_pictures_of_different_sizes_are_refused():
    sizes = [torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3, 5, 4, dtype=torch.uint8)]
    with pytest.raises(ValueError, match=r"one size, got \[\(3, 4, 4\), \(3, 5, 4\)\]: add alimm.Resize"):
        ClsDataPreprocessor()(dict(inputs=sizes))


@pytest.mark.parametrize(
    ("size", "stride", "sides"), [(32, 1, [32, 16, 8]), (48, 2, [24, 12, 6]), (28, 1, [28, 14, 7])]
)
def test_backbone_shapes(size, stride, sides):
    net = ResNetTiny(width=8, depths=(1, 2, 1), stem_stride=stride, mixstyle=0.5)
    maps = net(torch.zeros(2, 3, size, size))
    assert [tuple(m.shape) for m in maps] == [(2, 8 * 2**i, side, side) for i, side in enumerate(sides)]
    assert net.out_channels == 32


def test_mixstyle_swaps_statistics_and_rests_in_evaluation():
    torch.manual_seed(0)
    x = torch.randn(64, 4, 6, 6) * torch.rand(64, 4, 1, 1).add(0.5) + torch.randn(64, 4, 1, 1)
    mix = MixStyle(prob=1.0)
    assert torch.equal(mix.eval()(x), x)
    mixed = mix.train()(x)
    assert not torch.allclose(mixed.mean((2, 3)), x.mean((2, 3)), atol=0.05)

    def shape(y):
        return (y - y.mean((2, 3), keepdim=True)) / y.std((2, 3), keepdim=True)

    assert torch.allclose(shape(mixed), shape(x), atol=1e-3)
    assert mix(torch.randn(4, 3, 1, 1)).isfinite().all()
    assert torch.equal(MixStyle(prob=0.0).train()(x), x)


def test_neck_pools_the_last_map():
    maps = (torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2))
    assert torch.allclose(GlobalPoolNeck()(maps), maps[1].flatten(2).mean(2))
    with pytest.raises(ValueError, match="needs in_channels"):
        GlobalPoolNeck(norm=True)


def test_a_classifier_runs_under_ddp(gloo):
    together = gloo.run(2, ddp_gradient)
    assert torch.allclose(together[0], together[1])


def ddp_gradient():
    from mmengine.model import MMDistributedDataParallel

    torch.manual_seed(0)
    model = MMDistributedDataParallel(classifier(), broadcast_buffers=False)
    torch.manual_seed(torch.distributed.get_rank())
    data = model.module.data_preprocessor(batch(4), True)
    model(**data, mode="loss")["loss"].backward()
    return model.module.head.fc.weight.grad


def test_building_by_class_and_by_name_is_the_same():
    assert isinstance(classifier(), ImageClassifier)
    assert MODELS.get("alimm.ImageClassifier") is ImageClassifier
