"""From images to a circuit with its evidence, in one call.

1. Each image set is parted: the first part finds the circuit, the second, never seen, tests it.
2. `attribute` on the first part (taken from the folder if it was computed there before).
3. `select` the units; nothing here needs the network.
4. `evaluate` on the second part, beside the controls.
5. `exemplars`: what excites each chosen unit.
6. Everything into one folder, with its page.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from viscircuits.ablation import ABLATIONS, N_SAMPLES, measure
from viscircuits.attribution import N_DIGEST, Seen, attribute, find_layers, versions, what_ran
from viscircuits.bundle import Bundle
from viscircuits.circuit import Circuit, Unit
from viscircuits.editing import Edited, edit
from viscircuits.errors import FileFormatError, ImageError, ModelError, ViscircuitsError
from viscircuits.evaluation import Evaluation, LabelSource, evaluate, find_labels
from viscircuits.exemplars import Exemplar, exemplars
from viscircuits.files import write_atomically
from viscircuits.images import ImageSet, Source, batches, open_images, split
from viscircuits.matrices import CONTRASTS, Attributions
from viscircuits.models import ModelSpec, as_spec, load_model
from viscircuits.scores.formulas import SCORES, SUMMARIES, choose
from viscircuits.selection import REFINEMENTS, select, units_per_layer

UNFINISHED = "attributions.unfinished.safetensors"  # of a run that has not come to its end
N_CHECKED = 16  # images an edit is compared on
MOST_TO_FIND = 32  # images used to find a circuit unless told otherwise: more changes little, see docs/results.md


def discover(
    model: nn.Module | ModelSpec,
    images: Source,
    out: str | Path | None = None,
    *,
    reference: Source | None = None,
    test: Source | None = None,
    others: Source | None = None,
    find_with: int | None = None,
    layers: Sequence[str] | None = None,
    units: int | float | dict[str, int] = 0.1,
    score: str = "cla",
    summary: str = "norm",
    contrast: str | None = None,
    refine: str = "coordinate",
    ablation: str = "zero",
    labels: LabelSource | None = "auto",
    draws: int = 5,
    edge_fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    n_pictures: int = 4,
    n_pictured: int = 12,
    title: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    strict: bool = False,
    command: str = "",
    progress: bool = False,
) -> Bundle:
    """Find the circuit of a concept, test it on images it has not seen, and save all of it.

    Parameters
    ----------
    model
        The network.
    images
        The concept: whatever `open_images` takes.
    out
        Folder for the result; None keeps it in memory.
    reference
        Images without the concept. They give the contrast, the replacement values of every
        ablation but ``zero``, and the "others" of the test.
    test, others
        Images to test on, in place of the held-out part of `images` and `reference`.
    find_with
        How many images of each set find the circuit; by default half, at most 32.
    layers
        Addresses; by default the network's post-activation layers.
    units
        Units per layer: a number, a fraction, or layer → number.
    score, summary
        As for `attribute`.
    contrast
        ``none``, ``difference`` or ``ratio``; by default ``difference`` if there is a reference.
    refine
        As for `select`.
    ablation
        As for `ablate`.
    labels
        As for `evaluate`.
    draws, edge_fractions
        As for `evaluate`.
    n_pictures
        Image regions shown for each unit; 0 for none.
    n_pictured
        Units of each layer that get pictures: those with the highest scores.
    title
        The concept's name; by default that of the folder or file.
    batch_size
        Images per forward pass.
    seed
        Of every random choice.
    strict
        Stop at the first image that cannot be read.
    command
        The command to show on the page.
    progress
        Show progress bars.

    Returns
    -------
    Bundle
        Circuit, attributions, evaluation and pictures.

    Raises
    ------
    ViscircuitsError
        Whatever the caller can mend: its message says what was given and what to do.
    """
    spec = as_spec(model)
    contrast = contrast or ("none" if reference is None else "difference")
    for registry, name, what in (
        (SCORES, score, "score"), (SUMMARIES, summary, "summary"), (REFINEMENTS, refine, "refinement"),
        (CONTRASTS, contrast, "contrast"), (ABLATIONS, ablation, "ablation"),
    ):  # fmt: skip
        choose(registry, name, what)
    _check_numbers(draws=(draws, 1), pictures=(n_pictures, 0), pictured=(n_pictured, 0), batch_size=(batch_size, 1))
    _check_reference(contrast, ablation, reference)
    concept, tested = _part("concept", images, test, find_with, seed, strict)
    background, untested = (
        (None, None) if reference is None else _part("reference", reference, others, find_with, seed, strict)
    )
    if reference is None and others is not None:
        untested = open_images(others, strict=strict)
    chain = find_layers(spec, concept, layers)
    units_per_layer({layer.address: layer.n_units for layer in chain}, units)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `evaluate` will say it
        find_labels(
            spec, [tested] if untested is None else [tested, untested], labels
        )  # a mistake shows before the work
    _check_folder(out)
    options = {"score": score, "summary": summary, "layers": [layer.address for layer in chain]}
    attributions = _saved(out, spec, options, concept, background) or attribute(
        spec, concept, options["layers"], reference=background, score=score, summary=summary,
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    _check_apart(attributions)
    if out is not None:  # kept at once: this is what takes the time
        attributions.save(Path(out) / UNFINISHED)
    statistics = None
    if background is not None and ablation != "zero":
        n_samples = N_SAMPLES if ablation == "resample" else 0
        statistics = measure(
            spec, background, options["layers"], n_samples=n_samples, batch_size=batch_size, progress=progress
        )
    circuit = select(
        attributions.contrast(contrast), units, refine=refine, generator=torch.Generator().manual_seed(seed)
    )
    circuit = replace(
        circuit,
        provenance={
            **circuit.provenance,
            "ablation": ablation,
            "seed": seed,
            "sources": _sources(images=images, reference=reference),
        },
    )
    evaluation = evaluate(
        spec, circuit, tested, untested, attributions=attributions, labels=labels, ablation=ablation,
        reference=statistics, draws=draws, edge_fractions=edge_fractions, batch_size=batch_size, seed=seed,
        progress=progress,
    )  # fmt: skip
    axes = {layer.address: layer.unit_axis for layer in chain}
    pictures = _pictures(spec, strongest(circuit, n_pictured), concept, axes, n_pictures, batch_size, progress)
    bundle = Bundle(circuit, attributions, evaluation, pictures, title or concept_name(images), command)
    if out is not None:
        bundle.save(out)
        (Path(out) / UNFINISHED).unlink(missing_ok=True)
    return bundle


def concept_name(images: Source) -> str:
    """A name for the concept: the folder's or file's own, or the rendered concept's."""
    if isinstance(images, ImageSet):
        images = images.address
    return Path(str(images).split(",")[0]).stem.removeprefix("render:") if isinstance(images, str | Path) else "concept"


