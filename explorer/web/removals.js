import { h, signed, tableHead } from "./dom.js";

const ROWS = { nothing: "nothing", random: "at random", harmful: "most harmful", helpful: "most helpful" };
// As many marks as have room.
const CHANCES = [[0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999], [0.001, 0.1, 0.5, 0.9, 0.999], [0.001, 0.5, 0.999], [0.5]];

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

/** Dots: what each training without the images gave; a rhombus: what the scores foretold. */
function chart(rows) {
  const all = rows.flatMap((row) => [...row.measured, row.foretold]);
  const [low, high] = [Math.min(...all, -1) - 0.5, Math.max(...all, 1) + 0.5];
  const x = (value) => 100 + (480 * (value - low)) / (high - low);
  const ticks = CHANCES.map((chances) => chances.map((chance) => [chance, Math.log(chance / (1 - chance))]));
  const apart = (row) => row.every(([, odds], k) => k === 0 || x(odds) - x(row[k - 1][1]) >= 50);
  const inside = (ticks.find(apart) ?? []).filter(([, odds]) => odds > low && odds < high);
  const line = ({ kind, measured, foretold }, k) => {
    const y = 20 + 34 * k;
    const rhombus = `M${x(foretold) - 7},${y}l7,-7l7,7l-7,7z`;
    return h(
      "g",
      { class: kind },
      h("text", { x: 92, y: y + 4, "text-anchor": "end" }, ROWS[kind]),
      h("line", { x1: 100, x2: 580, y1: y, y2: y, class: "axis" }),
      (kind === "helpful" || kind === "harmful") && h("path", { d: rhombus, class: "foretold" }),
      measured.map((value) => h("circle", { cx: x(value), cy: y, r: 5 })),
    );
  };
  return h(
    "svg",
    { viewBox: "0 0 600 180", class: "chart", "aria-hidden": "true" },
    inside.map(([chance, odds]) => [
      h("line", { x1: x(odds), x2: x(odds), y1: 8, y2: 140, class: "axis" }),
      h("text", { x: x(odds), y: 156, "text-anchor": "middle" }, `${Number((100 * chance).toFixed(1))} %`),
    ]),
    h("text", { x: 340, y: 174, "text-anchor": "middle" }, "probability of the right class"),
    rows.map(line),
  );
}

/** What leaving out these images did beyond leaving out as many at random: foretold and measured change. */
function beyondRandom(removal, kind) {
  const measured = mean(removal[kind].measured) - mean(removal.random.measured);
  return { foretold: removal[kind].foretold - removal.random.foretold, measured };
}

/** How foretold and measured agree over all photographs that were trained again. */
function verdict(removals) {
  const pairs = removals.flatMap((removal) => ["helpful", "harmful"].map((kind) => beyondRandom(removal, kind)));
  const agree = pairs.filter(({ foretold, measured }) => foretold * measured > 0);
  const ratios = agree.map(({ foretold, measured }) => measured / foretold).sort((a, b) => a - b);
  const size = ratios.length ? ` and is ${Math.round(ratios[0])} to ${Math.round(ratios.at(-1))} times as large` : "";
  return (
    `Over the ${removals.length} photographs for which this was done the measured change goes the way foretold in ` +
    `${agree.length} of ${pairs.length} cases${size}: the sum of the scores says which way a large group pulls, not by ` +
    "how much. Single networks scatter widely."
  );
}

/** What was left out → the log-odds of each network, their mean, and the change against as many left out at random. */
function outcomes(removal) {
  const columns = ["left out", "log-odds of each network", "mean", "change measured", "change foretold"];
  const cells = (kind) => {
    const measured = kind === "nothing" ? removal.nothing : removal[kind].measured;
    const change = kind === "helpful" || kind === "harmful" ? beyondRandom(removal, kind) : null;
    return h(
      "tr",
      { class: kind },
      h("th", { scope: "row" }, kind === "nothing" ? "nothing" : `${removal.removed} ${ROWS[kind]}`),
      h("td", {}, measured.map((value) => signed(value, 1)).join("  ")),
      h("td", {}, signed(mean(measured), 2)),
      h("td", {}, change ? signed(change.measured, 2) : ""),
      h("td", {}, change ? signed(change.foretold, 2) : ""),
    );
  };
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "group", "aria-label": "Log-odds of the right class, as a table" },
    h(
      "table",
      { "aria-label": "Log-odds of the right class" },
      tableHead(columns),
      h("tbody", {}, Object.keys(ROWS).map(cells)),
    ),
  );
}

/** One experiment: what was done, what came, what was foretold. */
function showRemoval(removal, data) {
  const base = mean(removal.random.measured);
  const rows = Object.keys(ROWS).map((kind) => ({
    kind,
    measured: kind === "nothing" ? removal.nothing : removal[kind].measured,
    foretold: base + (kind in { helpful: 1, harmful: 1 } ? beyondRandom(removal, kind).foretold : 0),
  }));
  const task =
    `${removal.removed} of ${removal.of.toLocaleString("en")} training images, ${removal.by}, were left out, and networks ` +
    "trained again from the start. Each dot is one network; a rhombus is what the scores foretell, counted from the mean " +
    "of those without as many at random.";
  const alike = data.removals.filter((one) => one.of === removal.of && one.removed === removal.removed);
  return [h("p", {}, task), chart(rows), outcomes(removal), h("p", { class: "quiet" }, verdict(alike))];
}

/** "Train without them": only for the test images for which it was really done. */
export function removalPanel(state, { data }) {
  const removals = data.removalsOf(state.test);
  if (!removals.length) return null;
  const detail = h("div");
  const choose = (chosen) => {
    detail.replaceChildren(...showRemoval(removals[chosen], data));
    buttons.forEach((button, k) => button.setAttribute("aria-pressed", String(k === chosen)));
  };
  const buttons = removals.map(({ removed, of }, k) =>
    h("button", { type: "button", onclick: () => choose(k) }, `${removed} of ${of.toLocaleString("en")}`),
  );
  choose(removals.length - 1);
  return h(
    "section",
    { class: "removal", "aria-label": "Train without them" },
    h("h3", {}, "Train without them: it was done"),
    removals.length > 1 && h("div", { class: "row", role: "group", "aria-label": "How many were left out" }, buttons),
    detail,
  );
}
