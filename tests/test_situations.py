"""Situations in which a practitioner uses the engine: the right numbers, or one sentence that says what to do."""

import copy
import dataclasses
import os
import stat
import threading

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from references import loop_gradients
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, SubsetRandomSampler, TensorDataset

import influence_functions.compat as ptif
from influence_functions import (
    InfluenceSettings,
    NonFiniteError,
    Source,
    compute_influences,
    mean_influences,
    self_influences,
    sweep_damping,
)

PLAIN = {"solver": "identity", "damping": 1.0, "measure": "loss"}
GENERATOR = torch.Generator().manual_seed(0)
POINTS, LABELS = torch.randn(40, 5, generator=GENERATOR, dtype=torch.float64), torch.arange(40) % 3
NUMBERS = torch.randn(40, generator=GENERATOR, dtype=torch.float64)
DATA = (POINTS, LABELS)


def linear():
    torch.manual_seed(0)
    return nn.Linear(5, 3).double()


def assert_right(model, train, test=None, **changes):
    test = train if test is None else test
    found = compute_influences(model, train, test, **PLAIN | changes)
    mine, theirs = (loop_gradients(copy.deepcopy(model).double(), *data) for data in (test, train))
    wanted = (mine @ theirs.T / len(theirs)).numpy()
    assert found.scores.shape == wanted.shape
    assert np.abs(found.scores - wanted).max() <= 1e-9 * np.abs(wanted).max()
    return found


# ── what a sample is given must not depend on the others in its batch ───────────────────────────────────────────────


class Routed(nn.Module):
    """A mixture of experts: the batch is sorted by route, and put back."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        order = (x[:, 0] > 0).long().argsort(stable=True)
        return self.out(torch.tanh(self.inner(x[order]))[order.argsort()])


class Rare(nn.Module):
    """A layer that only some samples go through."""

    def __init__(self):
        super().__init__()
        self.inner, self.special, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        hidden, chosen = torch.tanh(self.inner(x)), x[:, 0] > 2
        if chosen.any():
            hidden = hidden.clone()
            hidden[chosen] = hidden[chosen] + self.special(x[chosen])
        return self.out(hidden)


class Padded(nn.Module):
    """Makes the batch longer inside."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(F.pad(x, (0, 0, 0, -len(x) % 8)))))[: len(x)]


class Siamese(nn.Module):
    """Two views through one encoder, the second without a gradient."""

    def __init__(self):
        super().__init__()
        self.encoder, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        one, other = self.encoder(torch.cat([x, x + 1])).chunk(2)
        return self.out(one * other.detach())


class Functional(nn.Module):
    """A weight that is used a second time, behind its layer's back, for some samples."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, x):
        return self.a(x) + (x[:, :1] > 1.9) * F.linear(x, self.a.weight)


class GraphLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x, adjacency):
        return adjacency @ (x @ self.weight)


class Graph(nn.Module):
    """A layer whose second argument is no sample's own, though it may be as long as a batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = GraphLayer(), nn.Linear(21, 3)
        self.register_buffer("adjacency", torch.rand(7, 7))

    def forward(self, x):
        return self.out(torch.tanh(self.layer(x, self.adjacency)).flatten(1))


def double(kind):
    torch.manual_seed(0)
    return kind().double()


def with_routes(rows, value):
    points = POINTS.clone()
    points[:, 0] = -points[:, 0].abs()
    points[rows, 0] = value
    return points, LABELS


@pytest.mark.parametrize("chunk", [10, 250])
def test_a_batch_that_is_sorted_by_route(chunk):
    one_route = (POINTS.abs(), LABELS)
    assert_right(double(Routed), one_route, DATA, chunk=chunk)
    assert_right(double(Routed), with_routes([38, 39], 1.0), chunk=chunk)
    assert_right(double(Routed), with_routes([1, 14, 27], 1.0), chunk=chunk)  # those that are proved share a route


@pytest.mark.parametrize("chunk", [10, 20, 250])
@pytest.mark.parametrize("rows", [[35], [33, 35], [3, 4, 5, 33, 35]])
def test_a_layer_that_only_some_samples_go_through(rows, chunk):
    assert_right(double(Rare), with_routes(rows, 2.5), chunk=chunk)


