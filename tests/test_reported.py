"""What users of attribution libraries reported, rebuilt in small: each by the number it has in the issue.

Every value is held against an independent computation: plain autograd, sample by sample, in float64.
"""

import copy
import dataclasses
import json
import os
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from conftest import of_notebook
from references import loop_gradients
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

import influence_functions.compat as ptif
import notebook_support as ns
from influence_functions import (
    MEASURES,
    Influences,
    InfluenceSettings,
    NonFiniteError,
    compute_influences,
    mean_influences,
    metrics,
    self_influences,
)
from influence_functions.exact import leave_one_out, removal_effect
from influence_functions.metrics import linear_datamodeling_score, noise_ceiling
from influence_functions.problem import make_problem
from influence_functions.solvers import SOLVERS

PLAIN = {"solver": "identity", "damping": 1.0, "device": "cpu"}
INDICES = [
    np.arange(12) % 4 == 1,
    (np.arange(12) % 4 == 1).tolist(),
    torch.arange(12) % 4 == 1,
    np.array([1, 5, 9], dtype=np.uint8),
    [1, 5, 9],
    range(1, 12, 4),
    slice(1, 12, 4),
    torch.tensor([1, 5, 9], dtype=torch.int32),
    np.where(np.arange(12) % 4 == 1),
    torch.where(torch.arange(12) % 4 == 1),
]
REFUSED = [[1.7, 2.9], np.array([1.0, 2.0]), np.ones(5, bool), [[1, 2]], ["1"], True, {"a": 1}, [12], [-1]]


def blob(n=12, width=5, classes=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, width, generator=generator, dtype=torch.float64), torch.arange(n) % classes


def small(width=5, classes=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, classes)).double()


def dots(model, inputs, labels, measure="loss"):
    """(n, n) inner products of gradients / n: what the identity solver must give at damping 1."""
    rows = loop_gradients(copy.deepcopy(model).double(), inputs, labels, MEASURES[measure].values)
    return (rows @ rows.T / len(rows)).numpy()


def assert_right(model, inputs, labels, tolerance=1e-9, measure="loss", **changes):
    found = compute_influences(model, (inputs, labels), (inputs, labels), measure=measure, **PLAIN | changes)
    wanted = dots(model, inputs, labels, measure)
    assert np.abs(found.scores - wanted).max() <= tolerance * np.abs(wanted).max()
    return found


# ── wrong numbers without a word ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chosen", INDICES, ids=lambda chosen: type(chosen).__name__)
def test_01_each_way_to_say_these_samples(chosen):
    data, model = blob(), small()
    wanted = compute_influences(model, data, data, [1, 5, 9], **PLAIN)
    found = compute_influences(model, data, data, chosen, **PLAIN)
    assert found.test_indices.tolist() == [1, 5, 9]
    np.testing.assert_array_equal(found.scores, wanted.scores)
    own = self_influences(model, data, chosen, **PLAIN)
    np.testing.assert_allclose(own, wanted.scores[[0, 1, 2], [1, 5, 9]], rtol=1e-12)
    effects = leave_one_out(data, data, 0.1, chosen)
    np.testing.assert_allclose(effects, leave_one_out(data, data, 0.1, [1, 5, 9]), rtol=1e-9)
    assert removal_effect(data, data, 0.1, chosen) == pytest.approx(removal_effect(data, data, 0.1, [1, 5, 9]))
    suspicion = np.arange(12.0)
    assert metrics.detection_quality(suspicion, chosen, 0.5) == metrics.detection_quality(suspicion, [1, 5, 9], 0.5)
    digits = ns.load_data("digits")[0].subset(range(12))
    assert torch.equal(digits.subset(chosen).images, digits.images[[1, 5, 9]])


@pytest.mark.parametrize("chosen", REFUSED, ids=str)
def test_01_what_is_no_index_is_refused(chosen):
    data, model = blob(), small()
    digits = ns.load_data("digits")[0].subset(range(12))
    for call in (
        lambda: compute_influences(model, data, data, chosen, **PLAIN),
        lambda: self_influences(model, data, chosen, **PLAIN),
        lambda: leave_one_out(data, data, 0.1, chosen),
        lambda: removal_effect(data, data, 0.1, chosen),
        lambda: metrics.detection_curve(np.arange(12.0), chosen),
        lambda: digits.subset(chosen),
    ):
        with pytest.raises(ValueError, match=r"indices must (be whole numbers, or a mask of 12|lie in 0\.\.11)"):
            call()


