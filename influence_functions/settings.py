"""How influence is computed: `InfluenceSettings`."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .measures import Measure, Values, as_measure

KINDS = {
    **dict.fromkeys(("damping", "scale", "tolerance", "memory"), float),
    **dict.fromkeys(("samples", "iterations", "batch_size", "repeats", "chunk", "jobs", "seed"), int),
    "device": str,
}


def _plain(name: str, value: Any, kind: type) -> Any:
    """A setting as Python's own number or text, which JSON takes, whatever library's it was; None stays."""
    if value is None and name in ("damping", "scale", "memory"):
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value) if kind is int else kind(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a {'whole ' * (kind is int)}number, not {value!r}") from error


@dataclass(frozen=True)
class InfluenceSettings:
    """How influence is computed; every field has a working default and is checked.

    solver      how (H + λI)⁻¹ is applied: "kernel", "ekfac", "ekfac_kernel", "cg", "lissa", "identity", or one of your
                own (see `solver`). "auto" is the first that fits into the memory of "kernel", "ekfac_kernel" (nearest
                to retraining of all by measurement, and slower for many test samples) and "ekfac"; `Health` says which
    measure     "margin", "loss", "squared_error", "binary", "tokens" or your own `Measure`, on both sides of the
                formula. The default is what foretells retraining best by measurement: an image learned by heart has
                almost no loss gradient left, but a margin. Only with a loss is a score an estimated change in nats.
    damping     λ > 0, in units of the curvature; None: the mean diagonal of the Gram matrix of the sampled gradients
                divided by `samples`, that is the mean of the curvature's non-zero eigenvalues; of "ekfac", which has
                p eigenvalues and not `samples`, twice the mean of all (measured, both: what foretells retraining best)
    samples     r: how many training samples stand in for all of them in the curvature H
    curvature   of "cg" and "lissa": "gauss_newton" (never negative) or "hessian"
    tolerance   of "cg": relative residual at which it stops;  iterations: of "cg" at most, the depth of "lissa"
    batch_size, scale, repeats   of "lissa": samples a step, divisor (None: from the largest eigenvalue), averaged runs
    memory      bytes that the call may take (None: half of what is free, on the GPU if there is one). What it needs is
                known before it is allocated: chunks become smaller, test samples are done in several passes over the
                training data, and where nothing fits, an error names the numbers
    chunk       training samples scored at a time, at most; jobs: joblib workers; device: "auto", "cpu", "cuda" or "mps"
    average     how the scores of several models are averaged: "spread" gives each model's row the same standard
                deviation first, their mean one, so that no model outweighs the others; "plain" takes them as they are
    seed        of everything that is sampled;  progress: show a bar on the terminal

    >>> InfluenceSettings(damping=-1.0)
    Traceback (most recent call last):
    ValueError: damping must be a positive number, not -1.0
    """

    solver: str = "auto"
    measure: str | Measure | Values = "margin"
    damping: float | None = None
    samples: int = 2000
    curvature: str = "gauss_newton"
    tolerance: float = 1e-3
    iterations: int = 500
    batch_size: int = 64
    scale: float | None = None
    repeats: int = 1
    chunk: int = 250
    jobs: int = 1
    device: str = "auto"
    memory: float | None = None
    average: str = "spread"
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        as_measure(self.measure)
        for name, kind in KINDS.items():
            object.__setattr__(self, name, _plain(name, getattr(self, name), kind))
        if self.curvature not in ("gauss_newton", "hessian"):
            raise ValueError(f"unknown curvature {self.curvature!r}: use one of gauss_newton, hessian")
        if self.average not in ("spread", "plain"):
            raise ValueError(f"unknown average {self.average!r}: use one of spread, plain")
        for name in ("damping", "scale", "tolerance", "memory"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ValueError(f"{name} must be a positive number, not {value}")
        for name in ("samples", "iterations", "batch_size", "repeats", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit in 64 bits, not {self.seed}")
        if self.jobs == 0:
            raise ValueError("jobs must be a number of workers, or −1 for all cores, not 0")

    def changed(self, changes: Mapping[str, Any]) -> InfluenceSettings:
        """The same with `changes`; ValueError for a name that is no setting."""
        known = {entry.name for entry in dataclasses.fields(self)}
        if unknown := set(changes) - known:
            raise ValueError(f"unknown setting {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
        return dataclasses.replace(self, **changes)

    def describe(self) -> dict[str, Any]:
        """The settings as plain values for JSON; a measure by its name."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return values | {"measure": as_measure(self.measure).name}
