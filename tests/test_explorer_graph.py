"""The graph of the page, tried as a person tries it, in Chromium; and the contract between Python and the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
import pytest

from browser import axe
from test_page import about, fake_circuit, fake_evaluation, fake_pictures, held, shown
from viscircuits import contract
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.connections import Connections
from viscircuits.page import page as page_of
from viscircuits.page import page_data
from viscircuits.probes import Probes
from viscircuits.selection import shrink
from viscircuits.visualisations import Visualisation

pytestmark = pytest.mark.browser


# ------------------------------------------------------------------ circuits to look at


def small() -> Circuit:
    """Three layers of which every share can be checked by hand.

    c:0 owes half to b:0, which excites it, and half to b:1, which inhibits it; b:0 owes 3/4 to a:0 and 1/4 to a:1, and
    b:1 all to a:0. A fifth of what leaves a:1 goes to b:0.
    """
    rows = [("a", 0, "b", 0, 3, 1), ("a", 1, "b", 0, 1, 1), ("a", 0, "b", 1, 4, 1), ("a", 1, "b", 2, 4, 1)]
    rows += [("b", 0, "c", 0, 2, 1), ("b", 1, "c", 0, 2, -1)]
    edges = tuple(
        Edge(Unit(la, i), Unit(lb, j), float(score), float(score * sign)) for la, i, lb, j, score, sign in rows
    )
    units = {"a": (0, 1), "b": (0, 1, 2), "c": (0,)}
    scores = {"a": (1.0, 0.5), "b": (3.0, 2.0, 0.3), "c": (1.0,)}
    return Circuit(units, {"a": 4, "b": 4, "c": 4}, scores, edges)


def branched() -> Circuit:
    """A stem, two branches beside each other, what joins them, and one edge that skips the branches."""
    ends = [("stem", "left"), ("stem", "right"), ("left", "join"), ("right", "join"), ("stem", "join")]
    edges = tuple(Edge(Unit(a, i), Unit(b, i), 1.0 + i, 1.0) for a, b in ends for i in range(2))
    units = dict.fromkeys(("stem", "left", "right", "join"), (0, 1))
    return Circuit(units, dict.fromkeys(units, 4), dict.fromkeys(units, (1.0, 2.0)), edges)


def measured_at(*fractions: float) -> dict[str, Any]:
    """An evaluation of parts with a faithfulness of 0.8 · √size and controls at a selectivity of 2 and 5 points."""
    evaluation = fake_evaluation()
    x = [0.0, *fractions]

    def series(name: str, selectivity: float) -> dict[str, Any]:
        flat = [about(0.9)] * len(x)
        return {"name": name, "concept": flat, "others": flat, "selectivity": [about(selectivity * f) for f in x]}

    own = {**series("circuit", 0.6), "faithfulness": [about(0.8 * f**0.5) for f in x]}
    controls = [series("random", 0.02), series("activation", 0.05)]
    evaluation["unit_curve"] = {"x": x, "n_units": [round(24 * f) for f in x], "series": [own, *controls]}
    return evaluation


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return fake_circuit(4, 6, 80)


SHOWS = {"beagle.jpg": "Hound", "whippet.jpg": "Hound"}


@pytest.fixture(scope="module")
def html(circuit) -> str:
    notes = {str(next(iter(circuit))): {"name": "ears", "text": "pointed ones", "by": "", "when": ""}}
    pictures = {
        each: [replace(shot, shows=SHOWS.get(shot.name, "")) for shot in shots]
        for each, shots in fake_pictures(circuit).items()
    }
    return page_of(circuit, measured_at(0.25, 0.5, 0.75, 1.0), pictures, title="dog", command="make", notes=notes)


# ------------------------------------------------------------------ what a person does and sees


def unit(page: Any, name: str | Unit) -> Any:
    layer, _, index = str(name).rpartition(":")
    return page.locator("#nodes").get_by_role("button", name=re.compile(rf"\b{index} of {re.escape(layer)}\b"))


def visible_units(page: Any) -> set[str]:
    labels = page.locator("#nodes .unit:visible:not(.super)").evaluate_all("all => all.map((each) => each.ariaLabel)")
    return {
        f"{layer}:{index}" for index, layer in (re.search(r"nit (\d+) of ([^,;]+)", text).groups() for text in labels)
    }


def lit(page: Any) -> dict[str, float]:
    """Lit units, with the share that is written at them; 0 for none."""
    return page.evaluate(
        """async () => {
          const { litNow } = await import("viscircuits/graph.js"), { units } = await import("viscircuits/store.js");
          const { units: ends, shares } = litNow();
          return Object.fromEntries(ends.map((id) => [units[id].name, shares[id] ?? 0]));
        }"""
    )


def drawn(page: Any) -> dict[str, Any]:
    return page.evaluate("import('viscircuits/graph.js').then(({ drawing }) => drawing())")


def card(page: Any) -> str:
    page.locator("#card").wait_for()
    return page.locator("#card").inner_text().replace("\u202f", " ").replace("−", "-")


def point_at(page: Any, name: str | Unit) -> None:
    unit(page, name).hover()
    page.locator("#card").wait_for()


def covered_at(page: Any, name: str) -> float:
    """How much of a veil lies over the middle of a unit, in [0, 1]."""
    box = unit(page, name).bounding_box()
    return page.evaluate(
        """([x, y]) => {
          const canvas = document.getElementById("lit"), box = canvas.getBoundingClientRect();
          const dense = canvas.width / box.width, at = [(x - box.left) * dense, (y - box.top) * dense];
          return canvas.getContext("2d").getImageData(...at.map(Math.round), 1, 1).data[3] / 255;
        }""",
        [box["x"] + box["width"] / 2, box["y"] + box["width"] / 2],
    )


# ------------------------------------------------------------------ paths


def test_pointing_lights_all_paths_with_their_signed_share(open_page):
    page = open_page(shown(small()))
    point_at(page, "c:0")
    paths = {"c:0": 0, "b:0": 0.5, "b:1": -0.5, "a:0": 0.5 * 0.75 - 0.5, "a:1": 0.5 * 0.25}
    assert lit(page) == pytest.approx(paths, abs=1e-4)  # shares have four figures
    assert "Receives from b:0 +50 %, b:1 -50 %" in card(page)
    assert covered_at(page, "a:0") == 0 and covered_at(page, "b:2") > 0.5  # what is not on a path is veiled


def test_pointing_lights_what_a_unit_gives_too(open_page):
    page = open_page(shown(small()))
    point_at(page, "a:1")
    assert lit(page) == pytest.approx({"a:1": 0, "b:0": 0.2, "b:2": 0.8, "c:0": 0.2}, abs=1e-4)
    page.mouse.move(2, 2)
    page.wait_for_timeout(150)
    assert lit(page) == {} and covered_at(page, "b:2") == 0


def test_the_card_says_how_much_of_the_focus_passes_through_what_is_pointed_at(open_page):
    page = open_page(shown(small()))
    unit(page, "c:0").click()
    point_at(page, "b:0")
    assert "+50 % of what c:0 receives passes here." in card(page)
    unit(page, "b:2").hover()
    page.wait_for_timeout(50)
    assert "Nothing that c:0 receives or gives passes here." in card(page)


def test_shares_of_what_is_listed_and_what_is_lit_are_the_same(open_page, html, circuit):
    page = open_page(html)
    target = circuit.edges[0].target
    unit(page, target).click()
    page.mouse.move(2, 2)
    page.wait_for_timeout(120)
    shares = lit(page)
    rows = page.locator("#unit section", has_text="Strongest incoming").locator(".row")
    listed = dict(re.search(r"(\S+:\d+)\D*?(?:ex|in)\S+\s+([+−]\d+)", text).groups() for text in rows.all_inner_texts())
    assert len(listed) == sum(edge.target == target for edge in circuit.edges)
    for name, percent in listed.items():
        assert 100 * shares[name] == pytest.approx(float(percent.replace("−", "-")), abs=0.51)


def test_scores_of_edges_from_several_layers_into_one_unit_are_set_against_one_another(open_page):
    """Each of join:0's edges is a small or the only part of its own pair of layers, which says nothing of join:0."""
    rows = [("left", 0, "join", 0, 3), ("left", 0, "join", 1, 27), ("right", 0, "join", 0, 1)]
    edges = tuple(Edge(Unit(a, i), Unit(b, j), float(score), float(score)) for a, i, b, j, score in rows)
    units = {"left": (0,), "right": (0,), "join": (0, 1)}
    scores = {"left": (1.0,), "right": (1.0,), "join": (1.0, 2.0)}
    page = open_page(shown(Circuit(units, dict.fromkeys(units, 4), scores, edges)))
    point_at(page, "join:0")
    assert lit(page) == pytest.approx({"join:0": 0, "left:0": 0.75, "right:0": 0.25}, abs=1e-4)
    assert "Receives from left:0 +75 %, right:0 +25 %" in card(page)
    unit(page, "join:0").click()
    listed = page.locator("#unit section", has_text="Strongest incoming").locator(".row").all_inner_texts()
    assert [re.search(r"\+(\d+)", text)[1] for text in listed] == ["75", "25"]


