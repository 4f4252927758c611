"""Interventions: what a network does when units or edges are removed.

- `ablate` removes every unit of a circuit, or everything but the circuit.
- `prune_edges` removes single connections: a target is recomputed from an input in which only its
  pruned sources are replaced, while every other target still sees the true ones. It is exact for
  any pair of layers, at the price of one extra partial forward pass for each distinct set of
  pruned sources.

A removed value becomes zero, its mean over a reference set, the same unit's value on another
image (resample), or Gaussian noise with the reference's mean and variance. Which one is part of
what a circuit is. Both contexts leave the network as they found it, whatever happens inside; each
belongs to the thread that opened it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.errors import ImageError, LayerError, ViscircuitsError
from viscircuits.hooks import Tap, activations, evaluating, pass_depth, rewrite, side_passes
from viscircuits.images import ImageSet, batches
from viscircuits.layers import Layer, along_units, by_unit
from viscircuits.models import ModelSpec, as_spec
from viscircuits.scores.formulas import choose
from viscircuits.tracing import resolve, trace

N_SAMPLES = 16


@dataclass(frozen=True)
class Statistics:
    """What units do over a reference set: the material that removed values are replaced with.

    Parameters
    ----------
    layers
        Address → the layer's description, in execution order.
    mean, variance
        Address → one number for each unit, over images and positions.
    samples
        Address → whole outputs for a few of the reference images, for resampling.
    n_images
        How many reference images there were.
    """

    layers: Mapping[str, Layer]
    mean: Mapping[str, Float[Tensor, " unit"]] = field(default_factory=dict)
    variance: Mapping[str, Float[Tensor, " unit"]] = field(default_factory=dict)
    samples: Mapping[str, Float[Tensor, "image *axes"]] = field(default_factory=dict)
    n_images: int = 0


# (statistics, address, true values, one seed for each image) → replacement
Replacement = Callable[[Statistics, str, Tensor, Sequence[int]], Tensor]


def _zero(statistics: Statistics, layer: str, true: Tensor, seeds: Sequence[int]) -> Tensor:
    return torch.zeros_like(true)


def _mean(statistics: Statistics, layer: str, true: Tensor, seeds: Sequence[int]) -> Tensor:
    axis = statistics.layers[layer].unit_axis
    return along_units(statistics.mean[layer], true, axis).expand_as(true)


def _resample(statistics: Statistics, layer: str, true: Tensor, seeds: Sequence[int]) -> Tensor:
    samples = statistics.samples[layer]
    if samples.shape[1:] != true.shape[1:]:
        raise ViscircuitsError(
            f"layer {layer!r} has shape {tuple(true.shape[1:])} here and {tuple(samples.shape[1:])} on the reference "
            "images; resampling needs images of one size"
        )
    draw = [int(torch.randint(len(samples), (), generator=_seeded(seed))) for seed in seeds]  # one image for all layers
    return samples[draw].to(true)


def _noise(statistics: Statistics, layer: str, true: Tensor, seeds: Sequence[int]) -> Tensor:
    axis = statistics.layers[layer].unit_axis
    own = [seed ^ zlib.crc32(layer.encode()) for seed in seeds]  # other noise in every layer
    noise = torch.stack([torch.randn(true.shape[1:], generator=_seeded(seed)) for seed in own]).to(true)
    spread = along_units(statistics.variance[layer].sqrt(), true, axis)
    return along_units(statistics.mean[layer], true, axis) + spread * noise


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ABLATIONS: dict[str, Replacement] = {"zero": _zero, "mean": _mean, "resample": _resample, "noise": _noise}


def measure(
    model: nn.Module | ModelSpec,
    images: ImageSet | Tensor | Iterable[Tensor],
    layers: Sequence[str],
    *,
    n_samples: int = N_SAMPLES,
    batch_size: int = 16,
    progress: bool = False,
) -> Statistics:
    """Each unit's mean and variance over images and positions, and whole outputs of a few images.

    Parameters
    ----------
    model, images, layers
        As for `attribute`. One layer is enough.
    n_samples
        How many images' outputs are kept for resampling, each image of the set being as likely
        to be kept as any other; 0 keeps none.
    batch_size
        Images per forward pass.
    progress
        Show a progress bar.

    Raises
    ------
    ImageError
        If there are no images.
    """
    spec = as_spec(model)
    chain: dict[str, Layer] = {}
    total: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    positions: dict[str, int] = {}
    samples: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    generator = torch.Generator().manual_seed(0)
    n_images = 0
    count = images.count if isinstance(images, ImageSet) else None
    bar = tqdm(total=count, desc="reference statistics", unit="image", delay=2, disable=not progress)
    with bar, evaluating(spec.model), torch.no_grad():
        for batch in batches(images, spec.transform, batch_size):
            chain = chain or {each.address: each for each in describe_layers(spec, batch.images, layers)}
            places = [_place(n_images + i, n_samples, generator) for i in range(len(batch.images))]
            for address, values in activations(spec.model, layers, batch.images).items():
                _keep(samples[address], values, places)
                flat = by_unit(values, chain[address].unit_axis).double()  # (image, unit, position)
                total[address] = total.get(address, 0) + flat.sum((0, 2)).cpu()
                square[address] = square.get(address, 0) + flat.square().sum((0, 2)).cpu()
                positions[address] = positions.get(address, 0) + flat.shape[0] * flat.shape[2]
            n_images += len(batch.images)
            bar.update(len(batch.images))
    if not n_images:
        raise ImageError("the reference set is empty: no image could be read")
    mean = {layer: total[layer] / positions[layer] for layer in chain}
    variance = {layer: (square[layer] / positions[layer] - mean[layer].square()).clamp(min=0) for layer in chain}
    return Statistics(
        chain,
        {layer: value.float() for layer, value in mean.items()},
        {layer: value.float() for layer, value in variance.items()},
        {layer: torch.stack(kept) for layer, kept in samples.items() if kept},
        n_images,
    )


def _place(number: int, n_samples: int, generator: torch.Generator) -> int | None:
    """Where the image of this number goes in a reservoir, or None: each is kept with the same probability."""
    if number < n_samples:
        return number
    place = int(torch.randint(number + 1, (), generator=generator))
    return place if place < n_samples else None


def _keep(kept: list[Tensor], values: Tensor, places: Sequence[int | None]) -> None:
    for each, place in zip(values.cpu(), places, strict=True):
        if place is not None:
            kept[place : place + 1] = [each.clone()]


@contextmanager
def ablate(
    model: nn.Module | ModelSpec,
    circuit: Circuit,
    ablation: str = "zero",
    *,
    reference: Statistics | None = None,
    keep: bool = False,
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    """Remove every unit of the circuit, or with `keep` everything in its layers but the circuit.

    Parameters
    ----------
    model
        The network; call it inside the context as usual.
    circuit
        The units.
    ablation
        What a removed value becomes: ``zero``, ``mean``, ``resample`` or ``noise``.
    reference
        What `measure` gave for the reference images; needed by all but ``zero``.
    keep
        Keep only the circuit.
    generator
        Where ``resample`` and ``noise`` draw from; by default a fresh one seeded with 0.

    Raises
    ------
    ViscircuitsError
        If the ablation is unknown, needs a reference that was not given, or the circuit's layers
        have other widths than the network's.
    """
    module = as_spec(model).model
    removed = circuit.complement() if keep else circuit
    if not any(removed.units.values()):
        yield
        return
    chosen = {layer: indices for layer, indices in removed.units.items() if indices}
    replacing = _Replacing(module, {layer: circuit.widths[layer] for layer in chosen}, ablation, reference, generator)
    taps = {layer: replacing.tap(layer, indices) for layer, indices in chosen.items()}
    with rewrite(module, taps, before=replacing.start, after=replacing.finish):
        yield


@contextmanager
def prune_edges(
    model: nn.Module | ModelSpec,
    edges: Iterable[Edge],
    ablation: str = "zero",
    *,
    reference: Statistics | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    """Remove single connections: each target stops seeing its pruned sources, nothing else changes.

    The target is recomputed with its pruned sources replaced; other targets see the true ones.
    With several pairs of layers the later ones work on what the earlier ones left.

    Parameters
    ----------
    model
        The network; call it inside the context as usual.
    edges
        Connections between units of any two layers, the source's layer before the target's.
    ablation, reference, generator
        As for `ablate`.

    Raises
    ------
    ViscircuitsError
        As `ablate`.
    """
    module = as_spec(model).model
    edges = tuple(edges)
    if not edges:
        yield
        return
    pruning = _EdgePruning(module, edges, ablation, reference, generator)
    with rewrite(
        module, {layer: pruning.tap_of(layer) for layer in pruning.pruned}, before=pruning.start, after=pruning.finish
    ):
        yield


def describe_layers(spec: ModelSpec, images: Tensor, layers: Iterable[str]) -> list[Layer]:
    """Describe layers, in execution order, that need not feed one another."""
    traced = trace(spec.model, images)
    ordered = sorted(layers, key=traced.value)
    return [layer for address in ordered for layer in resolve(spec.model, traced, [address])]


class _Replacing:
    """Replaces chosen units by what the ablation says; one draw of images for a whole forward pass."""

    def __init__(
        self,
        model: nn.Module,
        widths: Mapping[str, int | None],
        ablation: str,
        reference: Statistics | None,
        generator: torch.Generator | None,
    ) -> None:
        self.model = model
        self.widths = widths
        self.replacement = choose(ABLATIONS, ablation, "ablation")
        self.reference = reference or Statistics({})
        self.generator = generator or torch.Generator().manual_seed(0)
        self.seeds: dict[int, list[int]] = {}  # depth of the pass → a seed for each of its images
        self.layers = dict(self.reference.layers)
        self.busy = False
        if ablation != "zero":
            self._check_reference(ablation, reference)

    def _check_reference(self, ablation: str, reference: Statistics | None) -> None:
        if reference is None:
            raise ViscircuitsError(
                f"{ablation!r} ablation needs reference images: pass reference=measure(model, images, layers) "
                "(--reference IMAGES), or use 'zero'"
            )
        known = reference.samples if ablation == "resample" else reference.mean
        for layer in self.widths:
            if layer not in known:
                raise ViscircuitsError(f"the reference was not measured at layer {layer!r}; measure it there too")

    def start(self, args: tuple, kwargs: dict) -> None:
        """At a forward pass: know the layers, and draw a seed for each image to run."""
        if self.busy:
            return
        images = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.seeds[pass_depth()] = self._draw(len(images))
        self.busy = True
        try:
            with side_passes():
                self._describe(images)
                self.prepare(args, kwargs)
        finally:
            self.busy = False

    def finish(self) -> None:
        """After a forward pass: the next one draws anew."""
        self.seeds.pop(pass_depth(), None)

    def _draw(self, n_images: int) -> list[int]:
        """Seeds for a pass; the passes another context makes for one get the seeds that one has or will have."""
        if pass_depth() and len(self.seeds.get(0, ())) == n_images:
            return self.seeds[0]
        generator = self.generator if not pass_depth() else torch.Generator()
        generator.set_state(self.generator.get_state())
        return torch.randint(2**62, (n_images,), generator=generator).tolist()

    def prepare(self, args: tuple, kwargs: dict) -> None:
        """Whatever else must be known before the forward pass."""

    def _describe(self, images: Tensor) -> None:
        unknown = [layer for layer in self.widths if layer not in self.layers]
        if unknown:
            found = describe_layers(as_spec(self.model), images, unknown)
            self.layers.update({layer.address: layer for layer in found})
        for address, width in self.widths.items():
            n_units = self.layers[address].n_units
            if width is not None and n_units != width:
                raise ViscircuitsError(
                    f"layer {address!r} has {n_units} units in this network, {width} in the circuit: "
                    "the circuit belongs to another network"
                )

    def values(self, layer: str, true: Tensor) -> Tensor:
        """What every unit of the layer would become."""
        depth = max(depth for depth in self.seeds if depth <= pass_depth())
        return self.replacement(self.reference, layer, true, self.seeds[depth])

    def mask(self, layer: str, indices: Iterable[int], like: Tensor) -> Tensor:
        """True at the units named, shaped to broadcast against the layer's output."""
        chosen = torch.zeros(self.layers[layer].n_units, dtype=torch.float32)
        chosen[list(indices)] = 1
        return along_units(chosen, like, self.layers[layer].unit_axis) > 0

    def tap(self, layer: str, indices: Sequence[int]) -> Tap:
        """The tap that removes these units from the layer."""

        def replace(true: Tensor) -> Tensor:
            return true if self.busy else torch.where(self.mask(layer, indices, true), self.values(layer, true), true)

        return replace


