import { decimalsFor, h, signed } from "./dom.js";

/** "3 of 10 trainings" once there are several. */
function agreement(count, data) {
  return `in the top ${data.sizes.top} of ${count} of ${data.sizes.trainings}`;
}

/** Training images as cards to click; rows: [{train, score, agree}], agree only where it is known. */
export function trainingCards(rows, { data, tiles, go, decimals }) {
  const digits = decimals ?? decimalsFor(rows.map((row) => row.score));
  const card = ({ train, score, agree }) => {
    const notes = data.trains.notes(train);
    const several = data.sizes.trainings > 1 && data.sizes.top > 0 && agree !== undefined;
    const steady = several && 2 * agree >= data.sizes.trainings;
    const name = `#${data.trains.number(train)}`;
    const words = [
      `training image ${data.trains.number(train)}, ${data.trains.className(train)}`,
      `score ${signed(score, digits)}`,
      ...(several ? [`${agreement(agree, data)} trainings`] : []),
      ...notes.map((note) => note.text),
    ];
    return h(
      "li",
      {},
      h(
        "button",
        {
          type: "button",
          class: `card${steady ? " steady" : ""}`,
          "aria-label": words.join(", "),
          title: words.slice(2).join("; "),
          "data-train": data.trains.number(train),
          "data-score": score,
          onclick: () => go({ train }),
        },
        tiles.train(train),
        h("span", { class: "score" }, signed(score, digits)),
        h("span", {}, data.trains.className(train)),
        h("span", { class: "quiet" }, name),
        several && h("span", { class: steady ? "" : "quiet" }, `${agree} of ${data.sizes.trainings}`),
        notes.map((note) => h("span", { class: "badge" }, note.badge)),
      ),
    );
  };
  return h("ul", { class: "cards" }, rows.map(card));
}

/** Test images as cards to click; rows: [{test, score}], score only where there is one. */
export function testCards(rows, { data, tiles, go }) {
  const digits = decimalsFor(rows.map((row) => row.score ?? 0));
  const card = ({ test, score }) => {
    const answer = data.answer(test);
    const says = answer === null || data.isRight(test) ? "" : `taken for ${data.classes[answer]}`;
    const number = data.tests.number(test);
    const words = [`test image ${number}, ${data.tests.className(test)}`, says];
    if (score !== undefined) words.push(`score ${signed(score, digits)}`);
    return h(
      "li",
      {},
      h(
        "button",
        {
          type: "button",
          class: "card",
          "aria-label": words.filter(Boolean).join(", "),
          "data-test": number,
          "data-score": score,
          onclick: () => go({ view: "photograph", test, train: null }),
        },
        tiles.test(test),
        score !== undefined && h("span", { class: "score" }, signed(score, digits)),
        h("span", {}, data.tests.className(test)),
        says && h("span", { class: "wrong" }, says),
        h("span", { class: "quiet" }, `test #${number}`),
      ),
    );
  };
  return h("ul", { class: "cards" }, rows.map(card));
}

/** A heading that a change of view puts the focus on. */
export function title(text) {
  return h("h2", { tabindex: "-1", class: "title" }, text);
}

/** Notes as a list of sentences; nothing where there are none. */
export function noteList(notes) {
  const sentences = notes.map(({ text }) => `${text[0].toUpperCase()}${text.slice(1)}.`);
  return (
    notes.length > 0 &&
    h(
      "ul",
      { class: "notes" },
      sentences.map((text) => h("li", {}, text)),
    )
  );
}
