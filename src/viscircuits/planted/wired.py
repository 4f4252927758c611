"""Small convolutional networks whose weights are written by hand, so that every circuit is known.

1. A layer is written channel by channel: what it reads of which channels, a kernel each, and a bias.
   Kernels are geometry: a line filter, the lines along an arc, the arcs around a ring.
2. Decoys are added to every layer: units with random kernels that read true units and other decoys alike, as
   active on the concept's images as the true ones. They lead to an output of their own, never to the concept's.
3. Channels are shuffled by the seed. The truth is stated by channel name; edges of the circuit are those between
   its units that are wired. `viscircuits.planted.checks.check` tests both by removing them.

A layer's units are its maps after the ReLU. Two reasons why nothing that is wired but false has an effect:
its weights towards the concept's output are exactly zero, or it is constant and the ablation is ``mean``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from viscircuits.circuit import Unit
from viscircuits.planted import Planted
from viscircuits.planted.scenes import Exchange, Figure, Figures, pictures

Kernel = Float[Tensor, "row column"]
Number = int | float
PIXELS = ("red plane", "green plane", "blue plane")
ANGLES = (0, 45, 90, 135)  # of lines: degrees, counter-clockwise from lying
QUARTERS = {"north-east": 45, "north-west": 135, "south-west": 225, "south-east": 315}
RADIUS = 4.75  # pixels, of a ring's middle line
HALF_SIDE = 4.5  # pixels, of a square's middle line
N_DECOYS = 4
N_IMAGES = 24
HEIGHT = 10.0  # of the concept's output on the concept's images, on average
OTHERS = 2.0  # of every other output


# ---------------------------------------------------------------- kernels


def point(x: Number = 0, y: Number = 0, weight: Number = 1, *, size: int, width: Number = 0.7) -> Kernel:
    """A bump of total `weight`, `x` pixels to the right of the middle and `y` above it."""
    steps = torch.arange(size, dtype=torch.float64) - size // 2
    bump = torch.exp(-((steps - x).square() + (steps[:, None] + y).square()) / (2 * width**2))
    return weight * bump / bump.sum()


def line(angle: Number, size: int = 5) -> Kernel:
    """What a thin bright line of this orientation excites and an even ground does not: about 1 on such a line."""
    steps = torch.arange(size, dtype=torch.float64) - size // 2
    turn = math.radians(angle)
    across, up = steps, -steps[:, None]
    along, off = across * math.cos(turn) + up * math.sin(turn), up * math.cos(turn) - across * math.sin(turn)
    kernel = torch.exp(-along.square() / 4.5) * (1 - off.square()) * torch.exp(-off.square() / 2)
    kernel = kernel - kernel.mean()
    return kernel / kernel.clamp(min=0).sum()


def arc(middle: Number, extent: Number, size: int, *, offset: Number = 0) -> dict[str, Kernel]:
    """Line channel → how much its lines speak for an arc of a ring, seen from `offset` pixels outwards of its centre.

    At each place along the arc a line counts by the cosine of twice its angle with the arc: lines along it speak
    for it, lines across it against it.
    """
    found = {f"line {angle}": torch.zeros(size, size, dtype=torch.float64) for angle in ANGLES}
    x0, y0 = offset * math.cos(math.radians(middle)), offset * math.sin(math.radians(middle))
    for degrees in np.arange(middle - extent / 2, middle + extent / 2 + 1e-9, 7.5):
        turn = math.radians(degrees)
        at = (RADIUS * math.cos(turn) - x0, RADIUS * math.sin(turn) - y0)
        for angle in ANGLES:
            agreement = math.cos(2 * (turn + math.pi / 2 - math.radians(angle)))
            found[f"line {angle}"] += point(*at, agreement, size=size, width=0.5)
    total = sum(float(kernel.clamp(min=0).sum()) for kernel in found.values())
    return {name: kernel / total for name, kernel in found.items()}


def sides(corners: Sequence[tuple[int, int]], size: int, *, offset: Number = 0) -> dict[str, Kernel]:
    """Line channel → where its lines lie along the sides of a square that meet in these corners (±1, ±1)."""
    lying, standing = torch.zeros(2, size, size, dtype=torch.float64)
    for right, above in corners:
        for t in range(1, 5):
            x0, y0 = HALF_SIDE * right - offset * right, HALF_SIDE * above - offset * above
            lying += point(x0 - t * right, y0, size=size)
            standing += point(x0, y0 - t * above, size=size)
    total = float(lying.sum() + standing.sum())
    return {"line 0": lying / total, "line 90": standing / total}


# ---------------------------------------------------------------- layers


@dataclass(frozen=True)
class Channel:
    """One unit as it is written: what it reads, a kernel for each channel, and its bias."""

    reads: Mapping[str, Kernel] = field(default_factory=dict)
    bias: Number = 0.0


Channels = Mapping[str, Channel]


class Filters(nn.Module):
    """A convolution and a ReLU."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv, self.relu = conv, nn.ReLU()

    def forward(self, values: Tensor) -> Tensor:
        """Maps of the layer's units."""
        return self.relu(self.conv(values))

    def amplify(self, gain: Float[Tensor, " unit"]) -> None:
        """Multiply each unit's output."""
        _amplify(self.conv, gain)


