"""What every solver works on: a private copy of the model with its gradients, the training data and the settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ._support import NonFiniteError, free_bytes, pick_device
from .data import Inputs, Source, as_source, call, moved, shapes, tensors_of
from .gradients import PROVED, GradientMaker
from .measures import Measure, as_measure
from .private import private_copy
from .settings import InfluenceSettings
from .stack import Gradients


@dataclass(frozen=True, eq=False)
class Problem:
    """`outputs`: what the model returns for one training sample, (1, …)."""

    maker: GradientMaker
    train: Source
    settings: InfluenceSettings
    outputs: Tensor

    def __getstate__(self) -> dict[str, Any]:
        """Without what was computed on the way, which its owners hold themselves."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.maker.params.values())).device

    @property
    def measure(self) -> Measure:
        """What influence is the influence on."""
        return self.maker.measure

    @cached_property
    def held(self) -> float:
        """Bytes of the gradients of one sample."""
        few = self.proof()[0]
        return self.maker(*self.batch(self.train, few)).held / len(few)

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
        cure = f"samples below {len(self.sample)}, a model with frozen layers, or solver='cg'"
        self.check_memory(len(self.sample), f"of the {len(self.sample)} samples of the curvature", cure)
        return Gradients.join([self.maker(*batch) for batch in self._drawn_batches()])

    @cached_property
    def damping(self) -> float:
        """λ as given, or the mean of the sampled Fisher's non-zero eigenvalues."""
        if self.settings.damping:
            return self.settings.damping
        if "sampled" in self.__dict__:
            squares = self.sampled.squares()
        else:  # nobody needs the gradients but for their sizes: do not hold them
            squares = torch.cat([self.maker(*batch).squares() for batch in self._drawn_batches()])
        automatic = float(squares.mean()) / len(self.sample)
        if automatic <= 0:
            raise ValueError("every sampled gradient is zero, so no damping can be derived; pass damping=")
        return automatic

    def _drawn_batches(self) -> Iterator[tuple[Inputs, Tensor]]:
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
        """Checked samples on the model's device, numbers with a point in the model's type."""
        like = next(iter(self.maker.params.values()))
        inputs, targets = source.batch(chosen)
        self.measure.check(self.outputs, targets)
        return moved(inputs, like), targets.to(like.device, None if targets.is_floating_point() else torch.long)

    def batches(self, source: Source, indices: Tensor) -> Iterator[tuple[Inputs, Tensor]]:
        """The samples at `indices`, a chunk at a time."""
        return (self.batch(source, chosen) for chosen in indices.split(self.settings.chunk))

    def gradients(self, source: Source, indices: Tensor, role: str = "test") -> tuple[Gradients, Tensor]:
        """The gradients at the samples at `indices`, checked, and their targets (k, …)."""
        self.check_memory(len(indices), f"of {len(indices)} {role} samples", "fewer of them at once")
        parts = [(self.maker(*batch), batch[1]) for batch in self.batches(source, indices)]
        gradients = Gradients.join([part for part, _ in parts])
        if not torch.isfinite(gradients.squares()).all():
            raise NonFiniteError(
                f"the gradient of a {role} sample is NaN or infinite; check the model and the sample's values"
            )
        return gradients, join_targets([targets for _, targets in parts])

    def check_memory(self, count: int, whose: str, cure: str) -> None:
        """ValueError where the gradients of so many samples, and a copy while they are joined, find no room."""
        needed, free = 2 * count * self.held, free_bytes(self.device)
        if needed > free:
            raise ValueError(
                f"the gradients {whose} need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; pass {cure}"
            )

    def check_tests(self, source: Source, indices: Tensor) -> None:
        """Errors that say what is wrong with the choice of test samples, or with the samples."""
        if len(indices) == 0:
            raise ValueError("no sample chosen: the indices are empty")
        _try_model(self.maker, source, int(indices[0]), "test")


def join_targets(parts: list[Tensor]) -> Tensor:
    """(n, …) targets; (n,) of −1 where their shape differs from batch to batch."""
    if len({part.shape[1:] for part in parts}) > 1:
        return torch.full((sum(map(len, parts)),), -1)
    return torch.cat(parts).cpu()


def make_problem(model: nn.Module, train: Any, settings: InfluenceSettings) -> Problem:
    """Copy the model (so that the caller's is never touched), move it, and prove its roads on training samples."""
    private, measure = private_copy(model, pick_device(settings.device)), as_measure(settings.measure)
    source, maker = as_source(train, "train"), GradientMaker(private, measure)
    problem = Problem(maker, source, settings, _try_model(maker, source, 0, "train"))
    few, chunk = problem.proof()
    _check_measure(maker, *problem.batch(source, few[:2] if len(few) > 1 else few.repeat(2)))
    maker.prove([problem.batch(source, few), problem.batch(source, few.flip(0)), problem.batch(source, chunk)])
    return problem


def _check_measure(maker: GradientMaker, inputs: Inputs, targets: Tensor) -> None:
    """ValueError unless the measure gives two samples a number each, not one for both."""
    with torch.no_grad():
        values = maker.measure.values(call(maker.model, inputs), targets)
    if not isinstance(values, Tensor) or values.shape != (2,):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"measure {maker.measure.name!r} must return one number a sample, (2,) for two, not {shape}; for a loss "
            "of torch, pass reduction='none', and sum over what belongs to one sample"
        )


def _try_model(maker: GradientMaker, source: Source, index: int, role: str) -> Tensor:
    """Outputs (1, …) for one sample, with the errors a caller can act on when sample and model do not fit."""
    inputs, targets = source.batch(torch.tensor([index]))
    inputs = moved(inputs, next(iter(maker.params.values())))
    try:
        with torch.no_grad():
            outputs = call(maker.model, inputs)
    except ValueError:
        raise
    except Exception as error:  # whatever the caller's model raises
        hint = "; of each sample, all parts but the last, the target, are inputs" if isinstance(inputs, tuple) else ""
        raise ValueError(f"{role}: the model refuses inputs of shape {shapes(inputs)}{hint}: {error}") from error
    maker.measure.check(outputs, targets)
    finite = all(torch.isfinite(part).all() for part in tensors_of(inputs))
    if finite and not torch.isfinite(outputs).all():
        raise NonFiniteError(f"{role}: the model returns NaN or infinity for sample {index}; train it again")
    return outputs
