"""What every solver works on: a private copy of the model with its gradients, the training data and the settings."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ._support import NonFiniteError, allowed_bytes, pick_device
from .data import Inputs, Source, as_source, call, moved, tensors_of
from .gradients import PROVED, DisagreementError, GradientMaker
from .measures import Measure, as_measure
from .private import private_copy
from .settings import InfluenceSettings
from .stack import Gradients
from .verify import check_measure, check_own, try_model

CHECK_EVERY = 8  # chunks of training samples, whose gradients are held against autograd
QUICK = 24e6  # bytes up to which an array is allocated quickly: larger ones come from the system, page by page
ENOUGH = 100  # samples at a time, below which products with large layers lose more than that costs (measured)


@dataclass(frozen=True)
class Footprint:
    """Bytes: of the gradients of one sample, of a pass for each sample in it, and what may be taken in all.

    width: multiplications that an inner product of two gradients costs; factored: bytes of the gradients as factors,
    and largest: those of the layer that has most of them.
    """

    gradient: float = 0.0
    factored: float = 0.0
    largest: float = 0.0
    width: int = 0
    sample: float = 0.0
    room: float = math.inf


@dataclass(frozen=True, eq=False)
class Problem:
    """`outputs`: what the model returns for one training sample, (1, …)."""

    maker: GradientMaker
    train: Source
    settings: InfluenceSettings
    outputs: Tensor
    footprint: Footprint = Footprint()

    def __getstate__(self) -> dict[str, Any]:
        """Without what was computed on the way, which its owners hold themselves."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.like.device

    @property
    def measure(self) -> Measure:
        """What influence is the influence on."""
        return self.maker.measure

    @property
    def like(self) -> Tensor:
        """A parameter: where the model is, and its type."""
        return next(iter(self.maker.params.values()))

    @property
    def size(self) -> int:
        """Bytes of p numbers."""
        return sum(param.numel() for param in self.maker.params.values()) * self.like.element_size()

    @cached_property
    def sample(self) -> Tensor:
        """(r,) indices of the training samples that stand in for all of them in the curvature."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        order = torch.randperm(self.train.size, generator=generator)
        return order[: self.settings.samples].sort().values

    def proof(self) -> tuple[Tensor, Tensor]:
        """Indices of a few training samples from all over, and of a whole chunk that begins with them."""
        few = torch.linspace(0, self.train.size - 1, min(PROVED, self.train.size)).long().unique()
        others = torch.arange(min(self.train.size, self.settings.chunk))
        return few, torch.cat([few, others[~torch.isin(others, few)]])[: max(self.settings.chunk, len(few))]

    @cached_property
    def sampled(self) -> Gradients:
        """r gradients whose second moment is the Fisher matrix, the mean of their outer products.

        Where the measure can, each target is drawn from the model's own prediction: the expectation is then the true
        Fisher, which equals the Gauss-Newton matrix (Martens 2020, section 9). Else the given targets are used.
        """
        with self.told("training", self.sample):
            found = Gradients.collect((self.maker(*batch) for batch in self.drawn_batches()), len(self.sample))
        self.check_finite(found, "training")
        return found

    @cached_property
    def damping(self) -> float:
        """λ as given, or the mean of the sampled Fisher's non-zero eigenvalues."""
        if self.settings.damping:
            return self.settings.damping
        if "sampled" in self.__dict__:
            squares = self.sampled.squares()
        else:  # nobody needs the gradients but for their sizes: do not hold them
            squares = torch.cat([self.maker(*batch).squares() for batch in self.drawn_batches()])
        automatic = float(squares.mean()) / len(self.sample)
        if automatic <= 0:
            raise ValueError("every sampled gradient is zero, so no damping can be derived; pass damping=")
        return automatic

    def drawn_batches(self) -> Iterator[tuple[Inputs, Tensor]]:
        """Chunks of the sampled inputs, with the targets whose gradients make up the Fisher matrix."""
        chosen, uniform, start = self.sample, None, 0
        for inputs, targets in self.batches(self.train, chosen):
            if self.measure.draw is not None:
                if uniform is None:  # column by column, so that the first draws do not depend on how many there are
                    generator = torch.Generator().manual_seed(self.settings.seed)
                    size = (targets[0].numel(), len(chosen))
                    uniform = torch.rand(size, generator=generator, dtype=torch.float64).T.contiguous()
                with torch.no_grad():
                    outputs = call(self.maker.model, inputs)
                    targets = self.measure.draw(outputs, targets, uniform[start : start + len(targets)])
                start += len(targets)
            yield inputs, targets

    def batch(self, source: Source, chosen: Tensor) -> tuple[Inputs, Tensor]:
        """The samples at `chosen`, fitted."""
        return self.fitted(*source.batch(chosen))

    def fitted(self, inputs: Inputs, targets: Tensor) -> tuple[Inputs, Tensor]:
        """Checked samples on the model's device, numbers with a point in the model's type."""
        self.measure.check(self.outputs, targets)
        return moved(inputs, self.like), targets.to(self.device, None if targets.is_floating_point() else torch.long)

    def batches(self, source: Source, indices: Tensor) -> Iterator[tuple[Inputs, Tensor]]:
        """The samples at `indices`, a chunk at a time."""
        return (self.batch(source, chosen) for chosen in indices.split(self.settings.chunk))

    def gradients(self, source: Source, indices: Tensor, role: str = "test") -> tuple[Gradients, Tensor]:
        """The gradients at the samples at `indices`, checked, and their targets (k, …)."""
        seen: list[Tensor] = []

        def parts() -> Iterator[Gradients]:
            for chosen in indices.split(self.settings.chunk):
                with self.told(role, chosen):
                    inputs, targets = self.batch(source, chosen)
                    seen.append(targets)
                    yield self.maker(inputs, targets)

        gradients = Gradients.collect(parts(), len(indices))
        self.check_finite(gradients, role)
        return gradients, join_targets(seen)

    def check_finite(self, gradients: Gradients, role: str) -> None:
        """NonFiniteError where a gradient is not made of numbers."""
        if not torch.isfinite(gradients.squares()).all():
            raise NonFiniteError(
                f"the gradient of a {role} sample is NaN or infinite; check the model and the sample's values"
            )

    @contextlib.contextmanager
    def told(self, role: str, chosen: Tensor) -> Iterator[None]:
        """Whatever the caller's model raises becomes a ValueError that names the samples."""
        try:
            yield
        except (ValueError, DisagreementError):
            raise
        except Exception as error:
            samples = f"{int(chosen[0])}..{int(chosen[-1])}"
            raise ValueError(f"the model refuses {role} samples {samples}: {error}") from error

    def check_tests(self, source: Source, indices: Tensor) -> None:
        """Errors that say what is wrong with the choice of test samples, or with the samples."""
        if len(indices) == 0:
            raise ValueError("no sample chosen: the indices are empty")
        try_model(self.maker, source, int(indices[0]), "test")


