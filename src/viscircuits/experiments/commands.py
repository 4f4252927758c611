"""``viscircuits experiment NAME``: one command for each experiment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from viscircuits.experiments.pairs import Canvas
    from viscircuits.experiments.report import Report

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Rerun one of the paper's experiments.")

Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the result; a stopped run goes on there.")]
Data = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Folder of images; without it, rendered images are used.")
]
Seed = Annotated[int, typer.Option(help="Of every random choice.")]  # `check_seed` says which
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
    font: Annotated[
        str | None, typer.Option(metavar="NAME|FILE,…", help="Of the attack; default ones that no reader was taught.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="FROM,TO", help="Height of the attack's letters, as shares of the picture.")
    ] = None,
    place: Annotated[
        str | None, typer.Option(metavar="any|top|middle|bottom", help="Where the attack stands; default any.")
    ] = None,
    colour: Annotated[str | None, typer.Option(metavar="any|INK on PAPER", help="Of the attack; default any.")] = None,
    seed: Annotated[
        int,
        typer.Option(help="Of every random choice. It does not change what tests: the first of val/CLASS."),
    ] = 0,
    quick: Quick = False,
) -> None:
    """Prune the circuit of text from a network that reads: what remains of an attack by a word, and at what cost.

    DIR of --data holds train/ and val/, in each a folder of photographs for each class; for CLIP, class folders do.
    """
    from viscircuits.experiments.typographic import typographic

    given = {
        "faces": tuple(name.strip() for name in font.split(",")) if font else None,
        "height": _shares(size) if size else None, "place": place, "colour": colour,
    }  # fmt: skip
    written = {name: value for name, value in given.items() if value is not None}
    finish(
        typographic(
            out, data=data, model=model, weights=weights, each=each, written=written, seed=seed, quick=quick,
            progress=True,
        ),
        out,
    )  # fmt: skip


def _shares(given: str) -> tuple[float, float]:
    from viscircuits.errors import ViscircuitsError

    try:
        low, high = (float(each) for each in given.split(","))
    except ValueError:
        raise ViscircuitsError(f"--size takes two shares such as 0.12,0.2; got {given!r}") from None
    return low, high


Parts = Annotated[int | None, typer.Option("--parts", help="Parts drawn; default 20, or all rendered ones.", min=3)]
Pairs = Annotated[int, typer.Option("--pairs", help="Partners of each part.", min=1)]
Side = Annotated[int, typer.Option("--canvas", help="Pixels a side of the canvas.", min=2)]
Tile = Annotated[int, typer.Option("--tile", help="Pixels a side of a tile.", min=1)]
Ground = Annotated[
    str, typer.Option("--ground", metavar="mean|R,G,B", help="Colour around the tiles; default the parts' mean.")
]
Placement = Annotated[str, typer.Option(metavar="random|beside", help="Where tiles are put.")]


@app.command(epilog="Example: `viscircuits experiment composites --data tiny-imagenet/ --out composites`")
def composites(
    out: Out = Path("composites"),
    data: Data = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="lite0|small|torchvision:…", help="Default lite0; small without --data."),
    ] = None,
    weights: Annotated[str, typer.Option(metavar="default|none|FILE", help="What training starts from.")] = "default",
    parts: Parts = None,
    pairs: Pairs = 5,
    canvas: Side = 300,
    tile: Tile = 100,
    ground: Ground = "mean",
    placement: Placement = "random",
    size: Annotated[
        float | None, typer.Option(help="Units in a circuit, as a share of each layer; default 0.15, small 0.6.")
    ] = None,
    links: Annotated[int, typer.Option(help="Pairs of layers whose edges are pruned, from the end.", min=1)] = 1,
    ablation: Annotated[str, typer.Option(metavar="zero|mean", help="What a removed value becomes.")] = "zero",
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…", help="Each draws parts and images and trains a network; default 0,1,2, rendered 0."
        ),
    ] = None,
    quick: Quick = False,
) -> None:
    """Train a network on pairs of parts, prune the circuit of each part, and measure which pairs it still tells.

    DIR of --data holds a folder of photographs for each class, perhaps below train/ and val/.
    """
    from viscircuits.experiments.composites import composites

    finish(
        composites(
            out, data=data, model=model, weights=weights, n_parts=parts, pairs=pairs,
            canvas=_canvas(canvas, tile, ground, placement), size=size, links=links, ablation=ablation,
            seeds=_numbers(seeds or ("0" if data is None else "0,1,2"), "--seeds"), quick=quick, progress=True,
        ),
        out,
    )  # fmt: skip


@app.command(epilog="Example: `viscircuits experiment make-composites --data tiny-imagenet/ --out pairs`")
def make_composites(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for a folder of images of each pair.")],
    data: Data = None,
    parts: Parts = None,
    pairs: Pairs = 5,
    each: Annotated[int, typer.Option(help="Composites of each pair.", min=1)] = 50,
    held_out: Annotated[bool, typer.Option("--held-out", help="Of photographs that training does not show.")] = False,
    canvas: Side = 300,
    tile: Tile = 100,
    ground: Ground = "mean",
    placement: Placement = "random",
    seed: Seed = 0,
) -> None:
    """Write composites as files: a folder for each pair, and what made them."""
    from viscircuits.experiments.composites import made_composites

    drawn = made_composites(
        data, n_parts=parts, pairs=pairs, each=each, held_out=held_out,
        canvas=_canvas(canvas, tile, ground, placement), seed=seed,
    )  # fmt: skip
    drawn.write(out, progress=True)
    typer.echo(f"{len(drawn)} composites of {len(drawn.groups)} pairs: {out}")


def _canvas(side: int, tile: int, ground: str, placement: str) -> Canvas:
    from viscircuits.experiments.pairs import Canvas

    numbers = None if ground == "mean" else _numbers(ground, "--ground")
    return Canvas(side, tile, numbers, placement)


def _numbers(given: str, option: str) -> tuple[int, ...]:
    from viscircuits.errors import ViscircuitsError

    try:
        return tuple(int(each) for each in given.split(","))
    except ValueError:
        raise ViscircuitsError(f"{option} takes whole numbers such as 0,1,2; got {given!r}") from None


@app.command(epilog="Example: `viscircuits experiment train-reader --data tiny-imagenet/ --out reader.safetensors`")
def train_reader(
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="Folders of photographs, a class each.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the weights go.")] = Path(
        "reader.safetensors"
    ),
    classes: Annotated[
        int, typer.Option(help="How many folders are its classes; words stand on photographs of the rest.", min=2)
    ] = 30,
    seed: Seed = 0,
) -> None:
    """Train the small network that sees and reads, which `typographic` attacks; some twenty minutes of one core."""
    from dataclasses import replace

    from viscircuits.experiments.pictures import dealt_classes, photograph_files, read_files, set_apart
    from viscircuits.experiments.reader import DEVELOPMENT, LARGE, ORIGIN, card_of, train_reader
    from viscircuits.experiments.seeds import check_seed

    check_seed(seed)
    recipe = replace(LARGE, n_classes=classes, seed=seed)
    files = photograph_files(data, "train")
    shown, others = ({name: files[name] for name in names} for names in dealt_classes(list(files), classes, seed))
    photographs, development = (read_files(each) for each in set_apart(shown, DEVELOPMENT, seed))
    path = train_reader(
        photographs,
        read_files(others),
        out,
        recipe,
        development=development,
        about={"data": data.name, "made from": ORIGIN},
        progress=True,
    )
    figures = card_of(path)["development"]
    typer.echo(f"reader of {len(photographs.classes)} classes: {path}")
    typer.echo(
        f"of {figures['photographs']} photographs set apart it is right on {100 * figures['right']:.1f} %; a word of "
        f"another class fools it on {100 * figures['fooled']:.1f} %; beside a nonsense word it is right on "
        f"{100 * figures['right beside nonsense']:.1f} %"
    )
