"""Which condition a picture was taken in: from its folder, its name, a list, or clusters of the pictures' style.

A rule is a dict. Its ``type`` says where the condition stands:

    dict(type='folder', level=-2)                   part of the path; -2 is the folder that the picture lies in
    dict(type='folder', level=0)                    counted from the root of the pictures: 0 is the first folder
    dict(type='regex', pattern='_(?P<condition>fog|rain)_')   a named group, searched in the path below the root
    dict(type='list', file='conditions.csv')        path or stem, condition; .csv, .json or text; or mapping={...}
    dict(type='constant', condition='clear')        the same for all
    dict(type='clusters', k=4, file='styles.json')  nobody knows: group the pictures by style, see ``clustering``

and every rule may have

    rename={'foggy': 'fog'}       other names for what was found, so that several sets agree
    unknown='error' | 'skip'      a picture without a condition, or with one that was not asked for
    unused='error' | 'allow'      a condition that was asked for and that no picture has
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

Paths = Sequence[str]
Found = list[str | None]

COMMON_KEYS = ("type", "rename", "unknown", "unused")
UNDEFINED = ("", "undefined", "unknown")
"""What a list says of a picture whose condition it does not know."""


def few(names: Sequence[str], shown: int = 3) -> str:
    """The first names, for a message."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def resolve_conditions(
    paths: Paths,
    rule: Mapping[str, Any],
    conditions: Sequence[str] | None = None,
    root: str | os.PathLike[str] = "",
) -> tuple[Found, tuple[str, ...]]:
    """Find the condition of each picture.

    Args:
        paths: of the pictures.
        rule: where the condition stands, see the head of this file.
        conditions: the names in the order of their ids; None takes those found, sorted.
        root: the folder of the pictures; what lies above it says nothing about them.

    Returns:
        The name for each path, None where the rule says to skip it, and the names in the order of their ids.

    Raises:
        ValueError: the rule is wrong, a picture has no condition or one not in ``conditions``, or no picture has one
            of ``conditions``. The message names the first of them and how to mend it.
    """
    kind = rule.get("type")
    if kind not in RULES:
        raise ValueError(f"condition rule: type must be one of {', '.join(RULES)}, got {kind!r}")
    find, keys = RULES[kind]
    if wrong := sorted(set(rule) - {*keys, *COMMON_KEYS}):
        raise ValueError(f"condition rule of type {kind!r} does not know {few(wrong)}; its keys are {', '.join(keys)}")
    skip = _choice(rule, "unknown", ("error", "skip")) == "skip"
    allow = _choice(rule, "unused", ("error", "allow")) == "allow"
    rename = rule.get("rename", {})
    found = [name if name is None else str(rename.get(name, name)) for name in find(paths, rule, root)]
    if not skip:
        _check_known(paths, found, kind)
    if conditions is None:
        if kind == "clusters":  # all of them, also where these pictures show some styles only
            return found, tuple(dict.fromkeys(str(rename.get(name, name)) for name in _cluster_names(int(rule["k"]))))
        return found, tuple(sorted({name for name in found if name is not None}))
    names = check_names(conditions)
    foreign = [(path, name) for path, name in zip(paths, found, strict=True) if name is not None and name not in names]
    if foreign and not skip:
        raise ValueError(
            f"{len(foreign)} of {len(paths)} pictures have a condition that is not among {', '.join(names)}: "
            f"{few([f'{path} ({name!r})' for path, name in foreign])}. Add the name to conditions, give it another one "
            f"with rename={{...}}, or leave such pictures out with unknown='skip' in the rule"
        )
    found = [name if name in names else None for name in found]
    if (unused := [name for name in names if name not in found]) and not allow:
        raise ValueError(
            f"no picture has the condition {few(unused)}; {len(paths)} pictures were looked at"
            f"{', such as ' + paths[0] if paths else ''}. Mend the name or the rule, remove it from conditions, or set "
            f"unused='allow' in the rule"
        )
    return found, names


def check_names(conditions: Sequence[str]) -> tuple[str, ...]:
    """The names of conditions as a tuple.

    Raises:
        ValueError: they are one text, none, or one of them is empty or stands twice.
    """
    if isinstance(conditions, str):
        raise ValueError(f"conditions must be a list of names, got the text {conditions!r}: write [{conditions!r}]")
    names = tuple(conditions)
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError(f"conditions must be different names, at least one, got {list(names)!r}")
    return names


def below(path: str, root: str | os.PathLike[str]) -> PurePath:
    """The path as seen from the root, or itself where it does not lie there."""
    pure = PurePath(path)
    return pure.relative_to(root) if os.fspath(root) and pure.is_relative_to(root) else pure


