"""How good are the scores, against the libraries a user would pick instead? One command, one table.

    make bench                       # installs the libraries into .bench-venv, never into .venv, and runs this
    python benchmarks/quality.py     # the same, in an environment that has them

Two networks, a table each: `Net`, and a ResNet-8 with batch normalisation (`--model ResNet-8`). In each, the same
5,000 training images, 1,000 test images, models and ground truth for all. The ground truth: random halves of the
training images (100, or 50), each trained on several times (three, or two); `linear_datamodeling_score` says how well
the scores foretell which half leaves a test image with a low loss. Every method's damping (or other main value) is
chosen by that same score, ours too, on the first test images only; what is then reported is for all test images. A
library that lets its user choose what is measured (loss or margin) has a row for each; TRAK's is the margin, and where
curvature is the Hessian, it is that of the loss.

Each method runs in a process of its own, so that its peak memory is its own. Its time goes from data and models in
memory to the finished matrix; imports and tuning are left out. What has been measured is kept in data/quality/, one
record and one matrix a method: a run that was stopped goes on, and to measure again is to delete. A method that fails
or runs out of time stays in the table, with the reason. INFLUENCE_FAST=1: tiny data and a made-up truth, to try it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import peers
import torch
from numpy.typing import NDArray
from speed import peak

import notebook_support as ns
from influence_functions import NonFiniteError
from influence_functions._support import atomic_path, read_if_whole
from influence_functions.metrics import LDS, linear_datamodeling_score, noise_ceiling

FAST = ns.run_mode().fast
PER_CLASS, TEST_IMAGES = (10, 12) if FAST else (500, 1000)
TUNING_IMAGES = 200  # the first ones
SEEDS, CHECKPOINTS = 10, (1,) if FAST else (4, 7, 10, 13, 16)  # epochs
FOLDER = ns.run_mode().data / "quality"
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
SMALL = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)  # what EK-FAC likes best where there is batch normalisation
OURS = (None, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # the default is about 1 for the margin, 0.3 for the loss
EKFAC = (None, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Ground:
    """The truth that a table is made for: a network, and how often it was trained on how many halves of the images."""

    config: ns.TrainConfig
    halves: int
    repeats: int
    file: str

    @property
    def path(self) -> Path:
        """Where the retrainings are kept."""
        return ns.run_mode().data / self.file


EPOCHS = 1 if FAST else 16
GROUNDS = {
    "Net": Ground(ns.TrainConfig(epochs=EPOCHS), *((8, 2) if FAST else (100, 3)), "retraining-halves.npz"),
    "ResNet-8": Ground(
        ns.TrainConfig(epochs=EPOCHS, peak_lr=0.3, model="ResNet-8"),
        *((8, 2) if FAST else (50, 2)),
        "retraining-halves-resnet-8.npz",
    ),
}


@dataclass(frozen=True, eq=False)
class Method:
    """One row of the table.

    values    what is tried, None being the library's own default; one value: nothing to tune
    models    how many trainings it gets
    checkpoints   whether it gets the same five checkpoints of each training, in place of the finished model
    images    test images, fewer than all where it is too slow: time is then scaled, the score is for those images
    like      the method whose chosen value it takes over, in place of tuning
    network   whose table it is in
    """

    name: str
    function: str
    library: str = "notebook_support"
    options: dict[str, Any] = field(default_factory=dict)
    values: tuple[float | None, ...] = (None,)
    models: int = 1
    checkpoints: bool = False
    images: int = TEST_IMAGES
    like: str = ""
    limit_s: int = 900
    note: str = ""
    network: str = "Net"

    @property
    def file(self) -> Path:
        """Its record; the matrix lies beside it."""
        folder = FOLDER if self.network == "Net" else FOLDER / self.network.lower()
        return folder / (re.sub(r"\W+", "-", self.name).strip("-").lower() + ".json")


DATTRI, PYDVL = "dattri.algorithm", "pydvl.influence.torch"
HESSIAN, MARGIN = {"hessian_images": 1000}, {"measure": "margin"}
OF_BOTH = "margin of training and test images"
SLOW, TRAK = 12, "dimension 2,048"
FACTORS, BOTH, MIXED = {"solver": "ekfac"}, {"solver": "ekfac_kernel"}, "ours, EK-FAC + kernel"
FEWER = FACTORS | {"samples": 500}
OF_NET = (
    Method("ours", "ours", values=OURS, note="the default: kernel, margin, 2,000 sampled images"),
    Method("ours, fast", "ours", options={"samples": 500}, values=OURS, note="500 sampled images"),
    Method("ours, all images", "ours", options={"samples": 5000}, like="ours", note="curvature of all 5,000"),
    Method("ours, loss", "ours", options={"measure": "loss"}, values=OURS, note="measure='loss'"),
    Method("ours, EK-FAC", "ours", options=FACTORS, values=EKFAC, note="solver='ekfac', 2,000 sampled images"),
    Method("ours, EK-FAC, fast", "ours", options=FEWER, values=EKFAC, note="500 sampled images"),
    Method(MIXED, "ours", options=BOTH, values=EKFAC, note="solver='ekfac_kernel'"),
    Method("gradient product", "gradient_product", note="no curvature: what every method must beat"),
    Method("gradient product, margin", "gradient_product", options=MARGIN),
    Method("kronfluence EK-FAC", "kronfluence", "kronfluence.analyzer", values=(None, 1e-10, *SMALL, *DAMPINGS[:4])),
    Method(
        "kronfluence EK-FAC, margin",
        "kronfluence",
        "kronfluence.analyzer",
        MARGIN,
        (None, *SMALL, *DAMPINGS[:4]),
        note=OF_BOTH,
    ),
    Method("dattri EK-FAC", "dattri_ekfac", DATTRI, values=(0.0, *DAMPINGS), note="Linear layers only: its limit"),
    Method("dattri EK-FAC, margin", "dattri_ekfac", DATTRI, MARGIN, (0.0, *DAMPINGS), note=OF_BOTH),
    Method(
        "dattri Arnoldi",
        "dattri_arnoldi",
        DATTRI,
        HESSIAN,
        (0.0, 1e-1, 1.0, 10.0),
        note="Hessian of 1,000 images; 50 dimensions, as 100 end in NaN",
    ),
    Method(
        "dattri CG",
        "dattri_cg",
        DATTRI,
        HESSIAN,
        (1e-1, 1.0, 10.0, 100.0),
        images=SLOW,
        note="Hessian of 1,000 images",
    ),
    Method("dattri TRAK", "dattri_trak", DATTRI, values=(0.0, 1.0, 10.0, 100.0), note=TRAK),
    Method("pyDVL Nyström, rank 10", "pydvl_nystroem", PYDVL, {"rank": 10}, DAMPINGS, note="rank of its documentation"),
    Method("pyDVL Nyström, rank 50", "pydvl_nystroem", PYDVL, {"rank": 50}, DAMPINGS),
    Method(
        "pyDVL CG",
        "pydvl_cg",
        PYDVL,
        HESSIAN,
        (1e-1, 1.0, 10.0, 100.0),
        images=SLOW,
        note="Hessian of 1,000 images, at most 10 iterations",
    ),
    Method(
        "captum TracInCP, 5 checkpoints",
        "captum_tracin",
        "captum.influence",
        values=(1, 2, 5),
        checkpoints=True,
        note="tuned: how many of the five",
    ),
    Method(
        "captum TracInCP, margin, 5 checkpoints",
        "captum_tracin",
        "captum.influence",
        MARGIN,
        (1, 2, 5),
        checkpoints=True,
        note=OF_BOTH,
    ),
    Method("dattri TRAK, 5 checkpoints", "dattri_trak", DATTRI, checkpoints=True, like="dattri TRAK", note=TRAK),
    Method(
        "kronfluence EK-FAC, margin, 5 checkpoints",
        "kronfluence",
        "kronfluence.analyzer",
        MARGIN,
        checkpoints=True,
        like="kronfluence EK-FAC, margin",
        note="takes one model: the scores of each, averaged as ours are",
    ),
    Method("ours, 5 checkpoints", "ours", checkpoints=True, like="ours", note="what the notebooks show"),
    Method("ours, fast, 5 checkpoints", "ours", options={"samples": 500}, checkpoints=True, like="ours, fast"),
    Method("ours, EK-FAC, 5 checkpoints", "ours", options=FACTORS, checkpoints=True, like="ours, EK-FAC"),
    Method(f"{MIXED}, 5 checkpoints", "ours", options=BOTH, checkpoints=True, like=MIXED),
    Method("ours, loss, 5 checkpoints", "ours", options={"measure": "loss"}, checkpoints=True, like="ours, loss"),
    Method(
        "pytorch_influence_functions",
        "package",
        images=3,
        note="10 of its 5,000 recursions (they change nothing in 0.1.1), so its time is a lower bound; sign turned",
    ),
    Method("ours, 5 models", "ours", models=5, like="ours"),
    Method("dattri TRAK, 5 models", "dattri_trak", DATTRI, models=5, like="dattri TRAK", note=TRAK),
    Method(
        "captum TracInCP, 5 models",
        "captum_tracin",
        "captum.influence",
        values=(5,),
        models=5,
        note="the five final models",
    ),
    Method("ours, 10 models", "ours", models=10, like="ours"),
    Method("ours, 10 × 5 checkpoints", "ours", models=10, checkpoints=True, like="ours", note="ten trainings"),
    Method("ours, EK-FAC, 10 models", "ours", options=FACTORS, models=10, like="ours, EK-FAC"),
    Method("dattri TRAK, 10 models", "dattri_trak", DATTRI, models=10, like="dattri TRAK", note=TRAK),
)
LOSS, KERNEL = {"measure": "loss"}, {"solver": "kernel"}
IN_BOTH = (
    *("ours, EK-FAC", "ours, EK-FAC, fast", "ours, EK-FAC, 5 checkpoints"),
    *("gradient product", "gradient product, margin", "kronfluence EK-FAC", "kronfluence EK-FAC, margin"),
    *("kronfluence EK-FAC, margin, 5 checkpoints", "dattri EK-FAC, margin", "dattri TRAK"),
    *("dattri TRAK, 5 checkpoints", "captum TracInCP, margin, 5 checkpoints"),
)
OF_RESNET = (
    Method(MIXED, "ours", options=BOTH, values=EKFAC, note="solver='ekfac_kernel'"),
    Method(f"{MIXED}, loss", "ours", options=BOTH | LOSS, values=EKFAC, note="measure='loss'"),
    Method(f"{MIXED}, 5 checkpoints", "ours", options=BOTH, checkpoints=True, like=MIXED),
    Method(f"{MIXED}, 3 models", "ours", options=BOTH, models=3, like=MIXED),
    Method("ours, EK-FAC, loss", "ours", options=FACTORS | LOSS, values=EKFAC, note="measure='loss'"),
    Method("ours, kernel", "ours", options=KERNEL, values=OURS, note="2,000 sampled images"),
    Method("ours, kernel, loss", "ours", options=KERNEL | LOSS, values=OURS, note="measure='loss'"),
    Method("ours, kernel, 5 checkpoints", "ours", options=KERNEL, checkpoints=True, like="ours, kernel"),
    Method("ours, projected", "projected", values=(1e-3, 1e-2, 1e-1, 1.0), note="ridge on 4,096 random sums"),
    *(method for method in OF_NET if method.name in IN_BOTH),
    Method("ours, EK-FAC, fast, 5 checkpoints", "ours", options=FEWER, checkpoints=True, like="ours, EK-FAC, fast"),
)
METHODS = (*OF_NET, *(dataclasses.replace(method, network="ResNet-8") for method in OF_RESNET))


# ── the protocol ────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def data() -> tuple[ns.ImageData, ns.ImageData]:
    """The training subset, as many of each class, and the test images."""
    train, test = ns.load_data()
    return train.subset(ns.balanced_subset(train.labels, PER_CLASS)), test.subset(range(TEST_IMAGES))


@cache
def truth(network: str = "Net") -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Masks (h, n) of the halves, and the loss (r, h, m) that each of the r trainings of each half ended with.

    Those of `Net` are only read, never made here: 300 trainings are another command's work.
    """
    (small, asked), ground = data(), GROUNDS[network]
    masks, config = ns.random_halves(len(small), ground.halves), ground.config
    if FAST:
        made_up = np.random.default_rng(0).random((ground.repeats, ground.halves, len(asked)), dtype=np.float32)
        return masks, made_up
    plan = [(np.flatnonzero(mask), 1000 + 100 * r + h) for r in range(ground.repeats) for h, mask in enumerate(masks)]
    done, _ = read_if_whole(ground.path, ns._read_retrainings) or ({}, {})
    missing = sum(ns._training_key(small, asked, config, *training) not in done for training in plan)
    if missing and network == "Net":
        raise SystemExit(f"{missing} of {len(plan)} retrainings are missing in {ground.path}: run retraining.ipynb")
    losses = ns.retrain_all(small, asked, plan, config, ground.path).losses
    return masks, losses.reshape(ground.repeats, ground.halves, -1)


