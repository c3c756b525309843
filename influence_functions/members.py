"""Several models side by side, and test samples in parts: what fits into the memory together."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ._support import allowed_bytes, free_bytes, pick_device
from .data import Source, as_source
from .problem import make_problem
from .results import Influences
from .scoring import score_training
from .settings import InfluenceSettings
from .solvers import Cost, Health, Prepared, prepare


@dataclass(frozen=True, eq=False)
class Member:
    """One model, ready for test samples."""

    prepared: Prepared
    seconds: float

    @classmethod
    def ready(cls, model: nn.Module, train: Source, test: Source, indices: Tensor, settings: InfluenceSettings,
              results: Cost) -> Member:  # fmt: skip
        """Prepared within the settings' memory, of which `results` takes its part."""
        start = time.perf_counter()
        problem = make_problem(model, train, settings)
        problem.check_tests(test, indices)
        prepared = prepare(problem, len(indices), results)
        return cls(prepared, time.perf_counter() - start)

    def health(self, each: Sequence[Health], passes: int, seconds_score: float) -> Health:
        """Of solutions for some test samples each."""
        plan = self.prepared.plan
        return dataclasses.replace(
            _joined(each), seconds_solve=self.seconds + sum(one.seconds_solve for one in each),
            seconds_score=seconds_score, slow_layers=self.prepared.problem.maker.slow_layers, memory=plan.memory,
            chunk=plan.chunk, passes=passes, choice=plan.choice,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Part:
    """Some test samples: by model and multiple of the damping their scores (m, n), and the solutions' health."""

    scores: list[list[NDArray[Any]]]
    healths: list[list[Health]]
    labels: Tensor
    train_labels: NDArray[Any]
    seconds: float

    @classmethod
    def of(cls, members: Sequence[Member], test: Source, indices: Tensor, factors: Sequence[float]) -> Part:
        """Solved for by each model, then scored in one pass over the training data for all of them."""
        solutions, healths = [], []
        for one in members:
            start, prepared = time.perf_counter(), one.prepared
            gradients, labels = prepared.problem.gradients(test, indices)
            solved = [prepared.solve(gradients, factor * prepared.damping) for factor in factors]
            seconds = time.perf_counter() - start
            healths.append([dataclasses.replace(each.health, seconds_solve=seconds) for each in solved])
            solutions.append((prepared.problem, solved))
        start = time.perf_counter()
        scores, train_labels = score_training(solutions)
        return cls(scores, healths, labels, train_labels, (time.perf_counter() - start) / len(members))


def influences(models: Sequence[nn.Module], train: Any, test: Source, indices: Tensor, settings: InfluenceSettings,
                factors: Sequence[float]) -> list[Influences]:  # fmt: skip
    """The mean influences of the models at each multiple of their damping; the data is read once for all of them.

    Once for each part of the test samples, where not all of them fit at once.
    """
    source = as_source(train, "train")
    shared, results = shares(models, settings, source.size, len(indices) * len(factors))
    members = [Member.ready(model, source, test, indices, shared, results) for model in models]
    at_once = min(one.prepared.plan.tests for one in members)
    parts = [Part.of(members, test, chosen, factors) for chosen in indices.split(at_once)]
    labels, train_labels = torch.cat([part.labels for part in parts]).numpy(), parts[0].train_labels
    about, found = settings.describe() | {"models": len(members)}, []
    for k in range(len(factors)):
        means = [average([of_member[k] for of_member in part.scores], settings.average) for part in parts]
        seconds = sum(part.seconds for part in parts)
        each = tuple(
            one.health([part.healths[i][k] for part in parts], len(parts), seconds) for i, one in enumerate(members)
        )
        scores = np.concatenate(means) if len(means) > 1 else means[0]
        health = dataclasses.replace(_joined(each), memory=sum(one.memory for one in each))
        found.append(Influences(scores, indices.numpy(), labels, train_labels, about, health, each))
    return found


def shares(
    models: Sequence[nn.Module], settings: InfluenceSettings, n: int, rows: int
) -> tuple[InfluenceSettings, Cost]:
    """Of each model: its part of the memory, and what the scores (rows, n), which lie beside the CPU, take of it."""
    device = pick_device(settings.device)
    numbers = n * max((p.dtype.itemsize for p in models[0].parameters()), default=4)
    room, scores = allowed_bytes(settings.memory, device), 2 * rows * numbers
    if device.type == "cpu":
        results = Cost(scores / len(models), 3 * numbers)
    elif scores > (free := free_bytes(torch.device("cpu"))):
        raise ValueError(f"{rows} × {n} scores need {scores / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
    else:
        results = Cost()
    return (settings.changed({"memory": max(room / len(models), 1.0)}) if math.isfinite(room) else settings), results


def average(each: Sequence[NDArray[Any]], how: str = "spread") -> NDArray[Any]:
    """The mean of several models' scores (m, n), one scale for all or as they are: see `InfluenceSettings.average`.

    >>> average([np.array([[1.0, 3.0]]), np.array([[10.0, -10.0]])])  # standard deviations 1 and 10, mean 5.5
    array([[5.5, 5.5]])
    """
    if len(each) == 1:
        return each[0]
    if how == "plain":
        return np.mean(each, axis=0)
    spreads = np.stack([scores.std(axis=1, keepdims=True) for scores in each])
    unit = spreads.mean(axis=0)
    return np.mean([scores * (unit / np.where(own > 0, own, 1)) for scores, own in zip(each, spreads)], axis=0)


def _joined(each: Sequence[Health]) -> Health:
    """Of several models, or for several test samples: the worst residual, the mean damping, all slow layers."""
    return dataclasses.replace(
        each[0],
        residual=max(one.residual for one in each),
        damping=float(np.mean([one.damping for one in each])),
        largest_eigenvalue=max((one.largest_eigenvalue for one in each if one.largest_eigenvalue), default=None),
        iterations=max(one.iterations for one in each),
        seconds_solve=sum(one.seconds_solve for one in each),
        seconds_score=sum(one.seconds_score for one in each),
        slow_layers=tuple(dict.fromkeys(name for one in each for name in one.slow_layers)),
    )
