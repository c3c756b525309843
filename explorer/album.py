"""The images of one data set that are shown, and what is known of each."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .pictures import numbers_of, pixels_of
from .sheets import Sheets, make_sheets
from .sources import check_labels_at


def pack(values: NDArray[Any]) -> dict[str, Any]:
    """An array as little-endian bytes in base64, which a browser reads in no time; see web/data.js.

    Floats become float32; whole numbers, none below 0, the smallest type that holds them.
    """
    whole = values.dtype.kind in "iu"
    values = values.astype(np.min_scalar_type(int(values.max(initial=0))) if whole else np.float32)
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return {
        "type": values.dtype.name,
        "shape": list(values.shape),
        "base64": base64.b64encode(little.tobytes()).decode(),
    }


@dataclass(frozen=True, eq=False)
class Album:
    """k images of `data`: indices (k,) ascending where `place` is to find them, and their labels (k,)."""

    data: Any
    role: str
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        check_labels_at(self.data, self.indices, self.labels, self.role)

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """(k, h, w, 3)."""
        return pixels_of(self.data, self.indices, self.role)

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """(k,) what they are called: their index in the whole data set."""
        return numbers_of(self.data, self.indices)

    def sheets(self) -> Sheets:
        """Their pixels, to be drawn."""
        return make_sheets(self.pixels)

    def place(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in this album the images at `indices` of the data are."""
        return np.searchsorted(self.indices, indices)

    def about(self, notes: Mapping[int, Sequence[str]], layout: Mapping[str, int]) -> dict[str, Any]:
        """For the reader: numbers, labels, how they lie in their sheets, and the notes on each by its place."""
        noted = {k: list(notes[int(n)]) for k, n in enumerate(self.numbers) if int(n) in notes}
        return {
            "number": pack(self.numbers),
            "label": pack(self.labels),
            "layout": dict(layout),
            "notes": noted,
        }
