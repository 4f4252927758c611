// Two circuits laid over each other: who belongs to which, and how far they overlap, beside chance.
import { data, on, set, state } from "viscircuits/store.js";
import { count, figure, make, plural } from "viscircuits/words.js";
import { refill } from "viscircuits/pieces.js";

let element;

export const panel = {
  name: "compare",
  title: "Compare",
  available: () => Boolean(data.comparison),
  mount(place) {
    element = place;
    on(["members"], fill);
    fill();
  },
};

/** The three memberships, in the order of the contract's numbers. */
function members() {
  return [[1, `only ${data.title}`, "first"], [3, "both", "both"], [2, `only ${data.comparison.title}`, "second"]];
}

function fill() {
  const { member, edge_member: edgeMember } = data.comparison, shown = state.members ?? new Set([1, 2, 3]);
  const n = (list, which) => list.filter((each) => each === which).length;
  refill(element, make("h2", {}, data.title, " and ", data.comparison.title),
    make("fieldset", { class: "members" }, make("legend", {}, "Show"), members().map(([which, title, kind]) => make("label", {},
      make("input", { type: "checkbox", checked: shown.has(which), "data-key": `member${which}`, onchange: () => change(which) }),
      make("i", { class: `swatch ${kind}`, "aria-hidden": "true" }), make("b", {}, title), make("small", {}, `${plural(n(member, which), "unit")}, ${plural(n(edgeMember, which), "edge")}`)))),
    overlapSection());
}

function change(which) {
  const next = new Set(state.members ?? [1, 2, 3]);
  if (!next.delete(which)) next.add(which);
  set({ members: next });
}

function overlapSection() {
  const rows = data.comparison.overlap;
  if (!rows?.length) return null;
  return make("section", {}, make("h3", {}, "Overlap in each layer"),
    make("p", { class: "note" }, "Bar: units that both hold, as a share of those that either holds (Jaccard). Mark: what two random circuits of these sizes would share."),
    make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Overlap in each layer" }, make("table", { class: "overlap" },
      make("thead", {}, make("tr", {}, ["Layer", "Shared", "Jaccard", "p"].map((text, i) => make("th", { scope: "col", class: i ? "n" : null }, text)))),
      make("tbody", {}, rows.map((row) => make("tr", {}, make("th", { scope: "row" }, make("bdi", {}, row.layer)),
        make("td", { class: "n" }, count(row.shared), make("small", {}, `of ${count(row.size_a)} and ${count(row.size_b)}`)),
        make("td", { class: "n" }, figure(row.jaccard), make("small", {}, `chance ${figure(row.chance)}`), make("i", { class: "against-chance", "aria-hidden": "true", "--w": `${100 * row.jaccard}%`, "--chance": `${100 * row.chance}%` })),
        make("td", { class: "n" }, row.p_value < 1e-3 ? "< 0.001" : figure(row.p_value))))))));
}
