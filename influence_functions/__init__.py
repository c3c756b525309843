"""Which training samples make a model decide as it does? Influence functions for any PyTorch model, in one call.

    I(z, z_test) = ∇L(z_test)ᵀ (H + λI)⁻¹ ∇L(z) / n  ≈  L(z_test; θ trained without z) − L(z_test; θ)

THE SIGN: a positive influence is HELPFUL (without z the test loss would rise), a negative one is HARMFUL.
It is stated here once, holds everywhere in the package, and is guarded by a test that retrains.

    compute_influences   (m, n) scores of every training sample on m test samples
    mean_influences      (n,) its mean over a whole test set         self_influences   (k,) of samples on themselves
    sweep_damping        the same scores at several dampings, for the price of little more than one
    pixel_influences     (m, k, *shape): which pixels of k training samples help, when changed, and which harm
    noisy_copies         a finished model and its neighbours, to average over where a training has left no checkpoints
    InfluenceSettings    how: solver, measure, damping, …            Influences, Health   what came out, and how well

A new kind of anything is one object of yours, and no file of ours is touched:

    Measure, MEASURES    a task: loss, margin, squared_error, binary, tokens       tokens_measure
    layer_rule           the gradients of a layer type
    Source               where samples come from
    solver, SOLVERS      a way to apply (H + λI)⁻¹: kernel, ekfac, ekfac_kernel, cg, lissa, identity

    influence_functions.metrics   how good are scores? linear datamodeling score, noise ceiling, stability
    influence_functions.exact     small models where the truth can be computed: refitting, leave-one-out
    influence_functions.compat    the interface of `pytorch_influence_functions`, and the original made callable

Words: `params` θ (p of them), n `train` and m `test` samples, `damping` λ, `scores` the (m, n) influence matrix.
Sources: Koh & Liang, "Understanding Black-box Predictions via Influence Functions", ICML 2017, arXiv:1703.04730;
Agarwal, Bullins & Hazan, "Second-Order Stochastic Optimization for Machine Learning in Linear Time" (LiSSA), JMLR
2017; Martens, "New Insights and Perspectives on the Natural Gradient Method", JMLR 2020 (Fisher and Gauss-Newton).
"""

from ._support import CorruptFileError, NonFiniteError, pick_device
from .data import Source
from .ensemble import noisy_copies
from .layers import layer_rule
from .measures import MEASURES, Measure, tokens_measure
from .pixels import pixel_influences
from .results import Influences
from .scores import compute_influences, mean_influences, self_influences, sweep_damping
from .settings import InfluenceSettings
from .solvers import SOLVERS, Health, solver

__version__ = "1.0.0"
__all__ = [
    "MEASURES",
    "SOLVERS",
    "CorruptFileError",
    "Health",
    "InfluenceSettings",
    "Influences",
    "Measure",
    "NonFiniteError",
    "Source",
    "compute_influences",
    "layer_rule",
    "mean_influences",
    "noisy_copies",
    "pick_device",
    "pixel_influences",
    "self_influences",
    "solver",
    "sweep_damping",
    "tokens_measure",
]