def test_a_smaller_circuit_holds_the_units_that_were_measured_however_close_the_scores(open_page):
    whole = Circuit({"a": (0, 1, 2, 3)}, {"a": 4}, {"a": (1.00001, 1.00004, 1.00002, 1.00003)})
    page = open_page(shown(whole))
    page.evaluate("import('viscircuits/store.js').then(({ set }) => set({ fraction: 0.5 }))")
    assert visible_units(page) == {str(each) for each in shrink(whole, 0.5)} == {"a:1", "a:3"}


# ------------------------------------------------------------------ focus, pins, selection


def test_a_click_focuses_and_back_goes_to_the_unit_before(open_page, html, circuit):
    page = open_page(html)
    first, second = list(circuit)[1], list(circuit)[8]
    unit(page, first).click()
    unit(page, second).click()
    assert page.locator("#unit h2").inner_text() == str(second)
    page.go_back()
    page.locator("#unit h2", has_text=str(first)).wait_for()
    assert unit(page, first).get_attribute("aria-current") == "true"


def addressed(page, text):
    """The address says so, within the quarter of a second in which changes are gathered."""
    page.wait_for_function("(text) => decodeURIComponent(location.href).includes(text)", arg=text, timeout=3000)


@pytest.mark.parametrize("by", ["click", "key"])
def test_a_pinned_unit_stays_lit(open_page, by):
    page = open_page(shown(small()))
    if by == "click":
        unit(page, "a:1").click(modifiers=["Control"])
    else:
        unit(page, "a:1").hover()
        page.keyboard.press("p")
    page.mouse.move(2, 2)
    page.wait_for_timeout(150)
    assert set(lit(page)) == {"a:1", "b:0", "b:2"}  # it, and what it is connected to
    addressed(page, "pin=a:1")
    assert page.locator("#nodes [aria-current]").count() == 0
    page.keyboard.press("Escape")
    assert lit(page) == {}


