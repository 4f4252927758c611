"""What a circuit must beat: units chosen by something simpler than attribution.

Each control gives one number for each unit of each layer; a control circuit takes as many units a
layer as the circuit it stands beside. Random circuits are drawn in `viscircuits.selection`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from viscircuits.matrices import Attributions
from viscircuits.tracing import Operation, Trace

UnitScores = dict[str, Float[Tensor, " unit"]]


def activation(attributions: Attributions, model: nn.Module, trace: Trace) -> UnitScores | None:
    """The units most active on the concept: mean over images of the L2 norm of their maps."""
    return dict(attributions.activity)


def activation_difference(attributions: Attributions, model: nn.Module, trace: Trace) -> UnitScores | None:
    """The units whose activity the concept raises most over the reference; none without a reference."""
    if attributions.reference is None:
        return None
    before = attributions.reference.activity
    return {layer: mine - before[layer] for layer, mine in attributions.activity.items()}


def weight_norm(attributions: Attributions, model: nn.Module, trace: Trace) -> UnitScores | None:
    """The units with the largest incoming weights, batch norm's scale included; blind to images.

    None if at some layer no weights can be found that make its units.
    """
    weights: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    norms = {layer: _incoming_norm(trace, weights, trace.value(layer)) for layer in attributions.layers}
    widths = attributions.widths
    if any(norm is None or len(norm) != widths[layer] for layer, norm in norms.items()):
        return None
    return {layer: norm.detach().float().cpu() for layer, norm in norms.items() if norm is not None}


CONTROLS: dict[str, Callable[[Attributions, nn.Module, Trace], UnitScores | None]] = {
    "activation": activation,
    "activation difference": activation_difference,
    "weight norm": weight_norm,
}


def _incoming_norm(trace: Trace, weights: Mapping[str, Tensor], value: int) -> Tensor | None:
    """Norm of the weights that make each unit of a value, walking back to where they are applied."""
    operation = trace.producers.get(value)
    if operation is None:
        return None
    if operation.name in ("conv1d", "conv2d", "conv3d", "linear", "addmm"):
        weight = _weight(operation, weights)
        return None if weight is None else weight.flatten(1).norm(dim=1)
    if operation.name in ("cat", "concat", "concatenate"):
        pieces = [_incoming_norm(trace, weights, piece) for piece in operation.inputs]
        return None if any(piece is None for piece in pieces) else torch.cat([p for p in pieces if p is not None])
    if operation.name in ("add", "add_", "__add__", "__iadd__"):
        branches = [_incoming_norm(trace, weights, branch) for branch in operation.inputs]
        squares = [branch.square() for branch in branches if branch is not None]
        return torch.stack(squares).sum(0).sqrt() if len({len(s) for s in squares}) == 1 else None
    before = _incoming_norm(trace, weights, operation.inputs[0])
    if operation.name == "batch_norm" and before is not None:
        return before * _batch_norm_scale(operation, weights)
    return before


def _weight(operation: Operation, weights: Mapping[str, Tensor]) -> Tensor | None:
    return next((weights[name] for name in operation.weights if name.endswith("weight")), None)


def _batch_norm_scale(operation: Operation, weights: Mapping[str, Tensor]) -> Tensor:
    named = {name.rpartition(".")[2]: weights[name] for name in operation.weights}
    scale = torch.ones(())
    if "weight" in named:
        scale = named["weight"].abs()
    if "running_var" in named:
        epsilon = next((a for a in reversed(operation.arguments) if isinstance(a, float)), 1e-5)  # its last argument
        scale = scale / (named["running_var"] + epsilon).sqrt()
    return scale
