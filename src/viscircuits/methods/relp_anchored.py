"""Ours: what one look at the whole network says of a unit, and what removing it among others says, added up.

Two estimates of what a unit does for the concept's answers and not for others', which go wrong in different ways:

1. *Relevance* (`viscircuits.methods.relevance.relp_difference`), of the whole network. It carries over to new images,
   but knows nothing of what happens when many units are removed at once: others suffer.
2. *The effect of removal* (`viscircuits.methods.removing`), when many units are gone. It spares others, but follows
   the images at hand.

The first, which is in logits in every layer, is divided by its spread over the units of all layers; the second, whose
layers stand in for one another, by its spread over the layer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch

from viscircuits.errors import ViscircuitsError
from viscircuits.methods.relevance import GAMMA_OF_DIFFERENCE, relp_difference, rules_of
from viscircuits.methods.removing import CAUTION, IMAGES_A_STEP, SIZES, STEPS_A_SIZE, Removal, Removing, standard
from viscircuits.task import Finding, Task, costing


def relp_anchored(
    task: Task,
    *,
    protect: float = 1.0,
    effect_weight: float = 0.4,
    convolutions: str = "gamma",
    linear: str = "zero",
    gamma: int | float = GAMMA_OF_DIFFERENCE,
    sizes: Sequence[float] = SIZES,
    steps_a_size: int = STEPS_A_SIZE,
    images_a_step: tuple[int, int] = IMAGES_A_STEP,
    raise_weight: float | None = None,
    caution: float = CAUTION,
    answers: str = "concept",
    progress: bool = False,
) -> Finding:
    """Relevance of each unit to the concept and not to others, plus the effect of its removal when many are removed.

    ``D / spread of D over all layers + effect_weight · E / spread of E over the layer``, with D as in
    `relp_difference` and E what `anchored` ranks by, without the raise. Circuits are cut by ``half``
    (`viscircuits.task.Finding.circuit`).

    Parameters
    ----------
    task
        What to explain; its ablation is ``mean``, also where units will become 0 once they are removed, or ``zero``,
        under which a unit that is always active counts in full: circuits found so spare others less.
    protect
        How much what others lose weighs, in both; above 0.
    effect_weight
        Of the effect of removal, against relevance; 0 leaves the order of `relp_difference`.
    convolutions, linear, gamma
        As for `relp`.
    sizes, steps_a_size, images_a_step, raise_weight, caution, answers
        The path of removal, as for `anchored`.
    progress
        Show a progress bar.

    Raises
    ------
    ViscircuitsError
        If an option makes no sense; or if there is but one reference image, or no output but the concept's.

    References
    ----------
    Ours, from `relp_difference` and `anchored`. Where it leads and where it fails is told in docs/rivals.md.
    """
    if not 0 < protect < inf:
        raise ViscircuitsError(f"protect is a weight above 0, got {protect}; where nothing is protected, use 'relp'")
    if not 0 <= effect_weight < inf:
        raise ViscircuitsError(f"effect_weight is 0 or more, got {effect_weight}")
    rules_of(convolutions, linear, gamma)  # refused before the path is walked
    removal = Removal(protect, tuple(sizes), steps_a_size, images_a_step, raise_weight, caution, answers)
    with costing(task) as counted:
        effects = {}
        if effect_weight:
            removal = removal.checked(task)
            removing = Removing(counted, removal)
            removing.walk(progress)
            effects = removing.effects_of_removal()
    looked = relp_difference(
        task, protect=protect, convolutions=convolutions, linear=linear, gamma=gamma, progress=progress
    )
    counted.passes.add(looked.passes)
    spread = torch.cat(list(looked.units.values())).std(correction=0).clamp(min=1e-12)
    units = {layer: scores / spread for layer, scores in looked.units.items()}
    for layer, of_layer in effects.items():
        units[layer] = units[layer] + effect_weight * standard(of_layer)
    options = {**looked.options, "effect_weight": effect_weight, **removal.options}
    return Finding("relp-anchored", units, task.widths, {}, counted.passes, options, share=looked.share)
