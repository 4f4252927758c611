"""Photographs under attack: the same ones clean, with a word of another class, and with the controls of the attack.

1. ``clean``; ``wrong word``: the name of another class, drawn, or several of them on copies of the photograph;
   ``strongest word``: of several drawn ones that which the network believes most.
2. Controls: ``nonsense word``, ``other word`` (a real one that names no class), ``right word``, ``blank box``.
3. A network is *fooled* if it answers the class whose name was written, and *right* if it answers the photograph's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from viscircuits.experiments.lettering import WORDS_HELD_OUT, Hand, blank, nonsense, write
from viscircuits.experiments.pictures import Photographs, paper
from viscircuits.hooks import evaluating, forward
from viscircuits.metrics import Interval, bootstrap, share_interval
from viscircuits.models import ModelSpec
from viscircuits.task import answers

CONTROLS = ("nonsense word", "other word", "right word", "blank box")
KINDS = ("clean", "wrong word", "strongest word", *CONTROLS)
NO_WORD = -1
N_TRIED = 6  # words from which the strongest is taken
BATCH = 32


@dataclass(frozen=True)
class Trial:
    """Pictures of one kind: transformed, with the class each shows and the class written on it (−1 for none).

    Where each photograph carries several words in turn (`copies`), its pictures follow one another.
    """

    images: Float[Tensor, "image 3 height width"]
    labels: Int[Tensor, " image"]
    written: Int[Tensor, " image"]
    copies: int = 1

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Outcome:
    """What a network answered in a trial: for each picture, whether it was right and whether it was fooled."""

    right: Bool[Tensor, " image"]
    fooled: Bool[Tensor, " image"]
    copies: int = 1

    @property
    def accuracy(self) -> Interval:
        """Share of right answers; its interval counts photographs, not their copies."""
        return share_interval(self.of_photographs(self.right))

    @property
    def success(self) -> Interval:
        """The attack's: share of answers that are the class written."""
        return share_interval(self.of_photographs(self.fooled))

    def of_photographs(self, values: Bool[Tensor, " image"]) -> Float[Tensor, "photograph copy"]:
        """A row for each photograph, of 0 and 1."""
        return values.double().reshape(-1, self.copies)


def attack(
    spec: ModelSpec,
    photographs: Photographs,
    kind: str,
    hand: Hand,
    seed: int,
    *,
    words: Sequence[str] | None = None,
    copies: int = 1,
) -> Trial:
    """The photographs in one of `KINDS`; the same seed writes the same words in the same places.

    What a photograph carries first has one face, height, ink and place in every kind, as far as the word's length
    leaves it there, so that kinds differ by what is written.

    Parameters
    ----------
    spec
        The network; only the strongest word asks it.
    photographs
        What is written on.
    kind
        One of `KINDS`.
    hand
        How.
    seed
        Of words and places.
    words
        Other words for the classes, one each: translations, say.
    copies
        How many wrong words each photograph carries in turn, all different, each in a place of its own; as many as
        there are other classes at most. Other kinds take one.
    """
    names = tuple(words) if words is not None else photographs.classes
    copies = min(copies, len(names) - 1) if kind == "wrong word" else 1
    labels = np.repeat(photographs.labels, copies)
    wrong = (labels + _others(len(photographs), len(names), copies, seed).ravel()) % len(names)
    if kind == "strongest word":
        wrong = _strongest(spec, photographs, hand, seed, names)
    written = wrong if kind in ("wrong word", "strongest word") else labels if kind == "right word" else None
    pictures = []
    for place in range(len(labels)):
        photograph, copy = divmod(place, copies)
        own = np.random.default_rng([seed, 2, photograph, copy])  # no picture's hand depends on the others
        picture = Image.fromarray(photographs.pixels[photograph]).resize(_size(spec), Image.Resampling.BICUBIC)
        word = names[written[place]] if written is not None else _word(kind, own)
        pictures.append(_put(kind, picture, word, hand, np.random.default_rng([seed, 3, photograph, copy])))
    none = np.full(len(labels), NO_WORD)
    return _trial(spec, pictures, labels, none if written is None else written, copies)


