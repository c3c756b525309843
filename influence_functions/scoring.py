"""One pass over the training data: the scores of every training sample by solutions that are ready."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm  # plain text: the widget bars of tqdm.auto leave metadata that GitHub refuses to render

from ._support import NonFiniteError, in_parallel
from .gradients import DisagreementError
from .problem import Problem, join_targets
from .solvers import Solved

CHECK_EVERY = 8  # chunks of training samples, of which one is held against autograd


@dataclass(frozen=True, eq=False)
class _Scoring:
    """Indices (b,) → scores (m, b) of these training samples by each of several solutions, and their targets.

    Gradients are held against autograd in every chunk if told `always`, else in one of `CHECK_EVERY`, where a
    disagreement is an error: then all have to be looked at.
    """

    problem: Problem
    solved: tuple[Solved, ...]
    always: bool = False

    def __call__(self, chosen: Tensor) -> tuple[list[Tensor], Tensor]:
        problem, first, last = self.problem, int(chosen[0]), int(chosen[-1])
        check = self.always or first // problem.settings.chunk % CHECK_EVERY == 0 or last == problem.train.size - 1
        gradients, targets = problem.made(problem.train, chosen, "training", check, self.always)
        return [one.scores(gradients).cpu() for one in self.solved], targets.cpu()


def score_training(
    problem: Problem, solved: Sequence[Solved], always: bool = False
) -> tuple[list[NDArray[Any]], NDArray[Any]]:
    """(m, n) influences by each of the solutions, in one pass over the training data, and its targets (n, …)."""
    settings, everything = problem.settings, torch.arange(problem.train.size)
    chunk = min(settings.chunk, problem.train.size)
    problem.check_memory(chunk, f"of a chunk of {chunk} samples", f"chunk below {chunk}")
    # Each its own copy: a part of a tensor travels to another process with all of it.
    chunks = (chosen.clone() for chosen in everything.split(settings.chunk))
    parts = in_parallel(_Scoring(problem, tuple(solved), always), chunks, settings.jobs)
    count = math.ceil(problem.train.size / settings.chunk)
    shown = tqdm(parts, total=count, desc="scoring", unit="chunk", leave=False, disable=not settings.progress)
    try:
        found, targets = zip(*shown)
    except DisagreementError:
        return score_training(problem, solved, always=True)
    return [join_scores(column) for column in zip(*found)], join_targets(list(targets)).numpy()


def join_scores(parts: Sequence[Tensor]) -> NDArray[Any]:
    """(m, n) influences from the products of chunks (m, b) of training gradients; NonFiniteError names a bad sample."""
    products = torch.cat(list(parts), dim=1)
    scores = products / products.shape[1]
    if not torch.isfinite(scores).all():
        first = int((~torch.isfinite(scores)).any(0).nonzero()[0])
        raise NonFiniteError(
            f"the score of training sample {first} is NaN or infinite; check its values, raise damping"
        )
    return scores.cpu().numpy()
