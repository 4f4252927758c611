"""The scores of one connection, and the number a target's map is summed up in.

A score combines a source's activation with the gradient of a target's summary with respect to it.
Every function here takes maps whose last two axes are (unit, position) and registers under the
name used in Python, on the command line and in saved files. A new score is one function and one
entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from viscircuits.errors import ViscircuitsError, closest

Choice = TypeVar("Choice")

Map = Float[Tensor, "*#batch unit position"]
PerUnit = Float[Tensor, "*batch unit"]


def cla(activation: Map, gradient: Map) -> PerUnit:
    """Cross-layer attribution: `‖A_m‖₂ · ‖∂s_n/∂A_m‖₂` (Rajaram et al. 2023, arXiv:2404.14349)."""
    return torch.linalg.vector_norm(activation, dim=-1) * torch.linalg.vector_norm(gradient, dim=-1)


def grad_x_act(activation: Map, gradient: Map) -> PerUnit:
    """Gradient times activation, position by position: `Σ_p |A_m ⊙ ∂s_n/∂A_m|`."""
    return (activation * gradient).abs().sum(dim=-1)


def signed(activation: Map, gradient: Map) -> PerUnit:
    """Linear contribution `Σ_p A_m ⊙ ∂s_n/∂A_m`: exact inside one linear region, may be negative."""
    return (activation * gradient).sum(dim=-1)


def gradient_only(activation: Map, gradient: Map) -> PerUnit:
    """Sensitivity alone, `‖∂s_n/∂A_m‖₂`: a control that ignores whether the source is active."""
    return torch.linalg.vector_norm(gradient, dim=-1)


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cla": cla,
    "grad-x-act": grad_x_act,
    "signed": signed,
    "gradient": gradient_only,
}


def _norm(target: Tensor) -> Tensor:
    return torch.linalg.vector_norm(target, dim=1)


def _mean(target: Tensor) -> Tensor:
    return target.mean(dim=1)


def _sum(target: Tensor) -> Tensor:
    return target.sum(dim=1)


def _max(target: Tensor) -> Tensor:
    return target.amax(dim=1)


# (image, position) → (image): the number s_n of a target whose gradient is taken. At a map of
# zeros the norm has no derivative; torch uses the subgradient 0, so the score is 0 and never NaN.
SUMMARIES: dict[str, Callable[[Tensor], Tensor]] = {"norm": _norm, "mean": _mean, "sum": _sum, "max": _max}


def choose(registry: Mapping[str, Choice], name: str, what: str) -> Choice:
    """Look a name up in a registry.

    Raises
    ------
    ViscircuitsError
        If it is not there; the message lists what is.
    """
    if name not in registry:
        raise ViscircuitsError(f"no {what} {name!r}.{closest(name, registry)} Choose one of {', '.join(registry)}.")
    return registry[name]
