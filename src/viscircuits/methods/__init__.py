"""Ways to find a circuit, ours and others', behind one interface: a `Task` in, a `Finding` out.

A method is a function of a task and its own keyword options, registered under the name it has in tables.
It says nothing of a circuit's size: `Finding.circuit` cuts one of any size from its scores. To add one,
write a file beside these with such a function and enter it in `METHODS`; the contract tests and the
fidelity benchmark take it from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from viscircuits.methods import (
    acdc,
    anchored,
    controls,
    cross_layer,
    exact,
    gcc,
    masks,
    patching,
    relevance,
    relp_anchored,
    single_target,
)
from viscircuits.scores.formulas import choose
from viscircuits.task import Finding, Task

Method = Callable[..., Finding]

METHODS: dict[str, Method] = {
    # removal, one at a time
    "exact": exact.exact,
    # gradients of the behaviour
    "attribution-patching": patching.attribution_patching,
    "eap": patching.eap,
    "eap-ig": patching.eap_ig,
    "relp": relevance.relp,
    "relp-difference": relevance.relp_difference,
    # cross-layer attribution
    "cla": cross_layer.cla,
    "cla-difference": cross_layer.cla_difference,
    "cla-ratio": cross_layer.cla_ratio,
    "cla-anchored": cross_layer.cla_anchored,
    # anchored at the answers, along a path of removal
    "anchored": anchored.anchored,
    "relp-anchored": relp_anchored.relp_anchored,
    # one target
    "snip": single_target.snip,
    "actgrad": single_target.actgrad,
    # connections from the concept's roots on
    "gcc": gcc.gcc,
    # searches
    "acdc": acdc.acdc,
    "acdc-behaviour": acdc.acdc_behaviour,
    "masks": masks.masks,
    # controls
    "activation": controls.activation,
    "activation-difference": controls.activation_difference,
    "weight-norm": controls.weight_norm,
    "random": controls.random,
}


def find(task: Task, method: str, **options: Any) -> Finding:
    """Scores of every unit and edge of a task by the method of this name.

    Raises
    ------
    ViscircuitsError
        If there is no such method, or it cannot do this task.
    """
    return choose(METHODS, method, "method")(task, **options)
