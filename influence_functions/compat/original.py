"""`pytorch_influence_functions` 0.1.1, made callable; imported only by those who want to compare."""

from __future__ import annotations

import contextlib
import copy
import io
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader


@dataclass(frozen=True, eq=False)
class OriginalRun:
    """One test image through pytorch_influence_functions: its numbers with its own sign, and its own two lists.

    `influence` (n,) is −I in our convention; `harmful` and `helpful` (n,) are named as the package names them.
    """

    influence: NDArray[Any]
    harmful: NDArray[np.int64]
    helpful: NDArray[np.int64]
    seconds_solve: float
    seconds_score: float

    def seconds_for(self, depth: int, images: int, measured_depth: int) -> float:
        """Time of one test image at `depth` recursions over `images`, scaled linearly from what was measured."""
        return self.seconds_solve * depth / measured_depth + self.seconds_score * images / len(self.influence)


def run_original(
    model: nn.Module, train: Any, test: Any, depth: int, scale: float = 25.0, batch_size: int = 1
) -> OriginalRun:
    """Call pytorch_influence_functions 0.1.1 for the one sample in `test`, on the model's device, silently.

    train, test: map-style data sets; `batch_size` images a recursion (the whole set when it is as large).
    Its two halves are called by hand because its own driver fixes scale at 25 and the device at GPU 0.
    """
    from pytorch_influence_functions import calc_influence_function as package

    gpu = 0 if next(model.parameters()).is_cuda else -1
    whole = batch_size >= len(train)
    loader = DataLoader(train, batch_size=batch_size, shuffle=not whole)
    test_loader = DataLoader(test, batch_size=1)
    private = copy.deepcopy(model)  # the package switches the model to eval mode and leaves it there
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls log_softmax without a dimension, once an image
        start = time.perf_counter()
        image, label = next(iter(test_loader))
        solved = package.calc_s_test_single(private, image, label, loader, gpu, 0.01, scale, depth, 1)
        middle = time.perf_counter()
        influence, harmful, helpful, _ = package.calc_influence_single(
            private, loader, test_loader, 0, gpu, depth, 1, s_test_vec=[part.detach() for part in solved]
        )
        end = time.perf_counter()
    values = np.array([float(value) for value in influence])
    return OriginalRun(values, np.array(harmful), np.array(helpful), middle - start, end - middle)
