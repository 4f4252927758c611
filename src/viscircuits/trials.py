"""Running a network under many conditions, and keeping a few numbers of each image.

1. A condition is a context, such as an ablation, in which the network runs; `run_trials` reads each batch
   of images once, runs it under every condition, and forgets it.
2. What is kept is one number for each image, condition and measure (`measured`).
3. `find_labels` says which class an image is of; without labels the untouched network's own answers are
   the standard.
4. Images that a circuit was found with (`used_to_find`) cannot test it and are left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from viscircuits.attribution import N_DIGEST, Images, Seen
from viscircuits.errors import ImageError, ViscircuitsError
from viscircuits.hooks import evaluating, forward
from viscircuits.images import Batch, ImageSet, batches
from viscircuits.labels import match_labels
from viscircuits.metrics import correct, cosine_distance, kl_divergence
from viscircuits.models import ModelSpec
from viscircuits.prefix import Prefix
from viscircuits.task import log_probability, margin

LabelSource = str | Path | Mapping[str, str]
ClassOf = Callable[[Batch], Tensor]
Opener = Callable[[], AbstractContextManager[None]]
Measures = dict[str, Tensor]  # measure → one number for each image
Measure = Callable[[ModelSpec, Tensor, Tensor, Tensor | None], Measures]
Key = tuple[str, ...]
Outcomes = dict[Key, Measures]
BASELINE = "baseline"  # the untouched network: its outputs are at hand, and no condition is opened for it


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


def said_to_show(spec: ModelSpec, images: ImageSet, labels: LabelSource | None) -> dict[str, str]:
    """The class's name for each picture, by the picture's own, that a table or its name says; others are left out."""
    if labels is None or spec.classes is None:
        return {}
    named = _named(spec, images)
    names, given = [name for name, _ in named], [label for _, label in named]
    try:
        found = match_labels(names, given, spec.classes, table=None if labels == "auto" else labels, partly=True)
    except ViscircuitsError:  # a label that fits several classes names none
        return {}
    return {name: spec.classes[index][0] for name, index in zip(names, found.indices, strict=True) if index is not None}


def _named(spec: ModelSpec, images: Images) -> list[tuple[str, str | None]]:
    """Names and labels of the pictures of a set; of a stream, those of its beginning."""
    if not isinstance(images, ImageSet):
        return []
    if not callable(images.entries):
        return [(entry.name, entry.label) for entry in images.entries]
    first = next(iter(batches(images, spec.transform, 16)), None)
    return [] if first is None else list(zip(first.names, first.labels, strict=True))


# ------------------------------------------------------------------ running


def run_trials(
    spec: ModelSpec,
    images: Images,
    conditions: Mapping[Key, Opener],
    class_of: ClassOf | None,
    *,
    used: Collection[str] = (),
    only: Collection[int] | None = None,
    measure: Measure | None = None,
    layers: Sequence[str] = (),
    batch_size: int = 16,
    what: str = "concept",
    progress: bool = False,
) -> tuple[Outcomes, dict[str, Any]]:
    """One number for each image, condition and measure, and a description of the images.

    Parameters
    ----------
    spec, images
        The network and the images.
    conditions
        Key → context in which the network runs; a key that ends in `BASELINE` is the untouched network.
    class_of
        The classes of a batch, or None for the network's own answers.
    used
        Digests of images to leave out.
    only
        Places, among the images that are not left out, of those to run; None for all.
    measure
        What is kept of a batch's outputs; by default `measured`.
    layers
        All that the conditions touch, if they are many: what comes before is then run once for each batch.
    batch_size
        Images per forward pass.
    what
        The set's name, for errors and the progress bar.
    progress
        Show a progress bar.

    Raises
    ------
    ImageError
        If no image is left.
    """
    measure = measure or measured
    collected: dict[Key, dict[str, list[Tensor]]] = {key: {} for key in conditions}
    seen = Seen()
    classes: list[int] = []
    n_used = n_fresh = 0
    count = len(images) if isinstance(images, Tensor) else images.count if isinstance(images, ImageSet) else None
    total = None if count is None else count * len(conditions)
    bar = tqdm(total=total, desc=f"evaluation, {what}", unit="run", unit_scale=True, delay=2, disable=not progress)
    with bar, evaluating(spec.model), torch.no_grad():
        for batch in batches(images, spec.transform, batch_size):
            n_read, n_before = len(batch), n_fresh
            batch = _part(batch, [i for i, digest in enumerate(batch.digests) if digest[:N_DIGEST] not in used])
            n_used, n_fresh = n_used + n_read - len(batch), n_fresh + len(batch)
            if only is not None:
                batch = _part(batch, [i for i in range(len(batch)) if n_before + i in only])
            bar.update((n_read - len(batch)) * len(conditions))
            if not len(batch):
                continue
            known = None if class_of is None else class_of(batch)
            classes += [] if known is None else known.tolist()
            full = forward(spec.model, batch.images).float().cpu()
            if known is not None and int(known.max()) >= full.shape[1]:
                raise ViscircuitsError(
                    f"label {int(known.max())} is none of the network's {full.shape[1]} outputs, from 0"
                )
            with _begun(spec, layers, batch.images) as ready:
                for key, opener in conditions.items():
                    with opener():
                        outputs = full if key[-1] == BASELINE else forward(spec.model, ready).float().cpu()
                    for name, values in measure(spec, full, outputs, known).items():
                        collected[key].setdefault(name, []).append(values.double())
                    bar.update(len(batch))
            seen.add(batch)
    if not seen.names and n_used:
        raise ImageError(f"all {n_used} images of the {what} set were used to find the circuit; test on others")
    if not seen.names:
        raise ImageError(f"the {what} set is empty: no image could be read")
    outcome = {key: {m: torch.cat(parts) for m, parts in each.items()} for key, each in collected.items()}
    return outcome, _described(seen, images, n_used, classes)


def _described(seen: Seen, images: Images, n_used: int, classes: list[int]) -> dict[str, Any]:
    """What a result says about the images, and their classes where these are known and the images are named."""
    described = {**seen.describe(images), "left_out": n_used}
    return {**described, "classes": classes} if len(classes) == len(described["names"]) else described


def _begun(spec: ModelSpec, layers: Sequence[str], images: Tensor) -> AbstractContextManager[Tensor]:
    """The images to call the network on, and meanwhile nothing before these layers runs again."""
    if not layers:
        return nullcontext(images)
    return Prefix(spec.model, layers, images, len(images)).replay(range(len(images)))


def used_to_find(provenance: Any) -> set[str]:
    """Digests of every image, of the concept or the reference, that a circuit was found with: they cannot test it."""
    if isinstance(provenance, Mapping):
        own = set(provenance.get("digests", ()))
        return own.union(*(used_to_find(each) for key, each in provenance.items() if key != "digests"))
    if isinstance(provenance, list | tuple):
        return set().union(*(used_to_find(each) for each in provenance if isinstance(each, Mapping)))
    return set()


def _part(batch: Batch, keep: list[int]) -> Batch:
    if len(keep) == len(batch):
        return batch
    return Batch(
        batch.images[keep],
        tuple(batch.names[i] for i in keep),
        tuple(batch.labels[i] for i in keep),
        tuple(batch.digests[i] for i in keep),
    )


def measured(spec: ModelSpec, full: Tensor, outputs: Tensor, known: Tensor | None) -> Measures:
    """One number for each image and measure; the first measure is the one selectivity is about."""
    if spec.outputs == "embedding":
        return {"cosine": 1 - cosine_distance(full, outputs)}
    classes = full.argmax(1) if known is None else known
    return {
        "agreement" if known is None else "accuracy": correct(outputs, classes),
        "logit": outputs.gather(1, classes[:, None]).squeeze(1),
        "kl": kl_divergence(full, outputs),
    }


def measured_smoothly(spec: ModelSpec, full: Tensor, outputs: Tensor, known: Tensor | None) -> Measures:
    """What `measured` gives, and where there are classes the measures that no share of images makes coarse."""
    found = measured(spec, full, outputs, known)
    if spec.outputs == "embedding":
        return found
    classes = full.argmax(1) if known is None else known
    return {**found, "margin": margin(outputs, classes), "log-probability": log_probability(outputs, classes)}
