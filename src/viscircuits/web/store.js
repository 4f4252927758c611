// What the page knows and what is in view. Units are numbers, layer by layer; edges stand in the order in which the
// slider reveals them. Everything in view that can be shared stands in the address, and is read back from it.
import { check } from "viscircuits/contract.js";

export const data = JSON.parse(document.getElementById("data").textContent);
const faults = check(data);
if (faults.length) throw new Error(`This page's data is not what the page expects. ${faults.slice(0, 3).join(" ")} Make the page anew with the version of viscircuits that made its folder.`);

export const units = data.layers.flatMap((layer, l) => layer.units.map((index, i) => ({
  id: 0, layer: l, index, score: layer.scores[i], chosen: layer.chosen[i], name: `${layer.name}:${index}`, ins: [], outs: [], rank: 0, member: 3,
})));
units.forEach((unit, id) => { unit.id = id; unit.member = data.comparison?.member[id] ?? 3; });
data.layers.forEach((layer) => layer.order.forEach((id, rank) => { units[id].rank = rank; }));

export const edges = data.edges.source.map((source, place) => ({
  place, source, target: data.edges.target[place], score: data.edges.score[place], signed: data.edges.signed[place],
  share: data.edges.share[place], chosen: data.edges.chosen[place] ?? undefined, strength: 0, member: data.comparison?.edge_member[place] ?? 3,
}));

/** Attribution of the pairs of layers that the first n edges cover, as a share. */
export const covered = [0];
connect();

function connect() {
  const pairOf = (edge) => units[edge.source].layer * data.layers.length + units[edge.target].layer, strongest = new Map();
  for (const edge of edges) {
    units[edge.source].outs.push(edge);
    units[edge.target].ins.push(edge);
    strongest.set(pairOf(edge), Math.max(strongest.get(pairOf(edge)) ?? 0, edge.share));
  }
  for (const edge of edges) {
    edge.strength = Math.sqrt(edge.share / (strongest.get(pairOf(edge)) || 1));
    covered.push(covered.at(-1) + edge.share / (strongest.size || 1));
  }
  for (const unit of units) {
    unit.ins.sort((a, b) => Math.abs(b.score) - Math.abs(a.score));  // all in the unit's own units; what leaves it is not
    unit.outs.sort((a, b) => b.share - a.share);
  }
}

const byName = new Map(units.map((unit) => [unit.name, unit.id]));
const layerByName = new Map(data.layers.map((layer, l) => [layer.name, l]));
const edgeName = (edge) => `${units[edge.source].name}>${units[edge.target].name}`;
let edgesByName = null;
export const unitNamed = (name) => units[byName.get(name)] ?? null;

// ---------------------------------------------------------------- state

export const FACES = ["exemplars", "visualisations", "heat"];
export const manyEdges = Math.min(edges.length, Math.max(120, Math.round(1.5 * units.length)));
const ABLATIONS = Object.keys(data.evaluation?.full?.by_ablation ?? {});
/** What surgery can put in the place of what is taken out; the evaluation's `ablation` is a choice of its own. */
export const REPLACEMENTS = ["zero", "mean", "resample", "noise"];

/** Whatever is in view. Sets are replaced, never changed, so that identity tells. */
const FRESH = {
  focus: null, edge: null, pinned: new Set(), hovered: null, selected: { units: new Set(), edges: new Set() },
  fraction: 1, shown: manyEdges, collapsed: new Set(), least: 0, skips: true, query: "", probe: null, probe2: null,
  face: "exemplars", mosaic: null, members: new Set([1, 2, 3]), ablation: ABLATIONS[0] ?? data.evaluation?.ablation ?? null,
  replacement: [ABLATIONS[0], data.evaluation?.ablation, data.provenance?.ablation].find((name) => REPLACEMENTS.includes(name)) ?? "mean", panel: "evaluation", alone: false, notes: 0, probes: 0,
};
export const state = { ...FRESH };

const listeners = [];
export function on(keys, listener) { listeners.push({ keys, listener }); }

/** Takes over what differs, writes the address, and tells those who asked for it. */
export function set(patch) {
  const changed = Object.keys(patch).filter((key) => !Object.is(state[key], patch[key]));
  if (!changed.length) return;
  Object.assign(state, patch);
  if (changed.some((key) => key in WRITTEN || key in MARKED || key === "selected")) remember(changed.includes("focus") && state.focus !== null);
  tell(changed);
}
function tell(changed) {
  for (const { keys, listener } of [...listeners]) if (keys.some((key) => changed.includes(key))) listener(changed);
}

/** How strongly each unit is lit by a probe: a number in [0, 1], or in [−1, 1] if signed; null if by none. */
export let activations = null;
export let activationsSigned = false;
export function setActivations(values, { signed = false } = {}) {
  if (values === null && activations === null) return;
  activations = values;
  activationsSigned = signed;
  tell(["activations"]);
}

/** What an edit did to the units on the image in view: {before, after}, shares of each unit's largest; null without one. */
export let operated = null;
export function setOperated(found) {
  if (found === null && operated === null) return;
  operated = found;
  tell(["operated"]);
}

// ---------------------------------------------------------------- address

