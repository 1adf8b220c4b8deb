"""MMEngine's 'X is not in the Y registry' said so that a user can mend it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.config import Config

from alimm.extras import EXTRAS, require
from alimm.registry import near_matches

_NOT_FOUND = re.compile(r"^(?P<name>\S+) is not in the (?P<scope>[\w.]+)::(?P<registry>[\w ]+) registry")

_WRONG_ARGUMENT = re.compile(r"(?P<kind>\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(?P<key>\w+)'")


def places_of(name: str, node: Any, path: str = "") -> list[str]:
    """The dotted paths of every ``type`` in a config that is ``name``."""
    items: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    found = []
    for key, value in items:
        place = f"{path}.{key}" if path else str(key)
        if key == "type" and value == name:
            found.append(place)
        else:
            found += places_of(name, value, place)
    return found


def _registered_message(name: str, registry: str, where: str) -> str:
    return (
        f"there is no {registry} {name!r}{where}. {_near_hint(name, registry)}. If it is your own, register it and "
        "name its module in custom_imports"
    )


def _near_hint(name: str, registry: str) -> str:
    try:
        near = near_matches(name, registry)
    except ImportError as error:
        # A broken plugin must not hide the message about the name itself.
        return f"Its near names are unknown: {error}"
    return f"Near names: {', '.join(near)}" if near else "No registered name is like it"


def _keys_of(kind: str, key: str, node: Any, path: str = "") -> list[str]:
    """The dotted paths of ``key`` in every part of a config whose ``type`` is the class or function ``kind``."""
    items: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    found = []
    if isinstance(node, dict) and key in node and str(node.get("type", "")).rsplit(".", 1)[-1] == kind:
        found.append(f"{path}.{key}" if path else key)
    for name, value in items:
        found += _keys_of(kind, key, value, f"{path}.{name}" if path else str(name))
    return found


@contextmanager
def explain_build_errors(config: Config | None = None) -> Iterator[None]:
    """Explain what fails while parts are built from a config.

    Args:
        config: where the type is looked for, so that the message says at which key it stands.

    Raises:
        ValueError: a type is not registered (the message lists near names and the places in the config), or does not
            take an argument that the config gives it.
        ImportError: its package is not installed. The message names the extra.
    """
    try:
        yield
    except KeyError as error:
        match = _NOT_FOUND.match(str(error.args[0])) if error.args else None
        if match is None:
            raise
        name, registry = match["name"], match["registry"]
        places = places_of(name, config.to_dict()) if config is not None else []
        where = f" (at {', '.join(places[:3])})" if places else ""
        scopes = [name.split(".")[0] if "." in name else "", config.get("default_scope", "") if config else ""]
        for scope in scopes:
            if scope and scope.isidentifier() and importlib.util.find_spec(scope) is None:
                if not any(scope in modules for modules in EXTRAS.values()):
                    # Nobody knows what a misspelt scope is called where packages come from, so no command here.
                    hint = _near_hint(name, registry)
                    raise ImportError(
                        f"{name!r}{where} needs the package {scope}, which is not installed. {hint}", name=scope
                    ) from error
                require(scope, f"{name!r}{where}")
        raise ValueError(_registered_message(name, registry, where)) from error
    except TypeError as error:
        match = _WRONG_ARGUMENT.search(str(error))
        places = _keys_of(match["kind"], match["key"], config.to_dict()) if match and config is not None else []
        if match is None or not places:
            raise
        raise ValueError(f"{match['kind']} takes no argument {match['key']!r} (at {', '.join(places[:3])})") from error
    except ModuleNotFoundError as error:
        if error.name == "mmcv._ext":
            raise ImportError(
                "mmcv is installed without its compiled operators (mmcv._ext). `alimm doctor` prints the command that "
                "builds them",
                name=error.name,
            ) from error
        raise
