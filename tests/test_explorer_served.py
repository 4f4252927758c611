"""Surgery as a person does it, on a real server with a real network: what is shown is what Python gives."""

from __future__ import annotations

import io
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from browser import axe
from test_discovery import tiny
from viscircuits import evaluation
from viscircuits.ablation import ablate, describe_layers, measure, prune_edges
from viscircuits.bundle import Bundle
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.discovery import discover, found_with
from viscircuits.models import ModelSpec
from viscircuits.notes import load_notes
from viscircuits.probing import respond
from viscircuits.surgery import Surgery

server = pytest.importorskip("viscircuits.server")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'viscircuits[serve]'")
pytestmark = pytest.mark.browser

CONCEPT, OTHERS = "render:grating,size=32,n=8", "render:colour,size=32,n=8"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelSpec]:
    """A result folder and its network."""
    spec, folder = tiny(), tmp_path_factory.mktemp("explored") / "grating"
    with torch.no_grad():
        spec.model[-1].weight.mul_(30)  # so that every unit and edge shows in the probabilities
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "N_BOOTSTRAP", 20)
        discover(
            spec, CONCEPT, folder, reference=OTHERS, units=3, draws=1, bootstrap=0, n_pictures=1, edge_fractions=(1.0,)
        )
    return folder, spec


@pytest.fixture(scope="module")
def address(made: tuple[Path, ModelSpec]) -> Iterator[str]:
    with server.serving(*made) as url:
        yield url


@pytest.fixture
def bundle(made: tuple[Path, ModelSpec]) -> Bundle:
    return Bundle.load(made[0])


def tab(page: Any, name: str) -> Any:
    page.get_by_role("tab", name=name, exact=True).click()
    return page.locator(f"#{name.lower()}")


def click_unit(page: Any, unit: Unit) -> Any:
    page.locator("#nodes").get_by_role("button", name=f"nit {unit.index} of {unit.layer}").click()
    return page.locator("#unit")


def select(page: Any, unit: Unit) -> None:
    click_unit(page, unit).get_by_role("button", name="Select for surgery").click()


def replace_by(page: Any, ablation: str) -> None:
    choice = page.get_by_label("Replaced by")
    if choice.input_value() != ablation:
        with page.expect_response(lambda response: response.url.endswith("/api/surgery")):
            choice.select_option(ablation)
        page.wait_for_timeout(50)


def reload(page: Any, more: str = "") -> None:
    page.wait_for_timeout(300)  # the address is written a moment after the last of many changes
    page.evaluate("(more) => { location.hash += more }", more)
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")


def table(page: Any, probe: str = "kept:0") -> dict[int, tuple[str, str]]:
    """What the page shows of a probe: class → probability before and after, as printed."""
    rows = page.locator(f"#surgery [data-probe='{probe}'] [data-answer]")
    rows.first.wait_for()
    return {
        int(row.get_attribute("data-answer")): tuple(row.locator(which).inner_text() for which in (".was", ".is"))
        for row in rows.all()
    }


def printed(logits: Tensor) -> list[str]:
    return [f"{100 * p:.2f}\u202f%" for p in logits.softmax(1)[0].double().tolist()]


def runs(spec: ModelSpec, picture: Image.Image) -> Tensor:
    with torch.no_grad():
        return spec.model(spec.transform(picture)[None])


def pruned(spec: ModelSpec, edge: Edge, picture: Image.Image) -> Tensor:
    with prune_edges(spec, [edge], "zero"):
        return runs(spec, picture)


def part(circuit: Circuit, units: list[Unit]) -> Circuit:
    layers = dict.fromkeys(unit.layer for unit in units)
    chosen = {layer: tuple(sorted(unit.index for unit in units if unit.layer == layer)) for layer in layers}
    return Circuit(chosen, {layer: circuit.widths[layer] for layer in layers})


def expect(shown: dict[int, tuple[str, str]], before: list[str], after: list[str]) -> None:
    assert shown
    for index, (was, now) in shown.items():
        for text, true in ((was, before[index]), (now, after[index])):
            assert text == true or text.startswith("≤")  # not among the strongest five
    assert any(was != now for was, now in shown.values())


def test_an_image_of_ones_own_and_its_heat_on_the_units_come_back_with_a_reload(open_live, address, bundle, page):
    open_live(address)
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(buffer, "PNG")
    tab(page, "Probe").locator("input[type=file]").set_input_files(
        {"name": "teal.png", "mimeType": "image/png", "buffer": buffer.getvalue()}
    )
    page.locator("#probe").get_by_role("heading", name="teal.png").wait_for()
    page.mouse.click(5, 5)
    while not page.locator("#nodes img.heatmap").count():
        page.keyboard.press("v")
    for _ in range(2):
        first = page.locator("#nodes img.heatmap").first
        first.evaluate("async (img) => { await img.decode(); return img.naturalWidth }")  # raises if it cannot be drawn
        assert page.locator("#nodes img.heatmap").count() == len(list(bundle.circuit))
        reload(page)
        page.locator("#probe").get_by_role("heading", name="teal.png").wait_for()
        page.locator("#nodes img.heatmap").first.wait_for()


