"""The experiment on composites as sentences, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from viscircuits.experiments.kept import Entry
from viscircuits.experiments.permuting import own_more
from viscircuits.experiments.rankings import CONTROL, OURS, PUBLISHED, ROWS
from viscircuits.experiments.report import Cell, Figure, Report, Table, draw
from viscircuits.metrics import Interval, area_between

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

DRAWS = 2000
PERMUTATIONS = 9999
DRAWN = (OURS, "anchored, magnitude order", "random edges", PUBLISHED, CONTROL, "activation")
COLOURS = {
    OURS: "#1b7837", "anchored, magnitude order": "#7fbf7b", "random edges": "#666666", PUBLISHED: "#40004b",
    CONTROL: "#b35806", "activation": "#e08214",
}  # fmt: skip
KINSHIP = {2: "its own parts", 1: "one part in common", 0: "unrelated"}


def report_of(found: Mapping[int, Entry], made: Mapping[str, object]) -> Report:
    """Everything that is said of a run; `found` is what was measured for each seed."""
    of = Analysis(found)
    shared = {how: of.kinship(how) for how in of.shared}
    tables = (_networks(of), _pruned(of), _along(of), _kin(of, shared), _every_part(of))
    figures = (_curves(of), _selectivities(of), _parts(of))
    said = (_said_network(of), _said_ours(of), _said_beside(of), _said_published(of), _said_shared(of, shared))
    options = {**made, "intervals": f"{DRAWS} bootstrap draws of seeds and of parts within them"}
    return Report("composites", "Composites of two parts", said, tables, figures, {"seeds": dict(found)}, options)


class Analysis:
    """What was measured, as numbers for each seed and part.

    Parameters
    ----------
    found
        Seed → what `composites.OneSeed.measured` gives.
    """

    def __init__(self, found: Mapping[int, Entry]) -> None:
        self.found = found
        first = next(iter(found.values()))
        self.rows = [row for row in ROWS if row in next(iter(first["parts"].values()))]
        self.shared = list(first["shared"])
        self.curved = [row for row in self.rows if ROWS[row].curve]
        self.fractions = torch.tensor(next(iter(first["parts"].values()))[self.curved[0]]["fractions"])

    def curve(self, row: str, kind: str) -> Float[Tensor, "seed part fraction"]:
        """Accuracy on ``subclass`` or ``complement`` at each fraction of edges pruned."""
        return torch.tensor([[part[row][kind] for part in seed["parts"].values()] for seed in self.found.values()])

    def selective(self, row: str) -> Float[Tensor, "seed part fraction"]:
        """Fall on the subclass less the fall on the complement."""
        falls = [curve[..., :1] - curve for curve in (self.curve(row, kind) for kind in ("subclass", "complement"))]
        return falls[0] - falls[1]

    def fall(self, row: str, kind: str) -> Float[Tensor, "seed part"]:
        """What pruning all edges costs."""
        curve = self.curve(row, kind)
        return curve[..., 0] - curve[..., -1]

    def area(self, row: str) -> Float[Tensor, "seed part"]:
        """Area between the two curves, each less its start, of a row with a curve."""
        curves = self.selective(row)
        none = torch.zeros(len(self.fractions))
        return torch.tensor([[area_between(self.fractions, part, none) for part in seed] for seed in curves])

    def units(self, row: str) -> Float[Tensor, "seed part"] | None:
        """Selectivity of removing all units of the circuit."""
        if not ROWS[row].units:
            return None
        after = torch.tensor(
            [[part[row]["units removed"] for part in s["parts"].values()] for s in self.found.values()]
        )
        before = [self.curve(row, kind)[..., 0] for kind in ("subclass", "complement")]
        return (before[0] - after[..., 0]) - (before[1] - after[..., 1])

    def kinship(self, how: str) -> tuple[dict[int, Interval], Interval, float]:
        """Overlap above chance by parts in common; own less unrelated; largest p of the seeds."""
        means: dict[int, list[float]] = {common: [] for common in KINSHIP}
        differences, ps = [], []
        for seed, each in self.found.items():
            above = torch.tensor(each["shared"][how]["above chance"], dtype=torch.float64)  # (pair, union)
            common = torch.tensor(each["shared"][how]["parts in common"])
            for kin, values in means.items():
                values.append(float(above[common == kin].mean()))
            unrelated = torch.where(common == 0, above, torch.nan).nanmean(1)
            differences.append((above.diag() - unrelated).tolist())
            ps.append(own_more(above, PERMUTATIONS, torch.Generator().manual_seed(seed)).p)
        spans = {kin: Interval(sum(v) / len(v), min(v), max(v)) for kin, v in means.items()}
        return spans, over_seeds(torch.tensor(differences)), max(ps)


def over_seeds(values: Float[Tensor, "seed part"], draws: int = DRAWS, level: float = 0.95) -> Interval:
    """Mean with a percentile interval: seeds are drawn again, and within each its parts.

    With one seed the interval is over its parts alone.
    """
    n_seeds, n_parts = values.shape
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(n_seeds, (draws, n_seeds, 1), generator=generator)
    parts = torch.randint(n_parts, (draws, n_seeds, n_parts), generator=generator)
    drawn = values.double()[seeds, parts].mean((1, 2))
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(drawn, tail).tolist()
    return Interval(float(values.double().mean()), low, high)


# ------------------------------------------------------------------ sentences


def _said_network(of: Analysis) -> str:
    right = [each["network"]["accuracy"] for each in of.found.values()]
    each = next(iter(of.found.values()))["network"]
    return (
        f"**The networks tell {_percent(sum(right) / len(right))} of held-out composites** "
        f"({', '.join(_percent(one) for one in right)} by seed; {each['n']} composites of {len(each['by pair'])} pairs "
        f"each; chance {_percent(each['chance'])})."
    )


def _said_ours(of: Analysis) -> str:
    falls = [over_seeds(of.fall(OURS, kind)) for kind in ("subclass", "complement")]
    selective = over_seeds(of.selective(OURS)[..., -1])
    verdict = "reached" if selective.low > 0.5 else "reached on average" if selective.value >= 0.5 else "missed"
    return (
        f"**Pruning all exciting edges of a part's anchored circuit lowers accuracy on composites with the part by "
        f"{_points(falls[0])}, on others by {_points(falls[1])}: a selectivity of {_points(selective)}"
        f"{_each_seed(of.selective(OURS))}.** Fifty were asked for: {verdict}."
    )


def _said_beside(of: Analysis) -> str:
    mine = of.selective(OURS)
    behind = {row: mine - of.selective(row) for row in of.curved if not row.startswith(OURS)}
    leads = {row: over_seeds(each[..., -1]) for row, each in behind.items()}
    best = min(leads, key=lambda row: leads[row].value)
    clear = sum(each.low > 0 for each in leads.values())
    shown = dict.fromkeys((best, *(row for row in (CONTROL,) if row in leads)))
    return (
        f"**It is ahead of {clear} of {len(leads)} others with an interval clear of 0** (as many units, or as many "
        f"edges, unless a name says otherwise). The best of these is {best}. "
        + " ".join(
            f"Over {row} anchored has {_points(leads[row])} more with all edges pruned{_each_seed(behind[row])}, "
            f"{_points(over_seeds(of.area(OURS) - of.area(row)))} more on the way."
            for row in shown
        )
    )


def _each_seed(selective: Float[Tensor, "seed part fraction"]) -> str:
    """The means of several seeds with all edges pruned, in points: what an interval over parts might hide."""
    means = (100 * selective[..., -1].mean(1)).tolist()
    words = ", ".join(f"{each:.1f}" for each in means).replace("-", "−")
    return f" ({words} by seed)" if len(means) > 1 else ""


def _said_published(of: Analysis) -> str:
    everything, exciting = (over_seeds(of.selective(row)[..., -1]) for row in (f"{PUBLISHED}, all edges", PUBLISHED))
    ours = over_seeds(of.selective(f"{OURS}, all edges")[..., -1])
    verdict = "reaches fifty" if everything.value >= 0.5 else "does not reach fifty"
    return (
        f"**CLA as published {verdict}:** {_points(everything)} with all edges of the circuit pruned; with the "
        f"exciting ones alone, which is our choice and not the paper's, {_points(exciting)}. The anchored "
        f"circuit without all its edges reaches {_points(ours)}."
    )


def _said_shared(of: Analysis, shared: Mapping[str, Any]) -> str:
    sentences = []
    for how, (spans, more, p) in shared.items():
        own, none = spans[2], spans[0]
        sentences.append(
            f"{how}: {own.value:.2f} above chance with the union of its own parts' circuits, {none.value:.2f} "
            f"with that of unrelated parts (a difference of {_plain(more)}, p {_p(p)})"
        )
    holds = all(more.low > 0 and p < 0.05 for _, more, p in shared.values())
    return (
        f"**A pair's circuit is made of its parts' circuits: {'holds' if holds else 'not shown for every score'}.** "
        f"Overlap (Jaccard): {'; '.join(sentences)}."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _points(found: Interval) -> str:
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}] points".replace("-", "−")


def _plain(found: Interval) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]".replace("-0.00", "0.00").replace("-", "−")


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else f"{p:.1g}"


# ------------------------------------------------------------------ tables


def _networks(of: Analysis) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for seed, each in of.found.items():
        by_pair = sorted(each["network"]["by pair"].items(), key=lambda pair: pair[1])
        worst, best = (f"{name} ({_percent(share)})" for name, share in (by_pair[0], by_pair[-1]))
        right = each["network"]["accuracy"]
        rows.append((seed, len(each["parts"]), len(by_pair), each["network"]["n"], _percent(right), worst, best))
    head = ("seed", "parts", "pairs", "held-out composites", "right", "hardest pair", "easiest pair")
    return Table("The networks", head, tuple(rows), "Held-out composites show photographs that training does not.")


def _pruned(of: Analysis) -> Table:
    rows: list[tuple[Cell, ...]] = []
    mine = of.selective(OURS)[..., -1]
    for row in of.rows:
        selective, units = of.selective(row)[..., -1], of.units(row)
        edges = [part[row]["edges"] for seed in of.found.values() for part in seed["parts"].values()]
        area = over_seeds(of.area(row)) if row in of.curved else None
        rows.append((
            row, f"{sum(edges) / len(edges):,.0f}", over_seeds(of.fall(row, "subclass")),
            over_seeds(of.fall(row, "complement")), over_seeds(selective), area,
            None if row == OURS else over_seeds(mine - selective), None if units is None else over_seeds(units),
        ))  # fmt: skip
    head = ("circuit", "edges", "subclass falls", "complement falls", "selectivity", "area", "anchored is ahead by")
    note = (
        "Accuracy on held-out composites with and without the part, all edges pruned; last column: all units removed "
        "instead. Only exciting edges are pruned unless all are named. Area: selectivity averaged over the way from "
        "none to all. 95 % intervals over seeds and parts."
    )
    return Table("Without the part's circuit", (*head, "selectivity, units"), tuple(rows), note)


def _along(of: Analysis) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for row in of.curved:
        values = [f"{value:.2f}" for value in of.selective(row).mean((0, 1)).tolist()]
        rows.append((row, *values))
    head = ("circuit", *(_percent(fraction) for fraction in of.fractions.tolist()))
    return Table(
        "Selectivity on the way", head, tuple(rows), "By the share of edges pruned, mean over seeds and parts."
    )


def _kin(of: Analysis, shared: Mapping[str, Any]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for how, (spans, more, p) in shared.items():
        chance = [each["shared"][how]["chance"] for each in of.found.values()]
        rows.append((how, sum(chance) / len(chance), *(spans[kin] for kin in KINSHIP), more, _p(p)))
    head = ("circuits", "chance", *KINSHIP.values(), "own − unrelated", "p")
    note = (
        "Jaccard overlap, less chance, of a pair's circuit found from composites with the union of two parts' circuits "
        "found from plain images; brackets: smallest and largest of the seeds, for the difference the bootstrap over "
        "seeds and pairs. p: which union belongs to which pair is permuted; the largest of the seeds."
    )
    return Table("Circuits of pairs and of their parts", head, tuple(rows), note)


def _every_part(of: Analysis) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for seed, each in of.found.items():
        for name, part in each["parts"].items():
            cells: list[Cell] = []
            for row in (OURS, CONTROL, PUBLISHED):
                cells += [f"{part[row]['subclass'][-1]:.2f}", f"{part[row]['complement'][-1]:.2f}"]
            whole = part[OURS]
            rows.append((seed, name, f"{whole['subclass'][0]:.2f}", f"{whole['complement'][0]:.2f}", *cells))
    kinds = ("subclass", "complement")
    head = ("seed", "part", *kinds, *(f"{row}: {kind}" for row in (OURS, CONTROL, PUBLISHED) for kind in kinds))
    return Table("Every part", head, tuple(rows), "Accuracy of the whole network, and without all edges of a circuit.")


# ------------------------------------------------------------------ figures


def _curves(of: Analysis) -> Figure:
    shown = [row for row in DRAWN if row in of.rows]

    def plot(figure: Drawing) -> None:
        grid = figure.subplots(2, 3, sharex=True, sharey=True)
        x = (100 * of.fractions).tolist()
        for axes, row in zip(grid.flat, shown, strict=False):
            for kind, style in (("subclass", "-"), ("complement", "--")):
                curves = of.curve(row, kind)
                axes.plot(x, curves.flatten(0, 1).T.tolist(), color=COLOURS[row], linestyle=style, lw=0.4, alpha=0.25)
                axes.plot(x, curves.mean((0, 1)).tolist(), color=COLOURS[row], linestyle=style, lw=2, label=kind)
            axes.set_title(row, fontsize=9)
            axes.legend(fontsize=7)
        for axes in grid[:, 0]:
            axes.set_ylabel("accuracy")
        for axes in grid[1]:
            axes.set_xlabel("% of edges pruned")
        grid[0, 0].set_ylim(0, 1)

    note = (
        "Accuracy on composites with the part (solid) and without it (dashed) against the share of the circuit's edges "
        "pruned; thin lines are single parts, thick ones their mean."
    )
    return Figure("What remains", "composites-curves", draw(plot, 8.4, 5.0), note)


def _selectivities(of: Analysis) -> Figure:
    def plot(figure: Drawing) -> None:
        axes = figure.subplots()
        for row in of.curved:
            values = of.selective(row)
            ends = [over_seeds(values[..., i]) for i in range(values.shape[2])]
            colour, x = COLOURS.get(row, "#bbbbbb"), (100 * of.fractions).tolist()
            width, label = (2.0, row) if row in COLOURS else (0.8, None)
            axes.plot(x, [each.value for each in ends], label=label, color=colour, lw=width)
            if row in (OURS, PUBLISHED, CONTROL):
                low, high = [each.low for each in ends], [each.high for each in ends]
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.axhline(0.5, color="black", linewidth=0.6, linestyle=":")
        axes.set(xlabel="% of edges pruned", ylabel="selectivity")
        axes.legend(fontsize=7)

    note = (
        "Fall of accuracy with the part less fall without it, against the share of edges pruned, mean over seeds and "
        "parts; bands: 95 % intervals of three of them; grey: the other rows of the table; dotted: what was asked for."
    )
    return Figure("Selectivity", "composites-selectivity", draw(plot), note)


def _parts(of: Analysis) -> Figure:
    names = [(seed, name) for seed, each in of.found.items() for name in each["parts"]]

    def plot(figure: Drawing) -> None:
        n_rows = -(-len(names) // 10)
        grid = figure.subplots(n_rows, 10, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(names) :]:
            axes.axis("off")
        for axes, (seed, name) in zip(grid.flat, names, strict=False):
            part = of.found[seed]["parts"][name]
            for row in (CONTROL, OURS):
                for kind, style in (("subclass", "-"), ("complement", "--")):
                    axes.plot((100 * of.fractions).tolist(), part[row][kind], color=COLOURS[row], linestyle=style, lw=1)
            axes.set_title(f"{name[:14]} ({seed})", fontsize=6)
            axes.tick_params(labelsize=6)
        grid[0, 0].set_ylim(0, 1)

    note = (
        "Accuracy with the part (solid) and without it (dashed) against the share of edges pruned, for every part and "
        f"seed: {OURS} (green) and {CONTROL} (brown)."
    )
    return Figure("Every part", "composites-parts", draw(plot, 11.0, 1.2 * -(-len(names) // 10) + 0.4), note)
