"""What backward keeps, and what happens when the forward pass is run again, traced or compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alimm.projects.int8_training import convert, layers_of
from tests.projects.int8_training.single_layer import converted, error, example, run


def body(convolutions: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    for index in range(convolutions):
        layers += [nn.Conv2d(16, 16, 3, padding=1, groups=1 + index), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


PICTURES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(5))
TARGETS = torch.tensor([0, 1, 2, 3])


def gradients(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor = PICTURES) -> list[Tensor]:
    model.zero_grad()
    for _, state in layers_of(model):
        state.last_step = -1  # the same draws again
    nn.functional.cross_entropy(forward(x), TARGETS).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_does_not_change_a_bit(reentrant: bool) -> None:
    model = body().train()
    convert(model, planner=False)
    true = gradients(model, model)

    def in_two_parts(x: Tensor) -> Tensor:
        middle = checkpoint(model[:6], x, use_reentrant=reentrant)
        return model[9:](checkpoint(model[6:9], middle, use_reentrant=reentrant))

    x = PICTURES.clone().requires_grad_(reentrant)
    found = gradients(model, in_two_parts, x)
    assert all(torch.equal(one, other) for one, other in zip(found, true, strict=True))
    plain = body()
    assert any(not torch.equal(a, b) for a, b in zip(true, gradients(plain, plain), strict=True))


def compiled_gradients(backend: str) -> tuple[list[Tensor], list[Tensor]]:
    model = body().train()
    convert(model, planner=False)
    true = gradients(model, model)
    torch._dynamo.reset()
    try:
        found = gradients(model, torch.compile(model, fullgraph=True, backend=backend))
    finally:
        torch._dynamo.reset()
    return found, true


def test_the_whole_model_is_traced_as_one_graph() -> None:
    found, true = compiled_gradients("aot_eager")
    for one, other in zip(found, true, strict=True):
        # Batch norm is decomposed, which may move an integer of the layers before it.
        assert error(one, other) < 1e-3 or float(other.norm()) < 1e-5


@pytest.mark.slow
def test_inductor_compiles_it() -> None:
    found, true = compiled_gradients("inductor")
    for one, other in zip(found, true, strict=True):
        assert error(one, other) < 2e-2 or float(other.norm()) < 1e-5


def kept_bytes(forward: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> int:
    """Bytes of what autograd keeps, parameters apart, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(x)
    assert y.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("name", ["conv2d", "stride and groups", "1x1", "conv3d", "linear of sequences"])
def test_the_input_is_kept_in_a_quarter_of_the_bytes(name: str) -> None:
    module, x, _ = example(name)
    x = torch.randn(16, *x.shape[1:]).requires_grad_()
    # The FP32 layer keeps the input itself, so another one that does not belong to the caller.
    plain = kept_bytes(lambda t: module(t * 1.0), x, list(module.parameters()))
    layer, _ = converted(module)
    small = kept_bytes(lambda t: layer(t * 1.0), x, list(layer.parameters()))
    assert plain >= 4 * x.numel()
    assert small <= 0.27 * plain
    assert small >= x.numel()


def test_a_frozen_weight_keeps_no_input() -> None:
    module, x, grad = example("conv2d")
    layer, _ = converted(module)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    x = torch.randn(16, *x.shape[1:])
    assert kept_bytes(layer, x.requires_grad_(), list(layer.parameters())) <= 64
    found = run(layer, x, grad[:1].expand(16, *grad.shape[1:]))
    true = run(module, x, grad[:1].expand(16, *grad.shape[1:]))
    assert found.dw is None
    assert found.db is None
    assert 1e-4 < error(found.dx, true.dx) < 0.04
    with torch.no_grad():
        assert torch.equal(layer(x), found.y), "the output is the same whether anything is trained or not"


def test_the_first_layer_computes_no_input_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, grad = example("conv2d")
    layer, _ = converted(module)
    monkeypatch.setattr("alimm.projects.int8_training.engine.transposed_weight", lambda *_: 1 / 0)
    found = run(layer, x, grad, need_x=False)
    assert found.dx is None
    assert found.dw is not None
    with pytest.raises(ZeroDivisionError):
        run(layer, x, grad)


def test_only_the_bias_is_trained() -> None:
    module, x, grad = example("conv2d")
    layer, _ = converted(module)
    layer.weight.requires_grad_(False)
    found, true = run(layer, x, grad, need_x=False), run(module, x, grad)
    assert found.dw is None
    assert error(found.db, true.db) < 1e-5


THREADS = """
import numba, torch
{first}
from torch import nn
from alimm.projects.int8_training import convert
layer = nn.Sequential(nn.Linear(8, 8))
convert(layer, strict_all=True, planner=False)
layer(torch.randn(4, 8)).sum().backward()
print(torch.get_num_threads(), numba.get_num_threads())
"""


@pytest.mark.parametrize("first", ["", "torch.set_num_threads(1)"])
def test_torch_keeps_its_number_of_threads_and_numba_takes_the_same(first: str) -> None:
    """Ranks that share a machine are given one thread each; what they start must not take more."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    if not first:
        environment["OMP_NUM_THREADS"] = "1"
    child = subprocess.run(
        [sys.executable, "-c", THREADS.format(first=first)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
        env={**environment, "NUMBA_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout.split() == ["1", "1"]


def test_an_output_that_is_never_used_costs_nothing() -> None:
    module, x, _ = example("linear")
    layer, _ = converted(module)
    x.requires_grad_()
    layer(x)
    (2 * x).sum().backward()
    assert layer.weight.grad is None
    assert not layer.int8.ranges
