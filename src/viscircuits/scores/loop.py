"""Attribution between two layers, one backward pass for each target: the plain way.

This is the definition, written to be read; anything faster is checked against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from viscircuits.layers import Layer, by_unit
from viscircuits.scores.formulas import signed

Score = Callable[[Tensor, Tensor], Tensor]
Summary = Callable[[Tensor], Tensor]
Block = tuple[slice, Tensor, Tensor]  # targets, scores and signed contributions (image, target, source)


def blocks(
    source: Tensor, target: Tensor, source_layer: Layer, target_layer: Layer, score: Score, summary: Summary
) -> Iterator[Block]:
    """Yield, target by target, the score of every source and its signed contribution, per image.

    `source` and `target` are recorded in one forward pass with gradients. Images do not see one
    another, so the gradient of the sum over images holds each image's own gradient.
    """
    activation = by_unit(source.detach(), source_layer.unit_axis).float()  # (image, source, position)
    summaries = [summary(each) for each in by_unit(target, target_layer.unit_axis).float().unbind(dim=1)]
    for n, s in enumerate(summaries):  # s: (image,)
        (gradient,) = torch.autograd.grad(s.sum(), source, retain_graph=True, materialize_grads=True)
        gradient = by_unit(gradient, source_layer.unit_axis).float()  # (image, source, position)
        row = score(activation, gradient), signed(activation, gradient)
        yield slice(n, n + 1), row[0].unsqueeze(1), row[1].unsqueeze(1)
