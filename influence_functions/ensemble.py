"""Several models out of one, to average over: for a finished model whose training has left no checkpoints."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from .private import private_copy


def noisy_copies(model: nn.Module, count: int = 5, noise: float = 0.5, seed: int = 0) -> list[nn.Module]:
    """`count` copies of a finished model, each with its trainable weights moved a little at random.

    What a model's scores owe to its exact weights is mostly noise, and the average over neighbours of the model has
    less of it: compute_influences(noisy_copies(model), …). Checkpoints of the training do better (measured in
    `retraining.ipynb`); this is for where there are none. In the place of the dropout masks of Deng et al. 2024,
    "Efficient Ensembles", arXiv:2405.17293: it asks nothing of the architecture.

    noise: standard deviation of what is added to a weight, in units of the standard deviation of all weights of its
    tensor, so that a constant tensor stays as it is. The copies are in eval mode and on the CPU; the first ones do not
    depend on `count`. Raises ValueError (NonFiniteError for bad weights) saying what to do.

    >>> model = nn.Linear(4, 3)
    >>> first, second = noisy_copies(model, count=2)
    >>> bool((first.weight == second.weight).any()), bool((first.weight == noisy_copies(model)[0].weight).all())
    (False, True)
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    if not 0 < noise < math.inf:
        raise ValueError(f"noise must be a positive number, not {noise}: 0.5 is half the spread of a layer's weights")
    base, generator = private_copy(model, torch.device("cpu")), torch.Generator().manual_seed(seed)
    copies = [copy.deepcopy(base) for _ in range(count)]
    with torch.no_grad():
        for one in copies:
            for param in (param for param in one.parameters() if param.requires_grad):
                step = torch.randn(param.shape, generator=generator).to(param)
                param.add_(step, alpha=noise * float(param.std(correction=0)))
    return copies
