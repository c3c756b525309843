"""`GradientMaker`: model + measure → gradients, one a sample, each layer by the cheapest road that is right.

Three roads: the rule of the layer's type, the layer alone under vmap, and, for parameters that are used outside their
layer's call (shared, tied, functional), the whole network under vmap or, where torch cannot, in a loop. Which road a
layer takes is proved on real samples against plain autograd.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial, reduce

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from .blocks import Block, Dense
from .data import Inputs, call, on_tensors
from .hooks import Pass, Recorder, layers_of
from .layers import Call, by_rule, by_vmap, rule_of
from .measures import Measure
from .stack import Gradients, OnDemand

Road = Callable[[nn.Module, Sequence[str], Call], Block]
PROVED = 4  # samples of a batch that are compared, one by one
NETWORK = "(the network)"  # where parameters that go through the whole network stand among the layers


class DisagreementError(RuntimeError):
    """A layer's gradients were right on other samples, and are not on these."""


class GradientMaker:
    """Gradients of a measure with respect to the trainable parameters of a model, one a sample.

    model: a private copy in eval mode, never changed. It holds no data. `slow_layers`: those without a rule, by name.
    """

    def __init__(self, model: nn.Module, measure: Measure) -> None:
        self.model, self.measure = model, measure
        self.params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.columns = _columns(self.params)
        self.layers = layers_of(model)
        self.recorder = Recorder(model, [*self.layers])
        self.roads: dict[str, Road] = {}
        self.looped = False
        self.seen: set[frozenset[tuple[str, int]]] = set()  # ways through the model that were checked
        self.slow_layers: tuple[str, ...] = ()

    @torch.no_grad()
    def __call__(self, inputs: Inputs, targets: Tensor, check: bool = True, mend: bool = True,
                 light: bool = True) -> Gradients:  # fmt: skip
        """The gradients of the measure at each sample: inputs (b, …), targets (b, …); light: for inner products.

        Each layer's are made whenever they are read: `Gradients.made` is for who reads them more than once.
        check: hold each layer's against autograd on this batch, at the price of one more backward pass, as is done in
        any case where a batch goes another way than those before. Those that do not agree, as where a forward sorts its
        batch or sends samples different ways, are made in a loop if `mend`, else DisagreementError.
        """
        makers = self._by_layer(inputs, targets, check, mend) if self.roads else {}
        if rest := self._rest():
            makers[NETWORK] = lambda: self._dense(rest, self._through_the_network(rest, inputs, targets))
        places = tuple(self._places(name, rest) for name in makers)
        found = Gradients(OnDemand(tuple(map(torch.no_grad(), makers.values()))), places, len(targets))
        return found.light() if light else found

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """name → (k, *shape) becomes (k, p), parameters side by side in the model's order."""
        return torch.cat([tensors[name].reshape(len(tensors[name]), -1) for name in self.params], dim=1)

    def unflatten(self, matrix: Tensor) -> dict[str, Tensor]:
        """(k, p) becomes name → (k, *shape): the inverse of `flatten`."""
        pieces = matrix.split([param.numel() for param in self.params.values()], dim=1)
        return {name: piece.reshape(-1, *self.params[name].shape) for name, piece in zip(self.params, pieces)}

    def shapes(self) -> list[list[torch.Size]]:
        """Of each block of gradients, the shapes of the parameters in it."""
        blocks = [*map(self._parameters, self.roads), *filter(None, [self._rest()])]
        return [[self.params[name].shape for name in names] for names in blocks]

    def prove(self, batches: Sequence[tuple[Inputs, Tensor]]) -> None:
        """Choose each layer's road by comparing with plain autograd, on the first few samples (PROVED) of each batch.

        The batches should have several sizes and orders: a forward may sort its samples, or treat many unlike few. A
        rule that fails on a layer is left for that layer alone; a warning names it, unless the rule declined.
        """
        self.layers, self.roads, self.looped = (all_layers := layers_of(self.model)), {}, False
        passes = [self.recorder(self.measure, *batch) for batch in batches]
        behind = {name for one in passes for name in self._behind(one)}
        self.layers = {name: own for name, own in self.layers.items() if name not in behind}
        calls = [one.calls(self.layers, keep=False) for one in passes]
        truths = [self._in_a_loop([*self.params], *_first(*batch)) for batch in batches]
        for road in (by_rule, by_vmap):
            self.roads |= dict.fromkeys(self.layers.keys() - self.roads.keys(), road)
            for (_, targets), recorded, truth in zip(batches, calls, truths):
                found = self._attempt(recorded, len(targets))
                for name in [name for name, chosen in self.roads.items() if chosen is road]:
                    wanted = self._dense(self._parameters(name), truth).rows
                    if not _close(found.get(name), wanted):
                        del self.roads[name]
            if road is by_rule:
                self.slow_layers = tuple(name for name in all_layers if name not in self.roads)
        self.roads = {name: self.roads[name] for name in self.layers if name in self.roads}
        rest = self._rest()
        self.slow_layers += tuple(name for name in rest if name.rpartition(".")[0] not in all_layers)
        self.looped = bool(rest) and not self._network_agrees(rest, truths[0], *batches[0])

    def _attempt(self, calls: Mapping[str, Sequence[Call]], samples: int) -> dict[str, Tensor]:
        """The gradients of the first few samples, (b, q) of every layer whose road serves it at all."""
        found = {}
        for name in self.roads:
            try:
                with torch.no_grad():
                    block = self._block(name, calls.get(name, []), samples)
                    found[name] = block.select(slice(PROVED)).dense().clone()  # not a view that holds them all
            except NotImplementedError:
                continue
            except Exception as error:  # whatever a rule raises: there are other roads
                if self.roads[name] is by_rule:
                    kind = type(self.model.get_submodule(name)).__name__
                    warnings.warn(f"layer {name!r} ({kind}) goes the slow way: {error}", stacklevel=2)
        return found

    def _network_agrees(self, rest: list[str], truth: Mapping[str, Tensor], inputs: Inputs, targets: Tensor) -> bool:
        try:
            found = self._through_the_network(rest, inputs, targets)
        except (RuntimeError, ValueError, TypeError):  # torch says so where vmap does not serve an operation
            return False
        return all(_close(found[name], truth[name]) for name in rest)

    def _by_layer(self, inputs: Inputs, targets: Tensor, check: bool, mend: bool) -> dict[str, Callable[[], Block]]:
        """Of each layer with a road, what makes its block; where it is not what it should be, by the loop."""
        one, wanted = self.recorder(self.measure, inputs, targets), dict[str, Tensor]()
        way = one.shape
        check = check or way not in self.seen
        calls = one.calls(self.roads, keep=check)
        weights = torch.randn(len(targets), generator=torch.Generator().manual_seed(len(targets))).to(one.values)
        if check:
            wanted = one.sums({layer: self._parameters(layer) for layer in self.roads}, weights.detach())
            self.seen.add(way)

        @cache
        def exact() -> dict[str, Tensor]:  # whoever needs one layer may need them all
            every = [name for layer in self.roads for name in self._parameters(layer)]
            return self._in_a_loop(every, inputs, targets)

        def block(layer: str) -> Block:
            try:
                found = self._block(layer, calls.get(layer, []), len(targets))
                if len(found) == len(targets) and _right(found, weights, wanted.get(layer)):
                    return found
                self.seen.discard(way)
                if mend:
                    return self._dense(self._parameters(layer), exact())
            except Exception as error:
                kind = type(self.model.get_submodule(layer)).__name__
                raise ValueError(f"layer {layer!r} ({kind}): its gradients failed: {error}") from error
            raise DisagreementError(layer)

        return {layer: partial(block, layer) for layer in self.roads}

    def _behind(self, one: Pass) -> set[str]:
        """The layers whose parameters are used more often than they are called: by somebody else, too."""
        kinds = {name: self.model.get_submodule(name) for name in self.layers}
        return {
            layer for layer, kind in kinds.items()  # a layer of the caller's own may well use its weight twice a call
            if rule_of(kind) is not None and type(kind).__module__.startswith("torch.nn")
            and any(one.times_used[name] > one.times_called[layer] for name in self._parameters(layer))
        }  # fmt: skip

    def _block(self, name: str, calls: Sequence[Call], samples: int) -> Block:
        """Of a layer, summed over its calls; zero where it was not called."""
        layer, names = self.model.get_submodule(name), self.layers[name]
        blocks = [self.roads[name](layer, names, one) for one in calls]
        if not blocks:
            params = [layer.get_parameter(param) for param in names]
            return Dense(params[0].new_zeros(samples, sum(param.numel() for param in params)).detach())
        return reduce(lambda a, b: a.add(b), blocks)

    def _through_the_network(self, names: list[str], inputs: Inputs, targets: Tensor) -> dict[str, Tensor]:
        """name → (b, *shape): the gradients of the parameters `names`, by differentiating the whole network."""
        if self.looped:
            return self._in_a_loop(names, inputs, targets)
        model = self.recorder.scratch()

        def single(values: dict[str, Tensor], inputs: Inputs, target: Tensor) -> Tensor:
            outputs = call(model, on_tensors(lambda part: part[None], inputs), values)
            return self.measure.values(outputs, target[None]).sum()

        return vmap(grad(single), in_dims=(None, 0, 0))({n: self.params[n] for n in names}, inputs, targets)

    def _in_a_loop(self, names: list[str], inputs: Inputs, targets: Tensor) -> dict[str, Tensor]:
        """The same by plain autograd, one sample after the other: slow, general, what all else is held against."""
        if not names:
            return {}
        model, rows = self.recorder.scratch(), []
        params = [*map(dict(model.named_parameters()).__getitem__, names)]
        for i in range(len(targets)):
            one = slice(i, i + 1)
            with torch.enable_grad():
                outputs = call(model, on_tensors(partial(torch.narrow, dim=0, start=i, length=1), inputs))
                value = self.measure.values(outputs, targets[one]).sum()
            nothing = [None] * len(params)
            found = torch.autograd.grad(value, params, allow_unused=True) if value.requires_grad else nothing
            rows.append([torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(found, params)])
        return {name: torch.stack(column) for name, column in zip(names, zip(*rows))}

    @staticmethod
    def _dense(names: Sequence[str], values: Mapping[str, Tensor]) -> Dense:
        """The gradients (b, *shape) of some parameters, side by side."""
        return Dense(torch.cat([values[name].reshape(len(values[name]), -1) for name in names], dim=1))

    def _parameters(self, layer: str) -> list[str]:
        """Their full names."""
        return [f"{layer}.{name}" if layer else name for name in self.layers[layer]]

    def _rest(self) -> list[str]:
        """The full names of the parameters that no layer's road serves."""
        served = {param for name in self.roads for param in self._parameters(name)}
        return [name for name in self.params if name not in served]

    def _places(self, layer: str, rest: list[str]) -> tuple[slice, ...]:
        """Where the columns of a layer's block, in their order, stand among all p."""
        return tuple(self.columns[name] for name in (rest if layer == NETWORK else self._parameters(layer)))


def _columns(params: Mapping[str, Tensor]) -> dict[str, slice]:
    """Where each parameter stands among all p."""
    ends = [*itertools.accumulate((param.numel() for param in params.values()), initial=0)]
    return {name: slice(start, end) for name, start, end in zip(params, ends, ends[1:])}


def _first(inputs: Inputs, targets: Tensor) -> tuple[Inputs, Tensor]:
    return on_tensors(lambda part: part[:PROVED], inputs), targets[:PROVED]


def _right(found: Block, weights: Tensor, wanted: Tensor | None) -> bool:
    """A sum with random weights (b,) sees what is missing, and in which order the samples are; None: not looked at."""
    return wanted is None or _close(found.weighted(weights[None].to(wanted))[0], wanted)


def _close(found: Tensor | None, wanted: Tensor) -> bool:
    if found is None or found.shape != wanted.shape:
        return False
    tolerance = 1e-9 if wanted.dtype == torch.float64 else 1e-3
    limit = tolerance * float(wanted.nan_to_num(0, 0, 0).abs().max()) if wanted.numel() else 0.0
    return torch.allclose(found, wanted, rtol=tolerance, atol=limit, equal_nan=True)
