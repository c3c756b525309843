"""`Gradients`: one block a layer, side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .blocks import Block, Dense


@dataclass(frozen=True, eq=False)
class OnDemand(Sequence[Block]):
    """Blocks that are made whenever they are read, and held by nobody: in memory is one of them, and not all."""

    makers: tuple[Callable[[], Block], ...]

    def __len__(self) -> int:
        return len(self.makers)

    def __getitem__(self, chosen: Any) -> Any:
        return OnDemand(self.makers[chosen]) if isinstance(chosen, slice) else self.makers[chosen]()

    def then(self, change: Callable[[Block], Block]) -> OnDemand:
        """Changed, as soon as they are made."""
        return OnDemand(tuple(partial(_after, change, make) for make in self.makers))


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients of b `samples` with respect to all p parameters: blocks, and where their columns stand in p."""

    blocks: Sequence[Block]
    places: tuple[tuple[slice, ...], ...]
    samples: int

    def __len__(self) -> int:
        return self.samples

    @property
    def size(self) -> int:
        """p."""
        return sum(place.stop - place.start for places in self.places for place in places)

    @property
    def width(self) -> int:
        """Multiplications that an inner product of two samples costs."""
        return sum(block.width for block in self.blocks)

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
        few = len(torch.arange(self.samples)[chosen.cpu() if isinstance(chosen, Tensor) else chosen])
        return self._changed(lambda block: block.select(chosen), few)

    def like(self, matrix: Tensor) -> Gradients:
        """Any (k, p) as gradients of k samples, in blocks like these."""
        return self.of_blocks(self._gather(matrix, places) for places in self.places)

    def of_blocks(self, parts: Iterable[Tensor]) -> Gradients:
        """Any (k, q) for each block, its columns in its own order."""
        blocks = tuple(Dense(part.contiguous()) for part in parts)
        return Gradients(blocks, self.places, len(blocks[0]))

    def light(self) -> Gradients:
        """The same, each block in full where that makes inner products cheaper."""
        return self._changed(lambda block: block if block.width < block.size else Dense(block.dense()), self.samples)

    def made(self) -> Gradients:
        """The same, all blocks in memory: for who reads them more than once."""
        return self if isinstance(self.blocks, tuple) else Gradients(tuple(self.blocks), self.places, self.samples)

    def _changed(self, change: Callable[[Block], Block], samples: int) -> Gradients:
        blocks = self.blocks
        changed = blocks.then(change) if isinstance(blocks, OnDemand) else tuple(map(change, blocks))
        return Gradients(changed, self.places, samples)

    @staticmethod
    def collect(parts: Iterable[Gradients], count: int) -> Gradients:
        """All of the `count` samples of `parts`, in order, each copied to its place as it comes: never held twice."""
        whole: list[Block] = []
        places: tuple[tuple[slice, ...], ...] = ()
        start = 0
        for part in parts:
            if len(part) == count:
                return part.made()
            whole = whole or [block.with_room(count) for block in part.blocks]
            pairs = (_alike(pair) for pair in zip(whole, part.blocks, strict=True))
            whole = [mine.put(start, theirs) for mine, theirs in pairs]
            start, places = start + len(part), part.places
            del part  # with what its layers were given, before the next one is made
        return Gradients(tuple(whole), places, start)


def _after(change: Callable[[Block], Block], make: Callable[[], Block]) -> Block:
    return change(make())


def _alike(blocks: Sequence[Block]) -> Sequence[Block]:
    """The same blocks, all in full where they are not all of one form."""
    return blocks if len({type(block) for block in blocks}) == 1 else [Dense(block.dense()) for block in blocks]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total.add_(part)  # ours alone: nobody else holds these results
    return total
