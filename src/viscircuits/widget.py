"""The page inside a notebook: one widget, one module of a few lines, nothing from a network.

The page is the same that opens from disk. It runs in a frame of its own that cannot reach the notebook around it.
Needs the package anywidget (``pip install 'viscircuits[notebook]'``), which Jupyter, VS Code and marimo understand.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from viscircuits.errors import ViscircuitsError

if TYPE_CHECKING:
    from anywidget import AnyWidget

LEAST_HEIGHT = 200

MODULE = """\
function render({ model, el }) {
  const frame = document.createElement("iframe");
  frame.title = "Circuit";
  frame.setAttribute("sandbox", "allow-scripts allow-downloads allow-modals");
  frame.style.cssText = "display: block; width: 100%; border: 0;";
  const fill = () => { frame.srcdoc = model.get("page"); };
  const resize = () => { frame.style.height = `${model.get("height")}px`; };
  fill();
  resize();
  model.on("change:page", fill);
  model.on("change:height", resize);
  el.append(frame);
  return () => { model.off("change:page", fill); model.off("change:height", resize); frame.remove(); };
}
export default { render };
"""


def show_page(html: str, *, height: int = 720) -> AnyWidget:
    """A widget that shows a self-contained page.

    Parameters
    ----------
    html
        The page (`viscircuits.page.page`).
    height
        In pixels.

    Raises
    ------
    ViscircuitsError
        If anywidget is not installed, or the height is too little to see anything.
    """
    if height < LEAST_HEIGHT:
        raise ViscircuitsError(f"a widget of {height} pixels shows nothing; give a height of {LEAST_HEIGHT} or more")
    if not can_show():
        raise ViscircuitsError("widgets need the package anywidget: pip install 'viscircuits[notebook]'")
    return _kind()(page=html, height=height)


def can_show() -> bool:
    """Whether anywidget is installed."""
    return find_spec("anywidget") is not None


@cache
def _kind() -> Any:
    import anywidget
    import traitlets

    class PageWidget(anywidget.AnyWidget):
        _esm = MODULE
        page = traitlets.Unicode().tag(sync=True)
        height = traitlets.Int(720).tag(sync=True)

    return PageWidget
