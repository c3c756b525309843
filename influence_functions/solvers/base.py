"""What a solver is: prepared once for a problem, then asked about any test gradients, at any damping.

    SOLVERS[name](problem) → Prepared .solve(tests, damping=None) → Solved .scores(chunk) (m, b) · .own() (m,) · .health

A solver of your own is one more class, in a file of your own:

>>> @solver("scaled")
... class Scaled(Prepared):
...     def solve(self, tests, damping=None):
...         rate = damping or self.damping
...         return Directions(tests, tests.like(tests.dense() / rate), Health("scaled", 0.0, rate))
>>> "scaled" in SOLVERS
True
>>> _ = SOLVERS.pop("scaled")
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._support import NonFiniteError
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
    memory              bytes that the call was planned to take at most;  chunk: training samples at a time
    passes              over the training data: more than one where the test samples did not fit in at once
    choice              why this solver, where another was asked for first and did not fit

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
    memory: float = 0.0
    chunk: int = 0
    passes: int = 1
    choice: str = ""

    @property
    def converged(self) -> bool:
        """Whether the residual is below a tenth (NaN: unknown, so not)."""
        return self.residual < CONVERGED


class Solved(ABC):
    """The answer for m test samples.

    reads_once: whether `scores` reads each layer's gradients a single time, so that they need not all be in memory.
    """

    health: Health
    reads_once: ClassVar[bool] = False

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
    """The answer as the m solutions themselves, `s`, for `tests` of the same m samples."""

    tests: Gradients
    s: Gradients
    health: Health
    reads_once = True

    def scores(self, chunk: Gradients) -> Tensor:
        """Inner products of gradients and solutions."""
        return chunk.against(self.s)

    def own(self) -> Tensor:
        """Inner products of each test gradient with its own solution."""
        return (self.tests.dense() * self.s.dense()).sum(1)

    def directions(self) -> Tensor:
        """(m, p)."""
        return self.s.dense()


@dataclass(frozen=True)
class Cost:
    """Bytes that a solver takes: whatever it is asked, for each test sample, each sample of a chunk, and each pair."""

    fixed: float = 0.0
    test: float = 0.0
    sample: float = 0.0
    pair: float = 0.0

    def total(self, tests: int, chunk: int) -> float:
        """For so many test samples at once, and training samples at a time."""
        return self.fixed + tests * self.test + chunk * (self.sample + tests * self.pair)

    def plus(self, other: Cost) -> Cost:
        """Both."""
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))


@dataclass(frozen=True)
class Plan:
    """`tests` at once and `chunk` training samples at a time, at a price of `memory` bytes; why this `solver`."""

    solver: str = ""
    tests: int = 1
    chunk: int = 0
    memory: float = 0.0
    choice: str = ""


class Prepared(ABC):
    """A solver that has done, once, whatever does not depend on the test samples and on the damping."""

    plan = Plan()

    @classmethod
    def cost(cls, problem: Problem, tests: int) -> Cost:
        """What it will take, known before it is allocated; by default, that of gradients and solutions (tests, p)."""
        chunk = problem.footprint.sample + problem.footprint.gradient
        return Cost(problem.size, 3 * problem.size, chunk, problem.like.element_size())

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @property
    def damping(self) -> float:
        """λ as given, or what suits this solver's curvature."""
        return self.problem.damping

    @property
    def labels(self) -> str:
        """Whose the labels of the sampled gradients are: see `Health`."""
        return "given" if self.problem.measure.draw is None else "drawn"

    @abstractmethod
    def solve(self, tests: Gradients, damping: float | None = None) -> Solved:
        """Solve (H + λI)s = v for the gradients v of m test samples; damping λ: None for the solver's own."""

    def own(self, samples: Gradients) -> tuple[Tensor, Health]:
        """(k,): n times the influence of each of k training samples on itself, at the solver's own damping."""
        solved = self.solve(samples)
        return solved.own(), solved.health


def solver(name: str) -> Callable[[type[Prepared]], type[Prepared]]:
    """Register a `Prepared` under the name that settings call it by."""

    def register(kind: type[Prepared]) -> type[Prepared]:
        SOLVERS[name] = kind
        return kind

    return register


def relative_residual(residual: Tensor, v: Tensor) -> float:
    """Largest ‖residual‖ / ‖v‖ over the rows; a zero right-hand side has a zero residual."""
    return float((residual.norm(dim=1) / v.norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny)).max())


def factor_of(gram: Tensor, shift: float, damping: float) -> Tensor:
    """Cholesky factor of a Gram matrix (r, r) with `shift` added to its diagonal; the error names the damping."""
    factor, failed = torch.linalg.cholesky_ex(gram + shift * torch.eye(len(gram), dtype=gram.dtype))
    if failed or not torch.isfinite(factor).all():
        raise NonFiniteError(f"the Gram matrix with damping {damping:.1e} is singular; raise damping")
    return factor


def stepwise_cost(problem: Problem) -> Cost:
    """Of a solver that takes curvature products: forward and reverse mode through the model for each pair."""
    return Cost(2 * problem.size, 10 * problem.size, problem.footprint.sample, 4 * problem.footprint.sample)
