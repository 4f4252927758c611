"""Relevance patching: attribution patching with gradients replaced by the coefficients of relevance propagation.

The forward pass is the network's own; what is recorded for the backward pass is changed, operation by operation:

1. *Convolutions* (and batch norm right after one, merged into it): the γ-rule. An output above 0 is explained by
   ``w + γ w⁺`` in place of w, one below 0 by ``w + γ w⁻``, inputs below 0 the other way round; z-plus is γ → ∞.
2. *Linear layers*: the 0-rule, which is the gradient.
3. *Activations* f with f(0) = 0: the identity rule, ``f(x) / x`` in place of ``f′(x)``.
4. *Products* of two things that both depend on units: the half rule, half to each factor.
5. *What gates or scales* (softmax and attention, sigmoid, layer norm's deviation, a denominator) is held fast.

Whatever has no rule (pooling, addition, reshaping, group norm) keeps its gradient. In a network of linear layers and
ReLUs with the 0-rule throughout, this is attribution patching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from tqdm import tqdm

from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import frozen
from viscircuits.layers import by_unit
from viscircuits.methods.patching import first_order
from viscircuits.norms import coefficients
from viscircuits.scores.formulas import choose
from viscircuits.task import Finding, Task, costing, observe

GAMMA, GAMMA_OF_DIFFERENCE = 0.25, 1.0
Parts = Callable[[Tensor, float], Tensor]  # weights and a sign → weights with those of that sign favoured
Apply = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # a linear operation: input, weight, bias → output


def relp(
    task: Task,
    *,
    convolutions: str = "gamma",
    linear: str = "zero",
    gamma: int | float = GAMMA,
    edges: bool = True,
    engine: str = "auto",
) -> Finding:
    """Size of ``Σ_p (a − r) ⊙ c`` for each unit, c the coefficient by which relevance reaches it; edges likewise.

    On transformers the defaults are the published method's rules; it was not published for convolutions, where its
    0-rule would be attribution patching. There the default is the γ-rule, as is usual in vision (our decision).

    Parameters
    ----------
    task
        What to explain; its ablation is ``zero`` or ``mean``.
    convolutions, linear
        The rule of each: ``zero``, ``gamma`` or ``z-plus``.
    gamma
        How far the γ-rule favours what agrees with the output.
    edges, engine
        As for `attribution_patching`.

    Raises
    ------
    ViscircuitsError
        If a rule is unknown or γ is negative.

    References
    ----------
    Rezaei Jafari et al. 2025, arXiv:2508.21258; Montavon et al. 2019, doi:10.1007/978-3-030-28954-6_10 (γ, z⁺);
    Ali et al. 2022, arXiv:2202.07304 (attention, layer norm); Arras et al. 2017, arXiv:1706.07206 (gates).
    """
    chosen = rules_of(convolutions, linear, gamma)
    options = {"convolutions": convolutions, "linear": linear, "gamma": gamma, "edges": edges, "engine": engine}
    with costing(task) as counted:
        found = first_order(
            counted, edges=edges, engine=engine, rules=lambda: propagating(counted.spec.model, **chosen)
        )
    return found.finding("relp", counted, options)


def relp_difference(
    task: Task,
    *,
    protect: float = 1.0,
    convolutions: str = "gamma",
    linear: str = "zero",
    gamma: int | float = GAMMA_OF_DIFFERENCE,
    progress: bool = False,
) -> Finding:
    """Relevance of each unit on the concept, less what of it is above 0 on the reference: needed here and not there.

    ``mean R over the concept − protect · mean max(R, 0) over the reference``, with ``R = Σ_p (a − r) ⊙ c`` as in
    `relp`, each image judged by its own label. Below 0 on single reference images a unit stands in the way of
    their answers; that does not make up for what others would lose, hence the maximum. Circuits are cut
    by ``half`` (`viscircuits.task.Finding.circuit`): relevance is in units of the label's logit in every layer.

    Parameters
    ----------
    task
        What to explain; its ablation is ``zero`` or ``mean``.
    protect
        How much the reference's relevance weighs; 0 leaves signed `relp`.
    convolutions, linear, gamma
        As for `relp`.
    progress
        Show a progress bar.

    Raises
    ------
    ViscircuitsError
        If a rule is unknown, or `protect` or γ is no finite number from 0 on.

    References
    ----------
    Ours, from the coefficients of `relp`. Where it leads and where it fails is told in docs/rivals.md.
    """
    if not 0 <= protect < inf:
        raise ViscircuitsError(f"protect is a weight of 0 or more, got {protect}")
    chosen = rules_of(convolutions, linear, gamma)
    options = {"protect": protect, "convolutions": convolutions, "linear": linear, "gamma": gamma}
    units = {layer.address: torch.zeros(layer.n_units, dtype=torch.float64) for layer in task.layers}
    parts = {"concept": (len(task.concept), 1.0), "reference": (len(task.reference), -protect)}
    n_images = sum(n for n, weight in parts.values() if weight)
    with (
        costing(task) as counted,
        tqdm(total=n_images, desc="relevance", unit="image", delay=2, disable=not progress) as bar,
        propagating(task.spec.model, **chosen),
    ):
        for which, (n, weight) in parts.items():
            for images, labels in counted.batches(which) if weight else ():
                for layer, relevance in _of_images(counted, images, labels).items():
                    counts = relevance if which == "concept" else relevance.clamp(min=0)
                    units[layer] += weight / n * counts.sum(0)
                bar.update(len(images))
    return Finding("relp-difference", units, task.widths, {}, counted.passes, options, share="half")


def _of_images(task: Task, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Layer → ``Σ_p (a − r) ⊙ c`` of each unit on each image, while relevance is propagated."""
    seen, found = observe(task, images, labels), {}
    for layer in task.layers:
        values = seen.values[layer.address]
        relevance = (values - task.baseline(layer, values)) * seen.gradients[layer.address]
        found[layer.address] = by_unit(relevance.double(), layer.unit_axis).sum(2).cpu()  # (image, unit)
    return found