def test_01_one_number_is_one_sample():
    data, model = blob(), small()
    assert compute_influences(model, data, data, 4, **PLAIN).test_indices.tolist() == [4]
    assert compute_influences(model, data, data, np.int64(4), **PLAIN).test_indices.tolist() == [4]


def test_01_a_plan_of_masks_trains_each_half(tmp_path):
    train, test = (data.subset(range(60)) for data in ns.load_data("digits"))
    config = ns.TrainConfig(epochs=1, batch_size=16)
    halves = ns.random_halves(60, 3)
    plan = [(half, seed) for seed, half in enumerate(halves)]
    found = ns.retrain_all(train, test, plan, config, tmp_path / "masks.npz", jobs=1)
    same = [(np.flatnonzero(half), seed) for seed, half in enumerate(halves)]
    wanted = ns.retrain_all(train, test, same, config, tmp_path / "indices.npz", jobs=1)
    np.testing.assert_array_equal(found.margins, wanted.margins)
    assert len(np.unique(found.margins, axis=0)) == 3
    with pytest.raises(ValueError, match="the plan's indices must be whole numbers"):
        ns.retrain_all(train, test, [([0.5, 1.5], 0)], config, tmp_path / "no.npz", jobs=1)


@pytest.mark.parametrize(
    ("measure", "shape"),
    [
        (nn.CrossEntropyLoss(), r"\(\)"),
        (lambda out, y: F.cross_entropy(out, y, reduction="none")[:, None], r"\(2, 1\)"),
        (lambda out, y: float(out.sum()), "float"),
    ],
)
@pytest.mark.parametrize("solver", ["kernel", "cg", "lissa", "identity"])
def test_02_a_measure_gives_a_number_a_sample(measure, shape, solver):
    with pytest.raises(ValueError, match=rf"must return one number a sample, \(2,\) for two, not {shape}"):
        compute_influences(small(), blob(), blob(), measure=measure, solver=solver, damping=1.0)


class Named(nn.Module):
    """The same name and shapes, another function."""

    def __init__(self, activation, hidden=8):
        super().__init__()
        self.flat, self.a, self.b = nn.Flatten(), nn.Linear(3072, hidden), nn.Linear(hidden, 10)
        self.activation = activation

    def forward(self, x):
        return self.b(self.activation(self.a(self.flat(x))))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: Named(torch.tanh), "forward"),
        (lambda: Named(F.leaky_relu), "forward"),
        (lambda: Named(F.relu, hidden=9), "answer|structure"),
        (lambda: Named(nn.ReLU()), "structure"),
    ],
)
def test_03_a_checkpoint_of_another_model_is_not_loaded(tmp_path, capsys, other, words):
    train, test = (data.subset(range(60)) for data in ns.load_data("digits"))
    config, path = ns.TrainConfig(epochs=1, batch_size=16), tmp_path / "net.safetensors"
    ns.train_or_load(Named(F.relu), (train, test), config, path, retrain=False)
    ns.train_or_load(Named(F.relu), (train, test), config, path, retrain=False)
    assert "loaded" in capsys.readouterr().out
    ns.train_or_load(other(), (train, test), config, path, retrain=False)
    said = capsys.readouterr().out
    assert "training again" in said
    assert any(word in said for word in words.split("|"))


def test_03_retrainings_of_another_net_are_not_used(tmp_path, monkeypatch, capsys):
    train, test = (data.subset(range(60)) for data in ns.load_data("digits"))
    config, plan = ns.TrainConfig(epochs=1, batch_size=16), [(range(30), 0)]
    first = ns.retrain_all(train, test, plan, config, tmp_path / "kept.npz", jobs=1)
    monkeypatch.setattr(F, "relu", torch.tanh)  # as if Net's forward had been edited
    second = ns.retrain_all(train, test, plan, config, tmp_path / "kept.npz", jobs=1)
    assert "was made with another forward of Net" in capsys.readouterr().out
    assert not np.array_equal(first.margins, second.margins)


