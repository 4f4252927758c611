"""Cross-layer attribution as a method: the published score, its contrasts, and the same anchored at a behaviour.

`attribute` scores every edge between adjacent layers, whatever the behaviour. Anchored, it is carried down from the
behaviour: a unit then counts for what reaches the behaviour through it, not for what it does to anything.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from viscircuits.attribution import attribute
from viscircuits.layers import by_unit
from viscircuits.matrices import Attributions
from viscircuits.scores.formulas import SCORES
from viscircuits.task import Finding, Pair, Task, costing, observe


def cla(task: Task) -> Finding:
    """Cross-layer attribution on the concept's images, ``‖A_m‖ · ‖∂‖A_n‖/∂A_m‖``.

    A unit scores its summed attribution to and from all units of both adjacent layers.

    References
    ----------
    Rajaram et al. 2023, arXiv:2404.14349.
    """
    return _unanchored("cla", task, "none")


def cla_difference(task: Task) -> Finding:
    """As `cla`, the reference's attribution subtracted; what the reference uses more is below 0."""
    return _unanchored("cla-difference", task, "difference")


def cla_ratio(task: Task) -> Finding:
    """As `cla`, divided by the reference's attribution plus its mean."""
    return _unanchored("cla-ratio", task, "ratio")


def cla_anchored(task: Task, *, contrast: str = "difference") -> Finding:
    """Relevance for the behaviour, handed down from layer to layer in shares of cross-layer attribution.

    A unit of the last layer has the relevance ``‖A_n‖ · ‖∂T/∂A_n‖``, averaged over concept images; with a contrast
    ``‖A_n − r_n‖`` takes the place of ``‖A_n‖``. Each unit hands its own to its sources in proportion to its row of
    the attribution matrix, entries below 0 counting as 0: an edge scores what is handed along it, a unit what it gets.
    A row of zeros hands on nothing.

    Parameters
    ----------
    task
        What to explain.
    contrast
        Of the matrices: ``none``, ``difference`` or ``ratio``.
    """
    with costing(task) as counted:
        attributions = _attributions(counted, contrast)
        relevance = _anchor(counted, contrast)
        units, edges = {task.addresses[-1]: relevance}, {}
        for matrix in reversed(attributions.matrices):
            handed = relevance.unsqueeze(1) * _shares(matrix.values.double())  # (target, source)
            relevance = handed.sum(0)
            units[matrix.source], edges[matrix.source, matrix.target] = relevance, handed
    ordered = {layer: units[layer] for layer in task.addresses}
    return Finding("cla-anchored", ordered, task.widths, edges, counted.passes, {"contrast": contrast})


def _unanchored(method: str, task: Task, contrast: str) -> Finding:
    with costing(task) as counted:
        attributions = _attributions(counted, contrast)
    units = {layer: torch.zeros(width, dtype=torch.float64) for layer, width in task.widths.items()}
    edges: dict[Pair, Tensor] = {}
    for matrix in attributions.matrices:
        values = matrix.values.double()
        units[matrix.source] += values.sum(0)
        units[matrix.target] += values.sum(1)
        edges[matrix.source, matrix.target] = values
    return Finding(method, units, task.widths, edges, counted.passes, {"contrast": contrast})


def _attributions(task: Task, contrast: str) -> Attributions:
    """The matrices, their passes counted as the definition takes them: one backward pass for each target."""
    reference = None if contrast == "none" else task.reference
    n_images = len(task.concept) + (0 if reference is None else len(reference))
    task.passes.forward += n_images
    task.passes.backward += n_images * sum(target.n_units for _, target in task.pairs)
    found = attribute(task.spec, task.concept, task.addresses, reference=reference, batch_size=task.batch_size)
    return found.contrast(contrast)


def _anchor(task: Task, contrast: str) -> Float[Tensor, " unit"]:
    """Cross-layer attribution from the last layer to the behaviour."""
    layer = task.layers[-1]
    total = torch.zeros(layer.n_units, dtype=torch.float64)
    for images, labels in task.batches():
        seen = observe(task, images, labels)
        values = seen.values[layer.address]
        values = values if contrast == "none" else values - task.baseline(layer, values)
        maps = [by_unit(each, layer.unit_axis).double() for each in (values, seen.gradients[layer.address])]
        total += SCORES["cla"](*maps).sum(0).cpu()
    return total / len(task.concept)


def _shares(values: Float[Tensor, "target source"]) -> Float[Tensor, "target source"]:
    """Rows that add up to 1, or to 0 where there is nothing to share."""
    positive = values.clamp(min=0)
    sums = positive.sum(1, keepdim=True)
    return positive / torch.where(sums > 0, sums, torch.ones_like(sums))
