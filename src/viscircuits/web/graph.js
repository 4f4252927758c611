// The graph: units as buttons, edges on a canvas beneath them, and on a canvas above them a veil with holes for what a
// pointer or the focus lights.
import { activations, activationsSigned, data, edges, on, operated, set, state, units } from "viscircuits/store.js";
import { $, announce, called, count, describe, face, figure, known, make, percent, picture, plural, shotsOf, signedPercent, sum, sureness, verb } from "viscircuits/words.js";
import { HEAD, arrange, captionOf, curve, distance, endMark } from "viscircuits/layout.js";
import { edgeInView, inView, pathsOf, relative, shareOf } from "viscircuits/paths.js";
import { search } from "viscircuits/finding.js";
import { isThere } from "viscircuits/probe.js";
import { served } from "viscircuits/remote.js";

const CHUNK = 2500, LEAST_LIT = 0.003, MOST_LIT = 600, STRONG = 0.02, LABELLED = 60, LABELLED_TINY = 24, NEAR = 7, VEIL = 0.84, CHANGED = 0.02;
const root = document.documentElement, nUnits = units.length;
const nodes = [], supers = new Map();
let cardWaits = 0, darkWaits = 0;
const look = { size: 64, rows: 30, geometry: null, visible: null, lines: [], lit: [], shown: [], pointed: null, found: new Set(), flows: new Map(), ends: new Set(), veiled: false, dense: 1, room: { width: 0, height: 0 } };

export const isShown = (id) => Boolean(look.visible?.[id]) && !state.collapsed.has(units[id].layer);
const endOf = (id) => (state.collapsed.has(units[id].layer) ? nUnits + units[id].layer : id);
const nodeOf = (end) => (end < nUnits ? nodes[end] : supers.get(end - nUnits));

/** Draws the graph for the first time. */
export function mountGraph({ size, rows }) {
  Object.assign(look, { size, rows });
  readColours();
  units.forEach((unit) => nodes.push(nodeFor(unit)));
  data.layers.forEach((layer, l) => {
    supers.set(l, superFor(layer, l));
    $("nodes").append(...layer.order.map((id) => nodes[id]), supers.get(l));
  });
  const shape = ["fraction", "least", "collapsed", "members"];
  on(shape, place);
  on(["shown", "skips"], (changed) => { if (!changed.some((key) => shape.includes(key))) { gather(); drawAll(); light(); } });
  on(["face", "mosaic", "probe", "probes"], (changed) => { if (changed.some((key) => !key.startsWith("probe")) || state.face === "heat") dress(); });
  on(["notes"], name);
  on(["focus"], focused);
  on(["pinned", "selected"], mark);
  on(["focus", "hovered", "pinned", "edge", "panel"], light);
  on(["activations"], glow);
  on(["operated"], markChanges);
  on(["query", "notes"], find);
  listen();
  dress();
  mark();
  place();
  focused();
  glow();  // a probe named in the address was set before
  if (state.query) find();
}

/** Changes the size of units, in pixels. */
export function zoom(size) {
  look.size = size;
  place();
}

// ---------------------------------------------------------------- units

function nodeFor(unit) {
  const bar = known(unit.score) ? make("i", { "--score": relative(unit) }) : null;
  const node = make("button", { class: `unit${data.comparison ? ` member${unit.member}` : ""}${known(unit.chosen) && unit.chosen < 0.5 ? " unsure" : ""}`, type: "button", tabindex: -1, "aria-label": describe(unit) },
    make("span", {}), make("small", {}, make("b", {}, captionFor(unit)), bar));
  node.unit = unit;
  return node;
}
const captionFor = (unit) => called(unit) || (shotsOf(unit).length ? String(unit.index) : "");

function superFor(layer, l) {
  const best = layer.order.map((id) => units[id]).sort((a, b) => relative(b) - relative(a)).slice(0, 4);
  const node = make("button", { class: "unit super", type: "button", tabindex: -1, hidden: true }, make("span", {}, best.map((unit) => face(unit, 1))), make("small", {}, make("b", {}, "")));
  node.layer = l;
  return node;
}

function name() {
  units.forEach((unit, id) => {
    nodes[id].setAttribute("aria-label", describe(unit));
    nodes[id].querySelector("small b").textContent = captionFor(unit);
  });
}

