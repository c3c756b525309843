"""From what goes into a layer and the gradient at its output to the gradients of its parameters, one a sample.

One rule a layer type. A type of your own is one more function, in a file of your own:

>>> class Scale(nn.Module):
...     def __init__(self, features):
...         super().__init__()
...         self.weight = nn.Parameter(torch.ones(features))
...     def forward(self, x):
...         return x * self.weight
>>> @layer_rule(Scale)
... def scale(layer, inputs, deltas):
...     return {"weight": inputs * deltas}  # for each parameter (b, *its shape)
>>> Scale in RULES
True

Rules are proved on real samples before they are used (see `GradientMaker`); a layer that has none, or whose rule does
not agree, goes through `by_vmap`: the layer alone, differentiated once a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from .blocks import Block, Dense, Lookup, Pair, slices

Rule = Callable[[Any, Tensor, Tensor], "Mapping[str, Tensor] | Pair | Lookup"]
RULES: dict[type[nn.Module], Rule] = {}
COMPUTED = ("_orig", "_g", "_v")  # names that pruning, weight and spectral norm give to what they compute from
CACHED = 2**20  # numbers that are worked through several times: more fall out of the processor's cache (measured)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer: its arguments, and the gradient (b, …) of the measures' sum at its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    deltas: Tensor


def layer_rule(*kinds: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register a rule for layers of these types: (layer, inputs (b, …), deltas (b, …)) → gradients of its parameters.

    It returns for each parameter, by name, (b, *shape), or a `Pair` or a `Lookup` for weight and bias together.
    Frozen parameters are dropped afterwards. It raises NotImplementedError where it does not know its layer's options.
    """

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return register


def rule_of(layer: nn.Module) -> Rule | None:
    """The rule of the layer's type or of the nearest type that it is derived from."""
    return next((RULES[kind] for kind in type(layer).__mro__ if kind in RULES), None)


def by_rule(layer: nn.Module, names: Sequence[str], call: Call) -> Block:
    """The gradients of the parameters `names` of a layer in one of its calls, by the rule of its type."""
    rule, inputs = rule_of(layer), [*call.args, *call.kwargs.values()]
    if rule is None or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise NotImplementedError("rules are for layers that take one tensor")
    if any(name.endswith(COMPUTED) for name in names):
        raise NotImplementedError("its weight is computed from other parameters before each call")
    found = rule(layer, inputs[0], call.deltas)
    if isinstance(found, Pair | Lookup) and not set(names) <= {"weight", "bias"}:
        raise NotImplementedError("it has parameters that its type has not")
    if isinstance(found, Pair) and "weight" in names:
        return Pair(found.inputs, found.deltas, "bias" in names)
    if isinstance(found, Pair):
        found = {"bias": found.deltas.sum(1)}
    return found if isinstance(found, Lookup) else _dense(layer, names, found)


def by_vmap(layer: nn.Module, names: Sequence[str], call: Call) -> Block:
    """The same by differentiating the layer alone, once a sample."""
    params, batch = {name: layer.get_parameter(name).detach() for name in names}, len(call.deltas)
    values = [*call.args, *call.kwargs.values()]
    axes = tuple(0 if isinstance(v, Tensor) and v.ndim and len(v) == batch else None for v in values)

    def single(params: dict[str, Tensor], deltas: Tensor, *values: Any) -> Tensor:
        given = [v if axis is None else v[None] for v, axis in zip(values, axes)]
        named = dict(zip(call.kwargs, given[len(call.args) :]))
        return (functional_call(layer, params, tuple(given[: len(call.args)]), named) * deltas[None]).sum()

    return _dense(layer, names, vmap(grad(single), in_dims=(None, 0, *axes))(params, call.deltas, *values))


