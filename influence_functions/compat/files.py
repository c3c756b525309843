"""The package's results files, and a loader of the samples that its numbers single out."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from .._support import CorruptFileError
from ..results import Influences
from ..solvers import Health


def load_results(path: str | Path) -> Influences:
    """Read a results file of `pytorch_influence_functions`, ours or the original's: (m, n) scores, positive = helpful.

    In such a file influences have the opposite sign: they are turned. Where its helpful and harmful lists are swapped,
    as the original swaps them, a warning says so; ranks here follow the scores, never its lists. It does not say what
    the labels of the training samples are: train_labels are −1. CorruptFileError names a file that is none.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no results at {path}; calc_influences(...) writes them")
    try:
        entries = {int(index): entry for index, entry in json.loads(path.read_text(encoding="utf-8")).items()}
        scores = -np.array([entry["influence"] for entry in entries.values()], dtype=np.float32)
        labels = np.array([entry["label"] for entry in entries.values()], dtype=np.int64)
        first = [(entry["harmful"][0], entry["helpful"][0]) for entry in entries.values()]
        if scores.ndim != 2 or not np.isfinite(scores).all():
            raise ValueError("its influences are not as many finite numbers for each test image")
        swapped = sum(row[harmful] > row[helpful] for row, (harmful, helpful) in zip(scores, first))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path} is no results file of pytorch_influence_functions ({error!r})") from error
    if swapped:
        warnings.warn(
            f"{path}: helpful and harmful are swapped in {swapped} of {len(entries)} test images, as "
            "pytorch_influence_functions does; put right here (positive = helpful)",
            stacklevel=2,
        )
    health = Health("pytorch_influence_functions", math.nan, math.nan)
    unknown = np.full(scores.shape[1], -1)
    return Influences(scores, np.array(list(entries)), labels, unknown, {"file": path.name}, health)


def influential_loader(
    influence: NDArray[Any],
    train: Any,
    share: float,
    batch_size: int = 128,
    seed: int = 0,
    labels: NDArray[Any] | Tensor | None = None,
) -> DataLoader[Any]:
    """A shuffled DataLoader of the most influential samples only: the `share` (0..1] of `train` that helps most.

    influence (n,): `mean_influences`, a row of `Influences.scores`, or any number where larger is better.
    labels (n,): when given, the share is taken within each class, so that none is lost.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be a fraction above 0 and at most 1, not {share}")
    group = np.zeros(len(train), dtype=int) if labels is None else np.asarray(labels)
    for name, values in (("influence", influence), ("labels", group)):
        if values.shape != (len(train),):
            raise ValueError(f"{name} must be one number a training image, ({len(train)},), not {values.shape}")
    best: list[int] = []
    for members in (np.flatnonzero(group == label) for label in np.unique(group)):
        ranked = members[np.argsort(-influence[members], kind="stable")]
        best += ranked[: max(1, round(share * len(members)))].tolist()
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(Subset(train, best), batch_size, shuffle=True, generator=generator)
