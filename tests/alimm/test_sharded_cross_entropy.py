"""The sharded loss against one process's cross entropy: values, gradients, five steps, at 1, 2 and 4 ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.distributed import RowShards, Sharding, gather_counts, gather_features, rank_and_size
from alimm.distributed.collectives import gather_known
from alimm.losses.class_blocks import Classes, Workspace, softmax_statistics
from alimm.losses.margins import margin_logits
from alimm.losses.sharded_cross_entropy import SoftmaxOptions, sharded_cross_entropy
from alimm.registry import MODELS

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}


def problem(classes: int, dim: int, batch: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, dim, dtype=dtype, generator=generator)
    w = torch.randn(classes, dim, dtype=dtype, generator=generator) / dim**0.5
    y = torch.randint(classes, (batch,), generator=generator)
    if batch > 2:
        y[1] = -1
    return x, w, y


def oracle(
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, scale: float, cosine: bool, smooth: float, margin: Any = None
) -> torch.Tensor:
    """Written with torch's own operators over all classes."""
    if cosine:
        cos = F.normalize(x) @ F.normalize(w).T
        if margin is not None:
            cos = margin_logits(cos, y.clamp(min=0), margin, 1.0, x.detach().norm(dim=1))
        logits = scale * cos
    else:
        logits = x @ w.T
    return F.cross_entropy(logits, y, ignore_index=-1, label_smoothing=smooth)


def five_steps(
    sizes: list[int], batches: list[int], dtype: torch.dtype, cosine: bool, recompute: bool, smooth: float,
    sparse: bool, margin: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """Loss, gradients and the weights after five steps of SGD with momentum, as seen by this rank."""
    rank, _ = rank_and_size()
    sharding = Sharding(RowShards(tuple(sizes)), rank)
    x, w, y = problem(sum(sizes), 6, sum(batches), dtype)
    first = sum(batches[:rank])
    own = slice(first, first + batches[rank])
    features = x[own].clone().requires_grad_()
    weight = w[sharding.start : sharding.stop].clone().requires_grad_()
    options = SoftmaxOptions(cosine, MODELS.build(margin) if margin else None, smooth, recompute, Workspace())
    active = torch.arange(sharding.size) if sparse else None
    optimizer = torch.optim.SGD([features, weight], lr=0.5, momentum=0.9)
    report: dict[str, Any] = {}
    for step in range(5):
        counts = gather_counts(len(features), torch.device("cpu"))
        rows = torch.cat(gather_known(y[own], counts))
        norms = torch.cat(gather_known(features.detach().norm(dim=1), counts))
        global_x = gather_features(F.normalize(features) if cosine else features, counts, ddp_average=False)
        loss, _ = sharded_cross_entropy(
            global_x, weight, rows, sharding, 8.0 if cosine else 1.0, active, None, norms, options
        )
        optimizer.zero_grad()
        loss.backward()
        assert weight.grad is not None
        assert weight.grad.is_sparse == sparse
        weight.grad = weight.grad.to_dense()
        if step == 0:
            report.update(loss=loss.detach(), dx=features.grad.clone(), dw=weight.grad.clone())
        optimizer.step()
    report.update(x=features.detach(), w=weight.detach(), last=loss.detach())
    return report


def five_dense_steps(
    classes: int, batch: int, dtype: torch.dtype, cosine: bool, smooth: float, margin: dict[str, Any] | None
) -> dict[str, Any]:
    x, w, y = problem(classes, 6, batch, dtype)
    x.requires_grad_()
    w.requires_grad_()
    module = MODELS.build(margin) if margin else None
    optimizer = torch.optim.SGD([x, w], lr=0.5, momentum=0.9)
    report: dict[str, Any] = {}
    for step in range(5):
        loss = oracle(x, w, y, 8.0, cosine, smooth, module)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            report.update(loss=loss.detach(), dx=x.grad.clone(), dw=w.grad.clone())
        optimizer.step()
    report.update(x=x.detach(), w=w.detach(), last=loss.detach())
    return report


CASES = [
    # sizes of the shards, samples of the ranks
    ([13], [7]),
    ([7, 6], [4, 3]),
    ([9, 4], [7, 0]),
    ([3, 0, 5, 1], [2, 1, 0, 5]),
    ([1, 0, 0, 0], [1, 1, 1, 1]),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("sizes", "batches"), CASES)
@pytest.mark.parametrize(
    ("cosine", "recompute", "smooth", "sparse", "margin"),
    [
        (True, False, 0.0, False, None),
        (True, True, 0.1, True, None),
        (False, False, 0.1, True, None),
        (True, False, 0.0, True, dict(type="alimm.ArcFaceMargin")),
        (True, True, 0.0, False, dict(type="alimm.CosFaceMargin")),
    ],
)
def test_equals_one_process(
    gloo: Any, sizes: list[int], batches: list[int], dtype: torch.dtype, cosine: bool, recompute: bool, smooth: float,
    sparse: bool, margin: dict[str, Any] | None,
) -> None:  # fmt: skip
    expected = five_dense_steps(sum(sizes), sum(batches), dtype, cosine, smooth, margin)
    arguments = (sizes, batches, dtype, cosine, recompute, smooth, sparse, margin)
    if len(sizes) == 1:
        results = [five_steps(*arguments)]
    else:
        results = gloo.run(len(sizes), five_steps, *arguments)
    close = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for result in results:
        assert result["loss"].equal(results[0]["loss"])
        torch.testing.assert_close(result["loss"], expected["loss"], **close)
        torch.testing.assert_close(result["last"], expected["last"], **close)
    for key in ("dx", "dw", "x", "w"):
        torch.testing.assert_close(torch.cat([result[key] for result in results]), expected[key], **close)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 100))
