"""The sharded head: methods, predictions, state, and independence of the number of ranks."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from alimm.distributed import rank_and_size, run_ranks, sharding_of
from alimm.heads import CosineHead, ShardedHead
from alimm.heads.row_init import normal_rows
from alimm.heads.sharded_state import shards_left_out
from alimm.heads.sharded_topk import merge
from alimm.models import ImageClassifier
from alimm.optim.row_sparse_sgd import RowSparseSGD
from alimm.structures import ClsDataSample


def samples(labels: Sequence[int]) -> list[ClsDataSample]:
    return [ClsDataSample().set_gt_label(label) for label in labels]


def batch(size: int, classes: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, dim, generator=generator)
    return x, torch.randint(classes, (size,), generator=generator).tolist()


def class_weights(head: ShardedHead) -> torch.Tensor:
    """The rows of all classes in the order of the class ids."""
    return head.settled_weight()[head.permutation.rows(torch.arange(head.num_classes))]


def test_rows_drawn_do_not_depend_on_the_cut() -> None:
    whole = normal_rows(0, 9000, 3, 1.0, 5)
    cut = [normal_rows(a, b, 3, 1.0, 5) for a, b in ((0, 1), (1, 4096), (4096, 4096), (4096, 8999), (8999, 9000))]
    assert torch.cat(cut).equal(whole)
    assert not normal_rows(0, 9000, 3, 1.0, 6).equal(whole)
    assert len(whole.unique(dim=0)) == 9000
    assert abs(float(whole.std()) - 1) < 0.02


@pytest.mark.parametrize("method", ["full", "fused", "random"])
@pytest.mark.parametrize("cosine", [True, False])
def test_all_classes_active_equal_the_plain_softmax(method: str, cosine: bool) -> None:
    head = ShardedHead(300, 8, method, active=1.0, cosine=cosine, scale=12.0, label_smooth=0.1)
    x, labels = batch(16, 300, 8)
    labels[3] = -100
    x.requires_grad_()
    loss = head.loss(x, samples(labels))["loss"]
    weight = class_weights(head).requires_grad_()
    logits = 12.0 * F.normalize(x) @ F.normalize(weight).T if cosine else x @ weight.T
    expected = F.cross_entropy(logits, torch.tensor(labels), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    expected_x, expected_w = torch.autograd.grad(expected, (x, weight))
    loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.is_sparse == (method == "random")
    torch.testing.assert_close(x.grad, expected_x, rtol=1e-5, atol=1e-6)
    rows = head.permutation.rows(torch.arange(300))
    torch.testing.assert_close(head.weight.grad.to_dense()[rows], expected_w, rtol=1e-5, atol=1e-6)


def test_only_active_rows_get_a_gradient_and_labels_are_always_among_them() -> None:
    head = ShardedHead(1000, 8, "random", active=0.05)
    x, labels = batch(16, 1000, 8)
    report = head.loss(x.requires_grad_(), samples(labels))
    report["loss"].backward()
    rows = head.weight.grad.coalesce().indices()[0]
    assert len(rows) == 50 == int(report["active"])
    assert set(head.permutation.rows(torch.tensor(labels)).tolist()) <= set(rows.tolist())
    assert int(report["active_random"]) == 50 - len(set(labels))
    again = ShardedHead(1000, 8, "random", active=0.05)
    again.step.fill_(1)
    again.loss(x, samples(labels))["loss"].backward()
    assert again.weight.grad.coalesce().indices()[0].tolist() != rows.tolist(), "every step draws anew"


def test_more_labels_than_the_budget_are_all_kept_and_counted() -> None:
    head = ShardedHead(1000, 4, "random", active=4)
    report = head.loss(torch.randn(10, 4), samples(list(range(10))))
    assert int(report["active"]) == 10
    assert int(report["overflow"]) == 6


def test_prefetched_selection_is_that_of_the_same_step() -> None:
    x, labels = batch(16, 500, 8)
    one, other = ShardedHead(500, 8, "random"), ShardedHead(500, 8, "random")
    given = samples(labels)
    one.prefetch(given)
    assert one.loss(x, given)["loss"].equal(other.loss(x, given)["loss"])
    one.prefetch(samples([0] * 16))
    assert one.loss(x, given)["loss"].equal(other.loss(x, given)["loss"]), "what was prefetched for others is dropped"


def test_a_head_with_a_margin_is_harder_and_predicts_the_same() -> None:
    x, labels = batch(16, 50, 8)
    plain = ShardedHead(50, 8)
    for kind in ("ArcFaceMargin", "CosFaceMargin", "AdaFaceMargin"):
        head = ShardedHead(50, 8, margin=dict(type=f"alimm.{kind}"))
        assert head.loss(x, samples(labels))["loss"] > plain.loss(x, samples(labels))["loss"]
        assert head.predict(x)[0].pred_topk.equal(plain.predict(x)[0].pred_topk)


def test_predictions_are_the_best_classes_with_their_probabilities() -> None:
    head = ShardedHead(60, 8, "random", topk=5, dense_scores=True)
    x, _ = batch(7, 60, 8)
    logits = 32.0 * F.normalize(x) @ F.normalize(class_weights(head)).T
    torch.testing.assert_close(head(x), logits.detach())
    for sample, row in zip(head.predict(x), logits.detach(), strict=True):
        assert sample.pred_topk.tolist() == row.topk(5).indices.tolist()
        assert int(sample.pred_label) == int(row.argmax())
        torch.testing.assert_close(sample.pred_score, row.softmax(0))
    lean = ShardedHead(60, 8, topk=100, dense_scores=False)
    found = lean.predict(x)[0]
    assert sorted(found.pred_topk.tolist()) == list(range(60))
    assert "pred_score" not in found


def test_equal_logits_are_ordered_by_class_id() -> None:
    head = ShardedHead(5000, 4, topk=6, dense_scores=False)
    with torch.no_grad():
        head.weight[:] = torch.tensor([1.0, 0, 0, 0])
    assert head.predict(torch.ones(2, 4))[1].pred_topk.tolist() == [0, 1, 2, 3, 4, 5]
    values, ids = merge(torch.tensor([[1.0, -torch.inf]]), torch.tensor([[4, -1]]), torch.tensor([[1.0]]),
                        torch.tensor([[2]]))  # fmt: skip
    assert ids.tolist() == [[2, 4]]
    assert values.tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (dict(method="knn"), "alimm.KNNSoftmaxHead has 'knn'"),
        (dict(method="sampled"), "full, fused, random"),
        (dict(method="random", active=0.0), r"share in \(0, 1\] or a whole number of classes up to 10"),
        (dict(method="random", active=11), "up to 10"),
        (dict(method="random", active=2.5), "whole number"),
        (dict(scale=0.0), "scale must be above 0"),
        (dict(label_smooth=1.0), "label_smooth"),
        (dict(cosine=False, margin=dict(type="alimm.ArcFaceMargin")), "set cosine=True"),
        (dict(permute="random"), "hash, none"),
    ],
)
def test_wrong_settings_say_what_is_right(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ShardedHead(10, 4, **arguments)


def test_labels_that_name_no_class_are_refused() -> None:
    head = ShardedHead(10, 4)
    for wrong in (10, -1):
        with pytest.raises(ValueError, match=rf"label {wrong} in row 1 of the global batch is not in \[0, 10\)"):
            head.loss(torch.randn(2, 4), samples([3, wrong]))
    with pytest.raises(ValueError, match="has no gt_label"):
        head.loss(torch.randn(1, 4), [ClsDataSample()])


def test_state_of_one_process_is_an_ordinary_checkpoint() -> None:
    head = ShardedHead(30, 4, "random", seed=1)
    head.loss(torch.randn(2, 4), samples([1, 2]))
    state = copy.deepcopy(head.state_dict())
    assert state["weight"].shape == (30, 4)
    same = ShardedHead(30, 4, "random", seed=1)
    same.load_state_dict(state)
    assert same.weight.equal(head.weight)
    assert int(same.step) == 1
    other = ShardedHead(30, 4, seed=2)
    other.load_state_dict(state)
    assert not other.weight.equal(head.weight)
    assert class_weights(other).equal(class_weights(head)), "another layout of the same classes"
    plain = CosineHead(30, 4)
    other.load_state_dict(dict(weight=plain.weight, scale=plain.scale))
    assert class_weights(other).equal(plain.weight.detach())
    with pytest.raises(ValueError, match=r"has the shape \(30, 4\), this one \(31, 4\)"):
        ShardedHead(31, 4).load_state_dict(state)


def test_a_state_without_the_shards_is_never_used_by_mistake() -> None:
    head = ShardedHead(30, 4)
    with shards_left_out():
        state = head.state_dict()
    assert "weight" not in state
    other = ShardedHead(30, 4)
    other.load_state_dict(state)
    for use in (lambda: other.loss(torch.randn(1, 4), samples([0])), lambda: other.predict(torch.randn(1, 4))):
        with pytest.raises(ValueError, match=r"\.shards folder beside it"):
            use()
    with pytest.raises(ValueError, match="permute_seed 0, this one 3"):
        ShardedHead(30, 4, seed=3).load_shard({"weight": head.weight}, head.shard_scalars())
    other.load_shard({"weight": head.weight + 1, **head.shard_arrays()}, head.shard_scalars())
    assert other.weight.equal(head.weight + 1)
    other.predict(torch.randn(1, 4))


def test_a_copy_of_a_head_is_its_own() -> None:
    head = ShardedHead(30, 4, "random")
    head.loss(torch.randn(2, 4), samples([1, 2]))
    other = copy.deepcopy(head)
    other.loss(torch.randn(2, 4), samples([1, 2]))["loss"].backward()
    assert head.weight.grad is None


def train_ranks(rank: int, size: int, method: str, classes: int, batches: list[list[int]]) -> dict[str, Any]:
    """Twenty steps of a linear backbone and a head; batches are cut over the ranks as ``batches`` says."""
    head = ShardedHead(classes, 6, method, active=1.0, seed=4, learn_scale=True, topk=3)
    backbone = torch.nn.Linear(5, 6)
    with torch.no_grad():
        backbone.weight.copy_(torch.arange(30).reshape(6, 5) / 30 - 0.4)
        backbone.bias.zero_()
    optimizer = RowSparseSGD([*backbone.parameters(), *head.parameters()], lr=0.05, momentum=0.9, weight_decay=1e-3)
    losses = []
    for step in range(20):
        x, labels = batch(8, classes, 5, step)
        own = batches[step % len(batches)]
        cut = slice(sum(own[:rank]), sum(own[: rank + 1]))
        given = samples(labels[cut])
        head.prefetch(given)
        loss = head.loss(backbone(x[cut]), given)["loss"]
        optimizer.zero_grad()
        loss.backward()
        for parameter in [*backbone.parameters(), head.scale]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if size > 1:  # what DDP does
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= size
        optimizer.step()
        losses.append(float(loss.detach()))
    x, _ = batch(6, classes, 5, 99)
    cut = slice(rank, 6, size)
    predicted = head.predict(backbone(x)[cut])
    return dict(
        losses=losses,
        weight=head.settled_weight().clone(),
        backbone=backbone.weight.detach(),
        scale=head.scale.detach(),
        top={int(i): sample.pred_topk for i, sample in zip(range(6)[cut], predicted, strict=True)},
        logits=head(backbone(x)[cut]).detach(),
        sharded=sharding_of(head.weight) is not None,
    )


@pytest.mark.parametrize("method", ["full", "fused", "random"])
@pytest.mark.parametrize(("ranks", "batches"), [(2, [[4, 4], [8, 0]]), (4, [[2, 2, 2, 2], [0, 5, 3, 0]])])
def test_twenty_steps_do_not_depend_on_the_number_of_ranks(
    gloo: Any, method: str, ranks: int, batches: list[list[int]]
) -> None:
    alone = train_ranks(0, 1, method, 23, [[8]])
    results = gloo.run(ranks, _train_rank, method, 23, batches)
    for result in results:
        assert result["losses"] == results[0]["losses"]
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(alone["losses"]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["backbone"], alone["backbone"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result["scale"], alone["scale"], rtol=1e-5, atol=1e-5)
        for place, ids in result["top"].items():
            assert ids.tolist() == alone["top"][place].tolist()
    torch.testing.assert_close(torch.cat([r["weight"] for r in results]), alone["weight"], rtol=1e-4, atol=1e-5)
    first = results[0]["logits"]
    torch.testing.assert_close(first, alone["logits"][0::ranks], rtol=1e-4, atol=1e-4)


def _train_rank(method: str, classes: int, batches: list[list[int]]) -> dict[str, Any]:
    return train_ranks(*rank_and_size(), method, classes, batches)


def faults() -> list[str]:
    """Every rank must raise, also the one whose own batch is in order."""
    rank, _ = rank_and_size()
    head, told = ShardedHead(10, 4), []
    right, wrong = samples([1, 2]), samples([1, 10])
    missing = [ClsDataSample(metainfo=dict(sample_id="p7")), *samples([1])]
    for given in (wrong if rank else right, missing if rank else right):
        try:
            head.loss(torch.randn(2, 4), given)
            told.append("no error")
        except ValueError as error:
            told.append(str(error))
    try:
        head.state_dict()
    except ValueError as error:
        told.append(str(error))
    return told


def test_an_error_on_one_rank_is_told_on_all(gloo: Any) -> None:
    for told in gloo.run(2, faults):
        assert "label 10 in row 3 of the global batch" in told[0]
        assert "p7" in told[1]
        assert "alimm.ShardedCheckpointHook" in told[2]


def wrapped(rank: int, size: int) -> list[Any]:
    """DDP would send rank 0's shard over all others."""
    from alimm.distributed import CpuDistributedDataParallel

    model = ImageClassifier(
        backbone=dict(type="alimm.ResNetTiny", width=2),
        neck=dict(type="alimm.GlobalPoolNeck"),
        head=dict(type="alimm.ShardedHead", num_classes=10, in_channels=8, method="random", active=0.5),
    )
    before = model.head.weight.detach().clone()
    ddp = CpuDistributedDataParallel(model)
    loss = ddp(torch.randn(3, 3, 8, 8), samples([rank, 1, 2]), mode="loss")["loss"]
    loss.backward()
    stem = ddp.module.backbone.stem[0].weight.grad
    return [before, ddp.module.head.weight.detach(), stem, float(loss)]


