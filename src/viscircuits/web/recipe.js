// An edit as Python and as commands, for a page from disk; a served page asks its server, which knows its folder.
import { data } from "viscircuits/store.js";
import { plural } from "viscircuits/words.js";

const CONSTANT = ["zero", "mean"];  // ablations that weights can say
const CIRCUIT = { schema: "viscircuits/circuit", version: 1 };

/** The folder that holds this page, as far as the page can know. */
function folder() {
  if (location.protocol !== "file:") return "DIR";
  const path = decodeURIComponent(location.pathname).replace(/\/[^/]*$/, "");
  return /^\/[A-Za-z]:/.test(path) ? path.slice(1) : path || "/";
}

/** A text as a literal that Python reads: JSON's is one, once what is not ASCII is spelled out. */
const literal = (text) => JSON.stringify(text).replace(/[^\x20-\x7e]/gu, (sign) => {
  const code = sign.codePointAt(0).toString(16);
  return code.length > 4 ? `\\U${code.padStart(8, "0")}` : `\\u${code.padStart(4, "0")}`;
});
const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\"'\"'")}'`);
const tuple = (numbers) => `(${numbers.join(", ")}${numbers.length === 1 ? "," : ""})`;

/** The edit's units, layer by layer, ascending. */
function byLayer(edit) {
  return data.layers.map((layer) => ({ name: layer.name, width: layer.width, units: edit.units.filter(([name]) => name === layer.name).map(([, index]) => index).sort((a, b) => a - b) })).filter((layer) => layer.units.length);
}

/** A script that opens the network without the edit's units and edges, and shows what images then are. */
export function python({ units, edges, ablation }) {
  const layers = byLayer({ units }), all = [...new Set([...units, ...edges.flat()].map(([name]) => name))];
  const what = [units.length ? plural(units.length, "unit") : null, edges.length ? plural(edges.length, "edge") : null].filter(Boolean).join(" and ");
  const unit = ([name, index]) => `Unit(${literal(name)}, ${index})`, entries = (of) => layers.map((layer) => `\n    ${literal(layer.name)}: ${of(layer)},`).join("");
  const constant = CONSTANT.includes(ablation), measured = ablation !== "zero";
  return `# The network of the circuit ${literal(data.title)} without ${what}: each value becomes its ${ablation}.
# Give this script images, and it says what the network calls them before and after.
import sys

import torch

from viscircuits import Circuit, Edge, Unit, ablate, batches, measure, open_images, prune_edges
from viscircuits.discovery import found_with, model_of

circuit = Circuit.load(${literal(folder())})
spec = model_of(circuit)
removed = Circuit(units={${entries((layer) => tuple(layer.units))}\n}, widths={${entries((layer) => layer.width)}\n})
edges = [${edges.map(([a, b]) => `\n    Edge(${unit(a)}, ${unit(b)}, score=0.0, signed=0.0),`).join("")}\n]
ablation = ${literal(ablation)}
reference = ${measured ? `measure(spec, found_with(circuit.provenance, "reference"), [${all.map(literal).join(", ")}]${constant ? ", n_samples=0" : ""})` : "None"}


def answers(images):
    with torch.no_grad():
        return [spec.classes[i][0] if spec.classes else f"output {i}" for i in spec.model(images).argmax(1).tolist()]


for batch in batches(open_images(sys.argv[1:]), spec.transform, 8):
    before = answers(batch.images)
    with ablate(spec, removed, ablation, reference=reference), prune_edges(spec, edges, ablation, reference=reference):
        after = answers(batch.images)
    for name, old, new in zip(batch.names, before, after):
        print(f"{name}: {old} before, {new} after")
`;
}

/** Commands that write the network without the edit's units, or a sentence that says why no weights can. */
export function command(edit) {
  if (edit.edges.length) return "# Weights cannot say that an edge is gone: export the edit as Python, or take the edges out of it.\n";
  if (!CONSTANT.includes(edit.ablation)) return `# ${edit.ablation} ablation draws anew for each image, which no weights can: use zero or mean, or export the edit as Python.\n`;
  const { model, weights, weights_from } = data.provenance ?? {};
  const circuit = { ...CIRCUIT, layers: byLayer(edit).map(({ name, width, units }) => ({ name, n_units: width, units, scores: [] })), edges: [], selection: {}, provenance: { model, weights, weights_from } };
  return `cat > edit.json <<'END'\n${JSON.stringify(circuit)}\nEND\nviscircuits edit ${quoted(folder())} --circuit edit.json --ablation ${edit.ablation} --out edited.safetensors\n`;
}
