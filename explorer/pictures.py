"""Whatever holds images → pixels that can be shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from influence_functions.data import as_source

CHUNK = 1_000  # images read at a time
LARGEST = 128  # pixels: larger images are shown reduced


def pixels_of(data: Any, indices: NDArray[np.int64], role: str) -> NDArray[np.uint8]:
    """(k, h, w, 3) pixels 0..255 of the images of `data` at `indices`.

    data: an object with `images` (n, c, h, w), a pair (images, labels) or a map-style data set of such; one or three
    channels. Whole numbers are taken as they are, floats from 0..1 or −1..1, others from their smallest to their
    largest. Larger images than LARGEST are reduced. ValueError where there is no image to show.
    """
    parts = [_read(data, part, role) for part in torch.from_numpy(indices).split(CHUNK)]
    images = torch.cat(parts) if parts else torch.zeros(0, 3, 1, 1)
    if images.ndim == 3:
        images = images[:, None]  # (k, h, w) → (k, 1, h, w)
    if images.ndim != 4 or images.shape[1] not in {1, 3}:
        raise ValueError(
            f"{role} images must be (channels, height, width) with one or three channels, not {tuple(images.shape[1:])}"
        )
    images = _levels(images).expand(-1, 3, -1, -1)
    if (largest := max(images.shape[2:])) > LARGEST:
        size = [max(1, round(side * LARGEST / largest)) for side in images.shape[2:]]
        images = torch.nn.functional.interpolate(images, size, mode="area")
    return images.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _read(data: Any, part: Tensor, role: str) -> Tensor:
    if isinstance(getattr(data, "images", None), Tensor):
        return data.images[part]
    inputs, _ = as_source(data, role).batch(part)
    if not isinstance(inputs, Tensor):
        raise ValueError(f"{role} inputs must be one image each, to be shown, not {type(inputs).__name__}")
    return inputs.detach().cpu()


def _levels(images: Tensor) -> Tensor:
    """The images as float32 levels 0..255."""
    if not images.is_floating_point():
        return images.to(torch.float32).clamp(0, 255)
    low, high = (float(value) for value in images.aminmax()) if images.numel() else (0.0, 1.0)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= -1 and high <= 1:
        low, high = -1.0, 1.0
    return (images.to(torch.float32) - low) * (255 / max(high - low, 1e-12))


def class_names_of(data: Any, labels: Sequence[NDArray[Any]]) -> list[str]:
    """`class_names` or `classes` of a data set, else numbers."""
    named = getattr(data, "class_names", None) or getattr(data, "classes", None)
    count = 1 + max((int(part.max()) for part in labels if part.size), default=0)
    names = [str(name) for name in named] if named else [f"class {number}" for number in range(count)]
    if len(names) < count:
        raise ValueError(f"there are {len(names)} class names for labels up to {count - 1}; name every class")
    return names


def numbers_of(data: Any, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """What the images at `indices` are called: their index in the whole data set, where `data` is a part of it."""
    numbers = getattr(data, "numbers", None)
    return indices if numbers is None else np.asarray(numbers)[indices]
