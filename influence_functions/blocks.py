"""Gradients of b samples, one block a layer, held in whichever form makes their inner products cheapest.

A block knows its `size` q (numbers in the layer's gradient), its `width` (multiplications that an inner product of two
samples costs), and: dense() (b, q) · products(other) (b, b') · squares() (b,) · against(S (m, q)) (m, b) ·
weighted(W (m, b)) (m, q) · select(slice) · add(other) for a layer that was called twice · join(parts).
A new form is one more class with these methods.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HELD = 2**24  # numbers that an intermediate result may hold


def slices(total: int, each: int, held: int = HELD) -> Iterator[slice]:
    """Consecutive slices of `total` things, so that one slice of them, `each` numbers a thing, holds at most `held`."""
    step = max(1, held // max(each, 1))
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def fewer_as_factors(positions: int, inputs: int, outputs: int) -> bool:
    """Whether inner products of δaᵀ, summed over positions, cost less from the factors than from the full gradients."""
    return positions**2 * (inputs + outputs) < inputs * outputs


@dataclass(frozen=True, eq=False)
class Dense:
    """The gradients themselves: `rows` (b, q)."""

    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        """q."""
        return self.rows.shape[1]

    width = size

    def dense(self) -> Tensor:
        """(b, q)."""
        return self.rows

    def products(self, other: Dense) -> Tensor:
        """(b, b') inner products with the gradients of other samples."""
        return self.rows @ other.rows.T

    def squares(self) -> Tensor:
        """(b,) squared norms."""
        return self.rows.square().sum(1)

    def against(self, directions: Tensor) -> Tensor:
        """(m, b) inner products with directions (m, q)."""
        return directions @ self.rows.T

    def weighted(self, weights: Tensor) -> Tensor:
        """(m, q) sums of the gradients, weighted by (m, b)."""
        return weights @ self.rows

    def select(self, chosen: slice) -> Dense:
        """Some of the samples."""
        return Dense(self.rows[chosen])

    def add(self, other: Block) -> Dense:
        """The sum, sample by sample."""
        return Dense(self.rows + other.dense())

    @staticmethod
    def join(parts: Sequence[Dense]) -> Dense:
        """All samples of `parts`, in order."""
        return Dense(torch.cat([part.rows for part in parts]))


@dataclass(frozen=True, eq=False)
class Pair:
    """The gradients Σ_t δ_t a_tᵀ of a linear map: its inputs a (b, t, i), the gradients δ (b, t, o) at its output.

    A bias costs nothing: ⟨δaᵀ, δ'a'ᵀ⟩ + ⟨δ, δ'⟩ = (a·a' + 1)(δ·δ'). In `dense` the weight (o, i) comes first.
    """

    inputs: Tensor
    deltas: Tensor
    bias: bool

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def size(self) -> int:
        """q = o·i (+ o)."""
        return self.deltas.shape[2] * (self.inputs.shape[2] + self.bias)

    @property
    def width(self) -> int:
        """t²(i + o)."""
        return self.inputs.shape[1] ** 2 * (self.inputs.shape[2] + self.deltas.shape[2])

    def dense(self) -> Tensor:
        """(b, q)."""
        weight = (self.deltas.mT @ self.inputs).flatten(1)
        return torch.cat([weight, self.deltas.sum(1)], dim=1) if self.bias else weight

    def products(self, other: Pair) -> Tensor:
        """(b, b') inner products with the gradients of other samples."""
        (b, t, _), (c, u, _) = self.inputs.shape, other.inputs.shape
        mine, theirs = (self.inputs.flatten(0, 1), self.deltas.flatten(0, 1)), torch.empty(b, c).to(self.inputs)
        for part in slices(c, b * t * u):
            inner = mine[0] @ other.inputs[part].flatten(0, 1).T  # (b·t, c·u)
            if self.bias:
                inner += 1
            inner *= mine[1] @ other.deltas[part].flatten(0, 1).T
            theirs[:, part] = inner if t == u == 1 else inner.view(b, t, -1, u).sum((1, 3))
        return theirs

    def squares(self) -> Tensor:
        """(b,) squared norms."""
        inner = self.inputs @ self.inputs.mT + int(self.bias)
        return (inner * (self.deltas @ self.deltas.mT)).sum((1, 2))

    def against(self, directions: Tensor) -> Tensor:
        """(m, b) inner products with directions (m, q): Σ_t δᵀSa, or by way of full gradients where that is cheaper."""
        (b, t, i), o, m = self.inputs.shape, self.deltas.shape[2], len(directions)
        if t > 1 and m > 1:
            return torch.cat([directions @ self.select(part).dense().T for part in slices(b, self.size)], dim=1)
        weight = directions[:, : o * i].reshape(m * o, i)
        found = []
        for part in slices(b, t * m * o):
            moved = (self.inputs[part] @ weight.T).unflatten(2, (m, o))  # (b, t, m, o)
            if self.bias:
                moved += directions[:, o * i :]
            found.append(torch.einsum("btmo,bto->mb", moved, self.deltas[part]))
        return torch.cat(found, dim=1)

    def weighted(self, weights: Tensor) -> Tensor:
        """(m, q) sums of the gradients, weighted by (m, b)."""
        (m, _), o, inputs = weights.shape, self.deltas.shape[2], self.inputs.flatten(0, 1)
        sums = weights.new_empty(m, self.size)
        for part in slices(m, self.deltas.numel()):
            scaled = torch.einsum("mb,bto->mobt", weights[part], self.deltas).flatten(2)  # (m, o, b·t)
            sums[part, : o * inputs.shape[1]] = (scaled @ inputs).flatten(1)
            if self.bias:
                sums[part, o * inputs.shape[1] :] = scaled.sum(2)
        return sums

    def select(self, chosen: slice) -> Pair:
        """Some of the samples."""
        return Pair(self.inputs[chosen], self.deltas[chosen], self.bias)

    def add(self, other: Block) -> Pair | Dense:
        """The sum, sample by sample: two calls of a layer are one call at more positions."""
        if not isinstance(other, Pair):
            return Dense(self.dense()).add(other)
        columns = ((self.inputs, other.inputs), (self.deltas, other.deltas))
        return Pair(torch.cat(columns[0], dim=1), torch.cat(columns[1], dim=1), self.bias)

    @staticmethod
    def join(parts: Sequence[Pair]) -> Pair:
        """All samples of `parts`, in order."""
        columns = ([part.inputs for part in parts], [part.deltas for part in parts])
        return Pair(_stack(columns[0]), _stack(columns[1]), parts[0].bias)


@dataclass(frozen=True, eq=False)
class Lookup:
    """The gradients of a table (rows, e) of which only some rows were used: `ids` (b, t), and δ (b, t, e) at each."""

    ids: Tensor
    deltas: Tensor
    rows: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def size(self) -> int:
        """q = rows · e."""
        return self.rows * self.deltas.shape[2]

    @property
    def width(self) -> int:
        """t²(1 + e)."""
        return self.ids.shape[1] ** 2 * (1 + self.deltas.shape[2])

    def dense(self) -> Tensor:
        """(b, q)."""
        (b, _, e), at = self.deltas.shape, self.ids[..., None].expand_as(self.deltas)
        return self.deltas.new_zeros(b, self.rows, e).scatter_add_(1, at, self.deltas).flatten(1)

    def products(self, other: Lookup) -> Tensor:
        """(b, b') inner products with the gradients of other samples."""
        (b, t), (c, u) = self.ids.shape, other.ids.shape
        mine, theirs = self.deltas.flatten(0, 1), self.deltas.new_empty(b, c)
        for part in slices(c, b * t * u):
            same = self.ids.reshape(-1, 1) == other.ids[part].reshape(1, -1)  # (b·t, c·u)
            inner = (mine @ other.deltas[part].flatten(0, 1).T) * same
            theirs[:, part] = inner.view(b, t, -1, u).sum((1, 3))
        return theirs

    def squares(self) -> Tensor:
        """(b,) squared norms."""
        return ((self.deltas @ self.deltas.mT) * (self.ids[:, :, None] == self.ids[:, None, :])).sum((1, 2))

    def against(self, directions: Tensor) -> Tensor:
        """(m, b) inner products with directions (m, q)."""
        tables = directions.unflatten(1, (self.rows, -1))
        return torch.stack([(table[self.ids] * self.deltas).sum((1, 2)) for table in tables])

    def weighted(self, weights: Tensor) -> Tensor:
        """(m, q) sums of the gradients, weighted by (m, b)."""
        ids, deltas = self.ids.flatten(), self.deltas
        sums = weights.new_zeros(len(weights), self.rows, deltas.shape[2])
        for table, each in zip(sums, weights):
            table.index_add_(0, ids, (deltas * each[:, None, None]).flatten(0, 1))
        return sums.flatten(1)

    def select(self, chosen: slice) -> Lookup:
        """Some of the samples."""
        return Lookup(self.ids[chosen], self.deltas[chosen], self.rows)

    def add(self, other: Block) -> Lookup | Dense:
        """The sum, sample by sample."""
        if not isinstance(other, Lookup):
            return Dense(self.dense()).add(other)
        columns = ((self.ids, other.ids), (self.deltas, other.deltas))
        return Lookup(torch.cat(columns[0], dim=1), torch.cat(columns[1], dim=1), self.rows)

    @staticmethod
    def join(parts: Sequence[Lookup]) -> Lookup:
        """All samples of `parts`, in order."""
        columns = ([part.ids for part in parts], [part.deltas for part in parts])
        return Lookup(_stack(columns[0]), _stack(columns[1]), parts[0].rows)


Block = Dense | Pair | Lookup


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Parts (b, t, …) as one; where t differs, positions without a gradient (zeros) fill up the shorter ones."""
    longest = max(part.shape[1] for part in parts)
    missing = [(0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]) for part in parts]
    return torch.cat([F.pad(part, wanted) if wanted[-1] else part for part, wanted in zip(parts, missing)])


def lightest(block: Block) -> Block:
    """The same gradients, in full where that makes inner products cheaper."""
    return block if block.width < block.size else Dense(block.dense())


def alike(blocks: Sequence[Block]) -> Sequence[Block]:
    """The same blocks, all in full where they are not all of one form."""
    return blocks if len({type(block) for block in blocks}) == 1 else [Dense(block.dense()) for block in blocks]
