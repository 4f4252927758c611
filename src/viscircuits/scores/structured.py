"""Attribution between two layers by what the network's structure allows: the loop's numbers, cheaper.

A target's cotangent is one channel. Walking the recorded autograd graph from target to source, it
is kept in the smallest form that is still exact, for a chunk of targets at a time:

1. `One`: a map in a single channel. It stays so through whatever does not mix channels: activations,
   batch norm, pooling, depthwise convolution, concatenation, the identity of a residual block.
2. `Spread`: the same map in every channel, times a number for each channel. The first 1×1
   convolution makes it, and further ones only change the numbers, so a linear bottleneck costs one
   small matrix product for all targets.
3. `Dense`: a map for each channel. Only what follows a spatial mixing convolution, or an activation
   after a mixing one, is computed in this form.

Several paths into one value are added up. An operation not known here raises `Unsupported` before
anything is returned, and the caller takes the loop for that pair of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn.functional import conv_transpose2d

from viscircuits.layers import Layer
from viscircuits.scores.formulas import cla, grad_x_act, gradient_only, signed
from viscircuits.scores.loop import Block, Score, Summary

CHUNK_BYTES = 64 * 2**20
N_REHEARSED = 4


class Unsupported(Exception):
    """An operation between two layers that has no rule here."""


@dataclass(frozen=True)
class One:
    """Row r is zero but for channel `channels[r]`, which holds `maps[:, r]`."""

    maps: Tensor  # (image, row, height, width)
    channels: Tensor  # (row,)
    rows: Tensor  # (row,) which targets of the chunk


@dataclass(frozen=True)
class Spread:
    """Channel c of row r is `mix[r, c] · maps[:, r]`."""

    maps: Tensor  # (image, row, height, width)
    mix: Tensor  # (row, channel)
    rows: Tensor


@dataclass(frozen=True)
class Dense:
    """Every channel of every row."""

    maps: Tensor  # (image, row, channel, height, width)
    rows: Tensor


Cotangent = One | Spread | Dense
Rule = Callable[["_Graph", Node, Cotangent], list[Cotangent | None]]


def blocks(
    source: Tensor,
    target: Tensor,
    source_layer: Layer,
    target_layer: Layer,
    score: Score,
    summary: Summary,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Block]:
    """Yield scores and signed contributions of every source, for a chunk of targets at a time.

    Raises
    ------
    Unsupported
        Before anything is yielded, if the way between the layers holds an operation without a rule.
    """
    if source.ndim != 4 or target.ndim != 4 or source_layer.unit_axis != 1 or target_layer.unit_axis != 1:
        raise Unsupported("tokens or vectors (it knows maps of shape (image, unit, height, width))")
    if not (source.requires_grad and target.requires_grad):
        raise Unsupported("a way that no gradient takes")
    graph = _Graph(source, target)
    maps = _own_gradients(target, summary)  # (image, target, height, width)
    with torch.no_grad():
        graph.rehearse(maps)
        activation = source.detach().flatten(2).float()  # (image, source, position)
        step = max(1, chunk_bytes // max(graph.row_bytes, 1))
        for first in range(0, maps.shape[1], step):
            chunk = slice(first, min(first + step, maps.shape[1]))
            cotangent = graph.pull(_start(maps, chunk))
            yield chunk, *_scored(cotangent, activation, score, chunk.stop - chunk.start)


def _own_gradients(target: Tensor, summary: Summary) -> Tensor:
    """`∂s_n/∂A_n` for every target: its summary sees no other unit, so one backward pass does all."""
    values = target.detach().requires_grad_()
    with torch.enable_grad():
        s = torch.stack([summary(each.float()) for each in values.flatten(2).unbind(1)])
        return torch.autograd.grad(s.sum(), values)[0]


def _start(maps: Tensor, chunk: slice) -> One:
    channels = torch.arange(chunk.start, chunk.stop, device=maps.device)
    return One(maps[:, chunk], channels, channels - chunk.start)


# ------------------------------------------------------------------ walking the graph


class _Graph:
    """The part of the autograd graph that lies between two recorded tensors."""

    def __init__(self, source: Tensor, target: Tensor) -> None:
        edge = get_gradient_edge(source)
        self.end, self.end_output = edge.node, edge.output_nr
        self.start = get_gradient_edge(target).node
        self.order = self._between()
        self.slopes: dict[Node, Tensor] = {}
        self.row_bytes = 0  # the most that one target takes up on the way
        if not self.order:
            raise Unsupported("a way that no gradient takes")

    def _between(self) -> list[Node]:
        """Nodes on a path from target to source, each before the nodes it passes cotangents to."""
        leads: dict[Node, bool] = {self.end: True}
        order: list[Node] = []
        stack: list[tuple[Node, bool]] = [(self.start, False)]
        while stack:
            node, seen = stack.pop()
            following = [n for n, _ in node.next_functions if n is not None]
            if seen:
                leads[node] = any(leads[n] for n in following)
                if leads[node]:
                    order.append(node)
            elif node not in leads:
                leads[node] = False
                stack.append((node, True))
                stack += [(n, False) for n in following if n not in leads]
        self.leads = leads
        return order[::-1]

    def rehearse(self, maps: Tensor) -> None:
        """Go every way once, so that what is not known here is found now, and measure the memory it takes.

        A dense cotangent goes down every branch of a concatenation; a few single targets, spread
        over the branches, show how much of it stays in the smaller forms.
        """
        self.pull(Dense(maps[:, None], torch.zeros(1, dtype=torch.long, device=maps.device)))
        self.row_bytes = 0
        for n in range(0, maps.shape[1], max(1, maps.shape[1] // N_REHEARSED)):
            self.pull(_start(maps, slice(n, n + 1)))

    def pull(self, cotangent: Cotangent) -> Cotangent | None:
        """Carry a cotangent of the target back to the source; None if no path reaches it."""
        n_rows = len(cotangent.rows)
        waiting: dict[Node, Cotangent] = {self.start: cotangent}
        for node in self.order:
            here = waiting.pop(node, None)
            if here is None:
                continue
            if node.name() not in RULES:
                raise Unsupported(node.name())
            passed = RULES[node.name()](self, node, here)
            for (following, output), each in zip(node.next_functions, passed, strict=True):
                if following is None or each is None or not self.leads.get(following, False):
                    continue
                if output != (self.end_output if following is self.end else 0):
                    raise Unsupported(f"{following.name()} with several outputs")
                self._measure(each)
                waiting[following] = (
                    _add(waiting[following], each, n_rows, shape_of(following)[1]) if following in waiting else each
                )
        return waiting.get(self.end)

    def slope(self, node: Any) -> Tensor:
        """Derivative of an elementwise operation at every position: its cotangent of ones."""
        if node not in self.slopes:
            meta = node._input_metadata[0]
            self.slopes[node] = node(torch.ones(tuple(meta.shape), dtype=meta.dtype, device=meta.device))
        return self.slopes[node]

    def _measure(self, cotangent: Cotangent) -> None:
        n_bytes = 3 * cotangent.maps.numel() * cotangent.maps.element_size()
        self.row_bytes = max(self.row_bytes, n_bytes // len(cotangent.rows))


def shape_of(node: Any) -> tuple[int, ...]:
    """Shape of the value a node's cotangent belongs to."""
    return tuple(node._input_metadata[0].shape)


