"""`lissa`: the paper's stochastic recursion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .._support import NonFiniteError
from ..curvature import damped_product, largest_curvature
from ..problem import Problem
from ..stack import Gradients
from .base import Cost, Directions, Health, Prepared, relative_residual, solver, stepwise_cost


@solver("lissa")
class Lissa(Prepared):
    """h ← v + h − (H_batch + λI)h / scale, whose fixed point is scale·(H + λI)⁻¹v.

    Koh & Liang 2017, section 3; Agarwal et al. 2017. Unlike in `pytorch_influence_functions`, h is fed back, λ is not
    multiplied by the scale, and the result is divided by it. The scale must exceed every eigenvalue of H_batch + λI met
    on the way: it is set to twice the largest one found by power iteration on a few batches.
    """

    @classmethod
    def cost(cls, problem: Problem, tests: int) -> Cost:
        """Vectors (tests, p) of the recursion; a product with the curvature is a pass of its own for each test."""
        return stepwise_cost(problem)

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        settings = problem.settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        met = [problem.sample, *(self.draw() for _ in range(4))]
        self.start = self.generator.get_state()  # each solve begins here, so that none depends on those before
        self.tops = [largest_curvature(problem, batch) for batch in met[: 1 if settings.scale else None]]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "generator": None}  # torch cannot pickle it; its state is in `start`

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.generator = torch.Generator()

    def scale(self, damping: float) -> float:
        """What a step is divided by."""
        return self.problem.settings.scale or 2 * (max(self.tops) + damping)

    def cure(self, damping: float) -> str:
        """What to change where it diverges."""
        return (
            f"scale is {self.scale(damping):.3g}, the largest eigenvalue {self.tops[0]:.3g}: raise scale or "
            "batch_size, or use solver='kernel'"
        )

    def draw(self) -> Tensor:
        """Indices of a random batch of the curvature's sample; all of it when the batch is as large."""
        sample, size = self.problem.sample, self.problem.settings.batch_size
        return sample if size >= len(sample) else sample[torch.randint(len(sample), (size,), generator=self.generator)]

    def recursion(self, v: Tensor, depths: Sequence[int], damping: float) -> Iterator[Tensor]:
        """The solution after each of `depths` (rising) steps of one recursion."""
        h, scale = v.clone(), self.scale(damping)
        for step in range(1, depths[-1] + 1):
            h = v + h - damped_product(self.problem, h, self.draw(), damping) / scale
            if (step % 20 == 0 or step in depths) and not torch.isfinite(h).all():
                raise NonFiniteError(f"LiSSA diverged to NaN or infinity; {self.cure(damping)}")
            if step in depths:
                yield h / scale

    def residual(self, s: Tensor, v: Tensor, damping: float) -> float:
        """Largest relative residual of solutions s (m, p)."""
        return relative_residual(damped_product(self.problem, s, self.problem.sample, damping) - v, v)

    def residuals(self, v: Tensor, depths: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Each of `depths` and the residual that so many steps leave, without beginning anew for each."""
        self.generator.set_state(self.start)
        for depth, s in zip(depths, self.recursion(v, depths, self.problem.damping)):
            yield depth, self.residual(s, v, self.problem.damping)

    def average(self, v: Tensor, depth: int, repeats: int, damping: float) -> Tensor:
        """(m, p): the mean of `repeats` recursions of `depth` steps."""
        self.generator.set_state(self.start)
        return torch.stack([next(self.recursion(v, [depth], damping)) for _ in range(repeats)]).mean(0)

    def solve(self, tests: Gradients, damping: float | None = None) -> Directions:
        """`iterations` steps, averaged over `repeats` runs."""
        settings, v, damping = self.problem.settings, tests.dense(), damping or self.damping
        s = self.average(v, settings.iterations, settings.repeats, damping)
        samples, residual = len(self.problem.sample), self.residual(s, v, damping)
        if not residual <= 1:
            raise NonFiniteError(f"LiSSA diverged to a residual of {residual:.1e}; {self.cure(damping)}")
        steps = settings.iterations * settings.repeats
        return Directions(tests, tests.like(s), Health("lissa", residual, damping, self.tops[0], steps, samples))
