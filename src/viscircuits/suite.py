"""Everything that can be asked of a circuit, in one run, beside controls and under several ablations.

1. *Beside*: circuits of the same size (`viscircuits.contenders`).
2. *Run*: each batch passes once through every condition (`viscircuits.trials`): circuits and parts of them
   removed, circuits alone kept at their own size and at the ten sizes of MIB, everything removed, edges
   pruned; all of that under each ablation. Some units are removed one at a time.
3. *Sum up*: selectivity and its area, faithfulness, completeness, minimality, CPR, CMD, agreement of scores
   with exact ablation, transfer to other images, each with an interval; overlaps; stability.
4. *Judge* (`viscircuits.verdicts`): does the circuit beat each control, and does that depend on the ablation?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from viscircuits.ablation import Statistics
from viscircuits.attribution import Images
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.confidence import confidence
from viscircuits.contenders import OUTSIDE, at_size, contenders
from viscircuits.errors import ViscircuitsError
from viscircuits.evaluation import (
    FULL_VERSION,
    SCHEMA,
    VERSION,
    Evaluation,
    Report,
    check_options,
    conditions_of,
    edge_orders,
    is_kept,
    key_of,
    keys_of,
    layers_of,
    remover,
    statistics_of,
    summed_up,
)
from viscircuits.matrices import Attributions
from viscircuits.metrics import (
    MIB_FRACTIONS,
    bootstrap,
    minimality,
    overlap,
    overlap_together,
    pearson,
    spearman,
)
from viscircuits.models import ModelSpec, as_spec
from viscircuits.scores.controls import UnitScores
from viscircuits.trials import (
    BASELINE,
    ClassOf,
    Key,
    LabelSource,
    Opener,
    Outcomes,
    find_labels,
    measured_smoothly,
    run_trials,
    used_to_find,
)
from viscircuits.verdicts import Drawn, figures, flips, interval, share_left, verdicts

N_AGREEMENT = 200  # draws of units for the interval of an agreement
N_SIZED = 2  # random circuits that are followed over MIB's sizes
N_REDRAWN = 20  # draws of single images' attributions, where those were kept
SMOOTH = ("log-probability", "cosine")  # what ratios are taken of: the first that there is

Found = tuple[Images, Images | None]  # images with and without the concept
Ran = tuple[Outcomes, dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """What is compared, and how the network is run.

    Parameters
    ----------
    spec
        The network.
    circuits
        Name → circuits, several where they are drawn at random; ``circuit`` is the one in question.
    scores
        Name → layer → one score for every unit, for those that score all units.
    edges
        The circuit's edges in the orders they are pruned in.
    statistics
        Of the reference.
    ablations
        What a removed value becomes, in turn.
    unit_fractions, edge_fractions
        Of the curves.
    """

    spec: ModelSpec
    circuits: Mapping[str, Sequence[Circuit]]
    scores: Mapping[str, UnitScores]
    edges: Mapping[str, Sequence[Edge]]
    statistics: Statistics
    ablations: tuple[str, ...]
    unit_fractions: tuple[float, ...]
    edge_fractions: tuple[float, ...]
    batch_size: int
    seed: int
    progress: bool

    @property
    def circuit(self) -> Circuit:
        """The circuit in question."""
        return self.circuits["circuit"][0]

    @cached_property
    def comparable(self) -> set[str]:
        """Names of those that lie in the circuit's own layers: only of these can the rest be removed alike."""
        layers = set(self.circuit.layers)
        return {name for name, drawn in self.circuits.items() if all(set(each.layers) == layers for each in drawn)}

    @cached_property
    def used(self) -> set[str]:
        """Digests of the images that found any of them."""
        return set().union(*(used_to_find(each.provenance) for drawn in self.circuits.values() for each in drawn))

    @property
    def curved(self) -> dict[str, Sequence[Circuit]]:
        """Those whose parts are removed as well: all but the many random ones outside the circuit."""
        return {name: drawn for name, drawn in self.circuits.items() if name != OUTSIDE}

    def edges_under(self, ablation: str) -> Mapping[str, Sequence[Edge]]:
        """The edges pruned under an ablation: none but under the first."""
        return self.edges if ablation == self.ablations[0] else {}

    @property
    def x(self) -> list[float]:
        """The fractions of a circuit that are removed, from 0 to 1."""
        return [0.0, *sorted(float(fraction) for fraction in {*self.unit_fractions, 1.0})]

    def remover(self, ablation: str) -> Callable[..., Opener]:
        """A function that turns a circuit into the condition in which it is removed."""
        return remover(self.spec, ablation, self.statistics, self.seed)

    def run(
        self, images: Images, conditions: Mapping[Key, Opener], class_of: ClassOf | None, what: str, **how: Any
    ) -> Ran:
        """`run_trials` of this network, without the images that found a circuit unless `how` says otherwise."""
        how = {"used": self.used, "layers": layers_of(self.circuits), **how}
        return run_trials(
            self.spec, images, conditions, class_of, measure=measured_smoothly, batch_size=self.batch_size, what=what,
            progress=self.progress, **how,
        )  # fmt: skip


