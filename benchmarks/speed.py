"""How fast is the engine? One command, one run, ratios on the same machine, images and model.

    python benchmarks/speed.py            # what `make bench` does, about forty minutes on two cores
    python benchmarks/speed.py --large    # the large networks alone, half an hour

Each part runs in a process of its own, so that its peak memory is its own. The package is timed on a part of its work
(200 recursions, 2,000 gradients) and scaled to its documented 5,000 recursions and all images, which the table says.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import TensorDataset

import influence_functions.compat as ptif
import notebook_support as ns
from influence_functions import compute_influences, pick_device

DOCUMENTED_DEPTH = 5_000  # recursion depth in the package's manual
PART_DEPTH, PART_IMAGES = 200, 2_000
REPEATS = 3


def prepare() -> tuple[nn.Module, ns.ImageData, ns.ImageData]:
    """The committed model (speed does not depend on its weights, so an untrained one will do) and the real data."""
    train, test = ns.load_data("cifar10")
    model, checkpoint = ns.Net(), Path("data/net.safetensors")
    if checkpoint.exists():
        model.load_state_dict(ns.read_checkpoint(checkpoint).states[0])
    return model.to(pick_device()), train, test


def time_plain(n: int) -> dict[str, Any]:
    """A plain pass through the committed network."""
    model, train, _ = prepare()
    return {"seconds": time_pass(model, train.subset(range(n)))}


def time_pass(model: nn.Module, train: ns.ImageData, repeats: int = REPEATS, batch: int = 500) -> list[float]:
    """Seconds of each forward and backward pass over all images in batches, without an optimiser step."""
    device, seconds = pick_device(), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for chosen in torch.arange(len(train)).split(batch):
            images, labels = train.batch(chosen)
            model.zero_grad()
            F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]  # the first pass warms up


def time_engine(n: int, m: int, models: int = 1) -> dict[str, Any]:
    """The whole call, solve and score, with the default settings, for so many models of one size at once."""
    model, train, test = prepare()
    subset, runs = train.subset(range(n)), []
    for _ in range(REPEATS if m == 10 and n == len(train) else 1):
        start = time.perf_counter()
        health = compute_influences([model] * models, subset, test, range(m)).health
        runs.append((time.perf_counter() - start, health.seconds_solve, health.seconds_score))
    whole, solve, score = (list(column) for column in zip(*runs))
    return {"seconds": whole, "solve": solve, "score": score}


NETWORKS = ns.MODELS | {"ResNet-18": partial(torchvision.models.resnet18, num_classes=10)}
LARGE = {"ResNet-20": 20_000, "ResNet-18": 10_000, "ResNet-110": 5_000, "DenseNet-BC-100-12": 3_000}
"""The training images that ten minutes on two cores allow for each network."""
PLAIN_IMAGES, PLAIN_BATCHES = 1_000, (50, 250)  # a plain pass is scaled from so many; the faster batch size counts


def time_large(which: int, m: int) -> dict[str, Any]:
    """The whole call for m test images, within 5 GB, through an untrained network, against plain passes.

    The peak is that of the call: the plain passes, which keep the activations of a whole batch, come after it.
    """
    name, n = list(LARGE.items())[which]
    train, test = ns.load_data("cifar10")
    model, subset = NETWORKS[name]().to(pick_device()).eval(), train.subset(range(n))
    start = time.perf_counter()
    health = compute_influences(model, subset, test, range(m), memory=5e9).health
    figures = {"seconds": [time.perf_counter() - start], "peak": peak(), "chunk": health.chunk, "n": n}
    figures |= {"planned": health.memory / 1e9, "slow_layers": len(health.slow_layers)}
    part = train.subset(range(PLAIN_IMAGES))
    passes = [time_pass(model, part, repeats=1, batch=batch)[0] for batch in PLAIN_BATCHES]
    figures["plain"] = [min(passes) * n / PLAIN_IMAGES]
    return figures | {"solve": [health.seconds_solve], "score": [health.seconds_score]}


def time_package(batch_size: int) -> dict[str, Any]:
    """A part of the package's work for one test image, and what all of it would take."""
    model, train, test = prepare()
    part = TensorDataset(*train.batch(torch.arange(PART_IMAGES)))
    run = ptif.run_original(
        model, part, TensorDataset(*test.batch(torch.tensor([0]))), PART_DEPTH, batch_size=batch_size
    )
    scaled = run.seconds_for(DOCUMENTED_DEPTH, len(train), PART_DEPTH)
    return {"seconds": [scaled], "measured": run.seconds_solve + run.seconds_score}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "plain": time_plain,
    "engine": time_engine,
    "large": time_large,
    "package": time_package,
}


