"""The package's interface, delivered: its configuration, both its modes, its files, nothing lost, nothing mixed."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import pytorch_influence_functions as original
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

import influence_functions.compat as ptif
import influence_functions.compat.run as run_module
from influence_functions import CorruptFileError, NonFiniteError, compute_influences, curvature
from influence_functions.compat.config import batch_size_of
from influence_functions.compat.kept import Kept
from influence_functions.compat.log import LOG
from influence_functions.compat.run import _Run
from influence_functions.exact import fit_softmax_regression
from influence_functions.gradients import PROVED, GradientMaker

KERNEL = {"solver": "kernel", "progress": False, "num_classes": 3}


@pytest.fixture
def problem(softmax, blobs, tmp_path):
    """A model, two shuffled loaders over float64 points, and the folder that results go to."""
    points, labels = blobs
    train = DataLoader(TensorDataset(points[:30], labels[:30]), batch_size=7, shuffle=True)
    test = DataLoader(TensorDataset(points[30:], labels[30:]), batch_size=3, shuffle=True)
    return softmax, train, test, tmp_path / "out"


def config_for(outdir, **changes):
    return ptif.InfluenceConfig(outdir=outdir, **{**KERNEL, **changes})


def matrix(influences):
    return np.array([entry["influence"] for entry in influences.values()])


# ── the configuration ───────────────────────────────────────────────────────────────────────────────────────────────


def test_defaults_are_the_manuals():
    config = ptif.InfluenceConfig()
    assert (config.recursion_depth, config.r_averaging, config.damp, config.scale) == (5000, 1, 0.01, 25)
    assert (config.seed, config.gpu, config.calc_method) == (42, -1, "img_wise")
    assert (config.save_pth, config.log_filename) == (None, None)
    assert config.test_sample_num is config.test_sample_start_per_class is False


def test_the_packages_own_dict_is_taken():
    theirs = original.get_default_config()
    config = ptif.InfluenceConfig.from_package(theirs)
    shared = {key: value for key, value in theirs.items() if key != "dataset" and value is not None}
    assert {key: getattr(config, key) for key in shared} == shared
    assert (config.damp, config.scale) == (0.01, 25), "None there: the manual's value"
    assert ptif.InfluenceConfig.from_package(ptif.get_default_config()) == ptif.InfluenceConfig()
    assert ptif.InfluenceConfig.from_package(theirs | {"r": 7}).r_averaging == 7, "as the manual writes it"
    with pytest.raises(ValueError, match="unknown key recursion; there are"):
        ptif.InfluenceConfig.from_package({"recursion": 5})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recursion_depth": 0}, "recursion_depth must be a whole number of at least 1, not 0"),
        ({"r_averaging": 1.5}, "r_averaging must be a whole number"),
        ({"num_classes": True}, "num_classes must be a whole number"),
        ({"test_sample_num": 0}, "test_sample_num must be a whole number of at least 1"),
        ({"test_sample_num": True}, "test_sample_num must be a whole number"),
        ({"test_start_index": -1}, "test_start_index must be a whole number of at least 0"),
        ({"calc_method": "both"}, "unknown calc_method 'both': use one of img_wise, all_grad_then_test"),
        ({"gpu": -2}, "gpu must be −1"),
        ({"damp": -0.1}, "damping must be a positive number"),
        ({"scale": 0.0}, "scale must be a positive number"),
        ({"solver": "magic"}, "unknown solver 'magic'"),
        ({"jobs": 0}, "jobs must be"),
        ({"jobs": 1.5}, "jobs must be of kind int, not 1.5"),
        ({"gpu": True}, "gpu must be −1"),
        ({"outdir": None}, "outdir must be of kind str or Path, not None"),
        ({"save_pth": 3}, "save_pth must be of kind str or Path or None, not 3"),
        ({"log_filename": False}, "log_filename must be of kind"),
        ({"seed": "x"}, "seed must be of kind int, not 'x'"),
        ({"damp": "0.1"}, "damp must be of kind int or float or None, not '0.1'"),
        ({"progress": 1}, "progress must be of kind bool, not 1"),
        ({"test_sample_start_per_class": 2}, "needs test_sample_num"),
        ({"test_sample_num": 1, "test_sample_start_per_class": 2, "test_start_index": 0}, "and differ"),
    ],
)
def test_each_mistake_in_the_configuration_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        ptif.InfluenceConfig(**changes)


def test_a_gpu_where_there_is_none(problem, monkeypatch):
    model, train, test, outdir = problem
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda:0' asked for"):
        ptif.calc_img_wise(config_for(outdir, gpu=0), model, train, test)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="'cuda:7' asked for, but there are only 1; count from 0"):
        ptif.calc_img_wise(config_for(outdir, gpu=7), model, train, test)


def test_tuning_takes_the_scale_from_the_model_and_no_more_steps_than_needed(problem):
    model, train, test, outdir = problem
    wasteful = ptif.InfluenceConfig(outdir=outdir, scale=1000.0, damp=0.5, recursion_depth=4000, r_averaging=8)
    whole = DataLoader(train.dataset, batch_size=30)  # no chance in a step, so that the residual can reach its goal
    tuned = wasteful.tuned(model, whole)
    assert tuned.recursion_depth < 1000
    assert tuned.r_averaging == 1
    assert tuned.scale < 100
    assert all(name in tuned.report for name in ("scale 1000", "recursion_depth 4000", "r_averaging 8"))
    exact = compute_influences(model, train, test, solver="cg", measure="loss", damping=0.5, tolerance=1e-10)
    quick = compute_influences(model, train, test, settings=tuned.settings(batch_size=30))
    assert quick.health.residual < 0.1
    assert np.corrcoef(quick.scores.ravel(), exact.scores.ravel())[0, 1] > 0.99
    small = dataclasses.replace(wasteful, recursion_depth=1).tuned(model, train)
    assert small.recursion_depth == 1, "never more steps than were asked for"
    assert "no scale" in config_for(outdir).tuned(model, train).report


# ── both modes ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("solver", ["kernel", "cg", "lissa"])
def test_both_modes_agree_and_have_the_engines_numbers_with_the_packages_sign(problem, solver):
    model, train, test, outdir = problem
    config = config_for(outdir, solver=solver, damp=0.1, scale=None, recursion_depth=50)
    single, harmful, helpful = ptif.calc_img_wise(config, model, train, test)
    many, *_ = ptif.calc_all_grad_then_test(config, model, train, test)
    kept = dataclasses.replace(config, save_pth=outdir / "kept")
    stored, *_ = ptif.calc_all_grad_then_test(kept, model, train, test)
    scores = compute_influences(model, train, test, settings=config.settings(batch_size=7)).scores
    np.testing.assert_allclose(matrix(single), -scores, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(matrix(many), -scores, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(matrix(stored), -scores, rtol=1e-5, atol=1e-12)
    assert harmful == np.argsort(scores.mean(0)).tolist()
    assert helpful == harmful[::-1]


def test_harmful_is_what_harms(problem):
    """Really leave the most harmful sample out, and fit again: the loss must fall, and rise without the helpful one."""
    _, train, test, outdir = problem
    (points, labels), (asked, answers) = train.dataset.tensors, test.dataset.tensors
    model = fit_softmax_regression(points, labels, 0.05)
    influences, *_ = ptif.calc_img_wise(config_for(outdir, solver="cg", damp=0.05), model, train, test)

    def loss(left_out):
        kept = [i for i in range(30) if i != left_out]
        fitted = fit_softmax_regression(points[kept], labels[kept], 0.05, n=30)
        return torch.nn.functional.cross_entropy(fitted(asked[:1]), answers[:1]).item()

    assert loss(influences["0"]["harmful"][0]) < loss(None) < loss(influences["0"]["helpful"][0])


def test_the_files_have_the_manuals_structure(problem):
    model, train, test, outdir = problem
    config = config_for(outdir, test_sample_num=2, test_sample_start_per_class=1)
    influences, harmful, helpful = ptif.calc_img_wise(config, model, train, test)
    answers = test.dataset.tensors[1].tolist()
    expected = [i for label in range(3) for i in [j for j, own in enumerate(answers) if own == label][1:3]]
    written = json.loads((outdir / "influence_results_1_2.json").read_text())
    assert written == {index: entry | {"influence": entry["influence"].tolist()} for index, entry in influences.items()}
    assert list(map(int, influences)) == expected
    for index, entry in influences.items():
        keys = {"label", "num_in_dataset", "time_calc_influence_s", "residual", "influence", "harmful", "helpful"}
        assert set(entry) == keys
        assert entry["label"] == answers[int(index)]
        assert entry["num_in_dataset"] == int(index)
        assert entry["time_calc_influence_s"] > 0
        assert len(entry["influence"]) == 30
        assert entry["influence"][entry["harmful"][0]] == max(entry["influence"])
        assert entry["influence"][entry["helpful"][0]] == min(entry["influence"])
    meta = json.loads((outdir / "influences_results_meta_1-2.json").read_text())
    assert meta["test_sample_index_list"] == expected
    assert {key: meta[key] for key in ("seed", "damp", "recursion_depth")} == {
        "seed": 42,
        "damp": 0.01,
        "recursion_depth": 5000,
    }
    assert sorted(harmful) == sorted(helpful) == list(range(30))
    assert sorted(path.name for path in outdir.iterdir()) == [
        "influence_results_1_2.json",
        "influences_results_meta_1-2.json",
    ]


def test_zero_is_an_index_and_a_start_leaves_the_first_ones_out(problem):
    model, train, test, outdir = problem
    first, *_ = ptif.calc_img_wise(config_for(outdir, test_sample_num=1, test_start_index=0), model, train, test)
    answers = test.dataset.tensors[1].tolist()
    assert list(map(int, first)) == [answers.index(label) for label in range(3)]
    rest, *_ = ptif.calc_img_wise(config_for(outdir, test_start_index=7), model, train, test)
    assert list(rest) == ["7", "8", "9"]
    with pytest.raises(ValueError, match=r"test_start_index must lie in 0\.\.9"):
        ptif.calc_img_wise(config_for(outdir, test_start_index=10), model, train, test)
    with pytest.raises(ValueError, match="class 0 has fewer than 9 test images"):
        ptif.calc_img_wise(config_for(outdir, test_sample_num=9), model, train, test)


def test_order_and_size_of_the_loaders_change_nothing(problem):
    model, train, test, outdir = problem
    shuffled, *_ = ptif.calc_img_wise(config_for(outdir), model, train, test)
    plain, *_ = ptif.calc_img_wise(
        config_for(outdir), model, DataLoader(train.dataset, batch_size=30), DataLoader(test.dataset)
    )
    np.testing.assert_array_equal(matrix(shuffled), matrix(plain))


def test_augmentation_is_refused(problem):
    model, train, test, outdir = problem

    class Jittered(TensorDataset):
        def __getitem__(self, index):
            point, label = super().__getitem__(index)
            return point + torch.rand(()), label

    with pytest.raises(ValueError, match="train_loader gives other samples each time it is read"):
        ptif.calc_img_wise(config_for(outdir), model, DataLoader(Jittered(*train.dataset.tensors)), test)


def test_a_pixel_that_is_no_number_is_not_taken_for_augmentation(problem):
    model, train, test, outdir = problem
    points, labels = train.dataset.tensors
    broken = TensorDataset(torch.where(torch.arange(30)[:, None] == 3, torch.nan, points), labels)
    for mode in (ptif.calc_img_wise, ptif.calc_all_grad_then_test):
        with pytest.raises(NonFiniteError):
            mode(config_for(outdir, solver="identity", damp=1.0, save_pth=outdir / "kept"), model, broken, test)
    assert not list((outdir / "kept" / "grad_z").glob("*"))


def test_loaders_of_other_kinds(problem):
    model, train, test, outdir = problem
    plain = matrix(ptif.calc_img_wise(config_for(outdir), model, train, test)[0])
    batches = BatchSampler(SequentialSampler(train.dataset), 7, drop_last=False)
    for loader in (DataLoader(train.dataset, batch_size=None), DataLoader(train.dataset, batch_sampler=batches)):
        np.testing.assert_array_equal(matrix(ptif.calc_img_wise(config_for(outdir), model, loader, test)[0]), plain)
    assert batch_size_of(DataLoader(train.dataset, batch_sampler=batches)) == 7
    part = DataLoader(train.dataset, sampler=SubsetRandomSampler(range(20)))
    with pytest.raises(ValueError, match="draws not every sample of its data set once; give the loader a Subset"):
        ptif.calc_img_wise(config_for(outdir), model, part, test)

    class Stream(IterableDataset):
        def __len__(self):
            return 30

        def __iter__(self):
            return iter(train.dataset)

    with pytest.raises(ValueError, match="train_loader must be a pair of tensors"):
        ptif.calc_img_wise(config_for(outdir), model, DataLoader(Stream()), test)


class Watched(TensorDataset):
    """Notes which process reads it."""

    folder = ""

    def __getitem__(self, index):
        open(os.path.join(self.folder, f"pid-{os.getpid()}"), "w").close()
        return super().__getitem__(index)


@pytest.mark.parametrize("solver", ["kernel", "lissa"])
def test_two_processes_give_the_same(problem, solver):
    model, train, test, outdir = problem
    settings = {"solver": solver, "scale": 20.0, "recursion_depth": 30, "damp": 0.3}
    alone, *_ = ptif.calc_img_wise(config_for(outdir, **settings), model, train, test)
    watched = Watched(*train.dataset.tensors)
    watched.folder = str(outdir)
    loader = DataLoader(watched, batch_size=7)
    together, *_ = ptif.calc_img_wise(config_for(outdir, jobs=2, **settings), model, loader, test)
    np.testing.assert_array_equal(matrix(alone), matrix(together))
    workers = {path.name for path in outdir.glob("pid-*")} - {f"pid-{os.getpid()}"}
    assert workers, "nothing was computed in another process"


@pytest.mark.parametrize("solver", ["lissa", "cg"])
def test_the_solver_is_prepared_once_and_no_image_depends_on_another(problem, monkeypatch, solver):
    model, train, test, outdir = problem
    counted, real = [], curvature.largest_eigenvalue
    monkeypatch.setattr(curvature, "largest_eigenvalue", lambda *args, **kw: counted.append(1) or real(*args, **kw))
    config = config_for(outdir, solver=solver, damp=0.3, scale=20.0, recursion_depth=30)
    whole = matrix(ptif.calc_img_wise(config, model, train, test)[0])
    assert len(counted) == 1
    later = dataclasses.replace(config, test_start_index=6, outdir=outdir / "later")
    np.testing.assert_array_equal(matrix(ptif.calc_img_wise(later, model, train, test)[0]), whole[6:])


def test_silence_and_the_log(problem, capfd):
    model, train, test, outdir = problem
    log = outdir / "logs" / "run.txt"
    ptif.calc_img_wise(config_for(outdir, log_filename=log, test_sample_num=1), model, train, test)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert "running on 3 test images" in log.read_text()
    assert log.read_text().count("finished test image") == 3
    try:
        ptif.init_logging(log)
        ptif.calc_img_wise(config_for(outdir, log_filename=log, test_sample_num=1), model, train, test)
        assert capfd.readouterr().out == "", "silent after init_logging, too"
        assert log.read_text().count("running on 3 test images") == 2, "each line once"
        ptif.calc_img_wise(config_for(outdir, progress=True, test_sample_num=1), model, train, test)
        assert "running on 3 test images" in capfd.readouterr().out
    finally:
        LOG.handlers = []


def test_the_manuals_example_runs_unchanged_but_for_the_import(problem, monkeypatch):
    model, trainloader, testloader, outdir = problem
    monkeypatch.chdir(outdir.parent)
    ptif.init_logging()
    config = ptif.get_default_config()
    config["num_classes"], config["test_sample_num"], config["recursion_depth"] = 3, 1, 20
    influences, harmful, helpful = ptif.calc_img_wise(config, model, trainloader, testloader)
    LOG.handlers = []
    assert len(influences) == 3
    assert len(harmful) == len(helpful) == 30
    assert (outdir.parent / "outdir" / "influence_results_0_1.json").exists()


# ── what is kept, and never mixed ───────────────────────────────────────────────────────────────────────────────────


def test_what_is_kept_is_used_again_and_refused_for_anything_else(problem, monkeypatch):
    model, train, test, outdir = problem
    config = config_for(outdir, save_pth=outdir / "kept")
    first, *_ = ptif.calc_all_grad_then_test(config, model, train, test)
    names = sorted(path.relative_to(outdir / "kept").as_posix() for path in (outdir / "kept").rglob("*.safetensors"))
    assert names == ["grad_z/0-29.safetensors", *(f"s_test/{i}.safetensors" for i in range(10))]

    def never(*_):
        raise AssertionError("computed again")

    real = GradientMaker.__call__

    def few(maker, inputs, targets, *options, **named):
        """What a sample takes is weighed on four of them."""
        return real(maker, inputs, targets, *options, **named) if len(targets) <= PROVED else never()

    monkeypatch.setattr(run_module, "prepare", never)
    monkeypatch.setattr(GradientMaker, "__call__", few)
    again, *_ = ptif.calc_all_grad_then_test(config, model, train, test)
    np.testing.assert_array_equal(matrix(first), matrix(again))
    monkeypatch.undo()
    other, same, frozen = torch.nn.Linear(5, 3).double(), copy.deepcopy(model), copy.deepcopy(model)
    frozen.bias.requires_grad_(False)
    different = copy.deepcopy(train.dataset.tensors)
    different[0][4] += 1
    changed = DataLoader(TensorDataset(*different), batch_size=7)
    refused = "is of another model, data set or configuration"
    kept, aside = outdir / "kept" / "s_test", outdir / "aside"
    for asked in ((other, train), (frozen, train), (same, changed)):
        with pytest.raises(ValueError, match=f"s_test.* {refused}"):
            ptif.calc_all_grad_then_test(config, *asked, test)
        kept.rename(aside)
        with pytest.raises(ValueError, match=f"grad_z.* {refused}"):
            ptif.calc_all_grad_then_test(config, *asked, test)
        shutil.rmtree(kept)
        aside.rename(kept)
    with pytest.raises(ValueError, match=f"s_test.* {refused}"):
        ptif.calc_all_grad_then_test(dataclasses.replace(config, damp=0.3), model, train, test)
    shutil.rmtree(kept)
    monkeypatch.setattr(Kept, "write", only_s_test(Kept.write))
    ptif.calc_all_grad_then_test(dataclasses.replace(config, damp=0.3), model, train, test)  # gradients serve any λ
    (outdir / "kept" / "grad_z" / "0-29.safetensors").write_bytes(b"broken")
    with pytest.raises(CorruptFileError, match=r"0-29.safetensors is damaged"):
        ptif.calc_all_grad_then_test(dataclasses.replace(config, damp=0.3), model, train, test)


def only_s_test(write):
    def checked(kept, *args, **about):
        assert kept.name == "s_test", "the gradients were computed again"
        write(kept, *args, **about)

    return checked


def test_a_relative_folder_will_do(problem, monkeypatch):
    model, train, test, outdir = problem
    monkeypatch.chdir(outdir.parent)
    ptif.calc_all_grad_then_test(config_for("here", save_pth="kept", log_filename="log.txt"), model, train, test)
    assert (outdir.parent / "kept" / "s_test" / "0.safetensors").exists()
    assert (outdir.parent / "log.txt").exists()


def test_two_halves_of_one_task_leave_each_other_alone(problem):
    """The manual splits a task over machines by where each begins."""
    model, train, test, outdir = problem
    first = config_for(outdir, test_sample_num=1)
    second = dataclasses.replace(first, test_sample_start_per_class=1)
    waiting = _Run.prepare(first, model, train, test)
    waiting.compute([0, 1], stored=False)
    ptif.calc_img_wise(second, model, train, test)
    assert waiting.parts.read(0) is not None
    assert waiting.parts.read(1) is not None


def test_one_image_at_a_time_keeps_s_test_and_agrees(problem):
    model, train, test, outdir = problem
    plain, *_ = ptif.calc_img_wise(config_for(outdir), model, train, test)
    kept, *_ = ptif.calc_img_wise(config_for(outdir, save_pth=outdir / "kept"), model, train, test)
    np.testing.assert_allclose(matrix(plain), matrix(kept), rtol=1e-6, atol=1e-14)
    assert len(list((outdir / "kept" / "s_test").glob("*.safetensors"))) == 10
    assert not (outdir / "kept" / "grad_z").exists()


def test_results_of_before_are_renamed_never_lost(problem):
    model, train, test, outdir = problem
    ptif.calc_img_wise(config_for(outdir), model, train, test)
    before = (outdir / "influence_results_0_False.json").read_text()
    ptif.calc_img_wise(config_for(outdir, damp=0.3), model, train, test)
    (renamed,) = [path for path in outdir.glob("influence_results_0_False_*.json")]
    assert renamed.read_text() == before
    for damp in (0.4, 0.5, 0.6):
        ptif.calc_img_wise(config_for(outdir, damp=damp), model, train, test)
    assert len(list(outdir.glob("influence_results_0_False_*.json"))) == 4, "within the same second, too"
    assert (outdir / "influence_results_0_False.json").read_text() != before


SCRIPT = """
    import sys, time, torch
    sys.path.insert(0, {root!r})
    import influence_functions.compat as ptif
    from torch.utils.data import DataLoader, TensorDataset

    class Slow(TensorDataset):
        def __getitem__(self, index):
            time.sleep({pause})
            return super().__getitem__(index)

    generator = torch.Generator().manual_seed(0)
    points, labels = torch.randn(40, 5, generator=generator), torch.arange(40) % 3
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    train, test = Slow(points[:30], labels[:30]), TensorDataset(points[30:], labels[30:])
    config = ptif.InfluenceConfig(outdir={outdir!r}, solver="kernel", progress=False, damp={damp})
    ptif.calc_img_wise(config, model, DataLoader(train), DataLoader(test))
