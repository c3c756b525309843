"""Both modes of `pytorch_influence_functions`, with its files: nothing lost, nothing mixed."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from .._support import CorruptFileError, atomic_path, in_parallel, plain_torch
from ..data import Source, as_source, checksum
from ..problem import Problem, make_problem
from ..scoring import join_scores, score_training
from ..settings import InfluenceSettings
from ..solvers import Health, Prepared, Solved, prepare
from ..stack import Gradients
from .checks import choose_tests, keep_previous, model_checksum
from .config import InfluenceConfig, as_config, batch_size_of
from .kept import Kept, Parts, entry_text
from .log import LOG, logging_of

BLOCK = {"kernel": 500, "identity": 500}  # test samples solved at once: m·p numbers are held;
STEPWISE_BLOCK = 10  # by the other solvers, which hold m · batch · activations
SHARD = 1000  # training gradients a file


@plain_torch()
def calc_img_wise(
    config: InfluenceConfig | Mapping[str, Any], model: nn.Module, train_loader: Any, test_loader: Any
) -> tuple[dict[str, Any], list[int], list[int]]:
    """Influence of all training images, one test image after the other (`config.jobs` at once).

    config: an `InfluenceConfig`, or a dict of the package; loaders: DataLoaders of map-style data sets, of any batch
    size, shuffled or not: indices always count the data set. Returns (influences, harmful, helpful): the content of the
    results file, and all training indices by their mean harm and mean help, most first.

    influences: by test index (a string) label, num_in_dataset, time_calc_influence_s, influence (an array of n numbers
    with the sign of the package, −I: positive = harmful), the 500 most harmful and most helpful indices, rightly named,
    and residual: how far its solution is from solving its equation (0: exact; see `Health`).
    Written to `<outdir>/influence_results_<start>_<number>.json`, with the configuration in
    `influences_results_meta_<start>-<number>.json`. A run that was killed goes on after its last finished test image;
    results of another configuration, model or data set are never mixed in, but renamed.
    """
    return _Run.prepare(config, model, train_loader, test_loader).finish(block=1, stored=False)


def calc_influences(
    config: InfluenceConfig | Mapping[str, Any], model: nn.Module, train_loader: Any, test_loader: Any
) -> tuple[dict[str, Any], list[int], list[int]]:
    """Whichever of the two modes `calc_method` names."""
    own = as_config(config)
    mode = {"img_wise": calc_img_wise, "all_grad_then_test": calc_all_grad_then_test}[own.calc_method]
    return mode(own, model, train_loader, test_loader)


@plain_torch()
def calc_all_grad_then_test(
    config: InfluenceConfig | Mapping[str, Any], model: nn.Module, train_loader: Any, test_loader: Any
) -> tuple[dict[str, Any], list[int], list[int]]:
    """The same numbers as `calc_img_wise` (to 1e-5), many test images at a time: faster, the more there are.

    Without `save_pth` nothing is kept and nothing is held: each training gradient is used for a block of test images
    and forgotten. With it, two folders of safetensors files are written there and used again by any later call:

        s_test/<test index>.safetensors     "s_test" (p,)         4·p bytes a test image (in float32)
        grad_z/<first>-<last>.safetensors   "grad_z" (rows, p)    4·p bytes a training image: n·p·4 in all

    That is 12.4 GB for 62,006 parameters and 50,000 images; it pays only where reading is faster than computing
    again. The header names the model, the data and the settings; files of others are refused.
    The test images of a block are finished together (500 with solver "kernel", 10 with "lissa" or "cg"): so many may
    be lost when a run is killed.
    """
    run = _Run.prepare(config, model, train_loader, test_loader)
    return run.finish(run.block, stored=run.config.save_pth is not None)


@dataclass(frozen=True, eq=False)
class _Read(Solved):
    """Solutions (m, p) that were read from their files, without the gradients that they are of."""

    matrix: Tensor
    health: Health
    reads_once = True

    def scores(self, chunk: Gradients) -> Tensor:
        """Inner products of gradients and solutions."""
        return chunk.against(chunk.like(self.matrix))

    def own(self) -> Tensor:
        """Unknown."""
        raise ValueError("solutions that were read from a file have no test gradients with them")

    def directions(self) -> Tensor:
        """(m, p)."""
        return self.matrix


@dataclass(frozen=True, eq=False)
class _Run:
    """One call of the package's interface: what is asked, and where each finished test image is kept."""

    config: InfluenceConfig
    model: nn.Module
    train: Source
    test: Source
    settings: InfluenceSettings
    chosen: NDArray[np.int64]
    labels: NDArray[np.int64]
    keys: dict[str, str]

    @classmethod
    def prepare(cls, config: InfluenceConfig | Mapping[str, Any], model: nn.Module, train: Any, test: Any) -> _Run:
        """Check everything, choose the test images, and name the run by what it is made of."""
        own = as_config(config)
        settings = own.settings(batch_size_of(train))
        sources = as_source(train, "train_loader"), as_source(test, "test_loader")
        (train_sum, _), (test_sum, targets) = (checksum(source) for source in sources)
        labels = torch.cat(targets).cpu().numpy()
        gradients = f"{type(model).__name__}-{model_checksum(model, sources[0]):08x}-{train_sum}"
        about = settings.describe() | {"jobs": 0}  # how many at once changes nothing
        del about["memory"]  # nor does it
        solved = f"{gradients}-{test_sum}-{zlib.crc32(json.dumps(about, sort_keys=True).encode()):08x}"
        keys = {"grad_z": gradients, "s_test": solved}
        return cls(own, model, *sources, settings, choose_tests(own, labels), labels, keys)

    @cached_property
    def problem(self) -> Problem:
        """The model and the training data, checked."""
        return make_problem(self.model, self.train, self.settings)

    @property
    def block(self) -> int:
        """Test samples that are solved for at once, at most."""
        return BLOCK.get(self.config.solver, STEPWISE_BLOCK)

    @cached_property
    def prepared(self) -> Prepared:
        """Prepared once: eigenvalues and factors depend on the training samples only."""
        return prepare(self.problem, min(len(self.chosen), self.block))

    def finish(self, block: int, stored: bool) -> tuple[dict[str, Any], list[int], list[int]]:
        """Compute what is left in blocks of test samples, put everything together, write it."""
        with logging_of(self.config):
            LOG.info("running on %s test images", len(self.chosen))
            left = [int(i) for i in self.chosen if not self.parts.finished(int(i))]
            blocks = [left[start : start + block] for start in range(0, len(left), block)]
            jobs = self.config.jobs if block == 1 else 1
            if left and jobs != 1:
                _ = self.prepared  # prepared here, it goes to the processes with everything else
            finished = in_parallel(partial(self.compute, stored=stored), blocks, jobs, ordered=False)
            hidden = not (self.config.progress and blocks)
            for indices in tqdm(finished, "influence", len(blocks), leave=False, disable=hidden):
                LOG.info("finished test image %s", ", ".join(map(str, indices)))
            return self.assemble()

    @cached_property
    def parts(self) -> Parts:
        """Where finished test samples wait for the rest; its name belongs to this very run, and these test samples."""
        asked = zlib.crc32(self.chosen.tobytes(), zlib.crc32(self.keys["s_test"].encode()))
        return Parts(Path(self.config.outdir) / f"unfinished-{asked:08x}")

    def kept(self, name: str) -> Kept:
        """Where `save_pth` keeps "s_test" or "grad_z"."""
        return Kept(Path(self.config.save_pth or "") / name, name, self.keys[name])

    def compute(self, indices: list[int], stored: bool) -> list[int]:
        """Score a block of test samples, and keep each in a file of its own."""
        start, chosen = time.perf_counter(), torch.tensor(indices)
        self.problem.check_tests(self.test, chosen)
        if self.config.save_pth is None:
            parts = [self.scored(part) for part in chosen.split(self.prepared.plan.tests)]
            scores = np.concatenate([part for part, _ in parts])
            residuals = [residual for _, each in parts for residual in each]
        else:
            scores, residuals = self.scores_kept(indices, stored)
        seconds = (time.perf_counter() - start) / len(indices)
        for index, residual, row in zip(indices, residuals, scores):
            self.parts.write(index, int(self.labels[index]), seconds, residual, -row)
        return indices

    def scored(self, chosen: Tensor) -> tuple[NDArray[Any], list[float]]:
        """(k, n) scores of as many test samples as fit into the memory, and their residuals."""
        problem = self.prepared.problem
        solved = self.prepared.solve(problem.gradients(self.test, chosen)[0])
        return score_training([(problem, [solved])])[0][0][0], [solved.health.residual] * len(chosen)

    def scores_kept(self, indices: list[int], stored: bool) -> tuple[NDArray[Any], list[float]]:
        """(k, n) scores by way of files in `save_pth`: s_test always, the training gradients when `stored`."""
        directions, residuals = self.directions(indices)
        if stored:
            return join_scores([directions @ rows.T for rows in self.gradients()]), residuals
        health = Health(self.config.solver, max(residuals), self.settings.damping or math.nan)
        return score_training([(self.problem, [_Read(directions, health)])])[0][0][0], residuals

    def directions(self, indices: list[int]) -> tuple[Tensor, list[float]]:
        """(k, p) s_test of the test samples, and their residuals: from their files, or solved and written there."""
        kept = self.kept("s_test")
        if missing := [i for i in indices if not kept.path(i).exists()]:
            solved = self.prepared.solve(self.problem.gradients(self.test, torch.tensor(missing))[0])
            for i, row in zip(missing, solved.directions()):
                kept.write(i, row, "test", residual=solved.health.residual)
        rows, headers = zip(*map(kept.read, indices))
        return torch.stack(rows).to(self.problem.device), [float(header["residual"]) for header in headers]

    def gradients(self) -> Iterator[Tensor]:
        """Chunks (≤ SHARD, p) of the training gradients: from their files, or computed and written there."""
        kept, problem = self.kept("grad_z"), self.problem
        for chosen in torch.arange(self.train.size).split(SHARD):
            stem = f"{int(chosen[0])}-{int(chosen[-1])}"
            if not kept.path(stem).exists():
                rows = [problem.maker(*batch).dense() for batch in problem.batches(problem.train, chosen)]
                kept.write(stem, torch.cat(rows), "training")
            yield kept.read(stem)[0].to(problem.device)

    def assemble(self) -> tuple[dict[str, Any], list[int], list[int]]:
        """All test images in one file, the configuration in another; both as the package calls them."""
        outdir, stem = Path(self.config.outdir), self.config.file_stem
        results = outdir / f"influence_results_{stem}.json"
        meta = outdir / f"influences_results_meta_{stem.replace('_', '-')}.json"
        about = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self.config).items()}
        about |= {"test_sample_index_list": self.chosen.tolist(), "made_with": self.keys["s_test"]}
        total = np.zeros(self.train.size)
        influences: dict[str, Any] = {}
        keep_previous(results)
        with atomic_path(results) as temporary, temporary.open("w", encoding="utf-8") as file:
            for index in map(int, self.chosen):
                entry = self.parts.read(index)
                if entry is None:
                    raise CorruptFileError(f"{self.parts.path(index)} was damaged while the run went on; call it again")
                file.write(f'{"," if influences else "{"}\n"{index}": {entry_text(entry)}')
                influences[str(index)] = entry
                total += entry["influence"]
            file.write("\n}\n")
        keep_previous(meta)
        with atomic_path(meta) as temporary:
            temporary.write_text(json.dumps(about, indent=2), encoding="utf-8")
        self.parts.clear()
        ranked = np.argsort(-total, kind="stable")
        return influences, ranked.tolist(), ranked[::-1].tolist()
