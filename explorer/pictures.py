"""Whatever holds images → pixels that can be shown, and what the images and their classes are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from influence_functions.data import as_source

CHUNK = 1_000  # images read at a time
LARGEST = 128  # pixels: larger images are shown reduced
OUTER = 0.005  # share of the values that may lie beyond black, and beyond white, where nothing else says what these are
SAMPLED = 4_000_000  # values of which that is judged

Levels = tuple[float, float]
"""The values that are shown black and white."""


def read_images(data: Any, indices: NDArray[np.int64], role: str) -> Tensor:
    """(k, channels, h, w) of the images of `data` at `indices`, as they are, none larger than LARGEST.

    data: an object with `images` (n, c, h, w), or anything that the engine takes whose inputs are one image each, with
    or without an axis for the channels. ValueError where there is no image with one or three channels.
    """
    parts = [_small(_read(data, part, role), role) for part in torch.from_numpy(indices).split(CHUNK)]
    return torch.cat(parts)


def _read(data: Any, part: Tensor, role: str) -> Tensor:
    if isinstance(getattr(data, "images", None), Tensor):
        return data.images[part].detach().cpu()
    inputs, _ = as_source(data, role).batch(part)
    if not isinstance(inputs, Tensor):
        raise ValueError(f"{role} inputs must be one image each, to be shown, not {type(inputs).__name__}")
    return inputs.detach().cpu()


def _small(images: Tensor, role: str) -> Tensor:
    if images.ndim == 3:
        images = images[:, None]  # (k, h, w) → (k, 1, h, w)
    if images.ndim != 4 or images.shape[1] not in {1, 3}:
        shape = tuple(images.shape[1:])
        raise ValueError(f"{role} images must be (channels, height, width) with one or three channels, not {shape}")
    if (largest := max(images.shape[2:])) > LARGEST:
        size = [max(1, round(side * LARGEST / largest)) for side in images.shape[2:]]
        return torch.nn.functional.interpolate(images.float(), size, mode="area").to(images.dtype)
    return images


def levels_of(images: Sequence[Tensor]) -> Levels:
    """What is black and what white in all of these images together.

    0 and 255 for whole numbers up to 255, 0 and 65535 above; 0 or −1 and 1 for floats within; 0 and 1 for masks; else
    all but the outermost values, as of images that were standardised. ValueError for NaN and infinity.
    """
    values = torch.cat([part.flatten()[:: max(1, part.numel() // SAMPLED)].float() for part in images])
    if not all(bool(torch.isfinite(part).all()) for part in images):
        raise ValueError("there are images with NaN or infinity in their pixels; those cannot be shown")
    low, high = (float(value) for value in values.aminmax())
    whole = not any(part.is_floating_point() for part in images)
    for black, white in ((0, 1), *(((0, 255), (0, 65_535)) if whole else ((-1, 1), (0, 255)))):
        if black <= low and high <= white:
            return float(black), float(white)
    values = values.sort().values
    outer = int(OUTER * len(values))
    return float(values[outer]), float(values[len(values) - 1 - outer])


def to_pixels(images: Tensor, levels: Levels) -> NDArray[np.uint8]:
    """(k, h, w, 3) uint8, as a screen shows them."""
    black, white = levels
    shown = (images.to(torch.float32) - black).mul_(255 / max(white - black, 1e-12)).clamp_(0, 255).round_()
    return shown.to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def unwrapped(data: Any) -> tuple[Any, NDArray[np.int64] | None]:
    """The data set within a DataLoader and parts of one, and which of its samples these are (None: all)."""
    chosen: NDArray[np.int64] | None = None
    while isinstance(data, (DataLoader, Subset)):
        if isinstance(data, Subset):
            outer = np.asarray(data.indices, np.int64)
            chosen = outer if chosen is None else outer[chosen]
        data = data.dataset
    return data, chosen


def class_names_of(data: Any, labels: Sequence[NDArray[Any]], outputs: int | None) -> list[str]:
    """`class_names` or `classes` of a data set, where these are names; else a number for each output."""
    inner, _ = unwrapped(data)
    count = max(outputs or 0, 1 + max(int(part.max()) for part in labels))
    for given in (getattr(inner, "class_names", None), getattr(inner, "classes", None)):
        if isinstance(given, (list, tuple, np.ndarray)) and len(given) and all(isinstance(one, str) for one in given):
            if len(given) != count and (outputs or len(given) < count):
                about = f"the model has {outputs} outputs" if outputs else f"there are labels up to {count - 1}"
                raise ValueError(f"the data names {len(given)} classes, but {about}; name every class")
            return [str(name) for name in given]
    return [f"class {number}" for number in range(count)]


def numbers_of(data: Any, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """What the images at `indices` are called: their index in the whole data set, where `data` is a part of it."""
    inner, chosen = unwrapped(data)
    inside = indices if chosen is None else chosen[indices]
    numbers = getattr(inner, "numbers", None)
    return np.asarray(numbers)[inside] if isinstance(numbers, (Tensor, np.ndarray)) else inside


def labels_of(data: Any, indices: NDArray[np.int64], role: str) -> NDArray[np.int64]:
    """The labels of the samples at `indices`."""
    own = getattr(data, "labels", None)
    if isinstance(own, (Tensor, np.ndarray)) and np.ndim(own) == 1 and len(own) == len(data):
        return np.asarray(own.detach().cpu() if isinstance(own, Tensor) else own)[indices]
    return as_source(data, role).batch(torch.from_numpy(indices))[1].detach().cpu().numpy()