def test_an_image_that_the_server_no_longer_has_leaves_the_units_their_pictures(open_live, address, page):
    open_live(address)
    page.evaluate("location.hash = 'probe=0123456789abcdef&face=heat&panel=probe'")
    page.reload()
    page.locator("#probe").get_by_text("give the image again").wait_for()
    assert page.locator("#nodes img.heatmap").count() == 0
    page.complaints.clear()  # the browser's own of a 404


def test_selecting_units_changes_the_prediction_exactly_as_ablate_does(open_live, address, made, bundle):
    _, spec = made
    page, circuit = open_live(address), bundle.circuit
    chosen = [next(unit for unit in circuit if unit.layer == layer) for layer in circuit.layers[-2:]]
    for unit in chosen:
        select(page, unit)
    tab(page, "Surgery")
    picture = bundle.probes.pictures[0]
    reference = measure(spec, found_with(circuit.provenance, "reference"), circuit.layers)
    for ablation in ("zero", "mean"):
        replace_by(page, ablation)
        with ablate(spec, part(circuit, chosen), ablation, reference=reference):
            after = runs(spec, picture)
        expect(table(page), printed(runs(spec, picture)), printed(after))


def test_the_units_glow_as_they_fire_under_ablate(open_live, address, made, bundle):
    _, spec = made
    page, circuit, probes = open_live(address), bundle.circuit, bundle.probes
    clean = dict(zip(probes.units, probes.activations[0].tolist(), strict=True))
    most = dict(zip(probes.units, np.abs(probes.activations).max(0).tolist(), strict=True))
    cut = [unit for unit in circuit if unit.layer == circuit.layers[0]]  # later ones hear of it
    tab(page, "Probe").locator("button.probe").first.click()
    for unit in cut:
        select(page, unit)
    tab(page, "Surgery")
    for ablation in ("mean", "zero"):
        replace_by(page, ablation)
    units, layers = list(circuit), describe_layers(spec, spec.example(), circuit.layers)
    with ablate(spec, part(circuit, cut), "zero"):
        rows, _ = respond(spec, spec.transform(probes.pictures[0])[None], units, layers)
    fired = dict(zip(units, rows[0].tolist(), strict=True))
    shown = page.locator("#nodes .unit:not(.super)").evaluate_all(
        "all => all.map((each) => [each.unit.name, Number(each.style.getPropertyValue('--glow'))])"
    )
    true = {str(unit): min(1, max(0, fired[unit] / most[unit])) for unit in units if most[unit]}
    assert {name: dict(shown)[name] for name in true} == pytest.approx(true, abs=1e-3)
    changed = {
        str(unit): fired[unit] < clean[unit] for unit in units if abs(fired[unit] - clean[unit]) > 0.03 * most[unit]
    }
    assert any(changed.values()) and len({name.split(":")[0] for name in changed}) > 1  # later layers too
    fell = page.locator("#nodes .unit.fell").evaluate_all("all => all.map((each) => each.unit.name)")
    rose = page.locator("#nodes .unit.rose").evaluate_all("all => all.map((each) => each.unit.name)")
    assert all(name in (fell if less else rose) for name, less in changed.items())


def test_heat_maps_on_the_units_are_those_that_python_draws(open_live, address, made, bundle):
    _, spec = made
    own = replace(spec, model=deepcopy(spec.model))  # before the server's is busy drawing: a copy takes its hooks along
    page, circuit = open_live(address), bundle.circuit
    tab(page, "Probe").locator("button.probe").first.click()
    page.get_by_role("button", name="Heat map", exact=True).click()
    asked = Surgery(own, circuit)
    probe = asked.probe(bundle.probes.pictures[0], "first", "concept")
    for unit in (next(iter(circuit)), list(circuit)[-1]):
        node = page.locator("#nodes").get_by_role("button", name=f"nit {unit.index} of {unit.layer}")
        image = node.locator("img.heatmap")
        image.evaluate("async (img) => { await img.decode() }")
        shown = image.evaluate(
            """(img) => { const canvas = new OffscreenCanvas(img.naturalWidth, img.naturalHeight);
              const context = canvas.getContext("2d"); context.drawImage(img, 0, 0);
              return [...context.getImageData(0, 0, canvas.width, canvas.height).data] }"""
        )
        assert bytes(shown) == asked.heat(probe, unit).convert("RGBA").tobytes()
    tab(page, "Probe").locator("button.probe").first.click()  # no image, no heat
    assert page.locator("#nodes img.heatmap").count() == 0