def load_models(small: ns.ImageData, count: int, checkpoints: bool = False, network: str = "Net") -> peers.Models:
    """`count` trainings of different seeds: their finished models, or all `CHECKPOINTS` of each, oldest first.

    What is missing is trained: common to all methods, and never timed.
    """
    config, folder = GROUNDS[network].config, ns.run_mode().data / "models"
    trainings = ns.train_models(small, config, range(count), folder, checkpoints=CHECKPOINTS)
    if not checkpoints:
        return [(training.model.eval(), 1.0) for training in trainings]
    return [
        (model.eval(), float(training.history["learning_rate"][epoch - 1]))
        for training in trainings
        for epoch, model in training.checkpoints.items()
    ]


# ── one method, in its own process ──────────────────────────────────────────────────────────────────────────────────


def timed(score: peers.Score, test: ns.ImageData, value: float | None) -> tuple[NDArray[np.float32], float]:
    """The matrix, checked, and the seconds it took."""
    start = time.perf_counter()
    scores = score(test, value)
    seconds = time.perf_counter() - start
    if not np.isfinite(scores).all():
        raise NonFiniteError("its scores are NaN or infinite")
    return scores, seconds


def tune(method: Method, score: peers.Score, part: ns.ImageData) -> tuple[float | None, dict[str, Any]]:
    """The value of the best LDS on the test images in `part`, and what each of them scored (or why it did not)."""
    if method.like:
        return json.loads(by_name(method.like, method.network).file.read_text())["value"], {}
    if len(method.values) == 1:
        return method.values[0], {}
    found: dict[float | None, float] = {}
    tried: dict[str, Any] = {}
    for value in method.values:
        try:
            found[value] = lds(timed(score, part, value)[0], method.network).mean
            tried[str(value)] = round(found[value], 4)
        except Exception as error:  # whatever a library raises is reported: its other values may still work
            tried[str(value)] = f"{type(error).__name__}: {error}"[:200]
    if not found:
        raise RuntimeError(f"no value works: {next(iter(tried.values()))}")
    return max(found, key=lambda value: found[value]), tried


