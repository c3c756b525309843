"""The calls: influence of every training sample on chosen test samples, on all of them, on itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ._support import Indices, as_indices, plain_torch
from .data import Source, as_source
from .members import average, influences, shares
from .problem import make_problem
from .results import Influences
from .scoring import Member, score_training
from .settings import InfluenceSettings
from .solvers import Health, prepare

Models = nn.Module | Sequence[nn.Module]


def models_of(model: Models) -> list[nn.Module]:
    """The models to average over."""
    found = [model] if isinstance(model, nn.Module) else list(model)
    if not found or not all(isinstance(one, nn.Module) for one in found):
        raise ValueError("model must be an nn.Module, or a sequence of at least one to average over")
    return found


def settings_of(settings: InfluenceSettings | None, changes: Mapping[str, Any]) -> InfluenceSettings:
    """The settings given, or the default ones, with `changes`."""
    if settings is not None and not isinstance(settings, InfluenceSettings):
        raise ValueError(f"settings must be InfluenceSettings(…), not {type(settings).__name__}; or name single ones")
    return (settings or InfluenceSettings()).changed(changes)


def _indices(chosen: Indices | None, source: Source, role: str) -> Tensor:
    return torch.arange(source.size) if chosen is None else as_indices(chosen, source.size, role)


@plain_torch()
def compute_influences(
    model: Models,
    train: Any,
    test: Any,
    test_indices: Indices | None = None,
    settings: InfluenceSettings | None = None,
    **changes: Any,
) -> Influences:
    """Influence of every training sample on the chosen test samples (all of them by default); positive = helpful.

    model: any nn.Module, or several, such as the checkpoints of one training or several trainings, whose scores are
    averaged (see `InfluenceSettings.average`): steadier, and nearer to what retraining does. They may be of different
    architecture. The training data is read once for all of them.
    train, test: tensors (inputs, targets), where inputs may also be a tuple or dict of tensors, for model(x), model(*x)
    or model(**x); a map-style data set, a DataLoader of one, or a `Source`.
    settings, changes: an `InfluenceSettings`, and single settings to change in it, as in `solver="cg"`.
    The model is copied: its weights, modes and requires_grad flags stay as they are.
    Memory: never more than `InfluenceSettings.memory`; n × p gradients are never held.

    Koh & Liang 2017, eq. 2, negated and divided by n, so that it estimates what leaving the sample out does.
    Raises ValueError (NonFiniteError where a number went bad) saying what was wrong and what to do.

    >>> _ = torch.manual_seed(0)
    >>> points, classes = torch.randn(60, 4), torch.arange(60) % 3
    >>> found = compute_influences(nn.Linear(4, 3), (points, classes), (points, classes), test_indices=[0, 1])
    >>> found.scores.shape, found.health.solver, len(found.helpful(0, k=5))
    ((2, 60), 'kernel', 5)
    """
    chosen, source = settings_of(settings, changes), as_source(test, "test")
    indices = _indices(test_indices, source, "test")
    return influences(models_of(model), train, source, indices, chosen, [1.0])[0]


@plain_torch()
def sweep_damping(
    model: Models,
    train: Any,
    test: Any,
    factors: Iterable[float],
    settings: InfluenceSettings | None = None,
    **changes: Any,
) -> dict[float, Influences]:
    """factor → influences on all of `test` at damping = factor × the one that `settings` gives or the data suggests.

    The data is read, and the solver prepared, once for all of them.

    >>> points, classes = torch.randn(60, 4), torch.arange(60) % 3
    >>> found = sweep_damping(nn.Linear(4, 3), (points, classes), (points, classes), factors=(0.1, 1, 10))
    >>> round(found[10].health.damping / found[0.1].health.damping)
    100
    """
    wanted = [float(factor) for factor in factors]
    if not wanted or not min(wanted) > 0:
        raise ValueError(f"factors must be positive multiples of the damping, at least one, not {wanted}")
    source = as_source(test, "test")
    chosen = settings_of(settings, changes)
    return dict(zip(wanted, influences(models_of(model), train, source, torch.arange(source.size), chosen, wanted)))


@plain_torch()
def mean_influences(
    model: Models, train: Any, test: Any, settings: InfluenceSettings | None = None, **changes: Any
) -> NDArray[Any]:
    """(n,) mean over all of `test` of the influence of each training sample, for the price of one test sample.

    Influence is linear in the test gradient, so the mean gradient is solved once; the same as `Influences.mean()`.
    Arguments and errors as in `compute_influences`.

    >>> points, classes = torch.randn(60, 4), torch.arange(60) % 3
    >>> mean_influences(nn.Linear(4, 3), (points, classes), (points, classes)).shape
    (60,)
    """
    chosen, source = settings_of(settings, changes), as_source(test, "test")
    data, models = as_source(train, "train"), models_of(model)
    shared, _ = shares(models, chosen, data.size, 1)
    members = [_solved_for_the_mean(one, data, source, shared) for one in models]
    return average([of_member[0] for of_member in score_training(members)[0]], chosen.average)[0]


def _solved_for_the_mean(model: nn.Module, train: Source, test: Source, settings: InfluenceSettings) -> Member:
    problem, everything = make_problem(model, train, settings), torch.arange(test.size)
    problem.check_tests(test, everything)
    prepared = prepare(problem)
    problem, total = prepared.problem, torch.zeros(())
    for chosen in everything.split(problem.settings.chunk):
        gradients = problem.gradients(test, chosen)[0]
        total = total.to(problem.like) + gradients.weighted(problem.like.new_ones(1, len(gradients)))
    solved = prepared.solve(gradients.like(total / test.size))
    warn_unless_converged(solved.health)
    return problem, [solved]


@plain_torch()
def self_influences(
    model: Models, train: Any, indices: Indices | None = None, settings: InfluenceSettings | None = None, **changes: Any
) -> NDArray[Any]:
    """(k,) influence of each training sample on itself, ∇L(z)ᵀ(H + λI)⁻¹∇L(z)/n ≥ 0; large = hard to do without.

    The diagonal of `compute_influences(model, train, train)` without the rest of that matrix. Koh & Liang 2017, 5.4.
    Of several models, the plain mean.
    Arguments and errors as in `compute_influences`.

    >>> points, classes = torch.randn(60, 4), torch.arange(60) % 3
    >>> bool((self_influences(nn.Linear(4, 3), (points, classes)) >= 0).all())
    True
    """
    chosen = settings_of(settings, changes)
    return np.mean([np.concatenate([*_own(one, train, indices, chosen)]) for one in models_of(model)], axis=0)


def _own(model: nn.Module, train: Any, indices: Indices | None, settings: InfluenceSettings) -> Iterator[NDArray[Any]]:
    problem = make_problem(model, train, settings)
    chosen = _indices(indices, problem.train, "training")
    problem.check_tests(problem.train, chosen)
    prepared = prepare(problem, min(len(chosen), problem.settings.chunk))
    for part in chosen.split(prepared.plan.tests):
        own, health = prepared.own(problem.gradients(problem.train, part, "training")[0])
        warn_unless_converged(health)
        yield (own / problem.train.size).cpu().numpy()


def warn_unless_converged(health: Health) -> None:
    """For calls that return no health."""
    if not health.converged:
        warnings.warn(
            f"solver {health.solver!r} left a relative residual of {health.residual:.2g}: the influences are not what "
            "they should be; raise damping or iterations, or take float64",
            stacklevel=2,
        )
