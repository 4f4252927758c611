"""Independently trained classifiers fused into one network: a concept's circuit is the network it came from.

1. A *part* is a small convolutional network that answers one question about a picture (`composed.QUESTIONS`),
   trained alone on pictures that pose all questions at once. What is idle on its concept, one of the
   answers, was dropped (`learning.drop_idle`), so every unit and edge that is left does something.
2. `merged` puts parts side by side: the input is shared, weights stand in blocks, outputs are joined, and the
   units of every layer are shuffled.
3. `cross_talk` fills the empty blocks with random weights. Then the other parts do have an effect, and the
   truth is where the units came from, no longer all that counts.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from viscircuits.errors import ViscircuitsError
from viscircuits.planted import Planted
from viscircuits.planted.composed import QUESTIONS, letters_on_gratings
from viscircuits.planted.learning import (
    by_source,
    copy_units,
    drop_idle,
    everything,
    fit,
    initialise,
    load_weights,
    relus,
    shares,
    silence,
    weighted,
)
from viscircuits.scores.formulas import choose

WIDTHS = {"letters": (8, 12, 16), "gratings": (8, 10, 10), "colours": (8, 10, 10)}
N_VARIANTS = 3
N_ANSWERS = 4
IDLE = (0.01, 0.002)  # shares of the behaviour under which a unit, and an edge, is dropped
CROSS_TALK_TOLERANCE = 2.0  # share of the behaviour, for each unit of cross-talk
LEAST = 1e-4  # share that each unit and edge still has on images other than those it was kept for


@dataclass(frozen=True)
class Part:
    """A trained network, its question, and the answer that is its concept."""

    network: nn.Sequential
    question: str
    answer: int


def classifier(widths: Sequence[int], n_outputs: int = N_ANSWERS) -> nn.Sequential:
    """Three convolutions, each with a ReLU, and a linear layer on the mean over positions."""
    first, second, third = widths
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, first, 5, stride=2, padding=2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(first, second, 3, stride=2, padding=1),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(second, third, 3, padding=1),
            relu3=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(third, n_outputs),
        )
    )


def train_part(question: str, variant: int = 0, *, n_images: int = 3000, epochs: int = 20, rounds: int = 40) -> Part:
    """Train one part: learn the question, then drop what is idle and learn on, until nothing is.

    Parameters
    ----------
    question
        In `composed.QUESTIONS`.
    variant
        Of the weights, the pictures, and the answer that is the concept.
    n_images, epochs
        Pictures to learn from, and how often each is seen at first.
    rounds
        How often what is idle is dropped and the rest trained on, at the most.

    Raises
    ------
    ViscircuitsError
        If something is still idle after all rounds.
    """
    seed = 100 * variant + list(QUESTIONS).index(question)
    network = classifier(choose(WIDTHS, question, "question"))
    generator = torch.Generator().manual_seed(seed)
    initialise(network, generator)
    pictures, kept, answer = letters_on_gratings(n_images, [seed, 1]), everything(network), variant % N_ANSWERS
    shows = pictures.answers[question] == answer
    concept, reference = pictures.images[shows][:128], pictures.images[~shows][:256]
    labels = torch.full((len(concept),), answer)

    def loss(batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            network(pictures.images[batch]), pictures.answers[question][batch], label_smoothing=0.05
        )

    def learn(epochs: int, rate: float) -> None:
        fit(network, n_images, loss, epochs=epochs, rate=rate, generator=generator,
            after_step=lambda: silence(network, kept))  # fmt: skip

    learn(epochs, 1e-2)
    for _ in range(rounds):
        if not drop_idle(kept, shares(network, concept, labels, reference), IDLE, at_most=0.1):
            small = classifier([int(units.sum()) for units in kept.units])
            copy_units(network, small, [units.nonzero().flatten() for units in kept.units])
            return Part(small.eval(), question, answer)
        silence(network, kept)
        learn(2, 2e-3)
    raise ViscircuitsError(f"{question!r} {variant} still has idle units after {rounds} rounds; allow more")


def load_part(question: str, variant: int) -> Part:
    """The part that `tools/plant.py` trained."""
    weights = load_weights(f"{question}-{variant}")
    network = classifier([len(weights[f"conv{i}.weight"]) for i in (1, 2, 3)])
    network.load_state_dict(weights)
    return Part(network.eval(), question, variant % N_ANSWERS)


def merged(
    seed: int = 0,
    *,
    name: str = "two-networks",
    parts: Sequence[str] = ("letters", "gratings"),
    concept: str | None = None,
    cross_talk: float = 0.0,
    n_images: int = 32,
    fresh: bool = False,
) -> Planted:
    """Trained classifiers side by side; the circuit is the one whose question the concept answers.

    Parameters
    ----------
    seed
        Of the pictures, the order of units and the cross-talk; also which trained weights and which part.
    name
        What to call it.
    parts
        Their questions.
    concept
        The question whose part is the circuit; by default they take turns with the seed.
    cross_talk
        Norm of the random weights between parts over the norm of the weights within, layer by layer.
    n_images
        Images with the concept; there are twice as many without.
    fresh
        Train the parts anew instead of loading them: about a minute each.
    """
    question = concept_of(parts, concept, seed, N_VARIANTS)
    made = [(train_part if fresh else load_part)(each, seed % N_VARIANTS) for each in parts]
    place = parts.index(question)
    network, origins = merge([part.network for part in made], cross_talk, torch.Generator().manual_seed(seed))
    layers = relus(network)
    units = {layer: origin.part == place for layer, origin in zip(layers, origins, strict=True)}
    shown = question_images(question, made[place].answer, n_images, seed, N_ANSWERS * place)
    return Planted(
        name=name,
        family="merged" if not cross_talk else "merged with cross-talk",
        model=network,
        layers=layers,
        **shown,
        units=units,
        edges=dict(zip(pairwise(layers), _edges(made[place].network, origins, place), strict=True)),
        tolerance=1e-5 if not cross_talk else CROSS_TALK_TOLERANCE * cross_talk,
        least=LEAST if not cross_talk else 0.0,
        names=named(layers, origins, parts),
        note=f"networks for {' and '.join(parts)} in one, seen by all; the concept is an answer of {question}",
        options={"seed": seed, "parts": list(parts), "concept": question, "cross_talk": cross_talk, "fresh": fresh},
    )


def concept_of(parts: Sequence[str], asked: str | None, seed: int, n_variants: int) -> str:
    """The part asked for, else the one whose turn it is: over the seeds, each is the circuit in each of its variants.

    Parameters
    ----------
    parts
        Their questions.
    asked
        One of them, or None.
    seed
        Also decides the variant, ``seed % n_variants``.
    n_variants
        Of the weights.

    Raises
    ------
    ViscircuitsError
        If no part bears that name.
    """
    if asked is not None and asked not in parts:
        raise ViscircuitsError(f"the concept's part {asked!r} is none of {', '.join(parts)}")
    rounds = seed // math.lcm(len(parts), n_variants)
    return asked or parts[(seed + rounds) % len(parts)]


def named(layers: Sequence[str], origins: Sequence[Origins], parts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Layer → for each unit its part's question and its index there, such as ``letters 3``."""
    return {
        layer: tuple(f"{parts[p]} {i}" for p, i in zip(origin.part.tolist(), origin.index.tolist(), strict=True))
        for layer, origin in zip(layers, origins, strict=True)
    }


