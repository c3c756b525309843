"""`Recorder`: one forward pass, and what each layer was given and sent back in it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
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

    def __call__(
        self, measure: Measure, inputs: Inputs, targets: Tensor, wanted: Mapping[str, Sequence[nn.Parameter]],
        keep: bool = False,
    ) -> tuple[Tensor, dict[str, list[Call]], dict[str, Tensor]]:  # fmt: skip
        """The measure's values (b,), the calls of the `wanted` layers, and the sums over the batch of their gradients.

        wanted: layer → its parameters. Each call comes with the gradient of the values' sum at its output. keep: leave
        the values in autograd's graph.
        """
        model, recorded = self._hooked()
        recorded.clear()
        with torch.enable_grad():
            values = measure.values(call(model, inputs), targets)
            total = values.sum()
        chosen, calls = [one for one in recorded if one[0] in wanted], dict[str, list[Call]]()
        recorded.clear()
        params = [param for own in wanted.values() for param in own]
        found: Sequence[Tensor | None] = [None] * (len(chosen) + len(params))
        asked: list[Any] = [*(edge for *_, edge in chosen), *params]
        if asked and values.requires_grad:
            found = torch.autograd.grad(total, asked, retain_graph=keep, allow_unused=True)
        for (name, args, kwargs, _), delta in zip(chosen, found):
            if delta is not None:
                calls.setdefault(name, []).append(Call(args, kwargs, delta.to(next(self.model.parameters()).dtype)))
        sums = flat(wanted, found[len(chosen) :])
        return values if keep else values.detach(), calls, sums


def flat(owners: Mapping[str, Sequence[nn.Parameter]], grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Layer → (q,): the gradients of its parameters side by side, zeros where there is none."""
    params = [param for own in owners.values() for param in own]
    parts = iter([(torch.zeros_like(p) if g is None else g.to_dense()).flatten() for p, g in zip(params, grads)])
    return {layer: torch.cat([next(parts) for _ in own]) for layer, own in owners.items() if own}


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
