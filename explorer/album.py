"""The images of one data set that are shown, and what is known of each."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .notes import Note
from .pictures import Levels, numbers_of, read_images, to_pixels
from .sources import check_labels_at


def pack(values: NDArray[Any]) -> dict[str, Any]:
    """An array as little-endian bytes in base64, which a browser reads in no time; see web/data.js.

    Floats become float32; whole numbers, from 0 to 2³² − 1, the smallest type that holds them.
    """
    whole = values.dtype.kind in "iu"
    if whole and values.size and not 0 <= values.min() <= values.max() < 2**32:
        raise ValueError(f"numbers of images must lie in 0..{2**32 - 1}, not {values.min()}..{values.max()}")
    values = values.astype(np.min_scalar_type(int(values.max(initial=0))) if whole else np.float32)
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return {
        "type": values.dtype.name,
        "shape": list(values.shape),
        "base64": base64.b64encode(little.tobytes()).decode(),
    }


@dataclass(frozen=True, eq=False)
class Album:
    """k images of `data`: indices (k,), ascending where `place` is to find them, and their labels (k,)."""

    data: Any
    role: str
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        check_labels_at(self.data, self.indices, self.labels, self.role)

    @cached_property
    def images(self) -> Tensor:
        """(k, channels, h, w) as the data has them."""
        return read_images(self.data, self.indices, self.role)

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """(k,) what they are called: their index in the whole data set."""
        return numbers_of(self.data, self.indices)

    def pixels(self, levels: Levels) -> NDArray[np.uint8]:
        """(k, h, w, 3)."""
        return to_pixels(self.images, levels)

    def place(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in this album the images at `indices` of the data are."""
        return np.searchsorted(self.indices, indices)

    def about(self, notes: Mapping[int, Sequence[Note]], layout: Mapping[str, int]) -> dict[str, Any]:
        """For the reader: numbers, labels, how they lie in their sheets, and the notes on each by its place."""
        noted = {k: [asdict(note) for note in notes[int(n)]] for k, n in enumerate(self.numbers) if int(n) in notes}
        return {
            "number": pack(self.numbers),
            "label": pack(self.labels),
            "layout": dict(layout),
            "notes": noted,
        }
