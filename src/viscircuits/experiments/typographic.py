"""Text attacks: the circuit of text in a network that reads, and the network without it.

1. The attack: held-out photographs with a word of another class in a held-out font (`attacks`), beside its controls.
2. The circuit: found on training photographs alone, from words on paper, or from photographs with a word against the
   same photographs without. Each method gives a circuit of each size; so do the controls.
3. The choice: of all circuits that one which, on other training photographs, leaves the attack the least at the
   smallest cost (`_choice`). Whatever is reported is measured on held-out photographs.
4. The defence: units of the chosen circuit removed (`mean` ablation over photographs), its edges pruned in order of
   score, and simple defences beside it (`defences`).
5. How far it reaches: other fonts, sizes, places, colours, a shaky hand, words of other languages.
6. The protected network is written as weights.

References
----------
Goh et al. 2021, Distill; Rajaram et al. 2023, arXiv:2404.14349; Vi-CD, arXiv:2604.14477.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from viscircuits.ablation import Statistics, ablate, measure
from viscircuits.circuit import Circuit
from viscircuits.editing import edit
from viscircuits.errors import ViscircuitsError
from viscircuits.experiments import defences
from viscircuits.experiments.attack_report import BLIND, CONTROLS, report_of
from viscircuits.experiments.attacks import KINDS, Trial, attack, tell, words_on_paper
from viscircuits.experiments.defences import bits, of_bits
from viscircuits.experiments.kept import Entry, Kept, digest_of
from viscircuits.experiments.lettering import (
    FACES_HELD_OUT,
    FACES_LIKE_HANDWRITING,
    FACES_TO_TRAIN,
    FACES_WITH_ACCENTS,
    Hand,
    check_hand,
    check_legible,
    shared_faces,
)
from viscircuits.experiments.pictures import PARTS as FOLDERS
from viscircuits.experiments.pictures import Photographs, photograph_files, read_files, render_photographs
from viscircuits.experiments.reader import SIDES, SMALL, card_of, load_reader, train_reader
from viscircuits.experiments.report import Report, check_folder
from viscircuits.experiments.seeds import check_seed
from viscircuits.experiments.translations import TRANSLATIONS
from viscircuits.experiments.zero_shot import zero_shot
from viscircuits.methods import find
from viscircuits.models import ModelSpec
from viscircuits.task import Task, make_task

PARTS = ("find", "choose", "test")
SOURCES = ("words on paper", "words on photographs")
METHODS: Mapping[str, Mapping[str, Any]] = {
    "anchored": {
        "protect": 1.0,
        "answers": "own",
        "sizes": (0.01, 0.02, 0.05, 0.1),
        "steps_a_size": 12,  # of the published figures; the default is 8
        "edges": False,
    },
    "attribution-patching": {"edges": False},
    "activation-difference": {},
    "activation": {},
    "weight-norm": {},
    "random": {},
}
QUICK_METHODS = ("anchored", "activation-difference", "random")
SIZES = (0.01, 0.02, 0.05, 0.10)
COPIES = 3  # wrong words that each photograph carries in turn where the attack is measured
TOLERATED = 0.08  # attack success that a circuit chosen on training photographs may leave
RENDERED_CLASSES = ("red", "blue", "ring", "curve", "stripes")
QUICK_EACH = 2
BATCH = 32
Files = Mapping[str, Sequence[Path]]  # class → photographs


@dataclass(frozen=True)
class Setting:
    """A network and the photographs that find, choose and test."""

    spec: ModelSpec
    layers: tuple[str, ...]
    to_find: Photographs
    to_choose: Photographs
    to_test: Photographs
    learnt: Hand
    held_out: Hand
    seed: int
    methods: tuple[str, ...] = tuple(METHODS)
    sizes: tuple[float, ...] = SIZES
    sources: tuple[str, ...] = SOURCES

    @cached_property
    def reference(self) -> Tensor:
        """Photographs without words, transformed: what removed units are set to the mean of."""
        return self.trial("clean", "find").images

    @cached_property
    def statistics(self) -> Statistics:
        """What units do on the reference."""
        return measure(self.spec, self.reference, self.layers, batch_size=BATCH)

    def trial(self, kind: str, part: str, hand: Hand | None = None, words: Sequence[str] | None = None) -> Trial:
        """A part's photographs in one kind."""
        photographs = {"find": self.to_find, "choose": self.to_choose, "test": self.to_test}[part]
        hand = hand or (self.held_out if part == "test" else self.learnt)
        part_of_seed = self.seed * len(PARTS) + PARTS.index(part)  # no part shares words, places and inks with another
        copies = COPIES if part == "test" else 1
        return attack(self.spec, photographs, kind, hand, part_of_seed, words=words, copies=copies)


