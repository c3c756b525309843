import { title, trainingCards } from "./cards.js";
import { counted, h } from "./dom.js";

export const OFFERED = 6;

/** Numbers from 0 to 1 that only depend on the seed (mulberry32), so that a link asks everybody the same. */
export function randomFrom(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Fisher and Yates. */
export function shuffled(values, random) {
  const found = [...values];
  for (let last = found.length - 1; last > 0; last -= 1) {
    const other = Math.floor(random() * (last + 1));
    [found[last], found[other]] = [found[other], found[last]];
  }
  return found;
}

/** The places of the training images of each class. */
function byClass({ trains, classes }) {
  const members = classes.map(() => []);
  for (let train = 0; train < trains.size; train += 1) members[trains.label(train)].push(train);
  return members;
}

/**
 * The most helpful training image of a test image among five others of its class, in an order of their own; null where
 * there are not so many. None of the others is on a list of this test image, whoever is asked.
 */
export function question(test, data, members) {
  const random = randomFrom(data.tests.number(test) + 1);
  const [best] = data.list("helpful", data.sizes.trainings, test);
  if (!best) return null;
  const near = new Set([best.train]);
  for (let k = 1; k <= data.sizes.trainings; k += 1)
    data.list("helpful", k, test).forEach((row) => near.add(row.train));
  const others = members[data.trains.label(best.train)].filter((train) => !near.has(train));
  if (others.length < OFFERED - 1) return null;
  return { best, offered: shuffled([best.train, ...shuffled(others, random).slice(0, OFFERED - 1)], random) };
}

/** Guess first: which of six photographs helped most? The score runs on while the page is open. */
export function makeGuess(context) {
  const { data, tiles, go } = context;
  const element = h("div", { class: "detail" });
  const done = new Map();
  const members = byClass(data);
  const order = shuffled(
    Array.from({ length: data.tests.size }, (_, test) => test),
    randomFrom(1),
  );
  let offered = [];

  const score = () => {
    const right = [...done.values()].filter(Boolean).length;
    if (!done.size) return `Nothing guessed yet. Blind guessing is right once in ${OFFERED}.`;
    return `${right} right of ${done.size}; blind guessing would get ${(done.size / OFFERED).toFixed(1)}.`;
  };

  /** The next photograph that was not guessed yet and has a question. */
  const next = () => order.find((test) => !done.has(test) && question(test, data, members)) ?? order[0];

  function answered(asked, right) {
    const words = right ? "Right." : `No: it was number ${asked.offered.indexOf(asked.best.train) + 1}.`;
    return [
      h("p", { class: "verdict", tabindex: "-1" }, h("strong", {}, words)),
      h("div", { class: "helpful" }, trainingCards([asked.best], context)),
      h(
        "p",
        {},
        h("button", { type: "button", class: "main", onclick: () => go({ test: next() }) }, "Next photograph"),
        " ",
        h("button", { type: "button", onclick: () => go({ view: "photograph" }) }, "Show all that helped and harmed"),
      ),
    ];
  }

  function update({ test }) {
    const asked = question(test, data, members);
    offered = [];
    if (!asked) {
      const why = "There are not six training images of one class here to guess among.";
      element.replaceChildren(title("Guess first"), h("p", {}, why));
      return;
    }
    const running = h("p", { class: "quiet", role: "status" }, score());
    const verdict = h("div", { class: "answer" });
    const guess = (train, button) => {
      const right = train === asked.best.train;
      if (!done.has(test)) done.set(test, right);
      verdict.replaceChildren(...answered(asked, right));
      for (const one of offered) {
        one.disabled = true;
        one.classList.toggle("best", Number(one.dataset.place) === asked.best.train);
      }
      button.classList.add("guessed");
      running.textContent = score();
      verdict.querySelector(".verdict").focus();
    };
    offered = asked.offered.map((train, k) =>
      h(
        "button",
        {
          type: "button",
          class: "card",
          "data-place": train,
          "data-train": data.trains.number(train),
          "aria-label": `number ${k + 1}, training image ${data.trains.number(train)}, ${data.trains.className(train)}`,
          onclick: (event) => guess(train, event.currentTarget),
        },
        tiles.train(train),
        h("span", {}, `${k + 1}`),
      ),
    );
    const whose = data.sizes.trainings > 1 ? `, by the mean of ${data.sizes.trainings} trainings` : "";
    const task =
      `Test image ${data.tests.number(test)}, ${data.tests.className(test)}. One of these six training images has the ` +
      `highest score of all ${counted(data.sizes.train, "training image")} for it${whose}. Click it, or press its number.`;
    element.replaceChildren(
      title("Which of the six helped most?"),
      h(
        "div",
        { class: "head" },
        h("div", { class: "large" }, tiles.test(test)),
        h("div", {}, h("p", {}, task), running),
      ),
      h(
        "ul",
        { class: "cards offered" },
        offered.map((button) => h("li", {}, button)),
      ),
      verdict,
    );
  }

  /** The number of a photograph was pressed. */
  function key(pressed) {
    const button = offered[Number(pressed) - 1];
    if (button && !button.disabled) button.click();
  }
  return { element, update, key, enter: () => ({ test: next() }) };
}
