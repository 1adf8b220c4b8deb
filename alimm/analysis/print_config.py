"""Print a config as it is after inheritance and overrides, or what differs between two."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from mmengine.config import Config, DictAction

from alimm.apis.config import load_config
from alimm.zoo.index import config_of

STYLES = {"+++": "bold", "---": "bold", "@@": "cyan", "+": "green", "-": "red"}
"""Start of a line of a diff -> its style; the first that fits counts."""


def diff(one: Config, other: Config, names: tuple[str, str]) -> list[str]:
    """Lines of a unified diff from ``one`` to ``other``, without line ends; empty if they mean the same."""
    texts = one.pretty_text.splitlines(), other.pretty_text.splitlines()
    return list(difflib.unified_diff(texts[0], texts[1], names[0], names[1], lineterm=""))


def _print_diff(lines: list[str]) -> None:
    from rich.console import Console

    # soft_wrap: a pipe gets each line whole, and `patch` can read it.
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for line in lines:
        console.print(line, style=next((style for mark, style in STYLES.items() if line.startswith(mark)), None))


def main(argv: list[str] | None = None) -> int:
    """Command line of ``tools/print_config.py``."""
    parser = argparse.ArgumentParser(prog="print_config.py", description="Print a whole config, or compare two.")
    parser.add_argument("config", metavar="CONFIG", help="path, package::path, or a model of the zoo")
    parser.add_argument("--diff", metavar="OTHER", help="print how to get from CONFIG to OTHER")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, help="changes to CONFIG (not to OTHER), key=value"
    )
    parser.add_argument("--save", type=Path, metavar="PATH", help="also write the whole CONFIG to a file")
    args = parser.parse_args(argv)
    try:
        config = load_config(config_of(args.config), args.cfg_options)
        if args.save is not None:
            args.save.parent.mkdir(parents=True, exist_ok=True)
            config.dump(args.save)
        if args.diff is None:
            print(config.pretty_text)
            return 0
        lines = diff(config, load_config(config_of(args.diff)), (args.config, args.diff))
    except (ValueError, OSError, ImportError) as error:
        print(f"print_config.py: {error}", file=sys.stderr)
        return 1
    if lines:
        _print_diff(lines)
    else:
        print(f"{args.config} and {args.diff} mean the same")
    return 0