def typographic(
    out: str | Path,
    *,
    data: str | Path | None = None,
    model: str = "reader",
    weights: str | Path = "default",
    each: int = 8,
    written: Mapping[str, Any] | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: bool = False,
) -> Report:
    """Find the circuit of text in a network that reads, prune it, and measure what attack and accuracy become.

    Parameters
    ----------
    out
        Folder for parts, weights and the report; a stopped run goes on there.
    data
        ``train`` and ``val`` folders of photographs, a folder for each class; for CLIP, which was not trained here on
        any of them, class folders alone do. None: rendered scenes, and a small reader that is trained on them first.
    model
        ``reader`` (kept with the package), a file of `train_reader`, or ``open_clip:ARCHITECTURE/PRETRAINED``.
    weights
        For an open_clip model: ``default``, ``none`` or a file.
    each
        Held-out photographs of each class; as many find circuits, and as many choose. A quick run takes 2 at most.
    written
        How the attack that is measured is written, where it differs from the usual: fields of `Hand`, as in
        ``{"place": "top", "colour": "red on white"}``.
    seed
        Of the photographs that find and choose, of words, places and methods. Those that test are the first `each` of
        every class in ``val`` whatever the seed; only where CLIP has no ``val`` are they drawn as the others are.
    quick
        A small run that shows that everything works.
    progress
        Show progress bars.

    Raises
    ------
    ViscircuitsError
        If the data do not do, or a package is missing; it says what to do.
    FileFormatError
        If the folder holds the result of another experiment.
    """
    out, written = Path(out), dict(written or {})
    check_folder(out, "typographic")
    check_seed(seed)
    check_hand(Hand(**written))
    if data is None and (model, str(weights)) != ("reader", "default"):
        raise ViscircuitsError(
            f"{model!r} needs photographs to be asked about (--data DIR); without them a small reader is trained"
        )
    if data is None:
        setting = _rendered(out, written, seed, quick, progress)
    else:
        _check_model(model, weights)
        setting = _on(data, model, weights, written, min(each, QUICK_EACH) if quick else each, seed)
    if quick:
        setting = replace(setting, methods=QUICK_METHODS, sizes=(0.05, 0.1), sources=SOURCES[1:])
    made = {
        "model": setting.spec.address, "weights": setting.spec.weights_digest()[:12], "data": _named(data),
        "photographs": f"{len(setting.to_find)} find, {len(setting.to_choose)} choose, {len(setting.to_test)} test",
        "layers": f"{setting.layers[0]} … {setting.layers[-1]}", "ablation": "mean", "seed": seed,
    }  # fmt: skip
    if written:
        made["written"] = ", ".join(f"{name} {value}" for name, value in written.items())
    methods = {name: METHODS[name] for name in setting.methods}
    decides = {
        "methods": methods, "sizes": setting.sizes, "pixels": _pixels(setting), "hand": asdict(setting.held_out),
        "version": 4,
    }  # fmt: skip
    kept = Kept(out / "parts.jsonl", {**made, **decides})
    run = _Run(setting, kept, progress)
    curves = run.curves()
    chosen = _choice(curves)
    measured = {
        "whole": run.whole(), "curves": curves, "chosen": chosen, "removed": run.removed(chosen),
        "faces seen": shared_faces(setting.held_out, setting.learnt),
    }  # fmt: skip
    run.export(chosen, out / "protected.safetensors")
    return report_of(measured, made)


# ------------------------------------------------------------------ setting


def _rendered(out: Path, written: Mapping[str, Any], seed: int, quick: bool, progress: bool) -> Setting:
    """A small reader trained on rendered scenes, where no data are given."""
    recipe = replace(SMALL, seed=seed, steps=60 if quick else SMALL.steps)
    held_out = replace(recipe.hand, **{"faces": FACES_HELD_OUT, **written})
    check_legible(held_out, SIDES[recipe.architecture])
    n = 12 if quick else 60
    each = 60 if quick else 200
    name = digest_of({**recipe.digest(), "each": each})  # no reader of the user's own has this name
    path = out / f"reader-{name}.safetensors"
    if not path.is_file():
        scenes = render_photographs(each, seed, scenes=True)
        train_reader(_rendered_classes(each, seed), scenes, path, recipe, progress=progress)
    spec = load_reader(path)
    first, second, third = (_rendered_classes(n, seed + 1000 * (place + 1)) for place in range(3))
    return Setting(spec, tuple(spec.layers or ()), first, second, third, recipe.hand, held_out, seed)


