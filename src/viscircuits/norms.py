"""Batch norm of a network in evaluation as what it is there: one multiplication and one addition.

On CPUs torch's own takes several times as long, forward and back. Values are the same but for rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import batch_norm
from torch.overrides import TorchFunctionMode


class AffineNorms(TorchFunctionMode):
    """Inside, batch norms that use kept statistics are affine maps; others are left as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not batch_norm or kwargs["training"] or args[1] is None:  # whatever the call, three come by place
            return func(*args, **kwargs)
        x, mean, variance = args
        scale, shift = coefficients(mean, variance, kwargs["weight"], kwargs["bias"], kwargs["eps"])
        shape = (-1, *[1] * (x.ndim - 2))
        return torch.addcmul(shift.reshape(shape), x, scale.reshape(shape)).to(x.dtype)


def coefficients(
    mean: Float[Tensor, " unit"],
    variance: Float[Tensor, " unit"],
    weight: Float[Tensor, " unit"] | None,
    bias: Float[Tensor, " unit"] | None,
    eps: float,
) -> tuple[Float[Tensor, " unit"], Float[Tensor, " unit"]]:
    """By what batch norm multiplies, and what it adds; in single precision or better, as torch's own reckons."""
    precise = torch.promote_types(variance.dtype, torch.float32)
    scale = (variance.to(precise) + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    return scale, -mean * scale if bias is None else bias - mean * scale
