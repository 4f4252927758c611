"""What a circuit does, beside what its controls do, on images that were not used to find it.

1. Conditions: the untouched network; the circuit removed; control circuits of the same size per
   layer removed (random draws, most active, most raised over the reference, largest weights);
   the same for parts of each circuit; everything but the circuit, or but a part of it, or but a random
   circuit of that size removed; everything removed;
   the circuit's edges between two layers removed, a fraction at a time, by score and in random
   order.
2. Each batch of images runs under every condition and is forgotten; kept is one number per image,
   condition and measure.
3. Means, falls and selectivity with intervals over images: Wilson's for a share of images, the
   bootstrap's for everything else.

The measure is accuracy where labels are known, agreement with the untouched network's answer
where they are not, and cosine similarity for a network that gives embeddings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from viscircuits import tables
from viscircuits.ablation import ABLATIONS, Statistics, ablate, describe_layers, measure, prune_edges
from viscircuits.attribution import Images
from viscircuits.circuit import Circuit, Edge
from viscircuits.errors import FileFormatError, ImageError, ViscircuitsError
from viscircuits.files import write_atomically
from viscircuits.images import batches
from viscircuits.matrices import Attributions
from viscircuits.metrics import Interval, bootstrap, faithfulness, share_interval
from viscircuits.models import ModelSpec, as_spec
from viscircuits.scores.controls import CONTROLS
from viscircuits.scores.formulas import choose
from viscircuits.selection import random_like, same_size, shrink
from viscircuits.tracing import trace
from viscircuits.trials import (
    BASELINE,
    Key,
    LabelSource,
    Measures,
    Opener,
    Outcomes,
    find_labels,
    run_trials,
    used_to_find,
)

SCHEMA = "viscircuits/evaluation"
VERSION = 1
FULL_VERSION = 1  # of what the full suite adds (`viscircuits.suite`)
N_BOOTSTRAP = 1000
N_KEPT = 3  # random circuits that are kept alone at each size


@dataclass(frozen=True)
class Evaluation:
    """What was measured, as plain numbers; `data` is what is saved and what the page shows."""

    data: Mapping[str, Any]

    @property
    def selectivity(self) -> Interval | None:
        """Fall of the concept minus fall of the others when the circuit is removed."""
        return self._interval(self.data["circuits"][0].get("selectivity"))

    @property
    def faithfulness(self) -> Interval | None:
        """Share of the behaviour that the circuit alone keeps."""
        return self._interval(self.data.get("faithfulness"))

    def table(self) -> str:
        """Everything that was measured, as text: the circuit and its controls, a row each."""
        return "\n".join(tables.lines_of(self.data))

    def under(self, ablation: str) -> Evaluation:
        """What was measured under one of the ablations of a full suite.

        Raises
        ------
        ViscircuitsError
            If this evaluation was not made under that ablation.
        """
        if ablation == self.data["ablation"]:
            return self
        by_ablation = self.data.get("full", {}).get("by_ablation", {self.data["ablation"]: {}})
        return Evaluation({**self.data, **choose(by_ablation, ablation, "measurement under ablation")["removed"]})

    def save(self, path: str | Path) -> Path:
        """Write the evaluation as JSON."""
        return write_atomically(Path(path), json.dumps(self.data, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read an evaluation from its file or from the result folder that holds it."""
        path = Path(path)
        path = path / "evaluation.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise FileFormatError(f"cannot read an evaluation from {str(path)!r}: {error}") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or data.get("version") != VERSION:
            raise FileFormatError(f"{str(path)!r} does not hold a viscircuits evaluation of version {VERSION}")
        full = data.get("full", {"version": FULL_VERSION})
        if not isinstance(full, dict) or full.get("version") != FULL_VERSION:
            raise FileFormatError(f"the full suite in {str(path)!r} is not of version {FULL_VERSION}; evaluate again")
        return cls(data)

    @staticmethod
    def _interval(entry: Mapping[str, float] | None) -> Interval | None:
        return Interval(**entry) if entry else None


