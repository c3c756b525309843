"""`ekfac_kernel`: what `ekfac` cannot see, the curvature between layers, from a few sampled gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .._support import NonFiniteError
from ..blocks import HELD
from ..matrices import matrices
from ..problem import Problem
from ..stack import Gradients
from .base import Cost, Directions, Health, Prepared, relative_residual, solver
from .ekfac import CHECKED, Ekfac

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
        """Besides that of `ekfac`: r gradients as factors, twice while they are joined, and layers that are turned."""
        own, r = super().cost(problem, tests), min(SAMPLES, len(problem.sample))
        number = problem.like.element_size()
        written = 3 * number * min(HELD, r * problem.size // number)
        held = r * (2.5 * problem.footprint.factored + 4 * 8 * r) + written
        return own.plus(Cost(held, 2 * problem.size + 24 * r))

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        parts, count = [], 0
        for gradients in self._sampled(check=False):
            parts.append(gradients.select(slice(SAMPLES - count)))
            if (count := count + len(parts[-1])) == SAMPLES:
                break
        self.sample = Gradients.join(parts)
        self.factors: dict[float, tuple[Tensor, float]] = {}

    def factor(self, damping: float) -> tuple[Tensor, float]:
        """Cholesky factor of K + rμI in float64, and μ."""
        if damping not in self.factors:
            parts = (
                matrices(self.sample.blocks[one.block], one.sheet).turned(one.basis).gram(1 / (one.values + damping))
                for one in self.fitted
            )
            gram = sum(part.cpu().double() for part in parts)
            assert isinstance(gram, Tensor), "a model has parameters"
            shift = SHARE * float(gram.diagonal().mean())
            factor, failed = torch.linalg.cholesky_ex(gram + shift * torch.eye(len(gram), dtype=gram.dtype))
            if failed or not torch.isfinite(factor).all():
                raise NonFiniteError(f"the Gram matrix with damping {damping:.1e} is singular; raise damping")
            self.factors = {damping: (factor, shift / len(gram))}
        return self.factors[damping]

    def solve(self, tests: Gradients, damping: float | None = None) -> Directions:
        """By Woodbury, see the class."""
        damping = damping or self.damping
        factor, mu = self.factor(damping)
        base = self.apply(tests, damping)
        k = self.sample.against(base)  # (m, r)
        weights = torch.cholesky_solve(k.cpu().double().T, factor).T.to(k)
        taken = self.apply(tests.like(self.sample.weighted(weights)), damping)
        s = base.of_blocks((a.dense() - b.dense()) / mu for a, b in zip(base.blocks, taken.blocks))
        return Directions(tests, s, self._health(tests, s, damping, mu))

    def own(self, samples: Gradients) -> tuple[Tensor, Health]:
        """By way of the solutions."""
        return Prepared.own(self, samples)

    def _health(self, tests: Gradients, s: Gradients, damping: float, mu: float) -> Health:
        """The residual is that of the first few solutions, in all of H."""
        few, sample = s.select(slice(CHECKED)), self.sample
        v = tests.select(slice(CHECKED)).dense()
        image = sample.weighted(sample.against(few)) / len(sample) + mu * self.product(few, damping).dense()
        return self.about(relative_residual(image - v, v), damping)
