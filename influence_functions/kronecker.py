"""Gradients as sheets, and the directions of a sheet's two sides: what a Kronecker-factored curvature is made of.

Parameters of a layer that share their first dimension (weight (o, …) and bias (o,), say) are driven by the same
outputs: side by side their gradients are one matrix (o, d) a sample, a sheet. It is turned from the left and the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 1024  # numbers a sample up to which a layer is one row: its curvature is then a matrix of its own, exact
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


def moment_of(side: int, like: Tensor) -> Tensor | None:
    """Where the second moment of a side is summed; none where it would be too long."""
    return like.new_zeros(side, side) if side <= LONGEST else None