def lds(scores: NDArray[np.float32], network: str = "Net") -> LDS:
    """LDS of a matrix for the first test images, as many as it has rows, against the mean of the repeated trainings."""
    masks, losses = truth(network)
    return linear_datamodeling_score(scores, masks, losses.mean(0)[:, : len(scores)])


def measure(method: Method) -> dict[str, Any]:
    """Prepare, tune, score all its test images; scores to the disk, the figures as plain values."""
    importlib.import_module(method.library)
    small, asked = data()
    models, base = load_models(small, method.models, method.checkpoints, method.network), peak()
    start = time.perf_counter()
    score = getattr(peers, method.function)(models, small, **method.options)
    prepared = time.perf_counter() - start
    images = min(method.images, len(asked))
    value, tried = tune(method, score, asked.subset(range(min(TUNING_IMAGES, images))))
    scores, seconds = timed(score, asked.subset(range(images)), value)
    if images < len(asked):  # time has a fixed part, which scaling must leave alone
        fewer = images // 3
        short = timed(score, asked.subset(range(fewer)), value)[1]
        seconds = short + (seconds - short) / (images - fewer) * (len(asked) - fewer)
    with atomic_path(method.file.with_suffix(".npy")) as temporary:
        np.save(temporary, scores)
    figures = {"value": value, "tried": tried, "seconds": prepared + seconds, "images": images}
    return figures | {"base": base, "peak": peak()}


