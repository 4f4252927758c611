"""Gradients where an activation is flat: ReLU when off, ReLU6 and Hardtanh also at their ceiling.

Each context keeps every value of the forward pass as it is and changes only what the backward pass lets through.
Nothing of the network is touched, and nothing stays behind.

- `Unclipped`: a unit at the ceiling, though at its most excited, has no gradient. Inside, it has that of the unclipped
  activation: what a picture of a unit's causes needs.
- `Redirected`: a picture that leaves a unit silent has no gradient to make it better by. Inside, where nothing at all
  would get through an activation for an image, what points out of the flat part does.
- `Linearised`: every gradient gets through, of maximum pooling too: what the computation could depend on.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_F = nn.functional
_RELU = {_F.relu, torch.relu, Tensor.relu}
_RELU_IN_PLACE = {torch.relu_, Tensor.relu_}
_CEILED = {_F.relu6, _F.hardtanh}


class _Through(TorchFunctionMode):
    """Bounded activations with their true values and a backward pass of our own."""

    functions = frozenset(_RELU | _RELU_IN_PLACE | _CEILED)

    @staticmethod
    def passed(gradient: Tensor, values: Tensor, low: float, high: float) -> Tensor:
        """What is let through of a gradient; values at or beyond `low` and `high` are where the activation is flat."""
        raise NotImplementedError

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in self.functions:
            return self.other(function, args, kwargs)
        return _Bounded.apply(*_call(function, args, kwargs), type(self).passed)

    def other(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Any other operation, as it is."""
        return function(*args, **kwargs)


class Unclipped(_Through):
    """ReLU6 and Hardtanh with their true values, and at the ceiling the gradient of their unclipped selves."""

    functions = frozenset(_CEILED)

    @staticmethod
    def passed(gradient: Tensor, values: Tensor, low: float, high: float) -> Tensor:
        """All but what arrives at the floor."""
        return gradient * (values > low)


class Redirected(_Through):
    """Activations that are silent or saturated all over an image pass the gradient that would end this.

    A gradient descends: where it is negative the value grows. At the floor a growing value is let through, at the
    ceiling a falling one, and only for images of which nothing gets through otherwise.

    References
    ----------
    The idea is that of `redirected_relu_grad` in Lucid (github.com/tensorflow/lucid), there for the first 16 steps.
    """

    @staticmethod
    def passed(gradient: Tensor, values: Tensor, low: float, high: float) -> Tensor:
        """The true gradient, or for an image without any the one that leads out of the flat parts."""
        true = torch.ops.aten.hardtanh_backward(gradient, values, low, high)
        stuck = _without(true)  # (image,)
        if not stuck.any():
            return true
        leaves = ((values <= low) & (gradient < 0)) | ((values >= high) & (gradient > 0))
        return true + gradient * (leaves & stuck.view(-1, *[1] * (gradient.ndim - 1)))


class Linearised(_Through):
    """Every gradient passes bounded activations, and maximum pooling passes it as average pooling would."""

    @staticmethod
    def passed(gradient: Tensor, values: Tensor, low: float, high: float) -> Tensor:
        """Everything."""
        return gradient

    def other(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Average pooling in place of maximum pooling, anything else as it is."""
        if function not in (_F.max_pool2d, torch.max_pool2d):
            return function(*args, **kwargs)
        given = dict(zip(("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode"), args, strict=False))
        given |= kwargs
        if given.get("dilation", 1) not in (1, (1, 1), [1, 1]) or given.get("return_indices"):
            return function(*args, **kwargs)
        pooling = {key: given[key] for key in ("stride", "padding", "ceil_mode") if key in given}
        return _F.avg_pool2d(given["input"], given["kernel_size"], **pooling)


class Evened(Linearised):
    """`Linearised`, and a convolution is the mean over all that it can see: where gradients go depends on no weight."""

    def other(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Equal weights in place of a convolution's own."""
        if function is _F.conv2d and len(args) > 1:
            pixels, weight, *rest = args
            return function(pixels, torch.full_like(weight, 1 / weight[0].numel()), *rest, **kwargs)
        return super().other(function, args, kwargs)


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor, low: float, high: float, in_place: bool, passed: Callable) -> Tensor:
        bounded = values.clamp_(low, high) if in_place else values.clamp(low, high)
        if in_place:
            context.mark_dirty(bounded)
        context.save_for_backward(bounded if in_place or high == math.inf else values)  # as torch itself does
        context.bounds, context.passed = (low, high), passed
        return bounded

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return context.passed(gradient, *context.saved_tensors, *context.bounds), None, None, None, None


SAMPLED = 61  # one value of so many shows of nearly every image that it is not all zero


def _without(gradient: Tensor) -> Tensor:
    """Of which images nothing is left."""
    each = gradient.flatten(1)
    empty = ~each[:, ::SAMPLED].any(1)
    return ~each.any(1) if empty.any() else empty


def _call(function: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, float, float, bool]:
    """Of an activation's call: its input, floor and ceiling, and whether it works in place."""
    if function in _CEILED:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        return given["input"], given.get("min_val", 0.0), given.get("max_val", 6.0), bool(given.get("inplace"))
    named = dict(zip(("input", "inplace"), args, strict=False)) | kwargs
    return named["input"], 0.0, math.inf, function in _RELU_IN_PLACE or bool(named.get("inplace"))
