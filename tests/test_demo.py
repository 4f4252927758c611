"""The demo: its photographs are where it looks, and the page that is made of them opens from disk."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from viscircuits import discover, load_model
from viscircuits.demo import ANIMALS, THINGS, _paths
from viscircuits.errors import ImageError, ModelError


def test_every_photograph_is_there_and_named_once():
    try:
        found = {**_paths(ANIMALS), **_paths(THINGS)}
    except ImageError as error:
        pytest.skip(str(error))
    assert len({path.name for path in found}) == len(ANIMALS) + len(THINGS)
    for path in found:
        with Image.open(path) as image:
            assert min(image.size) >= 200


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.weights
def test_the_page_of_the_demos_network_and_photographs_opens_from_disk(open_page, tmp_path):
    """As the demo makes it, in three of its layers: pictures on the units, figures beside them, every panel."""
    try:
        spec, animals, things = load_model("lite0"), _paths(ANIMALS), _paths(THINGS)
    except (ImageError, ModelError) as error:
        pytest.skip(str(error))
    labels = {path.name: str(label) for path, label in (animals | things).items()}
    bundle = discover(
        spec, list(animals)[:6], tmp_path / "demo", reference=list(things)[:6], layers=(spec.layers or ())[-3:],
        units=0.01, contrast="ratio", ablation="mean", labels=labels, draws=1, bootstrap=0, edge_fractions=(),
        n_pictures=2, title="animal",
    )  # fmt: skip
    tab = open_page((tmp_path / "demo" / "index.html").read_text(encoding="utf-8"))
    assert tab.get_by_role("heading", level=1).inner_text() == "animal"
    units = tab.locator("#nodes .unit:not(.super)")
    assert units.count() == len(bundle.circuit)
    seen = Image.open(io.BytesIO(tab.locator("#nodes .unit:has(.pic) > span").first.screenshot())).convert("L")
    assert len(seen.getcolors(256) or ()) > 30  # a photograph, no empty tile
    units.first.hover()
    tab.wait_for_function("() => document.getElementById('stage').classList.contains('dim')")
    units.first.click()
    for panel in tab.get_by_role("tab").all():
        panel.click()
        shown = tab.locator(f"#{panel.get_attribute('aria-controls')}")
        assert shown.is_visible() and len(shown.inner_text()) > 20
    tab.keyboard.press("[")
    assert units.locator("visible=true").count() < len(bundle.circuit)