def in_own_process(method: Method) -> dict[str, Any]:
    """The record of a method: the one that is kept, or that of a new process, which is then kept."""
    if method.file.exists():
        return json.loads(method.file.read_text())
    print(f"{time.strftime('%H:%M:%S')} {method.name}", file=sys.stderr, flush=True)
    log = method.file.with_suffix(".log")
    start = time.perf_counter()
    try:
        with log.open("w") as file:
            command = [sys.executable, __file__, "--model", method.network, "--method", method.name]
            subprocess.run(command, stdout=file, stderr=file, timeout=method.limit_s, check=True)
        record = json.loads(log.read_text().splitlines()[-1])
    except subprocess.TimeoutExpired:
        record = {"reason": f"not finished within {method.limit_s} s, tuning included"}
    except subprocess.CalledProcessError as error:
        last = (log.read_text().splitlines() or [f"exit code {error.returncode}"])[-1]
        record = {"reason": last[:300] if error.returncode > 0 else f"ended by signal {-error.returncode}"}
    record["whole_seconds"] = round(time.perf_counter() - start, 1)
    with atomic_path(method.file) as temporary:
        temporary.write_text(json.dumps(record, indent=2))
    return record


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def by_name(name: str, network: str = "Net") -> Method:
    """The row called `name` in the table of a network."""
    return next(method for method in METHODS if (method.name, method.network) == (name, network))


