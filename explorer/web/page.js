import { render } from "./widget.js";

/** What a notebook's model is to the widget, for a page: the data lies in it, and the state in its address. */
function addressModel(data) {
  const values = { data, test_sheets: data.sheets.test, train_sheets: data.sheets.train };
  const listeners = new Set();
  let next = null;
  const read = () => location.hash.slice(1);
  window.addEventListener("popstate", () => listeners.forEach((listener) => listener()));
  return {
    get: (name) => (name === "state" ? read() : values[name]),
    set: (name, value) => (next = value),
    save_changes: () => {
      const before = new URLSearchParams(read());
      const after = new URLSearchParams(next);
      const moved = ["view", "train", "pair"].some((name) => before.get(name) !== after.get(name));
      // The way back leads from view to view, and not over every photograph in between.
      history[moved ? "pushState" : "replaceState"](null, "", `#${next}`);
    },
    on: (_, listener) => listeners.add(listener),
    off: (_, listener) => listeners.delete(listener),
  };
}

const place = document.getElementById("explorer");
place.replaceChildren();
render({ model: addressModel(JSON.parse(document.getElementById("data").textContent)), el: place });
