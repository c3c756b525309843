import { noteList, testCards, title } from "./cards.js";
import { h } from "./dom.js";

/** One training image: whom it helped and harmed most, of the test images here. */
export function showTraining(state, context) {
  const { data, tiles, go } = context;
  const { train } = state;
  const many = data.sizes.trainings > 1 ? `, by the mean of ${data.sizes.trainings} trainings` : "";
  const part = (kind, name) => {
    const rows = data.moved(kind, train);
    const list = rows.length ? testCards(rows, context) : h("p", {}, "None of the photographs here.");
    return h("section", { class: kind, "aria-label": name }, h("h3", {}, name), list);
  };
  return [
    h("button", { type: "button", class: "back", onclick: () => go({ train: null }) }, "← Back"),
    h(
      "div",
      { class: "head" },
      h("div", { class: "large" }, tiles.train(train)),
      h(
        "div",
        {},
        title(`Training image ${data.trains.number(train)}, labelled ${data.trains.className(train)}`),
        noteList(data.trains.notes(train)),
        h("p", {}, `Which of the ${data.tests.size} photographs here did it teach${many}?`),
      ),
    ),
    part("helpful", "It helped these most"),
    part("harmful", "It harmed these most"),
  ];
}