class Branches(nn.Module):
    """Layers of several kernel sizes side by side, their units concatenated."""

    def __init__(self, branches: Sequence[Filters]):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, values: Tensor) -> Tensor:
        """Maps of all branches' units."""
        return torch.cat([branch(values) for branch in self.branches], dim=1)

    def amplify(self, gain: Float[Tensor, " unit"]) -> None:
        """Multiply each unit's output."""
        branches = [branch for branch in self.branches if isinstance(branch, Filters)]
        for branch, part in zip(branches, gain.split([each.conv.out_channels for each in branches]), strict=True):
            branch.amplify(part)


class Residual(nn.Module):
    """``ReLU(skip(x) + expand(ReLU(inner(x))))``."""

    def __init__(self, inner: Filters, expand: nn.Conv2d, skip: nn.Conv2d):
        super().__init__()
        self.inner, self.expand, self.skip, self.relu = inner, expand, skip, nn.ReLU()

    def forward(self, values: Tensor) -> Tensor:
        """Maps of the block's units."""
        return self.relu(self.skip(values) + self.expand(self.inner(values)))

    def amplify(self, gain: Float[Tensor, " unit"]) -> None:
        """Multiply each unit's output."""
        _amplify(self.expand, gain)
        _amplify(self.skip, gain)


class Peaks(nn.Module):
    """A linear layer and a ReLU on the largest value of each map."""

    def __init__(self, linear: nn.Conv2d):
        super().__init__()
        self.pool, self.linear, self.relu = nn.AdaptiveMaxPool2d(1), linear, nn.ReLU()

    def forward(self, values: Tensor) -> Tensor:
        """One number for each unit, as maps of one pixel."""
        return self.relu(self.linear(self.pool(values)))

    def amplify(self, gain: Float[Tensor, " unit"]) -> None:
        """Multiply each unit's output."""
        _amplify(self.linear, gain)


def _amplify(conv: nn.Conv2d, gain: Tensor) -> None:
    with torch.no_grad():
        conv.weight.mul_(gain.to(conv.weight)[:, None, None, None])
        if conv.bias is not None:
            conv.bias.mul_(gain.to(conv.bias))


@dataclass(frozen=True)
class Written:
    """A layer, the names of its units in order, and for each unit the channels before it that it is wired to."""

    module: Filters | Branches | Residual | Peaks
    units: tuple[str, ...]
    wired: Mapping[str, frozenset[str]]


