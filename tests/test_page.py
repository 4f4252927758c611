from __future__ import annotations

import base64
import io
import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageDraw

from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.comparing import Comparison
from viscircuits.connections import Connections
from viscircuits.exemplars import Exemplar
from viscircuits.layout import columns, crossings, order_units, reveal
from viscircuits.page import MAX_EDGES, page
from viscircuits.probes import Probes
from viscircuits.visualisations import Visualisation

# ------------------------------------------------------------------ a circuit, its pictures, its figures


def fake_circuit(n_layers: int, n_units: int, n_edges: int, seed: int = 0) -> Circuit:
    rng = random.Random(seed)
    layers = [f"blocks.{i // 3 + 2}.{i % 3}.act" for i in range(n_layers)]
    units = {layer: tuple(sorted(rng.sample(range(8 * n_units), n_units))) for layer in layers}
    pairs = [(Unit(a, i), Unit(b, j)) for a, b in pairwise(layers) for i in units[a] for j in units[b]]
    edges = [
        Edge(source, target, score := rng.paretovariate(1.6) / 50, score * rng.choice([0.7, 0.5, -0.4]))
        for source, target in rng.sample(pairs, min(n_edges, len(pairs)))
    ]
    return Circuit(
        units,
        dict.fromkeys(layers, 8 * n_units),
        scores={layer: tuple(rng.paretovariate(2) / 10 for _ in indices) for layer, indices in units.items()},
        edges=tuple(sorted(edges, key=lambda edge: -edge.score)),
        selection={"objective": 12.3, "bound": 12.9, "gap": 0.047},
        provenance={
            "model": {"address": "lite0"},
            "images": {"address": "dogs/find", "n": 16},
            "reference": {"address": "others/find", "n": 40},
            "score": "cla",
            "options": {"units": n_units, "refine": "coordinate"},
        },
    )


def fake_pictures(circuit: Circuit, n: int = 4, side: int = 96, seed: int = 0) -> dict[Unit, list[Exemplar]]:
    rng = random.Random(seed)
    return {
        unit: [
            Exemplar(f"{rng.choice(BREEDS)}.jpg", 4.0 / (i + 1), (0, 0, side, side), _patch(rng, side, hue))
            for i in range(n)
        ]
        for unit in circuit
        for hue in [rng.randrange(360)]
    }


BREEDS = ("beagle", "collie", "pug", "whippet", "samoyed", "dalmatian")


def _patch(rng: random.Random, side: int, hue: int) -> Image.Image:
    image = Image.new("RGB", (side, side), f"hsl({hue}, 35%, {rng.randint(30, 60)}%)")
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, r = (rng.randrange(side) for _ in range(3))
        draw.ellipse(
            (x - r / 2, y - r / 2, x + r / 2, y + r / 2),
            f"hsl({(hue + rng.randint(-30, 30)) % 360}, 45%, {rng.randint(20, 85)}%)",
        )
    return image


def about(value: float, width: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width}


def fake_evaluation() -> dict:
    names = {"circuit": (0.08, 0.76), "random": (0.86, 0.82), "activation": (0.55, 0.4), "weight norm": (0.8, 0.78)}
    x = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]

    def series(name: str, concept: float, others: float) -> dict:
        return {
            "name": name,
            "concept": [about(0.92 + (concept - 0.92) * f**0.7) for f in x],
            "others": [about(0.89 + (others - 0.89) * f) for f in x],
            "selectivity": [about((0.92 - concept) * f**0.7 - (0.89 - others) * f, 0.06) for f in x],
        }

    return {
        "schema": "viscircuits/evaluation",
        "version": 1,
        "ablation": "mean",
        "measure": "accuracy",
        "labelled": True,
        "images": {
            "concept": {"address": "dogs/test", "n": 60, "skipped": []},
            "others": {"address": "others/test", "n": 120, "skipped": [{"name": "broken.jpg", "reason": "truncated"}]},
        },
        "baseline": {
            "concept": {"accuracy": about(0.92), "logit": about(9.1, 0.4)},
            "others": {"accuracy": about(0.89), "logit": about(8.8, 0.3)},
        },
        "circuits": [
            {
                "name": name,
                "draws": 5 if name == "random" else 1,
                "n_units": 192,
                "concept": {"accuracy": about(concept), "logit": about(3.0), "kl": about(2.1)},
                "others": {"accuracy": about(others), "logit": about(8.0), "kl": about(0.3)},
                "selectivity": about((0.92 - concept) - (0.89 - others), 0.1),
            }
            for name, (concept, others) in names.items()
        ],
        "faithfulness": about(0.41),
        "completeness": None,
        "unit_curve": {
            "x": x,
            "n_units": [0, 19, 48, 96, 144, 192],
            "series": [series(name, *names[name]) for name in ("circuit", "random")],
        },
        "edge_curve": {
            "source": "blocks.2.0.act",
            "target": "blocks.2.1.act",
            "x": x,
            "n_edges": [0, 58, 144, 288, 432, 576],
            "series": [series("by score", 0.7, 0.86), series("random order", 0.85, 0.87)],
        },
    }


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return fake_circuit(4, 6, 80)


