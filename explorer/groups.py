"""What pushes a confusion: the training images most harmful on the mean of its test images, in look-alikes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import AgglomerativeClustering

from .album import Album
from .rankings import first_of

PUSHERS, GROUPS, SIDE = 15, 4, 4  # training images of a confusion, groups at most, fields of a look a side


@dataclass(frozen=True, eq=False)
class Confusion:
    """Test images (rows of the scores) of class `label` that are called `said`; the training images that push it.

    pushers (k,): columns, most harmful first; scores (k,): their mean over all `tests`, below 0.
    """

    label: int
    said: int
    tests: NDArray[np.int64]
    pushers: NDArray[np.int64]
    scores: NDArray[Any]

    def grouped(self, trains: Album, pixels: NDArray[np.uint8]) -> dict[str, Any]:
        """For the reader, strongest group first: a group's push is the sum of its scores. pixels: of all `trains`."""
        places = trains.place(self.pushers)
        which = look_alikes(pixels[places], trains.labels[places])
        members = [np.flatnonzero(which == group) for group in range(which.max(initial=-1) + 1)]
        members.sort(key=lambda part: float(self.scores[part].sum()))
        groups = [{"trains": places[part].tolist(), "scores": _short(self.scores[part])} for part in members]
        return {"label": self.label, "said": self.said, "tests": self.tests.tolist(), "groups": groups}


def _short(scores: NDArray[Any]) -> list[float]:
    return [float(f"{score:.6g}") for score in scores]


def confusions(mean: NDArray[Any], labels: NDArray[np.int64], said: NDArray[np.int64]) -> list[Confusion]:
    """Every kind of mistake among the test images: mean (m, n) scores, labels and what is `said` of each (m,)."""
    found = []
    for label, answer in sorted({(int(a), int(b)) for a, b in zip(labels, said) if a != b}):
        tests = np.flatnonzero((labels == label) & (said == answer))
        scores = mean[tests].mean(0)
        chosen = first_of(scores[None], PUSHERS)[0]
        chosen = chosen[scores[chosen] < 0]
        found.append(Confusion(label, answer, tests, chosen, scores[chosen]))
    return found


def looks(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(k, 3 · SIDE²) what images (k, h, w, 3) look like from afar: means of SIDE × SIDE fields, 0..1.

    The mean of an image and its mirror image, so that it does not matter which way a ship sails.
    """
    return (_fields(images) + _fields(images[:, :, ::-1])) / 2


def _fields(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    rows, columns = (np.linspace(0, size, SIDE + 1).astype(int) for size in images.shape[1:3])
    corners = [(a, max(b, a + 1), c, max(d, c + 1)) for a, b in pairwise(rows) for c, d in pairwise(columns)]
    return np.concatenate([images[:, a:b, c:d].mean((1, 2)) / 255 for a, b, c, d in corners], axis=1)


def look_alikes(images: NDArray[np.uint8], labels: NDArray[Any]) -> NDArray[np.int64]:
    """(k,) the group of each image: GROUPS of them at most, or one a label; never two labels in one group.

    Agglomerative clustering (Ward) of `looks`; labels are set so far apart that they are told apart first.
    """
    if len(images) < 2:
        return np.zeros(len(images), np.int64)
    kinds, which = np.unique(labels, return_inverse=True)
    apart = 100.0 * (which[:, None] == np.arange(len(kinds)))
    count = max(min(GROUPS, len(images)), len(kinds))
    return AgglomerativeClustering(count).fit_predict(np.hstack([looks(images), apart]))
