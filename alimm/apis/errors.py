"""MMEngine's 'X is not in the Y registry' said so that a user can mend it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.config import Config

from alimm.extras import require
from alimm.registry import near_matches

_NOT_FOUND = re.compile(r"^(?P<name>\S+) is not in the (?P<scope>[\w.]+)::(?P<registry>[\w ]+) registry")


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
    try:
        near = near_matches(name, registry)
    except ImportError as error:
        # A broken plugin must not hide the message about the name itself.
        return f"there is no {registry} {name!r}{where}, and its near names are unknown: {error}"
    hint = f"Near names: {', '.join(near)}" if near else "No registered name is like it"
    return (
        f"there is no {registry} {name!r}{where}. {hint}. If it is your own, register it and name its module in "
        "custom_imports"
    )


@contextmanager
def explain_build_errors(config: Config | None = None) -> Iterator[None]:
    """Explain what fails while parts are built from a config.

    Args:
        config: where the type is looked for, so that the message says at which key it stands.

    Raises:
        ValueError: a type is not registered. The message lists near names and the places in the config.
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
                require(scope, f"{name!r}{where}")
        raise ValueError(_registered_message(name, registry, where)) from error
    except ModuleNotFoundError as error:
        if error.name == "mmcv._ext":
            raise ImportError(
                "mmcv is installed without its compiled operators (mmcv._ext). `alimm doctor` prints the command that "
                "builds them",
                name=error.name,
            ) from error
        raise
