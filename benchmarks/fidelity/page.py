"""The page of a fidelity run: tables, plots and sentences from `fidelity.json`, put into a template."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from fidelity.photographs import title_of
from fidelity.plots import ALT, draw
from fidelity.roster import AGAINST, ORACLE, RECOMMENDED, REMOVER
from fidelity.store import DIGITS, Entry
from fidelity.summary import MOST, by_family, flips, needed, of

TEMPLATE = Path(__file__).resolve().parent.parent / "fidelity_page.md"
MARKS = {"first": "●", "within": "○", "": ""}
MAIN_SIZES = ("0.05", "0.1")
REMOVERS = (REMOVER, RECOMMENDED)
MAIN = [(ablation, size) for ablation in ("mean", "zero") for size in MAIN_SIZES]


def write(results: Entry, folder: Path) -> None:
    """Write `fidelity.md` and the plots `img/fidelity-*.svg`; what was not measured leaves a dash."""
    text = TEMPLATE.read_text(encoding="utf-8")
    pictures = draw(results, folder / "img")
    for name, part in PARTS.items():
        text = text.replace(f"<!-- {name} -->", part(results) or "–")
    for name, alt in ALT.items():
        text = text.replace(f"<!-- {name} -->", f"![{alt}](img/{name}.svg)" if name in pictures else "–")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fidelity.md").write_text(text, encoding="utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def number(value: float | None, digits: int = 2) -> str:
    """A number, without a minus before a zero; a dash where there is none."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def bracketed(entry: Entry | None, digits: int = 2) -> str:
    """A number with its interval."""
    if not entry:
        return "–"
    return f"{number(entry['value'], digits)} [{number(entry['low'], digits)}, {number(entry['high'], digits)}]"


def _named(method: str) -> str:
    return f"**`{method}`**" if method in REMOVERS else f"`{method}`"


def _methods(entries: Iterable[Entry]) -> list[str]:
    return list(dict.fromkeys(entry["method"] for entry in entries))


# ------------------------------------------------------------------ planted


def _standing(results: Entry, *path: str) -> str:
    """Methods × families: a number of the cells of planted networks, marked."""
    entries = results["planted"]
    families = by_family(entries, lambda entry: of(entry, *path))
    if not families:
        return ""
    rows = [
        [_named(method), *(_marked(of(families[family], method)) for family in families)]
        for method in _methods(entries)
        if any(method in families[family] for family in families)
    ]
    return table(["method", *families], rows)


def _marked(entry: Entry | None) -> str:
    return f"{bracketed(entry, 3)} {MARKS[entry['mark']]}".rstrip() if entry else "–"


def _exactly(results: Entry) -> str:
    """Methods × families: share of networks whose circuit stands above all else, units and edges."""
    entries = results["planted"]
    families = list(dict.fromkeys(entry["family"] for entry in entries))
    rows = []
    for method in _methods(entries):
        cells = []
        for family in families:
            mine = [entry for entry in entries if (entry["method"], entry["family"]) == (method, family)]
            shares = [_share([of(entry, part, "precision") for entry in mine]) for part in ("units", "edges")]
            cells.append(" / ".join(shares))
        if any(cell != "– / –" for cell in cells):
            rows.append([_named(method), *cells])
    return table(["all of it first: units / edges", *families], rows) if rows else ""


def _share(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(value == 1 for value in known)} of {len(known)}" if known else "–"


def _networks(results: Entry) -> str:
    """Methods × planted networks: mean AUROC over units and edges."""
    entries = results["planted"]
    networks = list(dict.fromkeys(entry["network"] for entry in entries))
    rows = []
    for method in _methods(entries):
        mine = [entry for entry in entries if entry["method"] == method]
        cells = [
            " / ".join(
                number(_mean(of(entry, part, "auroc") for entry in mine if entry["network"] == network))
                for part in ("units", "edges")
            )
            for network in networks
        ]
        if any(cell != "– / –" for cell in cells):
            rows.append([_named(method), *cells])
    return table(["units / edges", *(f"`{network}`" for network in networks)], rows) if rows else ""


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cost(results: Entry) -> str:
    """Medians over planted networks, and over circuits of pretrained ones."""
    planted, removal = results["planted"], results["cost"]
    rows = []
    for method in dict.fromkeys([*_methods(planted), *_methods(removal)]):
        cells = [_spent([entry for entry in part if entry["method"] == method]) for part in (planted, removal)]
        rows.append([_named(method), *cells[0], *cells[1]])
    head = ["median", "forward", "backward", "seconds", "forward, photographs", "backward", "seconds"]
    return table(head, rows) if rows else ""


