"""How good are scores? The linear datamodeling score, what noise leaves of it, how stable what is shown is, and what
is found of wrong labels; the interval of a few runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata
from scipy.stats import t as student_t
from sklearn.metrics import average_precision_score, roc_auc_score

from ._support import Indices, NonFiniteError, as_indices
from .results import Influences


def mean_interval(values: Sequence[float] | NDArray[Any]) -> tuple[float, float]:
    """Mean of independent runs and the half-width of its 95 % interval (Student's t: wide for few runs).

    >>> mean, half = mean_interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 3)
    (2.0, 2.484)
    """
    if len(values) < 2:
        raise ValueError("an interval needs at least two runs")
    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)), float(student_t.ppf(0.975, len(values) - 1)) * spread


@dataclass(frozen=True, eq=False)
class LDS:
    """Linear datamodeling score: its mean over the test images, a 95 % interval, and each test image's own (m,)."""

    mean: float
    low: float
    high: float
    per_test: NDArray[np.float64]
    resampled: NDArray[np.float64]

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def minus(self, other: LDS) -> tuple[float, float, float]:
        """Difference of the means and its 95 % interval; both must come from the same resampling (same seed)."""
        gaps = self.resampled - other.resampled
        return self.mean - other.mean, *np.quantile(gaps, [0.025, 0.975]).tolist()


def linear_datamodeling_score(
    scores: NDArray[Any], masks: NDArray[np.bool_], outcomes: NDArray[Any], repeats: int = 1000, seed: int = 0
) -> LDS:
    """How well `scores` foretell which halves of the training data give a test image a low loss.

    scores (m, n), positive = helpful; masks (h, n): images kept in each of h retrainings; outcomes (h, m): the loss
    (or margin) each of them ended with. The sum of the scores of the images kept, negated, predicts the outcome; their
    Spearman correlation over the h halves is the score of one test image, −1..1 (Ilyas et al. 2022, arXiv:2202.00622;
    Park et al. 2023, arXiv:2303.14186, definition 2.3). A prediction that never changes scores 0.
    The interval is a bootstrap over halves and test images at once, ranks kept as they are.

    >>> masks = np.array([[True, False, True], [False, True, True], [True, True, False]])
    >>> linear_datamodeling_score(np.array([[3.0, 2.0, 1.0]]), masks, np.array([[0.2], [0.5], [0.1]])).mean
    1.0
    """
    m, n = scores.shape
    if masks.shape[1:] != (n,) or outcomes.shape != (len(masks), m):
        raise ValueError(
            f"scores {scores.shape} are (m, n), so masks must be (h, n) and outcomes (h, m), not {masks.shape}, "
            f"{outcomes.shape}"
        )
    for name, values in (("scores", scores), ("outcomes", outcomes)):
        if not np.isfinite(values).all():
            raise NonFiniteError(f"{name} contain NaN or infinity, of which no rank can be taken; compute them again")
    if not np.isin(masks, (0, 1)).all():
        raise ValueError("masks must be truth values, (h, n): which images each half keeps")
    masks = masks.astype(np.bool_)
    predicted, actual = _standard_ranks(-(masks.astype(scores.dtype) @ scores.T)), _standard_ranks(outcomes)
    generator = np.random.default_rng(seed)
    halves = generator.multinomial(len(masks), np.full(len(masks), 1 / len(masks)), size=repeats) / len(masks)
    images = generator.multinomial(m, np.full(m, 1 / m), size=repeats) / m
    resampled = (_weighted_correlation(halves, predicted, actual) * images).sum(1)
    per_test = _weighted_correlation(np.full((1, len(masks)), 1 / len(masks)), predicted, actual)[0]
    low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
    return LDS(float(per_test.mean()), low, high, per_test, resampled)


def _standard_ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """(h, m) → ranks within each column (ties share their mean), to mean 0 and variance 1; 0 where all are equal."""
    ranks = rankdata(values, axis=0)
    ranks -= ranks.mean(0)
    return ranks / np.maximum(ranks.std(0), 1e-12)