def test_a_shift_click_selects_for_surgery(open_page, html, circuit):
    page = open_page(html)
    some = list(circuit)[:2]
    for each in some:
        unit(page, each).click(modifiers=["Shift"])
    page.get_by_role("tab", name="Surgery").click()
    assert page.locator("#surgery .chip .what").all_inner_texts() == ["ears", str(some[1])]
    unit(page, some[0]).hover()
    page.keyboard.press("s")
    assert page.locator("#surgery .chip .what").all_inner_texts() == [str(some[1])]


def test_an_edge_is_opened_by_clicking_its_line(open_page):
    page = open_page(shown(small()))
    line = next(edge for edge in drawn(page)["edges"] if edge["stroke"] != drawn(page)["edges"][0]["stroke"])
    x0, y0, x1, y1, x2, y2, x3, y3 = (float(n) for n in re.findall(r"-?[\d.]+", line["d"])[:8])
    stage = page.locator("#stage").bounding_box()
    at = (stage["x"] + (x0 + 3 * x1 + 3 * x2 + x3) / 8, stage["y"] + (y0 + 3 * y1 + 3 * y2 + y3) / 8)
    page.mouse.move(*at)
    page.wait_for_timeout(80)
    assert card(page).startswith("b:1 → c:0\n") and "Inhibits" in card(page)
    page.mouse.click(*at)
    assert page.locator("#edge h2").inner_text() == "b:1 → c:0"
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.locator("#edge h2").inner_text() == "b:1 → c:0"


# ------------------------------------------------------------------ finding


def test_units_are_found_by_index_layer_name_remark_image_and_its_class(open_page, html, circuit):
    page = open_page(html)
    box, results = page.get_by_role("combobox", name="Find units"), page.get_by_role("listbox", name="Units found")
    layer, data = circuit.layers[2], held(html)
    names = [f"{each['name']}:{index}" for each in data["layers"] for index in each["units"]]

    def found(query: str) -> list[str]:
        box.fill(query)
        return results.get_by_role("option").locator("b").all_inner_texts()

    assert found(f"{layer}:{circuit.units[layer][3]}") == [f"{layer}:{circuit.units[layer][3]}"]
    assert sorted(found(layer)) == sorted(name for name in names if name.startswith(f"{layer}:"))
    assert found("EARS") == found("pointed") == ["ears"]
    image = data["names"].index("pug.jpg")
    with_pug = {name for name, shots in zip(names, data["pictures"], strict=True) if image in {s[1] for s in shots}}
    listed = set(found("pug"))
    assert {name if name != "ears" else names[0] for name in listed} == with_pug
    hounds = {data["names"].index(name) for name in SHOWS}
    with_hound = {name for name, shots in zip(names, data["pictures"], strict=True) if hounds & {s[1] for s in shots}}
    assert {name if name != "ears" else names[0] for name in found("hound")} == with_hound
    assert results.get_by_text("shows: Hound").count() == len(with_hound) < len(names)
    assert found("no such thing") == [] and "No unit found" in results.inner_text()


def test_a_result_is_chosen_with_the_keyboard_alone(open_page, html, circuit):
    page = open_page(html)
    page.keyboard.press("/")
    layer = circuit.layers[1]
    page.keyboard.type(layer)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    second = page.get_by_role("option", selected=True).locator("b").inner_text()
    assert set(lit(page)) == {str(each) for each in circuit if each.layer == layer}  # those found stand out
    page.keyboard.press("Enter")
    assert page.locator("#unit h2").inner_text() == second
    assert not page.locator("#results").is_visible()


def test_a_unit_that_a_filter_hides_is_brought_back_by_choosing_it(open_page, html, circuit):
    page = open_page(html, "#size=0.25&collapsed=" + circuit.layers[0])
    hidden = next(each for each in circuit if each.layer == circuit.layers[0] and each not in shrink(circuit, 0.25))
    page.get_by_role("combobox").fill(str(hidden))
    page.keyboard.press("Enter")
    assert unit(page, hidden).is_visible()
    assert unit(page, hidden).get_attribute("aria-current") == "true"


