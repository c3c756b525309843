"""Data, checkpoints, evaluation and results on disk, with real files, real damage and a real kill."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torchvision import transforms

import notebook_support as ns
from influence_functions import CorruptFileError


def test_cifar10_is_what_it_should_be(cifar):
    train, test = cifar
    assert (len(train), len(test)) == (50_000, 10_000)
    assert torch.bincount(train.labels).tolist() == [5_000] * 10
    assert torch.bincount(test.labels).tolist() == [1_000] * 10
    assert train.class_of(0) == "frog"
    assert test.class_of(0) == "cat"
    pixels = train.images.double() / 255
    assert np.allclose(pixels.mean((0, 2, 3)), [0.4914, 0.4822, 0.4465], atol=1e-4)
    assert np.allclose(pixels.std((0, 2, 3)), [0.2470, 0.2435, 0.2616], atol=1e-4)


def test_a_damaged_and_a_missing_cifar_file_are_named(cifar, root, tmp_path, monkeypatch):
    source = ns._find_cifar10(root / "data") / "cifar-10-batches-py"
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    (folder / "data_batch_3").unlink()
    with pytest.raises(CorruptFileError, match=r"data_batch_3 is missing"):
        ns.load_data(root=tmp_path)
    (folder / "data_batch_3").write_bytes((source / "data_batch_3").read_bytes()[:1_000_000])
    with pytest.raises(CorruptFileError, match=r"data_batch_3 is damaged"):
        ns.load_data(root=tmp_path)
    assert (folder / "data_batch_3").stat().st_size == 1_000_000


def test_cifar10_dir_may_name_the_folder_or_the_one_above(cifar, root, tmp_path, monkeypatch):
    found = ns._find_cifar10(root / "data")
    for named in (found, found / "cifar-10-batches-py"):
        monkeypatch.setenv("CIFAR10_DIR", str(named))
        assert ns._find_cifar10(tmp_path) in (named, named.parent)


@pytest.fixture
def silent_server():
    """A server that accepts and never answers, as a firewall that swallows packets would."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/cifar.tar.gz"


def test_a_download_that_cannot_start_gives_up_and_the_stand_in_is_announced(
    silent_server, tmp_path, monkeypatch, capsys
):
    assert ns.DOWNLOAD_PATIENCE_S < 20
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    monkeypatch.setattr(ns.CIFAR10, "url", silent_server)
    monkeypatch.setattr(ns, "DOWNLOAD_PATIENCE_S", 1.0)
    start = time.perf_counter()
    train, test = ns.load_data(root=tmp_path)
    assert time.perf_counter() - start < 5
    assert "THIS IS NOT CIFAR-10" in capsys.readouterr().out
    assert train.images.shape[1:] == (3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert len(train) + len(test) == 1797
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))
    with pytest.raises(FileNotFoundError, match="set CIFAR10_DIR"):
        ns.load_data("cifar10", root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_data_set_is_an_error():
    with pytest.raises(ValueError, match="unknown dataset 'mnist'"):
        ns.load_data("mnist")


def test_normalise_equals_torchvision():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    usual = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)])
    torch.testing.assert_close(ns.normalise(image), usual(image.permute(1, 2, 0).numpy()))
    assert image.dtype == torch.uint8


def test_batches_are_shuffled_complete_and_repeatable():
    train, _ = ns.load_data("digits")
    seen = [
        torch.cat([y for _, y in ns.shuffled_batches(train, 64, torch.Generator().manual_seed(s))]) for s in (1, 1, 2)
    ]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0].sort().values, train.labels.sort().values)


# ── training and checkpoints ─────────────────────────────────────────────────────────────────────────────────────

CONFIG = ns.TrainConfig(epochs=2, batch_size=64)


@pytest.fixture(scope="module")
def digits():
    return ns.load_data("digits")


def trained(digits, path, config=CONFIG, retrain=False):
    ns.seed_everything(0)
    model = ns.Net()
    return model, ns.train_or_load(model, digits, config, path, retrain).history


