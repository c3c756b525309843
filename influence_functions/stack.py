"""`Gradients`: one block a layer, side by side."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Block, Dense


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients of b samples with respect to all p parameters: blocks, and where each one's columns stand in p."""

    blocks: tuple[Block, ...]
    places: tuple[tuple[slice, ...], ...]

    def __len__(self) -> int:
        return len(self.blocks[0])

    @property
    def size(self) -> int:
        """p."""
        return sum(block.size for block in self.blocks)

    @property
    def width(self) -> int:
        """Multiplications that an inner product of two samples costs."""
        return sum(block.width for block in self.blocks)

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return sum(block.held for block in self.blocks)

    def _gather(self, directions: Tensor, places: tuple[slice, ...]) -> Tensor:
        """The columns of directions (m, p) at some places."""
        first, last = places[0], places[-1]
        if all(a.stop == b.start for a, b in itertools.pairwise(places)):
            return directions[:, first.start : last.stop]
        return torch.cat([directions[:, place] for place in places], dim=1)

    def _assemble(self, parts: Iterable[Tensor]) -> Tensor:
        """(k, q) of each block as (k, p)."""
        whole: Tensor | None = None
        for part, places in zip(parts, self.places):
            whole = part.new_empty(len(part), self.size) if whole is None else whole
            for place, piece in zip(places, part.split([place.stop - place.start for place in places], dim=1)):
                whole[:, place] = piece
        return whole if whole is not None else torch.empty(0)

    def dense(self) -> Tensor:
        """(b, p), parameters in the model's order."""
        return self._assemble(block.dense() for block in self.blocks)

    def products(self, other: Gradients) -> Tensor:
        """(b, b') inner products with the gradients of other samples."""
        pairs = (_alike(pair) for pair in zip(self.blocks, other.blocks, strict=True))
        return _sum([mine.products(theirs) for mine, theirs in pairs])

    def squares(self) -> Tensor:
        """(b,) squared norms."""
        return _sum([block.squares() for block in self.blocks])

    def against(self, directions: Gradients) -> Tensor:
        """(m, b) inner products with m directions: see `like`."""
        return _sum([mine.against(theirs.dense()) for mine, theirs in zip(self.blocks, directions.blocks, strict=True)])

    def weighted(self, weights: Tensor) -> Tensor:
        """(m, p) sums of the gradients, weighted by (m, b)."""
        return self._assemble(block.weighted(weights) for block in self.blocks)

    def select(self, chosen: slice | Tensor) -> Gradients:
        """Some of the samples."""
        return Gradients(tuple(block.select(chosen) for block in self.blocks), self.places)

    def like(self, matrix: Tensor) -> Gradients:
        """Any (k, p) as gradients of k samples, in blocks like these."""
        return self.of_blocks(self._gather(matrix, places) for places in self.places)

    def of_blocks(self, parts: Iterable[Tensor]) -> Gradients:
        """Any (k, q) for each block, its columns in its own order."""
        return Gradients(tuple(Dense(part.contiguous()) for part in parts), self.places)

    def light(self) -> Gradients:
        """The same, each block in full where that makes inner products cheaper."""
        blocks = (block if block.width < block.size else Dense(block.dense()) for block in self.blocks)
        return Gradients(tuple(blocks), self.places)

    @staticmethod
    def collect(parts: Iterable[Gradients], count: int) -> Gradients:
        """All of the `count` samples of `parts`, in order, each copied to its place as it comes: never held twice."""
        whole: list[Block] = []
        start = 0
        for part in parts:
            if len(part) == count:
                return part
            whole = whole or [block.with_room(count) for block in part.blocks]
            pairs = [_alike(pair) for pair in zip(whole, part.blocks, strict=True)]
            whole = [mine.put(start, theirs) for mine, theirs in pairs]
            start += len(part)
        return Gradients(tuple(whole), part.places)


def _alike(blocks: Sequence[Block]) -> Sequence[Block]:
    """The same blocks, all in full where they are not all of one form."""
    return blocks if len({type(block) for block in blocks}) == 1 else [Dense(block.dense()) for block in blocks]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total.add_(part)  # ours alone: nobody else holds these results
    return total