# ------------------------------------------------------------------ filters


def test_the_score_filter_leaves_those_with_enough_of_the_largest_score(open_page):
    page = open_page(shown(small()))
    page.locator("#filters summary").click()
    page.get_by_label("Score at least").fill("60")
    assert visible_units(page) == {"a:0", "b:0", "b:1", "c:0"}
    assert page.locator("#filters summary").inner_text() == "View · 1"
    assert page.locator("#shown").inner_text() == "4 of 6"  # edges between them
    page.keyboard.press("Escape")
    assert not page.get_by_label("Score at least").is_visible()


def test_a_layer_collapses_into_one_node_and_expands_again(open_page):
    page = open_page(shown(small()))
    page.get_by_role("button", name="b 3 of 4").click()
    assert visible_units(page) == {"a:0", "a:1", "c:0"}
    together = page.locator("#nodes .super:visible")
    assert together.locator("small").inner_text() == "3 units"
    lines = drawn(page)["edges"]
    assert len(lines) == 3  # a:0 and a:1 to all of b, all of b to c:0
    assert page.locator("#shown").inner_text().startswith("6 of 6")
    unit(page, "c:0").hover()
    page.wait_for_timeout(50)
    assert covered_at(page, "a:0") == 0
    together.click()
    assert visible_units(page) == {str(each) for each in small()}


def test_a_collapsed_layer_is_opened_from_the_filter(open_page, html, circuit):
    page = open_page(html)
    unit(page, next(iter(circuit))).hover()
    page.keyboard.press("c")
    assert page.locator("#nodes .super:visible").count() == 1
    page.locator("#filters summary").click()
    box = page.get_by_role("checkbox", name=circuit.layers[0])
    assert not box.is_checked()
    box.check()
    assert page.locator("#nodes .super:visible").count() == 0


def test_the_edge_slider_shows_more_or_fewer_and_says_how_many(open_page, html, circuit):
    page = open_page(html)
    slider = page.get_by_role("slider", name="Edges")
    slider.fill("1000")
    assert len(drawn(page)["edges"]) == len(circuit.edges)
    assert "100\u202f% of attribution" in page.locator("#shown").inner_text()
    slider.fill("0")
    assert drawn(page)["edges"] == []


# ------------------------------------------------------------------ size


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.7, 1.0])
def test_the_graph_shows_the_circuit_of_the_chosen_size(open_page, html, circuit, fraction):
    page = open_page(html)
    page.get_by_label("Size", exact=True).fill(str(round(1000 * fraction)))
    part = shrink(circuit, fraction)
    assert visible_units(page) == {str(each) for each in part}
    assert page.locator("#kept b").first.inner_text() == f"{part.n_units} of {circuit.n_units} units"
    assert page.locator("#shown").inner_text().startswith(f"{len(part.edges)} of {len(circuit.edges)}")


def test_at_a_measured_size_the_figures_stand_beside_the_controls(open_page, html):
    page = open_page(html)
    page.get_by_label("Size", exact=True).fill("495")  # near enough to a half
    text = page.locator("#kept").inner_text()
    assert "faithfulness 0.566 [0.516, 0.616]" in text
    assert "selectivity 30 points [25, 35], controls 1 to 3" in text
    assert page.locator("#curve .here").count() == 2  # a dot on each curve


def test_between_measured_sizes_no_figure_is_made_up(open_page, html):
    page = open_page(html, "#size=0.6")
    text = page.locator("#kept").inner_text()
    assert "between measured sizes, 50\u202f% and 75\u202f%" in text and "faithfulness" not in text
    assert page.locator("#curve .here").count() == 0
    page.get_by_label("Size", exact=True).fill("100")
    assert "below the smallest measured size, 25\u202f%" in page.locator("#kept").inner_text()


def test_the_smallest_circuit_that_keeps_ninety_percent(open_page, circuit):
    page = open_page(shown(circuit, measured_at(0.25, 0.5, 0.82, 0.9, 1.0)))  # √0.82 = 0.906
    page.get_by_role("button", name="Smallest keeping 90\u202f% of its faithfulness").click()
    assert visible_units(page) == {str(each) for each in shrink(circuit, 0.82)}
    addressed(page, "size=0.82")


def test_brackets_step_through_measured_sizes(open_page, html, circuit):
    page = open_page(html)
    page.keyboard.press("[")
    page.keyboard.press("[")
    assert visible_units(page) == {str(each) for each in shrink(circuit, 0.5)}
    page.keyboard.press("]")
    assert visible_units(page) == {str(each) for each in shrink(circuit, 0.75)}


def test_without_a_measured_size_the_page_says_so(open_page, circuit):
    page = open_page(shown(circuit))
    assert "not measured at any size" in page.locator("#kept").inner_text()
    assert not page.locator("#curve").is_visible() and not page.locator("#keeping").is_visible()


