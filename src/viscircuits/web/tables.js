// The same data as tables: for a screen reader, a spreadsheet, or whoever wants to check.
import { data, edges, on, units } from "viscircuits/store.js";
import { $, called, count, figure, imageOf, known, make, percent, shotsOf, verb } from "viscircuits/words.js";
import { band } from "viscircuits/charts.js";
import { evaluated } from "viscircuits/evaluation.js";

const FEW = 200;
const draws = data.selection.confidence?.draws;

/** Fills each table when it is opened. */
export function mountTables() {
  const fills = { tables: unitTables, figures: figureTables, made: madeTables };
  const fill = (id) => $(id).lastElementChild.replaceChildren(...fills[id]());
  Object.keys(fills).forEach((id) => $(id).addEventListener("toggle", () => { if ($(id).open && !$(id).lastElementChild.childNodes.length) fill(id); }));
  on(["ablation"], () => { if ($("figures").open) fill("figures"); else $("figures").lastElementChild.replaceChildren(); });
  on(["notes"], () => { if ($("tables").open) fill("tables"); else $("tables").lastElementChild.replaceChildren(); });
}

function table(caption, head, rows) {
  return make("table", {}, make("caption", {}, caption), make("thead", {}, make("tr", {}, head.map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map((cell, i) => make(i ? "td" : "th", i ? {} : { scope: "row" }, cell))))));
}

/** Columns of the units' table: what stands above, and what it says of a unit; those that nothing fills are left out. */
function columns() {
  const strongest = (list, end) => list.slice(0, 3).map((edge) => `${edge.signed < 0 ? "−" : "+"} ${units[edge[end]].name} (${figure(edge.score)})`).join(", ") || "–";
  const whose = data.comparison && { 1: `${data.title} alone`, 2: `${data.comparison.title} alone`, 3: "both" };
  return [["Unit", (unit) => String(unit.index)], ["Name", called, units.some(called)], ["Score", (unit) => figure(unit.score)],
    [`Draws that choose it, of ${draws}`, (unit) => (known(unit.chosen) ? String(Math.round(unit.chosen * draws)) : "–"), Boolean(draws)], ["Belongs to", (unit) => whose[unit.member], Boolean(whose)],
    ["Images that excite it most", (unit) => shotsOf(unit).map(imageOf).join(", ") || "–", Boolean(data.sprite)],
    ...(data.probes?.probes ?? []).map((probe, i) => [`Activation on ${probe.name}`, (unit) => figure(data.probes.probes[i].activations[unit.id])]),
    ["Strongest incoming", (unit) => strongest(unit.ins, "source")], ["Strongest outgoing", (unit) => strongest(unit.outs, "target")]].filter(([, , there = true]) => there);
}

function unitTables() {
  const some = columns(), few = edges.slice(0, FEW);
  return [make("p", { class: "note" }, "+ excites, − inhibits; the score in brackets."),
    ...data.layers.map((layer) => table(`${layer.name}: ${layer.units.length} of ${layer.width} units`, some.map(([title]) => title), layer.order.map((id) => some.map(([, say]) => say(units[id]))))),
    table(`The ${few.length} edges shown first, of ${count(data.n_edges)}`, ["Source", "Target", "Effect", "Score", "Signed", "Share of its layer pair", ...(draws ? [`Draws that choose it, of ${draws}`] : [])],
      few.map((e) => [units[e.source].name, units[e.target].name, verb(e), figure(e.score), figure(e.signed), percent(e.share), ...(draws ? [known(e.chosen) ? String(Math.round(e.chosen * draws)) : "–"] : [])]))];
}

function figureTables() {
  const evaluation = evaluated();
  if (!evaluation) return [make("p", { class: "note" }, "Not measured.")];
  const show = (e) => (known(e?.value) ? `${figure(e.value)} ${band(e, figure)}` : "not measured"), parts = ["concept", "others"];
  const kinds = [...new Set([evaluation.baseline, ...(evaluation.circuits ?? [])].flatMap((row) => parts.flatMap((part) => Object.keys(row?.[part] ?? {}))))];
  const line = (name, row) => [name, ...parts.flatMap((part) => kinds.map((kind) => show(row?.[part]?.[kind]))), row.selectivity ? show(row.selectivity) : "–"];
  const curves = [["Removing units", evaluation.unit_curve], ["Pruning edges", evaluation.edge_curve]].filter(([, it]) => it?.x?.length).map(([caption, it]) =>
    table(caption, ["Series", "Measured", ...it.x.map(percent)], (it.series ?? []).flatMap((s) => [...parts, "selectivity", "faithfulness"].filter((part) => s[part]).map((part) => [s.name, part, ...s[part].map(show)]))));
  return [table(`Each circuit removed${evaluation.ablation ? `, ${evaluation.ablation} ablation` : ""}`, ["Circuit", ...parts.flatMap((part) => kinds.map((kind) => `${part}: ${kind}`)), "selectivity"],
    [...(evaluation.baseline ? [line("nothing removed", evaluation.baseline)] : []), ...(evaluation.circuits ?? []).map((row) => line(row.name, row))]), ...curves];
}

function madeTables() {
  const text = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, typeof value === "object" && JSON.stringify(value)?.length > 80 ? 1 : 0));
  const rows = (object) => Object.entries(object).map(([name, value]) => [name, make("pre", {}, text(value))]);
  return [table("Provenance", ["What", "Value"], rows(data.provenance)), table("Selection", ["What", "Value"], rows(data.selection))];
}
