// What was measured: the verdict, the controls beside it, the curves, and which images served. One ablation at a time.
import { data, on, set, state } from "viscircuits/store.js";
import { count, figure, known, make, plural } from "viscircuits/words.js";
import { band, chart, key } from "viscircuits/charts.js";

const MEASURES = {
  accuracy: { word: "accuracy", share: true, sentence: (v) => `recognises ${v}` },
  agreement: { word: "agreement with the untouched network", share: true, sentence: (v) => `answers as the untouched network does on ${v}` },
  cosine: { word: "cosine similarity to the untouched network", share: false, sentence: (v) => `keeps a cosine similarity of ${v}` },
};
const BECOMES = { zero: "zero", mean: "its mean over reference images", resample: "its value on another image", noise: "noise" };
const ablations = Object.keys(data.evaluation?.full?.by_ablation ?? {});

/** The evaluation under the ablation in view, or null if there is none. */
export function evaluated() {
  const part = data.evaluation?.full?.by_ablation?.[state.ablation]?.removed;
  return part ? { ...data.evaluation, ...part } : data.evaluation;
}
/** What is measured, and how its figures are written. */
export function measured(evaluation) {
  const name = evaluation?.measure ?? "accuracy", measure = { name, ...(MEASURES[name] ?? { word: name, share: false, sentence: (v) => `has a mean ${name} of ${v}` }) };
  return {
    ...measure,
    read: (part) => part?.[name] ?? part?.accuracy ?? null,
    amount: (x) => (!known(x) ? "–" : measure.share ? `${Math.round(x * 100)}\u202f%` : figure(x)),
    points: (x) => (!known(x) ? "–" : (measure.share ? String(Math.round(x * 100)) : figure(x)).replace("-", "−")),
  };
}

export const panel = {
  name: "evaluation",
  title: "Evaluation",
  available: () => true,
  mount(element) {
    const fill = () => element.replaceChildren(...contents().flat(Infinity).filter((child) => child !== null && child !== ""));
    on(["ablation"], () => { const held = element.contains(document.activeElement); fill(); if (held) element.querySelector("select")?.focus(); });
    fill();
  },
};

function contents() {
  const evaluation = evaluated();
  if (!evaluation) {
    return [make("p", { class: "verdict" }, make("b", {}, "Not measured.")),
      make("p", { class: "note" }, "This page shows which units were chosen, not what they do. ", make("code", {}, "viscircuits evaluate"), " removes them on other images and measures what is lost."), confidence(), imagesUsed(null)];
  }
  const measure = measured(evaluation), ablation = evaluation.ablation ?? "an unrecorded", edge = evaluation.edge_curve;
  return [verdict(evaluation, measure), choice(),
    make("p", { class: "note" }, `${ablations.length > 1 ? "" : evaluation.ablation ? `${ablation[0].toUpperCase()}${ablation.slice(1)} ablation; ` : "Unrecorded ablation; "}${ablations.length > 1 ? measure.word[0].toUpperCase() + measure.word.slice(1) : measure.word}. Brackets and bands are 95 % intervals.`),
    make("h3", {}, "What is lost, beside controls of the same size"), effectTable(evaluation, measure),
    make("p", { class: "note" }, `Selectivity: fall on the concept − fall on the others${measure.share ? ", in percentage points" : ""}. Hollow: before; filled: after.`),
    imagesUsed(evaluation), confidence(), make("h3", {}, "The circuit by itself"),
    make("dl", { class: "images" }, alone(evaluation.faithfulness, "Faithfulness", "what it recovers alone; 1 is all"), alone(evaluation.completeness, "Completeness", "what is left without it; 0 is complete")),
    curve(evaluation.unit_curve, measure, "Removing more and more of the units", "share of the circuit's units removed"),
    curve(edge, measure, edge ? `Pruning edges ${edge.source ?? ""} → ${edge.target ?? ""}` : "", "share of these edges pruned")];
}

function choice() {
  if (ablations.length < 2) return null;
  return make("label", { class: "choice" }, make("span", {}, "A removed value becomes"), make("select", { id: "ablation", onchange: (event) => set({ ablation: event.target.value }) },
    ablations.map((name) => make("option", { value: name, selected: name === state.ablation }, BECOMES[name] ? `${BECOMES[name]} (${name})` : name))));
}

const alone = (e, name, text) => [make("dt", {}, name), make("dd", {}, known(e?.value) ? [`${figure(e.value)} ${band(e, figure)} `, make("span", { class: "note" }, text)] : "not measured")];

function verdict(evaluation, measure) {
  const ours = evaluation.circuits?.find((row) => row.name === "circuit") ?? evaluation.circuits?.[0], { read, amount } = measure;
  const before = read(evaluation.baseline?.concept), after = read(ours?.concept);
  if (!known(after?.value)) return make("p", { class: "verdict" }, "The effect of removing the circuit was not measured.");
  const otherBefore = read(evaluation.baseline?.others), otherAfter = read(ours?.others);
  const [said, rest] = measure.sentence("\u0000").split("\u0000"), of = measure.share ? " of the concept's test images" : " on the concept's test images";
  const others = known(otherAfter?.value)
    ? [measure.share ? "; of other images " : "; on other images ", make("b", {}, amount(otherAfter.value)), known(otherBefore?.value) ? `, before ${amount(otherBefore.value)}.` : "."]
    : ". Other images were not measured.";
  return make("p", { class: "verdict" }, "Without this circuit the network ", said, make("b", {}, amount(after.value)), rest, of, known(before?.value) ? `, before ${amount(before.value)}` : "", others);
}