def test_a_circuit_without_scores_has_no_parts(open_page, circuit):
    assert not open_page(shown(replace(circuit, scores={}))).locator("#size").is_visible()


# ------------------------------------------------------------------ layout


def places(page: Any) -> dict[str, tuple[float, float]]:
    """Where each unit stands: left and top."""
    found = {}
    for each in page.locator("#nodes .unit:visible").all():
        box = each.bounding_box()
        index, layer = re.search(r"nit (\d+) of ([^,;]+)", each.get_attribute("aria-label")).groups()
        found[f"{layer}:{index}"] = (box["x"], box["y"])
    return found


def test_branches_stand_beside_each_other_in_one_column(open_page):
    page = open_page(shown(branched()))
    left = {name.split(":")[0]: x for name, (x, _) in places(page).items()}
    assert left["stem"] < left["left"] < left["right"] < left["join"]
    band = page.locator("#bands i")
    assert band.count() == 1
    box = band.bounding_box()
    assert box["x"] < left["left"] and left["right"] < box["x"] + box["width"] < left["join"]


def test_edges_that_skip_a_column_are_arcs_that_can_be_dimmed(open_page):
    page = open_page(shown(branched()))

    def rise(d: str) -> float:
        _, y0, _, y1, _, y2, _, y3 = (float(n) for n in re.findall(r"-?[\d.]+", d)[:8])
        return min(y0, y3) - max(y1, y2)

    arcs = [edge for edge in drawn(page)["edges"] if rise(edge["d"]) > 20]
    assert len(arcs) == 2
    page.locator("#filters summary").click()
    page.get_by_label("Edges that skip layers in full").uncheck()
    dimmed = [edge for edge in drawn(page)["edges"] if rise(edge["d"]) > 20]
    assert sum(edge["opacity"] for edge in dimmed) < 0.25 * sum(edge["opacity"] for edge in arcs)
    addressed(page, "skips=dim")


def test_a_circuit_without_such_edges_offers_no_switch_for_them(open_page):
    page = open_page(shown(small()))
    page.locator("#filters summary").click()
    assert page.get_by_label("Edges that skip layers in full").count() == 0


def test_no_two_units_lie_over_each_other(open_page):
    found = list(places(open_page(shown(fake_circuit(3, 70, 100)))).values())
    assert len(found) == 210
    apart = [max(abs(x - u), abs(y - v)) for i, (x, y) in enumerate(found) for u, v in found[:i]]
    assert min(apart) >= 28


# ------------------------------------------------------------------ signs, confidence


def test_sign_is_colour_and_end_and_confidence_is_dashes(open_page):
    plain = small()
    sure = (0.95, 0.6, 0.2, 0.95, 0.95, 0.2)
    edges = tuple(replace(edge, chosen=share) for edge, share in zip(plain.edges, sure, strict=True))
    chosen = {layer: (0.3,) * len(indices) for layer, indices in plain.units.items()}
    found = {"draws": 20, "overlap": 0.5, "with_circuit": about(0.5) | {"mean": 0.5}}
    page = open_page(shown(replace(plain, edges=edges, chosen=chosen, selection={"confidence": found})))
    lines = drawn(page)["edges"]
    by_sign = {line["stroke"]: line["d"].count("L") for line in lines}
    assert sorted(by_sign.values()) == [1, 2]  # a bar has one stroke, an arrowhead two
    dashes = sorted(tuple(round(part / line["width"]) for part in line["dash"]) for line in lines)
    assert [bool(dash) for dash in dashes].count(False) == 3  # solid: those that nearly all draws choose
    assert len({len(line["dash"]) and line["dash"][0] > 4 for line in lines if line["dash"]}) == 2  # broken, dotted
    faint = [line["opacity"] / (0.12 + 0.6 * ((line["width"] - 0.5) / 4.5) ** 1.5) for line in lines]
    assert sorted(faint) == pytest.approx(sorted(0.4 + 0.6 * share for share in sure), abs=1e-6)
    assert page.locator("#nodes .unsure").count() == 6
    assert "dashed frame: a unit in fewer" in page.locator("#legend").inner_text()


# ------------------------------------------------------------------ pictures, probes


def everything(circuit: Circuit) -> dict[str, Any]:
    """All further parts of a result."""
    rng = np.random.default_rng(0)
    exemplar = next(iter(fake_pictures(circuit, 1).values()))[0].image
    pairs = tuple((edge.source, edge.target) for edge in circuit.edges[:10])
    n = len(circuit)
    return {
        "visualisations": [Visualisation(each, "channel", exemplar.rotate(90), 1.0, 2.0) for each in circuit],
        "connections": Connections(
            pairs,
            rng.normal(size=(10, 3, 3)).astype(np.float32),
            ("a.jpg", "b.jpg"),
            rng.normal(size=(10, 2)).astype(np.float32),
        ),
        "probes": Probes(
            ("beagle", "street"),
            ("concept", "reference"),
            (exemplar, exemplar),
            tuple(circuit),
            np.stack([np.linspace(0, 1, n), np.linspace(1, 0, n)]).astype(np.float32),
            (({"index": 1, "label": "beagle", "probability": 0.9},), ()),
        ),
        "notes": {str(next(iter(circuit))): {"name": "ears", "text": "", "by": "Ada", "when": "2026-01-02T10:00:00"}},
        "elsewhere": {str(next(iter(circuit))): ["cats"]},
    }