def test_blocks_equal_the_whole(classes: int, batch: int, cosine: bool, recompute: bool, seed: int) -> None:
    """More classes than a block, and shifts of all logits change nothing."""
    x, w, y = problem(classes, 5, batch, torch.float64, seed)
    x.requires_grad_()
    w.requires_grad_()
    sharding, options = Sharding(RowShards((classes,))), SoftmaxOptions(cosine, recompute=recompute)
    loss, normaliser = sharded_cross_entropy(
        F.normalize(x) if cosine else x, w, y, sharding, 8.0 if cosine else 1.0, options=options
    )
    found = torch.autograd.grad(loss, (x, w))
    expected = oracle(x, w, y, 8.0, cosine, 0.0)
    for one, other in zip((loss, *found), (expected, *torch.autograd.grad(expected, (x, w))), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert normaliser.requires_grad is False


def test_learned_scale_has_its_gradient() -> None:
    x, w, y = problem(50, 6, 9, torch.float64)
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    margin = MODELS.build(dict(type="alimm.ArcFaceMargin"))
    for options, used in ((SoftmaxOptions(), None), (SoftmaxOptions(margin=margin, recompute=True), margin)):
        loss, _ = sharded_cross_entropy(F.normalize(x), w, y, Sharding(RowShards((50,))), scale, options=options)
        (found,) = torch.autograd.grad(loss, scale)
        cos = F.normalize(x) @ F.normalize(w).T
        cos = cos if used is None else margin_logits(cos, y.clamp(min=0), used, 1.0, None)
        (expected,) = torch.autograd.grad(F.cross_entropy(scale * cos, y, ignore_index=-1), scale)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def learned_scale_of_rank() -> torch.Tensor:
    rank, _ = rank_and_size()
    x, w, y = problem(50, 6, 9, torch.float64)
    sharding = Sharding(RowShards((20, 30)), rank)
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    loss, _ = sharded_cross_entropy(F.normalize(x), w[sharding.start : sharding.stop], y, sharding, scale)
    return torch.autograd.grad(loss, scale)[0]


def test_gradient_of_the_scale_is_that_of_all_classes_on_every_rank(gloo: Any) -> None:
    x, w, y = problem(50, 6, 9, torch.float64)
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(scale * (F.normalize(x) @ F.normalize(w).T), y, ignore_index=-1)
    (expected,) = torch.autograd.grad(loss, scale)
    for found in gloo.run(2, learned_scale_of_rank):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_an_active_set_without_the_label_is_refused() -> None:
    x, w, y = problem(20, 4, 3, torch.float32)
    active = torch.tensor([row for row in range(20) if row != int(y[2])])
    with pytest.raises(ValueError, match=rf"row {int(y[2])} of the classifier, the class of sample 2 .* 0 ranks"):
        sharded_cross_entropy(F.normalize(x), w, y, Sharding(RowShards((20,))), 8.0, active)


def label_beyond_all_shards() -> str:
    rank, _ = rank_and_size()
    x, w, y = problem(20, 4, 3, torch.float32)
    y[0] = 20
    sharding = Sharding(RowShards((11, 9)), rank)
    try:
        sharded_cross_entropy(F.normalize(x), w[sharding.start : sharding.stop], y, sharding, 8.0)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_label_on_no_rank_is_an_error_on_every_rank(gloo: Any) -> None:
    for told in gloo.run(2, label_beyond_all_shards):
        assert "row 20 of the classifier, the class of sample 0 of the global batch, is on 0 ranks" in told


def test_all_labels_ignored_give_zero_and_zero_gradients() -> None:
    x, w, _ = problem(20, 4, 3, torch.float32)
    w.requires_grad_()
    loss, _ = sharded_cross_entropy(x, w, torch.full((3,), -1), Sharding(RowShards((20,))))
    assert float(loss.detach()) == 0
    assert torch.autograd.grad(loss, w)[0].abs().max() == 0


def test_a_row_of_nan_shows_in_the_loss_and_a_zero_row_does_not() -> None:
    x, w, y = problem(20, 4, 3, torch.float32)
    w[5] = 0
    w.requires_grad_()
    loss, _ = sharded_cross_entropy(F.normalize(x), w, y, Sharding(RowShards((20,))), 8.0)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, w)[0]).all()
    with torch.no_grad():
        w[5] = torch.nan
    loss, _ = sharded_cross_entropy(F.normalize(x), w, y, Sharding(RowShards((20,))), 8.0)
    assert torch.isnan(loss)