def _dense(layer: nn.Module, names: Sequence[str], found: Mapping[str, Tensor]) -> Dense:
    """(b, q) of the parameters `names`, side by side; ValueError where a gradient is missing or of another shape."""
    for name in names:
        wanted, given = tuple(layer.get_parameter(name).shape), found.get(name)
        if given is None or tuple(given.shape[1:]) != wanted:
            shape = "nothing" if given is None else f"(b, …) = {tuple(given.shape)}"
            raise ValueError(f"its rule returns {shape} for {name!r}; it must return (b, *{wanted})")
    return Dense(torch.cat([found[name].reshape(len(found[name]), -1) for name in names], dim=1))


# ── linear maps ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _positions(features: Tensor) -> Tensor:
    """(b, …, f) → (b, t, f): every position that a layer was applied to, t = 1 for plain vectors."""
    if features.ndim < 2:
        raise NotImplementedError("a layer that is given one sample without a batch")
    return features.reshape(len(features), -1, features.shape[-1])


@layer_rule(nn.Linear)
def linear(layer: nn.Linear, inputs: Tensor, deltas: Tensor) -> Pair:
    """Inputs (b, …, i), deltas (b, …, o)."""
    return Pair(_positions(inputs), _positions(deltas), bias=True)


@layer_rule(nn.Embedding)
def embedding(layer: nn.Embedding, ids: Tensor, deltas: Tensor) -> Lookup:
    """Ids (b, …), deltas (b, …, e); the row of `padding_idx` has no gradient."""
    if layer.max_norm is not None or layer.scale_grad_by_freq:
        raise NotImplementedError("max_norm and scale_grad_by_freq change what a step of training does")
    if layer.padding_idx is not None:
        deltas = deltas * (ids != layer.padding_idx)[..., None]
    return Lookup(ids.reshape(len(ids), -1), deltas.reshape(len(ids), -1, deltas.shape[-1]), layer.num_embeddings)


# ── convolutions ────────────────────────────────────────────────────────────────────────────────────────────────────


@layer_rule(nn.Conv1d, nn.Conv2d)
def convolution(layer: nn.Conv1d | nn.Conv2d, inputs: Tensor, deltas: Tensor) -> Mapping[str, Tensor] | Pair:
    """Inputs (b, c, …), deltas (b, o, …); any stride, dilation, groups and padding."""
    if inputs.ndim != layer.weight.ndim:
        raise NotImplementedError("a layer that is given one sample without a batch")
    padded, steps = _padded(layer, inputs), list(zip(layer.stride, layer.dilation))
    if isinstance(layer, nn.Conv1d):  # an image of one row
        padded, deltas, steps = padded.unsqueeze(2), deltas.unsqueeze(2), [(1, 1), *steps]
    kernel = (1 if isinstance(layer, nn.Conv1d) else layer.kernel_size[0], layer.kernel_size[-1])
    positions, window = deltas[0, 0].numel(), layer.weight[0].numel()
    lighter = 2 * positions * (window + layer.out_channels) < window * layer.out_channels  # as factors, in memory
    if layer.groups == 1 and lighter:
        windows = _columns(padded, kernel[1], *steps[1], deltas.shape[3])
        rows = [_rows(windows, row, deltas.shape[2], *steps[0]) for row in range(kernel[0])]  # each (b, c, l, h, w)
        columns = torch.stack(rows, dim=2)  # (b, c, k, l, h, w)
        return Pair(columns.flatten(1, 3).flatten(2).mT, deltas.flatten(2).mT, bias=True)
    weight = _kernel_gradients(layer, padded, deltas, kernel, steps).reshape(len(inputs), *layer.weight.shape)
    return {"weight": weight, "bias": deltas.flatten(2).sum(2)}


