"""The wheel and the metadata: what travels, and that it is found when the checkout is nowhere near."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from alimm.extras import EXTRAS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Modules of extras that the tested environment may lack, with the distribution that brings them.
ELSEWHERE = {"ray": "ray", "faiss": "faiss-gpu", "numba_cuda": "numba-cuda"}


def run(*command: str | os.PathLike[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that a build that litters the sources is seen."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("alimm", "configs", "ops", "projects", "tools", *(p.name for p in ROOT.iterdir() if p.is_file())):
        run("cp", "-r", ROOT / name, source, check=True)
    before = listing(source)
    done = run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    new = {name for name in listing(source) - before if not re.match(r"build/|alimm\.egg-info/", name)}
    assert not new, f"the build wrote into the sources: {sorted(new)}"
    (built,) = folder.glob("alimm-*.whl")
    return built


def listing(folder: Path) -> set[str]:
    """Files below the folder, links not followed."""
    return {
        str((Path(where) / name).relative_to(folder)) for where, _, names in os.walk(folder) for name in names
    }  # fmt: skip


def sources(folder: str) -> set[str]:
    """Files of a folder of the checkout, less what tools leave behind."""
    return {
        f"{folder}/{name}"
        for name in listing(ROOT / folder)
        if not re.search(r"(^|/)(__pycache__|\.[^/]+|work_dirs|[^/]+\.egg-info)(/|$)|\.pyc$", name)
    }


def test_the_wheel_holds_everything(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"alimm/.mim/{name}" for name in sources("configs") | sources("tools")}
    for name in sources("projects"):
        is_module = name.endswith(".py") and "/configs/" not in name
        expected.add(f"alimm/{name}" if is_module else f"alimm/.mim/{name}")
    expected |= {name for name in sources("alimm") if not name.startswith("alimm/projects/")}
    expected |= {name.removeprefix("ops/") for name in sources("ops")}
    if (ROOT / "model-index.yml").is_file():
        expected.add("alimm/.mim/model-index.yml")
    missing = {name for name in expected - names if "/tools/setup/" not in name}
    assert missing == set()
    assert {"alimm/projects/example_project/__init__.py", "alimm/.mim/projects/example_project/README.md"} <= names


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"alimm", "alimm_ops", f"alimm-{version()}.dist-info"}
    litter = [name for name in names if re.search(r"__pycache__|\.pyc$|/\.(?!mim/)|work_dirs|(^|/)tests/", name)]
    assert litter == []


def version() -> str:
    scope: dict[str, str] = {}
    exec((ROOT / "alimm" / "version.py").read_text(), scope)
    return scope["__version__"]


def test_an_installed_wheel_finds_its_configs_tools_and_projects(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    done = run(
        sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    probe = f"""
import sys
sys.path = [p for p in sys.path if p and not p.startswith({str(ROOT)!r} + "/ops") and p != {str(ROOT)!r}]
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
sys.path.insert(0, {str(target)!r})
import alimm, alimm_ops, alimm.projects
from alimm.paths import resource_root
root = resource_root()
assert root == __import__("pathlib").Path({str(target)!r}).resolve() / "alimm" / ".mim", root
assert (root / "configs").is_dir() and (root / "tools").is_dir()
assert (root / "projects" / "example_project" / "metafile.yml").is_file()
for module in (alimm, alimm_ops, alimm.projects):
    assert module.__file__.startswith({str(target)!r}), module.__file__
from importlib.metadata import distribution
points = distribution("alimm").entry_points
for point in points.select(group="alimm.plugins"):
    assert point.load().__file__.startswith({str(target)!r}), point
from alimm.registry import HOOKS
assert HOOKS.get("alimm.ClassCoverageHook").__name__ == "ClassCoverageHook"
print("found")
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = run(sys.executable, "-c", probe, cwd=tmp_path, env=environment)
    assert done.stdout.endswith("found\n"), done.stdout + done.stderr


def test_importing_the_kernels_needs_no_framework() -> None:
    code = "import sys, alimm_ops; print([m for m in ('torch', 'mmengine', 'alimm') if m in sys.modules])"
    done = run(sys.executable, "-c", code, env=os.environ | {"PYTHONPATH": str(ROOT / "ops")})
    assert done.stdout.strip() == "[]", done.stderr


def test_every_project_has_its_entry_point() -> None:
    folders = {path.parent.name for path in ROOT.glob("projects/*/__init__.py")}
    points = PROJECT["entry-points"]["alimm.plugins"]
    assert points == {name: f"alimm.projects.{name}" for name in folders}


def test_every_project_has_its_readme_and_metafile() -> None:
    for folder in (path.parent for path in ROOT.glob("projects/*/__init__.py")):
        headings = re.findall(r"^## (.+)$", (folder / "README.md").read_text(), re.MULTILINE)
        assert headings[:5] == ["What it does", "Use it", "Results", "Sources", "Limits"], folder.name
        assert (folder / "metafile.yml").is_file(), folder.name


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_extra_brings_the_modules_that_the_core_names_it_for(extra: str) -> None:
    brought = {canonicalize_name(Requirement(line).name) for line in PROJECT["optional-dependencies"][extra]}
    installed = packages_distributions()
    for module in EXTRAS[extra]:
        distributions = installed.get(module, [ELSEWHERE.get(module, module)])
        assert brought & {canonicalize_name(name) for name in distributions}, f"{extra} does not bring {module}"


