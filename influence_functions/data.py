"""Uniform access to whatever samples come in: `Source`, indices → (inputs, targets)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ._support import bytes_of

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""What a model is called with: model(x), model(*x) or model(**x); every tensor has the samples along its first axis."""
TARGETS = ("labels", "label")  # the key of a dict that holds the targets


@dataclass(frozen=True, eq=False)
class Source:
    """`size` samples; `batch`: indices (b,) → (inputs, targets (b, …)).

    >>> numbers = Source(100, lambda chosen: (chosen[:, None].float(), chosen % 2))
    >>> numbers.batch(torch.tensor([3, 4]))[1]
    tensor([1, 0])
    """

    size: int
    batch: Callable[[Tensor], tuple[Inputs, Tensor]]


def on_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """`function` of each tensor in `inputs`."""
    if isinstance(inputs, dict):
        return {name: function(value) for name, value in inputs.items()}
    return tuple(map(function, inputs)) if isinstance(inputs, tuple) else function(inputs)


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """The tensors in `inputs`."""
    return [*inputs.values()] if isinstance(inputs, dict) else [*inputs] if isinstance(inputs, tuple) else [inputs]


def arguments(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What stands in the brackets of the model's call."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """The outputs of `model`."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def shapes(inputs: Inputs) -> str:
    """The shape of one sample, for messages."""
    return ", ".join(str(tuple(part.shape[1:])) for part in tensors_of(inputs))


def as_source(data: Any, role: str) -> Source:
    """Wrap what the caller passed; ValueError when it is empty or of no known kind. `role` is its name in messages.

    (inputs, targets) as tensors, inputs also a tuple or dict of tensors; a dict of tensors with "labels" in it; an
    object with `batch(indices)` and a length; a map-style data set; a DataLoader of one.
    """
    if isinstance(data, Source):
        source = data
    elif isinstance(data, DataLoader):
        source = _of_samples(*_unwrap(data, role))
    elif isinstance(data, dict) or (isinstance(data, (tuple, list)) and _is_pair(data)):
        source = _of_tensors(*_split(data if isinstance(data, dict) else tuple(data), role), role)
    elif isinstance(data, Sized) and callable(getattr(data, "batch", None)):
        source = Source(len(data), data.batch)  # type: ignore[attr-defined]
    elif isinstance(data, Sized) and hasattr(data, "__getitem__") and not isinstance(data, IterableDataset):
        source = _of_samples(data, default_collate)
    else:
        raise ValueError(
            f"{role} must be a pair of tensors (inputs, targets), a map-style data set or a DataLoader of one, "
            f"not {type(data).__name__}"
        )
    if source.size == 0:
        raise ValueError(f"{role} is empty: influence needs at least one sample")
    return source


def _is_pair(data: Sequence[Any]) -> bool:
    """Whether this is (inputs, targets) and not a list of samples."""
    return len(data) == 2 and isinstance(data[1], Tensor) and isinstance(data[0], (Tensor, tuple, list, dict))


def _of_tensors(inputs: Inputs, targets: Tensor, role: str) -> Source:
    for part in tensors_of(inputs):
        if not isinstance(part, Tensor):
            raise ValueError(f"{role}: inputs must be tensors, not {type(part).__name__}")
        if len(part) != len(targets):
            raise ValueError(f"{role}: {len(part)} inputs but {len(targets)} targets; they must pair up")
    return Source(len(targets), lambda chosen: (on_tensors(lambda part: part[chosen], inputs), targets[chosen]))


def _of_samples(data: Any, collate: Callable[[list[Any]], Any]) -> Source:
    return Source(len(data), lambda chosen: _split(collate([data[int(i)] for i in chosen]), "a sample"))


def _split(batch: Any, role: str) -> tuple[Inputs, Tensor]:
    """A batch as a data set gives it, (input, …, target) or a dict with "labels", as (inputs, targets)."""
    if isinstance(batch, Mapping):
        key = next((name for name in TARGETS if name in batch), None)
        if key is None:
            raise ValueError(f"{role}: a dict must hold its targets under 'labels'; it has {', '.join(batch)}")
        return {name: value for name, value in batch.items() if name != key}, batch[key]
    if len(batch) < 2:
        raise ValueError(f"{role} must hold inputs and a target, not {len(batch)} thing alone")
    *inputs, targets = batch
    first = inputs[0] if len(inputs) == 1 else tuple(inputs)
    return tuple(first) if isinstance(first, list) else first, targets


def _unwrap(loader: DataLoader[Any], role: str) -> tuple[Any, Callable[[list[Any]], Any]]:
    """The data set of a loader, whose order gives the indices however its batches are drawn, and what makes a batch."""
    sampler, data = loader.sampler, loader.dataset
    if isinstance(data, IterableDataset) or not isinstance(data, Sized):
        raise ValueError(
            f"{role} must be a pair of tensors (inputs, targets) or a map-style data set: a stream has none"
        )
    if isinstance(sampler, Sized) and len(sampler) != len(data):
        raise ValueError(f"{role} draws not every sample of its data set once; give the loader a Subset of it instead")
    single = loader.batch_sampler is None  # then its collate_fn is for one sample, and makes no batch
    return data, default_collate if single else loader.collate_fn


def checksum(source: Source, chunk: int = 5_000) -> tuple[str, list[Tensor]]:
    """Size and checksum of all inputs and targets, and the targets of each chunk."""
    total, found = 0, []
    for chosen in torch.arange(source.size).split(chunk):
        inputs, targets = source.batch(chosen)
        for part in (*tensors_of(inputs), targets):
            total = zlib.crc32(bytes_of(part), total)
        found.append(targets)
    return f"{source.size}-{total:08x}", found
