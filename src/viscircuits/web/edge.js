// One edge: its effective kernel, where its source sits, and what it contributed on each image.
import { data, edges, link, on, state, units } from "viscircuits/store.js";
import { called, count, figure, known, make, percent, signedPercent, sum, sureness, verb } from "viscircuits/words.js";
import { copyButton, openEdge, refill, selectButton, unitButton } from "viscircuits/pieces.js";
import { shareOf } from "viscircuits/paths.js";
import { inView, network } from "viscircuits/probe.js";
import { histogram, signedBars } from "viscircuits/bars.js";
import { ask, served } from "viscircuits/remote.js";

const LISTED = 12, AT_EACH_END = 6;
let element, all = false;
const fetched = new Map();  // edge's place → what the server computed

export const panel = {
  name: "edge",
  title: "Edge",
  available: () => edges.length > 0,
  mount(place) {
    element = place;
    on(["edge", "selected", "notes", "focus"], fill);
    fill();
  },
};

function fill() {
  const edge = edges[state.edge];
  if (!edge) { refill(element, choices()); return; }
  const made = lookedAt(edge);
  refill(element, make("h2", {}, label(units[edge.source]), " → ", label(units[edge.target])),
    make("div", { class: "ends" }, unitButton(units[edge.source], { "data-key": "source" }), make("span", { class: `arrow ${verb(edge)}`, "aria-label": verb(edge), role: "img" }), unitButton(units[edge.target], { "data-key": "target" })),
    make("p", { class: "note" }, standing(edge)),
    make("div", { class: "toolrow" }, selectButton("edges", edge.place), copyButton("Copy link", link)),
    kernelSection(edge, made.kernel), contributionSection(edge, made.contributions), waiting(edge, made));
}
const label = (unit) => called(unit) || unit.name;

function choices() {
  const unit = units[state.focus];
  const list = unit ? [...unit.ins, ...unit.outs].sort((a, b) => b.share - a.share) : edges;
  return [make("p", { class: "note lead" }, "Click an edge in the graph, or choose one here, to see the weights between its two units and what it did on each image."),
    make("h3", {}, unit ? `Strongest edges of ${label(unit)}` : "Strongest edges"),
    make("ul", { class: "rows plain" }, list.slice(0, LISTED).map((edge) => make("li", {}, make("button", { type: "button", class: "line", onclick: () => openEdge(edge) },
      make("span", { class: verb(edge), "aria-label": verb(edge), role: "img" }), make("b", {}, label(units[edge.source])), " → ", make("b", {}, label(units[edge.target])), make("span", { class: "n" }, figure(edge.score))))))];
}

function standing(edge) {
  const target = units[edge.target], sure = sureness(edge);
  const what = `The source ${verb(edge)} the target. Score ${figure(edge.score)}; ${signedPercent(shareOf(edge, "ins"))} of what ${label(target)} receives in the circuit, ${percent(edge.share)} of the attribution between the two layers.`;
  return sure ? `${what} It is ${sure}.` : what;
}

// ---------------------------------------------------------------- what is known of it

function bytes(text) { return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)); }
const decoded = {};
const once = (name, make_) => (decoded[name] ??= make_());

function kernelOf(edge) {
  const held = data.kernels, place = held ? once("kernelPlaces", () => new Map(held.edges.map((each, i) => [each, i]))).get(edge.place) : undefined;
  if (place === undefined) return null;
  const values = once("kernels", () => new Int8Array(bytes(held.values).buffer)), size = held.side ** 2, scale = held.scale[place] / 127;
  return { side: held.side, values: Array.from(values.subarray(place * size, (place + 1) * size), (value) => value * scale) };
}

function contributionsOf(edge) {
  const held = data.contributions, place = held ? once("contributionPlaces", () => new Map(held.edges.map((each, i) => [each, i]))).get(edge.place) : undefined;
  if (place === undefined) return null;
  const view = once("contributions", () => new DataView(bytes(held.values).buffer)), n = held.images.length;
  return held.images.map((name, i) => ({ name, value: view.getFloat32(4 * (place * n + i), true) }));
}

function lookedAt(edge) {
  const asked = fetched.get(edge.place);
  return { kernel: kernelOf(edge) ?? asked?.kernel ?? null, contributions: contributionsOf(edge) ?? asked?.contributions ?? null };
}

