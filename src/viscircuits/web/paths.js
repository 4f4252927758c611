// How much flows from unit to unit: products of shares along paths, signed. Numbers in, numbers out.
import { data, state, units } from "viscircuits/store.js";
import { known, sum } from "viscircuits/words.js";

/** Units by column, so that every edge leads from an earlier to a later one. */
const inOrder = [...units].sort((a, b) => data.layers[a.layer].column - data.layers[b.layer].column || a.layer - b.layer);
/**
 * What an edge counts for among all that enter a unit, or leave it. Scores of edges that enter one unit are all in its
 * own units, whatever layer they come from. Edges that leave one are in those of their targets, so there an edge counts
 * by its share of its pair of layers.
 */
export const weight = { ins: (edge) => Math.abs(edge.score), outs: (edge) => edge.share };
const whole = Object.fromEntries(["ins", "outs"].map((list) => [list, units.map((unit) => sum(unit[list].map(weight[list])) || 1)]));

/** An edge's signed share of all that its target receives ("ins"), or its source gives ("outs"). */
export const shareOf = (edge, list) => (Math.sign(edge.signed) * weight[list](edge)) / whole[list][list === "ins" ? edge.target : edge.source];

/**
 * The paths that end or begin at a unit, through units that are in view.
 *
 * `flow[u]` is the share of what `unit` receives (for units before it) or gives (for those after it) that passes through
 * u: over all paths between them, the product of the edges' shares of their target's (or source's) whole, with the sign
 * of their effects. `edges` has each edge with the share that passes through it.
 */
export function pathsOf(unit, visible) {
  const flow = new Float64Array(units.length), through = [];
  flow[unit.id] = 1;
  const place = inOrder.indexOf(unit);
  for (let i = place; i >= 0; i--) spread(inOrder[i], "ins", "source", flow, through, visible);
  const before = flow.slice();
  flow.fill(0);
  flow[unit.id] = 1;
  for (let i = place; i < inOrder.length; i++) spread(inOrder[i], "outs", "target", flow, through, visible);
  for (let id = 0; id < flow.length; id++) if (before[id]) flow[id] = before[id];
  return { flow, edges: through };
}

function spread(from, list, end, flow, through, visible) {
  const arrived = flow[from.id];
  if (!arrived) return;
  for (const edge of from[list]) {
    if (!visible[edge[end]]) continue;
    const share = arrived * shareOf(edge, list);
    flow[edge[end]] += share;
    through.push({ edge, share });
  }
}

// ---------------------------------------------------------------- which units are in view

const largest = data.layers.map((layer) => Math.max(...layer.scores.map(Math.abs), 1e-30));
/** A unit's score as a share of the largest in its layer. */
export const relative = (unit) => (known(unit.score) ? Math.max(0, unit.score) / largest[unit.layer] : 1);

/** Best first: place of each unit among those of its layer, ties in the layer's order, as when circuits are shrunk. */
const place = new Int32Array(units.length);
data.layers.forEach((layer, l) => {
  const mine = units.filter((unit) => unit.layer === l);
  [...mine].sort((a, b) => (b.score ?? 0) - (a.score ?? 0) || a.index - b.index).forEach((unit, rank) => { place[unit.id] = rank; });
});
export const scored = data.layers.every((layer) => layer.scores.length === layer.units.length) && units.length > 0;

/** How many units of a layer the circuit of a size keeps: ⌈fraction · n⌉, with slack for 0.1 · 30 = 3.0000000000000004. */
export const keeps = (layer, fraction) => Math.ceil(fraction * layer.units.length - 1e-9);

/** For each unit 1 if it is in view: in the circuit of the chosen size, with score enough, of a chosen membership. */
export function inView() {
  const kept = data.layers.map((layer) => keeps(layer, state.fraction));
  return Uint8Array.from(units, (unit) => place[unit.id] < kept[unit.layer] && relative(unit) >= state.least && state.members.has(unit.member));
}
export const edgeInView = (edge, visible) => visible[edge.source] && visible[edge.target] && state.members.has(edge.member);
export const nUnitsAt = (fraction) => sum(data.layers.map((layer) => keeps(layer, fraction)));