class _EdgePruning(_Replacing):
    """Recomputes targets ahead of each forward pass and hands them in when their layer runs."""

    def __init__(
        self,
        model: nn.Module,
        edges: Iterable[Edge],
        ablation: str,
        reference: Statistics | None,
        generator: torch.Generator | None,
    ) -> None:
        self.pruned: dict[str, dict[int, set[Unit]]] = {}  # target layer → target index → its pruned sources
        for edge in edges:
            self.pruned.setdefault(edge.target.layer, {}).setdefault(edge.target.index, set()).add(edge.source)
        sources = {unit.layer for targets in self.pruned.values() for units in targets.values() for unit in units}
        super().__init__(model, dict.fromkeys(sources), ablation, reference, generator)
        self.ordered: list[str] = []  # target layers in execution order
        self.recomputed: dict[str, Tap] = {}
        self.replacements: dict[str, Tensor] = {}

    def prepare(self, args: tuple, kwargs: dict) -> None:
        """Recompute the pruned targets, layer by layer from the input on."""
        images = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if any(module.training for module in self.model.modules()):
            raise ViscircuitsError(
                "pruning edges runs the network several times for one answer, which in training mode would change it; "
                "call model.eval() first"
            )
        if not self.ordered:
            found = self._find({*self.widths, *self.pruned}, images)
            self.layers.update({layer.address: layer for layer in found})
            self._check_edges([layer.address for layer in found])
            self.ordered = [layer.address for layer in found if layer.address in self.pruned]
        self.recomputed, self.replacements = {}, {}
        for target in self.ordered:
            self.recomputed[target] = self._recompute(target, images)

    def _find(self, wanted: set[str], images: Tensor) -> list[Layer]:
        """These layers in execution order: as the reference has them, or if it lacks one by running the network."""
        known = self.reference.layers
        if wanted <= known.keys():
            return [known[address] for address in known if address in wanted]
        return describe_layers(as_spec(self.model), images, wanted)

    def _check_edges(self, order: Sequence[str]) -> None:
        for target, pruned in self.pruned.items():
            for index, sources in pruned.items():
                for unit in (Unit(target, index), *sources):
                    if not 0 <= unit.index < self.layers[unit.layer].n_units:
                        raise LayerError(
                            f"there is no unit {unit}: layer {unit.layer!r} has {self.layers[unit.layer].n_units} units"
                        )
                for unit in sources:
                    if order.index(unit.layer) >= order.index(target):
                        raise LayerError(
                            f"an edge leads from {unit} to {Unit(target, index)}, "
                            f"but {target!r} runs before {unit.layer!r}"
                        )

    def _recompute(self, target: str, images: Tensor) -> Tap:
        """One partial forward pass for each distinct set of pruned sources."""
        groups: dict[frozenset[Unit], list[int]] = {}
        for index, units in self.pruned[target].items():
            groups.setdefault(frozenset(units), []).append(index)
        axis = self.layers[target].unit_axis
        found: dict[int, Tensor] = {}
        for sources, indices in groups.items():
            with rewrite(self.model, {**self.recomputed, **self._without(sources)}):
                (values,) = activations(self.model, [target], images).values()
            found.update({index: values.select(axis, index).clone() for index in indices})

        def hand_in(true: Tensor) -> Tensor:
            new = true.clone()
            for index, values in found.items():
                new.select(axis, index).copy_(values)
            return new

        return hand_in

    def _without(self, sources: Iterable[Unit]) -> dict[str, Tap]:
        """Taps that replace these sources, on top of what was recomputed for their own layer."""
        by_layer: dict[str, list[int]] = {}
        for unit in sources:
            by_layer.setdefault(unit.layer, []).append(unit.index)

        def tap(layer: str, indices: list[int]) -> Tap:
            def replace(flowing: Tensor) -> Tensor:
                true = self.recomputed[layer](flowing) if layer in self.recomputed else flowing
                if layer not in self.replacements:  # made once, so that every target misses the same values
                    self.replacements[layer] = self.values(layer, true)
                return torch.where(self.mask(layer, indices, true), self.replacements[layer], true)

            return replace

        return {layer: tap(layer, indices) for layer, indices in by_layer.items()}

    def tap_of(self, target: str) -> Tap:
        """The tap that hands in what was recomputed for a target layer."""

        def replace(true: Tensor) -> Tensor:
            return true if self.busy else self.recomputed[target](true)

        return replace
