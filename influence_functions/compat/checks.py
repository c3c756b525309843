"""What a run of the package's interface is made of: which test samples, which model, data that stays as it is."""

from __future__ import annotations

import time
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .._support import bytes_of
from ..data import Source, call, moved
from ..private import private_copy
from .config import InfluenceConfig


def keep_previous(path: Path) -> None:
    """Rename a result that is already there, with the time it was written at, as the package does."""
    if path.exists():
        written = time.strftime("%Y-%m-%d-%H-%M-%S", time.localtime(path.stat().st_mtime))
        names = (f"{path.stem}_{written}{more}{path.suffix}" for more in ("", *(f"-{i}" for i in range(2, 10_000))))
        path.replace(next(path.with_name(name) for name in names if not path.with_name(name).exists()))


def model_checksum(model: nn.Module, source: Source) -> int:
    """Of the layers, of what is trainable, of every weight and buffer, and of what it answers to the first sample."""
    about = [(name, str(param.dtype), param.requires_grad) for name, param in model.named_parameters()]
    total = zlib.crc32(f"{model!r} {about}".encode())
    for value in model.state_dict().values():
        total = zlib.crc32(bytes_of(value), total)
    private = private_copy(model, torch.device("cpu"))
    like = next(private.parameters())
    with torch.no_grad():
        answer = call(private, moved(source.batch(torch.tensor([0]))[0], like)).double().flatten()
    weighted = float(answer @ torch.linspace(1, 2, len(answer), dtype=torch.float64))
    return zlib.crc32(f"{weighted:.2e}".encode(), total)


def choose_tests(config: InfluenceConfig, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the test images asked for: as many of each class, class by class, or all from a start on."""
    if config.test_sample_num is False:
        if config.start >= len(labels):
            raise ValueError(f"test_start_index must lie in 0..{len(labels) - 1}, not {config.start}")
        return np.arange(config.start, len(labels))
    wanted = slice(config.start, config.start + int(config.test_sample_num))
    chosen = [np.flatnonzero(labels == label)[wanted] for label in range(config.num_classes)]
    for label, found in enumerate(chosen):
        if len(found) < config.test_sample_num:
            raise ValueError(
                f"class {label} has fewer than {wanted.stop} test images; lower test_sample_num, "
                "test_sample_start_per_class or num_classes"
            )
    return np.concatenate(chosen)