const number = (low, high) => (text) => { const x = Number(text); return text !== "" && x >= low && x <= high ? x : undefined; };
const oneOf = (list) => (text) => (list.includes(text) ? text : undefined);
const short = (x) => String(Number(x.toPrecision(4)));

/** State → its name in the address, how it is written, how it is read; undefined where it cannot be. */
const WRITTEN = {
  focus: ["unit", (id) => units[id]?.name, (text) => byName.get(text)],
  edge: ["edge", (place) => edges[place] && edgeName(edges[place]), (text) => edgeNamed(text)],
  fraction: ["size", short, number(0, 1)], shown: ["edges", String, (text) => { const n = number(0, Infinity)(text); return n === undefined ? n : Math.min(edges.length, Math.round(n)); }], least: ["least", short, number(0, 1)],
  skips: ["skips", () => "dim", (text) => (text === "dim" ? false : undefined)],
  query: ["find", String, String], probe: ["probe", String, String], probe2: ["against", String, String],
  face: ["face", String, oneOf(FACES)], mosaic: ["pictures", (many) => (many ? "4" : "1"), (text) => text === "4"],
  alone: ["view", () => "graph", (text) => text === "graph" || undefined], ablation: ["ablation", String, oneOf(ABLATIONS)],
  replacement: ["replaced-by", String, oneOf(REPLACEMENTS)], panel: ["panel", String, String],
};
/** The same for what is a set of things, each with an entry of its own. */
const MARKED = {
  pinned: ["pin", (id) => units[id]?.name, (text) => byName.get(text)],
  collapsed: ["collapsed", (l) => data.layers[l]?.name, (text) => layerByName.get(text)],
  members: ["member", String, (text) => oneOf(["1", "2", "3"])(text) && Number(text)],
};

function edgeNamed(text) {
  edgesByName ??= new Map(edges.map((edge) => [edgeName(edge), edge.place]));
  return edgesByName.get(text);
}

function written() {
  const found = new URLSearchParams();
  for (const [key, [name, write]] of Object.entries(WRITTEN)) {
    if (state[key] === null || Object.is(state[key], FRESH[key])) continue;
    const text = write(state[key]);
    if (text !== undefined) found.set(name, text);
  }
  for (const [key, [name, write]] of Object.entries(MARKED)) {
    const same = state[key].size === FRESH[key].size && [...state[key]].every((each) => FRESH[key].has(each));
    if (!same) (state[key].size ? [...state[key]].map(write) : [""]).forEach((text) => { if (text !== undefined) found.append(name, text); });
  }
  for (const [name, ids, write] of [["cut", state.selected.units, (id) => units[id]?.name], ["cut-edge", state.selected.edges, (place) => edges[place] && edgeName(edges[place])]]) {
    ids.forEach((id) => found.append(name, write(id)));
  }
  return found.toString().replaceAll("%3A", ":");
}
let last = location.hash.slice(1), writing = null, wrote = 0;
/** Browsers allow some 200 changes of the address in 30 s: the first is written at once, those that follow hard upon it together. */
function remember(push) {
  clearTimeout(writing);
  const now = performance.now();
  if (push || now - wrote > 250) { wrote = now; write(push); } else writing = setTimeout(() => { wrote = performance.now(); write(false); }, 250);
}
/** The address of what is in view, also of what was only just changed. */
export function link() {
  clearTimeout(writing);
  write(false);
  return location.href;
}
addEventListener("pagehide", link);
function write(push) {
  const text = written();
  if (text === last) return;
  last = text;
  try { history[push ? "pushState" : "replaceState"](null, "", text ? `#${text}` : location.pathname + location.search); } catch { /* some browsers forbid it from disk and in frames */ }
}

/** The state that an address names; whatever it does not name is as at the start. */
function readAddress(hash) {
  const text = hash.replace(/^#/, "");
  const found = { ...FRESH, pinned: new Set(), selected: { units: new Set(), edges: new Set() }, collapsed: new Set() };
  const bare = unitNamed(safely(text));
  if (bare) return { ...found, focus: bare.id, panel: "unit" };  // a link to a unit may be short
  const given = new URLSearchParams(text);
  for (const [key, [name, , read]] of Object.entries(WRITTEN)) {
    const value = given.has(name) ? read(given.get(name)) : undefined;
    if (value !== undefined) found[key] = value;
  }
  for (const [key, [name, , read]] of Object.entries(MARKED)) {
    if (read && given.has(name)) found[key] = new Set(given.getAll(name).map(read).filter((each) => each !== undefined));
  }
  found.selected.units = new Set(given.getAll("cut").map((name) => byName.get(name)).filter((id) => id !== undefined));
  found.selected.edges = new Set(given.getAll("cut-edge").map(edgeNamed).filter((place) => place !== undefined));
  return found;
}
const safely = (text) => { try { return decodeURIComponent(text); } catch { return text; } };

Object.assign(state, readAddress(location.hash));
addEventListener("hashchange", () => {
  if (location.hash.slice(1) === last) return;
  last = location.hash.slice(1);
  const { notes, probes, hovered, ...found } = readAddress(location.hash);
  const changed = Object.keys(found).filter((key) => !Object.is(state[key], found[key]));
  Object.assign(state, found);
  tell(changed);
});