def strongest(circuit: Circuit, n: int) -> list[Unit]:
    """The `n` units of each layer with the highest scores, in the circuit's order."""
    found = []
    for layer, indices in circuit.units.items():
        scores = circuit.scores.get(layer) or (0.0,) * len(indices)
        ranked = sorted(zip(indices, scores, strict=True), key=lambda pair: -pair[1])[:n]
        found += [Unit(layer, index) for index in sorted(index for index, _ in ranked)]
    return found


def evaluate_again(
    folder: str | Path,
    images: Source,
    *,
    others: Source | None = None,
    reference: Source | None = None,
    ablation: str | None = None,
    labels: LabelSource | None = "auto",
    weights: str | Path | None = None,
    draws: int = 5,
    batch_size: int = 8,
    seed: int = 0,
    command: str = "",
    progress: bool = False,
) -> Bundle:
    """Test the circuit of a result folder on other images or under another ablation; renew the folder.

    Parameters
    ----------
    folder
        What `discover` wrote.
    images, others
        Images with and without the concept.
    reference
        Where ``mean``, ``resample`` and ``noise`` take their values from; by default the reference
        images the circuit was found with.
    ablation
        By default the circuit's own.
    weights
        Where the model's weights are, if not where they were.
    command
        The command to show on the page beside that which found the circuit.
    labels, draws, batch_size, seed, progress
        As for `evaluate`.

    Raises
    ------
    ImageError
        If every image was used to find the circuit and so cannot test it.
    """
    bundle = Bundle.load(folder)
    spec = model_of(bundle.circuit, weights)
    tested = open_images(images)
    background = None if others is None else open_images(others)
    ablation = ablation or bundle.circuit.provenance.get("ablation", "zero")
    source = None if ablation == "zero" else _reference_of(bundle.circuit, ablation, reference)
    evaluation = evaluate(
        spec, bundle.circuit, tested, background, attributions=bundle.attributions, labels=labels, ablation=ablation,
        reference=source, draws=draws, batch_size=batch_size, seed=seed,
        progress=progress,
    )  # fmt: skip
    evaluation = Evaluation({**evaluation.data, "command": command})
    bundle = replace(bundle, evaluation=evaluation)
    bundle.save(folder)
    return bundle