def evaluate(
    model: nn.Module | ModelSpec,
    circuit: Circuit,
    concept: Images,
    others: Images | None = None,
    *,
    attributions: Attributions | None = None,
    rivals: Mapping[str, Circuit] | None = None,
    labels: LabelSource | None = "auto",
    ablation: str = "zero",
    reference: Statistics | Images | None = None,
    draws: int = 5,
    unit_fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    edge_fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    edge_layers: tuple[str, str] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Measure what removing the circuit does to the concept and to everything else.

    Parameters
    ----------
    model
        The network.
    circuit
        What `select` chose.
    concept, others
        Images with and without the concept. Any that were used to find the circuit are left out
        and counted.
    attributions
        What the circuit was selected from; needed for the activity controls, which are left out
        without it.
    rivals
        Other circuits, by name, to be removed in their turn and stand beside this one.
    labels
        Where each picture's class is read: ``auto`` from folder or file names if all of them
        name classes of the network, or a file of ``path,label`` lines, or a mapping; None for
        nowhere, and then the network's own answers are the standard.
    ablation
        What a removed value becomes.
    reference
        Reference statistics, or images to measure them on; needed by all ablations but ``zero``.
    draws
        How many random circuits.
    unit_fractions
        Parts of each circuit for the curve over units, 0 left out: each is removed, and of the circuit and up to
        three random ones also kept alone.
    edge_fractions
        Parts of the edges for the curve over edges, 0 left out; empty for no such curve.
    edge_layers
        The pair of layers whose edges are pruned; by default the circuit's first two.
    batch_size
        Images per forward pass.
    seed
        Of the random circuits, edge orders, drawn replacements and bootstrap.
    progress
        Show a progress bar.

    Raises
    ------
    ImageError
        If either set is empty.
    ViscircuitsError
        If the circuit belongs to another network or the ablation needs a reference.

    References
    ----------
    Rajaram et al. 2023, arXiv:2404.14349 (concept against others over the fraction pruned);
    Marks et al. 2024, arXiv:2403.19647 (faithfulness, completeness).
    """
    spec = as_spec(model)
    check_options(ablation, reference, draws, (*unit_fractions, *edge_fractions), (concept, others))
    edge_fractions = sorted(edge_fractions)
    circuits = with_controls(spec, circuit, attributions, concept, draws, seed)
    circuits.update({name: [rival] for name, rival in (rivals or {}).items()})
    statistics = statistics_of(spec, layers_of(circuits), concept, reference, batch_size, progress)
    edges = edge_orders(circuit, edge_layers, seed) if edge_fractions else {}
    conditions = conditions_of(
        spec, circuit, circuits, edges, unit_fractions, edge_fractions, ablation, statistics, seed
    )
    sets = {"concept": concept} if others is None else {"concept": concept, "others": others}
    class_of = find_labels(spec, sets.values(), labels)
    outcomes: dict[str, Outcomes] = {}
    described: dict[str, Any] = {}
    used = set().union(*(used_to_find(each.provenance) for drawn in circuits.values() for each in drawn))
    for name, images in sets.items():
        asked = {key: opener for key, opener in conditions.items() if name == "concept" or not is_kept(key)}
        outcomes[name], described[name] = run_trials(
            spec, images, asked, class_of, used=used, batch_size=batch_size, what=name, progress=progress
        )
    return Evaluation(
        {
            "schema": SCHEMA,
            "version": VERSION,
            "level": 0.95,
            "seed": seed,
            "labelled": class_of is not None,
            "images": described,
            **summed_up(Report(outcomes, seed), ablation, circuits, edges, unit_fractions, edge_fractions),
        }
    )


def summed_up(
    report: Report,
    ablation: str,
    circuits: Mapping[str, Sequence[Circuit]],
    edges: Mapping[str, Sequence[Edge]],
    unit_fractions: Sequence[float],
    edge_fractions: Sequence[float],
    curved: Mapping[str, Sequence[Circuit]] | None = None,
) -> dict[str, Any]:
    """The part of an evaluation's data that depends on the ablation; `curved` are the circuits with a curve."""
    return {
        "ablation": ablation,
        "measure": report.measure,
        "baseline": report.behaviour([(BASELINE,)]),
        "circuits": [
            {"name": name, "draws": len(drawn), "n_units": drawn[0].n_units, **report.fall(keys_of(name, drawn, 1.0))}
            for name, drawn in circuits.items()
        ],
        "faithfulness": report.ratio([("kept",)]),
        "completeness": report.ratio([key_of("circuit", 0, 1.0)]),
        "unit_curve": _unit_curve(report, circuits if curved is None else curved, unit_fractions),
        "edge_curve": _edge_curve(report, edges, edge_fractions),
    }


def check_options(
    ablation: str,
    reference: Statistics | Images | None,
    draws: int,
    fractions: Iterable[float],
    sets: Iterable[Images | None],
) -> None:
    """What can be known to be wrong before any image is read."""
    choose(ABLATIONS, ablation, "ablation")
    if ablation != "zero" and reference is None:
        raise ViscircuitsError(
            f"{ablation!r} ablation needs reference images (reference=…, --reference IMAGES), or use 'zero'"
        )
    if draws < 1:
        raise ViscircuitsError(f"at least one random circuit is needed as a control, got draws={draws}")
    outside = [fraction for fraction in fractions if not 0 < fraction <= 1]
    if outside:
        raise ViscircuitsError(f"the curves are over fractions above 0, up to 1; got {outside[0]}")
    if any(isinstance(images, Iterator) for images in sets):
        raise ImageError("these images can be read only once; give a list of tensors, one tensor or an image set")


# ------------------------------------------------------------------ conditions


def statistics_of(
    spec: ModelSpec,
    layers: Sequence[str],
    images: Images,
    reference: Statistics | Images | None,
    batch_size: int,
    progress: bool,
) -> Statistics:
    """The reference's statistics, or without a reference at least where the units lie."""
    if isinstance(reference, Statistics):
        return reference
    if reference is not None:
        return measure(spec, reference, layers, batch_size=batch_size, progress=progress)
    first = next(iter(batches(images, spec.transform, 1)), None)
    if first is None:
        raise ImageError("the concept set is empty: no image could be read")
    return Statistics({layer.address: layer for layer in describe_layers(spec, first.images, layers)})


def with_controls(
    spec: ModelSpec, circuit: Circuit, attributions: Attributions | None, images: Images, draws: int, seed: int
) -> dict[str, list[Circuit]]:
    """The circuit and each control of the same size per layer, by name; random has several draws."""
    circuits = {"circuit": [circuit]}
    generator = torch.Generator().manual_seed(seed)
    circuits["random"] = [random_like(circuit, generator=generator) for _ in range(draws)]
    if attributions is None:
        return circuits
    first = next(iter(batches(images, spec.transform, 1)))
    traced = trace(spec.model, first.images)
    for name, control in CONTROLS.items():
        scores = control(attributions, spec.model, traced)
        if scores is not None:
            circuits[name] = [same_size(circuit, scores)]
    return circuits


def layers_of(circuits: Mapping[str, Sequence[Circuit]]) -> list[str]:
    """The layers of all circuits together."""
    return list(dict.fromkeys(layer for drawn in circuits.values() for each in drawn for layer in each.layers))


def edge_orders(circuit: Circuit, layers: tuple[str, str] | None, seed: int) -> dict[str, list[Edge]]:
    """The edges between two layers of the circuit, in the orders in which they are pruned."""
    pair = layers or circuit.layers[:2]
    edges = list(circuit.edges_between(*pair)) if len(pair) == 2 else []
    if layers and not edges:
        raise ViscircuitsError(
            f"the circuit has no edges from {layers[0]!r} to {layers[1]!r}; its layers are {', '.join(circuit.layers)}"
        )
    if not edges:
        return {}
    order = torch.randperm(len(edges), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"by score": edges, "random order": [edges[i] for i in order]}


def remover(spec: ModelSpec, ablation: str, statistics: Statistics, seed: int) -> Callable[..., Opener]:
    """A function that turns a circuit into the condition in which it, or with `keep` all but it, is removed."""

    def removing(which: Circuit, keep: bool = False) -> Opener:
        generator = torch.Generator().manual_seed(seed)
        return lambda: ablate(spec, which, ablation, reference=statistics, keep=keep, generator=generator)

    return removing


def conditions_of(
    spec: ModelSpec,
    circuit: Circuit,
    circuits: Mapping[str, Sequence[Circuit]],
    edges: Mapping[str, Sequence[Edge]],
    unit_fractions: Sequence[float],
    edge_fractions: Sequence[float],
    ablation: str,
    statistics: Statistics,
    seed: int,
) -> dict[Key, Opener]:
    """Everything that is done to the network under one ablation: key → context."""
    removing = remover(spec, ablation, statistics, seed)

    def pruning(which: Sequence[Edge]) -> Opener:
        generator = torch.Generator().manual_seed(seed)
        return lambda: prune_edges(spec, which, ablation, reference=statistics, generator=generator)

    conditions: dict[Key, Opener] = {
        (BASELINE,): nullcontext,
        ("kept",): removing(circuit, keep=True),
        ("empty",): removing(circuit | circuit.complement()),
    }
    for name, drawn in circuits.items():
        for draw, each in enumerate(drawn):
            for fraction in sorted({*unit_fractions, 1.0}):
                conditions[key_of(name, draw, fraction)] = removing(_best_part(each, fraction))
    for name, ordered in edges.items():
        for fraction in edge_fractions:
            conditions["edges", name, str(fraction)] = pruning(ordered[: _share(fraction, len(ordered))])
    for name in ("circuit", "random"):
        for draw, each in enumerate(circuits.get(name, ())[:N_KEPT]):
            for fraction in sorted({*unit_fractions, 1.0}):
                conditions.setdefault(kept_key(name, draw, fraction), removing(_best_part(each, fraction), keep=True))
    return conditions


def _best_part(circuit: Circuit, fraction: float) -> Circuit:
    return circuit if fraction == 1 else shrink(circuit, fraction)  # a whole circuit needs no scores


def _share(fraction: float, n: int) -> int:
    return math.ceil(fraction * n - 1e-9)  # the slack keeps 0.07 · 100 = 7.000000000000001 at 7


def key_of(name: str, draw: int, fraction: float) -> Key:
    """Key of the condition in which the best part of a circuit's draw is removed."""
    return ("units", name, str(draw), str(float(fraction)))


def keys_of(name: str, drawn: Sequence[Circuit], fraction: float) -> list[Key]:
    """`key_of` every draw."""
    return [key_of(name, draw, fraction) for draw in range(len(drawn))]


def kept_key(name: str, draw: int, fraction: float) -> Key:
    """Key of the condition in which all but the best part of a circuit's draw is removed."""
    return ("kept",) if (name, fraction) == ("circuit", 1) else ("kept", name, str(draw), str(float(fraction)))


def is_kept(key: Key) -> bool:
    """Whether faithfulness and completeness alone ask for this condition: the concept's images answer for them."""
    return key[0] in ("kept", "empty")


# ------------------------------------------------------------------ reporting


class Report:
    """Turns outcomes into means with intervals over images and, where there are several, over draws."""

    def __init__(self, outcomes: Mapping[str, Mapping[Key, Measures]], seed: int) -> None:
        self.outcomes = outcomes
        self.seed = seed
        self.measure = next(iter(outcomes["concept"][BASELINE,]))

    def of(self, images: str, keys: Iterable[Key], measure_: str) -> Tensor:
        """One number for each image and draw."""
        return torch.stack([self.outcomes[images][key][measure_] for key in keys], dim=1)  # (image, draw)

    def behaviour(self, keys: Sequence[Key]) -> dict[str, Any]:
        """Every measure on each set of images."""
        return {
            images: {m: self._mean(self.of(images, keys, m)) for m in outcome[keys[0]]}
            for images, outcome in self.outcomes.items()
        }

    def _mean(self, values: Tensor) -> dict[str, float]:
        if values.shape[1] == 1 and bool(((values == 0) | (values == 1)).all()):
            return asdict(share_interval(values[:, 0]))
        return self._interval(_redrawn, values, vectorised=True)

    def fall(self, keys: Sequence[Key]) -> dict[str, Any]:
        """Behaviour, and how much more the concept falls than the others."""
        return {**self.behaviour(keys), "selectivity": self.selectivity(keys)}

    def selectivity(self, keys: Sequence[Key]) -> dict[str, float] | None:
        """How much more the concept falls than the others; None without others."""
        if "others" not in self.outcomes:
            return None
        falls = [
            self.of(images, [(BASELINE,)], self.measure) - self.of(images, keys, self.measure)
            for images in ("concept", "others")
        ]
        return self._interval(_redrawn, *falls, vectorised=True)

    def ratio(self, keys: Sequence[Key]) -> dict[str, float] | None:
        """Share of the behaviour that is left under a condition, averaged over its draws.

        Faithfulness where all but the circuit is removed, completeness where the circuit is; None where ablating
        everything changes nothing.
        """
        measure_ = "logit" if "logit" in self.outcomes["concept"][BASELINE,] else self.measure
        full, empty = (self.outcomes["concept"][key][measure_] for key in ((BASELINE,), ("empty",)))
        left = self.of("concept", keys, measure_)  # (image, draw)
        if abs(float(full.mean() - empty.mean())) < 1e-9:
            return None
        whole = faithfulness(full, left.mean(1), empty)

        def share(full: Tensor, left: Tensor, empty: Tensor) -> Tensor:
            behaviour = full.mean(-1) - empty.mean(-1)
            found = (_redrawn(left) - empty.mean(-1)) / behaviour
            # on these images alone ablating everything may change nothing
            return torch.where(behaviour.abs() < 1e-9, whole, found)

        return self._interval(share, full, left, empty, paired=True, vectorised=True)

    def _interval(self, statistic: Callable, *samples: Tensor, **how: bool) -> dict[str, float]:
        generator = torch.Generator().manual_seed(self.seed)
        found = bootstrap(statistic, *samples, draws=N_BOOTSTRAP, generator=generator, **how)
        return {"value": found.value, "low": found.low, "high": found.high}


def _redrawn(values: Tensor, others: Tensor | None = None) -> Tensor:
    """Mean over images, less that of `others`, then over draws, which are drawn again as the images are.

    The last two axes are (image, draw); what stands before them are the draws of the bootstrap.
    """
    by_draw = values.mean(-2) if others is None else values.mean(-2) - others.mean(-2)
    if by_draw.ndim == 1:
        return by_draw.mean()
    picks = torch.randint(by_draw.shape[1], by_draw.shape, generator=torch.Generator().manual_seed(0))
    return by_draw.gather(1, picks).mean(1)


def _unit_curve(
    report: Report, circuits: Mapping[str, Sequence[Circuit]], fractions: Sequence[float]
) -> dict[str, Any]:
    x = [0.0, *sorted(float(f) for f in {*fractions, 1.0})]
    circuit = circuits["circuit"][0]
    return {
        "x": x,
        "n_units": [0, *(_best_part(circuit, fraction).n_units for fraction in x[1:])],
        "series": [
            {
                **_series(report, name, [keys_of(name, drawn, f) for f in x[1:]]),
                **_kept_series(report, name, len(drawn), x[1:]),
            }
            for name, drawn in circuits.items()
        ],
    }


def _kept_series(report: Report, name: str, n_draws: int, fractions: Sequence[float]) -> dict[str, Any]:
    """Faithfulness of each part kept alone, of those circuits for which that was run; of nothing it is 0."""
    points = [[kept_key(name, draw, fraction) for draw in range(min(n_draws, N_KEPT))] for fraction in fractions]
    if any(key not in report.outcomes["concept"] for keys in points for key in keys):
        return {}
    found = [report.ratio(keys) for keys in points]
    nothing = None if found[-1] is None else {"value": 0.0, "low": 0.0, "high": 0.0}
    return {"faithfulness": [nothing, *found]}


def _edge_curve(
    report: Report, edges: Mapping[str, Sequence[Edge]], fractions: Sequence[float]
) -> dict[str, Any] | None:
    if not edges:
        return None
    ordered = next(iter(edges.values()))
    return {
        "source": ordered[0].source.layer,
        "target": ordered[0].target.layer,
        "x": [0.0, *map(float, fractions)],
        "n_edges": [0, *(_share(fraction, len(ordered)) for fraction in fractions)],
        "series": [_series(report, name, [[("edges", name, str(f))] for f in fractions]) for name in edges],
    }


def _series(report: Report, name: str, points: Sequence[Sequence[Key]]) -> dict[str, Any]:
    falls = [report.fall(keys) for keys in ([(BASELINE,)], *points)]
    series: dict[str, Any] = {"name": name}
    for images in report.outcomes:
        series[images] = [fall[images][report.measure] for fall in falls]
    if "others" in report.outcomes:
        series["selectivity"] = [fall["selectivity"] for fall in falls]
    return series
