"""What a solver is: prepared once for a problem, then asked about any test gradients, at any damping.

    SOLVERS[name](problem) → Prepared .solve(tests, damping=None) → Solved .scores(chunk) (m, b) · .own() (m,) · .health

A solver of your own is one more class, in a file of your own:

>>> @solver("scaled")
... class Scaled(Prepared):
...     def solve(self, tests, damping=None):
...         rate = damping or self.problem.damping
...         return Directions(tests, tests.dense() / rate, Health("scaled", 0.0, rate))
>>> "scaled" in SOLVERS
True
>>> _ = SOLVERS.pop("scaled")
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Problem
from ..stack import Gradients

CONVERGED = 0.1  # relative residual
SOLVERS: dict[str, type[Prepared]] = {}


@dataclass(frozen=True)
class Health:
    """What a solver says of its own answer.

    residual            largest relative residual ‖(H + λI)s − v‖ / ‖v‖ over the test samples, in the solver's own H
    damping             λ, in units of the curvature;  largest_eigenvalue: of that H (None where there is no H)
    iterations          steps taken (0: direct);  samples: training samples that H was made of
    seconds_solve, seconds_score   wall time of the two halves of the call
    labels              of the samples that the Fisher matrix is made of: "drawn" from the model's own prediction,
                        "given" with the data, or "" where the solver needs none
    slow_layers         layers that no rule serves: they are differentiated once a sample, or with the whole network

    >>> Health("cg", residual=0.3, damping=0.01, iterations=5).converged
    False
    """

    solver: str
    residual: float
    damping: float
    largest_eigenvalue: float | None = None
    iterations: int = 0
    samples: int = 0
    seconds_solve: float = math.nan
    seconds_score: float = math.nan
    labels: str = ""
    slow_layers: tuple[str, ...] = ()

    @property
    def converged(self) -> bool:
        """Whether the residual is below a tenth (NaN: unknown, so not)."""
        return self.residual < CONVERGED


class Solved(ABC):
    """The answer for m test samples."""

    health: Health

    @abstractmethod
    def scores(self, chunk: Gradients) -> Tensor:
        """(m, b): n times the influence of b training samples on each test sample."""

    @abstractmethod
    def own(self) -> Tensor:
        """(m,): n times the influence of each test sample on itself, had it been a training sample."""

    @abstractmethod
    def directions(self) -> Tensor:
        """(m, p): s = (H + λI)⁻¹∇L(z_test)."""


@dataclass(frozen=True, eq=False)
class Directions(Solved):
    """The answer as the m solutions themselves: `s` (m, p), for `tests` of the same m samples."""

    tests: Gradients | None
    s: Tensor
    health: Health

    def scores(self, chunk: Gradients) -> Tensor:
        """Inner products of gradients and solutions."""
        return chunk.against(self.s)

    def own(self) -> Tensor:
        """Inner products of each test gradient with its own solution."""
        if self.tests is None:
            raise ValueError("solutions that were read from a file have no test gradients with them")
        return (self.tests.dense() * self.s).sum(1)

    def directions(self) -> Tensor:
        """`s`."""
        return self.s


class Prepared(ABC):
    """A solver that has done, once, whatever does not depend on the test samples and on the damping."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @abstractmethod
    def solve(self, tests: Gradients, damping: float | None = None) -> Solved:
        """Solve (H + λI)s = v for the gradients v of m test samples; damping λ: None for the problem's own."""


def solver(name: str) -> Callable[[type[Prepared]], type[Prepared]]:
    """Register a `Prepared` under the name that settings call it by."""

    def register(kind: type[Prepared]) -> type[Prepared]:
        SOLVERS[name] = kind
        return kind

    return register


def check_solver(name: str) -> None:
    """ValueError for a solver that nobody registered."""
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}: use one of {', '.join(SOLVERS)}")


def prepare(problem: Problem) -> Prepared:
    """The solver named in the problem's settings, ready for any test samples."""
    check_solver(problem.settings.solver)
    return SOLVERS[problem.settings.solver](problem)


def relative_residual(residual: Tensor, v: Tensor) -> float:
    """Largest ‖residual‖ / ‖v‖ over the rows; a zero right-hand side has a zero residual."""
    return float((residual.norm(dim=1) / v.norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny)).max())
