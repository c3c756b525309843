"""The engine against exact answers: dense inverses, loops over samples, and real retraining."""

import copy
import dataclasses

import joblib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import notebook_support as ns


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.squeeze(-1) - targets).square() / 2


def loop_gradients(model: nn.Module, images: Tensor, labels: Tensor, measure: ns.Measure = ns.loss_measure) -> Tensor:
    """(b, p) by plain autograd, one sample after the other: slow, and independent of torch.func."""
    model = copy.deepcopy(model).eval()
    params = [param for param in model.parameters() if param.requires_grad]
    rows = []
    for image, label in zip(images, labels):
        value = measure(model(image[None]), label[None]).sum()
        parts = torch.autograd.grad(value, params, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(q) if g is None else g).flatten() for g, q in zip(parts, params)]))
    return torch.stack(rows)


def dense_hessian(model: nn.Module, images: Tensor, labels: Tensor, measure: ns.Measure = ns.loss_measure) -> Tensor:
    """(p, p) Hessian of the mean measure, by differentiating twice."""
    names, shapes = zip(*((name, param.shape) for name, param in model.named_parameters()))
    flat = torch.cat([param.detach().flatten() for param in model.parameters()])

    def mean_measure(vector: Tensor) -> Tensor:
        pieces = vector.split([shape.numel() for shape in shapes])
        values = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes)}
        return measure(torch.func.functional_call(model, values, (images,)), labels).mean()

    return torch.func.hessian(mean_measure)(flat)


def exact_scores(matrix: Tensor, damping: float, test_gradients: Tensor, train_gradients: Tensor) -> Tensor:
    damped = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
    return test_gradients @ torch.linalg.inv(damped) @ train_gradients.T / len(train_gradients)


def relative_error(found: np.ndarray, exact: Tensor) -> float:
    return float((torch.as_tensor(found) - exact).norm() / exact.norm())


@pytest.mark.parametrize("kind", ["linear", "logistic", "mlp"])
def test_kernel_with_all_samples_equals_the_dense_inverse_of_the_same_matrix(kind, blobs, mlp, softmax):
    images, labels = blobs
    model, measure = {"logistic": (softmax, "loss"), "mlp": (mlp, "loss")}.get(kind, (nn.Linear(5, 1).double(), None))
    if measure is None:
        measure, labels = squared_error, labels.double()
    function = ns.MEASURES.get(measure, measure) if isinstance(measure, str) else measure
    settings = ns.InfluenceSettings(measure=measure, damping=0.03, samples=40, device="cpu")
    rows = ns._make_problem(model, (images, labels), settings).rows
    gradients = loop_gradients(model, images, labels, function)
    exact = exact_scores(rows.T @ rows / 40, 0.03, gradients[:4], gradients)
    found = ns.compute_influences(model, (images, labels), (images, labels), range(4), settings)
    assert relative_error(found.scores, exact) < 1e-6
    assert found.health.residual < 1e-10


def test_sampled_fisher_tends_to_the_gauss_newton_matrix(blobs, softmax):
    images, labels = blobs
    many = (images.repeat(500, 1), labels.repeat(500))
    rows = ns._make_problem(softmax, many, ns.InfluenceSettings(measure="loss", samples=20_000, device="cpu")).rows
    exact = dense_hessian(softmax, images, labels)  # for a linear model the Hessian is the Gauss-Newton matrix
    assert relative_error(rows.T @ rows / len(rows), exact) < 0.03


@pytest.mark.parametrize("kind", ["linear", "logistic"])
def test_cg_equals_the_dense_inverse_of_the_hessian(kind, blobs, softmax):
    images, labels = blobs
    model, measure = (softmax, ns.loss_measure)
    if kind == "linear":
        model, measure, labels = nn.Linear(5, 1).double(), squared_error, labels.double()
    gradients = loop_gradients(model, images, labels, measure)
    exact = exact_scores(dense_hessian(model, images, labels, measure), 0.01, gradients[:3], gradients)
    for curvature in ("gauss_newton", "hessian"):
        found = ns.compute_influences(
            model, (images, labels), (images, labels), range(3), solver="cg", damping=0.01, tolerance=1e-8,
            samples=40, curvature=curvature, measure=measure if kind == "linear" else "loss", device="cpu",
        )  # fmt: skip
        assert relative_error(found.scores, exact) < 1e-4
        assert found.health.residual < 1e-7


