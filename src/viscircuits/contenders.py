"""What stands beside a circuit in the full suite, all of the circuit's size in each layer.

1. The controls of `evaluate`: random, most active, most raised over the reference, largest weights.
2. Random units outside the circuit; the circuit without refinement; the units with the largest gradient.
3. Other circuits that are given.

Those that score all units have a *ranking* (`at_size`): their own units first, by their score, then all others by
the score they would have been chosen by. It says what they are at any other size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from viscircuits.ablation import describe_layers
from viscircuits.attribution import Images
from viscircuits.circuit import Circuit
from viscircuits.evaluation import with_controls
from viscircuits.hooks import evaluating, forward, record
from viscircuits.images import batches
from viscircuits.layers import by_unit
from viscircuits.matrices import Attributions
from viscircuits.models import ModelSpec
from viscircuits.scores.controls import CONTROLS, UnitScores
from viscircuits.selection import reselect, same_size
from viscircuits.task import Finding, gradients, log_probability
from viscircuits.tracing import trace

OUTSIDE = "random, outside it"
Contenders = dict[str, list[Circuit]]


def contenders(
    spec: ModelSpec,
    circuit: Circuit,
    images: Images,
    *,
    attributions: Attributions | None = None,
    unit_scores: UnitScores | None = None,
    rivals: Mapping[str, Circuit] | None = None,
    found_with: Images | None = None,
    draws: int = 5,
    batch_size: int = 16,
    seed: int = 0,
) -> tuple[Contenders, dict[str, UnitScores]]:
    """Name → circuits, the one in question first, and name → scores of all units where there are any.

    Parameters
    ----------
    spec, circuit
        The network and the circuit in question.
    images
        Any images, to trace the network with.
    attributions
        What the circuit was selected from.
    unit_scores
        Scores it was chosen by, if it was not by attribution.
    rivals
        Other circuits.
    found_with
        Images of the concept that found the circuit: the gradient is taken on these.
    draws
        How many random circuits.
    batch_size
        Images per pass.
    seed
        Of the random circuits.

    Raises
    ------
    ViscircuitsError
        If `unit_scores` do not fit the circuit's layers.
    """
    circuits = with_controls(spec, circuit, attributions, images, draws, seed)
    scores = _scores(spec, circuit, attributions, images, seed)
    own = unit_scores if unit_scores is not None else strengths(attributions, circuit)
    if own is not None:
        same_size(circuit, own)  # says what does not fit
        scores["circuit"] = {layer: own[layer].double().cpu() for layer in circuit.layers}
    if found_with is not None and spec.outputs != "embedding":
        scores["gradient"] = gradient(spec, circuit.layers, found_with, batch_size)
        circuits["gradient"] = [same_size(circuit, scores["gradient"])]
    if (outside := _outside(circuit, draws, seed)) is not None:
        circuits[OUTSIDE] = outside
    if (plain := _without_refinement(attributions, circuit)) is not None:
        circuits["no refinement"] = [plain]
    circuits.update({name: [rival] for name, rival in (rivals or {}).items()})
    return circuits, scores if "circuit" in scores else {}  # the others' are there to be compared with its own


def strengths(attributions: Attributions | None, circuit: Circuit) -> UnitScores | None:
    """Each unit's summed attribution to all units of both adjacent layers, by the circuit's own contrast.

    None without attributions of the circuit's layers, or where some targets were not asked for.
    """
    contrasted = _contrasted(attributions, circuit)
    if contrasted is None:
        return None
    found = {layer: torch.zeros(width, dtype=torch.float64) for layer, width in contrasted.widths.items()}
    for matrix in contrasted.matrices:
        found[matrix.source] += matrix.values.double().cpu().sum(0)
        found[matrix.target] += matrix.values.double().cpu().sum(1)
    return found if all(bool(score.isfinite().all()) for score in found.values()) else None


def gradient(spec: ModelSpec, layers: Sequence[str], images: Images, batch_size: int) -> UnitScores:
    """The units in whose maps the log-probability of the network's answer is steepest: mean norm over images."""
    first = next(iter(batches(images, spec.transform, 1)))
    axes = {layer.address: layer.unit_axis for layer in describe_layers(spec, first.images, layers)}
    total: dict[str, Tensor] = {}
    n_images = 0
    with evaluating(spec.model), torch.enable_grad():
        for batch in batches(images, spec.transform, batch_size):
            with record(spec.model, layers) as seen:
                outputs = forward(spec.model, batch.images)
            judged = log_probability(outputs, outputs.argmax(1)).sum()
            for layer, steep in gradients(judged, seen).items():
                norms = by_unit(steep, axes[layer]).double().norm(dim=2)  # (image, unit)
                total[layer] = total.get(layer, 0) + norms.sum(0).cpu()
            n_images += len(batch)
    return {layer: total[layer] / n_images for layer in layers}


