"""What circuits of pretrained networks are found on, and what they are tested on.

1. A group of ``imagenet-sample`` is cross-fitted: its photographs are dealt into folds; the circuit of a fold is
   found on the other folds and tested on it, so that each is tested once. Of the photographs outside the group some
   are drawn to be tested, each with one fold's circuit; of the others the reference, the same for all folds.
2. A class of ``tiny-imagenet`` is found on training images and tested on validation images, its own and those of
   other classes; both only of classes that the network knows.
3. The network of the quick run has random weights; its concept is what it answers most often on seeded noise.

Nothing that tests a circuit has found it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from viscircuits import load_model
from viscircuits.errors import ViscircuitsError
from viscircuits.hooks import evaluating, forward
from viscircuits.models import ModelSpec, as_spec
from viscircuits.prefix import Prefix
from viscircuits.task import answers

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NETWORKS = {"lite0": "EfficientNet-Lite0", "squeezenet1_1": "SqueezeNet 1.1"}
QUICK = "quick"
START = {"lite0": ("blocks.4.0",)}  # whose second batch norm is the first layer of interest
GROUPS = ("dog", "bird", "cat", "insect", "fish", "fruit", "car")
FOLDS, N_FOLDS = {"lite0": 3}, 2  # of groups; more where the budget allows it
N_OTHERS, N_REFERENCE = 80, 400
N_CLASS_FIND, N_CLASS_TEST, N_CLASS_REFERENCE, N_CLASS_OTHERS = 32, 50, 196, 98
LEAST_ACCURACY = 0.3  # of a class, on training images, to be asked about
BATCH = 32

T = TypeVar("T")
Part = tuple[Tensor, Tensor]  # images and their labels


@dataclass(frozen=True)
class Photographs:
    """A network, and the photographs that find and test circuits of one concept."""

    spec: ModelSpec
    layers: tuple[str, ...]
    concept: Part
    reference: Part
    others: Part
    folds: tuple[Fold, ...]
    prefix: Prefix


@dataclass(frozen=True)
class Fold:
    """Places among the concept's photographs to find with and to test, and among the others to test."""

    find: tuple[int, ...]
    test: tuple[int, ...]
    others: tuple[int, ...]


def load(
    network: str,
    source: str,
    concept: str,
    cache_folder: Path,
    seed: int = 0,
    *,
    n_folds: int | None = None,
    n_others: int = N_OTHERS,
) -> Photographs:
    """The photographs of a concept: a group of ``groups``, a class of ``classes``, or of noise for the quick run.

    A group, or noise, is dealt into `n_folds`, by default as many as the network has in the tables, and set beside
    `n_others`, if there are as many.
    """
    n_folds = folds_of(network, source) if n_folds is None else n_folds
    if network == QUICK:
        return _noise(seed, n_folds, n_others)
    spec = network_of(network)
    if source == "groups":
        concept_part, reference, others, folds = _group(network, concept, cache_folder, seed, n_folds, n_others)
        prefix = _prefix_of_sample(network, cache_folder)
    else:
        concept_part, reference, others, folds = _class(network, concept, cache_folder)
        prefix = _prefix(
            spec, _start(network, spec), torch.cat([part[0] for part in (concept_part, reference, others)])
        )
    return Photographs(spec, later_half(spec), concept_part, reference, others, folds, prefix)


@cache
def network_of(network: str) -> ModelSpec:
    """The network, in the memory format in which its convolutions are quickest."""
    spec = load_model(network)
    spec.model.to(memory_format=torch.channels_last)
    return spec


def title_of(network: str) -> str:
    """The network's usual name."""
    return NETWORKS.get(network, network)


def _prefix(spec: ModelSpec, start: Sequence[str], images: Tensor) -> Prefix:
    return Prefix(spec.model, start, images, BATCH)


@cache
def _prefix_of_sample(network: str, cache_folder: Path) -> Prefix:
    """Of all of imagenet-sample, whatever the group."""
    spec = network_of(network)
    return _prefix(spec, _start(network, spec), torch.from_numpy(np.load(_cached(network, cache_folder))))


