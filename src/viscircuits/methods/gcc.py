"""Granular Concept Circuits: forward from the units that a concept excites, along connections that matter and agree.

1. *Roots* are units whose activation on the image is among the highest of a pool of images.
2. The *sensitivity* of target n to source m is what n loses when m is muted, if it loses anything, as a share
   of what all units of the next layer lose: ``max(0, a_n − a_n without m) / Σ_n' max(0, …)``.
3. The *semantic flow* from m to n is the share of the images on which m is highest that are among those on
   which n is highest.
4. From the roots on, follow the connections whose semantic flow is above its mean over the layer pair.

The paper cuts sensitivity at a threshold from extreme-value theory and gets one circuit for each root of one
image. Here a number for each unit and edge is wanted, and a task has many images; what that made us decide is
said at `gcc`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import Tap, activations, rewrite
from viscircuits.layers import Layer, along_units, by_unit
from viscircuits.task import Finding, Pair, Task, costing


def gcc(task: Task, *, top: int | None = None, threshold: float | None = None, muted: str = "zero") -> Finding:
    """What flows from the concept's roots through each edge and into each unit.

    ``edge m→n = flow(m) · sensitivity(m→n)`` where the semantic flow from m to n is above the threshold, else 0;
    ``flow(n) = root share of n + Σ_m edge m→n``. As sensitivities of a source sum to 1, this is the expected number
    of walks from the roots that arrive.

    Known from the paper: muting to zero, the clipping at 0 and the normalisation over targets, semantic flow and
    its mean as threshold, roots and the forward search. Decided here: the pool is the task's concept and
    reference images (it was ImageNet's validation images); the highest are the `top` of them for roots and for
    semantic flow alike (the paper's 1 % would be no image of a small pool); sensitivity is taken image by image and
    averaged over the concept's; a map is judged by its spatial mean; no threshold on sensitivity, since a
    circuit of any size is to be cut from the ranking.

    Parameters
    ----------
    task
        The behaviour plays no part: the method asks what the concept excites, not what it leads to.
    top
        How many images of the pool are a unit's highest; by default as many as the concept has.
    threshold
        Semantic flow that a connection must exceed; by default the mean over its pair of layers.
    muted
        What a muted source becomes: ``zero``, as published, or ``task`` for the task's ablation.

    Raises
    ------
    ViscircuitsError
        If `top` is not between 1 and the size of the pool, or `muted` is unknown.

    References
    ----------
    Kwon, Lee and Choi 2025, arXiv:2508.01728.
    """
    n_pool = len(task.concept) + len(task.reference)
    top = len(task.concept) if top is None else top
    if not 1 <= top <= n_pool:
        raise ViscircuitsError(f"top is how many of the pool's {n_pool} images are a unit's highest, got {top}")
    if muted not in ("zero", "task"):
        raise ViscircuitsError(f"a source is muted to 'zero' or to what the 'task' ablates with, got {muted!r}")
    with costing(task) as counted, torch.no_grad():
        highest = _highest(counted, top)
        flow = {task.addresses[0]: _root_share(highest[task.addresses[0]], task)}
        edges: dict[Pair, Tensor] = {}
        for source, target in task.pairs:
            pair = (source.address, target.address)
            agreement = semantic_flow(highest[source.address], highest[target.address])
            passed = agreement > (agreement.mean() if threshold is None else threshold)
            edges[pair] = flow[source.address] * sensitivity(counted, source, target, muted) * passed
            flow[target.address] = _root_share(highest[target.address], task) + edges[pair].sum(1)
    return Finding(
        "gcc", flow, task.widths, edges, counted.passes, {"top": top, "threshold": threshold, "muted": muted}
    )


def semantic_flow(
    source: Bool[Tensor, "pool source"], target: Bool[Tensor, "pool target"]
) -> Float[Tensor, "target source"]:
    """Share of the images on which each source is highest that are also among each target's."""
    return target.float().T @ source.float() / source.float().sum(0).clamp(min=1)


def sensitivity(task: Task, source: Layer, target: Layer, muted: str) -> Float[Tensor, "target source"]:
    """What each target loses when a source is muted, as a share of what all targets lose.

    Mean over the concept's images, one pass over them for each source. A source to which no target loses
    anything has zeros.
    """
    total = torch.zeros(target.n_units, source.n_units, dtype=torch.float64)
    for images, _ in task.batches():
        whole = _mean_maps(task, images, target, {})
        for m in range(source.n_units):
            taps = {source.address: partial(_muted, task, source, m, muted)}
            loss = (whole - _mean_maps(task, images, target, taps)).clamp(min=0)
            together = loss.sum(1, keepdim=True)
            total[:, m] += (loss / together.where(together > 0, 1)).sum(0).cpu()
    return (total / len(task.concept)).float()


def _muted(task: Task, layer: Layer, unit: int, muted: str, values: Tensor) -> Tensor:
    mask = along_units((torch.arange(layer.n_units) == unit).float(), values, layer.unit_axis) > 0
    return torch.where(mask, task.baseline(layer, values) if muted == "task" else 0, values)


def _mean_maps(task: Task, images: Tensor, layer: Layer, taps: Mapping[str, Tap]) -> Float[Tensor, "image unit"]:
    task.passes.forward += len(images)
    with rewrite(task.spec.model, taps):
        values = activations(task.spec.model, [layer.address], images)[layer.address]
    return by_unit(values, layer.unit_axis).mean(2).double()


def _highest(task: Task, top: int) -> dict[str, Bool[Tensor, "pool unit"]]:
    """On which images each unit is highest, the concept's first; on none if it is the same on all."""
    seen: dict[str, list[Tensor]] = {address: [] for address in task.addresses}
    for which in ("concept", "reference"):
        for images, _ in task.batches(which):
            task.passes.forward += len(images)
            values = activations(task.spec.model, task.addresses, images)
            for layer in task.layers:
                seen[layer.address].append(by_unit(values[layer.address], layer.unit_axis).mean(2).cpu())
    found = {}
    for address, parts in seen.items():
        means = torch.cat(parts)
        least = means.sort(0, descending=True).values[top - 1]
        found[address] = (means >= least) & (means > means.amin(0))
    return found


def _root_share(highest: Bool[Tensor, "pool unit"], task: Task) -> Float[Tensor, " unit"]:
    """Share of the concept's images that are among each unit's highest."""
    return highest[: len(task.concept)].float().mean(0)
