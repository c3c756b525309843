"""Small exact problems that every test can compute by hand, and the real data where it is at hand."""

import ast
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import notebook_support as ns  # noqa: E402  (the module lies beside the notebooks, not in a package)


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
