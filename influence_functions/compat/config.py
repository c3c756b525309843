"""What `pytorch_influence_functions` calls its config, as a class that checks itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .._support import plain_torch
from ..problem import make_problem
from ..settings import InfluenceSettings
from ..solvers import Lissa, check_solver

CALC_METHODS = ("img_wise", "all_grad_then_test")


@dataclass(frozen=True)
class InfluenceConfig:
    """What pytorch_influence_functions calls `config`: its keys, with the defaults and the meaning of its manual.

    outdir          folder of the result files; it is made when it does not exist
    save_pth        folder to keep s_test and gradients in (see `calc_all_grad_then_test`), or None
    log_filename    file that the log is also written to, or None (see `init_logging`)
    seed            of everything that is sampled;  gpu: −1 for the CPU, else the number of the GPU
    calc_method     "img_wise" or "all_grad_then_test": which of the two `calc_influences` calls
    num_classes     of the test data, for the choice of as many images of each
    test_sample_num   test images a class, or False: all of them
    test_sample_start_per_class   the first of each class to take, or False: from 0; with `test_sample_num` only
    test_start_index  the first test image when all are taken; with `test_sample_num` the same as the line above
    recursion_depth, r_averaging, damp, scale   of solver "lissa": steps, averaged runs, λ (never multiplied by the
                    scale here) and divisor of a step (None: from the largest eigenvalue)
    progress        False: neither a bar nor a line of the log on the terminal
    jobs            test images at once, each in a process of its own
    solver          "lissa", as the package means it, or "kernel": direct, faster, nothing to choose but λ; "cg"
    report          what `tuned` found
    """

    outdir: str | Path = "outdir"
    save_pth: str | Path | None = None
    log_filename: str | Path | None = None
    seed: int = 42
    gpu: int = -1
    calc_method: str = "img_wise"
    num_classes: int = 10
    test_sample_start_per_class: int | bool = False
    test_sample_num: int | bool = False
    test_start_index: int | bool = False
    recursion_depth: int = 5000
    r_averaging: int = 1
    damp: float | None = 0.01
    scale: float | None = 25.0
    progress: bool = True
    jobs: int = 1
    solver: str = "lissa"
    report: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):  # NumPy's numbers as Python's own, which JSON takes
            if isinstance(value := getattr(self, entry.name), np.generic):
                object.__setattr__(self, entry.name, value.item())
        for name in ("num_classes", "recursion_depth", "r_averaging"):
            _check_count(name, getattr(self, name), 1)
        for name in ("test_sample_start_per_class", "test_sample_num", "test_start_index"):
            if getattr(self, name) is not False:
                _check_count(name, getattr(self, name), int(name == "test_sample_num"))
        if self.calc_method not in CALC_METHODS:
            raise ValueError(f"unknown calc_method {self.calc_method!r}: use one of {', '.join(CALC_METHODS)}")
        if isinstance(self.gpu, bool) or not isinstance(self.gpu, int) or self.gpu < -1:
            raise ValueError(f"gpu must be −1 (the CPU) or the number of a GPU, not {self.gpu!r}")
        starts = [n for n in (self.test_sample_start_per_class, self.test_start_index) if n is not False]
        if self.test_sample_num and len(set(starts)) > 1:
            raise ValueError("test_sample_start_per_class and test_start_index both say where to start, and differ")
        if not self.test_sample_num and self.test_sample_start_per_class:
            raise ValueError("test_sample_start_per_class needs test_sample_num: how many images of each class")
        _check_kinds(self)
        check_solver(self.solver)
        self.settings()  # the engine checks the values of damp, scale and jobs

    @classmethod
    def from_package(cls, config: Mapping[str, Any]) -> InfluenceConfig:
        """The configuration in a dict of the package, such as its `get_default_config()` returns.

        A key that is missing, or None (but for save_pth and log_filename), has the manual's default. `r`, as the
        manual writes r_averaging, goes before it. "dataset" is dropped, since nothing depends on it. ValueError names
        unknown keys.
        """
        fields = {entry.name for entry in dataclasses.fields(cls)}
        given = dict(config)
        given.pop("dataset", None)
        if "r" in given:
            given["r_averaging"] = given.pop("r")
        if unknown := set(given) - fields:
            raise ValueError(f"unknown key {', '.join(sorted(unknown))}; there are {', '.join(sorted(fields))}")
        return cls(
            **{key: value for key, value in given.items() if value is not None or key in ("save_pth", "log_filename")}
        )

    @property
    def start(self) -> int:
        """Where the test images begin, within each class or in all."""
        return int(self.test_sample_start_per_class or self.test_start_index or 0)

    @property
    def file_stem(self) -> str:
        """`<start>_<number>` as the package names its files, "False" for all images."""
        return f"{self.start}_{self.test_sample_num}"

    def settings(self, batch_size: int = InfluenceSettings.batch_size) -> InfluenceSettings:
        """The same for the engine; batch_size: of the training loader. The measure is the loss, as in the package."""
        return InfluenceSettings(
            solver=self.solver,
            measure="loss",
            damping=self.damp,
            iterations=self.recursion_depth,
            batch_size=batch_size,
            scale=self.scale,
            repeats=self.r_averaging,
            jobs=self.jobs,
            device="cpu" if self.gpu < 0 else f"cuda:{self.gpu}",
            seed=self.seed,
        )

    @plain_torch()
    def tuned(self, model: nn.Module, data: Any, tolerance: float = 0.1) -> InfluenceConfig:
        """This configuration with the scale that the model needs, and no more steps than it needs; says so in `report`.

        scale comes from the largest eigenvalue of the curvature of `data` (the training images, or their loader).
        recursion_depth and r_averaging are doubled from small, never above what they were, until the residual of the
        solutions for four training images is below `tolerance`; where none is, the smallest that comes within 5 % of
        the lowest residual is taken. `report` says so.
        """
        if self.solver != "lissa":
            return dataclasses.replace(self, report=f"solver {self.solver!r} has no scale, depth or r to tune")
        settings = dataclasses.replace(self.settings(batch_size_of(data)), scale=None)
        problem = make_problem(model, data, settings)
        solver, damping = Lissa(problem), problem.damping
        probes = problem.gradients(problem.train, problem.sample[:4], "training")[0].dense()
        scale = solver.scale(damping)
        depth, depths = _enough(solver.residuals(probes, _doubled(self.recursion_depth)), tolerance)
        averaged = (
            (r, solver.residual(solver.average(probes, depth, r, damping), probes, damping))
            for r in _doubled(self.r_averaging)
        )
        repeats, averages = _enough(averaged, tolerance)
        lines = [
            f"scale {self.scale} → {scale:.4g}: twice the largest eigenvalue met + λ, {scale / 2:.4g}",
            f"recursion_depth {self.recursion_depth} → {depth}; residual by depth:\n    {depths}",
            f"r_averaging {self.r_averaging} → {repeats}; residual by r: {averages}",
        ]
        if averages[repeats] > tolerance:
            lines.append(f"a residual of {tolerance} was not reached: allow more steps, raise damp, or use 'kernel'")
        return dataclasses.replace(
            self, scale=scale, recursion_depth=depth, r_averaging=repeats, report="\n".join(lines)
        )


def as_config(config: InfluenceConfig | Mapping[str, Any]) -> InfluenceConfig:
    """The configuration, whichever way it is given."""
    return config if isinstance(config, InfluenceConfig) else InfluenceConfig.from_package(config)


def get_default_config() -> dict[str, Any]:
    """The defaults of the manual as a dict, as in the package; `InfluenceConfig.from_package` checks it.

    >>> get_default_config()["recursion_depth"]
    5000
    """
    config = asdict(InfluenceConfig())
    del config["report"]
    return config


def _check_kinds(config: InfluenceConfig) -> None:
    """ValueError where a field is of another kind than it must be."""
    kinds: dict[str, tuple[type | None, ...]] = {
        "outdir": (str, Path),
        "save_pth": (str, Path, None),
        "log_filename": (str, Path, None),
        "seed": (int,),
        "damp": (int, float, None),
        "scale": (int, float, None),
        "progress": (bool,),
        "jobs": (int,),
        "solver": (str,),
    }
    for name, allowed in kinds.items():
        value, types = getattr(config, name), tuple(kind for kind in allowed if kind)
        if value is None and None in allowed:
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in allowed):
            words = " or ".join("None" if kind is None else kind.__name__ for kind in allowed)
            raise ValueError(f"{name} must be of kind {words}, not {value!r}")


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def batch_size_of(data: Any) -> int:
    """Images a step of the recursion: those of the loader, where there is one."""
    sampler = getattr(data, "batch_sampler", None)
    return getattr(data, "batch_size", None) or getattr(sampler, "batch_size", None) or InfluenceSettings.batch_size


def _doubled(most: int) -> list[int]:
    """`most`, half of it, a quarter, ... down to a 64th, rising."""
    return sorted({max(1, most >> halvings) for halvings in range(7)})


def _enough(tried: Iterable[tuple[int, float]], tolerance: float) -> tuple[int, dict[int, float]]:
    """The smallest value that is as good as needed or as the best, and all residuals up to the first good one."""
    residuals: dict[int, float] = {}
    for value, residual in tried:
        residuals[value] = round(residual, 4)
        if residual <= tolerance:
            break
    limit = max(tolerance, 1.05 * min(residuals.values()))
    return min(value for value, residual in residuals.items() if residual <= limit), residuals
