"""What must hold of a model, its measure and its data before there is any influence to speak of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._support import NonFiniteError
from .data import Inputs, Source, call, moved, on_tensors, shapes, tensors_of
from .gradients import GradientMaker
from .hooks import leaves_used


def check_measure(maker: GradientMaker, inputs: Inputs, targets: Tensor) -> None:
    """ValueError unless the measure gives each of two samples a number that is its own, and the same each time."""

    def values(inputs: Inputs, targets: Tensor) -> Tensor:
        return maker.measure.values(call(maker.recorder.scratch(), inputs), targets)

    def single(i: int) -> Tensor:
        return values(on_tensors(lambda part: part[i : i + 1], inputs), targets[i : i + 1])

    with torch.no_grad():
        try:
            both, again = values(inputs, targets), values(inputs, targets)
        except (RuntimeError, TypeError, IndexError) as error:
            raise ValueError(f"measure {maker.measure.name!r} fails on two samples: {error}") from error
        if not isinstance(both, Tensor) or both.shape != (2,):
            shape = tuple(both.shape) if isinstance(both, Tensor) else type(both).__name__
            raise ValueError(
                f"measure {maker.measure.name!r} must return one number a sample, (2,) for two, not {shape}; for a "
                "loss of torch, pass reduction='none', and sum over what belongs to one sample"
            )
        alone = torch.cat([single(0), single(1)])
    if not torch.allclose(both, again, 1e-3, 1e-5, equal_nan=True):
        raise ValueError("the model gives other outputs each time, even in eval mode; F.dropout needs training=False")
    if not torch.allclose(both, alone, 1e-2, 1e-4, equal_nan=True):
        raise ValueError(
            f"what the model says of a sample depends on the others in its batch, so none has an influence{_why(maker)}"
        )


def _why(maker: GradientMaker) -> str:
    """The layers that take the statistics of a batch, by name, and what to do."""
    kinds = {name: module for name, module in maker.model.named_modules() if isinstance(module, _BatchNorm)}
    found = [f"{name!r}" for name, module in kinds.items() if module.training or module.running_mean is None]
    if not found:
        return ""
    return (
        f": {', '.join(found)} normalise by the statistics of the batch; train with track_running_stats=True, and let "
        "eval() switch to them"
    )


def check_own(private: nn.Module, model: nn.Module, source: Source) -> None:
    """ValueError where the copy's forward runs parts of the caller's own model, by a function that holds on to it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # so that they do not change on this occasion
    try:
        outputs = call(private, moved(source.batch(torch.tensor([0]))[0], next(private.parameters())))
    except Exception:  # told better by `try_model`
        return
    finally:
        for module, mode in modes:
            module.training = mode
    theirs = {id(param): param for param in model.parameters()}  # held, or another could get the same id
    if any(id(leaf) in theirs for leaf in leaves_used(outputs)):
        raise ValueError(
            "the model's forward uses the original through a function that cannot be copied, such as a lambda over "
            "self; make it a method"
        )


def try_model(maker: GradientMaker, source: Source, index: int, role: str) -> Tensor:
    """Outputs (1, …) for one sample, with the errors a caller can act on when sample and model do not fit."""
    inputs, targets = source.batch(torch.tensor([index]))
    inputs = moved(inputs, next(iter(maker.params.values())))
    try:
        with torch.no_grad():
            outputs = call(maker.model, inputs)
    except ValueError as error:
        if why := _why(maker):
            raise ValueError(f"{role}: {error}{why}") from error
        raise
    except Exception as error:  # whatever the caller's model raises
        hint = "; of each sample, all parts but the last, the target, are inputs" if isinstance(inputs, tuple) else ""
        hint = "; a dict is passed as model(**dict), without the labels" if isinstance(inputs, dict) else hint
        raise ValueError(f"{role}: the model refuses inputs of shape {shapes(inputs)}{hint}: {error}") from error
    maker.measure.check(outputs, targets)
    finite = all(torch.isfinite(part).all() for part in tensors_of(inputs))
    if finite and torch.isnan(outputs).any():
        raise NonFiniteError(f"{role}: the model returns NaN or infinity for sample {index}; train it again")
    return outputs
