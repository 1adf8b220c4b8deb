from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alimm.projects.dcaa.discriminator import PixelDiscriminator
from alimm.registry import MODELS


def oracle(net: PixelDiscriminator, maps: torch.Tensor, strides: list[int]) -> torch.Tensor:
    """The two layouts written out, with the weights of ``net``."""
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    x = maps
    if net.layout == "dcaa":
        for i, conv in enumerate(convs[:-1]):
            x = F.conv2d(x, conv.weight, conv.bias, stride=strides[i], padding=1)
            x = x.clamp(min=0) if i < len(convs) - 2 else torch.where(x > 0, x, 0.2 * x)
        return F.conv2d(x, convs[-1].weight, convs[-1].bias)
    for i, conv in enumerate(convs):
        x = F.conv2d(x, conv.weight, conv.bias, stride=strides[i], padding=1)
        if i < len(convs) - 1:
            x = torch.where(x > 0, x, 0.2 * x)
    return x


@pytest.mark.parametrize(
    ("layout", "kernels", "stride", "grid"),
    [("dcaa", [3, 3, 3, 3, 1], 16, (2, 3)), ("adaptsegnet", [4] * 5, 32, (1, 1))],
)
def test_default_layouts(layout: str, kernels: list[int], stride: int, grid: tuple[int, int]) -> None:
    net = PixelDiscriminator(19, layout=layout)
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.kernel_size for conv in convs] == [(k, k) for k in kernels]
    assert [conv.in_channels for conv in convs] == [19, 64, 128, 256, 512]
    assert [conv.out_channels for conv in convs] == [64, 128, 256, 512, 1]
    assert net.total_stride == stride
    assert net(torch.rand(1, 19, 32, 48)).shape == (1, 1, *grid)


@pytest.mark.parametrize("layout", ["dcaa", "adaptsegnet"])
@pytest.mark.parametrize("num_strides", [0, 1, 3, None])
def test_values_are_those_of_the_written_out_layout(layout: str, num_strides: int | None) -> None:
    torch.manual_seed(0)
    net = PixelDiscriminator(3, (4, 5, 6), layout, num_strides).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    most = 3 if layout == "dcaa" else 4
    count = most if num_strides is None else num_strides
    maps = torch.randn(2, 3, 17, 21, dtype=torch.double)
    expected = oracle(net, maps, [2] * count + [1] * (most - count))
    torch.testing.assert_close(net(maps), expected)
    assert net.total_stride == 2**count


def test_fewer_strides_leave_a_grid_on_small_maps() -> None:
    net = PixelDiscriminator(5, (8, 8, 8, 8), num_strides=2)
    assert net.total_stride == 4
    assert net(torch.rand(1, 5, 16, 32)).shape == (1, 1, 4, 8)


@pytest.mark.parametrize("layout", ["dcaa", "adaptsegnet"])
@pytest.mark.parametrize("num_strides", [0, 1, 2, 4])
def test_minimum_size_is_the_least_that_runs(layout: str, num_strides: int) -> None:
    net = PixelDiscriminator(2, (3, 3, 3, 3), layout, num_strides)
    size = net.minimum_size
    assert net(torch.rand(1, 2, size, size)).shape[2:] == (1, 1)
    if size > 1:
        with pytest.raises(ValueError, match=f"at least {size} x {size} pixels.*got {size} x {size - 1}"):
            net(torch.rand(1, 2, size, size - 1))


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="layout must be one of dcaa, adaptsegnet, got 'patch'"):
        PixelDiscriminator(3, layout="patch")
    with pytest.raises(ValueError, match="between 0 and 4"):
        PixelDiscriminator(3, num_strides=5)
    with pytest.raises(ValueError, match="between 0 and 5"):
        PixelDiscriminator(3, layout="adaptsegnet", num_strides=6)
    with pytest.raises(ValueError, match="list of positive numbers"):
        PixelDiscriminator(3, channels=())
    with pytest.raises(ValueError, match=r"expected a map \(N, 3, H, W\).*\(1, 4, 16, 16\)"):
        PixelDiscriminator(3, (4,))(torch.rand(1, 4, 16, 16))


def test_built_from_the_registry_and_initialised_as_told() -> None:
    init = dict(type="Normal", layer="Conv2d", std=0.02)
    net = MODELS.build(dict(type="PixelDiscriminator", in_channels=19, channels=(64, 64), init_cfg=init))
    net.init_weights()
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
            assert 0.018 < module.weight.std().item() < 0.022
            assert not module.bias.any()
