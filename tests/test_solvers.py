"""Solvers against dense inverses, and against real retraining."""

import numpy as np
import pytest
import torch
from references import (
    ZOO,
    dense_hessian,
    exact_scores,
    from_the_zoo,
    loop_gradients,
    relative_error,
    squared_error,
)
from torch import nn
from torch.utils.data import TensorDataset

import influence_functions.compat as ptif
import notebook_support as ns
from influence_functions import (
    MEASURES,
    InfluenceSettings,
    NonFiniteError,
    compute_influences,
    kronecker,
    mean_influences,
    self_influences,
    sweep_damping,
)
from influence_functions.exact import fit_softmax_regression, removal_effect
from influence_functions.problem import make_problem
from influence_functions.solvers import Kernel, ekfac_kernel, prepare


@pytest.mark.parametrize("kind", ["linear", "logistic", "mlp"])
def test_kernel_with_all_samples_equals_the_dense_inverse_of_the_same_matrix(kind, blobs, mlp, softmax):
    images, labels = blobs
    model, measure = {"logistic": (softmax, "loss"), "mlp": (mlp, "loss")}.get(kind, (nn.Linear(5, 1).double(), None))
    if measure is None:
        measure, labels = squared_error, labels.double()
    function = MEASURES[measure].values if isinstance(measure, str) else measure
    settings = InfluenceSettings(measure=measure, damping=0.03, samples=40, device="cpu")
    rows = make_problem(model, (images, labels), settings).sampled.dense()
    gradients = loop_gradients(model, images, labels, function)
    exact = exact_scores(rows.T @ rows / 40, 0.03, gradients[:4], gradients)
    found = compute_influences(model, (images, labels), (images, labels), range(4), settings)
    assert relative_error(found.scores, exact) < 1e-6
    assert found.health.residual < 1e-10


def test_sampled_fisher_tends_to_the_gauss_newton_matrix(blobs, softmax):
    images, labels = blobs
    many = (images.repeat(500, 1), labels.repeat(500))
    settings = InfluenceSettings(measure="loss", samples=20_000, device="cpu")
    rows = make_problem(softmax, many, settings).sampled.dense()
    exact = dense_hessian(softmax, images, labels)  # for a linear model the Hessian is the Gauss-Newton matrix
    assert relative_error(rows.T @ rows / len(rows), exact) < 0.03


