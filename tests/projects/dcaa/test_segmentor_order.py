"""Conditions are equal before DCAA: their order changes neither predictions nor what is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("mmseg")

from tests.projects.dcaa.tiny import NAMES, batch, read, teaching
from tests.projects.dcaa.tiny_segmentor import sgd


def relabelled(state: dict[str, Tensor], order: Sequence[int]) -> dict[str, Tensor]:
    """Weights of a model whose condition order[k] is the condition k of this one."""
    count, result = len(order), {}

    def blocks(value: Tensor) -> Tensor:
        pieces = value.split(8, dim=1)  # what a decoder, or the attention, gives
        result = list(pieces)
        for k, to in enumerate(order):
            result[to] = pieces[k]
        return torch.cat(result, dim=1)

    for name, value in state.items():
        parts = name.split(".")
        for place in ("branches", "classifiers", "discriminators"):
            if place in parts and int(parts[parts.index(place) + 1]) < count:
                at = parts.index(place) + 1
                parts[at] = str(order[int(parts[at])])
        if name.endswith(("attend.0.0.weight", "fuse.0.0.weight")):
            value = blocks(value)
        elif name.endswith("attend.1.weight"):
            value = value[[list(order).index(k) for k in range(count)]]
        result[".".join(parts)] = value.clone()
    return result


@pytest.mark.parametrize("stage", ["align", "self_train"])
def test_the_order_of_the_conditions_does_not_matter(stage: str) -> None:
    order = (2, 0, 1)
    names = tuple(NAMES[order.index(k)] for k in range(3))
    options: dict[str, Any] = dict(ambivalence_threshold="q50", pseudo_on="all", momentum=0.5)
    one, other = teaching(3, **options), teaching(names, seed=1, **options)
    one.enter_stage(stage)
    other.load_state_dict(relabelled(one.state_dict(), order))
    assert other.stage == stage
    data, other_data = batch((0, 1, 2), (2, 2, 1)), batch((0, 1, 2), (2, 2, 1))
    for domain in ("source", "target"):
        for sample in other_data[domain]["data_samples"]:
            sample.set_metainfo(dict(cond_id=order[sample.cond_id]))
    inputs = read(one, data).target.inputs
    torch.testing.assert_close(one(inputs), other(inputs), rtol=1e-4, atol=1e-5)
    logs, other_logs = (m.train_step(d, sgd(m, 0.01)) for m, d in ((one, data), (other, other_data)))
    assert logs.keys() == other_logs.keys()
    for name, value in logs.items():
        torch.testing.assert_close(value, other_logs[name], rtol=1e-4, atol=1e-5, msg=name)
    after, other_after = relabelled(one.state_dict(), order), other.state_dict()
    for name, value in after.items():
        torch.testing.assert_close(value, other_after[name], rtol=1e-3, atol=1e-5, msg=name)
