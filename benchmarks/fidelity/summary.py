"""From cells to tables: means with intervals, marks for who is first, folds pooled. No network, no file.

1. On planted networks a number has an interval over networks, sizes and seeds drawn again. Who has the highest mean
   is *first*; who reaches the lower end of its interval is *within* it. How far one is *behind* the first is the mean
   difference over the same networks.
2. In removal the photographs are drawn again, those of the concept and the others each on their own, the same draw
   for all methods, so that differences are paired.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from math import comb
from typing import Any

import torch
from torch import Tensor

from fidelity.store import Entry

DRAWS, LEVEL = 2000, 0.95
MOST = "most"
PLACES = 9  # decimals from which on two means are one: sums in another order differ beyond

Falls = tuple[Tensor, Tensor]  # of the concept's photographs and of the others: right before minus right after


def interval(values: Sequence[float], draws: int = DRAWS) -> Entry | None:
    """Mean of some numbers, and the ends of its bootstrap interval."""
    if not values:
        return None
    sample = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(sample), (draws, len(sample)), generator=torch.Generator().manual_seed(0))
    return _with_ends(sample.mean(), sample[picks].mean(1)) | {"n": len(values)}


def _with_ends(value: Tensor, drawn: Tensor) -> Entry:
    ends = torch.quantile(drawn, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return dict(zip(("value", "low", "high"), (round(each, PLACES) for each in (float(value), *ends)), strict=True))


def standings(values: Mapping[str, Mapping[str, float]]) -> dict[str, Entry]:
    """Method → mean, interval and mark, from method → cell → number.

    Only who has a number in every cell can be first or within: on fewer, easier cells a mean says less.
    """
    cells = {cell for of_method in values.values() for cell in of_method}
    found = {
        method: {**interval([of_method[cell] for cell in sorted(of_method)]), "mark": ""}
        for method, of_method in values.items()
        if of_method
    }
    whole = [method for method in found if set(values[method]) == cells]
    if whole:
        leader = max(whole, key=lambda method: found[method]["value"])
        first = found[leader]
        for method in whole:
            value = found[method]["value"]
            found[method]["mark"] = "first" if value == first["value"] else "within" if value >= first["low"] else ""
            found[method]["behind"] = interval([values[method][cell] - values[leader][cell] for cell in sorted(cells)])
    return found


def by_family(entries: Iterable[Entry], number: Callable[[Entry], float | None]) -> dict[str, dict[str, Entry]]:
    """Family → method → standing of one number of the cells of planted networks."""
    values: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for entry in entries:
        found = number(entry)
        if found is not None:
            values[entry["family"]][entry["method"]][f"{entry['network']} {entry['size']} {entry['seed']}"] = found
    return {family: standings(of_family) for family, of_family in values.items()}


def of(entry: Entry, *path: str) -> Any:
    """What lies along a path of keys, or None where it ends early."""
    value: Any = entry
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


# ------------------------------------------------------------------ removal


def pooled(folds: Sequence[Entry], ablation: str, size: str) -> Falls:
    """Falls of all photographs of all folds."""
    return tuple(
        torch.cat([_digits(fold["full"][which]) - _digits(fold["after"][ablation][size][which]) for fold in folds])
        for which in ("concept", "others")
    )  # type: ignore[return-value]


def _digits(text: str) -> Tensor:
    return torch.tensor([int(digit) for digit in text], dtype=torch.float64)


def accuracy(folds: Sequence[Entry], ablation: str | None = None, size: str | None = None) -> dict[str, float]:
    """Share of right answers, of the concept's photographs and of the others, whole or after a removal."""
    parts = [fold["full"] if ablation is None else fold["after"][ablation][size] for fold in folds]
    return {which: _digits("".join(part[which] for part in parts)).mean().item() for which in ("concept", "others")}


def selectivities(
    falls: Mapping[str, Falls], against: str, draws: int = DRAWS
) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """Method → fall of the concept minus fall of the others, and the same less that of `against`; and all draws.

    ``apart`` is whether its interval lies wholly above that of `against`.
    """
    picks = [
        torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(place))
        for place, n in enumerate(len(part) for part in next(iter(falls.values())))
    ]
    drawn = {method: mine[picks[0]].mean(1) - others[picks[1]].mean(1) for method, (mine, others) in falls.items()}
    values = {method: mine.mean() - others.mean() for method, (mine, others) in falls.items()}
    return compared(values, drawn, against), drawn


