"""What a circuit does, beside what its controls do, on images that were not used to find it.

1. Conditions: the untouched network; the circuit removed; control circuits of the same size per
   layer removed (random draws, most active, most raised over the reference, largest weights);
   the same for parts of each circuit; everything but the circuit removed; everything removed;
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
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from viscircuits.ablation import ABLATIONS, Statistics, ablate, describe_layers, measure, prune_edges
from viscircuits.attribution import N_DIGEST, Images, Seen
from viscircuits.circuit import Circuit, Edge
from viscircuits.errors import FileFormatError, ImageError, ViscircuitsError
from viscircuits.files import write_atomically
from viscircuits.hooks import evaluating, forward
from viscircuits.images import Batch, ImageSet, batches
from viscircuits.labels import match_labels
from viscircuits.matrices import Attributions
from viscircuits.metrics import (
    Interval,
    bootstrap,
    completeness,
    correct,
    cosine_distance,
    faithfulness,
    kl_divergence,
    share_interval,
)
from viscircuits.models import ModelSpec, as_spec
from viscircuits.scores.controls import CONTROLS
from viscircuits.scores.formulas import choose
from viscircuits.selection import random_like, same_size, shrink
from viscircuits.tracing import trace

SCHEMA = "viscircuits/evaluation"
VERSION = 1
N_BOOTSTRAP = 1000

LabelSource = str | Path | Mapping[str, str]
ClassOf = Callable[[Batch], Tensor]
Opener = Callable[[], AbstractContextManager[None]]
Measures = dict[str, Tensor]  # measure → one number for each image
Key = tuple[str, ...]


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
        """Return the circuit and its controls, a row each: concept, others, selectivity."""
        measure = self.data["measure"]
        n = {images: f"(n={described['n']})" for images, described in self.data["images"].items()}
        rows = [
            (
                "removed",
                f"concept {measure} {n['concept']}",
                f"others {measure} {n.get('others', '')}".rstrip(),
                "selectivity",
            )
        ]
        rows += [
            (
                "nothing",
                _shown(self.data["baseline"], "concept", measure),
                _shown(self.data["baseline"], "others", measure),
                "",
            )
        ]
        for entry in self.data["circuits"]:
            rows.append(
                (
                    entry["name"],
                    _shown(entry, "concept", measure),
                    _shown(entry, "others", measure),
                    _show(entry.get("selectivity")),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

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
        Parts of each circuit for the curve over units, 0 left out.
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
    _check_options(ablation, reference, draws, (*unit_fractions, *edge_fractions), (concept, others))
    edge_fractions = sorted(edge_fractions)
    statistics = _statistics(spec, circuit, concept, reference, batch_size, progress)
    circuits = _with_controls(spec, circuit, attributions, concept, draws, seed)
    circuits.update({name: [rival] for name, rival in (rivals or {}).items()})
    edges = _edge_orders(circuit, edge_layers, seed) if edge_fractions else {}
    conditions = _conditions(spec, circuit, circuits, edges, unit_fractions, edge_fractions, ablation, statistics, seed)
    sets = {"concept": concept} if others is None else {"concept": concept, "others": others}
    class_of = find_labels(spec, sets.values(), labels)
    outcomes: dict[str, dict[Key, Measures]] = {}
    described: dict[str, Any] = {}
    used = set().union(*(_used_to_find(each.provenance) for drawn in circuits.values() for each in drawn))
    for name, images in sets.items():
        outcomes[name], described[name] = _run(spec, images, conditions, class_of, used, batch_size, name, progress)
    report = _Report(outcomes, seed)
    first = next(iter(edges.values()), [])
    return Evaluation(
        {
            "schema": SCHEMA,
            "version": VERSION,
            "ablation": ablation,
            "measure": report.measure,
            "labelled": class_of is not None,
            "level": 0.95,
            "seed": seed,
            "images": described,
            "baseline": report.behaviour([("baseline",)]),
            "circuits": [
                {"name": name, "draws": len(drawn), "n_units": drawn[0].n_units, **report.fall(_keys(name, drawn, 1.0))}
                for name, drawn in circuits.items()
            ],
            "faithfulness": report.ratio(faithfulness, ("kept",)),
            "completeness": report.ratio(completeness, _key("circuit", 0, 1.0)),
            "unit_curve": _unit_curve(report, circuits, unit_fractions),
            "edge_curve": _edge_curve(report, edges, edge_fractions, first),
        }
    )


def _check_options(
    ablation: str,
    reference: Statistics | Images | None,
    draws: int,
    fractions: Iterable[float],
    sets: Iterable[Images | None],
) -> None:
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


def _statistics(
    spec: ModelSpec,
    circuit: Circuit,
    images: Images,
    reference: Statistics | Images | None,
    batch_size: int,
    progress: bool,
) -> Statistics:
    """The reference's statistics, or without a reference at least where the units lie."""
    if isinstance(reference, Statistics):
        return reference
    if reference is not None:
        return measure(spec, reference, circuit.layers, batch_size=batch_size, progress=progress)
    first = next(iter(batches(images, spec.transform, 1)), None)
    if first is None:
        raise ImageError("the concept set is empty: no image could be read")
    return Statistics({layer.address: layer for layer in describe_layers(spec, first.images, circuit.layers)})


