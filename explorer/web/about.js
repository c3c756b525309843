import { title } from "./cards.js";
import { h, percent, tableHead } from "./dom.js";

/** How steady the lists are, as measured: a row for each number of trainings. */
function steadyTable({ steady, tests, sizes }) {
  if (!steady.helpful.length || !sizes.top) return null;
  const cell = ([share, half]) => h("td", {}, `${percent(share)} ± ${Math.max(1, Math.round(100 * half))} %`);
  const row = (helpful, k) =>
    h("tr", {}, h("th", { scope: "row" }, String(k + 1)), cell(helpful), cell(steady.harmful[k]));
  const what =
    `Of the ${sizes.shown} pictures that so many trainings show, the share that as many other trainings have among ` +
    `their first ${sizes.top}: mean over ${tests.size} photographs and its 95 % interval over them.`;
  return [
    h("h3", {}, "How steady are the pictures?"),
    h("p", {}, what),
    h("table", { "aria-label": what }, tableHead(["trainings", "helpful", "harmful"]), h("tbody", {}, steady.helpful.map(row))),
  ];
}

/** Whose harm it is where the answer is wrong: counted over what is shown. */
function rivals(data) {
  let [harmful, ofTheAnswer, ofTheLabel] = [0, 0, 0];
  for (let test = 0; test < data.tests.size; test += 1) {
    if (data.answer(test) === null || data.isRight(test)) continue;
    for (const { train } of data.list("harmful", data.sizes.trainings, test)) {
      harmful += 1;
      ofTheAnswer += data.trains.label(train) === data.answer(test);
      ofTheLabel += data.trains.label(train) === data.tests.label(test);
    }
  }
  if (!harmful) return null;
  const text =
    `Of the ${harmful.toLocaleString("en")} most harmful images shown for wrong answers, ${percent(ofTheAnswer / harmful)} ` +
    `are of the class that was answered, ${percent(ofTheLabel / harmful)} of the right one.`;
  return h("p", {}, text);
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
    rivals(data) ?? [],
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