@pytest.mark.parametrize("kind", [Padded, Siamese])
def test_a_batch_that_grows_inside(kind):
    data = (POINTS[:12], LABELS[:12])
    assert_right(double(kind), data)
    assert len(mean_influences(double(kind), data, data, **PLAIN)) == 12
    assert len(self_influences(double(kind), data, **PLAIN)) == 12


@pytest.mark.parametrize("row", [5, 15, 25, 35])
def test_a_weight_used_behind_its_layers_back_for_one_sample(row):
    assert_right(double(Functional), with_routes([row], 2.5), chunk=10)


@pytest.mark.parametrize(("n", "m", "chunk"), [(20, 7, 250), (20, 6, 13), (20, 3, 7), (7, 3, 250), (15, 2, 4)])
def test_an_argument_that_is_as_long_as_the_batch(n, m, chunk):
    nodes = torch.randn(20, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_right(double(Graph), (nodes[:n], LABELS[:n]), (nodes[:m], LABELS[:m]), chunk=chunk)


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, x):
        hidden = self.a(x)
        return hidden - hidden.mean(0)


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, x):
        return F.dropout(self.a(x), 0.5)


class Lambda(nn.Module):
    """Holds on to itself by a function that a copy does not copy."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.out = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.body = lambda x: torch.tanh(self.norm(self.a(x)))

    def forward(self, x):
        return self.out(self.body(x))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Centred, "depends on the others in its batch"),
        (Random, "gives other outputs each time, even in eval mode"),
        (Lambda, "uses the original through a function that cannot be copied"),
    ],
)
def test_models_that_have_no_influence_to_speak_of(kind, words):
    model = double(kind).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match=words):
        compute_influences(model, DATA, DATA, [0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_a_forward_that_was_patched():
    model = linear()
    old = model.forward
    model.forward = lambda x: old(x) * 2
    with pytest.raises(ValueError, match="uses the original through a function"):
        compute_influences(model, DATA, DATA, [0])


# ── parameters and layers of every kind ─────────────────────────────────────────────────────────────────────────────


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.scale, self.unused = nn.Linear(5, 3), nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.a(x) * self.scale.exp()


class ScalarLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x * self.scale


class Quiet(nn.Linear):
    """Its train() returns nothing."""

    def train(self, mode=True):
        super().train(mode)


class Adapted(nn.Linear):
    """A low-rank adapter on a frozen weight (LoRA)."""

    def __init__(self):
        super().__init__(5, 3)
        self.down, self.up = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(3, 2))
        self.weight.requires_grad_(False)

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class Prefix(nn.Module):
    """A class token and positions, as vision transformers have them."""

    def __init__(self):
        super().__init__()
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 6, 4))
        self.embed, self.attention = nn.Linear(1, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x[..., None])], dim=1) + self.places
        return self.out(self.attention(x, x, x, need_weights=False)[0][:, 0])


MODELS = {
    "0-dim parameter": Scaled,
    "0-dim parameter of a layer": lambda: nn.Sequential(ScalarLayer(), nn.Linear(5, 3)),
    "train() without self": lambda: Quiet(5, 3),
    "adapter": Adapted,
    "class token": Prefix,
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(5, 3)),
    "bilinear": lambda: nn.Sequential(nn.Linear(5, 4), nn.PReLU(4), nn.GLU(), nn.Linear(2, 3)),
    "twice": lambda: (lambda block: nn.Sequential(block, nn.Tanh(), block, nn.Linear(5, 3)))(nn.Linear(5, 5)),
    "conv3d": lambda: nn.Sequential(nn.Unflatten(1, (1, 1, 1, 5)), nn.Conv3d(1, 2, 1), nn.Flatten(), nn.Linear(10, 3)),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.InstanceNorm1d(1, affine=True), nn.Flatten(), nn.Linear(5, 3)
    ),
}


@pytest.mark.filterwarnings("ignore:.*performance drop.*")
@pytest.mark.parametrize("name", MODELS)
def test_model_families(name, recwarn):
    assert_right(double(MODELS[name]), DATA)
    assert not [warning for warning in recwarn if "goes the slow way" in str(warning.message)]


def test_a_sparse_embedding():
    ids = torch.randint(0, 9, (20, 3), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3)).double()
    rows = loop_gradients(nn.Sequential(nn.Embedding.from_pretrained(model[0].weight.data, freeze=False), *model[1:]),
                          ids, LABELS[:20])  # fmt: skip
    found = compute_influences(model, (ids, LABELS[:20]), (ids, LABELS[:20]), **PLAIN).scores
    np.testing.assert_allclose(found, (rows @ rows.T / 20).numpy(), rtol=1e-9, atol=1e-12)


def test_masked_classes_have_logits_of_minus_infinity():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 3)

        def forward(self, x):
            return torch.cat([self.a(x), torch.full((len(x), 1), -torch.inf, dtype=x.dtype)], dim=1)

    model = double(Masked)
    found = compute_influences(model, DATA, DATA, **PLAIN).scores
    np.testing.assert_allclose(found, compute_influences(model.a, DATA, DATA, **PLAIN).scores, rtol=1e-9)


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.scale = nn.Linear(5, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        self.kept = self.a(x) * self.scale
        return self.kept


@pytest.mark.parametrize("solver", ["identity", "cg"])
def test_a_model_that_keeps_activations_in_two_processes(solver):
    data = {"damping": 0.5, "measure": "loss", "solver": solver, "chunk": 10, "tolerance": 1e-9}
    one, two = (compute_influences(double(Keeps), DATA, DATA, [0, 1], jobs=jobs, **data).scores for jobs in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-9)


def test_many_threads_at_once():
    model, answers = double(Keeps), {}

    def ask(i):
        answers[i] = compute_influences(model, DATA, DATA, [i], **PLAIN).scores

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = compute_influences(model, DATA, DATA, range(4), **PLAIN).scores
    np.testing.assert_allclose(np.concatenate([answers[i] for i in range(4)]), wanted, rtol=1e-9)


# ── data ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class TheirBatch:
    """Another library's data set, whose batch() is another thing."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"input": POINTS[index], "labels": LABELS[index]}

    def batch(self, batch_size=None, by_column=None):
        raise AssertionError("not ours to call")


