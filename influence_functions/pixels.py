"""What each pixel of a training image does to a test loss, through training: `pixel_influences`."""

from __future__ import annotations

import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ._support import Indices, NonFiniteError, as_indices, plain_torch
from .data import Inputs, Source, as_source, call
from .problem import Problem, make_problem
from .scores import Models, models_of, settings_of, warn_unless_converged
from .settings import InfluenceSettings
from .solvers import prepare


@plain_torch()
def pixel_influences(
    model: Models,
    train: Any,
    test: Any,
    train_indices: Indices,
    test_indices: Indices,
    settings: InfluenceSettings | None = None,
    **changes: Any,
) -> NDArray[Any]:
    """(m, k, *shape of an image): what raising one pixel of a training image does for a test image; positive = helpful.

        P = ∂I(z, z_test)/∂x = sᵀ ∇ₓ∇L(z) / n    with s = (H + λI)⁻¹ ∇L(z_test) and z = (x, y)

    Change the image by a small δ and train again: the test loss then *falls* by Σ P·δ. Koh & Liang 2017, section 2.2,
    negated as everything here. Unit: that of the measure, for one unit of the pixels as the model is given them; a grey
    level of an image that was divided by 255 is 1/255 of it.
    Arguments and errors as in `compute_influences`; the inputs must be one tensor of numbers with a point, since there
    is no small change of a whole number. limits=(low, high), beside the settings, says between what pixels lie: images
    that are on another scale, or out of it, are then refused. Of several models, the plain mean. Cost: beyond the
    solver's, a backward pass through a backward pass for each pair of a test image and a chunk of training images.

    >>> images, classes = torch.rand(60, 1, 4, 4), torch.arange(60) % 3
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    >>> pixel_influences(model, (images, classes), (images, classes), [4, 5, 6], [0, 1], measure="loss").shape
    (2, 3, 1, 4, 4)
    """
    limits = changes.pop("limits", (-math.inf, math.inf))
    chosen, source, data = settings_of(settings, changes), as_source(test, "test"), as_source(train, "train")
    tests = as_indices(test_indices, source.size, "test")
    trains = as_indices(train_indices, data.size, "training")
    if not len(trains):
        raise ValueError("no training image chosen: the indices are empty")
    for part in trains.split(chosen.chunk):
        _check_pixels(data.batch(part)[0], *limits)
    found = [_of_one(make_problem(one, data, chosen), source, tests, trains) for one in models_of(model)]
    result = torch.stack(found).mean(0)
    if not torch.isfinite(result).all():
        raise NonFiniteError("a pixel's influence is NaN or infinite; raise damping, and check the images' values")
    return result.cpu().numpy()


def _check_pixels(inputs: Inputs, low: float, high: float) -> None:
    if not isinstance(inputs, Tensor):
        raise ValueError("pixel influences need one tensor of images as inputs, not a tuple or dict of them")
    if not inputs.is_floating_point():
        raise ValueError(
            f"the images are whole numbers ({inputs.dtype}), of which there is no small change; pass them as the model "
            "is given them, as images.float() / 255"
        )
    if not bool(((inputs >= low) & (inputs <= high)).all()):
        raise ValueError(
            f"pixels must lie in {low}..{high}; found {float(inputs.min())}..{float(inputs.max())}: pass the images as "
            "the model is given them, or other limits"
        )


def _of_one(problem: Problem, test: Source, tests: Tensor, trains: Tensor) -> Tensor:
    """(m, k, *shape) of one model, on the CPU."""
    problem.check_tests(test, tests)
    prepared = prepare(problem, len(tests))
    solved = prepared.solve(problem.gradients(test, tests)[0])
    warn_unless_converged(solved.health)
    directions, at_once = solved.directions(), max(1, problem.settings.chunk // 4)  # a graph twice as deep
    parts = [_leanings(problem, directions, part) for part in trains.split(at_once)]
    return torch.cat(parts, dim=1) / problem.train.size


def _leanings(problem: Problem, directions: Tensor, chosen: Tensor) -> Tensor:
    """(m, b, *shape): ∇ₓ of sᵀ∇L(z) for each direction s (m, p) and the training images at `chosen`."""
    inputs, targets = problem.batch(problem.train, chosen)
    assert isinstance(inputs, Tensor)
    model = problem.maker.recorder.scratch()
    params = [dict(model.named_parameters())[name] for name in problem.maker.params]
    with torch.enable_grad():
        pixels = inputs.detach().clone().requires_grad_()
        total = problem.measure.values(call(model, pixels), targets).sum()  # no sample sees another
        slopes = torch.autograd.grad(total, params, create_graph=True, allow_unused=True)
        rows = []
        for direction in directions:
            along = problem.maker.unflatten(direction[None]).values()
            leaning = total.new_zeros(())
            for one, slope in zip(along, slopes):
                leaning = leaning if slope is None else leaning + (one[0] * slope).sum()
            seen = leaning.requires_grad  # not so where no slope depends on the pixels
            found = torch.autograd.grad(leaning, pixels, retain_graph=True, allow_unused=True)[0] if seen else None
            rows.append(torch.zeros_like(pixels) if found is None else found.detach())
    return torch.stack(rows).cpu()