/** Puts the pictures of the kind in view on the units. */
function dress() {
  const many = state.mosaic ?? mosaicFits() ? 4 : 1;
  $("stage").classList.toggle("mosaic", many === 4);
  units.forEach((unit, id) => nodes[id].firstChild.replaceChildren(...(state.face === "heat" ? heatOf(unit) ?? face(unit, many) : face(unit, many))));
}
const mosaicFits = () => look.size >= 72 && nUnits <= 400;
export const hasMosaic = () => $("stage").classList.contains("mosaic");

/** Where the probe excites the unit, which a server can tell; fetched when it comes into view. */
function heatOf(unit) {
  if (!served || !isThere(state.probe)) return null;
  const query = new URLSearchParams({ layer: data.layers[unit.layer].name, index: unit.index, probe: state.probe });
  return [make("img", { class: "heatmap", loading: "lazy", alt: "", src: `/api/heat?${query}` })];
}

function mark() {
  nodes.forEach((node, id) => {
    node.classList.toggle("pinned", state.pinned.has(id));
    node.classList.toggle("cut", state.selected.units.has(id));
  });
}

function find() {
  look.found = new Set(search(state.query).map(({ unit }) => unit.id));
  nodes.forEach((node, id) => node.classList.toggle("found", look.found.has(id)));
  light();
}

function glow() {
  $("stage").classList.toggle("glowing", activations !== null);
  $("stage").classList.toggle("signed", activations !== null && activationsSigned);
  nodes.forEach((node, id) => {
    const value = activations?.[id] ?? 0;
    node.style.setProperty("--glow", activations ? Math.min(1, Math.abs(value)).toFixed(3) : "");
    node.classList.toggle("less", activations !== null && value < 0);
  });
}

/** ▲ and ▼ at the units that do more or less in the edited network, as large as the change. */
function markChanges() {
  nodes.forEach((node, id) => {
    const change = operated ? operated.after[id] - operated.before[id] : 0;
    node.classList.toggle("rose", change >= CHANGED);
    node.classList.toggle("fell", change <= -CHANGED);
    node.style.setProperty("--change", Math.abs(change) >= CHANGED ? Math.min(1, Math.abs(change)).toFixed(3) : "");
  });
}

function focused() {
  clearTimeout(cardWaits);
  const before = $("nodes").querySelector("[aria-current]");
  before?.classList.remove("chosen");
  before?.removeAttribute("aria-current");
  const unit = units[state.focus], door = unit ?? units[data.layers.find((layer) => layer.order.length)?.order[0]];
  $("nodes").querySelectorAll("[tabindex='0']").forEach((node) => { node.tabIndex = -1; });
  if (door) nodeOf(endOf(door.id)).tabIndex = 0;
  $("card").hidden = true;
  if (!unit) return;
  nodes[unit.id].classList.add("chosen");
  nodes[unit.id].setAttribute("aria-current", "true");
  nodeOf(endOf(unit.id)).scrollIntoView({ block: "nearest", inline: "nearest" });
  announce(describe(unit));
}

/** Goes to a unit, out of whatever hides it; `walk` takes the keyboard along. */
export function goToUnit(unit, { walk = false } = {}) {
  const patch = { focus: unit.id, panel: "unit" };
  if (state.collapsed.has(unit.layer)) patch.collapsed = new Set([...state.collapsed].filter((l) => l !== unit.layer));
  if (!look.visible[unit.id]) Object.assign(patch, { fraction: 1, least: 0, members: new Set([1, 2, 3]) });
  set(patch);
  if (walk) nodes[unit.id].focus({ preventScroll: true });
}

// ---------------------------------------------------------------- placing

function place() {
  look.visible = inView();
  look.shown = data.layers.map((layer) => layer.order.filter((id) => look.visible[id]));
  const { clientWidth, clientHeight } = $("scroll");
  look.room = { width: clientWidth, height: clientHeight };
  look.geometry = arrange({ layers: data.layers, shown: look.shown, collapsed: state.collapsed, nUnits, size: look.size, rows: look.rows, room: clientWidth, height: clientHeight - 2 });
  const { seats, width, height } = look.geometry;
  root.style.setProperty("--s", `${look.size}px`);
  root.style.setProperty("--label", `${captionOf(look.size)}px`);
  $("stage").classList.toggle("tiny", look.size < 40);
  Object.assign($("stage").style, { width: `${width}px`, height: `${height}px` });
  nodes.forEach((node, id) => seat(node, seats.get(id)));
  data.layers.forEach((layer, l) => {
    const node = supers.get(l), n = look.shown[l].length;
    seat(node, seats.get(nUnits + l));
    if (!state.collapsed.has(l)) return;
    node.querySelector("small b").textContent = plural(n, "unit");
    node.setAttribute("aria-label", `${layer.name}, ${plural(n, "unit")} taken together. Press to show them.`);
  });
  head();
  fitCanvases();
  gather();
  drawAll();
  light();
}