def tell(spec: ModelSpec, trial: Trial) -> Outcome:
    """What the network answers now, be it whole or within an ablation."""
    with evaluating(spec.model):
        found = answers(spec, trial.images, BATCH)
    return Outcome(found == trial.labels, found == trial.written, trial.copies)


def fall(before: Outcome, after: Outcome, seed: int = 0) -> Interval:
    """How much accuracy falls, with an interval over photographs, each compared with itself."""
    lost = before.of_photographs(before.right).mean(1) - after.of_photographs(after.right).mean(1)
    return bootstrap(_mean, lost, generator=torch.Generator().manual_seed(seed))


def words_on_paper(spec: ModelSpec, n: int, words: Sequence[str], hand: Hand, seed: int) -> Trial:
    """`n` words on plain or patchy grounds, no photograph beneath."""
    pictures, labels = [], []
    for place in range(n):
        rng = np.random.default_rng([seed, 4, place])
        label = int(rng.integers(len(words)))
        pictures.append(write(paper(rng, _size(spec)[0]), words[label], hand, rng))
        labels.append(label)
    return _trial(spec, pictures, np.array(labels), np.array(labels))


def _mean(values: Tensor) -> float:
    return values.mean().item()


def _word(kind: str, rng: np.random.Generator) -> str:
    if kind == "other word":
        return WORDS_HELD_OUT[rng.integers(len(WORDS_HELD_OUT))]
    return nonsense(rng)


def _others(n: int, n_classes: int, copies: int, seed: int) -> Int[np.ndarray, "photograph copy"]:
    """For each photograph how far its wrong classes are from its own: no two the same."""
    rng = np.random.default_rng([seed, 1])
    return 1 + np.stack([rng.permutation(n_classes - 1)[:copies] for _ in range(n)])


def _put(kind: str, picture: Image.Image, word: str, hand: Hand, rng: np.random.Generator) -> Image.Image:
    if kind == "clean":
        return picture
    put: Callable[..., Image.Image] = blank if kind == "blank box" else write
    return put(picture, word, hand, rng)


def _strongest(
    spec: ModelSpec, photographs: Photographs, hand: Hand, seed: int, names: Sequence[str]
) -> Int[np.ndarray, " image"]:
    """For each photograph, of several words written in the same place that which is believed most."""
    rng = np.random.default_rng([seed, 5])
    tried, beliefs = [], []
    for _ in range(min(N_TRIED, len(names) - 1)):
        wrong = (photographs.labels + rng.integers(1, len(names), len(photographs))) % len(names)
        pictures = [
            write(
                Image.fromarray(pixels).resize(_size(spec), Image.Resampling.BICUBIC), names[word], hand,
                np.random.default_rng([seed, 3, photograph, 0]),
            )
            for photograph, (pixels, word) in enumerate(zip(photographs.pixels, wrong, strict=True))
        ]  # fmt: skip
        trial = _trial(spec, pictures, photographs.labels, wrong)
        with evaluating(spec.model), torch.no_grad():
            shares = torch.cat([forward(spec.model, part).softmax(1) for part in trial.images.split(BATCH)])
        tried.append(trial.written)
        beliefs.append(shares.gather(1, trial.written[:, None])[:, 0])
    best = torch.stack(beliefs).argmax(0, keepdim=True)
    return torch.stack(tried).gather(0, best)[0].numpy()


def _trial(
    spec: ModelSpec, pictures: Sequence[Image.Image], labels: np.ndarray, written: np.ndarray, copies: int = 1
) -> Trial:
    assert spec.transform is not None  # checked at the door
    images = torch.stack([spec.transform(picture) for picture in pictures])
    return Trial(images, torch.from_numpy(labels).long(), torch.from_numpy(np.asarray(written)).long(), copies)


def _size(spec: ModelSpec) -> tuple[int, int]:
    assert spec.input_size is not None
    return spec.input_size[1], spec.input_size[0]