def join_targets(parts: list[Tensor]) -> Tensor:
    """(n, …) targets; (n,) of −1 where their shape differs from batch to batch."""
    if len({part.shape[1:] for part in parts}) > 1:
        return torch.full((sum(map(len, parts)),), -1)
    return torch.cat(parts).cpu()


def make_problem(model: nn.Module, train: Any, settings: InfluenceSettings) -> Problem:
    """Copy the model (so that the caller's is never touched), move it, and prove its roads on training samples."""
    device, source = pick_device(settings.device), as_source(train, "train")
    room = allowed_bytes(settings.memory, device)
    private = private_copy(model, device)
    maker = GradientMaker(private, as_measure(settings.measure))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a model that draws numbers leaves no trace
        with torch.enable_grad():
            check_own(private, model, source)
        problem = Problem(maker, source, settings, try_model(maker, source, 0, "train"))
        few, _ = problem.proof()
        with problem.told("training", few):
            check_measure(maker, *problem.batch(source, few[:2] if len(few) > 1 else few.repeat(2)))
            maker.prove(tried := [problem.batch(source, few)])
            problem = _within_memory(problem, few, room)
        chunk = problem.proof()[1]
        with problem.told("training", chunk):
            maker.prove([*tried, problem.batch(source, few.flip(0)), problem.batch(source, chunk)])
    return problem


def _within_memory(problem: Problem, few: Tensor, room: float) -> Problem:
    """With what it takes, measured on a few samples, and a chunk that leaves half of the room for the solver."""
    settings, batch = problem.settings, problem.batch(problem.train, few)
    factored = problem.maker(*batch, light=False).made()
    light = factored.light()
    held, full = ([block.held / len(few) for block in blocks] for blocks in (factored.blocks, light.blocks))
    gradient = sum(full)
    own = sum(part.numel() * part.element_size() for part in tensors_of(batch[0]))
    sample = (problem.maker.recorder.weight(problem.measure, *batch) + own) / len(few) + 3 * max(*held, *full)
    footprint = Footprint(gradient, sum(held), max(held), light.width, sample, room)
    chunk = max(1, min(settings.chunk, int(room / 2 / sample), max(ENOUGH, int(QUICK / max(full)))))
    return dataclasses.replace(problem, settings=settings.changed({"chunk": chunk}), footprint=footprint)
