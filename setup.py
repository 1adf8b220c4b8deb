"""What ``pyproject.toml`` cannot say: where the packages lie, and which plain files travel in a wheel.

``alimm.projects`` lies in ``projects/`` and ``alimm_ops`` in ``ops/``. Configs, tools and the projects' own files go to
``alimm/.mim``, where MIM, MMEngine's inferencers and ``alimm.paths`` look for them in an installed package. They are
copied into the build folder only; an editable install reads them from the checkout.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LITTER = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "work_dirs")


def _project_files(folder: str, names: list[str]) -> set[str]:
    """What of a project does not go to .mim: litter, and its modules, which are installed as a package."""
    ignored = set(LITTER(folder, names))
    if "configs" not in Path(folder).relative_to(ROOT / "projects").parts:
        ignored.update(name for name in names if name.endswith((".py", ".pyi", ".typed")))
    return ignored


class BuildWithMim(build_py):
    """Build as usual, then fill ``alimm/.mim`` of the build folder."""

    def run(self) -> None:
        """Copy packages, then configs, tools, the model index and the projects' other files."""
        super().run()
        if self.editable_mode:
            return
        mim = Path(self.build_lib) / "alimm" / ".mim"
        shutil.rmtree(mim, ignore_errors=True)
        for name in ("configs", "tools"):
            shutil.copytree(ROOT / name, mim / name, ignore=LITTER)
        shutil.rmtree(mim / "tools" / "setup")  # sets up a checkout, of no use elsewhere
        shutil.copytree(ROOT / "projects", mim / "projects", ignore=_project_files)
        for folder in sorted(mim.rglob("*"), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if (ROOT / "model-index.yml").is_file():
            shutil.copy2(ROOT / "model-index.yml", mim)


core = ["alimm", *(f"alimm.{name}" for name in find_packages("alimm", exclude=["projects", "projects.*"]))]
projects = ["alimm.projects", *(f"alimm.projects.{name}" for name in find_packages("projects"))]
ops = find_packages("ops")

setup(
    packages=core + projects + ops,
    package_dir={
        "alimm": "alimm",
        "alimm.projects": "projects",
        **{name: "ops/" + name.replace(".", "/") for name in ops},
    },
    package_data={"": ["py.typed", "assets/**/*", "templates/**/*"]},
    include_package_data=False,
    exclude_package_data={"": ["*.pyc"]},
    cmdclass={"build_py": BuildWithMim},
    zip_safe=False,
)