function effectTable(evaluation, measure) {
  const rows = evaluation.circuits ?? [], { read, amount, points } = measure;
  if (!rows.length) return "";
  const cell = (row, part) => {
    const before = read(evaluation.baseline?.[part]), after = read(row[part]);
    if (!known(after?.value)) return make("td", {}, "not measured");
    return make("td", {}, `${amount(before?.value)} → ${amount(after.value)}`, make("small", {}, band(after, points)), measure.share || measure.name === "cosine" ? change(before?.value, after.value) : "");
  };
  return make("table", {},
    make("thead", {}, make("tr", {}, ["Removed", "Concept", "Others", "Selectivity"].map((text, i) => make("th", { scope: "col", class: i === 3 ? "n" : null }, text)))),
    make("tbody", {}, rows.map((row) => make("tr", { class: row.name === "circuit" ? "ours" : null },
      make("th", { scope: "row" }, row.name === "circuit" ? "this circuit" : row.name, row.draws > 1 ? make("small", { class: "note" }, ` mean of ${row.draws}`) : null),
      cell(row, "concept"), cell(row, "others"), make("td", { class: "n" }, points(row.selectivity?.value), make("small", {}, band(row.selectivity, points)))))));
}

function change(before, after) {
  const at = (x) => 4 + 76 * Math.max(0, Math.min(1, x));
  if (!known(before) || !known(after)) return "";
  return make("svg", { class: "change", viewBox: "0 0 84 9", "aria-hidden": "true" },
    make("line", { x1: 4, x2: 80, y1: 4.5, y2: 4.5, stroke: "var(--line)", "stroke-width": 1 }), make("line", { x1: at(before), x2: at(after), y1: 4.5, y2: 4.5, stroke: "var(--ink)", "stroke-width": 2 }),
    make("circle", { cx: at(before), cy: 4.5, r: 3, fill: "var(--page)", stroke: "var(--ink)", "stroke-width": 1.2 }), make("circle", { cx: at(after), cy: 4.5, r: 3.5, fill: "var(--ink)" }));
}

function curve(it, measure, heading, xTitle) {
  if (!it?.x?.length || !it.series?.length) return [];
  const fall = `fall on the concept − fall on the others${measure.share ? ", points" : ""}`;
  const parts = [["concept", "On images of the concept", measure.word], ["others", "On other images", measure.word], ["selectivity", "Selectivity", fall]];
  const charts = parts.map(([part, title, yTitle]) => chart({
    title, xTitle, yTitle: yTitle[0].toUpperCase() + yTitle.slice(1), x: it.x, range: part === "selectivity" ? [0, 0.2] : [0, 1], write: part === "selectivity" ? measure.points : measure.amount,
    series: it.series.map((s, i) => ({ name: s.name, values: s[part], pen: i })),
  })).filter(Boolean);
  return charts.length ? [make("h3", {}, heading), key(it.series.map((s) => s.name)), ...charts] : [];
}

// ---------------------------------------------------------------- which images, and what others would give

/** Where images came from; of a long path the last two parts, which is what a reader knows it by. */
function address(thing) {
  const text = thing && typeof thing === "object" ? thing.address ?? thing.name ?? null : thing ?? null;
  return typeof text === "string" ? text.replace(/\/?(?:[^\s/]+\/){3,}(?=[^\s/]+\/[^\s/]+)/g, "…/") : text;
}

function imagesUsed(evaluation) {
  const made = data.provenance, found = made.images, reference = made.reference, tested = evaluation?.images;
  const n = (set_) => set_?.n ?? set_?.n_images ?? set_?.names?.length, ofFound = known(made.n_images) ? plural(made.n_images, "image") : null;
  const tell = (set_, otherwise) => {
    if (!set_) return otherwise;
    const skipped = Array.isArray(set_.skipped) ? set_.skipped.length : set_.skipped;
    return [known(n(set_)) ? plural(n(set_), "image") : null, address(set_), skipped ? `${skipped} skipped` : null].filter(Boolean).join(" · ") || otherwise;
  };
  const who = found?.digests && tested?.concept?.digests ? "digests" : "names";
  const used = new Set(found?.[who] ?? []), both = (tested?.concept?.[who] ?? []).filter((each) => used.has(each)).length;
  const first = typeof found === "string" ? [ofFound, address(found)].filter(Boolean).join(" · ") : tell(found, ofFound ?? "not recorded");
  return [make("h3", {}, "Images"), make("dl", { class: "images" },
    make("dt", {}, "Used to find"), make("dd", {}, first),
    reference ? [make("dt", {}, "Set against"), make("dd", {}, typeof reference === "string" ? address(reference) : tell(reference, ""))] : null,
    make("dt", {}, "Used to test"), make("dd", {}, tested?.concept ? `concept: ${tell(tested.concept, "not recorded")}` : evaluation ? "not recorded" : "none"),
    tested?.others ? [make("dt", {}), make("dd", {}, `others: ${tell(tested.others, "not recorded")}`)] : null),
    both ? make("p", { class: "note" }, make("strong", {}, `${plural(both, "test image")} also served to find the circuit.`), " The figures are that much too kind.") : null];
}

function confidence() {
  const found = data.selection.confidence, stopped = data.provenance.stopped;
  if (!found) return [];
  const { mean, low, high } = found.with_circuit;
  const needed = stopped ? ` ${stopped.stable ? "Images were taken in until that was" : "All images were taken in and it did not become"} at least ${figure(stopped.rule.overlap)} at ${stopped.rule.patience} looks in a row.` : "";
  return [make("h3", {}, "Would other images give this circuit?"),
    make("p", { class: "note" }, `Circuits from ${count(found.draws)} bootstrap draws of the images that found it share `, make("b", {}, figure(found.overlap)),
      ` of their units with one another (Jaccard), and ${figure(mean)} [${figure(low)}, ${figure(high)}] with this circuit. The first is about what as many other images of the kind would give, or somewhat more.${needed}`)];
}
