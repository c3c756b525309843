"""Gradients as matrices, and the directions of their two sides: what a Kronecker-factored curvature is made of.

Parameters of a layer that share their first dimension (weight (o, …) and bias (o,), say) are driven by the same
outputs: side by side their gradients are one matrix (o, d) a sample, a sheet. It is turned from the left and the right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Block, Lookup, Pair, slices

EXACT = 1024  # numbers a sample up to which a layer is one row: its curvature is then a matrix of its own, exact
FEW = 8  # positions up to which pairs of them cost less than gradients that are written out (measured)
LONGEST = 5000  # a longer side keeps its axes: the directions of one of n are a matrix (n, n), at a price of n³


@dataclass(frozen=True)
class Sheet:
    """`rows` (o), and for each parameter in it where it stands among a block's columns, in chunks of a row each."""

    rows: int
    places: tuple[slice, ...]

    @property
    def columns(self) -> int:
        """d."""
        return sum(place.stop - place.start for place in self.places) // self.rows

    def cut(self, dense: Tensor) -> Tensor:
        """(b, q) of the block → (b, o, d)."""
        return torch.cat([dense[:, place].unflatten(1, (self.rows, -1)) for place in self.places], dim=2)

    def put(self, matrices: Tensor, dense: Tensor) -> None:
        """(b, o, d) → into its places of (b, q)."""
        widths = [(place.stop - place.start) // self.rows for place in self.places]
        for place, part in zip(self.places, matrices.split(widths, dim=2)):
            dense[:, place] = part.flatten(1)


def sheets(shapes: Sequence[torch.Size]) -> list[Sheet]:
    """The sheets of a block whose columns are parameters of these shapes; a small block is one of a single row.

    >>> [(sheet.rows, sheet.columns) for sheet in sheets([torch.Size((300, 40)), torch.Size((300,)), torch.Size((7,))])]
    [(300, 41), (7, 1)]
    >>> [(sheet.rows, sheet.columns) for sheet in sheets([torch.Size((64,)), torch.Size((64,))])]
    [(1, 128)]
    """
    ends, places = 0, []
    for shape in shapes:
        places.append(slice(ends, ends := ends + shape.numel()))
    if ends <= EXACT:
        return [Sheet(1, tuple(places))]
    rows = [shape[0] if shape else 1 for shape in shapes]
    return [
        Sheet(each, tuple(place for place, own in zip(places, rows) if own == each)) for each in dict.fromkeys(rows)
    ]


@dataclass(frozen=True, eq=False)
class Side:
    """Orthogonal directions: `vectors` (k, k) of the k features that are `used`, the axes of all others.

    What is always zero, as where a kernel only ever meets padding, is left out: it costs nothing.
    """

    used: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, moment: Tensor | None, like: Tensor) -> Side:
        """The eigenvectors of a second moment (n, n); where there is none, the axes."""
        if moment is None:
            return cls(like.new_zeros(0, dtype=torch.long), like.new_zeros(0, 0))
        used = moment.diagonal().nonzero()[:, 0]
        part = moment[used][:, used]
        home = part.cpu() if part.device.type == "mps" else part  # where torch has no eigenvectors
        return cls(used, torch.linalg.eigh(home).eigenvectors.to(moment))

    def turn(self, features: Tensor) -> Tensor:
        """(…, n) in these directions."""
        return self._by(self.vectors, features)

    def back(self, features: Tensor) -> Tensor:
        """The inverse of `turn`."""
        return self._by(self.vectors.mT, features)

    def _by(self, vectors: Tensor, features: Tensor) -> Tensor:
        if len(self.used) == features.shape[-1]:
            return features @ vectors
        turned = features.clone()
        turned[..., self.used] = features[..., self.used] @ vectors
        return turned


@dataclass(frozen=True, eq=False)
class Basis:
    """The directions of both sides of a sheet."""

    left: Side
    right: Side

    def turn(self, matrices: Tensor) -> Tensor:
        """(b, o, d) in these directions."""
        return self.left.turn(self.right.turn(matrices).mT).mT

    def back(self, matrices: Tensor) -> Tensor:
        """The inverse of `turn`."""
        return self.left.back(self.right.back(matrices).mT).mT


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

    def parts(self) -> Iterator[Full]:
        for part in slices(len(self.table), self.table.size):
            yield Full(self.table.select(part).dense().unflatten(1, (self.table.rows, -1)))


def moment_of(side: int, like: Tensor) -> Tensor | None:
    """Where the second moment of a side is summed; none where it would be too long."""
    return like.new_zeros(side, side) if side <= LONGEST else None


def _add_moment(total: Tensor | None, side: Tensor, other: Tensor) -> None:
    """Add the sum over samples of Σ_tu side_t (other_t · other_u) side_uᵀ, of side (b, t, n), to total (n, n)."""
    if total is None:
        return
    mine, weighed = side.flatten(0, 1), ((other @ other.mT) @ side).flatten(0, 1)
    if 2 * len(used := mine.any(0).nonzero()[:, 0]) < len(total):
        total[used[:, None], used] += mine[:, used].T @ weighed[:, used]
    else:
        total.addmm_(mine.T, weighed)


def matrices(block: Block, sheet: Sheet) -> Matrices:
    """The gradients of a block in one of its sheets, in the form that costs least."""
    if sheet.rows > 1 and isinstance(block, Pair):
        ones = block.inputs.new_ones(*block.inputs.shape[:2], 1)
        return Outer(block.deltas, torch.cat([block.inputs, ones], dim=2) if block.bias else block.inputs)
    if sheet.rows > 1 and isinstance(block, Lookup):
        return Rows(block)
    return Full(sheet.cut(block.dense()))
