"""Build the explorer, docs/index.html and its sheets of images: what `make explore` does.

    python tools/explore.py
    python tools/explore.py --to build/page --trainings 3 --per-class 10

Ten trainings on all of CIFAR-10 (data/trainings, and the one of student.ipynb) are asked about test images of every
class and every kind of mistake; each one's scores are kept as a file of `Influences` below build/explorer and reused.
The same inputs give the same bytes on the same kind of processor.
"""

import argparse
import hashlib
import io
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL.Image
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from removals import at_full_size, of_a_part  # noqa: E402  (beside this script)

import notebook_support as ns  # noqa: E402  (it lies beside the notebooks, not in a package)
from explorer import Extras, Payload, gather, write_page  # noqa: E402
from influence_functions import Influences, compute_influences  # noqa: E402
from influence_functions._support import atomic_path, bytes_of  # noqa: E402
from influence_functions.measures import MEASURES  # noqa: E402

CONFIG = ns.TrainConfig()
DATA, DOCS = ROOT / "data", ROOT / "docs"
RIGHT, LEAST = 0.4, 2  # share of right answers among the test images of a class; images of each kind of mistake
TITLE = "Who taught the machine?"
ABOUT = (
    "Each of ten networks of the same kind (LeNet-style, 62,006 parameters) was trained on all 50,000 training images "
    "of CIFAR-10 from another random start. A score estimates by how much the log-odds of the right class would fall "
    "had the network been trained without that image: above 0 the image helped, below 0 it harmed.",
    "It is an estimate. Groups of images and averages over trainings carry over to the next training; the rank of a "
    "single image does so only in part, which is what the slider shows.",
    "A harmful image need not be a wrong one: without it the right answer should be surer, no more.",
)
CHOICE = "The photographs were chosen to show every kind of mistake: the numbers do not tell how often one happens."


def choose_tests(
    labels: NDArray[Any], said: NDArray[Any], per_class: int, wanted: Sequence[int] = ()
) -> NDArray[np.int64]:
    """Ascending indices of `per_class` test images of each class, those `wanted` and every kind of mistake among them.

    labels, said (m,): the class, and what the model says. By rule and not by eye: the first images of each kind; of
    each kind of mistake LEAST images, and beyond that as many as it is common.
    """
    chosen: list[int] = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        must = [int(index) for index in wanted if labels[index] == label]
        right = [int(index) for index in own if said[index] == label]
        kinds = [own[said[own] == answer].tolist() for answer in np.unique(said[own]) if answer != label]
        mistakes = _in_turn(kinds, per_class - round(RIGHT * per_class))
        if len(must) > per_class:
            raise ValueError(f"{len(must)} images of class {label} are wanted: per_class must not be {per_class}")
        order = dict.fromkeys([*must, *mistakes, *right, *(index for kind in kinds for index in kind)])
        chosen += list(order)[:per_class]
    return np.sort(np.array(chosen, np.int64))


def _in_turn(kinds: Sequence[Sequence[int]], count: int) -> list[int]:
    """`count` of all images: LEAST of each kind, then one after the other from the kind of which the least is taken."""
    taken = [list(kind[:LEAST]) for kind in kinds]
    while sum(map(len, taken)) < min(count, sum(map(len, kinds))):
        left = [len(kind) / (len(part) + 1) * (len(kind) > len(part)) for kind, part in zip(kinds, taken)]
        most = int(np.argmax(left))
        taken[most].append(kinds[most][len(taken[most])])
    return [index for part in taken for index in part]


def score_files(
    models: Sequence[torch.nn.Module], data: tuple[ns.ImageData, ns.ImageData], tests: NDArray[np.int64], folder: Path
) -> list[Path]:
    """One file of `Influences` a model, computed where it is missing; of other data or tests it has another name."""
    about = hashlib.sha256(f"{data[0].fingerprint} {data[1].fingerprint} {tests.tolist()}".encode()).hexdigest()[:8]
    files = []
    for j, model in enumerate(models):
        weights = b"".join(map(bytes_of, model.state_dict().values()))
        files.append(folder / f"influences-{about}-{j}-{hashlib.sha256(weights).hexdigest()[:8]}.npz")
        if not files[-1].exists():
            start = time.perf_counter()
            compute_influences(model, *data, tests).save(files[-1])
            print(f"training {j + 1} of {len(models)}: scores in {time.perf_counter() - start:.0f} s", flush=True)
    return files