function seat(node, at) {
  node.hidden = !at;
  if (at) { node.style.left = `${at.x}px`; node.style.top = `${at.y}px`; }
}

function head() {
  const { lanes, bands, gap } = look.geometry, room = Math.min(gap - 12, 130);
  $("heads").replaceChildren(...data.layers.map((layer, l) => {
    const { x, width, beside } = lanes[l], wide = Math.max(46, width + (beside ? 22 : room)), closed = state.collapsed.has(l);
    return make("button", { type: "button", style: `left:${x - (wide - width) / 2}px;width:${wide}px`, title: `${layer.name}: ${closed ? "show its units" : "take its units together"}`, "aria-expanded": String(!closed), "data-layer": l, onclick: () => toggleLayer(l) },
      make("b", {}, make("bdi", {}, layer.name)), make("span", {}, `${count(look.shown[l].length)} of ${count(layer.width)}`));
  }));
  $("bands").replaceChildren(...bands.filter((band) => band.layers.length > 1).map((band) => make("i", { style: `left:${band.x - 10}px;width:${band.width + 20}px` })));
}

/** Takes a layer's units together in one node, or apart again. */
export function toggleLayer(l) {
  const next = new Set(state.collapsed);
  if (!next.delete(l)) next.add(l);
  const held = document.activeElement?.dataset?.layer === String(l) || document.activeElement?.layer === l;
  set({ collapsed: next });
  if (held) $("heads").querySelector(`[data-layer="${l}"]`)?.focus();
  announce(`${data.layers[l].name}: ${next.has(l) ? "its units are taken together" : `${plural(look.shown[l].length, "unit")} shown`}.`);
}

function fitCanvases() {
  const { width, height } = look.geometry, { clientWidth, clientHeight } = $("scroll"), sharp = Math.min(devicePixelRatio || 1, 2);
  fitCanvas($("edges"), width, height, Math.min(sharp, Math.sqrt(12e6 / (width * height)), 8000 / Math.max(width, height)));
  fitCanvas($("lit"), clientWidth, clientHeight, sharp);
  look.dense = sharp;
}
function fitCanvas(canvas, width, height, dense) {
  canvas.width = Math.ceil(width * dense);
  canvas.height = Math.ceil(height * dense);
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  canvas.getContext("2d").setTransform(dense, 0, 0, dense, 0, 0);
}

// ---------------------------------------------------------------- edges

let colours = {};
function readColours() {
  const style = getComputedStyle(root), read = (key) => style.getPropertyValue(key).trim();
  colours = { 1: read("--excite"), "-1": read("--inhibit"), 0: read("--soft"), veil: read("--panel"), page: read("--raised"), ink: read("--ink") };
}

/** What is drawn: each edge in view, or all edges of a collapsed layer's pair in one line. */
function gather() {
  const lines = [], merged = new Map();
  for (let i = 0; i < state.shown; i++) {
    const edge = edges[i];
    if (!edgeInView(edge, look.visible)) continue;
    const from = endOf(edge.source), to = endOf(edge.target);
    if (from < nUnits && to < nUnits) lines.push(lineFor(from, to, Math.sign(edge.signed), edge.strength, edge.chosen, [edge]));
    else join(merged, from, to, edge, edge.share * Math.sign(edge.signed), edge.share);
  }
  look.lines = [...linesOf(merged), ...lines];
}

function join(merged, from, to, edge, signed, share) {
  const key = from * (nUnits + data.layers.length) + to, held = merged.get(key) ?? { from, to, edges: [], signed: 0, share: 0 };
  held.edges.push(edge);
  held.signed += signed;
  held.share += share;
  merged.set(key, held);
}
function linesOf(merged) {
  const strongest = new Map(), pairOf = ({ from, to }) => `${layerOf(from)}>${layerOf(to)}`;
  merged.forEach((each) => strongest.set(pairOf(each), Math.max(strongest.get(pairOf(each)) ?? 0, each.share)));
  return [...merged.values()].sort((a, b) => b.share - a.share).map((each) => lineFor(each.from, each.to, Math.sign(each.signed), Math.sqrt(each.share / strongest.get(pairOf(each))), undefined, each.edges));
}
const layerOf = (end) => (end < nUnits ? units[end].layer : end - nUnits);

