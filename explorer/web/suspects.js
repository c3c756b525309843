import { title } from "./cards.js";
import { h, percent } from "./dom.js";

/** The training images with the most suspicious labels, to judge oneself before being told which label is which. */
export function makeSuspects(context) {
  const { data, tiles, go } = context;
  const element = h("div", { class: "detail" });
  const judged = new Map();

  const tally = () => {
    const count = (kind) => [...judged.values()].filter((one) => one === kind).length;
    return (
      `${judged.size} of ${data.suspects.length} judged: you side with the data set’s label ${count("given")} ×, ` +
      `with the other networks ${count("suggested")} ×, with neither ${count("neither")} ×.`
    );
  };

  /** A small picture that leads to suspect k. */
  function jump(suspect, k, state) {
    const name = `suspect ${k + 1}${judged.has(k) ? ", judged" : ""}`;
    return h(
      "button",
      {
        type: "button",
        class: `thumb${judged.has(k) ? " judged" : ""}`,
        "aria-label": name,
        "aria-current": String(k === state.suspect),
        onclick: () => go({ suspect: k }),
      },
      tiles.train(suspect.train),
    );
  }

  function reveal(suspect) {
    const told =
      `The data set says ${suspect.given}. Networks that had not seen the image say ${suspect.suggested} with ` +
      `${percent(suspect.suggestedChance)}, ${suspect.given} with ${percent(suspect.givenChance)}.`;
    return [
      h("p", {}, told),
      h("p", { class: "quiet" }, `The table of suspects notes: ${suspect.reason}`),
      h(
        "button",
        { type: "button", onclick: () => go({ view: "photograph", train: suspect.train }) },
        "Whom did it help and harm?",
      ),
    ];
  }

  function update(state) {
    const suspect = data.suspects[state.suspect];
    if (!suspect) {
      element.replaceChildren(title("Suspects"), h("p", {}, "No table of suspicious labels was given."));
      return;
    }
    const same = suspect.given === suspect.suggested;
    const names = same ? [suspect.given] : [suspect.given, suspect.suggested].sort();
    const told = h("div", { class: "answer", role: "status" });
    const running = h("p", { class: "quiet" }, tally());
    const judge = (kind) => {
      judged.set(state.suspect, kind);
      told.replaceChildren(...reveal(suspect));
      running.textContent = tally();
      for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
    };
    const button = (kind, text) =>
      h(
        "button",
        {
          type: "button",
          "data-kind": kind,
          "aria-pressed": String(judged.get(state.suspect) === kind),
          onclick: () => judge(kind),
        },
        text,
      );
    const buttons = [
      ...names.map((name) => button(name === suspect.given ? "given" : "suggested", name)),
      button("neither", same ? "something else, or I cannot tell" : "neither, or I cannot tell"),
    ];
    if (judged.has(state.suspect)) told.replaceChildren(...reveal(suspect));
    const step = (by) => go({ suspect: (state.suspect + by + data.suspects.length) % data.suspects.length });
    element.replaceChildren(
      title(`Suspect ${state.suspect + 1} of ${data.suspects.length}: what is it?`),
      h(
        "div",
        { class: "head" },
        h("div", { class: "large" }, tiles.train(suspect.train)),
        h(
          "div",
          {},
          h("p", {}, `Training image ${suspect.number}. What do you see?`),
          h("div", { class: "row" }, buttons),
          told,
        ),
      ),
      running,
      h(
        "div",
        { class: "row" },
        h("button", { type: "button", onclick: () => step(-1) }, "← Previous"),
        h("button", { type: "button", class: "main", onclick: () => step(1) }, "Next →"),
      ),
      h(
        "div",
        { class: "strip" },
        data.suspects.map((one, k) => jump(one, k, state)),
      ),
    );
  }
  return { element, update };
}