@pytest.mark.parametrize(
    "data",
    [
        (POINTS, LABELS.tolist()),
        (POINTS.numpy()[::-1][::-1], LABELS.numpy().astype(np.uint16)),
        (POINTS.numpy().astype(">f8"), LABELS.numpy()),
        Source(40, lambda chosen: (POINTS[chosen].numpy(), LABELS[chosen].numpy())),
        TheirBatch(),
        DataLoader(TensorDataset(*DATA), batch_sampler=BatchSampler(SequentialSampler(range(40)), 3, drop_last=False)),
    ],
    ids=["list of labels", "uint16", "big endian", "arrays from a source", "another batch()", "batch sampler"],
)
def test_data_sources(data):
    wanted = compute_influences(linear(), DATA, DATA, **PLAIN).scores
    np.testing.assert_allclose(compute_influences(linear(), data, data, **PLAIN).scores, wanted, rtol=1e-12)


class RandomTargets(TensorDataset):
    def __getitem__(self, index):
        return POINTS[index], int(torch.randint(0, 3, ()))


IDS = torch.randint(0, 9, (20, 3), generator=torch.Generator().manual_seed(0))
IDS[9, 1] = 99
BROKEN = torch.where(torch.arange(40)[:, None] == 13, torch.nan, POINTS)


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 1)

    def forward(self, x):
        return self.a(x).squeeze()


def embedded():
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))


HALF = BatchSampler(SubsetRandomSampler(range(6)), 3, drop_last=False)
GRID = torch.rand(4, 3, 2, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("data", "kind", "changes", "words"),
    [
        ((POINTS[0], LABELS[0]), None, {}, "looks like one sample; pass"),
        ((pd.DataFrame(POINTS.numpy()), pd.Series(LABELS.numpy())), None, {}, r"not DataFrame; pass its .to_numpy\(\)"),
        ((POINTS.to_sparse(), LABELS), None, {}, r"pass its .to_dense\(\)"),
        (DataLoader(TensorDataset(*DATA), batch_sampler=HALF), None, {}, "draws not every sample of its data set once"),
        (RandomTargets(*DATA), None, {}, "gives other samples each time it is read"),
        ((POINTS, LABELS[:, None]), None, {}, r"pass labels.squeeze\(1\)"),
        ((POINTS, LABELS - 1), None, {}, "leave samples without a label out"),
        ((IDS, LABELS[:20]), embedded, {}, "the model refuses training samples .*index out of range"),
        ((POINTS, NUMBERS), Dropped, {"measure": "squared_error"}, "drops the batch axis"),
        ((GRID, GRID[:, :2].permute(0, 2, 3, 1)), lambda: nn.Conv2d(3, 2, 1), {"measure": "binary"}, "must pair up"),
        (DATA, None, {"measure": nn.CrossEntropyLoss}, "measure must be a name, a Measure or a function"),
        (DATA, None, {"measure": nn.CrossEntropyLoss(torch.ones(3), reduction="none")}, "fails on two samples"),
        (DATA, None, {"settings": {"damping": 1.0}}, "settings must be InfluenceSettings"),
        (DATA, None, {"seed": 2**70}, "seed must fit in 64 bits"),
    ],
)
def test_one_sentence_says_what_to_do(data, kind, changes, words):
    model = double(kind) if kind else linear()
    with pytest.raises(ValueError, match=words):
        compute_influences(model, data, data, [0], **changes)


