"""An evaluation's numbers as text, no line wider than 100 characters unless a circuit's name makes it so.

Data in, lines out. `lines_of` shows the basic suite as one table, and the full suite (`viscircuits.suite`)
as a section for each ablation and one for what depends on none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

Entry = Mapping[str, Any]


def lines_of(data: Entry) -> list[str]:
    """Everything an evaluation holds, line by line."""
    return list(_removed(data)) if "full" not in data else list(_full(data))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, their cells below one another."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]  # fmt: skip


def show(interval: Mapping[str, float] | None) -> str:
    """A number with its interval, or a dash."""
    if not interval:
        return "–"
    return f"{_plain(interval['value'])} [{_plain(interval['low'])}, {_plain(interval['high'])}]"


def _plain(number: float) -> str:
    return f"{round(number, 2) + 0.0:.2f}"  # no minus before a zero


def _removed(data: Entry) -> list[str]:
    """The circuit and its controls removed: concept, others, selectivity."""
    measure = data["measure"]
    n = {images: f"(n={described['n']})" for images, described in data["images"].items()}
    head = ("removed", f"concept {measure} {n['concept']}", f"others {measure} {n.get('others', '')}".rstrip())
    entries = [{**data["baseline"], "name": "nothing"}, *data["circuits"]]
    rows = [(*head, "selectivity")]
    for entry in entries:
        cells = [show(entry.get(images, {}).get(measure)) for images in ("concept", "others")]
        rows.append((entry["name"], *cells, "" if entry["name"] == "nothing" else show(entry.get("selectivity"))))
    return aligned(rows)


# ------------------------------------------------------------------ the full suite


def _full(data: Entry) -> Iterator[str]:
    full = data["full"]
    for ablation, part in full["by_ablation"].items():
        yield f"{ablation} ablation".upper()
        yield from _removed({**data, **part["removed"]})
        yield ""
        yield from _alone(part, full["smooth"])
        yield ""
        yield from _single_units(part, full["checked"])
        yield ""
        yield from _elsewhere(part["transfer"])
    yield "WHATEVER THE ABLATION"
    yield from _overlaps(full["overlap"])
    yield ""
    yield _stability(full["stability"])
    yield ""
    yield "VERDICTS: the circuit against the others, by the interval of the difference"
    yield from _verdicts(full)


def _alone(part: Entry, smooth: str) -> list[str]:
    """Area, and what circuits recover alone, at their own size and over all sizes."""
    rows = [(f"by {smooth}", "faithfulness", "completeness", "selectivity, area")]
    rows += [
        (row["name"], show(row["faithfulness"].get(smooth)), show(row["completeness"].get(smooth)), show(row["area"]))
        for row in part["rows"]
    ]
    curves = [("over ten sizes", "CPR (most is .999)", "CMD (0 is best)")]
    curves += [(row["name"], show(row["cpr"]), show(row["cmd"])) for row in part["rows"] if row["cpr"]]
    ends = (part["removed"]["baseline"]["concept"][smooth], part["empty"][smooth])
    told = [
        f"{smooth} on the concept: {show(ends[0])} untouched,",
        f"{show(ends[1])} with all units of the layers removed",
    ]
    return [*told, *aligned(rows)] + (["", *aligned(curves)] if len(curves) > 1 else [])


def _single_units(part: Entry, checked: Entry) -> list[str]:
    """Agreement of scores with exact ablation, and minimality."""
    if part["minimality"] is None:
        return ["no unit was removed alone: minimality and agreement are not measured"]
    n, images = checked["anywhere"], checked["n_images"]
    rows = [(f"score against exact ablation ({n} units, {images} images)", "Spearman", "Pearson")]
    rows += [
        (row["name"], show(row["agreement"]["spearman"]), show(row["agreement"]["pearson"]))
        for row in part["rows"]
        if row["agreement"]
    ]
    least = part["minimality"]
    inside, outside = (least["felt"][where] for where in ("circuit", "outside"))
    missed = f", and {outside:.0%} of those outside" if outside is not None else ""
    return [
        *aligned(rows),
        f"minimality: of {least['n_units']} of the circuit's {least['of']} units, removed one at a time,",
        f"{least['unit']} does least: {least['value']:.3g}; "
        f"{inside:.0%} do something that is sure{missed}",
    ]  # fmt: skip


def _elsewhere(found: Sequence[Entry]) -> Iterator[str]:
    for each in found:
        if "why" in each:
            yield f"on {each['images']} selectivity is not known: {each['why']}"
            continue
        rows = [(f"on {each['images']}", "selectivity", "more than here")]
        rows += [(row["name"], show(row["selectivity"]), show(row["difference"])) for row in each["rows"]]
        yield from aligned(rows)
        yield ""


def _overlaps(found: Sequence[Entry]) -> list[str]:
    rows = [("units shared with", "jaccard", "by chance", "p")]
    for each in found:
        p = "" if each["p_value"] is None else f"{each['p_value']:.1e}"
        rows.append((each["name"], f"{each['jaccard']:.3f}", f"{each['chance']:.3f}", p))
    return aligned(rows)


def _stability(found: Entry) -> str:
    if not found["known"]:
        return f"stability is not known: {found['why']}"
    return (
        f"stability: of {found['n_units']} units {found['unsure']} are chosen in less than half of "
        f"{found['draws']} draws of the images"
    )


def _verdicts(full: Entry) -> Iterator[str]:
    ablations = list(full["by_ablation"])
    by_measure: dict[str, dict[str, dict[str, str]]] = {}
    for ablation, part in full["by_ablation"].items():
        for each in part["verdicts"]:
            by_measure.setdefault(each["measure"], {}).setdefault(each["against"], {})[ablation] = each["verdict"]
    measures = list(by_measure)
    against = list(dict.fromkeys(name for of_measure in by_measure.values() for name in of_measure))
    for ablation in ablations:
        rows = [(f"{ablation} ablation", *measures)]
        rows += [(name, *(by_measure[m].get(name, {}).get(ablation, "–") for m in measures)) for name in against]
        yield from aligned(rows)
        yield ""
    if len(ablations) == 1:
        yield "one ablation only: whether a verdict depends on it was not asked"
        return
    if not full["flips"]:
        yield f"no verdict differs between {' and '.join(ablations)} ablation"
        return
    yield f"{len(full['flips'])} verdicts DIFFER between ablations:"
    for measure, flips in groupby(full["flips"], key=lambda flip: flip["measure"]):
        yield f"  {measure}"
        for flip in flips:
            said = ", ".join(f"{verdict} under {ablation}" for ablation, verdict in flip["verdicts"].items())
            yield f"    against {flip['against']}: {said}" + (" (turned round)" if flip["reversed"] else "")
