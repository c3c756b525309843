"""What the engine is held against: plain autograd in a loop, dense inverses, and a zoo of small models."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influence_functions import MEASURES
from influence_functions.measures import Values


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.squeeze(-1) - targets).square() / 2


def loop_gradients(
    model: nn.Module, images: Tensor, labels: Tensor, measure: Values = MEASURES["loss"].values
) -> Tensor:
    """(b, p) by plain autograd, one sample after the other: slow, and independent of torch.func."""
    model = copy.deepcopy(model)
    model.eval()
    params = [param for param in model.parameters() if param.requires_grad]
    rows = []
    for image, label in zip(images, labels):
        value = measure(model(image[None]), label[None]).sum()
        parts = torch.autograd.grad(value, params, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(q) if g is None else g).flatten() for g, q in zip(parts, params)]))
    return torch.stack(rows)


def dense_hessian(
    model: nn.Module, images: Tensor, labels: Tensor, measure: Values = MEASURES["loss"].values
) -> Tensor:
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


def relative_error(found: object, exact: Tensor) -> float:
    return float((torch.as_tensor(found) - exact).norm() / exact.norm())


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
