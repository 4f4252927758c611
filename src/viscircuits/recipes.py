"""An edit as text that makes it again: a Python script, or commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from viscircuits.circuit import Circuit, Unit
from viscircuits.errors import ViscircuitsError
from viscircuits.models import LIBRARIES, SOURCES
from viscircuits.surgery import WITHOUT_EDGES, Edit

CONSTANT = ("zero", "mean")  # ablations that weights can say


def as_python(
    edit: Edit,
    removed: Circuit,
    folder: str | Path,
    *,
    title: str,
    weights: str | None = None,
    reference: str | None = None,
) -> str:
    """A script that opens the network without the edit's units and edges, and shows what images then are.

    Parameters
    ----------
    edit
        What is removed.
    removed
        Its units as a circuit, whose provenance says in which network.
    folder
        The result folder, where the reference images are found again.
    title
        The circuit's name.
    weights
        Where the network's weights are, if not where the circuit says.
    reference
        Address of the reference images, if not those that the circuit was found with.
    """
    made = removed.provenance
    model, found_in = made.get("model", "custom"), weights or made.get("weights_from", "default")
    own = "" if _is_address(model) else "  # a network of your own: viscircuits.wrap(model, transform)"
    layers = sorted({unit.layer for unit in edit.units} | {end.layer for edge in edit.edges for end in edge})
    measured = edit.ablation != "zero" and bool(layers)
    lines = [
        f'"""The circuit {_plain(title)} edited: {_count(edit)} removed, each value becoming its {edit.ablation}.',
        "",
        "Give this script images, and it says what the network calls them before and after.",
        '"""',
        "",
        "import sys",
        "from contextlib import contextmanager",
        "",
        "import torch",
        "",
        "from viscircuits import Circuit, Edge, Unit, ablate, batches, edit, load_model, measure, open_images",
        "from viscircuits import prune_edges",
        *(["from viscircuits.discovery import found_with"] if measured and reference is None else []),
        "",
        f"spec = load_model({model!r}, weights={found_in!r}){own}",
        f"removed = Circuit(units={_dictionary(removed.units)}, widths={_dictionary(removed.widths)})",
        "edges = [",
        *(f"    Edge({_unit(source)}, {_unit(target)}, score=0.0, signed=0.0)," for source, target in edit.edges),
        "]",
        f"ablation = {edit.ablation!r}",
        *_reference(layers, str(folder), measured, reference),
        "",
        _BODY,
        *([] if edit.edges or edit.ablation not in CONSTANT or not edit.units else [_SAVE]),
        _MAIN,
    ]
    return "\n".join(lines)


def as_command(
    edit: Edit, removed: Circuit, folder: str | Path, *, weights: str | None = None, reference: str | None = None
) -> str:
    """Commands that write the network without the edit's units.

    Parameters
    ----------
    edit, removed, folder, weights, reference
        As for `as_python`.

    Raises
    ------
    ViscircuitsError
        If weights cannot say the edit.
    """
    if edit.edges:
        raise ViscircuitsError(WITHOUT_EDGES)
    if edit.ablation not in CONSTANT:
        raise ViscircuitsError(
            f"{edit.ablation!r} ablation draws anew for each image, which no weights can; use zero or mean, or export "
            "the edit as Python"
        )
    given = [] if weights is None else ["--weights", weights]
    given += [] if reference is None or edit.ablation == "zero" else ["--reference", reference]
    command = ["viscircuits", "edit", str(folder), "--circuit", "edit.json", "--ablation", edit.ablation, *given]
    written = json.dumps(removed.to_json())
    return f"cat > edit.json <<'END'\n{written}\nEND\n{shlex.join([*command, '--out', 'edited.safetensors'])}\n"


def _is_address(model: str) -> bool:
    kind, _, name = model.partition(":")
    return kind in SOURCES and bool(name) == (kind in LIBRARIES)


def _plain(title: str) -> str:
    return title.encode("ascii", "backslashreplace").decode().replace("\\", "/").replace('"', "'").replace("\n", " ")


def _count(edit: Edit) -> str:
    counts = [(len(edit.units), "unit"), (len(edit.edges), "edge")]
    return " and ".join(f"{n} {what}{'' if n == 1 else 's'}" for n, what in counts if n) or "nothing"


def _dictionary(entries: Mapping[str, object]) -> str:
    inside = "".join(f"\n    {layer!r}: {value!r}," for layer, value in entries.items())
    return f"{{{inside}\n}}" if inside else "{}"


def _unit(unit: Unit) -> str:
    return f"Unit({unit.layer!r}, {unit.index})"


def _reference(layers: list[str], folder: str, measured: bool, given: str | None) -> list[str]:
    if not measured:
        return ["reference = None"]
    found = f"found_with(Circuit.load({folder!r}).provenance, 'reference')"
    return [
        f"images = {found if given is None else f'open_images({given!r})'}",
        f"reference = measure(spec, images, {layers!r})",
    ]


_BODY = '''
@contextmanager
def edited():
    """The network without those units and edges, for as long as the context is open."""
    with ablate(spec, removed, ablation, reference=reference), prune_edges(spec, edges, ablation, reference=reference):
        yield

'''
_SAVE = '''
def save(path, images):
    """Write the network without those units as safetensors, checked on transformed images."""
    edit(spec, removed, images, ablation=ablation, reference=reference).save(path)

'''
_MAIN = '''
def name(output):
    """The usual name of a class, or its number."""
    return spec.classes[output][0] if spec.classes else f"output {output}"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"give images: python {sys.argv[0]} IMAGES")
    for batch in batches(open_images(sys.argv[1:]), spec.transform, 8):
        with torch.no_grad():
            before = spec.model(batch.images)
            with edited():
                after = spec.model(batch.images)
        for picture, old, new in zip(batch.names, before.argmax(1).tolist(), after.argmax(1).tolist()):
            print(f"{picture}: {name(old)} before, {name(new)} after")
'''
