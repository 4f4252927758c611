"""An evaluation's curve over sizes in the words of the page: what each part of the circuit does, beside controls.

Data in, data out; an evaluation of an older version lacks some of it, and then the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from viscircuits.contract import SizeData


def sizes(evaluation: Mapping[str, Any] | None) -> list[SizeData]:
    """The circuit's best parts that were measured, from the smallest to the whole.

    Parameters
    ----------
    evaluation
        What ``evaluation.json`` holds, or None.
    """
    curve = (evaluation or {}).get("unit_curve")
    if not evaluation or not curve or not curve.get("series"):
        return []
    own, *controls = curve["series"]
    found: list[SizeData] = []
    for i, fraction in enumerate(curve["x"]):
        if fraction <= 0:
            continue
        kept = _at(own, "faithfulness", i)
        found.append(
            {
                "fraction": fraction,
                "n_units": curve["n_units"][i],
                "concept": own["concept"][i],
                "others": _at(own, "others", i),
                "selectivity": _at(own, "selectivity", i),
                # an older evaluation knows it of the whole circuit alone
                "faithfulness": evaluation.get("faithfulness") if kept is None and fraction == 1 else kept,
                "controls": {each["name"]: entry for each in controls if (entry := _compared(each, i)) is not None},
            }
        )
    return found


def _compared(series: Mapping[str, Any], i: int) -> Any:
    """The figure by which a control is set beside the circuit."""
    return _at(series, "selectivity", i) if "selectivity" in series else _at(series, "concept", i)


def _at(series: Mapping[str, Any], what: str, i: int) -> Any:
    values: Sequence[Any] | None = series.get(what)
    return None if values is None or i >= len(values) else values[i]
