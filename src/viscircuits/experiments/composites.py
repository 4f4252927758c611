"""Composites ("CatFish"): a network that tells pairs, and what is left of it without the circuit of one part.

1. Parts are drawn, and pairs of them; a network is trained to tell the pairs (`pairs`, `training`). A part is never
   a label.
2. The circuit of a part is found from plain images of it, and the reference are plain images of the other parts
   (`rankings`). No score sees a composite.
3. The circuit's edges are pruned, from none to all in order of score, and then all its units; accuracy is measured on
   held-out composites that show the part, the *ablated subclass*, and on all others, the *complement* (`edges`).
   Selectivity is the fall of the first less the fall of the second.
4. The circuit of a pair, found from composites, is compared with the union of its parts' circuits.

All this for several seeds, each drawing other parts, pairs and images; intervals are over seeds and parts.

References
----------
Rajaram et al. 2023, arXiv:2404.14349.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from viscircuits.ablation import Statistics
from viscircuits.circuit import Circuit
from viscircuits.errors import ViscircuitsError
from viscircuits.experiments.composites_report import report_of
from viscircuits.experiments.edges import Link, Pruner, Running, layers_of, links_of, weights_of
from viscircuits.experiments.kept import Entry, Kept
from viscircuits.experiments.pairs import (
    RENDERED,
    Canvas,
    Composites,
    Group,
    Parts,
    choose_pairs,
    mean_colour,
    open_parts,
    render_parts,
)
from viscircuits.experiments.rankings import INSIDE, ROWS, Plain
from viscircuits.experiments.report import Report, check_folder
from viscircuits.experiments.seeds import check_seed
from viscircuits.experiments.training import Recipe, begin, build, recipe_for, train, transform_of, transformed
from viscircuits.images import split
from viscircuits.metrics import overlap
from viscircuits.models import ModelSpec

FRACTIONS = (0.0, 0.05, 0.15, 0.4, 1.0)
SHARED = ("cla", "cla-difference", "activation-difference")  # circuits of pairs that are compared with their parts'
SIZES = {"small": 0.6}  # a narrow network has many inputs to each unit: a small circuit holds few of them
USUAL_SIZE = 0.15


@dataclass(frozen=True)
class Options:
    """What decides the numbers of a run.

    Parameters
    ----------
    data
        Folder of class folders, or None for rendered parts.
    recipe
        How the network is trained.
    n_parts, pairs
        Parts of each seed, and partners of each part.
    canvas
        What tiles are put on.
    held_out
        Held-out composites of each pair.
    plain, composed
        Plain images of each part that find its circuit, and composites of each pair that find the pair's.
    size
        Units in a circuit, as a share of each layer.
    links
        Pairs of layers between which edges are pruned, counted from the end.
    ablation
        What a removed value becomes: ``zero`` or ``mean``.
    rows
        What is compared: names in `viscircuits.experiments.rankings.ROWS`.
    """

    data: Path | None
    recipe: Recipe
    n_parts: int = 20
    pairs: int = 5
    canvas: Canvas = field(default_factory=Canvas)
    held_out: int = 6
    plain: int = 16
    composed: int = 8
    size: float = USUAL_SIZE
    links: int = 1
    ablation: str = "zero"
    rows: tuple[str, ...] = tuple(ROWS)


def composites(
    out: str | Path,
    *,
    data: str | Path | None = None,
    model: str | None = None,
    weights: str = "default",
    n_parts: int | None = None,
    pairs: int = 5,
    canvas: Canvas | None = None,
    size: float | None = None,
    links: int = 1,
    ablation: str = "zero",
    seeds: Sequence[int] = (0, 1, 2),
    quick: bool = False,
    progress: bool = False,
) -> Report:
    """Train networks to tell pairs, prune the circuit of each part, and measure what they still tell.

    Parameters
    ----------
    out
        Folder for networks, parts and the report; a stopped run goes on there.
    data
        Folder of class folders, perhaps below ``train`` and ``val``; None renders parts.
    model
        ``small``, ``lite0`` or ``torchvision:NAME``; by default ``lite0``, for rendered parts ``small``.
    weights
        What the network starts from: ``default``, ``none`` or a file.
    n_parts
        Parts of each seed; by default 20, or all that are rendered.
    pairs, canvas, size, links, ablation
        As in `Options`; by default the size is 0.15, for ``small`` 0.6.
    seeds
        Each draws parts, pairs and images, and trains a network.
    quick
        A small run that shows that everything works.
    progress
        Show progress bars.

    Raises
    ------
    ViscircuitsError
        If an option or the data do not do; it says what to do.
    FileFormatError
        If the folder holds the result of another experiment.
    """
    out, data = Path(out), None if data is None else Path(data)
    check_folder(out, "composites")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ViscircuitsError(f"give one seed or more, each once; got {list(seeds)} (--seeds)")
    for seed in seeds:
        check_seed(seed, "--seeds")
    model = model or ("small" if data is None else "lite0")
    size = SIZES.get(model, USUAL_SIZE) if size is None else size
    if not 0 < size <= 1:
        raise ViscircuitsError(f"a circuit is a share of each layer, above 0 and at most 1; got {size} (--size)")
    if ablation not in ("zero", "mean"):
        raise ViscircuitsError(f"a removed value becomes 'zero' or 'mean', got {ablation!r} (--ablation)")
    options = Options(
        data, recipe_for(model, weights), n_parts or _usual(data), pairs, canvas or Canvas(), size=size, links=links,
        ablation=ablation,
    )  # fmt: skip
    if quick:
        options, seeds = _quick(options, n_parts or 5), seeds[:1]
    found = {seed: OneSeed(options, seed, out, progress).measured() for seed in seeds}
    return report_of(found, _made(options, seeds) | ({"quick": "a small run, no result"} if quick else {}))


def _quick(options: Options, n_parts: int) -> Options:
    """A run of seconds; only the small network learns anything in it."""
    recipe = options.recipe
    each, epochs = (24, 6) if recipe.network == "small" else (4, 1)
    recipe = replace(recipe, each=each, epochs=epochs, plain=min(recipe.plain, 4))
    pairs = min(options.pairs, 2)
    return replace(options, recipe=recipe, n_parts=n_parts, pairs=pairs, held_out=3, plain=4, composed=2)


def made_composites(
    data: str | Path | None,
    *,
    n_parts: int | None = None,
    pairs: int = 5,
    each: int = 50,
    held_out: bool = False,
    canvas: Canvas | None = None,
    seed: int = 0,
) -> Composites:
    """The composites of a seed, as the experiment draws them: those that train, or those that are held out."""
    check_seed(seed)
    folder = None if data is None else Path(data)
    recipe = replace(recipe_for("small" if folder is None else "lite0"), each=each)
    options = Options(folder, recipe, n_parts or _usual(folder), pairs, canvas or Canvas(), held_out=each)
    drawn = draw_sets(options, seed)
    return drawn.held_out if held_out else drawn.to_train


def _usual(data: Path | None) -> int:
    return len(RENDERED) if data is None else 20


def _made(options: Options, seeds: Sequence[int]) -> dict[str, object]:
    recipe, canvas = options.recipe, options.canvas
    return {
        "model": recipe.network, "weights": Path(recipe.weights).name,
        "data": "rendered parts" if options.data is None else options.data.name,
        "parts": options.n_parts, "partners of each": options.pairs,
        "training": f"{recipe.each} composites of each pair, {recipe.epochs} epochs, {recipe.size} pixels",
        "canvas": f"{canvas.side} pixels, tiles {canvas.tile}, {canvas.placement}, ground "
        f"{'mean colour' if canvas.ground is None else canvas.ground}",
        "plain images of each part": options.plain, "held-out composites of each pair": options.held_out,
        "circuit": f"{100 * options.size:g} % of each layer", "links": options.links, "ablation": options.ablation,
        "seeds": ", ".join(map(str, seeds)),
    }  # fmt: skip


# ---------------------------------------------------------------- what a seed draws


@dataclass(frozen=True)
class Drawn:
    """The parts and pairs of one seed, as sets of images.

    `to_train`, `plain` and `to_find` show training photographs, `held_out` others.
    """

    names: tuple[str, ...]
    pairs: tuple[Group, ...]
    training_parts: Parts
    held_out_parts: Parts
    canvas: Canvas
    options: Options
    seed: int

    @cached_property
    def to_train(self) -> Composites:
        """Composites to train on."""
        return Composites(self.training_parts, self.pairs, self.options.recipe.each, self.canvas, seed=self.seed)

    @cached_property
    def held_out(self) -> Composites:
        """Composites of photographs that training does not show, at places of their own."""
        return Composites(self.held_out_parts, self.pairs, self.options.held_out, self.canvas, seed=self.seed, stream=1)

    @cached_property
    def to_find(self) -> Composites:
        """Composites that find the circuit of a pair."""
        return Composites(self.training_parts, self.pairs, self.options.composed, self.canvas, seed=self.seed)

    def plain(self, each: int) -> Composites:
        """Plain training images of every part: one tile each."""
        return Composites(
            self.training_parts, [(i,) for i in range(len(self.names))], each, self.canvas, seed=self.seed
        )


def draw_sets(options: Options, seed: int) -> Drawn:
    """Parts, pairs and images of a seed.

    Raises
    ------
    ViscircuitsError
        If there are not so many classes.
    """
    every = list(RENDERED) if options.data is None else list(open_parts(options.data, "train"))
    if not 3 <= options.n_parts <= len(every):
        raise ViscircuitsError(
            f"there are {len(every)} classes; {options.n_parts} parts cannot be drawn: give 3 to {len(every)} (--parts)"
        )
    rng = np.random.default_rng(seed)
    wanted = sorted(rng.choice(every, options.n_parts, replace=False).tolist())
    training, held_out = _opened(options, wanted, seed)
    ground = options.canvas.ground or mean_colour(training)
    pairs = choose_pairs(len(wanted), options.pairs, seed)
    return Drawn(tuple(wanted), pairs, training, held_out, replace(options.canvas, ground=ground), options, seed)


def _opened(options: Options, names: Sequence[str], seed: int) -> tuple[Parts, Parts]:
    """Images of the parts for training, and held out."""
    if options.data is None:
        side = options.canvas.tile
        return render_parts(side, 2 * seed, names), render_parts(side, 2 * seed + 1, names)
    training = open_parts(options.data, "train", names)
    if (options.data / "val").is_dir():
        return training, open_parts(options.data, "val", names)
    halves = {name: split(images, max(1, len(images) * 4 // 5), seed) for name, images in training.items()}
    return {name: each[0] for name, each in halves.items()}, {name: each[1] for name, each in halves.items()}


def trained(drawn: Drawn, out: Path, progress: bool = False) -> ModelSpec:
    """The seed's network: trained, or read from where it was written."""
    recipe = replace(drawn.options.recipe, seed=drawn.seed)
    path = out / f"seed-{drawn.seed}.safetensors"
    return train(recipe, drawn.to_train, drawn.plain(max(recipe.plain, 1)), path, progress=progress)