def test_fewer_classes_never_raise_the_loss_and_logq_is_unbiased() -> None:
    """With a correction of -log q for drawn classes, the mean of exp(log normaliser) over draws is the full sum."""
    x, w, y = problem(40, 4, 1, torch.float64)
    sharding = Sharding(RowShards((40,)))
    full, _ = sharded_cross_entropy(F.normalize(x), w, y, sharding, 4.0)
    _, whole = sharded_cross_entropy(F.normalize(x), w, y, sharding, 4.0)
    generator = torch.Generator().manual_seed(1)
    others = torch.tensor([row for row in range(40) if row != int(y[0])])
    sums = []
    for _ in range(4000):
        drawn = others[torch.randperm(39, generator=generator)[:13]]
        active = torch.cat([y, drawn]).sort().values
        plain, _ = sharded_cross_entropy(F.normalize(x), w, y, sharding, 4.0, active)
        assert plain <= full + 1e-12
        correction = torch.full((14,), torch.log(torch.tensor(39 / 13)).item(), dtype=torch.float64)
        correction[active == y] = 0
        sums.append(sharded_cross_entropy(F.normalize(x), w, y, sharding, 4.0, active, correction)[1].exp())
    estimate = torch.cat(sums)
    error = estimate.std() / len(estimate) ** 0.5
    assert abs(estimate.mean() - whole.exp()[0]) < 4 * error
    assert error < 0.02 * whole.exp()[0]


def test_recomputed_logits_take_no_memory_that_grows_with_the_classes() -> None:
    x, w, _ = problem(40_000, 8, 64, torch.float32)
    empty = torch.empty(0, dtype=torch.int64)
    classes = Classes(w, None, 8.0, True, empty, empty)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        softmax_statistics(x, classes, None, False)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 64 * classes.block * 4 + 4096
    assert largest < 64 * 40_000 * 4 / 4


def test_the_workspace_is_given_back_after_backward_and_never_shared() -> None:
    x, w, y = problem(30, 4, 3, torch.float32)
    w.requires_grad_()
    workspace = Workspace()
    options, sharding = SoftmaxOptions(workspace=workspace), Sharding(RowShards((30,)))
    first, _ = sharded_cross_entropy(F.normalize(x), w, y, sharding, 8.0, options=options)
    second, _ = sharded_cross_entropy(F.normalize(x), w, y.roll(1), sharding, 8.0, options=options)
    (two,) = torch.autograd.grad(second, w)
    (one,) = torch.autograd.grad(first, w)
    torch.testing.assert_close(one, torch.autograd.grad(oracle(x, w, y, 8.0, True, 0.0), w)[0])
    torch.testing.assert_close(two, torch.autograd.grad(oracle(x, w, y.roll(1), 8.0, True, 0.0), w)[0])
    buffer = workspace._buffer
    third, _ = sharded_cross_entropy(F.normalize(x), w, y, sharding, 8.0, options=options)
    assert workspace._buffer is buffer
    third.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        third.backward()
