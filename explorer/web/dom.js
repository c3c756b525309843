/** Elements in one call: h("button", { class: "tab", onclick: go }, "Photographs"). */
export function h(tag, attributes = {}, ...children) {
  const svg = ["svg", "circle", "line", "path", "text", "g"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  // JupyterLab takes arrows and digits for commands of its own, unless the very element with the focus forbids it.
  if (["button", "input", "select"].includes(tag) || "tabindex" in attributes)
    element.setAttribute("data-lm-suppress-shortcuts", "true");
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

/** The head of a table: a column for each text. */
export function tableHead(texts) {
  const columns = texts.map((text) => h("th", { scope: "col" }, text));
  return h("thead", {}, h("tr", {}, columns));
}

/** "1 photograph", "5 photographs". */
export function counted(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}

/** 0.304 → "30 %", which no line breaks. */
export function percent(share) {
  return share > 0 && share < 0.005 ? "<\u00a01\u00a0%" : `${Math.round(100 * share)}\u00a0%`;
}

/** With a sign that is a real minus: "+0.0043", "−0.0012". */
export function signed(value, decimals) {
  const text = Math.abs(value).toFixed(decimals);
  return (Number(text) === 0 ? "" : value < 0 ? "−" : "+") + text;
}

/** Decimals with which the largest of some values has two digits. */
export function decimalsFor(values) {
  const largest = Math.max(...values.map(Math.abs), 0);
  return largest > 0 ? Math.min(12, Math.max(0, 1 - Math.floor(Math.log10(largest)))) : 0;
}

/**
 * Arrow keys, Home and End move among `items` (an array asked for anew each time), `columns()` in a row; the container
 * takes one stop of the Tab key. `moved(item)` is told where the focus went.
 */
export function moveByArrows(container, items, columns, moved) {
  container.addEventListener("keydown", (event) => {
    const all = items();
    const at = all.indexOf(event.target);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() };
    const goal = { Home: 0, End: all.length - 1 }[event.key] ?? at + steps[event.key];
    if (at < 0 || Number.isNaN(goal) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (!all[goal]) return;
    all[goal].focus();
    moved(all[goal]);
  });
}
