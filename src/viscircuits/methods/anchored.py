"""Ours: attribution anchored at what the network answers, along a path on which what is found is removed.

Two questions, one machine. `protect` says which.

**What computes this?** (``protect=0``) The behaviour on the concept's images is the anchor. Each unit's and edge's
first-order effect is averaged along three paths (`viscircuits.methods.patching.integrated`) and the sizes of the three
are added: from the mean reference image to the image; from what the ablation makes of a layer to its own values, one
layer at a time; and the same in all layers at once, which counts a tenth. The first two stay near what the network
computes. The third leaves it, and so finds copies that can stand in for one another, to which the others may be blind.
An edge that raises the behaviour on one image and lowers it on another computes something too, though its mean is
small: on the path of images an edge counts half the size of its mean and half the mean of its sizes. Units do not,
as what is small and of either sign is in them mostly cross-talk.

**What can be removed so that only this is lost?** (``protect`` above 0)

Units are removed step by step, and ranked by the size at which they go (`viscircuits.methods.removing`).

Where its constants were set is told in docs/rivals.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from viscircuits.errors import ViscircuitsError
from viscircuits.methods.patching import integrated
from viscircuits.methods.removing import ANSWERS, CAUTION, IMAGES_A_STEP, SIZES, STEPS_A_SIZE, Removal, Removing
from viscircuits.scores.formulas import choose
from viscircuits.task import Finding, Pair, Task, costing

PATHS = {"inputs": 1.0, "activations": 1.0, "all": 0.1}


def anchored(
    task: Task,
    *,
    protect: float = 0.0,
    steps: int = 5,
    sizes: Sequence[float] = SIZES,
    steps_a_size: int = STEPS_A_SIZE,
    images_a_step: tuple[int, int] = IMAGES_A_STEP,
    raise_weight: float | None = None,
    caution: float = CAUTION,
    answers: str = "concept",
    edges: bool = True,
    engine: str = "auto",
    progress: bool = False,
) -> Finding:
    """Size of what each unit and edge does to the concept's answers, averaged over a path of removal.

    Parameters
    ----------
    task
        What to explain; its ablation is ``zero`` or ``mean``.
    protect
        0: what computes the task's behaviour. Above 0: what can be removed so that the concept's answers fall and the
        reference images' own answers stand, these weighing `protect` times as much.
    steps
        Points on each path, where nothing is protected.
    sizes
        Shares of each layer that are removed one after the other, rising; nothing beyond the last is looked for.
    steps_a_size
        Steps on the way from one size to the next.
    images_a_step
        Concept and reference images that are drawn for a step.
    raise_weight
        Of how far the concept raises a unit, against its effect; 0 leaves the effect alone. By default √(64 / number
        of concept images), at least 1: the fewer they are, the less their effects say of others.
    caution
        Of a unit's effect on single reference images, as root mean square, what counts as harm beside the mean: the
        mean of many small effects either way is nothing, the harm of many such units together is not.
    answers
        Whose fall is looked for: the ``concept``'s, shared by its images; or each image's ``own`` label, where images
        have nothing in common but what makes the network answer so (words pasted on photographs).
    edges
        Score edges too, by their effect on the paths where nothing is protected.
    engine
        For edges: ``auto``, ``structured`` or ``loop``, as for `attribute`.
    progress
        Show a progress bar.

    Raises
    ------
    ViscircuitsError
        If an option makes no sense; or, where answers are to be protected, if there is but one reference image or
        every output of the network is an answer of the concept's images, so that none is left.

    References
    ----------
    Ours. Paths: Sundararajan et al. 2017, arXiv:1703.01365; Hanna et al. 2024, arXiv:2403.17806. Removing step
    by step while gates may reopen is iterative pruning (Mostafa and Wang 2019, arXiv:1902.05967).
    """
    if not 0 <= protect < inf:
        raise ViscircuitsError(f"protect is a weight of 0 or more, got {protect}")
    choose(ANSWERS, answers, "way to judge answers")
    options = {"protect": protect, "steps": steps, "edges": edges, "engine": engine}
    if not protect:
        return _explained(task, steps, edges, engine, options)
    removal = Removal(protect, tuple(sizes), steps_a_size, images_a_step, raise_weight, caution, answers).checked(task)
    with costing(task) as counted:
        removing = Removing(counted, removal)
        removing.walk(progress)
        ranks = removing.ranks()
    options |= removal.options
    found: Mapping[Pair, Tensor] = {}
    if edges:
        explained = _explained(task, steps, True, engine, {})
        found = explained.edges
        counted.passes.add(explained.passes)
    return Finding("anchored", ranks, task.widths, found, counted.passes, options)


def _explained(task: Task, steps: int, edges: bool, engine: str, options: Mapping[str, Any]) -> Finding:
    """Sizes of effects along the three paths, added up."""
    units = {layer: torch.zeros(width, dtype=torch.float64) for layer, width in task.widths.items()}
    connections: dict[Pair, Tensor] = {}
    with costing(task) as counted:
        for path, weight in PATHS.items():
            of_images = path == "inputs"
            if of_images and task.concept.shape[1:] != task.reference.shape[1:]:
                continue  # no mean reference image lies on a path to the concept's
            found = integrated(counted, path, steps, edges=edges, engine=engine, sizes=of_images)
            for layer, effects in found.units.items():
                units[layer] += weight * effects.abs()
            for pair, effects in found.edges.items():
                size = effects.abs() if not of_images else (effects.abs() + found.sizes[pair]) / 2
                connections[pair] = connections.get(pair, 0) + weight * size
    return Finding("anchored", units, task.widths, connections, counted.passes, options)
