"""Networks trained to hold a causal graph: their circuit lives among dense, learned weights.

The graph: is the figure on the left round, is the figure on the right red, and is it both (or one of the two);
apart from that, do the bars behind them stand.

1. In each layer a *group* of units is to hold each variable (`GROUPS`), the bars having theirs.
2. Interchange-intervention training: a group's values are exchanged for those on another image, and the
   network has to answer as the graph does when that variable is exchanged.
3. Strictly: what the graph says does not depend on it must not move. That goes for every group, and for
   every connection between groups that is no arrow of the graph.
4. So that training finds its way, at first a linear probe on each group of the third layer has to read off
   its variable, and strictness comes in by degrees (`COURSE`).
5. Units and connections within the circuit that do next to nothing are dropped, and the rest is trained on.
   Outside it dead units are dropped in the end.

What is not in the circuit is neither zero nor silent: it answers the question about the bars, and leaks a
little. `Planted.tolerance` says how much.

References
----------
Geiger et al. 2022, arXiv:2112.00826; Gupta et al. 2024 (InterpBench, strict interchange), arXiv:2407.14494.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from viscircuits.errors import ViscircuitsError
from viscircuits.layers import along_units
from viscircuits.planted import Planted
from viscircuits.planted.composed import Pictures, two_figures
from viscircuits.planted.learning import (
    Kept,
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
    stages,
    weighted,
)
from viscircuits.scores.formulas import choose

LEFT, RIGHT, BOTH, BARS = 0, 1, 2, 3
WIDTHS = ({LEFT: 5, RIGHT: 5, BARS: 5}, {LEFT: 5, RIGHT: 5, BARS: 5}, {LEFT: 5, RIGHT: 5, BARS: 5}, {BOTH: 8, BARS: 5})
ARROWS = {(LEFT, LEFT), (RIGHT, RIGHT), (BARS, BARS), (LEFT, BOTH), (RIGHT, BOTH)}
QUESTIONS = {LEFT: "left round", RIGHT: "right red", BARS: "upright"}
HOLDS = {**QUESTIONS, BOTH: "the answer"}
OUTPUTS = {BOTH: slice(0, 2), BARS: slice(2, 4)}
RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"and": torch.logical_and, "xor": torch.logical_xor}
N_VARIANTS = 2
# weights of what must not move and of the probes, against answering right; epochs; largest learning rate
COURSE = ((0.0, 1.0, 8, 1e-2), (0.03, 0.3, 8, 1e-2), (3.0, 0.0, 10, 5e-3))
IDLE = (0.03, 0.01)  # shares of the behaviour under which a unit, and an edge, is dropped
ALIVE = 0.01  # share of the pictures on which a unit is active, or it is dropped as well
TOLERANCE, LEAST = 0.15, 5e-4  # shares of the behaviour: of all outside the circuit, and of each part of it


@dataclass(frozen=True)
class Holder:
    """A network, and for each layer the variable that each of its units holds."""

    network: nn.Sequential
    groups: tuple[Int[Tensor, " _"], ...]


def network_of(widths: Sequence[int]) -> nn.Sequential:
    """Three convolutions and a linear layer, each with a ReLU, and four outputs."""
    first, second, third, fourth = widths
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, first, 5, stride=2, padding=2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(first, second, 3, stride=2, padding=1),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(second, third, 3, stride=2, padding=1),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            joint=nn.Linear(16 * third, fourth),
            relu4=nn.ReLU(),
            head=nn.Linear(fourth, 4),
        )
    )


def answers(rule: str, variables: Mapping[int, Tensor]) -> dict[int, Int[Tensor, " image"]]:
    """What the graph answers to its two questions, given the three variables it reads from an image.

    Parameters
    ----------
    rule
        ``and`` or ``xor``: how the figures' variables are joined.
    variables
        The values of ``LEFT``, ``RIGHT`` and ``BARS``; one of ``BOTH`` comes before the two it is made of.
    """
    joined = choose(RULES, rule, "rule")(variables[LEFT] > 0, variables[RIGHT] > 0).long()
    return {BOTH: variables.get(BOTH, joined), BARS: variables[BARS]}


def train_holder(rule: str, variant: int = 0, *, n_images: int = 3000, rounds: int = 40) -> Holder:
    """Train a network to hold the graph, then drop what is idle in its circuit and train on, until nothing is.

    Parameters
    ----------
    rule
        ``and`` or ``xor``.
    variant
        Of the weights and pictures.
    n_images
        Pictures to learn from.
    rounds
        How often what is idle is dropped and the rest trained on, at the most.

    Raises
    ------
    ViscircuitsError
        If something is still idle after all rounds.
    """
    seed = 100 * variant + 50 + list(RULES).index(rule)
    generator = torch.Generator().manual_seed(seed)
    groups = tuple(torch.cat([torch.full((n,), each) for each, n in widths.items()]) for widths in WIDTHS)
    network = network_of([len(group) for group in groups])
    initialise(network, generator)
    pictures, kept, aligned = two_figures(n_images, [seed, 1]), everything(network), circuit_of(groups)
    interchange = Interchange(network, groups, rule, pictures, generator)
    yes = interchange.variables[BOTH] == 1
    concept, reference = pictures.images[yes][:128], pictures.images[~yes][:256]

    def learn(strict: float, probing: float, epochs: int, rate: float) -> None:
        loss = partial(interchange.loss, strict=strict, probing=probing)
        fit(interchange.trainable, n_images, loss, epochs=epochs, rate=rate, generator=generator,
            after_step=lambda: silence(network, kept))  # fmt: skip

    for lesson in COURSE:
        learn(*lesson)
    for _ in range(rounds):
        found = shares(network, concept, torch.ones(len(concept), dtype=torch.long), reference)
        if not drop_idle(kept, found, IDLE, among=aligned, at_most=0.1):
            alive = [share > ALIVE for share in interchange.active()]
            left = [(units & awake).nonzero().flatten() for units, awake in zip(kept.units, alive, strict=True)]
            small = network_of([len(units) for units in left])
            copy_units(network, small, left)
            return Holder(small.eval(), tuple(group[units] for group, units in zip(groups, left, strict=True)))
        silence(network, kept)
        learn(3.0, 0.0, 2, 2e-3)
    raise ViscircuitsError(f"{rule!r} {variant} still has idle units after {rounds} rounds; allow more")


def circuit_of(groups: Sequence[Int[Tensor, " _"]]) -> Kept:
    """The units that hold a variable of the figures, and the connections between them that are arrows."""
    units = [group != BARS for group in groups]
    edges = []
    for source, target in pairwise(groups):
        arrows = torch.zeros(len(target), len(source), dtype=torch.bool)
        for tail, tip in ARROWS - {(BARS, BARS)}:
            arrows |= (target == tip)[:, None] & (source == tail)
        edges.append(arrows)
    return Kept(units, edges)


class Interchange:
    """The loss of strict interchange-intervention training.

    Parameters
    ----------
    network, groups
        The network and the variable of each unit.
    rule
        How the figures' variables are joined.
    pictures
        What it is trained on.
    generator
        Of the exchanges.
    """

    def __init__(
        self,
        network: nn.Sequential,
        groups: Sequence[Int[Tensor, " _"]],
        rule: str,
        pictures: Pictures,
        generator: torch.Generator,
    ) -> None:
        self.groups, self.rule, self.images, self.generator = groups, rule, pictures.images, generator
        self.parts = stages(network)
        self.variables = {each: pictures.answers[question] for each, question in QUESTIONS.items()}
        self.variables[BOTH] = answers(rule, self.variables)[BOTH]
        self.probes = nn.ModuleDict({str(each): nn.Linear(16 * n, 2) for each, n in WIDTHS[2].items()})
        initialise(self.probes, generator)
        self.trainable = nn.ModuleList([network, self.probes])

    def loss(self, batch: Int[Tensor, " image"], *, strict: float, probing: float) -> Float[Tensor, ""]:
        """Answering wrongly, also after exchanges at one layer, and moving what must not move.

        Parameters
        ----------
        batch
            Places of the images.
        strict, probing
            Weights of what must not move, and of what a group fails to show a linear probe.
        """
        images = self.images[batch]
        order = torch.randperm(len(batch), generator=self.generator)
        layer = int(torch.randint(len(self.groups), (), generator=self.generator))
        below = nn.Sequential(*self.parts[: layer + 1])(images)
        plain = self._rest(below, layer)
        value = self._wrong(plain, batch, {})
        for variable in self.groups[layer].unique().tolist():
            exchanged = self._rest(self._exchange(below, order, layer, variable), layer)
            value = value + self._wrong(exchanged, batch, {variable: self.variables[variable][batch[order]]})
        if strict:
            value = value + strict * self._leaks(below, plain, order, layer)
        return value + probing * self._hidden(batch) if probing else value

    @torch.no_grad()
    def active(self) -> list[Float[Tensor, " _"]]:
        """For each layer, the share of the pictures on which each unit is not zero everywhere."""
        values, found = self.images, []
        for part in self.parts[:-1]:
            values = part(values)
            found.append((values.flatten(2).amax(2) if values.ndim > 2 else values).gt(0).float().mean(0))
        return found

    def _hidden(self, batch: Tensor) -> Float[Tensor, ""]:
        """Cross-entropy of linear probes that read each variable off its group in the third layer."""
        values = nn.Sequential(*self.parts[:3])(self.images[batch])
        value = torch.zeros(())
        for variable in QUESTIONS:
            said = self.probes[str(variable)](values[:, self.groups[2] == variable].flatten(1))
            value = value + nn.functional.cross_entropy(said, self.variables[variable][batch])
        return value

    def _leaks(self, below: Tensor, plain: Tensor, order: Tensor, layer: int) -> Float[Tensor, ""]:
        """How much outputs move with values, and with connections to the next layer, that they do not depend on."""
        value = torch.zeros(())
        last = layer == len(self.groups) - 1
        above = plain if last else self.parts[layer + 1](below)
        for tail in self.groups[layer].unique().tolist():
            disturbed = self._disturb(below, order, layer, tail)
            head = OUTPUTS[BOTH] if tail == BARS else OUTPUTS[BARS]
            value = value + _moved(self._rest(disturbed, layer)[:, head], plain[:, head])
            for tip in [] if last else self.groups[layer + 1].unique().tolist():
                if (tail, tip) not in ARROWS:
                    leaked = self.parts[layer + 1](self._disturb(below, order, layer, tail))
                    at = along_units(self.groups[layer + 1] == tip, above, 1) > 0
                    value = value + _moved(self._rest(torch.where(at, leaked, above), layer + 1), plain)
        return value

    def _exchange(self, values: Tensor, order: Tensor, layer: int, variable: int) -> Tensor:
        """The values of one group taken from other images, those of the rest from the same."""
        return torch.where(along_units(self.groups[layer] == variable, values, 1) > 0, values[order], values)

    def _disturb(self, values: Tensor, order: Tensor, layer: int, variable: int) -> Tensor:
        """Some units of one group exchanged, at random for their values on other images or for their mean."""
        some = torch.rand(len(self.groups[layer]), generator=self.generator) < 0.5
        by_mean = torch.rand((), generator=self.generator) < 0.5
        means = along_units(values.transpose(0, 1).flatten(1).mean(1), values, 1).expand_as(values)
        chosen = along_units(some & (self.groups[layer] == variable), values, 1) > 0
        return torch.where(chosen, means if by_mean else values[order], values)

    def _rest(self, values: Tensor, layer: int) -> Float[Tensor, "image output"]:
        return nn.Sequential(*self.parts[layer + 1 :])(values)

    def _wrong(self, outputs: Tensor, batch: Tensor, exchanged: Mapping[int, Tensor]) -> Float[Tensor, ""]:
        """Cross-entropy of both questions with the graph's answers when these variables are exchanged."""
        own = {variable: values[batch] for variable, values in self.variables.items() if variable != BOTH}
        asked = answers(self.rule, {**own, **exchanged})
        return sum(
            (nn.functional.cross_entropy(outputs[:, OUTPUTS[each]], asked[each]) for each in OUTPUTS), torch.zeros(())
        )


