"""What a method must beat: units chosen by something simpler, or by nothing at all."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import activations
from viscircuits.layers import by_unit
from viscircuits.matrices import AttributionMatrix, Attributions
from viscircuits.scores.controls import CONTROLS
from viscircuits.task import Finding, Task, costing
from viscircuits.tracing import trace


def activation(task: Task) -> Finding:
    """The units most active on the concept: mean over images of the L2 norm of their maps."""
    return _control("activation", "activation", task, ("concept",))


def activation_difference(task: Task) -> Finding:
    """The units whose activity, as in `activation`, the concept raises most over the reference."""
    return _control("activation-difference", "activation difference", task, ("concept", "reference"))


def weight_norm(task: Task) -> Finding:
    """The units with the largest incoming weights, batch norm's scale included; blind to images, and free.

    Raises
    ------
    ViscircuitsError
        If at some layer no weights can be found that make its units.
    """
    return _control("weight-norm", "weight norm", task, ())


def random(task: Task, *, seed: int | None = None) -> Finding:
    """A random number for each unit and edge; `seed` is the task's own by default."""
    seed = task.seed if seed is None else seed
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    with costing(task) as counted:
        units = {layer.address: draw(layer.n_units) for layer in task.layers}
        edges = {(s.address, t.address): draw(t.n_units, s.n_units) for s, t in task.pairs}
    return Finding("random", units, task.widths, edges, counted.passes, {"seed": seed})


def _control(method: str, name: str, task: Task, sets: tuple[str, ...]) -> Finding:
    with costing(task) as counted:
        concept, reference = (_measured(counted, which, which in sets) for which in ("concept", "reference"))
        traced = trace(task.spec.model, task.concept[:1])
        scores = CONTROLS[name](replace(concept, reference=reference), task.spec.model, traced)
    if scores is None:
        raise ViscircuitsError(
            f"{method!r} finds no weights that make the units of every layer of {', '.join(task.addresses)}; "
            "take layers whose units a convolution or linear layer makes, or another control"
        )
    return Finding(method, {layer: each.double() for layer, each in scores.items()}, task.widths, {}, counted.passes)


def _measured(task: Task, which: str, run: bool) -> Attributions:
    """Activity alone, or zeros: controls look at no matrix, but find the layers there."""
    activity = {layer.address: torch.zeros(layer.n_units, dtype=torch.float64) for layer in task.layers}
    n_images = len(task.concept if which == "concept" else task.reference)
    for images, _ in task.batches(which) if run else ():
        task.passes.forward += len(images)
        with torch.no_grad():
            values = activations(task.spec.model, task.addresses, images)
        for layer in task.layers:
            norms = torch.linalg.vector_norm(by_unit(values[layer.address], layer.unit_axis).double(), dim=2)
            activity[layer.address] += norms.sum(0).cpu() / n_images
    blank = [(s.address, t.address, torch.zeros(t.n_units, s.n_units)) for s, t in task.pairs]
    matrices = tuple(AttributionMatrix(source, target, zeros, zeros) for source, target, zeros in blank)
    return Attributions(matrices, activity, n_images)
