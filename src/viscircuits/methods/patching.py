"""Attribution patching: what removing a unit or an edge would do, were the network linear between here and there.

With a the values, r what the ablation puts in their place and T the behaviour:

1. A unit's effect is about ``Σ_p (a − r) ⊙ ∂T/∂a``: one forward and one backward pass give all units.
2. An edge's is ``Σ_p (a_m − r_m) ⊙ (∂a_n/∂a_m)ᵀ ∂T/∂a_n``, all paths between the two layers included: one more
   backward pass for each target, from ``∂T/∂a_n`` in n alone, or the structured engine's way of doing many.
3. Integrated gradients average the gradients along a straight path from where everything is replaced.

Layers are recorded as *differences*: the number recorded is what multiplies the gradient, and the network runs on
from the true values, so that the engines of `viscircuits.scores` compute the edges as they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import product

import torch
from torch import Tensor

from viscircuits.budget import ENGINES, Scoring
from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import Tap, activations, forward, record, rewrite
from viscircuits.layers import Layer, by_unit
from viscircuits.methods.exact import Effects
from viscircuits.scores.formulas import SCORES, SUMMARIES, choose
from viscircuits.scores.structured import CHUNK_BYTES
from viscircuits.task import Finding, Task, costing, gradients

Difference = Callable[[Layer, Tensor], Tensor]  # a layer's values → what its gradient is multiplied by
Rules = Callable[[], AbstractContextManager]  # how the forward pass is recorded for the backward one


def attribution_patching(task: Task, *, edges: bool = True, engine: str = "auto") -> Finding:
    """Size of the first-order effect of each unit, ``|Σ_p (a − r) ⊙ ∂T/∂a|``, and of each edge as in `eap`.

    Parameters
    ----------
    task
        What to explain; its ablation is ``zero`` or ``mean``.
    edges
        Score edges too: the cost grows from one backward pass to one for each target.
    engine
        ``auto``, ``structured`` or ``loop``, as for `attribute`.

    References
    ----------
    Nanda 2023, neelnanda.io/mechanistic-interpretability/attribution-patching; Syed et al. 2023, arXiv:2310.10348.
    """
    with costing(task) as counted:
        found = first_order(counted, edges=edges, engine=engine)
    return found.finding("attribution-patching", counted, {"edges": edges, "engine": engine})


def eap(task: Task, *, engine: str = "auto") -> Finding:
    """Size of the first-order effect of each edge; a unit scores what the strongest of its edges does.

    A circuit of edges is cut at a threshold, and a unit enters it with its first edge: hence the largest.

    Parameters
    ----------
    task
        What to explain; its ablation is ``zero`` or ``mean``.
    engine
        As for `attribution_patching`.

    References
    ----------
    Syed et al. 2023, arXiv:2310.10348.
    """
    with costing(task) as counted:
        edges = first_order(counted, edges=True, engine=engine).edges
    found = Effects(_strongest(counted, edges), edges)
    return found.finding("eap", counted, {"engine": engine})


def eap_ig(task: Task, *, path: str = "inputs", steps: int = 5, edges: bool = True, engine: str = "auto") -> Finding:
    """As `attribution_patching`, with gradients averaged along a straight path.

    Parameters
    ----------
    task
        What to explain; its ablation is ``zero`` or ``mean``.
    path
        ``inputs``: images on their way from the mean reference image; the difference ``a − r`` is that on the image
        itself. ``activations``: one source layer after another, its values on their way from r; then a layer's unit
        effects add up to that of removing the whole layer, as steps grow. ``all``: the same in all layers at once.
    steps
        Points on the path, in the middle of as many equal parts of it.
    edges, engine
        As for `attribution_patching`.

    References
    ----------
    Hanna et al. 2024, arXiv:2403.17806 (``inputs``); Marks et al. 2024, arXiv:2403.19647 (``activations``);
    Sundararajan et al. 2017, arXiv:1703.01365.
    """
    with costing(task) as counted:
        found = integrated(counted, path, steps, edges=edges, engine=engine)
    return found.finding("eap-ig", counted, {"path": path, "steps": steps, "edges": edges, "engine": engine})


def integrated(task: Task, path: str, steps: int, *, edges: bool, engine: str, sizes: bool = False) -> Effects:
    """Signed first-order effects averaged along a path; with `sizes` also the mean size of each edge's.

    Parameters
    ----------
    task
        As for `eap_ig`, but as `viscircuits.task.costing` gives it: the network in evaluation mode.
    path, steps, edges, engine
        As for `eap_ig`.
    sizes
        Average the size of an edge's effect on each image at each point too.
    """
    walk = choose(PATHS, path, "path")
    if steps < 1:
        raise ViscircuitsError(f"a path needs 1 step or more, got {steps}")
    return walk(_Sums(task, edges, engine, sizes=sizes), steps)


def first_order(task: Task, *, edges: bool = True, engine: str = "auto", rules: Rules = nullcontext) -> Effects:
    """Signed first-order effects of units, and of edges.

    Parameters
    ----------
    task, edges, engine
        As for `attribution_patching`.
    rules
        A context in which the network is run, and what is differentiated afterwards recorded.
    """
    sums = _Sums(task, edges, engine, rules)
    for images, labels in task.batches():
        sums.add(images, labels, sums.from_baseline)
    return sums.effects()


def _strongest(task: Task, edges: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """For each unit the largest size among the edges that it takes part in."""
    units = {layer.address: torch.zeros(layer.n_units, dtype=torch.float64) for layer in task.layers}
    for (source, target), effects in edges.items():
        units[source] = torch.maximum(units[source], effects.abs().amax(0))
        units[target] = torch.maximum(units[target], effects.abs().amax(1))
    return units


class _Sums:
    """Adds up first-order effects over images."""

    def __init__(
        self, task: Task, edges: bool, engine: str, rules: Rules = nullcontext, *, sizes: bool = False
    ) -> None:
        self.task, self.rules = task, rules
        self.found = Effects.none(task, edges=edges, sizes=sizes)
        engines = choose(ENGINES, engine, "engine")
        every_row = [None] * len(task.pairs)
        self.scoring = Scoring(task.layers, SCORES["signed"], SUMMARIES["sum"], every_row, engines)

    def effects(self) -> Effects:
        """Means over the task's concept images."""
        return self.found.averaged(len(self.task.concept))

    def from_baseline(self, layer: Layer, values: Tensor) -> Tensor:
        """How far values are from what the ablation makes of them."""
        return values - self.task.baseline(layer, values)

    def add(
        self,
        images: Tensor,
        labels: Tensor,
        difference: Difference,
        *,
        replaced: Mapping[str, Tap] | None = None,
        of: Layer | None = None,
        share: float = 1.0,
    ) -> None:
        """Add a batch's effects, weighted by `share`: of every layer's units and edges, or of one layer's alone."""
        task = self.task
        task.passes.forward += len(images)
        task.passes.backward += len(images)
        with torch.enable_grad(), rewrite(task.spec.model, replaced or {}), _differences(task, difference) as values:
            with self.rules():
                outputs = forward(task.spec.model, images)
            slopes = gradients(task.judge(outputs, labels).sum(), values, keep=True)
            for layer in task.layers if of is None else [of]:
                effect = (values[layer.address].detach() * slopes[layer.address]).double()
                self.found.units[layer.address].add_(by_unit(effect, layer.unit_axis).sum((0, 2)).cpu(), alpha=share)
            for i, (source, _) in enumerate(task.pairs if self.found.edges else []):
                if of in (None, source):
                    self._add_edges(i, values, slopes, share)

    def _add_edges(self, i: int, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor], share: float) -> None:
        source, target = self.task.pairs[i]
        pair = source.address, target.address
        # the gradient of Σ_p a_n ⊙ ∂T/∂a_n, its second factor held fast, is (∂a_n/∂a_m)ᵀ ∂T/∂a_n
        weighted = values[target.address] * gradients[target.address]
        given = {source.address: values[source.address], target.address: weighted}
        self.task.passes.backward += len(weighted) * target.n_units
        first = self.scoring.engines[0]
        for targets, effects, _ in self.scoring.blocks(i, given, first, None, CHUNK_BYTES, lambda *_: None):
            effects = effects.detach().double()
            self.found.edges[pair][targets] += share * effects.sum(0).cpu()
            if pair in self.found.sizes:
                self.found.sizes[pair][targets] += share * effects.abs().sum(0).cpu()