def in_own_process(part: str, *numbers: int) -> dict[str, Any]:
    """Run one part in a new process; its figures, with the process's peak memory in GB."""
    command = [sys.executable, __file__, "--part", part, *map(str, numbers)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(f"measured {part} {numbers}", file=sys.stderr, flush=True)
    return json.loads(answer.splitlines()[-1])


def peak() -> float:
    """The most memory that this process has held so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def summary(figures: dict[str, Any]) -> dict[str, Any]:
    """Median, lowest and highest of the repeated seconds."""
    seconds = figures["seconds"]
    rounded = {"median": statistics.median(seconds), "low": min(seconds), "high": max(seconds), "peak": figures["peak"]}
    return {key: round(value, 2) for key, value in rounded.items()}


def machine() -> str:
    """Device, cores and versions, for whoever compares."""
    gpu = torch.cuda.get_device_name() if pick_device().type == "cuda" else "no GPU"
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return (
        f"{gpu}, {cores} CPU cores, torch {torch.__version__} on {threads} threads, Python {platform.python_version()}"
    )


def print_row(*cells: Any) -> None:
    """One row of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |")


def print_line(what: str, line: dict[str, Any], figures: dict[str, Any], ratio: Any, package: str = "") -> None:
    """The row of one measured part: its times, memory, halves (to solve, to score), and what it is compared with."""
    halves = " + ".join(f"{statistics.median(figures[part]):.1f}" for part in ("solve", "score") if part in figures)
    print_row(what, line["median"], f"{line['low']}-{line['high']}", line["peak"], halves, ratio, package)


def report_engine(n: int, m: int, figures: dict[str, Any], base: float, theirs: float) -> dict[str, Any]:
    """Print the row of one model; `base` is a plain pass over all 50,000 images, `theirs` the package's one image."""
    line, score = summary(figures), statistics.median(figures["score"])
    line |= {"score": round(score, 2), "score_to_plain": round(score / (base * n / 50_000), 2)}
    line |= {"package_ratio": round(theirs * n / 50_000 * m / line["median"])}
    what = f"influence, {n:,} × {m} test images"
    print_line(what, line, figures, line["score_to_plain"], f"{line['package_ratio']:,}")
    return line


def report_checkpoints(figures: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    """Print the row of five checkpoints, against one model on the same images, and return its record."""
    line = summary(figures)
    line |= {"to_one_model": round(statistics.median(figures["seconds"]) / statistics.median(one["seconds"]), 2)}
    print_line(f"five checkpoints, 50,000 × 10: {line['to_one_model']} × one model", line, figures, "")
    return line


def report_large(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Print the row of a large network and return its record; the unit is a plain pass over the same images.

    whole_50000: of the call for 50,000 images, whose first half takes as long as for these.
    """
    (plain,), (whole,), (solve,), (score,) = (figures[part] for part in ("plain", "seconds", "solve", "score"))
    line = {"plain": plain, "whole": whole, "solve": solve, "score": score, "peak": figures["peak"]}
    line |= {"score_to_plain": score / plain, "whole_to_plain": whole / plain}
    line["whole_50000"] = (solve + score * 50_000 / figures["n"]) / (plain * 50_000 / figures["n"])
    line |= {"planned": figures["planned"]}
    line = {key: round(value, 2) for key, value in line.items()}
    line |= {key: figures[key] for key in ("n", "chunk", "slow_layers")}
    print_row(name, *line.values())
    return line


def main() -> None:
    """Measure every part, print the table, record it."""
    plain = in_own_process("plain", 50_000)
    engine = {(n, 10): in_own_process("engine", n, 10) for n in (12_500, 25_000, 50_000)}
    engine[50_000, 200] = in_own_process("engine", 50_000, 200)
    package = min((in_own_process("package", size) for size in (1, 4, 32)), key=lambda figures: figures["seconds"][0])
    base, theirs = statistics.median(plain["seconds"]), package["seconds"][0]
    record: dict[str, Any] = {"machine": machine(), "plain": summary(plain)}
    record["package"] = {"scaled_seconds": round(theirs, 1), "measured_seconds": round(package["measured"], 1)}

    print(f"\n{machine()}; median of {REPEATS} runs where a range is given\n")
    print_row("what", "seconds", "range", "peak GB", "solve + score", "score ÷ plain", "package ÷ ours")
    print_row(*["---"] * 7)
    print_line("plain pass, 50,000", record["plain"], plain, 1)
    record["engine"] = {f"{n} x {m}": report_engine(n, m, found, base, theirs) for (n, m), found in engine.items()}
    record["checkpoints 50000 x 10"] = report_checkpoints(in_own_process("engine", 50_000, 10, 5), engine[50_000, 10])
    print_row("package, 50,000 × 1 test image", round(theirs), "scaled", round(package["peak"], 2), "", "", 1)
    part = f"{PART_DEPTH} of {DOCUMENTED_DEPTH:,} recursions and {PART_IMAGES:,} of 50,000 gradients"
    print(f"\nThe package was timed on {part} ({package['measured']:.1f} s) and scaled; the best of three batch sizes.")
    record_speed(record | {"large": time_all_large()})


def record_speed(values: dict[str, Any]) -> None:
    """Replace these figures of speed in results.json, keep the others."""
    path = ns.run_mode().data / "results.json"
    ns.record_results(path, "speed", ns.read_results(path).get("speed", {}) | values)


def time_all_large() -> dict[str, Any]:
    """Measure the large networks, each in its own process, and print their table."""
    found = {name: in_own_process("large", which, 10) for which, name in enumerate(LARGE)}
    heads = "plain pass s|whole s|solve s|score s|peak GB|score ÷ plain|whole ÷ plain|of 50,000|planned GB|images|chunk"
    print("\nLarge networks, 10 test images, memory=5e9; seconds of one run each\n")
    print_row("what", *heads.split("|"), "slow layers")
    print_row(*["---"] * 13)
    return {name: report_large(name, figures) for name, figures in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", metavar=("PART", "NUMBER"), help=argparse.SUPPRESS)
    parser.add_argument("--large", action="store_true", help="the large networks alone")
    if parser.parse_args().large:
        record_speed({"large": time_all_large()})
    elif chosen := parser.parse_args().part:
        measured = PARTS[chosen[0]](*map(int, chosen[1:]))
        print(json.dumps({"peak": peak()} | measured))
    else:
        main()