def test_cutting_an_edge_changes_the_prediction_exactly_as_prune_edges_does(open_live, address, made, bundle):
    _, spec = made
    picture = bundle.probes.pictures[0]
    cut = {edge: pruned(spec, edge, picture) for edge in bundle.circuit.edges}
    edge = max(cut, key=lambda edge: float((cut[edge] - runs(spec, picture)).abs().max()))  # several do next to nothing
    page = open_live(address)
    click_unit(page, edge.target).get_by_role("button", name=f"The edge from {edge.source}").click()
    page.locator("#edge").get_by_role("button", name="Select for surgery").click()
    tab(page, "Surgery")
    replace_by(page, "zero")
    expect(table(page), printed(runs(spec, picture)), printed(cut[edge]))


def test_undoing_everything_leaves_the_network_as_it_was(open_live, address, made, bundle):
    _, spec = made
    page, unit = open_live(address), next(iter(bundle.circuit))
    picture = bundle.probes.pictures[0]
    untouched = runs(spec, picture)
    select(page, unit)
    panel = tab(page, "Surgery")
    table(page)
    panel.get_by_role("button", name="Undo").click()
    assert "Nothing is selected" in panel.inner_text()
    assert panel.locator("[data-answer]").count() == 0
    assert torch.equal(runs(spec, picture), untouched)


@pytest.mark.parametrize("ablation", ["resample", "noise"])
def test_what_replaces_the_units_comes_back_with_a_reload_and_with_undo(open_live, address, bundle, page, ablation):
    open_live(address)
    for unit in bundle.circuit:
        select(page, unit)
    tab(page, "Surgery")
    usual = page.get_by_label("Replaced by").input_value()
    first = table(page)
    replace_by(page, ablation)
    shown = table(page)
    assert shown != first
    reload(page)
    assert page.get_by_label("Replaced by").input_value() == ablation and table(page) == shown
    replace_by(page, usual)
    assert table(page) == first
    for button, choice, answers in (("Undo", ablation, shown), ("Redo", usual, first)):
        with page.expect_response(lambda response: response.url.endswith("/api/surgery")):
            page.locator("#surgery").get_by_role("button", name=button).click()
        page.wait_for_timeout(50)
        assert page.get_by_label("Replaced by").input_value() == choice and table(page) == answers


def test_a_replacement_that_there_is_not_is_passed_over(open_live, address, bundle, page):
    open_live(address)
    select(page, next(iter(bundle.circuit)))
    tab(page, "Surgery")
    usual = page.get_by_label("Replaced by").input_value()
    reload(page, "&replaced-by=toString")
    assert page.get_by_label("Replaced by").input_value() == usual and table(page)


def test_an_image_of_ones_own_is_seen_by_the_network(open_live, address, made, bundle):
    _, spec = made
    page = open_live(address)
    picture = Image.effect_noise((32, 32), 90).convert("RGB")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    panel = tab(page, "Probe")
    given = {"name": "noise ½.png", "mimeType": "image/png", "buffer": buffer.getvalue()}
    panel.locator("input[type=file]").set_input_files([given])
    panel.get_by_role("heading", name="noise ½.png").wait_for()
    best = runs(spec, picture).softmax(1)[0].max().item()
    assert panel.locator(".answers .n").first.inner_text() == f"{100 * best:.2f}\u202f%"


def test_accuracy_is_measured_with_progress_and_told_with_intervals(open_live, address, bundle):
    page = open_live(address)
    select(page, next(iter(bundle.circuit)))
    panel = tab(page, "Surgery")
    panel.get_by_role("button", name="Measure accuracy").click()
    panel.get_by_role("row", name="concept").wait_for()
    before = bundle.evaluation.data["baseline"]["concept"][bundle.evaluation.data["measure"]]["value"]
    cells = panel.get_by_role("row", name="concept").get_by_role("cell").all_inner_texts()
    assert cells[0].startswith(f"{100 * before:.1f}") and "[" in cells[0]


def test_the_edge_without_a_kernel_in_the_page_gets_one_from_the_network(open_live, address, bundle):
    page, edge = open_live(address), bundle.circuit.edges[-1]
    page.evaluate("import('viscircuits/store.js').then(({ data }) => { data.kernels = data.contributions = null; })")
    click_unit(page, edge.target).get_by_role("button", name=f"The edge from {edge.source}").click()
    page.locator("#edge .kernel").wait_for()
    assert page.locator("#edge .bars li").count() > 0


def test_a_note_lands_in_the_folder_and_shows_in_another_tab(open_live, address, made, bundle):
    page, unit = open_live(address), next(iter(bundle.circuit))
    panel = click_unit(page, unit)
    panel.get_by_label("Name", exact=True).fill("stripes <i>")
    panel.get_by_role("button", name="Save").click()
    panel.get_by_role("heading", name="stripes <i>").wait_for()
    assert load_notes(made[0])[str(unit)]["name"] == "stripes <i>"
    other = page.context.new_page()
    other.goto(page.url)
    other.locator("#nodes").get_by_text("stripes <i>").first.wait_for()


def test_axe_finds_no_serious_fault_after_an_operation(open_live, address, bundle):
    page = open_live(address)
    select(page, next(iter(bundle.circuit)))
    tab(page, "Surgery")
    table(page)
    assert axe(page) == []
