"""Ours: what one look at the whole network says of a unit, and what removing it among others says, added up.

Two estimates of what a unit does for the concept's answers and not for others', which go wrong in different ways:

1. *Relevance* (`viscircuits.methods.relevance.relp_difference`), of the whole network. It carries over to new images,
   but knows nothing of what happens when many units are removed at once: others suffer.
2. *The effect of removal* (`viscircuits.methods.removing`), where a path of removal ends. It spares others, but follows
   the images at hand.

The first is divided by its spread over all layers' units, whose logits are on one scale; the second, whose layers
stand in for one another, by its spread over the layer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch

from viscircuits.errors import ViscircuitsError
from viscircuits.methods.relevance import GAMMA_OF_DIFFERENCE, relp_difference
from viscircuits.methods.removing import CAUTION, IMAGES_A_STEP, SIZES, STEPS_A_SIZE, Path, Removing, standard
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
    caution: float = CAUTION,
    answers: str = "concept",
    progress: bool = False,
) -> Finding:
    """Relevance of each unit to the concept and not to others, plus the effect of its removal along a path.

    Circuits are cut so that each layer gives half of its part and the rest lie where scores are highest.

    Parameters
    ----------
    task
        What to explain; its ablation is ``zero`` or ``mean``.
    protect
        How much what others lose weighs, in both.
    effect_weight
        Of the effect of removal, against relevance; 0 leaves `relp_difference`.
    convolutions, linear, gamma
        As for `relp`.
    sizes, steps_a_size, images_a_step, caution, answers
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
    if not 0 <= effect_weight < inf:
        raise ViscircuitsError(f"effect_weight is 0 or more, got {effect_weight}")
    path = Path(protect, tuple(sizes), steps_a_size, images_a_step, None, caution, answers).checked(task)
    looked = relp_difference(
        task, protect=protect, convolutions=convolutions, linear=linear, gamma=gamma, progress=progress
    )
    spread = torch.cat(list(looked.units.values())).std(correction=0).clamp(min=1e-12)
    units = {layer: scores / spread for layer, scores in looked.units.items()}
    with costing(task) as counted:
        if effect_weight:
            removing = Removing(counted, path)
            removing.ranked(progress)
            for layer, effects in removing.effects_of_removal().items():
                units[layer] = units[layer] + effect_weight * standard(effects)
    counted.passes.add(looked.passes)
    options = {**looked.options, "effect_weight": effect_weight, **path.options}
    return Finding("relp-anchored", units, task.widths, {}, counted.passes, options, looked.share)
