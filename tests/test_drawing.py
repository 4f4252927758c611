"""Drawings of a circuit that need no page: the excerpt, the static SVG of a notebook, the figure of a paper."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.drawing import draw, to_html
from viscircuits.errors import ViscircuitsError
from viscircuits.exemplars import Exemplar
from viscircuits.layout import HALF, NEARLY_ALL, excerpt, pattern, reveal, strongest
from viscircuits.plot import plot

SVG = "{http://www.w3.org/2000/svg}"
A, B, C = (tuple(Unit(layer, i) for i in range(3)) for layer in ("net.a", "net.b", "net.<c>"))
CIRCUIT = Circuit(
    {"net.a": (0, 1, 2), "net.b": (0, 1, 2), "net.<c>": (0, 1, 2)},
    {"net.a": 8, "net.b": 8, "net.<c>": 8},
    {"net.a": (3.0, 1.0, 2.0), "net.b": (1.0, 2.0, 3.0)},
    (
        Edge(A[0], B[0], 6.0, 6.0), Edge(A[0], B[2], 3.0, -3.0), Edge(A[1], B[1], 1.0, 1.0),
        Edge(B[2], C[0], 0.03, 0.03), Edge(B[1], C[1], 0.01, -0.01),
    ),
    provenance={"model": "tiny & new"},
)  # fmt: skip
# one of each sign is sure, in half of the draws, in fewer; and one nobody drew
SHARES = (0.95, 0.6, 0.2, 0.1, None)
DRAWN = replace(CIRCUIT, edges=tuple(replace(e, chosen=c) for e, c in zip(CIRCUIT.edges, SHARES, strict=True)))


# ------------------------------------------------------------------ what is shown


def test_the_strongest_units_of_each_layer_stand_in_the_circuits_order():
    assert strongest(CIRCUIT, 2) == [A[0], A[2], B[1], B[2], C[0], C[1]]


def test_an_excerpt_has_the_edges_between_its_units_with_their_share_of_all():
    found = excerpt(CIRCUIT, n_units=2)
    assert {layer: set(units) for layer, units in found.columns.items()} == {
        "net.a": {A[0], A[2]}, "net.b": {B[1], B[2]}, "net.<c>": {C[0], C[1]},
    }  # fmt: skip
    shares = {(edge.source, edge.target): share for edge, share in found.edges}
    assert shares == {
        (A[0], B[2]): pytest.approx(0.3), (B[2], C[0]): pytest.approx(0.75), (B[1], C[1]): pytest.approx(0.25),
    }  # fmt: skip


def test_few_edges_are_the_strongest_of_each_pair_of_layers():
    found = excerpt(CIRCUIT, n_edges=2)
    assert {(edge.source, edge.target) for edge, _ in found.edges} == {(A[0], B[0]), (B[2], C[0])}
    assert excerpt(CIRCUIT).edges == tuple(reveal(CIRCUIT.edges))


def test_only_the_layers_asked_for_are_in_it():
    assert list(excerpt(CIRCUIT, layers=("net.b", "net.<c>")).columns) == ["net.b", "net.<c>"]
    with pytest.raises(ViscircuitsError, match=r"no layer 'net\.d'"):
        excerpt(CIRCUIT, layers=("net.d",))


# ------------------------------------------------------------------ the static drawing


def test_the_drawing_has_a_dot_a_unit_and_a_line_an_edge():
    root = ET.fromstring(draw(CIRCUIT))
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert titles[0] == "9 units in 3 layers, 5 edges, of tiny & new"
    assert len(list(root.iter(f"{SVG}circle"))) == 9
    assert {"net.a:0, score 3", "net.<c>:2"} <= set(titles)
    lines = list(root.iter(f"{SVG}path"))
    assert len(lines) == 5
    widths = sorted(float(line.get("stroke-width")) for line in lines)
    assert widths[-1] / widths[-2] == pytest.approx((0.75 / 0.6) ** 0.5, rel=0.01)  # √ of the shares


def test_dashes_say_how_sure_an_edge_is_and_colour_and_end_its_sign():
    assert [pattern(edge.chosen) for edge in DRAWN.edges] == ["solid", "dashed", "dotted", "dotted", "solid"]
    lines = {round(float(line.get("stroke-width")), 2): line for line in ET.fromstring(draw(DRAWN)).iter(f"{SVG}path")}
    of = {edge: lines[round(7 * (share / 0.75) ** 0.5, 2)] for edge, share in reveal(DRAWN.edges)}
    assert {edge.chosen: line.get("stroke-dasharray") for edge, line in of.items()} == {
        0.95: None, 0.6: "5 3", 0.2: "1.2 2.4", 0.1: "1.2 2.4", None: None,
    }  # fmt: skip
    for edge, line in of.items():
        mark = line.get("d").split("M")[2]
        assert (line.get("stroke"), "L" in mark) == (("#7b5bb8", True) if edge.signed > 0 else ("#c4711a", False))
    assert not any("stroke-dasharray" in line.attrib for line in ET.fromstring(draw(CIRCUIT)).iter(f"{SVG}path"))


def test_the_page_breaks_its_lines_at_the_same_shares():
    script = (files("viscircuits") / "web" / "graph.js").read_text(encoding="utf-8")
    assert [float(share) for share in re.findall(r"chosen >= ([\d.]+)", script)] == [NEARLY_ALL, HALF]


def test_a_line_joins_the_dots_of_its_units():
    root = ET.fromstring(draw(CIRCUIT))
    dots = {}
    for group in root.iter(f"{SVG}g"):
        if (dot := group.find(f"{SVG}circle")) is not None:
            dots[group.find(f"{SVG}title").text.split(",")[0]] = (dot.get("cx"), dot.get("cy"))
    ends = set()
    for line in root.iter(f"{SVG}path"):
        curve = line.get("d").split("M")[1]
        start, (*_, to_x, to_y) = curve.split("C")[0].split(), curve.split("C")[1].split()
        ends.add((tuple(start), (f"{float(to_x) + 7:g}", to_y)))  # just before the dot
    assert ends == {(dots[str(edge.source)], dots[str(edge.target)]) for edge in CIRCUIT.edges}


def test_html_says_what_is_left_out_and_runs_and_asks_for_nothing():
    whole, part = to_html(CIRCUIT, "<dög>"), to_html(CIRCUIT, n_units=2)
    assert "&lt;dög&gt;" in whole and "drawn" not in whole
    assert "drawn: 6 units, 3 edges" in part
    for forbidden in ("<script", "http:", "https:", "url(", "onload"):
        assert forbidden not in whole.replace("http://www.w3.org/2000/svg", "")


def test_a_notebook_shows_a_circuit_as_its_drawing_and_a_short_text():
    assert CIRCUIT._repr_html_() == to_html(CIRCUIT)
    assert repr(CIRCUIT) == "Circuit(9 units in 3 layers, 5 edges)"
    assert ET.fromstring(draw(Circuit({}, {}))).tag == f"{SVG}svg"


def test_drawing_a_circuit_loads_neither_torch_nor_numpy():
    program = (
        "import sys; from viscircuits.circuit import Circuit; Circuit({'a': (0,)}, {'a': 2})._repr_html_();"
        "assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# ------------------------------------------------------------------ the figure


@pytest.fixture(autouse=True)
def matplotlib_or_skip(request):
    if "figure" in request.node.name:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'viscircuits[plot]'")


def texts(figure) -> list[str]:
    return [text.get_text() for text in (*figure.axes[0].texts, *figure.texts)]


def test_the_figure_has_the_width_of_a_column_or_of_a_page():
    assert CIRCUIT.plot().get_figwidth() == 3.3
    many = Circuit({f"l{i}": (0,) for i in range(7)}, {f"l{i}": 2 for i in range(7)})
    assert plot(many).get_figwidth() == 6.8
    assert plot(many, width=4.5).get_figwidth() == 4.5


def test_the_figure_draws_each_edge_by_share_sign_and_dash():
    from matplotlib.colors import to_hex

    patches = plot(DRAWN).axes[0].patches
    assert len(patches) == 5
    drawn = sorted(patches, key=lambda patch: patch.get_linewidth())
    shares = sorted(((share, edge) for edge, share in reveal(DRAWN.edges)), key=lambda pair: pair[0])
    solid = plot(CIRCUIT).axes[0].patches
    assert {patch.get_linestyle() for patch in solid} == {"-"}
    for patch, (share, edge) in zip(drawn, shares, strict=True):
        assert patch.get_linewidth() == pytest.approx(2.6 * (share / 0.75) ** 0.5, rel=0.01)
        assert to_hex(patch.get_edgecolor()) == ("#5e3c99" if edge.signed > 0 else "#b85c00")
        assert len(patch.get_path()) == (7 if edge.signed > 0 else 6)  # an arrowhead has three points, a bar two
        dash = patch.get_linestyle()
        assert (dash if dash == "-" else dash[1][0] > 1) == {"solid": "-", "dashed": True, "dotted": False}[
            pattern(edge.chosen)
        ]


def test_the_figure_names_layers_without_what_all_names_begin_with_and_counts_units():
    said = texts(plot(CIRCUIT, n_units=2))
    assert {"a", "b", "<c>", "2 of 3 units"} <= set(said)
    assert {"3 units"} <= set(texts(plot(CIRCUIT)))
    assert {"1", "2"} <= set(said)  # indices


def test_the_figure_shows_a_units_first_exemplar_where_the_unit_stands():
    red, blue = (Exemplar(name, 1.0, (0, 0, 8, 8), Image.new("RGB", (8, 8), name)) for name in ("red", "blue"))
    figure = plot(CIRCUIT, {A[0]: [red, blue], B[2]: [blue], C[0]: []})
    images = figure.axes[0].images
    colours = [tuple(np.asarray(image.get_array())[0, 0, :3]) for image in images]
    assert colours == [(255, 0, 0), (0, 0, 255)]
    lefts = [image.get_extent()[0] for image in images]
    assert lefts[0] < lefts[1]  # layer a stands left of layer b


def test_the_figure_is_vectors_with_its_text_as_text():
    vector = io.StringIO()
    plot(CIRCUIT).savefig(vector, format="svg")
    root = ET.fromstring(vector.getvalue())
    assert "<c>" in {(text.text or "").strip() for text in root.iter(f"{SVG}text")}
    assert not list(root.iter(f"{SVG}image"))


def test_the_figure_goes_into_axes_of_yours_and_changes_no_setting_of_matplotlib():
    import matplotlib
    from matplotlib.figure import Figure

    before = dict(matplotlib.rcParams)
    mine = Figure((6, 3))
    left, right = mine.subplots(1, 2)
    assert plot(CIRCUIT, ax=right) is mine
    assert (len(left.patches), len(right.patches)) == (0, 5)
    assert dict(matplotlib.rcParams) == before


def test_nothing_to_plot_is_said():
    with pytest.raises(ViscircuitsError, match="no unit to plot"):
        plot(Circuit({"a": ()}, {"a": 2}))


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ViscircuitsError, match=r"viscircuits\[plot\]"):
        CIRCUIT.plot()
