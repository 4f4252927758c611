// The shapes of what Python gives the page, under the names of contract.py, and a check that says which field is wrong.
// A test on the Python side holds the two together.

const INTERVAL = "IntervalData | null";
export const SHAPES = {
  PageData: {
    schema: "text", version: "number", title: "text", command: "text",
    layers: "list of LayerData", edges: "EdgesData", n_edges: "number",
    sprite: "SpriteData | null", pictures: "list of list of tuple of number, number, number", names: "list of text", classes: "list of text",
    visualisations: "list of list of tuple of number, text", visualisation_sprite: "SpriteData | null",
    kernels: "KernelsData | null", contributions: "ContributionsData | null", probes: "ProbesData | null", comparison: "ComparisonData | null",
    sizes: "map of list of SizeData", notes: "map of NoteData", elsewhere: "map of list of text",
    evaluation: "map of anything | null", selection: "map of anything", provenance: "map of anything",
  },
  LayerData: { name: "text", width: "number", units: "list of number", scores: "list of number", chosen: "list of number", order: "list of number", column: "number" },
  EdgesData: { source: "list of number", target: "list of number", score: "list of number", signed: "list of number", share: "list of number", chosen: "list of number | null" },
  SpriteData: { uri: "text", tile: "number", columns: "number", rows: "number" },
  KernelsData: { edges: "list of number", side: "number", values: "text", scale: "list of number" },
  ContributionsData: { images: "list of text", edges: "list of number", values: "text" },
  Answer: { index: "number", label: "text", probability: "number" },
  ProbeData: { name: "text", kind: "text", answers: "list of Answer", activations: "list of number | null" },
  ProbesData: { sprite: "SpriteData | null", probes: "list of ProbeData", most: "list of number" },
  ComparisonData: { title: "text", member: "list of 1 | 2 | 3", edge_member: "list of 1 | 2 | 3", overlap: "list of map of anything" },
  IntervalData: { value: "number", low: "number", high: "number" },
  SizeData: { fraction: "number", n_units: "number", concept: "IntervalData", others: INTERVAL, selectivity: INTERVAL, faithfulness: INTERVAL, controls: "map of IntervalData" },
  NoteData: { name: "text", text: "text", by: "text", when: "text" },
};

const plain = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const SIMPLE = {
  text: (value) => typeof value === "string", number: (value) => typeof value === "number" && Number.isFinite(value),
  null: (value) => value === null, 1: (value) => value === 1, 2: (value) => value === 2, 3: (value) => value === 3,
};
const told = (value) => (value === undefined ? "nothing" : value === null ? "null" : Array.isArray(value) ? `a list of ${value.length}` : plain(value) ? `an object of ${Object.keys(value).slice(0, 6).join(", ") || "nothing"}` : JSON.stringify(value));

/** The first fault in `value` as a sentence, or null. A list or map is looked at up to its first fault. */
function fault(value, shape, where) {
  if (shape === "anything") return null;
  if (shape.startsWith("list of ")) {
    if (!Array.isArray(value)) return wrong(value, "a list", where);
    return first(value, (each, i) => fault(each, shape.slice(8), `${where}[${i}]`));
  }
  if (shape.startsWith("map of ") && !shape.endsWith(" | null")) {
    if (!plain(value)) return wrong(value, "an object", where);
    return first(Object.entries(value), ([key, each]) => fault(each, shape.slice(7), `${where}[${JSON.stringify(key)}]`));
  }
  if (shape.startsWith("tuple of ")) {
    const parts = shape.slice(9).split(", ");
    if (!Array.isArray(value) || value.length !== parts.length) return wrong(value, `a list of ${parts.length}`, where);
    return first(parts, (part, i) => fault(value[i], part, `${where}[${i}]`));
  }
  if (shape.includes(" | ")) {
    const kinds = shape.split(" | "), faults = kinds.map((kind) => fault(value, kind, where));
    if (faults.includes(null)) return null;
    const record = kinds.findIndex((kind) => kind in SHAPES);
    return record >= 0 && plain(value) ? faults[record] : wrong(value, kinds.join(" or "), where);
  }
  if (shape in SIMPLE) return SIMPLE[shape](value) ? null : wrong(value, shape, where);
  if (!plain(value)) return wrong(value, shape, where);
  return first(Object.entries(SHAPES[shape]), ([name, kind]) => fault(value[name], kind, where ? `${where}.${name}` : name));
}

function first(list, look) {
  for (let i = 0; i < list.length; i++) {
    const found = look(list[i], i);
    if (found) return found;
  }
  return null;
}
const wrong = (value, expected, where) => `${where || "The page's data"} should be ${expected}, but is ${told(value)}.`;

/** All that is wrong with the page's data, a sentence each; lists that belong together must be of one length. */
export function check(data) {
  if (!plain(data)) return [wrong(data, "an object", "")];
  if (data.schema !== "viscircuits/page" || data.version !== 2) return [`schema and version should be viscircuits/page and 2, but are ${told(data.schema)} and ${told(data.version)}: the page and its data are of different versions of viscircuits.`];
  const faults = Object.entries(SHAPES.PageData).map(([name, shape]) => fault(data[name], shape, name)).filter(Boolean);
  return faults.length ? faults : lengths(data);
}

function lengths(data) {
  const nUnits = data.layers.reduce((n, layer) => n + layer.units.length, 0), nEdges = data.edges.source.length;
  const same = (list, n, where) => (list.length === n ? null : `${where} should have ${n} entries, but has ${list.length}.`);
  const perhaps = (list, n, where) => (list.length ? same(list, n, where) : null);
  const ends = ["source", "target"].map((end) => (data.edges[end].every((id) => id >= 0 && id < nUnits) ? null : `edges.${end} names a unit that is not among the ${nUnits}.`));
  return [
    ...data.layers.flatMap((layer, i) => [perhaps(layer.scores, layer.units.length, `layers[${i}].scores`), perhaps(layer.chosen, layer.units.length, `layers[${i}].chosen`), same(layer.order, layer.units.length, `layers[${i}].order`)]),
    ...Object.keys(SHAPES.EdgesData).map((name) => same(data.edges[name], nEdges, `edges.${name}`)), ...ends,
    same(data.classes, data.names.length, "classes"), perhaps(data.pictures, nUnits, "pictures"), perhaps(data.visualisations, nUnits, "visualisations"),
    ...(data.comparison ? [same(data.comparison.member, nUnits, "comparison.member"), same(data.comparison.edge_member, nEdges, "comparison.edge_member")] : []),
    ...(data.probes?.probes ?? []).map((probe, i) => same(probe.activations, nUnits, `probes.probes[${i}].activations`)),
  ].filter(Boolean);
}