@dataclass(frozen=True, eq=False)
class Asked:
    """What the trainings say of all test images: probabilities (t, m, C), log-odds of the right class (t, m)."""

    models: list[torch.nn.Module]
    probabilities: NDArray[Any]
    odds: NDArray[Any]

    @classmethod
    def of(cls, data: tuple[ns.ImageData, ns.ImageData], trainings: int) -> "Asked":
        """Of the training of student.ipynb and the others, which are in data/ (or trained again)."""
        story = ns.train_or_load(CONFIG.new_model(), data, CONFIG, DATA / "net.safetensors", retrain=False)
        others = ns.train_models(data[0], CONFIG, range(1, trainings), DATA / "trainings")
        models = [training.model for training in (story, *others)]
        results = [ns.evaluate(model, data[1]) for model in models]
        margins = [MEASURES["margin"].values(one.logits, one.labels) for one in results]
        probabilities = torch.stack([one.probabilities for one in results])
        return cls(models, probabilities.numpy(), -torch.stack(margins).double().numpy())


def make_payload(trainings: int, per_class: int, scores: Path) -> Payload:
    """What the page shows, of the first `trainings` of ten; scores are kept in folder `scores`."""
    data = train, test = ns.load_data("cifar10")
    asked = Asked.of(data, trainings)
    tables = {name: ns.read_table(DATA / f"{name}.csv") for name in ("removals-of-all", "removals", "stability")}
    if missing := [name for name, found in tables.items() if found is None]:
        raise FileNotFoundError(f"data/{missing[0]}.csv is missing: git checkout -- data, or make render")
    of_all, of_part, shown = (found[0] for found in tables.values() if found is not None)
    wanted = sorted({int(index) for table in (of_all, of_part, shown) for index in table["test_index"]})
    tests = choose_tests(test.labels.numpy(), asked.probabilities.mean(0).argmax(1), per_class, wanted)
    files = score_files(asked.models, data, tests, scores)
    again = sorted({int(index) for index in of_all["test_index"]})
    rows = np.mean([Influences.load(file).scores[np.searchsorted(tests, again)] for file in files], axis=0)
    done = at_full_size(data, of_all, dict(zip(again, rows)), asked.odds) + of_a_part(data, of_part)
    extras = Extras(
        pd.read_csv(DATA / "near-duplicates.csv"),
        pd.read_csv(DATA / "suspects.csv"),
        done,
        {"title": TITLE, "about": ABOUT, "choice": CHOICE},
    )
    return gather(files, train, test, asked.probabilities[:, tests], extras)


def find_chromium() -> str | None:
    """Where the system's Chromium or Chrome is."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def take_picture(page: Path, target: Path) -> None:
    """The picture that README shows, of an airplane taken for a deer; needs Chromium and requirements-dev.txt."""
    from playwright.sync_api import sync_playwright  # only here: to build the page needs no browser

    chromium = find_chromium()
    if chromium is None:
        sys.exit("no picture was taken: that needs Chromium (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        window = browser.new_page(viewport={"width": 1100, "height": 850})
        window.goto(f"{page.as_uri()}#view=photograph&test=10")
        window.wait_for_function("document.querySelectorAll('.detail canvas[data-drawn]').length >= 11")
        window.wait_for_timeout(1_000)
        drawn = window.screenshot()
        browser.close()
    picture = PIL.Image.open(io.BytesIO(drawn)).convert("RGB")
    with atomic_path(target) as temporary:
        picture.quantize(256, method=PIL.Image.Quantize.MAXCOVERAGE, kmeans=1).save(temporary, "PNG", optimize=True)


def main() -> int:
    """Build the page; exit status 1 and a line that says what to do when that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=DOCS, help="folder of the page (default: docs)")
    parser.add_argument("--trainings", type=int, default=10, help="how many trainings, 1 to 10")
    parser.add_argument("--per-class", type=int, default=60, help="test images of each class")
    parser.add_argument("--scores", type=Path, default=ROOT / "build/explorer", help="folder of the score files")
    parser.add_argument("--picture", type=Path, help="also take a picture of the page, for README (needs Chromium)")
    options, start = parser.parse_args(), time.perf_counter()
    try:
        payload = make_payload(options.trainings, options.per_class, options.scores)
        written = write_page(payload, options.to)
    except (ValueError, OSError) as error:
        print(f"{error}\nnothing was written to {options.to}", file=sys.stderr)
        return 1
    if options.to == DOCS:
        measured = {"steady": payload.data["steady"], "tests": payload.data["tests"]["number"]["shape"][0]}
        ns.record_results(DATA / "results.json", "explorer", measured)
    if options.picture:
        take_picture(written[0].resolve(), options.picture)
    size = sum(file.stat().st_size for file in written)
    print(f"wrote {written[0]} in {time.perf_counter() - start:.0f} s: {len(written)} files, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