@pytest.mark.parametrize("kind", ["linear", "logistic"])
def test_cg_equals_the_dense_inverse_of_the_hessian(kind, blobs, softmax):
    images, labels = blobs
    model, measure = (softmax, MEASURES["loss"].values)
    if kind == "linear":
        model, measure, labels = nn.Linear(5, 1).double(), squared_error, labels.double()
    gradients = loop_gradients(model, images, labels, measure)
    exact = exact_scores(dense_hessian(model, images, labels, measure), 0.01, gradients[:3], gradients)
    for curvature in ("gauss_newton", "hessian"):
        found = compute_influences(
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
    found = compute_influences(
        mlp, blobs, blobs, range(3), solver="cg", curvature="hessian", damping=damping, tolerance=1e-8, samples=40,
        measure="loss", device="cpu",
    )  # fmt: skip
    assert relative_error(found.scores, exact) < 1e-4
    assert found.health.largest_eigenvalue == pytest.approx(float(torch.linalg.eigvalsh(hessian).abs().max()), rel=0.05)


def test_negative_curvature_is_an_error_that_says_what_to_do(blobs, mlp):
    with pytest.raises(NonFiniteError, match="raise damping"):
        compute_influences(
            mlp, blobs, blobs, range(3), solver="cg", curvature="hessian", damping=1e-4, samples=40, measure="loss",
            device="cpu",
        )  # fmt: skip


def lissa(model, data, **changes):
    defaults = {"solver": "lissa", "damping": 0.05, "samples": 40, "batch_size": 40, "measure": "loss", "device": "cpu"}
    return compute_influences(model, data, data, range(3), **{**defaults, **changes})


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
    with pytest.raises(NonFiniteError, match="raise scale"):
        lissa(softmax, blobs, iterations=2000, scale=0.01)


def test_identity_is_the_gradient_dot_product(blobs, mlp):
    gradients = loop_gradients(mlp, *blobs)
    found = compute_influences(
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
    model = fit_softmax_regression(*train, l2)
    truth = np.array([removal_effect(train, test, l2, [k]) for k in range(len(train[1]))])
    found = mean_influences(model, train, test, solver="cg", measure="loss", damping=l2, tolerance=1e-8, samples=150)
    assert np.corrcoef(found, truth)[0, 1] > 0.99
    assert 0.7 < np.polyfit(truth, found, 1)[0] < 1.1  # first order: a point with leverage matters a little more


def test_removing_the_harmful_lowers_the_test_loss_and_removing_the_helpful_raises_it(regression):
    train, test, l2 = regression
    model = fit_softmax_regression(*train, l2)
    for solver, measure in (("kernel", "margin"), ("kernel", "loss"), ("cg", "loss")):
        for i in range(5):
            one = (test[0][i : i + 1], test[1][i : i + 1])
            found = compute_influences(model, train, one, solver=solver, measure=measure, damping=l2, samples=150)
            assert removal_effect(train, one, l2, found.harmful(0, 5)) < 0
            assert removal_effect(train, one, l2, found.helpful(0, 5)) > 0


def test_the_package_swaps_the_sign_and_ignores_its_depth(regression):
    train, test, l2 = regression
    model = fit_softmax_regression(*train, l2)
    one = (test[0][:1], test[1][:1])
    runs = [ptif.run_original(model, TensorDataset(*train), TensorDataset(*one), depth, 25.0, 150) for depth in (1, 40)]
    assert np.array_equal(runs[0].influence, runs[1].influence)
    ours = compute_influences(model, train, one, solver="cg", measure="loss", damping=l2, samples=150).scores[0]
    assert np.corrcoef(runs[0].influence, ours)[0, 1] < -0.5
    assert runs[0].seconds_for(depth=10, images=300, measured_depth=1) == pytest.approx(
        10 * runs[0].seconds_solve + 2 * runs[0].seconds_score
    )


# ── inner products instead of directions ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("measure", ["margin", "loss"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_inner_products_give_the_scores_of_the_directions(name, frozen, measure, monkeypatch):
    model = from_the_zoo(name, frozen, seed=4)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(11, 3, 8, 8, generator=generator, dtype=torch.float64)
    data = (images, torch.randint(0, 3, (11,), generator=generator))
    settings = InfluenceSettings(measure=measure, samples=7, damping=0.1, chunk=4, device="cpu")
    found = {}
    for dual in (False, True):
        asked: list[int] = []
        monkeypatch.setattr(Kernel, "pays", lambda _, m, dual=dual, asked=asked: asked.append(m) or dual)
        found[dual] = (
            compute_influences(model, data, data, [0, 5, 9], settings),
            self_influences(model, data, [0, 5, 9], settings),
        )
        assert asked == [3, 3], "the patch was not met"
    assert relative_error(found[True][0].scores, torch.as_tensor(found[False][0].scores)) < 1e-9
    assert relative_error(found[True][1], torch.as_tensor(found[False][1])) < 1e-9
    assert found[True][0].health.residual < 1e-9
    assert found[True][0].health.largest_eigenvalue == pytest.approx(found[False][0].health.largest_eigenvalue)


def test_the_residual_of_the_inner_products_notices_a_wrong_solution(blobs, mlp):
    problem = make_problem(mlp, blobs, InfluenceSettings(samples=20, damping=0.1, device="cpu"))
    solver = Kernel(problem)
    tests, _ = problem.gradients(problem.train, torch.arange(3))
    assert solver.by_products(tests).health.residual < 1e-12
    solver.factors = {0.1: solver.factor(0.1) * 1.1}
    assert solver.by_products(tests).health.residual > 1e-3
    assert solver.by_directions(tests).health.residual > 1e-3


def test_the_cheaper_road_is_taken_and_both_choose_the_same_damping():
    images, labels = torch.rand(60, 3, 32, 32), torch.arange(60) % 10
    problem = make_problem(ns.Net(), (images, labels), InfluenceSettings(samples=20, device="cpu"))
    damping = problem.damping  # before the gradients are held, from their sizes alone
    solver = Kernel(problem)
    assert not solver.pays(1)
    assert solver.pays(50)
    assert solver.sample.width < 4_000 < solver.sample.size == 62_006
    assert damping == pytest.approx(float(solver.sample.squares().mean()) / 20, rel=1e-5)
    rows = solver.sample.dense()
    products = solver.sample.products(solver.sample)
    assert torch.allclose(products, rows @ rows.T, rtol=1e-4, atol=1e-4 * float(products.abs().max()))


# ── eigenvalue-corrected Kronecker factors ───────────────────────────────────────────────────────────────────────


def by_hand(problem, sheets_of, damping):
    """(p, p) curvature + λI from its definition: full matrices, one Kronecker product a sheet, parameters in order."""
    rows, places = problem.sampled.dense(), problem.sampled.places
    whole = torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype)
    for shapes, block in zip(problem.maker.shapes(), places):
        columns = torch.cat([torch.arange(place.start, place.stop) for place in block])
        for sheet in sheets_of(shapes):
            grid = sheet.cut(columns[None].double())[0].long()  # (o, d): which parameter each entry is
            gradients = rows[:, grid.flatten()].unflatten(1, grid.shape)
            left = torch.linalg.eigh(sum(g @ g.T for g in gradients)).eigenvectors
            right = torch.linalg.eigh(sum(g.T @ g for g in gradients)).eigenvectors
            vectors = torch.kron(left, right)
            values = (gradients.flatten(1) @ vectors).square().mean(0)
            whole[grid.flatten()[:, None], grid.flatten()] = vectors @ torch.diag(values) @ vectors.T
    return whole + damping * torch.eye(len(whole), dtype=rows.dtype)


@pytest.mark.parametrize("exact", [0, 60, 10_000])
@pytest.mark.parametrize("measure", ["margin", "loss"])
@pytest.mark.parametrize("name", ZOO)
def test_ekfac_equals_its_definition_by_full_matrices(name, measure, exact, monkeypatch):
    monkeypatch.setattr(kronecker, "EXACT", exact)
    model = from_the_zoo(name, frozen=False, seed=6)
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(13, 3, 8, 8, generator=generator, dtype=torch.float64)
    data = (images, torch.randint(0, 3, (13,), generator=generator))
    settings = InfluenceSettings(solver="ekfac", measure=measure, samples=13, damping=0.1, chunk=5, device="cpu")
    found = compute_influences(model, data, data, [0, 5, 9], settings)
    gradients = loop_gradients(model, *data, MEASURES[measure].values)
    damped = by_hand(make_problem(model, data, settings), kronecker.sheets, 0.1)
    exact_solution = gradients[[0, 5, 9]] @ torch.linalg.inv(damped) @ gradients.T / 13
    assert relative_error(found.scores, exact_solution) < 1e-8
    assert found.health.residual < 1e-10
    own = self_influences(model, data, [0, 5, 9], settings)
    assert relative_error(own, exact_solution[[0, 1, 2], [0, 5, 9]]) < 1e-8
    mean = mean_influences(model, data, data, settings)
    everything = compute_influences(model, data, data, settings=settings).scores
    assert relative_error(mean, torch.as_tensor(everything.mean(0))) < 1e-8


@pytest.mark.parametrize("exact", [0, 60])
@pytest.mark.parametrize("name", ZOO)
def test_ekfac_kernel_equals_its_definition_by_full_matrices(name, exact, monkeypatch):
    """GᵀG/r + μD, with D the curvature of ekfac and its damping, and μ from the Gram matrix in its metric."""
    monkeypatch.setattr(kronecker, "EXACT", exact)
    monkeypatch.setattr(ekfac_kernel, "SAMPLES", 7)
    model = from_the_zoo(name, frozen=False, seed=6)
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(13, 3, 8, 8, generator=generator, dtype=torch.float64)
    data = (images, torch.randint(0, 3, (13,), generator=generator))
    settings = InfluenceSettings(solver="ekfac_kernel", samples=13, damping=0.1, chunk=5, device="cpu")
    found = compute_influences(model, data, data, [0, 5, 9], settings)
    gradients, problem = loop_gradients(model, *data, MEASURES["margin"].values), make_problem(model, data, settings)
    metric, rows = by_hand(problem, kronecker.sheets, 0.1), problem.sampled.dense()[:7]
    mu = float((rows @ torch.linalg.inv(metric) * rows).sum(1).mean()) / 7
    exact_solution = gradients @ torch.linalg.inv(rows.T @ rows / 7 + mu * metric) @ gradients.T / 13
    assert relative_error(found.scores, exact_solution[[0, 5, 9]]) < 1e-8
    assert (found.health.solver, found.health.damping) == ("ekfac_kernel", 0.1)
    assert found.health.residual < 1e-10
    own = self_influences(model, data, [0, 5, 9], settings)
    assert relative_error(own, exact_solution.diagonal()[[0, 5, 9]]) < 1e-8


def test_a_small_model_has_its_exact_fisher_matrix_in_ekfac(blobs, softmax):
    settings = InfluenceSettings(measure="loss", damping=0.03, samples=40, device="cpu")
    one, other = (compute_influences(softmax, blobs, blobs, range(4), settings, solver=s) for s in ("kernel", "ekfac"))
    assert relative_error(one.scores, torch.as_tensor(other.scores)) < 1e-9


def test_ekfac_takes_twice_the_mean_eigenvalue_for_damping_and_a_sweep_keeps_to_it(blobs, mlp):
    problem = make_problem(mlp, blobs, InfluenceSettings(solver="ekfac", samples=40, device="cpu"))
    trace = float(problem.sampled.squares().mean())
    parameters = sum(param.numel() for param in mlp.parameters())
    swept = sweep_damping(mlp, blobs, blobs, (1, 5), solver="ekfac", samples=40, device="cpu")
    assert swept[1].health.damping == pytest.approx(2 * trace / parameters)
    again = compute_influences(mlp, blobs, blobs, solver="ekfac", samples=40, damping=swept[5].health.damping)
    assert relative_error(swept[5].scores, torch.as_tensor(again.scores)) < 1e-12


def test_ekfac_serves_tables_shared_weights_and_sides_that_are_too_long(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 6), nn.Flatten(), nn.Linear(24, 4)).double()
    data = (torch.randint(0, 50, (30, 4)), torch.arange(30) % 4)
    settings = InfluenceSettings(solver="ekfac", samples=30, damping=0.1, device="cpu")
    monkeypatch.setattr(kronecker, "EXACT", 0)
    rows = loop_gradients(model, *data, MEASURES["margin"].values)
    table = rows[:, :300].unflatten(1, (50, 6))
    directions = torch.linalg.eigh(torch.einsum("nri,nrj->ij", table, table)).eigenvectors
    values = (table @ directions).square().mean(0)
    part = torch.einsum("mri,nri->mn", (table[[1, 2]] @ directions) / (values + 0.1), table @ directions)
    frozen = nn.Sequential(*model)
    frozen[2].requires_grad_(False)
    alone = compute_influences(frozen, data, data, [1, 2], settings)
    assert relative_error(alone.scores * 30, part) < 1e-9
    assert relative_error(self_influences(frozen, data, [1], settings) * 30, part[:1, 1]) < 1e-9
    both = [
        compute_influences(each, data, data, [1], settings, solver="ekfac_kernel").health for each in (model, frozen)
    ]
    assert max(health.residual for health in both) < 1e-9
    monkeypatch.setattr(kronecker, "LONGEST", 10)
    linear = nn.Linear(24, 4, bias=False).double()
    inputs = torch.randn(30, 24, dtype=torch.float64)
    found = compute_influences(linear, (inputs, data[1]), (inputs, data[1]), [1, 2], settings)
    rows = loop_gradients(linear, inputs, data[1], MEASURES["margin"].values).unflatten(1, (4, 24))
    left = torch.linalg.eigh(torch.einsum("noi,npi->op", rows, rows)).eigenvectors
    turned = torch.einsum("noi,op->npi", rows, left)
    exact = torch.einsum("mpi,npi->mn", turned[[1, 2]] / (turned.square().mean(0) + 0.1), turned)
    assert relative_error(found.scores * 30, exact) < 1e-9


def test_features_that_are_never_used_cost_nothing_and_change_nothing():
    """A 3 × 3 kernel on images of one pixel meets padding in eight of its nine places."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(40, 40, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3)).double()
    data = (torch.randn(20, 40, 1, 1, dtype=torch.float64), torch.arange(20) % 3)
    prepared = prepare(make_problem(model, data, InfluenceSettings(solver="ekfac", samples=20, device="cpu")))
    side = next(one.basis.right for one in prepared.fitted if one.sheet.rows == 40)
    assert len(side.used) == 41  # its inputs, and the bias
    small = nn.Sequential(nn.Conv2d(40, 40, 1), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3)).double()
    with torch.no_grad():
        small[0].weight.copy_(model[0].weight[:, :, 1:2, 1:2])
    small[0].bias, small[3] = model[0].bias, model[3]
    given = {"solver": "ekfac", "samples": 20, "damping": 0.01, "device": "cpu"}
    one, other = (compute_influences(each, data, data, range(3), **given).scores for each in (model, small))
    assert relative_error(one, torch.as_tensor(other)) < 1e-9
