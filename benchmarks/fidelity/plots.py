"""The plots of the fidelity page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fidelity.photographs import title_of
from fidelity.roster import AGAINST, RECOMMENDED, REMOVER
from fidelity.store import Entry
from fidelity.summary import by_family, of

matplotlib.rcParams["svg.hashsalt"] = "viscircuits"  # the same run draws the same bytes

DRAWN = (REMOVER, RECOMMENDED, AGAINST, "cla-ratio", "cla", "attribution-patching", "activation", "random")
STYLES = ("o-", "p-", "s--", "^-.", "v:", "D-", "x--", "+:")
ALT = {
    "fidelity-units": "AUROC over units for each method, a mark for each family of planted networks",
    "fidelity-cost": "mean AUROC over units against the seconds that a method took",
    "fidelity-removal": "selectivity against the share of units removed, mean over groups",
}


def draw(results: Entry, folder: Path) -> list[str]:
    """The plots there are numbers for; returns their names without the ending."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"fidelity-units": _families, "fidelity-cost": _scatter, "fidelity-removal": _curves}
    drawn = []
    for name, plot in figures.items():
        figure = plot(results)
        if figure is not None:
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            drawn.append(name)
    return drawn


def _methods(results: Entry) -> list[str]:
    return list(dict.fromkeys(entry["method"] for entry in results["planted"]))


def _families(results: Entry) -> Figure | None:
    families = by_family(results["planted"], lambda entry: of(entry, "units", "auroc"))
    if not families:
        return None
    methods = [method for method in _methods(results) if any(method in each for each in families.values())]
    figure = Figure(figsize=(6.4, 0.28 * len(methods) + 1.2), layout="constrained")
    axes = figure.add_subplot(xlabel="AUROC over units")
    for place, (family, found) in enumerate(families.items()):
        known = [(i, found[method]) for i, method in enumerate(methods) if method in found]
        heights = [i + 0.12 * (place - (len(families) - 1) / 2) for i, _ in known]
        values = [each["value"] for _, each in known]
        ends = [[abs(each["value"] - each[end]) for _, each in known] for end in ("low", "high")]
        axes.errorbar(values, heights, xerr=ends, fmt="osD^v<>"[place % 7], markersize=4, linewidth=1, label=family)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.axvline(0.5, color="0.7", linewidth=1, zorder=0)
    axes.legend(frameon=False, fontsize="small")
    return figure


def _scatter(results: Entry) -> Figure | None:
    points: dict[str, tuple[float, float]] = {}
    for method in _methods(results):
        mine = [
            entry
            for entry in results["planted"]
            if entry["method"] == method and of(entry, "units", "auroc") is not None
        ]
        if mine:
            seconds = median(entry["passes"]["seconds"] for entry in mine)
            points[method] = max(seconds, 1e-3), sum(entry["units"]["auroc"] for entry in mine) / len(mine)
    if not points:
        return None
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="seconds, median", ylabel="AUROC over units, mean")
    axes.plot(*zip(*points.values(), strict=True), "o", color="C0")
    for method, (x, y) in points.items():
        axes.annotate(method, (x, y), (4, 3), textcoords="offset points", fontsize="x-small")
    return figure


def _curves(results: Entry) -> Figure | None:
    panels = [
        (f"{title_of(network)}, {ablation}", sizes)
        for network, sources in results["removal"].items()
        for ablation, sizes in (of(sources, "groups", "mean") or {}).items()
    ]
    if not panels:
        return None
    n_rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(7.6, 2.6 * n_rows + 0.6), layout="constrained")
    grid = figure.subplots(n_rows, 2, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (title, sizes) in zip(grid, panels, strict=False):
        _curve(axes, sizes)
        axes.set_title(title, fontsize="medium")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("units removed of each layer, %", fontsize="medium")
    figure.supylabel("selectivity, mean over groups", fontsize="medium")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    return figure


def _curve(axes: Any, sizes: Mapping[str, Mapping[str, Entry]]) -> None:
    at = [100 * float(size) for size in sizes]
    for style, (place, method) in zip(STYLES, enumerate(DRAWN), strict=True):
        entries = [of_size.get(method) for of_size in sizes.values()]
        if all(entries):
            axes.plot(at, [each["value"] for each in entries], style, color=f"C{place}", markersize=4, label=method)
            if method in (REMOVER, RECOMMENDED, AGAINST):
                ends = [[each[end] for each in entries] for end in ("low", "high")]
                axes.fill_between(at, *ends, color=f"C{place}", alpha=0.15, linewidth=0)
    axes.axhline(0, color="0.7", linewidth=1, zorder=0)
    axes.set_xticks(at)
