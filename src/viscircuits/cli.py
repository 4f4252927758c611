"""The command line: each command reads its words, calls one function, and prints.

Exit codes: 0 done, 2 the caller's mistake (one line on stderr), 1 ours.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import warnings
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from viscircuits.errors import ViscircuitsError
from viscircuits.experiments.commands import app as experiments

if TYPE_CHECKING:
    import torch

    from viscircuits.bundle import Bundle
    from viscircuits.circuit import Circuit
    from viscircuits.matrices import Attributions
    from viscircuits.models import ModelSpec

app = typer.Typer(
    name="viscircuits",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

FEW = 10  # test images below which an interval deserves no trust
MODEL_HELP = "lite0, squeezenet1_1, torchvision:NAME, timm:NAME or open_clip:ARCH/PRETRAINED."
IMAGES_HELP = "A folder, image file, list file (.txt, .csv), tar shards, or render:CONCEPT."


Score = Literal["cla", "grad-x-act", "signed", "gradient"]
Summary = Literal["norm", "mean", "sum", "max"]
Contrast = Literal["none", "difference", "ratio"]
Refine = Literal["coordinate", "paper", "none"]
Ablation = Literal["zero", "mean", "resample", "noise"]
Suite = Literal["basic", "full"]
Engine = Literal["auto", "loop", "structured"]
Dtype = Literal["float32", "bfloat16"]
Format = Literal["graphml", "neuronpedia", "csv"]

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Images = Annotated[str, typer.Argument(metavar="IMAGES", help=IMAGES_HELP)]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `discover` wrote.")]
Weights = Annotated[str, typer.Option(metavar="default|none|FILE", help="Pretrained, random, or from a file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Labels = Annotated[
    str, typer.Option(metavar="auto|none|FILE", help="Classes from folder and file names, none, or a path,label file.")
]
Reference = Annotated[str | None, typer.Option(metavar="IMAGES", help="Images without the concept.")]
LayerNames = Annotated[
    str | None, typer.Option("--layers", metavar="A,B,…", help="Layers; default the post-activation ones.")
]
ScoreOption = Annotated[Score, typer.Option(help="How a connection is scored.")]
SummaryOption = Annotated[Summary, typer.Option(help="What a target's map is summed up in.")]
EngineOption = Annotated[Engine, typer.Option(help="How attribution is computed; the numbers are the same.")]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(help="Of attribution's dense work; default the model's. bfloat16 is faster where built in."),
]
Memory = Annotated[
    str | None,
    typer.Option(metavar="2G", help="What attribution may allocate beyond libraries and model; default all."),
]
Bootstrap = Annotated[
    int, typer.Option(help="Draws of the images that say how sure each unit is; 0 for none. They take disk space.")
]
AttributionBatch = Annotated[
    int | None, typer.Option(help="Images per forward pass; default what suits the engine and the memory.")
]
Seed = Annotated[int, typer.Option(help="Of every random choice.", min=0, max=2**63 - 1)]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print how each pair of layers was attributed, and how long it took.")
]


def _reports_mistakes(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the caller's mistakes into one line and exit code 2, and Ctrl-C into a word on what is kept."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        warnings.showwarning = _warn
        try:
            command(*args, **kwargs)
        except ViscircuitsError as error:
            typer.echo(f"viscircuits: {_worker()}{' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error
        except OSError as error:  # a full disk, a folder that may not be written to
            what = f"{error.strerror or error}: {error.filename or 'no file'}"
            typer.echo(
                f"viscircuits: {_worker()}{what}; what is finished is kept: mend it, give the command again", err=True
            )
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            if _is_first():
                typer.echo(f"viscircuits: stopped; to go on from what is finished: {_command()}", err=True)
            raise typer.Exit(130) from None

    return run


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    if _is_first():
        typer.echo(f"viscircuits: warning: {message}", err=True)


def _is_first() -> bool:
    """Whether this process talks: of those that torchrun started, the first."""
    if "RANK" not in os.environ:  # without waiting for torch
        return True
    from viscircuits.workers import is_first

    return is_first()


def _worker() -> str:
    return "" if _is_first() else f"worker {os.environ['RANK']}: "


def _show_version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        typer.echo(version("viscircuits"))
        raise typer.Exit
    return asked


@app.callback()
def _every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Find the circuit of a visual concept in a pretrained vision model, test it, picture it, edit it out."""


