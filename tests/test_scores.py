"""What must not matter: order, chunks, threads, processes, the form of the data."""

import joblib
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import notebook_support as ns
from influence_functions import (
    MEASURES,
    Influences,
    InfluenceSettings,
    Source,
    compute_influences,
    mean_influences,
    noisy_copies,
    self_influences,
    sweep_damping,
)
from influence_functions.problem import make_problem

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
    return compute_influences(model, train, test, range(4), **{"samples": 100, "device": "cpu", **changes}).scores


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
    settings = InfluenceSettings(solver="cg", measure="loss", damping=0.05, samples=40, tolerance=1e-10)
    straight = compute_influences(mlp, blobs, blobs, range(6), settings).scores
    shuffled = compute_influences(mlp, (images[order], labels[order]), blobs, [5, 4, 3, 2, 1, 0], settings).scores
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
    settings = InfluenceSettings(damping=0.05, samples=40, device="cpu", chunk=7)
    full = compute_influences(mlp, blobs, blobs, None, settings)
    assert full.scores.shape == (40, 40)
    assert np.allclose(mean_influences(mlp, blobs, blobs, settings), full.mean(), rtol=1e-9, atol=1e-14)
    assert np.allclose(self_influences(mlp, blobs, None, settings), np.diag(full.scores), rtol=1e-9)
    assert np.allclose(self_influences(mlp, blobs, [3, 1], settings), np.diag(full.scores)[[3, 1]], rtol=1e-9)


