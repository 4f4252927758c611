"""The hierarchy of circuits as sentences, tables and figures."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from viscircuits.experiments.hierarchy_analysis import FALL, N_BOOTSTRAP, RANDOM, THIRDS, Analysis
from viscircuits.experiments.permuting import Tested, interval
from viscircuits.experiments.report import Cell, Figure, Report, Table, draw
from viscircuits.experiments.trees import Concept
from viscircuits.metrics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

LEVEL = 0.05
PER_ROW = 4  # units in a row of pictures
PAPER = "CLA"
LINES = {"related": "#1b7837", "all pairs": "#40004b", "unrelated": "#9970ab", "itself": "#666666"}
COLOURS = {"CLA": "#40004b", "CLA difference": "#9970ab", "activation": "#e08214", "activation difference": "#b35806"}
REMOVED = {"backbone": "backbone", "as active": "most active others", RANDOM: "random (mean of sets)"}


def report_of(
    found: Mapping[str, Any], concepts: Sequence[Concept], made: Mapping[str, Any], *, n_permuted: int, seed: int
) -> Report:
    """Everything that is said of a run; parameters as for `Analysis`, and `made`: options and seed."""
    of = Analysis(found, concepts, n_permuted, seed)
    tables = [_claims(of), _overlap_table(of), _layer_table(of), _hurt_table(of), _backbone_table(of), _tree_table(of)]
    figures = [_heat_maps(of), _depth_figure(of), _distance_figure(of), _hurt_figure(of)]
    said = [_said_depth(of), _said_kinship(of), _said_hurt(of), _said_backbone(of)]
    if "removed" in found["backbone"]:
        tables.insert(5, _removal_table(of))
        figures.append(_strip(of))
        said.append(_said_removal(of))
    options = {**made, "permutations": n_permuted, "bootstrap": f"{N_BOOTSTRAP} draws of concepts"}
    return Report(
        "hierarchy", "A hierarchy of circuits", tuple(said), tuple(tables), tuple(figures), _data(of), options
    )


# ------------------------------------------------------------------ sentences


def _said_depth(of: Analysis) -> str:
    thirds, share, fall = of.thirds(PAPER), of.of_itself(PAPER), of.fall(PAPER)
    return (
        f"**Overlap is high early and falls with depth: {_sign(thirds[FALL])}.** Circuits of different concepts (CLA "
        f"as published) overlap by {_written(thirds['early'])} above chance in the early third of the layers and by "
        f"{_written(thirds['late'])} in the late third: a fall of {_written(thirds[FALL])}; over single layers overlap "
        f"correlates with depth by {_tested(fall)}. As a share of what a concept's circuit shares with itself when "
        f"found from other images the overlap is {share['early'].value:.2f} early and {share['late'].value:.2f} late, "
        f"a fall of {_written(share[FALL])}."
    )


def _said_kinship(of: Analysis) -> str:
    (more, p), tested = of.kinship[PAPER], of.by_distance[PAPER]
    values = [each.value for each in tested]
    return (
        f"**Related concepts overlap more: {_verdict(p < LEVEL, more.high < 0)}.** Pairs with the same parent overlap "
        f"by {_written(more)} more than other pairs, over all layers (p {_p(p)}). Overlap falls with distance in the "
        f"tree at {_sure(tested)} of {len(tested)} layers (Spearman {_span(values)}; Mantel "
        f"tests, Holm's correction); at {_sure(of.by_distance_alone[PAPER])} with each concept's own level taken out."
    )


def _said_hurt(of: Analysis) -> str:
    sure, sentences = [], []
    for part in of.parts:
        found, beside = of.hurt[part, PAPER], of.beside_random(part, PAPER)
        sure.append(found.p < LEVEL and beside.low > 1)
        sentences.append(
            f"Removed in {part.replace('later', 'the later')}, a CLA circuit moves its own concept's answers "
            f"{_written(found.times)} times as much as circuit and images let expect (p {_p(found.p)}), "
            f"{_written(beside)} times what random circuits do; {found.worst} of {len(of.concepts)} concepts are hurt "
            f"most by their own; divergence against distance: {_tested(found.by_distance)}."
        )
    others = "; ".join(
        f"{method} {_written(of.hurt[of.later, method].times)}" for method in (*of.methods, RANDOM) if method != PAPER
    )
    verdicts = ", ".join(f"{part} {_verdict(holds, False)}" for part, holds in zip(of.parts, sure, strict=True))
    return (
        f"**A circuit's removal hurts its own concept more: {verdicts}.** {' '.join(sentences)} Beside it, in the "
        f"{of.later}: {others}."
    )


def _said_backbone(of: Analysis) -> str:
    shared = {method: of.shared(method) for method in of.methods}
    own = shared[PAPER]
    others = ", ".join(f"{each.n} of {method}" for method, each in shared.items() if method != PAPER)
    return (
        f"**Circuits share a backbone: {_verdict(own.p < LEVEL and own.n > 0, own.n == 0)}.** {own.n} units are in at "
        f"least {of.found['backbone']['least']} of the {len(of.concepts)} CLA circuits ({_by_thirds(own.thirds)}); "
        f"independent circuits would share {own.by_chance:.2g}. Of the other circuits: {others}."
    )


def _said_removal(of: Analysis) -> str:
    moved = {name: of.removed(name, "kl") for name in REMOVED}
    more = {name: of.over_concepts(moved["backbone"] - moved[name]) for name in REMOVED}
    return (
        f"**The backbone carries more than random units of its number: {_sign(more[RANDOM])}; more than other active "
        f"units: {_sign(more['as active'])}.** Removing it moves the answers by {float(moved['backbone'].mean()):.2f} "
        f"nats, random sets of the same size by {float(moved[RANDOM].mean()):.2f} (a difference of "
        f"{_written(more[RANDOM])}), the most active units outside it by {float(moved['as active'].mean()):.2f} "
        f"(a difference of {_written(more['as active'])})."
    )


def _verdict(holds: bool, fails: bool, between: str = "not shown") -> str:
    return "holds" if holds else "does not hold" if fails else between


def _sign(found: Interval) -> str:
    return _verdict(found.low > 0, found.high < 0)


def _sure(tested: Sequence[Tested]) -> int:
    return sum(each.p < LEVEL for each in tested)


def _by_thirds(counts: Sequence[int]) -> str:
    return ", ".join(f"{n} {third}" for third, n in zip(THIRDS, counts, strict=True))


def _written(found: Interval) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]".replace("-0.00", "0.00").replace("-", "−")


def _tested(found: Tested) -> str:
    return f"{found.value:.2f} (p {_p(found.p)})".replace("-0.00", "0.00").replace("-", "−")


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}".replace("-", "−")


def _p(p: float) -> str:
    if p < 1e-9:
        return "< 1e-9"
    return f"{p:.2g}" if p >= 0.001 else f"{p:.1g}"


# ------------------------------------------------------------------ tables


def _claims(of: Analysis) -> Table:
    """The claims in a row each, for every sort of circuit."""
    rows: list[tuple[Cell, ...]] = [
        ("overlap above chance, early", *(of.thirds(method)["early"] for method in of.methods)),
        ("overlap falls: early − late", *(of.thirds(method)[FALL] for method in of.methods)),
        ("… as a share of overlap with itself", *(of.of_itself(method)[FALL] for method in of.methods)),
        ("related − unrelated", *(of.kinship[method][0] for method in of.methods)),
        ("… p by permutation", *(_p(of.kinship[method][1]) for method in of.methods)),
        (
            "layers at which overlap falls with distance",
            *(f"{_sure(of.by_distance[method])} of {len(of.layers)}" for method in of.methods),
        ),
        (
            "… each concept's own level taken out",
            *(f"{_sure(of.by_distance_alone[method])} of {len(of.layers)}" for method in of.methods),
        ),
        (f"own concept hurt, times expected ({of.later})", *(of.hurt[of.later, m].times for m in of.methods)),
        (f"hurt against distance, ρ ({of.later})", *(_tested(of.hurt[of.later, m].by_distance) for m in of.methods)),
        ("units in most circuits (by chance)", *(_in_most(of, method) for method in of.methods)),
    ]
    note = "Above 0 a claim holds, for the times above 1, for ρ below 0; 95 % intervals over concepts."
    return Table("The claims", ("claim", *of.methods), tuple(rows), note)


def _in_most(of: Analysis, method: str) -> str:
    found = of.shared(method)
    return f"{found.n} ({found.by_chance:.2g})"


def _overlap_table(of: Analysis) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for method in of.methods:
        rows += [(method, kind, *of.thirds(method, kind).values()) for kind in of.curves[method]]
        rows.append((method, "all pairs, share of itself", *of.of_itself(method).values()))
    note = (
        "Mean Jaccard overlap above chance, by thirds of the depth; 95 % intervals over concepts. Related: same "
        "parent. Itself: a concept's circuit with the one found from its other images, the most to be expected."
    )
    return Table("Overlap of circuits", ("circuits", "pairs", *THIRDS, FALL), tuple(rows), note)


def _layer_table(of: Analysis) -> Table:
    above = {method: of.curves[method]["all pairs"][0].tolist() for method in of.methods}
    chance = of.overlaps[PAPER].chance.tolist()
    rows = []
    for i, layer in enumerate(of.layers):
        numbers = (of.found["widths"][layer], of.found["sizes"][layer], f"{chance[i]:.3f}")
        pairs = [(f"{above[method][i]:+.2f}", _tested(of.by_distance[method][i])) for method in of.methods]
        rows.append((layer, *numbers, *(cell for pair in pairs for cell in pair)))
    heads = [head for method in of.methods for head in (method, "ρ (p)")]
    note = (
        "Under each sort of circuit the mean Jaccard overlap over pairs, less chance; ρ: Spearman correlation of "
        "overlap with distance in the tree, p of a one-sided Mantel test, Holm's correction for the number of layers."
    )
    return Table("Layer by layer", ("layer", "units", "chosen", "chance", *heads), tuple(rows), note)


def _hurt_table(of: Analysis) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for (part, method), found in of.hurt.items():
        worst = f"{found.worst} of {len(of.concepts)}"
        beside = None if method == RANDOM else of.beside_random(part, method)
        numbers = (found.own, found.others, found.times, _p(found.p), beside, worst, _tested(found.by_distance))
        rows.append((part, method, *numbers))
    head = (
        *("removed in", "circuits", "KL, own", "KL, others", "own, times expected", "p", "times random"),
        *("hurt most by own", "ρ (p)"),
    )
    note = (
        "Divergence of the answers, in nats, on held-out images when a circuit is removed (mean ablation). Times "
        "expected: beyond what this circuit does to all and these images suffer from all; interval over concepts, p by "
        "permuting which circuit is whose. Times random: against one random circuit for each concept. ρ of divergence "
        "with distance in the tree; below 0: near ones are hurt more."
    )
    return Table("Who is hurt by whom", head, tuple(rows), note)


def _backbone_table(of: Analysis) -> Table:
    rows = []
    for method in of.methods:
        found = of.shared(method)
        rows.append((method, found.n, *found.thirds, f"{found.by_chance:.2g}", _p(found.p), found.everywhere))
    note = (
        f"Units in at least {of.found['backbone']['least']} of {len(of.concepts)} circuits of "
        f"{sum(of.found['sizes'].values())} units each; by chance: expected for independent random circuits (binomial)."
    )
    head = ("circuits", "units in most", *THIRDS, "by chance", "p", "units in all")
    return Table("Shared backbone", head, tuple(rows), note)


def _removal_table(of: Analysis) -> Table:
    rows = [
        (shown, of.over_concepts(of.removed(name, "kl")), of.over_concepts(of.removed(name, "same")))
        for name, shown in REMOVED.items()
    ]
    note = (
        "Sets of the same size in each layer (of other units fewer, where most are in the backbone), mean ablation in "
        "all layers, held-out images of all concepts; intervals over concepts."
    )
    return Table("Removing the backbone", ("removed", "KL, nats", "answers unchanged"), tuple(rows), note)


def _tree_table(of: Analysis) -> Table:
    rows = [(" / ".join(concept.place), len(concept.first), len(concept.second)) for concept in of.concepts]
    return Table("The tree", ("concept", "images that find", "held out"), tuple(rows))


# ------------------------------------------------------------------ figures


def _heat_maps(of: Analysis) -> Figure:
    places = [int(part[len(part) // 2]) for part in torch.arange(len(of.layers)).tensor_split(3)]

    def plot(figure: Drawing) -> None:
        rows = figure.subplots(2, 3, sharex=True, sharey=True)
        for row, method in zip(rows, (PAPER, "CLA difference"), strict=True):
            overlap = of.overlaps[method]
            for axes, place, third in zip(row, places, THIRDS, strict=True):
                values = overlap.jaccard[place].clone().fill_diagonal_(torch.nan)
                shown = axes.imshow(values.numpy(), vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
                layer = f"{of.layers[place]} (chance {overlap.chance[place]:.2f})"
                axes.set_title(f"{method}, {third}\n{layer}", fontsize=8)
                _name_axes(axes, of.names)
        figure.colorbar(shown, ax=rows, label="Jaccard overlap", shrink=0.6)

    note = (
        "Jaccard overlap of the circuits of each pair of concepts, in tree order, at the middle layer of each third of "
        "the depth: the same size of circuit, found as published (above) and less the other concepts' mean (below)."
    )
    return Figure("Overlap at three depths", "hierarchy-overlap", draw(plot, 10.5, 7.4), note)


def _depth_figure(of: Analysis) -> Figure:
    shown = (PAPER, "CLA difference", "activation")

    def plot(figure: Drawing) -> None:
        row = figure.subplots(1, len(shown), sharey=True)
        for axes, method in zip(row, shown, strict=True):
            for kind, drawn in of.curves[method].items():
                ends = [interval(drawn[:, i]) for i in range(drawn.shape[1])]
                style = {"color": LINES[kind], "linestyle": ":" if kind == "itself" else "-"}
                axes.plot([each.value for each in ends], label=kind, marker=".", **style)
                low, high = [each.low for each in ends], [each.high for each in ends]
                axes.fill_between(range(len(ends)), low, high, color=LINES[kind], alpha=0.15, linewidth=0)
            axes.axhline(0, color="black", linewidth=0.6)
            axes.set(title=method, xlabel="layer, from the input on")
            axes.locator_params(axis="x", integer=True)
        row[0].set_ylabel("Jaccard overlap above chance")
        row[-1].legend(fontsize=7)

    note = (
        "Mean overlap above chance against depth, for pairs with the same parent, all pairs and unrelated pairs, and "
        "of a concept's circuit with that from its other images (dotted); bands are 95 % intervals over concepts."
    )
    return Figure("Overlap against depth", "hierarchy-depth", draw(plot, 9.5, 3.4), note)


def _distance_figure(of: Analysis) -> Figure:
    def plot(figure: Drawing) -> None:
        axes = figure.subplots()
        for method, tested in of.by_distance.items():
            values = [each.value for each in tested]
            axes.plot(values, color=COLOURS[method], label=method, linewidth=1)
            faces = [COLOURS[method] if each.p < LEVEL else "white" for each in tested]
            axes.scatter(range(len(values)), values, s=22, color=faces, edgecolors=COLOURS[method], zorder=3)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.locator_params(axis="x", integer=True)
        axes.set(xlabel="layer, from the input on", ylabel="Spearman ρ of overlap with distance")
        axes.legend(fontsize=7)

    note = (
        "Correlation of overlap with distance in the tree at each layer; filled where the Mantel test with Holm's "
        "correction has p below 0.05."
    )
    return Figure("Overlap and distance in the tree", "hierarchy-distance", draw(plot), note)


def _hurt_figure(of: Analysis) -> Figure:
    shown = (PAPER, "CLA difference", "activation difference", RANDOM)

    def plot(figure: Drawing) -> None:
        grid = figure.subplots(2, 2, sharex=True, sharey=True)
        for axes, method in zip(grid.flat, shown, strict=True):
            doublings = of.hurt[of.later, method].beyond / math.log(2)
            drawn = axes.imshow(doublings.numpy(), vmin=-2, vmax=2, cmap="PuOr", interpolation="nearest")
            axes.set_title(method, fontsize=8)
            _name_axes(axes, of.names)
        for axes in grid[:, 0]:
            axes.set_ylabel("circuit removed")
        for axes in grid[1]:
            axes.set_xlabel("images of")
        bar = figure.colorbar(drawn, ax=grid, ticks=range(-2, 3), shrink=0.6, label="divergence, times expected")
        bar.ax.set_yticklabels(["¼", "½", "1", "2", "4"])

    note = (
        f"Divergence of the answers on each concept's held-out images (columns) when each circuit is removed in the "
        f"{of.later} (rows), as a multiple of what row and column let expect; purple is more."
    )
    return Figure("Who is hurt by whom", "hierarchy-hurt", draw(plot, 9.5, 8.0), note)


def _strip(of: Analysis) -> Figure:
    """Written by hand: matplotlib would blow up the pictures."""
    pictures = of.found["backbone"]["pictures"]
    side, step, title = 146, 162, 30
    n_rows = -(-len(pictures) // PER_ROW)
    parts = []
    for place, each in enumerate(pictures):
        x, y = place % PER_ROW * step + 8, place // PER_ROW * (step + title) + title
        link = f"data:image/jpeg;base64,{each['jpeg']}"
        parts += [
            f'<text x="{x}" y="{y - 16}">{html.escape(each["unit"])}</text>',
            f'<text x="{x}" y="{y - 4}">in {each["circuits"]} of {len(of.concepts)}</text>',
            f'<image x="{x}" y="{y}" width="{side}" height="{side}" href="{link}"/>',
        ]
    width, height = PER_ROW * step, n_rows * (step + title)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    svg = "\n".join([f'{head} font-family="sans-serif" font-size="11">', *parts, "</svg>\n"])
    note = (
        "Units in most CLA circuits, of the early, middle and late third of the depth, each with the four image "
        "regions that excite it most."
    )
    return Figure("Units of the backbone", "hierarchy-backbone", svg, note)


def _name_axes(axes: Any, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set_yticks(range(len(names)), names, fontsize=6)


# ------------------------------------------------------------------ data


def _data(of: Analysis) -> dict[str, Any]:
    """Every number that tables and figures are made of."""
    return {
        "concepts": [concept.key for concept in of.concepts],
        "layers": of.layers,
        "distance": of.distance.tolist(),
        "overlap": {method: _rounded(overlap.jaccard) for method, overlap in of.overlaps.items()},
        "chance": _rounded(of.overlaps[PAPER].chance),
        "itself": {method: _rounded(overlap.itself) for method, overlap in of.overlaps.items()},
        "by distance": {method: [[each.value, each.p] for each in tested] for method, tested in of.by_distance.items()},
        "kinship": {method: list(found) for method, found in of.kinship.items()},
        "divergence": of.found["hurt"],
        "own": {
            part: {m: [found.times, found.p] for (where, m), found in of.hurt.items() if where == part}
            for part in of.parts
        },
        "backbone": {key: value for key, value in of.found["backbone"].items() if key != "pictures"},
    }


def _rounded(values: Tensor) -> Any:
    return np.round(values.numpy(), 4).tolist()
