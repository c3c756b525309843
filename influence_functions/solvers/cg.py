"""`cg`: conjugate gradients on curvature products."""

from __future__ import annotations

import torch
from torch import Tensor

from .._support import NonFiniteError
from ..curvature import damped_product, largest_curvature
from ..problem import Problem
from ..stack import Gradients
from .base import Cost, Directions, Health, Prepared, relative_residual, solver, stepwise_cost


@solver("cg")
class ConjugateGradients(Prepared):
    """All right-hand sides at once (Hestenes & Stiefel 1952), on the Gauss-Newton matrix or the Hessian."""

    @classmethod
    def cost(cls, problem: Problem, tests: int) -> Cost:
        """Vectors (tests, p) of the recursion; a product with the curvature is a pass of its own for each test."""
        return stepwise_cost(problem)

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.largest = largest_curvature(problem, problem.sample)

    def solve(self, tests: Gradients, damping: float | None = None) -> Directions:
        """Until the residual of every row is below the tolerance, or `iterations` are used up."""
        problem, v, damping = self.problem, tests.dense(), damping or self.damping
        s, iterations = self._iterate(v, damping)
        worst = relative_residual(damped_product(problem, s, problem.sample, damping) - v, v)
        return Directions(
            tests, tests.like(s), Health("cg", worst, damping, self.largest, iterations, len(problem.sample))
        )

    def _iterate(self, v: Tensor, damping: float) -> tuple[Tensor, int]:
        settings = self.problem.settings
        s, residual, step = torch.zeros_like(v), v.clone(), v.clone()
        squared, iteration = residual.square().sum(1), 0
        goal = (settings.tolerance * v.norm(dim=1)).square()
        while iteration < settings.iterations and bool((squared > goal).any()):
            open_rows = squared > goal
            product = damped_product(self.problem, step[open_rows], self.problem.sample, damping)
            bend = (step[open_rows] * product).sum(1)
            if not bool((bend > 0).all()):
                raise NonFiniteError(
                    f"H + λI is not positive along a search direction; raise damping above {damping:.1e}, "
                    "or use curvature='gauss_newton'"
                )
            length = (squared[open_rows] / bend)[:, None]
            s[open_rows] += length * step[open_rows]
            residual[open_rows] -= length * product
            renewed = residual[open_rows].square().sum(1)
            step[open_rows] = residual[open_rows] + (renewed / squared[open_rows])[:, None] * step[open_rows]
            squared[open_rows] = renewed
            iteration += 1
        return s, iteration
