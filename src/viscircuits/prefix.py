"""The part of a network that no intervention reaches, run once for each image and replayed afterwards.

1. Run one image and note which modules have returned before the first layer of interest begins.
2. Of these, the outermost are replayed: they hand out what they returned before, and run no more.
3. What only other replayed modules read need not be kept. It is replaced by NaN, and one pass shows whether
   that reaches the output; if it does, everything is kept.

Interventions at late layers of a network then cost what the late layers cost. The outputs are those of the
whole network bit for bit, as long as images run in the batches they were kept in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from viscircuits.errors import ModelError
from viscircuits.hooks import evaluating, forward, watch_calls
from viscircuits.layers import parse_address


class _Begun(Exception):
    """Raised inside a forward pass when the first layer of interest begins."""


class Prefix:
    """What a network computes before its first layer of interest, for a set of images.

    Parameters
    ----------
    model
        The network, left as it was found.
    layers
        Addresses of the layers of interest.
    images
        Transformed images.
    batch_size
        Images per forward pass.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[str], images: Float[Tensor, "image *axes"], batch_size: int = 16
    ) -> None:
        self.model, self.images = model, images
        self.first = {parse_address(layer).name for layer in layers}
        with evaluating(model), torch.no_grad():
            self.names = self._outermost(images[:1])
            one = self._run(images[:1], self.names)
            self.unread = self._unread(images[:1], one)
            read = [name for name in self.names if name not in self.unread]
            batches = [self._run(batch, read) for batch in images.split(batch_size)]
        self.kept = {**one, **{name: torch.cat([batch[name] for batch in batches]) for name in read}}

    @contextmanager
    def replay(self, which: Int[Tensor, " chosen"] | Sequence[int]) -> Iterator[Tensor]:
        """Images of these places to call the network on: inside, what comes before the first layer is not run again.

        Call the network on the very tensor that is given, in whole.
        """
        places = torch.as_tensor(which)
        with self._handing_out(
            {name: value[places] for name, value in self.kept.items() if name not in self.unread},
            {name: _repeated(self.kept[name], len(places)) for name in self.unread},
        ):
            yield self.images[places]

    def _outermost(self, image: Tensor) -> tuple[str, ...]:
        """Modules that ran once, returned a tensor before the first layer began, and lie in no other such module."""
        returned: list[str] = []
        calls: dict[str, int] = {}

        def entering(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
            if name in self.first:
                raise _Begun
            calls[name] = calls.get(name, 0) + 1

        def leaving(name: str, module: nn.Module, output: Any) -> None:
            if isinstance(output, Tensor) and calls[name] == 1:
                returned.append(name)

        self._until_begun(image, entering, leaving)
        once = {name for name in returned if calls[name] == 1 and self._is_met_once(name)}
        return tuple(name for name in returned if name in once and not any(_holds(other, name) for other in once))

    def _is_met_once(self, name: str) -> bool:
        """Whether the module bears one name, and so runs nowhere else under another."""
        module = self.model.get_submodule(name)
        return sum(each is module for _, each in self.model.named_modules(remove_duplicate=False)) == 1

    def _run(self, images: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """What these modules return, as far as the network runs before the first layer."""
        kept: dict[str, Tensor] = {}
        wanted = set(names)

        def entering(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
            if name in self.first:
                raise _Begun

        def leaving(name: str, module: nn.Module, output: Any) -> None:
            if name in wanted:
                kept[name] = output.clone()  # the next operation may work in place

        self._until_begun(images, entering, leaving)
        return kept

    def _until_begun(self, images: Tensor, entering: Callable, leaving: Callable) -> None:
        try:
            with watch_calls(self.model, entering, leaving):
                forward(self.model, images)
        except _Begun:
            pass

    def _unread(self, image: Tensor, kept: dict[str, Tensor]) -> frozenset[str]:
        """All but the last, if nothing else reads them, nor writes into them."""
        early = self.names[:-1]
        try:
            late = {name: _repeated(value, 2) for name, value in kept.items() if name not in early}
            blank = {name: _repeated(torch.full_like(kept[name], torch.nan), 2) for name in early}
            with self._handing_out(late, blank):
                reached = not bool(forward(self.model, _repeated(image, 2)).isfinite().all())
        except (ModelError, RuntimeError):
            # something wrote into what is one memory for both images, or a module's output has no axis for images
            reached = True
        return frozenset() if reached else frozenset(early)

    @contextmanager
    def _handing_out(self, values: dict[str, Tensor], unread: dict[str, Tensor]) -> Iterator[None]:
        """Inside, modules return these values, copied unless nothing reads them."""
        with ExitStack() as stack:
            for name, value in (values | unread).items():
                module = self.model.get_submodule(name)
                before = module.__dict__.get("forward")
                stack.callback(_put_back, module, before)
                module.forward = _returning(value, copied=name in values)
            yield


def _holds(outer: str, inner: str) -> bool:
    return inner.startswith(outer + ".")


def _repeated(value: Tensor, n: int) -> Tensor:
    """The same for each of `n` images, without copying it."""
    return value.expand(n, *value.shape[1:])


def _returning(value: Tensor, *, copied: bool) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: value.clone() if copied else value  # the next operation may work in place


def _put_back(module: nn.Module, before: Any) -> None:
    if before is None:
        del module.forward
    else:
        module.forward = before
