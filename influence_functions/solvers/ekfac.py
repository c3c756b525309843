"""`ekfac`: one small eigenbasis a layer, for models whose gradients are too large to be kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._support import NonFiniteError
from ..blocks import HELD
from ..kronecker import LONGEST, Basis, Sheet, Side, moment_of, sheets
from ..matrices import matrices
from ..problem import CHECK_EVERY, Problem
from ..stack import Gradients
from .base import Cost, Directions, Health, Prepared, relative_residual, solver

DAMPING = 2.0  # automatic λ, in means of the curvature's eigenvalues: best by LDS (measured, see benchmarks/quality.py)
CHECKED = 2  # solutions whose residual is computed


@dataclass(frozen=True, eq=False)
class Fitted:
    """The curvature of one sheet: directions, and in each of them its eigenvalue (o, d)."""

    block: int
    sheet: Sheet
    basis: Basis
    values: Tensor


@solver("ekfac")
class Ekfac(Prepared):
    """Eigenvalue-corrected Kronecker factors (George et al. 2018, arXiv:1806.03884; Grosse et al. 2023).

    H is block-diagonal, a block a layer. Its directions are the Kronecker products of those of the two sides of the
    gradients G (o, d): the eigenvectors of the means of GGᵀ and GᵀG (Gupta et al. 2018, arXiv:1802.09568), which need
    no assumption that inputs and deltas are independent, as those of K-FAC do, and serve any parameter. The
    eigenvalues are fitted, the mean of the squared gradients in each direction, so that the diagonal of H is right in
    this basis. Small layers and norms have a full matrix of their own (`EXACT` in kronecker.py).
    Reads the sampled gradients twice and keeps none: memory for two bases a layer and p eigenvalues.
    """

    name = "ekfac"

    @classmethod
    def cost(cls, problem: Problem, tests: int) -> Cost:
        """Two bases and the eigenvalues of each layer; of each test sample its gradient, and the solution twice."""
        number, one = problem.like.element_size(), problem.footprint
        found = [sheet for shapes in problem.maker.shapes() for sheet in sheets(shapes)]
        sides = [side * side for sheet in found for side in (sheet.rows, sheet.columns) if side <= LONGEST]
        largest = number * max(sheet.rows * sheet.columns for sheet in found)
        slices = 4 * number * HELD if 16 * largest > number * HELD else 0  # what is written out, where not all at once
        fixed = number * (2 * sum(sides) + 3 * max(sides)) + (2 + 3 * CHECKED) * problem.size + slices
        test = problem.size + 2 * one.gradient + 5 * largest
        return Cost(fixed, test, one.sample + (0 if slices else 4 * largest), number)

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.fitted = self._with_values(self._bases())
        total = sum(float(one.values.sum()) for one in self.fitted)
        if not math.isfinite(total):
            raise NonFiniteError("the gradient of a training sample is NaN or infinite; check the model and the data")
        self.mean = total / sum(one.values.numel() for one in self.fitted)

    @property
    def damping(self) -> float:
        """λ as given, or twice the mean of all p eigenvalues."""
        given = self.problem.settings.damping
        if given is None and self.mean <= 0:
            raise ValueError("every sampled gradient is zero, so no damping can be derived; pass damping=")
        return given or DAMPING * self.mean

    def _sampled(self, check: bool) -> Iterator[Gradients]:
        with self.problem.told("training", self.problem.sample):
            for i, batch in enumerate(self.problem.drawn_batches()):
                yield self.problem.maker(*batch, check and i % CHECK_EVERY == 0, light=False)

    def _bases(self) -> list[list[tuple[Sheet, Basis]]]:
        """Of each block the sheets, with their directions."""
        like = self.problem.like
        found = [
            [(sheet, moment_of(sheet.rows, like), moment_of(sheet.columns, like)) for sheet in sheets(each)]
            for each in self.problem.maker.shapes()
        ]
        for gradients in self._sampled(check=True):
            for block, parts in zip(gradients.blocks, found):
                for sheet, left, right in parts:
                    matrices(block, sheet).add_moments(left, right)
            del gradients  # with what its layers were given, before the next ones are made
        return [[(sheet, Basis(Side.of(a, like), Side.of(b, like))) for sheet, a, b in parts] for parts in found]

    def _with_values(self, bases: list[list[tuple[Sheet, Basis]]]) -> list[Fitted]:
        """The mean squared gradient in each direction."""
        like, count = self.problem.like, len(self.problem.sample)
        found = [[(one, like.new_zeros(one[0].rows, one[0].columns)) for one in parts] for parts in bases]
        for gradients in self._sampled(check=False):
            for block, parts in zip(gradients.blocks, found):
                for (sheet, basis), total in parts:
                    total += matrices(block, sheet).turned(basis).squares()
            del gradients
        return [Fitted(k, *one, total / count) for k, parts in enumerate(found) for one, total in parts]

    def solve(self, tests: Gradients, damping: float | None = None) -> Directions:
        """Each layer by itself: turn, divide, turn back."""
        damping = damping or self.damping
        few, s = tests.select(slice(CHECKED)), self.apply(tests, damping)
        return Directions(tests, s, self.health(few, s.select(slice(CHECKED)), damping))

    def own(self, samples: Gradients) -> tuple[Tensor, Health]:
        """In the basis itself, without any solution written out."""
        blocks, damping, few = samples.blocks, self.damping, samples.select(slice(CHECKED))
        parts = [
            matrices(blocks[one.block], one.sheet).turned(one.basis).weighed(1 / (one.values + damping))
            for one in self.fitted
        ]
        return torch.stack(parts).sum(0), self.health(few, self.apply(few, damping), damping)

    def health(self, few: Gradients, s: Gradients, damping: float) -> Health:
        """The residual is that of the first few solutions."""
        v = few.dense()
        residual = relative_residual(self.product(s, damping).dense() - v, v)
        largest = max(float(one.values.max()) for one in self.fitted)
        samples = len(self.problem.sample)
        return Health(self.name, residual, damping, largest, samples=samples, labels=self.labels)

    def apply(self, gradients: Gradients, damping: float) -> Gradients:
        """(H + λI)⁻¹ times each gradient."""
        return self._by(gradients, lambda values: 1 / (values + damping))

    def product(self, gradients: Gradients, damping: float) -> Gradients:
        """(H + λI) times each gradient."""
        return self._by(gradients, lambda values: values + damping)

    def _by(self, gradients: Gradients, weigh: Callable[[Tensor], Tensor]) -> Gradients:
        def parts() -> Iterator[Tensor]:
            for k, block in enumerate(gradients.blocks):
                v = block.dense()
                s = torch.empty_like(v)
                for one in (one for one in self.fitted if one.block == k):
                    turned = one.basis.turn(one.sheet.cut(v))
                    one.sheet.put(one.basis.back(turned * weigh(one.values)), s)
                yield s

        return gradients.of_blocks(parts())