def question_images(question: str, answer: int, n_images: int, seed: int, first_output: int) -> dict[str, Any]:
    """Images that give this answer and images that give another, for discovery and held out, as `Planted` names them.

    Parameters
    ----------
    question, answer
        What makes the concept.
    n_images
        With the concept; twice as many without.
    seed
        Of the pictures.
    first_output
        Of the question's outputs among the network's: labels count from it.
    """
    found: dict[str, Any] = {}
    for which, prefix in enumerate(("", "test_")):
        concept = letters_on_gratings(n_images, [seed, 2, which], given={question: answer})
        reference = letters_on_gratings(2 * n_images, [seed, 3, which], excluded={question: answer})
        for kind, pictures in (("concept", concept), ("reference", reference)):
            found[f"{prefix}{kind}"] = pictures.images
            found[f"{prefix}{kind}_labels"] = first_output + pictures.answers[question]
    return found


@dataclass(frozen=True)
class Origins:
    """Where each unit of a merged layer came from: the number of its part, and its index there."""

    part: Int[Tensor, " unit"]
    index: Int[Tensor, " unit"]


def shuffled(widths: Sequence[int], generator: torch.Generator) -> Origins:
    """The units of several layers of these widths, put together in any order."""
    ordered = in_order(widths)
    order = torch.randperm(sum(widths), generator=generator)
    return Origins(ordered.part[order], ordered.index[order])


