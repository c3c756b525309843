import { title } from "./cards.js";
import { h, percent } from "./dom.js";

/** How steady the lists are, as measured: a row for each number of trainings. */
function steadyTable({ steady, tests, sizes }) {
  if (!steady.helpful.length) return null;
  const cell = ([share, half]) => h("td", {}, `${percent(share)} ± ${Math.max(1, Math.round(100 * half))} %`);
  const row = (helpful, k) =>
    h("tr", {}, h("th", { scope: "row" }, String(k + 1)), cell(helpful), cell(steady.harmful[k]));
  const head = () =>
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        ["trainings", "helpful", "harmful"].map((text) => h("th", { scope: "col" }, text)),
      ),
    );
  const what =
    `Of the ${sizes.shown} pictures that so many trainings show, the share that as many other trainings have among ` +
    `their first ${sizes.top}: mean over ${tests.size} photographs and its 95 % interval over them.`;
  return [
    h("h3", {}, "How steady are the pictures?"),
    h("p", {}, what),
    h("table", { "aria-label": what }, head(), h("tbody", {}, steady.helpful.map(row))),
  ];
}
/** What one sees here, and what it does not say. */
export function makeAbout({ data }) {
  const about = data.words.about ?? [
    "A score estimates what training without an image would do to a prediction: above 0 the image helped, below 0 it harmed.",
  ];
  const element = h(
    "div",
    { class: "prose" },
    title("What is this?"),
    about.map((text) => h("p", {}, text)),
    steadyTable(data) ?? [],
    h("h3", {}, "Keys, and links"),
    h("p", {}, "Arrows move among photographs and in the matrix, 1 to 6 guess."),
    h(
      "p",
      {},
      "The address of the page (in a notebook: the explorer’s “state”) always names what is shown: send it to somebody.",
    ),
  );
  return { element, update: () => {} };
}