def _moved(outputs: Tensor, plain: Tensor) -> Float[Tensor, ""]:
    return (outputs - plain).square().mean()


def load_holder(rule: str, variant: int) -> Holder:
    """The network that `tools/plant.py` trained."""
    choose(RULES, rule, "rule")
    weights = load_weights(f"{rule}-{variant}")
    groups = tuple(weights.pop(f"groups.{i}") for i in range(len(WIDTHS)))
    network = network_of([len(group) for group in groups])
    network.load_state_dict(weights)
    return Holder(network.eval(), groups)


def trained(seed: int = 0, *, rule: str = "and", n_images: int = 32, fresh: bool = False) -> Planted:
    """A network trained to answer whether the left figure is round and the right one red (or just one of the two).

    Parameters
    ----------
    seed
        Of the pictures and the order of units; also which trained weights.
    rule
        ``and`` or ``xor``: how the two are joined.
    n_images
        Images for which the answer is yes; there are twice as many for which it is no.
    fresh
        Train the network anew instead of loading it: a few minutes.
    """
    holder = (train_holder if fresh else load_holder)(rule, seed % N_VARIANTS)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(group), generator=generator) for group in holder.groups]
    groups = [group[order] for group, order in zip(holder.groups, orders, strict=True)]
    network = network_of([len(group) for group in groups])
    copy_units(holder.network, network, orders)
    layers, aligned = relus(network), circuit_of(groups)
    edges = [
        arrows & (by_source(layer.weight.detach(), arrows.shape[1]).abs().amax(2) > 0)
        for layer, arrows in zip(weighted(network)[1:], aligned.edges, strict=False)
    ]
    return Planted(
        name=f"trained-{rule}",
        family="trained",
        model=network.eval(),
        layers=layers,
        **_images(rule, n_images, seed),
        units=dict(zip(layers, aligned.units, strict=True)),
        edges=dict(zip(pairwise(layers), edges, strict=True)),
        tolerance=TOLERANCE,
        least=LEAST,
        names={
            layer: tuple(HOLDS[each] for each in group.tolist()) for layer, group in zip(layers, groups, strict=True)
        },
        note=f"trained by interchange to hold two variables and their {rule}; other units answer about the bars",
        options={"seed": seed, "rule": rule, "fresh": fresh},
    )


def _images(rule: str, n_images: int, seed: int) -> dict[str, Any]:
    """Images for which the graph answers yes, and no, for discovery and held out, as `Planted` names them."""
    found: dict[str, Any] = {}
    for which, prefix in enumerate(("", "test_")):
        pictures = two_figures(8 * n_images, [seed, 2, which])
        said = answers(rule, {each: pictures.answers[question] for each, question in QUESTIONS.items()})[BOTH]
        for kind, chosen in (("concept", (said == 1).nonzero()[:n_images]), ("reference", (said == 0).nonzero())):
            places = chosen.flatten()[: n_images if kind == "concept" else 2 * n_images]
            found[f"{prefix}{kind}"], found[f"{prefix}{kind}_labels"] = pictures.images[places], said[places]
    return found