class _Workshop:
    """Writes layers for one seed: decoys and the order of units are drawn here."""

    def __init__(self, seed: int, n_decoys: int):
        self.rng = np.random.default_rng([seed, 2])
        self.n_decoys = n_decoys

    def filters(self, channels: Channels, sources: Sequence[str], size: int) -> Written:
        """One convolution; decoys read every source."""
        units = self._shuffled({**channels, **self.decoys(sources, size)})
        return Written(Filters(_conv(units, sources, size)), tuple(units), _wiring(units))

    def peaks(self, channels: Channels, sources: Sequence[str]) -> Written:
        """A linear layer on the maps' largest values; decoys read every source."""
        units = self._shuffled({**channels, **self.decoys(sources, 1)})
        return Written(Peaks(_conv(units, sources, 1)), tuple(units), _wiring(units))

    def branches(self, channels: Mapping[int, Channels], sources: Sequence[str]) -> Written:
        """Kernel size → the channels of that branch; the decoys are dealt out to the branches."""
        parts: list[Written] = []
        names = iter(range(self.n_decoys))
        for i, (size, of_branch) in enumerate(channels.items()):
            n_mine = len(range(i, self.n_decoys, len(channels)))
            mine = {f"decoy {next(names)}": decoy for decoy in self._random(n_mine, sources, size)}
            units = self._shuffled({**of_branch, **mine})
            parts.append(Written(Filters(_conv(units, sources, size)), tuple(units), _wiring(units)))
        module = Branches([part.module for part in parts if isinstance(part.module, Filters)])
        wired = {name: sources for part in parts for name, sources in part.wired.items()}
        return Written(module, tuple(name for part in parts for name in part.units), wired)

    def residual(
        self, inner: Channels, expand: Channels, skip: Channels | None, sources: Sequence[str], size: int
    ) -> Written:
        """A block: `expand` reads `inner`, `skip` the sources; without a skip it is the identity.

        Decoys inside the block read every source and write to the decoys outside, which also skip.
        """
        inner = self._shuffled({**inner, **self.decoys(sources, size)})
        decoys = [f"decoy {i}" for i in range(self.n_decoys)]
        outer = {**expand, **{name: Channel({name: torch.ones(1, 1)}) for name in decoys}}
        if skip is None:
            carried: Channels = {name: Channel({name: torch.ones(1, 1)}) for name in sources}
        else:
            carried = {**skip, **{name: Channel({name: torch.ones(1, 1)}) for name in decoys}}
        units = self._shuffled(dict.fromkeys([*outer, *carried])) if skip is not None else dict.fromkeys(sources)
        outer, carried = ({name: part.get(name, Channel()) for name in units} for part in (outer, carried))
        wired = {
            name: frozenset(carried[name].reads).union(*(frozenset(inner[each].reads) for each in outer[name].reads))
            for name in units
        }
        block = Residual(
            Filters(_conv(inner, sources, size)), _conv(outer, list(inner), 1), _conv(carried, sources, 1, bias=False)
        )
        return Written(block, tuple(units), wired)

    def decoys(self, sources: Sequence[str], size: int) -> dict[str, Channel]:
        """Units that are active and lead nowhere near the concept."""
        return {f"decoy {i}": decoy for i, decoy in enumerate(self._random(self.n_decoys, sources, size))}

    def _random(self, n: int, sources: Sequence[str], size: int) -> list[Channel]:
        """Random kernels over every source, excitatory on the whole so that they are active where the sources are."""
        blunt = self.rng.uniform(0, 0.3, (n, 1, 1, 1))  # 0: as much against as for
        drawn = torch.from_numpy(self.rng.standard_normal((n, len(sources), size, size)) + blunt)
        drawn = drawn * drawn.sum((1, 2, 3), keepdim=True).sign()
        return [Channel(dict(zip(sources, kernels, strict=True))) for kernels in drawn]

    def _shuffled(self, channels: Mapping[str, Any]) -> dict[str, Any]:
        names = list(channels)
        return {names[i]: channels[names[i]] for i in self.rng.permutation(len(names))}