def opponent(method: Method) -> Method:
    """Our row that a library's row is held against: the first one of the same models."""
    wanted = (method.network, method.models, method.checkpoints)
    same = (one for one in METHODS if (one.network, one.models, one.checkpoints) == wanted)
    return next(one for one in same if one.function == "ours")


def row(method: Method, record: dict[str, Any]) -> dict[str, Any]:
    """The figures of one method, and how far ours is ahead on the same test images, with 95 % intervals."""
    models = f"{method.models} × {len(CHECKPOINTS)} checkpoints" if method.checkpoints else method.models
    about = {"method": method.name, "models": models, "note": method.note}
    if reason := record.get("reason"):
        return {**about, "reason": reason}
    result = lds(np.load(method.file.with_suffix(".npy")), method.network)
    figures = {"lds": result.mean, "low": result.low, "high": result.high}
    if method.function != "ours":
        rival = lds(np.load(opponent(method).file.with_suffix(".npy"))[: record["images"]], method.network)
        figures |= dict(zip(("ahead", "ahead_low", "ahead_high"), rival.minus(result)))
    rounded = {key: round(value, 3) for key, value in figures.items()}
    kept = {key: record[key] for key in ("value", "tried", "images", "whole_seconds")}
    numbers = [value for value in method.values if value is not None]
    kept["edge"] = bool(record["tried"]) and record["value"] in (min(numbers), max(numbers))
    return {**about, **rounded, **kept, "seconds": round(record["seconds"], 1), "peak_gb": round(record["peak"], 2)}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown, best first; what failed last."""
    print("| method | models | LDS [95 %] | ours − it [95 %] | seconds | peak GB | value | remarks |")
    print("|---|---|---|---|---|---|---|---|")
    for line in sorted(rows, key=lambda line: -line.get("lds", -1)):
        if "reason" in line:
            print(f"| {line['method']} | {line['models']} | – | – | – | – | – | {line['reason']} |")
            continue
        score = f"{line['lds']:.3f} [{line['low']:.3f}, {line['high']:.3f}]"
        ahead = ""
        if "ahead" in line:
            ahead = f"{line['ahead']:+.3f} [{line['ahead_low']:+.3f}, {line['ahead_high']:+.3f}]"
        part = "" if line["images"] == TEST_IMAGES else f"first {line['images']} test images only, time scaled"
        edge = "best value at an end of its grid" if line["edge"] else ""
        remarks = "; ".join(filter(None, (line["note"], part, edge)))
        figures = (f"{line['seconds']:,.1f}", line["peak_gb"], line["value"], remarks)
        print("| " + " | ".join(map(str, (line["method"], line["models"], score, ahead, *figures))) + " |")


def best_within(rows: list[dict[str, Any]], budget: float, own: bool) -> str:
    """The best method of one side that needs at most `budget` seconds."""
    fitting = [
        line
        for line in rows
        if "lds" in line and line["seconds"] <= budget and line["method"].startswith("ours") == own
    ]
    best = max(fitting, key=lambda line: line["lds"], default=None)
    return f"{best['lds']:.3f} ({best['method']}, {best['seconds']:.0f} s)" if best else "nothing"


def machine() -> str:
    """Cores and versions, for whoever compares."""
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return f"{cores} CPU cores, torch {torch.__version__} on {threads} threads, Python {platform.python_version()}"


def main(network: str, only: list[str]) -> None:
    """Train what is missing, measure every method (or `only` those, and show what is kept), print and record."""
    methods = [method for method in METHODS if method.network == network]
    methods[0].file.parent.mkdir(parents=True, exist_ok=True)
    load_models(data()[0], max(method.models for method in methods), network=network)
    truth(network)  # complain now, not after half an hour
    chosen = [method for method in methods if not only or method.name in only or method.file.exists()]
    records = {method: in_own_process(method) for method in chosen}
    rows = [row(method, record) for method, record in records.items()]
    agreement, ceiling = noise_ceiling(truth(network)[1])
    print(f"\n{network}; {machine()}; {len(data()[0]):,} training and {TEST_IMAGES:,} test images")
    print(f"No scores can pass an LDS of {ceiling:.3f} here: two trainings of one half agree to {agreement:.3f} only.")
    base = max(record.get("base", 0) for record in records.values())
    print(f"Peak memory is that of the whole process; imports, data and models alone take up to {base:.2f} GB of it.")
    print("Every value was chosen by the LDS on the first test images, ours too. Ours − it: on the same images.\n")
    print_table(rows)
    print("\n| time budget | best of ours | best of the others |\n|---|---|---|")
    for budget in (10, 30, 60, 120, 300):
        print(f"| {budget} s | {best_within(rows, budget, True)} | {best_within(rows, budget, False)} |")
    record = {"machine": machine(), "agreement": agreement, "ceiling": ceiling, "rows": rows}
    name = "quality" if network == "Net" else f"quality {network}"
    ns.record_results(ns.run_mode().data / "results.json", name, record)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=GROUNDS, default="Net", help="whose table")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    names = {method.name for method in METHODS}
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=sorted(names), default=[])
    given = parser.parse_args()
    if given.method:
        print(json.dumps(measure(by_name(given.method, given.model))))
    else:
        main(given.model, given.only)
