"""Scores for one target number: what convolution kernels (SNIP) and activations (ActGrad) do to it, to first order.

1. A kernel is what a convolution or linear layer does from one of its inputs to one of its outputs.
2. Find, for each layer, the convolutions whose outputs become its units, through whatever keeps units apart:
   activations, norms of batches, pooling, sums and concatenations. Their kernels are its *incoming kernels*.
3. Where such a convolution reads the layer before, in the same sense, its kernels are the edges between the two.

A pair of layers that no single convolution joins (two of them lie between, or a norm over units) has no edges.
The target is the task's behaviour, or the size of one unit of the last layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import forward, record, submodule
from viscircuits.layers import by_unit, parse_address
from viscircuits.task import Finding, Observed, Pair, Task, costing, gradients
from viscircuits.tracing import Trace, trace

Module = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear

_JOINED = re.compile(r"(cat|concat|concatenate)")
_APART = re.compile(  # what a unit becomes depends on that unit alone, up to a scale for each
    r".*(relu|gelu|silu|swish|mish|elu|hardtanh|softplus|tanh|sigmoid|pool|dropout|clamp).*"
    r"|batch_norm|identity|clone|contiguous|detach|add_?|__i?add__|mul_?|__i?mul__|mean|flatten|reshape|view|squeeze|transpose|permute",
    re.IGNORECASE,
)


def snip(task: Task, *, target: int | None = None) -> Finding:
    """Sum over each kernel's weights of ``|w ⊙ ∂T/∂w|``; a unit's score is the sum over its incoming kernels.

    The gradient is averaged over the concept's images before the bars. The published code averages over a
    kernel's weights; within a pair of layers the order is the same. The ablation plays no part.

    Parameters
    ----------
    task
        Each of its layers must have incoming kernels.
    target
        T is the sum of this unit's absolute map in the last layer; by default the behaviour.

    Raises
    ------
    ViscircuitsError
        If a layer has no incoming kernels, or there is no such unit.

    References
    ----------
    Lee et al. 2019, arXiv:1810.02340; for features Hamblin, Konkle and Alvarez 2022, arXiv:2206.01627.
    """
    with costing(task) as counted:
        kernels = _kernels(counted)
        for layer in task.addresses:
            if not kernels[layer]:
                raise ViscircuitsError(
                    f"no convolution or linear layer makes the units of layer {layer!r} unit by unit, so it has no "
                    "kernels to score; choose layers behind one (`viscircuits layers MODEL`), or 'actgrad'"
                )
        slopes = {each.address: torch.zeros_like(each.module.weight) for each in _every(kernels)}
        for images, labels in counted.batches():
            seen = _observe(counted, images, labels, target, kernels)
            for address, each in _unlike(kernels).items():
                slopes[address] += _weight_gradient(each, seen)
    saliency = {
        address: _kernel_sums((slopes[address] / len(task.concept) * each.module.weight.detach()).abs(), each.module)
        for address, each in _unlike(kernels).items()
    }
    units = {layer: _incoming(saliency, kernels[layer], width) for layer, width in task.widths.items()}
    return Finding("snip", units, task.widths, _edges(task, kernels, saliency), counted.passes, {"target": target})


def actgrad(task: Task, *, target: int | None = None) -> Finding:
    """Sum over positions of ``|a ⊙ ∂T/∂a|``, mean over the concept's images: of units, and of what kernels put out.

    An edge's activation is what its kernel alone adds to the convolution's output, before the sum over
    inputs. Positions are summed where the published code averages: within a pair of layers the order is the
    same. The ablation plays no part: units are judged against zero.

    Parameters
    ----------
    task
        Layers without incoming kernels are scored too; they have no edges.
    target
        As for `snip`.

    Raises
    ------
    ViscircuitsError
        If there is no such unit.

    References
    ----------
    Hamblin, Konkle and Alvarez 2022, arXiv:2206.01627.
    """
    with costing(task) as counted:
        kernels = _kernels(counted)
        units = {layer: torch.zeros(width, dtype=torch.float64) for layer, width in task.widths.items()}
        joining = {each.address: each for each in _every(kernels) if each.reads}
        saliency: dict[str, Tensor] = {}
        for images, labels in counted.batches():
            seen = _observe(counted, images, labels, target, kernels)
            for layer in task.layers:
                parts = (seen.values[layer.address] * seen.gradients[layer.address]).abs()
                units[layer.address] += by_unit(parts, layer.unit_axis).double().sum((0, 2)).cpu()
            for address, each in joining.items():
                saliency[address] = saliency.get(address, 0) + _put_out(each, seen)
    n_images = len(task.concept)
    saliency = {address: total / n_images for address, total in saliency.items()}
    scores = {layer: (total / n_images).float() for layer, total in units.items()}
    return Finding("actgrad", scores, task.widths, _edges(task, kernels, saliency), counted.passes, {"target": target})


# ------------------------------------------------------------------ which kernels there are


@dataclass(frozen=True)
class Kernels:
    """One call of a convolution whose outputs are units of a layer, from `first` on.

    `reads` says where the layer before stands among its inputs: the first, and how many in a row belong to
    each unit; None if it does not read that layer.
    """

    address: str
    module: Module
    first: int
    reads: tuple[int, int] | None


def _kernels(task: Task) -> dict[str, list[Kernels]]:
    """Incoming kernels of each layer."""
    model = task.spec.model
    traced = trace(model, task.concept)
    found: dict[str, list[Kernels]] = {}
    before: int | None = None
    for layer in task.addresses:
        value = traced.value(layer)
        found[layer] = list(_behind(model, traced, value, before))
        before = value
    return found


def _behind(model: nn.Module, traced: Trace, value: int, before: int | None) -> Iterable[Kernels]:
    places = {place: first for place, first, block in _same_units(traced, value) if block == 1}
    n_calls = {call.name: 0 for call in traced.calls}
    for call in traced.calls:
        n_calls[call.name] += 1
    for call in traced.calls:
        module = submodule(model, parse_address(call.name))
        if not isinstance(module, Module) or call.outputs[0] not in places:
            continue
        inputs = {place: (first, block) for place, first, block in _same_units(traced, call.inputs[0])}
        address = call.name if n_calls[call.name] == 1 else f"{call.name}@{call.index}"
        reads = inputs.get(before) if before is not None else None
        yield Kernels(address, module, places[call.outputs[0]], reads)


def _same_units(traced: Trace, value: int) -> list[tuple[int, int, int]]:
    """Values whose units are this one's: the value, the place of its first unit in this one, and entries for each."""
    found: dict[int, tuple[int, int]] = {}
    waiting = [(value, 0, 1)]
    while waiting:
        here, first, block = waiting.pop()
        if here in found:
            continue
        found[here] = (first, block)
        operation = traced.producers.get(here)
        if operation is None:
            continue
        given = [each for each in operation.inputs if len(traced.shapes[each]) >= 2]
        if _JOINED.fullmatch(operation.name):
            if sum(_n_units(traced, each) for each in given) == _n_units(traced, here):
                for each in given:
                    waiting.append((each, first, block))
                    first += _n_units(traced, each) * block
        elif _APART.fullmatch(operation.name):
            waiting += [(each, first, block * ratio) for each in given if (ratio := _ratio(traced, each, here))]
    return [(each, *place) for each, place in found.items()]


