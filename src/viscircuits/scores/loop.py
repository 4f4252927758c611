"""Attribution between two layers, one backward pass for each target: the plain way.

This is the definition, written to be read; anything faster is checked against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from viscircuits.errors import LayerError
from viscircuits.layers import Layer, by_unit
from viscircuits.scores.formulas import signed

Score = Callable[[Tensor, Tensor], Tensor]
Summary = Callable[[Tensor], Tensor]
Block = tuple[Tensor, Tensor, Tensor]  # targets, scores and signed contributions (image, target, source)


def blocks(
    source: Tensor,
    target: Tensor,
    source_layer: Layer,
    target_layer: Layer,
    score: Score,
    summary: Summary,
    rows: Tensor | None = None,
) -> Iterator[Block]:
    """Yield, target by target, the score of every source and its signed contribution, per image.

    `rows` says which targets, all by default. `source` and `target` are recorded in one forward
    pass with gradients. Images do not see one another, so the gradient of the sum over images holds
    each image's own gradient.

    Raises
    ------
    LayerError
        If no gradient flows from the target to the source.
    """
    activation = by_unit(source.detach(), source_layer.unit_axis).float()  # (image, source, position)
    maps = by_unit(target, target_layer.unit_axis).float()  # (image, target, position)
    for n in torch.arange(target_layer.n_units) if rows is None else rows:
        s = summary(maps[:, n])  # (image,)
        gradient = _gradient(s.sum(), source)
        if gradient is None:
            raise LayerError(
                f"no gradient flows from layer {target_layer.address!r} back to {source_layer.address!r}: the network "
                "detaches or rounds what lies between them, or runs it under torch.no_grad; choose other layers"
            )
        gradient = by_unit(gradient, source_layer.unit_axis).float()  # (image, source, position)
        row = score(activation, gradient), signed(activation, gradient)
        yield n[None], row[0].unsqueeze(1), row[1].unsqueeze(1)


def _gradient(s: Tensor, source: Tensor) -> Tensor | None:
    if not (s.requires_grad and source.requires_grad):
        return None
    return torch.autograd.grad(s, source, retain_graph=True, allow_unused=True)[0]
