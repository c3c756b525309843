"""Small random architectures, inputs, types, frozen sets, chunks and measures: every public call against a loop."""

import copy

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from references import loop_gradients
from torch import nn

from influence_functions import (
    MEASURES,
    compute_influences,
    mean_influences,
    self_influences,
    sweep_damping,
)

CLASSES = 3


class Residual(nn.Module):
    """A block around which the input goes, and whose layer is called twice."""

    def __init__(self, width):
        super().__init__()
        self.layer, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.layer(torch.tanh(self.layer(self.norm(x))))


class Last(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self, width, hidden):
        super().__init__()
        self.cell = nn.GRU(width, hidden, batch_first=True)

    def forward(self, x):
        return self.cell(x)[0][:, -1]


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x):
        return x.mean(1)


def image_model(draw):
    channels, stride, groups = draw(st.sampled_from([2, 4])), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding, bias = draw(st.sampled_from([0, 1, 2, "circular"])), draw(st.booleans())
    mode = {"padding": 1, "padding_mode": "circular"} if padding == "circular" else {"padding": padding}
    parts = [nn.Conv2d(2, channels, draw(st.integers(1, 3)), stride, groups=groups, bias=bias, **mode)]
    parts += draw(st.sampled_from([[], [nn.BatchNorm2d(channels)], [nn.GroupNorm(2, channels)], [nn.PReLU(channels)]]))
    parts += [draw(st.sampled_from([nn.Tanh(), nn.ReLU(inplace=True), nn.GELU(), nn.Dropout(0.5)]))]
    parts += draw(
        st.sampled_from([[], [nn.ConvTranspose2d(channels, channels, 2)], [nn.Conv2d(channels, channels, 1)]])
    )
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, CLASSES))


def vector_model(draw):
    width = draw(st.integers(1, 6))
    middle = draw(
        st.sampled_from([[], [Residual(width)], [nn.BatchNorm1d(width)], [nn.Linear(width, width, bias=False)]])
    )
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), *middle, nn.Linear(width, CLASSES))


def sequence_model(draw):
    width = draw(st.integers(2, 4))
    end = draw(st.sampled_from([[Mean(), nn.Linear(width, CLASSES)], [Last(width, 3), nn.Linear(3, CLASSES)]]))
    middle = draw(st.sampled_from([[], [Residual(width)], [nn.Linear(width, width), nn.Tanh()]]))
    table = nn.Embedding(7, width, padding_idx=draw(st.sampled_from([None, 0])))
    return nn.Sequential(table, *middle, *end)


@st.composite
def problems(draw):
    """A model in eval mode, inputs, labels, and the measure's name."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    n, kind = draw(st.integers(2, 9)), draw(st.sampled_from(["image", "vector", "sequence"]))
    model = {"image": image_model, "vector": vector_model, "sequence": sequence_model}[kind](draw)
    shape = {"image": (n, 2, 5, 6), "vector": (n, 5), "sequence": (n, 4)}[kind]
    inputs = torch.randint(0, 7, shape) if kind == "sequence" else torch.randn(shape)
    if kind == "image" and draw(st.booleans()):
        model(torch.randn(4, 2, 5, 6))  # so that running means are not zero
    params = list(model.parameters())
    for param, frozen in zip(params[:-1], draw(st.lists(st.booleans(), min_size=len(params) - 1, max_size=99))):
        param.requires_grad_(not frozen)
    return model.eval(), inputs, torch.randint(0, CLASSES, (n,)), draw(st.sampled_from(["margin", "loss"]))


def exactly(model, inputs, labels, measure):
    """(n, p) gradients by plain autograd, in float64."""
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    return loop_gradients(copy.deepcopy(model).double(), inputs, labels, MEASURES[measure].values)


def close(found, wanted, kind):
    tolerance = 1e-9 if kind == torch.float64 else 2e-3
    limit = tolerance * max(float(wanted.abs().max()), 1e-12)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=tolerance, atol=limit)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=problems(), kind=st.sampled_from([torch.float64, torch.float32]), chunk=st.integers(1, 12))
def test_every_call_is_what_a_loop_gives(problem, kind, chunk):
    model, inputs, labels, measure = problem
    rows = exactly(model, inputs, labels, measure)
    n, data = len(rows), (inputs.to(kind) if inputs.is_floating_point() else inputs, labels)
    options = {"solver": "identity", "damping": 1.0, "measure": measure, "chunk": chunk}
    products, model = rows @ rows.T / n, model.to(kind)
    close(compute_influences(model, data, data, **options).scores, products, kind)
    close(mean_influences(model, data, data, **options), products.mean(0), kind)
    close(self_influences(model, data, **options), products.diag(), kind)
    if measure != "margin" or float(rows.square().mean()) < 1e-12:
        return  # the labels of the curvature are drawn: see test_measures
    damping = float(rows.square().sum(1).mean()) / n
    inverse = torch.linalg.inv(rows.T @ rows / n + damping * torch.eye(rows.shape[1], dtype=torch.float64))
    wanted, options = rows @ inverse @ rows.T / n, {"measure": measure, "chunk": chunk, "samples": n}
    close(compute_influences(model, data, data, **options).scores, wanted, kind)  # at the automatic damping
    swept = sweep_damping(model, data, data, (1, 3), **options)
    close(swept[1].scores, wanted, kind)
    close(self_influences(model, data, damping=damping, **options), wanted.diag(), kind)
    assert swept[1].health.residual < 1e-2