def test_a_constant_test_loss_has_no_influence(blobs, mlp):
    def constant(outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.sum(1) * 0 + 3

    found = compute_influences(mlp, blobs, blobs, [0], measure=constant, damping=1.0, device="cpu")
    assert not found.scores.any()


def test_the_margin_is_the_log_odds_of_the_label():
    logits = torch.randn(6, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    p = logits.softmax(1)[torch.arange(6), labels]
    assert torch.allclose(MEASURES["margin"].values(logits, labels), -torch.log(p / (1 - p)))


def test_the_automatic_damping_is_the_mean_eigenvalue_of_the_gram_matrix(blobs, mlp):
    problem = make_problem(mlp, blobs, InfluenceSettings(samples=10, device="cpu"))
    eigenvalues = torch.linalg.eigvalsh(problem.sampled.products(problem.sampled) / 10)
    assert problem.damping == pytest.approx(float(eigenvalues.mean()), rel=1e-9)


def test_several_models_are_averaged(blobs, mlp, softmax, tmp_path):
    settings = InfluenceSettings(samples=40, device="cpu", damping=0.05)
    single = [compute_influences(model, blobs, blobs, [0, 1], settings) for model in (mlp, softmax)]
    plain = compute_influences([mlp, softmax], blobs, blobs, [0, 1], settings, average="plain")
    np.testing.assert_allclose(plain.scores, (single[0].scores + single[1].scores) / 2, rtol=1e-12)
    both = compute_influences([mlp, softmax], blobs, blobs, [0, 1], settings)
    spreads = [one.scores.std(1, keepdims=True) for one in single]
    unit = (single[0].scores / spreads[0] + single[1].scores / spreads[1]) / 2
    np.testing.assert_allclose(both.scores, unit * (spreads[0] + spreads[1]) / 2, rtol=1e-12)
    assert both.health.residual == max(one.health.residual for one in single)
    assert [one.residual for one in both.members] == [one.health.residual for one in single]
    assert (both.settings["models"], both.settings["average"]) == (2, "spread")
    both.save(tmp_path / "both.npz")
    assert Influences.load(tmp_path / "both.npz").members == both.members
    mean = mean_influences([mlp, softmax], blobs, blobs, settings, average="plain")
    expected = [mean_influences(model, blobs, blobs, settings) for model in (mlp, softmax)]
    np.testing.assert_allclose(mean, np.mean(expected, axis=0), rtol=1e-12)
    spreads = [one.std() for one in expected]
    mean = mean_influences([mlp, softmax], blobs, blobs, settings)
    np.testing.assert_allclose(mean, sum(a / s for a, s in zip(expected, spreads)) / 2 * np.mean(spreads), rtol=1e-12)
    own = [self_influences(model, blobs, [3], settings) for model in (mlp, softmax)]
    np.testing.assert_allclose(self_influences([mlp, softmax], blobs, [3], settings), np.mean(own, axis=0), rtol=1e-12)
    swept = sweep_damping([mlp, softmax], blobs, blobs, (1,), settings)[1]
    np.testing.assert_allclose(swept.scores[:2], both.scores, rtol=1e-9)
    with pytest.raises(ValueError, match="a sequence of at least one"):
        compute_influences([], blobs, blobs, [0], settings)


def test_the_training_data_is_read_once_for_all_models(blobs, mlp, softmax):
    read = []

    def batch(chosen: Tensor) -> tuple[Tensor, Tensor]:
        read.extend(chosen.tolist())
        return blobs[0][chosen % 40], blobs[1][chosen % 40]

    def times(models: list[nn.Module]) -> int:
        read.clear()
        compute_influences(models, Source(400, batch), blobs, [0], solver="identity", damping=1.0, chunk=7)
        return len(read)

    assert times([mlp, softmax]) - times([mlp]) < 100, "what is read more is for the proofs: less than a pass"
    assert times([mlp, softmax, mlp, softmax]) - times([mlp]) == 3 * (times([mlp, softmax]) - times([mlp]))


@pytest.mark.parametrize("solver", ["kernel", "cg", "lissa", "identity"])
def test_a_sweep_gives_the_scores_of_single_calls_and_reads_the_data_once(blobs, mlp, solver):
    read = []

    def batch(chosen: Tensor) -> tuple[Tensor, Tensor]:
        read.append(len(chosen))
        return blobs[0][chosen], blobs[1][chosen]

    settings = InfluenceSettings(solver=solver, measure="loss", samples=40, device="cpu", damping=0.5, iterations=20)
    swept = sweep_damping(mlp, Source(40, batch), blobs, (0.5, 1, 4), settings)
    often, _ = len(read), read.clear()
    sweep_damping(mlp, Source(40, batch), blobs, (1,), settings)
    if solver in ("kernel", "identity"):
        assert often == len(read), "every further damping is for nothing"
    for factor, found in swept.items():
        alone = compute_influences(mlp, blobs, blobs, None, settings, damping=0.5 * factor)
        np.testing.assert_allclose(found.scores, alone.scores, rtol=1e-9, atol=1e-15)
        assert found.health.damping == 0.5 * factor
    with pytest.raises(ValueError, match="factors must be positive"):
        sweep_damping(mlp, blobs, blobs, (1, 0), settings)


def test_a_tuple_of_inputs_is_what_the_model_is_called_with(blobs):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(2, 3), nn.Linear(3, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.left(a) + self.right(b)

    points, labels = blobs
    model = Two().double()
    whole = nn.Linear(5, 3).double()
    with torch.no_grad():
        whole.weight.copy_(torch.cat([model.left.weight, model.right.weight], dim=1))
        whole.bias.copy_(model.left.bias + model.right.bias)
    parts = ((points[:, :2], points[:, 2:]), labels)
    samples = [(a, b, label) for (a, b), label in zip(zip(*parts[0]), labels)]
    settings = InfluenceSettings(solver="identity", damping=1.0, device="cpu")
    expected = compute_influences(model, parts, parts, [0, 7], settings).scores
    np.testing.assert_allclose(compute_influences(model, samples, samples, [0, 7], settings).scores, expected)
    plain = compute_influences(whole, blobs, blobs, [0, 7], settings).scores
    assert np.corrcoef(expected.ravel(), plain.ravel())[0, 1] > 0.9  # one bias more, the same function


class Awkward(nn.Module):
    """Normalisation whose weights are all equal, a buffer, a frozen layer and a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.norm, self.a, self.b = (
            nn.Linear(60, 60),
            nn.BatchNorm1d(60),
            nn.Linear(60, 60),
            nn.Linear(60, 60),
        )
        self.frozen.requires_grad_(requires_grad=False)
        self.b.weight = self.a.weight
        self.out = nn.Linear(60, 3)

    def forward(self, x):
        return self.out(self.b(self.a(self.norm(self.frozen(x))).tanh()))


def test_noisy_copies_differ_by_so_much_and_only_where_the_model_learns():
    torch.manual_seed(0)
    model = Awkward().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    copies = noisy_copies(model, count=3, noise=0.5, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    for one in copies:
        assert not one.training
        assert one.b.weight is one.a.weight
        assert torch.equal(one.frozen.weight, model.frozen.weight)
        assert torch.equal(one.norm.weight, model.norm.weight), "all equal: nothing to measure the noise by"
        assert torch.equal(one.norm.running_mean, model.norm.running_mean)
        moved = (one.a.weight - model.a.weight).std() / model.a.weight.std()
        assert moved.item() == pytest.approx(0.5, rel=0.05)
    assert not torch.equal(copies[0].a.weight, copies[1].a.weight)
    again, other = noisy_copies(model, count=1, noise=0.5, seed=4)[0], noisy_copies(model, 1, 0.5, seed=5)[0]
    assert torch.equal(again.a.weight, copies[0].a.weight)
    assert not torch.equal(other.a.weight, copies[0].a.weight)
    data = torch.randn(40, 60), torch.arange(40) % 3
    found = compute_influences(copies, data, data, [0], samples=40, device="cpu")
    assert len(found.members) == 3
    assert found.health.converged


@pytest.mark.parametrize("wrong", [{"count": 0}, {"noise": 0.0}, {"noise": -1.0}, {"noise": float("nan")}])
def test_noisy_copies_say_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        noisy_copies(nn.Linear(2, 2), **wrong)
