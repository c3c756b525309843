export const VIEWS = {
  photograph: "Photographs",
  guess: "Guess first",
  confusion: "Confusions",
  suspects: "Suspects",
  about: "About",
};
export const ANSWERS = { all: "all", right: "right answers", wrong: "wrong answers", again: "trained again without" };

/** A class in a link: its name, or its number where names may be mistaken. */
function wordFor(label, { classes }) {
  const name = classes[label];
  const plain = !name.includes(",") && !/^\d+$/.test(name) && classes.indexOf(name) === classes.lastIndexOf(name);
  return plain ? name : String(label);
}

/**
 * What is shown, as one plain object, and as the text of an address; whatever is not said is as here.
 *
 * test, train: places in the albums (train: null where no training image is looked at). trainings: how many are
 * averaged. label, answer: the filter; pair: [label, said] of a confusion, or null. suspect: which of them.
 */
export function firstState(data) {
  return {
    view: "photograph",
    test: 0,
    train: null,
    trainings: data.sizes.trainings,
    label: null,
    answer: "all",
    pair: null,
    suspect: 0,
  };
}

/** A state → "view=photograph&test=25"; the images by their numbers, so that a link outlives another choice of them. */
export function toText(state, data) {
  const first = firstState(data);
  const parts = new URLSearchParams({ view: state.view, test: data.tests.number(state.test) });
  if (state.train !== null) parts.set("train", data.trains.number(state.train));
  for (const name of ["trainings", "answer", "suspect"]) {
    if (state[name] !== first[name]) parts.set(name, state[name]);
  }
  if (state.label !== null) parts.set("class", wordFor(state.label, data));
  if (state.pair) parts.set("pair", state.pair.map((label) => wordFor(label, data)).join(","));
  return parts.toString();
}

/** The state that a text names, and complaints about what in it does not exist here. */
export function fromText(text, data) {
  const parts = new URLSearchParams(text);
  const state = firstState(data);
  const complaints = [];
  const take = (name, read) => {
    if (!parts.has(name)) return;
    const value = read(parts.get(name));
    if (value === undefined) complaints.push(`This link asks for ${name} “${parts.get(name)}”, which is not here.`);
    else state[name === "class" ? "label" : name] = value;
  };
  const among = (table) => (word) => (Object.hasOwn(table, word) ? word : undefined);
  const whole = (low, high) => (word) =>
    /^\d+$/.test(word) && Number(word) >= low && Number(word) <= high ? Number(word) : undefined;
  const classOf = (word) =>
    data.classes.includes(word) ? data.classes.indexOf(word) : whole(0, data.classes.length - 1)(word);
  const placeIn = (album) => (word) => (/^\d+$/.test(word) ? album.placeOf(Number(word)) : undefined);
  take("view", among(VIEWS));
  take("test", placeIn(data.tests));
  take("train", placeIn(data.trains));
  take("trainings", whole(1, data.sizes.trainings));
  take("answer", among(ANSWERS));
  take("suspect", whole(0, Math.max(0, data.suspects.length - 1)));
  take("class", classOf);
  take("pair", (word) => {
    const pair = word.split(",").map(classOf);
    return pair.length === 2 && !pair.includes(undefined) && pair[0] !== pair[1] ? pair : undefined;
  });
  return { state, complaints };
}

/** The places of the test images that a state's filter lets through. */
export function filtered(state, data) {
  const wanted = {
    all: () => true,
    right: (test) => data.isRight(test),
    wrong: (test) => !data.isRight(test),
    again: (test) => data.removalsOf(test).length > 0,
  }[state.answer];
  const places = Array.from({ length: data.tests.size }, (_, test) => test);
  return places.filter((test) => (state.label === null || data.tests.label(test) === state.label) && wanted(test));
}