def test_cg_on_the_hessian_of_an_mlp(blobs, mlp):
    images, labels = blobs
    gradients = loop_gradients(mlp, images, labels)
    hessian = dense_hessian(mlp, images, labels)
    damping = 0.1 - float(torch.linalg.eigvalsh(hessian)[0])  # an MLP's Hessian has negative eigenvalues
    exact = exact_scores(hessian, damping, gradients[:3], gradients)
    found = ns.compute_influences(
        mlp, blobs, blobs, range(3), solver="cg", curvature="hessian", damping=damping, tolerance=1e-8, samples=40,
        measure="loss", device="cpu",
    )  # fmt: skip
    assert relative_error(found.scores, exact) < 1e-4
    assert found.health.largest_eigenvalue == pytest.approx(float(torch.linalg.eigvalsh(hessian).abs().max()), rel=0.05)


def test_negative_curvature_is_an_error_that_says_what_to_do(blobs, mlp):
    with pytest.raises(ns.NonFiniteError, match="raise damping"):
        ns.compute_influences(
            mlp, blobs, blobs, range(3), solver="cg", curvature="hessian", damping=1e-4, samples=40, measure="loss",
            device="cpu",
        )  # fmt: skip


def lissa(model, data, **changes):
    defaults = {"solver": "lissa", "damping": 0.05, "samples": 40, "batch_size": 40, "measure": "loss", "device": "cpu"}
    return ns.compute_influences(model, data, data, range(3), **{**defaults, **changes})


def test_lissa_converges_with_depth_and_does_not_depend_on_its_scale(blobs, softmax):
    gradients = loop_gradients(softmax, *blobs)
    exact = exact_scores(dense_hessian(softmax, *blobs), 0.05, gradients[:3], gradients)
    errors = [
        relative_error(lissa(softmax, blobs, iterations=depth, scale=4.0).scores, exact) for depth in (1, 30, 600)
    ]
    assert errors[0] > 2 * errors[1] > 20 * errors[2]
    assert errors[2] < 1e-3
    doubled = lissa(softmax, blobs, iterations=800, scale=8.0)
    assert relative_error(doubled.scores, exact) < 1e-3
    assert doubled.health.residual < 1e-2


def test_lissa_with_small_batches_finds_its_scale_and_comes_near(blobs, softmax):
    gradients = loop_gradients(softmax, *blobs)
    exact = exact_scores(dense_hessian(softmax, *blobs), 0.05, gradients[:3], gradients)
    found = lissa(softmax, blobs, iterations=400, batch_size=8, repeats=4)
    assert relative_error(found.scores, exact) < 0.35


def test_lissa_that_diverges_is_an_error_not_a_picture(blobs, softmax):
    with pytest.raises(ns.NonFiniteError, match="raise scale"):
        lissa(softmax, blobs, iterations=2000, scale=0.01)


def test_identity_is_the_gradient_dot_product(blobs, mlp):
    gradients = loop_gradients(mlp, *blobs)
    found = ns.compute_influences(
        mlp, blobs, blobs, range(3), solver="identity", measure="loss", damping=1.0, device="cpu"
    )
    assert relative_error(found.scores, gradients[:3] @ gradients.T / 40) < 1e-12


# ── the sign, by retraining ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def regression():
    """150 real 8 × 8 digits (0, 1, 2) as an L2-regularised softmax regression, with 30 test images."""
    train, test = ns.load_data("digits")
    parts = []
    for data, count in ((train, 150), (test, 30)):
        chosen = torch.where(data.labels < 3)[0][:count]
        features = ns.normalise(data.images[chosen, 0, 2::8, 2::8]).double().flatten(1)
        parts.append(
            (
                features + 0.5 * torch.randn(features.shape, generator=torch.Generator().manual_seed(count)),
                data.labels[chosen],
            )
        )
    return *parts, 0.02


def test_influence_agrees_with_leave_one_out_retraining_in_size_and_sign(regression):
    train, test, l2 = regression
    model = ns.fit_softmax_regression(*train, l2)
    truth = np.array([ns.removal_effect(train, test, l2, [k]) for k in range(len(train[1]))])
    found = ns.mean_influences(model, train, test, solver="cg", measure="loss", damping=l2, tolerance=1e-8, samples=150)
    assert np.corrcoef(found, truth)[0, 1] > 0.99
    assert 0.7 < np.polyfit(truth, found, 1)[0] < 1.1  # first order: a point with leverage matters a little more


