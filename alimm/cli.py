"""The command ``alimm``: one table of sub-commands, each imported when it is called.

Installed plugins bring further ones: entry points of the group ``alimm.commands``, each ``name = "module:function"``.
``alimm --help`` and ``alimm list`` import neither torch nor mmengine, nor a plugin.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from alimm.version import __version__

COMMANDS: dict[str, tuple[str, str, str]] = {
    "train": ("alimm.apis.train", "main", "train what a config describes"),
    "test": ("alimm.apis.test", "main", "test a checkpoint"),
    "list": ("alimm.cli", "list_models", "list the models of the zoo and the methods"),
    "download": ("alimm.cli", "download", "fetch the checkpoint of a model and check it"),
    "doctor": ("alimm.doctor", "main", "print the environment, what works and how to mend what does not"),
    "print-config": ("alimm.analysis.print_config", "main", "print a config, or how two differ"),
    "browse-dataset": ("alimm.analysis.browse_dataset", "main", "draw samples as the model gets them"),
    "analyze-logs": ("alimm.analysis.analyze_logs", "main", "plot the curves of one or more runs"),
    "confusion-matrix": ("alimm.analysis.confusion_matrix", "main", "compute and draw a confusion matrix"),
    "get-flops": ("alimm.analysis.get_flops", "main", "count parameters and operations of a model"),
    "advise": ("alimm.analysis.advise", "main", "what a classifier of very many classes costs, by method"),
    "publish-model": ("alimm.analysis.publish_model", "main", "make a checkpoint of weights only, named by its digest"),
    "merge-shards": ("alimm.analysis.merge_shards", "main", "make one file of a checkpoint with shards, or import one"),
}
"""Sub-command -> module, function ``(argv) -> exit code``, help."""

COMMAND_GROUP = "alimm.commands"


def plugin_commands() -> dict[str, tuple[str, str, str]]:
    """The sub-commands of installed plugins, as in ``COMMANDS``; nothing of a plugin is imported.

    The help of one is the first line of its module's docstring. A command of alimm itself is never replaced.
    """
    from importlib.metadata import entry_points

    points = sorted(entry_points(group=COMMAND_GROUP), key=lambda point: point.name)
    return {
        point.name: (point.module, point.attr, _summary(point.module)) for point in points if point.name not in COMMANDS
    }


def _summary(module: str) -> str:
    """First line of the docstring of a module that is found, but not imported."""
    locations: Sequence[str] | None = None
    parts = module.split(".")
    try:
        for count in range(1, len(parts) + 1):
            # Not importlib.util.find_spec: that imports the packages around the module.
            name = ".".join(parts[:count])
            specs = (finder.find_spec(name, locations) for finder in sys.meta_path if hasattr(finder, "find_spec"))
            spec = next(filter(None, specs))
            locations = spec.submodule_search_locations
        doc = ast.get_docstring(ast.parse(Path(str(spec.origin)).read_bytes())) or ""
    except (StopIteration, KeyError, ImportError, OSError, ValueError, SyntaxError):
        return f"(of {module}, which is not found)"
    line = doc.partition("\n")[0].rstrip(".")
    return line[:1].lower() + line[1:]


def _parser(commands: dict[str, tuple[str, str, str]]) -> argparse.ArgumentParser:
    width = max(map(len, commands))
    table = "\n".join(f"  {name:<{width}}  {text}" for name, (_, _, text) in commands.items())
    parser = argparse.ArgumentParser(
        prog="alimm",
        description="Large-scale visual recognition and search as plugins for MMEngine.",
        epilog=f"commands:\n{table}\n\n`alimm COMMAND --help` explains one command. "
        "ALIMM_DEBUG=1 shows the traceback of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"alimm {__version__}")
    parser.add_argument("command", choices=list(commands), metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its options")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; return its exit code, 2 for a mistake of the user."""
    words = sys.argv[1:] if argv is None else list(argv)
    # Looking for plugins takes a while: not where the command is one of ours.
    commands = COMMANDS if words and words[0] in COMMANDS else {**COMMANDS, **plugin_commands()}
    parsed = _parser(commands).parse_args(words)
    module, function, _ = commands[parsed.command]
    return run_guarded(module, function, parsed.arguments)


def run_guarded(module: str, function: str, arguments: Sequence[str] | None) -> int:
    """Call ``module.function(arguments)``; tell a user's mistake in a sentence, without a traceback.

    With ``ALIMM_DEBUG=1`` the exception goes through.
    """
    try:
        code = int(getattr(import_module(module), function)(arguments) or 0)
        sys.stdout.flush()
        return code
    except (ValueError, FileNotFoundError, ImportError) as error:
        if os.environ.get("ALIMM_DEBUG") == "1":
            raise
        print(f"alimm: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Who read the output has enough, as `head` does. Python would complain again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("alimm: interrupted", file=sys.stderr)
        return 130


def list_models(argv: Sequence[str] | None = None) -> int:
    """``alimm list``: the models of the zoo, then the methods."""
    from alimm.zoo.index import list_models as names
    from alimm.zoo.index import load_index

    parser = argparse.ArgumentParser(prog="alimm list", description="List the models of the zoo and the methods.")
    parser.add_argument("pattern", nargs="?", default="*", help="show only names that match, as *r18*")
    pattern = parser.parse_args(argv).pattern
    index = load_index()
    chosen = [index[name] for name in names(pattern)]
    print("models" if chosen else f"models: none matches {pattern}" if index else "models: none yet")
    rows = [("name", "method", "weights", "config")]
    rows += [(m.name, m.collection, _size(m.size) if m.weights else "-", m.config) for m in chosen]
    if chosen:
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        for row in rows:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("methods")
    for name, summary in methods():
        print(textwrap.fill(f"{name}: {summary}", 100, initial_indent="  ", subsequent_indent="      "))
    return 0


def _size(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.1f} MB"


def methods() -> list[tuple[str, str]]:
    """The projects of this installation: name, and the first heading of the README."""
    from alimm.paths import PACKAGE, resource_root

    for folder in (resource_root() / "projects", PACKAGE / "projects"):
        readmes = sorted(folder.glob("*/README.md"))
        if readmes:
            return [(readme.parent.name, _heading(readme)) for readme in readmes]
    return []


def _heading(readme: Path) -> str:
    with readme.open(encoding="utf-8") as file:
        return next((line.lstrip("# ").strip() for line in file if line.startswith("#")), "")


def download(argv: Sequence[str] | None = None) -> int:
    """``alimm download``: fetch a checkpoint, check it, print where it is."""
    from alimm.zoo.download import DownloadError
    from alimm.zoo.download import download as fetch

    parser = argparse.ArgumentParser(prog="alimm download", description="Fetch the checkpoint of a model and check it.")
    parser.add_argument("name", help="a name that `alimm list` prints")
    parser.add_argument("--dest", type=Path, help="also copy it into this folder")
    arguments = parser.parse_args(argv)
    try:
        print(fetch(arguments.name, arguments.dest))
    except DownloadError as error:
        print(f"alimm: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