def shown(
    circuit: Circuit, evaluation=None, pictures=None, title="dog", command="viscircuits discover lite0 dogs"
) -> str:
    return page(circuit, evaluation, pictures, title=title, command=command)


def held(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


# ------------------------------------------------------------------ what the file holds


def test_the_page_holds_the_circuit_as_it_is(circuit):
    data = held(shown(circuit))
    assert [layer["name"] for layer in data["layers"]] == list(circuit.layers)
    units = [Unit(layer["name"], index) for layer in data["layers"] for index in layer["units"]]
    ends = set(zip(data["edges"]["source"], data["edges"]["target"], strict=True))
    assert {(units[i], units[j]) for i, j in ends} == {(edge.source, edge.target) for edge in circuit.edges}
    assert data["n_edges"] == len(circuit.edges)


def with_shares(circuit: Circuit) -> Circuit:
    """The circuit as 19 of 20 bootstrap draws would have it, but for its first edge."""
    chosen = {layer: (0.95,) * len(units) for layer, units in circuit.units.items()}
    edges = tuple(replace(edge, chosen=0.25 if i == 0 else 0.9) for i, edge in enumerate(circuit.edges))
    found = {"draws": 20, "overlap": 0.81, "with_circuit": {"mean": 0.88, "low": 0.8, "high": 0.93}}
    return replace(circuit, chosen=chosen, edges=edges, selection={**circuit.selection, "confidence": found})


def test_the_page_holds_how_often_units_and_edges_are_chosen(circuit):
    data = held(shown(with_shares(circuit)))
    assert all(layer["chosen"] == [0.95] * len(layer["units"]) for layer in data["layers"])
    assert sorted(set(data["edges"]["chosen"])) == [0.25, 0.9]
    assert set(held(shown(circuit))["edges"]["chosen"]) == {None}


def test_each_layer_shows_each_of_its_units_once(circuit):
    first = 0
    for layer in held(shown(circuit))["layers"]:
        assert sorted(layer["order"]) == list(range(first, first + len(layer["units"])))
        first += len(layer["units"])


def test_evaluation_comes_through_unchanged_but_for_numbers_that_are_none(circuit):
    evaluation = fake_evaluation()
    evaluation["faithfulness"]["high"] = float("nan")
    data = held(shown(circuit, evaluation))
    assert data["evaluation"]["faithfulness"].pop("high") is None
    del evaluation["faithfulness"]["high"]
    assert data["evaluation"] == evaluation


def test_hostile_text_stays_text(circuit):
    hostile = "</script><script>alert(1)</script><!-- & @@data@@"
    text = shown(circuit, title=hostile, command=hostile)
    assert "<script>alert" not in text
    assert held(text)["title"] == held(text)["command"] == hostile
    assert len(re.findall(r"<script\b", text)) == len(re.findall(r"</script>", text)) == 4


class Addresses(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")]


def test_the_page_asks_nothing_of_a_network(circuit):
    text = shown(circuit, fake_evaluation(), fake_pictures(circuit))
    parser = Addresses()
    parser.feed(text)
    assert parser.found == []
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert "default-src 'none'" in text


def test_every_picture_is_one_tile_of_the_sprite(circuit):
    data = held(shown(circuit, pictures=fake_pictures(circuit, n=3)))
    tiles = [shot[0] for mine in data["pictures"] for shot in mine]
    assert tiles == list(range(3 * circuit.n_units))
    sprite = data["sprite"]
    sheet = Image.open(io.BytesIO(base64.b64decode(sprite["uri"].split(",")[1])))
    assert sheet.size == (sprite["columns"] * sprite["tile"], sprite["rows"] * sprite["tile"])
    assert sprite["columns"] * sprite["rows"] >= len(tiles)


def test_a_tile_shows_the_picture_of_its_unit():
    circuit = Circuit({"a": (0, 1, 2)}, {"a": 3})
    colours = {0: (250, 0, 0), 1: (0, 250, 0), 2: (0, 0, 250)}
    pictures = {
        Unit("a", i): [Exemplar("x", 1.0, (0, 0, 32, 32), Image.new("RGB", (32, 32), c))] for i, c in colours.items()
    }
    sprite = held(shown(circuit, pictures=pictures))["sprite"]
    sheet = Image.open(io.BytesIO(base64.b64decode(sprite["uri"].split(",")[1]))).convert("RGB")
    for i, colour in colours.items():
        centre = [(n + 0.5) * sprite["tile"] for n in (i % sprite["columns"], i // sprite["columns"])]
        assert sheet.getpixel((int(centre[0]), int(centre[1]))) == pytest.approx(colour, abs=24)


# ------------------------------------------------------------------ the further parts of a result


def unpacked(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def test_kernels_and_contributions_come_through_at_the_places_of_their_edges(circuit):
    rng = np.random.default_rng(0)
    pairs = tuple((edge.source, edge.target) for edge in circuit.edges[5:2:-1])  # in an order of their own
    kernels = rng.normal(size=(3, 5, 5)).astype(np.float32)
    kernels[1] = 0
    given = rng.normal(size=(3, 2)).astype(np.float32)
    made = Connections(pairs, kernels, ("a.jpg", "b.jpg"), given)
    data = held(page(circuit, None, None, title="", command="", connections=made))
    units = [str(unit) for unit in circuit]
    ends = [(units[i], units[j]) for i, j in zip(data["edges"]["source"], data["edges"]["target"], strict=True)]
    assert {ends[place] for place in data["kernels"]["edges"]} == {(str(a), str(b)) for a, b in pairs}
    steps = unpacked(data["kernels"]["values"], "i1").reshape(3, 5, 5)
    values = steps * np.array(data["kernels"]["scale"])[:, None, None] / 127
    for place, kernel in zip(data["kernels"]["edges"], values, strict=True):
        mine = kernels[pairs.index(tuple(unit_named(name) for name in ends[place]))]
        assert kernel == pytest.approx(mine, abs=float(np.abs(mine).max()) / 254 + 1e-3)
    assert data["contributions"]["images"] == ["a.jpg", "b.jpg"]
    rows = unpacked(data["contributions"]["values"], "<f4").reshape(3, 2)
    for place, row in zip(data["contributions"]["edges"], rows, strict=True):
        assert row.tolist() == given[pairs.index(tuple(unit_named(name) for name in ends[place]))].tolist()


def unit_named(name: str) -> Unit:
    layer, _, index = name.rpartition(":")
    return Unit(layer, int(index))


def test_probes_are_put_in_the_order_of_the_circuit_and_say_what_was_not_looked_at(circuit):
    units = tuple(reversed(list(circuit)))[:-1]  # without the first unit, and back to front
    activations = np.arange(2 * len(units), dtype=np.float32).reshape(2, -1) - 3
    colours = [(250, 0, 0), (0, 0, 250)]
    pictures = tuple(Image.new("RGB", (20, 20), colour) for colour in colours)
    answers = (({"index": 3, "label": "pug", "probability": 0.5},), ())
    probes = Probes(("one", "two"), ("concept", "mine"), pictures, units, activations, answers)
    data = held(page(circuit, None, None, title="", command="", probes=probes))["probes"]
    expected = [dict(zip(map(str, units), row, strict=True)) for row in activations.tolist()]
    for probe, row in zip(data["probes"], expected, strict=True):
        assert probe["activations"] == [row.get(str(unit)) for unit in circuit]
    most = np.abs(activations).max(0).tolist()
    assert data["most"] == [0.0, *reversed(most)]
    assert data["probes"][0]["answers"] == list(answers[0])
    sheet = Image.open(io.BytesIO(base64.b64decode(data["sprite"]["uri"].split(",")[1]))).convert("RGB")
    tile = data["sprite"]["tile"]
    for i, colour in enumerate(colours):
        assert sheet.getpixel((int((i + 0.5) * tile), tile // 2)) == pytest.approx(colour, abs=30)


def test_visualisations_stand_at_their_units_and_others_are_left_out(circuit):
    first, second = list(circuit)[:2]
    image = Image.new("RGB", (16, 16))
    made = [
        Visualisation(second, "channel", image, 1.0, 2.0),
        Visualisation(Unit("elsewhere", 0), "channel", image, 1.0, 2.0),
        Visualisation(second, "channel, negative", image, 1.0, 2.0),
        Visualisation(first, "channel", image, 1.0, 2.0),
    ]
    data = held(page(circuit, None, None, title="", command="", visualisations=made))
    kinds = [[kind for _, kind in mine] for mine in data["visualisations"]]
    assert kinds[:3] == [["channel"], ["channel", "channel, negative"], []]
    assert sorted(tile for mine in data["visualisations"] for tile, _ in mine) == [0, 1, 2]


def test_a_comparison_says_whose_each_unit_and_edge_is():
    first, second = fake_circuit(3, 5, 30, seed=1), fake_circuit(3, 5, 30, seed=1)
    gone = first.edges[0].source
    second = Circuit(
        {layer: tuple(i for i in indices if Unit(layer, i) != gone) for layer, indices in second.units.items()},
        second.widths,
        edges=tuple(edge for edge in second.edges if gone not in (edge.source, edge.target)),
    )
    comparison = Comparison(first, second, "other")
    data = held(page(comparison.union(), fake_evaluation(), None, title="", command="", comparison=comparison))
    units = [f"{layer['name']}:{index}" for layer in data["layers"] for index in layer["units"]]
    members = dict(zip(units, data["comparison"]["member"], strict=True))
    assert members.pop(str(gone)) == 1 and set(members.values()) == {3}
    ends = zip(data["edges"]["source"], data["edges"]["target"], strict=True)
    touching = [str(gone) in (units[i], units[j]) for i, j in ends]
    assert [member == 1 for member in data["comparison"]["edge_member"]] == touching
    assert data["sizes"] == {}  # nobody measured a part of a union


def test_sizes_are_those_of_each_ablation(circuit):
    evaluation = fake_evaluation()
    other = {**evaluation["unit_curve"], "x": [0.0, 0.5, 1.0]}
    removed = {"ablation": "zero", "unit_curve": other, "faithfulness": None}
    evaluation["full"] = {"by_ablation": {"mean": {"removed": {"ablation": "mean"}}, "zero": {"removed": removed}}}
    sizes = held(shown(circuit, evaluation))["sizes"]
    assert [size["fraction"] for size in sizes["mean"]] == [0.1, 0.25, 0.5, 0.75, 1.0]
    assert [size["fraction"] for size in sizes["zero"]] == [0.5, 1.0]
    assert sizes["mean"][-1]["faithfulness"]["value"] == 0.41 and sizes["zero"][-1]["faithfulness"] is None


# ------------------------------------------------------------------ columns, order of edges and of units


def test_branches_share_a_column_and_what_joins_them_stands_behind_the_longest():
    layers = ["stem", "left.1", "left.2", "right", "join"]
    pairs = [("stem", "left.1"), ("left.1", "left.2"), ("left.2", "join"), ("stem", "right"), ("right", "join")]
    assert columns(layers, pairs) == {"stem": 0, "left.1": 1, "left.2": 2, "right": 1, "join": 3}


def test_an_edge_that_skips_a_layer_moves_nothing():
    layers = ["a", "b", "c"]
    chain = [("a", "b"), ("b", "c")]
    assert columns(layers, [*chain, ("a", "c")]) == columns(layers, chain) == {"a": 0, "b": 1, "c": 2}


def test_layers_without_edges_stand_one_after_another_in_their_place():
    assert columns(["a", "b", "c"], []) == {"a": 0, "b": 1, "c": 2}
    assert columns(["a", "lone", "b"], [("a", "b")]) == {"a": 0, "lone": 1, "b": 2}


def test_a_layer_that_nothing_reaches_stands_just_before_what_it_reaches():
    pairs = [("a", "b"), ("b", "c"), ("late", "c")]
    assert columns(["a", "b", "late", "c"], pairs) == {"a": 0, "b": 1, "late": 1, "c": 2}


@pytest.mark.parametrize("seed", range(5))
def test_edges_lead_to_later_columns_and_no_column_is_empty(seed):
    rng = random.Random(seed)
    layers = [f"l{i}" for i in range(12)]
    pairs = [tuple(sorted(rng.sample(range(12), 2))) for _ in range(14)]
    found = columns(layers, [(layers[a], layers[b]) for a, b in pairs])
    assert all(found[layers[a]] < found[layers[b]] for a, b in pairs)
    assert set(found.values()) == set(range(max(found.values()) + 1))


def test_the_column_of_each_layer_is_in_the_page():
    assert [layer["column"] for layer in held(shown(fake_circuit(4, 6, 80)))["layers"]] == [0, 1, 2, 3]


# ------------------------------------------------------------------ order of edges and units


def test_reveal_covers_every_pair_of_layers_at_the_same_pace():
    small = [Edge(Unit("a", i), Unit("b", 0), 1e-6 * (10 - i), 1.0) for i in range(10)]
    large = [Edge(Unit("b", i), Unit("c", 0), 1e3 * (10 - i), 1.0) for i in range(10)]
    revealed = reveal(small + large)
    assert {edge.source.layer for edge, _ in revealed[:2]} == {"a", "b"}
    for n in range(2, 21, 2):
        covered = {layer: sum(share for edge, share in revealed[:n] if edge.source.layer == layer) for layer in "ab"}
        assert covered["a"] == pytest.approx(covered["b"])
    assert sum(share for _, share in revealed) == pytest.approx(2)


def test_the_page_keeps_the_strongest_edges_and_says_how_many_there_are():
    circuit = fake_circuit(2, 150, MAX_EDGES + 500)
    data = held(shown(circuit))
    assert data["n_edges"] == MAX_EDGES + 500
    weakest_kept = sorted((edge.score for edge in circuit.edges), reverse=True)[MAX_EDGES - 1]
    assert len(data["edges"]["score"]) == MAX_EDGES
    assert min(data["edges"]["score"]) == pytest.approx(weakest_kept, rel=1e-3)


def test_crossings_are_counted_pair_by_pair():
    links = [(0, 2, 1.0), (1, 3, 1.0)]
    assert crossings([[0, 1], [2, 3]], links) == 0
    assert crossings([[1, 0], [2, 3]], links) == 1
    assert crossings([[0, 1], [2, 3]], [(0, 3, 1.0), (1, 2, 1.0), (0, 2, 1.0)]) == 1


def test_ordering_untangles_a_shuffled_ladder():
    groups = [[10 * layer + i for i in range(10)] for layer in range(4)]
    rng = random.Random(1)
    shuffled = [rng.sample(group, len(group)) for group in groups]
    links = [(a, b, 1.0) for below, above in pairwise(groups) for a, b in zip(below, above, strict=True)]
    assert crossings(shuffled, links) > 0
    assert crossings(order_units(shuffled, links), links) == 0


@pytest.mark.parametrize("seed", range(5))
def test_ordering_never_adds_crossings(seed):
    rng = random.Random(seed)
    groups = [list(range(8 * layer, 8 * layer + 8)) for layer in range(3)]
    links = [(rng.choice(a), rng.choice(b), rng.random()) for a, b in pairwise(groups) for _ in range(20)]
    ordered = order_units(groups, links)
    assert crossings(ordered, links) <= crossings(groups, links)
    assert [sorted(group) for group in ordered] == groups


# ------------------------------------------------------------------ in a browser


def seen(page, panel: str = "evaluation") -> str:
    return page.locator(f"#{panel}").inner_text()


@pytest.mark.browser
def test_the_script_draws_every_unit_and_the_figures(open_page, circuit):
    page = open_page(shown(circuit, fake_evaluation(), fake_pictures(circuit)))
    assert page.locator("#nodes .unit:visible").count() == circuit.n_units
    assert "92\u202f% → 8\u202f%" in seen(page) and "not measured" in seen(page)  # completeness
    assert page.locator("#evaluation figure svg").count() == 6
    assert "dogs/find" in seen(page) and "dogs/test" in seen(page)


@pytest.mark.browser
def test_without_evaluation_or_pictures_the_page_says_so(open_page, circuit):
    page = open_page(shown(circuit), f"#{next(iter(circuit))}")
    assert "made without pictures" in seen(page, "unit")
    page.get_by_role("tab", name="Evaluation").click()
    assert "Not measured." in seen(page)


@pytest.mark.browser
@pytest.mark.parametrize(("names", "told"), [(["a.jpg", "b.jpg", "c.jpg"], True), (["d.jpg"], False)])
def test_images_that_served_twice_are_counted(open_page, circuit, names, told):
    evaluation = fake_evaluation()
    evaluation["images"]["concept"]["names"] = names
    found = {**circuit.provenance, "images": {"address": "dogs", "n": 2, "names": ["c.jpg", "a.jpg"]}}
    page = open_page(shown(replace(circuit, provenance=found), evaluation))
    assert ("2 test images also served to find" in seen(page)) == told
    assert ("also served" in seen(page)) == told


@pytest.mark.browser
def test_unit_edges_and_circuit_say_how_sure_they_are(open_page, circuit):
    page = open_page(shown(with_shares(circuit), fake_evaluation()), f"#{circuit.edges[0].source}")
    assert "It is chosen in 19 of 20 bootstrap draws." in seen(page, "unit")
    assert " · 5 of 20 draws" in seen(page, "unit") and " · 18 of 20 draws" in seen(page, "unit")
    page.get_by_role("tab", name="Evaluation").click()
    assert "Would other images give this circuit?" in seen(page) and "0.88 [0.8, 0.93]" in seen(page)
    assert "bootstrap draws" in page.locator("#legend").inner_text()


@pytest.mark.browser
def test_without_bootstrap_draws_nothing_is_said_about_them(open_page, circuit):
    page = open_page(shown(circuit, fake_evaluation()))
    assert "bootstrap" not in page.locator("body").inner_text() and "Would other images" not in seen(page)


@pytest.mark.browser
@pytest.mark.parametrize("bare", [False, True])
def test_an_evaluation_may_lack_any_entry(open_page, circuit, bare):
    whole = fake_evaluation()
    partial = {key: value for key, value in whole.items() if key not in ("baseline", "images", "edge_curve")}
    partial["circuits"] = [{"name": "circuit", "concept": {"cosine": about(0.4)}}]
    partial["measure"] = "cosine"
    page = open_page(shown(circuit, {"schema": "viscircuits/evaluation", "version": 1} if bare else partial))
    assert ("keeps a cosine similarity of 0.4" in seen(page)) != bare
    assert ("was not measured" in seen(page)) == bare


@pytest.mark.browser
def test_a_short_link_opens_the_unit_it_names(open_page, circuit):
    unit = circuit.edges[0].source
    page = open_page(shown(circuit, pictures=fake_pictures(circuit)), f"#{unit}")
    assert page.locator("#nodes [aria-current=true]").count() == 1
    assert page.locator("#unit h2").inner_text() == str(unit) and "Strongest outgoing" in seen(page, "unit")


@pytest.mark.browser
def test_arrow_keys_walk_along_the_strongest_edge_and_escape_clears(open_page, circuit):
    first = circuit.edges[0].source
    strongest = max((edge for edge in circuit.edges if edge.source == first), key=lambda edge: edge.score).target
    page = open_page(shown(circuit), f"#{first}")
    page.keyboard.press("ArrowRight")
    chosen = page.locator("#nodes [aria-current=true]")
    assert chosen.get_attribute("aria-label").startswith(f"Unit {strongest.index} of {strongest.layer},")
    assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "true"  # the keyboard went along
    page.keyboard.press("Escape")
    assert chosen.count() == 0


@pytest.mark.browser
def test_a_circuit_of_one_layer_and_no_edges_is_drawn(open_page):
    page = open_page(shown(Circuit({"relu": (1, 4)}, {"relu": 8})))
    assert page.locator("#nodes .unit:visible").count() == 2
    assert page.locator("#shown").inner_text() == "no edges"


@pytest.mark.browser
def test_a_thousand_units_are_drawn(open_page):
    page = open_page(shown(fake_circuit(12, 100, 6_000), fake_evaluation()))
    assert page.locator("#nodes .unit:visible").count() == 1200
