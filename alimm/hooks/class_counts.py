"""Tell the losses how many training samples each class has."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from alimm.registry import HOOKS


@HOOKS.register_module()
class ClassCountsHook(Hook):
    """Before training, hand ``metainfo['class_counts']`` of the training data to every part that asks for it.

    A part asks by having a method ``set_class_counts``, as `alimm.BalancedSoftmaxLoss` has.
    """

    priority = "NORMAL"

    def before_train(self, runner: Runner) -> None:
        """Find the counts and hand them over.

        Raises:
            ValueError: the data set has no counts, or no part of the model asks for them.
        """
        counts = runner.train_dataloader.dataset.metainfo.get("class_counts")
        if counts is None:
            raise ValueError(
                f"ClassCountsHook: {type(runner.train_dataloader.dataset).__name__} has no metainfo['class_counts']; "
                f"give class_counts=[...] to the loss and remove the hook"
            )
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        parts = [part for part in model.modules() if hasattr(part, "set_class_counts")]
        if not parts:
            raise ValueError("ClassCountsHook: no part of the model has set_class_counts; remove the hook")
        for part in parts:
            part.set_class_counts(counts)