def _start(network: str, spec: ModelSpec) -> Sequence[str]:
    """Where images are looked at from: what makes the units of the first layer of interest is in it, or follows."""
    return START.get(network, later_half(spec))


def later_half(spec: ModelSpec) -> tuple[str, ...]:
    if spec.layers is None:
        raise ViscircuitsError(f"{spec.address} has no default layers to take the later half of")
    return tuple(spec.layers[len(spec.layers) // 2 :])


# ------------------------------------------------------------------ folds


def dealt(n: int, n_hands: int, seed: int) -> list[list[int]]:
    """Numbers below `n` in a seeded order, dealt into hands whose sizes differ by one at most, each sorted."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return [sorted(order[i::n_hands]) for i in range(n_hands)]


def folds_of(network: str, source: str) -> int:
    """How many folds the photographs of a concept are dealt into."""
    return FOLDS.get(network, N_FOLDS) if source == "groups" else 1


def cross_fitted(n: int, n_others: int, seed: int, n_folds: int) -> tuple[Fold, ...]:
    """Folds of which each photograph of the concept, and each other one, is tested in exactly one."""
    hands, other_hands = dealt(n, n_folds, seed), dealt(n_others, n_folds, seed + 1)
    return tuple(
        Fold(tuple(sorted(set(range(n)) - set(hand))), tuple(hand), tuple(others))
        for hand, others in zip(hands, other_hands, strict=True)
    )


def _drawn(places: Sequence[T], n: int, seed: int) -> list[T]:
    """`n` of them, or all if there are no more, in their order."""
    chosen = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:n]
    return [places[i] for i in sorted(chosen.tolist())]


# ------------------------------------------------------------------ groups of imagenet-sample


def group_members(concept: str) -> list[str]:
    """File names of a group."""
    return sorted(json.loads((DATA / "imagenet-sample" / "groups.json").read_text(encoding="utf-8"))[concept])


def _files() -> list[str]:
    return sorted(path.name for path in (DATA / "imagenet-sample").glob("*.jpg"))


def prepare(network: str, cache_folder: Path) -> None:
    """Transform all of imagenet-sample once for a network, into a file that is mapped into memory."""
    path = _cached(network, cache_folder)
    if path.is_file():
        return
    spec = network_of(network)
    first = _read(spec, [DATA / "imagenet-sample" / _files()[0]])
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part.npy")
    images = np.lib.format.open_memmap(draft, "w+", np.float32, (len(_files()), *first.shape[1:]))
    for i, name in enumerate(_files()):
        images[i] = _read(spec, [DATA / "imagenet-sample" / name])[0].numpy()
    images.flush()
    draft.replace(path)


def _cached(network: str, cache_folder: Path) -> Path:
    return cache_folder / f"images-{network}.npy"


def _group(
    network: str, concept: str, cache_folder: Path, seed: int, n_folds: int, n_others: int
) -> tuple[Part, Part, Part, tuple[Fold, ...]]:
    files, members = _files(), set(group_members(concept))
    mine = [i for i, name in enumerate(files) if name in members]
    rest = [i for i, name in enumerate(files) if name not in members]
    test = _drawn(rest, n_others, seed)
    find = _drawn(sorted(set(rest) - set(test)), N_REFERENCE, seed + 1)
    images = np.load(_cached(network, cache_folder), mmap_mode="r")
    parts = [_part(images, files, places) for places in (mine, find, test)]
    return parts[0], parts[1], parts[2], cross_fitted(len(mine), len(test), seed, n_folds)


def _part(images: np.ndarray, files: Sequence[str], places: Sequence[int]) -> Part:
    labels = torch.tensor([int(files[i].split("_")[0]) for i in places])
    return torch.from_numpy(np.array(images[list(places)])), labels


def _read(spec: ModelSpec, paths: Sequence[Path]) -> Tensor:
    if spec.transform is None:
        raise ViscircuitsError(f"{spec.address} has no transform")
    return torch.stack([spec.transform(Image.open(path).convert("RGB")) for path in paths])


# ------------------------------------------------------------------ classes of tiny-imagenet


def chosen_classes(network: str, n: int, cache_folder: Path, seed: int) -> list[str]:
    """`n` of the classes that the network knows, drawn."""
    return _drawn(_known_classes(network, cache_folder), n, seed) if n else []


def _known_classes(network: str, cache_folder: Path) -> list[str]:
    """Classes that the network often tells on enlarged training images; kept in the cache folder."""
    path = cache_folder / f"classes-{network}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_accuracies(network), indent=1) + "\n", encoding="utf-8")
    accuracies = json.loads(path.read_text(encoding="utf-8"))
    return sorted(name for name, accuracy in accuracies.items() if accuracy >= LEAST_ACCURACY)


def _accuracies(network: str, n: int = 20) -> dict[str, float]:
    """Class → accuracy on the last training images, which find no circuit."""
    spec, found = network_of(network), {}
    for name, output in _outputs(spec).items():
        images = _read(spec, _class_files("train", name)[-n:])
        with evaluating(spec.model), torch.no_grad():
            found[name] = (forward(spec.model, images).argmax(1) == output).float().mean().item()
    return found


def _outputs(spec: ModelSpec) -> dict[str, int]:
    """Class → the network's output for it, by WordNet id."""
    classes = json.loads((DATA / "tiny-imagenet" / "classes.json").read_text(encoding="utf-8"))
    places = {names[-1]: i for i, names in enumerate(spec.classes or ())}
    return {name: places[each["wnid"]] for name, each in classes.items() if each["wnid"] in places}


def _class_files(part: str, name: str) -> list[Path]:
    return sorted((DATA / "tiny-imagenet" / part / name).iterdir())


def _class(network: str, concept: str, cache_folder: Path) -> tuple[Part, Part, Part, tuple[Fold, ...]]:
    spec = network_of(network)
    outputs = _outputs(spec)
    rest = [name for name in sorted(outputs) if name != concept]
    find = _class_files("train", concept)[:N_CLASS_FIND]
    test = _class_files("val", concept)[:N_CLASS_TEST]
    mine = _read(spec, [*find, *test]), torch.full((len(find) + len(test),), outputs[concept])
    reference = _of_classes(spec, outputs, rest, "train", N_CLASS_REFERENCE)
    known = [name for name in _known_classes(network, cache_folder) if name != concept]  # the others can fall
    others = _of_classes(spec, outputs, known, "val", N_CLASS_OTHERS)
    fold = Fold(tuple(range(len(find))), tuple(range(len(find), len(find) + len(test))), tuple(range(len(others[0]))))
    return mine, reference, others, (fold,)


def _of_classes(spec: ModelSpec, outputs: dict[str, int], names: Sequence[str], part: str, n: int) -> Part:
    """The same number of images of each class, the first of each."""
    each = max(1, n // len(names))
    files = [(path, outputs[name]) for name in names for path in _class_files(part, name)[:each]]
    return _read(spec, [path for path, _ in files]), torch.tensor([label for _, label in files])


# ------------------------------------------------------------------ the quick run


def _noise(seed: int, n_folds: int, n_others: int) -> Photographs:
    """A network of random weights and seeded noise; the concept is its most frequent answer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(16, 20, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(80, 6),
        ).eval()  # fmt: skip
    images = torch.randn(160, 3, 12, 12, generator=generator) + torch.randn(160, 3, 1, 1, generator=generator)
    labels = answers(as_spec(model), images, BATCH)
    concept = int(labels.bincount().argmax())
    mine, rest = (which.nonzero().flatten() for which in (labels == concept, labels != concept))
    half = len(rest) // 2
    parts = [(images[places], labels[places]) for places in (mine, rest[:half], rest[half:][:n_others])]
    folds = cross_fitted(len(mine), len(parts[2][0]), seed, n_folds)
    layers = ("1", "3", "5")
    prefix = _prefix(as_spec(model), ("0",), images)  # which makes the units of "1"
    return Photographs(as_spec(model), layers, parts[0], parts[1], parts[2], folds, prefix)