def _n_units(traced: Trace, value: int) -> int:
    return traced.shapes[value][traced.axes[value]]


def _ratio(traced: Trace, given: int, made: int) -> int:
    """How many entries of `made` each unit of `given` became: 1 where units stay, 0 where they do not."""
    before, after = traced.shapes[given], traced.shapes[made]
    if _n_units(traced, given) == _n_units(traced, made):
        alone = traced.producers[made].inputs == (given,) and len(after) <= len(before)  # not broadcast against another
        return int(before == after or alone)
    flattened = len(after) == 2 and traced.axes[given] == 1 and torch.Size(before[1:]).numel() == after[1]
    return after[1] // before[1] if flattened else 0


def _every(kernels: Mapping[str, list[Kernels]]) -> list[Kernels]:
    return [each for of_layer in kernels.values() for each in of_layer]


def _unlike(kernels: Mapping[str, list[Kernels]]) -> dict[str, Kernels]:
    """Each call once, though several layers may be made of it."""
    return {each.address: each for each in _every(kernels)}


# ------------------------------------------------------------------ what they do


def _observe(
    task: Task, images: Tensor, labels: Tensor, target: int | None, kernels: Mapping[str, list[Kernels]]
) -> Observed:
    """Values and gradients of T at the layers, and at both sides of each convolution."""
    task.passes.forward += len(images)
    task.passes.backward += len(images)
    sides = [side for address in _unlike(kernels) for side in (address, f"{address}:in")]
    wanted = list(dict.fromkeys([*task.addresses, *sides]))
    with torch.enable_grad(), record(task.spec.model, wanted) as seen:
        outputs = forward(task.spec.model, images)
        judged = task.judge(outputs, labels) if target is None else _size_of(task, seen, target)
        slopes = gradients(judged.sum(), seen)
    return Observed({name: value.detach() for name, value in seen.items()}, slopes, judged.detach())


