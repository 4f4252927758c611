"""Do circuits form a hierarchy: what the circuits of a tree of concepts share, and who is hurt by whom.

1. A tree of concepts (`trees`), each with images that find its circuit and images held out.
2. Circuits of one size: cross-layer attribution as published, and less what all other concepts have on average; beside
   them the units most active on the concept, most active beyond the others, and random ones.
3. The same once more from the held-out half: how far a concept's circuit overlaps with *itself* when found from other
   images is the most that two concepts' circuits can be expected to.
4. Each circuit is removed (``mean`` ablation) and the divergence of the outputs is measured on every concept's held-out
   images; only circuits of the first half are removed.
5. The backbone: units that are in most circuits, beside what chance gives; what it shows, and what removing it does.
6. `hierarchy_report` compares all this with the tree.

References
----------
Rajaram et al. 2023, arXiv:2404.14349.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from viscircuits.ablation import Statistics, ablate, measure
from viscircuits.attribution import attribute, find_layers
from viscircuits.circuit import Circuit, Unit
from viscircuits.errors import ModelError, ViscircuitsError
from viscircuits.exemplars import Exemplar, exemplars
from viscircuits.experiments.hierarchy_report import report_of
from viscircuits.experiments.kept import Entry, Kept
from viscircuits.experiments.report import Report, check_folder
from viscircuits.experiments.seeds import check_seed
from viscircuits.experiments.small_network import ADDRESS, train_small
from viscircuits.experiments.trees import RENDERED, Concept, open_tree, rendered_tree
from viscircuits.files import write_atomically
from viscircuits.hooks import evaluating, forward
from viscircuits.images import ImageSet, batches, digest_of, open_images
from viscircuits.layers import Layer
from viscircuits.matrices import AttributionMatrix, Attributions
from viscircuits.metrics import kl_divergence
from viscircuits.models import ModelSpec, load_model
from viscircuits.prefix import Prefix
from viscircuits.selection import largest, select, units_per_layer

HALVES = ("first", "second")
ATTRIBUTED = ("CLA", "CLA difference")
METHODS = (*ATTRIBUTED, "activation", "activation difference")
RANDOM = "random"
ALL, LATER = "all layers", "later half"
N_RANDOM = 5  # random sets beside the backbone
N_QUICK = 8  # rendered concepts of a quick run
PICTURED = 4  # units of each third of the depth
BATCH = 16
Scores = list[Float[Tensor, " _unit"]]


@dataclass(frozen=True)
class Setting:
    """A network, its layers, and a tree of concepts."""

    spec: ModelSpec
    layers: tuple[Layer, ...]
    concepts: tuple[Concept, ...]
    units: float
    seed: int

    @property
    def addresses(self) -> list[str]:
        """Layers in execution order."""
        return [layer.address for layer in self.layers]

    @property
    def widths(self) -> dict[str, int]:
        """Layer → number of units."""
        return {layer.address: layer.n_units for layer in self.layers}

    @property
    def sizes(self) -> dict[str, int]:
        """Layer → number of units in a circuit."""
        return units_per_layer(self.widths, self.units)

    def images(self, half: str) -> list[Tensor]:
        """For each concept the transformed images of a half."""
        sets: list[ImageSet] = [getattr(concept, half) for concept in self.concepts]
        return [torch.cat([batch.images for batch in batches(each, self.spec.transform, BATCH)]) for each in sets]

    def circuit(self, units: Mapping[str, Sequence[int]]) -> Circuit:
        """Units as a circuit of this network."""
        return Circuit({layer: tuple(units[layer]) for layer in self.addresses if layer in units}, self.widths)


def hierarchy(
    out: str | Path,
    *,
    data: str | Path | None = None,
    model: str | None = None,
    weights: str | Path = "default",
    layers: Sequence[str] | None = None,
    units: float = 0.1,
    each: int | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Report:
    """Compare the circuits of a tree of concepts, layer by layer, and what removing each does to all.

    Parameters
    ----------
    out
        Folder for finished parts; a stopped run goes on there.
    data
        Photographs: a folder of folders, or one with a ``groups.json``. None: rendered concepts.
    model, weights
        As for `load_model`; ``trained`` is a small network trained on rendered concepts. None: the first of lite0,
        squeezenet1_1 and ``trained`` that is installed.
    layers
        Addresses; by default the network's own.
    units
        Share of each layer's units in a circuit.
    each
        Images in each half of a concept, at most; by default 12 photographs, or 4 rendered images.
    seed
        Of every random choice.
    quick
        A small run that shows that everything works.
    progress
        Show progress bars.

    Raises
    ------
    ViscircuitsError
        If there is no tree in the data, the network's outputs are no classes, or the share of units is none.
    FileFormatError
        If the folder holds the result of another experiment.
    """
    if not 0 < units < 1:
        raise ViscircuitsError(
            f"a circuit holds a share of each layer's units between 0 and 1, such as 0.1, not {units:g}"
        )
    out = Path(out)
    check_folder(out, "hierarchy")
    check_seed(seed)
    if data is None:
        concepts = rendered_tree(each or (2 if quick else 4), seed)[: N_QUICK if quick else None]
    else:
        concepts = open_tree(data, each or (4 if quick else 12), seed)
    spec = _network(model or (ADDRESS if quick and data is None else None), weights, seed, quick, progress)
    if spec.outputs != "logits":
        raise ViscircuitsError(f"{spec.address} gives embeddings; this experiment compares answers: take a classifier")
    chain = find_layers(spec, concepts[0].first, layers)
    setting = Setting(spec, tuple(chain), tuple(concepts), units, seed)
    made = {
        "model": spec.address, "weights": spec.weights_digest()[:12], "layers": len(chain),
        "units": f"{units:g} of each layer",
        "data": "rendered" if data is None else Path(data).name, "concepts": len(concepts),
        "images": f"up to {max(len(c.first) for c in concepts)} + {max(len(c.second) for c in concepts)} a concept",
        "seed": seed,
    }  # fmt: skip
    decides = {**made, "addresses": setting.addresses, "sets": [_named(concept) for concept in concepts]}
    run = _Run(setting, Kept(out / "parts.jsonl", decides), out, progress)
    circuits = run.circuits()
    found = {
        "circuits": circuits, "hurt": run.hurt(circuits), "backbone": run.backbone(circuits),
        "parts": run.parts, "sizes": setting.sizes, "widths": setting.widths,
    }  # fmt: skip
    return report_of(found, concepts, made, n_permuted=199 if quick else 9999, seed=seed)


# ------------------------------------------------------------------ setting


def _network(address: str | None, weights: str | Path, seed: int, quick: bool, progress: bool) -> ModelSpec:
    if address == ADDRESS:
        if weights != "default":
            raise ViscircuitsError(
                f"the network {ADDRESS!r} is trained here and takes no weights, got {str(weights)!r}; "
                "name the network they are of (--model), or leave them out"
            )
        return train_small(RENDERED, each=8 if quick else 48, steps=15 if quick else 200, seed=seed, progress=progress)
    if address is not None:
        return load_model(address, weights=weights)
    return _network(_installed(weights), weights, seed, quick, progress)


def _installed(weights: str | Path) -> str:
    """The first network whose packages are there; weights of the user's own decide nothing here."""
    for address in ("lite0", "squeezenet1_1"):
        with suppress(ModelError):  # its package is not there
            load_model(address, weights="default" if weights == "default" else "none")
            return address
    return ADDRESS


