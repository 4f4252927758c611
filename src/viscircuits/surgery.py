"""What a network does without some of its units and edges, asked again and again.

1. An `Edit` names units and edges of a circuit's layers, and what they become. It is a value: nothing remembers it.
2. `Surgery` holds what every question needs anew: where the layers' units lie, what removed values are replaced with,
   and which images to test on. Each question opens `ablate` and, inside it, `prune_edges`, and closes both.
3. One question at a time touches the network, whichever thread asks. A long one, accuracy over many images, lets
   others in after each batch.

Whatever happens inside a question, the network is afterwards what it was.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from viscircuits.ablation import ABLATIONS, Statistics, ablate, describe_layers, measure, prune_edges
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.connecting import connect
from viscircuits.connections import Connections
from viscircuits.contract import AccuracyData, Answer, EditData
from viscircuits.editing import edit as fold
from viscircuits.errors import ImageError, LayerError, ModelError, ViscircuitsError, closest
from viscircuits.evaluation import Report
from viscircuits.exemplars import heat, unnormalise
from viscircuits.images import Batch, ImageSet, batches, open_images
from viscircuits.models import ModelSpec
from viscircuits.prefix import Prefix
from viscircuits.probing import reduced, respond
from viscircuits.running import N_DIGEST
from viscircuits.scores.formulas import choose
from viscircuits.trials import BASELINE, Key, LabelSource, Opener, Outcomes, find_labels, run_trials, used_to_find

BATCH_SIZE = 4  # test images that run before another question gets its turn
N_LOOKED_AT = 16  # images that a single edge is looked into on
N_BEGUN = 4  # probes whose part before the circuit is kept
FEW_EDGES = 8  # so few are pruned sooner than what comes before them is put aside
WITHOUT_EDGES = "weights cannot say that an edge is gone; export the edit as Python, or take the edges out of it"

End = tuple[Unit, Unit]
Progress = dict[str, int]


@dataclass(frozen=True)
class Edit:
    """What is done to a network: units and edges that are removed, and what their values become.

    Parameters
    ----------
    units
        Units to remove.
    edges
        Source and target of each connection to remove.
    ablation
        As for `viscircuits.ablation.ablate`.
    """

    units: tuple[Unit, ...] = ()
    edges: tuple[End, ...] = ()
    ablation: str = "zero"

    def __bool__(self) -> bool:
        return bool(self.units or self.edges)

    @classmethod
    def from_json(cls, data: Any) -> Edit:
        """Read an `EditData`.

        Raises
        ------
        ViscircuitsError
            If it is none.
        """
        try:
            units = tuple(dict.fromkeys(unit_from_json(each) for each in data["units"]))
            edges = tuple(dict.fromkeys((unit_from_json(a), unit_from_json(b)) for a, b in data["edges"]))
            ablation = data["ablation"]
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ViscircuitsError):
                raise
            raise ViscircuitsError(
                'an edit is {"units": [[layer, index], …], "edges": [[[layer, index], [layer, index]], …], '
                f'"ablation": name}}; reading this one failed ({type(error).__name__} {error})'
            ) from error
        return cls(units, edges, str(ablation))

    def to_json(self) -> EditData:
        """The edit as plain lists."""
        return {
            "units": [(unit.layer, unit.index) for unit in self.units],
            "edges": [((s.layer, s.index), (t.layer, t.index)) for s, t in self.edges],
            "ablation": self.ablation,
        }


def unit_from_json(data: Any) -> Unit:
    """Read a unit from ``[layer, index]``.

    Raises
    ------
    ViscircuitsError
        If it is none.
    """
    is_pair = isinstance(data, list | tuple) and len(data) == 2
    if not is_pair or not isinstance(data[0], str) or isinstance(data[1], bool) or not isinstance(data[1], int):
        raise ViscircuitsError(f'a unit is [layer, index], such as ["layer1", 3]; got {str(data)[:80]!r}')
    return Unit(data[0], data[1])


@dataclass(frozen=True, eq=False)
class Probe:
    """An image that questions are asked about, and what the untouched network makes of it.

    Parameters
    ----------
    name, kind
        What it is called, and where it comes from.
    picture
        What is given to the network's transform.
    image
        What the transform makes of it.
    answers
        The network's strongest outputs.
    activations
        The largest value of each unit of the circuit over positions.
    """

    name: str
    kind: str
    picture: Image.Image
    image: Float[Tensor, "1 channel height width"]
    answers: tuple[Answer, ...]
    activations: Float[np.ndarray, " unit"]


@dataclass(frozen=True, eq=False)
class Operated:
    """What a network under an edit makes of a probe, and how many seconds its forward pass took."""

    answers: tuple[Answer, ...]
    activations: Float[np.ndarray, " unit"]
    seconds: float


class Surgery:
    """A network and its circuit, ready to be asked what it does under any edit.

    Parameters
    ----------
    model
        The network; every question leaves it as it was.
    circuit
        Its layers are those that edits may touch, its units those that are watched.
    reference
        Images that replacement values are measured on; None offers ``zero`` alone.
    tests
        ``concept``, and perhaps ``others`` → images to measure accuracy on. Those that found the circuit are left
        out.
    labels
        As for `viscircuits.evaluation.evaluate`.
    looked_at
        Images that single edges are looked into on, and that folded weights are checked on; None takes probes.
    seed
        Of drawn replacements and the bootstrap.
    progress
        Show a progress bar while the reference is measured.

    Raises
    ------
    ViscircuitsError
        If the circuit belongs to another network, or the model has no transform.
    """

    def __init__(
        self,
        model: ModelSpec,
        circuit: Circuit,
        *,
        reference: ImageSet | None = None,
        tests: Mapping[str, ImageSet] | None = None,
        labels: LabelSource | None = "auto",
        looked_at: ImageSet | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        if model.transform is None or model.input_size is None:
            raise ModelError("surgery is done on pictures, and needs the model's transform: viscircuits.wrap(…)")
        self.model, self.circuit, self.seed = model, circuit, seed
        self.input_size = model.input_size
        self.units = tuple(circuit)
        self.layers = describe_layers(model, model.example(), circuit.layers)
        for layer in self.layers:
            if layer.n_units != circuit.widths[layer.address]:
                raise LayerError(
                    f"layer {layer.address!r} has {layer.n_units} units in this network, "
                    f"{circuit.widths[layer.address]} in the circuit: give the network that the circuit was found in"
                )
        self.statistics = Statistics({layer.address: layer for layer in self.layers})
        if reference is not None:
            self.statistics = measure(model, reference, circuit.layers, progress=progress)
        self.ablations = ("zero",) if reference is None else tuple(ABLATIONS)
        self.tests = dict(tests or {})
        self.looked_at = looked_at
        # where the images of the test are gone, nothing is named that labels could be for
        self._class_of = find_labels(model, self.tests.values(), labels) if self.tests else None
        self._used = used_to_find(circuit.provenance)
        self._alone = threading.Lock()
        self._begun: OrderedDict[Probe, Prefix] = OrderedDict()
        self._shown: Callable[[Tensor], Image.Image] | None = None

    # ------------------------------------------------------------------ edits

    def check(self, edit: Edit) -> None:
        """See that an edit can be made to this network.

        Raises
        ------
        ViscircuitsError
            If it names a layer, unit or ablation that does not exist, an edge that leads backwards, or an ablation
            whose replacement values are not known.
        """
        choose(ABLATIONS, edit.ablation, "ablation")
        if edit.ablation not in self.ablations:
            raise ViscircuitsError(
                f"{edit.ablation!r} ablation needs reference images, and none could be opened; use 'zero', or start "
                "again with some (--reference IMAGES)"
            )
        for unit in (*edit.units, *(end for edge in edit.edges for end in edge)):
            self.check_unit(unit)
        order = [layer.address for layer in self.layers]
        for source, target in edit.edges:
            if order.index(source.layer) >= order.index(target.layer):
                raise LayerError(f"an edge leads from {source} to {target}, but {target.layer!r} does not run later")

    def check_unit(self, unit: Unit) -> None:
        """See that a unit lies in one of the circuit's layers.

        Raises
        ------
        LayerError
            If it does not.
        """
        widths = self.circuit.widths
        if unit.layer not in self.circuit.units:
            raise LayerError(
                f"no layer {unit.layer!r} in the circuit.{closest(unit.layer, widths)} "
                f"It has {', '.join(self.circuit.layers)}."
            )
        if not 0 <= unit.index < widths[unit.layer]:
            raise LayerError(f"there is no unit {unit}: layer {unit.layer!r} has units 0 to {widths[unit.layer] - 1}")

    def removed(self, edit: Edit) -> Circuit:
        """The edit's units as a circuit."""
        units = {
            layer: tuple(sorted(unit.index for unit in edit.units if unit.layer == layer))
            for layer in self.circuit.layers
        }
        kept = {layer: indices for layer, indices in units.items() if indices}
        return Circuit(kept, {layer: self.circuit.widths[layer] for layer in kept}, provenance=self._made_in())

    def _made_in(self) -> dict[str, Any]:
        """Which network an edit belongs to."""
        known = ("model", "weights", "weights_from")
        return {key: self.circuit.provenance[key] for key in known if key in self.circuit.provenance}

    @contextmanager
    def under(self, edit: Edit) -> Iterator[None]:
        """The network under an edit, for as long as the context is open; other questions wait.

        Raises
        ------
        ViscircuitsError
            As `check`.
        """
        self.check(edit)
        with self._alone, self._opener(edit)():
            yield

    def _opener(self, edit: Edit) -> Opener:
        """The edit as a context that may be opened for one batch after another, drawing on."""
        circuit, edges = self.removed(edit), [Edge(source, target, 0.0, 0.0) for source, target in edit.edges]
        drawing = [torch.Generator().manual_seed(self.seed) for _ in range(2)]

        @contextmanager
        def opened() -> Iterator[None]:
            with (
                ablate(self.model, circuit, edit.ablation, reference=self.statistics, generator=drawing[0]),
                prune_edges(self.model, edges, edit.ablation, reference=self.statistics, generator=drawing[1]),
            ):
                yield

        return opened

    # ------------------------------------------------------------------ questions about one image

    def probe(self, picture: Image.Image, name: str, kind: str) -> Probe:
        """A picture, made as small as is of use, with what the untouched network makes of it.

        Raises
        ------
        ImageError
            If the transform cannot take it.
        """
        small = reduced(picture, self.input_size)
        (batch,) = batches(open_images(small), self.model.transform, 1)
        with self._alone:
            values, answers = respond(self.model, batch.images, self.units, self.layers)
        return Probe(name, kind, small, batch.images, answers[0], values[0])

    def operate(self, probe: Probe, edit: Edit) -> Operated:
        """What the network under an edit makes of a probe.

        Raises
        ------
        ViscircuitsError
            As `check`.
        """
        self.check(edit)
        with self._alone, ExitStack() as stack:
            image = probe.image
            if edit.edges:  # pruning runs the network many times, and every time the same up to the circuit
                image = stack.enter_context(self._prefix(probe).replay([0]))
            stack.enter_context(self._opener(edit)())
            start = time.perf_counter()
            values, answers = respond(self.model, image, self.units, self.layers)
            return Operated(answers[0], values[0], time.perf_counter() - start)

    def _prefix(self, probe: Probe) -> Prefix:
        if probe not in self._begun:
            self._begun[probe] = Prefix(self.model.model, self.circuit.layers, probe.image, 1)
        self._begun.move_to_end(probe)
        while len(self._begun) > N_BEGUN:
            self._begun.popitem(last=False)
        return self._begun[probe]

    def heat(self, probe: Probe, unit: Unit) -> Image.Image:
        """Where on a probe the unit of the untouched network is active; see `viscircuits.exemplars.heat`.

        Raises
        ------
        LayerError
            If the unit does not exist, or its layer's positions are no grid.
        ImageError
            If the transform's colours cannot be turned back into a picture.
        """
        self.check_unit(unit)
        axis = self.statistics.layers[unit.layer].unit_axis
        with self._alone:
            if self._shown is None:
                self._shown = unnormalise(self.model.transform, probe.picture.size)  # type: ignore[arg-type]
            image = probe.image[0]
            return heat(self.model.model, unit, image, self._shown(image), unit_axis=axis)

    # ------------------------------------------------------------------ questions about many

    @property
    def evaluated_on(self) -> dict[str, int]:
        """How many images of each set there are to measure accuracy on; 0 for a stream nobody has counted."""
        return {name: images.count or 0 for name, images in self.tests.items()}

    def accuracy(self, edit: Edit) -> Iterator[Progress | AccuracyData]:
        """How often the network is right with and without an edit: first how far it is, last what was found.

        The network is free between two of the answers; whoever stops asking stops the work.

        Raises
        ------
        ViscircuitsError
            As `check`, and if there is nothing to test on.
        """
        self.check(edit)
        if "concept" not in self.tests:
            raise ImageError(
                "there are no images to measure accuracy on: those of the test cannot be opened again; start again "
                "with some (--images IMAGES --others IMAGES)"
            )
        return self._accuracy(edit)

    def _accuracy(self, edit: Edit) -> Iterator[Progress | AccuracyData]:
        done, of = 0, sum(self.evaluated_on.values())
        yield {"done": done, "of": of}
        outcomes: dict[str, Outcomes] = {}
        for what, images in self.tests.items():
            parts: list[Outcomes] = []
            opener = self._opener(edit)
            for batch in batches(images, self.model.transform, BATCH_SIZE):
                parts += self._tried(batch, opener, len(edit.edges) > FEW_EDGES)
                done += len(batch)
                yield {"done": done, "of": max(of, done)}
            if not parts:
                raise ImageError(f"all {what} images were used to find the circuit; test on others")
            outcomes[what] = _joined(parts)
        report = Report(outcomes, self.seed)
        before, after = (_of_measure(report.behaviour([(key,)]), report.measure) for key in (BASELINE, "edit"))
        selectivity: Any = report.selectivity([("edit",)])
        yield {"measure": report.measure, "before": before, "after": after, "selectivity": selectivity}

    def _tried(self, batch: Batch, opener: Opener, many: bool) -> list[Outcomes]:
        """What was measured on a batch's images that did not find the circuit; nothing if all did."""
        fresh = [i for i, digest in enumerate(batch.digests) if digest[:N_DIGEST] not in self._used]
        if not fresh:
            return []
        known = None if self._class_of is None else self._class_of(batch)[fresh]
        conditions: dict[Key, Opener] = {(BASELINE,): nullcontext, ("edit",): opener}
        with self._alone:
            outcomes, _ = run_trials(
                self.model, batch.images[fresh], conditions, None if known is None else lambda _: known,
                layers=self.circuit.layers if many else (), batch_size=len(fresh),
            )  # fmt: skip
        return [outcomes]

    def connection(self, source: Unit, target: Unit, probes: Sequence[Probe] = ()) -> Connections:
        """What an edge of the untouched network is made of: its kernel, and its contribution on single images.

        On the probes if there are any, else on the images that were given to look at.

        Raises
        ------
        ViscircuitsError
            If a unit does not exist, no gradient flows between them, or there are no images.
        """
        self.check(Edit(edges=((source, target),)))
        with self._alone:
            return connect(
                self.model, self.circuit, self._to_look_at(probes), [(source, target)],
                n_images=max(N_LOOKED_AT, len(probes)), n_kernel_images=N_LOOKED_AT // 2,
            )  # fmt: skip

    def weights(self, edit: Edit, probes: Sequence[Probe] = ()) -> bytes:
        """The network without the edit's units as a safetensors file, checked on images against `ablate`.

        Raises
        ------
        ViscircuitsError
            As `viscircuits.editing.edit`, and if the edit has edges.
        """
        self.check(edit)
        if edit.edges:
            raise ViscircuitsError(WITHOUT_EDGES)
        images = self._to_look_at(() if self.looked_at is not None else probes)
        with self._alone, tempfile.TemporaryDirectory() as folder:
            first = next(iter(batches(images, self.model.transform, N_LOOKED_AT)))
            found = fold(
                self.model, self.removed(edit), first.images, ablation=edit.ablation, reference=self.statistics
            )
            return found.save(Path(folder) / "edited.safetensors").read_bytes()

    def _to_look_at(self, probes: Sequence[Probe]) -> ImageSet | Tensor:
        if probes:
            return torch.cat([probe.image for probe in probes])
        if self.looked_at is None:
            raise ImageError("there is no image to look at: those that found the circuit are gone; add a probe")
        return self.looked_at


def _joined(parts: Iterable[Outcomes]) -> Outcomes:
    """Outcomes of several batches as those of one."""
    parts = list(parts)
    return {
        key: {name: torch.cat([part[key][name] for part in parts]) for name in measures}
        for key, measures in parts[0].items()
    }


def _of_measure(behaviour: Mapping[str, Any], measure_: str) -> dict[str, Any]:
    return {images: found[measure_] for images, found in behaviour.items()}
