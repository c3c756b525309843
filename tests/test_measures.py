"""Measures: the Fisher matrix of each against one made by hand, in float64."""

import pytest
import torch
import torch.nn.functional as F
from references import exact_scores, loop_gradients, relative_error
from torch import nn

from influence_functions import MEASURES, InfluenceSettings, compute_influences, tokens_measure
from influence_functions.problem import make_problem

N = 24


def by_hand(name, outputs, targets, generator):
    """Targets drawn from the model's own prediction, a sample at a time, straight from the definition."""
    uniform = torch.rand((targets[0].numel(), N), generator=generator, dtype=torch.float64).T
    drawn = []
    for out, target, u in zip(outputs, targets, uniform):
        if name == "squared_error":
            drawn.append(out.reshape(target.shape) + torch.distributions.Normal(0.0, 1.0).icdf(u).reshape(target.shape))
        elif name == "binary":
            drawn.append((u.reshape(target.shape) < 1 / (1 + torch.exp(-out.reshape(target.shape)))).to(target))
        else:
            rows = out[None] if out.ndim == 1 else out
            picks = [int((row.softmax(0).cumsum(0) < v).sum()) for row, v in zip(rows, u)]
            if name == "tokens":
                picks = [t if t == -100 else p for t, p in zip(target.tolist(), picks)]
            pick = torch.tensor(picks)
            one_hot = target.is_floating_point()
            drawn.append(
                F.one_hot(pick[0], len(rows[0])).double() if one_hot else pick if name == "tokens" else pick[0]
            )
    return torch.stack(drawn)


def cases():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    classes, numbers = torch.arange(N) % 3, torch.randn(N, 2, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 6, (N, 4), generator=generator)
    words = torch.where(torch.rand(N, 4, generator=generator) < 0.2, -100, tokens)
    torch.manual_seed(1)
    embed = nn.Sequential(nn.Embedding(6, 3), nn.Tanh(), nn.Linear(3, 6)).double()
    two, one = (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, k)).double() for k in (2, 1))
    three = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return {
        "loss": ("loss", three, points, classes),
        "one-hot": ("loss", three, points, F.one_hot(classes, 3).double()),
        "margin": ("margin", three, points, classes),
        "squared_error": ("squared_error", two, points, numbers),
        "one number": ("squared_error", one, points, numbers[:, 0]),
        "binary": ("binary", one, points, classes % 2),
        "binaries": ("binary", two, points, (numbers > 0).double()),
        "tokens": ("tokens", embed, tokens, words),
    }


@pytest.mark.parametrize("case", cases())
def test_the_fisher_matrix_is_the_one_made_by_hand(case):
    name, model, inputs, targets = cases()[case]
    with torch.no_grad():
        outputs = model(inputs)
    drawn = targets if name == "margin" else by_hand(name, outputs, targets, torch.Generator().manual_seed(0))
    values = MEASURES[name].values
    fisher = loop_gradients(model, inputs, drawn, values)
    gradients = loop_gradients(model, inputs, targets, values)
    exact = exact_scores(fisher.T @ fisher / N, 0.05, gradients[:3], gradients)
    found = compute_influences(
        model, (inputs, targets), (inputs, targets), range(3), measure=name, damping=0.05, device="cpu", chunk=7
    )
    assert relative_error(found.scores, exact) < 1e-8
    assert found.health.labels == ("given" if name == "margin" else "drawn")


def test_one_hot_labels_are_labels():
    _, model, inputs, classes = cases()["loss"]
    pairs = [(inputs, classes), (inputs, F.one_hot(classes, 3).double())]
    plain, hot = (compute_influences(model, pair, pair, range(2), measure="loss", damping=0.1) for pair in pairs)
    assert relative_error(hot.scores, torch.as_tensor(plain.scores)) < 1e-10


def test_a_measure_of_ones_own_uses_the_given_labels_and_health_says_so():
    _, model, inputs, classes = cases()["loss"]

    def own(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)

    found = compute_influences(model, (inputs, classes), (inputs, classes), [0], measure=own, damping=0.1)
    assert (found.health.labels, found.settings["measure"]) == ("given", "own")


@pytest.mark.parametrize(
    ("measure", "targets", "words"),
    [
        ("squared_error", torch.zeros(N, 5), "returns 3 numbers a sample, but each target holds 5"),
        ("binary", torch.full((N, 3), 2.0), "binary targets must lie in 0..1"),
        ("tokens", torch.arange(N), r"wants logits \(b, t, V\)"),
        ("loss", torch.full((N, 3), 1.5), "must be probabilities"),
        ("margin", torch.zeros(N, 3), "labels must be whole numbers"),
        ("accuracy", torch.arange(N) % 3, "unknown measure 'accuracy'"),
        (3, torch.arange(N) % 3, "measure must be a name"),
    ],
)
def test_targets_that_do_not_fit_are_refused(measure, targets, words):
    _, model, inputs, _ = cases()["loss"]
    with pytest.raises(ValueError, match=words):
        compute_influences(model, (inputs, targets), (inputs, targets), [0], measure=measure)


def test_another_ignore_index_and_dicts_of_inputs():
    class Named(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, mask):
            return self.inner(input_ids) * mask[..., None]

    _, model, tokens, words = cases()["tokens"]
    mask = (words != -100).double()
    plain = compute_influences(model, (tokens, words), (tokens, words), [0], measure="tokens", damping=0.1)
    batch = {"input_ids": tokens, "mask": mask, "labels": torch.where(words == -100, 5, words)}
    data = {key: value for key, value in batch.items() if key != "labels"}, torch.where(words == -100, -1, words)
    for given in (data, {**data[0], "labels": data[1]}):
        found = compute_influences(Named(model), given, given, [0], measure=tokens_measure(-1), damping=0.1)
        assert relative_error(found.scores, torch.as_tensor(plain.scores)) < 1e-9


def test_the_draw_of_a_sample_does_not_depend_on_the_chunk():
    _, model, inputs, classes = cases()["loss"]
    settings = [InfluenceSettings(measure="loss", device="cpu", chunk=chunk) for chunk in (1, 24)]
    rows = [make_problem(model, (inputs, classes), one).sampled.dense() for one in settings]
    assert torch.allclose(*rows, rtol=1e-10, atol=1e-14)