def _dense(cotangent: Cotangent, n_channels: int) -> Dense:
    if isinstance(cotangent, Dense):
        return cotangent
    if isinstance(cotangent, Spread):
        return Dense(cotangent.maps.unsqueeze(2) * cotangent.mix[None, :, :, None, None], cotangent.rows)
    n_images, n_rows, height, width = cotangent.maps.shape
    maps = cotangent.maps.new_zeros(n_images, n_rows, n_channels, height, width)
    maps[:, torch.arange(n_rows), cotangent.channels] = cotangent.maps
    return Dense(maps, cotangent.rows)


def _add(a: Cotangent, b: Cotangent, n_rows: int, n_channels: int) -> Cotangent:
    if (
        isinstance(a, One)
        and isinstance(b, One)
        and torch.equal(a.rows, b.rows)
        and torch.equal(a.channels, b.channels)
    ):
        return One(a.maps + b.maps, a.channels, a.rows)
    dense = [_dense(each, n_channels) for each in (a, b)]
    n_images, _, _, height, width = dense[0].maps.shape
    maps = dense[0].maps.new_zeros(n_images, n_rows, n_channels, height, width)
    for each in dense:
        maps.index_add_(1, each.rows, each.maps)
    return Dense(maps, torch.arange(n_rows, device=maps.device))


# ------------------------------------------------------------------ rules, one for each kind of operation


def _pass_on(graph: _Graph, node: Node, cotangent: Cotangent) -> list[Cotangent | None]:
    return [cotangent]