@pytest.mark.parametrize("solver", ["kernel", "cg", "lissa", "identity"])
def test_a_training_sample_that_is_no_number_is_an_error_in_every_solver(solver):
    with pytest.raises(NonFiniteError):
        compute_influences(linear(), (BROKEN, LABELS), DATA, [0], solver=solver, measure="loss", damping=0.1)


# ── habits ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("solver", ["kernel", "cg", "lissa", "identity"])
def test_the_modes_that_a_caller_may_be_in_change_nothing(solver):
    options = {"solver": solver, "measure": "loss", "damping": 0.5, "iterations": 50}
    wanted = compute_influences(linear(), DATA, DATA, [0], **options).scores
    for mode in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        model = linear()
        with mode:
            np.testing.assert_allclose(compute_influences(model, DATA, DATA, [0], **options).scores, wanted, rtol=1e-12)
    with torch.inference_mode():
        assert mean_influences(linear(), DATA, DATA, **options).any()
        assert self_influences(linear(), DATA, [0], **options).any()


def test_the_packages_interface_in_inference_mode(tmp_path):
    loader = DataLoader(TensorDataset(*DATA), batch_size=10)
    config = ptif.InfluenceConfig(outdir=tmp_path, solver="kernel", progress=False, num_classes=3, test_sample_num=1)
    with torch.inference_mode():
        influences, *_ = ptif.calc_img_wise(config, linear(), loader, loader)
        assert "scale" in dataclasses.replace(config, solver="lissa", damp=0.5).tuned(linear(), loader).report
    assert all(entry["influence"].any() for entry in influences.values())


def test_factors_of_any_kind():
    for factors in (np.logspace(-1, 1, 3), (factor for factor in (0.1, 1, 10)), [1]):
        assert 1.0 in sweep_damping(linear(), DATA, DATA, factors)
    with pytest.raises(ValueError, match="factors must be positive"):
        sweep_damping(linear(), DATA, DATA, [0])


def test_the_model_the_data_and_the_random_state_are_left_as_they_were():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double().train()
    model(POINTS).sum().backward()
    kept = [copy.deepcopy(model.state_dict()), [param.grad.clone() for param in model.parameters()]]
    state, points = torch.get_rng_state(), POINTS.clone()
    for solver in ("kernel", "cg"):
        compute_influences(model, DATA, DATA, [0], solver=solver, measure="loss", damping=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(points, POINTS)
    assert all(torch.equal(value, kept[0][name]) for name, value in model.state_dict().items())
    assert all(torch.equal(param.grad, grad) for param, grad in zip(model.parameters(), kept[1]))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("changes", [{"chunk": 1}, {"chunk": 99}, {"samples": 999}, {"jobs": 2, "chunk": 7}])
def test_sizes_change_nothing(changes):
    wanted = compute_influences(linear(), DATA, DATA, [3, 3, 0], InfluenceSettings(samples=40), chunk=10)
    found = compute_influences(linear(), DATA, DATA, [3, 3, 0], InfluenceSettings(samples=40), **changes)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-9)
    np.testing.assert_allclose(found.scores[0], found.scores[1], rtol=1e-9)


@pytest.mark.skipif(os.name != "posix", reason="file modes")
@pytest.mark.parametrize(("mask", "wanted"), [(0o077, 0o600), (0o022, 0o644)])
def test_a_file_is_as_private_as_the_user_wants_it(tmp_path, mask, wanted):
    before = os.umask(mask)
    try:
        compute_influences(linear(), DATA, DATA, [0]).save(tmp_path / "found.npz")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "found.npz").stat().st_mode) == wanted
