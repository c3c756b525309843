"""Scores of several trainings → what is shown of them: the lists after one, two, … trainings, and how steady they are.

A matrix of scores is large, so each training's is looked at once and only sums are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

KINDS = {"helpful": -1.0, "harmful": 1.0}  # first is what has the smallest sign × score
SHOWN, TOP = 5, 10  # images of a list; an image of it "agrees" with a training that has it in its own first TOP


class Scored(Protocol):
    """The scores (m, n) of one training, positive = helpful, as `Influences` has them."""

    @property
    def scores(self) -> NDArray[Any]:
        """(m, n), read anew from its file each time where there is one."""


def first_of(keys: NDArray[Any], k: int) -> NDArray[np.int64]:
    """(m, k) the columns with the smallest keys of each row, smallest first; ties by column, as `Influences` ranks."""
    k = min(k, keys.shape[1])
    border = np.partition(keys, k - 1, axis=1)[:, k - 1 : k]
    rows, columns = np.nonzero(keys <= border)  # more than k in a row where there are ties
    order = np.lexsort((columns, keys[rows, columns], rows))
    starts = np.searchsorted(rows[order], np.arange(len(keys)))
    return columns[order][starts[:, None] + np.arange(k)]


@dataclass(frozen=True, eq=False)
class Rankings:
    """What t trainings show, alone and together; lists are of columns (training images), by kind.

    lists, scores (t, m, SHOWN): entry j is of the mean of the first j + 1 trainings. agreement (t, m, SHOWN): how many
    of all t trainings, each alone, have that image among their first TOP. mean (m, n): over all of them.
    steady (t // 2, m): the share of a list of k trainings that is among the first TOP of k others.
    """

    mean: NDArray[Any]
    lists: dict[str, NDArray[np.int64]]
    scores: dict[str, NDArray[Any]]
    agreement: dict[str, NDArray[np.uint8]]
    steady: dict[str, NDArray[np.float64]]

    @property
    def trainings(self) -> int:
        """How many there are."""
        return len(self.lists["helpful"])

    @property
    def top(self) -> int:
        """TOP where to be among the first TOP means something, since there are many more; else 0: not counted."""
        return TOP if self.mean.shape[1] >= 10 * TOP else 0


def rank(found: Sequence[Scored]) -> Rankings:
    """`Rankings` of one training after the other; at most half of their sums are in memory at a time."""
    count, sums, total = len(found), list[NDArray[Any]](), np.zeros(())
    alone, lists, scores, steady = ({kind: list[NDArray[Any]]() for kind in KINDS} for _ in range(4))
    for j, one in enumerate(found, 1):
        own = one.scores
        total = total + own
        sums += [total] if 2 * j <= count else []
        for kind, sign in KINDS.items():
            alone[kind].append(first_of(sign * own, TOP))
            lists[kind].append(first_of(sign * total, SHOWN))
            scores[kind].append(np.take_along_axis(total, lists[kind][-1], axis=1) / j)
            if j % 2 == 0:
                steady[kind].append(_shared(sign * sums[j // 2 - 1], sign * (total - sums[j // 2 - 1])))
    return Rankings(
        total / count,
        {kind: np.stack(parts) for kind, parts in lists.items()},
        {kind: np.stack(parts) for kind, parts in scores.items()},
        {kind: _agreement(lists[kind], alone[kind]) for kind in KINDS},
        {kind: np.array(parts).reshape(count // 2, len(total)) for kind, parts in steady.items()},
    )


def _shared(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """(m,) the share of the first SHOWN by one that are among the first TOP by the other; mean of both ways."""
    lists = first_of(a, TOP), first_of(b, TOP)
    ways = [(one[:, :SHOWN, None] == other[:, None, :]).any(-1).mean(1) for one, other in (lists, lists[::-1])]
    return np.mean(ways, axis=0)


def _agreement(lists: Sequence[NDArray[Any]], alone: Sequence[NDArray[Any]]) -> NDArray[np.uint8]:
    """(t, m, SHOWN) by how many of `alone` (each (m, TOP)) an image of a list is found."""
    own = np.stack(alone)
    counts = [(own[:, :, None, :] == chosen[None, :, :, None]).any(-1).sum(0) for chosen in lists]
    return np.stack(counts).astype(np.uint8)


def most_moved(mean: NDArray[Any], trains: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """By kind, (k, SHOWN) the rows (test images) that each of the training images `trains` helps, or harms, most."""
    columns = mean[:, trains].T
    return {kind: first_of(sign * columns, SHOWN) for kind, sign in KINDS.items()}
