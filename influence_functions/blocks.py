"""Gradients of b samples in one layer, in whichever form makes inner products cheapest: a new one is one `Block`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ._support import in_use

HELD = 2**24  # numbers that an intermediate result may hold
WRITTEN = 5  # multiplications that cost as much as one whose gradient must be written and read (measured)


def slices(total: int, each: int, held: int = HELD) -> Iterator[slice]:
    """Consecutive slices of `total` things, of `each` numbers, that hold at most `held` of them."""
    step = max(1, held // max(each, 1))
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


class Block(ABC):
    """Gradients of b samples, of q numbers each."""

    @abstractmethod
    def __len__(self) -> int:
        """b."""

    @property
    @abstractmethod
    def size(self) -> int:
        """q."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Multiplications that an inner product of two samples costs."""

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return sum(part.numel() * part.element_size() for part in vars(self).values() if isinstance(part, Tensor))

    @abstractmethod
    def dense(self) -> Tensor:
        """(b, q)."""

    @abstractmethod
    def products(self, other: Self) -> Tensor:
        """(b, b') inner products with the gradients of other samples."""

    @abstractmethod
    def squares(self) -> Tensor:
        """(b,) squared norms."""

    @abstractmethod
    def against(self, directions: Tensor) -> Tensor:
        """(m, b) inner products with directions (m, q)."""

    @abstractmethod
    def weighted(self, weights: Tensor) -> Tensor:
        """(m, q) sums of the gradients, weighted by (m, b)."""

    @abstractmethod
    def select(self, chosen: slice | Tensor) -> Self:
        """Some of the samples."""

    def add(self, other: Block) -> Block:
        """The sum, sample by sample, for a layer that was called twice."""
        return Dense(self.dense() + other.dense())

    @abstractmethod
    def with_room(self, count: int) -> Self:
        """A block of this form for `count` samples, all zero so far."""

    @abstractmethod
    def put(self, start: int, part: Self) -> Self:
        """With the samples of `part` from `start` on: in place, where there is room for their form."""


@dataclass(frozen=True, eq=False)
class Dense(Block):
    """The gradients themselves: `rows` (b, q)."""

    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        return self.rows.shape[1]

    width = size

    def dense(self) -> Tensor:
        return self.rows

    def products(self, other: Dense) -> Tensor:
        return self.rows @ other.rows.T

    def squares(self) -> Tensor:
        return self.rows.square().sum(1)

    def against(self, directions: Tensor) -> Tensor:
        return directions @ self.rows.T

    def weighted(self, weights: Tensor) -> Tensor:
        return weights @ self.rows

    def select(self, chosen: slice | Tensor) -> Dense:
        return Dense(self.rows[chosen])

    def with_room(self, count: int) -> Dense:
        return Dense(self.rows.new_zeros(count, self.size))

    def put(self, start: int, part: Dense) -> Dense:
        self.rows[start : start + len(part)] = part.rows
        return self


@dataclass(frozen=True, eq=False)
class Factors(Block):
    """Gradients Σ_t δ_t ⊗ a_t: what a layer was given at t positions, `inputs` (b, t, …), and `deltas` (b, t, o)."""

    inputs: Tensor
    deltas: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def width(self) -> int:
        return self.inputs.shape[1] ** 2 * (self.inputs[0, 0].numel() + self.deltas.shape[2])

    @abstractmethod
    def meet(self, a: Tensor, b: Tensor) -> Tensor:
        """(…, t, u) inner products of inputs (…, t, …) and (…, u, …), as far as the gradients share a row."""

    def products(self, other: Self) -> Tensor:
        (b, t), (c, u) = self.inputs.shape[:2], other.inputs.shape[:2]
        mine, found = (self.inputs.flatten(0, 1), self.deltas.flatten(0, 1)), self.deltas.new_empty(b, c)
        for part in slices(c, b * t * u):
            inner = mine[1] @ other.deltas[part].flatten(0, 1).T  # (b·t, c·u)
            inner *= self.meet(mine[0], other.inputs[part].flatten(0, 1))
            found[:, part] = inner if t == u == 1 else inner.view(b, t, -1, u).sum((1, 3))
        return found

    def squares(self) -> Tensor:
        return ((self.deltas @ self.deltas.mT) * self.meet(self.inputs, self.inputs)).sum((1, 2))

    def select(self, chosen: slice | Tensor) -> Self:
        return dataclasses.replace(self, inputs=self.inputs[chosen], deltas=self.deltas[chosen])

    def add(self, other: Block) -> Block:
        if type(other) is not type(self):
            return super().add(other)
        columns = ((self.inputs, other.inputs), (self.deltas, other.deltas))  # two calls: one call at more positions
        return dataclasses.replace(self, inputs=torch.cat(columns[0], dim=1), deltas=torch.cat(columns[1], dim=1))

    def with_room(self, count: int) -> Self:
        inputs, deltas = (part.new_zeros(count, *part.shape[1:]) for part in (self.inputs, self.deltas))
        return dataclasses.replace(self, inputs=inputs, deltas=deltas)

    def put(self, start: int, part: Self) -> Self:
        """Where some samples have fewer positions than others, the rest has no gradient (zeros)."""
        rooms, missing = [self.inputs, self.deltas], part.inputs.shape[1] - self.inputs.shape[1]
        rooms = [F.pad(room, (0, 0) * (room.ndim - 2) + (0, missing)) if missing > 0 else room for room in rooms]
        for room, given in zip(rooms, (part.inputs, part.deltas)):
            room[start : start + len(given), : given.shape[1]] = given
        return dataclasses.replace(self, inputs=rooms[0], deltas=rooms[1])