def _choice(rule: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str:
    value = rule.get(key, choices[0])
    if value not in choices:
        raise ValueError(f"condition rule: {key} must be one of {', '.join(choices)}, got {value!r}")
    return str(value)


def _check_known(paths: Paths, found: Found, kind: str) -> None:
    missing = [path for path, name in zip(paths, found, strict=True) if name is None]
    if missing:
        raise ValueError(
            f"the condition rule of type {kind!r} finds no condition for {len(missing)} of {len(paths)} pictures: "
            f"{few(missing)}. {MENDS[kind]}, or leave them out with unknown='skip' in the rule"
        )


MENDS = {
    "folder": "Set level so that it names the folder of the condition",
    "regex": "Mend the pattern",
    "list": "Add them to the list",
    "constant": "Name the condition",
    "clusters": "Replace pictures that cannot be read",
}


def _needed(rule: Mapping[str, Any], key: str) -> Any:
    if key not in rule:
        raise ValueError(f"condition rule of type {rule['type']!r} needs {key!r}, got {dict(rule)!r}")
    return rule[key]


def _by_folder(paths: Paths, rule: Mapping[str, Any], root: str | os.PathLike[str]) -> Found:
    level = rule.get("level", -2)
    if isinstance(level, bool) or not isinstance(level, int) or level == -1:
        raise ValueError(
            f"condition rule 'folder': level must be -2 (the folder of the picture), less (those above it) or 0 and "
            f"more (counted from the root), got {level!r}"
        )
    found: Found = []
    for path in paths:
        folders = below(path, root).parts[:-1]
        position = level if level >= 0 else len(folders) + 1 + level
        found.append(folders[position] if 0 <= position < len(folders) else None)
    return found


def _by_regex(paths: Paths, rule: Mapping[str, Any], root: str | os.PathLike[str]) -> Found:
    text = _needed(rule, "pattern")
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ValueError(f"condition rule 'regex': {text!r} is no regular expression: {error}") from error
    if "condition" not in pattern.groupindex:
        raise ValueError(
            f"condition rule 'regex': {text!r} must have a group named condition, as in (?P<condition>fog|rain)"
        )
    matches = [pattern.search(below(path, root).as_posix()) for path in paths]
    return [match["condition"] or None if match else None for match in matches]


def _by_constant(paths: Paths, rule: Mapping[str, Any], root: str | os.PathLike[str]) -> Found:
    (name,) = check_names([_needed(rule, "condition")])
    return [name] * len(paths)


def _by_list(paths: Paths, rule: Mapping[str, Any], root: str | os.PathLike[str]) -> Found:
    if ("file" in rule) == ("mapping" in rule):
        raise ValueError(f"condition rule 'list' needs either file or mapping, got {sorted(rule)}")
    entries = rule["mapping"].items() if "mapping" in rule else _read_list(Path(rule["file"]))
    table: dict[str, str] = {}
    for key, name in entries:
        key = PurePath(str(key).strip()).as_posix()
        if table.setdefault(key, str(name).strip()) != str(name).strip():
            raise ValueError(f"{rule.get('file', 'mapping')} gives {key} two conditions: {table[key]!r} and {name!r}")
    found: Found = []
    for path in paths:
        short = below(path, root)
        keys = (PurePath(path).as_posix(), short.as_posix(), short.with_suffix("").as_posix(), short.name, short.stem)
        name = next((table[key] for key in keys if key in table), "")
        found.append(None if name.lower() in UNDEFINED else name)
    return found


def _read_list(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        raise ValueError(f"condition rule 'list': there is no file {path}")
    if path.suffix.lower() == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold one object, path or stem to condition, got a {type(content).__name__}")
        yield from content.items()
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        commas = path.suffix.lower() == ".csv"
        lines = csv.reader(file) if commas else (line.rsplit(None, 1) for line in file)
        for number, line in enumerate(lines, 1):
            if not line or (commas and number == 1 and "condition" in line):
                continue
            if len(line) != 2:
                raise ValueError(f"{path}, line {number}: expected path and condition, got {line!r}")
            yield line[0], line[1]


def _by_clusters(paths: Paths, rule: Mapping[str, Any], root: str | os.PathLike[str]) -> Found:
    from alimm.projects.dcaa.clustering import assign_or_cluster

    names = _cluster_names(int(_needed(rule, "k")))
    ids = assign_or_cluster(
        paths, len(names), file=rule.get("file"), seed=int(rule.get("seed", 0)), fit=bool(rule.get("fit", True))
    )
    return [names[number] for number in ids]


def _cluster_names(k: int) -> tuple[str, ...]:
    return tuple(f"style{number}" for number in range(k))


RULES: dict[str, tuple[Callable[[Paths, Mapping[str, Any], str | os.PathLike[str]], Found], tuple[str, ...]]] = {
    "folder": (_by_folder, ("level",)),
    "regex": (_by_regex, ("pattern",)),
    "list": (_by_list, ("file", "mapping")),
    "constant": (_by_constant, ("condition",)),
    "clusters": (_by_clusters, ("k", "file", "seed", "fit")),
}
"""Type of a rule -> what finds the names, and the keys that it knows."""