@contextmanager
def _differences(task: Task, difference: Difference) -> Iterator[dict[str, Tensor]]:
    """Record at each layer `difference` of its values in their place; the network runs on from the values.

    The gradient of anything in what is recorded is its gradient in the values.
    """
    rest: dict[str, Tensor] = {}

    def take(layer: Layer) -> Tap:
        def tap(values: Tensor) -> Tensor:
            rest[layer.address] = (values - difference(layer, values)).detach()
            return values - rest[layer.address]

        return tap

    def give_back(layer: Layer) -> Tap:
        return lambda recorded: recorded + rest[layer.address]

    with ExitStack() as stack:  # taps of one layer run in the order in which they were attached
        stack.enter_context(rewrite(task.spec.model, {layer.address: take(layer) for layer in task.layers}))
        values = stack.enter_context(record(task.spec.model, task.addresses))
        stack.enter_context(rewrite(task.spec.model, {layer.address: give_back(layer) for layer in task.layers}))
        yield values


# ------------------------------------------------------------------ paths


def _along_inputs(sums: _Sums, steps: int) -> Effects:
    task = sums.task
    if task.concept.shape[1:] != task.reference.shape[1:]:
        raise ViscircuitsError(
            f"concept images have shape {tuple(task.concept.shape[1:])}, reference images "
            f"{tuple(task.reference.shape[1:])}: no mean reference image lies on a path to the concept's; "
            "use path='activations'"
        )
    start = task.reference.mean(0, keepdim=True)
    for images, labels in task.batches():
        task.passes.forward += len(images)
        with torch.no_grad():
            values = activations(task.spec.model, task.addresses, images)
        whole = {each.address: sums.from_baseline(each, values[each.address]) for each in task.layers}

        def on_images(layer: Layer, _: Tensor, whole: Mapping[str, Tensor] = whole) -> Tensor:
            return whole[layer.address]

        for at in _middles(steps):
            sums.add(start + at * (images - start), labels, on_images, share=1 / steps)
    return sums.effects()