function lineFor(from, to, sign, strength, chosen, some) {
  const line = curve(look.geometry, from, to);
  Object.assign(line, { from, to, sign, edges: some, width: 0.5 + strength * 4.5, opacity: 0.12 + 0.6 * strength ** 1.5 });
  line.dash = dashOf(chosen, line.width);
  if (known(chosen)) line.opacity *= 0.4 + 0.6 * chosen;
  if (line.skips && !state.skips) line.opacity *= 0.18;
  return line;
}
/** Solid for what nearly all bootstrap draws choose; broken the more, the fewer do. */
const dashOf = (chosen, width) => (!known(chosen) || chosen >= 0.8 ? [] : chosen >= 0.5 ? [5 + 2 * width, 3 + width] : [1 + 0.6 * width, 2.4 + width]);

function stroke(context, line) {
  context.strokeStyle = colours[line.sign];
  context.lineWidth = line.width;
  context.globalAlpha = line.opacity;
  context.setLineDash(line.dash);
  context.beginPath();
  context.moveTo(line.x0, line.y0);
  context.bezierCurveTo(line.cx0, line.cy0, line.cx1, line.cy1, line.x1, line.y1);
  endMark(line, line.sign, line.width).forEach(([x, y], i) => { if (i) context.lineTo(x, y); else context.moveTo(x, y); });
  context.stroke();
}

let turn = 0;
function drawAll() {
  const context = $("edges").getContext("2d"), mine = ++turn, { lines, geometry } = look;
  context.clearRect(0, 0, geometry.width, geometry.height);
  context.globalCompositeOperation = "destination-over";  // weaker ones, drawn later, lie beneath
  const some = (from) => {
    if (mine !== turn) return;
    const to = Math.min(lines.length, from + CHUNK);
    for (let i = from; i < to; i++) stroke(context, lines[i]);
    if (to < lines.length) requestAnimationFrame(() => some(to));
    else root.dataset.ready = "1";
  };
  some(0);
}

/** How many edges are drawn now. */
export const nDrawn = () => sum(look.lines.map((line) => line.edges.length));

// ---------------------------------------------------------------- light

let held = { id: null, visible: null, paths: null };
function pathsOfHeld(id) {
  if (held.id !== id || held.visible !== look.visible) held = { id, visible: look.visible, paths: pathsOf(units[id], look.visible) };
  return held.paths;
}

/** Lights the paths of the unit that is pointed at, or else of the one in focus; beside it, what is pinned or found. */
function light() {
  // under Probe the glow is what one looks at, and the paths of the unit in focus would veil it
  const subject = state.hovered ?? (state.panel === "probe" ? null : state.focus), ends = new Set([...state.pinned].filter(isShown));
  Object.assign(look, { lit: [], flows: new Map(), ends });
  if (known(subject) && look.visible[subject]) lightPaths(subject, ends);
  else look.found.forEach((id) => { if (isShown(id)) ends.add(id); });
  state.pinned.forEach((id) => { if (look.visible[id] && id !== subject) lightPinned(id, ends); });
  const line = lineOfEdge();
  if (line) { look.lit.push(line); ends.add(line.from).add(line.to); }
  paint();
}

function lightPaths(subject, ends) {
  const { flow, edges: through } = pathsOfHeld(subject), merged = new Map();
  const chosen = through.filter(({ share, edge }) => Math.abs(share) >= LEAST_LIT || edge.source === subject || edge.target === subject)
    .sort((a, b) => Math.abs(b.share) - Math.abs(a.share)).slice(0, MOST_LIT);
  for (const { edge, share } of chosen) join(merged, endOf(edge.source), endOf(edge.target), edge, edge.share * Math.sign(edge.signed), Math.abs(share));
  for (const { from, to, signed, share, edges: some } of [...merged.values()].sort((a, b) => a.share - b.share)) {
    const strength = Math.sqrt(Math.min(1, share)), line = lineFor(from, to, Math.sign(signed), 0, undefined, some);
    Object.assign(line, { width: 0.8 + 6 * strength, opacity: Math.min(0.95, 0.3 + 0.9 * strength) });
    line.dash = dashOf(some.length === 1 ? some[0].chosen : undefined, line.width);
    look.lit.push(line);
    ends.add(from).add(to);
  }
  ends.add(endOf(subject));
  for (let id = 0; id < nUnits; id++) if (flow[id] && id !== subject && ends.has(endOf(id))) look.flows.set(endOf(id), (look.flows.get(endOf(id)) ?? 0) + flow[id]);
}

