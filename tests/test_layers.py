"""Layer rules and the other roads to a gradient, against a loop of plain autograd."""

import copy

import numpy as np
import pytest
import torch
from references import (
    ZOO,
    Functional,
    from_the_zoo,
    loop_gradients,
    relative_error,
)
from torch import Tensor, nn

import notebook_support as ns
from influence_functions import (
    MEASURES,
    SOLVERS,
    InfluenceSettings,
    compute_influences,
)
from influence_functions.layers import RULES
from influence_functions.problem import make_problem


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_architecture_gets_the_same_scores_as_a_loop(name, frozen):
    model = from_the_zoo(name, frozen, seed=0)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(9, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (9,), generator=generator)
    gradients = loop_gradients(model, images, labels)
    found = compute_influences(
        model, (images, labels), (images, labels), range(3), solver="identity", measure="loss", damping=1.0, chunk=4
    )
    assert relative_error(found.scores, gradients[:3] @ gradients.T / 9) < 1e-9


def test_the_fast_path_covers_all_of_net_and_nothing_doubtful():
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    problem = make_problem(ns.Net(), (images, labels), InfluenceSettings(device="cpu"))
    assert list(problem.maker.roads) == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert problem.maker.slow_layers == ()
    doubtful = make_problem(Functional(), (images, labels % 3), InfluenceSettings(device="cpu"))
    assert list(doubtful.maker.roads) == []
    assert doubtful.maker.slow_layers == ("fc",)


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
    for solver in SOLVERS:
        found = compute_influences(model, data, data, [0], solver=solver, damping=1.0, iterations=5, device="cpu")
        assert isinstance(found.scores, np.ndarray)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(param.requires_grad, param.grad is None) for param in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


# ── each rule on its own ────────────────────────────────────────────────────────────────────────────────────────────


class Positions(nn.Module):
    """Layers at every position of a sequence of token ids, then the mean over positions."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(1)


def stem(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


def convolutions() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    found = {}
    for stride, dilation, groups, padding in [
        (1, 1, 1, 0), (2, 1, 1, 1), (1, 2, 1, 2), (2, 2, 2, 1), (3, 1, 4, 2), ((2, 1), (1, 2), 2, (0, 3)),
    ]:  # fmt: skip
        for mode in ("zeros", "reflect", "circular", "replicate"):
            layer = nn.Conv2d(4, 8, (3, 2), stride, padding, dilation, groups, padding_mode=mode)
            found[f"conv2d {stride} {dilation} {groups} {padding} {mode}"] = stem(layer), (4, 9, 8)
    found["conv2d same"] = stem(nn.Conv2d(4, 8, (4, 3), padding="same", dilation=(1, 2), groups=2)), (4, 9, 8)
    found["conv2d valid"] = stem(nn.Conv2d(4, 8, 3, padding="valid", bias=False)), (4, 9, 8)
    found["conv2d as factors"] = stem(nn.Conv2d(8, 16, 3, stride=2, dilation=2, padding=1)), (8, 6, 6)
    found["conv1d"] = stem(nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2, padding=3)), (4, 11)
    found["conv1d circular"] = stem(nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular")), (4, 11)
    return found


def others() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    norm = nn.BatchNorm2d(4)
    norm.running_mean, norm.running_var = torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4)
    return {
        "linear": (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), (5,)),
        "linear, sequence": (Positions(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), (4, 5)),
        "linear, short sequence": (Positions(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3)), (2, 30)),
        "embedding": (Positions(nn.Embedding(9, 4), nn.Tanh(), nn.Linear(4, 3)), ()),
        "embedding, padding": (Positions(nn.Embedding(200, 4, padding_idx=2), nn.Tanh(), nn.Linear(4, 3)), ()),
        "batch norm": (stem(norm, nn.Conv2d(4, 3, 2)), (4, 5, 5)),
        "batch norm 1d": (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)), (5,)),
        "layer norm": (Positions(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)), (4, 5)),
        "layer norm, two axes": (stem(nn.LayerNorm((4, 5))), (3, 4, 5)),
        "group norm": (stem(nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 2)), (4, 5, 5)),
    }


RULED = {**convolutions(), **others()}


@pytest.mark.parametrize("frozen", ["nothing", "weight", "bias"])
@pytest.mark.parametrize("measure", ["loss", "margin"])
@pytest.mark.parametrize("name", RULED)
def test_each_rule_gives_the_gradients_of_a_loop(name, measure, frozen):
    torch.manual_seed(0)
    model, shape = {**convolutions(), **others()}[name]
    ids = torch.randint(0, 9, (6, 5))
    inputs = torch.randn(6, *shape, dtype=torch.float64) if shape else ids
    model = model.double().eval()
    with torch.no_grad():
        model(inputs)  # lazy layers take their shape
    ruled = [layer for layer in model.modules() if type(layer) in RULES]
    if frozen != "nothing":
        for layer in ruled:
            param = getattr(layer, frozen, None)
            if param is not None and layer is not ruled[-1]:
                param.requires_grad_(False)
    labels = torch.arange(6) % 3
    problem = make_problem(model, (inputs, labels), InfluenceSettings(measure=measure, device="cpu"))
    assert problem.maker.slow_layers == ()
    exact = loop_gradients(model, inputs, labels, MEASURES[measure].values)
    found, _ = problem.gradients(problem.train, torch.arange(6))
    assert relative_error(found.dense(), exact) < 1e-10
    assert relative_error(found.products(found), exact @ exact.T) < 1e-10
    assert relative_error(found.squares(), exact.square().sum(1)) < 1e-10
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(3, exact.shape[1], generator=generator, dtype=torch.float64)
    assert relative_error(found.against(found.like(directions)), directions @ exact.T) < 1e-10
    weights = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    assert relative_error(found.weighted(weights), weights @ exact) < 1e-10
    halves = type(found).collect((found.select(slice(0, 2)), found.select(slice(2, 6))), 6)
    assert relative_error(halves.dense(), exact) < 1e-10


class Sorts(nn.Module):
    """Reorders its batch inside: a rule that is proved on samples in order only would mix them up."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.fc(x[order])[order.argsort()]


@pytest.mark.parametrize("kind", ["reordered", "tied", "weight norm", "prelu", "keyword", "lstm"])
def test_what_no_rule_serves_is_right_all_the_same(kind):
    class Keyword(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](input=x)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lstm(x[..., None])[0][:, -1])

    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))
    tied = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.Linear(5, 3))
    tied[2].weight = tied[0].weight
    model = {
        "reordered": Sorts(),
        "tied": tied,
        "weight norm": nn.Sequential(normed, nn.Tanh(), nn.Linear(4, 3)),
        "prelu": nn.Sequential(nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, 3)),
        "keyword": Keyword(nn.Linear(5, 3)),
        "lstm": Last(),
    }[kind].double()
    inputs, labels = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3
    found = compute_influences(model, (inputs, labels), (inputs, labels), [0, 1], solver="identity", damping=1.0)
    gradients = loop_gradients(model, inputs, labels, MEASURES["margin"].values)
    assert relative_error(found.scores, gradients[:2] @ gradients.T / 8) < 1e-10
    assert bool(found.health.slow_layers) == (kind != "keyword")
    assert "2" not in found.health.slow_layers or kind == "tied", "a layer that has a rule is slow because of another"