def test_ddp_leaves_the_shards_alone() -> None:
    one, other = run_ranks(wrapped, 2)
    for before, after, _, _ in (one, other):
        assert before.equal(after)
    assert not one[0].equal(other[0])
    assert one[2].equal(other[2]), "the backbone's gradient is the same on all ranks"
    assert one[3] == other[3]


def lazy_run(rows: str = "lazy_exact") -> tuple[ShardedHead, list[float]]:
    """Twelve steps on a few of the classes, after which others are behind; the coverage of each step."""
    head = ShardedHead(40, 6, "random", active=8, seed=1, coverage_interval=1)
    optimizer = RowSparseSGD([head.weight], lr=0.5, momentum=0.9, weight_decay=0.05, rows=rows)
    coverage = []
    for step in range(12):
        x, labels = batch(4, 40, 6, step)
        report = head.loss(x, samples(labels))
        coverage.append(float(report["coverage"]))
        optimizer.zero_grad()
        report["loss"].backward()
        optimizer.step()
    head.optimizer = optimizer
    return head, coverage


def test_coverage_is_that_of_rows_that_are_up_to_date() -> None:
    assert lazy_run()[1] == pytest.approx(lazy_run("dense")[1], rel=1e-4)


def test_weights_loaded_into_a_run_owe_nothing_to_the_old_ones() -> None:
    head, _ = lazy_run()
    state = copy.deepcopy(head.state_dict())
    for step in range(3):
        x, labels = batch(4, 40, 6, step)
        head.loss(x, samples(labels))["loss"].backward()
        head.optimizer.step()
    head.load_state_dict(state)
    assert head.settled_weight().equal(state["weight"])


