"""Edges pruned by the thousand, exactly, where the way from a layer to the next is linear up to each unit's own.

`viscircuits.ablation.prune_edges` runs part of the network once for each distinct set of pruned sources, whatever lies
between two layers. In most networks what lies there is simple: the sources are mixed by linear maps, and what unit n
makes of the sum arriving at it depends on that sum alone (its activation, a depthwise filter). A `Link` says so of two
layers. Then pruning any set of edges takes one pass: from the sum arriving at n is taken what its pruned sources bring
beyond what their replacements would::

    z_n  ←  z_n − Σ_{m pruned} K_nm ∗ (A_m − r_m)

with K the kernel of all linear maps between them. `Pruner` does this for a chain of links, later ones working on what
earlier ones left, and replays what precedes the first. `Running` gives the same through `prune_edges` for layers
that no link describes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from viscircuits.ablation import Statistics, ablate, prune_edges
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.errors import LayerError
from viscircuits.experiments.training import lighten
from viscircuits.hooks import Tap, activations, evaluating, forward, rewrite
from viscircuits.models import ModelSpec
from viscircuits.prefix import Prefix

Masks = Mapping[str, Bool[Tensor, "target source"]]  # source layer → which of its edges to the next layer are pruned
BATCH = 50


@dataclass(frozen=True)
class Link:
    """Two layers between which sources are mixed by linear maps alone.

    Parameters
    ----------
    source, target
        Addresses of the layers.
    mixing
        The modules that carry the source to the target, in order; together linear but for a constant.
    enters
        Address at which their sum arrives. Unit n of the target depends on channel n of it alone.
    """

    source: str
    target: str
    mixing: tuple[str, ...]
    enters: str

    @property
    def layers(self) -> tuple[str, str]:
        """Source and target."""
        return self.source, self.target


def kernel(model: nn.Module, link: Link) -> Float[Tensor, "target source height width"]:
    """What one source unit adds to each arriving sum, position by position: found by giving the mixing an impulse.

    Raises
    ------
    LayerError
        If the mixing is not a convolution of stride 1, whose kernel an impulse shows in whole.
    """
    modules = [model.get_submodule(name) for name in link.mixing]
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    if not convolutions or any(module.stride != (1, 1) or module.groups != 1 for module in convolutions):
        raise LayerError(f"from {link.source!r} to {link.target!r} there are no plain convolutions of stride 1 alone")
    reach = sum(int(module.padding[0]) for module in convolutions)
    n_sources, side = convolutions[0].in_channels, 2 * reach + 1
    impulses = torch.zeros(n_sources + 1, n_sources, side, side)
    impulses[range(n_sources), range(n_sources), reach, reach] = 1
    with evaluating(model), torch.no_grad():
        seen = impulses
        for module in modules:
            seen = module(seen)  # (source, target, side, side)
    return (seen[:-1] - seen[-1:]).flip(2, 3).transpose(0, 1).contiguous()


def weights_of(model: nn.Module, links: Sequence[Link]) -> dict[str, Float[Tensor, "target source"]]:
    """Source layer → size of every edge's kernel."""
    return {link.source: kernel(model, link).flatten(2).norm(dim=2) for link in links}


@dataclass(frozen=True)
class _Pruned:
    """The rows and columns that hold pruned edges, and the kernel of these edges alone."""

    targets: Int[Tensor, " target"]
    sources: Int[Tensor, " source"]
    kernel: Float[Tensor, "target source height width"]

    @classmethod
    def of(cls, mask: Bool[Tensor, "all_targets all_sources"], whole: Tensor) -> _Pruned:
        targets, sources = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        return cls(targets, sources, whole[targets][:, sources] * mask[targets][:, sources, None, None])


