"""Tiny ImageNet by name, in both its layouts, and the chapter that fine-tunes on it: a small folder made like it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
import pytest
import torch
from conftest import ROOT, of_notebook
from pyarrow import parquet
from torch import nn

import notebook_support as ns

CLASSES, TRAIN, VAL = 101, 40, 10
SHOWN = (90, 100)


def jpeg(path: Path, seed: int, size: int = 64, mode: str = "RGB") -> None:
    """A soft picture of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).resize((size, size)).convert(mode).save(path, format="JPEG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The official layout with 101 classes; the two that are asked for have more than one image."""
    made = tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200"
    names = [f"n{1_000_000 + 7 * number}" for number in range(CLASSES)]
    lines = []
    for number, name in enumerate(names):
        count = TRAIN if number in SHOWN else 1
        for k in range(count):
            mode = "L" if (number, k) == (90, 3) else "RGB"  # some of the real ones are grey
            jpeg(made / f"train/{name}/images/{name}_{k}.JPEG", 1_000 * number + k, mode=mode)
        (made / f"train/{name}/{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t62\n")
        for k in range(VAL if number in SHOWN else 1):
            lines.append(f"val_{len(lines)}.JPEG\t{name}\t0\t0\t62\t62\n")
            jpeg(made / f"val/images/val_{len(lines) - 1}.JPEG", 500_000 + 1_000 * number + k)
    order = np.random.default_rng(0).permutation(CLASSES)  # the official list is not sorted, either
    (made / "wnids.txt").write_text("".join(f"{names[i]}\n" for i in order))
    (made / "val/val_annotations.txt").write_text("".join(lines))
    (made / "words.txt").write_text("".join(f"{name}\tthing {i}, object\n" for i, name in enumerate(names)))
    return made


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    """One that may be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "tiny-imagenet-200"))


def as_parquet(folder: Path, target: Path) -> None:
    """The same in the layout of Hugging Face: bytes of JPEGs, labels, and the names in the metadata."""
    names = sorted((folder / "wnids.txt").read_text().split())
    listed = [line.split("\t") for line in (folder / "val/val_annotations.txt").read_text().splitlines()]
    train = [(file, names.index(file.parts[-3])) for file in sorted(folder.glob("train/*/images/*.JPEG"))]
    parts = {"train": train, "valid": [(folder / "val/images" / line[0], names.index(line[1])) for line in listed]}
    about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    for part, rows in parts.items():
        columns = {
            "image": [{"bytes": file.read_bytes(), "path": None} for file, _ in rows],
            "label": [label for _, label in rows],
        }
        table = pyarrow.table(columns).replace_schema_metadata({"huggingface": json.dumps(about)})
        (target / "data").mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, target / f"data/{part}-00000-of-00001.parquet")


def test_two_classes_of_the_official_layout(folder, monkeypatch):
    monkeypatch.setenv("TINY_IMAGENET_DIR", str(folder))
    train, test = ns.load_data("tiny-imagenet", labels=SHOWN)
    assert repr(train) == f"Tiny ImageNet: {2 * TRAIN} images (3, 64, 64), 2 classes"
    assert train.class_names == test.class_names == ("thing 90", "thing 100")
    assert torch.bincount(train.labels).tolist() == [TRAIN, TRAIN]
    assert torch.bincount(test.labels).tolist() == [VAL, VAL]
    assert train.images.dtype == torch.uint8
    grey = [i for i, image in enumerate(train.images) if image[0].equal(image[1])]
    assert len(grey) == 1
    # The index in the whole is the one that torchvision's reader of such folders counts.
    from torchvision.datasets import ImageFolder

    every = ImageFolder(str(folder / "train"))
    for i in (0, 5, TRAIN, 2 * TRAIN - 1):
        file, label = every.samples[train.number_of(i)]
        assert label == SHOWN[int(train.labels[i])]
        assert torch.from_numpy(np.array(PIL.Image.open(file).convert("RGB"))).permute(2, 0, 1).equal(train.images[i])


def test_the_order_of_labels_is_kept_and_none_means_all(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("TINY_IMAGENET_DIR", raising=False)
    (tmp_path / "tiny-imagenet-200").symlink_to(folder)  # found in root without the variable
    swapped, _ = ns.load_data("tiny-imagenet", tmp_path, labels=(100, 90))
    assert swapped.class_names == ("thing 100", "thing 90")
    assert swapped.labels.tolist() == [1] * TRAIN + [0] * TRAIN
    train, test = ns.load_data("tiny-imagenet", tmp_path)
    assert len(train.class_names) == CLASSES
    assert len(train) == 2 * TRAIN + CLASSES - 2
    assert [train.number_of(i) for i in (0, len(train) - 1)] == [0, len(train) - 1]
    assert test.labels.max() == CLASSES - 1


def test_parquet_holds_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_IMAGENET_DIR", str(tmp_path))
    as_parquet(folder, tmp_path)
    shutil.copy(folder / "words.txt", tmp_path)
    expected, _ = ns.load_data("tiny-imagenet", folder.parent, labels=SHOWN)
    train, test = ns.load_data("tiny-imagenet", tmp_path / "nothing", labels=SHOWN)
    assert train.class_names == expected.class_names
    assert train.images.equal(expected.images)
    assert train.labels.equal(expected.labels)
    assert train.numbers.equal(expected.numbers)
    assert len(test) == 2 * VAL
    (tmp_path / "words.txt").unlink()
    assert ns.load_data("tiny-imagenet", tmp_path / "nothing", labels=SHOWN)[0].class_names[0].startswith("n1000")


def test_what_is_missing_is_explained(tmp_path, monkeypatch):
    monkeypatch.delenv("TINY_IMAGENET_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match=r"tiny-imagenet-200\.zip .* TINY_IMAGENET_DIR"):
        ns.load_data("tiny-imagenet", tmp_path)
    with pytest.raises(ValueError, match="'digits' or 'tiny-imagenet'"):
        ns.load_data("imagenet")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda at: (at / "val/val_annotations.txt").unlink(), "is not whole .*unpack"),
        (lambda at: (at / "val/val_annotations.txt").write_text("val_0.JPEG\tn999\n"), "is not whole"),
        (lambda at: shutil.rmtree(at / "train/n1000700"), "100 classes and wnids.txt names 101"),
        (lambda at: next((at / "train/n1000700/images").glob("*_3.*")).write_bytes(b"torn"), "cannot be read"),
        (lambda at: jpeg(at / "train/n1000700/images/n1000700_3.JPEG", 0, size=32), r"is \(32, 32\), not 64 × 64"),
    ],
)
def test_damage_is_named(copied, monkeypatch, spoil, message):
    monkeypatch.setenv("TINY_IMAGENET_DIR", str(copied))
    spoil(copied)
    with pytest.raises(ns.CorruptFileError, match=message):
        ns.load_data("tiny-imagenet", labels=SHOWN)


def test_damaged_parquet_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_IMAGENET_DIR", str(tmp_path))
    as_parquet(folder, tmp_path)
    file = tmp_path / "data/train-00000-of-00001.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ns.CorruptFileError, match=r"not whole .*download again"):
        ns.load_data("tiny-imagenet", labels=SHOWN)
    parquet.write_table(pyarrow.table({"label": [1, 2]}), file)
    with pytest.raises(ns.CorruptFileError, match="not whole"):
        ns.load_data("tiny-imagenet", labels=SHOWN)
    file.unlink()
    with pytest.raises(ns.CorruptFileError, match="not whole"):
        ns.load_data("tiny-imagenet", labels=SHOWN)


@pytest.mark.parametrize(
    ("labels", "message"), [((90, 101), r"0\.\.100"), ((90, 90), "each once"), ((5,), "at least two")]
)
def test_labels_that_are_none_are_refused(folder, monkeypatch, labels, message):
    monkeypatch.setenv("TINY_IMAGENET_DIR", str(folder))
    with pytest.raises(ValueError, match=message):
        ns.load_data("tiny-imagenet", labels=labels)


def test_parts_of_any_data_know_where_they_come_from():
    whole, _ = ns.load_data("digits")
    train, test = ns.load_data("digits", labels=(3, 5))
    assert train.class_names == test.class_names == ("digit 3", "digit 5")
    for i in (0, 7, len(train) - 1):
        assert whole.images[train.number_of(i)].equal(train.images[i])
        assert whole.labels[train.number_of(i)] == (3, 5)[int(train.labels[i])]
    again = train.subset([4, 2]).subset([1])
    assert again.number_of(0) == train.number_of(2)
    assert whole.subset([8, 9]).number_of(1) == 9
    doubled = dataclasses.replace(train, images=torch.cat([train.images] * 2), labels=torch.cat([train.labels] * 2))
    assert doubled.subset([len(train) + 1]).number_of(0) == len(train) + 1  # a data set of its own


# ── the chapter, run the other way ──────────────────────────────────────────────────────────────────────────────────


def test_the_chapter_runs_on_tiny_imagenet(folder, tmp_path):
    """With random weights: the real ones can be downloaded only where there is a network."""
    asked = {"FINETUNE_DATA": "tiny-imagenet", "FINETUNE_WEIGHTS": "random", "TINY_IMAGENET_DIR": str(folder)}
    fast = {"INFLUENCE_FAST": "1", "INFLUENCE_OUT": str(tmp_path)}
    command = [sys.executable, ROOT / "tools/execute.py", ROOT / "finetuning.ipynb", "--to", tmp_path]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, **asked, **fast},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    record = json.loads((tmp_path / "data/results.json").read_text())["finetuning"]
    assert record["dataset"] == "Tiny ImageNet"
    assert record["pearson"]["cg"]["all pairs"] > 0.9
    assert "pretraining" not in record


def test_without_weights_it_says_what_to_do(monkeypatch):
    chapter = of_notebook("finetuning.ipynb")
    kept = chapter.torchvision.models.ResNet18_Weights

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(kept, "get_state_dict", unreachable)
    chapter.imagenet_body.__globals__["WEIGHTS"] = "DEFAULT"
    with pytest.raises(FileNotFoundError, match=r"resnet18-.*\.pth into .*FINETUNE_WEIGHTS=random"):
        chapter.imagenet_body()


def test_each_image_is_judged_by_its_own_head():
    chapter = of_notebook("finetuning.ipynb")
    chapter.own_loss.__globals__["OLD"] = 3
    logits, labels = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 4, 3])
    loss = nn.functional.cross_entropy
    expected = torch.cat(
        [loss(logits[:3, :3], labels[:3], reduction="none"), loss(logits[3:, 3:], labels[3:] - 3, reduction="none")]
    )
    torch.testing.assert_close(chapter.own_loss(logits, labels), expected)
    drawn = torch.cat(
        [chapter.own_draw(logits, labels, torch.full((6, 1), level, dtype=torch.float64)) for level in (1e-9, 1 - 1e-9)]
    )
    assert drawn.tolist() == [0, 0, 0, 3, 3, 3, 2, 2, 2, 4, 4, 4]
    many = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = chapter.own_draw(logits[:1].expand(20_000, 5), labels[:1].expand(20_000), many)
    shares = torch.bincount(first, minlength=5) / 20_000
    torch.testing.assert_close(shares[:3], logits[0, :3].softmax(0), atol=0.02, rtol=0)