def _along_activations(sums: _Sums, steps: int) -> Effects:
    for (images, labels), layer, at in product(sums.task.batches(), sums.task.layers, _middles(steps)):

        def approach(values: Tensor, layer: Layer = layer, at: float = at) -> Tensor:
            start = sums.task.baseline(layer, values)
            return start + at * (values - start)

        def whole(layer: Layer, values: Tensor, at: float = at) -> Tensor:
            return sums.from_baseline(layer, values) / at

        sums.add(images, labels, whole, replaced={layer.address: approach}, of=layer, share=1 / steps)
    return sums.effects()


def _along_all(sums: _Sums, steps: int) -> Effects:
    for (images, labels), at in product(sums.task.batches(), _middles(steps)):

        def approach(layer: Layer, at: float = at) -> Tap:
            def tap(values: Tensor) -> Tensor:
                start = sums.task.baseline(layer, values)
                return start + at * (values - start)

            return tap

        def whole(layer: Layer, values: Tensor, at: float = at) -> Tensor:
            return sums.from_baseline(layer, values) / at

        taps = {layer.address: approach(layer) for layer in sums.task.layers}
        sums.add(images, labels, whole, replaced=taps, share=1 / steps)
    return sums.effects()


def _middles(steps: int) -> list[float]:
    return [(step + 0.5) / steps for step in range(steps)]


PATHS: dict[str, Callable[[_Sums, int], Effects]] = {
    "inputs": _along_inputs,
    "activations": _along_activations,
    "all": _along_all,
}