class Pruner:
    """Answers of a network for fixed images when edges or units are removed.

    Parameters
    ----------
    spec
        The network.
    links
        The chain of layers, one link for each pair.
    images
        Transformed images.
    ablation
        What a removed value becomes: ``zero`` or ``mean``.
    statistics
        For ``mean``: what `measure` gave at the layers.
    """

    def __init__(
        self, spec: ModelSpec, links: Sequence[Link], images: Tensor, ablation: str, statistics: Statistics
    ) -> None:
        self.spec, self.links, self.ablation, self.statistics = spec, tuple(links), ablation, statistics
        self.n_images = len(images)
        self.kernels = {link.source: kernel(spec.model, link) for link in links}
        first = links[0].source
        self.to_units = Prefix(spec.model, [first], images, BATCH)
        self.to_edges = Prefix(spec.model, [links[0].enters], images, BATCH)
        for begun in (self.to_units, self.to_edges):
            lighten(begun)
        self.fixed = torch.cat([self._noted(first, places) for places in self._batches()])

    def _batches(self) -> Sequence[Tensor]:
        return torch.arange(self.n_images).split(BATCH)

    def _noted(self, layer: str, places: Tensor) -> Tensor:
        with self.to_units.replay(places) as images, torch.no_grad():
            return activations(self.spec.model, [layer], images)[layer]

    def without_edges(self, masks: Masks) -> Float[Tensor, "image output"]:
        """Outputs with these edges pruned."""
        pruned = {layer: _Pruned.of(mask, self.kernels[layer]) for layer, mask in masks.items() if bool(mask.any())}
        found = []
        for places in self._batches():
            sources = {self.links[0].source: self.fixed[places]}
            taps: dict[str, Tap] = {}
            for link in self.links:
                if link is not self.links[0]:
                    taps[link.source] = partial(_note, sources, link.source)
                if link.source in pruned:
                    taps[link.enters] = partial(self._take_out, link.source, sources, pruned[link.source])
            with self.to_edges.replay(places) as images, torch.no_grad(), rewrite(self.spec.model, taps):
                found.append(forward(self.spec.model, images))
        return torch.cat(found)

    def _take_out(self, layer: str, sources: Mapping[str, Tensor], pruned: _Pruned, arriving: Tensor) -> Tensor:
        beyond = sources[layer][:, pruned.sources]
        if self.ablation == "mean":
            beyond = beyond - self.statistics.mean[layer][pruned.sources, None, None]
        brought = nn.functional.conv2d(beyond, pruned.kernel, padding=pruned.kernel.shape[2] // 2)
        return arriving.index_add(1, pruned.targets, -brought)

    def without_units(self, circuit: Circuit) -> Float[Tensor, "image output"]:
        """Outputs with all units of the circuit removed."""
        found = []
        with ablate(self.spec.model, circuit, self.ablation, reference=self.statistics), torch.no_grad():
            for places in self._batches():
                with self.to_units.replay(places) as images:
                    found.append(forward(self.spec.model, images))
        return torch.cat(found)


def _note(sources: dict[str, Tensor], layer: str, values: Tensor) -> Tensor:
    sources[layer] = values
    return values


class Running:
    """As `Pruner`, for any layers, by running the network for every distinct set of pruned sources."""

    def __init__(
        self, spec: ModelSpec, layers: Sequence[str], images: Tensor, ablation: str, statistics: Statistics
    ) -> None:
        self.spec, self.layers, self.images = spec, tuple(layers), images
        self.ablation, self.statistics = ablation, statistics

    def without_edges(self, masks: Masks) -> Float[Tensor, "image output"]:
        """Outputs with these edges pruned."""
        edges = [
            Edge(Unit(source, m), Unit(target, n), 0.0, 0.0)
            for source, target in pairwise(self.layers)
            if source in masks
            for n, m in masks[source].nonzero().tolist()
        ]
        with prune_edges(self.spec.model, edges, self.ablation, reference=self.statistics):
            return self._outputs()

    def without_units(self, circuit: Circuit) -> Float[Tensor, "image output"]:
        """Outputs with all units of the circuit removed."""
        with ablate(self.spec.model, circuit, self.ablation, reference=self.statistics):
            return self._outputs()

    def _outputs(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([forward(self.spec.model, images) for images in self.images.split(BATCH)])


# ---------------------------------------------------------------- links of known networks


def links_of(model: nn.Module, address: str) -> tuple[Link, ...]:
    """Every link that is known of a network, in execution order; none for one that is not known."""
    if address == "small":
        return tuple(
            Link(f"relu{i}", f"relu{i + 1}", (f"conv{i + 1}", f"norm{i + 1}"), f"relu{i + 1}:in") for i in (3, 4)
        )
    if address != "lite0":
        return ()
    blocks = [name for name, _ in model.named_modules() if name.startswith("blocks.") and name.count(".") == 2]
    inner = [
        Link(f"{a}.bn2", f"{b}.bn2", (f"{a}.conv_pwl", f"{a}.bn3", f"{b}.conv_pw"), f"{b}.bn1:in")
        for a, b in pairwise(blocks[1:])
    ]
    last = blocks[-1]
    return (*inner, Link(f"{last}.bn2", "bn2", (f"{last}.conv_pwl", f"{last}.bn3", "conv_head"), "bn2:in"))


def layers_of(links: Sequence[Link]) -> tuple[str, ...]:
    """The layers of a chain of links.

    Raises
    ------
    LayerError
        If one does not begin where the one before ends.
    """
    for before, after in pairwise(links):
        if before.target != after.source:
            raise LayerError(f"the chain is broken between {before.target!r} and {after.source!r}")
    return (links[0].source, *(link.target for link in links))