@pytest.fixture(scope="module")
def whole(circuit) -> str:
    parts = everything(circuit)
    return page_of(circuit, fake_evaluation(), fake_pictures(circuit), title="dog", command="make", **parts)


def test_one_key_turns_exemplars_into_visualisations_and_back(open_page, whole, circuit):
    page = open_page(whole)
    data = held(whole)
    first = unit(page, list(circuit)[3]).locator(".pic").first

    def sheet() -> str:
        return first.evaluate("(picture) => getComputedStyle(picture).backgroundImage")

    assert data["sprite"]["uri"] in sheet()
    page.keyboard.press("v")
    assert data["visualisation_sprite"]["uri"] in sheet()
    assert page.get_by_role("group", name="Pictures on the units").get_by_role("button", pressed=True).inner_text() == (
        "Visualisations"
    )
    page.keyboard.press("v")
    assert data["sprite"]["uri"] in sheet()


def test_one_picture_or_four(open_page, html, circuit):
    page = open_page(html)
    pictures = unit(page, list(circuit)[3]).locator(".pic")
    assert pictures.count() == 4  # there is room for them
    page.keyboard.press("m")
    assert pictures.count() == 1
    page.locator("#filters summary").click()
    page.get_by_label("Four pictures on each unit").check()
    assert pictures.count() == 4


