"""The registries of alimm: children of MMEngine's, scope ``alimm``.

A part registered here is reached from any OpenMMLab config as ``type='alimm.Name'``: MMEngine imports this module by
itself when it meets the scope. A name that is not found here is looked for in the installed plugins (entry points of
the group ``alimm.plugins``), so that a method works from a config without a line of ``custom_imports``; a name that is
nowhere is answered with its near matches.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import FUNCTIONS as MMENGINE_FUNCTIONS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODEL_WRAPPERS as MMENGINE_MODEL_WRAPPERS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import OPTIMIZERS as MMENGINE_OPTIMIZERS
from mmengine.registry import PARAM_SCHEDULERS as MMENGINE_PARAM_SCHEDULERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry as _Registry
from mmengine.utils import get_object_from_string

from alimm.extras import require

PLUGIN_GROUP = "alimm.plugins"
_loaded_plugins: set[str] = set()


def load_plugins() -> list[str]:
    """Import every installed plugin once; return the names of those loaded so far.

    Raises:
        ImportError: a plugin is installed but does not import. The message names it.
    """
    for point in entry_points(group=PLUGIN_GROUP):
        if point.name in _loaded_plugins:
            continue
        _loaded_plugins.add(point.name)
        try:
            point.load()
        except ImportError as error:
            _loaded_plugins.discard(point.name)
            raise ImportError(
                f"the alimm plugin {point.name!r} ({point.value}) is installed but does not import: {error}"
            ) from error
    return sorted(_loaded_plugins)


class _Lazy:
    """Stands for a part whose module is imported when somebody asks for it."""

    module: str
    needs: str


class Registry(_Registry):
    """MMEngine's registry that also looks into the installed plugins."""

    def register_lazy(self, name: str, module: str, needs: str) -> None:
        """Register a part without importing it, since that brings in a heavy or optional package.

        Args:
            name: of the part.
            module: where it registers itself under that name when it is imported.
            needs: the package; where it is not installed, asking for the part says which extra brings it.
        """
        if name not in self._module_dict:
            self._module_dict[name] = type(name, (_Lazy,), {"module": module, "needs": needs})

    def _register_module(
        self, module: Callable[..., Any], module_name: str | list[str] | None = None, force: bool = False
    ) -> None:
        names = [module_name or module.__name__] if not isinstance(module_name, list) else module_name
        for name in names:
            if _is_lazy(self._module_dict.get(name)):
                del self._module_dict[name]
        super()._register_module(module, module_name, force)

    def get(self, key: str) -> Any:
        """Return the class or function registered as ``key`` (with or without a scope), or None.

        Raises:
            ImportError: it is known, and the optional package that it needs is not installed.
        """
        found = self._find(key)
        if _is_lazy(found):
            require(found.needs, f"alimm.{found.__name__}")
            import_module(found.module)
            found = super().get(key)
            assert not _is_lazy(found), f"{key} does not register itself"
        return found

    def _find(self, key: str) -> Any:
        # The dump of a class reads "alimm.models.X"; another package's registry hands that on without its first word.
        head, _, rest = key.partition(".") if isinstance(key, str) else ("", "", "")
        if rest and self.scope == "alimm" and head != "alimm" and find_spec(f"alimm.{head}") is not None:
            return get_object_from_string(f"alimm.{key}")
        found = super().get(key)
        if found is None and isinstance(key, str) and (key.startswith("alimm.") or "." not in key):
            before = len(_loaded_plugins)
            load_plugins()
            if len(_loaded_plugins) > before:
                found = super().get(key)
        return found


def _is_lazy(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, _Lazy)


def _child(parent: _Registry, *locations: str) -> Registry:
    return Registry(parent.name, parent=parent, scope="alimm", locations=list(locations))


MODELS = _child(MMENGINE_MODELS, "alimm.models", "alimm.heads", "alimm.losses")
DATASETS = _child(MMENGINE_DATASETS, "alimm.datasets")
DATA_SAMPLERS = _child(MMENGINE_DATA_SAMPLERS, "alimm.datasets")
TRANSFORMS = _child(MMENGINE_TRANSFORMS, "alimm.datasets")
FUNCTIONS = _child(MMENGINE_FUNCTIONS, "alimm.hooks")
HOOKS = _child(MMENGINE_HOOKS, "alimm.hooks")
LOOPS = _child(MMENGINE_LOOPS, "alimm.hooks")
METRICS = _child(MMENGINE_METRICS, "alimm.evaluation")
OPTIMIZERS = _child(MMENGINE_OPTIMIZERS, "alimm.optim")
OPTIM_WRAPPER_CONSTRUCTORS = _child(MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS, "alimm.optim")
OPTIM_WRAPPERS = _child(MMENGINE_OPTIM_WRAPPERS, "alimm.optim")
PARAM_SCHEDULERS = _child(MMENGINE_PARAM_SCHEDULERS, "alimm.optim")
MODEL_WRAPPERS = _child(MMENGINE_MODEL_WRAPPERS, "alimm.distributed")
INDEXES = Registry("index", scope="alimm", locations=["alimm.search"])
TEXT_ENCODERS = Registry("text_encoder", scope="alimm")


def near_matches(name: str, registry_name: str | None = None, count: int = 5) -> list[str]:
    """Names like ``name`` in every registry that is loaded, best first, written as a config would write them.

    Args:
        name: the type that was not found, with or without a scope.
        registry_name: look only in registries of this name (``'model'``, ``'hook'``, ...); all if None.
        count: at most so many.
    """
    roots = [
        MMENGINE_MODELS, MMENGINE_DATASETS, MMENGINE_DATA_SAMPLERS, MMENGINE_TRANSFORMS, MMENGINE_HOOKS, MMENGINE_LOOPS,
        MMENGINE_METRICS, MMENGINE_OPTIMIZERS, MMENGINE_OPTIM_WRAPPERS, MMENGINE_PARAM_SCHEDULERS,
        MMENGINE_MODEL_WRAPPERS, MMENGINE_FUNCTIONS, INDEXES, TEXT_ENCODERS,
    ]  # fmt: skip
    candidates: dict[str, str] = {}
    for root in roots:
        if registry_name is not None and root.name != registry_name:
            continue
        for registry in (root, *root.children.values()):
            try:
                registry.import_from_location()
            except ImportError:
                # mmaction2 1.2 names locations that do not exist; a hint must not fail for what others left broken.
                if registry.scope == "alimm":
                    raise
            for short in registry.module_dict:
                full = short if registry is root and registry.scope == "mmengine" else f"{registry.scope}.{short}"
                candidates.setdefault(full, short)
    short_name = name.rsplit(".", 1)[-1].lower()
    scored = sorted(
        (
            (difflib.SequenceMatcher(None, short_name, short.lower()).ratio(), full)
            for full, short in candidates.items()
        ),
        key=lambda pair: (-pair[0], pair[1]),
    )
    return [full for ratio, full in scored[:count] if ratio >= 0.6]