def _rendered_classes(each: int, seed: int) -> Photographs:
    return render_photographs(each, seed).of_classes(RENDERED_CLASSES)


def _check_model(model: str, weights: str | Path) -> None:
    clip = model.startswith("open_clip:")
    if not clip and model != "reader" and not Path(model).is_file():
        raise ViscircuitsError(
            f"{model!r} is no network that reads; this experiment takes 'reader', a file that train-reader wrote, or "
            "open_clip:ARCHITECTURE/PRETRAINED (--model)"
        )
    if not clip and str(weights) != "default":
        raise ViscircuitsError(
            f"weights are of open_clip models; a reader has its own, got {str(weights)!r}: name its file as the model"
        )


def _on(data: str | Path, model: str, weights: str | Path, written: Mapping[str, Any], each: int, seed: int) -> Setting:
    """Photographs of a folder, for the reader or for CLIP. All is checked before a photograph is read."""
    clip = model.startswith("open_clip:")
    path = None if clip or model == "reader" else model
    train, test = _files(data, clip)
    if not clip and set(known := card_of(path)["classes"]) <= set(train):  # else the folder's own, by their names
        train, test = ({name: files[name] for name in known if name in files} for files in (train, test))
    own = _checked(data, train, test, each)
    spec = zero_shot(model, list(train), weights=weights) if clip else load_reader(path, list(train))
    layers = tuple(spec.layers or ())
    if not layers:
        raise ViscircuitsError(f"{spec.address} has no default layers; only models with known layers can be used here")
    assert spec.input_size is not None  # readers and CLIP have one
    side, held_out = max(spec.input_size), Hand(**{"faces": FACES_HELD_OUT, **written})
    check_legible(held_out, min(spec.input_size))
    tested = _drawn(train, each, seed, 2) if own else {name: files[:each] for name, files in test.items()}
    parts = (_drawn(train, each, seed, 0), _drawn(train, each, seed, 1), tested)
    first, second, third = (read_files(part, side) for part in parts)
    late = layers[len(layers) // 4 :]
    return Setting(spec, late, first, second, third, Hand(FACES_TO_TRAIN), held_out, seed)


def _files(data: str | Path, clip: bool) -> tuple[Files, Files]:
    """Those that find and choose, and those that test: none where the folder has no ``val`` and CLIP is asked."""
    missing = [name for name in FOLDERS if not (Path(data) / name).is_dir()]
    if missing and not clip and Path(data).is_dir():
        raise ViscircuitsError(
            f"{str(data)!r} has no folder {missing[0]!r}: a reader may have been trained on any photograph that is not "
            "set apart, so it is tested on val/CLASS alone; part them into train/CLASS and val/CLASS"
        )
    train = photograph_files(data, "train")
    return train, {} if "val" in missing else photograph_files(data, "val")


def _checked(data: str | Path, train: Files, test: Files, each: int) -> bool:
    """Whether the photographs that test come from the same folders as the others; refused if there are too few."""
    own = not test
    if not own and set(train) != set(test):
        name = min(set(train) ^ set(test))
        raise ViscircuitsError(
            f"'train' and 'val' in {str(data)!r} hold different classes, such as {name!r}; they must be the same"
        )
    _check_enough(train, 3 if own else 2, "find, choose and test" if own else "find and choose", each)
    _check_enough(test, 1, "test", each)
    return own


def _check_enough(files: Files, n: int, what: str, each: int) -> None:
    for name, photographs in files.items():
        if len(photographs) < n * each:
            raise ViscircuitsError(
                f"class {name!r} has {len(photographs)} photographs; {n * each} are needed to {what} with {each} each "
                "(--each N)"
            )


def _drawn(files: Files, each: int, seed: int, hand: int) -> Files:
    """`each` of every class, dealt so that no two hands share one."""
    rng = np.random.default_rng([seed, 9])
    orders = {name: rng.permutation(len(photographs)) for name, photographs in files.items()}
    return {name: [files[name][i] for i in order[hand * each : (hand + 1) * each]] for name, order in orders.items()}


def _pixels(setting: Setting) -> str:
    """Digests of the photographs themselves, so that no part of another folder's run is taken for this one's."""
    return " ".join(part.digest for part in (setting.to_find, setting.to_choose, setting.to_test))


def _named(data: str | Path | None) -> str:
    return "rendered scenes" if data is None else Path(data).name


# ------------------------------------------------------------------ running


class _Run:
    """Computes the parts of the experiment, or reads those that are finished."""

    def __init__(self, setting: Setting, kept: Kept, progress: bool) -> None:
        self.setting, self.kept, self.progress = setting, kept, progress
        self.trials: dict[tuple[str, str], Trial] = {}

    def trial(self, kind: str, part: str) -> Trial:
        if (kind, part) not in self.trials:
            self.trials[kind, part] = self.setting.trial(kind, part)
        return self.trials[kind, part]

    def whole(self) -> dict[str, Entry]:
        """Every kind, the network untouched."""
        return {kind: self.kept.of(f"whole/{kind}", partial(self._told, kind)) for kind in KINDS}

    def curves(self) -> list[Entry]:
        """Each source, method and size: what remains on the photographs that choose and on those that test."""
        cells = [
            (source, method)
            for source in self.setting.sources
            for method in self.setting.methods
            if source == self.setting.sources[0] or method not in BLIND
        ]
        found = []
        for source, method in tqdm(cells, "circuits", disable=not self.progress):
            for size in self.setting.sizes:
                key = f"curve/{source}/{method}/{size}"
                entry = self.kept.of(key, partial(self._point, source, method, size))
                found.append({"source": source, "method": method, "size": size, **entry})
        return found

    def circuit(self, source: str, method: str, size: float) -> Circuit:
        """The best share of each layer's units."""
        ranked = self.kept.of(f"ranked/{source}/{method}", partial(self._ranked, source, method))
        widths = {layer: self.setting.statistics.layers[layer].n_units for layer in self.setting.layers}
        units = {
            layer: tuple(sorted(ranked[layer][: max(1, int(size * width + 0.5))])) for layer, width in widths.items()
        }
        return Circuit(units, widths)

    def removed(self, chosen: Entry) -> dict[str, Any]:
        """Everything about the chosen circuit."""
        circuit = self.circuit(chosen["source"], chosen["method"], chosen["size"])
        key = f"{chosen['source']}/{chosen['method']}/{chosen['size']}"
        kinds = {kind: self.kept.of(f"removed/{key}/{kind}", partial(self._told, kind, circuit)) for kind in KINDS}
        hands = {}
        for name, hand in tqdm(_hands(self.setting).items(), "other hands", disable=not self.progress):
            hands[name] = self.kept.of(f"hands/{key}/{name}", partial(self._in_hand, circuit, *hand))
        simple = self.kept.of("simple", partial(defences.simple, self.setting))
        edges = self.kept.of(f"edges/{key}", partial(self._edges, chosen["source"], circuit))
        everywhere = self.kept.of(f"everywhere/{key}", partial(self._everywhere, chosen, circuit))
        again = self.kept.of(f"adaptive/{key}", partial(self._adaptive, circuit))
        found = {"kinds": kinds, "adaptive": again, "hands": hands, "simple": simple}
        return {**found, "edges": edges, "everywhere": everywhere}

    def export(self, chosen: Entry, path: Path) -> None:
        """Write the protected network."""
        circuit = self.circuit(chosen["source"], chosen["method"], chosen["size"])
        checked = self.setting.reference[:16]
        edit(self.setting.spec, circuit, checked, ablation="mean", reference=self.setting.statistics).save(path)

    def _told(self, kind: str, circuit: Circuit | None = None) -> Entry:
        """What the network answers to held-out photographs of a kind, whole or without a circuit."""
        trial = self.trial(kind, "test")
        return bits(tell(self.setting.spec, trial)) if circuit is None else self._without(circuit, trial)

    def _without(self, circuit: Circuit, trial: Trial) -> Entry:
        with ablate(self.setting.spec, circuit, "mean", reference=self.setting.statistics):
            return bits(tell(self.setting.spec, trial))

    def _adaptive(self, circuit: Circuit) -> Entry:
        """The strongest words once more, chosen by asking the protected network itself."""
        with ablate(self.setting.spec, circuit, "mean", reference=self.setting.statistics):
            return bits(tell(self.setting.spec, self.setting.trial("strongest word", "test")))

    def _in_hand(self, circuit: Circuit, hand: Hand, words: Sequence[str] | None) -> Entry:
        trial = self.setting.trial("wrong word", "test", hand, words)
        return {"before": bits(tell(self.setting.spec, trial)), "after": self._without(circuit, trial)}

    def _edges(self, source: str, circuit: Circuit) -> Entry:
        """Edges between the two middle layers, scored by attribution patching between units."""
        middle = len(self.setting.layers) // 2
        pair = self.setting.layers[middle - 1], self.setting.layers[middle]
        task = self._task(source, pair)
        scores = find(task, "eap").edges[pair]
        return defences.edges(self.setting, circuit, scores, pair)

    def _everywhere(self, chosen: Entry, circuit: Circuit) -> Entry:
        """The circuit's edges between all neighbouring layers, beside those of circuits of its size."""
        sources = {"activation": chosen["source"], "random": self.setting.sources[0]}
        controls = {name: self.circuit(source, name, chosen["size"]) for name, source in sources.items()}
        return defences.edges_everywhere(self.setting, {"text": circuit, **controls})

    def _point(self, source: str, method: str, size: float) -> Entry:
        circuit = self.circuit(source, method, size)
        return {
            part: {kind: self._without(circuit, self.trial(kind, part)) for kind in kinds}
            for part, kinds in (("choose", ("clean", "wrong word")), ("test", defences.MEASURED))
        }

    def _ranked(self, source: str, method: str) -> Entry:
        finding = find(self._task(source), method, **METHODS[method])
        most = max(self.setting.sizes)
        return {layer: _best(scores, most) for layer, scores in finding.units.items()}

    def _task(self, source: str, layers: tuple[str, ...] | None = None) -> Task:
        setting = self.setting
        shown = setting.trial("wrong word", "find")
        if source == SOURCES[0]:
            shown = words_on_paper(
                setting.spec, len(setting.to_find), setting.to_find.classes, setting.learnt, setting.seed
            )
        plain = setting.trial("clean", "find")
        return make_task(
            setting.spec, layers or setting.layers, shown.images, plain.images, concept_labels=shown.written,
            reference_labels=plain.labels, statistics=setting.statistics, batch_size=BATCH, seed=setting.seed,
        )  # fmt: skip


def _best(scores: Tensor, share: float) -> list[int]:
    """The best share of a layer's units, best first."""
    n = max(1, int(share * len(scores) + 0.5))
    return torch.sort(scores, descending=True, stable=True).indices[:n].tolist()


def _choice(curves: Sequence[Entry]) -> Entry:
    """On the photographs that choose: of circuits that leave little of the attack the one that costs least."""
    own = [each for each in curves if each["method"] not in CONTROLS]
    enough = [each for each in own if of_bits(each["choose"]["wrong word"]).success.value <= TOLERATED]
    if enough:
        return max(enough, key=lambda each: (of_bits(each["choose"]["clean"]).accuracy.value, -each["size"]))
    return min(own, key=lambda each: (of_bits(each["choose"]["wrong word"]).success.value, each["size"]))


def _hands(setting: Setting) -> dict[str, tuple[Hand, Sequence[str] | None]]:
    """Other ways of writing the attack."""
    usual = setting.held_out
    low, high = usual.height
    accented = replace(usual, faces=FACES_WITH_ACCENTS)
    hands: dict[str, tuple[Hand, Sequence[str] | None]] = {
        "fonts seen in training": (replace(usual, faces=setting.learnt.faces), None),
        "slanted faces, shaky hand": (replace(usual, faces=FACES_LIKE_HANDWRITING, jitter=6.0), None),
        "two thirds the size": (replace(usual, height=(low * 2 / 3, high * 2 / 3)), None),
        "half as large again": (replace(usual, height=(low * 1.5, high * 1.5)), None),
        "at the top": (replace(usual, place="top"), None),
        "in the middle": (replace(usual, place="middle"), None),
        "black on white": (replace(usual, colour="black on white", boxed=1.0), None),
        "without a box": (replace(usual, boxed=0.0), None),
    }
    for language, words in TRANSLATIONS.items():
        if all(name in words for name in setting.to_test.classes):
            hands[language] = (accented, [words[name] for name in setting.to_test.classes])
    return hands