@dataclass(frozen=True, eq=False)
class Pair(Factors):
    """The gradients δaᵀ of a linear map: inputs (b, t, i). In `dense` the weight (o, i) comes first.

    A bias costs nothing: ⟨δaᵀ, δ'a'ᵀ⟩ + ⟨δ, δ'⟩ = (a·a' + 1)(δ·δ').
    """

    bias: bool

    @property
    def size(self) -> int:
        return self.deltas.shape[2] * (self.inputs.shape[2] + self.bias)

    def meet(self, a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT).add_(1) if self.bias else a @ b.mT

    def dense(self) -> Tensor:
        weight = (self.deltas.mT @ self.inputs).flatten(1)
        return torch.cat([weight, self.deltas.sum(1)], dim=1) if self.bias else weight

    def against(self, directions: Tensor) -> Tensor:
        """Σ_t δᵀSa, or by way of full gradients where that is cheaper; inputs that are always zero are left out."""
        (b, t, i), o, m = self.inputs.shape, self.deltas.shape[2], len(directions)
        if t * m > WRITTEN * (t + m):
            return torch.cat([directions @ self.select(part).dense().T for part in slices(b, self.size)], dim=1)
        used, found = in_use(self.inputs), []
        weight, inputs = directions[:, : o * i].reshape(m * o, i)[:, used], self.inputs[..., used]
        for part in slices(b, t * m * o):
            moved = (inputs[part].flatten(0, 1) @ weight.T).view(-1, t, m, o)
            if self.bias:
                moved += directions[:, o * i :].view(m, o)
            found.append(torch.einsum("btmo,bto->mb", moved, self.deltas[part]))
        return torch.cat(found, dim=1)

    def weighted(self, weights: Tensor) -> Tensor:
        (m, _), o, inputs = weights.shape, self.deltas.shape[2], self.inputs.flatten(0, 1)
        sums = weights.new_empty(m, self.size)
        for part in slices(m, self.deltas.numel()):
            scaled = torch.einsum("mb,bto->mobt", weights[part], self.deltas).flatten(2)  # (m, o, b·t)
            sums[part, : o * inputs.shape[1]] = (scaled @ inputs).flatten(1)
            if self.bias:
                sums[part, o * inputs.shape[1] :] = scaled.sum(2)
        return sums


@dataclass(frozen=True, eq=False)
class Lookup(Factors):
    """The gradients of a table (rows, o) of which only some rows were used: inputs (b, t) are their numbers."""

    rows: int

    @property
    def size(self) -> int:
        return self.rows * self.deltas.shape[2]

    def meet(self, a: Tensor, b: Tensor) -> Tensor:
        return (a[..., :, None] == b[..., None, :]).to(self.deltas)

    def dense(self) -> Tensor:
        (b, _, o), at = self.deltas.shape, self.inputs[..., None].expand_as(self.deltas)
        return self.deltas.new_zeros(b, self.rows, o).scatter_add_(1, at, self.deltas).flatten(1)

    def against(self, directions: Tensor) -> Tensor:
        tables = directions.unflatten(1, (self.rows, -1))
        return torch.stack([(table[self.inputs] * self.deltas).sum((1, 2)) for table in tables])

    def weighted(self, weights: Tensor) -> Tensor:
        ids, deltas = self.inputs.flatten(), self.deltas
        sums = weights.new_zeros(len(weights), self.rows, deltas.shape[2])
        for table, each in zip(sums, weights):
            table.index_add_(0, ids, (deltas * each[:, None, None]).flatten(0, 1))
        return sums.flatten(1)