def _padded(layer: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    """The input as the kernel meets it; F.pad counts the last dimension first."""
    amounts: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if isinstance(layer.padding, str):
            both = layer.dilation[axis] * (layer.kernel_size[axis] - 1) if layer.padding == "same" else 0
            amounts += [both // 2, both - both // 2]
        else:
            amounts += [layer.padding[axis]] * 2
    if not any(amounts):
        return inputs
    return F.pad(inputs, amounts, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _columns(padded: Tensor, length: int, stride: int, dilation: int, width: int) -> Tensor:
    """(b, c, H, W) → (b, c, l, H, w): what each column of the kernel meets, at each place along the width.

    Unfolded along the width only: k-fold memory instead of k²-fold.
    """
    windows = padded.unfold(3, dilation * (length - 1) + 1, stride)[..., ::dilation]  # (b, c, H, w, l)
    return windows[:, :, :, :width].permute(0, 1, 4, 2, 3).contiguous()


def _rows(columns: Tensor, row: int, height: int, stride: int, dilation: int) -> Tensor:
    """(b, c, l, H, w) → (b, c, l, h, w): what row `row` of the kernel meets."""
    first = row * dilation
    return columns[:, :, :, first : first + stride * (height - 1) + 1 : stride]


def _kernel_gradients(
    layer: nn.Conv1d | nn.Conv2d, padded: Tensor, deltas: Tensor, kernel: tuple[int, int], steps: list[tuple[int, int]]
) -> Tensor:
    """(b, o, c / g, k, l): one batched matrix product for each row of the kernel."""
    (b, o, h, w), groups, c = deltas.shape, layer.groups, layer.in_channels
    gradients = deltas.new_empty(b, o, c // groups, *kernel)
    for part in slices(b, c * kernel[1] * padded.shape[2] * w, CACHED):
        columns = _columns(padded[part], kernel[1], *steps[1], w)
        d = deltas[part].reshape(-1, o // groups, h * w)  # (b·g, o / g, h·w)
        for row in range(kernel[0]):
            windows = _rows(columns, row, h, *steps[0]).reshape(len(d), -1, h * w)  # (b·g, c / g · l, h·w)
            gradients[part, :, :, row] = torch.bmm(d, windows.mT).view(-1, o, c // groups, kernel[1])
    return gradients


# ── norms: the gradient of the weight is Σ δ·x̂ over positions, that of the bias Σ δ ─────────────────────────────────


def _scaled(normalised: Tensor, deltas: Tensor) -> dict[str, Tensor]:
    """Both (b, c, …), one weight a channel."""
    shape = (len(deltas), deltas.shape[1], -1)
    return {"weight": (normalised * deltas).reshape(shape).sum(2), "bias": deltas.reshape(shape).sum(2)}


@layer_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(layer: nn.BatchNorm2d, inputs: Tensor, deltas: Tensor) -> dict[str, Tensor]:
    """Inputs and deltas (b, c, …); in eval mode, that is with the running mean and variance."""
    if layer.running_mean is None or layer.running_var is None or layer.training:
        raise NotImplementedError("with the statistics of a batch, no sample has a gradient of its own")
    return _scaled(F.batch_norm(inputs, layer.running_mean, layer.running_var, eps=layer.eps), deltas)


@layer_rule(nn.GroupNorm)
def group_norm(layer: nn.GroupNorm, inputs: Tensor, deltas: Tensor) -> dict[str, Tensor]:
    """Inputs and deltas (b, c, …)."""
    return _scaled(F.group_norm(inputs, layer.num_groups, eps=layer.eps), deltas)


@layer_rule(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, inputs: Tensor, deltas: Tensor) -> dict[str, Tensor]:
    """Inputs and deltas (b, …, *normalised shape)."""
    shape = layer.normalized_shape
    if inputs.ndim <= len(shape):
        raise NotImplementedError("a layer that is given one sample without a batch")
    normalised = F.layer_norm(inputs, shape, eps=layer.eps)
    per_sample = (len(inputs), -1, *shape)
    products, plain = (normalised * deltas).reshape(per_sample), deltas.reshape(per_sample)
    return {"weight": products.sum(1), "bias": plain.sum(1)}
