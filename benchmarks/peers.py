"""The methods that `quality.py` compares, one function each, every library called as its documentation recommends.

Each takes the trained models and the training images, prepares what does not depend on the value that is tuned
(damping, mostly), and returns a `Score`: (test images, value) → (m, n) scores. The sign is ours: positive = helpful.
Nothing here is timed or compared; that is the work of `quality.py`. Runs in `.bench-venv`, where the libraries are.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import influence_functions.compat as ptif
import notebook_support as ns
from influence_functions import MEASURES, InfluenceSettings, compute_influences
from influence_functions.data import as_source
from influence_functions.members import average
from influence_functions.problem import make_problem

Score = Callable[[ns.ImageData, float | None], NDArray[np.float32]]
Models = Sequence[tuple[nn.Module, float]]
"""(model, weight): for checkpoints of one training, TracIn's weight is the learning rate; for others it is 1."""


def as_dataset(data: ns.ImageData) -> TensorDataset:
    """Normalised images and labels, held in memory."""
    return TensorDataset(*data.batch(torch.arange(len(data))))


def as_loader(data: ns.ImageData, batch_size: int) -> DataLoader[Any]:
    """In order, as every library here wants it."""
    return DataLoader(as_dataset(data), batch_size=min(batch_size, len(data)))


# ── ours ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def ours(models: Models, train: ns.ImageData, **options: Any) -> Score:
    """`compute_influences` with its defaults but for `options`, of all the models at once."""
    chosen = [model for model, _ in models]

    def score(test: ns.ImageData, damping: float | None) -> NDArray[np.float32]:
        return compute_influences(chosen, train, test, damping=damping, **options).scores

    return score


def gradient_product(models: Models, train: ns.ImageData, measure: str = "loss") -> Score:
    """The baseline without any curvature: `solver="identity"`, for which damping is a mere factor."""

    def score(test: ns.ImageData, _: float | None) -> NDArray[np.float32]:
        return compute_influences(models[0][0], train, test, solver="identity", measure=measure).scores

    return score


def projected(models: Models, train: ns.ImageData, dimension: int = 4096, nonzero: int = 4) -> Score:
    """The second candidate for large models: ridge on margin gradients of one model, randomly projected.

    A sparse projection (Kane & Nelson 2014, arXiv:1012.1577): each of the p numbers is added, with random signs, to
    `nonzero` of the sums. The value: damping, in means of the projected second moment's eigenvalues.
    """
    settings = InfluenceSettings(measure="margin")
    problem, generator = make_problem(models[0][0], train, settings), torch.Generator().manual_seed(0)
    params = problem.size // problem.like.element_size()
    place = torch.randint(dimension, (nonzero, params), generator=generator)
    sign = (torch.randint(2, (nonzero, params), generator=generator) * 2 - 1).float()

    def sums(data: ns.ImageData) -> Tensor:
        source, found = as_source(data, "images"), []
        for chosen in torch.arange(len(data)).split(problem.settings.chunk):
            rows = problem.gradients(source, chosen)[0].dense()
            into = rows.new_zeros(len(rows), dimension)
            found.append(sum((into.index_add(1, p, rows * s) for p, s in zip(place, sign)), torch.zeros(())))
        return torch.cat(found)

    features = sums(train)
    values, vectors = torch.linalg.eigh(features.T @ features / len(features))

    def score(test: ns.ImageData, damping: float | None) -> NDArray[np.float32]:
        solved = (sums(test) @ vectors) / (values + (damping or 1.0) * values.mean())
        return (solved @ (features @ vectors).T).numpy()

    return score


# ── kronfluence ─────────────────────────────────────────────────────────────────────────────────────────────────────