def _with_controls(
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


def _edge_orders(circuit: Circuit, layers: tuple[str, str] | None, seed: int) -> dict[str, list[Edge]]:
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


def _conditions(
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
    def removing(which: Circuit, keep: bool = False) -> Opener:
        generator = torch.Generator().manual_seed(seed)
        return lambda: ablate(spec, which, ablation, reference=statistics, keep=keep, generator=generator)

    def pruning(which: Sequence[Edge]) -> Opener:
        generator = torch.Generator().manual_seed(seed)
        return lambda: prune_edges(spec, which, ablation, reference=statistics, generator=generator)

    conditions: dict[Key, Opener] = {
        ("baseline",): nullcontext,
        ("kept",): removing(circuit, keep=True),
        ("empty",): removing(circuit | circuit.complement()),
    }
    for name, drawn in circuits.items():
        for draw, each in enumerate(drawn):
            for fraction in sorted({*unit_fractions, 1.0}):
                conditions[_key(name, draw, fraction)] = removing(_best_part(each, fraction))
    for name, ordered in edges.items():
        for fraction in edge_fractions:
            conditions["edges", name, str(fraction)] = pruning(ordered[: _share(fraction, len(ordered))])
    return conditions


def _best_part(circuit: Circuit, fraction: float) -> Circuit:
    return circuit if fraction == 1 else shrink(circuit, fraction)  # a whole circuit needs no scores


def _share(fraction: float, n: int) -> int:
    return math.ceil(fraction * n - 1e-9)  # the slack keeps 0.07 · 100 = 7.000000000000001 at 7


def _key(name: str, draw: int, fraction: float) -> Key:
    return ("units", name, str(draw), str(float(fraction)))


def _keys(name: str, drawn: Sequence[Circuit], fraction: float) -> list[Key]:
    return [_key(name, draw, fraction) for draw in range(len(drawn))]


# ------------------------------------------------------------------ labels


def find_labels(spec: ModelSpec, sets: Iterable[Images], labels: LabelSource | None) -> ClassOf | None:
    """How to know the classes of a batch, or None where nothing says them.

    Raises
    ------
    ViscircuitsError
        If a label fits no class or several, or only some pictures have one.
    """
    if labels is None or spec.outputs == "embedding":
        return None
    table = None if labels == "auto" else labels
    pictures = [pair for images in sets for pair in _named(spec, images)]
    if not pictures and table is not None:
        raise ViscircuitsError(
            "labels were given, but tensors have no names to look up; give images that open_images opens"
        )
    if not pictures:
        return None
    names, given = zip(*pictures, strict=True)
    found = match_labels(names, given, spec.classes, table=table, partly=table is None)
    if found.unmatched:  # where only some are known nothing can be compared
        if found.n_matched:
            warnings.warn(
                f"{len(found.unmatched)} of {len(names)} pictures name no class of the network, {found.unmatched[0]!r} "
                "among them: the network's own answers are the standard instead. Give labels for all (--labels FILE).",
                stacklevel=3,
            )
        return None
    known = dict(zip(pictures, found.indices, strict=True))

    def class_of(batch: Batch) -> Tensor:
        pairs = list(zip(batch.names, batch.labels, strict=True))
        new = [pair for pair in pairs if pair not in known]  # further on in a stream
        if new:
            matched = match_labels([n for n, _ in new], [g for _, g in new], spec.classes, table=table, partly=True)
            known.update(zip(new, matched.indices, strict=True))
        unlabelled = [name for name, label in pairs if known[name, label] is None]
        if unlabelled:
            raise ViscircuitsError(
                f"picture {unlabelled[0]!r} has no class of the model, though others have; "
                "label all of them (--labels FILE) or none (--labels none)"
            )
        return torch.tensor([known[pair] for pair in pairs])

    return class_of


def _named(spec: ModelSpec, images: Images) -> list[tuple[str, str | None]]:
    """Names and labels of the pictures of a set; of a stream, those of its beginning."""
    if not isinstance(images, ImageSet):
        return []
    if not callable(images.entries):
        return [(entry.name, entry.label) for entry in images.entries]
    first = next(iter(batches(images, spec.transform, 16)), None)
    return [] if first is None else list(zip(first.names, first.labels, strict=True))


# ------------------------------------------------------------------ running


def _run(
    spec: ModelSpec,
    images: Images,
    conditions: Mapping[Key, Opener],
    class_of: ClassOf | None,
    used: Collection[str],
    batch_size: int,
    what: str,
    progress: bool,
) -> tuple[dict[Key, Measures], dict[str, Any]]:
    collected: dict[Key, dict[str, list[Tensor]]] = {key: {} for key in conditions}
    seen = Seen()
    n_used = 0
    count = len(images) if isinstance(images, Tensor) else images.count if isinstance(images, ImageSet) else None
    total = None if count is None else count * len(conditions)
    bar = tqdm(total=total, desc=f"evaluation, {what}", unit="run", unit_scale=True, delay=2, disable=not progress)
    with bar, evaluating(spec.model), torch.no_grad():
        for batch in batches(images, spec.transform, batch_size):
            batch, n_dropped = _unseen(batch, used)
            n_used += n_dropped
            bar.update(n_dropped * len(conditions))
            if not len(batch):
                continue
            known = None if class_of is None else class_of(batch)
            full = forward(spec.model, batch.images).float().cpu()
            if known is not None and int(known.max()) >= full.shape[1]:
                raise ViscircuitsError(
                    f"label {int(known.max())} is none of the network's {full.shape[1]} outputs, from 0"
                )
            for key, opener in conditions.items():
                with opener():
                    outputs = full if key == ("baseline",) else forward(spec.model, batch.images).float().cpu()
                for measure_, values in _measured(spec, full, outputs, known).items():
                    collected[key].setdefault(measure_, []).append(values.double())
                bar.update(len(batch.images))
            seen.add(batch)
    if not seen.names and n_used:
        raise ImageError(f"all {n_used} images of the {what} set were used to find the circuit; test on others")
    if not seen.names:
        raise ImageError(f"the {what} set is empty: no image could be read")
    outcome = {key: {m: torch.cat(parts) for m, parts in measures.items()} for key, measures in collected.items()}
    return outcome, {**seen.describe(images), "left_out": n_used}


def _used_to_find(provenance: Any) -> set[str]:
    """Digests of every image, of the concept or the reference, that a circuit was found with: they cannot test it."""
    if isinstance(provenance, Mapping):
        own = set(provenance.get("digests", ()))
        return own.union(*(_used_to_find(each) for key, each in provenance.items() if key != "digests"))
    if isinstance(provenance, list | tuple):
        return set().union(*(_used_to_find(each) for each in provenance if isinstance(each, Mapping)))
    return set()


def _unseen(batch: Batch, used: Collection[str]) -> tuple[Batch, int]:
    keep = [i for i, digest in enumerate(batch.digests) if digest[:N_DIGEST] not in used]
    if len(keep) == len(batch):
        return batch, 0
    kept = Batch(
        batch.images[keep],
        tuple(batch.names[i] for i in keep),
        tuple(batch.labels[i] for i in keep),
        tuple(batch.digests[i] for i in keep),
    )
    return kept, len(batch) - len(keep)


def _measured(spec: ModelSpec, full: Tensor, outputs: Tensor, known: Tensor | None) -> Measures:
    """One number for each image and measure; the first measure is the one selectivity is about."""
    if spec.outputs == "embedding":
        return {"cosine": 1 - cosine_distance(full, outputs)}
    classes = full.argmax(1) if known is None else known
    return {
        "agreement" if known is None else "accuracy": correct(outputs, classes),
        "logit": outputs.gather(1, classes[:, None]).squeeze(1),
        "kl": kl_divergence(full, outputs),
    }


# ------------------------------------------------------------------ reporting


class _Report:
    """Turns outcomes into means with intervals over images and, where there are several, over draws."""

    def __init__(self, outcomes: Mapping[str, Mapping[Key, Measures]], seed: int) -> None:
        self.outcomes = outcomes
        self.seed = seed
        self.measure = next(iter(outcomes["concept"]["baseline",]))

    def of(self, images: str, keys: Iterable[Key], measure_: str) -> Tensor:
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
        if "others" not in self.outcomes:
            return None
        falls = [
            self.of(images, [("baseline",)], self.measure) - self.of(images, keys, self.measure)
            for images in ("concept", "others")
        ]
        return self._interval(_redrawn, *falls, vectorised=True)

    def ratio(self, statistic: Callable[..., float], key: Key) -> dict[str, float] | None:
        """Faithfulness or completeness; None where ablating everything changes nothing."""
        measure_ = "logit" if "logit" in self.outcomes["concept"]["baseline",] else self.measure
        samples = [self.outcomes["concept"][each][measure_] for each in (("baseline",), key, ("empty",))]
        if abs(float(samples[0].mean() - samples[2].mean())) < 1e-9:
            return None
        whole = statistic(*samples)

        def of_draw(*drawn: Tensor) -> float:
            try:
                return statistic(*drawn)
            except ViscircuitsError:  # on these images alone ablating everything changes nothing
                return whole

        return self._interval(of_draw, *samples, paired=True)

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
    report: _Report, circuits: Mapping[str, Sequence[Circuit]], fractions: Sequence[float]
) -> dict[str, Any]:
    x = [0.0, *sorted(float(f) for f in {*fractions, 1.0})]
    circuit = circuits["circuit"][0]
    return {
        "x": x,
        "n_units": [0, *(_best_part(circuit, fraction).n_units for fraction in x[1:])],
        "series": [_series(report, name, [_keys(name, drawn, f) for f in x[1:]]) for name, drawn in circuits.items()],
    }


def _edge_curve(
    report: _Report, edges: Mapping[str, Sequence[Edge]], fractions: Sequence[float], ordered: Sequence[Edge]
) -> dict[str, Any] | None:
    if not edges:
        return None
    return {
        "source": ordered[0].source.layer,
        "target": ordered[0].target.layer,
        "x": [0.0, *map(float, fractions)],
        "n_edges": [0, *(_share(fraction, len(ordered)) for fraction in fractions)],
        "series": [_series(report, name, [[("edges", name, str(f))] for f in fractions]) for name in edges],
    }


def _series(report: _Report, name: str, points: Sequence[Sequence[Key]]) -> dict[str, Any]:
    falls = [report.fall(keys) for keys in ([("baseline",)], *points)]
    series: dict[str, Any] = {"name": name}
    for images in report.outcomes:
        series[images] = [fall[images][report.measure] for fall in falls]
    if "others" in report.outcomes:
        series["selectivity"] = [fall["selectivity"] for fall in falls]
    return series


def _shown(entry: Mapping[str, Any], images: str, measure_: str) -> str:
    return _show(entry.get(images, {}).get(measure_))


def _show(interval: Mapping[str, float] | None) -> str:
    return (
        "–" if not interval else f"{_plain(interval['value'])} [{_plain(interval['low'])}, {_plain(interval['high'])}]"
    )


def _plain(number: float) -> str:
    return f"{round(number, 2) + 0.0:.2f}"  # no minus before a zero
