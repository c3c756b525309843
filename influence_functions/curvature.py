"""Products with the curvature H, and its largest eigenvalue."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .data import Inputs, call
from .problem import Problem

# torch's own jvp raises this on first use; it says nothing about our code.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)


def curvature_product(problem: Problem, vectors: Tensor, indices: Tensor) -> Tensor:
    """(k, p) → (k, p): the mean Gauss-Newton matrix or Hessian of the samples at `indices`, times each vector.

    Gauss-Newton is Jᵀ(∂²M/∂outputs²)J: forward mode to the outputs, their small Hessian, reverse mode back.
    """
    maker, total = problem.maker, torch.zeros_like(vectors)
    rows = maker.unflatten(vectors)
    for inputs, targets in problem.batches(problem.train, indices):
        product = partial(_product, problem, inputs, targets)
        try:
            found = vmap(product)(rows)
        except (RuntimeError, NotImplementedError):  # a fused operation that has no forward mode, or none under vmap
            found = _without_fused_operations(product, rows)
        total += maker.flatten(found)
    return total / len(indices)


def _product(problem: Problem, inputs: Inputs, targets: Tensor, vector: dict[str, Tensor]) -> dict[str, Tensor]:
    """The curvature of the measures' sum on a batch, times a vector."""
    maker, model = problem.maker, problem.maker.recorder.scratch()

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return call(model, inputs, values)

    def summed(out: Tensor) -> Tensor:
        return problem.measure.values(out, targets).sum()

    def whole(values: dict[str, Tensor]) -> Tensor:
        return summed(outputs(values))

    if problem.settings.curvature == "hessian":
        return jvp(grad(whole), (maker.params,), (vector,))[1]
    moved: tuple[Tensor, ...] = jvp(outputs, (maker.params,), (vector,))
    curved = jvp(grad(summed), moved[:1], moved[1:])[1]
    return vjp(outputs, maker.params)[1](curved)[0]


def _without_fused_operations(
    product: Callable[[dict[str, Tensor]], dict[str, Tensor]], rows: dict[str, Tensor]
) -> dict[str, Tensor]:
    """`product` of each row, slowly, with attention and recurrent layers made of operations that can do all modes."""
    count, fastpath = len(next(iter(rows.values()))), torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            found = [product({name: row[i] for name, row in rows.items()}) for i in range(count)]
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"torch cannot differentiate this model twice ({error}); use solver='kernel'") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return {name: torch.stack([one[name] for one in found]) for name in rows}


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
