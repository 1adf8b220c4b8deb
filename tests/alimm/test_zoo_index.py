"""The model index: what is read, what is refused, what the checked-in index holds."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alimm.paths import resource_root
from alimm.zoo.index import get_entry, is_model_name, list_models, load_index, validate_index

WEIGHTS = b"not really weights"
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()
LOCAL = f"projects/toy/checkpoints/toy_r18_20260101-{DIGEST[:8]}.pth"


def metafile():
    return {
        "Collections": [
            {
                "Name": "Toy",
                "README": "projects/toy/README.md",
                "License": "Apache-2.0",
                "Metadata": {"Training Data": ["A", "B"]},
            }
        ],
        "Models": [
            {
                "Name": "toy_r18",
                "In Collection": "Toy",
                "Config": "configs/toy/toy_r18.py",
                "Weights": LOCAL,
                "Weights SHA256": DIGEST,
                "Weights Size": len(WEIGHTS),
                "Command": "python tools/train.py configs/toy/toy_r18.py",
                "Results": [
                    {
                        "Task": "Image Classification",
                        "Dataset": "A",
                        "Metrics": {"top1": 52.5},
                        "Device": "CPU",
                        "Date": "2026-01-01",
                        "Seed": 0,
                    }
                ],
            },
            {"Name": "toy_r50", "In Collection": "Toy", "Config": "configs/toy/toy_r50.py"},
        ],
    }


def write(root: Path, content) -> Path:
    for name in ("configs/toy/toy_r18.py", "configs/toy/toy_r50.py", "projects/toy/README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    (root / LOCAL).parent.mkdir(parents=True, exist_ok=True)
    (root / LOCAL).write_bytes(WEIGHTS)
    (root / "projects/toy/metafile.yml").write_text(yaml.safe_dump(content))
    (root / "model-index.yml").write_text(yaml.safe_dump({"Import": ["projects/toy/metafile.yml"]}))
    return root


def test_reads_models_and_inherits_from_the_collection(tmp_path):
    entry = load_index(write(tmp_path, metafile()))["toy_r18"]
    assert entry.weights == (LOCAL,)
    assert entry.weights_name == LOCAL.rsplit("/", 1)[1]
    assert (entry.license, entry.training_data, entry.size) == ("Apache-2.0", "A, B", len(WEIGHTS))
    assert entry.readme == "projects/toy/README.md"
    assert entry.config_path == tmp_path / "configs/toy/toy_r18.py"
    assert entry.results[0].metrics == {"top1": 52.5}
    assert (entry.results[0].device, entry.results[0].seed) == ("CPU", 0)


@pytest.mark.parametrize(
    ("pattern", "pretrained", "expected"),
    [
        ("*", False, ["toy_r18", "toy_r50"]),
        ("*", True, ["toy_r18"]),
        ("*_r5?", False, ["toy_r50"]),
        ("toy_r50", False, ["toy_r50"]),
        ("toy_r50", True, []),
        ("absent*", False, []),
    ],
)
def test_list_models(tmp_path, pattern, pretrained, expected):
    assert list_models(pattern, pretrained, root=write(tmp_path, metafile())) == expected


@pytest.mark.parametrize("name", ["toy-r18", "TOY_R18", "r18"])
def test_an_unknown_name_lists_near_matches(tmp_path, name):
    root = write(tmp_path, metafile())
    with pytest.raises(ValueError, match=rf"no model named '{name}'.*toy_r18"):
        get_entry(name, root)
    with pytest.raises(ValueError, match="Did you mean"):
        list_models(name, root=root)


def test_an_unlike_name_is_not_answered_with_a_guess(tmp_path):
    with pytest.raises(ValueError, match="alimm list"):
        get_entry("zzzzzz", write(tmp_path, metafile()))


def test_a_valid_index_has_no_faults(tmp_path):
    assert validate_index(write(tmp_path, metafile())) == []


def change(key, value):
    def apply(root, content):
        content["Models"][0][key] = value

    return apply


def drop_result_key(key):
    def apply(root, content):
        del content["Models"][0]["Results"][0][key]

    return apply


def remove(name):
    return lambda root, content: (root / name).unlink()


@pytest.mark.parametrize(
    ("mutate", "fault"),
    [
        (remove("configs/toy/toy_r18.py"), "config configs/toy/toy_r18.py does not exist"),
        (remove("projects/toy/README.md"), "README projects/toy/README.md does not exist"),
        (remove(LOCAL), "weights .* do not exist"),
        (lambda root, content: (root / LOCAL).write_bytes(b"x" * len(WEIGHTS)), "has the sha256"),
        (lambda root, content: (root / LOCAL).write_bytes(WEIGHTS + b"x"), "bytes, Weights Size says"),
        (change("Weights SHA256", DIGEST[:-1]), "64 lower-case hex digits"),
        (change("Weights SHA256", "0" * 64), "not the first eight"),
        (change("Weights", "projects/toy/toy.pth"), "eight hex digits"),
        (change("Weights", [LOCAL, f"https://example.org/other-{DIGEST[:8]}.pth"]), "every mirror"),
        (change("In Collection", "Other"), "collection is not declared"),
        (change("Config", "configs/toy/toy_r50.py"), "differs from the stem"),
        (change("Command", ""), "no Command"),
        (change("Weights Size", None), "no Weights Size"),
        (drop_result_key("Device"), "needs Metrics, Device, Date and Seed"),
        (drop_result_key("Seed"), "needs Metrics, Device, Date and Seed"),
        (lambda root, content: (root / "configs/toy/metafile.yml").write_text("Models: []"), "not imported"),
    ],
)
def test_each_fault_is_found(tmp_path, mutate, fault):
    content = metafile()
    write(tmp_path, content)
    mutate(tmp_path, content)
    (tmp_path / "projects/toy/metafile.yml").write_text(yaml.safe_dump(content))
    problems = validate_index(tmp_path)
    assert len(problems) >= 1
    assert any(re.search(fault, problem) for problem in problems), problems


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"Models": [{"Name": "a"}]}, "lacks Config"),
        ({"Models": [{"Name": "a", "Config": "c"}, {"Name": "a", "Config": "c"}]}, "is in .* already"),
        ({"Models": {"Name": "a"}}, "list of mappings"),
        ({"Models": [{"Name": "a", "Config": "c", "Weights Size": "1 MB"}]}, "number of bytes"),
    ],
)
def test_a_malformed_metafile_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_index(write(tmp_path, content))


def test_broken_or_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"model-index\.yml, which does not exist"):
        load_index(tmp_path)
    (tmp_path / "model-index.yml").write_text("Import: [")
    with pytest.raises(ValueError, match=r"model-index\.yml is not valid YAML"):
        load_index(tmp_path)
    (tmp_path / "model-index.yml").write_text("Import: [gone.yml]")
    with pytest.raises(ValueError, match=r"gone\.yml, which does not exist"):
        load_index(tmp_path)


def test_the_checked_in_index_is_valid():
    assert validate_index(resource_root()) == []


def test_reading_the_index_imports_neither_torch_nor_mmengine():
    code = (
        "import sys, alimm.zoo; alimm.zoo.load_index(); "
        "sys.exit(bool({'torch', 'mmengine', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("emoji_r18", True), ("configs/a.py", False), ("a.py", False), ("mmdet::a", False), ("configs/a", False)],
)
def test_what_counts_as_a_name(spec, expected):
    assert is_model_name(spec) is expected
