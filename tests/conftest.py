"""Small exact problems that every test can compute by hand, and the real data where it is at hand."""

import ast
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import explorer  # noqa: E402  (what is imported here lies beside the notebooks, installed nowhere)
import notebook_support as ns  # noqa: E402
from influence_functions import compute_influences  # noqa: E402


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture
def blobs() -> tuple[Tensor, Tensor]:
    """40 float64 points in 5 dimensions with 3 labels that overlap, so that no loss is near zero."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(40) % 3
    centres = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(40, 5, generator=generator, dtype=torch.float64), labels


@pytest.fixture
def mlp() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.fixture
def softmax() -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(5, 3).double()


@pytest.fixture(scope="session")
def cifar() -> tuple[ns.ImageData, ns.ImageData]:
    """The real CIFAR-10 from data/ or CIFAR10_DIR; tests that need it are skipped where it is in neither."""
    folder = ns._find_cifar10(ROOT / "data")
    if folder is None:
        pytest.skip("CIFAR-10 is neither in data/ nor in CIFAR10_DIR")
    return ns._read_cifar10(folder, train=True), ns._read_cifar10(folder, train=False)


def of_notebook(name: str) -> SimpleNamespace:
    """The imports, functions and classes of a notebook, without running anything else of it."""
    cells = json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    tree = ast.Module([node for node in ast.parse(text).body if isinstance(node, kept)], [])
    module = types.ModuleType(Path(name).stem)
    sys.modules[module.__name__] = module  # where dataclasses look for it
    exec(compile(tree, name, "exec"), module.__dict__)
    return SimpleNamespace(**module.__dict__)


# ── the explorer ─────────────────────────────────────────────────────────────────────────────────────────────────


NO_BROWSER = "no Chromium on this machine (Debian: apt-get install chromium)"


def pytest_terminal_summary(terminalreporter) -> None:
    """Say it where it cannot be missed when the tests in a browser were left out."""
    skipped = [one for one in terminalreporter.stats.get("skipped", []) if NO_BROWSER in str(one.longrepr)]
    if skipped:
        terminalreporter.write_line(f"LEFT OUT: {len(skipped)} tests of the explorer in a browser: {NO_BROWSER}")


@pytest.fixture(scope="session")
def explored(tmp_path_factory) -> SimpleNamespace:
    """A small explorer: four linear models on the digits, asked about 60 of them, with every kind of extra."""
    train, test = ns.load_data("digits")
    train, test = train.subset(range(600)), test.subset(range(200))
    models = [fitted(train, seed) for seed in range(4)]
    rows = np.arange(120, 180)
    found = [compute_influences(model, train, test, rows) for model in models]
    said = torch.stack([ns.evaluate(model, test).probabilities[rows] for model in models]).numpy()
    suspicion = pd.DataFrame({"loss": ns.evaluate(models[0], train).losses.numpy()})
    pairs = of_notebook("EDA.ipynb").near_duplicates(train, test, 0.95)
    suspects = ns.list_suspects(train, suspicion, said[0, :1].repeat(len(train), 0), pairs, "loss", 40)
    kinds = {kind: {"foretold": sign * 0.2, "measured": [1 + sign, 1.5 + sign]} for kind, sign in REMOVED.items()}
    removals = [{"test": 130, "removed": 50, "of": 600, "by": "chosen at will", "nothing": [1.0, 1.5, 2.0], **kinds}]
    words = {"title": "Digits <b>& others</b>", "about": ["A sentence with </script> in it."]}
    extras = explorer.Extras(pairs, suspects, removals, words)
    payload = explorer.gather(found, train, test, said, extras)
    folder = tmp_path_factory.mktemp("page")
    files = explorer.write_page(payload, folder)
    parts = {"train": train, "test": test, "models": models, "influences": found, "probabilities": said}
    return SimpleNamespace(**parts, extras=extras, payload=payload, folder=folder, files=files)


REMOVED = {"helpful": -1.0, "harmful": 1.0, "random": 0.0}


def fitted(train: ns.ImageData, seed: int) -> nn.Module:
    """A linear model of every fourth pixel, hardly trained, so that it errs."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    images, labels = train.batch(torch.arange(len(train)))
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model