/** What stands where nothing is known of the edge yet; a served page then asks the network. */
function waiting(edge, { kernel, contributions }) {
  if (kernel || contributions) return null;
  if (!served) return make("p", { class: "note empty" }, "This page holds no kernel for this edge; it keeps those of the edges shown first. ", make("code", {}, "viscircuits view DIR --serve"), " computes any other.");
  const place = make("div", { class: "asking" }, make("p", { class: "note" }, "Asking the network for its kernel…"));
  const name = (unit) => [data.layers[unit.layer].name, unit.index];
  const asking = async () => {
    const probes = (await network())?.images_to_look_at ? [] : inView();  // without images of its own the server takes these
    return ask("/api/edge", { json: { source: name(units[edge.source]), target: name(units[edge.target]), probes }, topic: "edge", into: place });
  };
  asking().then((answer) => {
    if (!answer) { place.querySelector(".note")?.remove(); return; }
    fetched.set(edge.place, answer);
    if (state.edge === edge.place) fill();
  });
  return place;
}

// ---------------------------------------------------------------- the kernel

function kernelSection(edge, kernel) {
  if (!kernel?.values.length) return null;
  const { side, values } = kernel;
  if (side === 1) return make("section", {}, make("h3", {}, "Effective weight"), make("p", { class: "figure" }, signed(values[0])), make("p", { class: "note" }, "Averaged over images. The layers have no positions, so the kernel is one number."));
  const mass = centreOfMass(kernel), readout = make("output", { class: "readout" }, "Point at a square, or walk with the arrow keys, for its weight.");
  return make("section", {}, make("h3", {}, "Effective kernel"),
    make("p", { class: "note" }, "What the target, where it is most active, owes to each position of the source around that place; averaged over images, through what lies between the two layers."),
    kernelPicture(kernel, mass, readout), readout, scaleBar(values),
    make("p", { class: "offset" }, offsetWords(mass)),
    make("details", {}, make("summary", {}, "Kernel as a table"), kernelTable(kernel, edge)));
}

const signed = (x) => (x > 0 ? `+${figure(x)}` : figure(x));

/** Where the weights' sizes balance, in positions from the middle; null if all are zero. */
function centreOfMass({ side, values }) {
  const middle = (side - 1) / 2, mass = sum(values.map(Math.abs));
  if (!mass) return null;
  const along = (position) => sum(values.map((value, i) => Math.abs(value) * position(i))) / mass - middle;
  return { right: along((i) => i % side), down: along((i) => Math.floor(i / side)) };
}

function offsetWords(mass) {
  if (!mass) return "The kernel is zero everywhere.";
  const part = (x, more, less) => (Math.abs(x) < 0.15 ? null : `${Math.abs(x).toFixed(1)} positions ${x > 0 ? more : less}`);
  const down = part(mass.down, "below", "above"), right = part(mass.right, "to the right", "to the left");
  const where = down && right ? `${down} and ${right} of the target` : down ? `${down} the target` : right ? `${right} of the target` : "where the target is";
  return `The source sits ${where}, by the kernel's centre of mass.`;
}

function whereWords(i, side) {
  const middle = (side - 1) / 2, right = (i % side) - middle, down = Math.floor(i / side) - middle;
  const part = (n, more, less) => (n ? `${Math.abs(n)} ${n > 0 ? more : less}` : null);
  return [part(down, "down", "up"), part(right, "right", "left")].filter(Boolean).join(", ") || "at the target";
}

function kernelPicture({ side, values }, mass, readout) {
  const most = Math.max(...values.map(Math.abs)) || 1, cell = 36, size = side * cell, middle = size / 2;
  const svg = make("svg", { class: "kernel", viewBox: `-1 -1 ${size + 2} ${size + 2}`, tabindex: 0, role: "img", "aria-label": `Kernel of ${side} by ${side} weights. ${offsetWords(mass)} Arrow keys read single weights; the table below has all.` });
  values.forEach((value, i) => svg.append(make("rect", { x: (i % side) * cell, y: Math.floor(i / side) * cell, width: cell, height: cell, class: value < 0 ? "less" : "more", "fill-opacity": (Math.abs(value) / most).toFixed(3), "data-cell": i },
    make("title", {}, `${whereWords(i, side)}: ${signed(value)}`))));
  // hatching says minus where colour cannot
  values.forEach((value, i) => { if (value < -0.12 * most) svg.append(make("path", { class: "hatch", d: hatch((i % side) * cell, Math.floor(i / side) * cell, cell) })); });
  svg.append(make("rect", { class: "middle", x: middle - cell / 2, y: middle - cell / 2, width: cell, height: cell }));
  if (mass && Math.hypot(mass.right, mass.down) >= 0.15) svg.append(arrow(middle, middle, middle + mass.right * cell, middle + mass.down * cell));
  else if (mass) svg.append(make("circle", { class: "mass", cx: middle, cy: middle, r: 4 }));
  walkable(svg, side, cell, (i) => { readout.textContent = `${whereWords(i, side)}: ${signed(values[i])}`; });
  return svg;
}
const hatch = (x, y, cell) => [0.25, 0.5, 0.75, 1].map((t) => `M${x + 4} ${y + cell * t - 2}L${x + cell * t - 2} ${y + 4}`).slice(1).join("");