def _conv(channels: Channels, sources: Sequence[str], size: int, bias: bool = True) -> nn.Conv2d:
    conv = nn.Conv2d(len(sources), len(channels), size, padding=size // 2, bias=bias)
    with torch.no_grad():
        conv.weight.zero_()
        for i, channel in enumerate(channels.values()):
            for name, kernel in channel.reads.items():
                edge = (size - kernel.shape[0]) // 2  # a small kernel sits in the middle of a large one
                conv.weight[i, sources.index(name), edge : size - edge, edge : size - edge] = kernel.float()
            if conv.bias is not None:
                conv.bias[i] = channel.bias
    return conv


def _wiring(channels: Channels) -> dict[str, frozenset[str]]:
    return {name: frozenset(channel.reads) for name, channel in channels.items()}


# ---------------------------------------------------------------- from layers to a planted network


@dataclass(frozen=True)
class Plan:
    """What a hand-wired network consists of, before its decoys are scaled and its truth is put into tensors.

    Parameters
    ----------
    layers
        Address → layer, in execution order.
    truth
        Address → names of the units that belong to the circuit.
    outputs
        For each output the last layer's units that it reads, with weights; the concept's comes first. One more
        reads the decoys.
    figures, exchange
        What is in a scene, and what stands in the reference instead.
    redundant
        Groups of units, (address, name) each, of which one alone suffices.
    threshold
        What is taken from the concept's output, so that a little evidence is an answer of another kind.
    """

    layers: Mapping[str, Written]
    truth: Mapping[str, Sequence[str]]
    outputs: Sequence[Mapping[str, float]]
    figures: Callable[[np.random.Generator], Figures]
    exchange: Exchange
    redundant: Sequence[Sequence[tuple[str, str]]] = ()
    threshold: float = 0.0


def _planted(name: str, note: str, plan: Plan, workshop: _Workshop, seed: int, n_images: int) -> Planted:
    """The finished network with its pictures and truth."""
    concept, reference = pictures(plan.figures, plan.exchange, n_images, (seed, 0))
    test_concept, test_reference = pictures(plan.figures, plan.exchange, n_images, (seed, 1))
    model = _assembled(plan, concept, workshop.rng)
    layers = tuple(plan.layers)
    units = {
        layer: torch.tensor([name in plan.truth[layer] for name in written.units])
        for layer, written in plan.layers.items()
    }
    return Planted(
        name=name,
        family="hand-wired",
        model=model,
        layers=layers,
        concept=concept,
        concept_labels=torch.zeros(n_images, dtype=torch.long),
        reference=reference,
        reference_labels=_other_answers(model, reference),
        test_concept=test_concept,
        test_concept_labels=torch.zeros(n_images, dtype=torch.long),
        test_reference=test_reference,
        test_reference_labels=_other_answers(model, test_reference),
        units=units,
        edges={(source, target): _true_edges(plan, source, target) for source, target in pairwise(layers)},
        redundant=tuple(
            tuple(Unit(layer, plan.layers[layer].units.index(unit)) for layer, unit in group)
            for group in plan.redundant
        ),
        note=note,
        options={"seed": seed, "n_decoys": workshop.n_decoys, "n_images": n_images},
        names={layer: written.units for layer, written in plan.layers.items()},
    )


def _true_edges(plan: Plan, source: str, target: str) -> Tensor:
    """Which units of the circuit are wired to which, rows targets."""
    before, after = plan.layers[source], plan.layers[target]
    return torch.tensor(
        [
            [n in plan.truth[target] and m in plan.truth[source] and m in after.wired[n] for m in before.units]
            for n in after.units
        ]
    )


def _assembled(plan: Plan, concept: Tensor, rng: np.random.Generator) -> nn.Sequential:
    """The layers one after another and the outputs, with decoys and outputs scaled on the concept's images."""
    model = nn.Sequential()
    values = concept
    with torch.no_grad():
        for address, written in plan.layers.items():
            written.module.amplify(_waking(written, written.module(values)))
            written.module.amplify(_gain(written, plan.truth[address], written.module(values), rng))
            model.add_module(address, written.module)
            values = written.module(values)
        last = list(plan.layers.values())[-1]
        head = nn.Linear(len(last.units), len(plan.outputs) + 1)
        decoys = {name: float(rng.uniform(0.5, 1.5)) for name in last.units if name.startswith("decoy")}
        head.weight.zero_()
        head.bias.zero_()
        for row, reads in enumerate((*plan.outputs, decoys)):
            for name, weight in reads.items():
                head.weight[row, last.units.index(name)] = weight
        found = head(values.mean((2, 3))).mean(0)  # (output,)
        wanted = torch.tensor([HEIGHT, *[OTHERS] * len(plan.outputs)])
        head.weight.mul_(torch.where(found == 0, 1, wanted / found.abs())[:, None])
        head.bias[0] = -plan.threshold
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("outputs", head)
    return model.eval().requires_grad_(True)


def _waking(written: Written, values: Tensor) -> Float[Tensor, " unit"]:
    """-1 for each decoy that is silent everywhere, so that it answers to what held it down; 1 for the others."""
    silent = values.amax((0, 2, 3)) == 0
    decoys = torch.tensor([name.startswith("decoy") for name in written.units])
    return torch.where(silent & decoys, -1.0, 1.0)


def _gain(written: Written, true: Sequence[str], values: Tensor, rng: np.random.Generator) -> Float[Tensor, " unit"]:
    """What makes each decoy between half and twice as active as the circuit's units are on average."""
    activity = values.square().mean((0, 2, 3)).sqrt()  # (unit,)
    typical = activity[[written.units.index(name) for name in true]].mean()
    gain = torch.ones(len(written.units))
    for i, name in enumerate(written.units):
        if name.startswith("decoy") and activity[i] > 0:
            gain[i] = rng.uniform(0.5, 2) * typical / activity[i]
    return gain


def _other_answers(model: nn.Module, images: Tensor) -> Tensor:
    """The largest output other than the concept's."""
    with torch.no_grad():
        return model(images)[:, 1:].argmax(1) + 1


# ---------------------------------------------------------------- the networks


def _lines(gain: Number = 1 / 3, planes: Sequence[str] = PIXELS, bias: float = -0.15) -> dict[str, Channel]:
    """Bright lines in four orientations, in the sum of the colour planes times `gain`."""
    return {f"line {angle}": Channel(dict.fromkeys(planes, gain * line(angle)), bias) for angle in ANGLES}


def _colours(*names: str) -> dict[str, Channel]:
    """Pixels of one colour and no other."""
    found = {}
    for name in names:
        reads = {plane: point(size=3, weight=1.0 if plane == f"{name} plane" else -1.0, width=0.5) for plane in PIXELS}
        found[name] = Channel(reads, -0.1)
    return found


def _arcs(suffix: str = "") -> dict[str, Channel]:
    """Quarters of a ring, each seen at its middle."""
    return {
        f"arc {name}{suffix}": Channel(arc(middle, 90, 7, offset=RADIUS), -0.05) for name, middle in QUARTERS.items()
    }


def _corners() -> dict[str, Channel]:
    """Corners of a square, each seen one and a half pixels inside it."""
    where = {"north-east": (1, 1), "north-west": (-1, 1), "south-west": (-1, -1), "south-east": (1, -1)}
    return {
        f"corner {name}": Channel(sides([corner], 7, offset=HALF_SIDE - 1.5), -0.1) for name, corner in where.items()
    }


def _around(what: str, distance: Number, bias: Number, suffix: str = "") -> Channel:
    """Four quarters around a middle, each `distance` pixels away from it: less than three are not enough."""
    reads = {}
    for name, middle in QUARTERS.items():
        turn = math.radians(middle)
        at = (distance * math.cos(turn), distance * math.sin(turn))
        reads[f"{what} {name}{suffix}"] = point(*at, size=9, width=0.8)
    return Channel(reads, bias)


def _blur(weight: Number) -> Kernel:
    """How much of a channel there is within a few pixels."""
    return point(size=9, width=2.2, weight=weight)


def _times(gain: Number, reads: Mapping[str, Kernel]) -> dict[str, Kernel]:
    return {name: gain * kernel for name, kernel in reads.items()}


def _clutter(*others: Figure, n: int = 2) -> Callable[[np.random.Generator], list[Figure]]:
    return lambda rng: [others[i] for i in rng.choice(len(others), n, replace=False)]


RING, BROKEN = Figure("ring"), Figure("broken ring")
STRAIGHT = (Figure("square"), Figure("plus"), Figure("cross"))


def circle(seed: int = 0, *, n_decoys: int = N_DECOYS, n_images: int = N_IMAGES) -> Planted:
    """Lines → quarters of a ring → ring, beside lines → corners → square.

    Parameters
    ----------
    seed
        Of the pictures, the decoys and the order of units.
    n_decoys
        How many more units each layer has that lead to an output of their own.
    n_images
        How many images of each kind, for discovery and held out alike.
    """
    shop = _Workshop(seed, n_decoys)
    lines = shop.filters(_lines(), PIXELS, 5)
    parts = shop.filters({**_arcs(), **_corners()}, lines.units, 7)
    shapes = {"ring": _around("arc", RADIUS, -0.45), "square": _around("corner", 4.2, -0.2)}
    plan = Plan(
        layers={"lines": lines, "parts": parts, "shapes": shop.filters(shapes, parts.units, 9)},
        truth={"lines": tuple(_lines()), "parts": tuple(_arcs()), "shapes": ("ring",)},
        outputs=({"ring": 1.0}, {"square": 1.0}),
        figures=lambda rng: [RING, *_clutter(*STRAIGHT)(rng)],
        exchange={RING: BROKEN},
        threshold=3.0,
    )
    return _planted("circle", "A hierarchy: lines, quarters of a ring, ring.", plan, shop, seed, n_images)


def conjunction(seed: int = 0, *, n_decoys: int = N_DECOYS, n_images: int = N_IMAGES) -> Planted:
    """Colour and shape: a red ring among green rings and red squares.

    In the reference the colours have changed places, so every colour and every shape is there as often.
    Parameters as for `circle`.
    """
    shop = _Workshop(seed, n_decoys)
    features = shop.filters({**_lines(1.0), **_colours("red", "green")}, PIXELS, 5)
    shapes = {
        "ring": Channel(_times(4, arc(0, 352.5, 11)), -0.8),
        "square": Channel(_times(4, sides([(1, 1), (-1, 1), (-1, -1), (1, -1)], 11)), -0.9),
    }
    areas = {f"{colour} area": Channel({colour: _blur(5)}) for colour in ("red", "green")}
    parts = shop.filters({**shapes, **areas}, features.units, 11)
    both = {
        f"{colour} {shape}": Channel({shape: point(size=3, weight=4), f"{colour} area": point(size=3)}, -1.25)
        for colour in ("red", "green")
        for shape in ("ring", "square")
    }
    objects = shop.filters(both, parts.units, 3)
    red_ring, green_ring = Figure("ring", "red"), Figure("ring", "green")
    red_square, green_square = Figure("square", "red"), Figure("square", "green")
    plan = Plan(
        layers={"features": features, "parts": parts, "objects": objects},
        truth={"features": (*_lines(), "red"), "parts": ("ring", "red area"), "objects": ("red ring",)},
        outputs=tuple({name: 1.0} for name in both),
        figures=lambda rng: [
            red_ring,
            green_square,
            *_clutter(Figure("plus", "blue"), Figure("cross", "blue"), n=1)(rng),
        ],
        exchange={red_ring: green_ring, green_square: red_square},
    )
    return _planted("conjunction", "Colour and shape: both are needed, at one place.", plan, shop, seed, n_images)


def branches(seed: int = 0, *, n_decoys: int = N_DECOYS, n_images: int = N_IMAGES) -> Planted:
    """A red plus sign, seen by three kernel sizes side by side whose units are concatenated.

    1×1 passes colours on, 3×3 sees lines meet, 7×7 sees long lines. In the reference the plus is green and the
    cross beside it red. Parameters as for `circle`.
    """
    shop = _Workshop(seed, n_decoys)
    lines = shop.filters({**_lines(1.0), **_colours("red", "green")}, PIXELS, 5)
    colours = {f"{colour} here": Channel({colour: torch.ones(1, 1)}) for colour in ("red", "green")}
    meetings = {
        name: Channel({f"line {a}": point(size=3, weight=2), f"line {b}": point(size=3, weight=2)}, -0.8)
        for name, a, b in (("upright meeting", 0, 90), ("slanting meeting", 45, 135))
    }
    long = {f"long line {angle}": Channel({f"line {angle}": _along(angle)}, -0.2) for angle in ANGLES}
    mixed = shop.branches({1: colours, 3: meetings, 7: long}, lines.units)
    signs = {
        f"{colour} {sign}": Channel(
            {
                f"{colour} here": point(size=5, width=1.5),
                f"{way} meeting": point(size=5, width=1.5, weight=2),
                **{f"long line {angle}": point(size=5, width=1.5, weight=2) for angle in angles},
            },
            -0.9 if sign == "plus" else -0.75,
        )
        for colour in ("red", "green")
        for sign, way, angles in (("plus", "upright", (0, 90)), ("cross", "slanting", (45, 135)))
    }
    red_plus, green_plus = Figure("plus", "red"), Figure("plus", "green")
    red_cross, green_cross = Figure("cross", "red"), Figure("cross", "green")
    plan = Plan(
        layers={"lines": lines, "mixed": mixed, "signs": shop.filters(signs, mixed.units, 5)},
        truth={
            "lines": ("line 0", "line 90", "red"),
            "mixed": ("red here", "upright meeting", "long line 0", "long line 90"),
            "signs": ("red plus",),
        },
        outputs=tuple({name: 1.0} for name in signs),
        figures=lambda rng: [red_plus, green_cross, Figure("ring", "blue")],
        exchange={red_plus: green_plus, green_cross: red_cross},
    )
    return _planted("branches", "Branches of three kernel sizes, concatenated.", plan, shop, seed, n_images)


def _along(angle: Number) -> Kernel:
    """Places along a line of this orientation, seven pixels long."""
    turn = math.radians(angle)
    places = [point(t * math.cos(turn), t * math.sin(turn), 1 / 7, size=7, width=0.6) for t in range(-3, 4)]
    return torch.stack(places).sum(0)


def residual(seed: int = 0, *, n_decoys: int = N_DECOYS, n_images: int = N_IMAGES) -> Planted:
    """A red ring in two residual blocks: colour is carried by the skips, shape is added by the branches.

    The first block's skip is a 1×1 convolution, the second's the identity: there the unit that holds how much
    red there is becomes the one for red rings. Layers are the sums after their ReLU; what is inside the
    branches is part of the edges. Parameters as for `circle`.
    """
    shop = _Workshop(seed, n_decoys)
    stem = shop.filters({**_lines(1.0), **_colours("red", "green")}, PIXELS, 5)
    colours = ("red", "green")
    first = shop.residual(
        inner={**_arcs(), **{f"around {colour}": Channel({colour: _blur(5)}) for colour in colours}},
        expand={
            **{name: Channel({name: torch.ones(1, 1)}) for name in _arcs()},
            **{f"{colour} area": Channel({f"around {colour}": torch.ones(1, 1)}) for colour in colours},
        },
        skip={
            **{f"{colour} area": Channel({colour: torch.full((1, 1), 0.25)}) for colour in colours},
            **{name: Channel({name: torch.ones(1, 1)}) for name in _lines()},
        },
        sources=stem.units,
        size=9,
    )
    ring = _around("arc", RADIUS, -0.45)
    second = shop.residual(
        inner={"ring": Channel(_times(4, ring.reads), 4 * ring.bias)},
        expand={f"{colour} area": Channel({"ring": torch.ones(1, 1)}, -1.2) for colour in colours},
        skip=None,
        sources=first.units,
        size=9,
    )
    red_ring, green_ring = Figure("ring", "red"), Figure("ring", "green")
    red_square, green_square = Figure("square", "red"), Figure("square", "green")
    plan = Plan(
        layers={"stem": stem, "block1": first, "block2": second},
        truth={"stem": (*_lines(), "red"), "block1": (*_arcs(), "red area"), "block2": ("red area",)},
        outputs=({"red area": 1.0}, {"green area": 1.0}, dict.fromkeys(_lines(), 1.0)),
        figures=lambda rng: [red_ring, green_square, Figure("cross", "blue")],
        exchange={red_ring: green_ring, green_square: red_square},
    )
    return _planted("residual", "Residual blocks: the skip carries half of the circuit.", plan, shop, seed, n_images)


def decoy(seed: int = 0, *, n_decoys: int = N_DECOYS, n_images: int = N_IMAGES, strength: Number = 4.0) -> Planted:
    """The ring of `circle`, beside three paths that are busier than it and have no effect on it.

    A blue patch goes with every ring and is missing from the reference. The units that see it are stronger than
    the ring's and lead (1) to another output and (2) to the ring's output through a unit that never opens.
    (3) Units that are constant are read by the arcs and by the ring: replaced by their mean they stay what they are.
    Under ``zero`` ablation the constant units would belong to the circuit.

    Parameters
    ----------
    seed, n_decoys, n_images
        As for `circle`.
    strength
        How much stronger the patch's units are than a ring's.
    """
    shop = _Workshop(seed, n_decoys)
    constant, held_up = Channel(bias=strength), 0.25
    lines = shop.filters(
        {**_lines(), "constant": constant, "blue": Channel(_times(strength, _colours("blue")["blue"].reads))}, PIXELS, 5
    )
    arcs = {
        name: Channel({**channel.reads, "constant": torch.full((1, 1), held_up)}, channel.bias - held_up * strength)
        for name, channel in _arcs().items()
    }
    parts = shop.filters({**arcs, "constant": constant, "blue area": Channel({"blue": _blur(2)})}, lines.units, 9)
    ring = _around("arc", RADIUS, -0.45)
    shapes = {
        "ring": Channel({**ring.reads, "constant": torch.full((1, 1), held_up)}, ring.bias - held_up * strength),
        "patch": Channel({"blue area": point(size=3)}),
        "closed": Channel({"blue area": point(size=3)}, -1000.0),
    }
    plan = Plan(
        layers={"lines": lines, "parts": parts, "shapes": shop.filters(shapes, parts.units, 9)},
        truth={"lines": tuple(_lines()), "parts": tuple(_arcs()), "shapes": ("ring",)},
        outputs=({"ring": 1.0, "closed": 1.0}, {"patch": 1.0}),
        figures=lambda rng: [RING, Figure("patch", "blue"), *_clutter(*STRAIGHT, n=1)(rng)],
        exchange={RING: BROKEN, Figure("patch", "blue"): None},
        threshold=3.0,
    )
    return _planted(
        "decoy", "Paths that are active with the concept and have no effect on it.", plan, shop, seed, n_images
    )


def copies(seed: int = 0, *, n_decoys: int = N_DECOYS, n_images: int = N_IMAGES) -> Planted:
    """The ring of `circle` twice over: each copy carries half of the output. Parameters as for `circle`."""
    shop = _Workshop(seed, n_decoys)
    lines = shop.filters(_lines(), PIXELS, 5)
    both = (" A", " B")
    arcs = {name: channel for copy in both for name, channel in _arcs(copy).items()}
    parts = shop.filters(arcs, lines.units, 7)
    rings = {f"ring{copy}": _around("arc", RADIUS, -0.45, copy) for copy in both}
    plan = Plan(
        layers={"lines": lines, "parts": parts, "shapes": shop.filters(rings, parts.units, 9)},
        truth={"lines": tuple(_lines()), "parts": tuple(arcs), "shapes": tuple(rings)},
        outputs=(dict.fromkeys(rings, 1.0),),
        figures=lambda rng: [RING, *_clutter(*STRAIGHT)(rng)],
        exchange={RING: BROKEN},
        threshold=3.0,
    )
    return _planted("copies", "Two copies of a circuit, each half of the output.", plan, shop, seed, n_images)


def spare(seed: int = 0, *, n_decoys: int = N_DECOYS, n_images: int = N_IMAGES) -> Planted:
    """A plus sign seen twice, in red and in blue light, where either sight is enough.

    The last layer's two units take the difference ``ReLU(A + B) − ReLU(A + B − 1)``, which is 1 as soon as one of the
    copies is 1. One at a time, no unit of a copy has an effect, and no gradient of the output either: the
    truth is in `Planted.redundant`, and exact one-at-a-time ablation is blind to it. Parameters as for `circle`.
    """
    shop = _Workshop(seed, n_decoys)
    lights = {"A": "red plane", "B": "blue plane"}
    lines = shop.filters(
        {f"{name} {copy}": channel for copy, plane in lights.items() for name, channel in _lines(1.0, [plane]).items()},
        PIXELS,
        5,
    )
    meetings = {
        f"{way} {copy}": Channel({f"line {a} {copy}": _along(a) * 8, f"line {b} {copy}": _along(b) * 8}, -4.5)
        for copy in lights
        for way, a, b in (("upright", 0, 90), ("slanting", 45, 135))
    }
    parts = shop.filters(meetings, lines.units, 7)
    seen = {f"upright {copy}": torch.ones(1, 1) for copy in lights}
    others = {f"slanting {copy}": torch.ones(1, 1) for copy in lights}
    signs = {"any": Channel(seen), "more than one": Channel(seen, -1.0), "cross": Channel(others)}
    plan = Plan(
        layers={"lines": lines, "parts": parts, "signs": shop.peaks(signs, parts.units)},
        truth={
            "lines": tuple(f"line {angle} {copy}" for angle in (0, 90) for copy in lights),
            "parts": tuple(seen),
            "signs": ("any", "more than one"),
        },
        outputs=({"any": 1.0, "more than one": -1.0}, {"cross": 1.0}),
        figures=lambda rng: [Figure("plus"), *_clutter(RING, Figure("square"), n=1)(rng)],
        exchange={Figure("plus"): Figure("cross")},
        redundant=[
            *[[("lines", f"line {angle} {copy}") for copy in lights] for angle in (0, 90)],
            [("parts", name) for name in seen],
        ],
    )
    return _planted("spare", "Two copies of a circuit, either of which suffices.", plan, shop, seed, n_images)


def suppressor(seed: int = 0, *, n_decoys: int = N_DECOYS, n_images: int = N_IMAGES) -> Planted:
    """The ring of `circle`, held back by blue in its middle and by green anywhere.

    Blue takes from the ring's unit by a negative weight, green from the output by a unit of its own. About half of
    the concept's images have a blue core and half a green patch; the reference has as many cores but no patch
    (what adds up over the image and is as frequent in the reference has no mean effect under ``mean``). Removing
    what sees them raises the output: a negative effect, and part of the circuit. Parameters as for `circle`.
    """
    shop = _Workshop(seed, n_decoys)
    lines = shop.filters({**_lines(), **_colours("blue", "green")}, PIXELS, 5)
    areas = {f"{colour} area": Channel({colour: _blur(2)}) for colour in ("blue", "green")}
    parts = shop.filters({**_arcs(), **_corners(), **areas}, lines.units, 9)
    ring = _around("arc", RADIUS, -0.45)
    shapes = {
        "ring": Channel({**ring.reads, "blue area": point(size=9, weight=-0.15)}, ring.bias),
        "square": _around("corner", 4.2, -0.2),
        "veto": Channel({"green area": point(size=9)}),
    }
    cored, patch = Figure("ring", core="blue"), Figure("patch", "green")
    plan = Plan(
        layers={"lines": lines, "parts": parts, "shapes": shop.filters(shapes, parts.units, 9)},
        truth={
            "lines": (*_lines(), "blue", "green"),
            "parts": (*_arcs(), *areas),
            "shapes": ("ring", "veto"),
        },
        outputs=({"ring": 1.0, "veto": -0.002}, {"square": 1.0}),
        figures=lambda rng: [
            cored if rng.random() < 0.5 else RING,
            *_clutter(*STRAIGHT, n=1)(rng),
            *([patch] if rng.random() < 0.5 else []),
        ],
        exchange={RING: BROKEN, cored: Figure("broken ring", core="blue"), patch: None},
        threshold=2.0,
    )
    return _planted("suppressor", "A circuit with parts that hold the concept back.", plan, shop, seed, n_images)