function lightPinned(id, ends) {
  for (const edge of [...units[id].ins, ...units[id].outs]) {
    if (edge.place >= state.shown || !edgeInView(edge, look.visible)) continue;
    const line = lineFor(endOf(edge.source), endOf(edge.target), Math.sign(edge.signed), edge.strength, edge.chosen, [edge]);
    look.lit.push(Object.assign(line, { opacity: 0.3 + 0.5 * edge.strength }));
    ends.add(line.from).add(line.to);
  }
}

/** The edge that is pointed at, or the one whose panel is open. */
function lineOfEdge() {
  const edge = look.pointed ?? (state.panel === "edge" ? edges[state.edge] : null);
  if (!edge || !edgeInView(edge, look.visible)) return null;
  const line = lineFor(endOf(edge.source), endOf(edge.target), Math.sign(edge.signed), edge.strength, edge.chosen, [edge]);
  return Object.assign(line, { width: line.width + 2.5, opacity: 1 });
}

/** What is lit now: units and collapsed layers, and the signed share of those that paths of the subject pass through. */
export const litNow = () => ({ units: [...look.ends], shares: Object.fromEntries(look.flows) });

/**
 * A veil over what is seen of the graph, lit edges upon it, and holes in it where units are lit: the units themselves
 * are not touched, so that a pointer moving over a thousand of them costs the browser no new layout.
 */
function paint() {
  const canvas = $("lit"), scroll = $("scroll"), context = canvas.getContext("2d"), { clientWidth: width, clientHeight: height, scrollLeft, scrollTop } = scroll;
  context.setTransform(1, 0, 0, 1, 0, 0);
  if (look.veiled) context.clearRect(0, 0, canvas.width, canvas.height);
  look.veiled = look.ends.size > 0;
  $("stage").classList.toggle("dim", look.veiled);
  if (!look.veiled) return;
  context.setTransform(look.dense, 0, 0, look.dense, 0, 0);
  context.globalAlpha = VEIL;
  context.fillStyle = colours.veil;
  context.fillRect(0, 0, width, height);
  context.translate(-scrollLeft, -scrollTop);
  const right = scrollLeft + width;
  for (const line of look.lit) if (line.x1 > scrollLeft && line.x0 < right) stroke(context, line);
  uncover(context);
  context.clearRect(scrollLeft, scrollTop, width, HEAD - 4);  // the layers' names
}

function uncover(context) {
  const { size } = look, caption = captionOf(size), strongest = [...look.flows].filter(([, share]) => Math.abs(share) >= 0.005)
    .sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, size < 40 ? LABELLED_TINY : LABELLED);
  for (const end of look.ends) {
    const { x, y } = look.geometry.seats.get(end), rim = nodeOf(end).classList.length > 1 ? (size < 48 ? 3 : 6) : 2;  // no further than the gutter
    context.clearRect(x - rim, y - rim, size + 2 * rim, size + caption + rim);
  }
  context.globalAlpha = 1;
  context.setLineDash([]);
  context.lineWidth = 1.6;
  context.strokeStyle = colours.ink;
  context.font = `600 ${size < 40 ? 9.5 : 10.5}px system-ui, -apple-system, "Segoe UI", sans-serif`;
  for (const [end, share] of strongest) {
    const { x, y } = look.geometry.seats.get(end), text = signedPercent(share), high = size < 40 ? 12 : caption - 1, top = size < 40 ? y + size - high : y + size + 1;
    if (Math.abs(share) >= STRONG) { context.beginPath(); context.roundRect(x - 0.5, y - 0.5, size + 1, size + 1, 7); context.stroke(); }
    context.fillStyle = size < 40 ? colours.page : colours.veil;
    context.fillRect(x - 1, top, size < 40 ? context.measureText(text).width + 4 : size + 2, high);
    context.fillStyle = colours.ink;
    context.fillText(text, x + 1, top + high - (size < 40 ? 2.5 : 5));
  }
}

// ---------------------------------------------------------------- what is pointed at

