"""Memory is a setting: known before it is taken, held to under a hard limit, and refused with numbers."""

import json
import re
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from references import relative_error
from torch import nn

from influence_functions import compute_influences, mean_influences, scoring, self_influences
from influence_functions._support import RUNTIME, free_bytes
from influence_functions.gradients import GradientMaker

WIDE = 100


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, 3)).double()


@pytest.fixture
def points() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(120, 20, generator=generator, dtype=torch.float64), torch.arange(120) % 3


def images_and_model() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Gradients in full, 18,000 numbers each, of convolutions on small images."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 48, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(200, 3, 12, 12, generator=generator)
    return nn.Sequential(*layers, nn.Linear(48, 3)), (images, torch.arange(200) % 3)


def test_auto_is_the_kernel_where_it_fits_and_ekfac_where_not_and_says_so():
    model, data = images_and_model()
    roomy = compute_influences(model, data, data, [0, 1], samples=150)
    assert (roomy.health.solver, roomy.health.choice) == ("kernel", "")
    tight = compute_influences(model, data, data, [0, 1], samples=1500, memory=3e8)
    assert tight.health.solver == "kernel"  # there are 200 samples, not 1,500
    factor = 20
    many = tuple(part.repeat(factor, *[1] * (part.ndim - 1)) for part in data)
    for memory, solver in ((6e8, "ekfac_kernel"), (2e8, "ekfac")):
        tight = compute_influences(model, many, data, [0, 1], samples=4000, memory=memory, device="cpu")
        assert tight.health.solver == solver
        assert re.match(rf"kernel needs [\d.]+ GB of {memory / 1e9:.1f} GB", tight.health.choice)
        assert 0 < tight.health.memory <= memory
        assert 0 < tight.health.chunk <= 250
        named = compute_influences(model, many, data, [0, 1], samples=4000, solver=solver, device="cpu")
        assert relative_error(tight.scores, torch.as_tensor(named.scores)) < 1e-3


@pytest.mark.parametrize("solver", ["ekfac", "ekfac_kernel", "identity", "kernel", "cg"])
def test_less_memory_takes_more_passes_and_gives_the_same_numbers(solver, points):
    given = {"solver": solver, "damping": 0.1, "samples": 60, "device": "cpu", "iterations": 3, "tolerance": 1e-10}
    whole = compute_influences(wide(), points, points, range(20), **given)
    assert whole.health.passes == 1
    least = float(re.search(r"at least ([\d.e-]+) GB", refusal(points, memory=1e4, **given)).group(1)) * 1e9
    seen = set()
    for more in (1.1, 1.3, 2.0, 4.0):
        found = compute_influences(wide(), points, points, range(20), memory=least * more, **given)
        assert found.health.memory <= least * more
        seen.add((found.health.passes, found.health.chunk))
        assert found.scores.shape == (20, 120)
        assert found.test_labels.tolist() == whole.test_labels.tolist()
        assert relative_error(found.scores, torch.as_tensor(whole.scores)) < 1e-7
    assert len(seen) > 1, "memory decided nothing"


def refusal(data, **settings) -> str:
    with pytest.raises(ValueError, match="influence needs at least") as caught:
        compute_influences(wide(), data, data, range(20), **settings)
    return str(caught.value)


def test_what_fits_nowhere_is_refused_with_the_numbers_and_what_to_change(points):
    said = refusal(points, memory=1e5)
    least = ", ".join(rf"[\d.]+ GB with solver '{name}'" for name in ("kernel", "ekfac_kernel", "ekfac"))
    pattern = (
        rf"influence needs at least {least}, [\d.e-]+ GB of it for the scores, and 0\.0001 GB may be taken; raise "
        r"memory=, if there is more, or pass fewer test samples, samples below 120 or a model with frozen layers"
    )
    assert re.fullmatch(pattern, said), said
    for call in (mean_influences, lambda model, data, *_, **given: self_influences(model, data, **given)):
        with pytest.raises(ValueError, match="may be taken; raise memory="):
            call(wide(), points, points, memory=1e5)


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), "much", True])
def test_a_memory_that_is_none_is_refused(wrong, points):
    with pytest.raises(ValueError, match="memory must be a"):
        compute_influences(wide(), points, points, [0], memory=wrong)


def test_several_models_share_the_memory(points):
    given = {"samples": 60, "device": "cpu", "solver": "ekfac", "damping": 0.1}
    three = [wide(), wide(), wide()]
    least = float(re.search(r"at least ([\d.e-]+) GB", refusal(points, memory=1e4, **given)).group(1)) * 1e9
    found = compute_influences(three, points, points, range(5), memory=4 * least, **given)
    assert found.health.memory <= 4 * least
    assert all(one.memory <= 4 / 3 * least for one in found.members)
    with pytest.raises(ValueError, match="may be taken"):
        compute_influences(three, points, points, range(5), memory=2 * least, **given)
    compute_influences(three[0], points, points, range(5), memory=2 * least, **given)