# ---------------------------------------------------------------- one seed


class OneSeed:
    """Computes what is measured for a seed, or reads what is finished.

    Parameters
    ----------
    options
        Of the run.
    seed
        Draws parts, pairs and images, and trains the network.
    out
        Folder for the network and finished parts.
    progress
        Show progress bars.
    """

    def __init__(self, options: Options, seed: int, out: Path, progress: bool = False) -> None:
        self.options, self.seed, self.progress = options, seed, progress
        self.drawn = draw_sets(options, seed)
        _check_pairs(self.drawn.pairs)
        self.links, self.layers = _chain(options, self.drawn.to_train.names)
        self.spec = trained(self.drawn, out, progress)
        self.spec.model.to(memory_format=torch.channels_last)  # twice as fast on processors
        recipe = {"data": options.data and options.data.name, "recipe": None}  # the weights say how they were trained
        made = {**asdict(options), **recipe, "rows": None, "seed": seed, "weights": self.spec.weights_digest()}
        images = (self.drawn.plain(options.plain), self.drawn.held_out, self.drawn.to_find)
        self.kept = Kept(out / "parts.jsonl", {**made, "images": [each.digest() for each in images], "version": 1})

    def measured(self) -> Entry:
        """Everything that the report is made of."""
        rows = [row for row in self.options.rows if self.links or ROWS[row].order != "weight"]
        found: Entry = {"parts": {}, "layers": self.layers, "network": self.kept.of("network", self._network)}
        cells = [(i, row) for i in range(len(self.drawn.names)) for row in rows]
        for part, row in tqdm(cells, f"seed {self.seed}", disable=not self.progress):
            name = self.drawn.names[part]
            found["parts"].setdefault(name, {})[row] = self.kept.of(
                f"part/{name}/{row}", partial(self._pruned, part, row)
            )
        found["shared"] = {how: self.kept.of(f"shared/{how}", partial(self._shared, how)) for how in SHARED}
        return found

    @cached_property
    def plain(self) -> Plain:
        """Plain images as far as the first layer."""
        options, drawn = self.options, self.drawn
        begun = begin(self.spec, self.layers[0], drawn.plain(options.plain), self.progress)
        return Plain(
            self.spec, self.layers, drawn.pairs, begun, options.plain, size=options.size, ablation=options.ablation,
            weights=weights_of(self.spec.model, self.links) or None, seed=self.seed,
        )  # fmt: skip

    @cached_property
    def statistics(self) -> Statistics:
        """What units do on plain images of all parts."""
        inside = self.plain.measured
        layers = {layer: replace(inside.layers[INSIDE + layer], address=layer) for layer in self.layers}
        mean, variance = ({layer: each[INSIDE + layer] for layer in layers} for each in (inside.mean, inside.variance))
        return Statistics(layers, mean, variance, n_images=inside.n_images)

    @cached_property
    def pruner(self) -> Pruner | Running:
        """What answers for the held-out composites when something is removed."""
        images = transformed(self.drawn.held_out, transform_of(self.spec))
        if not self.links:
            return Running(self.spec, self.layers, images, self.options.ablation, self.statistics)
        return Pruner(self.spec, self.links, images, self.options.ablation, self.statistics)

    @cached_property
    def whole(self) -> Tensor:
        """Outputs of the untouched network for the held-out composites."""
        return self.pruner.without_edges({})

    def _network(self) -> Entry:
        right = self._right(self.whole)
        by_pair = right.view(len(self.drawn.pairs), -1).mean(1)
        return {
            "accuracy": float(right.mean()), "n": len(right), "chance": 1 / len(self.drawn.pairs),
            "by pair": dict(zip(self.drawn.held_out.names, by_pair.tolist(), strict=True)),
        }  # fmt: skip

    def _pruned(self, part: int, row: str) -> Entry:
        pruner, shown = self.pruner, self.drawn.held_out.holds(part)
        ranking = self.plain.ranking(part, ROWS[row])
        fractions = FRACTIONS if ROWS[row].curve else (0.0, 1.0)
        outputs = [self.whole, *(pruner.without_edges(ranking.masks(fraction)) for fraction in fractions[1:])]
        circuit = self.plain.circuit(part, ROWS[row].circuit, ROWS[row].size)
        entry: Entry = {"fractions": fractions, "edges": ranking.n_edges, "units removed": None}
        if ROWS[row].units:
            outputs.append(pruner.without_units(circuit))
        rights = [self._right(each) for each in outputs]
        subclass = [float(right[shown].mean()) for right in rights]
        complement = [float(right[~shown].mean()) for right in rights]
        if ROWS[row].units:
            entry["units removed"] = [subclass.pop(), complement.pop()]
            entry["units"] = {layer: circuit.units[layer] for layer in self.layers}
        return {**entry, "subclass": subclass, "complement": complement}

    def _right(self, outputs: Tensor) -> Tensor:
        return (outputs.argmax(1) == self.drawn.held_out.labels).double()

    # ------------------------------------------------------------ circuits of pairs

    def _shared(self, how: str) -> Entry:
        """Overlap, above chance, of each pair's circuit (rows) with the union of each pair's parts' (columns)."""
        circuits, unions = self._of_pairs(how), []
        for pair in self.drawn.pairs:
            one, two = (self.plain.circuit(part, how) for part in pair)
            unions.append(_union(one, two))
        above = [
            [float(np.mean([each.jaccard - each.chance for each in overlap(mine, union)])) for union in unions]
            for mine in circuits
        ]
        shared = [[len(set(one) & set(two)) for two in self.drawn.pairs] for one in self.drawn.pairs]
        chance = float(np.mean([each.chance for m, u in zip(circuits, unions, strict=True) for each in overlap(m, u)]))
        return {"above chance": above, "parts in common": shared, "chance": chance}

    def _of_pairs(self, how: str) -> list[Circuit]:
        """The circuit of each pair, found from composites of it, the other pairs being the reference."""
        as_parts = self._pairs_as_parts
        return [as_parts.circuit(i, how) for i in range(len(self.drawn.pairs))]

    @cached_property
    def _pairs_as_parts(self) -> Plain:
        """Composites in the place of plain images, pairs in the place of parts."""
        pairs, begun = self.drawn.pairs, begin(self.spec, self.layers[0], self.drawn.to_find, self.progress)
        return Plain(
            self.spec, self.layers, [(i,) for i in range(len(pairs))], begun, self.options.composed,
            size=self.options.size, seed=self.seed,
        )  # fmt: skip


