"""Recording and rewriting what layers compute: the only room that registers a hook.

1. A *tap* is a function at an address: it sees the layer's true tensor and may replace it.
2. `_tapped` attaches taps, counts how often each module has run in this forward pass, and takes
   every hook away again, whatever happens inside.
   Taps and hooks are `partial`s of functions of the module, not closures: shape checks of closures are made anew
   each time one is defined.
3. `record` and `rewrite` are the two taps there are. What is recorded is a private copy, so that
   an in-place operation further on cannot change it, and the rest of the network runs on from
   that copy, so that gradients with respect to it are the true ones.

A forward pass is counted from the outermost module, so call the network itself, not a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from viscircuits.errors import LayerError, ModelError, ViscircuitsError, closest
from viscircuits.layers import Address, parse_address

_depth: ContextVar[int] = ContextVar("depth", default=0)  # forward passes that run inside another one's start

Tap = Callable[[Tensor], Tensor]
Before = Callable[[tuple, dict], None]


class _Reached(Exception):
    """Raised inside a forward pass once everything asked for is recorded."""


@contextmanager
def record(model: nn.Module, addresses: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the tensors at `addresses` of the next forward pass.

    With gradients enabled the tensors stay in the graph (a frozen network gets its graph from
    the first recorded layer on). A second forward pass overwrites the first.

    Raises
    ------
    LayerError
        If an address does not exist, is not reached, runs several times, or holds no floats.
    """
    values: dict[str, Tensor] = {}
    with _tapped(model, {address: partial(_keep, values, address) for address in addresses}, observing=True):
        yield values


@contextmanager
def rewrite(
    model: nn.Module, taps: Mapping[str, Tap], before: Before | None = None, after: Callable[[], None] | None = None
) -> Iterator[None]:
    """Replace what the layers at these addresses compute, for as long as the context is open.

    A tap gets the true tensor and returns one of the same shape; it must not change it in place.
    `before` is called at the start of each forward pass with the network's arguments, `after` at
    its end.

    Raises
    ------
    LayerError
        As `record`, and if a tap returns another shape.
    """
    checked = {address: partial(_replace, address, tap) for address, tap in taps.items()}
    with _tapped(model, checked, before, after):
        yield


def activations(model: nn.Module, addresses: Iterable[str], images: Float[Tensor, "image *axes"]) -> dict[str, Tensor]:
    """Run the network just far enough to know the tensors at `addresses`, and return them.

    The addresses have to be resolved (`viscircuits.tracing.resolve`): of a module that would run
    again further on, this sees the first call.
    """
    addresses = list(addresses)
    values: dict[str, Tensor] = {}
    taps = {address: partial(_keep_and_stop, values, len(addresses), address) for address in addresses}
    try:
        with _tapped(model, taps, observing=True):
            forward(model, images)
    except _Reached:
        pass
    return values


def forward(model: nn.Module, images: Float[Tensor, "image *axes"]) -> Tensor:
    """Run the network on images moved to its device and dtype, and return its main output.

    Of a tuple or dictionary the main output is the entry called ``logits`` or ``out``, else the
    first.

    Raises
    ------
    ModelError
        If the network cannot take these images or returns no tensor.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), images)
    try:
        output = model(images.to(device=like.device, dtype=like.dtype))
    except (_Reached, ViscircuitsError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, IndexError, ValueError, AssertionError) as error:
        shape = "×".join(map(str, images.shape))
        raise ModelError(f"{type(model).__name__} cannot run on images of shape {shape}: {error}") from error
    return _main_output(output, model)


@contextmanager
def side_passes() -> Iterator[None]:
    """Mark the forward passes made inside as another pass's preparation: observers opened before skip them."""
    token = _depth.set(_depth.get() + 1)
    try:
        yield
    finally:
        _depth.reset(token)


def pass_depth() -> int:
    """How many forward passes the present one was made for: 0 for the caller's own."""
    return _depth.get()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the network in evaluation mode, and each module back as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the parameters, which would cost time and memory; each as it was afterwards."""
    # made in inference mode a parameter has none, and could not be given back
    trained = [each for each in model.parameters() if each.requires_grad and not each.is_inference()]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def watch_calls(
    model: nn.Module,
    before: Callable[[str, nn.Module, tuple, dict], None],
    after: Callable[[str, nn.Module, Any], None],
) -> Iterator[None]:
    """Be told of each module's call, with its arguments, and of its return, with its output."""
    _refuse_compiled(model)
    depth = pass_depth()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            entering, leaving = partial(_entering, before, depth, name), partial(_leaving, after, depth, name)
            stack.callback(module.register_forward_pre_hook(entering, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leaving).remove)
        yield


