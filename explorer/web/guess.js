import { title, trainingCards } from "./cards.js";
import { counted, h, withArticle } from "./dom.js";

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

/**
 * The most helpful training image of a test image among five others of its class, in an order of their own; null where
 * there are not so many. None of the others helps this test image among the first, whoever is asked.
 */
export function question(test, data) {
  const random = randomFrom(data.tests.number(test) + 1);
  const [best] = data.list("helpful", data.sizes.trainings, test);
  const near = new Set([best.train]);
  for (let k = 1; k <= data.sizes.trainings; k += 1)
    data.list("helpful", k, test).forEach((row) => near.add(row.train));
  const others = Array.from({ length: data.trains.size }, (_, train) => train).filter((train) => !near.has(train));
  const alike = shuffled(others, random).sort(
    (a, b) =>
      Number(data.trains.label(a) !== data.trains.label(best.train)) -
      Number(data.trains.label(b) !== data.trains.label(best.train)),
  );
  if (alike.length < OFFERED - 1) return null;
  return { best, offered: shuffled([best.train, ...alike.slice(0, OFFERED - 1)], random) };
}

/** Guess first: which of six photographs helped most? The score runs on while the page is open. */
export function makeGuess(context) {
  const { data, tiles, go } = context;
  const element = h("div", { class: "detail" });
  const done = new Map();
  const order = shuffled(
    Array.from({ length: data.tests.size }, (_, test) => test),
    randomFrom(1),
  );

  const score = () => {
    const right = [...done.values()].filter(Boolean).length;
    if (!done.size) return `Nothing guessed yet. Blind guessing is right once in ${OFFERED}.`;
    return `${right} right of ${done.size}; blind guessing would get ${(done.size / OFFERED).toFixed(1)}.`;
  };

  function answered(test, asked, train, right) {
    if (!done.has(test)) done.set(test, right);
    const words = right ? "Right." : `No: it was number ${asked.offered.indexOf(asked.best.train) + 1}.`;
    const next = order[(order.indexOf(test) + 1) % order.length];
    return [
      h("p", { class: "verdict", tabindex: "-1" }, h("strong", {}, words)),
      trainingCards([asked.best], context),
      h(
        "p",
        {},
        h("button", { type: "button", class: "main", onclick: () => go({ test: next }) }, "Next photograph"),
        " ",
        h("button", { type: "button", onclick: () => go({ view: "photograph" }) }, "Show all that helped and harmed"),
      ),
    ];
  }

  function update(state) {
    const { test } = state;
    const asked = question(test, data);
    if (!asked) {
      element.replaceChildren(
        title("Guess first"),
        h("p", {}, "Too few training images are shown here to guess among."),
      );
      return;
    }
    const running = h("p", { class: "quiet", role: "status" }, score());
    const verdict = h("div", { class: "answer" });
    const guess = (train, button) => {
      const right = train === asked.best.train;
      verdict.replaceChildren(...answered(test, asked, train, right));
      for (const one of offered) {
        one.disabled = true;
        one.classList.toggle("best", Number(one.dataset.place) === asked.best.train);
      }
      button.classList.add("guessed");
      running.textContent = score();
      verdict.querySelector(".verdict").focus();
    };
    const offered = asked.offered.map((train, k) =>
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
    element.onkeydown = (event) => {
      const button = offered[Number(event.key) - 1];
      if (button && !button.disabled && !event.ctrlKey && !event.metaKey && !event.altKey) button.click();
    };
    const name = withArticle(data.tests.className(test));
    element.replaceChildren(
      title("Which of the six helped most?"),
      h(
        "div",
        { class: "head" },
        h("div", { class: "large" }, tiles.test(test)),
        h(
          "div",
          {},
          h(
            "p",
            {},
            `Test image ${data.tests.number(test)}, ${name}. One of these six training images is the most `,
            `helpful of all ${counted(data.sizes.train, "training image")} for it. Click it, or press its number.`,
          ),
          running,
        ),
      ),
      h(
        "ul",
        { class: "cards offered" },
        offered.map((button) => h("li", {}, button)),
      ),
      verdict,
    );
  }
  return { element, update };
}
