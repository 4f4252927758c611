"""One execution of a network, written down: which tensor came from which.

1. A torch function mode sees every tensor operation, hooks see every module's call.
2. Each tensor *value* gets a number; an in-place operation gives its tensor a new number.
3. On the way each value is tagged: the axis its units lie on (convolutions put them on axis 1,
   linear layers and layer norms on the last), whether it is the output of a non-linearity, and
   which non-linearities it depends on.

From this come the list of layers, the default layers of a network nobody described, and where an
edit may be folded into existing weights. It follows one real execution, so it needs no symbolic
tracing and works on networks with control flow; operations hidden inside a fused kernel are seen
as one.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from viscircuits.errors import LayerError
from viscircuits.hooks import evaluating, forward, pass_depth, submodule, watch_calls
from viscircuits.layers import Layer, parse_address

N_IMAGES = 2  # two, so that an image axis can be told from a unit axis of size one

_NONLINEAR_FUNCTION = re.compile(
    r"(relu|relu6|gelu|silu|hardswish|leaky_relu|prelu|rrelu|elu|selu|celu|mish|softplus|threshold|hardtanh)_?"
)
_NONLINEAR_MODULE = re.compile(r".*(ReLU|ReLU6|GELU|SiLU|Swish|Mish|ELU|Hardtanh|Softplus|GELUTanh)", re.IGNORECASE)
_CHANNEL_FIRST = re.compile(r"(conv\d?d?|convolution|conv_transpose\dd|batch_norm|group_norm|instance_norm)")
_CHANNEL_LAST = re.compile(r"(linear|layer_norm|rms_norm|multi_head_attention_forward)")
_CONCATENATIONS = ("cat", "concat", "concatenate")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Operation:
    """One tensor operation: its name, the values it read, the value it made, the weights it used."""

    name: str
    inputs: tuple[int, ...]
    output: int
    weights: tuple[str, ...] = ()
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Call:
    """One call of a module: the values it was given and the values it returned."""

    name: str
    index: int
    kind: str
    container: bool
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    items: tuple[str, ...]


@dataclass
class Trace:
    """What one execution did. Values are numbered in the order in which they came about."""

    calls: list[Call] = field(default_factory=list)
    producers: dict[int, Operation] = field(default_factory=dict)
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    axes: dict[int, int] = field(default_factory=dict)
    nonlinear: set[int] = field(default_factory=set)
    aliases: dict[str, str] = field(default_factory=dict)  # further names of shared modules → the first

    def consumers(self, value: int) -> list[Operation]:
        """Every operation that read `value`."""
        return [operation for operation in self.producers.values() if value in operation.inputs]

    def value(self, address: str) -> int:
        """Return the number of the value an address names.

        Raises
        ------
        LayerError
            If the layer never runs, runs several times, or returns several tensors.
        """
        parsed = parse_address(address)
        calls = [call for call in self.calls if call.name == parsed.name]
        if not calls and parsed.name in self.aliases:
            raise LayerError(f"layer {address!r} is the module {self.aliases[parsed.name]!r}; call it by that name")
        if not calls:
            raise LayerError(
                f"layer {address!r} never runs: its parent uses its weights directly (fused attention does) "
                "or leaves it out. Choose one that runs; `viscircuits layers MODEL` lists them."
            )
        if parsed.call is None and len(calls) > 1:
            choices = ", ".join(f"{parsed.name}@{i}" for i in range(len(calls)))
            raise LayerError(f"layer {address!r} runs {len(calls)} times in a forward pass; say which: {choices}")
        if parsed.call is not None and parsed.call >= len(calls):
            raise LayerError(f"layer {parsed.name!r} runs {len(calls)} times, so there is no {address!r}")
        call = calls[parsed.call or 0]
        values = call.inputs[:1] if parsed.input else call.outputs
        if parsed.item is not None:
            values = tuple(v for v, item in zip(call.outputs, call.items, strict=True) if item == parsed.item)
        if len(values) != 1:
            items = ", ".join(f"{parsed.name}[{item}]" for item in call.items)
            raise LayerError(f"layer {address!r} gives {len(values)} tensors, not one. It has: {items or 'none'}")
        return values[0]

    def layer(self, address: str) -> Layer:
        """Describe the layer at an address.

        Raises
        ------
        LayerError
            If it does not hold units: no float tensor with images along its first axis.
        """
        value = self.value(address)
        shape, name = self.shapes[value], parse_address(address).name
        if len(shape) < 2 or shape[0] != N_IMAGES:
            raise LayerError(
                f"layer {address!r} has shape {shape} for {N_IMAGES} images: the first axis is not the images. "
                "Choose a layer outside the windows or token-first part."
            )
        kind = next(call.kind for call in self.calls if call.name == name)
        return Layer(address, kind, shape[1:], self.axes[value])

    def ancestors(self, values: Iterable[int]) -> dict[int, set[int]]:
        """For each of `values`, which of the others it was computed from."""
        wanted = sorted(set(values))
        bit = {value: 1 << i for i, value in enumerate(wanted)}
        upstream: dict[int, int] = {}
        for value in sorted(self.shapes):
            mask = 0
            for source in self.producers[value].inputs if value in self.producers else ():
                mask |= upstream.get(source, 0) | bit.get(source, 0)
            upstream[value] = mask
        return {value: {other for other in wanted if upstream[value] & bit[other]} for value in wanted}

    def layers(self) -> list[Layer]:
        """Every layer that holds units, in the order in which they finish."""
        counts: dict[str, int] = {}
        for call in self.calls:
            counts[call.name] = counts.get(call.name, 0) + 1
        found = []
        for call in self.calls:
            if not call.name:
                continue
            stem = call.name if counts[call.name] == 1 else f"{call.name}@{call.index}"
            for item, value in zip(call.items, call.outputs, strict=True):
                shape = self.shapes[value]
                if len(shape) >= 2 and shape[0] == N_IMAGES:
                    address = stem if len(call.outputs) == 1 else f"{stem}[{item}]"
                    found.append(Layer(address, call.kind, shape[1:], self.axes[value]))
        return found

    def default_layers(self) -> tuple[str, ...]:
        """Post-activation layers, each of which feeds the next: the longest such chain.

        Raises
        ------
        LayerError
            If the network has fewer than two of them.
        """
        addresses = self._nonlinear_addresses()
        left_out = [value for value in addresses if self._is_gate(value, addresses) or self._is_piece(value, addresses)]
        values = sorted(addresses.keys() - left_out)
        upstream = self.ancestors(values)
        best: dict[int, tuple[int, ...]] = {}
        for value in values:
            chains = [best[earlier] for earlier in values if earlier in upstream[value]]
            best[value] = (*max(chains, key=len, default=()), value)
        chain = max(best.values(), key=len, default=())
        if len(chain) < 2:
            raise LayerError(
                "found fewer than two outputs of non-linearities that feed one another; "
                "name the layers yourself (--layers A,B,…)"
            )
        return tuple(addresses[value] for value in chain)

    def _nonlinear_addresses(self) -> dict[int, str]:
        """Post-activation values and the address of each: the outermost module that gives it."""
        counts: dict[str, int] = {}
        for call in self.calls:
            counts[call.name] = counts.get(call.name, 0) + 1
        addresses: dict[int, str] = {}
        for call in sorted(self.calls, key=lambda call: (call.container, call.name.count("."))):
            stem = call.name if counts[call.name] == 1 else f"{call.name}@{call.index}"
            if call.name and len(call.outputs) == 1:
                addresses.setdefault(call.outputs[0], stem)
        for call in self.calls:  # a functional activation: the next module's input
            stem = call.name if counts[call.name] == 1 else f"{call.name}@{call.index}"
            if call.name and call.inputs:
                addresses.setdefault(call.inputs[0], f"{stem}:in")
        usable = {v for v in self.nonlinear if len(self.shapes[v]) >= 2 and self.shapes[v][0] == N_IMAGES}
        return {value: addresses[value] for value in usable if value in addresses}

    def _is_gate(self, value: int, candidates: Iterable[int]) -> bool:
        """A squeezed map that later maps outgrow is a gate (squeeze-excite), not a layer of units."""
        return self._n_positions(value) == 1 and any(
            later > value and self._n_positions(later) > 1 for later in candidates
        )

    def _is_piece(self, value: int, candidates: Container[int]) -> bool:
        """A map that is only ever read as part of a concatenation is there as part of that layer."""
        readers = self.consumers(value)
        return bool(readers) and all(r.name in _CONCATENATIONS and r.output in candidates for r in readers)

    def _n_positions(self, value: int) -> int:
        shape = self.shapes[value]
        return int(torch.Size(shape[1:]).numel()) // max(shape[self.axes[value]], 1)


def trace(model: nn.Module, images: Float[Tensor, "image *axes"]) -> Trace:
    """Run the network once, in evaluation mode, and write down what it did.

    Parameters
    ----------
    model
        Any network; it is left as it was found.
    images
        At least one image; the first is run, twice over.
    """
    recorder = _Recorder(model)
    with evaluating(model), torch.no_grad(), watch_calls(model, recorder.entering, recorder.leaving), recorder:
        forward(model, images[:1].expand(N_IMAGES, *images.shape[1:]).clone())
    return recorder.trace


def resolve(model: nn.Module, trace: Trace, addresses: Iterable[str]) -> list[Layer]:
    """Describe the layers at `addresses`, put in execution order, and check that each feeds the next.

    Raises
    ------
    LayerError
        If an address is unknown, stands twice, or a layer has no path to the one after it.
    """
    values: dict[int, str] = {}
    for address in addresses:
        submodule(model, parse_address(address))
        value = trace.value(address)
        if value in values:
            other = values[value]
            raise LayerError(f"layers {other!r} and {address!r} are the same tensor; leave one of them out")
        values[value] = address
    ordered = sorted(values)
    upstream = trace.ancestors(ordered)
    for source, target in pairwise(ordered):
        if source not in upstream[target]:
            raise LayerError(
                f"no path leads from layer {values[source]!r} to layer {values[target]!r}; "
                "choose layers of which each feeds the next"
            )
    return [trace.layer(values[value]) for value in ordered]


def list_layers(
    model: nn.Module, images: Float[Tensor, "image *axes"], default: Iterable[str] | None
) -> tuple[list[Layer], set[str]]:
    """Every layer in execution order, and the addresses of the default ones among them.

    Default layers that are a module's input are listed too, before the module.
    """
    traced = trace(model, images)
    chosen = set(default if default is not None else traced.default_layers())
    found = traced.layers()
    inputs = [traced.layer(address) for address in chosen if parse_address(address).input]
    return sorted([*inputs, *found], key=lambda layer: traced.value(layer.address)), chosen


class _Recorder(TorchFunctionMode):
    """Numbers every tensor value of one execution and notes how it came about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        first = {module: name for name, module in model.named_modules()}
        names = model.named_modules(remove_duplicate=False)
        self.trace = Trace(aliases={name: first[module] for name, module in names if name != first[module]})
        self.numbers: dict[int, int] = {}
        self.alive: list[Tensor] = []  # a tensor that is freed would lend its id to another
        self.weights = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        self.weights.update({id(b): name for name, b in model.named_buffers(remove_duplicate=False)})
        self.open: list[tuple[str, tuple[int, ...]]] = []
        self.counts: dict[str, int] = {}
        self.depth = pass_depth()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if pass_depth() != self.depth:  # a pass that another context makes for itself
            return func(*args, **kwargs)
        given = list(_tensors((args, kwargs)))
        inputs = tuple(self._number(t) for t in given if id(t) not in self.weights)
        weights = tuple(self.weights[id(t)] for t in given if id(t) in self.weights)
        result = func(*args, **kwargs)
        name = (resolve_name(func) or getattr(func, "__name__", "")).rsplit(".", 1)[-1]
        if name == "__setitem__":
            result_tensors = [args[0]]
        else:
            result_tensors = list(_tensors(result))
        plain = tuple(a for a in (*args, *kwargs.values()) if not isinstance(a, Tensor))
        for tensor in result_tensors:
            if inputs and id(tensor) not in self.weights:
                self._made(tensor, Operation(name, inputs, -1, weights, plain))
        return result

    def entering(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.open.append((name, tuple(self._number(t) for t in _tensors((args, kwargs)))))

    def leaving(self, name: str, module: nn.Module, output: Any) -> None:
        _, inputs = self.open.pop()
        items = [(item, t) for item, t in _items(output) if t.is_floating_point()]
        for _, tensor in items:
            if id(tensor) not in self.numbers and inputs:  # made by an operation torch functions do not show
                self._made(tensor, Operation(type(module).__name__, inputs, -1))
        outputs = tuple(self._number(t) for _, t in items)
        if _NONLINEAR_MODULE.fullmatch(type(module).__name__):
            self.trace.nonlinear.update(outputs)
        index = self.counts.get(name, 0)
        self.counts[name] = index + 1
        container = isinstance(module, _CONTAINERS)
        kind = type(module).__name__
        self.trace.calls.append(Call(name, index, kind, container, inputs, outputs, tuple(item for item, _ in items)))

    def _number(self, tensor: Tensor) -> int:
        if id(tensor) not in self.numbers:
            self._new(tensor)
        return self.numbers[id(tensor)]

    def _new(self, tensor: Tensor) -> int:
        number = len(self.trace.shapes)
        self.numbers[id(tensor)] = number
        self.alive.append(tensor)
        self.trace.shapes[number] = tuple(tensor.shape)
        self.trace.axes[number] = 1 if tensor.ndim in (2, 4, 5) else max(tensor.ndim - 1, 0)
        return number

    def _made(self, tensor: Tensor, operation: Operation) -> None:
        number = self._new(tensor)
        operation = Operation(operation.name, operation.inputs, number, operation.weights, operation.arguments)
        self.trace.producers[number] = operation
        self.trace.axes[number] = _unit_axis(operation, self.trace)
        pieces = [value for value in operation.inputs if self.trace.shapes[value]]
        if _NONLINEAR_FUNCTION.fullmatch(operation.name) or (
            operation.name in _CONCATENATIONS and pieces and self.trace.nonlinear.issuperset(pieces)
        ):
            self.trace.nonlinear.add(number)


def _unit_axis(operation: Operation, trace: Trace) -> int:
    shape = trace.shapes[operation.output]
    guess = trace.axes[operation.output]
    if _CHANNEL_FIRST.fullmatch(operation.name):
        return min(1, len(shape) - 1)
    if _CHANNEL_LAST.fullmatch(operation.name):
        return max(len(shape) - 1, 0)
    source = max(operation.inputs, key=lambda value: len(trace.shapes[value]))
    before, axis = trace.shapes[source], trace.axes[source]
    if not shape or not before:  # a number: it has no units
        return guess
    if operation.name == "permute":
        order = operation.arguments[0] if isinstance(operation.arguments[0], tuple | list) else operation.arguments
        return [d % len(before) for d in order].index(axis)
    if operation.name in ("transpose", "swapaxes", "transpose_") and len(operation.arguments) == 2:
        a, b = (d % len(before) for d in operation.arguments)
        return {a: b, b: a}.get(axis, axis)
    if len(before) == len(shape) and (before[axis] == shape[axis] or operation.name in _CONCATENATIONS):
        return axis
    if prod(before) == prod(shape):
        return _reshaped_axis(before, shape, axis, guess)
    if shape[: axis + 1] == before[: axis + 1]:  # later axes were summed up or cut
        return axis
    if shape[axis - len(before) :] == before[axis:]:  # earlier ones were
        return len(shape) + axis - len(before)
    return guess


def _reshaped_axis(before: tuple[int, ...], shape: tuple[int, ...], axis: int, guess: int) -> int:
    """Where the unit axis lies after a reshape: the last of the axes it was split into, else `guess`."""
    ahead, behind = prod(before[:axis]), prod(before[axis + 1 :])
    start = next((a for a in range(len(shape)) if prod(shape[:a]) == ahead), None)
    if start is None:
        return guess
    return next((b - 1 for b in range(start + 1, len(shape) + 1) if prod(shape[b:]) == behind), guess)


def _tensors(structure: Any) -> Iterator[Tensor]:
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, dict):
        for value in structure.values():
            yield from _tensors(value)
    elif isinstance(structure, tuple | list):
        for value in structure:
            yield from _tensors(value)


def _items(output: Any) -> Iterator[tuple[str, Tensor]]:
    pairs = (
        output.items()
        if isinstance(output, dict)
        else enumerate(output if isinstance(output, tuple | list) else [output])
    )
    return ((str(key), value) for key, value in pairs if isinstance(value, Tensor))
