import { testCards, title, trainingCards } from "./cards.js";
import { counted, decimalsFor, h, moveByArrows, percent, signed } from "./dom.js";

const RULES =
  "Rows: what it is. Columns: what the model says. The numbers count the photographs on this page, which were chosen to " +
  "show every kind of mistake: they do not tell how often it happens.";

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
  const most = Math.max(
    ...[...found].filter(([key]) => new Set(key.split(",")).size === 2).map(([, count]) => count),
    1,
  );
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
        "aria-label": `${counted(count, data.classes[label])} called ${data.classes[said]}`,
        onclick: () =>
          right ? go({ view: "photograph", label, answer: "right", ...firstOf(label) }) : go({ pair: [label, said] }),
      },
      String(count),
    );
    return h("td", { class: right ? "right" : "" }, button);
  };
  const firstOf = (label) => {
    const test = Array.from({ length: data.tests.size }, (_, k) => k).find(
      (k) => data.tests.label(k) === label && data.isRight(k),
    );
    return { test, train: null };
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
  const mark = (pair) =>
    buttons.forEach((one) => one.setAttribute("aria-pressed", String(one.dataset.pair === String(pair))));
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
  const whole = all.reduce((sum, score) => sum + score, 0);
  const decimals = decimalsFor(all);
  const over = confusion.tests.length === 1 ? "this photograph" : `all ${confusion.tests.length} photographs`;
  const group = ({ trains, scores }, k) => {
    const push = scores.reduce((sum, score) => sum + score, 0);
    const what = counted(trains.length, data.trains.className(trains[0]));
    return h(
      "section",
      { class: "harmful group", "aria-label": `Group ${k + 1}` },
      h("h4", {}, `${what}, together ${signed(push, decimals)} (${percent(push / whole)} of these ${all.length})`),
      trainingCards(
        trains.map((train, j) => ({ train, score: scores[j] })),
        { ...context, decimals },
      ),
    );
  };
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
    all.length
      ? h(
          "p",
          {},
          `Those most harmful on the mean over ${over}, grouped by how they look. Without them the right answer should be surer.`,
        )
      : h("p", {}, "No training image is harmful on the mean over them."),
    confusion.groups.map(group),
  ];
}

/** The confusion matrix and what is behind a cell. */
export function makeConfusion(context) {
  const { data } = context;
  const known = data.confusions.length > 0;
  const matrix = known ? makeMatrix(context) : null;
  const detail = h("div", { class: "detail" });
  const element = known
    ? h(
        "div",
        { class: "columns matrices" },
        h("div", {}, h("p", { class: "quiet" }, RULES), h("div", { class: "scroll" }, matrix.table)),
        detail,
      )
    : h("div", {}, title("Confusions"), h("p", {}, "What the model says is not known here, or it makes no mistake."));
  function update(state) {
    if (!known) return;
    const found =
      state.pair && data.confusions.find((one) => one.label === state.pair[0] && one.said === state.pair[1]);
    matrix.mark(state.pair);
    detail.replaceChildren(
      ...(found
        ? showCell(found, context).flat()
        : [
            title("Confusions"),
            h(
              "p",
              {},
              state.pair
                ? "No photograph here shows this mistake."
                : "Click a number: which training images push this mistake?",
            ),
          ]),
    );
  }
  return { element, update };
}
