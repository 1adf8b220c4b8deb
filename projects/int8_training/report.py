"""What runs where, as a table for the log."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from alimm.projects.int8_training import planner
from alimm.projects.int8_training.state import LayerState, products_for


def plan_table(states: Mapping[str, LayerState], device: str = "cpu") -> str:
    """One line a layer and input shape: the product's backend or ``float``, and the time of the plan against float32.

    Args:
        states: of the converted layers, by name.
        device: where they run.
    """
    width = max([len(name) for name in states] + [5])
    lines = [
        f"INT8 training: what multiplies\n  {'layer':{width}}  {'shape':28}  {'output':>8} {'dX':>8} {'dW':>8}  gain"
    ]
    for name, state in states.items():
        backend = products_for(state.options.backend, torch.device(device)).name
        for shape, plan in state.plans.items():
            where = [backend if on else "float" for on in plan]
            gain = ""
            if times := state.timings.get(shape):
                stock, chosen = planner.total(times, (False, False, False)), planner.total(times, plan)
                gain = f"{stock / chosen:4.2f}x" if chosen else ""
            shown = f"{'x'.join(map(str, shape))} {state.geometry}"
            lines.append(f"  {name:{width}}  {shown:28}  {where[0]:>8} {where[1]:>8} {where[2]:>8}  {gain}")
    return "\n".join(lines)
