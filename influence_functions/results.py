"""What comes out: `Influences`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._support import CorruptFileError, atomic_path
from .solvers.base import Health

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Influences:
    """Scores (m, n), positive = helpful; nats for a loss, for another measure sign and rank; who, how and how well.

    test_indices (m,): whole numbers; test_labels (m, …) and train_labels (n, …): the targets as given (−1 where their
    shape differs from sample to sample). Column j is training sample j. members: the health of each of several models,
    whose scores these are the average of; `health` sums them up.

    >>> found = Influences(np.array([[0.5, -1.0, 2.0]]), np.array([7]), np.array([0]), np.array([0, 1, 0]), {},
    ...                    Health("kernel", 0.0, 0.1))
    >>> found.helpful(0, 2), found.harmful(0, 1)
    (array([2, 0]), array([1]))
    """

    scores: NDArray[Any]
    test_indices: NDArray[np.int64]
    test_labels: NDArray[Any]
    train_labels: NDArray[Any]
    settings: dict[str, Any]
    health: Health
    members: tuple[Health, ...] = ()

    def helpful(self, i: int, k: int = 5) -> NDArray[np.int64]:
        """(k,) training indices with the largest scores for row i, the most helpful first; ties by index."""
        return self._ranked(-self.scores[self._row(i)], k)

    def harmful(self, i: int, k: int = 5) -> NDArray[np.int64]:
        """(k,) training indices with the smallest scores for row i, the most harmful first; ties by index."""
        return self._ranked(self.scores[self._row(i)], k)

    def _row(self, i: int) -> int:
        if not 0 <= i < len(self.scores):
            raise ValueError(f"row {i} does not exist: there are {len(self.scores)} test samples, counted from 0")
        return i

    @staticmethod
    def _ranked(keys: NDArray[Any], k: int) -> NDArray[np.int64]:
        if not 1 <= k <= len(keys):
            raise ValueError(f"k must lie in 1..{len(keys)}, the number of training samples, not {k}")
        return np.argsort(keys, kind="stable")[:k]

    def mean(self) -> NDArray[Any]:
        """(n,) mean influence of each training sample over the test samples."""
        return self.scores.mean(0)

    def to_frame(self) -> pd.DataFrame:
        """One row a (test, train) pair: test_index, test_label, train_index, train_label, score; m·n rows.

        Targets of several numbers have no column.
        """
        import pandas as pd  # not needed before, and slow to load

        m, n = self.scores.shape
        columns = {
            "test_index": np.repeat(self.test_indices, n),
            "test_label": np.repeat(self.test_labels, n) if self.test_labels.ndim == 1 else None,
            "train_index": np.tile(np.arange(n), m),
            "train_label": np.tile(self.train_labels, m) if self.train_labels.ndim == 1 else None,
            "score": self.scores.ravel(),
        }
        return pd.DataFrame({name: values for name, values in columns.items() if values is not None})

    def save(self, path: str | Path) -> None:
        """Write a compressed .npz without pickled objects; settings and health ride along as JSON."""
        members = [asdict(one) for one in self.members]
        about = json.dumps({"settings": self.settings, "health": asdict(self.health), "members": members})
        arrays = {name: getattr(self, name) for name in ("scores", "test_indices", "test_labels", "train_labels")}
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, about=np.array(about), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Influences:
        """Read what `save` wrote; CorruptFileError names a file that is damaged or another's.

        (`compat.load_results` reads the results files of `pytorch_influence_functions`.)
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"no influences at {path}; compute them with compute_influences(...).save(path)")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(str(arrays.pop("about")))
            health, *members = (
                Health(**one | {"slow_layers": tuple(one["slow_layers"])})
                for one in (about["health"], *about.get("members", ()))
            )
            return cls(**arrays, settings=about["settings"], health=health, members=tuple(members))
        except Exception as error:  # zipfile, zlib, numpy and json each have their own ways to say "damaged"
            raise CorruptFileError(
                f"{path} is damaged or not from Influences.save ({error}); compute it again"
            ) from error