def evaluate_fully(
    model: nn.Module | ModelSpec,
    circuit: Circuit,
    concept: Images,
    others: Images | None = None,
    *,
    attributions: Attributions | None = None,
    unit_scores: UnitScores | None = None,
    rivals: Mapping[str, Circuit] | None = None,
    labels: LabelSource | None = "auto",
    ablations: Sequence[str] = ("zero",),
    reference: Statistics | Images | None = None,
    transfer: Found | None = None,
    found_with: Found | None = None,
    draws: int = 5,
    unit_fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    edge_fractions: Sequence[float] = (0.5, 1.0),
    checked_units: int = 64,
    checked_images: int = 16,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measure everything that is known to measure of a circuit, under each of several ablations.

    Parameters
    ----------
    model, circuit, concept, others, rivals, labels, reference, draws, batch_size, progress
        As for `evaluate`.
    unit_fractions, edge_fractions
        As for `evaluate`. Edges are pruned under the first ablation alone: of all conditions it is the slowest.
    attributions
        What the circuit was selected from. Without it there are fewer controls, and unless `unit_scores` are
        given no ranking of all units, on which CPR, CMD and the agreement with exact ablation rest.
    unit_scores
        Layer → one score for every unit, if the circuit was not chosen by attribution (``Finding.units``).
    ablations
        What a removed value becomes, in turn; the first is the one that `Evaluation.data` shows outermost.
    transfer
        Other images with and without the concept, to test on as well; without others here's are taken.
    found_with
        The images that the circuit was found with: how much better it fares on them, and the gradient control.
    checked_units
        How many units, drawn from all of the circuit's layers, and how many drawn from the circuit, are
        removed one at a time; 0 for none.
    checked_images
        On how many of the concept's images.
    seed
        Of the draws of circuits, units and images, and of the bootstrap.

    Returns
    -------
    Evaluation
        What `evaluate` gives under the first ablation, and `data`'s entry ``full``: see docs/evaluation.md.

    Raises
    ------
    ImageError
        If a set is empty.
    ViscircuitsError
        As `evaluate`.

    References
    ----------
    Wang et al. 2022, arXiv:2211.00593 (minimality); Marks et al. 2024, arXiv:2403.19647 (faithfulness,
    completeness); Mueller et al. 2025, arXiv:2504.13151 (CPR, CMD).
    """
    spec, ablations = as_spec(model), tuple(dict.fromkeys(ablations))
    _check(ablations, checked_units, checked_images)
    for ablation in ablations:
        check_options(ablation, reference, draws, (*unit_fractions, *edge_fractions), (concept, others))
    circuits, scores = contenders(
        spec, circuit, concept, attributions=attributions, unit_scores=unit_scores, rivals=rivals,
        found_with=found_with and found_with[0], draws=draws, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    setting = Setting(
        spec, circuits, scores, edge_orders(circuit, None, seed) if edge_fractions else {},
        statistics_of(spec, layers_of(circuits), concept, reference, batch_size, progress), ablations,
        tuple(unit_fractions), tuple(sorted(edge_fractions)), batch_size, seed, progress,
    )  # fmt: skip
    sets = {"concept": concept} if others is None else {"concept": concept, "others": others}
    class_of = find_labels(spec, sets.values(), labels)
    ran = {what: _run(setting, images, class_of, what) for what, images in sets.items()}
    checked = _remove_alone(setting, concept, class_of, ran["concept"][1]["n"], checked_units, checked_images)
    there = _elsewhere(setting, ran, class_of, labels, transfer, found_with)
    parts = {ablation: _under(setting, ablation, ran, checked, there) for ablation in ablations}
    return Evaluation(
        {
            "schema": SCHEMA,
            "version": VERSION,
            "level": 0.95,
            "seed": seed,
            "labelled": class_of is not None,
            "images": {what: described for what, (_, described) in ran.items()},
            **parts[ablations[0]]["removed"],
            "full": {
                "version": FULL_VERSION,
                "smooth": _smooth(ran["concept"][0]),
                "fractions": list(MIB_FRACTIONS),
                "n_units": _sizes(setting),
                "checked": checked.described,
                "by_ablation": parts,
                "flips": flips({ablation: part["verdicts"] for ablation, part in parts.items()}),
                "overlap": _overlaps(setting),
                "stability": stability_of(circuit, attributions, seed),
            },
        }
    )


def _check(ablations: Sequence[str], checked_units: int, checked_images: int) -> None:
    if not ablations:
        raise ViscircuitsError("name at least one ablation, such as ablations=('zero', 'mean')")
    if checked_units < 0 or checked_images < 1:
        raise ViscircuitsError(
            f"units are checked from 0 on, on 1 image or more; got {checked_units} units on {checked_images} images"
        )


# ------------------------------------------------------------------ conditions


def _run(setting: Setting, images: Images, class_of: ClassOf | None, what: str) -> Ran:
    """Everything that is done on a set of images."""
    removed, pruned, kept = _conditions(setting)
    outcomes, described = setting.run(images, {**removed, **kept} if what == "concept" else removed, class_of, what)
    if pruned:  # the passes that pruning makes for one pass look at the whole network
        outcomes.update(setting.run(images, pruned, class_of, f"{what}, edges", layers=())[0])
    return outcomes, described


def _conditions(setting: Setting) -> tuple[dict[Key, Opener], dict[Key, Opener], dict[Key, Opener]]:
    """What is removed on every set of images, what edges pruned, what kept on the concept's alone, by ablation."""
    everywhere: dict[Key, Opener] = {}
    edges: dict[Key, Opener] = {}
    concept: dict[Key, Opener] = {}
    for ablation in setting.ablations:
        found = conditions_of(
            setting.spec, setting.circuit, setting.curved, setting.edges_under(ablation), setting.unit_fractions,
            setting.edge_fractions, ablation, setting.statistics, setting.seed,
        )  # fmt: skip
        removing = setting.remover(ablation)
        found = {**_whole(setting, removing), **found}
        for key, opener in found.items():
            where = edges if key[0] == "edges" else concept if is_kept(key) else everywhere
            where[_beneath(ablation, key)] = opener
        for name in sorted(setting.comparable):
            for draw, each in enumerate(setting.circuits[name]):
                concept[ablation, "kept", name, str(draw)] = removing(each, keep=True)
                for fraction in MIB_FRACTIONS[:-1] if name in setting.scores and draw < N_SIZED else ():
                    part = at_size(each, setting.scores[name], fraction)
                    concept[ablation, "size", name, str(draw), str(fraction)] = removing(part, keep=True)
    return everywhere, edges, concept


def _kept_keys(name: str, drawn: Sequence[Circuit]) -> list[Key]:
    return [("kept", name, str(draw)) for draw in range(len(drawn))]


def _size_keys(name: str, drawn: Sequence[Circuit]) -> list[list[Key]]:
    """The conditions at each of MIB's sizes; at the last one everything is kept."""
    draws = range(min(len(drawn), N_SIZED))
    smaller: list[list[Key]] = [
        [("size", name, str(draw), str(fraction)) for draw in draws] for fraction in MIB_FRACTIONS[:-1]
    ]
    return [*smaller, [(BASELINE,) for _ in draws]]


def _sizes(setting: Setting) -> list[int] | None:
    """How many units the ranking keeps at each of MIB's sizes."""
    if "circuit" not in setting.scores:
        return None
    return [at_size(setting.circuit, setting.scores["circuit"], fraction).n_units for fraction in MIB_FRACTIONS]


def _beneath(ablation: str, key: Key) -> Key:
    """The key that a condition has among those of all ablations."""
    return (ablation, *key)


def _of(ablation: str, outcomes: Outcomes) -> Outcomes:
    """The outcomes under one ablation, by the keys they have there."""
    return {key[1:]: measures for key, measures in outcomes.items() if key[0] == ablation}


def _smooth(outcomes: Outcomes) -> str:
    known = next(iter(outcomes.values()))
    return next(measure for measure in SMOOTH if measure in known)


# ------------------------------------------------------------------ units removed one at a time


@dataclass(frozen=True)
class _Alone:
    """Units that were removed one at a time: which, and what images did without each."""

    anywhere: tuple[Unit, ...]
    inside: tuple[Unit, ...]
    outcomes: Outcomes
    described: dict[str, Any]


def _remove_alone(
    setting: Setting, concept: Images, class_of: ClassOf | None, n: int, n_units: int, n_images: int
) -> _Alone:
    """Remove some units of all layers, and some of the circuit, one at a time on some of the concept's images."""
    generator = torch.Generator().manual_seed(setting.seed)
    circuit = setting.circuit
    anywhere = _some(list(circuit | circuit.complement()), n_units, generator)
    inside = _some(list(circuit), n_units, generator)
    only = set(torch.randperm(n, generator=generator)[:n_images].tolist())
    described = {"anywhere": len(anywhere), "inside": len(inside), "n_images": len(only)}
    if not inside:
        return _Alone((), (), {}, described)
    conditions: dict[Key, Opener] = {}
    for ablation in setting.ablations:
        removing = setting.remover(ablation)
        conditions[ablation, BASELINE] = removing(circuit)  # never opened
        for unit in {*anywhere, *inside}:
            alone = Circuit({unit.layer: (unit.index,)}, circuit.widths)
            conditions[ablation, "unit", str(unit)] = removing(alone)
    outcomes, _ = setting.run(concept, conditions, class_of, "single units", only=only)
    return _Alone(anywhere, inside, outcomes, described)


def _some(units: Sequence[Unit], n: int, generator: torch.Generator) -> tuple[Unit, ...]:
    return tuple(units[i] for i in sorted(torch.randperm(len(units), generator=generator)[:n].tolist()))


def _effects(alone: _Alone, units: Sequence[Unit], ablation: str, smooth: str, seed: int) -> Tensor:
    """Fall of the behaviour without each unit: of the images as they are, then of every draw."""
    drawn = Drawn({"concept": _of(ablation, alone.outcomes)}, seed)
    without = drawn.mean("concept", [("unit", str(unit)) for unit in units], smooth)
    return drawn.mean("concept", [(BASELINE,)], smooth) - without  # (draw, unit)


def _agreement(scores: Tensor, effects: Tensor, seed: int) -> dict[str, Any] | None:
    """Correlations of a score with the size of the exact effect, with intervals over the units.

    None where they have no meaning: all scores or all effects are equal.
    """
    exact, scores = effects.abs().double(), scores.double()
    found = {}
    for name, statistic in (("spearman", spearman), ("pearson", pearson)):
        try:
            whole = statistic(scores, exact)
        except ViscircuitsError:
            return None

        def of_draw(*drawn: Tensor, statistic: Callable = statistic, whole: float = whole) -> float:
            try:
                return statistic(*drawn)
            except ViscircuitsError:  # the same unit again and again
                return whole

        generator = torch.Generator().manual_seed(seed)
        found[name] = asdict(bootstrap(of_draw, scores, exact, paired=True, draws=N_AGREEMENT, generator=generator))
    return found


def _scores_at(scores: UnitScores, units: Sequence[Unit]) -> Tensor:
    return torch.stack([scores[unit.layer][unit.index].double().cpu() for unit in units])


def _minimality(setting: Setting, alone: _Alone, ablation: str, smooth: str) -> dict[str, Any]:
    """The least that a unit of the circuit does, and how many units do anything that is sure."""
    outcomes = _of(ablation, alone.outcomes)
    without = torch.stack([outcomes["unit", str(unit)][smooth] for unit in alone.inside])
    effects = _effects(alone, alone.inside, ablation, smooth, setting.seed)
    outside = [unit for unit in alone.anywhere if unit not in setting.circuit]
    least = interval(effects.abs().amin(1))
    of_outside = _effects(alone, outside, ablation, smooth, setting.seed) if outside else None
    return {
        **(least or {}),
        "value": minimality(outcomes[BASELINE,][smooth], without),
        "unit": str(alone.inside[int(effects[0].abs().argmin())]),
        "n_units": len(alone.inside),
        "of": setting.circuit.n_units,
        "median": {
            "circuit": float(effects[0].abs().median()),
            "outside": None if of_outside is None else float(of_outside[0].abs().median()),
        },
        "felt": {"circuit": _felt(effects), "outside": None if of_outside is None else _felt(of_outside)},
    }


def _felt(effects: Tensor) -> float:
    """Share of the units whose effect has an interval without 0."""
    intervals = [interval(effects[:, i]) or {} for i in range(effects.shape[1])]
    return sum(each["low"] > 0 or each["high"] < 0 for each in intervals) / len(intervals)


# ------------------------------------------------------------------ other images


def _elsewhere(
    setting: Setting,
    here: Mapping[str, Ran],
    class_of: ClassOf | None,
    labels: LabelSource | None,
    transfer: Found | None,
    found_with: Found | None,
) -> dict[str, dict[str, Ran] | str]:
    """What circuits do on other images: name → outcomes of its sets, or why there are none."""
    found: dict[str, dict[str, Ran] | str] = {}
    for name, sets in (("the images given for transfer", transfer), ("the images it was found with", found_with)):
        if sets is None:
            continue
        if "others" not in here:
            found[name] = "without other images there is no selectivity"
            continue
        given = {what: images for what, images in zip(("concept", "others"), sets, strict=True) if images is not None}
        theirs = find_labels(setting.spec, given.values(), labels) if labels in ("auto", None) else class_of
        if (theirs is None) != (class_of is None):
            found[name] = "only one of the two sets of images has labels"
            continue
        used = setting.used if sets is transfer else ()
        conditions: dict[Key, Opener] = {}
        for ablation in setting.ablations:
            removing = setting.remover(ablation)
            whole = {(BASELINE,): removing(setting.circuit), **_whole(setting, removing)}  # the first is never opened
            conditions.update({_beneath(ablation, key): opener for key, opener in whole.items()})
        ran = {
            what: setting.run(images, conditions, theirs, f"{what}, {name}", used=used)
            for what, images in given.items()
        }
        found[name] = {"concept": ran["concept"], "others": ran.get("others", here["others"])}
    return found


def _whole(setting: Setting, removing: Callable[..., Opener]) -> dict[Key, Opener]:
    """Each circuit removed as a whole."""
    return {
        key_of(name, draw, 1.0): removing(each)
        for name, drawn in setting.circuits.items()
        for draw, each in enumerate(drawn)
    }


def _transfer(
    setting: Setting, ablation: str, here: Drawn, there: Mapping[str, dict[str, Ran] | str], measure: str
) -> list[dict[str, Any]]:
    """Selectivity on other images, for each circuit, and how much more it is than here."""
    found: list[dict[str, Any]] = []
    for images, sets in there.items():
        if isinstance(sets, str):
            found.append({"images": images, "why": sets})
            continue
        drawn = Drawn({what: _of(ablation, outcomes) for what, (outcomes, _) in sets.items()}, setting.seed + 1)
        rows = []
        for name, circuits in setting.circuits.items():
            keys = keys_of(name, circuits, 1.0)
            own, other = (each.over_circuits(each.selectivity(keys, measure)) for each in (here, drawn))
            rows.append({"name": name, "selectivity": interval(other), "difference": interval(other - own)})
        described = {what: {"n": about["n"], "left_out": about["left_out"]} for what, (_, about) in sets.items()}
        found.append({"images": images, "n": described, "rows": rows})
    return found


# ------------------------------------------------------------------ summing up


def _under(
    setting: Setting,
    ablation: str,
    ran: Mapping[str, Ran],
    alone: _Alone,
    there: Mapping[str, dict[str, Ran] | str],
) -> dict[str, Any]:
    """Everything measured under one ablation."""
    outcomes = {what: _of(ablation, found) for what, (found, _) in ran.items()}
    report, drawn = Report(outcomes, setting.seed), Drawn(outcomes, setting.seed)
    smooth = _smooth(outcomes["concept"])
    found = {name: _figures(setting, drawn, name, report.measure, smooth) for name in setting.circuits}
    return {
        "removed": summed_up(
            report,
            ablation,
            setting.circuits,
            setting.edges_under(ablation),
            setting.unit_fractions,
            setting.edge_fractions,
            curved=setting.curved,
        ),
        "rows": [_row(setting, drawn, name, figures_, alone, ablation, smooth) for name, figures_ in found.items()],
        "empty": {measure: interval(row[:, 0]) for measure, row in _empty(drawn).items()},
        "minimality": _minimality(setting, alone, ablation, smooth) if alone.inside else None,
        "verdicts": verdicts(found),
        "transfer": _transfer(setting, ablation, drawn, there, report.measure),
    }


def _empty(drawn: Drawn) -> dict[str, Tensor]:
    """What the concept's images do with everything removed: the 0 of faithfulness."""
    measures = drawn.outcomes["concept"][BASELINE,]
    return {measure: drawn.mean("concept", [("empty",)], measure) for measure in measures}


def _figures(setting: Setting, drawn: Drawn, name: str, measure: str, smooth: str) -> dict[str, Any]:
    circuits = setting.circuits[name]
    comparable = name in setting.comparable
    ranked = comparable and name in setting.scores
    x = setting.x if name in setting.curved else [0.0, 1.0]
    return figures(
        drawn, measure, smooth,
        removed=[[(BASELINE,)], *(keys_of(name, circuits, fraction) for fraction in x[1:])],
        kept=_kept_keys(name, circuits) if comparable else None,
        sizes=_size_keys(name, circuits) if ranked else None,
        x=x,
    )  # fmt: skip


def _row(
    setting: Setting,
    drawn: Drawn,
    name: str,
    found: Mapping[str, Any],
    alone: _Alone,
    ablation: str,
    smooth: str,
) -> dict[str, Any]:
    """One circuit, or several random ones, as plain numbers with intervals."""
    circuits = setting.circuits[name]
    comparable, ranked = name in setting.comparable, name in setting.scores
    measures = list(drawn.outcomes["concept"][BASELINE,]) if comparable else []
    row: dict[str, Any] = {
        "name": name,
        "draws": len(circuits),
        "n_units": circuits[0].n_units,
        **{statistic: interval(found[statistic]) for statistic in ("selectivity", "area", "cpr", "cmd")},
        "agreement": None,
    }
    for statistic, keys in (
        ("faithfulness", _kept_keys(name, circuits)),
        ("completeness", keys_of(name, circuits, 1.0)),
    ):
        row[statistic] = {measure: interval(share_left(drawn, keys, measure)) for measure in measures}
    if comparable and ranked:
        shares = [share_left(drawn, keys, smooth) for keys in _size_keys(name, circuits)]
        row["faithfulness_by_size"] = [interval(share) for share in shares]
    if ranked and alone.inside:
        effects = _effects(alone, alone.anywhere, ablation, smooth, setting.seed)[0]
        row["agreement"] = _agreement(_scores_at(setting.scores[name], alone.anywhere), effects, setting.seed)
    if name == "circuit" and alone.inside and setting.circuit.scores:
        effects = _effects(alone, alone.inside, ablation, smooth, setting.seed)[0]
        own = dict(zip(setting.circuit, _flat(setting.circuit.scores), strict=True))
        scores = torch.tensor([own[unit] for unit in alone.inside], dtype=torch.float64)
        row["agreement_inside"] = _agreement(scores, effects, setting.seed)
    return row


def _flat(scores: Mapping[str, Sequence[float]]) -> list[float]:
    return [score for of_layer in scores.values() for score in of_layer]


def _overlaps(setting: Setting) -> list[dict[str, Any]]:
    """How many units the circuit shares with each other one, beside chance; of random ones the mean."""
    found = []
    for name, drawn in setting.circuits.items():
        if name == "circuit" or not set(setting.circuit.layers) & set(drawn[0].layers):
            continue
        by_layer = [overlap(setting.circuit, each) for each in drawn]
        pooled = [overlap_together(layers) for layers in by_layer]
        found.append(
            {
                "name": name,
                "jaccard": sum(each.jaccard for each in pooled) / len(pooled),
                "chance": pooled[0].chance,
                "p_value": pooled[0].p_value if len(drawn) == 1 else None,
                "layers": [asdict(layer) for layer in by_layer[0]] if len(drawn) == 1 else None,
            }
        )
    return found


def stability_of(circuit: Circuit, attributions: Attributions | None, seed: int = 0) -> dict[str, Any]:
    """How often each unit of the circuit is chosen over bootstrap draws of the images, or why that is unknown.

    The circuit may carry it already (`viscircuits.confidence`); else it is taken from the draws that the
    attributions hold, or from their single images, where these were kept.
    """
    source = "the draws it was discovered with"
    if not circuit.chosen:
        drawn = _with_draws(attributions, seed)
        if drawn is None:
            return {"known": False, "why": "no draws of the images were kept; discover with --bootstrap 20"}
        if drawn.layers != circuit.layers or not {"refine", "k", "absolute"} <= set(circuit.selection):
            return {"known": False, "why": "the circuit was not selected from these attributions"}
        asked = confidence(drawn, circuit, circuit.provenance.get("contrast", "none"))
        summary = asked.summary()
        circuit = replace(asked.circuit, selection={**circuit.selection, "confidence": summary})
        source = "the draws of the attributions" if drawn is attributions else "single images, drawn anew"
    said = circuit.selection.get("confidence", {})
    shares = _flat(circuit.chosen)
    alike = overlap_together(overlap(circuit, circuit))
    return {
        "known": True,
        "from": source,
        "draws": said.get("draws"),
        "overlap": said.get("overlap"),
        "chance": alike.chance,
        "n_units": len(shares),
        "unsure": sum(share < 0.5 for share in shares),
        "units": {layer: list(each) for layer, each in circuit.chosen.items()},
    }


def _with_draws(attributions: Attributions | None, seed: int) -> Attributions | None:
    """The attributions with bootstrap draws: their own, or of their single images."""
    if attributions is None or attributions.n_draws:
        return attributions
    matrices = []
    generator = torch.Generator().manual_seed(seed)
    counts: Tensor | None = None
    for matrix in attributions.matrices:
        if matrix.per_image is None:
            return None
        n = len(matrix.per_image)
        if counts is None:  # the same images in every pair of layers
            picks = torch.randint(n, (N_REDRAWN, n), generator=generator)
            counts = torch.zeros(N_REDRAWN, n).scatter_add_(1, picks, torch.ones(N_REDRAWN, n))
        draws = torch.einsum("di,its->dts", counts / n, matrix.per_image.float().cpu())
        matrices.append(replace(matrix, draws=draws))
    reference = attributions.reference
    if reference is not None:
        reference = _with_draws(reference, seed + 1)
        if reference is None:
            return None
    return replace(attributions, matrices=tuple(matrices), reference=reference)
