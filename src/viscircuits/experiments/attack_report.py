"""The report of the experiment on text attacks: what was measured as tables, a figure and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from viscircuits.experiments.attacks import KINDS, fall
from viscircuits.experiments.defences import MEASURED, of_bits
from viscircuits.experiments.kept import Entry
from viscircuits.experiments.report import Figure, Report, Table, draw
from viscircuits.metrics import Interval

CONTROLS = ("activation", "weight-norm", "random")
BLIND = ("weight-norm", "random")  # look at no image, so that it does not matter what they are found from
ANEW = "strongest word, chosen anew"
FACES_NOTES = {
    False: "Held-out photographs and fonts",
    True: "Held-out photographs; the fonts, or some of them, are those of training",
}
KINDS_NOTE = (
    "95 % intervals over photographs. The strongest word is chosen by asking the whole "
    "network; chosen anew, by asking the one without the circuit, as an attacker would who knows of the defence."
)
METHODS_NOTE = (
    "← chosen on other photographs. The control by activation is found from what the circuits beside it are found "
    "from; weight norm and random look at no images."
)
DIFFERENCES = (
    "Published figures are of CLIP on ImageNet-like sets, with other words, fonts and sizes, and clean accuracy before "
    "and after; ours are of a smaller network, so only the directions compare. Dyslexify reports up to 22 points more "
    "accuracy under attack on ImageNet-100-typo."
)
PUBLISHED = (
    ("Vi-CD, CLIP ViT-B/32 (arXiv:2604.14477), best of three", "39.4 → 1.6 %", "57.1 → 55.7 %"),
    ("Vi-CD, worst of three", "39.5 → 3.1 %", "57.1 → 49.9 %"),
)


def report_of(data: Mapping[str, Any], made: Mapping[str, Any]) -> Report:
    """Tables, figure and sentences from what was measured."""
    whole, curves, chosen, removed = (data[name] for name in ("whole", "curves", "chosen", "removed"))
    tables = (
        _of_kinds(whole, removed, data["faces seen"]), _of_methods(whole, curves, chosen),
        _of_hands(removed["hands"]), _of_defences(whole, removed), _of_edges(removed["edges"]), _of_all_edges(removed),
    )  # fmt: skip
    figure = Figure(
        "What remains of the attack, and what it costs",
        "typographic-sizes",
        draw(lambda drawing: _plot(drawing, whole, curves)),
        "attack success and clean accuracy against the share of units removed, a line for each method",
    )
    return Report("typographic", "Text attacks", _said(whole, chosen, removed), tables, (figure,), data, made)


def _said(whole: Mapping[str, Entry], chosen: Entry, removed: Mapping[str, Any]) -> tuple[str, ...]:
    before, after = ({kind: of_bits(each[kind]) for kind in KINDS} for each in (whole, removed["kinds"]))
    nonsense_costs, clean_falls = fall(before["clean"], before["nonsense word"]), fall(before["clean"], after["clean"])
    found = f"{100 * chosen['size']:g} % of each layer's units, found by {chosen['method']} from {chosen['source']}"
    return (
        f"Untouched, the network is right on {_percent(before['clean'].accuracy)} of {len(before['clean'].right)} "
        f"held-out photographs. A drawn word of another class ({before['wrong word'].copies} on each in turn) fools "
        f"it on {_percent(before['wrong word'].success)}, the strongest of several words on "
        f"{_percent(before['strongest word'].success)}; a nonsense word costs {_points(nonsense_costs)} of accuracy.",
        f"**Without the circuit of text** ({found}, chosen on other photographs) a drawn word fools it on "
        f"{_percent(after['wrong word'].success)}, the strongest word, chosen by asking the network as it is now, on "
        f"{_percent(of_bits(removed['adaptive']).success)}; clean accuracy falls by {_points(clean_falls)}.",
    )


def _of_kinds(whole: Mapping[str, Entry], removed: Mapping[str, Any], faces_seen: bool) -> Table:
    rows = []
    for kind in KINDS:
        before, then = of_bits(whole[kind]), of_bits(removed["kinds"][kind])
        written = kind in ("wrong word", "strongest word")
        successes = (before.success, then.success) if written else (None, None)
        rows.append((kind, before.accuracy, then.accuracy, fall(before, then), *successes))
        if kind == "strongest word":
            anew = of_bits(removed["adaptive"])
            rows.append((ANEW, before.accuracy, anew.accuracy, fall(before, anew), before.success, anew.success))
    head = (
        "photographs with",
        "right, whole",
        "right, without text circuit",
        "fall",
        "fooled, whole",
        "fooled, without",
    )
    return Table("The network before and after", head, tuple(rows), f"{FACES_NOTES[faces_seen]}; {KINDS_NOTE}")


def _of_methods(whole: Mapping[str, Entry], curves: Sequence[Entry], chosen: Entry) -> Table:
    clean, rows = of_bits(whole["clean"]), []
    for each in curves:
        test = {kind: of_bits(entry) for kind, entry in each["test"].items()}
        mark = " ←" if each == chosen else ""
        rows.append(
            (f"{each['method']}{mark}", _source(each), f"{100 * each['size']:g} %", test["wrong word"].success,
             test["wrong word"].accuracy, fall(clean, test["clean"]))
        )  # fmt: skip
    head = ("circuit by", "found from", "units", "fooled", "right under attack", "clean accuracy lost")
    return Table("Circuits of every method and size", head, tuple(rows), METHODS_NOTE)


def _source(each: Entry) -> str:
    return "no images" if each["method"] in BLIND else each["source"]


def _of_hands(hands: Mapping[str, Any]) -> Table:
    rows = []
    for name, each in hands.items():
        before, after = of_bits(each["before"]), of_bits(each["after"])
        rows.append((name, before.success, after.success, after.accuracy))
    head = ("the attack written", "fooled, whole", "fooled, without text circuit", "right, without")
    return Table(
        "Does it survive another hand?", head, tuple(rows), "The circuit was found with the fonts of training."
    )


def _of_defences(whole: Mapping[str, Entry], removed: Mapping[str, Any]) -> Table:
    before = {kind: of_bits(whole[kind]) for kind in MEASURED}
    rows: list[tuple[Any, ...]] = []
    ours = {kind: removed["kinds"][kind] for kind in MEASURED}
    for name, entry in {"circuit of text removed": ours, **removed["simple"]}.items():
        after = {kind: of_bits(each) for kind, each in entry.items()}
        rows.append(
            (name, after["wrong word"].success, after["wrong word"].accuracy, fall(before["clean"], after["clean"]))
        )
    rows += [(name, success, None, clean) for name, success, clean in PUBLISHED]
    head = ("defence", "fooled", "right under attack", "clean accuracy lost")
    return Table("Beside simple defences, and what others report", head, tuple(rows), DIFFERENCES)


def _of_edges(edges: Mapping[str, Any]) -> Table:
    before, rows = of_bits(edges["before"]["clean"]), []
    for order in ("by score", "random order"):
        for fraction, entry in zip(edges["fractions"], edges[order], strict=True):
            after = {kind: of_bits(each) for kind, each in entry.items()}
            n = round(fraction * edges["n"])
            attacked = after["wrong word"]
            rows.append((order, n, attacked.success, attacked.accuracy, fall(before, after["clean"])))
    head = ("edges pruned", "number", "fooled", "right under attack", "clean accuracy lost")
    title = f"Edges of the circuit from {edges['source']} to {edges['target']} pruned"
    return Table(
        title, head, tuple(rows), f"Whole: fooled on {_percent(of_bits(edges['before']['wrong word']).success)}."
    )


def _of_all_edges(removed: Mapping[str, Any]) -> Table:
    clean, rows = of_bits(removed["edges"]["before"]["clean"]), []
    for name, entry in removed["everywhere"].items():
        attacked, after = of_bits(entry["wrong word"]), of_bits(entry["clean"])
        rows.append((name, entry["n"], attacked.success, attacked.accuracy, fall(clean, after)))
    head = ("edges of the circuit of", "number", "fooled", "right under attack", "clean accuracy lost")
    return Table(
        "Edges between all neighbouring layers pruned at once", head, tuple(rows),
        "Between the units of a circuit of the chosen size; their values stay as they are for all other units.",
    )  # fmt: skip


def _plot(figure: Any, whole: Mapping[str, Entry], curves: Sequence[Entry]) -> None:
    success, clean = figure.subplots(1, 2)
    sizes = sorted({each["size"] for each in curves})
    groups = list(dict.fromkeys((each["method"], each["source"]) for each in curves))
    for place, group in enumerate(groups):
        points = [each for each in curves if (each["method"], each["source"]) == group]
        x = [100 * each["size"] for each in points]
        control = group[0] in CONTROLS
        style = {
            "color": f"C{place % 10}",
            "linestyle": ":" if control else "-",
            "marker": "os^vDx+*"[place % 8],
            "markersize": 4,
        }
        name = group[0] if group[0] in BLIND else f"{group[0]}, {group[1].removeprefix('words ')}"
        success.plot(x, [of_bits(each["test"]["wrong word"]).success.value for each in points], label=name, **style)
        clean.plot(x, [of_bits(each["test"]["clean"]).accuracy.value for each in points], **style)
    success.axhline(of_bits(whole["wrong word"]).success.value, color="0.6", linewidth=1)
    clean.axhline(of_bits(whole["clean"]).accuracy.value, color="0.6", linewidth=1)
    for axes, title in ((success, "fooled by a wrong word"), (clean, "right on clean photographs")):
        axes.set(xscale="log", ylim=(0, 1), title=title, xlabel="units removed of each layer, %")
        axes.set_xticks([100 * size for size in sizes], [f"{100 * size:g}" for size in sizes])
        axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")


def _percent(share: Interval) -> str:
    return f"{100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _points(share: Interval) -> str:
    return f"{100 * share.value:.1f} points [{100 * share.low:.1f}, {100 * share.high:.1f}]".replace("-0.0", "0.0")