def test_removing_the_harmful_lowers_the_test_loss_and_removing_the_helpful_raises_it(regression):
    train, test, l2 = regression
    model = ns.fit_softmax_regression(*train, l2)
    for solver, measure in (("kernel", "margin"), ("kernel", "loss"), ("cg", "loss")):
        for i in range(5):
            one = (test[0][i : i + 1], test[1][i : i + 1])
            found = ns.compute_influences(model, train, one, solver=solver, measure=measure, damping=l2, samples=150)
            assert ns.removal_effect(train, one, l2, found.harmful(0, 5)) < 0
            assert ns.removal_effect(train, one, l2, found.helpful(0, 5)) > 0


def test_the_package_swaps_the_sign_and_ignores_its_depth(regression):
    train, test, l2 = regression
    model = ns.fit_softmax_regression(*train, l2)
    one = (test[0][:1], test[1][:1])
    runs = [ns.run_package(model, TensorDataset(*train), TensorDataset(*one), depth, 25.0, 150) for depth in (1, 40)]
    assert np.array_equal(runs[0].influence, runs[1].influence)
    ours = ns.compute_influences(model, train, one, solver="cg", measure="loss", damping=l2, samples=150).scores[0]
    assert np.corrcoef(runs[0].influence, ours)[0, 1] < -0.5
    assert runs[0].seconds_for(depth=10, images=300, measured_depth=1) == pytest.approx(
        10 * runs[0].seconds_solve + 2 * runs[0].seconds_score
    )


# ── any model ────────────────────────────────────────────────────────────────────────────────────────────────────


class Shared(nn.Module):
    """One layer called twice, and one weight used by two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.head, self.tied = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3)).repeat(1, 2)
        return self.tied(torch.tanh(self.head(torch.tanh(self.twice(torch.tanh(self.twice(x)))))))


class Functional(nn.Module):
    """A layer's weight used behind the layer's back: hooks cannot see it, so the fast path must notice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3))) + F.linear(x.amax((2, 3)), self.fc.weight)


