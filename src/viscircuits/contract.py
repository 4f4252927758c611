"""What Python gives the page, as types: the JSON block of `index.html` and the answers of `viscircuits view --serve`.

Units are numbers: place in the circuit, layer by layer. Edges are places in `Edges`, which stand in the order in which
the page reveals them. Whatever was not measured is None or an empty list, and the page says so.

The page checks what it is given against the same names (`web/contract.js`); tests hold the two together.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

SCHEMA = "viscircuits/page"
VERSION = 2


class IntervalData(TypedDict):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class LayerData(TypedDict):
    """One layer: a column, or the part of a column that belongs to one branch."""

    name: str
    width: int
    units: list[int]  # indices in the network's layer
    scores: list[float]  # one a unit, or empty
    chosen: list[float]  # share of bootstrap draws, one a unit, or empty
    order: list[int]  # unit numbers from top to bottom, so that edges cross little
    column: int  # columns stand left to right in execution order; layers that run side by side share one


class EdgesData(TypedDict):
    """Edges in the order of revealing, a list for each property."""

    source: list[int]
    target: list[int]
    score: list[float]
    signed: list[float]
    share: list[float]  # of the attribution between its two layers
    chosen: list[float | None]


class SpriteData(TypedDict):
    """Many pictures in one."""

    uri: str
    tile: int  # pixels a side
    columns: int
    rows: int


class KernelsData(TypedDict):
    """Effective kernels: what a target's value owes to each position of a source around it, averaged over images."""

    edges: list[int]
    side: int  # kernels are side × side, row by row
    values: str  # base64 of int8, kernel after kernel; times scale / 127
    scale: list[float]  # largest size in each kernel


class ContributionsData(TypedDict):
    """What each source gave each target on single images, signed."""

    images: list[str]
    edges: list[int]
    values: str  # base64 of little-endian float32 [edge][image]


class Answer(TypedDict):
    """One of a network's strongest outputs."""

    index: int
    label: str
    probability: float


class ProbeData(TypedDict):
    """An image that the network saw, with how strongly it excites each unit of the circuit."""

    name: str
    kind: str  # "concept", "reference", or what the user calls it
    answers: list[Answer]  # strongest first; empty for a network without classes
    activations: list[float | None]  # one a unit: the largest over positions; None where it was not looked at


class ProbesData(TypedDict):
    """Images kept with the result; `tiles` are their numbers in the sprite."""

    sprite: SpriteData | None
    probes: list[ProbeData]
    most: list[float]  # one a unit: the largest activation over these probes, to set others against


class ComparisonData(TypedDict):
    """A second circuit laid over the first; the page then holds the units of both."""

    title: str
    member: list[Literal[1, 2, 3]]  # a unit: 1 in the first alone, 2 in the second alone, 3 in both
    edge_member: list[Literal[1, 2, 3]]
    overlap: list[dict[str, Any]]  # as `viscircuits compare --json`, a layer each


class SizeData(TypedDict):
    """The circuit's best part of one size, measured; faithfulness: that part alone kept."""

    fraction: float  # of each layer's chosen units, those with the highest scores
    n_units: int
    concept: IntervalData
    others: IntervalData | None
    selectivity: IntervalData | None
    faithfulness: IntervalData | None
    controls: dict[str, IntervalData]  # their selectivity; without others, what is left of the concept


class NoteData(TypedDict):
    """What people wrote about a unit, or under the key "" about the circuit."""

    name: str
    text: str
    by: str
    when: str  # ISO 8601


class PageData(TypedDict):
    """The whole block."""

    schema: str
    version: int
    title: str
    command: str
    layers: list[LayerData]
    edges: EdgesData
    n_edges: int  # in the circuit; `edges` may hold fewer
    sprite: SpriteData | None
    pictures: list[list[tuple[int, int, float]]]  # a unit: tile, place in names, activation
    names: list[str]
    classes: list[str]  # what the image of each name shows, as far as somebody said it, else ""
    visualisations: list[list[tuple[int, str]]]  # a unit: tile, what it is ("channel", "channel, negative", …)
    visualisation_sprite: SpriteData | None
    kernels: KernelsData | None
    contributions: ContributionsData | None
    probes: ProbesData | None
    comparison: ComparisonData | None
    sizes: dict[str, list[SizeData]]  # by ablation, from the smallest measured to the whole
    notes: dict[str, NoteData]  # "layer:index", or "" for the circuit
    elsewhere: dict[str, list[str]]  # "layer:index" → titles of other circuits that hold the unit
    evaluation: dict[str, Any] | None
    selection: dict[str, Any]
    provenance: dict[str, Any]


# ------------------------------------------------------------------ the served page


class EditData(TypedDict):
    """What is done to the network: units and edges of any of its circuit's layers, and what they become."""

    units: list[tuple[str, int]]
    edges: list[tuple[tuple[str, int], tuple[str, int]]]
    ablation: str


class NetworkData(TypedDict):
    """GET /api/network: what can be asked."""

    model: str
    layers: list[dict[str, Any]]  # {"name": …, "width": …}
    ablations: list[str]  # those for which the replacement values are known
    classes: bool
    evaluated_on: dict[str, int]  # "concept" → images on which accuracy can be asked, and "others"
    images_to_look_at: bool  # whether those that found the circuit are there; else questions must name probes
    limits: dict[str, int]  # "upload_bytes", "upload_pixels"


class UploadedData(ProbeData):
    """POST /api/probe, the image's bytes as body: the probe, named by its `id` from then on; GET /api/probe/ID."""

    id: str
    picture: str  # data: URI, at most 224 pixels a side


class OperatedProbe(TypedDict):
    """What one probe was answered before and after."""

    id: str
    before: list[Answer]
    after: list[Answer]
    activations: list[float]  # of the circuit's units, after


class SurgeryData(TypedDict):
    """POST /api/surgery {"edit": EditData, "probes": [id]}."""

    probes: list[OperatedProbe]
    milliseconds: dict[str, float]  # "forward": of the forward pass, "all": of the answer


class AccuracyData(TypedDict):
    """The last line of POST /api/accuracy {"edit": EditData}; earlier lines are {"done": n, "of": n}."""

    measure: str
    before: dict[str, IntervalData]  # "concept", "others"
    after: dict[str, IntervalData]
    selectivity: IntervalData | None