@app.command(epilog="Example: `viscircuits layers lite0`")
@_reports_mistakes
def layers(model: Model, weights: Weights = "default", as_json: Json = False) -> None:
    """List a model's layers in execution order; the default ones carry a `*`."""
    from viscircuits.models import load_model
    from viscircuits.tracing import list_layers

    spec = load_model(model, weights=weights)
    found, default = list_layers(spec.model, spec.example(), spec.layers)
    if as_json:
        rows = [
            {
                "layer": each.address,
                "type": each.kind,
                "shape": list(each.shape),
                "unit_axis": each.unit_axis,
                "n_units": each.n_units,
                "default": each.address in default,
            }
            for each in found
        ]
        typer.echo(json.dumps(rows, indent=1))
        return
    table = [("", "layer", "type", "shape", "unit axis", "units")]
    table += [
        (
            "*" if each.address in default else "",
            each.address,
            each.kind,
            "×".join(map(str, each.shape)),
            str(each.unit_axis),
            str(each.n_units),
        )
        for each in found
    ]
    typer.echo(_aligned(table))


@app.command(
    epilog="Example: `viscircuits discover lite0 photos/dogs --reference photos/other --units 5% --out dogs`\n\n"
    "Until it is stable: `viscircuits discover lite0 photos/dogs --until-stable 0.8 --memory 2G -v --out dogs`"
)
@_reports_mistakes
def discover(
    model: Model,
    images: Images,
    reference: Reference = None,
    test: Annotated[str | None, typer.Option(metavar="IMAGES", help="Test on these, not on a held-out part.")] = None,
    others: Annotated[
        str | None, typer.Option(metavar="IMAGES", help="Others to test on, not a held-out part of the reference.")
    ] = None,
    find_with: Annotated[
        int | None,
        typer.Option(help="Images of each set that find the circuit; default half, at most 32 but for --until-stable."),
    ] = None,
    layer_names: LayerNames = None,
    units: Annotated[str, typer.Option(metavar="K|10%", help="Units per layer.")] = "10%",
    score: ScoreOption = "cla",
    summary: SummaryOption = "norm",
    contrast: Annotated[
        Contrast | None,
        typer.Option(help="Concept against reference; default difference if there is one."),
    ] = None,
    refine: Annotated[Refine, typer.Option(help="How the choice is improved.")] = "coordinate",
    ablation: Annotated[Ablation, typer.Option(help="What a removed value becomes.")] = "zero",
    labels: Labels = "auto",
    weights: Weights = "default",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the result.")] = Path("circuit"),
    bootstrap: Bootstrap = 20,
    until_stable: Annotated[
        float | None,
        typer.Option(metavar="0.9", help="Take in images until circuits from draws of them overlap by this much."),
    ] = None,
    pictures: Annotated[int, typer.Option(help="Image regions shown for each unit that has pictures.")] = 4,
    pictured: Annotated[int, typer.Option(help="Units of each layer that have pictures, the strongest first.")] = 12,
    draws: Annotated[int, typer.Option(help="Random circuits to compare with.")] = 5,
    engine: EngineOption = "auto",
    dtype: DtypeOption = None,
    memory: Memory = None,
    batch_size: AttributionBatch = None,
    seed: Seed = 0,
    strict: Strict = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Find the circuit of a concept, test it on held-out images, and write the result folder.

    A run that was stopped goes on when the same command is given again. Under `torchrun` the workers share the images.
    """
    from viscircuits.discovery import discover as find

    spec = _load(model, weights)
    bundle = find(
        spec,
        images,
        out,
        reference=reference,
        test=test,
        others=others,
        find_with=find_with,
        layers=_names(layer_names),
        units=_units(units),
        score=score,
        summary=summary,
        contrast=contrast,
        refine=refine,
        ablation=ablation,
        labels=None if labels == "none" else labels,
        bootstrap=bootstrap,
        until_stable=until_stable,
        draws=draws,
        n_pictures=pictures,
        n_pictured=pictured,
        engine=engine,
        dtype=_dtype(dtype),
        memory=memory,
        batch_size=batch_size,
        seed=seed,
        strict=strict,
        command=_command(),
        progress=_is_first(),
    )
    if not _is_first():
        return
    if verbose:
        _print_ways(bundle.attributions)
    _print_result(bundle, out, as_json)


@app.command(
    epilog="Example: `viscircuits attribute lite0 photos/dogs --reference photos/other --find-with 32 --out dogs`\n\n"
    "On eight processes: `torchrun --nproc-per-node 8 -m viscircuits attribute lite0 dogs.tar --memory 4G --out dogs`"
)
@_reports_mistakes
def attribute(
    model: Model,
    images: Images,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for attributions.safetensors.")],
    reference: Reference = None,
    find_with: Annotated[
        int | None, typer.Option(help="Leave all but so many images of each set for the test; default none.")
    ] = None,
    layer_names: LayerNames = None,
    score: ScoreOption = "cla",
    summary: SummaryOption = "norm",
    weights: Weights = "default",
    bootstrap: Bootstrap = 20,
    engine: EngineOption = "auto",
    dtype: DtypeOption = None,
    memory: Memory = None,
    batch_size: AttributionBatch = None,
    seed: Seed = 0,
    strict: Strict = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Compute and save the attributions alone; `discover` goes on from them.

    `discover` with the same `--out`, model, layers, score and images takes them as they are: with the same
    `--find-with`, or with test images of its own (`--test`) where all images were used here.
    """
    from viscircuits.discovery import attribute_images

    found = attribute_images(
        _load(model, weights),
        images,
        out,
        reference=reference,
        find_with=find_with,
        layers=_names(layer_names),
        score=score,
        summary=summary,
        bootstrap=bootstrap,
        engine=engine,
        dtype=_dtype(dtype),
        memory=memory,
        batch_size=batch_size,
        seed=seed,
        strict=strict,
        progress=_is_first(),
    )
    if not _is_first():
        return
    if verbose:
        _print_ways(found)
    _print_skipped(found.provenance)
    if as_json:
        typer.echo(json.dumps({"folder": str(out), "provenance": dict(found.provenance)}))
        return
    n_reference = "" if found.reference is None else f" and {found.reference.n_images} of the reference"
    typer.echo(f"{out / 'attributions.safetensors'}: {found.n_images} images{n_reference}, {len(found.layers)} layers")


@app.command(
    epilog="Example: `viscircuits evaluate dogs photos/more-dogs --others photos/more-others --ablation mean`\n\n"
    "Everything there is to measure, under two ablations: "
    "`viscircuits evaluate dogs photos/more-dogs --others photos/more-others --suite full --ablation zero,mean`"
)
@_reports_mistakes
def evaluate(
    folder: Folder,
    images: Images,
    others: Annotated[str | None, typer.Option(metavar="IMAGES", help="Images without the concept.")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="IMAGES", help="Where mean, resample and noise take their values from.")
    ] = None,
    ablation: Annotated[
        str | None,
        typer.Option(
            metavar="zero|mean|…",
            help="What a removed value becomes: zero, mean, resample or noise; default that of the circuit. The full "
            "suite takes several, with commas between them, and by default zero and mean besides.",
        ),
    ] = None,
    suite: Annotated[
        Suite,
        typer.Option(
            help="basic: what removing the circuit does, beside controls. full: everything there is to measure, and "
            "which verdicts depend on the ablation; takes minutes."
        ),
    ] = "basic",
    transfer: Annotated[
        str | None, typer.Option(metavar="IMAGES", help="Full suite: other images of the concept, to test on as well.")
    ] = None,
    checked_units: Annotated[int, typer.Option(help="Full suite: units removed one at a time; 0 for none.")] = 64,
    checked_images: Annotated[int, typer.Option(help="Full suite: on how many images of the concept.")] = 16,
    labels: Labels = "auto",
    weights: Annotated[str | None, typer.Option(help="If the model's weights are elsewhere now.")] = None,
    draws: Annotated[int, typer.Option(help="Random circuits to compare with.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.")] = 8,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Test a circuit on other images, or under another ablation, and renew its folder."""
    from viscircuits.discovery import evaluate_again

    bundle = evaluate_again(
        folder,
        images,
        others=others,
        reference=reference,
        ablation=_listed("--ablation", ablation),
        suite=suite,
        transfer=transfer,
        checked_units=checked_units,
        checked_images=checked_images,
        labels=None if labels == "none" else labels,
        weights=weights,
        draws=draws,
        batch_size=batch_size,
        seed=seed,
        command=_command(),
        progress=True,
    )
    typer.echo(f"this replaces the earlier evaluation in {folder}", err=True)
    _print_result(bundle, folder, as_json)


@app.command(epilog="Example: `viscircuits edit dogs --out no-dogs.safetensors --onnx no-dogs.onnx`")
@_reports_mistakes
def edit(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default DIR/edited.safetensors.")] = None,
    onnx: Annotated[Path | None, typer.Option(metavar="FILE", help="Also export to ONNX.")] = None,
    images: Annotated[
        str | None, typer.Option(metavar="IMAGES", help="To check the edit on; default those of the circuit.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="IMAGES", help="For mean ablation; default that of the circuit.")
    ] = None,
    circuit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Other units of the same network to remove, in a circuit's JSON file."),
    ] = None,
    ablation: Annotated[
        Ablation | None,
        typer.Option(help="zero or mean; default that of the circuit."),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="If the model's weights are elsewhere now.")] = None,
    as_json: Json = False,
) -> None:
    """Write the model without the circuit, checked against the ablated model on real images."""
    from viscircuits.discovery import edit_from

    out = out or folder / "edited.safetensors"
    edited, onnx_difference = edit_from(
        folder,
        out,
        onnx=onnx,
        images=images,
        reference=reference,
        circuit=circuit,
        ablation=ablation,
        weights=weights,
    )
    if as_json:
        report = {"weights": str(out), "folded": list(edited.folded), "gates": list(edited.gates)}
        typer.echo(
            json.dumps({**report, "difference": edited.difference, "onnx_difference": onnx_difference}, indent=1)
        )
        return
    where = f"in existing weights at {len(edited.folded)} layers, with gates at {len(edited.gates)}"
    typer.echo(f"{out}: {where}; differs from the ablated model by {edited.difference:.1e} of its largest output")
    if onnx is not None:
        typer.echo(f"{onnx}: under onnxruntime differs by {onnx_difference:.1e}")


@app.command(
    epilog="Example: `viscircuits view dogs`\n\nTwo circuits in one: `viscircuits view dogs --with cats`\n\n"
    "With the network behind it: `viscircuits view dogs --serve`"
)
@_reports_mistakes
def view(
    folder: Folder,
    other: Annotated[
        Path | None,
        typer.Option("--with", metavar="DIR", help="Lay another circuit over it, in DIR/compared.html."),
    ] = None,
    among: Annotated[
        str | None,
        typer.Option(
            metavar="DIR,DIR,…", help="Say of units in which of these circuits they are; default the folders beside it."
        ),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open it, or only print where it is.")] = True,
    served: Annotated[
        bool, typer.Option("--serve", help="With the network behind it, for surgery; until Ctrl-C, on this machine.")
    ] = False,
    port: Annotated[int, typer.Option(help="Served: where to listen; 0 for any free port.", min=0, max=65535)] = 0,
    images: Annotated[
        str | None,
        typer.Option(metavar="IMAGES", help="Served: to measure accuracy on; default those of the test."),
    ] = None,
    others: Annotated[str | None, typer.Option(metavar="IMAGES", help="Served: the same, without the concept.")] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="IMAGES", help="Served: for mean, resample and noise; default those of the circuit."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="auto|none|FILE", help="Served: classes of the images; default as in the test."),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Served: if the model's weights are elsewhere now.")] = None,
) -> None:
    """Draw a result folder's page anew, with whatever notes and visualisations it now holds, and open it."""
    given = {"images": images, "others": others, "reference": reference, "labels": labels, "weights": weights}
    if served:
        _serve(folder, port, browser, other, among, given)
        return
    _check_served(port, given)
    from viscircuits.bundle import page_of
    from viscircuits.files import write_atomically

    html = page_of(folder, other=other, among=_listed("--among", among))
    path = write_atomically(folder / ("index.html" if other is None else "compared.html"), html)
    typer.echo(str(path))
    if browser:
        webbrowser.open(path.resolve().as_uri())


@app.command(
    epilog="Example: `viscircuits render lite0 blocks.4.0.bn2:17,blocks.4.0.bn2:50 --out pictures`\n\n"
    "For a result, into its folder and its page: `viscircuits render dogs`"
)
@_reports_mistakes
def render(
    what: Annotated[str, typer.Argument(metavar="MODEL|DIR", help=f"{MODEL_HELP} Or a folder that `discover` wrote.")],
    units: Annotated[
        str | None, typer.Argument(metavar="LAYER:INDEX,…", help="Of the model; of a folder its strongest units.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where pictures of the model's units are put.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of gradient ascent.")] = 64,
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 128,
    per_layer: Annotated[int, typer.Option(help="Units of each layer of a folder's circuit.")] = 4,
    negative: Annotated[bool, typer.Option("--negative", help="Also what lowers each unit.")] = False,
    diversity: Annotated[int, typer.Option(help="Pictures of each unit, kept unlike each other.")] = 1,
    images: Annotated[
        str | None,
        typer.Option(metavar="IMAGES", help="Search these for how strongly images excite the model's units."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="default, none or a file; of a folder: where they are now.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make pictures that excite units as strongly as can be found, from noise (feature visualisation).

    A run that was stopped goes on from the pictures that are finished.
    """
    from viscircuits.visualising import parse_units, visualise_circuit, visualise_units

    options: dict[str, Any] = {"steps": steps, "size": size, "negative": negative, "diverse": diversity, "seed": seed}
    if units is None:
        if not Path(what).is_dir():
            raise ViscircuitsError(f"{what!r} is no folder; to picture a model's units, name them: LAYER:INDEX,…")
        folder = Path(what)
        found = visualise_circuit(folder, per_layer=per_layer, weights=weights, progress=True, **options)
    else:
        folder = out or Path("visualisations")
        spec, chosen = _load(what, weights or "default"), parse_units(units)
        found = visualise_units(spec, chosen, folder, images=images, progress=True, **options)
    if as_json:
        typer.echo((folder / "visualisations.json").read_text(encoding="utf-8"), nl=False)
        return
    table = [("unit", "picture of", "objective", "activation", "strongest image")]
    for each in found:
        strongest = "–" if each.exemplar_activation is None else f"{each.exemplar_activation:.4g}"
        table.append((str(each.unit), each.kind, f"{each.objective:.4g}", f"{each.activation:.4g}", strongest))
    typer.echo(_aligned(table))
    typer.echo(f"see {folder / ('index.html' if units is None else 'visualisations')}")


@app.command(epilog="Example: `viscircuits compare dogs cats`")
@_reports_mistakes
def compare(
    first: Annotated[Path, typer.Argument(metavar="DIR", help="A result folder or circuit.json.")],
    second: Annotated[Path, typer.Argument(metavar="DIR", help="Another.")],
    as_json: Json = False,
) -> None:
    """Show how far two circuits overlap, layer by layer, beside what chance would give."""
    from dataclasses import asdict

    from viscircuits.circuit import Circuit
    from viscircuits.metrics import overlap

    one, other = Circuit.load(first), Circuit.load(second)
    found = overlap(one, other)
    if one.provenance.get("weights") != other.provenance.get("weights"):
        typer.echo("viscircuits: warning: the two circuits were found in networks with different weights", err=True)
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in found], indent=1))
        return
    table = [("layer", "units", "first", "second", "shared", "jaccard", "by chance", "p")]
    table += [
        (
            each.layer,
            str(each.n_units),
            str(each.size_a),
            str(each.size_b),
            str(each.shared),
            f"{each.jaccard:.3f}",
            f"{each.chance:.3f}",
            f"{each.p_value:.1e}",
        )
        for each in found
    ]
    typer.echo(_aligned(table))


@app.command(epilog="Example: `viscircuits export dogs --format graphml --out dogs.graphml`")
@_reports_mistakes
def export(
    folder: Folder,
    kind: Annotated[
        Format, typer.Option("--format", help="GraphML, Neuronpedia's attribution graph, or tables of edges and units.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to; tables: also FILE with -units in its name.")],
    as_json: Json = False,
) -> None:
    """Write a circuit, with the names people gave its units, in the format of another tool."""
    from viscircuits.bundle import Bundle
    from viscircuits.exports import export as write

    bundle = Bundle.load(folder)
    written = write(bundle.circuit, kind, out, title=bundle.title, notes=bundle.notes)
    if as_json:
        typer.echo(json.dumps({"format": kind, "files": [str(path) for path in written]}))
        return
    for path in written:
        typer.echo(f"{path}: {bundle.circuit.n_units} units, {len(bundle.circuit.edges)} edges")


@app.command(epilog="Example: `viscircuits demo --out demo`")
@_reports_mistakes
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the result.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Run everything on EfficientNet-Lite0 and photographs that came with pip."""
    from viscircuits.demo import demo as run

    bundle, edited = run(out, command=_command(), progress=True)
    _print_result(bundle, out, as_json)
    if not as_json:
        typer.echo(
            f"edited model: {out / 'edited.safetensors'}, differs from the ablated one by {edited.difference:.1e} "
            "of its largest output"
        )


for _entry in experiments.registered_commands:
    _entry.callback = _reports_mistakes(_entry.callback)  # type: ignore[arg-type]
app.add_typer(experiments, name="experiment")


def main() -> None:
    """Run the command line."""
    app()


# ------------------------------------------------------------------ below: what commands share


def _serve(
    folder: Path, port: int, browser: bool, other: Path | None, among: str | None, given: Mapping[str, str | None]
) -> None:
    from viscircuits.server import serve

    if other is not None or among is not None:
        raise ViscircuitsError("--serve shows one circuit; leave --with and --among out, or --serve")

    def ready(address: str, once: str) -> None:
        typer.echo(address)
        typer.echo("only this address opens the page; press Ctrl-C to end", err=True)
        if browser:
            webbrowser.open(once)

    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if given["labels"] == "none":
        options["labels"] = None
    serve(folder, port=port, ready=ready, progress=True, **options)
    typer.echo("ended", err=True)


def _check_served(port: int, given: Mapping[str, str | None]) -> None:
    named = [name for name, value in given.items() if value is not None] + (["port"] if port else [])
    if named:
        raise ViscircuitsError(f"--{named[0]} is for a served page; add --serve")


def _load(model: str, weights: str) -> ModelSpec:
    from viscircuits.models import load_model

    return load_model(model, weights=weights)


def _names(text: str | None) -> list[str] | None:
    return _listed("--layers", text)


def _listed(option: str, text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ViscircuitsError(f"{option} takes names with commas between them, got {text!r}")
    return names


def _units(text: str) -> int | float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError:
        raise ViscircuitsError(
            f"--units takes a number of units per layer or a share such as 10%, got {text!r}"
        ) from None


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _command() -> str:
    started = ["viscircuits"]
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun's
        started = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "viscircuits"]
    return shlex.join([*started, *sys.argv[1:]])


def _print_result(bundle: Bundle, out: Path, as_json: bool) -> None:
    circuit, evaluation = bundle.circuit, bundle.evaluation
    data = {} if evaluation is None else dict(evaluation.data)
    if as_json:
        typer.echo(json.dumps({"folder": str(out), "circuit": circuit.to_json(), "evaluation": data}))
        return
    chosen = circuit.selection
    typer.echo(f"{bundle.title}: {circuit.n_units} units in {len(circuit.layers)} layers, {len(circuit.edges)} edges")
    typer.echo(f"attribution inside it {chosen['objective']:.4g}, of {chosen['upper_bound']:.4g} at most for this size")
    _print_confidence(circuit)
    if evaluation is not None:
        typer.echo(f"\n{evaluation.table()}\n")
        share = evaluation.faithfulness
        if share is not None:
            interval = f"[{share.low:.2f}, {share.high:.2f}]"
            typer.echo(
                f"kept alone, the circuit recovers {share.value:.2f} {interval} of what its layers do for the concept"
            )
    sets = data.get("images", {})
    _print_skipped({**circuit.provenance, **{f"test {what}": each for what, each in sets.items()}})
    for what, each in sets.items():
        if each["left_out"]:
            typer.echo(f"left {each['left_out']} {what} test images out that had found the circuit", err=True)
    few = " and ".join(f"{each['n']} {what}" for what, each in sets.items() if each["n"] < FEW)
    if few:
        typer.echo(f"viscircuits: warning: only {few} test images: too few to trust an interval", err=True)
    if sets and "others" not in sets:
        typer.echo("no images without the concept were given (--reference): selectivity is not measured", err=True)
    typer.echo(f"see {out / 'index.html'}")


def _print_confidence(circuit: Circuit) -> None:
    """What the bootstrap says of the circuit, and how many images were needed."""
    found = circuit.selection.get("confidence")
    if found:
        unsure = sum(share < 0.5 for shares in circuit.chosen.values() for share in shares)
        typer.echo(
            f"{found['draws']} bootstrap draws: circuits from as many other images would overlap by about "
            f"{found['overlap']:.2f}, or less; {unsure} of the units are chosen in less than half of the draws"
        )
    stopped = circuit.provenance.get("stopped")
    if stopped:
        asked = f"overlap {stopped['rule']['overlap']:g} at {stopped['rule']['patience']} looks in a row"
        made_with = circuit.provenance
        seen = f"{made_with['images']['n']} images"
        if "reference" in made_with:
            seen += f" of the concept and {made_with['reference']['n']} of the reference"
        verdict = "stable after" if stopped["stable"] else "not yet stable after all"
        typer.echo(f"{verdict} {seen} ({asked})")


def _print_skipped(sets: Mapping[str, Any]) -> None:
    for images in sets.values():
        if isinstance(images, dict):
            for name, reason in images.get("skipped", ()):
                typer.echo(f"skipped {name}: {reason}", err=True)


def _print_ways(attributions: Attributions | None) -> None:
    """How each pair of layers was attributed: engine, what was left to autograd, seconds."""
    if attributions is None:
        return
    table = [("", "from", "to", "engine", "left to autograd", "seconds")]
    for what, part in (("concept", attributions), ("reference", attributions.reference)):
        for way in part.provenance["engines"] if part is not None else ():
            left = ", ".join(way["left"]) or "nothing"
            table.append((what, way["source"], way["target"], way["engine"], left, f"{way['seconds']:.2f}"))
    typer.echo(_aligned(table), err=True)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
