"""The main job on photographs that arrive by pip, so that it runs anywhere.

The concept is *animal*: photographs of seven animals from foolbox and a cat from scikit-image; the
reference is fifteen photographs of other things from the same packages. Half of each finds the
circuit, the rest tests it: few images, so the intervals are wide, and the page shows them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from viscircuits.bundle import Bundle
from viscircuits.discovery import discover, edit_from
from viscircuits.editing import Edited
from viscircuits.errors import ImageError
from viscircuits.models import load_model

N_LAYERS = 8  # the later half: where removing a concept's units spares the rest, see docs/results.md

# (package, file, ImageNet class)
ANIMALS = (
    ("foolbox", "imagenet_00_243.jpg", 243),
    ("foolbox", "imagenet_14_129.jpg", 129),
    ("foolbox", "imagenet_15_99.jpg", 99),
    ("foolbox", "imagenet_16_251.jpg", 251),
    ("foolbox", "imagenet_17_22.jpg", 22),
    ("foolbox", "imagenet_18_317.jpg", 317),
    ("foolbox", "imagenet_19_305.jpg", 305),
    ("skimage", "chelsea.png", 282),
)
THINGS = (
    ("foolbox", "imagenet_01_559.jpg", 559),
    ("foolbox", "imagenet_02_438.jpg", 438),
    ("foolbox", "imagenet_03_990.jpg", 990),
    ("foolbox", "imagenet_04_949.jpg", 949),
    ("foolbox", "imagenet_05_853.jpg", 853),
    ("foolbox", "imagenet_06_609.jpg", 609),
    ("foolbox", "imagenet_07_609.jpg", 609),
    ("foolbox", "imagenet_08_915.jpg", 915),
    ("foolbox", "imagenet_09_455.jpg", 455),
    ("foolbox", "imagenet_10_541.jpg", 541),
    ("foolbox", "imagenet_11_630.jpg", 630),
    ("foolbox", "imagenet_12_741.jpg", 741),
    ("foolbox", "imagenet_13_471.jpg", 471),
    ("skimage", "coffee.png", 967),
    ("skimage", "rocket.jpg", 657),
)


def demo(out: str | Path, *, command: str = "viscircuits demo", progress: bool = False) -> tuple[Bundle, Edited]:
    """Discover, test, picture and edit out the circuit of *animal* in EfficientNet-Lite0.

    Parameters
    ----------
    out
        Folder for the result, with the edited weights in ``edited.safetensors``.
    command
        The command to show on the page.
    progress
        Show progress bars.

    Raises
    ------
    ImageError
        If the packages that hold the photographs are not installed.
    """
    spec = load_model("lite0")
    animals, things = _paths(ANIMALS), _paths(THINGS)
    labels = {path.name: str(label) for path, label in (animals | things).items()}
    late = (spec.layers or ())[-N_LAYERS:]
    bundle = discover(
        spec, list(animals), out, reference=list(things), layers=late, units=0.05, contrast="ratio", ablation="mean",
        labels=labels,
        draws=3, edge_fractions=(0.25, 0.5, 1.0), n_pictures=2, n_pictured=24, title="animal",
        command=command, progress=progress,
    )  # fmt: skip
    edited, _ = edit_from(out, Path(out) / "edited.safetensors")
    return bundle, edited


def _paths(photographs: tuple[tuple[str, str, int], ...]) -> dict[Path, int]:
    """Where the photographs lie in the installed packages, which are not imported."""
    return {_data_folder(package) / file: label for package, file, label in photographs}


def _data_folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImageError(
            f"the demo's photographs come with {package}, which is not installed: pip install 'viscircuits[demo]'"
        )
    return Path(found.submodule_search_locations[0]) / "data"
