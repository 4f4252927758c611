"""Rules for maps (image, unit, height, width): convolution, batch norm, pooling, concatenation, padding.

Elementwise operations, sums and products are here as well; they hold for values of any shape.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, pad, unfold

from viscircuits.scores.structured import winograd
from viscircuits.scores.structured.forms import (
    Cotangent,
    Dense,
    Factored,
    One,
    Spread,
    Through,
    Unpooled,
    along,
    as_dense,
    mixed,
    scaled,
    settled,
)
from viscircuits.scores.structured.graph import Graph, Passed, Rule, Unknown

BIG = 2**63  # what torch keeps of a negative number is larger than this


def signed_int(value: int) -> int:
    """A number that torch kept as unsigned."""
    return value - 2 * BIG if value >= BIG else value


# ------------------------------------------------------------------ elementwise


def pass_on(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """The identity."""
    return [cotangent]


def elementwise(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """An operation whose derivative is one number a position, which autograd gives for a cotangent of ones."""
    on_way = [graph.is_on(place) for place in node.next_functions]
    if sum(on_way) != 1 or graph.shape_at(node.next_functions[on_way.index(True)]) != graph.shape_at((node, 0)):
        raise Unknown
    return [multiplied(graph, node, cotangent, graph.slope(node)) if on else None for on in on_way]


def multiplied(graph: Graph, node: Any, cotangent: Cotangent, factor: Tensor, which: int = 0) -> Cotangent:
    """Multiply by a factor that broadcasts to the shape of the node's output, the `which`-th that the node has."""
    shape = graph.shape_at((node, 0))
    factor = factor.reshape([1] * (len(shape) - factor.ndim) + list(factor.shape))
    if isinstance(cotangent, One):
        by_unit = factor.expand(shape).movedim(cotangent.axis, 0)
        return replace(cotangent, maps=cotangent.maps * by_unit[cotangent.units].to(cotangent.maps.dtype))
    if isinstance(cotangent, Dense):
        gain = cotangent.gain
        weighed = graph.keep(node, f"factor {which} {id(gain)}", lambda: _weighed_factor(factor, gain, graph.dtype))
        return Dense(cotangent.maps * weighed, cotangent.rows)
    if isinstance(cotangent, Spread):
        cotangent = replace(cotangent, maps=cotangent.maps.to(graph.dtype), mix=cotangent.mix.to(graph.dtype))
    dense = as_dense(cotangent, shape[cotangent.axis]).maps.to(graph.dtype)
    cast = graph.keep(node, f"factor {which}", lambda: _weighed_factor(factor, None, graph.dtype))
    return Dense(dense.mul_(cast), cotangent.rows)


