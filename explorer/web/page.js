import { render } from "./widget.js";

/** What a notebook's model is to the widget, for a page: the data lies in it, and the state in its address. */
function addressModel(data) {
  const values = { data, test_sheets: data.sheets.test, train_sheets: data.sheets.train };
  const listeners = new Set();
  const part = (text, name) => new URLSearchParams(text).get(name) ?? (name === "view" ? "photograph" : null);
  let text = location.hash.slice(1);
  let waiting = 0;
  const write = () => {
    clearTimeout(waiting);
    waiting = 0;
    history.replaceState(null, "", `#${text}`);
  };
  window.addEventListener("popstate", () => {
    clearTimeout(waiting);
    waiting = 0;
    text = location.hash.slice(1);
    listeners.forEach((listener) => listener());
  });
  window.addEventListener("pagehide", () => waiting && write());
  return {
    get: (name) => (name === "state" ? text : values[name]),
    set: (name, value) => {
      const moved = ["view", "train", "pair"].some((one) => part(text, one) !== part(value, one));
      // The way back leads from view to view, and not over every photograph in between; and whoever holds an arrow key
      // changes the address more often than a browser allows.
      if (moved && waiting) write();
      text = value;
      if (moved) history.pushState(null, "", `#${text}`);
      else waiting ||= setTimeout(write, 150);
    },
    save_changes: () => {},
    on: (_, listener) => listeners.add(listener),
    off: (_, listener) => listeners.delete(listener),
  };
}

const place = document.getElementById("explorer");
place.replaceChildren();
render({ model: addressModel(JSON.parse(document.getElementById("data").textContent)), el: place });