def _named(concept: Concept) -> str:
    """What tells a concept's images from others': where it stands, and the pixels of each half."""
    digests = [image.digest for half in HALVES for image in getattr(concept, half)]
    return f"{concept.key} {RENDERED.get(concept.key, '')} {len(concept.first)} {digest_of(digests)}"


# ------------------------------------------------------------------ running


class _Run:
    """Computes the parts of the experiment, or reads those that are finished."""

    def __init__(self, setting: Setting, kept: Kept, out: Path, progress: bool) -> None:
        self.setting, self.kept, self.progress = setting, kept, progress
        self.folder = out / "attributions"
        half = len(setting.addresses) // 2
        self.parts = {ALL: setting.addresses, LATER: setting.addresses[half:]}

    # ---------------------------------------------------------------- circuits

    def circuits(self) -> dict[str, dict[str, list[Circuit]]]:
        """Half → method → a circuit for each concept. Attributions are kept until every circuit is chosen."""
        found: dict[str, dict[str, list[Circuit]]] = {}
        for half in HALVES:
            entries = list(self._entries(half))
            found[half] = {
                method: [self.setting.circuit(entry[method]) for entry in entries] for method in (*METHODS, RANDOM)
            }
        for half in HALVES:
            for file in self._files(half):
                file.unlink(missing_ok=True)
        with suppress(OSError):  # not there, or it holds what others put there
            self.folder.rmdir()
        return found

    def _entries(self, half: str) -> Iterator[Entry]:
        concepts = self.setting.concepts
        keys = [f"circuits/{half}/{concept.key}" for concept in concepts]
        if all(key in self.kept for key in keys):
            yield from (self.kept.known[key] for key in keys)
            return
        files = self._attributed(half)
        total: dict[str, Tensor] = {}
        for file in files:
            for name, values in load_file(file).items():
                total[name] = total.get(name, 0) + values.double()
        for number, (key, file) in enumerate(
            zip(tqdm(keys, f"choosing, {half} half", disable=not self.progress), files, strict=True)
        ):
            yield self.kept.of(key, partial(self._chosen, half, number, file, total))

    def _files(self, half: str) -> list[Path]:
        n = len(self.setting.concepts)
        return [self.folder / f"{self.kept.digest}-{half}-{i:03d}.safetensors" for i in range(n)]

    def _attributed(self, half: str) -> list[Path]:
        """Files of each concept's matrices and activity, made where they are missing."""
        files = self._files(half)
        sets: list[ImageSet] = [getattr(concept, half) for concept in self.setting.concepts]
        for file, images in zip(tqdm(files, f"attributing, {half} half", disable=not self.progress), sets, strict=True):
            if not file.is_file():
                found = attribute(self.setting.spec, images, self.setting.addresses)
                tensors = {f"matrix {i}": matrix.values.float() for i, matrix in enumerate(found.matrices)}
                tensors |= {f"activity {i}": found.activity[layer].float() for i, layer in enumerate(found.layers)}
                write_atomically(file, save({name: each.contiguous() for name, each in tensors.items()}))
        return files

    def _chosen(self, half: str, number: int, file: Path, total: Mapping[str, Tensor]) -> Entry:
        """Units by each method: with the concept's own scores, and with these less the others' mean."""
        own, others = load_file(file), len(self.setting.concepts) - 1
        beyond = {name: values - (total[name] - values) / others for name, values in own.items()}
        scores = {"activation": own, "activation difference": beyond}
        found = {method: self._largest(_activity(of, self.setting)) for method, of in scores.items()}
        for method, of in zip(ATTRIBUTED, (own, beyond), strict=True):
            circuit = select(_attributions(of, self.setting), self.setting.units, restarts=3, bound_steps=0)
            found[method] = {layer: list(indices) for layer, indices in circuit.units.items()}
        found[RANDOM] = self._random(self.setting.sizes, HALVES.index(half), number)
        return found

    def _largest(self, scores: Scores) -> dict[str, list[int]]:
        sizes = self.setting.sizes
        return {
            layer: largest(each, sizes[layer]).tolist()
            for layer, each in zip(self.setting.addresses, scores, strict=True)
        }

    def _random(self, sizes: Mapping[str, int], *which: int) -> dict[str, list[int]]:
        rng = np.random.default_rng([self.setting.seed, *which])
        widths = self.setting.widths
        return {layer: sorted(rng.permutation(widths[layer])[:size].tolist()) for layer, size in sizes.items()}

    # ---------------------------------------------------------------- removal

    def hurt(self, circuits: Mapping[str, Mapping[str, list[Circuit]]]) -> dict[str, dict[str, list[list[float]]]]:
        """Part → method → mean divergence, a row for each circuit removed, a column for each concept tested."""
        cells = [(part, method) for part in self.parts for method in (*METHODS, RANDOM)]
        found: dict[str, dict[str, list[list[float]]]] = {part: {} for part in self.parts}
        for part, method in tqdm(cells, "removing circuits", disable=not self.progress):
            rows = []
            for concept, circuit in zip(self.setting.concepts, circuits["first"][method], strict=True):
                key = f"hurt/{part}/{method}/{concept.key}"
                rows.append(self.kept.of(key, partial(self._removed, part, circuit))["kl"])
            found[part][method] = rows
        return found

    def _removed(self, part: str, circuit: Circuit) -> Entry:
        """For each concept: mean divergence, and share of held-out images answered as before."""
        before = self._untouched
        with ablate(self.setting.spec, circuit.restrict(tuple(self.parts[part])), "mean", reference=self._statistics):
            after = self._answers(part)
        same = (before.argmax(1) == after.argmax(1)).double()
        counts = [len(concept.second) for concept in self.setting.concepts]
        means = [
            [each.mean().item() for each in values.split(counts)] for values in (kl_divergence(before, after), same)
        ]
        return {"kl": means[0], "same": means[1]}

    @cached_property
    def _held_out(self) -> Tensor:
        return torch.cat(self.setting.images("second"))

    @cached_property
    def _statistics(self) -> Statistics:
        images = torch.cat(self.setting.images("first"))
        return measure(self.setting.spec, images, self.setting.addresses, n_samples=0, batch_size=BATCH)

    @cached_property
    def _later(self) -> Prefix:
        return Prefix(self.setting.spec.model, self.parts[LATER], self._held_out, BATCH)

    @cached_property
    def _untouched(self) -> Tensor:
        """Outputs without any removal; the prefix is made here too, where nothing is removed."""
        assert self._later is not None
        return self._answers(ALL)

    def _answers(self, part: str) -> Float[Tensor, "image output"]:
        """Outputs on all held-out images; what precedes the later half is not run again."""
        images, later = self._held_out, self._later if part == LATER else None
        found = []
        with evaluating(self.setting.spec.model), torch.no_grad():
            for places in torch.arange(len(images)).split(BATCH):
                with later.replay(places) if later else nullcontext(images[places]) as batch:
                    found.append(forward(self.setting.spec.model, batch).cpu())
        return torch.cat(found)

    # ---------------------------------------------------------------- backbone

    def backbone(self, circuits: Mapping[str, Mapping[str, list[Circuit]]]) -> dict[str, Any]:
        """How many circuits each unit is in, pictures of those in most, and what removing these does."""
        counts = {method: self._counted(circuits["first"][method]) for method in METHODS}
        least = len(self.setting.concepts) // 2 + 1
        most = {layer: (each >= least).nonzero()[:, 0].tolist() for layer, each in counts["CLA"].items()}
        found: dict[str, Any] = {"counts": {method: _lists(each) for method, each in counts.items()}, "least": least}
        if any(most.values()):
            sets = {"backbone": most, "as active": self._as_active(most)}
            sizes = {layer: len(units) for layer, units in most.items()}
            sets |= {f"{RANDOM} {i}": self._random(sizes, len(HALVES), i) for i in range(N_RANDOM)}
            found["removed"] = {
                name: self.kept.of(f"backbone/{name}", partial(self._removed, ALL, self.setting.circuit(units)))
                for name, units in tqdm(sets.items(), "removing the backbone", disable=not self.progress)
            }
            found["pictures"] = self.kept.of("pictures", partial(self._pictures, counts["CLA"], most))["units"]
        return found

    def _counted(self, circuits: Sequence[Circuit]) -> dict[str, Int[Tensor, " unit"]]:
        found = {layer: torch.zeros(width, dtype=torch.int64) for layer, width in self.setting.widths.items()}
        for circuit in circuits:
            for layer, units in circuit.units.items():
                found[layer][list(units)] += 1
        return found

    def _as_active(self, most: Mapping[str, list[int]]) -> dict[str, list[int]]:
        """As many units in each layer, outside the backbone: those with the largest mean over all concepts' images.

        Fewer where the backbone is more than half of a layer, and no more are outside it.
        """
        found = {}
        for layer, units in most.items():
            mean = self._statistics.mean[layer].clone()
            mean[units] = -torch.inf
            found[layer] = largest(mean, min(len(units), len(mean) - len(units))).tolist()
        return found

    def _pictures(self, counts: Mapping[str, Tensor], most: Mapping[str, list[int]]) -> Entry:
        """Of each third of the depth the units in most circuits, with the images that excite them most."""
        chosen: list[Unit] = []
        for third in torch.arange(len(self.setting.addresses)).tensor_split(3):
            layers = [self.setting.addresses[place] for place in third.tolist()]
            # among equals one of each layer first
            mine = [
                (-int(counts[layer][i]), turn, Unit(layer, i)) for layer in layers for turn, i in enumerate(most[layer])
            ]
            chosen += [unit for *_, unit in sorted(mine, key=lambda each: each[:2])[:PICTURED]]
        images = open_images([concept.first for concept in self.setting.concepts])
        axes = {layer.address: layer.unit_axis for layer in self.setting.layers}
        assert self.setting.spec.transform is not None  # load_model and wrap see to it
        shown = exemplars(
            self.setting.spec.model, chosen, images, self.setting.spec.transform, n=4, batch_size=BATCH, unit_axes=axes
        )
        pictures = [
            {"unit": str(unit), "circuits": int(counts[unit.layer][unit.index]), "jpeg": _tiled(shown[unit])}
            for unit in chosen
        ]
        return {"units": pictures}


def _activity(of: Mapping[str, Tensor], setting: Setting) -> Scores:
    return [of[f"activity {i}"] for i in range(len(setting.layers))]


def _attributions(of: Mapping[str, Tensor], setting: Setting) -> Attributions:
    """Scores as attributions to select from; they carry no sign."""
    matrices = [
        AttributionMatrix(source, target, of[f"matrix {i}"], of[f"matrix {i}"])
        for i, (source, target) in enumerate(zip(setting.addresses, setting.addresses[1:], strict=False))
    ]
    return Attributions(tuple(matrices), dict(zip(setting.addresses, _activity(of, setting), strict=True)), 1)


def _lists(counts: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {layer: each.tolist() for layer, each in counts.items()}


def _tiled(shown: Sequence[Exemplar]) -> str:
    """Four image regions as one small picture, base64."""
    side = 72
    sheet = Image.new("RGB", (2 * side + 2, 2 * side + 2), "white")
    for place, each in enumerate(shown[:4]):
        sheet.paste(
            each.image.resize((side, side), Image.Resampling.BICUBIC),
            ((place % 2) * (side + 2), (place // 2) * (side + 2)),
        )
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=88)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