def _spent(entries: Sequence[Entry]) -> list[str]:
    passes = [entry["passes"] for entry in entries if "passes" in entry]
    if not passes:
        return ["–"] * 3
    found = {name: median(each[name] for each in passes) for name in ("forward", "backward", "seconds")}
    digits = 2 if found["seconds"] < 10 else 0
    return [f"{found['forward']:.0f}", f"{found['backward']:.0f}", number(found["seconds"], digits)]


# ------------------------------------------------------------------ agreement


def _agreement(results: Entry) -> str:
    """Methods × networks: Pearson and Spearman of units and of edges."""
    planted, real = results["planted"], results["agreement"]
    networks = list(dict.fromkeys(entry["network"] for entry in real))
    groups = {"planted": planted} | {
        title_of(name): [entry for entry in real if entry["network"] == name] for name in networks
    }
    rows = []
    for method in _methods([*planted, *real]):
        cells = [
            _correlation([of(entry, "agreement", part) for entry in entries if entry["method"] == method])
            for entries in groups.values()
            for part in ("units", "edges")
        ]
        if method != ORACLE and set(cells) != {"–"}:
            rows.append([_named(method), *cells])
    head = [f"{name}, {part}" for name in groups for part in ("units", "edges")]
    return table(["Pearson / Spearman", *head], rows) if rows else ""


def _correlation(entries: Sequence[Entry | None]) -> str:
    known = [entry for entry in entries if entry]
    if not known:
        return "–"
    return " / ".join(number(_mean(entry[kind] for entry in known)) for kind in ("pearson", "spearman"))


# ------------------------------------------------------------------ removal


def _removal(source: str, results: Entry) -> str:
    """For each network, ablation and size: methods × concepts."""
    parts = []
    for network, sources in results["removal"].items():
        concepts = sources.get(source, {}).get("concepts", {})
        if concepts:
            parts.append(f"### {title_of(network)}\n\n{_untouched(concepts)}")
            for ablation, size in _conditions(concepts):
                title = f"**{float(size):.0%} of units, {ablation} ablation**"
                parts.append(f"{title}\n\n{_selectivity(sources[source], ablation, size)}")
    return "\n\n".join(parts)


def _conditions(concepts: Mapping[str, Entry]) -> list[tuple[str, str]]:
    """Ablation and size, those that count first."""
    after = next(iter(concepts.values()))["after"]
    found = [(ablation, size) for ablation, sizes in after.items() for size in sizes]
    return sorted(found, key=lambda each: (each[1] not in MAIN_SIZES, each[0] != "mean", float(each[1])))


def _untouched(concepts: Mapping[str, Entry]) -> str:
    rows = [
        [
            concept,
            str(each["n"]["concept"]),
            number(each["accuracy"]["concept"]),
            str(each["n"]["others"]),
            number(each["accuracy"]["others"]),
        ]
        for concept, each in concepts.items()
    ]
    return table(["untouched", "photographs", "right", "others", "right"], rows)


def _selectivity(source: Entry, ablation: str, size: str) -> str:
    concepts = source["concepts"]
    found = {concept: each["after"][ablation][size] for concept, each in concepts.items()}
    mean = of(source, "mean", ablation, size) or {}
    methods = list(dict.fromkeys(method for each in found.values() for method in each))
    rows = []
    for method in sorted(methods, key=lambda method: -(of(mean, method, "value") or 0)):
        cells = [_bold(each.get(method)) for each in found.values()]
        rows.append([_named(method), *cells, _bold(mean.get(method))])
    return table(["method", *found, "mean"], rows)


def _bold(entry: Entry | None) -> str:
    """A number with its interval, bold where the interval lies above that of the control."""
    return f"**{bracketed(entry)}**" if entry and entry.get("apart") else bracketed(entry)


def _concepts(results: Entry) -> Iterator[tuple[str, Entry]]:
    """Every concept of every network, by the name it has in tables."""
    for network, sources in results["removal"].items():
        for source in sources.values():
            yield from ((f"{title_of(network)}, {concept}", each) for concept, each in source["concepts"].items())


def _differences(results: Entry) -> str:
    """What the methods recommended for removal have over the control, concept by concept."""
    return "\n\n".join(found for method in REMOVERS if (found := _difference(results, method)))


def _difference(results: Entry, method: str) -> str:
    rows = [
        [name, *(bracketed(of(each, "after", *where, method, "difference")) for where in MAIN)]
        for name, each in _concepts(results)
        if of(each, "after", *MAIN[0], method, "difference")
    ]
    return table([f"`{method}` − `{AGAINST}`", *_main_head()], rows) if rows else ""


