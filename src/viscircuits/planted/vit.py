"""Two small vision transformers fused into one: the transformers' version of `merged`.

1. A *part* is a transformer trained alone to answer one question about a picture, as in `merged`.
2. Side by side they share the image: embeddings, heads and outputs stand one after the other, each part is
   normalised by itself (`PartNorm`), linear layers stand in blocks, and the units of each MLP are shuffled.
3. The layers of units are the MLPs after their GELU. Between two of them lie the residual stream and the next
   block's attention; an edge is all of that.

A transformer's edges have no weights of their own that could be dropped. Instead training goes on until every
unit and every edge within a part has a share in its concept (`trained_far_enough`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from viscircuits.errors import ViscircuitsError
from viscircuits.planted import Planted
from viscircuits.planted.checks import check
from viscircuits.planted.composed import QUESTIONS, SIZE, letters_on_gratings
from viscircuits.planted.learning import accuracy, fit, load_weights, weighted
from viscircuits.planted.merged import (
    N_ANSWERS,
    Origins,
    concept_of,
    gathered,
    in_order,
    joined,
    named,
    question_images,
    shuffled,
)
from viscircuits.scores.formulas import choose

WIDTH, HEADS, HIDDEN, BLOCKS, PATCH = 16, 2, 8, 3, 4  # of one part
N_VARIANTS = 2
CROSS_TALK_TOLERANCE = 2.0  # share of the behaviour, for each unit of cross-talk
IDLE = (1e-3, 5e-6)  # shares of the behaviour under which a unit, and an edge, keeps a part in training
ENOUGH = 0.96  # of the answers right


class PartNorm(nn.Module):
    """Layer normalisation of each part's features by themselves."""

    def __init__(self, n_parts: int, width: int) -> None:
        super().__init__()
        self.n_parts = n_parts
        self.weight, self.bias = nn.Parameter(torch.ones(n_parts * width)), nn.Parameter(torch.zeros(n_parts * width))

    def forward(self, tokens: Float[Tensor, "image token feature"]) -> Float[Tensor, "image token feature"]:
        """Normalised tokens."""
        parts = tokens.unflatten(-1, (self.n_parts, -1))
        normal = nn.functional.layer_norm(parts, parts.shape[-1:])
        return normal.flatten(-2) * self.weight + self.bias


class Attention(nn.Module):
    """Self-attention whose heads stand one after the other, part by part."""

    def __init__(self, n_parts: int, width: int) -> None:
        super().__init__()
        self.n_heads = n_parts * HEADS
        self.query, self.key, self.value, self.proj = (nn.Linear(n_parts * width, n_parts * width) for _ in range(4))

    def forward(self, tokens: Float[Tensor, "image token feature"]) -> Float[Tensor, "image token feature"]:
        """What the heads have read, back in the residual stream."""
        query, key, value = (
            each(tokens).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )  # (image, head, token, feature)
        attention = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        return self.proj((attention @ value).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """A transformer block that normalises before attention and before the MLP."""

    def __init__(self, n_parts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = PartNorm(n_parts, width), PartNorm(n_parts, width)
        self.attention = Attention(n_parts, width)
        self.rise, self.gelu, self.fall = (
            nn.Linear(n_parts * width, hidden),
            nn.GELU(),
            nn.Linear(hidden, n_parts * width),
        )

    def forward(self, tokens: Float[Tensor, "image token feature"]) -> Float[Tensor, "image token feature"]:
        """The residual stream after this block."""
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.fall(self.gelu(self.rise(self.norm2(tokens))))


class Transformer(nn.Module):
    """One or several small vision transformers on the same patches, with a head on their mean token.

    Parameters
    ----------
    n_parts
        How many transformers it holds.
    hidden
        Units of each MLP, all parts' together.
    """

    def __init__(self, n_parts: int = 1, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, n_parts * WIDTH, 2 * PATCH - 1, stride=PATCH, padding=PATCH - 1)
        self.place = nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2, n_parts * WIDTH))
        self.blocks = nn.Sequential(*[Block(n_parts, WIDTH, hidden) for _ in range(BLOCKS)])
        self.norm = PartNorm(n_parts, WIDTH)
        self.head = nn.Linear(n_parts * WIDTH, n_parts * N_ANSWERS)

    def forward(self, images: Float[Tensor, "image 3 row column"]) -> Float[Tensor, "image output"]:
        """A logit for each answer of each part."""
        tokens = self.stem(images).flatten(2).transpose(1, 2) + self.place  # (image, token, feature)
        return self.head(self.norm(self.blocks(tokens)).mean(1))


LAYERS = tuple(f"blocks.{i}.gelu" for i in range(BLOCKS))


