"""All that the explorer shows, checked and made once: `gather` → `Payload`, the same for the page and the widget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .album import Album, pack
from .groups import Confusion, confusions
from .notes import Notes, merged, near_duplicates_of, suspects_of, to_judge
from .pictures import class_names_of, levels_of, numbers_of
from .rankings import KINDS, SHOWN, Rankings, most_moved, rank
from .sheets import Sheets, make_sheets
from .sources import Given, Labels, check_data, open_trainings
from .still import draw_still

if TYPE_CHECKING:
    import pandas as pd

JUDGED = 30  # suspects to judge oneself


@dataclass(frozen=True, eq=False)
class Extras:
    """What a project knows besides the scores; all of it may be left out.

    near_duplicates, suspects: tables as in data/near-duplicates.csv and of `notebook_support.list_suspects`, which name
    images by their number in the whole data set. removals: what retraining without images gave (`tools/removals.py`).
    words: what the reader is told: "title", "about" (a list of sentences), "choice" (how the test images were chosen).
    """

    near_duplicates: pd.DataFrame | None = None
    suspects: pd.DataFrame | None = None
    removals: Sequence[Mapping[str, Any]] = ()
    words: Mapping[str, Any] = field(default_factory=dict)

    def notes(self, role: str) -> Notes:
        """Number of a train or test image → what the tables say of it."""
        twins = near_duplicates_of(self.near_duplicates, role)
        return merged(twins, suspects_of(self.suspects) if role == "train" else {})


@dataclass(frozen=True, eq=False)
class Payload:
    """data: what JSON can hold, arrays packed (see `pack`). test, train: the images that it speaks of.

    still: a picture of it, PNG, for where nothing moves.
    """

    data: dict[str, Any]
    test: Sheets
    train: Sheets
    still: bytes


def gather(
    influences: Given | Sequence[Given],
    train: Any,
    test: Any,
    probabilities: NDArray[Any] | None = None,
    extras: Extras | None = None,
) -> Payload:
    """What the explorer shows of the scores of one training, or of several, one `Influences` (or its file) each.

    train, test: the data that the scores were computed on (see `read_images`). probabilities (t, m, C): what the model
    of each training says of the test images asked; (m, C) of a single one. Raises FileNotFoundError for a missing
    file, ValueError where scores, data and probabilities do not belong together.
    """
    labels, trainings = open_trainings(influences)
    check_data(labels, train, test)
    said, known = _checked(probabilities, (len(trainings), len(labels.tests))), extras or Extras()
    names = class_names_of(train, [labels.trains, labels.tests], None if said is None else said.shape[2])
    ranked, says = rank(trainings), None if said is None else _Says.of(said)
    cells = [] if says is None else confusions(ranked.mean, labels.tests, says.choices[-1, :, 0])
    judged, judged_at = _judged(known, train, labels)
    tests, shown = Album(test, "test", labels.test_indices, labels.tests), _shown(ranked, cells, judged_at)
    trains = Album(train, "train", shown, labels.trains[shown])
    levels = levels_of([tests.images, trains.images])
    pixels = tests.pixels(levels), trains.pixels(levels)
    sheets = make_sheets(pixels[0]), make_sheets(pixels[1])
    data = {
        "words": dict(known.words),
        "classes": names,
        "sizes": {"train": len(labels.trains), "trainings": ranked.trainings, "top": ranked.top, "shown": SHOWN},
        "tests": tests.about(known.notes("test"), sheets[0].layout()),
        "trains": trains.about(known.notes("train"), sheets[1].layout()),
        "says": says and says.packed(),
        **_lists(ranked, trains),
        "confusions": [cell.grouped(trains, pixels[1]) for cell in cells],
        "suspects": [{**one, "train": int(place)} for one, place in zip(judged, trains.place(judged_at))],
        "removals": [dict(one) for one in known.removals],
    }
    return Payload(data, *sheets, draw_still((tests, trains), pixels, ranked, names))


def _checked(probabilities: NDArray[Any] | None, shape: tuple[int, int]) -> NDArray[Any] | None:
    """(t, m, C) float32."""
    if probabilities is None:
        return None
    found = np.asarray(probabilities, np.float32)
    found = found[None] if found.ndim == 2 else found
    if found.ndim != 3 or found.shape[:2] != shape or found.shape[2] < 2:
        raise ValueError(f"probabilities must be {shape} (trainings, test images) × two classes or more: {found.shape}")
    if not np.allclose(found.sum(-1), 1, atol=1e-3) or found.min() < 0:
        raise ValueError("probabilities must be from 0 and sum to 1 over the classes of each test image")
    return found


@dataclass(frozen=True, eq=False)
class _Says:
    """Of each test image: choices (t, m, 2) and chances (t, m, 2), first and second of the mean of the first j + 1
    trainings; own (t, m), what each training says alone.
    """

    choices: NDArray[Any]
    chances: NDArray[Any]
    own: NDArray[Any]

    @classmethod
    def of(cls, said: NDArray[Any]) -> _Says:
        together = np.cumsum(said, axis=0) / np.arange(1, len(said) + 1)[:, None, None]
        order = np.argsort(-together, axis=2, kind="stable")[..., :2]
        return cls(order, np.take_along_axis(together, order, axis=2), said.argmax(2))

    def packed(self) -> dict[str, Any]:
        return {name: pack(getattr(self, name)) for name in ("choices", "chances", "own")}


def _judged(known: Extras, train: Any, labels: Labels) -> tuple[list[dict[str, Any]], NDArray[np.int64]]:
    """The suspects to judge that are in this data, and their indices in it."""
    numbers = numbers_of(train, np.arange(len(labels.trains)))
    at = {int(number): index for index, number in enumerate(numbers)}
    judged = [one for one in to_judge(known.suspects, JUDGED) if one["number"] in at]
    return judged, np.array([at[one["number"]] for one in judged], np.int64)


def _shown(ranked: Rankings, cells: Sequence[Confusion], judged: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ascending indices of all training images that are shown anywhere."""
    parts = [*(part.ravel() for part in ranked.lists.values()), *(cell.pushers for cell in cells), judged]
    return np.unique(np.concatenate(parts))


def _lists(ranked: Rankings, trains: Album) -> dict[str, Any]:
    """Who helps and harms each test image, whom each training image helps and harms, and how steady lists are."""
    moved = most_moved(ranked.mean, trains.indices)
    return {
        "lists": {
            kind: {
                "train": pack(trains.place(ranked.lists[kind])),
                "score": pack(ranked.scores[kind]),
                "agree": pack(ranked.agreement[kind]),
            }
            for kind in KINDS
        },
        "moved": {
            kind: {
                "test": pack(rows),
                "score": pack(np.take_along_axis(ranked.mean[:, trains.indices].T, rows, axis=1)),
            }
            for kind, rows in moved.items()
        },
        "steady": {kind: [_with_interval(row) for row in shares] for kind, shares in ranked.steady.items()},
    }


def _with_interval(shares: NDArray[np.float64]) -> list[float]:
    """Mean of m shares, and half the width of its 95 % interval over the test images."""
    half = 1.96 * shares.std(ddof=1) / len(shares) ** 0.5 if len(shares) > 1 else 0.0
    return [round(float(shares.mean()), 4), round(float(half), 4)]
