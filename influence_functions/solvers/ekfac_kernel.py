"""`ekfac_kernel`: what `ekfac` cannot see, the curvature between layers, from a few sampled gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..blocks import HELD
from ..matrices import matrices
from ..problem import Problem
from ..stack import Gradients
from .base import Cost, Health, Prepared, factor_of, solver
from .ekfac import Ekfac

SAMPLES = 500  # sampled gradients that are held
SHARE = 1.0  # μ, in mean eigenvalues of the sampled Fisher matrix in the metric D: best by LDS (measured)


@solver("ekfac_kernel")
class EkfacKernel(Ekfac):
    """H = GᵀG/r + μD: the Fisher matrix of r sampled gradients G, and D = EK-FAC + λI in the place of the identity.

    In a residual network the layers' gradients are strongly correlated, and a curvature that treats each layer by
    itself loses half of the quality (LDS, measured); the kernel sees all that r gradients can show, and EK-FAC stands
    for all that they cannot. By Woodbury, with K = GD⁻¹Gᵀ: (GᵀG/r + μD)⁻¹v = (D⁻¹v − D⁻¹Gᵀ(K + rμI)⁻¹GD⁻¹v) / μ.
    """

    name = "ekfac_kernel"

    @classmethod
    def cost(cls, problem: Problem, tests: int) -> Cost:
        """Besides that of `ekfac`: r gradients as factors, and of one layer at a time what is turned."""
        own, r = super().cost(problem, tests), min(SAMPLES, len(problem.sample))
        number = problem.like.element_size()
        written = 3 * number * min(HELD, r * problem.size // number)
        held = r * (problem.footprint.factored + 3 * problem.footprint.largest + 4 * 8 * r) + written
        return own.plus(Cost(held, 2 * problem.size + 24 * r))

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.sample = Gradients.collect(self._first(), min(SAMPLES, len(problem.sample)))
        self.factors: dict[float, tuple[Tensor, float]] = {}

    def _first(self) -> Iterator[Gradients]:
        """The sampled gradients, up to so many."""
        left = SAMPLES
        for gradients in self._sampled(check=False):
            yield gradients.select(slice(left))
            left -= len(gradients)
            del gradients  # with what its layers were given, before the next ones are made
            if left <= 0:
                return

    def factor(self, damping: float) -> tuple[Tensor, float]:
        """Cholesky factor of K + rμI in float64, and μ."""
        if damping not in self.factors:
            parts = (
                matrices(self.sample.blocks[one.block], one.sheet).turned(one.basis).gram(1 / (one.values + damping))
                for one in self.fitted
            )
            gram = torch.stack([part.cpu().double() for part in parts]).sum(0)
            shift = SHARE * float(gram.diagonal().mean())
            self.factors = {damping: (factor_of(gram, shift, damping), shift / len(gram))}
        return self.factors[damping]

    def apply(self, gradients: Gradients, damping: float) -> Gradients:
        """H⁻¹ times each gradient, by Woodbury: see the class."""
        factor, mu = self.factor(damping)
        base = super().apply(gradients, damping)
        k = self.sample.against(base)  # (b, r)
        weights = torch.cholesky_solve(k.cpu().double().T, factor).T.to(k)
        taken = super().apply(gradients.like(self.sample.weighted(weights)), damping)
        return base.of_blocks((a.dense() - b.dense()) / mu for a, b in zip(base.blocks, taken.blocks))

    def product(self, gradients: Gradients, damping: float) -> Gradients:
        """H times each gradient."""
        seen = self.sample.weighted(self.sample.against(gradients)) / len(self.sample)
        rest, mu = super().product(gradients, damping), self.factor(damping)[1]
        return rest.of_blocks(a.dense() + mu * b.dense() for a, b in zip(rest.like(seen).blocks, rest.blocks))

    def own(self, samples: Gradients) -> tuple[Tensor, Health]:
        """By way of the solutions."""
        return Prepared.own(self, samples)
