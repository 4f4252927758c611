"""The ways to compute rows of one attribution matrix, all on the same recorded tensors.

Each way takes a `Pair` and the rows wanted, and yields `(rows, scores, contributions)` as the engines of
`viscircuits.scores` do; `drained` runs one for its time, `gathered` for its numbers.

1. ``loop``: one backward pass a target over one kept graph (`viscircuits.scores.loop`), the definition.
2. ``vmap``: the same backward passes at once, `torch.autograd.grad(…, is_grads_batched=True)`.
3. ``captum``: `NeuronGradient` on the module between the layers where the target layer reads nothing but the source
   layer; else `LayerGradientXActivation`, which runs the network from the images for every target.
4. ``float32``, ``bfloat16``: `viscircuits.scores.structured` in the two precisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from captum.attr import LayerGradientXActivation, NeuronGradient
from torch import Tensor, nn

from viscircuits.hooks import activations, evaluating, submodule
from viscircuits.layers import Layer, by_unit, parse_address
from viscircuits.models import ModelSpec
from viscircuits.scores import loop, structured
from viscircuits.scores.formulas import SCORES, SUMMARIES, signed
from viscircuits.tracing import resolve, trace

SCORE, SUMMARY = SCORES["cla"], SUMMARIES["norm"]

Rows = Tensor | None
Blocks = Iterator[tuple[Tensor | slice, Tensor, Tensor]]


@dataclass(frozen=True)
class Pair:
    """Two neighbouring layers of a network, recorded in one forward pass with gradients."""

    model: nn.Module
    images: Tensor
    source: Tensor
    target: Tensor
    source_layer: Layer
    target_layer: Layer
    costs: dict[Any, structured.Costs] = field(default_factory=dict)  # found once, as `attribute` does

    @property
    def recorded(self) -> tuple[Tensor, Tensor, Layer, Layer]:
        return self.source, self.target, self.source_layer, self.target_layer

    @property
    def n_targets(self) -> int:
        return self.target_layer.n_units


Way = Callable[[Pair, Rows], Blocks]


def recorded(spec: ModelSpec, images: Tensor, layers: tuple[str, ...] | None = None) -> list[Pair]:
    """Run the network once and return each pair of neighbouring layers, default ones if none are named."""
    with evaluating(spec.model):
        traced = trace(spec.model, images[:1])
        chain = resolve(spec.model, traced, layers or spec.layers or traced.default_layers())
        with torch.enable_grad():
            values = activations(spec.model, [layer.address for layer in chain], images)
    return [Pair(spec.model, images, values[a.address], values[b.address], a, b) for a, b in pairwise(chain)]


def by_loop(pair: Pair, rows: Rows) -> Blocks:
    return loop.blocks(*pair.recorded, SCORE, SUMMARY, rows=rows)


def by_structure(pair: Pair, rows: Rows, dtype: torch.dtype | None = None, left: set[str] | None = None) -> Blocks:
    """As engine ``auto`` does: what the structured engine refuses as a whole is the loop's."""
    try:
        costs = pair.costs.setdefault((dtype, None if rows is None else tuple(rows.tolist())), structured.Costs())
        yield from structured.blocks(*pair.recorded, SCORE, SUMMARY, rows=rows, dtype=dtype, left=left, costs=costs)
    except structured.Unsupported as error:  # raised before the first block
        if left is not None:
            left.add(f"all ({error})")
        yield from by_loop(pair, rows)


def by_vmap(pair: Pair, rows: Rows) -> Blocks:
    """All rows given as one batch of backward passes."""
    rows = torch.arange(pair.n_targets) if rows is None else rows
    activation = by_unit(pair.source.detach(), pair.source_layer.unit_axis)  # (image, source, position)
    maps = by_unit(pair.target, pair.target_layer.unit_axis)
    sums = torch.stack([SUMMARY(maps[:, n]).sum() for n in rows.tolist()])
    gradients = torch.autograd.grad(sums, pair.source, torch.eye(len(rows)), retain_graph=True, is_grads_batched=True)
    each = [by_unit(gradient, pair.source_layer.unit_axis) for gradient in gradients[0]]
    yield (
        rows,
        torch.stack([SCORE(activation, gradient) for gradient in each], 1),
        torch.stack([signed(activation, gradient) for gradient in each], 1),
    )


def by_captum(pair: Pair, rows: Rows) -> Blocks:
    """The signed contributions alone; captum has no cross-layer score."""
    axis, layer = pair.source_layer.unit_axis, pair.target_layer
    attribute = _captum_of_module(pair) if reads_only_source(pair) else _captum_of_network(pair)
    for n in range(layer.n_units) if rows is None else rows.tolist():
        products = by_unit(attribute(n).detach(), axis).sum(2).unsqueeze(1)
        yield torch.tensor([n]), products, products


def reads_only_source(pair: Pair) -> bool:
    """Whether the target's module takes the source layer's output and nothing else."""
    with torch.no_grad():
        address = pair.target_layer.address + ":in"
        given = activations(pair.model, [address], pair.images)[address]
    return given.shape == pair.source.shape and torch.equal(given, pair.source)


def _captum_of_module(pair: Pair) -> Callable[[int], Tensor]:
    module = submodule(pair.model, parse_address(pair.target_layer.address))
    gradient = NeuronGradient(module, module)
    source = pair.source.detach().clone().requires_grad_()
    return lambda n: source * gradient.attribute(source, neuron_selector=partial(_norm, pair, n))


def _captum_of_network(pair: Pair) -> Callable[[int], Tensor]:
    module, address = submodule(pair.model, parse_address(pair.source_layer.address)), pair.target_layer.address

    def forward(images: Tensor, n: int) -> Tensor:
        return _norm(pair, n, activations(pair.model, [address], images)[address])

    gradient = LayerGradientXActivation(forward, module)
    images = pair.images.clone().requires_grad_()
    return lambda n: gradient.attribute(images, additional_forward_args=(n,))


def _norm(pair: Pair, n: int, maps: Tensor) -> Tensor:
    return SUMMARY(by_unit(maps, pair.target_layer.unit_axis)[:, n])


MAY_FAIL = ("vmap", "captum")  # they do not take every network
WAYS: dict[str, Way] = {
    "loop": by_loop,
    "vmap": by_vmap,
    "captum": by_captum,
    "float32": by_structure,
    "bfloat16": partial(by_structure, dtype=torch.bfloat16),
}


def drained(way: Way, pair: Pair, rows: Rows) -> None:
    """Run a way and keep nothing but the sum over images, as `viscircuits.attribute` does."""
    for _, scores, contributions in way(pair, rows):
        scores.double().sum(0), contributions.double().sum(0)


def gathered(way: Way, pair: Pair, rows: Rows) -> tuple[Tensor, Tensor]:
    """Scores and signed contributions, (image, row, source), in the order of the rows."""
    parts = [(_numbers(each), scores, contributions) for each, scores, contributions in way(pair, rows)]
    order = torch.cat([each for each, _, _ in parts]).argsort()
    scores, contributions = (torch.cat([part[i] for part in parts], 1)[:, order] for i in (1, 2))
    return scores, contributions


def _numbers(rows: Tensor | slice) -> Tensor:
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.cpu()


def evenly(n: int, k: int) -> Tensor:
    """Up to `k` of `n` indices, spread evenly from the first to the last, in rising order."""
    return torch.linspace(0, n - 1, min(n, k)).round().long().unique()
