"""Ways to apply (H + λI)⁻¹, compared in the open: `SOLVERS` by name."""

from .base import SOLVERS, Cost, Directions, Health, Prepared, Solved, solver
from .cg import ConjugateGradients
from .ekfac import Ekfac
from .ekfac_kernel import EkfacKernel
from .identity import Identity
from .kernel import Kernel
from .lissa import Lissa
from .plan import check_solver, prepare

__all__ = [
    "SOLVERS",
    "ConjugateGradients",
    "Cost",
    "Directions",
    "Ekfac",
    "EkfacKernel",
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
