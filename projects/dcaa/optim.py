"""Two optimisers for two players: one steps the segmentor, the other the discriminators, in turn."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NoReturn

from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from alimm.registry import OPTIM_WRAPPER_CONSTRUCTORS

SEGMENTOR = "seg"
DISCRIMINATORS = "disc"


class AlternatingOptimWrapper(OptimWrapperDict):
    """MMEngine's dictionary of wrappers, ``seg`` and ``disc``, with messages for what such a model cannot do."""

    def optim_context(self, model: nn.Module) -> NoReturn:
        """Refuse: a step has two phases, and each opens the context of its own wrapper.

        Raises:
            ValueError: always. ``MMDistributedDataParallel`` is what comes here.
        """
        raise ValueError(
            f"{type(model).__name__} runs the training step itself, but this model steps the segmentor and the "
            "discriminators in turn: set model_wrapper_cfg = dict(type='alimm.SteppedDataParallel') in the config"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of all wrappers.

        Raises:
            ValueError: the state is that of other wrappers.
        """
        if set(state_dict) != set(self.optim_wrappers):
            raise ValueError(
                f"the checkpoint has the state of the optimisers {', '.join(map(str, state_dict)) or '(none)'}, and "
                f"this run has {', '.join(self.optim_wrappers)}: it was saved with another model. To start from its "
                "weights alone, give it as load_from without resume"
            )
        super().load_state_dict(state_dict)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class AlternatingOptimWrapperConstructor:
    """Builds `AlternatingOptimWrapper`: ``seg`` over the model without its discriminators, ``disc`` over those.

    Config::

        optim_wrapper = dict(
            type='OptimWrapper',  # or AmpOptimWrapper, alimm.Bf16OptimWrapper: that of both
            constructor='alimm.AlternatingOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=2.5e-4, momentum=0.9, weight_decay=5e-4),
            discriminator=dict(type='Adam', lr=1e-4, betas=(0.9, 0.99)),
            paramwise_cfg=dict(custom_keys={'decode_head': dict(lr_mult=10)}),  # of the segmentor alone
            clip_grad=dict(max_norm=10))  # of each by itself

    The discriminators are the model's attribute ``discriminators``, a module or None; without one there is only
    ``seg``. Parameters that need no gradient (a teacher, frozen layers) are in neither. Parameters whose settings are
    equal share a group, which is faster than MMEngine's group for each.

    Args:
        optim_wrapper_cfg: the config without ``constructor`` and ``paramwise_cfg``.
        paramwise_cfg: as MMEngine's ``DefaultOptimWrapperConstructor`` takes it.

    Raises:
        ValueError: ``optimizer`` is missing, or ``accumulative_counts`` is not 1.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        config = copy.deepcopy(dict(optim_wrapper_cfg))
        if not isinstance(config.get("optimizer"), Mapping):
            raise ValueError(
                "AlternatingOptimWrapperConstructor needs optimizer=dict(type=...), the segmentor's, in optim_wrapper, "
                f"got {config.get('optimizer')!r}"
            )
        if config.get("accumulative_counts", 1) != 1:
            raise ValueError(
                f"accumulative_counts is {config['accumulative_counts']}, but the segmentor and the discriminators are "
                "stepped in turn in every iteration: leave it out, and use a larger batch"
            )
        self.optimizer = config.pop("optimizer")
        self.discriminator = config.pop("discriminator", None)
        self.wrapper = config
        self.paramwise = dict(paramwise_cfg or {})

    def __call__(self, model: Any) -> AlternatingOptimWrapper:
        """Build the wrappers of a model, which may be in a distributed wrapper.

        Raises:
            ValueError: the model has discriminators and the config no ``discriminator``, or nothing can be trained.
        """
        while is_model_wrapper(model):
            model = model.module
        discriminators = getattr(model, "discriminators", None)
        theirs = {} if discriminators is None else {id(p): p for p in discriminators.parameters()}
        groups = self._groups(model, self.optimizer, self.paramwise, set(theirs))
        if not groups:
            raise ValueError(f"{type(model).__name__} has no parameter that needs a gradient beside its discriminators")
        wrappers = {SEGMENTOR: self._wrapper(self.optimizer, groups, SEGMENTOR)}
        groups = [] if discriminators is None else self._groups(discriminators, self.discriminator or {}, {}, set())
        if groups:
            if self.discriminator is None:
                raise ValueError(
                    f"{type(model).__name__} has discriminators: give their optimiser, such as discriminator=dict("
                    "type='Adam', lr=1e-4, betas=(0.9, 0.99)), in optim_wrapper"
                )
            wrappers[DISCRIMINATORS] = self._wrapper(self.discriminator, groups, DISCRIMINATORS)
        return AlternatingOptimWrapper(**wrappers)

    @staticmethod
    def _groups(
        module: nn.Module, optimizer: Mapping[str, Any], paramwise: dict[str, Any], excluded: set[int]
    ) -> list[dict[str, Any]]:
        """Parameters that need a gradient, each once, in groups of equal settings."""
        rules = DefaultOptimWrapperConstructor({"optimizer": dict(optimizer)}, paramwise)
        single: list[dict[str, Any]] = []
        rules.add_params(single, _trainable_part(module, excluded))
        seen = set(excluded)
        groups: list[dict[str, Any]] = []
        for entry in single:
            (parameter,) = entry.pop("params")
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            for group in groups:
                if {key: value for key, value in group.items() if key != "params"} == entry:
                    group["params"].append(parameter)
                    break
            else:
                groups.append({"params": [parameter], **entry})
        return groups

    def _wrapper(self, optimizer: Mapping[str, Any], groups: list[dict[str, Any]], name: str) -> OptimWrapper:
        built = OPTIMIZERS.build({**optimizer, "params": groups})
        wrapper = copy.deepcopy(self.wrapper)
        wrapper.setdefault("type", "OptimWrapper")
        result = OPTIM_WRAPPERS.build(wrapper, default_args=dict(optimizer=built))
        if result.clip_grad_kwargs:
            result.grad_name = f"{name}.{result.grad_name}"  # two norms in the log
        return result


def _trainable_part(module: nn.Module, excluded: set[int]) -> nn.Module:
    """A shell with the same names and without the children that hold nothing to train, of which MMEngine would warn."""
    shell = nn.Module()
    for name, parameter in module.named_parameters(recurse=False):
        shell.register_parameter(name, parameter)
    for name, child in module.named_children():
        if any(parameter.requires_grad and id(parameter) not in excluded for parameter in child.parameters()):
            shell.add_module(name, child)
    return shell
