"""Cross-layer attribution over a set of images.

1. Trace the network once to know its layers, and put the chosen ones in execution order.
2. For each batch run the network just far enough to reach the last of them.
3. For each pair of adjacent layers score every connection (`viscircuits.scores`), image by image.
4. Add the scores up over images; nothing of a batch outlives it, unless per-image scores are
   asked for.

The sums are kept in float64, so batch size and image order change nothing beyond the rounding of
the network itself.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from viscircuits.errors import ImageError, LayerError, ModelError, ViscircuitsError
from viscircuits.hooks import activations, evaluating
from viscircuits.images import Batch, ImageSet, batches, digest_of
from viscircuits.layers import Layer, by_unit
from viscircuits.matrices import AttributionMatrix, Attributions
from viscircuits.models import ModelSpec, as_spec
from viscircuits.scores import loop, structured
from viscircuits.scores.formulas import SCORES, SUMMARIES, choose
from viscircuits.tracing import resolve, trace

Images = ImageSet | Tensor | Iterable[Tensor]

N_DIGEST = 16  # hexadecimal digits that tell one image from another in a result

Engines = tuple[str, ...]
ENGINES: dict[str, Engines] = {"auto": ("structured", "loop"), "loop": ("loop",), "structured": ("structured",)}
ENGINE_BLOCKS: dict[str, Callable[..., Iterator[loop.Block]]] = {"loop": loop.blocks, "structured": structured.blocks}


def attribute(
    model: nn.Module | ModelSpec,
    images: Images,
    layers: Sequence[str] | None = None,
    *,
    reference: Images | None = None,
    score: str = "cla",
    summary: str = "norm",
    per_image: bool = False,
    engine: str = "auto",
    batch_size: int = 8,
    progress: bool = False,
) -> Attributions:
    """How much each unit contributes to each unit of the next layer, averaged over images.

    With the defaults this is the paper's score `‖A_m‖₂ · ‖∂‖A_n‖₂/∂A_m‖₂`, taken per image and
    then averaged. The network is run in evaluation mode and left as it was found.

    Parameters
    ----------
    model
        A network, or a `ModelSpec` (which also knows its transform and default layers).
    images
        The concept: an image set, or a tensor of shape (image, channel, height, width), already
        transformed, or an iterable of such tensors.
    layers
        Addresses, in any order; by default the network's post-activation layers.
    reference
        Images to set the concept against. They are scored in the same way and kept in
        `Attributions.reference`; `Attributions.contrast` combines the two.
    score
        ``cla``, ``grad-x-act``, ``signed`` or ``gradient``.
    summary
        What a target's map is summed up in before the gradient: ``norm``, ``mean``, ``sum``, ``max``.
    per_image
        Keep the scores of each image as well (images × targets × sources numbers a pair).
    engine
        ``loop`` takes one backward pass a target; ``structured`` uses what the network's structure
        allows and gives the same numbers (see `viscircuits.scores.structured`); ``auto`` takes
        ``structured`` wherever it knows every operation between two layers.
    batch_size
        Images per forward pass. Changes speed and memory, not the result.
    progress
        Show a progress bar with the time left.

    Returns
    -------
    Attributions
        One matrix for each pair of adjacent layers, rows targets, columns sources.

    Raises
    ------
    LayerError
        If a layer does not exist, holds no units, or does not feed the next one.
    ImageError
        If there are no images.
    ModelError
        If the network cannot run on the images or its gradients are not finite.

    References
    ----------
    Rajaram et al. 2023, arXiv:2404.14349.
    """
    spec = as_spec(model)
    score_of = choose(SCORES, score, "score")
    summary_of = choose(SUMMARIES, summary, "summary")
    engines = choose(ENGINES, engine, "engine")
    if batch_size < 1:
        raise ViscircuitsError(f"batch size must be at least 1, got {batch_size}")
    _refuse_iterators(images, reference)
    chain = find_layers(spec, images, layers)
    options = {"score": score, "summary": summary, "layers": [layer.address for layer in chain]}
    measured: list[Attributions] = []
    for what, each in (("concept", images), ("reference", reference)):
        if each is None:
            continue
        bar = _bar(each, chain, what, progress)
        with bar, evaluating(spec.model), torch.inference_mode(False), torch.enable_grad():
            sums = _Sums(chain, per_image, engines)
            for batch in batches(each, spec.transform, batch_size):
                values = activations(spec.model, [layer.address for layer in chain], batch.images)
                sums.add(values, batch, score_of, summary_of, bar)
        measured.append(sums.attributions(spec, options, each))
    concept = measured[0]
    if len(measured) == 1:
        return concept
    provenance = {**concept.provenance, "reference": measured[1].provenance["images"]}
    return Attributions(concept.matrices, concept.activity, concept.n_images, provenance, measured[1])


def find_layers(spec: ModelSpec, images: Images, layers: Sequence[str] | None = None) -> list[Layer]:
    """Describe the layers to use, in execution order: those named, else the network's default ones."""
    first = next(batches(images, spec.transform, 1))  # an empty set is an error there
    traced = trace(spec.model, first.images)
    addresses = layers or spec.layers or traced.default_layers()
    chain = resolve(spec.model, traced, addresses)
    if len(chain) < 2:
        raise LayerError(f"attribution needs at least two layers, got {', '.join(addresses)}")
    return chain


def _refuse_iterators(*sets: Images | None) -> None:
    for images in sets:
        if isinstance(images, Iterator):
            raise ImageError(
                f"a {type(images).__name__} can be read only once, and layers have to be found first; "
                "give a list of tensors or an image set"
            )


