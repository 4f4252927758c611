"""A network that remembers how far its first half came with known images.

Methods look at the same photographs over and over, and none at what comes before the layers of interest. Inside
`remembering` that part is not run again for images that a `viscircuits.prefix.Prefix` holds; others, such as those
between two images, go all the way. Outputs are the network's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from viscircuits.prefix import Prefix


@contextmanager
def remembering(model: nn.Module, prefix: Prefix) -> Iterator[None]:
    """Let the network begin halfway wherever it is called on images of `prefix`."""
    known = {mark: place for place, mark in enumerate(_marks(prefix.images))}
    plain = model.forward

    def forward(images: Tensor, *args: Any, **kwargs: Any) -> Any:
        places = [] if images.requires_grad else [known.get(mark, -1) for mark in _marks(images)]
        if not places or min(places) < 0:
            return plain(images, *args, **kwargs)
        with prefix.replay(places) as same:
            return plain(same, *args, **kwargs)

    model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.forward


def _marks(images: Tensor) -> list[bytes]:
    sparse = images.detach()[..., ::17, ::19].flatten(1).numpy()
    return [row.tobytes() for row in sparse]