def train_part(
    question: str, variant: int = 0, *, n_images: int = 3000, epochs: int = 16, rounds: int = 20
) -> Transformer:
    """Train one part: learn the question, and learn on until every unit and edge has a share in the concept.

    Parameters
    ----------
    question
        In `composed.QUESTIONS`.
    variant
        Of the weights, the pictures, and the answer that is the concept.
    n_images, epochs
        Pictures to learn from, and how often each is seen before others judge whether that was enough.
    rounds
        How often, at the most, it starts over from where it stands; and then how often all are seen once more.

    Raises
    ------
    ViscircuitsError
        If something is still idle after all rounds.
    """
    seed = 100 * variant + 20 + list(QUESTIONS).index(choose({each: each for each in QUESTIONS}, question, "question"))
    generator = torch.Generator().manual_seed(seed)
    pictures = letters_on_gratings(n_images, [seed, 1])
    network = Transformer()
    _initialise(network, generator)

    def loss(batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            network(pictures.images[batch]), pictures.answers[question][batch], label_smoothing=0.05
        )

    exam = letters_on_gratings(400, [seed, 4])
    for _ in range(rounds):
        fit(network, n_images, loss, epochs=epochs, rate=5e-3, generator=generator)
        if accuracy(network, exam, question) >= ENOUGH:
            break
    for _ in range(rounds):
        alone = _planted([network.eval()], [question], question, variant, seed, cross_talk=0.0, n_images=64)
        found = check(alone)
        if found.weakest_unit > IDLE[0] and found.weakest_edge > IDLE[1]:
            return network
        fit(network, n_images, loss, epochs=1, rate=1e-3, generator=generator)
    raise ViscircuitsError(f"{question!r} {variant} still has idle units after {rounds} rounds; allow more")


@torch.no_grad()
def _initialise(network: Transformer, generator: torch.Generator) -> None:
    for layer in weighted(network):
        layer.weight.normal_(0, layer.weight[0].numel() ** -0.5, generator=generator)
        layer.bias.zero_()
    network.place.normal_(0, 0.1, generator=generator)


def load_part(question: str, variant: int) -> Transformer:
    """The part that `tools/plant.py` trained."""
    network = Transformer()
    network.load_state_dict(load_weights(f"vit-{question}-{variant}"))
    return network.eval()


def merged_transformers(
    seed: int = 0,
    *,
    parts: Sequence[str] = ("letters", "gratings"),
    concept: str | None = None,
    cross_talk: float = 0.0,
    n_images: int = 32,
    fresh: bool = False,
) -> Planted:
    """Trained vision transformers side by side; the circuit is the one whose question the concept answers.

    Parameters
    ----------
    seed
        Of the pictures, the order of units and the cross-talk; also which trained weights and which part.
    parts
        Their questions.
    concept
        The question whose part is the circuit; by default they take turns with the seed.
    cross_talk
        Norm of the random weights between parts over the norm of the weights within, for each linear layer.
    n_images
        Images with the concept; there are twice as many without.
    fresh
        Train the parts anew instead of loading them: a few minutes each.
    """
    question = concept_of(parts, concept, seed, N_VARIANTS)
    variant = seed % N_VARIANTS
    networks = [(train_part if fresh else load_part)(each, variant) for each in parts]
    return _planted(networks, parts, question, variant, seed, cross_talk=cross_talk, n_images=n_images)


def _planted(
    networks: Sequence[Transformer],
    parts: Sequence[str],
    question: str,
    variant: int,
    seed: int,
    *,
    cross_talk: float,
    n_images: int,
) -> Planted:
    place = list(parts).index(question)
    whole, origins = merge(networks, cross_talk, torch.Generator().manual_seed(seed))
    units = {layer: origin.part == place for layer, origin in zip(LAYERS, origins, strict=True)}
    return Planted(
        name="two-transformers",
        family="merged ViT",
        model=whole,
        layers=LAYERS,
        **question_images(question, variant % N_ANSWERS, n_images, seed, N_ANSWERS * place),
        units=units,
        edges={(source, target): units[target][:, None] & units[source] for source, target in pairwise(LAYERS)},
        tolerance=1e-5 if not cross_talk else CROSS_TALK_TOLERANCE * cross_talk,
        least=0.0,
        names=named(LAYERS, origins, parts),
        note=f"transformers for {' and '.join(parts)} in one, seen by all; the concept is an answer of {question}",
        options={"seed": seed, "parts": list(parts), "concept": question, "cross_talk": cross_talk},
    )


@torch.no_grad()
def merge(
    networks: Sequence[Transformer], cross_talk: float, generator: torch.Generator
) -> tuple[Transformer, tuple[Origins, ...]]:
    """One transformer in the place of several, and where the units of each of its MLPs came from.

    Parameters
    ----------
    networks
        They see the same images, their outputs are joined in this order.
    cross_talk
        Norm of the random weights between parts over the norm of the weights within, for each linear layer.
    generator
        Of the order of units and the cross-talk.
    """
    whole, n_parts = Transformer(len(networks), len(networks) * HIDDEN), len(networks)
    features, outputs = in_order([WIDTH] * n_parts), in_order([N_ANSWERS] * n_parts)
    units = [shuffled([HIDDEN] * n_parts, generator) for _ in LAYERS]
    each: list[dict[str, Tensor]] = [dict(network.named_parameters()) for network in networks]
    for name, parameter in whole.named_parameters():
        values = [parameters[name] for parameters in each]
        mlp = units[int(name.split(".")[1])] if name.startswith("blocks.") else features
        target = mlp if ".rise." in name else outputs if name.startswith("head.") else features
        source = mlp if ".fall." in name else features
        if name == "place":
            parameter.copy_(torch.cat(values, dim=2))
        elif parameter.ndim == 2:
            parameter.copy_(joined(values, target, source, cross_talk, generator))
        else:  # of one unit each, or the stem, which reads the shared image
            parameter.copy_(gathered(values, target))
    return whole.eval(), tuple(units)
