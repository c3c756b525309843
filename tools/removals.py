"""What retraining without images gave (section 3 of retraining.ipynb), beside what scores foretell, for the explorer.

The trainings are those of that notebook and lie in data/retraining-*.npz; nothing is trained again here but the ten
models of the 5,000 images, and those only where data/removals-foretold.csv is missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import notebook_support as ns
from influence_functions import compute_influences
from influence_functions.members import average

DATA = Path(__file__).resolve().parent.parent / "data"
Data = tuple[ns.ImageData, ns.ImageData]
Key = tuple[int, str, int]
"""Test image, kind, how many are left out."""
KINDS = ("helpful", "harmful", "random")

FULL, REMOVED, FULL_SEEDS, ASKED = ns.TrainConfig(), 500, range(200, 203), range(1_000)
SMALL, PER_CLASS, MODELS = ns.TrainConfig(epochs=16), 500, 10
SIZES, SEEDS, MORE_SEEDS = (10, 50, 200, 500), range(100, 105), range(100, 115)


@dataclass(frozen=True, eq=False)
class Trial:
    """One training without the images `gone`: "helpful" or "harmful" to a test image, or at "random" (image −1)."""

    image: int
    kind: str
    size: int
    seed: int
    gone: NDArray[np.int64]


def trials_of(table: pd.DataFrame, sizes: Sequence[int], seeds: dict[tuple[str, int], range], of: int) -> list[Trial]:
    """All trainings of a table (test_index, kind, rank, train_index), and those without as many of `of` at random.

    seeds: of each kind and size; where size 0 is among them, also those without nothing.
    """
    groups = table.groupby(["test_index", "kind"])["train_index"]
    gone = {(int(image), str(kind)): part.to_numpy() for (image, kind), part in groups}
    found = [
        Trial(image, kind, size, seed, left_out[:size])
        for (image, kind), left_out in gone.items()
        for size in sizes
        for seed in seeds[kind, size]
    ]
    for size in (*sizes, 0):
        kind = "random" if size else "nothing"
        for seed in seeds.get((kind, size), ()):
            picked = np.random.default_rng(seed).choice(of, size, replace=False)
            found.append(Trial(-1, kind, size, seed, picked))
    return found


def outcomes(trials: Sequence[Trial], odds: NDArray[Any], images: Sequence[int]) -> dict[Key, list[float]]:
    """(test image, kind, size) → log-odds of the right class of each training; odds (trials, images)."""
    found: dict[Key, list[float]] = {}
    for trial, row in zip(trials, odds):
        for image, value in zip(images, row):
            if trial.image in (image, -1):
                found.setdefault((image, trial.kind, trial.size), []).append(round(float(value), 3))
    return found


def foretold(trials: Sequence[Trial], scores: dict[int, NDArray[Any]]) -> dict[Key, float]:
    """(test image, kind, size) → change of the log-odds by the sum of the scores (n,) left out, mean of the seeds."""
    sums: dict[Key, list[float]] = {}
    for trial in trials:
        for image, row in scores.items():
            if trial.image in (image, -1) and trial.size:
                sums.setdefault((image, trial.kind, trial.size), []).append(-float(row[trial.gone].sum()))
    return {key: round(float(np.mean(values)), 4) for key, values in sums.items()}


def retrained(data: Data, trials: Sequence[Trial], config: ns.TrainConfig, name: str) -> NDArray[Any]:
    """(trials, m) log-odds of the right class of all test images, read from data/."""
    everyone = np.arange(len(data[0]))
    plan = [(np.setdiff1d(everyone, trial.gone), trial.seed) for trial in trials]
    return -ns.retrain_all(*data, plan, config, DATA / name).margins.astype(np.float64)


def records(
    measured: dict[Key, list[float]],
    expected: dict[Key, float],
    untouched: dict[int, list[float]],
    about: dict[str, Any],
) -> list[dict[str, Any]]:
    """For the page, one for each test image and size: what came, and what was foretold."""
    return [
        {
            "test": image,
            "removed": size,
            **about,
            "nothing": untouched[image],
            **{
                kind: {"foretold": expected[image, kind, size], "measured": measured[image, kind, size]}
                for kind in KINDS
            },
        }
        for image, kind, size in measured
        if kind == "helpful"
    ]


def at_full_size(data: Data, table: pd.DataFrame, scores: dict[int, NDArray[Any]], odds: NDArray[Any]) -> list[Any]:
    """Of 50,000 images 500 left out; scores (n,) of the page; odds (t, m) of all test images by its own trainings."""
    train, test = data
    seeds = {(kind, REMOVED): FULL_SEEDS for kind in KINDS}
    trials = trials_of(table, (REMOVED,), seeds, len(train))
    images = [int(image) for image in table["test_index"].unique()]
    found = retrained((train, test.subset(ASKED)), trials, FULL, "retraining-full.npz")
    untouched = {image: [round(float(value), 3) for value in odds[:, image]] for image in images}
    by = "chosen by the scores of the first network alone (the mean of five checkpoints of its training)"
    about = {"of": len(train), "by": by}
    return records(outcomes(trials, found[:, images], images), foretold(trials, scores), untouched, about)


def of_a_part(data: Data, table: pd.DataFrame) -> list[Any]:
    """Of a fixed 5,000 images 10, 50, 200 or 500 left out; the scores are the mean of ten trainings on these."""
    train, test = data
    small = train.subset(ns.balanced_subset(train.labels, PER_CLASS))
    more = {("random", size) for size in SIZES[1:3]} | {("harmful", size) for size in SIZES[1:3]} | {("nothing", 0)}
    pairs = [*((kind, size) for kind in KINDS for size in SIZES), ("nothing", 0)]
    trials = trials_of(table, SIZES, {pair: MORE_SEEDS if pair in more else SEEDS for pair in pairs}, len(small))
    images = [int(image) for image in table["test_index"].unique()]
    measured = outcomes(
        trials, retrained((small, test.subset(images)), trials, SMALL, "retraining-removals.npz"), images
    )

    def foretell() -> pd.DataFrame:
        models = [one.model for one in ns.train_models(small, SMALL, range(MODELS), DATA / "models")]
        scores = average([compute_influences(model, small, test, images).scores for model in models])
        found = foretold(trials, dict(zip(images, scores)))
        return pd.DataFrame([(*key, value) for key, value in found.items()], columns=["test", "kind", "size", "sum"])

    about = f"{small.fingerprint} {SMALL} {MODELS} trainings, {len(trials)} removals"
    sums = ns.read_or_make_table(DATA / "removals-foretold.csv", foretell, about)
    expected = {(int(r.test), str(r.kind), int(r.size)): float(r.sum) for r in sums.itertuples()}
    untouched = {image: measured.pop((image, "nothing", 0)) for image in images}
    by = "chosen by the scores of ten other networks, trained on these 5,000"
    return records(measured, expected, untouched, {"of": len(small), "by": by})
