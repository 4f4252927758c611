"""The pictures that trained planted networks look at: several things to tell at once in each.

1. A `Task` in the sense of this file is one thing to tell of a picture, a question with a few answers.
2. `letters_on_gratings` draws a letter of one of four colours on a grating of one of four directions: three
   questions, all of them posed by every picture, so that what is active does not tell what is asked.
3. `two_figures` draws a figure on the left and one on the right, each round or square and red or green, on
   bars that lie or stand.

Every answer is drawn on its own, so none tells of another. Image i depends on the seed and i alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from viscircuits.concepts import grating, text

SIZE = 32
LETTERS = ("H", "O", "T", "X")
DIRECTIONS = (0.0, 45.0, 90.0, 135.0)  # degrees, counter-clockwise
INKS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "yellow": (1.0, 1.0, 0.0)}
QUESTIONS: dict[str, tuple[str, ...]] = {
    "letters": LETTERS,
    "gratings": tuple(f"{degrees:g}°" for degrees in DIRECTIONS),
    "colours": tuple(INKS),
}
MIDDLE, SPREAD = 0.5, 0.25  # of pixel values: networks see (value − MIDDLE) / SPREAD

Picture = Float[np.ndarray, "row column 3"]


@dataclass(frozen=True)
class Pictures:
    """Images as a network takes them, and for each question the number of each image's answer."""

    images: Float[Tensor, "image 3 row column"]
    answers: Mapping[str, Int[Tensor, " image"]]

    def where(self, chosen: Tensor) -> Pictures:
        """The images at these places, or where this is True."""
        return Pictures(self.images[chosen], {question: answer[chosen] for question, answer in self.answers.items()})

    def __len__(self) -> int:
        return len(self.images)


def letters_on_gratings(
    n_images: int,
    seed: Sequence[int],
    *,
    given: Mapping[str, int] | None = None,
    excluded: Mapping[str, int] | None = None,
) -> Pictures:
    """A letter of a colour on a grating, with the answers to ``letters``, ``gratings`` and ``colours``.

    Parameters
    ----------
    n_images
        How many.
    seed
        Of everything that is drawn.
    given
        Question → the answer that every image gives to it.
    excluded
        Question → the answer that no image gives to it.
    """
    scenes, answers = [], []
    for i in range(n_images):
        rng = np.random.default_rng([*seed, i])
        drawn = dict(zip(QUESTIONS, rng.integers(4, size=3).tolist(), strict=True)) | dict(given or {})
        drawn |= {question: (no + int(rng.integers(1, 4))) % 4 for question, no in (excluded or {}).items()}
        scenes.append(_letter(rng, drawn["letters"], drawn["gratings"], drawn["colours"]))
        answers.append(drawn)
    return _pictures(scenes, answers)


def two_figures(n_images: int, seed: Sequence[int]) -> Pictures:
    """A figure on the left, one on the right, and bars behind them.

    The questions are ``left round``, ``left red``, ``right round``, ``right red`` and ``upright`` (of the bars);
    1 is yes.
    """
    scenes, answers = [], []
    questions = ("left round", "left red", "right round", "right red", "upright")
    for i in range(n_images):
        rng = np.random.default_rng([*seed, i])
        drawn = dict(zip(questions, rng.integers(2, size=5).tolist(), strict=True))
        scene = _bars(rng, 90.0 * drawn["upright"])
        for side, left in (("left", 0), ("right", SIZE // 2)):
            ink = _ink(rng, "red" if drawn[f"{side} red"] else "green")
            scene = _paint(scene, _figure(rng, left, bool(drawn[f"{side} round"])), ink)
        scenes.append(scene)
        answers.append(drawn)
    return _pictures(scenes, answers)


def _pictures(scenes: Sequence[Picture], answers: Sequence[Mapping[str, int]]) -> Pictures:
    pixels = torch.from_numpy(np.stack(scenes)).float().permute(0, 3, 1, 2)  # (image, 3, row, column)
    numbers = {question: torch.tensor([each[question] for each in answers]) for question in answers[0]}
    return Pictures(((pixels - MIDDLE) / SPREAD).contiguous(), numbers)


def _letter(rng: np.random.Generator, letter: int, direction: int, ink: int) -> Picture:
    stencil = text(
        rng, SIZE, words=(LETTERS[letter],), height=(0.55, 0.75), colour=("white",), ground=("black",),
        background=("plain",), grain=(0.0, 0.0),
    )  # fmt: skip
    mask = np.asarray(stencil, dtype=np.float64)[..., 0] / 255
    return _paint(_bars(rng, DIRECTIONS[direction]), mask, _ink(rng, tuple(INKS)[ink]))


def _bars(rng: np.random.Generator, degrees: float) -> Picture:
    drawn = grating(
        rng, SIZE, frequency=(3.0, 6.0), orientation=(degrees - 8, degrees + 8), contrast=(0.4, 0.8), grain=(4.0, 4.0)
    )
    return np.asarray(drawn, dtype=np.float64) / 255


def _ink(rng: np.random.Generator, name: str) -> Float[np.ndarray, "3"]:
    return np.clip(np.array(INKS[name]) * rng.uniform(0.7, 1.0) + rng.uniform(0.0, 0.2, 3), 0, 1)


def _figure(rng: np.random.Generator, left: int, is_round: bool) -> Float[np.ndarray, "row column"]:
    """A disc or a square somewhere in one half of the image, 1 on it and 0 off it, soft at its edge."""
    half = rng.uniform(4.5, 6.0)  # pixels
    across, down = np.meshgrid(*2 * [np.arange(SIZE) + 0.5])
    across = abs(across - left - rng.uniform(half + 0.5, SIZE / 2 - half - 0.5))
    down = abs(down - rng.uniform(half + 1, SIZE - half - 1))
    distance = np.hypot(across, down) if is_round else np.maximum(across, down)
    return np.clip(half + 0.5 - distance, 0, 1)


def _paint(scene: Picture, mask: Float[np.ndarray, "row column"], ink: Float[np.ndarray, "3"]) -> Picture:
    return scene + mask[..., None] * (ink - scene)
