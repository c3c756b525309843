"""The gradients of b samples in one sheet (see `kronecker`), in whichever form they come: what is asked of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._support import in_use
from .blocks import Block, Lookup, Pair, slices
from .kronecker import Basis, Sheet

FEW = 8  # positions up to which pairs of them cost less than gradients that are written out (measured)


class Matrices(ABC):
    """The gradients of b samples in one sheet, (b, o, d), in whichever form they come."""

    @abstractmethod
    def add_moments(self, left: Tensor | None, right: Tensor | None) -> None:
        """Add the sums over the samples of GGᵀ to `left` (o, o), of GᵀG to `right` (d, d); None: of no interest."""

    @abstractmethod
    def turned(self, basis: Basis) -> Matrices:
        """The same in other directions."""

    @abstractmethod
    def parts(self) -> Iterator[Full]:
        """Written out, as many samples at a time as an intermediate result may hold."""

    def squares(self) -> Tensor:
        """(o, d): sums over the samples of the squared entries."""
        return torch.stack([part.squares() for part in self.parts()]).sum(0)

    def weighed(self, weights: Tensor) -> Tensor:
        """(b,): of each sample the squared entries, weighted by (o, d) and summed."""
        return torch.cat([part.weighed(weights) for part in self.parts()])

    @abstractmethod
    def gram(self, weights: Tensor) -> Tensor:
        """(b, b): inner products of the samples, entries weighted by (o, d)."""


@dataclass(frozen=True, eq=False)
class Full(Matrices):
    """As they are: `values` (b, o, d)."""

    values: Tensor

    def add_moments(self, left: Tensor | None, right: Tensor | None) -> None:
        across, along = self.values.transpose(0, 1).flatten(1), self.values.flatten(0, 1)
        if left is not None:
            left.addmm_(across, across.T)
        if right is not None:
            right.addmm_(along.T, along)

    def turned(self, basis: Basis) -> Full:
        return Full(basis.turn(self.values))

    def parts(self) -> Iterator[Full]:
        yield self

    def squares(self) -> Tensor:
        return self.values.square().sum(0)

    def weighed(self, weights: Tensor) -> Tensor:
        return self.values.square().flatten(1) @ weights.flatten()

    def gram(self, weights: Tensor) -> Tensor:
        return (self.values * weights).flatten(1) @ self.values.flatten(1).T


@dataclass(frozen=True, eq=False)
class Outer(Matrices):
    """Σ_t δ_t ⊗ a_t, of `deltas` (b, t, o) and `inputs` (b, t, d)."""

    deltas: Tensor
    inputs: Tensor

    def add_moments(self, left: Tensor | None, right: Tensor | None) -> None:
        _add_moment(left, self.deltas, self.inputs)
        _add_moment(right, self.inputs, self.deltas)

    def turned(self, basis: Basis) -> Outer:
        return Outer(basis.left.turn(self.deltas), basis.right.turn(self.inputs))

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A squared sum over t is one over pairs (t, u): Σ δ_t δ_u (k, o) ⊗ a_t a_u (k, d), for slices of samples."""
        t, u = torch.triu_indices(*[self.deltas.shape[1]] * 2, device=self.deltas.device)
        twice = 1 + (t != u).to(self.deltas)[:, None]
        for part in slices(len(self.deltas), len(t) * (self.deltas.shape[2] + self.inputs.shape[2])):
            deltas, inputs = self.deltas[part], self.inputs[part]
            yield deltas[:, t] * deltas[:, u] * twice, inputs[:, t] * inputs[:, u]

    def squares(self) -> Tensor:
        if self.deltas.shape[1] > FEW:
            return super().squares()
        found = [deltas.flatten(0, 1).T @ inputs.flatten(0, 1) for deltas, inputs in self.pairs()]
        return torch.stack(found).sum(0) if len(found) > 1 else found[0]

    def weighed(self, weights: Tensor) -> Tensor:
        if self.deltas.shape[1] > FEW:
            return super().weighed(weights)
        return torch.cat([((deltas @ weights) * inputs).sum((1, 2)) for deltas, inputs in self.pairs()])

    def gram(self, weights: Tensor) -> Tensor:
        total, used = weights.new_zeros(len(self.deltas), len(self.deltas)), in_use(self.inputs)
        roots, inputs = weights[:, used].sqrt(), self.inputs[..., used]
        for rows in slices(len(roots), inputs[:, 0].numel()):
            written = (self.deltas[:, :, rows].mT @ inputs) * roots[rows]
            total.addmm_(written.flatten(1), written.flatten(1).T)
        return total

    def parts(self) -> Iterator[Full]:
        for part in slices(len(self.deltas), self.deltas.shape[2] * self.inputs.shape[2]):
            yield Full(self.deltas[part].mT @ self.inputs[part])


@dataclass(frozen=True, eq=False)
class Rows(Matrices):
    """The gradients of a table, of which each sample used few rows: the rows keep their axes."""

    table: Lookup

    def add_moments(self, left: Tensor | None, right: Tensor | None) -> None:
        same, deltas = self.table.meet(self.table.inputs, self.table.inputs), self.table.deltas
        if right is not None:
            right.addmm_(deltas.flatten(0, 1).T, (same @ deltas).flatten(0, 1))

    def turned(self, basis: Basis) -> Rows:
        table = self.table
        return Rows(Lookup(table.inputs, basis.right.turn(table.deltas), table.rows))

    def gram(self, weights: Tensor) -> Tensor:
        table = self.table
        return table.products(Lookup(table.inputs, table.deltas * weights[table.inputs], table.rows))

    def parts(self) -> Iterator[Full]:
        for part in slices(len(self.table), self.table.size):
            yield Full(self.table.select(part).dense().unflatten(1, (self.table.rows, -1)))


def _add_moment(total: Tensor | None, side: Tensor, other: Tensor) -> None:
    """Add the sum over samples of Σ_tu side_t (other_t · other_u) side_uᵀ, of side (b, t, n), to total (n, n)."""
    if total is None:
        return
    mine, weighed = side.flatten(0, 1), ((other @ other.mT) @ side).flatten(0, 1)
    if isinstance(used := in_use(side), slice):
        total.addmm_(mine.T, weighed)
    else:
        total[used[:, None], used] += mine[:, used].T @ weighed[:, used]


def matrices(block: Block, sheet: Sheet) -> Matrices:
    """The gradients of a block in one of its sheets, in the form that costs least."""
    if sheet.rows > 1 and isinstance(block, Pair):
        ones = block.inputs.new_ones(*block.inputs.shape[:2], 1)
        return Outer(block.deltas, torch.cat([block.inputs, ones], dim=2) if block.bias else block.inputs)
    if sheet.rows > 1 and isinstance(block, Lookup):
        return Rows(block)
    return Full(sheet.cut(block.dense()))