def _elementwise(graph: _Graph, node: Node, cotangent: Cotangent) -> list[Cotangent | None]:
    slope = graph.slope(node)  # (image, channel, height, width)
    return [_times(cotangent, slope)]


def _times(cotangent: Cotangent, factor: Tensor) -> Cotangent:
    """Multiply by a factor of shape (image or 1, channel, height or 1, width or 1)."""
    if isinstance(cotangent, One):
        return One(cotangent.maps * factor[:, cotangent.channels], cotangent.channels, cotangent.rows)
    dense = _dense(cotangent, factor.shape[1])
    return Dense(dense.maps * factor.unsqueeze(1), dense.rows)


def _batch_norm(graph: _Graph, node: Any, cotangent: Cotangent) -> list[Cotangent | None]:
    if node._saved_training:
        raise Unsupported("batch norm in training mode")
    scale = (node._saved_running_var + node._saved_eps).rsqrt()
    scale = scale if node._saved_weight is None else scale * node._saved_weight
    if isinstance(cotangent, Spread):
        return [Spread(cotangent.maps, cotangent.mix * scale, cotangent.rows), None, None]
    return [_times(cotangent, scale[None, :, None, None]), None, None]


def _add_inputs(graph: _Graph, node: Any, cotangent: Cotangent) -> list[Cotangent | None]:
    shape = shape_of(node)
    if any(n is not None and graph.leads.get(n) and shape_of(n) != shape for n, _ in node.next_functions):
        raise Unsupported("a broadcast sum")
    return [cotangent, _scaled(cotangent, node._saved_alpha)]


def _scaled(cotangent: Cotangent, factor: int | float) -> Cotangent:
    if factor == 1:
        return cotangent
    return type(cotangent)(**{**cotangent.__dict__, "maps": cotangent.maps * factor})


def _product(graph: _Graph, node: Any, cotangent: Cotangent) -> list[Cotangent | None]:
    sides = (node._saved_other, node._saved_self)  # what each input is multiplied with
    passed: list[Cotangent | None] = []
    for (following, _), factor in zip(node.next_functions, sides, strict=True):
        if following is None or not graph.leads.get(following, False):
            passed.append(None)
            continue
        if not isinstance(factor, Tensor) or factor.ndim != 4:
            raise Unsupported("a product with something other than a map")
        product = _times(cotangent, factor.expand(-1, shape_of(node)[1], -1, -1))
        if shape_of(following) != shape_of(node):
            if shape_of(following) != (*shape_of(node)[:2], 1, 1):
                raise Unsupported("a broadcast product")
            summed = product.maps.sum((-2, -1), keepdim=True)
            product = type(product)(**{**product.__dict__, "maps": summed})
        passed.append(product)
    return passed


def _concatenation(graph: _Graph, node: Any, cotangent: Cotangent) -> list[Cotangent | None]:
    if node._saved_dim not in (1, 2**64 - 3):
        raise Unsupported("a concatenation along another axis than the units'")
    passed: list[Cotangent | None] = []
    start = 0
    for following, _ in node.next_functions:
        if following is None:
            raise Unsupported("a concatenation with a constant")
        stop = start + shape_of(following)[1]
        if following.name() == "torch::autograd::AccumulateGrad":
            stop = start + following.variable.shape[1]
        passed.append(_slice_channels(cotangent, start, stop))
        start = stop
    return passed


def _slice_channels(cotangent: Cotangent, start: int, stop: int) -> Cotangent | None:
    if isinstance(cotangent, Dense):
        return Dense(cotangent.maps[:, :, start:stop], cotangent.rows)
    if isinstance(cotangent, Spread):
        return Spread(cotangent.maps, cotangent.mix[:, start:stop], cotangent.rows)
    mine = (cotangent.channels >= start) & (cotangent.channels < stop)
    if not mine.any():
        return None
    return One(cotangent.maps[:, mine], cotangent.channels[mine] - start, cotangent.rows[mine])


def _padding(graph: _Graph, node: Any, cotangent: Cotangent) -> list[Cotangent | None]:
    pad = [p - 2**64 if p >= 2**63 else p for p in node._saved_pad]
    if len(pad) > 4 or min(pad) < 0:
        raise Unsupported("padding of other axes")
    left, right, top, bottom = (*pad, 0, 0)[:4]
    height, width = cotangent.maps.shape[-2:]
    cropped = cotangent.maps[..., top : height - bottom, left : width - right]
    return [type(cotangent)(**{**cotangent.__dict__, "maps": cropped})]


