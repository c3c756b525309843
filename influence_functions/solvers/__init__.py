"""Ways to apply (H + λI)⁻¹, compared in the open: `SOLVERS` by name."""

from .base import SOLVERS, Directions, Health, Prepared, Solved, check_solver, prepare, solver
from .cg import ConjugateGradients
from .identity import Identity
from .kernel import Kernel
from .lissa import Lissa

__all__ = [
    "SOLVERS",
    "ConjugateGradients",
    "Directions",
    "Health",
    "Identity",
    "Kernel",
    "Lissa",
    "Prepared",
    "Solved",
    "check_solver",
    "prepare",
    "solver",
]