class Tokens(nn.Module):
    """Linear layers applied at every position, with LayerNorm in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Linear(24, 7), nn.LayerNorm(7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(
            torch.relu(self.norm(self.embed(x.flatten(2).unflatten(2, (-1, 8)).flatten(1).unflatten(1, (-1, 24)))))
        ).mean(1)


ZOO = {
    "plain": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5)),
    "padded": lambda: nn.Sequential(
        nn.Conv2d(3, 4, (3, 5), padding=(1, 2)), nn.Tanh(), nn.Flatten(), nn.Linear(256, 5)
    ),
    "no bias": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(144, 5, bias=False)),
    "strided": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 5)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, padding="same"), nn.Flatten(), nn.Linear(384, 5)),
    "norm": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5)
    ),
    "shared": Shared,
    "functional": Functional,
    "tokens": Tokens,
    "bare": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5)),
}


def from_the_zoo(name: str, frozen: bool, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = ZOO[name]().double()
    if frozen and len(list(model.parameters())) > 2:
        next(model.parameters()).requires_grad_(False)
    return model


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_architecture_gets_the_same_scores_as_a_loop(name, frozen):
    model = from_the_zoo(name, frozen, seed=0)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(9, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (9,), generator=generator)
    gradients = loop_gradients(model, images, labels)
    found = ns.compute_influences(
        model, (images, labels), (images, labels), range(3), solver="identity", measure="loss", damping=1.0, chunk=4
    )
    assert relative_error(found.scores, gradients[:3] @ gradients.T / 9) < 1e-9


def test_the_fast_path_covers_all_of_net_and_nothing_doubtful():
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    problem = ns._make_problem(ns.Net(), (images, labels), ns.InfluenceSettings(device="cpu"))
    assert ns._fast_layers(problem) == ("conv1", "conv2", "fc1", "fc2", "fc3")
    doubtful = ns._make_problem(Functional(), (images, labels % 3), ns.InfluenceSettings(device="cpu"))
    assert ns._fast_layers(doubtful) == ()


def test_the_model_is_left_exactly_as_it_was():
    torch.manual_seed(0)
    model = ZOO["norm"]()
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    before = copy.deepcopy(model.state_dict())
    flags = [(param.requires_grad, param.grad is None) for param in model.parameters()]
    modes = [module.training for module in model.modules()]
    data = (torch.rand(8, 3, 8, 8), torch.arange(8) % 5)
    for solver in ns.SOLVERS:
        found = ns.compute_influences(model, data, data, [0], solver=solver, damping=1.0, iterations=5, device="cpu")
        assert isinstance(found.scores, np.ndarray)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(param.requires_grad, param.grad is None) for param in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


# ── invariances ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def digits_net():
    train, test = ns.load_data("digits")
    ns.seed_everything(0)
    model = ns.Net()
    ns.train_model(model, train.subset(range(300)), ns.TrainConfig(epochs=2, batch_size=32))
    return model, train.subset(range(300)), test.subset(range(50))


def scores(digits_net, **changes):
    model, train, test = digits_net
    return ns.compute_influences(model, train, test, range(4), **{"samples": 100, "device": "cpu", **changes}).scores


def test_two_runs_with_one_seed_give_the_same_bits_and_another_seed_does_not(digits_net):
    assert np.array_equal(scores(digits_net), scores(digits_net))
    assert not np.allclose(scores(digits_net), scores(digits_net, seed=1), rtol=1e-3)


def test_chunk_size_does_not_matter(digits_net):
    expected = scores(digits_net, chunk=300)
    for chunk in (1, 7, 64):
        assert np.abs(scores(digits_net, chunk=chunk) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_two_workers_give_the_scores_of_one(digits_net, backend):
    expected = scores(digits_net, chunk=100)
    with joblib.parallel_config(backend=backend):
        found = scores(digits_net, chunk=100, jobs=2)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_number_of_torch_threads_does_not_matter(digits_net):
    expected, threads = scores(digits_net), torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        found = scores(digits_net)
    finally:
        torch.set_num_threads(threads)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_order_of_the_images_does_not_matter(blobs, mlp):
    images, labels = blobs
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    settings = ns.InfluenceSettings(solver="cg", measure="loss", damping=0.05, samples=40, tolerance=1e-10)
    straight = ns.compute_influences(mlp, blobs, blobs, range(6), settings).scores
    shuffled = ns.compute_influences(mlp, (images[order], labels[order]), blobs, [5, 4, 3, 2, 1, 0], settings).scores
    assert np.allclose(shuffled[::-1], straight[:, order], rtol=1e-6, atol=1e-12)


class Pairs(Dataset):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def test_tensors_image_data_and_data_sets_are_the_same_data(digits_net):
    model, train, test = digits_net
    expected = scores(digits_net)
    images, labels = train.batch(torch.arange(len(train)))
    for kind in ((images, labels), Pairs(images, labels), TensorDataset(images, labels), train):
        assert np.array_equal(scores((model, kind, test)), expected)


def test_mean_and_self_influences_are_row_mean_and_diagonal(blobs, mlp):
    settings = ns.InfluenceSettings(damping=0.05, samples=40, device="cpu", chunk=7)
    full = ns.compute_influences(mlp, blobs, blobs, None, settings)
    assert full.scores.shape == (40, 40)
    assert np.allclose(ns.mean_influences(mlp, blobs, blobs, settings), full.mean(), rtol=1e-9, atol=1e-14)
    assert np.allclose(ns.self_influences(mlp, blobs, None, settings), np.diag(full.scores), rtol=1e-9)
    assert np.allclose(ns.self_influences(mlp, blobs, [3, 1], settings), np.diag(full.scores)[[3, 1]], rtol=1e-9)


def test_a_constant_test_loss_has_no_influence(blobs, mlp):
    def constant(outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.sum(1) * 0 + 3

    found = ns.compute_influences(mlp, blobs, blobs, [0], measure=constant, damping=1.0, device="cpu")
    assert not found.scores.any()


def test_the_margin_is_the_log_odds_of_the_label():
    logits = torch.randn(6, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    p = logits.softmax(1)[torch.arange(6), labels]
    assert torch.allclose(ns.margin_measure(logits, labels), -torch.log(p / (1 - p)))


def test_the_automatic_damping_is_the_mean_eigenvalue_of_the_gram_matrix(blobs, mlp):
    problem = ns._make_problem(mlp, blobs, ns.InfluenceSettings(samples=10, device="cpu"))
    eigenvalues = torch.linalg.eigvalsh(problem.rows @ problem.rows.T / 10)
    assert problem.damping == pytest.approx(float(eigenvalues.mean()), rel=1e-9)


# ── the result ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def result() -> ns.Influences:
    health = ns.Health("kernel", 1e-6, 0.1, 3.0, 0, 5, 0.5, 0.25)
    table = np.array([[0.5, -1.0, 0.0, 2.0], [1.0, 1.0, -3.0, 0.25]], dtype=np.float32)
    return ns.Influences(
        table, np.array([7, 9]), np.array([0, 1]), np.array([0, 1, 1, 0]), {"solver": "kernel"}, health
    )


def test_helpful_and_harmful_are_sorted_and_break_ties_by_index(result):
    assert result.helpful(0, 2).tolist() == [3, 0]
    assert result.harmful(0, 2).tolist() == [1, 2]
    assert result.helpful(1, 2).tolist() == [0, 1]
    assert result.harmful(1, 4).tolist() == [2, 3, 0, 1]
    assert result.mean().tolist() == [0.75, 0.0, -1.5, 1.125]


@pytest.mark.parametrize(("row", "k", "words"), [(2, 1, "row 2"), (-1, 1, "row -1"), (0, 5, "1..4"), (0, 0, "1..4")])
def test_rows_and_counts_that_do_not_exist_are_errors(result, row, k, words):
    with pytest.raises(ValueError, match=words):
        result.helpful(row, k)


def test_the_frame_has_one_row_a_pair(result):
    frame = result.to_frame()
    assert len(frame) == 8
    assert frame.iloc[6].to_dict() == {
        "test_index": 9, "test_label": 1, "train_index": 2, "train_label": 1, "score": -3.0,
    }  # fmt: skip


def test_save_and_load_keep_everything(result, tmp_path):
    path = tmp_path / "deep" / "influences.npz"
    result.save(path)
    again = ns.Influences.load(path)
    assert np.array_equal(again.scores, result.scores)
    assert again.scores.dtype == np.float32
    assert again.health == result.health
    assert again.settings == result.settings
    assert [entry.name for entry in path.parent.iterdir()] == ["influences.npz"]


def test_a_damaged_or_foreign_file_is_named_and_left_alone(result, tmp_path):
    path = tmp_path / "influences.npz"
    result.save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not a zip file", b""):
        path.write_bytes(damaged)
        with pytest.raises(ns.CorruptFileError, match=r"influences\.npz"):
            ns.Influences.load(path)
        assert path.read_bytes() == damaged
    with pytest.raises(FileNotFoundError, match="no influences"):
        ns.Influences.load(tmp_path / "missing.npz")


# ── inner products instead of directions ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("measure", ["margin", "loss"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_inner_products_give_the_scores_of_the_directions(name, frozen, measure, monkeypatch):
    model = from_the_zoo(name, frozen, seed=4)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(11, 3, 8, 8, generator=generator, dtype=torch.float64)
    data = (images, torch.randint(0, 3, (11,), generator=generator))
    settings = ns.InfluenceSettings(measure=measure, samples=7, damping=0.1, chunk=4, device="cpu")
    found = {}
    for dual in (False, True):
        monkeypatch.setattr(ns, "_dual_pays", lambda *_, dual=dual: dual)
        found[dual] = (
            ns.compute_influences(model, data, data, [0, 5, 9], settings),
            ns.self_influences(model, data, [0, 5, 9], settings),
        )
    assert relative_error(found[True][0].scores, torch.as_tensor(found[False][0].scores)) < 1e-9
    assert relative_error(found[True][1], torch.as_tensor(found[False][1])) < 1e-9
    assert found[True][0].health.residual < 1e-9
    assert found[True][0].health.largest_eigenvalue == pytest.approx(found[False][0].health.largest_eigenvalue)


def test_the_residual_of_the_inner_products_notices_a_wrong_solution(blobs, mlp):
    problem = ns._make_problem(mlp, blobs, ns.InfluenceSettings(samples=20, damping=0.1, device="cpu"))
    solver = ns._DualKernel(problem, ns._fast_layers(problem))
    tests, _ = ns._test_factors(problem, solver, problem.train, torch.arange(3))
    assert solver.solve(tests)[1].residual < 1e-12
    solver.factor = solver.factor * 1.1
    assert solver.solve(tests)[1].residual > 1e-3


def test_the_cheaper_road_is_taken_and_both_choose_the_same_damping():
    images, labels = torch.rand(60, 3, 32, 32), torch.arange(60) % 10
    problem = ns._make_problem(ns.Net(), (images, labels), ns.InfluenceSettings(samples=20, device="cpu"))
    layers = ns._fast_layers(problem)
    assert not ns._dual_pays(problem, layers, 1)
    assert ns._dual_pays(problem, layers, 50)
    assert not ns._dual_pays(dataclasses.replace(problem, settings=ns.InfluenceSettings(solver="cg")), layers, 50)
    solver = ns._DualKernel(problem, layers)
    assert solver.sample.width < 4_000 < sum(param.numel() for param in problem.params.values())
    assert solver.damping == pytest.approx(problem.damping, rel=1e-5)
    products = solver.sample.products(solver.sample)
    assert torch.allclose(products, problem.rows @ problem.rows.T, rtol=1e-4, atol=1e-4 * float(products.abs().max()))