def edit_from(
    folder: str | Path,
    out: str | Path,
    *,
    onnx: str | Path | None = None,
    images: Source | None = None,
    reference: Source | None = None,
    ablation: str | None = None,
    weights: str | Path | None = None,
) -> tuple[Edited, float | None]:
    """Write the network without the circuit of a result folder, as safetensors and perhaps as ONNX.

    Parameters
    ----------
    folder
        What `discover` wrote.
    out
        Where the weights go.
    onnx
        Where the ONNX file goes, if there shall be one.
    images, reference
        To check on, and to take means from; by default the images the circuit was found with.
    ablation
        By default the circuit's own.
    weights
        Where the model's weights are, if not where they were.

    Returns
    -------
    tuple
        The edited network, and how far the ONNX file differs from it (None without one).
    """
    if Path(out).suffix != ".safetensors":
        raise ViscircuitsError(f"edited weights are safetensors: name the file so, not {str(out)!r}")
    bundle = Bundle.load(folder)
    provenance = bundle.circuit.provenance
    spec = model_of(bundle.circuit, weights)
    ablation = ablation or provenance.get("ablation", "zero")
    statistics = None
    if ablation != "zero":
        background = _reference_of(bundle.circuit, ablation, reference)
        statistics = measure(spec, background, bundle.circuit.layers, n_samples=0)
    checked = open_images(images, limit=N_CHECKED) if images is not None else _found_with(provenance, "images")
    batch = next(iter(batches(checked, spec.transform, N_CHECKED)), None)
    if batch is None:
        raise ImageError("no image could be read to check the edit on; give some (--images IMAGES)")
    edited = edit(spec, bundle.circuit, batch.images, ablation=ablation, reference=statistics)
    edited.save(out)
    return edited, None if onnx is None else edited.export_onnx(onnx, batch.images)


def model_of(circuit: Circuit, weights: str | Path | None = None) -> ModelSpec:
    """Load the model a circuit was found in, and check that it is the same one.

    Raises
    ------
    ModelError
        If the model was not loaded by address, or has other weights now.
    """
    provenance = circuit.provenance
    try:
        spec = load_model(provenance["model"], weights=weights or provenance.get("weights_from", "default"))
    except KeyError as error:
        raise ModelError("the circuit does not say which model it is from") from error
    if spec.weights_digest() != provenance["weights"]:
        raise ModelError(
            f"the weights of {provenance['model']!r} are not those the circuit was found in; "
            "pass the file they were in (--weights FILE)"
        )
    return spec


def _sources(**given: Source | None) -> dict[str, Any]:
    """What must be opened to have the image sets again, as far as it can be written down."""
    written = {what: _written(source) for what, source in given.items()}
    return {what: source for what, source in written.items() if source is not None}


def _written(source: Source | None) -> str | list[Any] | None:
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, list | tuple):
        parts = [_written(part) for part in source]
        return None if None in parts else parts
    return None


def _reference_of(circuit: Circuit, ablation: str, given: Source | None) -> ImageSet:
    """The reference images to use: those given, else those the circuit was found with."""
    if given is not None:
        return open_images(given)
    if "reference" not in circuit.provenance:
        raise ViscircuitsError(f"ablation {ablation!r} needs reference images (--reference IMAGES), or use 'zero'")
    return _found_with(circuit.provenance, "reference")


def _found_with(provenance: Mapping[str, Any], what: str) -> ImageSet:
    """The very images of a set that a circuit was found with, opened again."""
    if what not in provenance.get("sources", {}):
        raise ImageError(f"the circuit does not say which images it was found with; name some (--{what} IMAGES)")
    try:
        images = open_images(provenance["sources"][what])
    except ImageError as error:
        raise ImageError(f"the images of the circuit are gone: {error} Or name any (--{what} IMAGES).") from error
    names = provenance[what]["names"]
    if callable(images.entries):  # a stream: found again by its place
        return split(images, len(names), provenance["seed"])[0]
    part = ImageSet(images.address, [entry for entry in images.entries if entry.name in set(names)])
    same = {picture.digest[:N_DIGEST] for picture in part}.intersection(provenance[what]["digests"])
    if len(same) != len(set(provenance[what]["digests"])):
        raise ImageError(
            f"{images.address!r} holds {len(same)} of the {len(names)} images the circuit was found with; "
            f"name some (--{what} IMAGES)"
        )
    return part