def rules_of(convolutions: str, linear: str, gamma: int | float) -> dict[str, Parts | None]:
    """The rule of each operation.

    Raises
    ------
    ViscircuitsError
        If a rule is unknown or γ is negative.
    """
    if not 0 <= gamma < inf:
        raise ViscircuitsError(f"γ must be 0 or more, got {gamma}; 0 is the plain gradient")
    return {
        "convolution": choose(_parts(gamma), convolutions, "rule"),
        "linear": choose(_parts(gamma), linear, "rule"),
    }


def _parts(gamma: int | float) -> dict[str, Parts | None]:
    def favour(weight: Tensor, sign: float) -> Tensor:
        return weight + gamma * sign * (sign * weight).clamp(min=0)

    def keep(weight: Tensor, sign: float) -> Tensor:
        return sign * (sign * weight).clamp(min=0)

    return {"zero": None, "gamma": favour, "z-plus": keep}


@contextmanager
def propagating(model: nn.Module, convolution: Parts | None, linear: Parts | None) -> Iterator[None]:
    """Record forward passes so that autograd gives coefficients of relevance; parameters are constants meanwhile."""
    with frozen(model), _Propagation(convolution, linear):
        yield


class _Propagation(TorchFunctionMode):
    """Sees every tensor operation and records in its place one with the same values and the rule's gradient."""

    def __init__(self, convolution: Parts | None, linear: Parts | None) -> None:
        super().__init__()
        self.parts = {"linear": linear, "conv1d": convolution, "conv2d": convolution, "conv3d": convolution}
        self.last: tuple[Tensor, int, Callable, tuple, dict] | None = None  # a convolution that batch norm may follow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(given, Tensor) and given.requires_grad for given in args):
            return func(*args, **kwargs)
        name = (resolve_name(func) or "").rpartition(".")[2]
        if name in self.parts:
            return self._mixing(name, func, args, kwargs)
        if name == "batch_norm":
            return self._batch_norm(func, args, kwargs)
        rule = RULES.get(name)
        return func(*args, **kwargs) if rule is None else rule(func, args, kwargs)

    def _mixing(self, name: str, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        parts = self.parts[name]
        self.last = None
        if parts is None or len(args) < 2:
            return func(*args, **kwargs)
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        others = {key: value for key, value in kwargs.items() if key != "bias"}
        output = _explained(parts, lambda x, w, b: func(x, w, b, *args[3:], **others), args[0], args[1], bias)
        if name != "linear":
            self.last = output, output._version, func, (*args[:2], bias, *args[3:]), others
        return output

    def _batch_norm(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        given = dict(zip(("input", "mean", "variance", "weight", "bias", "training", "momentum", "eps"), args))  # noqa: B905
        given.update(kwargs)
        last, self.last = self.last, None
        parts = self.parts["conv2d"]
        if parts is None or last is None or last[0] is not given["input"] or given.get("training"):
            return func(*args, **kwargs)
        output, version, convolve, (x, weight, bias, *how), others = last
        if output._version != version:  # changed in place since
            return func(*args, **kwargs)
        known = (given["mean"], given["variance"], given.get("weight"), given.get("bias"), given.get("eps", 1e-5))
        scale, shift = (each.to(weight.dtype) for each in coefficients(*known))
        merged = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        shift = shift if bias is None else shift + scale * bias
        return _explained(parts, lambda x, w, b: convolve(x, w, b, *how, **others), x, merged, shift)


def _explained(parts: Parts, apply: Apply, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear operation whose outputs are explained by the weights that agree with their sign."""
    mixed = bool((x < 0).any())
    above, below = (x * (x >= 0), x * (x < 0)) if mixed else (x, x)
    value = apply(x.detach(), weight, bias)

    def favoured(sign: float) -> Tensor:
        found = apply(above, parts(weight, sign), None if bias is None else parts(bias, sign))
        return found + apply(below, parts(weight, -sign), None) if mixed else found

    explained = torch.where(value > 0, favoured(1.0), favoured(-1.0))
    # it has the output's sign and is no smaller: the ratio lies between 0 and 1
    ratio = (value / explained.detach()).masked_fill_(value == 0, 0.0)
    return _keeping(value, explained * ratio)


def _keeping(value: Tensor, path: Tensor) -> Tensor:
    """`value` to the last bit, with the gradient of `path`, whose own values nothing has kept."""
    path = path.to(value.dtype)
    path.detach().copy_(value)
    return path


# ------------------------------------------------------------------ rules of other operations


def _identity(func: Callable, args: tuple, kwargs: dict) -> Tensor:
    x = args[0]
    copy = x.detach().clone()
    value = func(copy, *args[1:], **kwargs)
    ratio = (value / x.detach()).masked_fill_(x.detach() == 0, 0.0)
    path = _keeping(value, x * ratio)
    return x.copy_(path) if value is copy else path  # an operation in place gives back what it was given


def _gate(func: Callable, args: tuple, kwargs: dict) -> Tensor:
    return func(args[0].detach().clone(), *args[1:], **kwargs)


def _half(func: Callable, args: tuple, kwargs: dict) -> Tensor:
    if not all(isinstance(given, Tensor) and given.requires_grad for given in args[:2]):
        return func(*args, **kwargs)
    in_place = (resolve_name(func) or "").endswith(("mul_", "__imul__"))
    value = args[0].clone() * args[1] if in_place else func(*args, **kwargs)
    path = _keeping(value, value / 2)
    return args[0].copy_(path) if in_place else path


def _fixed_denominator(func: Callable, args: tuple, kwargs: dict) -> Tensor:
    x, y = args[:2]
    return func(x, y.detach() if isinstance(y, Tensor) else y, *args[2:], **kwargs)


def _fixed_attention(func: Callable, args: tuple, kwargs: dict) -> Any:
    query, key, *others = args
    return func(query.detach(), key.detach(), *others, **kwargs)


def _fixed_deviation(func: Callable, args: tuple, kwargs: dict) -> Tensor:
    given = {**dict(zip(("input", "shape", "weight", "bias", "eps"), args)), **kwargs}  # noqa: B905
    x, weight = given["input"], given.get("weight")
    axes = list(range(-len(given.get("shape", given.get("normalized_shape", (1,)))), 0))
    centred = x - x.mean(axes, keepdim=True)
    scale = (centred.detach().square().mean(axes, keepdim=True) + given.get("eps", 1e-5)).rsqrt()
    return _keeping(func(*args, **kwargs), centred * scale if weight is None else centred * scale * weight)


Rule = Callable[[Callable, tuple, dict], Any]
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish")
RULES: dict[str, Rule] = {
    **{name + end: _identity for name in (*ACTIVATIONS, "hardtanh", "tanh") for end in ("", "_")},
    **dict.fromkeys(("softmax", "sigmoid", "hardsigmoid"), _gate),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__", "mul_", "__imul__"), _half),
    **dict.fromkeys(("matmul", "__matmul__", "bmm"), _half),
    **dict.fromkeys(("div", "true_divide", "__truediv__", "div_", "__itruediv__"), _fixed_denominator),
    **dict.fromkeys(("scaled_dot_product_attention", "multi_head_attention_forward"), _fixed_attention),
    "layer_norm": _fixed_deviation,
}
