import { noteList, title, trainingCards } from "./cards.js";
import { decimalsFor, h, percent } from "./dom.js";
import { removalPanel } from "./removals.js";

const KINDS = { helpful: "Most helpful", harmful: "Most harmful" };

/** "All 10", "7 of the 10". */
function votes(count, trainings) {
  return count === trainings ? `All ${trainings}` : `${count} of the ${trainings}`;
}

/** What the model says of a test image: first and second choice as bars. */
function choices(state, { data }) {
  const says = data.says(state.trainings, state.test);
  if (!says) return null;
  const many = state.trainings > 1;
  const bar = ({ class: label, chance }) =>
    h(
      "li",
      { class: label === data.tests.label(state.test) ? "true" : "" },
      h("span", { class: "bar", style: `width:${Math.max(1, 100 * chance)}%` }),
      h("span", {}, `${data.classes[label]} ${percent(chance)}`),
    );
  return [
    h("p", {}, many ? `${state.trainings} networks together say:` : "The network says:"),
    h("ul", { class: "bars" }, [says.first, says.second].map(bar)),
    many && h("p", { class: "quiet" }, `${votes(says.votes, state.trainings)} say ${data.classes[says.first.class]}.`),
  ];
}

/** How far lists of so many trainings can be trusted, as measured. */
function steadiness(trainings, { steady, sizes }) {
  const measured = sizes.top ? steady.helpful.length : 0;
  if (!measured) return "";
  const k = Math.min(trainings, measured);
  const share = (kind) => `${percent(steady[kind][k - 1][0])} of the ${kind}`;
  const whose = k === 1 ? "one training shows, another has" : `${k} trainings show together, ${k} others have`;
  const found = `Of the ${sizes.shown} pictures that ${whose} ${share("helpful")} and ${share("harmful")} among the first ${sizes.top}.`;
  return k === trainings ? found : `${found} More than ${measured} cannot be compared with as many others.`;
}

/** "One model … ten trainings". */
function slider(state, { data, go }) {
  if (data.sizes.trainings < 2) return null;
  const text = state.trainings === 1 ? "one training alone" : `the mean of ${state.trainings} trainings`;
  return h(
    "div",
    { class: "slider" },
    h(
      "label",
      {},
      h("span", {}, "Who is asked: ", h("strong", {}, text)),
      h("input", {
        type: "range",
        min: 1,
        max: data.sizes.trainings,
        value: state.trainings,
        "aria-valuetext": text,
        oninput: (event) => go({ trainings: Number(event.target.value) }),
      }),
    ),
    h("p", { class: "quiet", role: "status" }, steadiness(state.trainings, data)),
  );
}

/** What stands below a picture. */
function legend({ sizes }) {
  const parts = ["its score (what it adds to the right answer)", "its class", "its number in the training set"];
  const alone = `how many of the ${sizes.trainings} trainings, each alone, have it among their first ${sizes.top}`;
  const frame = " A solid frame: at least half of them do.";
  const many = sizes.trainings > 1 && sizes.top > 0;
  return `Below each picture: ${parts.join(", ")}${many ? `, and ${alone}.${frame}` : "."} Click one to see whom it taught.`;
}

/** The lists of one test image. */
function lists(state, context) {
  const { data } = context;
  const rows = Object.fromEntries(
    Object.keys(KINDS).map((kind) => [kind, data.list(kind, state.trainings, state.test)]),
  );
  const decimals = decimalsFor(
    Object.values(rows)
      .flat()
      .map((row) => row.score),
  );
  const sections = Object.entries(KINDS).map(([kind, name]) =>
    h(
      "section",
      { class: kind, "aria-label": `${name} training images` },
      h("h3", {}, `${name} training images`),
      rows[kind].length ? trainingCards(rows[kind], { ...context, decimals }) : h("p", {}, "None."),
    ),
  );
  return [...sections, h("p", { class: "quiet legend" }, legend(data))];
}

/**
 * One test image: what it is, what the model says, who helped and harmed. The slider stays the same element while it
 * is moved, else it would lose the focus: only what it decides is drawn anew.
 */
export function makePhotograph(context) {
  const { data, tiles } = context;
  const head = h("div", { class: "head" });
  const asked = h("div");
  const found = h("div");
  const after = h("div");
  let current = null;

  function update(state) {
    const other = current?.test !== state.test;
    const name = `Test image ${data.tests.number(state.test)}: ${data.tests.className(state.test)}`;
    const said = choices(state, context);
    if (other) {
      head.replaceChildren(h("div", { class: "large" }, tiles.test(state.test)), h("div", {}, title(name), h("div")));
      after.replaceChildren(...[noteList(data.tests.notes(state.test)), removalPanel(state, context)].filter(Boolean));
    }
    head.lastChild.lastChild.replaceChildren(...(said ?? []).filter(Boolean));
    const control = slider(state, context);
    const old = asked.querySelector("input");
    if (control && old) {
      old.value = state.trainings;
      old.ariaValueText = control.querySelector("input").getAttribute("aria-valuetext");
      asked.querySelector("strong").textContent = control.querySelector("strong").textContent;
      asked.querySelector("p").textContent = control.querySelector("p").textContent;
    } else if (control) asked.replaceChildren(control);
    found.replaceChildren(...lists(state, context));
    current = state;
  }
  return { element: h("div", {}, head, asked, found, after), update };
}
