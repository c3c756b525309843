"""The interface of `pytorch_influence_functions`, with results that mean what its manual says.

    import influence_functions.compat as ptif        # was: import pytorch_influence_functions as ptif

The numbers in its files keep the package's sign (−I: positive = harmful); the lists are rightly named.

>>> import tempfile
>>> from torch.utils.data import DataLoader, TensorDataset
>>> points, classes = torch.randn(60, 4), torch.arange(60) % 3
>>> loader = DataLoader(TensorDataset(points, classes), batch_size=20)
>>> config = get_default_config() | {"num_classes": 3, "test_sample_num": 1, "outdir": tempfile.mkdtemp()}
>>> config |= {"solver": "kernel", "progress": False}  # or InfluenceConfig(…), which checks itself
>>> influences, harmful, helpful = calc_img_wise(config, nn.Linear(4, 3), loader, loader)
>>> same, *_ = calc_all_grad_then_test(config | {"outdir": tempfile.mkdtemp()}, nn.Linear(4, 3), loader, loader)
>>> sorted(influences), len(harmful), len(influences["0"]["influence"])
(['0', '1', '2'], 60, 60)
>>> load_results(config["outdir"] + "/influence_results_0_1.json").scores.shape
(3, 60)
>>> len(influential_loader(-influences["0"]["influence"], loader.dataset, share=0.5, batch_size=10))
3
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
