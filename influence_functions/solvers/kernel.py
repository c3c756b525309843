"""`kernel`: direct, through the r × r Gram matrix of r sampled gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..curvature import largest_eigenvalue
from ..problem import Problem
from ..stack import Gradients
from .base import Cost, Directions, Health, Prepared, Solved, factor_of, relative_residual, solver

CHECKED, CHECKED_ABOVE = 4, 1e-4  # solutions written out, where the residual may exceed this


def gram_matrix(gradients: Gradients, blocks: int = 8) -> Tensor:
    """(r, r) inner products of all samples, float64 on the CPU; the lower half is computed and mirrored."""
    r, columns = len(gradients), []
    for start in range(0, r, step := -(-r // blocks)):
        below = gradients.select(slice(start, r)).products(gradients.select(slice(start, start + step)))
        columns.append(torch.cat([below.new_zeros(start, below.shape[1]), below]).cpu().double())
    lower = torch.cat(columns, dim=1).tril()
    return lower + lower.tril(-1).T


@dataclass(frozen=True, eq=False)
class InnerProducts(Solved):
    """The answer without any direction s: only inner products of gradients are ever needed.

    With K the products among the r sampled gradients G and k those of a test gradient v with them,
    gᵀ(GᵀG/r + λI)⁻¹v = (gᵀv − (Gg)ᵀ(K + rλI)⁻¹k) / λ: at a price that depends on the `width` of the gradients instead
    of p, and hardly on the number of test samples. weights (m, r) = (K + rλI)⁻¹k.
    """

    sample: Gradients
    tests: Gradients
    weights: Tensor
    health: Health

    def scores(self, chunk: Gradients) -> Tensor:
        """(m, b)."""
        return (self.tests.products(chunk) - self.weights @ self.sample.products(chunk)) / self.health.damping

    def own(self) -> Tensor:
        """(m,)."""
        products = self.tests.products(self.sample)
        return (self.tests.squares() - (products * self.weights).sum(1)) / self.health.damping

    def directions(self) -> Tensor:
        """(m, p): s = (v − Gᵀ(K + rλI)⁻¹k) / λ."""
        return (self.tests.dense() - self.sample.weighted(self.weights)) / self.health.damping


@solver("kernel")
class Kernel(Prepared):
    """The damped Fisher inverse by Woodbury: (GᵀG/r + λI)⁻¹ v = (v − Gᵀ (GGᵀ + rλI)⁻¹ G v) / λ.

    No step size, no divergence; factorised in float64, once for each λ.
    """

    @classmethod
    def cost(cls, problem: Problem, tests: int) -> Cost:
        """The sampled gradients, and some r × r matrices in float64."""
        r, one, number = len(problem.sample), problem.footprint, problem.like.element_size()
        fixed = r * one.gradient + 4 * 8 * r * r
        products = _pays(r, tests, one.width, problem.size // number)
        test = 2 * one.gradient + (24 * r if products else 2 * problem.size)
        return Cost(fixed, test, one.sample + (one.gradient + r * number if products else 0), number)

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.sample = problem.sampled
        self.gram = gram_matrix(self.sample)
        self.largest = largest_eigenvalue(lambda vector: vector @ self.gram, self.gram[:1]) / len(self.gram)
        self.factors: dict[float, Tensor] = {}

    def solve(self, tests: Gradients, damping: float | None = None) -> Solved:
        """Two roads to the same numbers: directions, or inner products where these cost less for so many tests."""
        return self.by_products(tests, damping) if self.pays(len(tests)) else self.by_directions(tests, damping)

    def pays(self, m: int) -> bool:
        """Whether inner products cost less."""
        return _pays(len(self.sample), m, self.sample.width, self.sample.size)

    def by_directions(self, tests: Gradients, damping: float | None = None) -> Directions:
        """The residual is that of the directions, in their own precision."""
        damping = damping or self.damping
        v = tests.dense()
        s = self.directions(v, self.weights(tests, damping)[0], damping)
        return Directions(tests, tests.like(s), self.health(self.residual(s, v, damping), damping))

    def directions(self, v: Tensor, weights: Tensor, damping: float) -> Tensor:
        """(m, p): s = (v − Gᵀ(K + rλI)⁻¹k) / λ."""
        return (v - self.sample.weighted(weights)) / damping

    def residual(self, s: Tensor, v: Tensor, damping: float) -> float:
        """Of solutions s (m, p), by products with the sampled gradients."""
        image = self.sample.weighted(self.sample.against(self.sample.like(s))) / len(self.sample) + damping * s
        return relative_residual(image - v, v)

    def by_products(self, tests: Gradients, damping: float | None = None) -> InnerProducts:
        """The residual follows from the Gram matrix, since that of s is a weighted sum of the sampled gradients.

        What is lost where inner products are subtracted, the Gram matrix cannot see: where rounding may matter, the
        solutions that suffer most are written out and checked themselves.
        """
        damping = damping or self.damping
        (weights, k), shift = self.weights(tests, damping), len(self.gram) * damping
        exact, norms = weights.cpu().double(), tests.squares().cpu().double().sqrt()
        norms = norms.clamp_min(torch.finfo(torch.float64).tiny)
        error = (k - exact @ self.gram - shift * exact) / shift
        residual = float((((error @ self.gram) * error).sum(1).clamp_min(0).sqrt() / norms).max())
        rounding = torch.finfo(weights.dtype).eps * self.largest / damping
        if max(residual, rounding) > CHECKED_ABOVE:
            few = (exact.norm(dim=1) / norms).topk(min(CHECKED, len(exact))).indices.to(weights.device)
            v = tests.select(few).dense()
            rounding = self.residual(self.directions(v, weights[few], damping), v, damping)
        return InnerProducts(self.sample, tests, weights, self.health(max(residual, rounding), damping))

    def weights(self, tests: Gradients, damping: float) -> tuple[Tensor, Tensor]:
        """(K + rλI)⁻¹k (m, r), in the type of the gradients, and k (m, r) in float64 on the CPU."""
        products = tests.products(self.sample)
        k = products.cpu().double()
        return torch.cholesky_solve(k.T, self.factor(damping)).T.to(products), k

    def factor(self, damping: float) -> Tensor:
        """Cholesky factor of K + rλI."""
        if damping not in self.factors:
            factor = factor_of(self.gram, len(self.gram) * damping, damping)
            self.factors = {damping: factor}  # a sweep asks for one after the other
        return self.factors[damping]

    def health(self, residual: float, damping: float) -> Health:
        """Direct, so without iterations."""
        return Health("kernel", residual, damping, self.largest, samples=len(self.gram), labels=self.labels)


def _pays(r: int, m: int, width: int, size: int) -> bool:
    """Whether r + m inner products a training sample cost less than m full ones."""
    return (r + m) * width < m * size
