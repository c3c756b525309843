import { h } from "./dom.js";
import { openData } from "./data.js";
import { openTiles } from "./tiles.js";
import { firstState, fromText, toText, VIEWS } from "./state.js";
import { makeAbout } from "./about.js";
import { makeConfusion } from "./confusion.js";
import { makeGallery } from "./gallery.js";
import { makeGuess } from "./guess.js";
import { makePhotograph } from "./photograph.js";
import { makeSuspects } from "./suspects.js";
import { showTraining } from "./training.js";

/** Addresses of the sheets: as given by a page, or made of the bytes that a kernel sends. */
function addresses(sheets) {
  return sheets.map((one) =>
    typeof one === "string" ? one : URL.createObjectURL(new Blob([one], { type: "image/jpeg" })),
  );
}

/** Sizes at which images are shown: whole multiples, so that every pixel stays a square. */
function sizesOf({ width, height }) {
  const times = (target) => Math.max(1, Math.round(target / Math.max(width, height))) * width;
  return `--thumb:${times(48)}px;--card:${times(96)}px;--wide:${times(128)}px;--large:${times(176)}px`;
}

/** The photographs: the gallery beside one test image. */
function makePhotographs(context, gallery) {
  const photograph = makePhotograph(context);
  const element = h("div", { class: "columns" }, gallery.element, h("div", { class: "detail" }, photograph.element));
  function update(state) {
    gallery.update(state);
    photograph.update(state);
  }
  return { element, update };
}

/**
 * The whole explorer in `el`. model: `get("data")`, `get("test_sheets")`, `get("train_sheets")` as made by Python,
 * and `get("state")`, the text of the state shown, which is set as the reader moves and followed when another sets it.
 */
export function render({ model, el }) {
  const data = openData(model.get("data"));
  const context = { data, go };
  const urls = ["test_sheets", "train_sheets"].map((name) => addresses(model.get(name)));
  context.tiles = { test: openTiles(data.tests.layout, urls[0]), train: openTiles(data.trains.layout, urls[1]) };
  const views = {
    photograph: makePhotographs(context, makeGallery(context)),
    guess: makeGuess(context),
    confusion: makeConfusion(context),
    suspects: makeSuspects(context),
    about: makeAbout(context),
  };
  const training = h("div", { class: "training" });
  const offered = Object.keys(VIEWS).filter((view) => view !== "suspects" || data.suspects.length > 0);
  const tabs = offered.map((view) =>
    h(
      "button",
      {
        type: "button",
        class: "tab",
        "data-view": view,
        onclick: () => go({ view, train: null, ...views[view].enter?.() }),
      },
      VIEWS[view],
    ),
  );
  const message = h("p", { class: "message", role: "alert", hidden: true });
  const root = h(
    "div",
    { class: "explorer", style: sizesOf(data.trains.layout) },
    h(
      "header",
      {},
      h("h1", {}, data.words.title ?? "Who taught the machine?"),
      h("nav", { "aria-label": "Views" }, tabs),
    ),
    message,
    Object.values(views).map((view) => view.element),
    training,
  );
  let state = firstState(data);
  let written = null;

  function show(next) {
    const previous = state;
    state = next;
    const looked = state.train !== null; // a training image lies over the view from which it was clicked
    for (const [name, view] of Object.entries(views)) view.element.hidden = looked || name !== state.view;
    training.replaceChildren(...(looked ? showTraining(state, context).flat().filter(Boolean) : []));
    for (const tab of tabs) tab.setAttribute("aria-current", tab.dataset.view === state.view ? "page" : "false");
    if (!looked) views[state.view].update(state);
    return previous;
  }

  /** What had the focus is gone: then the picture that one comes back to has it, or the heading of what is new. */
  function refocus(previous) {
    if (document.activeElement !== document.body && document.activeElement?.getClientRects().length) return;
    const seen = (selector) => [...root.querySelectorAll(selector)].find((one) => one.getClientRects().length);
    const left = previous.train !== null && state.train === null;
    const card = left && seen(`.card[data-train="${data.trains.number(previous.train)}"]`);
    (card || seen(".title"))?.focus();
  }

  function go(changes) {
    message.hidden = true;
    refocus(show({ ...state, ...changes }));
    written = toText(state, data);
    model.set("state", written);
    model.save_changes();
  }

  function follow() {
    const text = model.get("state") ?? "";
    if (text === written) return;
    written = text;
    const within = root.contains(document.activeElement);
    const { state: asked, complaints } = fromText(text, data);
    message.textContent = complaints.join(" ");
    message.hidden = complaints.length === 0;
    const previous = show(asked);
    if (within) refocus(previous);
  }

  root.addEventListener("keydown", (event) => {
    if (state.train === null && !event.ctrlKey && !event.metaKey && !event.altKey) views[state.view].key?.(event.key);
  });

  root.addEventListener("missing", (event) => {
    message.textContent = `Some pictures cannot be shown: ${event.detail}.`;
    message.hidden = false;
  });
  el.append(root); // first: the gallery scrolls to what is shown, which has a place only then
  follow();
  context.tiles.train.prepare();
  model.on("change:state", follow);
  return () => {
    model.off("change:state", follow);
    urls
      .flat()
      .filter((url) => url.startsWith("blob:"))
      .forEach((url) => URL.revokeObjectURL(url));
  };
}

export default { render };
