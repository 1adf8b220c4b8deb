"""Build, change, search and check an index of binary codes.

The command ``alimm index``: one table of sub-commands, each imported when it is called. None needs torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

_HERE = "alimm.projects.binary_graph"

COMMANDS: dict[str, tuple[str, str, str]] = {
    "build": (f"{_HERE}.cli_build", "build", "build an index of codes in .npy or Parquet files"),
    "add": (f"{_HERE}.cli_change", "add", "add rows to an index"),
    "delete": (f"{_HERE}.cli_change", "delete", "delete rows by their ids"),
    "search": (f"{_HERE}.cli_search", "search", "find the nearest rows of queries"),
    "serve-bench": (f"{_HERE}.cli_serve", "serve_bench", "measure speed and recall of searches"),
    "verify": (f"{_HERE}.cli_inspect", "verify", "check the files of an index, and mend its log"),
    "info": (f"{_HERE}.cli_inspect", "info", "print what an index holds"),
    "merge": (f"{_HERE}.cli_build", "merge", "take the rows of other indexes into one"),
    "compact": (f"{_HERE}.cli_build", "compact", "build everything anew as one segment, without what is deleted"),
    "hash": (f"{_HERE}.cli_hash", "hash_vectors", "make codes of float vectors"),
}
"""Sub-command -> module, function ``(argv) -> exit code``, help."""

_WORDS = (
    ("missing='ignore' deletes", "--missing ignore deletes"),
    (": close it there, or open the index with read_only=True", ": close it there, or wait for its end"),
    (": open the index with read_only=True", ": only search, serve-bench, info and verify work there"),
)
"""Advice for who writes Python -> the same for who types a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command of ``alimm index``; return its exit code.

    Raises:
        ValueError: a mistake of the user, or a folder, a disk or a memory that cannot be used.
    """
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {text}" for name, (_, _, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="alimm index",
        description="Build, change, search and check an index of binary codes.",
        epilog=f"commands:\n{table}\n\n`alimm index COMMAND --help` explains one command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its options")
    parsed = parser.parse_args(argv)
    module, function, _ = COMMANDS[parsed.command]
    try:
        return int(getattr(import_module(module), function)(parsed.arguments) or 0)
    except (FileNotFoundError, BrokenPipeError):
        raise
    except ValueError as error:
        text = str(error)
        for python, command in _WORDS:
            text = text.replace(python, command)
        if text == str(error):
            raise
        raise ValueError(text) from error
    except MemoryError as error:
        raise ValueError(f"there is not enough memory ({error}): ask for less at a time") from error
    except OSError as error:
        # No permission, a full disk: as good as a mistake of the user, and as little in need of a traceback.
        raise ValueError(str(error)) from error