def _weighed_factor(factor: Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (factor if gain is None else factor * along(gain[None], 1, factor.ndim)).to(dtype)


def add(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """A sum, `first + alpha · second`, without broadcasting of what leads to the source."""
    shape = graph.shape_at((node, 0))
    on_way = [graph.is_on(place) for place in node.next_functions]
    if any(on and graph.shape_at(place) != shape for on, place in zip(on_way, node.next_functions, strict=True)):
        raise Unknown
    if all(on_way) and isinstance(cotangent, Dense):
        cotangent = replace(cotangent, shared=True)
    return [cotangent, scaled(cotangent, node._saved_alpha * (-1 if "Sub" in node.name() else 1))]


def product(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """A product of two values, either of which may be broadcast over positions."""
    others = (node._saved_other, node._saved_self)  # what each input is multiplied with
    passed: Passed = []
    for which, (place, factor) in enumerate(zip(node.next_functions, others, strict=True)):
        if not graph.is_on(place):
            passed.append(None)
            continue
        if not isinstance(factor, Tensor):
            raise Unknown
        passed.append(_summed_to(graph, place, multiplied(graph, node, cotangent, factor, which), node))
    return passed


def _summed_to(graph: Graph, place: Any, cotangent: Cotangent, node: Any) -> Cotangent:
    """Add up over the positions that were broadcast."""
    shape, full = graph.shape_at(place), graph.shape_at((node, 0))
    if shape == full:
        return cotangent
    if len(shape) != len(full):
        raise Unknown
    axes = [axis for axis, (small, large) in enumerate(zip(shape, full, strict=True)) if small != large]
    cotangent = _densely(cotangent)
    if isinstance(cotangent, Dense):
        return Dense(cotangent.maps.sum([axis + 1 for axis in axes], keepdim=True), cotangent.rows)
    if cotangent.axis in axes:
        raise Unknown
    own = [axis + 1 if axis < cotangent.axis else axis for axis in axes]  # the unit axis is missing in its maps
    return replace(cotangent, maps=cotangent.maps.sum(own, keepdim=True))


# ------------------------------------------------------------------ batch norm, concatenation, padding, pooling


def batch_norm(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """In evaluation mode: one number a unit."""
    if node._saved_training:
        raise Unknown
    if isinstance(cotangent, One | Spread | Through) and cotangent.axis != 1:
        raise Unknown
    scale: Tensor = graph.keep(node, "scale", lambda: _scale(node))
    if isinstance(cotangent, One):
        factor = scale[cotangent.units].reshape(-1, *[1] * (cotangent.maps.ndim - 1))
        return [replace(cotangent, maps=cotangent.maps * factor), None, None]
    if isinstance(cotangent, Spread):
        return [replace(cotangent, mix=cotangent.mix * scale), None, None]
    if isinstance(cotangent, Through) and cotangent.plus is None:
        return [replace(cotangent, mix=cotangent.mix * scale), None, None]
    dense = as_dense(cotangent, len(scale))
    return [replace(dense, gain=scale), None, None]


def _scale(node: Any) -> Tensor:
    scale = (node._saved_running_var + node._saved_eps).rsqrt()
    return scale if node._saved_weight is None else scale * node._saved_weight


def concatenation(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """Each part of a concatenation gets its share, along the units or along positions."""
    dim = signed_int(node._saved_dim) % len(graph.shape_at((node, 0)))
    passed: Passed = []
    start = 0
    for place in node.next_functions:
        if place[0] is None:  # a constant, of unknown size
            raise Unknown
        stop = start + graph.shape_at(place)[dim]
        passed.append(_cut(cotangent, dim, start, stop) if graph.is_on(place) else None)
        start = stop
    return passed


def _cut(given: Cotangent, dim: int, start: int, stop: int) -> Cotangent | None:
    cotangent = _densely(given)
    if isinstance(cotangent, Dense):
        cotangent = settled(cotangent)
        return replace(cotangent, maps=cotangent.maps.narrow(dim + 1, start, stop - start))
    if dim != cotangent.axis:
        return replace(cotangent, maps=cotangent.maps.narrow(dim + (dim < cotangent.axis), start, stop - start))
    if isinstance(cotangent, Spread):
        return replace(cotangent, mix=cotangent.mix[:, start:stop])
    mine = (cotangent.units >= start) & (cotangent.units < stop)
    if not mine.any():
        return None
    if mine.all():
        return replace(cotangent, units=cotangent.units - start)
    return replace(cotangent, maps=cotangent.maps[mine], units=cotangent.units[mine] - start, rows=cotangent.rows[mine])


def _densely(cotangent: Cotangent) -> One | Spread | Dense:
    """In full, if something is pending that later rules do not look at."""
    return as_dense(cotangent, 0) if isinstance(cotangent, Through | Unpooled | Factored) else cotangent


def _spatial(cotangent: Cotangent) -> One | Spread | Dense:
    """Make sure that height and width are the last axes of the maps and nothing is pending there."""
    cotangent = _densely(cotangent)
    if not isinstance(cotangent, Dense) and cotangent.axis != 1:
        raise Unknown
    return cotangent


def padding(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """Zeros around a map: cut off again."""
    sides = [signed_int(p) for p in node._saved_pad]
    if len(sides) > 4 or min(sides) < 0 or len(graph.shape_at((node, 0))) != 4:
        raise Unknown
    left, right, top, bottom = (*sides, 0, 0)[:4]
    cotangent = _spatial(cotangent)
    height, width = cotangent.maps.shape[-2:]
    return [replace(cotangent, maps=cotangent.maps[..., top : height - bottom, left : width - right])]


def spatial_mean(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """A mean over height and width that keeps both axes."""
    sizes = tuple(node._saved_self_sym_sizes)
    if len(sizes) != 4 or not node._saved_keepdim or {signed_int(d) % 4 for d in node._saved_dim} != {2, 3}:
        raise Unknown
    cotangent = _spatial(cotangent)
    maps = cotangent.maps / (sizes[2] * sizes[3])
    maps = maps.expand(*maps.shape[:-2], *sizes[2:])
    return [
        replace(cotangent, maps=maps, shared=True) if isinstance(cotangent, Dense) else replace(cotangent, maps=maps)
    ]


def max_pool(graph: Graph, node: Any, given: Cotangent) -> Passed:
    """Each value goes back to where the largest was, which differs from unit to unit."""
    cotangent = as_dense(given, 0) if isinstance(given, Unpooled | Factored) else given
    if node._saved_self.ndim != 4:
        raise Unknown
    pool = graph.keep(node, "pool", lambda: _MaxPool(node))
    if not isinstance(cotangent, Dense) and cotangent.axis != 1:
        raise Unknown
    if isinstance(cotangent, One):
        mine = cotangent.maps.transpose(0, 1).contiguous()  # (image, row, height, width)
        own, indices = pool.given[:, cotangent.units], pool.indices[:, cotangent.units]
        return [replace(cotangent, maps=pool.scattered(mine, own, indices).transpose(0, 1))]
    if isinstance(cotangent, Dense):
        cotangent = settled(cotangent)
    return [Unpooled(cotangent, pool)]


class _MaxPool:
    """What a max-pooling remembers; see `forms.MaxPool`."""

    def __init__(self, node: Any) -> None:
        self.given, self.indices = node._saved_self, node._saved_result1
        window = (node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_dilation)
        self.options = (*window, node._saved_ceil_mode)
        self.reach = [  # how many neighbours further on a window overlaps with
            -(-((k - 1) * d + 1) // s) - 1 for k, s, _, d in zip(*window, strict=True)
        ]

    def scattered(self, maps: Tensor, given: Tensor, indices: Tensor, out: Tensor | None = None) -> Tensor:
        """(n, unit, pooled height, pooled width) → (n, unit, height, width)."""
        return torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
            maps, given, *self.options, indices, grad_input=torch.empty_like(given) if out is None else out
        )

    def back(self, maps: Tensor) -> Tensor:
        """As `scattered`, for each row."""
        given = self.given.to(maps.dtype)
        out = maps.new_empty(len(maps), *given.shape)
        for each, into in zip(maps.contiguous(), out, strict=True):
            self.scattered(each, given, self.indices, into)
        return out


def average_pool(graph: Graph, node: Any, cotangent: Cotangent) -> Passed:
    """Each value goes back in equal parts."""
    size = node._saved_self.shape
    if len(size) != 4:
        raise Unknown
    cotangent = _spatial(cotangent)
    if isinstance(cotangent, Dense):
        cotangent = replace(as_dense(cotangent, 0), shared=False)
    flat = cotangent.maps.flatten(0, -3).unsqueeze(0)
    like = flat.new_zeros(()).expand(*flat.shape[:2], *size[2:])
    maps = torch.ops.aten.avg_pool2d_backward(
        flat.contiguous(), like, node._saved_kernel_size, node._saved_stride, node._saved_padding,
        node._saved_ceil_mode, node._saved_count_include_pad, node._saved_divisor_override,
    )  # fmt: skip
    return [replace(cotangent, maps=maps.reshape(*cotangent.maps.shape[:-2], *size[2:]))]


# ------------------------------------------------------------------ convolution


def convolution(graph: Graph, node: Any, given: Cotangent) -> Passed:
    """Two-dimensional, of any stride, dilation, padding and number of groups."""
    cotangent = as_dense(given, 0) if isinstance(given, Unpooled | Factored) else given
    weight = node._saved_weight
    if node._saved_transposed or weight.ndim != 4:
        raise Unknown
    if not isinstance(cotangent, Dense) and cotangent.axis != 1:
        raise Unknown
    back = _Back(node)
    if isinstance(cotangent, Spread) and back.groups > 1:
        cotangent = as_dense(cotangent, len(weight))
    if isinstance(cotangent, Dense | Through):
        return [_dense_convolution(graph, back, cotangent), None, None]
    if back.groups == 1:
        return [_fanned_out(graph, back, cotangent), None, None]
    assert isinstance(cotangent, One)
    return [_grouped(graph, back, cotangent), None, None]


class _Back:
    """What leads a convolution's output back to its input."""

    def __init__(self, node: Any) -> None:
        self.node, self.weight, self.groups = node, node._saved_weight, node._saved_groups
        self.stride, self.padding, self.dilation = node._saved_stride, node._saved_padding, node._saved_dilation
        self.kernel = tuple(self.weight.shape[2:])
        self.size = tuple(node._saved_input.shape[-2:])

    @property
    def is_pointwise(self) -> bool:
        """Whether positions do not meet."""
        return self.kernel == (1, 1) and tuple(self.padding) == (0, 0)

    def transposed(self, maps: Tensor, weight: Tensor, groups: int) -> Tensor:
        """The transposed convolution that leads back to the input's very size."""
        extra = [
            size - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for size, out, stride, padding, dilation, kernel in zip(
                self.size, maps.shape[-2:], self.stride, self.padding, self.dilation, self.kernel, strict=True
            )
        ]
        return conv_transpose2d(
            maps, weight, stride=self.stride, padding=self.padding, output_padding=extra, groups=groups,
            dilation=self.dilation,
        )  # fmt: skip

    def by_phases(self, graph: Graph, maps: Tensor, weight: Tensor, gain: int) -> Tensor:
        """The same as plain convolutions, one for each position modulo the stride; those are the faster ones."""
        phases = [(a, b) for a in range(self.stride[0]) for b in range(self.stride[1])]
        is_plain = len(phases) == 1 and self.kernel == (3, 3) and max(self.padding) <= 2
        if is_plain and winograd.pays(maps, weight):
            kernels: Tensor = graph.keep(self.node, f"winograd {gain}", lambda: winograd.transformed(weight))
            return winograd.led_back(maps, kernels, self.padding)
        if len(phases) == 1:
            return self._phase(graph, maps, weight, (0, 0), gain)
        out = maps.new_zeros(len(maps), weight.shape[1], *self.size)
        for a, b in phases:
            into = out[..., a :: self.stride[0], b :: self.stride[1]]
            if into.numel() and all(
                (x + p) % s < k for x, p, s, k in zip((a, b), self.padding, self.stride, self.kernel, strict=True)
            ):
                into.copy_(self._phase(graph, maps, weight, (a, b), gain))
        return out

    def _phase(self, graph: Graph, maps: Tensor, weight: Tensor, phase: tuple[int, int], gain: int) -> Tensor:
        """`out[i] = Σ_t w[first + s t] · maps[i + shift - t]` along each axis."""
        sides: list[int] = []
        taps = []
        sizes = zip(phase, self.padding, self.stride, self.kernel, self.size, maps.shape[-2:], strict=True)
        for a, p, s, k, size, have in sizes:
            first, shift = (a + p) % s, (a + p) // s
            n_taps = len(range(first, k, s))
            before = n_taps - 1 - shift
            sides = [before, -(-(size - a) // s) + shift - have, *sides]  # the last axis first
            taps.append(slice(first, None, s))
        kernel: Tensor = graph.keep(
            self.node, f"phase {phase} {gain}", lambda: _flipped(weight[:, :, taps[0], taps[1]])
        )
        even = sides[0] == sides[1] and sides[2] == sides[3] and min(sides) >= 0
        return conv2d(maps, kernel, padding=(sides[2], sides[0])) if even else conv2d(pad(maps, sides), kernel)

    def unstrided(self, maps: Tensor) -> Tensor:
        """Put the maps of a pointwise convolution where they came from, zeros between."""
        if tuple(self.stride) == (1, 1):
            return maps
        out = maps.new_zeros(*maps.shape[:-2], *self.size)
        out[..., :: self.stride[0], :: self.stride[1]] = maps
        return out

    def windows(self, maps: Tensor) -> Tensor:
        """The values each position of the input takes from: (n, height, width) → (n, taps, position)."""
        height, width = maps.shape[-2:]
        if tuple(self.stride) != (1, 1):
            stuffed = maps.new_zeros(len(maps), (height - 1) * self.stride[0] + 1, (width - 1) * self.stride[1] + 1)
            stuffed[:, :: self.stride[0], :: self.stride[1]] = maps
            maps, (height, width) = stuffed, stuffed.shape[-2:]
        before, after = [], []
        for size, have, p, d, k in zip(
            self.size, (height, width), self.padding, self.dilation, self.kernel, strict=True
        ):
            before.append(d * (k - 1) - p)
            after.append(size - have + p)
        maps = pad(maps, (before[1], after[1], before[0], after[0]))
        return unfold(maps.unsqueeze(1), self.kernel, dilation=self.dilation)


def _fanned_out(graph: Graph, back: _Back, cotangent: One | Spread) -> Cotangent:
    """The first mixing of units: a single map becomes one for each unit."""
    weight, rows = back.weight, cotangent.rows
    if isinstance(cotangent, One):
        kernels = weight[cotangent.units]  # (row, unit, height, width)
    else:
        kernels = torch.einsum("rc,cikl->rikl", cotangent.mix, weight)
    if back.is_pointwise:
        return Spread(back.unstrided(cotangent.maps), kernels[:, :, 0, 0], rows, 1)
    n_rows, n_images = cotangent.maps.shape[:2]
    windows = back.windows(cotangent.maps.flatten(0, 1)).to(graph.dtype)  # (row · image, taps, position)
    taps = kernels.flip(-2, -1).flatten(2).to(graph.dtype)  # (row, unit, taps)
    return Through(windows.reshape(n_rows, n_images, -1, *back.size), taps.mT, rows, 1)


def _grouped(graph: Graph, back: _Back, cotangent: One) -> Cotangent:
    """A single map goes to the units of its group, to one unit if the convolution is depthwise."""
    weight, groups = back.weight, back.groups
    group = cotangent.units // (len(weight) // groups)
    kernels = weight[cotangent.units]  # (row, units of the group, height, width)
    n_rows, n_images = cotangent.maps.shape[:2]
    maps = back.transposed(cotangent.maps.transpose(0, 1), kernels, n_rows)  # (image, row · unit of the group, …)
    if weight.shape[1] == 1:
        return One(maps.transpose(0, 1), group, cotangent.rows, 1)
    maps = maps.unflatten(1, (n_rows, -1)).transpose(0, 1)  # (row, image, unit of the group, height, width)
    placed = maps.new_zeros(n_rows, n_images, groups, weight.shape[1], *back.size)
    placed[torch.arange(n_rows, device=maps.device), :, group] = maps
    return Dense(placed.flatten(2, 3).to(graph.dtype), cotangent.rows)


def _dense_convolution(graph: Graph, back: _Back, cotangent: Dense | Through) -> Cotangent:
    gain = cotangent.gain if isinstance(cotangent, Dense) else None
    weight: Tensor = graph.keep(back.node, f"weight {id(gain)}", lambda: _weighed(graph, back, gain))
    if isinstance(cotangent, Through):
        cotangent = as_dense(cotangent, len(weight))
    n_rows, n_images = cotangent.maps.shape[:2]
    if back.is_pointwise and back.groups == 1:
        mix: Tensor = graph.keep(back.node, f"mix {id(gain)}", lambda: weight[:, :, 0, 0].contiguous())
        if tuple(back.stride) == (1, 1):
            return Through(cotangent.maps, mix, cotangent.rows, 1)
        return Dense(back.unstrided(mixed(cotangent.maps, mix, 2)), cotangent.rows)
    flat = cotangent.maps.flatten(0, 1)
    if back.groups == 1 and set(back.dilation) == {1}:
        maps = back.by_phases(graph, flat, weight, id(gain))
    else:
        maps = back.transposed(flat, weight, back.groups)
    return Dense(maps.unflatten(0, (n_rows, n_images)), cotangent.rows)


def _flipped(weight: Tensor) -> Tensor:
    return weight.flip(-2, -1).transpose(0, 1).contiguous()


def _weighed(graph: Graph, back: _Back, gain: Tensor | None) -> Tensor:
    weight = back.weight if gain is None else back.weight * gain[:, None, None, None]
    return weight.to(graph.dtype)


RULES: dict[str, Rule] = {
    "ConvolutionBackward0": convolution,
    "NativeBatchNormBackward0": batch_norm,
    "CudnnBatchNormBackward0": batch_norm,
    "AddBackward0": add,
    "SubBackward0": add,
    "MulBackward0": product,
    "CatBackward0": concatenation,
    "ConstantPadNdBackward0": padding,
    "MeanBackward1": spatial_mean,
    "MaxPool2DWithIndicesBackward0": max_pool,
    "AvgPool2DBackward0": average_pool,
    "CloneBackward0": pass_on,
    **dict.fromkeys(
        (f"{name}Backward{variant}" for variant in (0, 1) for name in (  # 1: some that worked in place
            "Relu", "Hardtanh", "Gelu", "Silu", "Hardswish", "LeakyRelu", "Elu", "Sigmoid", "Hardsigmoid", "Tanh",
            "Softplus", "Mish", "Threshold", "Div", "Neg", "Exp", "Log", "Sqrt", "Rsqrt", "Abs", "Clamp", "Pow",
        )),
        elementwise,
    ),
}  # fmt: skip
