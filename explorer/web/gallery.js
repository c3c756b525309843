import { counted, h, moveByArrows } from "./dom.js";
import { ANSWERS, filtered } from "./state.js";

/** What a test image is, in a line. */
function describe(test, data) {
  const answer = data.answer(test);
  const says = answer === null ? "" : data.isRight(test) ? ", rightly answered" : `, taken for ${data.classes[answer]}`;
  return `test image ${data.tests.number(test)}, ${data.tests.className(test)}${says}`;
}

/** The test images to choose from, with their filter; update(state) follows what is shown. */
export function makeGallery({ data, tiles, go }) {
  const options = Array.from({ length: data.tests.size }, (_, test) => {
    const wrong = data.answer(test) !== null && !data.isRight(test);
    return h(
      "button",
      {
        type: "button",
        role: "option",
        class: `thumb${wrong ? " mistaken" : ""}`,
        tabindex: "-1",
        "aria-label": describe(test, data),
        "aria-selected": "false",
        title: describe(test, data),
        "data-test": data.tests.number(test),
        onclick: () => go({ test, train: null }),
      },
      tiles.test(test),
    );
  });
  const list = h("div", { class: "gallery", role: "listbox", "aria-label": "Test images" }, options);
  const shown = () => options.filter((option) => !option.hidden);
  const columns = () => {
    const all = shown();
    const second = all.findIndex((option) => option.offsetTop !== all[0].offsetTop);
    return second < 0 ? all.length : second; // of a single row there is no way down
  };
  moveByArrows(list, shown, columns, (option) => option.click());

  const pick = (entries, value, change) =>
    h(
      "select",
      { onchange: (event) => change(event.target.value) },
      entries.map(([key, text]) => h("option", { value: key, selected: key === value }, text)),
    );
  const classes = pick([["", "all classes"], ...data.classes.map((name, label) => [String(label), name])], "", (key) =>
    choose({ label: key === "" ? null : Number(key) }),
  );
  const known = Object.entries(ANSWERS).filter(
    ([key]) =>
      key === "all" || (key === "again" ? data.removals.length > 0 : data.says !== null && data.answer(0) !== null),
  );
  const answers = pick(known, "all", (key) => choose({ answer: key }));
  const count = h("p", { class: "quiet", role: "status" });
  let current = null;

  /** Another filter: the first image that it lets through is shown, if the present one is not. */
  function choose(changes) {
    const wanted = { ...current, ...changes };
    const places = filtered(wanted, data);
    const test = places.includes(wanted.test) || places.length === 0 ? wanted.test : places[0];
    go({ ...changes, test, train: null });
  }

  function update(state) {
    const again = !current || current.label !== state.label || current.answer !== state.answer;
    current = state;
    if (again) {
      const places = new Set(filtered(state, data));
      options.forEach((option, test) => (option.hidden = !places.has(test)));
      count.textContent = places.size ? counted(places.size, "photograph") : "No photograph is like that.";
      classes.value = state.label === null ? "" : String(state.label);
      answers.value = state.answer;
    }
    for (const option of options) {
      if (option.tabIndex === 0) option.tabIndex = -1;
      if (option.ariaSelected === "true") option.ariaSelected = "false";
    }
    const now = options[state.test];
    now.ariaSelected = "true";
    (now.hidden ? (shown()[0] ?? now) : now).tabIndex = 0;
    // Within its own box only: scrollIntoView would move the page, too.
    const top = now.offsetTop;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + now.offsetHeight > list.scrollTop + list.clientHeight)
      list.scrollTop = top + now.offsetHeight - list.clientHeight;
  }

  const filters = h(
    "div",
    { class: "filters" },
    h("label", {}, "Class ", classes),
    known.length > 1 && h("label", {}, "Show ", answers),
  );
  return { element: h("div", { class: "chooser" }, filters, count, list), update };
}