def _weighted_correlation(
    weights: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(k, h) weights that sum to 1, (h, m) and (h, m) → (k, m) correlations over h; 0 where one side is constant."""
    mean_a, mean_b = weights @ a, weights @ b
    spread = np.sqrt((weights @ a**2 - mean_a**2).clip(0) * (weights @ b**2 - mean_b**2).clip(0))
    return np.where(spread > 1e-9, (weights @ (a * b) - mean_a * mean_b) / np.maximum(spread, 1e-9), 0)


def noise_ceiling(outcomes: NDArray[Any]) -> tuple[float, float]:
    """(r, h, m) outcomes of r repeated trainings of each half → agreement of two trainings, and the LDS ceiling.

    The agreement is the mean Spearman correlation between two repeats. The mean of r repeats has the reliability
    R = r·agreement / (1 + (r − 1)·agreement) (Spearman-Brown), and √R is the most that a perfect prediction of the
    noise-free outcome could score against it.

    >>> noise_ceiling(np.array([[[1.0], [2.0], [3.0]], [[1.1], [2.2], [2.9]]]))
    (1.0, 1.0)
    """
    if not np.isfinite(outcomes).all():
        raise NonFiniteError("outcomes contain NaN or infinity; leave those trainings out")
    if len(outcomes) < 2:
        raise ValueError("a noise ceiling needs at least two repeated trainings of each half")
    ranks, whole = [_standard_ranks(repeat) for repeat in outcomes], np.full((1, outcomes.shape[1]), 1.0)
    whole /= outcomes.shape[1]
    pairs = [_weighted_correlation(whole, a, b).mean() for a, b in itertools.combinations(ranks, 2)]
    agreement, r = max(float(np.mean(pairs)), 0.0), len(outcomes)
    return agreement, math.sqrt(r * agreement / (1 + (r - 1) * agreement))


def count_top_images(models: Sequence[Influences], k: int = 10) -> pd.DataFrame:
    """In how many of several models' results is a training image among the k most helpful, or most harmful?

    One row for each (test_index, kind, train_index) that occurs at all: `found_by` of `models` models. All results
    must be about the same test images. See `found_by`.
    """
    if not models or any(one.test_indices.tolist() != models[0].test_indices.tolist() for one in models):
        raise ValueError("pass the influences of at least one model, all for the same test images")
    rows = [
        {"test_index": int(index), "kind": kind, "train_index": int(j)}
        for one in models
        for i, index in enumerate(one.test_indices)
        for kind, ranked in (("helpful", one.helpful(i, k)), ("harmful", one.harmful(i, k)))
        for j in ranked
    ]
    counts = pd.DataFrame(rows).groupby(["test_index", "kind", "train_index"]).size().rename("found_by").reset_index()
    return counts.assign(models=len(models))


def found_by(counts: pd.DataFrame, test_index: int, kind: str) -> dict[int, int] | None:
    """train_index → how many of the models have it in their top; None when that test image was not measured.

    counts: of `count_top_images`; kind: "helpful" or "harmful". An image that no model has is not listed.

    >>> from influence_functions import compute_influences
    >>> points, classes = torch.randn(60, 4), torch.arange(60) % 3
    >>> models = [compute_influences(nn.Linear(4, 3), (points, classes), (points, classes), [7]) for _ in range(2)]
    >>> sorted(found_by(count_top_images(models, k=5), 7, "helpful").values())[-1] in (1, 2)
    True
    """
    measured = counts[counts["test_index"] == test_index]
    if measured.empty:
        return None
    chosen = measured[measured["kind"] == kind]
    return dict(zip(chosen["train_index"].tolist(), chosen["found_by"].tolist()))


def detection_curve(suspicion: NDArray[Any], flipped: Indices) -> tuple[NDArray[Any], NDArray[Any]]:
    """What inspecting the most suspicious images first finds: (n + 1,) fraction inspected, fraction of `flipped` found.

    suspicion (n,), larger = more suspicious, ties in the order of the images; flipped: indices of the wrong labels.

    >>> detection_curve(np.array([0.1, 0.9, 0.2, 0.3]), flipped=[1, 2])[1].tolist()
    [0.0, 0.5, 0.5, 1.0, 1.0]
    """
    wrong = _wrong_mask(suspicion, flipped)
    found = np.cumsum(wrong[np.argsort(-suspicion, kind="stable")])
    return np.linspace(0, 1, len(wrong) + 1), np.concatenate([[0.0], found / wrong.sum()])


def detection_quality(suspicion: NDArray[Any], flipped: Indices, inspected: float = 0.1) -> dict[str, float]:
    """ROC AUC and average precision of a suspicion (n,), and the fraction of `flipped` found in the first `inspected`.

    0.5, the share of wrong labels, and `inspected` itself are what guessing gets. (scikit-learn's metrics.)

    >>> quality = detection_quality(np.array([0.1, 0.9, 0.2, 0.3]), flipped=[1], inspected=0.25)
    >>> quality["ROC AUC"], quality["found"]
    (1.0, 1.0)
    """
    wrong = _wrong_mask(suspicion, flipped)
    if not 0 < inspected <= 1:
        raise ValueError(f"inspected must be a fraction above 0 and at most 1, not {inspected}")
    if wrong.all():
        raise ValueError("every label is flipped: there is nothing to tell apart")
    _, found = detection_curve(suspicion, flipped)
    return {
        "ROC AUC": float(roc_auc_score(wrong, suspicion)),
        "average precision": float(average_precision_score(wrong, suspicion)),
        "found": float(found[round(inspected * len(wrong))]),
    }


def _wrong_mask(suspicion: NDArray[Any], flipped: Indices) -> NDArray[np.bool_]:
    """(n,) whether each label is flipped; an error when there is nothing to rank by or nothing to find."""
    if suspicion.ndim != 1 or not np.isfinite(suspicion).all():
        raise ValueError(f"suspicion must be one finite number an image, not {suspicion.shape} with NaN or infinity")
    wrong = np.zeros(len(suspicion), np.bool_)
    wrong[as_indices(flipped, len(suspicion), "flipped")] = True
    if not wrong.any():
        raise ValueError("flipped must hold at least one index: there is nothing to find")
    return wrong