def kronfluence(models: Models, train: ns.ImageData, measure: str = "loss") -> Score:
    """EK-FAC (the default strategy) on all Conv2d and Linear layers, true Fisher.

    Its CIFAR-10 example takes the margin of the test images and the loss of the training images. That changes no
    ranking, the margin's gradient being the loss's times 1 / (1 − p); so here `measure` is that of both. It takes one
    model; the scores of several are averaged here as ours are.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits, labels = model(batch[0]), batch[1]
            if sample:  # labels drawn from the model's own prediction make it the true Fisher
                labels = torch.multinomial(logits.detach().softmax(1), 1).flatten()
            return MEASURES[measure].values(logits, labels).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return MEASURES[measure].values(model(batch[0]), batch[1]).sum()

    folder, task, analyzers = tempfile.TemporaryDirectory(prefix="kronfluence-"), Classification(), []
    for k, (model, _) in enumerate(models):
        prepared = prepare_model(copy.deepcopy(model).eval(), task)
        analyzers.append(Analyzer(f"{k}", prepared, task, cpu=True, disable_tqdm=True, output_dir=folder.name))
        analyzers[-1].fit_all_factors("ekfac", as_dataset(train), 500, factor_args=FactorArguments(strategy="ekfac"))

    def score(test: ns.ImageData, damping: float | None, _: Any = folder) -> NDArray[np.float32]:
        sets = {"query_dataset": as_dataset(test), "train_dataset": as_dataset(train)}
        sizes = {"per_device_query_batch_size": 1000, "per_device_train_batch_size": 500}
        asked = {"score_args": ScoreArguments(damping_factor=damping), "overwrite_output_dir": True}
        for analyzer in analyzers:
            analyzer.compute_pairwise_scores("pairs", "ekfac", **sets, **sizes, **asked)
        return average([one.load_pairwise_scores("pairs")["all_modules"].float().numpy() for one in analyzers])

    return score


# ── dattri ──────────────────────────────────────────────────────────────────────────────────────────────────────────

DATTRI_BATCH = 2500  # fastest here: test gradients, and TRAK's random matrix, are made anew for every training batch


def dattri_task(models: Models, measure: str = "loss", trak: bool = False) -> Any:
    """Its task: what is measured (of test and training images, and in the curvature) in the style of torch.func.

    trak: in place of `measure` TRAK's own margin, of one image at a time.

    Its attributors are called under `torch.no_grad()`, which torch.func does not mind, as its TRAK example does: else
    autograd records every product with the Hessian, and 100 of them on 100 images take 10 GB.
    """
    from dattri.task import AttributionTask

    model = copy.deepcopy(models[0][0]).eval()

    def measured(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        return MEASURES[measure].values(functional_call(model, params, (data[0],)), data[1]).mean()

    def log_odds(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        log_probability = -F.cross_entropy(functional_call(model, params, (data[0][None],)), data[1][None])
        return log_probability - torch.log(1 - torch.exp(log_probability))

    weights = [copy.deepcopy(model.state_dict()) for model, _ in models]
    return AttributionTask(loss_func=log_odds if trak else measured, model=model, checkpoints=weights)


def dattri_cg(models: Models, train: ns.ImageData, hessian_images: int = 5000, block: int = 4) -> Score:
    """`IFAttributorCG`, 10 iterations (its default) on the Hessian of the first `hessian_images` in one batch.

    One batch because it sums the inverses of the batches, not the Hessians; and the training set in one batch because
    it would solve again for each. `block` test images are solved for at a time, which is all that memory allows.
    """
    from dattri.algorithm import IFAttributorCG

    whole, part = as_loader(train, len(train)), train.subset(range(min(hessian_images, len(train))))

    def score(test: ns.ImageData, damping: float | None) -> NDArray[np.float32]:
        attributor = IFAttributorCG(dattri_task(models), regularization=damping or 0.0)
        with torch.no_grad():  # see dattri_task
            attributor.cache(as_loader(part, len(part)))
            return attributor.attribute(whole, as_loader(test, block)).T.numpy()

    return score


def dattri_arnoldi(models: Models, train: ns.ImageData, hessian_images: int = 5000, dimensions: int = 50) -> Score:
    """`IFAttributorArnoldi`, 100 iterations (its default) on the Hessian of the first `hessian_images`.

    It takes the square roots of the eigenvalues of its `dimensions` (default: 100), so that a single negative one makes
    every score NaN, although it warns and means to leave such ones out: fewer dimensions are the way around.
    """
    from dattri.algorithm import IFAttributorArnoldi

    part = train.subset(range(min(hessian_images, len(train))))

    def score(test: ns.ImageData, damping: float | None) -> NDArray[np.float32]:
        attributor = IFAttributorArnoldi(dattri_task(models), proj_dim=dimensions, regularization=damping or 0.0)
        with torch.no_grad():  # see dattri_task
            attributor.cache(as_loader(part, len(part)))
            return attributor.attribute(as_loader(train, DATTRI_BATCH), as_loader(test, 1000)).T.numpy()

    return score


def dattri_ekfac(models: Models, train: ns.ImageData, measure: str = "loss") -> Score:
    """`IFAttributorEKFAC`: the Linear layers only (it knows no convolution), given labels (empirical Fisher)."""
    from dattri.algorithm import IFAttributorEKFAC

    attributor = IFAttributorEKFAC(dattri_task(models, measure))
    attributor.cache(as_loader(train, 500))

    def score(test: ns.ImageData, damping: float | None) -> NDArray[np.float32]:
        attributor.damping = damping or 0.0
        with torch.no_grad():  # see dattri_task
            return attributor.attribute(as_loader(train, DATTRI_BATCH), as_loader(test, 1000)).T.numpy()

    return score


def dattri_trak(models: Models, train: ns.ImageData, dimension: int = 2048) -> Score:
    """`TRAKAttributor` with its own margin and probability, `dimension` as in its CIFAR benchmark; any models."""
    from dattri.algorithm import TRAKAttributor

    model = copy.deepcopy(models[0][0]).eval()

    def probability(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        return torch.exp(-F.cross_entropy(functional_call(model, params, (data[0][None],)), data[1][None]))

    def score(test: ns.ImageData, damping: float | None) -> NDArray[np.float32]:
        projector = {"proj_dim": dimension, "device": "cpu"}
        attributor = TRAKAttributor(
            dattri_task(models, trak=True), probability, projector, regularization=damping or 0.0
        )
        with torch.no_grad():
            attributor.cache(as_loader(train, DATTRI_BATCH))
            return attributor.attribute(as_loader(test, 1000)).T.numpy()

    return score


# ── pyDVL ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def pydvl_matrix(fitted: Any, test: ns.ImageData, train: ns.ImageData) -> NDArray[np.float32]:
    """Its sequential calculator over chunks of test and training images."""
    from pydvl.influence import SequentialInfluenceCalculator
    from pydvl.influence.torch.util import NestedTorchCatAggregator

    lazy = SequentialInfluenceCalculator(fitted).influences(as_loader(test, 1000), as_loader(train, 500))
    return lazy.compute(aggregator=NestedTorchCatAggregator()).numpy()


def pydvl_cg(models: Models, train: ns.ImageData, hessian_images: int = 5000, iterations: int = 10) -> Score:
    """`CgInfluence`, all right-hand sides at once, at most `iterations` (dattri's default; its own is 10·p)."""
    from pydvl.influence.torch import CgInfluence

    part = train.subset(range(min(hessian_images, len(train))))
    fitted = CgInfluence(
        copy.deepcopy(models[0][0]).eval(),
        F.cross_entropy,
        regularization=1.0,
        maxiter=iterations,
        solve_simultaneously=True,
        warn_on_max_iteration=False,
    ).fit(as_loader(part, 500))

    def score(test: ns.ImageData, damping: float | None) -> NDArray[np.float32]:
        return pydvl_matrix(fitted.with_regularization(damping), test, train)

    return score


def pydvl_nystroem(models: Models, train: ns.ImageData, rank: int = 10) -> Score:
    """`NystroemSketchInfluence` of the Hessian on all training images, of the rank its documentation shows."""
    from pydvl.influence.torch import NystroemSketchInfluence

    model = copy.deepcopy(models[0][0]).eval()
    fitted = NystroemSketchInfluence(model, F.cross_entropy, regularization=1.0, rank=rank).fit(as_loader(train, 500))

    def score(test: ns.ImageData, damping: float | None) -> NDArray[np.float32]:
        return pydvl_matrix(fitted.with_regularization(damping), test, train)

    return score


# ── captum and pytorch_influence_functions ──────────────────────────────────────────────────────────────────────────


def captum_tracin(models: Models, train: ns.ImageData, measure: str = "loss") -> Score:
    """`TracInCP`, weighted by learning rates; the value: how many checkpoints, evenly spread, with the last."""
    from captum.influence import TracInCP

    model = copy.deepcopy(models[-1][0]).eval()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return MEASURES[measure].values(outputs, targets).sum()

    def load(target: nn.Module, checkpoint: tuple[nn.Module, float]) -> float:
        target.load_state_dict(checkpoint[0].state_dict())
        return checkpoint[1]

    def score(test: ns.ImageData, count: float | None) -> NDArray[np.float32]:
        step = max(len(models) // int(count or len(models)), 1)
        chosen = list(models)[::-1][::step][::-1]
        tracin = TracInCP(
            model, as_dataset(train), chosen, load, loss_fn=loss, batch_size=500, sample_wise_grads_per_batch=True
        )
        return tracin.influence(as_loader(test, 1000)).detach().numpy()

    return score


def package(models: Models, train: ns.ImageData, depth: int = 10) -> Score:
    """pytorch_influence_functions 0.1.1, whose depth does nothing (ANCHORS: never fed back), so a short one will do.

    It prints −I: the sign is turned here. The value that could be tuned is the scale.
    """

    def score(test: ns.ImageData, scale: float | None) -> NDArray[np.float32]:
        rows = []
        for index in range(len(test)):
            one = as_dataset(test.subset([index]))
            rows.append(-ptif.run_original(models[0][0], as_dataset(train), one, depth, scale=scale or 25.0).influence)
        return np.array(rows, dtype=np.float32)

    return score
