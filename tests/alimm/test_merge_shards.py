"""One file of a checkpoint with shards, a matrix for a search index, and InsightFace's files as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alimm.analysis.merge_shards import export_npy, import_insightface, main, merge
from alimm.apis.checkpoints import load_restricted
from alimm.apis.model import init_model
from alimm.distributed.blocks import read_index
from alimm.heads import ShardedHead
from tests.alimm.sharded_run import CLASSES, flip_a_weight, run_sharded, sharded_config


def class_rows(head: Any) -> torch.Tensor:
    return head.weight.detach()[head.permutation.rows(torch.arange(CLASSES))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run_sharded(str(folder), {"train_cfg.max_epochs": 1})
    return folder / "epoch_1.pth"


def test_a_merged_file_is_in_class_order_and_loads_everywhere(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.pth"
    assert main([str(trained), str(out)]) == 0
    expected = init_model(sharded_config(), trained)
    content = load_restricted(out)
    weight = content["state_dict"]["head.weight"]
    assert torch.equal(weight, class_rows(expected.head))
    assert not torch.equal(weight, expected.head.weight), "the head has its rows in another order"
    assert content.keys() == {"meta", "state_dict"}
    assert not [key for key in content["meta"] if key.startswith("alimm_")]
    assert content["meta"]["dataset_meta"]["classes"][0] == "class 0"
    again = init_model(sharded_config(), out)
    assert torch.equal(again.head.weight, expected.head.weight)
    assert torch.equal(again.body.weight, expected.body.weight)
    # Another order of rows, which the shards themselves refuse.
    other = init_model(sharded_config(**{"model.head.permute": "none"}), out)
    assert torch.equal(other.head.weight, weight)


def merge_and_load(path: str) -> tuple[int, torch.Tensor]:
    model = init_model(sharded_config(), path)
    return model.head.sharding.start, model.head.weight.detach()


def test_a_merged_file_loads_on_two_ranks(trained: Path, tmp_path: Path, gloo: Any) -> None:
    merge(trained, tmp_path / "merged.pth")
    parts = sorted(gloo.run(2, merge_and_load, str(tmp_path / "merged.pth")), key=lambda part: part[0])
    assert torch.equal(torch.cat([rows for _, rows in parts]), init_model(sharded_config(), trained).head.weight)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_matrix_for_a_search_index(trained: Path, tmp_path: Path, normalize: bool) -> None:
    export_npy(trained, tmp_path / "rows.npy", normalize)
    matrix = np.load(tmp_path / "rows.npy", mmap_mode="r")
    rows = class_rows(init_model(sharded_config(), trained).head).numpy()
    if normalize:
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(matrix, rows, rtol=1e-6 if normalize else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.npy"]


def test_what_cannot_be_merged_is_refused(trained: Path, tmp_path: Path, capsys: Any) -> None:
    merge(trained, tmp_path / "merged.pth")
    with pytest.raises(ValueError, match="complete as it is"):
        merge(tmp_path / "merged.pth", tmp_path / "again.pth")
    with pytest.raises(ValueError, match="does not exist"):
        merge(tmp_path / "none.pth", tmp_path / "again.pth")
    run_sharded(str(tmp_path / "run"), {"train_cfg.max_epochs": 1})
    flip_a_weight(tmp_path / "run" / "epoch_1.shards")
    assert main([str(tmp_path / "run" / "epoch_1.pth"), str(tmp_path / "out.pth")]) == 1
    assert "sha256" in capsys.readouterr().err
    assert main(["a.pth", "b.pth", str(tmp_path / "out.pth")]) == 1
    assert not (tmp_path / "out.pth").exists()


def test_files_of_insightface_become_a_checkpoint(tmp_path: Path) -> None:
    rows = torch.randn(CLASSES, 5, generator=torch.Generator().manual_seed(0))
    torch.save(rows[:4], tmp_path / "a.pt")
    torch.save({"weight": rows[4:7]}, tmp_path / "b.pt")
    torch.save({"epoch": 3, "state_dict_softmax_fc": {"weight": rows[7:]}}, tmp_path / "c.pt")
    files = [tmp_path / f"{name}.pt" for name in "abc"]
    assert main(["--insightface", *map(str, files), str(tmp_path / "imported.pth")]) == 0
    assert read_index(tmp_path / "imported.shards").num_rows == CLASSES
    model = init_model(
        sharded_config(**{"model.head.permute": "none", "model.head.seed": 0}), tmp_path / "imported.pth"
    )
    assert torch.equal(model.head.weight, rows)
    with pytest.raises(ValueError, match="permutation"):
        init_model(sharded_config(), tmp_path / "imported.pth")
    merge(tmp_path / "imported.pth", tmp_path / "merged.pth")
    assert torch.equal(class_rows(init_model(sharded_config(), tmp_path / "merged.pth").head), rows)

    with pytest.raises(ValueError, match="exists"):
        import_insightface(files, tmp_path / "imported.pth")
    torch.save(torch.randn(3, 6), tmp_path / "wide.pt")
    with pytest.raises(ValueError, match="not of one classifier"):
        import_insightface([*files, tmp_path / "wide.pt"], tmp_path / "other.pth")
    torch.save({"a.weight": rows, "b.weight": rows}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="no classifier"):
        import_insightface([tmp_path / "two.pt"], tmp_path / "other.pth")


def test_the_head_of_the_import_may_be_the_model(tmp_path: Path) -> None:
    torch.save(torch.ones(3, 2), tmp_path / "a.pt")
    import_insightface([tmp_path / "a.pt"], tmp_path / "imported.pth", head="")
    merge(tmp_path / "imported.pth", tmp_path / "merged.pth")
    head = ShardedHead(3, 2)
    head.load_state_dict(load_restricted(tmp_path / "merged.pth")["state_dict"], strict=False)
    assert torch.equal(head.weight, torch.ones(3, 2))