def _check_pairs(pairs: Sequence[Group]) -> None:
    """See that each pair can be set against one that shares no part with it."""
    if any(all(set(one) & set(two) for two in pairs) for one in pairs):
        raise ViscircuitsError(
            f"of {len(pairs)} pairs one shares a part with all others, so that nothing is left to compare it with; "
            "take more parts (--parts) or partners (--pairs)"
        )


def _chain(options: Options, names: Sequence[str]) -> tuple[tuple[Link, ...], tuple[str, ...]]:
    """The links and layers of the network, known before it is trained."""
    recipe = options.recipe
    spec = build(replace(recipe, weights="none"), names)
    known = links_of(spec.model, spec.address)
    if not 1 <= options.links <= max(1, len(known)):
        raise ViscircuitsError(f"{spec.address} has {max(1, len(known))} links, got {options.links} (--links)")
    links = known[-options.links :] if known else ()
    layers = layers_of(links) if known else tuple(spec.layers or ())[-2:]
    if len(layers) < 2:
        raise ViscircuitsError(f"no two layers are known of {spec.address}; take lite0")
    return links, layers


def _union(one: Circuit, two: Circuit) -> Circuit:
    units = {layer: tuple(sorted({*one.units[layer], *two.units[layer]})) for layer in one.layers}
    return Circuit(units, one.widths)
