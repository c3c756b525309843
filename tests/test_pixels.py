"""Pixel influences: against refits of exact models, against dense formulas, and by really changing a pixel."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import ZOO, dense_hessian, from_the_zoo, relative_error
from torch import Tensor, nn

import notebook_support as ns
from influence_functions import MEASURES, SOLVERS, InfluenceSettings, compute_influences, pixel_influences
from influence_functions.exact import fit_softmax_regression
from influence_functions.problem import make_problem
from influence_functions.solvers import prepare

EXACT = {"solver": "cg", "measure": "loss", "samples": 10_000, "tolerance": 1e-12}


def refitted(features: Tensor, labels: Tensor, l2: float) -> Tensor:
    """(C, d) weights of the softmax regression with this minimum, to the last digits: a few Newton steps more."""
    weight = fit_softmax_regression(features, labels, l2).weight.detach()

    def objective(flat: Tensor) -> Tensor:
        return F.cross_entropy(features @ flat.view_as(weight).T, labels) + l2 / 2 * flat.square().sum()

    flat = weight.flatten()
    for _ in range(3):
        slope, curvature = torch.func.grad(objective)(flat), torch.func.hessian(objective)(flat)
        flat = flat - torch.linalg.solve(curvature, slope)
    return flat.view_as(weight)


def as_model(weight: Tensor) -> nn.Linear:
    model = nn.Linear(weight.shape[1], len(weight), bias=False, dtype=weight.dtype)
    model.load_state_dict({"weight": weight})
    return model


def mixed(model: nn.Module, images: Tensor, labels: Tensor, measure: str = "loss") -> Tensor:
    """(b, p, *shape): the mixed second derivatives, one sample after the other, by jacobians of jacobians."""
    params = {name: param.detach() for name, param in model.named_parameters() if param.requires_grad}

    def slope(image: Tensor, label: Tensor) -> Tensor:
        def value(values: dict[str, Tensor]) -> Tensor:
            outputs = torch.func.functional_call(model.eval(), values, (image[None],))
            return MEASURES[measure].values(outputs, label[None]).sum()

        return torch.cat([part.flatten() for part in torch.func.grad(value)(params).values()])

    return torch.stack([torch.func.jacrev(slope)(image, label) for image, label in zip(images, labels)])


def directions(model: nn.Module, data: tuple[Tensor, Tensor], tests: list[int], **changes: object) -> Tensor:
    """(m, p): what the solver itself says."""
    problem = make_problem(model, data, InfluenceSettings().changed(changes))
    source = problem.train
    return prepare(problem, len(tests)).solve(problem.gradients(source, torch.tensor(tests))[0]).directions()


# ── how it is checked: three ways ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("classes", [2, 3])
def test_it_is_the_slope_of_refitted_losses(blobs, classes):
    points, labels = blobs[0], blobs[1] % classes
    l2, trains, tests, step = 0.05, [0, 7, 21], [3, 4], 1e-4
    model = as_model(refitted(points, labels, l2))
    found = pixel_influences(model, (points, labels), (points, labels), trains, tests, damping=l2, **EXACT)
    expected = np.zeros((2, 3, 5))
    for j, index in enumerate(trains):
        for pixel in range(5):
            losses = []
            for sign in (1, -1):
                moved = points.clone()
                moved[index, pixel] += sign * step
                outputs = points[tests] @ refitted(moved, labels, l2).T
                losses.append(F.cross_entropy(outputs, labels[tests], reduction="none"))
            expected[:, j, pixel] = -(losses[0] - losses[1]) / (2 * step)  # positive: the loss falls
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_it_is_the_dense_formula_on_a_small_network(blobs, mlp):
    points, labels = blobs
    trains, tests, damping = [0, 5, 39], [1, 2], 3.0
    hessian = dense_hessian(mlp, points, labels) + damping * torch.eye(sum(p.numel() for p in mlp.parameters()))
    slopes = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        F.cross_entropy(mlp(points[i : i + 1]), labels[i : i + 1]), [*mlp.parameters()]
                    )
                ]
            )
            for i in tests
        ]
    )
    s = torch.linalg.solve(hessian, slopes.T).T
    expected = torch.einsum("mp,kpd->mkd", s, mixed(mlp, points[trains], labels[trains])) / len(points)
    found = pixel_influences(
        mlp, (points, labels), (points, labels), trains, tests, damping=damping, curvature="hessian", **EXACT
    )
    assert relative_error(found, expected) < 1e-8


def test_a_pixel_that_is_really_changed_does_what_was_foretold():
    train, test = ns.load_data("digits", labels=(3, 5))
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 5, 3), nn.Tanh(), nn.AvgPool2d(3), nn.Flatten()).double().requires_grad_(False)
    images, labels, l2 = ns.normalise(train.images).double(), train.labels, 1e-3
    asked = ns.normalise(test.images[:3]).double(), test.labels[:3]
    model = nn.Sequential(body, as_model(refitted(body(images), labels, l2)))
    trains = [4, 90]
    found = pixel_influences(model, (images, labels), asked, trains, range(3), damping=l2, **EXACT)
    assert found.shape == (3, 2, 3, 32, 32)
    before = F.cross_entropy(model(asked[0]), asked[1], reduction="none")
    level = 2 / 255  # a grey level, in −1..1
    for j, index in enumerate(trains):
        place = np.unravel_index(np.abs(found[0, j]).argmax(), found.shape[2:])
        moved = images.clone()
        moved[(index, *place)] += level
        after = F.cross_entropy(body(asked[0]) @ refitted(body(moved), labels, l2).T, asked[1], reduction="none")
        foretold = -found[(slice(None), j, *place)] * level
        np.testing.assert_allclose((after - before).detach(), foretold, rtol=0.03, atol=0.01 * np.abs(foretold).max())


# ── every solver, every layer ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("measure", ["loss", "margin"])
def test_with_every_solver_it_is_the_gradient_of_its_influence(blobs, mlp, solver, measure):
    options = {"solver": solver, "measure": measure, "damping": 0.5, "samples": 40, "iterations": 50, "batch_size": 20}
    found = pixel_influences(mlp, blobs, blobs, [2, 30], [0, 1, 5], **options)
    s = directions(mlp, blobs, [0, 1, 5], **options)
    expected = torch.einsum("mp,kpd->mkd", s, mixed(mlp, blobs[0][[2, 30]], blobs[1][[2, 30]], measure)) / 40
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_any_layer(name, frozen):
    model = from_the_zoo(name, frozen, seed=0)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(20, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.arange(20) % 3
    options = {"solver": "identity", "measure": "loss", "damping": 1.0}
    found = pixel_influences(model, (images, labels), (images, labels), [3, 11], [0, 1], **options)
    s = directions(model, (images, labels), [0, 1], **options)
    expected = torch.einsum("mp,kpcij->mkcij", s, mixed(model, images[[3, 11]], labels[[3, 11]])) / 20
    assert relative_error(found, expected) < 1e-9


def test_it_is_what_a_small_change_does_to_the_influence(blobs, mlp):
    """With s held fast, that is with the identity for H, the score itself moves by P·δ."""
    (points, labels), delta = (
        blobs,
        1e-5 * torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    options = {"solver": "identity", "measure": "loss", "damping": 1.0}
    slope = pixel_influences(mlp, blobs, blobs, [8], [0, 1], **options)[:, 0]
    moved = points.clone()
    moved[8] += delta
    before, after = (
        compute_influences(mlp, (part, labels), blobs, [0, 1], **options).scores for part in (points, moved)
    )
    np.testing.assert_allclose((after - before)[:, 8], slope @ delta.numpy(), rtol=1e-3)


def test_parts_do_not_matter_and_models_are_averaged(blobs, mlp):
    options = {"damping": 0.2, "measure": "loss"}
    whole = pixel_influences(mlp, blobs, blobs, range(40), [0, 1], **options)
    parts = pixel_influences(mlp, blobs, blobs, range(40), [0, 1], chunk=5, **options)
    np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-12 * np.abs(whole).max())
    other = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    both = pixel_influences([mlp, other], blobs, blobs, [0], [1], **options)
    each = [pixel_influences(one, blobs, blobs, [0], [1], **options) for one in (mlp, other)]
    np.testing.assert_allclose(both, np.mean(each, axis=0))
    assert all(param.requires_grad and param.grad is None for param in mlp.parameters())


def test_an_image_that_the_loss_does_not_see_has_none():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(4, 3)).double()
    images, labels = torch.rand(20, 1, 2, 2, dtype=torch.float64), torch.arange(20) % 3
    images[4] = -1  # behind the ReLU
    found = pixel_influences(model, (images, labels), (images, labels), [4, 5], [0], measure="loss", damping=0.1)
    assert not found[0, 0].any()
    assert found[0, 1].any()


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("train", "trains", "tests", "message"),
    [
        (lambda x, y: ((10 * x).long(), y), [0], [0], r"whole numbers \(torch.int64\).*images.float\(\) / 255"),
        (lambda x, y: ((x,), y), [0], [0], "one tensor of images"),
        (lambda x, y: (x, y), [40], [0], r"training indices must lie in 0\.\.39"),
        (lambda x, y: (x, y), [0], [-1], r"test indices must lie in 0\.\.39"),
        (lambda x, y: (x, y), [], [0], "no training image chosen"),
        (lambda x, y: (x, y), [0], [], "no sample chosen"),
        (lambda x, y: (x, y), [0.5], [0], "must be whole numbers"),
    ],
)
def test_bad_input_is_refused(blobs, mlp, train, trains, tests, message):
    with pytest.raises(ValueError, match=message):
        pixel_influences(mlp, train(*blobs), blobs, trains, tests)


def test_pixels_outside_their_range_are_refused(blobs, mlp):
    low, high = float(blobs[0].min()), float(blobs[0].max())
    within = pixel_influences(mlp, blobs, blobs, [0, 1], [0], limits=(low, high))
    np.testing.assert_array_equal(within, pixel_influences(mlp, blobs, blobs, [0, 1], [0]))
    with pytest.raises(ValueError, match=r"pixels must lie in 0\.\.1; found -.*as the model is given them"):
        pixel_influences(mlp, blobs, blobs, range(40), [0], limits=(0, 1))
    spoilt = blobs[0].clone()
    spoilt[1, 2] = torch.nan
    with pytest.raises(ValueError, match="found nan"):
        pixel_influences(mlp, (spoilt, blobs[1]), blobs, [1], [0])
