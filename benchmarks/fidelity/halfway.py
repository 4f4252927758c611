"""A network that remembers how far its first half came with known images.

Methods look at the same photographs over and over, and none at what comes before the layers of interest. Inside
`remembering` that part is not run again for images that a `viscircuits.prefix.Prefix` holds; others, such as those
between two images, go all the way. Outputs are the network's own, but for rounding where it kept them in other batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from viscircuits.prefix import Prefix


@contextmanager
def remembering(model: nn.Module, prefix: Prefix) -> Iterator[None]:
    """Let the network begin halfway wherever it is called on images of `prefix`."""
    known = {mark: place for place, mark in enumerate(_marks(prefix.images))}
    before = vars(model).get("forward")
    plain = model.forward

    def places_of(images: Tensor) -> list[int]:
        """Nothing where the network has to run as it is: images are new, or someone else replays its modules."""
        if images.requires_grad or any("forward" in vars(model.get_submodule(name)) for name in prefix.names):
            return []
        places = [known.get(mark, -1) for mark in _marks(images)]
        return places if min(places) >= 0 and torch.equal(prefix.images[places], images) else []

    def forward(images: Tensor, *args: Any, **kwargs: Any) -> Any:
        places = places_of(images)
        if not places:
            return plain(images, *args, **kwargs)
        with prefix.replay(places) as same:
            return plain(same, *args, **kwargs)

    model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before  # type: ignore[method-assign]


def _marks(images: Tensor) -> list[bytes]:
    """A few pixels of each, by which to look it up."""
    sparse = images.detach()[..., ::17, ::19].flatten(1).numpy()
    return [row.tobytes() for row in sparse]