"""


def start(root, outdir, pause=0.0, damp=0.01):
    script = textwrap.dedent(SCRIPT).format(root=str(root), outdir=str(outdir), pause=pause, damp=damp)
    return subprocess.Popen([sys.executable, "-c", script])


def test_a_killed_run_goes_on_and_takes_nothing_of_another_configuration(root, tmp_path):
    running = start(root, tmp_path / "killed", pause=0.005)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("unfinished-*/[0-9]*.npz"))) < 3:
        assert running.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not list((tmp_path / "killed").glob("influence_results*"))
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("unfinished-*/[0-9]*.npz")}
    assert 3 <= len(finished) < 10
    times = {name: float(np.load(next((tmp_path / "killed").glob(f"*/{name}")))["seconds"]) for name in finished}
    assert start(root, tmp_path / "killed", damp=0.3).wait() == 0  # another configuration, beside it
    other = json.loads((tmp_path / "killed" / "influence_results_0_False.json").read_text())
    assert start(root, tmp_path / "killed").wait() == 0
    resumed = json.loads((tmp_path / "killed" / "influence_results_0_False.json").read_text())
    assert start(root, tmp_path / "whole").wait() == 0
    whole = json.loads((tmp_path / "whole" / "influence_results_0_False.json").read_text())
    np.testing.assert_array_equal(matrix(resumed), matrix(whole))
    assert not np.allclose(matrix(other), matrix(whole), rtol=0.1)
    for name, seconds in times.items():
        again = resumed[name.removesuffix(".npz")]["time_calc_influence_s"]
        assert again == seconds, "a finished image was computed again"


def test_a_damaged_part_is_kept_aside_and_computed_again(problem, capsys):
    model, train, test, outdir = problem
    config = config_for(outdir)
    run = _Run.prepare(config, model, train, test)
    run.compute([0, 1], stored=False)
    run.parts.path(0).write_bytes(run.parts.path(0).read_bytes()[:90])
    assert run.parts.read(0) is None
    assert "0.npz is damaged" in capsys.readouterr().out
    assert run.parts.read(1) is not None
    whole, *_ = ptif.calc_img_wise(config, model, train, test)
    assert len(whole) == 10
    assert len(list(outdir.glob("unfinished-*.damaged"))) == 1, "kept when the rest is tidied away"


# ── the original's files, and the loader ────────────────────────────────────────────────────────────────────────────


def test_a_file_of_the_original_is_put_right_with_a_warning(problem):
    """Numbers and lists come from the original package itself, in the structure that its calc_img_wise writes."""
    model, train, test, outdir = problem
    model, one = model.float(), [part[:1] for part in test.dataset.tensors]
    data = TensorDataset(train.dataset.tensors[0].float(), train.dataset.tensors[1])
    run = ptif.run_original(model, data, TensorDataset(one[0].float(), one[1]), depth=5)
    entry = {"label": int(one[1][0]), "num_in_dataset": 0, "time_calc_influence_s": 1.0}
    entry |= {"influence": run.influence.tolist(), "harmful": run.harmful.tolist(), "helpful": run.helpful.tolist()}
    outdir.mkdir()
    (outdir / "original.json").write_text(json.dumps({"0": entry}))
    with pytest.warns(UserWarning, match="helpful and harmful are swapped in 1 of 1 test images"):
        loaded = ptif.load_results(outdir / "original.json")
    np.testing.assert_allclose(loaded.scores[0], -run.influence, rtol=1e-6)
    assert loaded.harmful(0, 3).tolist() == run.helpful[:3].tolist()
    assert loaded.helpful(0, 3).tolist() == run.harmful[:3].tolist()


def test_a_file_of_ours_loads_without_a_warning(problem, recwarn):
    model, train, test, outdir = problem
    influences, *_ = ptif.calc_img_wise(config_for(outdir), model, train, test)
    loaded = ptif.load_results(outdir / "influence_results_0_False.json")
    assert not [warning for warning in recwarn if "swapped" in str(warning.message)]
    np.testing.assert_allclose(loaded.scores, -matrix(influences), rtol=1e-6)
    assert loaded.harmful(2, 5).tolist() == influences["2"]["harmful"][:5]
    assert loaded.test_labels.tolist() == test.dataset.tensors[1].tolist()
    for content in ("[1]", '{"0": {"label": 1}}', '{"0": ', '{"0": {"label": 1, "influence": [], "harmful": []}}'):
        (outdir / "odd.json").write_text(content)
        with pytest.raises(CorruptFileError, match=r"odd\.json is no results file"):
            ptif.load_results(outdir / "odd.json")


def test_the_loader_has_the_most_influential_samples_only(blobs):
    points, labels = blobs
    influence = np.arange(40.0)[::-1].copy()
    loader = ptif.influential_loader(influence, TensorDataset(points, labels), 0.25, batch_size=4)
    seen = torch.cat([batch for batch, _ in loader])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, points[:10].tolist()))
    assert len(loader) == 3
    each = ptif.influential_loader(influence, TensorDataset(points, labels), 0.2, labels=labels).dataset.indices
    assert sorted(each) == [0, 1, 2, 3, 4, 5, 6, 7, 8], "a fifth of 14, 13 and 13"
    with pytest.raises(ValueError, match="share must be a fraction"):
        ptif.influential_loader(influence, TensorDataset(points, labels), 0)
    with pytest.raises(ValueError, match=r"one number a training image, \(40,\), not \(39,\)"):
        ptif.influential_loader(influence[1:], TensorDataset(points, labels), 0.5)
    with pytest.raises(ValueError, match="labels must be one number a training image"):
        ptif.influential_loader(influence, TensorDataset(points, labels), 0.5, labels=labels[1:])


# ── package.ipynb: every row of its three tables, computed anew by its own cells ────────────────────────────────────


@pytest.fixture(scope="module")
def compared(root, cifar, tmp_path_factory):
    """What the cells of sections 1 to 3 define: the original and ours on the same small exact problem."""
    cells = json.loads((root / "package.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    end = next(index for index, source in enumerate(sources) if source.startswith("## 4 "))
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("INFLUENCE_FAST", "1")
        patch.setenv("INFLUENCE_OUT", str(tmp_path_factory.mktemp("package")))
        for cell, source in zip(cells[:end], sources):
            if cell["cell_type"] == "code":
                exec(compile(source, "package.ipynb", "exec"), names)
    return names


def test_ours_agrees_with_the_truth_and_the_original_swaps_its_lists(compared):
    theirs, ours = compared["quality"]["the package"], compared["quality"]["ours"]
    correlation, size, without_harmful, without_helpful = compared["quality"].index
    assert ours[correlation] > 0.999
    assert ours[size] == pytest.approx(1, abs=0.05)
    assert ours[without_harmful] < 0 < ours[without_helpful]
    assert theirs[correlation] < ours[correlation] - 0.03
    assert theirs[without_harmful] > 0 > theirs[without_helpful], "its names are swapped"


@pytest.mark.parametrize("setting", ["recursion_depth", "damp", "scale", "r_averaging"])
def test_each_setting_means_in_ours_what_the_manual_says(compared, setting):
    (row,) = [row for name, row in compared["settings"].iterrows() if name.startswith(setting)]
    theirs, ours = (float(row[name].removesuffix(" %")) for name in ("the package", "ours (lissa)"))
    if row["should be"] == "a change":
        assert (theirs, ours > 20) == (0, True)
    else:
        assert theirs > 5
        assert ours < 0.1


@pytest.mark.parametrize(
    ("row", "theirs", "ours"),
    [
        ("default recursion_depth", 1, 5000),
        ("outdir", "stops: FileNotFoundError", "made"),
        ("gpu", "stops: RuntimeError", "runs: 12 test images"),
        ("what is returned", "None", "(dict, list, list)"),
        ("test_start_index 0", "0, 1, 2", "0, 4, 8"),
        ("test_start_index 1", "1, 5, 9", "1, 5, 9"),
        ("test_sample_num False", "stops: UnboundLocalError", ", ".join(map(str, range(12)))),
        ("labels as tensors", "stops: TypeError", "0, 4, 8"),
        ("calc_all_grad_then_test", "stops: TypeError", "the same numbers"),
    ],
)
def test_each_question_is_answered_as_the_manual_says(compared, row, theirs, ours):
    if row == "gpu" and torch.cuda.is_available():
        pytest.skip("what happens without a GPU cannot be seen here")
    (answer,) = [answer for name, answer in compared["answers"].iterrows() if name.startswith(row)]
    assert answer["the package"] == theirs
    assert answer["ours"] == ours or row == "calc_all_grad_then_test"
    if row == "calc_all_grad_then_test":
        assert float(answer["ours"].removeprefix(ours + ", to ")) < 1e-5


def test_no_row_is_left_untested(compared):
    assert [len(compared[name]) for name in ("quality", "settings", "answers")] == [4, 4, 9]