def test_03_what_save_pth_keeps_is_not_used_after_an_edited_forward(tmp_path, monkeypatch):
    points, labels = blob(30)
    loaders = [DataLoader(TensorDataset(points, labels), batch_size=10)] * 2

    class Edited(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3).double()

        def forward(self, x):
            return self.layer(x)

    torch.manual_seed(0)
    model = Edited()
    config = ptif.InfluenceConfig(outdir=tmp_path, save_pth=tmp_path / "kept", solver="kernel", progress=False)
    ptif.calc_all_grad_then_test(dataclasses.replace(config, num_classes=3), model, *loaders)
    monkeypatch.setattr(Edited, "forward", lambda self, x: torch.tanh(self.layer(x)))
    with pytest.raises(ValueError, match="is of another model, data set or configuration"):
        ptif.calc_all_grad_then_test(dataclasses.replace(config, num_classes=3), model, *loaders)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x):
        x.sub_(5)
        return self.layer(x)


@pytest.mark.parametrize("solver", ["kernel", "cg", "lissa", "identity"])
def test_04_a_forward_that_changes_its_input(solver):
    points, labels = blob(30)
    torch.manual_seed(0)
    model, given = InPlace(), points.clone()
    options = {"solver": solver, "damping": 5.0, "measure": "loss", "samples": 30, "iterations": 300, "scale": None}
    found = compute_influences(model, (given, labels), (given, labels), [0, 1], **options)
    assert torch.equal(given, points), "the caller's data is left as it was"
    wanted = compute_influences(model.layer, (points - 5, labels), (points - 5, labels), [0, 1], **options)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-9)
    batch = ns.ImageData("x", torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.arange(4), ("a", "b", "c", "d"))
    assert torch.equal(batch.batch(torch.arange(2))[0], -torch.ones(2, 3, 2, 2))


def test_05_lissa_that_diverged_but_is_finite_is_an_error(tmp_path):
    points, labels = blob(30)
    data, model = (10 * points, labels), nn.Linear(5, 3).double()
    with pytest.raises(NonFiniteError, match="LiSSA diverged to a residual of"):
        compute_influences(
            model, data, data, [0], solver="lissa", measure="loss", damping=0.01, scale=1.0, iterations=8
        )
    loader = DataLoader(TensorDataset(*data), batch_size=10)
    config = ptif.InfluenceConfig(
        outdir=tmp_path, damp=0.01, scale=1.0, recursion_depth=8, progress=False, num_classes=3
    )
    with pytest.raises(NonFiniteError, match="LiSSA diverged"):
        ptif.calc_img_wise(config, model, loader, loader)
    assert not list(tmp_path.glob("influence_results*"))


def test_05_an_unconverged_solution_says_so(tmp_path):
    data, model = blob(30), small()
    options = {"solver": "cg", "measure": "loss", "damping": 1e-4, "iterations": 1, "tolerance": 1e-9}
    found = compute_influences(model, data, data, [0], **options)
    assert not found.health.converged
    found.save(tmp_path / "found.npz")
    assert not Influences.load(tmp_path / "found.npz").health.converged
    with pytest.warns(UserWarning, match="left a relative residual of"):
        mean_influences(model, data, data, **options)
    with pytest.warns(UserWarning, match="left a relative residual of"):
        self_influences(model, data, [0], **options)
    loader = DataLoader(TensorDataset(*data), batch_size=10)
    config = ptif.InfluenceConfig(
        outdir=tmp_path, damp=0.01, scale=None, recursion_depth=2, progress=False, num_classes=3, test_sample_num=1
    )
    influences, *_ = ptif.calc_img_wise(config, model, loader, loader)
    written = json.loads((tmp_path / "influence_results_0_1.json").read_text())
    for entries in (influences, written):
        assert all(0.1 < entry["residual"] < 1 for entry in entries.values())


def curvature_matrix(problem):
    """H of the curvature's sample by plain autograd: the generalised Gauss-Newton matrix of the loss, (p, p)."""
    inputs, _ = problem.batch(problem.train, problem.sample)
    model, names = problem.maker.model, [*problem.maker.params]
    total = 0.0
    for x in inputs:

        def logits(*values, x=x):
            return torch.func.functional_call(model, dict(zip(names, values)), (x[None],))[0]

        parts = torch.autograd.functional.jacobian(logits, tuple(problem.maker.params.values()))
        jacobian = torch.cat([part.flatten(1) for part in parts], dim=1)
        share = logits(*problem.maker.params.values()).softmax(0)
        total = total + jacobian.T @ (share.diag() - share[:, None] * share) @ jacobian
    return total / len(inputs)


