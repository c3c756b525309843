import { testCards, title, trainingCards } from "./cards.js";
import { counted, decimalsFor, h, signed } from "./dom.js";
import { filtered } from "./state.js";

/** The cells with photographs: "label,said" → how many. */
function counts(data) {
  const found = new Map();
  for (let test = 0; test < data.tests.size; test += 1) {
    const key = `${data.tests.label(test)},${data.answer(test)}`;
    found.set(key, (found.get(key) ?? 0) + 1);
  }
  return found;
}

/** The matrix: a row for each class, a column for each answer. */
function makeMatrix({ data, go }) {
  const found = counts(data);
  const most = Math.max(...data.confusions.map(({ tests }) => tests.length));
  const cell = (label, said) => {
    const count = found.get(`${label},${said}`) ?? 0;
    const right = label === said;
    if (!count) return h("td", { class: right ? "right" : "" }, h("span", { class: "none" }, "·"));
    const strength = right ? 0 : Math.round((45 * count) / most);
    const button = h(
      "button",
      {
        type: "button",
        tabindex: "-1",
        style: `--strength:${strength}%`,
        "data-pair": `${label},${said}`,
        "aria-label": `${counted(count, "photograph")} of ${data.classes[label]} called ${data.classes[said]}`,
        onclick: () =>
          right ? go({ view: "photograph", ...rightOnes(label), train: null }) : go({ pair: [label, said] }),
      },
      String(count),
    );
    return h("td", { class: right ? "right" : "" }, button);
  };
  const rightOnes = (label) => {
    const filter = { label, answer: "right" };
    return { ...filter, test: filtered(filter, data)[0] };
  };
  const row = (name, label) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, name),
      data.classes.map((_, said) => cell(label, said)),
    );
  const table = h(
    "table",
    { class: "matrix", "aria-label": "Photographs by what they are and by what the model says" },
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        h("td", {}),
        data.classes.map((name) => h("th", { scope: "col" }, h("span", {}, name))),
      ),
    ),
    h("tbody", {}, data.classes.map(row)),
  );
  const buttons = [...table.querySelectorAll("button")];
  if (buttons.length) buttons[0].tabIndex = 0;
  const choose = (button) => {
    buttons.forEach((one) => (one.tabIndex = one === button ? 0 : -1));
  };
  table.addEventListener("focusin", (event) => choose(event.target));
  moveInMatrix(table, buttons);
  const mistakes = buttons.filter((one) => !one.closest(".right"));
  const mark = (pair) =>
    mistakes.forEach((one) => one.setAttribute("aria-pressed", String(one.dataset.pair === String(pair))));
  return { table, mark };
}

/** Arrow keys go to the next cell that has photographs, in its row or column. */
function moveInMatrix(table, buttons) {
  const at = (button) => button.dataset.pair.split(",").map(Number);
  table.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || !event.target.dataset.pair) return;
    event.preventDefault();
    const [row, column] = at(event.target);
    const ahead = buttons
      .map((button) => [button, at(button)[0] - row, at(button)[1] - column])
      .filter(([, down, right]) => (step[0] ? right === 0 && down * step[0] > 0 : down === 0 && right * step[1] > 0))
      .sort((a, b) => Math.abs(a[1] + a[2]) - Math.abs(b[1] + b[2]));
    ahead[0]?.[0].focus();
  });
}

/** The training images that push a confusion, in groups of look-alikes, beside its test images. */
function showCell(confusion, context) {
  const { data } = context;
  const [label, said] = [confusion.label, confusion.said].map((one) => data.classes[one]);
  const all = confusion.groups.flatMap((group) => group.scores);
  const decimals = decimalsFor(all);
  const few = confusion.tests.length < 3 ? " So few photographs are an example, and not a rule." : "";
  const over = confusion.tests.length === 1 ? "this photograph" : `all ${confusion.tests.length} photographs`;
  const group = ({ trains, scores }, k) => {
    const push = scores.reduce((sum, score) => sum + score, 0);
    const what = `${trains.length} × ${data.trains.className(trains[0])}, together ${signed(push, decimals)}`;
    const rows = trains.map((train, j) => ({ train, score: scores[j] }));
    return h(
      "section",
      { class: "harmful group", "aria-label": `Group ${k + 1}` },
      h("h4", {}, what),
      trainingCards(rows, { ...context, decimals }),
    );
  };
  const task =
    `The ${all.length} training images that harm the right answer most, on the mean over ${over}, in groups of ` +
    `look-alikes. Without them the right answer should be surer.${few}`;
  return [
    title(`${label} taken for ${said}`),
    h("h3", {}, counted(confusion.tests.length, "photograph")),
    h(
      "div",
      { class: "small" },
      testCards(
        confusion.tests.map((test) => ({ test })),
        context,
      ),
    ),
    h("h3", {}, "The training images that push this confusion"),
    h("p", {}, all.length ? task : `No training image is harmful on the mean over ${over}.`),
    confusion.groups.map(group),
  ];
}

/** The confusion matrix and what is behind a cell. */
export function makeConfusion(context) {
  const { data } = context;
  const why = data.says ? "The model makes no mistake here." : "What the model says was not given: pass the model.";
  const matrix = data.confusions.length ? makeMatrix(context) : null;
  const detail = h("div", { class: "detail" });
  const rules = `Rows: what it is. Columns: what the model says. ${data.words.choice ?? ""}`;
  const element = matrix
    ? h(
        "div",
        { class: "columns matrices" },
        h("div", {}, h("p", { class: "quiet" }, rules), h("div", { class: "scroll" }, matrix.table)),
        detail,
      )
    : h("div", {}, title("Confusions"), h("p", {}, why));

  function update({ pair }) {
    if (!matrix) return;
    matrix.mark(pair);
    const found = pair && data.confusions.find((one) => one.label === pair[0] && one.said === pair[1]);
    const hint = pair
      ? "No photograph here shows this mistake."
      : "Click a number: which training images push this mistake?";
    detail.replaceChildren(...(found ? showCell(found, context).flat() : [title("Confusions"), h("p", {}, hint)]));
  }
  return { element, update };
}