def test_a_copy_and_a_pickle_have_rows_up_to_date_and_know_that_they_are_shards() -> None:
    head, _ = lazy_run()
    del head.optimizer
    copied = copy.deepcopy(head)
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copied, loaded):
        assert other.weight.equal(head.settled_weight())
        assert sharding_of(other.weight) == head.sharding


def test_a_loss_in_inference_mode_does_not_spoil_training() -> None:
    head = ShardedHead(30, 4)
    with torch.inference_mode():
        head.loss(torch.randn(2, 4), samples([1, 2]))
    head.loss(torch.randn(2, 4), samples([1, 2]))["loss"].backward()
    assert head.weight.grad is not None


def test_features_without_labels_are_not_dropped() -> None:
    with pytest.raises(ValueError, match="4 features for 2 data samples"):
        ShardedHead(30, 4).loss(torch.randn(4, 4), samples([1, 2]))
    twice = ClsDataSample().set_gt_label([1, 2])
    with pytest.raises(ValueError, match="1 data samples have 2 labels"):
        ShardedHead(30, 4).loss(torch.randn(1, 4), [twice])


def test_a_full_loss_after_lazy_steps_sees_rows_up_to_date() -> None:
    head, _ = lazy_run()
    x, labels = batch(4, 40, 6, 99)
    head.selector = None
    loss = head.loss(x, samples(labels))["loss"]
    assert loss.equal(head.loss(x, samples(labels))["loss"])
    logits = 32.0 * F.normalize(x) @ F.normalize(class_weights(head)).T
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor(labels)))