function hover(unit) {
  clearTimeout(cardWaits);
  clearTimeout(darkWaits);
  if (!unit) {  // not at once: between two units nothing should flicker
    darkWaits = setTimeout(() => { set({ hovered: null }); if (!look.pointed) $("card").hidden = true; }, 70);
    return;
  }
  set({ hovered: look.visible[unit.id] ? unit.id : null });
  if (unit.id === state.focus) { $("card").hidden = true; return; }  // its panel says more
  cardWaits = setTimeout(() => showCard(unitCard(unit), nodes[unit.id].getBoundingClientRect()), $("card").hidden ? 140 : 0);
}

function unitCard(unit) {
  const shots = shotsOf(unit).slice(0, 4).map((shot) => picture(shot)), told = called(unit), sure = sureness(unit);
  return [shots.length ? make("div", { class: "shots" }, shots) : null,
    make("p", {}, told ? make("b", { class: "called" }, told) : null, make("b", {}, unit.name), known(unit.score) ? ` score ${figure(unit.score)}` : ""),
    sure ? make("p", {}, sure) : null, operated ? make("p", {}, "Activation ", make("b", {}, `${percent(operated.before[unit.id])} → ${percent(operated.after[unit.id])}`), " of its largest under the edit") : null, passing(unit), ends("Receives from", unit.ins, "source"), ends("Gives to", unit.outs, "target")];
}

/** How much of what the unit in focus receives or gives passes through this one. */
function passing(unit) {
  const focus = units[state.focus];
  if (!focus || focus === unit || !look.visible[focus.id]) return null;
  const share = pathsOf(focus, look.visible).flow[unit.id], before = data.layers[unit.layer].column < data.layers[focus.layer].column;
  return make("p", { class: "passing" }, share ? [make("b", {}, signedPercent(share)), ` of what ${called(focus) || focus.name} ${before ? "receives" : "gives"} passes here.`] : `Nothing that ${called(focus) || focus.name} receives or gives passes here.`);
}
function ends(title, list, end) {
  const mine = list.filter((edge) => look.visible[edge[end]]).slice(0, 3), side = end === "source" ? "ins" : "outs";
  return mine.length ? make("p", {}, `${title} `, mine.map((edge, i) => [i ? ", " : "", called(units[edge[end]]) || units[edge[end]].name, " ", make("b", { class: verb(edge) }, signedPercent(shareOf(edge, side)))])) : null;
}

function edgeCard(line) {
  const [edge] = line.edges, label = (end) => (end < nUnits ? called(units[end]) || units[end].name : data.layers[end - nUnits].name);
  const words = line.edges.length > 1 || line.from >= nUnits || line.to >= nUnits ? `${plural(line.edges.length, "edge")}; in balance ${line.sign < 0 ? "they inhibit" : "they excite"}.`
    : `${verb(edge)[0].toUpperCase()}${verb(edge).slice(1)}; score ${figure(edge.score)}, ${percent(edge.share)} of the attribution between the two layers.${sureness(edge) ? ` It is ${sureness(edge)}.` : ""}`;
  return [make("p", {}, make("b", {}, `${label(line.from)} → ${label(line.to)}`)), make("p", {}, words)];
}

function showCard(content, box) {
  const card = $("card");
  card.replaceChildren(...content.filter(Boolean));
  card.hidden = false;
  const wide = card.offsetWidth, high = card.offsetHeight, left = box.right + 14 + wide < innerWidth ? box.right + 14 : Math.max(4, box.left - 14 - wide);
  Object.assign(card.style, { left: `${left}px`, top: `${Math.max(8, Math.min(box.top - 8, innerHeight - high - 8))}px` });
}

/** The line nearest to a point of the stage, if a pointer there means it. */
function lineAt(x, y) {
  let best = null, least = NEAR;
  for (const line of look.lit.length ? [...look.lit, ...look.lines] : look.lines) {
    if (x < line.x0 - NEAR || x > line.x1 + NEAR || y < Math.min(line.y0, line.y1, line.cy0, line.cy1) - NEAR || y > Math.max(line.y0, line.y1) + NEAR) continue;
    const far = distance(line, x, y) - line.width / 2;
    if (far < least - 0.5) { least = far; best = line; }
  }
  return best;
}