@dataclass
class _Sums:
    """Running sums of scores over images; the only thing that grows is what `per_image` keeps."""

    chain: list[Layer]
    per_image: bool
    engines: Engines
    n_images: int = 0
    values: list[Tensor] = field(default_factory=list)
    signed: list[Tensor] = field(default_factory=list)
    kept: list[list[Tensor]] = field(default_factory=list)
    activity: dict[str, Tensor] = field(default_factory=dict)
    taken: dict[int, str] = field(default_factory=dict)
    seen: Seen = field(default_factory=lambda: Seen())

    def __post_init__(self) -> None:
        for source, target in self.pairs:
            shape = (target.n_units, source.n_units)
            self.values.append(torch.zeros(shape, dtype=torch.float64))
            self.signed.append(torch.zeros(shape, dtype=torch.float64))
            self.kept.append([])
        for layer in self.chain:
            self.activity[layer.address] = torch.zeros(layer.n_units, dtype=torch.float64)

    @property
    def pairs(self) -> list[tuple[Layer, Layer]]:
        return list(zip(self.chain[:-1], self.chain[1:], strict=True))

    def add(self, values: dict[str, Tensor], batch: Batch, score_of: Callable, summary_of: Callable, bar: tqdm) -> None:
        for layer in self.chain:
            norms = torch.linalg.vector_norm(by_unit(values[layer.address].detach(), layer.unit_axis).float(), dim=2)
            self.activity[layer.address] += norms.double().sum(0).cpu()
        for i, (source, target) in enumerate(self.pairs):
            pair = (values[source.address], values[target.address], source, target)
            kept = []
            for targets, scores, contributions in self._blocks(i, pair, score_of, summary_of):
                self.values[i][targets] += scores.double().sum(0).cpu()
                self.signed[i][targets] += contributions.double().sum(0).cpu()
                if self.per_image:
                    kept.append(scores.cpu())
                bar.update(len(batch.images) * scores.shape[1])
            if self.per_image:
                self.kept[i].append(torch.cat(kept, dim=1))  # (image, target, source)
            if not torch.isfinite(self.values[i]).all():
                raise ModelError(
                    f"the attribution from {source.address!r} to {target.address!r} is not finite "
                    f"({values[source.address].dtype}); run the network in float32, or look for NaN in its weights"
                )
        self.seen.add(batch)
        self.n_images += len(batch.images)

    def _blocks(self, i: int, pair: tuple, score_of: Callable, summary_of: Callable) -> Iterator[loop.Block]:
        """Blocks of a pair's matrix from the first engine that knows every operation on the way."""
        for engine in self.engines[self.engines.index(self.taken.get(i, self.engines[0])) :]:
            try:
                yield from ENGINE_BLOCKS[engine](*pair, score_of, summary_of)
            except structured.Unsupported as error:  # raised before the first block
                if engine == self.engines[-1]:
                    source, target = (layer.address for layer in self.pairs[i])
                    raise LayerError(
                        f"the structured engine has no rule for {error} between {source!r} and {target!r}; "
                        "use engine 'auto'"
                    ) from error
                continue
            self.taken[i] = engine
            return

    def attributions(self, spec: ModelSpec, options: dict[str, Any], images: Images) -> Attributions:
        matrices = tuple(
            AttributionMatrix(
                source.address,
                target.address,
                (self.values[i] / self.n_images).float(),
                (self.signed[i] / self.n_images).float(),
                torch.cat(self.kept[i]) if self.per_image else None,
            )
            for i, (source, target) in enumerate(self.pairs)
        )
        activity = {layer: (total / self.n_images).float() for layer, total in self.activity.items()}
        provenance = {
            **what_ran(spec),
            **options,
            "engines": [self.taken[i] for i in range(len(self.pairs))],
            "images": self.seen.describe(images),
            "versions": versions(),
        }
        return Attributions(matrices, activity, self.n_images, provenance)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    known = {"python": platform.python_version()}
    for package in ("viscircuits", "torch", "torchvision", "timm", "open_clip_torch", "pillow"):
        with suppress(PackageNotFoundError):
            known[package] = version(package)
    return known


def what_ran(spec: ModelSpec) -> dict[str, Any]:
    """What a result says about the network: address, weights and structure."""
    return {
        "model": spec.address,
        "weights": spec.weights_digest(),
        "weights_from": spec.weights,
        "structure": hashlib.sha256(repr(spec.model).encode()).hexdigest()[:N_DIGEST],
    }


@dataclass
class Seen:
    """Which images were run: names, digests of their files, and one digest of what the network was given."""

    names: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    inputs: Any = field(default_factory=hashlib.sha256)

    def add(self, batch: Batch) -> None:
        """Add a batch; how images are batched does not matter."""
        self.names += batch.names
        self.digests += [digest[:N_DIGEST] for digest in batch.digests]
        self.inputs.update(batch.images.detach().cpu().float().contiguous().numpy().tobytes())

    def describe(self, images: Images) -> dict[str, Any]:
        """What a result says about an image set: address, count, digests, names, and what was skipped."""
        skipped = [[each.name, each.reason] for each in getattr(images, "skipped", ())]
        return {
            "address": getattr(images, "address", type(images).__name__),
            "n": len(self.names),
            "digest": digest_of(self.digests),
            "inputs": self.inputs.hexdigest()[:N_DIGEST],
            "names": self.names,
            "digests": self.digests,
            "skipped": skipped,
        }


def _bar(images: Images, chain: list[Layer], what: str, progress: bool) -> tqdm:
    """A progress bar over images × targets, shown only if the work takes more than two seconds."""
    count = len(images) if isinstance(images, Tensor) else images.count if isinstance(images, ImageSet) else None
    total = None if count is None else count * sum(layer.n_units for layer in chain[1:])
    return tqdm(total=total, desc=f"attribution, {what}", unit="row", unit_scale=True, delay=2, disable=not progress)
