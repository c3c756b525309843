"""Uniform access to whatever samples come in: `Source`, indices → (inputs, targets)."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ._support import bytes_of

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""What a model is called with: model(x), model(*x) or model(**x); every tensor has the samples along its first axis."""
ARRAYS = (Tensor, np.ndarray)
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


class _Checked(Source):
    """One that `as_source` made: it is not read and checked again for each of several models."""


def on_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """`function` of each tensor in `inputs`."""
    if isinstance(inputs, dict):
        return {name: function(value) for name, value in inputs.items()}
    return tuple(map(function, inputs)) if isinstance(inputs, tuple) else function(inputs)


def moved(inputs: Inputs, like: Tensor) -> Inputs:
    """`inputs` where `like` is, numbers with a point in its type."""
    return on_tensors(lambda part: part.to(like.device, like.dtype if part.is_floating_point() else None), inputs)


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """The tensors in `inputs`."""
    return [*inputs.values()] if isinstance(inputs, dict) else [*inputs] if isinstance(inputs, tuple) else [inputs]


def arguments(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What stands in the brackets of the model's call: copies, since a forward may change its inputs in place."""
    copies = on_tensors(torch.clone, inputs)
    if isinstance(copies, dict):
        return (), copies
    return (copies if isinstance(copies, tuple) else (copies,)), {}


def call(model: nn.Module, inputs: Inputs, params: dict[str, Tensor] | None = None) -> Tensor:
    """The outputs (b, …) of `model`, if need be with other `params`; see `outputs_of`."""
    args, kwargs = arguments(inputs)
    return outputs_of(model(*args, **kwargs) if params is None else functional_call(model, params, args, kwargs))


def outputs_of(returned: Any) -> Tensor:
    """The tensor that a measure is of: what is returned, its `logits` (an attribute or a key), or its first part."""
    found = getattr(returned, "logits", None)
    if found is None and isinstance(returned, Mapping):
        found = returned.get("logits")
    if found is None and isinstance(returned, (tuple, list)) and returned:
        found = returned[0]
    found = returned if found is None else found
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model returns {type(returned).__name__}; it must return a tensor, something with `logits`, or a "
            "tuple whose first part is the tensor: wrap it in a module that does"
        )
    return found


def shapes(inputs: Inputs) -> str:
    """The shape of one sample, for messages."""
    return ", ".join(str(tuple(part.shape[1:])) for part in tensors_of(inputs))


def as_source(data: Any, role: str) -> Source:
    """Wrap what the caller passed; ValueError when it is empty or of no known kind. `role` is its name in messages.

    (inputs, targets) as tensors or NumPy arrays, inputs also a tuple or dict of them; a dict of them with "labels" in
    it; an object with `batch(indices)` and a length; a map-style data set; a DataLoader of one. It must give the same
    samples each time: with augmentation, neither would influences mean anything, nor could a run be continued.
    """
    if isinstance(data, _Checked):
        return data
    if isinstance(data, Mapping) or (isinstance(data, (tuple, list)) and _is_pair(data)):
        return _of_tensors(*_split(data if isinstance(data, Mapping) else tuple(data), role), role)
    if isinstance(data, Source):
        source = Source(data.size, lambda chosen: _split(data.batch(chosen), role))
    elif isinstance(data, DataLoader):
        source = _of_samples(*_unwrap(data, role), role)
    elif isinstance(data, Sized) and _has_batch(data):
        source = Source(len(data), lambda chosen: _split(data.batch(chosen), role))  # type: ignore[attr-defined]
    elif isinstance(data, Sized) and hasattr(data, "__getitem__") and not isinstance(data, IterableDataset):
        source = _of_samples(data, default_collate, role)
    else:
        raise ValueError(
            f"{role} must be a pair of tensors (inputs, targets), a map-style data set or a DataLoader of one, "
            f"not {type(data).__name__}"
        )
    _check_steady(source, role)
    return _Checked(source.size, source.batch)


def _check_size(size: int, role: str) -> None:
    if size == 0:
        raise ValueError(f"{role} is empty: influence needs at least one sample")


def _check_steady(source: Source, role: str) -> None:
    _check_size(source.size, role)
    first = torch.arange(min(source.size, 20))
    once, again = ([*tensors_of(inputs), targets] for inputs, targets in (source.batch(first) for _ in range(2)))
    if not all(a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(once, again)):
        raise ValueError(f"{role} gives other samples each time it is read; switch off its augmentation")


