"""The package as a whole: its rooms, what importing it loads, installing it, and adding to it from outside."""

import ast
import doctest
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import cloudpickle
import joblib
import pytest
import torch
from references import loop_gradients, relative_error
from torch import nn

from influence_functions import InfluenceSettings, Measure, compute_influences, layer_rule
from influence_functions.data import Source
from influence_functions.layers import RULES
from influence_functions.problem import make_problem
from influence_functions.scoring import _Scoring
from influence_functions.solvers import prepare

PACKAGE = Path(__file__).resolve().parent.parent / "influence_functions"
FROM_THE_GROUND_UP = (
    "_support", "measures", "blocks", "kronecker", "matrices", "stack", "layers", "data", "settings", "private",
    "ensemble", "hooks", "gradients", "verify", "problem", "curvature", "solvers.base", "solvers.kernel", "solvers.cg",
    "solvers.lissa", "solvers.identity", "solvers.ekfac", "solvers.ekfac_kernel", "solvers.plan", "solvers", "scoring",
    "results", "members", "scores", "pixels", "metrics", "exact", "compat.config", "compat.log", "compat.checks",
    "compat.original", "compat.files", "compat.kept", "compat.run", "compat", "",
)  # fmt: skip
MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
}
MODULES = {name.removesuffix("__init__").removesuffix("."): path for name, path in MODULES.items()}


def imported(name: str) -> set[str]:
    """The modules of the package that a module imports, by their names in it."""
    package = ["influence_functions", *name.split(".")] if name else ["influence_functions"]
    if MODULES[name].name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            found.add(".".join(base[1:]))
    return found


def test_every_module_has_its_place():
    assert sorted(MODULES) == sorted(FROM_THE_GROUND_UP)


@pytest.mark.parametrize("name", FROM_THE_GROUND_UP)
def test_an_import_only_goes_down(name):
    below = set(FROM_THE_GROUND_UP[: FROM_THE_GROUND_UP.index(name)])
    assert imported(name) <= below, f"{name or 'the package'} imports upwards: {imported(name) - below}"


@pytest.mark.parametrize("name", [name for name in FROM_THE_GROUND_UP if not name.startswith("compat.original")])
def test_the_examples_in_the_docstrings_work(name):
    module = importlib.import_module(f"influence_functions.{name}".removesuffix("."))
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn}, optionflags=flags)
    assert result.failed == 0


@pytest.mark.parametrize("name", ["", "metrics", "exact", "compat"])
def test_every_public_function_has_an_example(name):
    """In its own docstring, in that of its class or module, or in another example of the same module."""
    room = importlib.import_module(f"influence_functions.{name}".removesuffix("."))
    own = [word for word, thing in vars(room).items() if getattr(thing, "__module__", "") == room.__name__]
    public = [word for word in getattr(room, "__all__", own) if not word.startswith("_") and not word.endswith("Error")]
    without = {
        "OriginalRun",
        "run_original",
        "init_logging",
        "calc_influences",
        "LDS",
    }  # the original, variants
    for word in (word for word in public if callable(getattr(room, word)) and word not in without):
        thing = getattr(room, word)
        home = sys.modules[thing.__module__]
        docs = [inspect.getdoc(thing) or "", home.__doc__ or "", room.__doc__ or ""]
        docs += [inspect.getdoc(other) or "" for other in vars(home).values() if callable(other)]
        assert any(word in doc.partition(">>>")[2] for doc in docs), word


def test_importing_the_package_loads_nothing_that_only_notebooks_need():
    heavy = ["matplotlib", "sklearn", "cleanlab", "torchvision", "IPython", "pytorch_influence_functions", "pandas"]
    script = f"import sys, influence_functions; print([name for name in {heavy} if name in sys.modules])"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def readme_example() -> str:
    """The code below README's heading "Your own model and data"."""
    section = (PACKAGE.parent / "README.md").read_text(encoding="utf-8").split("## Your own model and data")[1]
    return section.split("```python\n")[1].split("```")[0]


def test_rooms_are_small():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > 250} == {}
    support = (PACKAGE.parent / "notebook_support.py").read_text(encoding="utf-8")
    assert len(support.splitlines()) <= 1_500


