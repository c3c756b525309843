"""Labels that people gave: read from either file, checked, and nothing unpickled that is not an array."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import notebook_support as ns

OFFICIAL = {"aggregate": "aggre_label", "worst": "worse_label", "random1": "random_label1", "random3": "random_label3"}


@pytest.fixture
def train() -> ns.ImageData:
    labels = torch.arange(200) % 10
    return ns.ImageData("CIFAR-10", torch.zeros(200, 3, 2, 2, dtype=torch.uint8), labels, ns.CLASS_NAMES)


def with_errors(labels: torch.Tensor, count: int) -> np.ndarray:
    wrong = labels.numpy().copy()
    wrong[:count] = (wrong[:count] + 1) % 10
    return wrong


def official(train: ns.ImageData, path: Path, **changes: object) -> Path:
    """A file as the authors of CIFAR-10N saved theirs: a dict of NumPy arrays, by torch."""
    arrays = {theirs: with_errors(train.labels, 10 * k) for k, theirs in enumerate(OFFICIAL.values(), 1)}
    torch.save({"clean_label": train.labels.numpy(), **arrays} | changes, path)
    return path


@pytest.mark.parametrize(("name", "errors"), [("aggregate", 10), ("worst", 20), ("random1", 30), ("random3", 40)])
def test_the_official_file_is_read_from_data(name, errors, train, tmp_path, monkeypatch):
    monkeypatch.delenv("CIFARN_FILE", raising=False)
    official(train, tmp_path / "CIFAR-10_human.pt")
    labels = ns.load_human_labels(name, train, tmp_path)
    assert labels.dtype == torch.int64
    assert int((labels != train.labels).sum()) == errors


def test_a_file_saved_with_an_older_numpy_is_read(train, tmp_path, monkeypatch):
    """The official file names NumPy's module as it was called before version 2."""
    new, old = official(train, tmp_path / "new.pt"), tmp_path / "old.pt"
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for item in source.namelist():
            target.writestr(item, source.read(item).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
            if item.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in source.read(item)
    monkeypatch.setenv("CIFARN_FILE", str(old))
    assert int((ns.load_human_labels("random1", train) != train.labels).sum()) == 30


def test_an_npz_is_read_where_the_variable_names_it(train, tmp_path, monkeypatch):
    np.savez(tmp_path / "labels.npz", aggregate=with_errors(train.labels, 7).astype(np.uint8))
    monkeypatch.setenv("CIFARN_FILE", str(tmp_path / "labels.npz"))
    assert int((ns.load_human_labels("aggregate", train) != train.labels).sum()) == 7
    with pytest.raises(ValueError, match="has no labels 'random1', only aggregate"):
        ns.load_human_labels("random1", train)


def test_without_a_file_it_is_told_where_to_get_it(train, tmp_path, monkeypatch):
    monkeypatch.delenv("CIFARN_FILE", raising=False)
    with pytest.raises(FileNotFoundError, match=r"noisylabels\.com into data/, or set CIFARN_FILE"):
        ns.load_human_labels("aggregate", train, tmp_path)
    with pytest.raises(ValueError, match="unknown human labels 'best'"):
        ns.load_human_labels("best", train, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"aggre_label": np.zeros(100, np.int64)},
        {"aggre_label": np.arange(200) % 7},
        {"clean_label": np.arange(200) % 9},
    ],
    ids=["too few", "unlike", "of other data"],
)
def test_labels_of_other_data_are_refused(changes, train, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFARN_FILE", str(official(train, tmp_path / "a.pt", **changes)))
    with pytest.raises(ns.CorruptFileError, match="does not fit CIFAR-10's 200 training images"):
        ns.load_human_labels("aggregate", train)


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch evil",)


@pytest.mark.parametrize("how", ["pickle", "torch", "cut"])
def test_nothing_but_arrays_is_unpickled(how, train, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIFARN_FILE", str(path))
    if how == "pickle":
        path.write_bytes(pickle.dumps({"aggre_label": Evil()}))
    elif how == "torch":
        torch.save({"aggre_label": Evil()}, path)
    else:
        whole = official(train, path).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ns.CorruptFileError, match="damaged or not what it should be"):
        ns.load_human_labels("aggregate", train)
    assert not (tmp_path / "evil").exists()


def test_the_labels_at_hand_are_wrong_as_often_as_published(cifar, root, monkeypatch):
    file = Path(os.environ.get("CIFARN_FILE", root.parent / "shared/cifar-n/labels.npz"))
    if not file.exists():
        pytest.skip("CIFAR-10N is not at hand")
    monkeypatch.setenv("CIFARN_FILE", str(file))
    wrong = {}
    for name in ("aggregate", "random1"):
        wrong[name] = float((ns.load_human_labels(name, cifar[0]) != cifar[0].labels).float().mean())
    assert wrong == pytest.approx({"aggregate": 0.0901, "random1": 0.1723}, abs=0.0005)  # Wei et al. 2022, table 1