def test_training_learns_and_is_repeatable(digits, tmp_path):
    model, history = trained(digits, tmp_path / "a.safetensors")
    again, _ = trained(digits, tmp_path / "b.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert history["validation_accuracy"].iloc[-1] > 0.5
    assert history["epoch"].tolist() == [1, 2]


def test_a_checkpoint_is_used_only_for_this_very_configuration_and_data(digits, tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    model, history = trained(digits, path)
    loaded, loaded_history = trained(digits, path)
    assert "loaded" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    pd.testing.assert_frame_equal(history, loaded_history, rtol=1e-6)
    trained(digits, path, ns.TrainConfig(epochs=1, batch_size=64))
    assert "made with another epochs" in capsys.readouterr().out
    train, test = digits
    trained((train.subset(range(100)), test), path)
    assert "made with another epochs, train" in capsys.readouterr().out
    trained((train.subset(range(100)), test), path, retrain=True)
    assert "training again" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "params"),
    {
        "Net": 62_006,
        "ResNet-8": 75_290,
        "ConvNet-8": 295_106,
        "ResNet-20": 269_722,
        "DenseNet-BC-100-12": 769_162,
    }.items(),
)
def test_mixed_training_learns_and_is_kept_in_half_the_bytes(name, params, digits, tmp_path):
    config, part = ns.TrainConfig(model=name, epochs=1, batch_size=16, mixed=True), digits[0].subset(range(64))
    made, kept = (ns.train_models(part, config, [0], tmp_path, 1, checkpoints=[1])[0] for _ in range(2))
    assert ns.count_parameters(made.model) == params
    states = [one.state_dict() for one in (made.model, kept.model, kept.checkpoints[1])]
    for values in zip(*(state.values() for state in states)):
        assert all(torch.equal(values[0], value) and value.dtype == values[0].dtype for value in values)
    assert next(made.model.parameters()).dtype == torch.float32
    (path,) = tmp_path.glob("*.safetensors")
    assert 2 < path.stat().st_size / (2 * params) < 2.6  # two bytes a number, twice; statistics and names besides
    plain = ns.train_models(part, dataclasses.replace(config, mixed=False), [0], tmp_path / "plain", 1)[0]
    assert made.history["train_loss"][0] == pytest.approx(plain.history["train_loss"][0], rel=0.05)
    assert made.history["train_loss"][0] != plain.history["train_loss"][0]


def test_mirrored_images_are_shown_to_half_and_change_nothing_else(digits):
    part = digits[0].subset(range(200))
    assert torch.equal(part.mirrored.images, part.images.flip(-1))
    assert torch.equal(part.mirrored.labels, part.labels)
    shown = {flag: [*ns.shuffled_batches(part, 64, torch.Generator().manual_seed(1), flag)] for flag in (False, True)}
    images, labels = (torch.cat(side) for side in zip(*shown[True]))
    known = {(image.numpy().tobytes(), int(label)) for image, label in zip(*part.batch(torch.arange(200)))}
    turned = {(image.numpy().tobytes(), int(label)) for image, label in zip(*part.mirrored.batch(torch.arange(200)))}
    both = [(image.numpy().tobytes(), int(label)) for image, label in zip(images, labels)]
    assert set(both) <= known | turned
    assert 60 < sum(one in turned for one in both) < 140  # 100 ± 5.7 standard deviations
    first, again = shown[False][0], next(ns.shuffled_batches(part, 64, torch.Generator().manual_seed(1)))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_a_training_with_mirrored_images_is_another(digits, tmp_path):
    config = ns.TrainConfig(epochs=1, batch_size=32)
    mirror = dataclasses.replace(config, mirror=True)
    assert "mirror" not in config.numbers(), "trainings kept before there was mirroring are still found"
    assert mirror.numbers()["mirror"] is True
    plain, turned = (ns.train_models(digits[0], one, [0], tmp_path, 1)[0] for one in (config, mirror))
    assert not torch.equal(plain.model.fc3.weight, turned.model.fc3.weight)


def test_what_float16_cannot_hold_is_kept_as_it_is_after_mixed_training(digits):
    config, part = ns.TrainConfig(epochs=1, mixed=True), digits[0].subset(range(64))
    model = config.new_model()
    model.register_buffer("far", torch.tensor([1e6, 1 / 3]))
    model.register_buffer("near", torch.tensor([1.0, 1 / 3]))
    ns.train_model(model, part, config)
    assert model.far.tolist() == torch.tensor([1e6, 1 / 3]).tolist()
    assert model.near.tolist() == torch.tensor([1.0, 1 / 3]).half().tolist()


def test_checkpoints_are_the_model_on_its_way_and_come_back_from_the_file(digits, tmp_path, capsys):
    config, path = ns.TrainConfig(epochs=3, batch_size=64), tmp_path / "net.safetensors"
    models, trainings = [ns.Net() for _ in range(2)], []
    for model in models:
        ns.seed_everything(0)
        model.load_state_dict(ns.Net().state_dict())
        trainings.append(ns.train_or_load(model, digits, config, path, False, checkpoints=(3, 1)))
    assert "loaded" in capsys.readouterr().out
    made, loaded = trainings
    assert list(made.checkpoints) == list(loaded.checkpoints) == [1, 3]
    states = [[one.state_dict() for one in (training.model, *training.checkpoints.values())] for training in trainings]
    for a, b in zip(*states):
        assert all(torch.equal(a[name], b[name]) for name in a)
    final, first, last = states[1]
    assert all(torch.equal(final[name], last[name]) for name in final)
    assert not torch.equal(final["fc3.weight"], first["fc3.weight"])
    ns.seed_everything(0)
    again = ns.Net()
    ns.train_model(again, digits[0], config)
    assert torch.equal(again.fc3.weight, final["fc3.weight"]), "keeping weights changes nothing"
    history = loaded.history
    assert history["learning_rate"].iloc[-1] < history["learning_rate"].iloc[0] < config.peak_lr