def _bounds(results: Entry) -> str:
    """Selectivity if the whole concept were lost, of the search found where it is tested, of the remover held out."""
    rows = []
    for name, each in _concepts(results):
        if "bound" in each:
            triples = [(of(each, MOST, *at), of(each["bound"], *at), of(each, "after", *at, REMOVER)) for at in MAIN]
            rows.append([name, *(" / ".join(number(of(entry, "value")) for entry in three) for three in triples)])
    return table(["all of it and nothing else / bound / held out", *_main_head()], rows) if rows else ""


def _needed(results: Entry) -> str:
    """How much of each concept must be lost, and nothing else, for an interval to lie above the control's."""
    rows = []
    for name, each in _concepts(results):
        n, right = each["n"]["concept"], round(each["accuracy"]["concept"] * each["n"]["concept"])
        highs = [of(each, "after", *at, AGAINST, "high") for at in MAIN]
        if None not in highs:
            enough = [of(each, MOST, *at, "apart") for at in MAIN]  # whether taking all of them is
            least = [
                needed(n, right, high, DIGITS) if all_do else None for high, all_do in zip(highs, enough, strict=True)
            ]
            rows.append([name, *(f"{'–' if lost is None else lost} of {right}" for lost in least)])
    return table(["right answers to take, none of others'", *_main_head()], rows) if rows else ""


def _main_head() -> list[str]:
    return [f"{float(size):.0%}, {ablation}" for ablation, size in MAIN]


# ------------------------------------------------------------------ a closer look


def _closer(results: Entry) -> str:
    """What more seeds of trained networks say, and more photographs of groups."""
    looked = results.get("closer")
    if not looked:
        return ""
    return "\n\n".join(
        [
            f"{looked['seconds'] / 60:.0f} minutes of work.",
            _closer_planted(looked["planted"]),
            _removal_aims(looked),
            _removal("groups", looked),
            _differences(looked),
            _needed(looked),
        ]
    )


def _closer_planted(entries: Sequence[Entry]) -> str:
    """Methods × units and edges: AUROC, and how far from the first."""
    standings = [by_family(entries, lambda entry, part=part: of(entry, part, "auroc")) for part in ("units", "edges")]
    family, rows = entries[0]["family"], []
    for method in _methods(entries):
        found = [each[family][method] for each in standings]
        cells = [cell for each in found for cell in (_marked(each), bracketed(each["behind"], 4))]
        rows.append([_named(method), *cells])
    n = len({(entry["network"], entry["seed"]) for entry in entries})
    return table([f"AUROC, {n} seeds of {family}", "units", "from the first", "edges", "from the first"], rows)


# ------------------------------------------------------------------ sentences


def _summary(results: Entry) -> str:
    """What was asked for beforehand, and what came out."""
    lines = "\n".join(f"- {line}" for line in _planted_aims(results))
    return "\n\n".join(part for part in (lines, _removal_aims(results)) if part)


def _planted_aims(results: Entry) -> list[str]:
    lines = []
    for part, aim in (("units", 0.98), ("edges", 0.95)):
        families = by_family(results["planted"], lambda entry, part=part: of(entry, part, "auroc"))
        mine = {family: each[RECOMMENDED] for family, each in families.items() if RECOMMENDED in each}
        if mine:
            words = ", ".join(f"{family} {number(each['value'], 3)} {_place(each)}" for family, each in mine.items())
            lines.append(f"AUROC over {part}, asked for at least {aim}: {words}.")
    return lines


def _place(standing: Entry) -> str:
    """The mark, or how far behind the first."""
    if standing["mark"] or "behind" not in standing:
        return MARKS[standing["mark"]]
    behind = standing["behind"]
    return f"({number(behind['value'], 4)} [{number(behind['low'], 4)}, {number(behind['high'], 4)}] from the first)"


def _removal_aims(results: Entry) -> str:
    """How many concepts of each source each method is above the control for, and what bounds that."""
    rows = []
    for network, sources in results["removal"].items():
        for source, found in sources.items():
            concepts = list(found["concepts"].values())
            for ablation, size in MAIN:
                cells = [_ahead(concepts, method, ablation, size) for method in REMOVERS]
                cells += [_would(concepts, ablation, size), _searched(concepts, ablation, size)]
                name = f"{title_of(network)}, {source}, {float(size):.0%}, {ablation}"
                rows += [[name, str(len(concepts)), *cells]] if set(cells) != {"–"} else []
    head = [f"above `{AGAINST}` / surely / apart", "of", *(f"`{method}`" for method in REMOVERS)]
    return table([*head, "could be apart", f"`{RECOMMENDED}` told the answers: apart"], rows) if rows else ""


