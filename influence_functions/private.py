"""A private copy of the caller's model, whatever it holds: the caller's is never changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import reduce
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ._support import NonFiniteError

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def private_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy in eval mode on the device, unwrapped and in one type; errors where it has nothing to be influenced.

    Half precision becomes float32, for the same weights: products of small gradients would vanish in it.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, not {type(model).__name__}")
    while isinstance(model, WRAPPERS):
        model = model.module
    private = copy_of(model).to(device)
    private.eval()  # not chained: a model's own train() may return nothing
    for param in private.parameters():
        if not param.is_leaf:  # torch copies the weights of a scripted model as computed from the original's
            param.detach_().requires_grad_()
    params = [param for param in private.parameters() if param.requires_grad]
    if not params:
        raise ValueError("the model has no trainable parameter (requires_grad); influence is about trained parameters")
    if lazy := [name for name, p in private.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]:
        raise ValueError(f"the model has parameters without a shape yet ({lazy[0]}); call it once on a sample first")
    if any(param.is_complex() for param in params):
        raise ValueError("the model has complex parameters; influence is defined here for real ones")
    if not all(torch.isfinite(param).all() for param in params):
        raise NonFiniteError("the model's weights contain NaN or infinity; train it again or load another checkpoint")
    kinds = {param.dtype for param in private.parameters() if param.is_floating_point()}
    widest = reduce(torch.promote_types, kinds, torch.float32)
    return private if kinds == {widest} else private.to(widest)


def copy_of(model: nn.Module, shared: Mapping[int, Any] = MappingProxyType({})) -> nn.Module:
    """A deep copy, but for what is `shared`: id of an object → what stands for it.

    What cannot be copied (a lock, a file, a generator) is shared, too; what autograd made is detached.
    """
    try:
        return copy.deepcopy(model, dict(shared))
    except (TypeError, RuntimeError, AttributeError):
        memo = dict(shared)
        for module in model.modules():
            for name, value in vars(module).items():
                if name not in ("_parameters", "_buffers", "_modules"):
                    _settle(value, memo)
        return copy.deepcopy(model, memo)


def _settle(value: Any, memo: dict[int, Any]) -> None:
    """Note in `memo` what stands for the parts of a value that do not copy themselves."""
    if isinstance(value, nn.Module | nn.Parameter) or id(value) in memo:
        return
    if isinstance(value, Tensor):
        memo[id(value)] = value.detach().clone()
    elif isinstance(value, list | tuple | set | dict):
        for part in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
            _settle(part, memo)
    else:
        try:
            copy.deepcopy(value, memo)
        except (TypeError, RuntimeError, AttributeError):
            memo[id(value)] = value
