"""`identity`: no curvature at all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..problem import Problem
from ..stack import Gradients
from .base import Cost, Health, Prepared, Solved, solver


@dataclass(frozen=True, eq=False)
class Plain(Solved):
    """v / λ, which needs inner products of gradients only."""

    tests: Gradients
    health: Health
    reads_once = True

    def scores(self, chunk: Gradients) -> Tensor:
        """gᵀv / λ."""
        return self.tests.products(chunk) / self.health.damping

    def own(self) -> Tensor:
        """vᵀv / λ."""
        return self.tests.squares() / self.health.damping

    def directions(self) -> Tensor:
        """(m, p)."""
        return self.tests.dense() / self.health.damping


@solver("identity")
class Identity(Prepared):
    """H = 0: the plain gradient dot product divided by λ, the baseline that every claim must beat."""

    @classmethod
    def cost(cls, problem: Problem, tests: int) -> Cost:
        """The gradients of the test samples, twice while they are joined."""
        one = problem.footprint
        return Cost(0, 2 * one.gradient, one.sample, problem.like.element_size())

    def solve(self, tests: Gradients, damping: float | None = None) -> Plain:
        """Nothing to solve."""
        return Plain(tests, Health("identity", 0.0, damping or self.damping))