function arrow(x0, y0, x1, y1) {
  const length = Math.hypot(x1 - x0, y1 - y0), dx = (x1 - x0) / length, dy = (y1 - y0) / length, head = Math.min(9, length * 0.6);
  const back = [x1 - head * dx, y1 - head * dy], wing = head * 0.55;
  return make("g", { class: "offset-arrow" }, make("line", { x1: x0, y1: y0, x2: back[0], y2: back[1] }),
    make("polygon", { points: `${x1},${y1} ${back[0] - wing * dy},${back[1] + wing * dx} ${back[0] + wing * dy},${back[1] - wing * dx}` }));
}

/** A cursor over the squares, for pointer and keys. */
function walkable(svg, side, cell, tell) {
  const cursor = make("rect", { class: "cursor", width: cell, height: cell, visibility: "hidden" });
  svg.append(cursor);
  let at = (side * side - 1) / 2;
  const move = (i) => {
    at = i;
    for (const [key, value] of Object.entries({ x: (i % side) * cell, y: Math.floor(i / side) * cell, visibility: "visible" })) cursor.setAttribute(key, value);
    tell(i);
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), column = Math.floor(((event.clientX - box.left) / box.width) * side), row = Math.floor(((event.clientY - box.top) / box.height) * side);
    if (column >= 0 && row >= 0 && column < side && row < side) move(row * side + column);
  });
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) move(at); });
  svg.addEventListener("keydown", (event) => {
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [];
    if (dx === undefined) return;
    event.preventDefault();
    event.stopPropagation();  // arrow keys elsewhere walk along the circuit
    const column = (at % side) + dx, row = Math.floor(at / side) + dy;
    if (column >= 0 && row >= 0 && column < side && row < side) move(row * side + column);
  });
}

function scaleBar(values) {
  const most = Math.max(...values.map(Math.abs));
  return make("p", { class: "scale", "aria-hidden": "true" }, make("span", {}, `−${figure(most)}`), make("i", {}), make("span", {}, `+${figure(most)}`));
}

function kernelTable({ side, values }, edge) {
  const middle = (side - 1) / 2, offset = (n) => (n > 0 ? `+${n}` : String(n).replace("-", "−"));
  const columns = Array.from({ length: side }, (_, i) => i);
  return make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Kernel as a table" }, make("table", {}, make("caption", {}, `From ${units[edge.source].name} to ${units[edge.target].name}; rows go down, columns go right of the target`),
    make("thead", {}, make("tr", {}, make("td", {}), columns.map((c) => make("th", { scope: "col" }, offset(c - middle))))),
    make("tbody", {}, columns.map((r) => make("tr", {}, make("th", { scope: "row" }, offset(r - middle)), columns.map((c) => make("td", {}, figure(values[r * side + c]))))))));
}

// ---------------------------------------------------------------- contributions

function contributionSection(edge, contributions) {
  if (!contributions?.length) return null;
  const sorted = [...contributions].sort((a, b) => b.value - a.value), few = !all && sorted.length > 2 * AT_EACH_END + 2;
  const hidden = sorted.length - 2 * AT_EACH_END, values = sorted.map((each) => each.value), for_ = values.filter((value) => value > 0).length, against = values.filter((value) => value < 0).length;
  const mean = sum(values) / values.length, words = `For the target on ${for_} of ${count(values.length)} images, against it on ${against}; mean ${signed(mean)}.`;
  const more = sorted.length > 2 * AT_EACH_END + 2 && make("button", { type: "button", class: "tool", "data-key": "all", "aria-expanded": !few, onclick: () => { all = !all; fill(); } }, few ? `Show ${count(hidden)} more between` : "Show fewer");
  return make("section", {}, make("h3", {}, "Contribution on each image"), make("p", { class: "note" }, words), histogram(values, { label: `Histogram of contributions. ${words}` }),
    signedBars(few ? sorted.slice(0, AT_EACH_END) : sorted, signed, sorted), more || null, few ? signedBars(sorted.slice(-AT_EACH_END), signed, sorted) : null);
}
