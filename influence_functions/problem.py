"""What every solver works on: a private copy of the model with its gradients, the training data and the settings."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ._support import NonFiniteError, pick_device
from .data import Inputs, Source, as_source, call, on_tensors, shapes, tensors_of
from .gradients import GradientMaker
from .measures import Measure, as_measure
from .settings import InfluenceSettings
from .stack import Gradients

PROVED_ON = 3  # training samples


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
    def sample(self) -> Tensor:
        """(r,) indices of the training samples that stand in for all of them in the curvature."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        order = torch.randperm(self.train.size, generator=generator)
        return order[: self.settings.samples].sort().values

    @cached_property
    def sampled(self) -> Gradients:
        """r gradients whose second moment is the Fisher matrix, the mean of their outer products.

        Where the measure can, each target is drawn from the model's own prediction: the expectation is then the true
        Fisher, which equals the Gauss-Newton matrix (Martens 2020, section 9). Else the given targets are used.
        """
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
        return _moved(inputs, like), targets.to(like.device, None if targets.is_floating_point() else torch.long)

    def batches(self, source: Source, indices: Tensor) -> Iterator[tuple[Inputs, Tensor]]:
        """The samples at `indices`, a chunk at a time."""
        return (self.batch(source, chosen) for chosen in indices.split(self.settings.chunk))

    def gradients(self, source: Source, indices: Tensor, role: str = "test") -> tuple[Gradients, Tensor]:
        """The gradients at the samples at `indices`, checked, and their targets (k, …)."""
        parts = [(self.maker(*batch), batch[1]) for batch in self.batches(source, indices)]
        gradients = Gradients.join([part for part, _ in parts])
        if not torch.isfinite(gradients.squares()).all():
            raise NonFiniteError(
                f"the gradient of a {role} sample is NaN or infinite; check the model and the sample's values"
            )
        return gradients, join_targets([targets for _, targets in parts])

    def check_tests(self, source: Source, indices: Tensor) -> None:
        """Errors that say what is wrong with the choice of test samples, or with the samples."""
        if len(indices) == 0:
            raise ValueError("no test sample chosen: test_indices is empty")
        if int(indices.min()) < 0 or int(indices.max()) >= source.size:
            raise ValueError(f"test indices must lie in 0..{source.size - 1}; found {indices.tolist()}")
        _try_model(self.maker, source, int(indices[0]), "test")


def join_targets(parts: list[Tensor]) -> Tensor:
    """(n, …) targets; (n,) of −1 where their shape differs from batch to batch."""
    if len({part.shape[1:] for part in parts}) > 1:
        return torch.full((sum(map(len, parts)),), -1)
    return torch.cat(parts).cpu()


def make_problem(model: nn.Module, train: Any, settings: InfluenceSettings) -> Problem:
    """Copy the model (so that the caller's is never touched), move it, and prove its roads on training samples."""
    device = pick_device(settings.device)
    private = copy.deepcopy(model).to(device).eval()
    params = [param for param in private.parameters() if param.requires_grad]
    if not params:
        raise ValueError("the model has no trainable parameter (requires_grad); influence is about trained parameters")
    if not all(torch.isfinite(param).all() for param in params):
        raise NonFiniteError("the model's weights contain NaN or infinity; train it again or load another checkpoint")
    source, maker = as_source(train, "train"), GradientMaker(private, as_measure(settings.measure))
    problem = Problem(maker, source, settings, _try_model(maker, source, 0, "train"))
    maker.prove(*problem.batch(source, torch.arange(min(PROVED_ON, source.size))))
    return problem


def _moved(inputs: Inputs, like: Tensor) -> Inputs:
    return on_tensors(lambda part: part.to(like.device, like.dtype if part.is_floating_point() else None), inputs)


def _try_model(maker: GradientMaker, source: Source, index: int, role: str) -> Tensor:
    """Outputs (1, …) for one sample, with the errors a caller can act on when sample and model do not fit."""
    inputs, targets = source.batch(torch.tensor([index]))
    inputs = _moved(inputs, next(iter(maker.params.values())))
    try:
        with torch.no_grad():
            outputs = call(maker.model, inputs)
    except RuntimeError as error:
        raise ValueError(f"{role}: the model refuses inputs of shape {shapes(inputs)}: {error}") from error
    maker.measure.check(outputs, targets)
    finite = all(torch.isfinite(part).all() for part in tensors_of(inputs))
    if finite and not torch.isfinite(outputs).all():
        raise NonFiniteError(f"{role}: the model returns NaN or infinity for sample {index}; train it again")
    return outputs
