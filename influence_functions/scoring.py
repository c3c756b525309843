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
from .problem import CHECK_EVERY, Problem, join_targets
from .solvers import Solved

Member = tuple[Problem, Sequence[Solved]]
"""One model with the training data, and solutions for it."""


@dataclass(frozen=True, eq=False)
class _Scoring:
    """Indices (b,) → for each member the scores (m, b) by each of its solutions, and the targets; read once for all.

    Gradients are held against autograd in every chunk if told `always`; else in the last, in one of `CHECK_EVERY`, and
    wherever a chunk goes a new way through a model. A disagreement is then an error, as all have to be looked at.
    """

    members: tuple[Member, ...]
    chunk: int
    always: bool = False

    def __call__(self, chosen: Tensor) -> tuple[list[list[Tensor]], Tensor]:
        train = self.members[0][0].train
        last = int(chosen[-1]) == train.size - 1
        check = self.always or last or int(chosen[0]) // self.chunk % CHECK_EVERY == 0
        raw = train.batch(chosen)

        def scores(problem: Problem, solved: Sequence[Solved]) -> list[Tensor]:
            with problem.told("training", chosen):
                gradients = problem.maker(*problem.fitted(*raw), check, self.always)
            gradients = gradients if all(one.reads_once for one in solved) else gradients.made()
            return [one.scores(gradients).cpu() for one in solved]

        return [scores(*member) for member in self.members], raw[1].cpu()


def score_training(members: Sequence[Member], always: bool = False) -> tuple[list[list[NDArray[Any]]], NDArray[Any]]:
    """For each member, (m, n) influences by each of its solutions, in one pass over the data, and targets (n, …)."""
    settings, everything = members[0][0].settings, torch.arange(members[0][0].train.size)
    chunk = min(problem.settings.chunk for problem, _ in members)
    # Each its own copy: a part of a tensor travels to another process with all of it.
    chunks = (chosen.clone() for chosen in everything.split(chunk))
    parts = in_parallel(_Scoring(tuple(members), chunk, always), chunks, settings.jobs)
    count = math.ceil(len(everything) / chunk)
    shown = tqdm(parts, total=count, desc="scoring", unit="chunk", leave=False, disable=not settings.progress)
    try:
        found, targets = zip(*shown)
    except DisagreementError:
        return score_training(members, always=True)
    scores = [[join_scores(column) for column in zip(*of_member)] for of_member in zip(*found)]
    return scores, join_targets(list(targets)).numpy()


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
