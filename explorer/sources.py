"""Where the scores come from: influences in memory or in files, which must be of one and the same data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence_functions import Influences
from influence_functions.data import as_source

from .pictures import labels_of

Given = Influences | str | Path


@dataclass(frozen=True, eq=False)
class Labels:
    """What scores (m, n) are of: the test images' indices (m,), the labels of test (m,) and training images (n,)."""

    test_indices: NDArray[np.int64]
    tests: NDArray[np.int64]
    trains: NDArray[np.int64]

    @classmethod
    def of(cls, found: Influences) -> Labels:
        """Those of some influences; ValueError where their targets are not classes."""
        for role, labels in (("test", found.test_labels), ("train", found.train_labels)):
            if labels.ndim != 1 or labels.dtype.kind not in "iu" or (labels.size and labels.min() < 0):
                raise ValueError(
                    f"the explorer shows classes: the {role} labels of the influences must be whole numbers from 0, "
                    f"one each, not {labels.dtype} of shape {labels.shape}"
                )
        if found.scores.shape != (len(found.test_labels), len(found.train_labels)) or not found.scores.size:
            raise ValueError(f"there are no scores to show: {found.scores.shape}")
        return cls(found.test_indices, found.test_labels, found.train_labels)

    def check_same(self, other: Labels, name: str) -> None:
        """ValueError where two trainings were not asked about the same images."""
        for what in ("test_indices", "tests", "trains"):
            if not np.array_equal(getattr(self, what), getattr(other, what)):
                raise ValueError(
                    f"{name} is not about the same images as the first influences ({what} differ): compute all of them "
                    "with the same train, test and test_indices"
                )


@dataclass(frozen=True, eq=False)
class Training:
    """The scores of one training, read from its file each time they are asked for."""

    given: Given
    name: str
    like: Labels | None = None

    def load(self) -> Influences:
        """In memory; FileNotFoundError or CorruptFileError for a file that cannot be read, ValueError for others'."""
        found = self.given if isinstance(self.given, Influences) else Influences.load(self.given)
        labels = Labels.of(found)
        if self.like is not None:
            self.like.check_same(labels, self.name)
        if not np.isfinite(found.scores).all():
            raise ValueError(f"{self.name} holds NaN or infinity; compute it again")
        return found

    @property
    def scores(self) -> NDArray[Any]:
        """(m, n)."""
        return self.load().scores


def open_trainings(influences: Given | Sequence[Given]) -> tuple[Labels, list[Training]]:
    """What the scores are of, and the trainings, one for each `Influences` or file of it."""
    given = [influences] if isinstance(influences, (Influences, str, Path)) else list(influences)
    if not given or not all(isinstance(one, (Influences, str, Path)) for one in given):
        raise ValueError("pass the Influences of a training, or a list of them or of their files, one a training")
    names = [f"influences {j}" if isinstance(one, Influences) else str(one) for j, one in enumerate(given)]
    like = Labels.of(Training(given[0], names[0]).load())
    return like, [Training(one, name, like) for one, name in zip(given, names)]


def check_data(labels: Labels, train: Any, test: Any) -> None:
    """ValueError where the scores were not computed on data of this size."""
    sizes = as_source(train, "train").size, as_source(test, "test").size
    if sizes[0] != len(labels.trains):
        raise ValueError(
            f"the influences are of {len(labels.trains):,} training images, the training data has {sizes[0]:,}: pass "
            "the data that they were computed on"
        )
    if (last := int(labels.test_indices.max())) >= sizes[1]:
        raise ValueError(f"the influences are of test image {last}, the test data has {sizes[1]:,} images")
    numbers, counts = np.unique(labels.test_indices, return_counts=True)
    if counts.max() > 1:
        raise ValueError(f"test image {numbers[counts.argmax()]} was asked about twice; pass each index once")


def check_labels_at(data: Any, indices: NDArray[np.int64], labels: NDArray[np.int64], role: str) -> None:
    """ValueError where the images of `data` at `indices` have other labels than these."""
    found = labels_of(data, indices, role)
    wrong = np.flatnonzero(found != labels)
    if wrong.size:
        at = wrong[0]
        raise ValueError(
            f"{role} image {indices[at]} is labelled {found[at]} in the data and {labels[at]} in the influences: they "
            "were computed on other data, or on other labels"
        )
