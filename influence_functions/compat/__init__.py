"""The interface of `pytorch_influence_functions`, with results that mean what its manual says.

    import influence_functions.compat as ptif        # was: import pytorch_influence_functions as ptif

The numbers in its files keep the package's sign (−I: positive = harmful); the lists are rightly named.
"""

from .config import InfluenceConfig, get_default_config
from .files import influential_loader, load_results
from .log import init_logging
from .original import OriginalRun, run_original
from .run import calc_all_grad_then_test, calc_img_wise, calc_influences

__all__ = [
    "InfluenceConfig",
    "OriginalRun",
    "calc_all_grad_then_test",
    "calc_img_wise",
    "calc_influences",
    "get_default_config",
    "influential_loader",
    "init_logging",
    "load_results",
    "run_original",
]