def _spatial_mean(graph: _Graph, node: Any, cotangent: Cotangent) -> list[Cotangent | None]:
    sizes = tuple(node._saved_self_sym_sizes)
    dims = {d - 2**64 + 4 if d >= 2**63 else d for d in node._saved_dim}
    if not node._saved_keepdim or dims != {2, 3}:
        raise Unsupported("a mean over other axes")
    spread = cotangent.maps.expand(*cotangent.maps.shape[:-2], *sizes[-2:]) / (sizes[-1] * sizes[-2])
    return [type(cotangent)(**{**cotangent.__dict__, "maps": spread})]


def _max_pool(graph: _Graph, node: Any, cotangent: Cotangent) -> list[Cotangent | None]:
    given, indices = node._saved_self, node._saved_result1
    if isinstance(cotangent, Spread):
        cotangent = _dense(cotangent, given.shape[1])
    if isinstance(cotangent, One):
        given, indices = given[:, cotangent.channels], indices[:, cotangent.channels]
        return [One(_max_unpool(node, cotangent.maps, given, indices), cotangent.channels, cotangent.rows)]
    n_images, n_rows = cotangent.maps.shape[:2]
    flat = cotangent.maps.flatten(0, 1)
    repeated = (t.repeat_interleave(n_rows, 0) for t in (given, indices))
    return [Dense(_max_unpool(node, flat, *repeated).unflatten(0, (n_images, n_rows)), cotangent.rows)]


def _max_unpool(node: Any, maps: Tensor, given: Tensor, indices: Tensor) -> Tensor:
    return torch.ops.aten.max_pool2d_with_indices_backward(
        maps.contiguous(), given, node._saved_kernel_size, node._saved_stride, node._saved_padding,
        node._saved_dilation, node._saved_ceil_mode, indices,
    )  # fmt: skip


def _average_pool(graph: _Graph, node: Any, cotangent: Cotangent) -> list[Cotangent | None]:
    flat = cotangent.maps.flatten(0, -4) if cotangent.maps.ndim > 4 else cotangent.maps
    like = flat.new_zeros(()).expand(*flat.shape[:2], *node._saved_self.shape[-2:])
    maps = torch.ops.aten.avg_pool2d_backward(
        flat.contiguous(), like, node._saved_kernel_size, node._saved_stride, node._saved_padding,
        node._saved_ceil_mode, node._saved_count_include_pad, node._saved_divisor_override,
    )  # fmt: skip
    maps = maps.reshape(*cotangent.maps.shape[:-2], *maps.shape[-2:])
    return [type(cotangent)(**{**cotangent.__dict__, "maps": maps})]