def count_hooks(model: nn.Module) -> int:
    """How many forward and backward hooks are registered on the network and its parts."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def submodule(model: nn.Module, address: Address) -> nn.Module:
    """Return the module an address names.

    Raises
    ------
    LayerError
        If there is none; the message names the closest one there is.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if address.name not in modules:
        hint = closest(address.name, modules)
        raise LayerError(
            f"no layer {address.name!r} in {type(model).__name__}.{hint} List them with `viscircuits layers MODEL`."
        )
    return modules[address.name]


# ------------------------------------------------------------------ below: how taps are attached


@contextmanager
def _tapped(
    model: nn.Module,
    taps: Mapping[str, Tap],
    before: Before | None = None,
    after: Callable[[], None] | None = None,
    observing: bool = False,
) -> Iterator[None]:
    _refuse_compiled(model)
    parsed = {parse_address(text): tap for text, tap in taps.items()}
    counter = _Counter(parsed, observing)
    by_module: dict[nn.Module, dict[Address, Tap]] = {}
    for address, tap in parsed.items():
        by_module.setdefault(submodule(model, address), {})[address] = tap
    with ExitStack() as stack:
        starting, finished = partial(_starting, counter, before), partial(_finished, counter, after)
        stack.callback(model.register_forward_pre_hook(starting, with_kwargs=True).remove)
        for module, mine in by_module.items():
            inputs = {address: tap for address, tap in mine.items() if address.input}
            outputs = {address: tap for address, tap in mine.items() if not address.input}
            if inputs:
                hook = partial(_tap_inputs, inputs, counter)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if outputs:
                stack.callback(module.register_forward_hook(partial(_tap_outputs, outputs, counter)).remove)
        stack.callback(model.register_forward_hook(finished).remove)
        yield


def _keep(values: dict[str, Tensor], address: str, tensor: Tensor) -> Tensor:
    values[address] = _private(tensor)
    return values[address].clone()


def _keep_and_stop(values: dict[str, Tensor], wanted: int, address: str, tensor: Tensor) -> Tensor:
    kept = _keep(values, address, tensor)
    if len(values) == wanted:
        raise _Reached
    return kept


def _replace(address: str, tap: Tap, tensor: Tensor) -> Tensor:
    new = tap(tensor)
    if new.shape != tensor.shape:
        raise LayerError(
            f"the replacement for layer {address!r} has shape {tuple(new.shape)}, the layer has {tuple(tensor.shape)}"
        )
    return new


def _starting(counter: _Counter, before: Before | None, module: nn.Module, args: tuple, kwargs: dict) -> None:
    if before is not None:
        before(args, kwargs)
    counter.start()  # after `before`, which may run the network itself


def _finished(counter: _Counter, after: Callable[[], None] | None, module: nn.Module, args: tuple, output: Any) -> None:
    counter.check()
    if after is not None:
        after()