def _has_batch(data: Any) -> bool:
    """Whether it has batch(indices), and not another library's method of that name."""
    batch = getattr(data, "batch", None)
    return callable(batch) and next(iter(signature(batch).parameters), "") in ("indices", "chosen")


def _is_pair(data: Sequence[Any]) -> bool:
    """Whether this is (inputs, targets) and not a list of samples."""
    if len(data) != 2 or (not isinstance(data[0], (*ARRAYS, tuple, list, dict)) and not hasattr(data[0], "to_numpy")):
        return False
    column = isinstance(data[1], list) and all(isinstance(target, (int, float)) for target in data[1])
    return column or isinstance(data[1], ARRAYS) or hasattr(data[1], "to_numpy")


def _tensor(part: Any, role: str) -> Tensor:
    """A tensor that autograd does not follow, of a tensor or an array; ValueError for anything else."""
    if isinstance(part, list) and all(isinstance(number, (int, float)) for number in part):
        part = np.array(part)
    if isinstance(part, np.ndarray) and part.dtype.kind in "biuf" and part.dtype.itemsize <= 8:
        kind = np.int64 if part.dtype.kind == "u" and part.dtype.itemsize > 1 else part.dtype.newbyteorder("=")
        with warnings.catch_warnings():  # of memory that may only be read: nobody writes to it
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(np.ascontiguousarray(part, dtype=kind))  # a copy only where it must be
    if not isinstance(part, Tensor) or part.is_sparse or part.layout != torch.strided:
        hint = "; pass its .to_numpy()" if hasattr(part, "to_numpy") else ""
        hint = "; pass its .to_dense()" if isinstance(part, Tensor) else hint
        raise ValueError(f"{role}: inputs and targets must be tensors of numbers, not {type(part).__name__}{hint}")
    return part.detach()


def _of_tensors(inputs: Inputs, targets: Tensor, role: str) -> Source:
    for part in tensors_of(inputs):
        if part.ndim == 0 or targets.ndim == 0:
            raise ValueError(f"{role} looks like one sample; pass (x[None], y[None]), or a Subset of the data set")
        if len(part) != len(targets):
            raise ValueError(f"{role}: {len(part)} inputs but {len(targets)} targets; they must pair up")
    _check_size(len(targets), role)
    return _Checked(len(targets), lambda chosen: (on_tensors(lambda part: part[chosen], inputs), targets[chosen]))


def _of_samples(data: Any, collate: Callable[[list[Any]], Any], role: str) -> Source:
    def batch(chosen: Tensor) -> tuple[Inputs, Tensor]:
        samples = [data[int(i)] for i in chosen]
        try:
            return _split(collate(samples), f"{role}: a sample")
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"{role}: its samples do not make a batch ({error}); let the data set give tensors of one shape, or "
                "pass a DataLoader whose collate_fn makes them so"
            ) from error

    return Source(len(data), batch)


def _split(batch: Any, role: str) -> tuple[Inputs, Tensor]:
    """A batch as a data set gives it, (input, …, target) or a dict with "labels", as (inputs, targets)."""
    if isinstance(batch, Mapping):
        key = next((name for name in TARGETS if name in batch), None)
        if key is None:
            raise ValueError(f"{role}: a dict must hold its targets under 'labels'; it has {', '.join(batch)}")
        inputs = {name: _tensor(value, f"{role}, {name!r}") for name, value in batch.items() if name != key}
        return inputs, _tensor(batch[key], f"{role}, {key!r}")
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ValueError(f"{role} must hold inputs and a target, not one thing alone ({type(batch).__name__})")
    *given, targets = batch
    first = given[0] if len(given) == 1 else tuple(given)
    if isinstance(first, Mapping):
        return {name: _tensor(value, f"{role}, {name!r}") for name, value in first.items()}, _tensor(targets, role)
    if isinstance(first, (tuple, list)):
        return tuple(_tensor(part, role) for part in first), _tensor(targets, role)
    return _tensor(first, role), _tensor(targets, role)


def _unwrap(loader: DataLoader[Any], role: str) -> tuple[Any, Callable[[list[Any]], Any]]:
    """The data set of a loader, whose order gives the indices however its batches are drawn, and what makes a batch."""
    sampler, data = getattr(loader.batch_sampler, "sampler", loader.sampler), loader.dataset
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