def test_the_wheel_installs_and_runs_elsewhere(tmp_path):
    """What README says: pip install, then its ten lines; torch and the rest are taken from where they are."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, PACKAGE.parent]
    subprocess.run(list(map(str, build)), check=True)
    (wheel,) = tmp_path.glob("influence_functions-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    script = textwrap.dedent("""
        import torch
        import influence_functions
        assert "site" in influence_functions.__file__, influence_functions.__file__
        model = torch.nn.Linear(4, 3)
        train = test = (torch.randn(80, 4), torch.arange(80) % 3)
        {README}
        print(len(influences.helpful(0, 5)), influences.health.solver)
    """).format(README=readme_example())
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "5 kernel\n", done.stderr
    assert (tmp_path / "site/influence_functions/py.typed").exists()


# ── added from outside: a layer type and a task, in one file of the user's ──────────────────────────────────────────


def test_a_transposed_convolution_and_a_poisson_loss_are_one_object_each():
    def values(outputs, counts):
        return outputs[:, 0].exp() - counts * outputs[:, 0]

    def draw(outputs, counts, uniform):
        below = torch.special.gammaincc(torch.arange(1.0, 60.0, dtype=torch.float64), outputs.exp()) < uniform
        return below.sum(1).to(counts)

    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(147, 1)).double()
    images = torch.randn(12, 2, 3, 3, dtype=torch.float64)
    counts = torch.poisson(torch.ones(12, dtype=torch.float64))
    settings = InfluenceSettings(measure=Measure("poisson", values, draw), solver="identity", damping=1.0)
    slow = compute_influences(model, (images, counts), (images, counts), [0, 1], settings)
    assert slow.health.slow_layers == ("0",)

    @layer_rule(nn.ConvTranspose2d)
    def transposed(layer, inputs, deltas):
        """The weight (i, o, k, l) meets each input at stride-wise places of the output."""
        k, s = layer.kernel_size[0], layer.stride[0]
        windows = deltas.unfold(2, k, s).unfold(3, k, s)  # (b, o, h, w, k, l)
        return {"weight": torch.einsum("bihw,bohwkl->biokl", inputs, windows), "bias": deltas.flatten(2).sum(2)}

    try:
        fast = compute_influences(model, (images, counts), (images, counts), [0, 1], settings)
        kernel = compute_influences(model, (images, counts), (images, counts), [0], settings, solver="kernel")
    finally:
        del RULES[nn.ConvTranspose2d]
    gradients = loop_gradients(model, images, counts, values)
    assert fast.health.slow_layers == ()
    assert kernel.health.labels == "drawn"
    for found in (slow, fast):
        assert relative_error(found.scores, gradients[:2] @ gradients.T / 12) < 1e-10


def test_a_rule_that_fails_is_named_and_its_layer_goes_the_slow_way():
    class Own(nn.Linear):
        pass

    @layer_rule(Own)
    def wrong(layer, inputs, deltas):
        return {"weight": deltas, "bias": deltas}

    model, data = nn.Sequential(nn.Linear(4, 3), Own(3, 3)).double(), (torch.randn(9, 4).double(), torch.arange(9) % 3)
    try:
        with pytest.warns(UserWarning, match=r"layer '1' \(Own\) goes the slow way: its rule returns"):
            found = compute_influences(model, data, data, [0], solver="identity", damping=1.0, measure="loss")
    finally:
        del RULES[Own]
    gradients = loop_gradients(model, *data)
    assert found.health.slow_layers == ("1",)
    assert relative_error(found.scores, gradients[:1] @ gradients.T / 9) < 1e-10


# ── nothing done twice ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [100, 20_000])
def test_a_parallel_task_holds_indices_and_no_data(n, monkeypatch):
    sizes, real = [], joblib.delayed

    def weighed(function):
        def task(*args):
            sizes.append(len(cloudpickle.dumps((function, args))))
            return real(function)(*args)

        return task

    data = (torch.randn(n, 5), torch.arange(n) % 3)
    monkeypatch.setattr(joblib, "delayed", weighed)
    compute_influences(nn.Linear(5, 3), data, data, [0], samples=20, jobs=2, chunk=max(n // 4, 25), device="cpu")
    assert len(sizes) >= 4
    assert max(sizes) < 60_000, "the indices of a chunk, and no sample"


def test_a_thousand_test_samples_prepare_their_solver_once(monkeypatch, tmp_path):
    import influence_functions.compat as ptif
    import influence_functions.compat.run as run_module

    counted = []
    monkeypatch.setattr(run_module, "prepare", lambda *asked: counted.append(1) or prepare(*asked))
    data = torch.utils.data.TensorDataset(torch.randn(1_000, 4), torch.arange(1_000) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=100)
    config = ptif.InfluenceConfig(outdir=tmp_path, solver="kernel", progress=False, num_classes=3)
    influences, *_ = ptif.calc_all_grad_then_test(config, nn.Linear(4, 3), loader, loader)
    assert (len(influences), len(counted)) == (1_000, 1)


def test_what_scores_a_chunk_travels_without_what_was_computed_on_the_way():
    data = Source(50, lambda chosen: (torch.ones(len(chosen), 4), chosen % 3))
    problem = make_problem(nn.Linear(4, 3), data, InfluenceSettings(device="cpu", samples=20))
    solved = prepare(problem).solve(problem.gradients(data, torch.arange(2))[0])
    assert "sampled" in problem.__dict__
    again = cloudpickle.loads(cloudpickle.dumps(_Scoring(((problem, (solved,)),), 50)))
    assert "sampled" not in again.members[0][0].__dict__
    chosen = torch.arange(7)
    assert torch.equal(again(chosen)[0][0][0], _Scoring(((problem, (solved,)),), 50)(chosen)[0][0][0])