def true_residual(problem, tests, solved):
    """The largest ‖(H + λI)s − v‖ / ‖v‖, with that H."""
    s, v = solved.directions(), tests.dense()
    left = s @ curvature_matrix(problem) + problem.settings.damping * s - v
    return float((left.norm(dim=1) / v.norm(dim=1)).max())


@pytest.mark.parametrize(("solver", "changes"), [
    ("cg", {"iterations": 3}), ("cg", {"iterations": 200, "tolerance": 1e-8}),
    ("lissa", {"iterations": 20, "batch_size": 30}), ("lissa", {"iterations": 400, "batch_size": 30}),
])  # fmt: skip
def test_06_the_residual_of_a_solver_is_that_of_what_it_returns(solver, changes):
    points, labels = blob(30)
    problem = make_problem(
        small(), (points, labels), InfluenceSettings(solver=solver, measure="loss", damping=0.05, samples=30, **changes)
    )
    tests = problem.gradients(problem.train, torch.arange(4))[0]
    solved = SOLVERS[solver](problem).solve(tests)
    assert solved.health.residual == pytest.approx(true_residual(problem, tests, solved), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("damping", [1e-1, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("road", ["by_directions", "by_products"])
def test_06_the_kernels_residual_sees_its_rounding(road, damping):
    """float32 far below the largest eigenvalue, against the same in float64."""
    points, labels = blob(60, width=20)
    points = 5 * points
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    answers = []
    for kind in (torch.float64, torch.float32):
        data = (points.to(kind), labels)
        settings = InfluenceSettings(measure="margin", damping=damping, samples=60)
        problem = make_problem(copy.deepcopy(model).to(kind), data, settings)
        tests = problem.gradients(problem.train, torch.arange(8))[0]
        solved = getattr(SOLVERS["kernel"](problem), road)(tests)
        everything = problem.gradients(problem.train, torch.arange(60))[0]
        answers.append((solved.scores(everything).double(), solved.health.residual))
    (wanted, exact), (found, reported) = answers
    off = float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())
    assert exact < 1e-5
    assert reported >= min(off, 1.0) / 30, f"{off:.1e} off, and the residual says {reported:.1e}"


class ByLength(nn.Module):
    """Sorts its batch by length, as users of packed sequences do, and puts it back."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.out(torch.tanh(self.layer(x[order])))[order.argsort()]


class ManyAtOnce(nn.Module):
    """Treats large batches another way: backwards, and back again."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(x) if len(x) < 10 else self.layer(x.flip(0)).flip(0)


@pytest.mark.parametrize("model", [ByLength, ManyAtOnce])
def test_07_a_forward_that_reorders_its_batch(model):
    points, labels = blob(40)
    points[:20, 0] = points[:20, 0].sort().values  # the first ones happen to be in order
    torch.manual_seed(0)
    assert_right(model().double(), points, labels)


class Jittered(Dataset):
    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.randn(5), index % 3


def test_08_augmentation_is_refused_everywhere():
    random, steady, model = Jittered(), blob(30), small().float()
    steady = steady[0].float(), steady[1]
    for call in (
        lambda: compute_influences(model, random, steady, [0]),
        lambda: compute_influences(model, steady, random, [0]),
        lambda: mean_influences(model, DataLoader(random), steady),
        lambda: self_influences(model, random),
    ):
        with pytest.raises(ValueError, match="gives other samples each time it is read; switch off its augmentation"):
            call()


# ── crashes, and what was expected: scores ──────────────────────────────────────────────────────────────────────────


class Ids(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.out(self.table(ids).mean(1))


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(x.to(self.out.weight) / 3)


WHOLE = {
    "token ids": (Ids, torch.randint(0, 9, (30, 5), generator=torch.Generator().manual_seed(0))),
    "int32 ids": (Ids, torch.randint(0, 9, (30, 5), generator=torch.Generator().manual_seed(0)).int()),
    "uint8 pixels": (Pixels, torch.randint(0, 9, (30, 6), generator=torch.Generator().manual_seed(0)).byte()),
    "truth values": (Pixels, torch.randint(0, 2, (30, 6), generator=torch.Generator().manual_seed(0)).bool()),
}


@pytest.mark.parametrize("name", WHOLE)
def test_09_inputs_of_whole_numbers_in_every_call_and_solver(name, tmp_path):
    kind, inputs = WHOLE[name]
    torch.manual_seed(0)
    model, labels = kind().double(), torch.arange(30) % 3
    assert_right(model, inputs, labels)
    data = (inputs, labels)
    exact = compute_influences(model, data, data, [0, 1], solver="kernel", measure="loss", damping=0.1, samples=30)
    for solver in ("cg", "lissa"):
        for curvature in ("gauss_newton", "hessian"):
            options = {"measure": "loss", "damping": 0.5, "iterations": 200, "batch_size": 30, "samples": 30}
            found = compute_influences(model, data, data, [0, 1], solver=solver, curvature=curvature, **options)
            assert found.health.residual < 1e-2
    np.testing.assert_allclose(self_influences(model, data, [0, 1], measure="loss", damping=0.1, samples=30),
                               exact.scores[[0, 1], [0, 1]], rtol=1e-8)  # fmt: skip
    assert mean_influences(model, data, data, measure="loss", damping=0.1).shape == (30,)
    loader = DataLoader(TensorDataset(*data), batch_size=7)
    config = ptif.InfluenceConfig(outdir=tmp_path, solver="kernel", progress=False, num_classes=3, test_sample_num=1)
    assert len(ptif.calc_img_wise(config, model, loader, loader)[0]) == 3


class Keeps(nn.Module):
    """Keeps an activation, and things that cannot be copied."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.lock, self.file, self.generator = threading.Lock(), open(__file__), torch.Generator()  # noqa: SIM115
        self.kept, self.history = None, []

    def forward(self, x):
        self.kept = self.layer(x)
        self.history = [self.kept * 2]
        return self.kept


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(input=torch.tanh(self.a(input=x)))


def wrapped(name):
    model = small()
    if name == "weight_norm":
        nn.utils.parametrizations.weight_norm(model[0])
    elif name == "old weight_norm":
        nn.utils.weight_norm(model[0])
    elif name == "spectral_norm":
        nn.utils.parametrizations.spectral_norm(model[0])
    elif name == "old spectral_norm":
        nn.utils.spectral_norm(model[0])
    elif name == "orthogonal":
        nn.utils.parametrizations.orthogonal(model[0])
    elif name == "pruned":
        torch.nn.utils.prune.l1_unstructured(model[0], "weight", amount=0.4)
    return model.train()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "name", ["weight_norm", "old weight_norm", "spectral_norm", "old spectral_norm", "orthogonal", "pruned"]
)
def test_10_layers_whose_weight_is_computed(name):
    points, labels = blob()
    model = wrapped(name)
    model(points[:3])  # what it computed, it may keep
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = compute_influences(model, (points, labels), (points, labels), measure="loss", **PLAIN)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()
    params = [param for param in model.parameters() if param.requires_grad]
    losses = [F.cross_entropy(model(x[None]), y[None]) for x, y in zip(points, labels)]
    rows = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]) for loss in losses])
    wanted = (rows @ rows.T / len(rows)).numpy()
    assert np.abs(found.scores - wanted).max() <= 1e-9 * np.abs(wanted).max()
    assert "2" not in found.health.slow_layers, "one layer that cannot be fast must not slow the others"


@pytest.mark.parametrize("solver", ["kernel", "identity"])
def test_10_a_model_that_keeps_things(solver):
    torch.manual_seed(0)
    model, (points, labels) = Keeps().double(), blob()
    model(points)
    kept, history = model.kept, model.history
    found = compute_influences(model, (points, labels), (points, labels), measure="loss", solver=solver, damping=1.0)
    assert model.kept is kept
    assert model.history is history
    layer = compute_influences(
        model.layer, (points, labels), (points, labels), measure="loss", solver=solver, damping=1.0
    )
    np.testing.assert_allclose(found.scores, layer.scores, rtol=1e-12)
    with pytest.raises(ValueError, match=r"cannot be sent to other processes .* use jobs=1"):
        compute_influences(model, (points, labels), (points, labels), damping=1.0, jobs=2, chunk=5)
    model.file.close()


def test_10_inputs_by_keyword():
    torch.manual_seed(0)
    assert assert_right(Keyword().double(), *blob()).health.slow_layers == ()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", ["kernel", "identity"])
def test_11_half_precision(kind, solver):
    points, labels = blob(40)
    model, inputs = small().to(kind), points.to(kind)
    options = {"measure": "loss", "solver": solver, "damping": 1e-3, "samples": 40}
    found = compute_influences(model, (inputs, labels), (inputs, labels), **options)
    exact = (copy.deepcopy(model).double(), (inputs.double(), labels))
    wanted = compute_influences(exact[0], exact[1], exact[1], **options).scores
    assert found.scores.dtype == np.float32
    assert np.abs(found.scores - wanted).max() < 1e-3 * np.abs(wanted).max()
    assert (found.scores != 0).all()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat, self.a, self.out = nn.Flatten(), nn.Linear(3072, 10), nn.Linear(10, 10)
        self.again, self.b = self.out, nn.Linear(10, 10)
        self.b.weight = self.out.weight

    def forward(self, x):
        return self.b(torch.tanh(self.again(torch.tanh(self.a(self.flat(x))))))


def test_12_tied_weights_are_saved_and_loaded(tmp_path):
    train, test = (data.subset(range(40)) for data in ns.load_data("digits"))
    config, path, models = ns.TrainConfig(epochs=1, batch_size=16), tmp_path / "tied.safetensors", [Tied(), Tied()]
    for model in models:
        ns.train_or_load(model, (train, test), config, path, retrain=False)
    for one, other in zip(models[0].state_dict().values(), models[1].state_dict().values()):
        assert torch.equal(one, other)
    assert models[1].b.weight is models[1].out.weight
    scores = compute_influences(models[1], train, test, [0], samples=20).scores
    assert scores.shape == (1, 40)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.encoder(x).mean(1))


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.out = kind(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


SEQUENCES = {
    "transformer": Attention, "sdpa": Fused,
    "lstm": lambda: Recurrent(nn.LSTM), "gru": lambda: Recurrent(nn.GRU), "rnn": lambda: Recurrent(nn.RNN),
}  # fmt: skip


def sequences(n=12):
    return torch.randn(n, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(n) % 3


@pytest.mark.parametrize("name", SEQUENCES)
def test_16_transformers_and_recurrent_networks(name):
    torch.manual_seed(0)
    assert_right(SEQUENCES[name]().double(), *sequences())


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("solver", ["cg", "lissa"])
def test_13_curvature_products_where_fused_operations_lack_forward_mode(name, solver):
    torch.manual_seed(0)
    model, data = SEQUENCES[name]().double(), sequences()
    settings = InfluenceSettings(solver=solver, measure="loss", damping=0.5, samples=12, batch_size=12, iterations=60)
    problem = make_problem(model, data, settings)
    tests = problem.gradients(problem.train, torch.arange(2))[0]
    solved = SOLVERS[solver](problem).solve(tests)
    wanted = true_residual(problem, tests, solved)
    assert solved.health.residual == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    assert wanted < 0.05


def test_14_settings_of_other_libraries_numbers_are_saved(tmp_path):
    data = blob(30)
    odd = {"damping": np.float32(0.1), "samples": np.int64(10), "device": torch.device("cpu"), "seed": np.int16(3)}
    found = compute_influences(small(), data, data, [0], **odd)
    found.save(tmp_path / "found.npz")
    assert Influences.load(tmp_path / "found.npz").settings["samples"] == 10
    loader = DataLoader(TensorDataset(*data), batch_size=10)
    config = ptif.InfluenceConfig(
        outdir=tmp_path, damp=np.float64(0.1), test_sample_num=np.int64(1), solver="kernel", progress=False,
        num_classes=np.int32(3),
    )  # fmt: skip
    assert len(ptif.calc_img_wise(config, small(), loader, loader)[0]) == 3
    for wrong in ({"samples": 2.5}, {"damping": "much"}, {"iterations": True}):
        with pytest.raises(ValueError, match=r"must be a (whole )?number, not"):
            InfluenceSettings(**wrong)


def test_15_a_last_batch_of_one_sample():
    train, _ = ns.load_data("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.BatchNorm1d(4), nn.Linear(4, 10))
    training = ns.train_model(model, train.subset(range(33)), ns.TrainConfig(epochs=2, batch_size=16))
    assert len(training.history) == 2
    for n, size in ((33, 16), (32, 16), (34, 16), (1, 16), (17, 16), (16, 16)):
        batches = [labels for _, labels in ns.shuffled_batches(train.subset(range(n)), size, torch.Generator())]
        assert len(batches) == ns.batches_of(n, size)
        assert sum(map(len, batches)) == n
        assert n == 1 or min(map(len, batches)) > 1
    data = train.subset(range(33))
    assert compute_influences(model, data, data, [0], chunk=16, samples=33).scores.shape == (1, 33)


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_17_finished_samples_are_held_as_numbers(tmp_path):
    torch.manual_seed(0)
    inputs, labels = torch.randn(2_000, 5), torch.arange(2_000) % 3
    train, test = (DataLoader(TensorDataset(inputs[:n], labels[:n]), batch_size=500) for n in (2_000, 60))
    config = ptif.InfluenceConfig(outdir=tmp_path, solver="kernel", progress=False, num_classes=3)
    influences, *_ = ptif.calc_all_grad_then_test(config, nn.Linear(5, 3), train, test)
    arrays = [entry["influence"] for entry in influences.values()]
    assert sum(array.nbytes for array in arrays) == 4 * 60 * 2_000, "4 bytes a pair in memory"
    size = (tmp_path / "influence_results_0_False.json").stat().st_size
    assert size < 60 * (17 * 2_000 + 8_000), "17 bytes a pair in the manual's own format"
    loaded = ptif.load_results(tmp_path / "influence_results_0_False.json")
    np.testing.assert_array_equal(loaded.scores, -np.stack(arrays))


def test_18_many_equal_images():
    images = torch.zeros(2_000, 3, 32, 32, dtype=torch.uint8)
    first, second = of_notebook("EDA.ipynb").exact_copies(images)
    assert len(first) == 2_000 * 1_999 // 2
    assert (first < second).all()


def test_19_what_does_not_fit_says_which_setting_to_change(monkeypatch):
    from influence_functions import _support

    data, asked = blob(30), []
    monkeypatch.setattr(_support, "free_bytes", lambda device: asked.append(device) or _support.RUNTIME + 20_000)
    words = r"influence needs at least .* with solver 'kernel'.* raise memory=.* fewer test samples, samples below 30"
    with pytest.raises(ValueError, match=words):
        compute_influences(nn.Linear(5, 40).double(), data, data, range(12))
    assert asked, "the patch was not met"
    monkeypatch.setattr(_support, "free_bytes", lambda device: _support.RUNTIME + 4e6)
    assert compute_influences(nn.Linear(5, 40).double(), data, data, range(12)).health.memory <= 2e6
    monkeypatch.setattr(_support, "free_bytes", lambda device: 20_000)
    with pytest.raises(ValueError, match="less than 128 MB of memory are free: stop what else takes memory"):
        compute_influences(nn.Linear(5, 40).double(), data, data, range(12))


# ── errors that name cause and cure, or no error at all ─────────────────────────────────────────────────────────────


class Answer:
    def __init__(self, logits):
        self.logits = logits


OUTPUTS = {
    "tuple": lambda out: (out, out * 2),
    "list": lambda out: [out, None],
    "dict": lambda out: {"loss": None, "logits": out},
    "object": Answer,
}


class Returns(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.layer, self.wrap = nn.Linear(5, 3).double(), wrap

    def forward(self, x):
        return self.wrap(self.layer(x))


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("solver", ["kernel", "cg", "lissa", "identity"])
def test_20_outputs_with_logits_inside(name, solver):
    torch.manual_seed(0)
    model, data = Returns(OUTPUTS[name]), blob()
    options = {"solver": solver, "measure": "loss", "damping": 0.5, "iterations": 50}
    found = compute_influences(model, data, data, [0], **options).scores
    np.testing.assert_allclose(found, compute_influences(model.layer, data, data, [0], **options).scores, rtol=1e-9)


def test_20_outputs_with_none_inside():
    with pytest.raises(ValueError, match="the model returns dict; it must return a tensor, something with `logits`"):
        compute_influences(Returns(lambda out: {"x": out}), blob(), blob(), [0])


def test_20_data_in_other_clothes():
    points, labels = blob()
    model = small()
    wanted = compute_influences(model, (points, labels), (points, labels), **PLAIN).scores
    arrays = (points.numpy(), labels.numpy())
    leaf = (points.clone().requires_grad_(), labels)
    samples = [(x, int(y)) for x, y in zip(points, labels)]
    arrays_of = [(x.numpy(), np.int64(y)) for x, y in zip(points, labels)]
    dicts = {"input": points, "labels": labels}
    mixed = (points.float(), labels.to(torch.int32))
    for given in (arrays, leaf, samples, arrays_of, dicts):
        found = compute_influences(model, given, given, **PLAIN)
        np.testing.assert_allclose(found.scores, wanted, rtol=1e-12)
    np.testing.assert_allclose(compute_influences(model, mixed, mixed, **PLAIN).scores, wanted, rtol=1e-5)
    np.testing.assert_allclose(compute_influences(nn.DataParallel(model), arrays, arrays, **PLAIN).scores, wanted)
    mixed_model = nn.Sequential(model[0], model[1], copy.deepcopy(model[2]).float())
    assert compute_influences(mixed_model, arrays, arrays, **PLAIN).scores.shape == (12, 12)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.out, self.reentrant = small(), nn.Linear(3, 3).double(), reentrant

    def forward(self, x):
        return self.out(checkpoint(self.inner, x, use_reentrant=self.reentrant))


def test_20_scripted_and_checkpointed_models():
    points, labels = blob()
    model = small()
    wanted = compute_influences(model, (points, labels), (points, labels), **PLAIN).scores
    scripted = torch.jit.script(small())
    np.testing.assert_allclose(
        compute_influences(scripted, (points, labels), (points, labels), **PLAIN).scores, wanted, rtol=1e-9
    )
    assert_right(Checkpointed(False), points, labels)


class Frame:
    """What a DataFrame looks like to us."""

    def to_numpy(self):
        return np.zeros((3, 2))


@pytest.mark.parametrize(
    ("data", "model", "changes", "words"),
    [
        ([(torch.zeros(5), 0, 7)] * 6, small, {}, "of each sample, all parts but the last, the target, are inputs"),
        ([{"x": torch.zeros(5), "y": 1}] * 6, small, {}, "a dict must hold its targets under 'labels'; it has x, y"),
        ({"x": ["a", "b"], "labels": torch.arange(2)}, small, {}, "'x': inputs and targets must be tensors of numbers"),
        ({"x": Frame(), "labels": torch.arange(3)}, small, {}, r"not Frame; pass its .to_numpy\(\)"),
        (blob(), lambda: nn.Linear(5, 1).double(), {}, "returns one number a sample; pass measure='binary'"),
        (blob(), lambda: nn.LazyLinear(3), {}, "parameters without a shape yet"),
        (blob(), lambda: nn.Linear(5, 3, dtype=torch.complex64), {}, "complex parameters"),
        (blob(), lambda: "model", {}, "model must be an nn.Module"),
        ([(torch.zeros(k + 1), 0) for k in range(6)], small, {}, "its samples do not make a batch"),
        (blob(), small, {"outdir": __file__}, "is a file, where a folder is needed"),
    ],
)
def test_20_one_clear_sentence_for_the_rest(data, model, changes, words):
    def call():
        if not changes:
            return compute_influences(model(), data, data, [0])
        loader = DataLoader(TensorDataset(*data), batch_size=4)
        config = ptif.InfluenceConfig(solver="kernel", progress=False, num_classes=3, **changes)
        return ptif.calc_img_wise(config, model(), loader, loader)

    with pytest.raises(ValueError, match=words):
        call()


def test_20_targets_of_several_numbers_have_no_column():
    points, _ = blob()
    data = (points, points[:, :3])
    table = compute_influences(small(), data, data, [0], measure="squared_error", **PLAIN).to_frame()
    assert list(table.columns) == ["test_index", "train_index", "score"]


def test_21_nan_in_a_linear_datamodeling_score_is_an_error():
    scores, masks, outcomes = np.ones((2, 6)), ns.random_halves(6, 4), np.ones((4, 2))
    for bad in ((scores * np.nan, masks, outcomes), (scores, masks, outcomes * np.nan)):
        with pytest.raises(NonFiniteError, match="contain NaN or infinity"):
            linear_datamodeling_score(*bad)
    with pytest.raises(ValueError, match="masks must be truth values"):
        linear_datamodeling_score(scores, masks * 5, outcomes)
    with pytest.raises(NonFiniteError, match="outcomes contain NaN"):
        noise_ceiling(np.full((2, 4, 2), np.nan))


def test_21_saving_onto_a_link_keeps_the_link(tmp_path):
    data = blob()
    found = compute_influences(small(), data, data, [0], **PLAIN)
    (tmp_path / "link.npz").symlink_to(tmp_path / "real.npz")
    found.save(tmp_path / "link.npz")
    assert (tmp_path / "link.npz").is_symlink()
    np.testing.assert_array_equal(Influences.load(tmp_path / "real.npz").scores, found.scores)
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", tmp_path, "/dev/null"):
        with pytest.raises(ValueError, match="is not a regular file"):
            found.save(special)