def _size_of(task: Task, seen: Mapping[str, Tensor], target: int) -> Float[Tensor, " image"]:
    layer = task.layers[-1]
    if not 0 <= target < layer.n_units:
        raise ViscircuitsError(f"there is no unit {target} in layer {layer.address!r}, which has {layer.n_units}")
    return by_unit(seen[layer.address], layer.unit_axis)[:, target].abs().sum(1)


def _weight_gradient(kernels: Kernels, seen: Observed) -> Tensor:
    """∂T/∂w of one call, summed over images, without touching the parameter."""
    weight = kernels.module.weight.detach().clone().requires_grad_()
    with torch.enable_grad():
        made = functional_call(kernels.module, {"weight": weight}, (seen.values[f"{kernels.address}:in"],))
        return torch.autograd.grad(made, weight, seen.gradients[kernels.address])[0]


def _put_out(kernels: Kernels, seen: Observed) -> Float[Tensor, "out input"]:
    """``Σ |c ⊙ ∂T/∂y|`` over images and positions, where c is what one kernel alone adds to the output y."""
    given, slope = seen.values[f"{kernels.address}:in"], seen.gradients[kernels.address]
    module = kernels.module
    if isinstance(module, nn.Linear):
        sizes = torch.einsum("...i,...o->oi", given.abs(), slope.abs())
        return (sizes * module.weight.detach().abs()).double().cpu()
    within = module.weight.shape[1]
    unbiased = {} if module.bias is None else {"bias": torch.zeros_like(module.bias)}
    found = torch.zeros(module.weight.shape[:2], dtype=torch.float64)
    for m in range(within):  # one input of each group at a time
        alone = torch.zeros_like(given)
        alone[:, m::within] = given[:, m::within]
        with torch.no_grad():
            put_out = functional_call(module, unbiased, (alone,))
        found[:, m] = (put_out * slope).abs().transpose(0, 1).flatten(1).double().sum(1).cpu()
    return _ungrouped(found, module)


def _kernel_sums(per_weight: Tensor, module: Module) -> Float[Tensor, "out input"]:
    return _ungrouped(per_weight.unsqueeze(2).flatten(2).double().sum(2).cpu(), module)


def _ungrouped(per_kernel: Float[Tensor, "out within"], module: Module) -> Float[Tensor, "out input"]:
    """Kernels of a grouped convolution at their own inputs, zeros where there are none."""
    return per_kernel if isinstance(module, nn.Linear) else torch.block_diag(*per_kernel.chunk(module.groups))


def _incoming(saliency: Mapping[str, Tensor], kernels: list[Kernels], width: int) -> Float[Tensor, " unit"]:
    total = torch.zeros(width, dtype=torch.float64)
    for each in kernels:
        of_outputs = saliency[each.address].sum(1)
        total[each.first : each.first + len(of_outputs)] += of_outputs
    return total.float()


def _edges(
    task: Task, kernels: Mapping[str, list[Kernels]], saliency: dict[str, Tensor]
) -> dict[Pair, Float[Tensor, "_target _source"]]:
    edges: dict[Pair, Tensor] = {}
    for source, target in task.pairs:
        total = torch.zeros(target.n_units, source.n_units, dtype=torch.float64)
        for each in kernels[target.address]:
            if each.reads is None:
                continue
            first, block = each.reads
            columns = saliency[each.address][:, first : first + source.n_units * block]
            total[each.first : each.first + len(columns)] += columns.unflatten(1, (source.n_units, block)).sum(2)
            edges[source.address, target.address] = total
    return {pair: total.float() for pair, total in edges.items()}