def test_all_means_all() -> None:
    extras = dict(PROJECT["optional-dependencies"])
    (everything,) = extras.pop("all")
    assert Requirement(everything).extras == set(extras) - {"gpu-search"}, "faiss-gpu and faiss-cpu share their files"


def pins(python: str) -> dict[str, str]:
    """Distribution -> pinned version for a Python such as '3.10'; each at most once."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            found[name] = re.fullmatch(r"==([^=,]+)", str(requirement.specifier)).group(1)
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_dependency_is_pinned_within_its_range(python: str) -> None:
    locked = pins(python)
    lines = PROJECT["dependencies"] + [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, lines):
        if requirement.name != "alimm":
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_the_tested_environment_is_the_pinned_one() -> None:
    locked = pins(f"{sys.version_info[0]}.{sys.version_info[1]}")
    done = run(sys.executable, "-m", "pip", "list", "--format=freeze", check=True)
    installed = {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in done.stdout.split())}
    wrong = {n: v for n, v in installed.items() if n in locked and v.split("+")[0] != locked[n]}
    assert wrong == {}, "installed otherwise than pinned"
    assert set(installed) - set(locked) - {"alimm", "pip"} == set(), "installed but not pinned"


# ---- the set-up's own messages ----


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of a checkout as the set-up reads before it starts."""
    folder = tmp_path / "checkout"
    for name in ("constraints.txt", "pyproject.toml", "setup.py", "alimm/version.py", "tools/setup"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        run("cp", "-r", ROOT / name, folder / name, check=True)
    return folder


def bootstrap(folder: Path, programs: dict[str, str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the set-up with a PATH that holds the plain tools and the given programs only."""
    path = folder.parent / "bin"
    path.mkdir()
    for tool in ("bash", "cat", "dirname", "sed", "head", "tail", "mkdir", "rm", "mv", "uname", "grep"):
        (path / tool).symlink_to(next(p for d in ("/bin", "/usr/bin") if (p := Path(d, tool)).exists()))
    for name, body in programs.items():
        (path / name).write_text(f"#!/bin/bash\n{body}\n")
        (path / name).chmod(0o755)
    return run("/bin/bash", folder / "tools/setup/bootstrap.sh", env={"PATH": str(path), **environment}, timeout=60)


def python_like(version: str) -> str:
    """A program that answers the set-up's questions as a complete Python of that version."""
    fit = "3.10" <= version <= "3.12"
    return f"if [[ $1 == -c ]]; then echo {version}; exit {0 if fit else 1}; else [[ $1 == - ]] && cat >/dev/null; fi"


def test_setup_names_everything_that_is_missing_at_once(checkout: Path) -> None:
    done = bootstrap(checkout, {"python3": python_like("3.13"), "python": "exit 127"})
    assert done.returncode == 1
    assert "Python 3.10, 3.11 or 3.12 is missing (found: 3.13 (" in done.stderr
    for package in (
        "apt install python3.11 python3.11-venv",
        "apt install g++",
        "dnf install gcc-c++",
        "apt install git",
    ):
        assert package in done.stderr
    assert not (checkout / ".venv").exists()


def test_setup_passes_over_a_shim_that_does_not_run(checkout: Path) -> None:
    shim = "echo 'python3.11: command not found' >&2; exit 127"
    headless = python_like("3.12").replace("cat >/dev/null", "{ cat >/dev/null; echo headers; }")
    done = bootstrap(checkout, {"python3.11": shim, "python3": headless, "git": "cat >/dev/null", "c++": "exit 0"})
    assert done.returncode == 1
    assert "Python.h" in done.stderr
    assert "apt install python3.12-dev" in done.stderr
    assert "dnf install python3.12-devel" in done.stderr
    assert "compiler" not in done.stderr


def test_setup_refuses_the_wrong_python_that_was_named(checkout: Path) -> None:
    done = bootstrap(checkout, {"python3.9": python_like("3.09"), "git": "exit 0", "c++": "exit 0"}, PYTHON="python3.9")
    assert done.returncode == 1
    assert "PYTHON='python3.9' must be Python 3.10, 3.11 or 3.12; it is 3.09" in done.stderr


def test_setup_refuses_an_unknown_build_of_torch(checkout: Path) -> None:
    done = bootstrap(checkout, {}, ALIMM_TORCH="rocm")
    assert done.returncode == 1
    assert "ALIMM_TORCH must be 'cpu' or 'cuda', got 'rocm'" in done.stderr


def test_setup_refuses_a_path_with_a_space(checkout: Path) -> None:
    moved = checkout.rename(checkout.with_name("my checkout"))
    done = bootstrap(moved, {})
    assert done.returncode == 1
    assert "contains a space" in done.stderr


def test_a_step_that_fails_leaves_no_stamp_and_names_its_log(checkout: Path) -> None:
    broken = python_like("3.11") + '; [[ "$*" == "-m venv "* ]] && { echo "no space left on device"; exit 1; }; exit 0'
    done = bootstrap(checkout, {"python3.11": broken, "git": "cat >/dev/null; echo 1", "c++": "exit 0"})
    assert done.returncode == 1, done.stdout
    assert "stopped at the step 'virtual environment'" in done.stderr
    assert "no space left on device" in done.stderr
    assert (checkout / ".setup/log/venv.log").is_file()
    assert not (checkout / ".venv/alimm-setup.stamp").exists()
