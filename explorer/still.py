"""A picture of the explorer for where it cannot be alive: on GitHub, on paper, in a notebook that nobody runs."""

from __future__ import annotations

import io
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .album import Album
from .rankings import KINDS, Rankings

COLOURS = {"helpful": "#0072B2", "harmful": "#D55E00"}  # Okabe & Ito, as in all figures of this project


def draw_still(tests: Album, trains: Album, ranked: Rankings, names: list[str], row: int = 0) -> bytes:
    """PNG, 7 inches wide: test image `row` at the left, its most helpful and most harmful training images."""
    width = ranked.lists["helpful"].shape[2]
    figure = plt.figure(figsize=(7, 3.3), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2, width + 1, width_ratios=[1.7] + [1] * width)
    left = _show(figure.add_subplot(grid[:, 0]), tests.pixels[row])
    left.set_title(f"test image {tests.numbers[row]}\n{names[tests.labels[row]]}", fontsize=8)
    for line, kind in enumerate(KINDS):
        chosen = trains.place(ranked.lists[kind][-1, row])
        for column, (place, score) in enumerate(zip(chosen, ranked.scores[kind][-1, row])):
            ax = _show(figure.add_subplot(grid[line, column + 1]), trains.pixels[place])
            sign = "−" if score < 0 else "+"
            about = f"{sign}{abs(score):.2g}\n{names[trains.labels[place]]}\n#{trains.numbers[place]}"
            ax.set_title(about, fontsize=7.5, color=COLOURS[kind])
            if ranked.trainings > 1:
                found = f"{ranked.agreement[kind][-1, row, column]} of {ranked.trainings}"
                ax.text(0.5, -0.08, found, transform=ax.transAxes, ha="center", va="top", fontsize=7.5)
            if column == 0:
                look: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center", "color": COLOURS[kind]}
                ax.text(-0.12, 0.5, f"most {kind}", transform=ax.transAxes, fontsize=8, **look)
    return _png(figure)


def _show(ax: Axes, pixels: NDArray[np.uint8]) -> Axes:
    ax.imshow(pixels, interpolation="nearest")
    ax.set_axis_off()
    return ax


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    return file.getvalue()