# ── under a hard limit ──────────────────────────────────────────────────────────────────────────────────────────────


def limited(gigabytes: float, script: str) -> subprocess.CompletedProcess[str]:
    """Run in a process that cannot get more data memory than this: an allocation beyond it fails at once."""
    head = f"""
        import resource, torch, torchvision
        torch.set_num_threads(2)
        resource.setrlimit(resource.RLIMIT_DATA, ({int(gigabytes * 1e9)},) * 2)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(head) + textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_readmes_large_model_runs_within_four_gigabytes(root):
    """2,000 gradients of 11 million numbers would be 89 GB."""
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (example,) = (block for block in blocks if "resnet18" in block)
    assert len(example.strip().splitlines()) <= 10
    done = limited(4, f"{example}\nprint(influences.health.solver, influences.health.memory)")
    assert done.returncode == 0, done.stderr
    solver, memory = done.stdout.split()[-2:]
    assert solver in ("ekfac_kernel", "ekfac")
    assert float(memory) <= 3e9


@pytest.mark.parametrize("gigabytes", [1.0, 1.2, 1.5, 2.0])
def test_under_any_limit_a_call_ends_with_numbers_or_says_what_it_needs(gigabytes):
    """Never a failed allocation, with whichever solver: 86,000 parameters."""
    done = limited(gigabytes, """
        import json
        from torch import nn
        from influence_functions import compute_influences
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10))
        data, said = (torch.randn(300, 3, 48, 48), torch.arange(300) % 10), {}
        for solver in ("auto", "kernel", "ekfac_kernel", "ekfac", "identity", "cg"):
            try:
                found = compute_influences(model, data, data, range(3), solver=solver, samples=300, iterations=2)
                said[solver] = found.health.solver
            except ValueError as error:
                said[solver] = str(error)
        print(json.dumps(said))
    """)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    for solver, answer in said.items():
        refused = "may be taken; raise memory=" in answer or "MB of memory are free" in answer
        assert answer in ("kernel", "ekfac_kernel", "ekfac", solver) or refused, answer
    assert gigabytes < 2 or ("auto" in said and said["auto"] in ("kernel", "ekfac_kernel", "ekfac"))


class Hungry(nn.Linear):
    """A forward that asks for a petabyte as soon as it sees more than a few samples."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) > 60:
            torch.empty(10**15)
        return super().forward(inputs)


def test_memory_that_runs_out_all_the_same_is_an_error_that_says_what_to_do(points):
    model = Hungry(20, 3).double()
    with pytest.raises(ValueError, match=r"memory ran out: pass a smaller memory=, or stop .*allocate memory"):
        compute_influences(model, points, points, [0], device="cpu")
    compute_influences(model, points, points, [0], device="cpu", chunk=50)


def test_no_room_at_all_is_said_at_once(points, monkeypatch):
    monkeypatch.setattr("influence_functions._support.free_bytes", lambda device: RUNTIME / 2)
    with pytest.raises(ValueError, match="less than 128 MB of memory are free: stop what else takes memory"):
        compute_influences(wide(), points, points, [0], device="cpu")


def test_a_limit_of_the_process_counts_as_what_is_free():
    done = limited(3, "from influence_functions._support import free_bytes\nprint(free_bytes(torch.device('cpu')))")
    assert 1e9 < float(done.stdout) < 3e9 < free_bytes(torch.device("cpu")) + 2e9


@pytest.mark.parametrize(("solver", "most"), [("ekfac", 2), ("identity", 3), ("kernel", 6)])
def test_of_a_deep_network_few_layers_gradients_are_in_memory_while_it_is_scored(solver, most, monkeypatch):
    """All six are held only by who reads them several times; the one before dies when the next is there."""
    layers = [nn.Sequential(nn.Linear(20, 20), nn.Tanh()) for _ in range(5)]
    torch.manual_seed(0)
    model, points = nn.Sequential(*layers, nn.Linear(20, 3)), (torch.randn(60, 20), torch.arange(60) % 3)
    alive, peaks, make = weakref.WeakSet(), [], GradientMaker._block

    def counted(*args):
        alive.add(block := make(*args))
        peaks.append(len(alive))
        return block

    score = scoring._Scoring.__call__

    def watched(self, chosen):
        with monkeypatch.context() as patch:
            patch.setattr(GradientMaker, "_block", counted)
            return score(self, chosen)

    monkeypatch.setattr(scoring._Scoring, "__call__", watched)
    found = compute_influences(model, points, points, range(30), solver=solver, chunk=10, damping=1.0, device="cpu")
    assert found.scores.shape == (30, 60)
    assert max(peaks) == most
