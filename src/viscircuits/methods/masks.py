"""Learned masks: gates on units or edges, trained until few are open and the behaviour is still there.

1. A gate is ``z = clamp(s·(ζ − γ) + γ, 0, 1)`` with ``s = σ((log u − log(1 − u) + log α) / β)`` and u uniform: with
   some probability it is exactly 0, with some exactly 1, and log α can be learned by gradient.
2. For each λ, minimise ``D(gates) / D(all shut) + λ · expected share of gates that are not 0`` over log α.
3. A score is the probability that the gate is not shut, averaged over the λ: what survives a larger price
   comes sooner.

Unlike other methods this one optimises what circuits are judged by, on all units at once, so what it finds
bounds what a score could; as it is trained by gradient from one start the bound is itself approximate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from viscircuits.errors import ViscircuitsError
from viscircuits.methods.wiring import Wiring, best_leaving
from viscircuits.task import Finding, Task, costing

PRICES = (0.1, 0.3, 1.0)
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # temperature and stretch, as Louizos et al. chose them
MARGIN = 1e-6  # how far the noise stays from 0 and 1, whose logarithms are infinite


def masks(
    task: Task,
    *,
    edges: bool = False,
    prices: Sequence[float] = PRICES,
    metric: str = "behaviour",
    steps: int = 60,
    rate: float = 0.2,
    start: float = 5.0,
    seed: int | None = None,
) -> Finding:
    """Probability that the trained gate of each unit, and of each edge if asked for, is not shut: between 0 and 1.

    A step runs all concept images forward and back once, for edges once more for each unit that has incoming
    ones; every image of a step has the same gates. A unit's score, with `edges`, is that of the best
    connection that leaves it.

    Parameters
    ----------
    task
        Ablated with ``zero`` or ``mean``: what a shut gate lets through.
    edges
        A gate for every edge between adjacent layers; for small networks.
    prices
        The λ, each trained on its own from the start. At 1 all gates together cost what losing everything does.
    metric
        ``behaviour`` (mean absolute change) or ``kl`` of all outputs.
    steps, rate
        Of Adam, for each λ.
    start
        The log α that training begins from. At 5 three gates of a hundred are not fully open: where units must
        work together, more of them at once would hide what each does, and all would be shut.
    seed
        Of the gates' noise; by default the task's.

    Raises
    ------
    ViscircuitsError
        If there is no price or step, an option is unknown, or removing everything changes nothing.

    References
    ----------
    Louizos et al. 2018, arXiv:1712.01312 (the gates); Bhaskar et al. 2024, arXiv:2406.16778 (on edges).
    """
    if not prices or min(prices) < 0 or steps < 1:
        raise ViscircuitsError(f"masks need prices of 0 or more and at least one step, got {tuple(prices)} and {steps}")
    options: dict[str, Any] = {
        "edges": edges,
        "prices": [float(each) for each in prices],
        "metric": metric,
        "steps": steps,
        "rate": rate,
        "start": start,
        "seed": task.seed if seed is None else seed,
    }
    with costing(task) as counted:
        wiring = Wiring(counted, metric)
        trained = [_train(wiring, _gates(wiring, edges, start), price, options) for price in options["prices"]]
    found = {
        name: torch.stack([open_probability(logits[name].detach()) for logits in trained]).mean(0)
        for name in trained[0]
    }
    of_edges = {i: found["edges", i] for kind, i in found if kind == "edges"}
    onward = {i: found["onward", i] for kind, i in found if kind == "onward"}
    units = {layer.address: best_leaving(i, of_edges, onward) for i, layer in enumerate(task.layers)}
    between = {(task.addresses[i], task.addresses[i + 1]): scores for i, scores in of_edges.items()}
    return Finding("masks", units, task.widths, between, counted.passes, options)


Logits = Mapping[tuple[str, int], Tensor]  # (edges or onward, place of the source's layer) → log α


def _gates(wiring: Wiring, edges: bool, start: float) -> Logits:
    widths = [layer.n_units for layer in wiring.layers]
    shapes: dict[tuple[str, int], tuple[int, ...]] = {}
    for i, width in enumerate(widths):
        if edges and i + 1 < len(widths):
            shapes["edges", i] = (widths[i + 1], width)
        if not edges or i in wiring.around:
            shapes["onward", i] = (width,)
    return {name: torch.full(shape, start, requires_grad=True) for name, shape in shapes.items()}


def _train(wiring: Wiring, logits: Logits, price: float, options: Mapping[str, Any]) -> Logits:
    """Lower the loss at one price; the gradient of each batch is added up before a step."""
    generator = torch.Generator().manual_seed(options["seed"])
    free = list(logits.values())
    n_gates = sum(each.numel() for each in free)
    n_images = len(wiring.task.concept)
    optimiser = torch.optim.Adam(free, lr=options["rate"])
    for _ in range(options["steps"]):
        noise = {name: _noise(each.shape, generator) for name, each in logits.items()}
        size = torch.stack([open_probability(each).sum() for each in free]).sum() / n_gates
        slopes = list(torch.autograd.grad(price * size, free))
        for batch in wiring.batches:
            gates = {name: gate(each, noise[name]) for name, each in logits.items()}
            edges, onward = ({i: z for (kind, i), z in gates.items() if kind == of} for of in ("edges", "onward"))
            distances = wiring.distances(batch, edges, onward, {})
            wiring.task.passes.backward += len(batch.images)
            found = torch.autograd.grad(distances.sum() / n_images / wiring.empty, free, allow_unused=True)
            slopes = [slope if more is None else slope + more for slope, more in zip(slopes, found, strict=True)]
        for each, slope in zip(free, slopes, strict=True):
            each.grad = slope
        optimiser.step()
    return logits


def gate(logits: Float[Tensor, "*gates"], noise: Float[Tensor, "*gates"]) -> Float[Tensor, "*gates"]:
    """Hard-concrete gates between 0 and 1, both included, for noise uniform between 0 and 1."""
    concrete = ((noise.logit() + logits) / BETA).sigmoid()
    return (concrete * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(logits: Float[Tensor, "*gates"]) -> Float[Tensor, "*gates"]:
    """Probability that a gate is not 0: ``σ(log α − β · log(−γ / ζ))``."""
    return (logits - BETA * math.log(-GAMMA / ZETA)).sigmoid()


def _noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (1 - 2 * MARGIN) + MARGIN