def test_units_glow_by_how_strongly_a_probe_excites_them(open_page, whole, circuit):
    page = open_page(whole)
    page.get_by_role("tab", name="Probe").click()
    page.locator("#probe").get_by_role("button", name=re.compile("^beagle")).click()
    seen = page.locator("#nodes .unit:not(.super)").evaluate_all(
        "all => all.map((each) => [each.unit.id, Number(getComputedStyle(each.querySelector('.pic')).opacity)])"
    )
    n = len(circuit)
    share = np.linspace(0, 1, n) / np.maximum(np.linspace(0, 1, n), np.linspace(1, 0, n))  # of its largest
    assert dict(seen) == pytest.approx(dict(enumerate((0.28 + 0.72 * share).tolist())), abs=2e-3)
    page.locator("#probe").get_by_role("button", name=re.compile("^Set street against")).click()
    less = page.locator("#nodes .unit.less").evaluate_all("all => all.map((each) => each.unit.id)")
    assert sorted(less) == list(range(n // 2, n))


def test_a_second_circuit_is_told_apart_by_shape_and_colour(open_page, circuit):
    text = shown(circuit)
    data = held(text)
    n_units, n_edges = len(circuit), len(data["edges"]["source"])
    member = [(1, 2, 3)[i % 3] for i in range(n_units)]
    data["comparison"] = {"title": "cats", "member": member, "edge_member": [3] * n_edges, "overlap": []}
    page = open_page(with_data(text, data))
    looks = page.locator("#nodes .unit:not(.super)").evaluate_all(
        """all => all.map((each) => { const mark = getComputedStyle(each, "::before");
             return [each.unit.id, `${mark.backgroundColor} ${mark.borderRadius} ${mark.transform}`]; })"""
    )
    by_member = {which: {look for id_, look in looks if member[id_] == which} for which in (1, 2, 3)}
    assert all(len(each) == 1 for each in by_member.values())
    assert len(set.union(*by_member.values())) == 3
    assert not page.locator("#size").is_visible()  # no size of a union was measured


def with_data(text: str, data: dict[str, Any]) -> str:
    written = json.dumps(data).replace("<", "\\u003c")
    return re.sub(
        r'(<script type="application/json" id="data">).*?(</script>)',
        lambda found: found[1] + written + found[2],
        text,
        flags=re.DOTALL,
    )


# ------------------------------------------------------------------ evaluation, address, view


def test_the_ablation_of_the_evaluation_can_be_chosen(open_page, circuit):
    evaluation = fake_evaluation()
    zero = {key: evaluation[key] for key in ("baseline", "measure", "faithfulness", "completeness", "edge_curve")}
    ours = {**evaluation["circuits"][0], "concept": {"accuracy": about(0.31)}}
    zero |= {"ablation": "zero", "circuits": [ours], "unit_curve": measured_at(0.5, 1.0)["unit_curve"]}
    mean = {key: evaluation[key] for key in [*zero]}
    evaluation["full"] = {"by_ablation": {"mean": {"removed": mean}, "zero": {"removed": zero}}}
    page = open_page(shown(circuit, evaluation))
    assert "recognises 8\u202f%" in page.locator("#evaluation .verdict").inner_text()
    page.get_by_label("A removed value becomes").select_option("zero")
    assert "recognises 31\u202f%" in page.locator("#evaluation .verdict").inner_text()
    assert page.locator("#facts").inner_text().endswith("zero")
    page.keyboard.press("Tab")
    page.keyboard.press("[")  # the strip knows the sizes of that ablation: a half is the next
    assert "faithfulness 0.566" in page.locator("#kept").inner_text()
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert "recognises 31\u202f%" in page.locator("#evaluation .verdict").inner_text()


def test_the_address_brings_everything_back(open_page, whole, circuit, page):
    open_page(whole)
    some = list(circuit)
    page.get_by_label("Size", exact=True).fill("750")
    page.get_by_role("slider", name="Edges").fill("600")
    best = [each for each in some if each in shrink(circuit, 0.75)]
    unit(page, best[2]).click(modifiers=["Control"])
    unit(page, best[3]).click(modifiers=["Shift"])
    page.locator("#heads button").nth(3).click()
    page.locator("#filters summary").click()
    page.get_by_label("Score at least").fill("5")
    page.keyboard.press("Escape")
    page.get_by_role("combobox", name="Find units").fill(best[1].layer)
    page.keyboard.press("Escape")
    page.get_by_role("combobox", name="Find units").fill("")
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="Probe").click()
    page.locator("#probe").get_by_role("button", name=re.compile("^beagle")).click()
    unit(page, best[0]).click()
    page.keyboard.press("v")
    page.keyboard.press("m")
    page.wait_for_timeout(300)
    state = """async () => {
      const { state, activations } = await import("viscircuits/store.js");
      const plain = (value) => value instanceof Set ? [...value].sort()
        : value?.units ? [plain(value.units), plain(value.edges)] : value;
      const shared = Object.entries(state).filter(([key]) => !["hovered", "notes"].includes(key));
      return [shared.map(([key, value]) => [key, plain(value)]), [...activations]];
    }"""
    before, drawing = page.evaluate(state), drawn(page)["units"]
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.evaluate(state) == before
    assert [seat["id"] for seat in drawn(page)["units"]] == [seat["id"] for seat in drawing]


def test_an_address_that_names_nothing_there_opens_the_page_all_the_same(open_page, html, circuit):
    page = open_page(html, "#unit=gone:7&size=many&face=cubist&edge=a>b&panel=nowhere&edges=9999")
    assert page.locator("#nodes .unit:visible").count() == circuit.n_units
    assert page.get_by_role("tab", selected=True).inner_text() == "Evaluation"
    assert page.locator("#shown").inner_text().startswith(f"{len(circuit.edges)} of")


def test_the_graph_can_have_the_window_to_itself(open_page, html):
    page = open_page(html)
    before = page.locator("#scroll").bounding_box()["width"]
    page.keyboard.press("f")
    assert not page.locator("#side").is_visible()
    assert page.locator("#scroll").bounding_box()["width"] > before + 300
    page.get_by_role("button", name="Graph alone").click()
    assert page.locator("#side").is_visible()


def test_every_key_that_the_page_names_is_shown_on_request(open_page, html):
    page = open_page(html)
    page.keyboard.press("?")
    keys = page.get_by_role("dialog").locator("kbd").all_inner_texts()
    assert set(keys) == {"→", "←", "↑", "↓", "+", "−", "[", "]", "/", "P", "S", "C", "V", "F", "M", "Esc", "?"}
    page.keyboard.press("Escape")
    assert not page.get_by_role("dialog").is_visible()


# ------------------------------------------------------------------ for everyone


def test_the_tables_hold_what_the_graph_shows(open_page, whole, circuit):
    page = open_page(whole)
    page.get_by_text("Units and edges as tables").click()
    tables = page.locator("#tables table")
    tables.first.wait_for()
    assert tables.count() == len(circuit.layers) + 1
    for layer, table in zip(circuit.layers, tables.all(), strict=False):
        heads = table.locator("thead th").all_inner_texts()
        assert {*heads} >= {"Score", "Name", "Activation on beagle", "Images that excite it most"}
        assert {int(text) for text in table.locator("tbody th").all_inner_texts()} == set(circuit.units[layer])
    assert tables.last.locator("tbody tr").count() == len(circuit.edges)


@pytest.mark.parametrize("width", [1400, 380])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_no_serious_fault(open_page, whole, circuit, dark, width):
    page = open_page(whole, f"#unit={next(iter(circuit))}", dark=dark, width=width)
    assert axe(page) == []
    page.get_by_role("tab", name="Evaluation").click()
    page.locator("#filters summary").click()
    page.locator("#heads button").first.evaluate("(button) => button.click()")
    for summary in page.locator("footer summary").all():
        summary.click()
    page.get_by_role("combobox", name="Find units").fill("pug")
    assert axe(page) == []


def test_nothing_is_wider_than_a_small_screen(open_page, whole, circuit):
    page = open_page(whole, width=380, height=780)
    assert page.evaluate("scrollY") == 0
    for open_ in (lambda: None, lambda: page.locator("#filters summary").click()):
        open_()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("#legend").click()
    unit(page, next(iter(circuit))).click()  # its panel comes up from below
    box = page.locator("#side").bounding_box()
    assert box["y"] + box["height"] == pytest.approx(780, abs=1) and box["height"] < 0.6 * 780
    page.get_by_role("button", name="Close").click()
    assert page.locator("#nodes [aria-current]").count() == 0


# ------------------------------------------------------------------ the contract


def word(kind: Any) -> str:
    """A type of `contract` in the words of `contract.js`."""
    simple = {str: "text", int: "number", float: "number", Any: "anything", NoneType: "null"}
    if kind in simple:
        return simple[kind]
    if is_typeddict(kind):
        return kind.__name__
    origin, inside = get_origin(kind), get_args(kind)
    if origin is list:
        return f"list of {word(inside[0])}"
    if origin is dict:
        return f"map of {word(inside[1])}"
    if origin is tuple:
        return f"tuple of {', '.join(map(word, inside))}"
    return " | ".join(map(str, inside) if origin is Literal else map(word, inside))


def test_python_and_the_page_speak_of_the_same_fields(open_page, html):
    shapes = open_page(html).evaluate("import('viscircuits/contract.js').then(({ SHAPES }) => SHAPES)")
    assert {"PageData", "EdgesData", "SizeData", "ProbeData"} <= set(shapes)
    for name, fields in shapes.items():
        hints = get_type_hints(getattr(contract, name))
        assert {field: word(kind) for field, kind in hints.items()} == fields, name
    named = set(re.findall(r"\b[A-Z]\w+", json.dumps([list(fields.values()) for fields in shapes.values()])))
    assert named <= set(shapes)  # no shape is spoken of that is not there


def misfits(value: Any, kind: Any, where: str = "") -> Iterator[str]:
    """Where a value is not of a type of `contract`."""
    inside = parts(value, kind)
    if inside is None:
        yield f"{where}: {value!r:.80} is no {getattr(kind, '__name__', kind)}"
    elif get_origin(kind) in (UnionType, Union):
        found = [list(misfits(value, of, where)) for of in get_args(kind)]
        yield from min(found, key=len)
    else:
        for name, each, of in inside:
            yield from misfits(each, of, f"{where}.{name}")


def parts(value: Any, kind: Any) -> list[tuple[Any, Any, Any]] | None:
    """What is inside a value, each with its name and type; None if the value is not of the type to begin with."""
    origin, inside = get_origin(kind), get_args(kind)
    if is_typeddict(kind):
        hints = get_type_hints(kind)
        same = isinstance(value, dict) and set(value) == set(hints)
        return [(field, value[field], of) for field, of in hints.items()] if same else None
    if origin in (list, tuple, dict) and not isinstance(value, origin):
        return None
    if origin is list:
        return [(i, each, inside[0]) for i, each in enumerate(value)]
    if origin is tuple:
        return list(zip(inside, value, inside, strict=True))
    if origin is dict:
        return [(key, each, inside[1]) for key, each in value.items()]
    if origin is Literal:
        return [] if value in inside else None
    return [] if kind is Any or origin or type(value) in ((int, float) if kind is float else (kind,)) else None


def test_what_python_makes_is_of_the_types_it_says(circuit):
    parts = everything(circuit)
    data = page_data(circuit, measured_at(0.5, 1.0), fake_pictures(circuit), title="dog", command="make", **parts)
    assert list(misfits(data, contract.PageData)) == []
    assert all(data[name] for name in contract.PageData.__annotations__ if name != "comparison")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda data: data["edges"].pop("signed"), "edges.signed should be a list, but is nothing."),
        (lambda data: data["layers"][1].update(column="2"), 'layers[1].column should be number, but is "2".'),
        (lambda data: data["edges"]["share"].pop(), "edges.share should have 80 entries, but has 79."),
        (
            lambda data: data["edges"]["source"].__setitem__(0, 99),
            "edges.source names a unit that is not among",
        ),
        (lambda data: data.update(version=1), "are of different versions of viscircuits"),
        (lambda data: data.update(sizes={"mean": [{"fraction": 1}]}), 'sizes["mean"][0].n_units should be number'),
    ],
)
def test_a_page_with_damaged_data_names_the_field(page, tmp_path, html, damage, told):
    data = held(html)
    damage(data)
    (tmp_path / "index.html").write_text(with_data(html, data), encoding="utf-8")
    page.goto((tmp_path / "index.html").as_uri())
    notice = page.get_by_role("alert")
    notice.wait_for()
    assert told in notice.inner_text() and "Make the page anew" in notice.inner_text()


def test_neighbouring_columns_hold_neighbouring_layers(open_page, html, circuit):
    found = places(open_page(html))
    left = {layer: min(x for name, (x, _) in found.items() if name.startswith(f"{layer}:")) for layer in circuit.layers}
    assert all(left[a] < left[b] for a, b in pairwise(circuit.layers))
