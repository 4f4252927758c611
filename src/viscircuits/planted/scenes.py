"""The pictures that hand-wired networks look at: a few small figures on a dark ground.

1. A `Figure` is a glyph of 12×12 pixels in one colour, perhaps with a coloured core.
2. A scene puts up to four of them into the quarters of the image, at a place, a contrast and with noise
   that the generator draws.
3. A scene with the concept and its reference come from the same draws: they are the same picture but for
   the figures that were exchanged, so nothing but the concept tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from viscircuits.concepts import circle

SIZE = 28
GLYPH = 12
NOISE = 0.02
CONTRAST = (0.9, 1.0)
COLOURS = {"white": (1.0, 1.0, 1.0), "red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}

Glyph = Float[np.ndarray, "row column"]


@dataclass(frozen=True)
class Figure:
    """A glyph in a colour; its core, where it has one, is a small disc in another."""

    glyph: str
    colour: str = "white"
    core: str = ""


Figures = Sequence[Figure]
Exchange = Mapping[Figure, Figure | None]


def pictures(
    figures: Callable[[np.random.Generator], Figures], exchange: Exchange, n_images: int, seed: Sequence[int]
) -> tuple[Float[Tensor, "image 3 row column"], Float[Tensor, "image 3 row column"]]:
    """Scenes with the concept, and the same scenes with some figures exchanged for others or left out.

    Parameters
    ----------
    figures
        Draws what is in one scene.
    exchange
        Figure → what stands in its place in the reference; None leaves the place empty.
    n_images
        How many of each.
    seed
        Image i depends on this and i alone.
    """
    concept, reference = [], []
    for i in range(n_images):
        drawn = figures(np.random.default_rng([*seed, i, 0]))
        concept.append(_scene(drawn, np.random.default_rng([*seed, i, 1])))
        reference.append(_scene([exchange.get(each, each) for each in drawn], np.random.default_rng([*seed, i, 1])))
    return torch.stack(concept), torch.stack(reference)


def _scene(figures: Sequence[Figure | None], rng: np.random.Generator) -> Float[Tensor, "3 row column"]:
    cell = SIZE // 2
    canvas = NOISE * rng.standard_normal((3, SIZE, SIZE))
    places = rng.permutation(4)
    for figure, place, jitter, share in zip(
        figures, places, rng.integers(0, cell - GLYPH + 1, (4, 2)), rng.random(4), strict=False
    ):
        top, left = cell * (int(place) // 2) + jitter[0], cell * (int(place) % 2) + jitter[1]
        if figure is not None:
            contrast = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * share
            canvas[:, top : top + GLYPH, left : left + GLYPH] += contrast * _painted(figure)
    return torch.from_numpy(canvas).float()


def _painted(figure: Figure) -> Float[np.ndarray, "3 row column"]:
    picture = _in_colour(glyph(figure.glyph), figure.colour)
    return picture + _in_colour(glyph("core"), figure.core) if figure.core else picture


def _in_colour(mask: Glyph, colour: str) -> Float[np.ndarray, "3 row column"]:
    return np.array(COLOURS[colour])[:, None, None] * mask


@lru_cache
def glyph(name: str) -> Glyph:
    """A figure's shape, 1 on it and 0 off it.

    A broken ring is a ring whose quarters have changed places crosswise: the same ink, the same lines, the
    same curves, but no ring.
    """
    across, down = np.meshgrid(*2 * [np.arange(GLYPH) - (GLYPH - 1) / 2])
    near, far = np.minimum(abs(across), abs(down)), np.maximum(abs(across), abs(down))
    shapes: dict[str, Callable[[], np.ndarray]] = {
        "ring": lambda: _round("ring", 0.46),
        "broken ring": lambda: np.roll(_round("ring", 0.46), (GLYPH // 2, GLYPH // 2), (0, 1)),
        "disc": lambda: _round("disc", 0.35),
        "core": lambda: _round("disc", 0.2),
        "square": lambda: (far > 3.6) & (far < 5.2),
        "patch": lambda: far < 4,
        "plus": lambda: (near < 1) & (far < 5.6),
        "cross": lambda: abs(abs(across) - abs(down)) < 1.2,
    }
    return shapes[name]().astype(np.float64)


def _round(fill: str, radius: float) -> Glyph:
    drawn = circle(
        np.random.default_rng(0), GLYPH, fill=(fill,), radius=(radius, radius), thickness=(0.13, 0.13),
        colour=("white",), ground=("black",), background=("plain",), grain=(0.0, 0.0), x=(0.5, 0.5), y=(0.5, 0.5),
    )  # fmt: skip
    return np.asarray(drawn, dtype=np.float64)[..., 0] / 255
