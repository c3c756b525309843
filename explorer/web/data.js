const ARRAYS = {
  float32: Float32Array,
  uint8: Uint8Array,
  uint16: Uint16Array,
  uint32: Uint32Array,
};

/** An array as album.py packs it: little-endian bytes in base64. */
export function unpack({ type, shape, base64 }) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  return { shape, values: new ARRAYS[type](bytes.buffer) };
}

/** The images of one data set that are shown: their numbers, labels and notes, by place. */
function album(packed, classes) {
  const numbers = unpack(packed.number).values;
  const labels = unpack(packed.label).values;
  const places = new Map([...numbers].map((number, place) => [number, place]));
  return {
    size: numbers.length,
    layout: packed.layout,
    number: (place) => numbers[place],
    label: (place) => labels[place],
    className: (place) => classes[labels[place]],
    notes: (place) => packed.notes[place] ?? [],
    placeOf: (number) => places.get(number),
  };
}

/** Rows of `fields`, packed arrays of one shape: at(i, j, …) gives [{field: value}, …] along the last axis. */
function table(fields) {
  const columns = Object.entries(fields).map(([name, packed]) => [name, unpack(packed)]);
  const { shape } = columns[0][1];
  const width = shape.at(-1);
  return (...indices) => {
    const row = indices.reduce((start, index, axis) => start * shape[axis] + index, 0);
    return Array.from({ length: width }, (_, k) =>
      Object.fromEntries(columns.map(([name, { values }]) => [name, values[row * width + k]])),
    );
  };
}

/** Of rows that are sorted by score those that really help, or harm: of a few images the last may do the opposite. */
function ofSign(kind, rows) {
  return rows.filter(({ score }) => (kind === "helpful" ? score > 0 : score < 0));
}

/** What `gather` of payload.py made, in the words of the views; trainings are counted from 1. */
export function openData(packed) {
  const { classes, sizes } = packed;
  const lists = { helpful: table(packed.lists.helpful), harmful: table(packed.lists.harmful) };
  const moved = { helpful: table(packed.moved.helpful), harmful: table(packed.moved.harmful) };
  const choices = packed.says && table({ class: packed.says.choices, chance: packed.says.chances });
  const own = packed.says && unpack(packed.says.own);
  const tests = album(packed.tests, classes);
  const answer = (test) => (choices ? choices(sizes.trainings - 1, test)[0].class : null);
  return {
    ...packed,
    tests,
    trains: album(packed.trains, classes),
    /** The training images that help, or harm, a test image most by the mean of the first `trainings`; 5 at most. */
    list: (kind, trainings, test) => ofSign(kind, lists[kind](trainings - 1, test)),
    /** The test images that a training image helps, or harms, most. */
    moved: (kind, train) => ofSign(kind, moved[kind](train)),
    /** First and second choice of the first `trainings` together, and how many of them choose the first. */
    says: (trainings, test) => {
      if (!choices) return null;
      const [first, second] = choices(trainings - 1, test);
      const votes = Array.from({ length: trainings }, (_, j) => own.values[j * own.shape[1] + test]);
      return { first, second, votes: votes.filter((vote) => vote === first.class).length };
    },
    /** What all trainings together say, a class; null where it is not known. */
    answer,
    isRight: (test) => answer(test) === tests.label(test),
    /** What retraining without images gave for a test image: one record for each number of them. */
    removalsOf: (test) => packed.removals.filter((one) => one.test === tests.number(test)),
  };
}
