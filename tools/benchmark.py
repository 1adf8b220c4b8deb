"""Run a benchmark: what it measures, on what machine, and whether its claims are met.

    python tools/benchmark.py NAME [--quick] [--json FILE] [options of the benchmark]

NAME is a file under ``tools/benchmarks/``; without one the names are listed. The exit code is 1 where a claim is not
met. ``--quick`` ends within a minute on two cores and tests the machinery: it judges no claim.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from alimm.apis.train import check_work_dir
from alimm.cli import run_guarded
from alimm.report.benchmark import Outcome, environment, show

FOLDER = Path(__file__).resolve().parent / "benchmarks"


def names(folder: Path) -> list[str]:
    """The benchmarks there; a file whose name starts with ``_`` is a part of others."""
    return sorted(path.stem for path in folder.glob("*.py") if not path.name.startswith("_"))


def summary(path: Path) -> str:
    """First line of a benchmark's docstring, without importing it."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def load(name: str, folder: Path) -> ModuleType:
    """Import a benchmark.

    Raises:
        ValueError: there is none of that name; the message lists them.
    """
    known = names(folder)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no benchmark {name!r}.{hint} There are: {', '.join(known) or 'none'}")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # benchmarks share modules, and so do the processes that they start
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main(argv: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Run the benchmark that is named; 0 where its claims are met, 2 for a mistake of the user."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        description="Run a benchmark and judge its claims.",
        epilog=f"benchmarks: {', '.join(names(folder))}. `benchmark.py NAME --help` explains one.",
    )
    parser.add_argument("name", nargs="?", help="a file under tools/benchmarks/; without one the names are listed")
    if not given:
        for name in names(folder):
            print(f"{name}: {summary(folder / f'{name}.py')}")
        return 0
    if given[0].startswith("-"):
        parser.parse_args(given)
        parser.error("the name of the benchmark comes first")
    module = load(given[0], folder)
    parser.description, parser.epilog = module.__doc__, None
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="try the machinery within a minute; judges no claim")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures, claims and machine there")
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)
    arguments = parser.parse_args(given)
    if arguments.json:
        # Before hours of work end with nothing saved.
        check_work_dir(str(arguments.json.resolve().parent))
    machine = environment()
    for key, value in machine.items():
        print(f"{key + ':':<14}{value}")
    sys.stdout.flush()
    outcome: Outcome = module.run(arguments)
    if arguments.json:
        options = {key: value for key, value in vars(arguments).items() if key not in ("name", "json")}
        record = {"name": arguments.name, "options": options, "environment": machine, **outcome.to_dict()}
        arguments.json.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    show(arguments.name, outcome, judged=not arguments.quick)
    return 0 if outcome.met or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(run_guarded("__main__", "main", None))