@torch.no_grad()
def merge(
    networks: Sequence[nn.Sequential], cross_talk: float, generator: torch.Generator
) -> tuple[nn.Sequential, tuple[Origins, ...]]:
    """One network in the place of several, and where the units of each of its layers came from.

    Parameters
    ----------
    networks
        Made by `classifier`; they see the same images, their outputs are joined in this order.
    cross_talk
        Norm of the random weights between parts over the norm of the weights within, layer by layer.
    generator
        Of the order of units and the cross-talk.
    """
    each = [weighted(network) for network in networks]
    origins = [shuffled([len(layer.weight) for layer in layers], generator) for layers in zip(*each, strict=True)]
    n_outputs = [len(layers[-1].weight) for layers in each]
    origins[-1] = in_order(n_outputs)
    whole = classifier([len(origin.part) for origin in origins[:-1]], sum(n_outputs))
    for i, (layer, target) in enumerate(zip(weighted(whole), origins, strict=True)):
        weights = [layers[i].weight for layers in each]
        layer.bias.copy_(gathered([layers[i].bias for layers in each], target))
        if i == 0:  # the image is shared: there is nothing between the parts
            layer.weight.copy_(gathered(weights, target))
        else:
            layer.weight.copy_(joined(weights, target, origins[i - 1], cross_talk, generator))
    return whole.eval(), tuple(origins[:-1])


def in_order(widths: Sequence[int]) -> Origins:
    """The units of several layers of these widths, one layer after the other."""
    part = torch.cat([torch.full((n,), i) for i, n in enumerate(widths)])
    return Origins(part, torch.cat([torch.arange(n) for n in widths]))


def joined(
    weights: Sequence[Tensor], target: Origins, source: Origins, cross_talk: float, generator: torch.Generator
) -> Float[Tensor, "target source *kernel"]:
    """Several layers' weights as one layer's: each within its part, random ones or zeros between parts.

    Parameters
    ----------
    weights
        Of each part: (target, source, …).
    target, source
        Where the rows and columns of the answer come from.
    cross_talk
        Norm of what stands between parts over the norm of what stands within.
    generator
        Of what stands between parts.
    """
    kernel = weights[0].shape[2:]
    between = torch.randn(len(target.part), len(source.part), *kernel, generator=generator)
    within = torch.zeros_like(between)
    for p, weight in enumerate(weights):
        rows, columns = (target.part == p).nonzero().flatten(), (source.part == p).nonzero().flatten()
        within[rows[:, None], columns] = weight[target.index[rows]][:, source.index[columns]]
        between[rows[:, None], columns] = 0
    if cross_talk and len(weights) > 1:
        within += between * (cross_talk * within.norm() / between.norm())
    return within


def gathered(values: Sequence[Tensor], origins: Origins) -> Float[Tensor, "unit *axes"]:
    """Several layers' values as one layer's, each unit bringing its own.

    Parameters
    ----------
    values
        Of each part: (unit, …).
    origins
        Where the units of the answer come from.
    """
    return torch.stack([values[p][i] for p, i in zip(origins.part.tolist(), origins.index.tolist(), strict=True)])


def _edges(network: nn.Sequential, origins: Sequence[Origins], place: int) -> list[Bool[Tensor, "_ _"]]:
    """For each pair of layers the edges that the part in this place has."""
    found = []
    for layer, (source, target) in zip(weighted(network)[1:], pairwise(origins), strict=False):
        n_sources = int((source.part == place).sum())
        has = by_source(layer.weight.detach(), n_sources).abs().amax(2) > 0  # (target, source) of the part
        both = (target.part == place)[:, None] & (source.part == place)
        edges = torch.zeros_like(both)
        edges[both] = has[target.index[target.part == place]][:, source.index[source.part == place]].flatten()
        found.append(edges)
    return found
