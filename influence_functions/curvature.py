"""Products with the curvature H, and its largest eigenvalue."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp, vmap

from .data import Inputs, arguments
from .problem import Problem

# torch's own jvp raises this on first use; it says nothing about our code.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)


def curvature_product(problem: Problem, vectors: Tensor, indices: Tensor) -> Tensor:
    """(k, p) → (k, p): the mean Gauss-Newton matrix or Hessian of the samples at `indices`, times each vector.

    Gauss-Newton is Jᵀ(∂²M/∂outputs²)J: forward mode to the outputs, their small Hessian, reverse mode back.
    """
    maker, total = problem.maker, torch.zeros_like(vectors)
    for inputs, targets in problem.batches(problem.train, indices):

        def outputs(values: dict[str, Tensor], inputs: Inputs = inputs) -> Tensor:
            return functional_call(maker.model, values, *arguments(inputs))

        def summed(out: Tensor, targets: Tensor = targets) -> Tensor:
            return problem.measure.values(out, targets).sum()

        def gauss_newton(vector: dict[str, Tensor]) -> dict[str, Tensor]:
            moved: tuple[Tensor, ...] = jvp(outputs, (maker.params,), (vector,))
            curved = jvp(grad(summed), moved[:1], moved[1:])[1]
            return vjp(outputs, maker.params)[1](curved)[0]

        def hessian(vector: dict[str, Tensor]) -> dict[str, Tensor]:
            def whole(values: dict[str, Tensor]) -> Tensor:
                return summed(outputs(values))

            return jvp(grad(whole), (maker.params,), (vector,))[1]

        product = gauss_newton if problem.settings.curvature == "gauss_newton" else hessian
        total += maker.flatten(vmap(product)(maker.unflatten(vectors)))
    return total / len(indices)


def damped_product(problem: Problem, vectors: Tensor, indices: Tensor, damping: float) -> Tensor:
    """(k, p) → (k, p): H + λI, with H of the samples at `indices`, times each vector."""
    return curvature_product(problem, vectors, indices) + damping * vectors


def largest_eigenvalue(product: Callable[[Tensor], Tensor], like: Tensor, seed: int = 0, steps: int = 30) -> float:
    """Largest |eigenvalue| of a symmetric matrix given as (1, p) → (1, p), by power iteration (to about 1 %).

    >>> matrix = torch.diag(torch.tensor([1.0, -3.0]))
    >>> round(largest_eigenvalue(lambda vector: vector @ matrix, matrix[:1]), 2)
    3.0
    """
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(1, like.shape[1], generator=generator).to(like)
    eigenvalue = 0.0
    for _ in range(steps):
        vector = vector / vector.norm()
        image = product(vector)
        previous, eigenvalue = eigenvalue, float(image.norm())
        if eigenvalue == 0 or abs(eigenvalue - previous) < 1e-3 * eigenvalue:
            break
        vector = image
    return eigenvalue


def largest_curvature(problem: Problem, indices: Tensor) -> float:
    """Largest |eigenvalue| of H (without damping) on the training samples at `indices`."""
    like = problem.maker.flatten({name: param[None] for name, param in problem.maker.params.items()})
    return largest_eigenvalue(partial(curvature_product, problem, indices=indices), like)