def _ahead(concepts: Iterable[Entry], method: str, *at: str) -> str:
    """For how many concepts a method is above the control, for how many surely, and for how many apart."""
    entries = [of(concept, "after", *at, method) for concept in concepts]
    known = [entry for entry in entries if entry and "difference" in entry]
    if not known:
        return "–"
    fewer = f" of {len(known)}" if len(known) < len(entries) else ""
    above = sum(entry["difference"]["value"] > 0 for entry in known)
    surely = sum(entry["difference"]["low"] > 0 for entry in known)
    return f"{above} / {surely} / {sum(entry.get('apart', False) for entry in known)}{fewer}"


def _would(concepts: Iterable[Entry], *at: str) -> str:
    """For how many concepts a removal of all of it and nothing else would be apart."""
    known = [entry for entry in (of(concept, MOST, *at) for concept in concepts) if entry]
    return str(sum(entry["apart"] for entry in known)) if known else "–"


def _searched(concepts: Iterable[Entry], *at: str) -> str:
    """For how many concepts the search that is given the very photographs that test it is apart."""
    both = [(of(concept, "bound", *at), of(concept, "after", *at, AGAINST)) for concept in concepts]
    known = [(bound["low"], control["high"]) for bound, control in both if bound and control]
    return str(sum(low > high for low, high in known)) if known else "–"


def _flips(results: Entry) -> str:
    """Where the verdict on a method recommended for removal turns with the ablation."""
    if not results["removal"]:
        return ""
    turned = [
        f"`{method}`, {name}, {float(size):.0%}"
        for method in REMOVERS
        for name, each in _concepts(results)
        for size in MAIN_SIZES
        if flips(each, method, size)
    ]
    if not turned:
        return "No verdict turns with the ablation."
    return f"The verdict turns with the ablation for: {'; '.join(turned)}."


def _advice(results: Entry) -> str:
    """Who is best at what, with the numbers."""
    lines = []
    for part in ("units", "edges"):
        values: dict[str, list[float]] = defaultdict(list)
        for entry in results["planted"]:
            if of(entry, part, "auroc") is not None:
                values[entry["method"]].append(entry[part]["auroc"])
        means = {method: sum(each) / len(each) for method, each in values.items()}
        lines.append(f"{part}, over all planted networks: {_best(means, 3)}")
    for network, sources in results["removal"].items():
        for source, found in sources.items():
            for size in MAIN_SIZES:
                means = {name: each["value"] for name, each in (of(found, "mean", "mean", size) or {}).items()}
                lines.append(f"removal, {title_of(network)}, {source}, {float(size):.0%}: {_best(means, 2)}")
    return "\n".join(f"- {line}" for line in lines)


def _best(means: Mapping[str, float], digits: int) -> str:
    """The three highest."""
    ranked = sorted(means, key=lambda method: -means[method])[:3]
    return ", ".join(f"`{method}` {number(means[method], digits)}" for method in ranked) or "–"


def _left_out(results: Entry) -> str:
    rows = [[f"`{method}`", part, why] for part, each in results["left_out"].items() for method, why in each.items()]
    return table(["left out", "of", "because"], rows) if rows else ""


def _machine(results: Entry) -> str:
    machine, minutes = results["machine"], results["seconds"] / 60
    one_go = "clock" in results
    clock = results["clock"] / 60 if one_go else minutes / results["jobs"]
    return (
        f"Measured on {machine['cores']} cores ({', '.join([machine['processor'], *machine['instructions']])}), "
        f"Python {machine['python']}, torch {machine['torch']}, {results['jobs']} processes of one thread: "
        f"{minutes:.0f} minutes of work in all, {clock:.0f} on the clock{', in one go' if one_go else ''}."
    )


PARTS: dict[str, Callable[[Entry], str]] = {
    "machine": _machine,
    "summary": _summary,
    "units": lambda results: _standing(results, "units", "auroc"),
    "units by layer": lambda results: _standing(results, "units", "auroc_by_part"),
    "edges": lambda results: _standing(results, "edges", "auroc"),
    "precision of units": lambda results: _standing(results, "units", "precision"),
    "precision of edges": lambda results: _standing(results, "edges", "precision"),
    "exactly": _exactly,
    "networks": _networks,
    "agreement": _agreement,
    "groups": lambda results: _removal("groups", results),
    "classes": lambda results: _removal("classes", results),
    "differences": _differences,
    "bounds": _bounds,
    "needed": _needed,
    "closer": _closer,
    "flips": _flips,
    "cost": _cost,
    "left out": _left_out,
    "advice": _advice,
}
