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


def draw_still(
    albums: tuple[Album, Album], pixels: tuple[NDArray[np.uint8], NDArray[np.uint8]], ranked: Rankings, names: list[str]
) -> bytes:
    """PNG, 7 inches wide: the first test image, and the training images that help and harm it most.

    albums, pixels: of test and training images.
    """
    (tests, trains), width = albums, ranked.lists["helpful"].shape[2]
    figure = plt.figure(figsize=(7, 3.3), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2, width + 1, width_ratios=[1.7] + [1] * width)
    left = _show(figure.add_subplot(grid[:, 0]), pixels[0][0])
    left.set_title(f"test image {tests.numbers[0]}\n{names[tests.labels[0]]}", fontsize=8)
    for line, (kind, sign) in enumerate(KINDS.items()):
        places = trains.place(ranked.lists[kind][-1, 0])
        look: dict[str, Any] = {"fontsize": 7.5, "color": COLOURS[kind]}
        for column, (place, score) in enumerate(zip(places, ranked.scores[kind][-1, 0])):
            ax = figure.add_subplot(grid[line, column + 1])
            ax.set_axis_off()
            if column == 0:
                turned: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center", "transform": ax.transAxes}
                ax.text(-0.12, 0.5, f"most {kind}", **turned, **look)
            if sign * score < 0:
                about = f"{'−' if score < 0 else '+'}{abs(score):.2g}\n{names[trains.labels[place]]}"
                _show(ax, pixels[1][place]).set_title(f"{about}\n#{trains.numbers[place]}", **look)
                if ranked.trainings > 1 and ranked.top:
                    found = f"{ranked.agreement[kind][-1, 0, column]} of {ranked.trainings}"
                    ax.text(0.5, -0.08, found, transform=ax.transAxes, ha="center", va="top", fontsize=7.5)
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