def _entering(before: Callable, depth: int, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
    if pass_depth() == depth:
        before(name, module, args, kwargs)


def _leaving(after: Callable, depth: int, name: str, module: nn.Module, args: tuple, output: Any) -> None:
    if pass_depth() == depth:
        after(name, module, output)


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        in_place = getattr(module, "_compiled_call_impl", None) is not None  # module.compile()
        if in_place or isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
            what = f"{type(model).__name__}'s part {name!r}" if name else type(model).__name__
            raise ModelError(
                f"{what} is compiled, so its layers cannot be watched; pass the plain module it was made from"
            )


class _Counter:
    """How many times each address's module has run in the present forward pass.

    Passes that run inside the start of another count for themselves, and those who only observe
    do not see the passes that others make.
    """

    def __init__(self, addresses: Iterable[Address], observing: bool) -> None:
        self.addresses = tuple(addresses)
        self.calls: dict[int, dict[Address, int]] = {}
        self.only = _depth.get() if observing else None

    def start(self) -> None:
        self.calls[_depth.get()] = dict.fromkeys(self.addresses, 0)

    def is_meant(self, address: Address) -> bool:
        depth = _depth.get()
        if self.only not in (None, depth):
            return False
        calls = self.calls.setdefault(depth, dict.fromkeys(self.addresses, 0))
        call = calls[address]
        calls[address] = call + 1
        if address.call is None and call:
            raise LayerError(
                f"layer {address.text!r} runs more than once in a forward pass; "
                f"say which: {address.name}@0, {address.name}@1, …"
            )
        return address.call is None or address.call == call

    def check(self) -> None:
        """Once the forward pass is over: every address must have been reached."""
        if self.only not in (None, _depth.get()):
            return
        for address, calls in self.calls.get(_depth.get(), {}).items():
            if calls == 0:
                raise LayerError(
                    f"layer {address.text!r} never runs: its parent uses its weights directly (fused attention does) "
                    f"or leaves it out. Choose one that runs; `viscircuits layers MODEL` lists them."
                )
            if address.call is not None and calls <= address.call:
                raise LayerError(f"layer {address.name!r} runs {calls} times, so there is no {address.text!r}")


def _tap_outputs(taps: Mapping[Address, Tap], counter: _Counter, module: nn.Module, args: tuple, output: Any) -> Any:
    for address, tap in taps.items():
        if counter.is_meant(address):
            output = _put(output, address, tap(_pick(output, address)))
    return output


def _tap_inputs(
    taps: Mapping[Address, Tap], counter: _Counter, module: nn.Module, args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    for address, tap in taps.items():
        if not counter.is_meant(address):
            continue
        if args and isinstance(args[0], Tensor):
            args = (tap(_floats(args[0], address)), *args[1:])
            continue
        key = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
        if key is None:
            raise LayerError(f"layer {address.text!r} takes no tensor as its input")
        kwargs = {**kwargs, key: tap(_floats(kwargs[key], address))}
    return args, kwargs


def _private(tensor: Tensor) -> Tensor:
    if torch.is_grad_enabled() and not tensor.requires_grad:
        return tensor.detach().clone().requires_grad_()
    return tensor.clone()


def _floats(value: Any, address: Address) -> Tensor:
    if not isinstance(value, Tensor):
        raise LayerError(f"layer {address.text!r} gives a {type(value).__name__}, not a tensor; choose another layer")
    if not value.is_floating_point():
        raise LayerError(f"layer {address.text!r} holds {value.dtype}, not floats, so it has no gradient")
    if value.ndim < 2:
        raise LayerError(f"layer {address.text!r} has shape {tuple(value.shape)}: no axis for units beside the images")
    return value


def _elements(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items()}
    return {str(i): value for i, value in enumerate(output)}


def _key(output: Any, address: Address) -> str:
    elements = _elements(output)
    if address.item is not None:
        if address.item in elements:
            return address.item
        raise LayerError(f"layer {address.name!r} returns {', '.join(elements)}; there is no element {address.item!r}")
    tensors = [key for key, value in elements.items() if isinstance(value, Tensor)]
    if len(tensors) != 1:
        raise LayerError(
            f"layer {address.text!r} returns {len(tensors)} tensors; "
            f"say which: {', '.join(f'{address.name}[{key}]' for key in tensors) or 'another layer'}"
        )
    return tensors[0]


def _pick(output: Any, address: Address) -> Tensor:
    if isinstance(output, Tensor) and address.item is None:
        return _floats(output, address)
    if not isinstance(output, Mapping | tuple | list):
        return _floats(output if address.item is None else None, address)
    return _floats(_elements(output)[_key(output, address)], address)


def _put(output: Any, address: Address, new: Tensor) -> Any:
    if isinstance(output, Tensor):
        return new
    key = _key(output, address)
    if isinstance(output, Mapping):
        original = next(k for k in output if str(k) == key)
        kind: Any = type(output)
        changed = kind(output)  # a copy
        changed[original] = new
        return changed
    elements = [new if str(i) == key else value for i, value in enumerate(output)]
    return type(output)(*elements) if hasattr(output, "_fields") else type(output)(elements)


def _main_output(output: Any, model: nn.Module) -> Tensor:
    if isinstance(output, Mapping | tuple | list) and len(output):
        elements = _elements(output)
        named = dict(zip(getattr(output, "_fields", ()), elements.values(), strict=False)) or elements
        output = next((named[key] for key in ("logits", "out") if key in named), next(iter(elements.values())))
    if not isinstance(output, Tensor):
        raise ModelError(f"{type(model).__name__} returns a {type(output).__name__}; a tensor of outputs was expected")
    return output