def test_a_file_without_a_wanted_checkpoint_is_made_again_and_one_with_more_serves(digits, tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    trained(digits, path)
    for wanted, words in (((1, 2), "has no weights of epoch 1, 2"), ((2,), "loaded"), ((), "loaded")):
        training = ns.train_or_load(ns.Net(), digits, CONFIG, path, False, wanted)
        assert words in capsys.readouterr().out
        assert tuple(training.checkpoints) == wanted
    with pytest.raises(ValueError, match=r"epochs in 1\.\.2, not \[0, 3\]"):
        ns.train_model(ns.Net(), digits[0], CONFIG, checkpoints=[0, 3])


def test_checkpoints_of_any_model_with_buffers(digits, tmp_path):
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3072, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 10)
    )
    made = ns.train_or_load(model, digits, CONFIG, tmp_path / "a.safetensors", False, (1,))
    other = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(3072, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 10)
    )
    loaded = ns.train_or_load(other, digits, CONFIG, tmp_path / "a.safetensors", False, (1,))
    assert torch.equal(made.checkpoints[1][2].running_mean, loaded.checkpoints[1][2].running_mean)
    assert not torch.equal(loaded.checkpoints[1][2].running_mean, loaded.model[2].running_mean)


def test_a_layer_may_have_a_slash_in_its_name(digits, tmp_path, capsys):
    models = [torch.nn.Sequential(torch.nn.Flatten()) for _ in range(2)]
    for model in models:
        model.add_module("head/out", torch.nn.Linear(3072, 10))
    made, loaded = (ns.train_or_load(one, digits, CONFIG, tmp_path / "a.safetensors", False, (1,)) for one in models)
    assert "loaded" in capsys.readouterr().out
    for a, b in ((made.model, loaded.model), (made.checkpoints[1], loaded.checkpoints[1])):
        assert torch.equal(a.state_dict()["head/out.weight"], b.state_dict()["head/out.weight"])


def test_a_truncated_checkpoint_is_named_and_neither_used_nor_overwritten(digits, tmp_path):
    path = tmp_path / "net.safetensors"
    trained(digits, path)
    whole = path.read_bytes()
    for damaged in (whole[:1000], whole[:-7], b"", b"x" * 100):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=r"net\.safetensors is damaged"):
            trained(digits, path)
        assert path.read_bytes() == damaged


def test_a_real_kill_in_the_middle_of_writing_leaves_the_old_file(root, tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"old": 1}')
    script = (
        "import sys, time, notebook_support as ns\n"
        f"with ns.atomic_path({str(path)!r}) as temporary:\n"
        "    temporary.write_text('{\"half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads(path.read_text()) == {"old": 1}


def test_an_error_while_writing_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def interrupted() -> None:
        with ns.atomic_path(path) as temporary:
            temporary.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


# ── evaluation and results ───────────────────────────────────────────────────────────────────────────────────────


def test_evaluation_on_hand_computed_numbers():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    result = ns.Evaluation(logits, torch.tensor([0, 1, 1, 1]), ("a", "b"))
    assert result.accuracy == 0.75
    assert result.confusion().tolist() == [[1, 0], [1, 2]]
    table = result.per_class()
    assert table.loc["a", ["precision", "recall"]].tolist() == [0.5, 1.0]
    assert table.loc["b", "F1"] == pytest.approx(0.8)
    assert table.loc["macro average", "recall"] == pytest.approx((1 + 2 / 3) / 2)
    assert table.loc["macro average", "images"] == 4
    assert result.loss == pytest.approx((3 * np.log1p(np.exp(-2)) + np.log1p(np.exp(2))) / 4, rel=1e-6)


def test_evaluate_puts_every_module_back_in_its_mode(digits):
    model = torch.nn.Sequential(
        torch.nn.BatchNorm2d(3), torch.nn.Dropout(), torch.nn.Flatten(), torch.nn.Linear(3072, 10)
    )
    model.train()
    model[0].eval()
    ns.evaluate(model, digits[1])
    assert [module.training for module in model.modules()] == [True, False, True, True, True]


def test_results_keep_the_other_chapters_and_refuse_a_damaged_file(tmp_path):
    path = tmp_path / "results.json"
    ns.record_results(path, "one", {"a": 1})
    ns.record_results(path, "two", {"b": 2})
    ns.record_results(path, "one", {"a": 3})
    assert ns.read_results(path) == {"one": {"a": 3}, "two": {"b": 2}}
    with pytest.raises(ValueError, match="JSON"):
        ns.record_results(path, "one", {"a": float("nan")})
    assert ns.read_results(path)["one"] == {"a": 3}
    path.write_text('{"one": ')
    with pytest.raises(CorruptFileError, match=r"results\.json is not JSON"):
        ns.record_results(path, "one", {"a": 1})
    assert path.read_text() == '{"one": '


def test_run_mode_reads_the_environment(monkeypatch):
    for name in ("INFLUENCE_FAST", "INFLUENCE_RETRAIN", "INFLUENCE_OUT"):
        monkeypatch.delenv(name, raising=False)
    assert ns.run_mode() == ns.RunMode(False, False, Path("."))
    monkeypatch.setenv("INFLUENCE_FAST", "1")
    monkeypatch.setenv("INFLUENCE_OUT", "somewhere")
    assert ns.run_mode().fast
    assert ns.run_mode().images == Path("somewhere/images")