def needed(n: int, right: int, above: float, decimals: int) -> int | None:
    """How many of a concept's `n` photographs a removal must take, and nothing of others', for its interval to lie
    `above` a number that is known to some decimals; None where all that were answered `right` are too few.

    How many of n drawn photographs are lost ones is binomial: its quantile is where the bootstrap tends to.
    """

    def enough(lost: int) -> bool:
        chances = accumulate(comb(n, k) * lost**k * (n - lost) ** (n - k) / n**n for k in range(n + 1))
        least = next(k for k, chance in enumerate(chances) if chance >= (1 - LEVEL) / 2)
        return round(least / n, decimals) > above

    least = bisect_left(range(right + 1), True, key=enough)
    return least if least <= right else None


def compared(values: Mapping[str, Tensor], drawn: Mapping[str, Tensor], against: str) -> dict[str, Entry]:
    """Each method's number with its interval, and where `against` is among them the difference from it."""
    found = {method: _with_ends(values[method], drawn[method]) for method in values}
    if against not in found:
        return found
    for method, entry in found.items():
        entry["apart"] = entry["low"] > found[against]["high"]
        entry["difference"] = _with_ends(values[method] - values[against], drawn[method] - drawn[against])
    return found


def of_concept(cells: Iterable[Entry], against: str) -> Entry:
    """One concept in one network: accuracy untouched, and selectivity by ablation, size and method.

    ``most``: the same for a removal that takes every right answer of the concept and none of the others.
    """
    folds = defaultdict(list)
    for cell in cells:
        if "full" in cell:
            folds[cell["method"]].append(cell)
    if not folds:
        return {}
    most = max(len(each) for each in folds.values())
    whole = {
        method: sorted(each, key=lambda cell: str(cell["fold"])) for method, each in folds.items() if len(each) == most
    }
    first = next(iter(whole.values()))
    counts = {which: sum(len(cell["full"][which]) for cell in first) for which in ("concept", "others")}
    found: Entry = {"accuracy": accuracy(first), "n": counts, "after": {}, MOST: {}}
    perfect = (_digits("".join(cell["full"]["concept"] for cell in first)), torch.zeros(counts["others"]).double())
    drawn = {}
    for ablation, sizes in first[0]["after"].items():
        found["after"][ablation], found[MOST][ablation] = {}, {}
        for size in sizes:
            falls = {method: pooled(each, ablation, size) for method, each in whole.items()}
            entry, draws = selectivities(falls, against)
            for method, each in whole.items():
                entry[method]["accuracy"] = accuracy(each, ablation, size)
            found["after"][ablation][size] = entry
            if against in falls:
                found[MOST][ablation][size] = selectivities({against: falls[against], MOST: perfect}, against)[0][MOST]
            drawn[ablation, size] = draws
    return {**found, "draws": drawn}


def over_concepts(concepts: Sequence[Entry], against: str) -> dict[str, dict[str, dict[str, Entry]]]:
    """Ablation → size → method → mean over concepts, from what `of_concept` gives; drawn in each on its own."""
    found: dict[str, dict[str, dict[str, Entry]]] = {}
    for ablation, sizes in concepts[0]["after"].items():
        found[ablation] = {}
        for size in sizes:
            both = [(each["after"][ablation][size], each["draws"][ablation, size]) for each in concepts]
            methods = [method for method in both[0][0] if all(method in entry for entry, _ in both)]
            values = {
                method: torch.tensor([entry[method]["value"] for entry, _ in both], dtype=torch.float64).mean()
                for method in methods
            }
            # a draw of one concept has nothing to do with that of another: shuffled, they do not rise together
            orders = [_order(place, len(next(iter(draws.values())))) for place, (_, draws) in enumerate(both)]
            drawn = {
                method: torch.stack(
                    [draws[method][order] for order, (_, draws) in zip(orders, both, strict=True)]
                ).mean(0)
                for method in methods
            }
            found[ablation][size] = compared(values, drawn, against)
    return found


def _order(seed: int, n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def flips(concept: Entry, method: str, size: str) -> bool:
    """Whether a method is above `against` under one ablation and below under another, both beyond chance."""
    signs = set()
    for sizes in concept["after"].values():
        difference = of(sizes, size, method, "difference")
        if difference and (difference["low"] > 0 or difference["high"] < 0):
            signs.add(difference["low"] > 0)
    return len(signs) == 2
