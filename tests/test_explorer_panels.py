"""The panels beside the graph, tried as a person tries them, in Chromium."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import runpy
import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from browser import axe
from test_discovery import tiny
from test_page import about, fake_circuit, fake_evaluation, fake_pictures, held, shown
from viscircuits import discovery
from viscircuits.ablation import ablate, prune_edges
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.models import ModelSpec
from viscircuits.notes import load_notes
from viscircuits.page import page

pytestmark = pytest.mark.browser

SIDE = 5
IMAGES = [f"photo {i}.jpg" for i in range(20)]
PROBES = ["clean mug", "mug with a note", "street"]


# ------------------------------------------------------------------ a page that holds everything


def sheet(colours: list[tuple[int, int, int]], tile: int = 32) -> dict[str, Any]:
    """A sprite of plain tiles."""
    image = Image.new("RGB", (tile * len(colours), tile))
    for i, colour in enumerate(colours):
        image.paste(colour, (i * tile, 0, (i + 1) * tile, tile))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"uri": uri, "tile": tile, "columns": len(colours), "rows": 1}


def kernels(n: int) -> np.ndarray:
    """Kernels of the first `n` edges: edge 0 has one weight of +0.5 two positions right of the middle and one up."""
    values = np.random.default_rng(0).normal(size=(n, SIDE, SIDE)) / 10
    values[0] = 0
    values[0, 1, 4] = 0.5
    return values


def contributions(n: int) -> np.ndarray:
    values = np.random.default_rng(1).normal(0.3, 1, size=(n, len(IMAGES)))
    values[0] = np.arange(len(IMAGES)) - 4.5
    return values.astype("<f4")


def answers(*given: tuple[int, str, float]) -> list[dict[str, Any]]:
    return [{"index": index, "label": label, "probability": p} for index, label, p in given]


def probes(n_units: int) -> dict[str, Any]:
    """Three probes. On the second the last unit alone does what it did not do on the first."""
    clean = [i / n_units for i in range(n_units)]
    attacked = [*clean[:-1], clean[-1] - 0.8]
    rows = [(PROBES[0], "concept", clean), (PROBES[1], "attacked", attacked), (PROBES[2], "reference", [0.1] * n_units)]
    given = [
        answers((504, "coffee mug", 0.81234), (968, "cup", 0.11)),
        answers((606, "iPod", 0.7), (504, "coffee mug", 0.2)),
        answers((920, "traffic light", 0.9)),
    ]
    return {
        "sprite": sheet([(180, 120, 60), (90, 140, 190), (90, 160, 90)]),
        "probes": [
            {"name": name, "kind": kind, "answers": given[i], "activations": values}
            for i, (name, kind, values) in enumerate(rows)
        ],
        "most": [1.0] * n_units,
    }


def blocks(data: dict[str, Any]) -> dict[str, Any]:
    """Everything that a page may hold beside its graph."""
    n_units, n_edges = sum(len(layer["units"]) for layer in data["layers"]), len(data["edges"]["source"])
    first = f"{data['layers'][0]['name']}:{data['layers'][0]['units'][0]}"
    looked_at = min(40, n_edges)
    made, given = kernels(looked_at), contributions(looked_at)
    scale = abs(made).max((1, 2))
    written = np.round(made / scale[:, None, None] * 127).astype(np.int8)
    where = list(range(looked_at))
    overlap = [
        {
            "layer": layer["name"],
            "n_units": layer["width"],
            "size_a": len(layer["units"]),
            "size_b": 5,
            "shared": 3,
            "jaccard": 0.375,
            "chance": 0.06,
            "p_value": 2e-4,
        }
        for layer in data["layers"]
    ]
    return {
        "visualisation_sprite": sheet([(200, 80, 80), (80, 80, 200)]),
        "visualisations": [[[0, "channel"], [1, "channel, negative"]]] * n_units,
        "kernels": {
            "edges": where,
            "side": SIDE,
            "values": base64.b64encode(written.tobytes()).decode(),
            "scale": scale.tolist(),
        },
        "contributions": {"images": IMAGES, "edges": where, "values": base64.b64encode(given.tobytes()).decode()},
        "probes": probes(n_units),
        "comparison": {
            "title": "cats",
            "member": [(1, 3, 2)[i % 3] for i in range(n_units)],
            "edge_member": [(1, 3, 2, 3)[i % 4] for i in range(n_edges)],
            "overlap": overlap,
        },
        "notes": {first: {"name": "ears", "text": "pointed ones", "by": "Ada", "when": "2026-01-02T10:00:00+00:00"}},
        "elsewhere": {first: ["cats", "wolves"]},
    }


def served(circuit: Circuit, evaluation: Any, pictures: Any) -> str:
    """The page as a server gives it."""
    return page(circuit, evaluation, pictures, title="dog", command="viscircuits discover lite0 dogs", served=True)


def holding(text: str) -> str:
    """The page with every block filled in."""
    data = held(text)
    data |= blocks(data)
    written = json.dumps(data).replace("<", "\\u003c")
    return re.sub(
        r'(<script type="application/json" id="data">).*?(</script>)',
        lambda found: found[1] + written + found[2],
        text,
        flags=re.DOTALL,
    )


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return fake_circuit(4, 6, 80)


@pytest.fixture(scope="module")
def html(circuit) -> str:
    return holding(shown(circuit, fake_evaluation(), fake_pictures(circuit)))


@pytest.fixture(scope="module")
def data(html) -> dict[str, Any]:
    return held(html)


def names_of(data: dict[str, Any]) -> list[str]:
    return [f"{layer['name']}:{index}" for layer in data["layers"] for index in layer["units"]]


def tab(page: Any, name: str) -> Any:
    """Open a tab of the side panel; its content."""
    page.get_by_role("tab", name=name, exact=True).click()
    return page.locator(f"#{name.lower()}")


def click_unit(page: Any, name: str) -> Any:
    """Click a unit in the graph; its panel."""
    layer, _, index = name.rpartition(":")
    page.locator("#nodes").get_by_role("button", name=re.compile(rf"^.*\b{index} of {re.escape(layer)}\b")).click()
    return page.locator("#unit")


def with_minus(text: str) -> str:
    return text.replace("−", "-").replace("\u202f", " ")


def first_answer(panel: Any) -> list[str]:
    return with_minus(panel.locator(".answers li").first.inner_text()).split("\n")


# ------------------------------------------------------------------ unit


def test_a_unit_shows_its_pictures_its_confidence_and_where_else_it_stands(open_page, html, data):
    panel = click_unit(open_page(html), names_of(data)[0])
    assert panel.get_by_role("heading", level=2).inner_text() == "ears"
    assert panel.locator(".where").first.inner_text() == names_of(data)[0]
    assert panel.get_by_role("img", name=re.compile("Region of")).count() == len(data["pictures"][0])
    assert panel.locator("h3:text('Also in') + ul li").all_inner_texts() == ["cats", "wolves"]


def test_neighbours_are_listed_with_their_signed_share_and_a_click_goes_there(open_page, html, data):
    page = open_page(html)
    panel = click_unit(page, names_of(data)[0])
    edges = data["edges"]
    mine = [i for i, source in enumerate(edges["source"]) if source == 0]
    mine.sort(key=lambda i: -edges["share"][i])
    total = sum(edges["share"][i] for i in mine)
    shares = [math.copysign(edges["share"][i] / total, edges["signed"][i]) for i in mine]
    listed = [with_minus(text) for text in panel.locator(".neighbour .n b").all_inner_texts()]
    assert [float(text.rstrip("% ")) for text in listed] == pytest.approx([100 * share for share in shares], abs=0.51)
    panel.locator(".neighbour .row").first.click()
    there = names_of(data)[edges["target"][mine[0]]]
    assert panel.get_by_role("heading", level=2).inner_text() == there
    page.reload()  # the address is a permanent link
    page.wait_for_selector("html[data-ready]", state="attached")
    assert panel.get_by_role("heading", level=2).inner_text() == there


def test_visualisations_stand_beside_exemplars(open_page, html, data):
    panel = click_unit(open_page(html), names_of(data)[0])
    panel.get_by_role("button", name="Visualisations").click()
    assert panel.locator("figcaption").all_inner_texts() == ["channel", "channel, negative"]
    colours = panel.locator(".shots .pic").evaluate_all(
        "all => all.map((one) => getComputedStyle(one).backgroundImage)"
    )
    assert all(data["visualisation_sprite"]["uri"] in colour for colour in colours)


# ------------------------------------------------------------------ edge


def open_first_edge(page: Any, data: dict[str, Any]) -> Any:
    """Open edge 0 from its source's panel."""
    source, target = (names_of(data)[data["edges"][end][0]] for end in ("source", "target"))
    click_unit(page, source).get_by_role("button", name=re.compile(f"The edge to {re.escape(target)}\\b")).click()
    return page.locator("#edge")