def _check_numbers(**given: tuple[int, int]) -> None:
    for name, (number, least) in given.items():
        if number < least:
            raise ViscircuitsError(f"{name.replace('_', ' ')} must be at least {least}, got {number}")


def _check_folder(out: str | Path | None) -> None:
    """Make the folder now, so that a place that cannot be written to shows before the work."""
    if out is None:
        return
    if Path(out).exists() and not Path(out).is_dir():
        raise ViscircuitsError(f"{str(out)!r} is a file; give a folder for the result (--out DIR)")
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(out) / UNFINISHED.replace("attributions", "trial"), b"").unlink()
    except OSError as error:
        raise ViscircuitsError(f"cannot write to {str(out)!r} ({error.strerror}); give another (--out DIR)") from error


def _check_apart(attributions: Attributions) -> None:
    """The reference is there to differ from the concept."""
    if attributions.reference is None:
        return
    concept, reference = (set(attributions.provenance[what]["digests"]) for what in ("images", "reference"))
    if concept <= reference or reference <= concept:
        raise ImageError(
            f"{len(concept & reference)} of the {len(reference)} reference images are the concept's own; "
            "give images without the concept (--reference IMAGES)"
        )
    if concept & reference:
        warnings.warn(f"{len(concept & reference)} images are in the concept and in the reference", stacklevel=3)


def _check_reference(contrast: str, ablation: str, reference: Source | None) -> None:
    if reference is None and contrast != "none":
        raise ViscircuitsError(f"contrast {contrast!r} needs reference images (--reference IMAGES)")
    if reference is None and ablation != "zero":
        raise ViscircuitsError(f"ablation {ablation!r} needs reference images (--reference IMAGES), or use 'zero'")


def _part(
    what: str, source: Source, test: Source | None, find_with: int | None, seed: int, strict: bool
) -> tuple[ImageSet, ImageSet]:
    """The images that find the circuit and those that test it."""
    images = open_images(source, strict=strict)
    if test is not None:
        return images, open_images(test, strict=strict)
    count = images.count
    if find_with is None and count is None:
        raise ImageError(f"the {what} set is a stream of unknown length; say how many of it to use (--find-with N)")
    if count is not None and count < 2:
        raise ImageError(
            f"the {what} set {images.address!r} has {count} image; at least 2 are needed, "
            "to find with one and test on the other. Give test images of their own (--test IMAGES), or more images."
        )
    n = min(MOST_TO_FIND, (count or 0) // 2) if find_with is None else find_with
    if n < 1 or (count is not None and n >= count):
        raise ImageError(f"cannot find a circuit with {n} of {count} {what} images and test it on the rest")
    return split(images, n, seed)


def _saved(
    out: str | Path | None, spec: ModelSpec, options: dict[str, Any], concept: ImageSet, reference: ImageSet | None
) -> Attributions | None:
    """Attributions of an earlier run into the same folder, if they were made from the very same things."""
    files = () if out is None else (Path(out) / UNFINISHED, Path(out) / "attributions.safetensors")
    candidates = []
    for file in files:
        with suppress(FileFormatError):
            candidates.append(Attributions.load(file))
    if not candidates:
        return None
    expected = {
        **what_ran(spec),
        **options,
        "engines": None,
        "images": _described(spec, concept),
        "versions": versions(),
    }
    if reference is not None:
        expected["reference"] = _described(spec, reference)
    for found in candidates:
        expected["engines"] = found.provenance.get("engines")  # these give the same numbers
        if found.provenance == expected:
            return replace(found, provenance=expected)  # in the order of a fresh run: a header's entries are sorted
    return None


def _described(spec: ModelSpec, images: ImageSet) -> dict[str, Any]:
    seen = Seen()
    for batch in batches(images, spec.transform, 16):
        seen.add(batch)
    return seen.describe(images)


def _pictures(
    spec: ModelSpec, units: list[Unit], images: ImageSet, axes: dict[str, int], n: int, batch_size: int, progress: bool
) -> dict[Unit, list[Exemplar]]:
    if not n or spec.transform is None:
        return {}

    def watch(stream: Any) -> Any:
        return tqdm(stream, desc="pictures", delay=2, disable=not progress)

    try:
        return exemplars(
            spec.model, units, images, spec.transform, n=n, batch_size=batch_size, unit_axes=axes, progress=watch
        )
    except ImageError as error:
        warnings.warn(f"the result has no pictures of its units: {error}", stacklevel=3)
        return {}