def at_size(circuit: Circuit, scores: UnitScores, fraction: float) -> Circuit:
    """The best part of a circuit's ranking: this share of each layer's units, and at least one.

    A circuit of unequal shares has a ranking all the same, but none of these parts is the circuit itself.

    Raises
    ------
    ViscircuitsError
        If `fraction` is not above 0 and up to 1.
    """
    ranking = {layer: _own_first(circuit, layer, scores[layer]) for layer in circuit.layers}
    return Finding("ranking", ranking, {layer: circuit.widths[layer] for layer in circuit.layers}).circuit(fraction)


def _own_first(circuit: Circuit, layer: str, scores: Tensor) -> Tensor:
    """Places from the last up: all units by `scores`, but the circuit's own above the others, by its scores."""
    n, own = circuit.widths[layer], list(circuit.units[layer])
    place = torch.empty(n, dtype=torch.float64)
    place[torch.sort(scores.double().cpu(), descending=True, stable=True).indices] = torch.arange(n, 0, -1).double()
    within = circuit.scores.get(layer)
    best = place[own] if within is None else torch.tensor(within, dtype=torch.float64)
    order = torch.sort(best, descending=True, stable=True).indices
    place[torch.tensor(own, dtype=torch.long)[order]] = torch.arange(len(own), 0, -1).double() + n
    return place


def _scores(
    spec: ModelSpec, circuit: Circuit, attributions: Attributions | None, images: Images, seed: int
) -> dict[str, UnitScores]:
    """Scores of all units by which controls are chosen."""
    generator = torch.Generator().manual_seed(seed + 1)
    found: dict[str, UnitScores] = {
        "random": {
            layer: torch.rand(circuit.widths[layer], generator=generator, dtype=torch.float64)
            for layer in circuit.layers
        }
    }
    if attributions is not None:
        traced = trace(spec.model, next(iter(batches(images, spec.transform, 1))).images)
        for name, control in CONTROLS.items():
            scores = control(attributions, spec.model, traced)
            if scores is not None:
                found[name] = scores
    return found


def _contrasted(attributions: Attributions | None, circuit: Circuit) -> Attributions | None:
    """The attributions as the circuit was selected from them; None where they are of other layers."""
    if attributions is None or attributions.layers != circuit.layers:
        return None
    contrast = circuit.provenance.get("contrast", "none")
    if "contrast" in attributions.provenance or contrast == "none":
        return attributions
    return None if attributions.reference is None else attributions.contrast(contrast)


def _without_refinement(attributions: Attributions | None, circuit: Circuit) -> Circuit | None:
    how, contrasted = circuit.selection, _contrasted(attributions, circuit)
    if contrasted is None or not {"refine", "k", "absolute"} <= set(how) or how["refine"] == "none":
        return None
    return reselect(contrasted, replace(circuit, selection={**how, "refine": "none"}))


def _outside(circuit: Circuit, draws: int, seed: int) -> list[Circuit] | None:
    """Random units that the circuit does not hold; None where some layer has too few of them."""
    rest = circuit.complement()
    if any(len(rest.units[layer]) < len(circuit.units[layer]) for layer in circuit.layers):
        return None
    generator = torch.Generator().manual_seed(seed + 2)
    found = []
    for _ in range(draws):
        priorities = {
            layer: torch.rand(width, generator=generator, dtype=torch.float64).index_fill(
                0, torch.tensor(circuit.units[layer], dtype=torch.long), -1
            )
            for layer, width in circuit.widths.items()
            if layer in circuit.units
        }
        found.append(same_size(circuit, priorities))
    return found
