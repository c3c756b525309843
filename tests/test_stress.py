"""The chapter on attacks: its formulas against refits, on a small body and real pixels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import of_notebook
from torch import nn

import notebook_support as ns
from influence_functions import compute_influences
from influence_functions.exact import fit_softmax_regression


@pytest.fixture
def chapter() -> SimpleNamespace:
    """Its functions, with digits in place of cats and dogs, and a body that nobody has trained."""
    found = of_notebook("stress_test.ipynb")
    train, test = ns.load_data("digits", labels=(3, 5))
    train, test = train.subset(range(100)), test.subset(range(20))
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 5, 3), nn.Tanh(), nn.AvgPool2d(3), nn.Flatten()).requires_grad_(False)
    names = found.refit.__globals__
    names |= {"body": body, "L2": 1e-2, "LEVELS": 20, "CANDIDATES": 50, "train": train, "test": test, "n": len(train)}
    with torch.no_grad():
        names |= {"X": found.features(train.images), "X_TEST": found.features(test.images)}
    names |= {"Y": train.labels.double(), "Y_TEST": test.labels.double()}
    start = torch.zeros(names["X"].shape[1], dtype=torch.float64)
    names["WEIGHTS"] = found.refit(names["X"], names["Y"], start)
    return SimpleNamespace(**names)


def loss_of(chapter: SimpleNamespace, weights: torch.Tensor, target: int) -> float:
    score = chapter.X_TEST[target] @ weights
    return float(F.binary_cross_entropy_with_logits(score, chapter.Y_TEST[target]))


def test_the_refit_is_softmax_regression(chapter):
    exact = fit_softmax_regression(chapter.X, chapter.train.labels, 1e-2).weight.detach()
    torch.testing.assert_close(chapter.WEIGHTS, exact[1] - exact[0], atol=1e-5, rtol=1e-5)


def test_pulls_and_slopes_foretell_what_a_changed_pixel_does(chapter):
    target, index = 3, 7
    s, pulls = chapter.pull(chapter.X, chapter.Y, chapter.WEIGHTS, target)
    slope = chapter.slopes(chapter.train.images[[index]], chapter.Y[[index]], chapter.WEIGHTS, s)[0] / 100
    place = np.unravel_index(int(slope.abs().argmax()), slope.shape)
    before, images = loss_of(chapter, chapter.WEIGHTS, target), chapter.train.images[[index]].clone()
    step = 3 if images[(0, *place)] < 128 else -3
    images[(0, *place)] = int(images[(0, *place)]) + step
    _, after = chapter.refitted_with(torch.tensor([index]), images, chapter.Y[[index]])
    foretold = -float(slope[place]) * step * 2 / 255
    assert loss_of(chapter, after, target) - before == pytest.approx(foretold, rel=0.05)
    # And the pulls are n times what the package says of the same last layer.
    head = nn.Linear(len(chapter.WEIGHTS), 2, bias=False, dtype=torch.float64)
    head.load_state_dict({"weight": torch.stack([-chapter.WEIGHTS, chapter.WEIGHTS]) / 2})
    data = (chapter.X, chapter.train.labels), (chapter.X_TEST, chapter.test.labels)
    found = compute_influences(head, *data, [target], solver="cg", measure="loss", damping=1e-2, tolerance=1e-10)
    np.testing.assert_allclose(found.scores[0] * 100, pulls.numpy(), rtol=1e-6, atol=1e-8)


def test_an_attack_stays_within_its_levels_and_beats_chance(chapter):
    target = int(((chapter.X_TEST @ chapter.WEIGHTS > 0) == (chapter.Y_TEST > 0.5)).nonzero()[0])
    chosen = chapter.choose(target, 10)
    images, weights = chapter.attack(target, chosen)
    change = images.int() - chapter.train.images[chosen].int()
    assert images.dtype == torch.uint8
    assert 0 < int(change.abs().max()) <= 20
    noise = 20 * (2 * torch.randint(0, 2, images.shape, generator=torch.Generator().manual_seed(0)) - 1)
    shaken = (chapter.train.images[chosen] + noise).clamp(0, 255).to(torch.uint8)
    _, at_random = chapter.refitted_with(chosen, shaken, chapter.Y[chosen])
    assert chapter.flipped(weights, target)[1] < chapter.flipped(at_random, target)[1]