def _convolution(graph: _Graph, node: Any, cotangent: Cotangent) -> list[Cotangent | None]:
    weight, groups = node._saved_weight, node._saved_groups
    if node._saved_transposed or weight.ndim != 4:
        raise Unsupported("a transposed or non-spatial convolution")
    n_channels = weight.shape[1] * groups
    pull = _Pull(node)
    passed: Cotangent
    if isinstance(cotangent, Spread) and groups > 1:
        cotangent = _dense(cotangent, weight.shape[0])
    if isinstance(cotangent, Dense):
        flat = cotangent.maps.flatten(0, 1)
        maps = pull(flat, weight, groups).unflatten(0, cotangent.maps.shape[:2])
        return [Dense(maps, cotangent.rows), None, None]
    if isinstance(cotangent, Spread):
        kernels = torch.einsum("rc,cikl->rikl", cotangent.mix, weight)
    else:
        kernels = weight[cotangent.channels]  # (row, channels of its group, height, width)
    n_rows = len(kernels)
    if weight.shape[2:] == (1, 1) and groups == 1:
        ones = kernels.new_ones(n_rows, 1, 1, 1)
        passed = Spread(pull(cotangent.maps, ones, n_rows), kernels[:, :, 0, 0], cotangent.rows)
        return [passed, None, None]
    maps = pull(cotangent.maps, kernels, n_rows)  # (image, row · channel of its group, height, width)
    if groups == n_channels and isinstance(cotangent, One):
        into = cotangent.channels // (weight.shape[0] // groups)
        return [One(maps, into, cotangent.rows), None, None]
    maps = maps.unflatten(1, (n_rows, -1))
    if groups > 1 and isinstance(cotangent, One):
        maps = _place_groups(maps, cotangent.channels // (weight.shape[0] // groups), groups)
    return [Dense(maps, cotangent.rows), None, None]


class _Pull:
    """A convolution's transposed map with the padding that leads back to its input's very size."""

    def __init__(self, node: Any) -> None:
        self.stride, self.padding, self.dilation = node._saved_stride, node._saved_padding, node._saved_dilation
        self.size = node._saved_input.shape[-2:]

    def __call__(self, maps: Tensor, weight: Tensor, groups: int) -> Tensor:
        extra = [
            size - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for size, out, stride, padding, dilation, kernel in zip(
                self.size, maps.shape[-2:], self.stride, self.padding, self.dilation, weight.shape[-2:], strict=True
            )
        ]
        return conv_transpose2d(
            maps, weight, stride=self.stride, padding=self.padding, output_padding=extra, groups=groups,
            dilation=self.dilation,
        )  # fmt: skip


def _place_groups(maps: Tensor, group: Tensor, groups: int) -> Tensor:
    """Put each row's channels where its group's inputs lie, zeros elsewhere."""
    n_images, n_rows, size, height, width = maps.shape
    placed = maps.new_zeros(n_images, n_rows, groups, size, height, width)
    placed[:, torch.arange(n_rows), group] = maps
    return placed.flatten(2, 3)


RULES: Mapping[str, Rule] = {
    "ConvolutionBackward0": _convolution,
    "NativeBatchNormBackward0": _batch_norm,
    "AddBackward0": _add_inputs,
    "MulBackward0": _product,
    "CatBackward0": _concatenation,
    "ConstantPadNdBackward0": _padding,
    "MeanBackward1": _spatial_mean,
    "MaxPool2DWithIndicesBackward0": _max_pool,
    "AvgPool2DBackward0": _average_pool,
    "CloneBackward0": _pass_on,
    **dict.fromkeys(
        (f"{name}Backward{variant}" for variant in (0, 1) for name in (  # 1: some that worked in place
            "Relu", "Hardtanh", "Gelu", "Silu", "Hardswish", "LeakyRelu", "Elu", "Sigmoid", "Hardsigmoid", "Tanh",
            "Softplus", "Mish", "Threshold",
        )),
        _elementwise,
    ),
}  # fmt: skip


# ------------------------------------------------------------------ scoring what arrives at the source


def _scored(cotangent: Cotangent | None, activation: Tensor, score: Score, n_rows: int) -> tuple[Tensor, Tensor]:
    """Scores and signed contributions, (image, target, source), of a cotangent at the source."""
    n_images, n_sources, _ = activation.shape
    values, contributions = (activation.new_zeros(n_images, n_rows, n_sources) for _ in range(2))
    if cotangent is None:
        return values, contributions
    maps = cotangent.maps.flatten(-2).float()
    if isinstance(cotangent, One):
        mine = activation[:, cotangent.channels]
        values[:, cotangent.rows, cotangent.channels] = score(mine, maps)
        contributions[:, cotangent.rows, cotangent.channels] = signed(mine, maps)
        return values, contributions
    if isinstance(cotangent, Spread) and score in _SPREAD:
        mix = cotangent.mix.float()
        values[:, cotangent.rows] = _SPREAD[score](activation, maps, mix)
        contributions[:, cotangent.rows] = _SPREAD[signed](activation, maps, mix)
        return values, contributions
    maps = _dense(cotangent, n_sources).maps.flatten(3).float()  # (image, row, source, position)
    values[:, cotangent.rows] = score(activation.unsqueeze(1), maps)
    contributions[:, cotangent.rows] = torch.einsum("irsp,isp->irs", maps, activation)
    return values, contributions


def _norms(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dim=-1)


# the formulas of scores/formulas.py for a gradient mix[r, s] · maps[r]: (image, source, position),
# (image, row, position), (row, source) → (image, row, source)
_SPREAD: Mapping[Score, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    cla: lambda a, g, mix: _norms(g).unsqueeze(2) * _norms(a).unsqueeze(1) * mix.abs(),
    grad_x_act: lambda a, g, mix: (g.abs() @ a.abs().transpose(1, 2)) * mix.abs(),
    signed: lambda a, g, mix: (g @ a.transpose(1, 2)) * mix,
    gradient_only: lambda a, g, mix: _norms(g).unsqueeze(2) * mix.abs(),
}
