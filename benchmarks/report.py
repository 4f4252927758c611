"""The page of a benchmark run: tables, plots, and what limits each, from `benchmarks.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.rcParams["svg.hashsalt"] = "viscircuits"  # the same run draws the same bytes

Entry = dict[str, Any]
ALT = {
    "bench-images": "time an image and peak memory over the number of images",
    "bench-size": "time an image over the size of the image, loop and float32",
    "bench-width": "time an image over the width of the layers, loop and float32",
}
WAYS = ("loop", "vmap", "captum", "float32", "bfloat16")

TEMPLATE = Path(__file__).with_name("page.md")


def write(results: Entry, folder: Path) -> None:
    """Write `benchmarks.md` and the plots `img/bench-*.svg` into a folder; what was not measured leaves a dash."""
    networks, growth = list(results["networks"].values()), results["growth"]
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, part in PARTS.items():
        text = text.replace(f"<!-- {name} -->", part(networks) if networks else "–")
    text = text.replace("<!-- growth -->", _growth(growth, draw(growth, folder / "img")) if growth else "–")
    (folder / "benchmarks.md").write_text(text, encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def total(entry: Entry, way: str) -> float | None:
    """Seconds an image over all pairs; None if the way failed on one of them."""
    times = [pair["seconds"].get(way) for pair in entry["pairs"]]
    return None if None in times else sum(times) / entry["batch"]


def ratio(over: float | None, under: float | None) -> str:
    return "–" if over is None or not under else f"{over / under:.1f}×"


def seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def scientific(value: float) -> str:
    return f"{value:.0e}" if value else "0"


# ------------------------------------------------------------------ tables


def _machines(networks: list[Entry]) -> str:
    """Each distinct machine once, in words, with its peaks."""
    kinds = {_words(entry): entry for entry in networks}
    lines = [
        f"Measured on {words}. A 2048×1024×1024 matrix product between the pairs, median: {_peaks(entry)}."
        for words, entry in kinds.items()
    ]
    return "\n\n".join(lines)


def _words(entry: Entry) -> str:
    machine = entry["machine"]
    return (
        f"{machine['cores']} cores ({', '.join([machine['processor'], *machine['instructions']])}), "
        f"threads: {machine['threads']}, Python {machine['python']}, torch {machine['torch']}"
    )


def _peaks(entry: Entry) -> str:
    return ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in entry["peak"].items())


def _speed(networks: list[Entry]) -> str:
    rows = []
    for entry in networks:
        times = {way: total(entry, way) for way in WAYS}
        worst = min(pair["seconds"]["loop"] / pair["seconds"]["float32"] for pair in entry["pairs"])
        gain, public = ratio(times["loop"], times["float32"]), entry["public"]
        rows.append(
            [
                entry["title"],
                *(seconds(times[way]) for way in WAYS),
                f"**{gain}**",
                f"{worst:.1f}×",
                ratio(times["float32"], times["bfloat16"]),
                seconds(public and public["seconds"]),
            ]
        )
    return table(
        ["seconds an image", *WAYS, "loop ÷ float32", "its slowest pair", "float32 ÷ bfloat16", "`attribute`"], rows
    )


def _errors(networks: list[Entry]) -> str:
    rows = []
    for entry in networks:
        pairs, found = entry["pairs"], entry["overlap"]
        share = sum(pair["rows"]["float32"] for pair in pairs) / sum(pair["n_targets"] for pair in pairs)
        errors = [_largest(pairs, way) for way in WAYS[1:]]
        rows.append([entry["title"], f"{share:.0%}", *errors, f"{found['jaccard']:.2f}" if found else "–"])
    return table(["largest error", "targets computed", *WAYS[1:], "overlap of circuits"], rows)


def _largest(pairs: list[Entry], way: str) -> str:
    errors = [pair["error"][way] for pair in pairs if way in pair["error"]]
    return scientific(max(errors)) if errors else "–"


def _arithmetic(networks: list[Entry]) -> str:
    rows = []
    for entry in networks:
        flops = {way: sum(pair["flops"].get(way, 0) for pair in entry["pairs"]) for way in ("loop", "float32", "bound")}
        spent = sum(pair["seconds"]["float32"] for pair in entry["pairs"])
        share = flops["float32"] / spent / entry["peak"]["float32"]
        each = [f"{count / entry['batch'] / 1e9:.1f}" for count in flops.values()]
        more = [ratio(flops["loop"], flops["bound"]), ratio(flops["float32"], flops["bound"])]
        rows.append([entry["title"], *each, *more, f"{share:.0%}"])
    head = ["GFLOP an image", "loop", "float32", "bound", "loop ÷ bound", "float32 ÷ bound", "share of peak"]
    return table(head, rows)


def _profile(networks: list[Entry]) -> str:
    rows = []
    for entry in networks:
        spent = dict.fromkeys(("products", "pooling", "rest"), 0.0)
        flops = 0.0
        for pair in entry["pairs"]:
            scale = pair["n_targets"] / pair["profile"]["rows"]
            flops += pair["profile"]["flops"] * scale
            spent = {kind: spent[kind] + pair["profile"][kind] * scale for kind in spent}
        inside = f"{flops / spent['products'] / entry['peak']['float32']:.0%}" if spent["products"] else "–"
        rows.append([entry["title"], *(f"{each / sum(spent.values()):.0%}" for each in spent.values()), inside])
    return table(["share of time", "products", "pooling", "the rest", "speed inside products"], rows)


def _memory(networks: list[Entry]) -> str:
    rows = []
    for entry in networks:
        pair = entry["pairs"][len(entry["pairs"]) // 2]
        sizes = (entry["memory"].get(way) for way in WAYS)
        cells = ["–" if size is None else f"{size / 2**20:.0f}" for size in sizes]
        rows.append([f"{entry['title']}, `{pair['source']}` → `{pair['target']}`", str(entry["batch"]), *cells])
    return table(["MiB", "images", *WAYS], rows)


def _pairs(networks: list[Entry]) -> str:
    return "\n\n".join(_pairs_of(entry) for entry in networks)


def _pairs_of(entry: Entry) -> str:
    batch, rows = entry["batch"], []
    for pair in entry["pairs"]:
        times = pair["seconds"]
        share = pair["flops"].get("float32", 0) / times["float32"] / entry["peak"]["float32"]
        rows.append(
            [
                f"`{pair['source']}` → `{pair['target']}`",
                f"{pair['n_sources']} → {pair['n_targets']}",
                *(f"{1000 * times[way] / batch:.1f}" if way in times else "–" for way in WAYS),
                ratio(times["loop"], times["float32"]),
                scientific(pair["error"]["float32"]),
                f"{share:.0%}",
                ", ".join(pair["left"]) or "–",
            ]
        )
    head = ["ms an image", "units", *WAYS, "loop ÷ float32", "error", "of peak", "left to autograd"]
    size = "×".join(str(each) for each in entry["image"])
    what = f"{batch} image{'' if batch == 1 else 's'} of {size}, {entry['settings']['repeats']} repeats."
    return f"### {entry['title']}\n\n{what}\n\n{table(head, rows)}"


PARTS: dict[str, Callable[[list[Entry]], str]] = {
    "machine": _machines,
    "speed": _speed,
    "errors": _errors,
    "arithmetic": _arithmetic,
    "profile": _profile,
    "memory": _memory,
    "pairs": _pairs,
}


# ------------------------------------------------------------------ growth


def _growth(growth: Entry, plots: list[str]) -> str:
    rows = [
        [str(point["images"]), f"{1000 * point['seconds']:.1f}", f"{point['bytes'] / 2**20:.0f}"]
        for point in growth["images"]
    ]
    pictures = "\n".join(f"![{ALT[name]}](img/{name}.svg)" for name in plots)
    return f"{table(['images', 'ms an image', 'MiB at the peak'], rows)}\n\n{pictures}"


def draw(growth: Entry, folder: Path) -> list[str]:
    """One plot a curve; returns their names without the ending."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, tuple[str, Callable[[Axes], None]]] = {
        "bench-images": ("number of images", lambda axes: _images(axes, growth["images"])),
        "bench-size": ("height and width, pixels", lambda axes: _ways(axes, growth["size"], "size")),
        "bench-width": ("units a layer", lambda axes: _ways(axes, growth["width"], "width")),
    }
    for name, (label, curve) in plots.items():
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        axes = figure.add_subplot(xscale="log", xlabel=label)
        curve(axes)
        points = growth[name.removeprefix("bench-")]
        axes.set_xticks(ticks := [next(iter(point.values())) for point in points], [str(tick) for tick in ticks])
        axes.minorticks_off()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return list(plots)


def _images(axes: Axes, points: list[Entry]) -> None:
    n = [point["images"] for point in points]
    axes.plot(n, [1000 * point["seconds"] for point in points], "o-", color="C0")
    axes.set_ylabel("ms an image", color="C0")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    memory = axes.twinx()
    memory.plot(n, [point["bytes"] / 2**20 for point in points], "s--", color="C1")
    memory.set_ylabel("MiB at the peak", color="C1")
    memory.set_ylim(0, 1.5 * memory.get_ylim()[1])


def _ways(axes: Axes, points: list[Entry], along: str) -> None:
    for way, mark in (("loop", "s--"), ("float32", "o-")):
        axes.plot([point[along] for point in points], [1000 * point[way] for point in points], mark, label=way)
    axes.set_yscale("log")
    axes.set_ylabel("ms an image")
    axes.legend(frameon=False)
