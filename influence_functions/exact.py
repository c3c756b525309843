"""Where the truth can be computed: softmax regressions, refitted without some samples. Needs scikit-learn.

>>> points, classes = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
>>> fit_softmax_regression(points, classes, l2=0.1).weight.shape
torch.Size([3, 4])
>>> effects = leave_one_out((points, classes), (points, classes), 0.1, [0, 1])  # > 0: it helped
>>> effects.shape
(2, 30)
>>> round(float(removal_effect((points, classes), (points, classes), 0.1, [0]) / effects[0].mean()), 6)
1.0
>>> removal_effects((points, classes), (points, classes), 0.1, [[0, 1, 2], range(6)]).shape  # groups
(2, 30)
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from ._support import Indices, NonFiniteError, as_indices

FAMILIAR = 30  # steps of a refit with the Hessian of the full fit, before one of its own


def fit_softmax_regression(features: Tensor, labels: Tensor, l2: float, n: int | None = None) -> nn.Linear:
    """The one minimum of Σ losses / n + l2/2 ‖W‖², as a float64 linear layer without bias: features (k, d) → (k, C).

    n: what the sum is divided by (default k); the full data's n keeps the objective of the others when some are left
    out. Every one of the C ≥ 2 classes must occur in `labels`. Fitted by scikit-learn to a gradient of 1e-10.
    """
    classes = int(labels.max()) + 1
    if classes < 2 or len(labels.unique()) != classes:
        raise ValueError(f"labels must contain every class 0..{max(classes, 2) - 1}, at least two; drop no whole class")
    # Of two classes scikit-learn fits the difference w of their weights. They are then ±w/2, and ‖W‖² = ‖w‖²/2.
    strength = l2 * (n or len(labels)) / (2 if classes == 2 else 1)
    fit = LogisticRegression(C=1 / strength, fit_intercept=False, tol=1e-10, max_iter=10_000)
    fit.fit(features.double().numpy(), labels.numpy())
    weight = torch.from_numpy(fit.coef_)
    model = nn.Linear(features.shape[1], classes, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.cat([-weight, weight]) / 2 if classes == 2 else weight)
    return model


def removal_effect(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], l2: float, removed: Indices) -> float:
    """Mean test loss of a softmax regression refitted without the `removed` images, minus that with all of them.

    Positive: they were helpful. train, test: (features, labels); the objective keeps its 1/n (see above).
    """
    (features, labels), (test_features, test_labels) = train, test
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[as_indices(removed, len(labels), "removed")] = False
    losses = []
    for chosen in (torch.ones_like(kept), kept):
        model = fit_softmax_regression(features[chosen], labels[chosen], l2, n=len(labels))
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(test_features.double()), test_labels)))
    return losses[1] - losses[0]


def leave_one_out(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], l2: float, left_out: Indices
) -> NDArray[np.float64]:
    """(k, m) change of each test loss when softmax regression is refitted without one training image; > 0: it helped.

    Arguments as in `removal_effects`, of which this is the case of k groups of one.
    """
    return removal_effects(train, test, l2, as_indices(left_out, len(train[1]), "left_out")[:, None])


def removal_effects(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], l2: float, groups: Iterable[Indices]
) -> NDArray[np.float64]:
    """(k, m) change of each test loss when softmax regression is refitted without each of k groups of images.

    train, test: (features, labels); the objective of `fit_softmax_regression`, its 1/n kept. Each refit starts at the
    full fit and takes Newton steps with the full fit's Hessian, which few images hardly change: a handful of steps to
    a gradient of 1e-12, where scikit-learn from scratch needs minutes for what here takes seconds. For images that
    do change it, the Hessian is taken anew after FAMILIAR steps.
    """
    features, labels, n = train[0].double(), train[1], len(train[1])
    weight = fit_softmax_regression(features, labels, l2).weight.detach()
    familiar = _curvature(features, labels, weight, l2, n)

    def without(removed: Tensor) -> Tensor:
        refitted, factor, kept = weight.clone(), familiar, torch.ones(n, dtype=torch.bool)
        kept[removed] = False
        for step in range(100):
            errors = (features @ refitted.T).softmax(1) - F.one_hot(labels, len(weight))
            errors[removed] = 0
            slope = errors.T @ features / n + l2 * refitted
            if slope.abs().max() < 1e-12:
                return refitted
            if step >= FAMILIAR:
                factor = _curvature(features[kept], labels[kept], refitted, l2, n)
            refitted -= torch.cholesky_solve(slope.reshape(-1, 1), factor).view_as(slope)
        raise NonFiniteError(f"the refit without {removed.tolist()[:5]} did not converge; raise l2 above {l2:.1e}")

    def losses(weight: Tensor) -> Tensor:
        return F.cross_entropy(test[0].double() @ weight.T, test[1], reduction="none")

    before, chosen = losses(weight), [as_indices(group, n, "removed") for group in groups]
    return torch.stack([losses(without(group)) - before for group in chosen]).numpy()


def _curvature(features: Tensor, labels: Tensor, weight: Tensor, l2: float, n: int) -> Tensor:
    """(C·d, C·d) Cholesky factor of the Hessian of Σ losses / n + l2/2 ‖W‖² at `weight` (C, d)."""

    def objective(weight: Tensor) -> Tensor:
        return F.cross_entropy(features @ weight.T, labels, reduction="sum") / n + l2 / 2 * weight.square().sum()

    size = weight.numel()
    return torch.linalg.cholesky(torch.autograd.functional.hessian(objective, weight).view(size, size))
