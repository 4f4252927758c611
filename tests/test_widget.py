"""A circuit in a notebook: what is shown, and that it is the page, running, with no network."""

from __future__ import annotations

import base64
import json

import pytest

from browser import browser, open_page, page  # noqa: F401
from viscircuits.bundle import Bundle
from viscircuits.circuit import Circuit, Edge, Unit
from viscircuits.errors import ViscircuitsError
from viscircuits.widget import MODULE, show_page

A, B = Unit("a", 1), Unit("b", 0)
BUNDLE = Bundle(Circuit({"a": (1, 2), "b": (0,)}, {"a": 4, "b": 2}, edges=(Edge(A, B, 0.5, -0.5),)), title="dög")
NEEDED = "anywidget is not installed: pip install 'viscircuits[notebook]'"


def test_a_bundle_shows_itself_as_a_widget_with_the_static_drawing_to_fall_back_on():
    pytest.importorskip("anywidget", reason=NEEDED)
    shown, _ = BUNDLE._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in shown
    assert shown["text/html"] == BUNDLE._repr_html_()
    assert shown["text/html"].count("<svg") == 1 and "dög" in shown["text/html"]
    assert shown["text/plain"] == "Bundle('dög', Circuit(3 units in 2 layers, 1 edge))"


def test_the_widget_holds_the_very_page_that_opens_from_disk():
    pytest.importorskip("anywidget", reason=NEEDED)
    widget = BUNDLE.widget(height=500)
    assert (widget.page, widget.height, widget._esm) == (BUNDLE.page(), 500, MODULE)
    assert "import" not in MODULE and "http" not in MODULE  # one module, nothing fetched
    assert BUNDLE._display_().page == widget.page  # marimo's question


def test_without_anywidget_the_drawing_is_shown_and_the_widget_says_what_to_install(monkeypatch):
    monkeypatch.setattr("viscircuits.widget.find_spec", lambda name: None)
    assert set(BUNDLE._repr_mimebundle_()) == {"text/plain", "text/html"}
    assert BUNDLE._display_() is BUNDLE.circuit
    with pytest.raises(ViscircuitsError, match=r"viscircuits\[notebook\]"):
        BUNDLE.widget()


def test_a_height_in_which_nothing_can_be_seen_is_refused():
    with pytest.raises(ViscircuitsError, match="200 or more"):
        show_page("", height=10)


NOTEBOOK = """<!doctype html><title>notebook</title><main id="cell"></main><script type="module">
const { default: widget } = await import("data:text/javascript;base64,@module@");
const listeners = {}, values = @values@;
window.model = {
  get: (name) => values[name],
  set: (name, value) => { values[name] = value; listeners[`change:${name}`]?.(); },
  on: (event, call) => { listeners[event] = call; },
  off: (event) => { delete listeners[event]; },
};
window.done = widget.render({ model, el: document.getElementById("cell") });
window.listeners = listeners;
document.documentElement.dataset.ready = "1";
</script>"""


@pytest.mark.browser
def test_the_page_runs_inside_a_cell(open_page):  # noqa: F811
    values = json.dumps({"page": BUNDLE.page(), "height": 640}).replace("<", "\\u003c")
    module = base64.b64encode(MODULE.encode()).decode()
    tab = open_page(NOTEBOOK.replace("@module@", module).replace("@values@", values))
    frame = tab.frame_locator("iframe")
    frame.locator("html[data-ready='1']").wait_for(state="attached")
    assert frame.locator("html[data-error]").count() == 0
    assert "dög" in frame.locator("h1").inner_text()
    assert tab.locator("iframe").bounding_box()["height"] == 640
    inside = tab.frames[1]
    assert inside.evaluate("(() => { try { return parent.document.title; } catch (e) { return e.name; } })()") == (
        "SecurityError"  # the page cannot reach the notebook
    )
    tab.evaluate("model.set('height', 300)")
    assert tab.locator("iframe").bounding_box()["height"] == 300
    tab.evaluate("done()")
    assert tab.locator("iframe").count() == 0
    assert tab.evaluate("Object.keys(listeners)") == []


def test_a_notebook_that_is_run_holds_the_widget_and_the_drawing(tmp_path):
    pytest.importorskip("anywidget", reason=NEEDED)
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install 'viscircuits[test]'")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'viscircuits[test]'")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install 'viscircuits[test]'")
    BUNDLE.save(tmp_path / "dog")
    source = "from viscircuits.bundle import Bundle\nbundle = Bundle.load('dog')\nbundle"
    cells = [nbformat.v4.new_code_cell(text) for text in (source, "bundle.circuit")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    whole, circuit = (cell.outputs[-1]["data"] for cell in notebook.cells)
    view = whole["application/vnd.jupyter.widget-view+json"]
    state = client.widget_state[view["model_id"]]
    assert state["page"] == BUNDLE.page()
    assert state["_esm"] == MODULE
    assert whole["text/html"] == BUNDLE._repr_html_()
    assert circuit["text/html"] == BUNDLE.circuit._repr_html_()
    nbformat.validate(notebook)
