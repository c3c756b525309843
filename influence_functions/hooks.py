"""`Recorder`: one forward pass, and what each layer was given and sent back in it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .data import Inputs, call
from .layers import Call
from .measures import Measure
from .private import copy_of

_Recorded = tuple[str, tuple[Any, ...], dict[str, Any], GradientEdge]


class Recorder:
    """Records the calls of some layers of a model, in copies that share its parameters: one for each thread.

    The model itself is never run, so that it stays small to pickle, whatever its layers keep.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model, self.layers, self._local = model, tuple(layers), threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_local": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def scratch(self) -> nn.Module:
        """A new copy that shares parameters and buffers, to be run and thrown away with whatever it keeps."""
        if any(isinstance(module, torch.jit.ScriptModule) for module in self.model.modules()):
            return self.model  # torch does not share what a scripted module holds
        return copy_of(self.model, {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())})

    def _hooked(self) -> tuple[nn.Module, list[_Recorded]]:
        if not hasattr(self._local, "hooked"):
            recorded: list[_Recorded] = []
            model = self.scratch()
            for name in self.layers:
                model.get_submodule(name).register_forward_hook(partial(_record, recorded, name), with_kwargs=True)
            self._local.hooked = model, recorded
        return self._local.hooked

    def weight(self, measure: Measure, inputs: Inputs, targets: Tensor) -> float:
        """Bytes of a pass over these samples: what autograd saves, and the gradients at the layers' outputs."""
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            one = self(measure, inputs, targets)
        for param in one.params.values():
            saved.pop(param.untyped_storage().data_ptr(), None)
        calls = [each for found in one.calls(self.layers, keep=False).values() for each in found]
        return sum(saved.values()) + sum(each.deltas.numel() * each.deltas.element_size() for each in calls)

    def __call__(self, measure: Measure, inputs: Inputs, targets: Tensor) -> Pass:
        """One forward pass, up to the values of the measure."""
        model, recorded = self._hooked()
        recorded.clear()
        with torch.enable_grad():
            values = measure.values(call(model, inputs), targets)
            found = Pass(values, values.sum(), tuple(recorded), dict(self.model.named_parameters()))
        recorded.clear()
        return found


@dataclass(frozen=True, eq=False)
class Pass:
    """The measure's `values` (b,) and their `total`, in autograd's graph, and what the layers were given on the way."""

    values: Tensor
    total: Tensor
    recorded: tuple[_Recorded, ...]
    params: dict[str, nn.Parameter]

    @cached_property
    def times_called(self) -> Counter[str]:
        """Layer → how often."""
        return Counter(name for name, *_ in self.recorded)

    @cached_property
    def times_used(self) -> Counter[str]:
        """Parameter → how often, by way of its layer or behind its back."""
        names = {id(param): name for name, param in self.params.items()}
        return Counter(names.get(id(leaf), "") for leaf in leaves_used(self.values))

    @property
    def shape(self) -> frozenset[tuple[str, int]]:
        """What is the same for batches that go the same way through the model."""
        return frozenset([*self.times_called.items(), *self.times_used.items()])

    def calls(self, wanted: Container[str], keep: bool) -> dict[str, list[Call]]:
        """The calls of the `wanted` layers, with the gradient of the total at their outputs; keep: the graph, too.

        No weight's gradient is computed.
        """
        chosen, found = [one for one in self.recorded if one[0] in wanted], dict[str, list[Call]]()
        if chosen and self.total.requires_grad:
            edges, kind = [edge for *_, edge in chosen], next(iter(self.params.values())).dtype
            deltas = torch.autograd.grad(self.total, edges, retain_graph=keep, allow_unused=True)
            for (name, args, kwargs, _), delta in zip(chosen, deltas):
                if delta is not None:
                    found.setdefault(name, []).append(Call(args, kwargs, delta.to(kind)))
        return found

    def sums(self, layers: Mapping[str, Sequence[str]], weights: Tensor) -> dict[str, Tensor]:
        """Layer → (q,): the gradients of its parameters by autograd, summed over the batch with weights (b,)."""
        owned = [self.params[name] for names in layers.values() for name in names]
        grads: Sequence[Tensor | None] = [None] * len(owned)
        if owned and self.values.requires_grad:
            grads = torch.autograd.grad(self.values, owned, weights.to(self.values), allow_unused=True)
        parts = iter([(torch.zeros_like(p) if g is None else g.to_dense()).flatten() for p, g in zip(owned, grads)])
        return {layer: torch.cat([next(parts) for _ in names]) for layer, names in layers.items()}


def layers_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Layer → its trainable parameters, for the layers without children whose parameters nobody shares."""
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners[param] = owners.get(param, 0) + 1
    found: dict[str, tuple[str, ...]] = {}
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return found  # what happens inside of it, no hook sees
    for name, layer in model.named_modules():
        own = {n: p for n, p in layer.named_parameters(recurse=False, remove_duplicate=False) if p.requires_grad}
        if own and not any(layer.children()) and all(owners[param] == 1 for param in own.values()):
            found[name] = tuple(own)
    return found


def leaves_used(result: Tensor) -> Iterator[Tensor]:
    """The tensors that autograd began with on the way to a result, each as often as it was used."""
    seen, nodes = set(), [result.grad_fn]
    while nodes:
        if (node := nodes.pop()) is not None and node not in seen:
            seen.add(node)
            for before, _ in node.next_functions:
                if (leaf := getattr(before, "variable", None)) is not None:
                    yield leaf
                else:
                    nodes.append(before)


def _record(
    recorded: list[_Recorded], name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    if isinstance(out, Tensor) and out.requires_grad:
        # The edge stands for the output as it is now, whatever an in-place activation does to the tensor afterwards.
        plain = tuple(_settled(layer, a) for a in args)
        named = {key: _settled(layer, a) for key, a in kwargs.items()}
        recorded.append((name, plain, named, get_gradient_edge(out)))


def _settled(layer: nn.Module, value: Any) -> Any:
    """A layer's argument outside of autograd, in the layer's type: under autocast, it may come in another."""
    if not isinstance(value, Tensor):
        return value
    kind = next(layer.parameters(recurse=False)).dtype
    return value.detach().to(kind) if value.is_floating_point() else value.detach()