def test_an_edge_shows_its_kernel_as_picture_number_and_table(open_page, html, data):
    page = open_page(html)
    panel = open_first_edge(page, data)
    cells = panel.locator(".kernel [data-cell]")
    assert cells.count() == SIDE**2
    shown_at = panel.locator(".kernel [data-cell][fill-opacity='1.000']")
    assert shown_at.count() == 1 and shown_at.get_attribute("data-cell") == "9"  # row 1, column 4
    shown_at.hover(force=True)
    assert panel.locator("output").inner_text() == "1 up, 2 right: +0.5"
    assert (
        "sits 1.0 positions above and 2.0 positions to the right of the target" in panel.locator(".offset").inner_text()
    )
    panel.get_by_text("Kernel as a table").click()
    numbers = [float(with_minus(cell)) for cell in panel.locator("table tbody td").all_inner_texts()]
    assert numbers == pytest.approx(kernels(1)[0].ravel().tolist(), abs=0.5 / 127)


def test_the_kernel_is_read_with_the_arrow_keys(open_page, html, data):
    page = open_page(html)
    panel = open_first_edge(page, data)
    panel.get_by_role("button", name="Copy link").focus()
    page.keyboard.press("Tab")
    said = []
    for key in ("ArrowUp", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
        said.append(panel.locator("output").inner_text())
    assert said == ["1 up: 0", "1 up, 1 right: 0", "1 up, 2 right: +0.5"]
    assert panel.get_by_role("heading", level=2).inner_text().count("→") == 1  # the graph did not move


def test_contributions_are_sorted_and_summed_up(open_page, html, data):
    panel = open_first_edge(open_page(html), data)
    assert "For the target on 15 of 20 images, against it on 5; mean +5." in panel.inner_text()
    assert panel.locator(".bars .name").first.inner_text() == "photo 19.jpg"
    panel.get_by_role("button", name="Show 8 more between").click()
    listed = [float(with_minus(text)) for text in panel.locator(".bars .n").all_inner_texts()]
    assert listed == sorted(contributions(1)[0].tolist(), reverse=True)


def test_an_edge_that_was_not_looked_at_says_how_to_look(open_page, circuit):
    text = shown(circuit, None, fake_pictures(circuit))
    page = open_page(text)
    assert "viscircuits view DIR --serve" in open_first_edge(page, held(text)).inner_text()


# ------------------------------------------------------------------ probe


def glow(page: Any) -> list[float] | None:
    return page.evaluate("import('viscircuits/store.js').then((store) => store.activations && [...store.activations])")


def test_a_probe_makes_the_units_glow_and_tells_the_answers(open_page, html, data):
    page = open_page(html)
    panel = tab(page, "Probe")
    panel.get_by_role("button", name=re.compile("clean mug")).click()
    n = len(names_of(data))
    assert glow(page) == pytest.approx([i / n for i in range(n)], abs=1e-6)
    assert first_answer(panel) == [
        "coffee mug",
        "81.23 %",
    ]
    panel.get_by_role("button", name=re.compile("^clean mug")).click()  # again: off
    assert glow(page) is None


def test_a_link_restores_the_glow(open_page, html, data):
    page = open_page(html)
    tab(page, "Probe").get_by_role("button", name=re.compile("^clean mug")).click()
    page.wait_for_url(re.compile("probe=kept:0"))
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    lit = page.locator("#nodes .unit[style*='--glow']")
    assert lit.count() == len(names_of(data))
    assert page.locator("#probe").get_by_role("heading", level=2).inner_text() == "clean mug"


def test_two_probes_stand_side_by_side_with_what_differs(open_page, html, data):
    page = open_page(html)
    panel = tab(page, "Probe")
    panel.get_by_role("button", name=re.compile("^clean mug")).click()
    panel.get_by_role("button", name="Set mug with a note against clean mug").click()
    assert panel.locator(".pair figcaption").all_inner_texts() == ["first clean mug", "second mug with a note"]
    n = len(names_of(data))
    assert glow(page) == pytest.approx([0.0] * (n - 1) + [-0.8], abs=1e-6)
    differing = panel.locator(".excited li")
    assert differing.count() == 1 and names_of(data)[-1] in differing.inner_text()
    assert with_minus(differing.locator(".n").inner_text()) == "-80 %"


# ------------------------------------------------------------------ compare


def test_two_circuits_are_counted_and_set_against_chance(open_page, html, data):
    panel = tab(open_page(html), "Compare")
    member, of_edges = data["comparison"]["member"], data["comparison"]["edge_member"]
    labels = panel.locator("label").all()
    listed = [(label.locator("b").inner_text(), label.locator("small").inner_text()) for label in labels]
    assert listed == [
        (title, f"{member.count(which)} units, {of_edges.count(which)} edges")
        for which, title in ((1, "only dog"), (3, "both"), (2, "only cats"))
    ]
    assert panel.locator("tbody tr").count() == len(data["layers"])
    assert "0.375" in panel.inner_text() and "chance 0.06" in panel.inner_text() and "< 0.001" in panel.inner_text()


def test_members_can_be_hidden(open_page, html, data):
    page = open_page(html)
    panel = tab(page, "Compare")
    panel.get_by_label(re.compile("only cats")).uncheck()
    shown_now = page.locator("#nodes .unit:visible").count()
    assert shown_now == sum(which != 2 for which in data["comparison"]["member"])


# ------------------------------------------------------------------ surgery, in a page without a server


def test_the_basket_can_be_filled_undone_done_again_and_cleared(open_page, html, data):
    page = open_page(html)
    names = names_of(data)
    click_unit(page, names[0]).get_by_role("button", name="Select for surgery").click()
    click_unit(page, names[7]).get_by_role("button", name="Select for surgery").click()
    panel = tab(page, "Surgery")
    chips = panel.get_by_role("list", name="Selected for surgery").locator(".what")
    assert chips.all_inner_texts() == ["ears", names[7]]
    panel.get_by_role("button", name="Take out ears").click()
    assert chips.all_inner_texts() == [names[7]]
    panel.get_by_role("button", name="Undo").click()
    assert chips.all_inner_texts() == ["ears", names[7]]
    panel.get_by_role("button", name="Redo").click()
    assert chips.all_inner_texts() == [names[7]]
    panel.get_by_role("button", name="Clear").click()
    assert "Nothing is selected" in panel.inner_text()
    for _ in range(3):
        panel.get_by_role("button", name="Undo").click()
    assert chips.all_inner_texts() == ["ears"]
    assert "viscircuits view DIR --serve" in panel.inner_text()


def tiny_circuit(spec: ModelSpec) -> Circuit:
    """A circuit in a real network."""
    edges = tuple(Edge(Unit("1", i), Unit("3", j), 1.0 / (1 + i + j), 0.1) for i in (0, 1) for j in (2, 5))
    made = {"model": "tiny", "weights": spec.weights_digest(), "weights_from": "none", "ablation": "zero"}
    return Circuit({"1": (0, 1), "3": (2, 5)}, {"1": 6, "3": 8}, edges=edges, provenance=made)


def test_the_exported_script_does_what_ablate_does(open_page, tmp_path, monkeypatch, capsys):
    spec = tiny()
    monkeypatch.setattr(discovery, "load_model", lambda address, weights: spec)
    circuit = tiny_circuit(spec)
    circuit.save(tmp_path / "circuit.json")
    text = select_and_export(open_page(shown(circuit)), "1:0", circuit.edges[0], "Python")
    (tmp_path / "surgery.py").write_text(text, encoding="utf-8")
    photo = Image.effect_noise((32, 32), 80).convert("RGB")
    photo.save(tmp_path / "photo.png")
    monkeypatch.setattr(sys, "argv", ["surgery.py", str(tmp_path / "photo.png")])
    script = runpy.run_path(str(tmp_path / "surgery.py"))
    image = spec.transform(photo)[None]
    with torch.no_grad():
        before = spec.model(image)
        with ablate(spec, Circuit({"1": (0,)}, {"1": 6}), "zero"), prune_edges(spec, circuit.edges[:1], "zero"):
            after = spec.model(image)
        with ablate(spec, script["removed"], script["ablation"]), prune_edges(spec, script["edges"], "zero"):
            assert torch.equal(spec.model(image), after)
    assert not torch.equal(before, after)
    said = capsys.readouterr().out
    assert said == f"photo.png: output {before.argmax()} before, output {after.argmax()} after\n"


def test_the_exported_command_names_the_units(open_page, tmp_path):
    circuit = tiny_circuit(tiny())
    text = select_and_export(open_page(shown(circuit)), "1:0", None, "Command line")
    _, written, _, command, _ = text.split("\n")
    assert Circuit.from_json(json.loads(written)).units == {"1": (0,)}
    asked = shlex.split(command)
    assert asked[:3] == ["viscircuits", "edit", str(tmp_path)] and "edit.json" in asked


def select_and_export(page: Any, unit: str, edge: Edge | None, kind: str) -> str:
    panel = click_unit(page, unit)
    panel.get_by_role("button", name="Select for surgery").click()
    if edge is not None:
        panel.get_by_role("button", name=re.compile(f"The edge to {re.escape(str(edge.target))}\\b")).click()
        page.locator("#edge").get_by_role("button", name="Select for surgery").click()
    panel = tab(page, "Surgery")
    panel.get_by_role("button", name=kind).click()
    return panel.locator("pre.code").inner_text()


# ------------------------------------------------------------------ notes


def write_note(panel: Any, label: str, **parts: str) -> None:
    form = panel.get_by_role("form", name=label)
    for part, text in parts.items():
        form.get_by_label(part, exact=True).fill(text)
    form.get_by_role("button", name="Save").click()


def test_a_name_stays_in_the_browser_and_goes_to_the_folder_as_notes(open_page, html, data, tmp_path):
    page = open_page(html)
    name = names_of(data)[3]
    write_note(click_unit(page, name), f"Note on {name}", Name="wet noses", Remark="and lips <b>", By="Grace")
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert click_unit(page, name).get_by_role("heading", level=2).inner_text() == "wet noses"
    panel = tab(page, "Notes")
    assert "and lips <b>" in panel.inner_text() and "Grace" in panel.inner_text()
    with page.expect_download() as download:
        panel.get_by_role("button", name="Download notes.json").click()
    download.value.save_as(tmp_path / "folder" / "notes.json")
    notes = load_notes(tmp_path / "folder")
    assert set(notes) == {names_of(data)[0], name}
    assert {part: notes[name][part] for part in ("name", "text", "by")} == {
        "name": "wet noses",
        "text": "and lips <b>",
        "by": "Grace",
    }
    assert datetime.fromisoformat(notes[name]["when"]).tzinfo is not None


def test_the_later_of_two_notes_is_shown(open_page, html, data):
    page = open_page(html)
    first = names_of(data)[0]
    write_note(click_unit(page, first), f"Note on {first}", Name="muzzles")
    panel = page.locator("#unit")
    assert panel.get_by_role("heading", level=2).inner_text() == "muzzles"
    page.reload()  # the file still says ears, but earlier
    page.wait_for_selector("html[data-ready]", state="attached")
    assert click_unit(page, first).get_by_role("heading", level=2).inner_text() == "muzzles"


# ------------------------------------------------------------------ export


def exported(page: Any, kind: str) -> Path:
    page.get_by_role("button", name="Export", exact=True).click()
    with page.expect_download() as download:
        page.get_by_role("dialog").get_by_role("button", name=kind, exact=True).click()
    return download.value.path()


def test_the_svg_is_a_vector_that_needs_nothing_else(open_page, html, data):
    tree = ElementTree.parse(exported(open_page(html), "SVG")).getroot()
    space = "{http://www.w3.org/2000/svg}"
    images = list(tree.iter(f"{space}image"))
    assert len(images) == len(names_of(data))
    assert all(image.get("href").startswith("data:image/jpeg;base64,") for image in images)
    drawn = next(group for group in tree.iter(f"{space}g") if group.get("id") == "edges")
    assert len(list(drawn)) == len(data["edges"]["source"])
    words = [text.text for text in tree.iter(f"{space}text")]
    assert "ears" in words and all(layer["name"] in words for layer in data["layers"])
    links = [value for each in tree.iter() for name, value in each.attrib.items() if name.endswith("href")]
    assert all(value.startswith("data:") for value in links)


def test_the_png_shows_what_the_svg_shows_at_twice_the_size(open_page, html):
    page = open_page(html)
    tree = ElementTree.parse(exported(page, "SVG")).getroot()
    page.keyboard.press("Escape")
    image = Image.open(exported(page, "PNG")).convert("RGB")
    assert image.size == (2 * int(tree.get("width")), 2 * int(tree.get("height")))
    tile = next(tree.iter("{http://www.w3.org/2000/svg}image"))
    x, y, side = (2 * float(tile.get(name)) for name in ("x", "y", "width"))
    inside = image.crop((int(x) + 2, int(y) + 2, int(x + side) - 2, int(y + side) - 2)).resize(
        (4, 4), Image.Resampling.BOX
    )
    held_in_svg = Image.open(io.BytesIO(base64.b64decode(tile.get("href").split(",")[1])))
    held_in_svg = held_in_svg.resize((4, 4), Image.Resampling.BOX)
    assert np.asarray(inside, float) == pytest.approx(np.asarray(held_in_svg, float), abs=16)


def test_citation_and_command_are_there_to_be_copied(open_page, html, data):
    page = open_page(html)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Export", exact=True).click()
    dialog = page.get_by_role("dialog")
    assert "@article{rajaram2024automatic" in dialog.inner_text()
    dialog.get_by_role("button", name="Copy command").click()
    assert page.evaluate("navigator.clipboard.readText()") == data["command"]
    dialog.get_by_role("button", name="Copy link to this state").click()
    assert page.evaluate("navigator.clipboard.readText()") == page.url


# ------------------------------------------------------------------ with a server, here a made-up one


class Server:
    """Answers as the contract says, and keeps what the page asked."""

    def __init__(self, data: dict[str, Any]):
        self.data = data
        self.asked: list[tuple[str, str, Any]] = []
        self.refuse: dict[str, str] = {}

    def __call__(self, method: str, path: str, request: Any) -> tuple[int, Any]:
        name = path.split("?")[0].removeprefix("/api/")
        body = request.post_data_buffer
        sent = json.loads(body) if body and name != "probe" else body
        self.asked.append((method, path, sent))
        if method != "GET":
            assert request.headers["x-viscircuits"] == "1"
        if name in self.refuse:
            return 400, {"error": self.refuse[name]}
        return 200, getattr(self, name)(sent, request)

    def of(self, name: str) -> list[Any]:
        """What was sent to one address."""
        return [sent for _, path, sent in self.asked if path.split("?")[0] == f"/api/{name}"]

    def network(self, sent: Any, request: Any) -> Any:
        return {
            "model": "lite0",
            "layers": [{"name": layer["name"], "width": layer["width"]} for layer in self.data["layers"]],
            "ablations": ["zero", "mean"],
            "classes": True,
            "evaluated_on": {"concept": 60, "others": 120},
            "images_to_look_at": True,
            "limits": {"upload_bytes": 1000, "upload_pixels": 10**6},
        }

    def probe(self, sent: Any, request: Any) -> Any:
        name = unquote(request.headers["x-name"])
        given = answers((1, "tench", 0.4))
        picture = self.data["probes"]["sprite"]["uri"]
        glow = [0.5] * len(names_of(self.data))
        return {"id": "u1", "name": name, "kind": "yours", "answers": given, "activations": glow, "picture": picture}

    def surgery(self, sent: Any, request: Any) -> Any:
        n = len(sent["edit"]["units"]) + len(sent["edit"]["edges"])
        before = answers((504, "coffee mug", 0.81234), (968, "cup", 0.11))
        after = answers((968, "cup", 0.52), (504, "coffee mug", 0.81234 / (n + 1)))
        gone = {f"{layer}:{index}" for layer, index in sent["edit"]["units"]}
        operated = []
        for each in sent["probes"]:
            kept = self.data["probes"]["probes"][int(each.removeprefix("kept:"))] if each != "u1" else None
            clean = kept["activations"] if kept else [0.5] * len(names_of(self.data))
            now = [0.0 if name in gone else x for name, x in zip(names_of(self.data), clean, strict=True)]
            operated.append({"id": each, "before": before, "after": after, "activations": now})
        return {"probes": operated, "milliseconds": {"forward": 41.2, "all": 66.6}}

    def accuracy(self, sent: Any, request: Any) -> Any:
        last = {
            "measure": "accuracy",
            "before": {"concept": about(0.92), "others": about(0.89)},
            "after": {"concept": about(0.08), "others": about(0.82)},
            "selectivity": about(0.77),
        }
        return "".join(json.dumps(line) + "\n" for line in ({"done": 16, "of": 180}, {"done": 180, "of": 180}, last))

    def edge(self, sent: Any, request: Any) -> Any:
        values = [0.0] * 9
        values[3] = -2.5  # left of the middle
        return {
            "kernel": {"side": 3, "values": values},
            "contributions": [{"name": "a.jpg", "value": 1.5}, {"name": "b.jpg", "value": -2.0}],
        }

    def heat(self, sent: Any, request: Any) -> Any:
        return base64.b64decode(self.data["probes"]["sprite"]["uri"].split(",")[1])

    def notes(self, sent: Any, request: Any) -> Any:
        note = {part: sent[part] for part in ("name", "text", "by")}
        return {**self.data["notes"], sent["key"]: {**note, "when": "2026-02-03T00:00:00+00:00"}}

    def export(self, sent: Any, request: Any) -> Any:
        return b"weights" if sent["kind"] == "weights" else f"# {sent['kind']} by the server\n"


@pytest.fixture
def server(data) -> Server:
    return Server(data)


@pytest.fixture(scope="module")
def served_html(circuit) -> str:
    return holding(served(circuit, fake_evaluation(), fake_pictures(circuit)))


def test_surgery_shows_at_once_what_the_network_answers(open_served, served_html, server, data):
    page = open_served(served_html, server)
    layer = data["layers"][0]
    click_unit(page, names_of(data)[0]).get_by_role("button", name="Select for surgery").click()
    panel = tab(page, "Surgery")
    row = panel.locator("[data-probe='kept:0'] [data-answer='504']")
    row.wait_for()
    assert server.of("surgery")[-1] == {
        "edit": {"units": [[layer["name"], layer["units"][0]]], "edges": [], "ablation": "mean"},
        "probes": ["kept:0"],
    }
    assert row.locator(".was").inner_text() == "81.23\u202f%"
    assert row.locator(".is").inner_text() == "40.62\u202f%"
    assert row.locator("em").inner_text() == "−40.62"
    panel.get_by_label("Replaced by").select_option("zero")
    page.wait_for_function("document.querySelector('#surgery select').value === 'zero'")
    page.wait_for_timeout(50)
    assert server.of("surgery")[-1]["edit"]["ablation"] == "zero"


def test_under_an_edit_units_glow_by_the_edited_network_and_what_changed_is_marked(
    open_served, served_html, server, data
):
    page = open_served(served_html, server)
    probe, most = data["probes"]["probes"][0], data["probes"]["most"]
    cut = max(range(len(most)), key=lambda i: probe["activations"][i] / most[i])
    share = probe["activations"][cut] / most[cut]
    tab(page, "Probe").get_by_role("button", name=re.compile("^clean mug")).click()
    clean = glow(page)
    assert clean[cut] == pytest.approx(share, abs=1e-3) and share > 0.1
    click_unit(page, names_of(data)[cut]).get_by_role("button", name="Select for surgery").click()
    panel = tab(page, "Surgery")
    panel.locator("[data-probe]").wait_for()
    assert glow(page) == [0 if i == cut else was for i, was in enumerate(clean)]
    marked = page.locator("#nodes .unit.fell")
    assert marked.evaluate_all("all => all.map((each) => each.unit.id)") == [cut]
    assert marked.evaluate("each => getComputedStyle(each, '::after').clipPath").startswith("polygon")
    assert page.locator("#nodes .unit.rose").count() == 0
    said = f"{round(100 * share)}\u202f% → 0\u202f%"
    assert panel.locator(".changed li").all_inner_texts()[0].split("\n")[-1] == said
    assert "under the edit" in page.locator("#legend").inner_text()
    page.locator("#nodes .unit").nth(0).evaluate("() => document.activeElement.blur()")
    panel.get_by_role("button", name="Undo").click()
    assert glow(page) == clean and page.locator("#nodes .unit.fell").count() == 0
    assert "under the edit" not in page.locator("#legend").inner_text()


def test_two_probes_are_operated_on_together_and_edges_are_named_by_their_ends(open_served, served_html, server, data):
    page = open_served(served_html, server)
    panel = tab(page, "Probe")
    panel.get_by_role("button", name=re.compile("^street")).click()
    panel.get_by_role("button", name="Set clean mug against street").click()
    open_first_edge(page, data).get_by_role("button", name="Select for surgery").click()
    panel = tab(page, "Surgery")
    panel.locator("[data-probe]").nth(1).wait_for()
    asked = server.of("surgery")[-1]
    ends = [names_of(data)[data["edges"][end][0]].rpartition(":") for end in ("source", "target")]
    assert asked["probes"] == ["kept:2", "kept:0"]
    assert asked["edit"]["edges"] == [[[layer, int(index)] for layer, _, index in ends]]


def test_what_was_answered_to_another_edit_is_taken_away_at_once(open_served, served_html, server, data):
    page = open_served(served_html, server)
    click_unit(page, names_of(data)[0]).get_by_role("button", name="Select for surgery").click()
    panel = tab(page, "Surgery")
    panel.locator("[data-probe]").wait_for()
    server.refuse["surgery"] = "busy"
    click_unit(page, names_of(data)[1]).get_by_role("button", name="Select for surgery").click()
    panel = tab(page, "Surgery")
    panel.get_by_text("busy").wait_for()
    assert panel.locator("[data-probe]").count() == 0
    page.complaints.clear()  # the browser's own of a refusal


def test_a_refusal_is_told_and_leaves_what_was_shown(open_served, served_html, server, data, page):
    open_served(served_html, server)
    server.refuse["surgery"] = "mean ablation needs a reference; choose zero"
    click_unit(page, names_of(data)[0]).get_by_role("button", name="Select for surgery").click()
    panel = tab(page, "Surgery")
    panel.get_by_text("mean ablation needs a reference; choose zero").wait_for()
    assert page.locator("#status").inner_text() == "mean ablation needs a reference; choose zero"
    server.refuse.clear()
    panel.get_by_label("Replaced by").select_option("zero")
    panel.locator("[data-probe]").wait_for()
    assert panel.locator(".fault").count() == 0
    page.complaints.clear()  # the browser logs each 400


def test_accuracy_is_measured_on_demand_and_forgotten_when_the_edit_changes(open_served, served_html, server, data):
    page = open_served(served_html, server)
    click_unit(page, names_of(data)[0]).get_by_role("button", name="Select for surgery").click()
    panel = tab(page, "Surgery")
    panel.get_by_role("button", name="Measure accuracy on 60 images of the concept and 120 others").click()
    panel.get_by_role("cell", name="8.0").wait_for()
    assert (
        "Selectivity 77.0 points [72.0, 82.0]" in panel.inner_text()
        and "[3.0\u202f%, 13.0\u202f%]" in panel.inner_text()
    )
    assert server.of("accuracy") == [{"edit": server.of("surgery")[-1]["edit"]}]
    panel.get_by_label("Replaced by").select_option("zero")
    panel.get_by_role("button", name="Measure accuracy").wait_for()
    assert "Selectivity" not in panel.inner_text()


def test_measuring_can_be_called_off(open_served, served_html, server, data, page):
    waiting: list[Any] = []
    open_served(served_html, server)
    page.route("**/api/accuracy", lambda route: waiting.append(route))  # never answered
    click_unit(page, names_of(data)[0]).get_by_role("button", name="Select for surgery").click()
    panel = tab(page, "Surgery")
    panel.get_by_role("button", name="Measure accuracy").click()
    panel.get_by_role("progressbar", name="Images measured").wait_for()
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/api/accuracy")):
        panel.get_by_role("button", name="Cancel").click()
    panel.get_by_role("button", name="Measure accuracy").wait_for()
    assert len(waiting) == 1 and panel.locator(".fault").count() == 0


def test_an_answer_that_is_no_longer_wanted_is_called_off(open_served, served_html, server, data, page):
    waiting: list[Any] = []
    open_served(served_html, server)
    first, second = (names_of(data)[i] for i in (0, 7))
    page.route("**/api/surgery", lambda route: waiting.append(route), times=1)
    click_unit(page, first).get_by_role("button", name="Select for surgery").click()
    panel = tab(page, "Surgery")
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/api/surgery")):
        click_unit(page, second).get_by_role("button", name="Select for surgery").click()
    tab(page, "Surgery")
    panel.locator("[data-answer='504'] .is").wait_for()
    assert panel.locator("[data-answer='504'] .is").inner_text() == f"{81.234 / 3:.2f}\u202f%"  # both units, not one
    assert len(waiting) == 1 and panel.locator(".fault").count() == 0


def test_the_basket_is_exported_by_the_server(open_served, served_html, server, data):
    page = open_served(served_html, server)
    click_unit(page, names_of(data)[0]).get_by_role("button", name="Select for surgery").click()
    panel = tab(page, "Surgery")
    panel.get_by_role("button", name="Python").click()
    panel.get_by_text("# python by the server").wait_for()
    with page.expect_download() as download:
        panel.get_by_role("button", name="Weights").click()
    assert download.value.path().read_bytes() == b"weights"
    assert download.value.suggested_filename == "dog-edited.safetensors"


DROP = """([name, kind, bytes]) => {
  const files = new DataTransfer();
  files.items.add(new File([new Uint8Array(bytes)], name, { type: kind }));
  const send = (what) => document.body.dispatchEvent(
    new DragEvent(what, { dataTransfer: files, bubbles: true, cancelable: true }));
  send("dragenter"); send("dragover"); send("drop");
}"""


PASTE = """([name, type, bytes]) => {
  const clipboardData = new DataTransfer();
  clipboardData.items.add(new File([new Uint8Array(bytes)], name, { type }));
  document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
}"""


@pytest.mark.parametrize("way", [DROP, PASTE], ids=["dropped", "pasted"])
def test_an_image_dropped_or_pasted_anywhere_becomes_the_probe(open_served, served_html, server, data, way):
    page = open_served(served_html, server)
    page.evaluate(way, ["мой mug.png", "image/png", [137, 80, 78, 71]])
    panel = page.locator("#probe")
    panel.get_by_role("heading", name="мой mug.png").wait_for()
    assert server.of("probe") == [b"\x89PNG"]
    assert first_answer(panel) == ["tench", "40.00 %"]
    assert glow(page) == pytest.approx([0.5] * len(names_of(data)))
    click_unit(page, names_of(data)[0]).get_by_role("button", name="Select for surgery").click()
    tab(page, "Surgery").locator("[data-probe='u1']").wait_for()


@pytest.mark.parametrize(
    ("name", "kind", "size", "told"),
    [("notes.txt", "text/plain", 4, "is no image"), ("big.png", "image/png", 5000, "takes up to")],
)
def test_what_cannot_be_a_probe_is_refused_before_it_is_sent(open_served, served_html, server, name, kind, size, told):
    page = open_served(served_html, server)
    panel = tab(page, "Probe")
    page.evaluate(DROP, [name, kind, [0] * size])
    assert told in panel.locator(".fault").inner_text()
    assert server.of("probe") == []


def test_an_image_dropped_on_a_page_without_a_server_is_told_where_to_go(open_page, html):
    page = open_page(html)
    page.evaluate(DROP, ["mug.png", "image/png", [137]])
    assert "viscircuits view DIR --serve" in page.locator("#probe .fault").inner_text()


def test_an_edge_that_was_not_looked_at_is_asked_for(open_served, circuit, server):
    text = served(circuit, None, fake_pictures(circuit))
    data = held(text)
    page = open_served(text, server)
    panel = open_first_edge(page, data)
    panel.get_by_text("1.0 positions to the left of the target").wait_for()
    ends = [names_of(data)[data["edges"][end][0]].rpartition(":") for end in ("source", "target")]
    assert server.of("edge") == [
        {end: [layer, int(index)] for end, (layer, _, index) in zip(("source", "target"), ends, strict=True)}
        | {"probes": []}  # the server has images of its own to look at
    ]
    assert panel.locator(".bars .n").all_inner_texts() == ["+1.5", "−2"]


def test_the_heat_map_of_a_unit_is_asked_for_when_wanted(open_served, served_html, server, data):
    page = open_served(served_html, server)
    panel = click_unit(page, names_of(data)[0])
    assert not [path for _, path, _ in server.asked if path.startswith("/api/heat")]
    panel.get_by_role("button", name="Heat map").click()
    picture = panel.get_by_role("img", name=f"Heat map of {names_of(data)[0]} on clean mug")
    picture.wait_for()
    assert picture.evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 3 * 32
    layer, _, index = names_of(data)[0].rpartition(":")
    asked = next(path for _, path, _ in server.asked if path.startswith("/api/heat"))
    assert parse_qs(asked.split("?")[1]) == {"layer": [layer], "index": [index], "probe": ["kept:0"]}


def test_a_note_goes_to_the_server(open_served, served_html, server, data):
    page = open_served(served_html, server)
    name = names_of(data)[2]
    panel = click_unit(page, name)
    write_note(panel, f"Note on {name}", Name="paws", Remark="four", By="Ada")
    panel.get_by_role("heading", name="paws").wait_for()
    assert server.asked[-1] == ("PUT", "/api/notes", {"key": name, "name": "paws", "text": "four", "by": "Ada"})


# ------------------------------------------------------------------ for everyone


PANELS = ["Unit", "Edge", "Probe", "Compare", "Surgery", "Notes"]


def fill_everything(page: Any, data: dict[str, Any]) -> None:
    open_first_edge(page, data).get_by_role("button", name="Select for surgery").click()
    panel = tab(page, "Probe")
    panel.get_by_role("button", name=re.compile("^clean mug")).click()
    panel.get_by_role("button", name="Set mug with a note against clean mug").click()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_no_serious_fault_in_any_panel(open_page, html, data, dark):
    page = open_page(html, dark=dark)
    fill_everything(page, data)
    for name in PANELS:
        tab(page, name)
        assert axe(page) == [], name
    page.get_by_role("button", name="Export", exact=True).click()
    assert axe(page) == []


def test_no_panel_is_wider_than_a_small_screen(open_page, html, data):
    page = open_page(html)
    fill_everything(page, data)
    page.set_viewport_size({"width": 380, "height": 800})
    for name in PANELS:
        panel = tab(page, name)
        assert panel.evaluate("(panel) => panel.scrollWidth <= panel.clientWidth"), name
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