function point(event) {
  const box = $("stage").getBoundingClientRect(), line = lineAt(event.clientX - box.left, event.clientY - box.top), edge = line?.edges.length === 1 ? line.edges[0] : null;
  $("stage").classList.toggle("on-edge", Boolean(line));
  if (edge !== look.pointed) { look.pointed = edge; light(); }
  if (line) showCard(edgeCard(line), { left: event.clientX, right: event.clientX, top: event.clientY });
  else if (state.hovered === null) $("card").hidden = true;
}
function leaveEdge() {
  $("stage").classList.remove("on-edge");
  if (look.pointed) { look.pointed = null; $("card").hidden = true; light(); }
}

export function togglePin(id) {
  const next = new Set(state.pinned), gone = next.delete(id);
  if (!gone) next.add(id);
  set({ pinned: next });
  announce(`${units[id].name} ${gone ? "is no longer pinned" : "is pinned"}.`);
}
export function toggleCut(id) {
  const next = { units: new Set(state.selected.units), edges: state.selected.edges }, gone = next.units.delete(id);
  if (!gone) next.units.add(id);
  set({ selected: next });
  announce(`${units[id].name} ${gone ? "is taken out of surgery" : "is selected for surgery"}.`);
}

function click(event) {
  const node = event.target.closest(".unit");
  if (!node) { if (look.pointed) set({ edge: look.pointed.place, panel: "edge" }); return; }
  if (node.layer !== undefined) toggleLayer(node.layer);
  else if (event.ctrlKey || event.metaKey) togglePin(node.unit.id);
  else if (event.shiftKey) toggleCut(node.unit.id);
  else goToUnit(node.unit);
}

function listen() {
  const stage = $("stage"), under = (event) => event.target.closest?.(".unit")?.unit ?? null;
  stage.addEventListener("pointerover", (event) => { if (event.pointerType === "mouse" && event.target.closest(".unit")) { leaveEdge(); hover(under(event)); } else if (event.pointerType === "mouse") hover(null); });
  stage.addEventListener("pointerleave", () => { hover(null); leaveEdge(); });
  let waits = 0;
  stage.addEventListener("pointermove", (event) => {
    if (event.pointerType !== "mouse" || event.target.closest(".unit, #heads")) return;
    cancelAnimationFrame(waits);
    waits = requestAnimationFrame(() => point(event));
  });
  stage.addEventListener("pointerdown", (event) => { if (event.pointerType !== "mouse" && !event.target.closest(".unit, #heads")) point(event); });
  stage.addEventListener("click", click);
  let scrolled = 0;
  $("scroll").addEventListener("scroll", () => {
    $("card").hidden = true;
    cancelAnimationFrame(scrolled);
    if (look.veiled) scrolled = requestAnimationFrame(paint);
  }, { passive: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); drawAll(); light(); });
  new ResizeObserver(() => {
    const { clientWidth, clientHeight } = $("scroll"), { room } = look;
    if (Math.abs(clientWidth - room.width) > 1 || Math.abs(clientHeight - room.height) > 1) place();
  }).observe($("scroll"));
}

// ---------------------------------------------------------------- for export

const rounded = (x) => Number(x.toFixed(1));
function pathText(line) {
  const marks = endMark(line, line.sign, line.width).map(([x, y], i) => `${i ? "L" : "M"}${rounded(x)} ${rounded(y)}`).join("");
  return `M${rounded(line.x0)} ${rounded(line.y0)}C${[line.cx0, line.cy0, line.cx1, line.cy1, line.x1, line.y1].map(rounded).join(" ")}${marks}`;
}

/** What the graph shows now, in pixels of the stage, for a vector drawing. */
export function drawing() {
  const { geometry, lines, lit, shown } = look, dim = look.veiled;
  const drawn = (list, faded) => list.map((line) => ({ d: pathText(line), stroke: colours[line.sign], width: line.width, opacity: line.opacity * (faded ? 0.25 : 1), dash: line.dash }));
  const seat = ([end, { x, y }]) => ({ id: end < nUnits ? end : shown[end - nUnits][0], label: end < nUnits ? undefined : plural(shown[end - nUnits].length, "unit"), x, y, size: geometry.size, opacity: dim && !look.ends.has(end) ? 0.3 : 1 });
  return {
    width: geometry.width, height: geometry.height, edges: [...drawn([...lines].reverse(), dim), ...drawn(lit, false)], units: [...geometry.seats].map(seat),
    heads: data.layers.map((layer, l) => ({ x: geometry.lanes[l].x + geometry.lanes[l].width / 2, text: layer.name, sub: `${count(shown[l].length)} of ${count(layer.width)}` })),
  };
}
