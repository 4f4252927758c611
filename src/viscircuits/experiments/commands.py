"""``viscircuits experiment NAME``: one command for each experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from viscircuits.experiments.report import Report

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Rerun one of the paper's experiments.")

Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the result; a stopped run goes on there.")]
Data = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Folder of images; without it, rendered images are used.")
]
Seed = Annotated[int, typer.Option(help="Of every random choice.", min=0, max=2**63 - 1)]
Quick = Annotated[bool, typer.Option("--quick", help="A small run that shows that everything works; no result.")]


def finish(report: Report, out: Path) -> None:
    """Save the report, print it, and say where the page is."""
    page = report.save(out)
    typer.echo(report.text())
    typer.echo(f"\nsee {page}")


@app.command(epilog="Example: `viscircuits experiment hierarchy --data photographs/ --model lite0`")
def hierarchy(
    out: Out = Path("hierarchy"),
    data: Data = None,
    model: Annotated[
        str | None,
        typer.Option(help="As for `discover`, or `trained`: a small network trained first. Default what is installed."),
    ] = None,
    weights: Annotated[str, typer.Option(metavar="default|none|FILE", help="Pretrained, random, or from a file.")] = (
        "default"
    ),
    layers: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Layers; default the post-activation ones.")
    ] = None,
    units: Annotated[float, typer.Option(help="Share of each layer's units in a circuit.", min=0.0, max=1.0)] = 0.1,
    each: Annotated[
        int | None, typer.Option(help="Images that find a concept's circuit, at most; as many test it.", min=2)
    ] = None,
    seed: Seed = 0,
    quick: Quick = False,
) -> None:
    """Compare the circuits of a tree of concepts: what they share, layer by layer, and who is hurt by whom.

    DIR of --data holds nested folders (animals/dogs/terrier/…) or photographs with a groups.json.
    """
    from viscircuits.experiments.hierarchy import hierarchy

    names = [name.strip() for name in layers.split(",")] if layers else None
    finish(
        hierarchy(
            out, data=data, model=model, weights=weights, layers=names, units=units, each=each, seed=seed, quick=quick,
            progress=True,
        ),
        out,
    )  # fmt: skip


@app.command(epilog="Example: `viscircuits experiment typographic --data tiny-imagenet/ --out typographic`")
def typographic(
    out: Out = Path("typographic"),
    data: Data = None,
    model: Annotated[
        str, typer.Option(metavar="reader|FILE|open_clip:…", help="The kept reader, one of your own, or a CLIP model.")
    ] = "reader",
    weights: Annotated[
        str, typer.Option(metavar="default|none|FILE", help="Of a CLIP model: pretrained, random, or from a file.")
    ] = "default",
    each: Annotated[
        int, typer.Option(help="Photographs of each class that find, as many that choose, as many that test.", min=1)
    ] = 8,
    seed: Seed = 0,
    quick: Quick = False,
) -> None:
    """Prune the circuit of text from a network that reads: what remains of an attack by a word, and at what cost.

    DIR of --data holds a folder of photographs for each class, perhaps below train/ and val/.
    """
    from viscircuits.experiments.typographic import typographic

    finish(
        typographic(out, data=data, model=model, weights=weights, each=each, seed=seed, quick=quick, progress=True), out
    )


@app.command(epilog="Example: `viscircuits experiment train-reader --data tiny-imagenet/ --out reader.safetensors`")
def train_reader(
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="Folders of photographs, a class each.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the weights go.")] = Path(
        "reader.safetensors"
    ),
    seed: Seed = 0,
) -> None:
    """Train the small network that sees and reads, which `typographic` attacks; some twenty minutes on two cores."""
    from dataclasses import replace

    from viscircuits.experiments.pictures import dealt_classes, read_photographs
    from viscircuits.experiments.reader import Recipe, train_reader

    recipe = replace(Recipe(), seed=seed)
    photographs, scenes = dealt_classes(read_photographs(data, "train"), recipe.n_classes, seed)
    path = train_reader(photographs, scenes, out, recipe, about={"data": data.name}, progress=True)
    typer.echo(f"reader of {len(photographs.classes)} classes: {path}")
