"""Everything the notebooks of *Influence over Inference* share, but for influence itself (`influence_functions`).

The module reads in the order the data flows; a section never calls one below it:
    setup → data → looking at the data → model and training → evaluation → retrainings → wrong labels → plots →
    results on disk

Words and the one sign (positive = helpful) are those of `influence_functions`, whose docstring states them.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import joblib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import pyarrow.compute
import torch
import torch.nn.functional as F
from cleanlab.rank import get_label_quality_scores
from IPython.display import Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from pyarrow import parquet
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.utils import check_integrity
from torchvision.models import DenseNet
from tqdm import tqdm  # plain text: the widget bars of tqdm.auto leave metadata that GitHub refuses to render

from explorer import explore as explore  # ns.explore(influences, train, test, model): click, in the notebook
from influence_functions import (
    MEASURES,
    CorruptFileError,
    Influences,
    NonFiniteError,
    mean_influences,
    pick_device,
    self_influences,
)
from influence_functions._support import Indices, as_indices, atomic_path, bytes_of, read_if_whole
from influence_functions.measures import check_labels
from influence_functions.metrics import found_by
from influence_functions.private import copy_of, private_copy

# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Setup: run mode, device, seeds, safe files                                                                   ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


@dataclass(frozen=True)
class RunMode:
    """How this execution of a notebook was asked to run; set by environment variables, so no cell needs editing.

    `fast` (INFLUENCE_FAST=1) shrinks data and epochs only; the mathematics stays the same.
    `retrain` (INFLUENCE_RETRAIN=1) trains even where a matching checkpoint exists.
    `output` (INFLUENCE_OUT, default: this folder) is where `images/` and `data/` are written.
    """

    fast: bool
    retrain: bool
    output: Path

    @property
    def images(self) -> Path:
        """Folder of the figures."""
        return self.output / "images"

    @property
    def data(self) -> Path:
        """Folder of the checkpoint and of results.json."""
        return self.output / "data"


def run_mode() -> RunMode:
    """The `RunMode` of this process, read from its environment variables."""

    def flag(name: str) -> bool:
        return os.environ.get(name, "0").lower() in {"1", "true", "yes"}

    return RunMode(flag("INFLUENCE_FAST"), flag("INFLUENCE_RETRAIN"), Path(os.environ.get("INFLUENCE_OUT", ".")))


def seed_everything(seed: int) -> None:
    """Seed torch on every device (initial weights); whatever else is random here takes a seed of its own."""
    torch.manual_seed(seed)


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Data: CIFAR-10, or the loudly announced stand-in                                                             ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DOWNLOAD_PATIENCE_S = 15.0
_SAID = (
    "THIS IS NOT CIFAR-10",
    "CIFAR-10 was found neither in data/ nor in CIFAR10_DIR, and cannot be downloaded.",
    "Every cell runs, but on a STAND-IN: scikit-learn's 1,797 handwritten digits, enlarged.",
    "Nothing the text says about planes, cats or dogs applies to what you see.",
)
STAND_IN_BANNER = "\n".join(["!" * 96, *(f"!!  {line:<88}  !!" for line in _SAID), "!" * 96])


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labelled images held in memory once; a map-style data set of (normalised image, label).

    `images`: (n, 3, h, w) uint8, `labels`: (n,) int64, in the order (and so with the indices) of torchvision.
    `numbers`: (n,) int64, the index of each in the whole data set; None: the same, as in a copy with more images.
    """

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    numbers: Tensor | None = None

    def __post_init__(self) -> None:
        if self.numbers is not None and len(self.numbers) != len(self.labels):
            object.__setattr__(self, "numbers", None)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return normalise(self.images[index]), int(self.labels[index])

    def __repr__(self) -> str:
        return f"{self.name}: {len(self):,} images {tuple(self.images.shape[1:])}, {len(self.class_names)} classes"

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, 3, h, w) float32, normalised, and labels (b,) at `indices`."""
        return normalise(self.images[indices]), self.labels[indices]

    def subset(self, indices: Indices) -> ImageData:
        """The same data restricted to `indices` (which then count from 0), in any of the ways of `as_indices`."""
        chosen = as_indices(indices, len(self), "image")
        numbers = chosen if self.numbers is None else self.numbers[chosen]
        return dataclasses.replace(self, images=self.images[chosen], labels=self.labels[chosen], numbers=numbers)

    def of_classes(self, classes: Sequence[int]) -> ImageData:
        """The images of these classes only, labelled 0, 1, … in the order given; ValueError for an unknown class."""
        check_labels(torch.tensor(classes), len(self.class_names))
        if len({*classes}) != len(classes) or len(classes) < 2:
            raise ValueError(f"labels must name at least two classes, each once, not {tuple(classes)}")
        place = torch.full((len(self.class_names),), -1)
        place[list(classes)] = torch.arange(len(classes))
        part, names = self.subset(place[self.labels] >= 0), tuple(self.class_names[one] for one in classes)
        return dataclasses.replace(part, labels=place[part.labels], class_names=names)

    @property
    def mirrored(self) -> ImageData:
        """The same images, left and right exchanged."""
        return dataclasses.replace(self, images=self.images.flip(3))

    def number_of(self, index: int) -> int:
        """Index in the whole data set, as torchvision counts, of image `index` of this part."""
        return int(index if self.numbers is None else self.numbers[index])

    def with_labels(self, labels: Tensor) -> ImageData:
        """The same images under other `labels` (n,); ValueError when there are more or fewer, or an unknown class."""
        if labels.shape != self.labels.shape:
            raise ValueError(f"labels must have shape {tuple(self.labels.shape)}, not {tuple(labels.shape)}")
        check_labels(labels, len(self.class_names))
        return dataclasses.replace(self, labels=labels.long())

    def class_of(self, index: int) -> str:
        """Name of the class that image `index` is labelled with."""
        return self.class_names[int(self.labels[index])]

    @cached_property
    def fingerprint(self) -> str:
        """Checksum of images and labels; a checkpoint carries it so that it is never used for other data."""
        images = zlib.crc32(bytes_of(self.images))
        labels = zlib.crc32(bytes_of(self.labels), images)
        return f"{self.name.replace(' ', '-')}-{len(self)}-{labels:08x}"


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels 0..255 → float32 in [−1, 1]; equals torchvision's ToTensor then Normalize(0.5, 0.5)."""
    return images.to(torch.float32).div_(255).sub_(0.5).div_(0.5)


def load_data(
    dataset: str = "auto", root: str | Path = "data", labels: Sequence[int] | None = None
) -> tuple[ImageData, ImageData]:
    """Train and test data: `root`, then the folder in CIFAR10_DIR, then a download, then (only "auto") the stand-in.

    dataset: "auto", "cifar10" (an error instead of the stand-in), "digits" (the stand-in itself), or "tiny-imagenet":
    200 classes of 64 × 64 images, from `root` or the folder in TINY_IMAGENET_DIR; its validation images are the test
    data. labels: these classes only, which then count from 0 (see `ImageData.of_classes`).
    Raises CorruptFileError when a data file is damaged, FileNotFoundError when the data cannot be had.
    """
    if dataset not in {"auto", "cifar10", "digits", "tiny-imagenet"}:
        raise ValueError(f"unknown dataset {dataset!r}: use 'auto', 'cifar10', 'digits' or 'tiny-imagenet'")
    if dataset == "tiny-imagenet":
        return _tiny_imagenet(Path(root), labels)
    train, test = _cifar10_or_digits(dataset, Path(root))
    return (train, test) if labels is None else (train.of_classes(labels), test.of_classes(labels))


def _cifar10_or_digits(dataset: str, root: Path) -> tuple[ImageData, ImageData]:
    if dataset == "digits":
        return _digits()
    folder = _find_cifar10(root) or _download_cifar10(root)
    if folder is not None:
        return _read_cifar10(folder, train=True), _read_cifar10(folder, train=False)
    if dataset == "cifar10":
        raise FileNotFoundError(
            f"CIFAR-10 is neither in {root}/ nor in CIFAR10_DIR, and cannot be downloaded. Unpack "
            f"cifar-10-python.tar.gz so that {root / CIFAR10.base_folder}/ holds its files, or set CIFAR10_DIR."
        )
    print(STAND_IN_BANNER)
    return _digits()


def _find_cifar10(root: Path) -> Path | None:
    """The first of `root` and CIFAR10_DIR that holds the official files, every one of them verified by md5."""
    named = os.environ.get("CIFAR10_DIR")
    candidates = [root] + ([Path(named), Path(named).parent] if named else [])
    for folder in candidates:
        base = folder / CIFAR10.base_folder
        if not base.is_dir():
            continue
        for file, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]:
            if not check_integrity(str(base / file), md5):
                state = "is damaged (wrong md5)" if (base / file).exists() else "is missing"
                raise CorruptFileError(f"{base / file} {state}; restore it, or delete {base} to download again")
        return folder
    return None


def _download_cifar10(root: Path) -> Path | None:
    """Download and unpack into `root`; None, within DOWNLOAD_PATIENCE_S, when the server cannot be reached."""
    reachable = threading.Event()

    def probe() -> None:
        try:
            with urllib.request.urlopen(CIFAR10.url, timeout=DOWNLOAD_PATIENCE_S):
                reachable.set()
        except OSError:
            pass

    # A name look-up has no time-out of its own, so it is left behind in a thread when it hangs.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_PATIENCE_S)
    if not reachable.is_set():
        return None
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as unfinished:
        CIFAR10(unfinished, download=True)
        shutil.move(str(Path(unfinished) / CIFAR10.base_folder), str(root / CIFAR10.base_folder))
    return root


def _read_cifar10(folder: Path, train: bool) -> ImageData:
    """torchvision's reader (which checks the md5 once more) → tensors."""
    data = CIFAR10(str(folder), train=train)
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # (n, 32, 32, 3) → (n, 3, 32, 32)
    return ImageData("CIFAR-10", images, torch.tensor(data.targets), CLASS_NAMES)


def _digits() -> tuple[ImageData, ImageData]:
    """scikit-learn's digits, 8 × 8 with 16 greys, enlarged to 3 × 32 × 32; every fifth one is a test image."""
    raw = load_digits()
    small = torch.from_numpy(raw.images / 16 * 255)[:, None]  # (n, 8, 8) → (n, 1, 8, 8)
    large = F.interpolate(small, size=(32, 32), mode="bilinear").round().to(torch.uint8).expand(-1, 3, -1, -1)
    names = tuple(f"digit {number}" for number in range(10))
    data = ImageData("digits stand-in", large.contiguous(), torch.from_numpy(raw.target).long(), names)
    is_test = torch.arange(len(data)) % 5 == 0
    train, test = (dataclasses.replace(data.subset(part), numbers=None) for part in (~is_test, is_test))
    return train, test


def _tiny_imagenet(root: Path, labels: Sequence[int] | None) -> tuple[ImageData, ImageData]:
    """Tiny ImageNet in either layout; a class is numbered by its place among the sorted WordNet names, as by others."""
    named = os.environ.get("TINY_IMAGENET_DIR")
    for folder in (root / "tiny-imagenet-200", root / "tiny-imagenet", *([Path(named)] if named else [])):
        if (folder / "wnids.txt").exists():
            return _read_tiny_folder(folder, labels)
        if files := sorted(folder.rglob("*.parquet")):
            parts = [[file for file in files if file.name.startswith(part)] for part in ("train", "val")]
            return _read_tiny_parquet(folder, parts[0], labels), _read_tiny_parquet(folder, parts[1], labels)
    raise FileNotFoundError(
        f"Tiny ImageNet is neither in {root}/ nor in TINY_IMAGENET_DIR. Download http://cs231n.stanford.edu/"
        f"tiny-imagenet-200.zip (250 MB) and unpack it so that {root / 'tiny-imagenet-200'}/wnids.txt is there; or the "
        f"parquet files of the data set zh-plus/tiny-imagenet at Hugging Face into {root / 'tiny-imagenet'}/; or set "
        "TINY_IMAGENET_DIR to the folder that holds either."
    )


def _read_tiny_folder(folder: Path, labels: Sequence[int] | None) -> tuple[ImageData, ImageData]:
    """The official layout: train/<name>/images/*.JPEG, in torchvision's order, and val/ with its list of names."""
    try:
        names = sorted((folder / "wnids.txt").read_text(encoding="utf-8").split())
        listed = [line.split("\t") for line in (folder / "val/val_annotations.txt").read_text().splitlines()]
        parts = [
            ImageFolder(str(folder / "train")).samples,
            [(str(folder / "val/images" / line[0]), names.index(line[1])) for line in listed],
        ]
    except (OSError, ValueError, IndexError) as error:
        raise CorruptFileError(f"{folder} is not whole ({error}); unpack tiny-imagenet-200.zip again") from error
    if (count := 1 + max(label for _, label in parts[0])) != len(names):
        raise CorruptFileError(f"{folder}/train holds {count} classes and wnids.txt names {len(names)}; unpack again")

    def data_of(part: Sequence[tuple[str, int]]) -> ImageData:
        given = [label for _, label in part]
        return _tiny_data(folder, names, given, lambda chosen: [part[number][0] for number in chosen], labels)

    return data_of(parts[0]), data_of(parts[1])


def _read_tiny_parquet(folder: Path, files: Sequence[Path], labels: Sequence[int] | None) -> ImageData:
    """The layout of Hugging Face: columns `image` (of which the bytes are a JPEG) and `label`."""
    try:
        table = pyarrow.concat_tables(parquet.read_table(file, columns=["image", "label"]) for file in files)
        about = json.loads((table.schema.metadata or {})[b"huggingface"])
        names = about["info"]["features"]["label"]["names"]
        given, pixels = table["label"].to_pylist(), pyarrow.compute.struct_field(table["image"], "bytes")
    except (OSError, ValueError, KeyError, TypeError) as error:  # what pyarrow raises is a ValueError or an OSError
        raise CorruptFileError(f"the parquet files in {folder} are not whole ({error!r}); download again") from error
    return _tiny_data(folder, names, given, lambda numbers: pixels.take(numbers).to_pylist(), labels)


def _tiny_data(
    folder: Path,
    names: Sequence[str],
    given: Sequence[int],
    jpegs: Callable[[list[int]], Sequence[str | bytes]],
    labels: Sequence[int] | None,
) -> ImageData:
    """Images of the chosen classes, decoded; given: the class of every image; jpegs: files, or JPEGs, of some."""
    chosen = list(range(len(names))) if labels is None else list(labels)
    check_labels(torch.tensor(chosen), len(names))
    numbers = [number for number, label in enumerate(given) if label in {*chosen}]
    decoded = [_decoded(jpeg, f"image {number} of {folder}") for number, jpeg in zip(numbers, jpegs(numbers))]
    kept = torch.tensor([given[number] for number in numbers])
    data = ImageData("Tiny ImageNet", torch.stack(decoded), kept, _in_words(folder, names), torch.tensor(numbers))
    return data if labels is None else data.of_classes(chosen)


def _decoded(jpeg: str | bytes, about: str) -> Tensor:
    """(3, 64, 64) uint8; a few images of Tiny ImageNet are grey and get three equal channels."""
    try:
        image = PIL.Image.open(io.BytesIO(jpeg) if isinstance(jpeg, bytes) else jpeg).convert("RGB")
    except OSError as error:
        raise CorruptFileError(f"{about} cannot be read ({error}); restore it") from error
    if image.size != (64, 64):
        raise CorruptFileError(f"{about} is {image.size}, not 64 × 64 as in Tiny ImageNet; restore it")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _in_words(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """The first word of words.txt for each WordNet name, or the name itself where there is no such file."""
    file = folder / "words.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    words = {name: word.split(",")[0] for name, _, word in (line.partition("\t") for line in lines)}
    return tuple(words.get(name, name) for name in names)


HUMAN_LABELS = {  # what we call a set of CIFAR-10N, and what the official file does
    "aggregate": "aggre_label",
    "worst": "worse_label",
    **{f"random{k}": f"random_label{k}" for k in (1, 2, 3)},
}
CIFARN_HELP = (
    "Get CIFAR-10_human.pt of CIFAR-10N (Wei et al. 2022, arXiv:2110.12088; for non-commercial use) from "
    "http://noisylabels.com into data/, or set CIFARN_FILE to it."
)


def load_human_labels(name: str, train: ImageData | None = None, root: str | Path = "data") -> Tensor:
    """(50000,) labels that people gave to the training images of CIFAR-10, in torchvision's order: CIFAR-10N.

    name: "random1" to "random3", one annotator each; "aggregate", their majority; "worst", a wrong one where there is
    any. Read from the file that CIFARN_FILE names (the official one, or an .npz of arrays by these names), else from
    CIFAR-10_human.pt in `root`. train: CIFAR-10's training images, to check against (default: loaded for that).
    Raises FileNotFoundError saying where to get it, CorruptFileError for a file that is damaged or of other data.
    """
    if name not in HUMAN_LABELS:
        raise ValueError(f"unknown human labels {name!r}: use one of {', '.join(HUMAN_LABELS)}")
    path = Path(os.environ.get("CIFARN_FILE") or Path(root) / "CIFAR-10_human.pt")
    if not path.exists():
        raise FileNotFoundError(f"the labels that people gave are not at {path}. {CIFARN_HELP}")
    arrays = _read_arrays(path)
    found, true = arrays.get(name, arrays.get(HUMAN_LABELS[name])), (train or load_data("cifar10", root)[0]).labels
    if found is None:
        raise ValueError(f"{path} has no labels {name!r}, only {', '.join(sorted(arrays))}. {CIFARN_HELP}")
    labels = torch.from_numpy(np.asarray(found).astype(np.int64))
    clean = arrays.get("clean_label", true.numpy())
    if labels.shape != true.shape or not np.array_equal(clean, true) or (labels == true).float().mean() < 0.5:
        raise CorruptFileError(f"{path} does not fit CIFAR-10's {len(true):,} training images. {CIFARN_HELP}")
    check_labels(labels, len(CLASS_NAMES))
    return labels


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz, or of a torch file of a dict of them, of which nothing else is unpickled."""
    allowed: list[Any] = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in ("i8", "i4", "u1"))]
    for core in ("core", "_core"):  # NumPy's own name for it before version 2, and since
        allowed.append((np.zeros(1).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct"))
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        with torch.serialization.safe_globals(allowed):
            found = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): np.asarray(values) for name, values in found.items()}
    except Exception as error:  # zipfile, pickle and torch each have their own ways to say "damaged"
        raise CorruptFileError(f"{path} is damaged or not what it should be ({error}). {CIFARN_HELP}") from error


def shuffled_batches(
    data: ImageData, batch_size: int, generator: torch.Generator, mirror: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over `data` in a random order: images (b, 3, 32, 32), normalised, and labels (b,).

    mirror: every other image, by chance, left and right exchanged. A last batch of one image joins the one before:
    batch normalisation cannot train on one.
    """
    order = torch.randperm(len(data), generator=generator)
    for part in range(batches_of(len(data), batch_size)):
        end = (part + 1) * batch_size
        images, labels = data.batch(order[part * batch_size : len(data) if end + 1 >= len(data) else end])
        if mirror:
            turned = torch.rand(len(labels), 1, 1, 1, generator=generator) < 0.5
            images = torch.where(turned, images.flip(3), images)
        yield images, labels


def batches_of(n: int, batch_size: int) -> int:
    """How many batches `shuffled_batches` makes of n images."""
    whole, left = divmod(n, batch_size)
    return max(whole + (left > 1), 1)


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Looking at the data: statistics, histograms, near-duplicates                                                 ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝

CHANNELS = ("red", "green", "blue")
LOOK_CHUNK = 5_000  # images (or pairs of images) held as floating-point numbers at a time


def colour_features(data: ImageData, classes: Sequence[int], per_class: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each colour channel, and a constant, of the first images of some classes; their labels.

    (k, 7) float64 of normalised pixels, (k,) int64 that count from 0 in the order of `classes` (ascending).
    """
    chosen = torch.cat([torch.where(data.labels == c)[0][:per_class] for c in classes])
    pixels = normalise(data.images[chosen]).double()
    features = torch.cat([pixels.mean((2, 3)), pixels.std((2, 3)), torch.ones(len(chosen), 1)], dim=1)
    return features, torch.searchsorted(torch.tensor(classes), data.labels[chosen])


def image_details(images: Tensor) -> Tensor:
    """What is left of uint8 images (n, 3, 32, 32) without brightness, contrast and slow change: (n, 1728) unit rows.

    From each pixel at least 4 from the border (24 × 24 of them) the mean of the 9 × 9 pixels around it is subtracted.
    The product of two rows is then a correlation; a featureless image is a row of zeros and correlates with nothing.
    """
    parts = []
    for chunk in images.split(LOOK_CHUNK):
        pixels = chunk.float()
        blurred = F.avg_pool2d(F.avg_pool2d(pixels, (9, 1), stride=1), (1, 9), stride=1)  # (b, 3, 24, 24)
        sharp = (pixels[..., 4:-4, 4:-4] - blurred).flatten(1)
        sharp -= sharp.mean(1, keepdim=True)
        length = sharp.norm(dim=1, keepdim=True)
        parts.append(torch.where(length > 1, sharp / length.clamp(min=1), 0))  # ≤ 1 is rounding, not a picture
    return torch.cat(parts)


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Model and training                                                                                           ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


class Net(nn.Module):
    """The LeNet-style network of the course: images (b, 3, 32, 32) → logits (b, 10); 62,006 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, 32, 32) → logits (b, 10)."""
        x = self.pool(F.relu(self.conv1(x)))  # (b, 6, 14, 14)
        x = self.pool(F.relu(self.conv2(x)))  # (b, 16, 5, 5)
        x = torch.flatten(x, 1)  # (b, 400)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class Residual(nn.Module):
    """Two convolutions with batch normalisation, and the way around them; no parameter on it (He et al., option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, outputs - inputs
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) → (b, outputs, h / stride, w / stride)."""
        around = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + around)


def resnet(depth: int, classes: int = 10) -> nn.Module:
    """The residual network for CIFAR-10 of 6k + 2 layers (He et al. 2016, arXiv:1512.03385, section 4.2).

    Images (b, 3, 32, 32) → logits (b, classes); p is 75,290 for a depth of 8, 269,722 for 20, 1,727,962 for 110.
    """
    k, odd = divmod(depth - 2, 6)
    if k < 1 or odd:
        raise ValueError(f"depth must be 8, 14, 20 and so on, not {depth}")
    sizes = [(16, 16, 1)] * k + [(16, 32, 2)] + [(32, 32, 1)] * (k - 1) + [(32, 64, 2)] + [(64, 64, 1)] * (k - 1)
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    return nn.Sequential(*stem, *(Residual(*size) for size in sizes), *head).to(memory_format=torch.channels_last)


def densenet() -> nn.Module:
    """DenseNet-BC-100/12 for CIFAR-10 (Huang et al. 2017, arXiv:1608.06993): (b, 3, 32, 32) → (b, 10), p is 769,162."""
    model = DenseNet(growth_rate=12, block_config=(16, 16, 16), num_init_features=24, num_classes=10)
    model.features.conv0 = nn.Conv2d(3, 24, 3, 1, 1, bias=False)
    del model.features[1:4]  # what ImageNet needs behind it: normalisation, ReLU and pooling
    return model


def convnet() -> nn.Module:
    """Eight plain layers, after Jordan 2024 (arXiv:2404.00498), narrower: (b, 3, 32, 32) → (b, 10), p is 295,106."""
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 2), nn.ReLU()]
    for inputs, outputs in ((24, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    head = [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(128, 10)]
    return nn.Sequential(*layers, *head).to(memory_format=torch.channels_last)


MODELS: dict[str, Callable[[], nn.Module]] = {"Net": Net, "DenseNet-BC-100-12": densenet, "ConvNet-8": convnet}
MODELS |= {f"ResNet-{depth}": partial(resnet, depth) for depth in (8, 20, 110)}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the trained weights, apart from the data.

    SGD with Nesterov momentum and a one-cycle learning rate that peaks at `peak_lr` (Smith 2018, arXiv:1708.07120).
    mixed: passes in bfloat16, weights in float32 (Micikevicius et al. 2018, arXiv:1710.03740), in the end in float16.
    mirror: about half the images of a pass are shown left and right exchanged; influence knows nothing of it.
    """

    seed: int = 0
    epochs: int = 12
    batch_size: int = 128
    peak_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    model: str = "Net"
    mixed: bool = False
    mirror: bool = False

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"unknown model {self.model!r}: use one of {', '.join(MODELS)}")
        for name in ("epochs", "batch_size", "peak_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")

    def new_model(self) -> nn.Module:
        """Untrained, on the GPU where there is one."""
        return MODELS[self.model]().to(pick_device())

    def numbers(self) -> dict[str, float]:
        """All but the model, which tells of itself (see `model_identity`), and what is switched off."""
        return {name: value for name, value in asdict(self).items() if name != "model" and value is not False}


def predict(model: nn.Module, data: ImageData, batch_size: int = 1000) -> Tensor:
    """(n, C) logits on the CPU, computed in eval mode (of a copy, so that the model stays as it is)."""
    device, private = next(model.parameters()).device, copy_of(model)
    private.eval()
    with torch.no_grad():
        parts = torch.arange(len(data)).split(batch_size)
        return torch.cat([private(data.batch(part)[0].to(device)).cpu() for part in parts])


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters p."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@dataclass(frozen=True, eq=False)
class Training:
    """What a training leaves: the `model`, its `history` (a row an epoch), and what the model was on the way.

    checkpoints: epoch → a model with the weights as they were after it, oldest first; of the epochs asked for only.
    """

    model: nn.Module
    history: pd.DataFrame
    checkpoints: dict[int, nn.Module] = dataclasses.field(default_factory=dict)


def train_model(
    model: nn.Module,
    train: ImageData,
    config: TrainConfig,
    validation: ImageData | None = None,
    checkpoints: Sequence[int] = (),
) -> Training:
    """Train `model` in place on its own device; no augmentation, so that the training set is the training set.

    checkpoints: the epochs (1 = the first) after which the weights are kept as well; they change nothing.
    history: one row an epoch: epoch, train_loss, train_accuracy (running, while the weights move), learning_rate (of
    its last step), seconds; with `validation` also validation_loss and validation_accuracy, and a progress bar
    (without it: silent). The last epoch's weights are kept: the validation data decides nothing.
    """
    if not set(checkpoints) <= set(range(1, config.epochs + 1)):
        raise ValueError(f"checkpoints must be epochs in 1..{config.epochs}, not {list(checkpoints)}")
    generator = torch.Generator().manual_seed(config.seed)
    optimizer, scheduler = _optimizer(model, config, config.epochs * batches_of(len(train), config.batch_size))
    history, kept, start = [], {}, time.perf_counter()
    epochs = range(1, config.epochs + 1)
    for epoch in tqdm(epochs, desc="training", unit="epoch", leave=False, disable=validation is None):
        batches = shuffled_batches(train, config.batch_size, generator, config.mirror)
        row = {"epoch": epoch, **_train_epoch(model, batches, optimizer, scheduler, config.mixed)}
        if validation is not None:
            logits = predict(model, validation)
            row["validation_loss"] = float(F.cross_entropy(logits, validation.labels))
            row["validation_accuracy"] = float((logits.argmax(1) == validation.labels).float().mean())
        if epoch in checkpoints:
            kept[epoch] = copy.deepcopy(model)
        history.append({**row, "seconds": time.perf_counter() - start})
    for one in (model, *kept.values()) if config.mixed else ():
        for tensor in one.state_dict().values():
            if tensor.is_floating_point() and torch.isfinite(half := tensor.half()).all():  # else nothing is lost
                tensor.copy_(half)
    return Training(model, pd.DataFrame(history), kept)


def _optimizer(
    model: nn.Module, config: TrainConfig, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """What moves the weights, and how fast in each of the `steps`."""
    optimizer = torch.optim.SGD(
        model.parameters(), config.peak_lr, config.momentum, weight_decay=config.weight_decay, nesterov=True
    )
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, config.peak_lr, total_steps=steps)


def _train_epoch(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    mixed: bool,
) -> dict[str, float]:
    """One pass over `batches`; mean train_loss and train_accuracy measured on the way, and its last learning_rate."""
    model.train()
    device = next(model.parameters()).device
    loss_sum, hits, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learning_rate = optimizer.param_groups[0]["lr"]
        scheduler.step()
        loss_sum += loss.detach() * len(labels)
        hits += (logits.detach().argmax(1) == labels).sum()
        seen += len(labels)
    if not torch.isfinite(loss_sum):
        raise NonFiniteError("the training loss became NaN or infinite; lower TrainConfig.peak_lr")
    measured = {"train_loss": float(loss_sum) / seen, "train_accuracy": float(hits) / seen}
    return {**measured, "learning_rate": learning_rate}


State = dict[str, Tensor]
"""Weights and buffers of a model by name."""


def save_checkpoint(path: str | Path, training: Training, identity: Mapping[str, Any]) -> None:
    """Write a training as safetensors; `identity` (what it was made with) and the history ride in its header.

    The finished model's weights have their own names, those after epoch 2 the same names below "epoch-2/".
    """
    models = {"": training.model} | {f"epoch-{epoch}/": model for epoch, model in training.checkpoints.items()}
    weights = {
        f"{prefix}{name}": _as_stored(tensor)
        for prefix, model in models.items()
        for name, tensor in model.state_dict().items()
    }
    header = {"identity": json.dumps(identity, sort_keys=True), "history": training.history.to_json(orient="records")}
    with atomic_path(path) as temporary:
        save_file(weights, str(temporary), metadata=header)


def _as_stored(tensor: Tensor) -> Tensor:
    """Its own copy (safetensors refuses memory that is shared, as where weights are tied), in float16 where exact."""
    own = tensor.detach().cpu().clone().contiguous()
    half = own.half()
    return half if own.is_floating_point() and half.to(own.dtype).equal(own) else own


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A training as it lies in a file: states by epoch, the finished model's under 0; what it was made with."""

    states: dict[int, State]
    identity: dict[str, Any]
    history: pd.DataFrame

    def lacks(self, wanted: Mapping[str, Any], checkpoints: Sequence[int]) -> str:
        """Why this is not the training with the identity `wanted` and these `checkpoints`; "" when it is."""
        if differing := _differing(self.identity, wanted):
            return f"was made with another {', '.join(differing)}"
        missing = [str(epoch) for epoch in checkpoints if epoch not in self.states]
        return f"has no weights of epoch {', '.join(missing)}" if missing else ""

    def restored(self, model: nn.Module, checkpoints: Sequence[int]) -> Training:
        """The training, with `model` as the finished model."""
        kept = {epoch: copy.deepcopy(model) for epoch in sorted(checkpoints)}
        for epoch, one in {0: model, **kept}.items():
            one.load_state_dict(self.states[epoch])
        return Training(model, self.history, kept)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """What `save_checkpoint` left at `path`; CorruptFileError names a file that is damaged."""
    try:
        states: dict[int, State] = {0: {}}
        with safe_open(str(path), framework="pt") as file:
            for key in file.offset_keys():
                early = re.fullmatch(r"epoch-(\d+)/(.+)", key)  # a layer's own name may hold a slash, too
                epoch, name = early.groups() if early else (0, key)
                states.setdefault(int(epoch), {})[name] = file.get_tensor(key)
            header = file.metadata() or {}
        return Checkpoint(states, json.loads(header["identity"]), pd.DataFrame(json.loads(header["history"])))
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptFileError(
            f"checkpoint {path} is damaged or not ours ({error}); delete it or restore it: git checkout -- {path}"
        ) from error


def model_identity(model: nn.Module, like: Tensor) -> dict[str, Any]:
    """What tells a model from others whatever it has learned: its name, its structure, and what it computes.

    answer: the outputs for two images of noise, in the shape of the image `like`, with weights that are noise, too; so
    another activation or another order of the layers is another model.
    """
    private, generator = private_copy(model, torch.device("cpu")), torch.Generator().manual_seed(0)
    noise = torch.randn(2, *like.shape, generator=generator)
    with torch.no_grad():
        for param in private.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) / max(param[:1].numel(), 1) ** 0.5)
        for value in (buffer for buffer in private.buffers() if buffer.is_floating_point()):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)  # positive: some are variances
        answer = torch.as_tensor(private(noise)).flatten()[:20]
    about = f"{model!r} {[(name, tuple(value.shape)) for name, value in model.state_dict().items()]}"
    return {
        "model": type(model).__name__,
        "structure": f"{zlib.crc32(about.encode()):08x}",
        "answer": [float(f"{value:.4g}") for value in answer.tolist()],
    }


def _identity(model: nn.Module, train: ImageData, config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint must have been made with to be used for `model`, `train` and `config`."""
    return {**model_identity(model, train.images[0]), "train": train.fingerprint, **config.numbers()}


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The names of what differs in two identities; answers differ when they do by more than rounding."""
    names = sorted(name for name in {*found, *wanted} - {"answer"} if found.get(name) != wanted.get(name))
    answers = np.array(found.get("answer", [])), np.array(wanted.get("answer", []))
    same = answers[0].shape == answers[1].shape and np.allclose(*answers, rtol=1e-2, atol=1e-4)
    return names if same else [*names, "forward"]


def train_or_load(
    model: nn.Module,
    data: tuple[ImageData, ImageData],
    config: TrainConfig,
    path: str | Path,
    retrain: bool,
    checkpoints: Sequence[int] = (),
) -> Training:
    """Load `path` if it was trained with this very configuration on this very data, else train and save there.

    data: (training, validation). checkpoints: as in `train_model`; a file that lacks one of them does not fit.
    A file that does not fit is replaced, and the reason is printed; a damaged one is an error (see `read_checkpoint`),
    because silently training again would hide it.
    """
    train, validation = data
    identity = _identity(model, train, config)
    if not retrain and Path(path).exists():
        saved = read_checkpoint(path)
        if not (lack := saved.lacks(identity, checkpoints)):
            print(f"loaded {path}: trained with this very configuration ({len(saved.history)} epochs)")
            return saved.restored(model, checkpoints)
        print(f"training again: the checkpoint {path} {lack}")
    training = train_model(model, train, config, validation, checkpoints)
    save_checkpoint(path, training, identity)
    print(f"trained {config.epochs} epochs in {training.history['seconds'].iloc[-1]:.0f} s; saved {path}")
    return training


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Evaluation                                                                                                   ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model says of a data set: `logits` (n, C), `labels` (n,), both on the CPU."""

    logits: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    @property
    def predictions(self) -> Tensor:
        """(n,) class with the largest logit."""
        return self.logits.argmax(1)

    @property
    def probabilities(self) -> Tensor:
        """(n, C) softmax of the logits."""
        return self.logits.softmax(1)

    @property
    def accuracy(self) -> float:
        """Share of right predictions, 0..1."""
        return float((self.predictions == self.labels).float().mean())

    @property
    def losses(self) -> Tensor:
        """(n,) cross-entropy in nats."""
        return F.cross_entropy(self.logits, self.labels, reduction="none")

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(self.losses.mean())

    def confusion(self) -> NDArray[np.int64]:
        """(C, C) counts; row = true class, column = predicted class."""
        return confusion_matrix(self.labels, self.predictions, labels=range(len(self.class_names)))

    def per_class(self) -> pd.DataFrame:
        """Precision, recall, F1 (0..1) and number of images of each class, and their macro average."""
        scores = precision_recall_fscore_support(
            self.labels, self.predictions, labels=range(len(self.class_names)), zero_division=0
        )
        table = pd.DataFrame(dict(zip(("precision", "recall", "F1", "images"), scores)), index=list(self.class_names))
        table.loc["macro average"] = [*table[["precision", "recall", "F1"]].mean(), table["images"].sum()]
        return table.astype({"images": int})


def evaluate(model: nn.Module, data: ImageData) -> Evaluation:
    """Run `model` (in eval mode) over `data`."""
    return Evaluation(predict(model, data), data.labels, data.class_names)


def choose_test_images(result: Evaluation, wrong: int = 2) -> list[int]:
    """The first image of each class that the model gets right, then the first `wrong` it gets wrong: a rule, no eye.

    Where a class has none right, its first image stands in; a class that does not occur is an error.
    """
    right, chosen = result.predictions == result.labels, []
    for label, name in enumerate(result.class_names):
        members = torch.where(result.labels == label)[0]
        if not len(members):
            raise ValueError(f"no image of class {name} to choose from; pass more images")
        chosen.append(int(members[right[members].int().argmax()]))
    return chosen + torch.where(~right)[0][:wrong].tolist()


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Retrainings: many times, and never twice                                                                    ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝

Planned = tuple[Indices, int]
"""What one retraining is made of: the indices of the training images kept (or a mask), and the seed."""


@dataclass(frozen=True, eq=False)
class Retrainings:
    """What t models, trained one after the other, say of m test images.

    margins (t, m) float16: −log(p_y / (1 − p_y)) as in the measure "margin", from which the loss follows exactly;
    correct (t, m): whether the class with the largest logit is the right one. Lower margin = surer and right.
    """

    margins: NDArray[np.float16]
    correct: NDArray[np.bool_]

    @property
    def losses(self) -> NDArray[np.float32]:
        """(t, m) cross-entropy in nats, log(1 + exp(margin))."""
        return np.logaddexp(np.float32(0), self.margins.astype(np.float32))

    def rows(self, chosen: Any) -> Retrainings:
        """The trainings at `chosen` (a slice or indices) only."""
        return Retrainings(self.margins[chosen], self.correct[chosen])


def balanced_subset(labels: Tensor, per_class: int, seed: int = 0) -> NDArray[np.int64]:
    """Sorted indices of `per_class` random images of each class; ValueError when a class has fewer."""
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(labels.numpy() == label) for label in labels.unique().tolist()]
    if not 1 <= per_class <= min(map(len, members)):
        raise ValueError(f"per_class must lie in 1..{min(map(len, members))}, the smallest class, not {per_class}")
    return np.sort(np.concatenate([generator.choice(member, per_class, replace=False) for member in members]))


def random_halves(n: int, count: int, seed: int = 0) -> NDArray[np.bool_]:
    """(count, n) masks, each keeping a random n // 2 of n images."""
    generator = np.random.default_rng(seed)
    masks = np.zeros((count, n), dtype=np.bool_)
    for mask in masks:
        mask[generator.choice(n, n // 2, replace=False)] = True
    return masks


def train_once(
    train: ImageData, config: TrainConfig, kept: Indices | None = None, checkpoints: Sequence[int] = ()
) -> Training:
    """`train_model` of a new model on the images `kept` (default: all), on one thread of the CPU or on the GPU, silent.

    One thread: many small trainings at once use the cores better than one training on all cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seed_everything(config.seed)
        model = config.new_model()
        return train_model(model, train if kept is None else train.subset(kept), config, None, checkpoints)
    finally:
        torch.set_num_threads(threads)


def train_models(
    train: ImageData | Sequence[ImageData],
    config: TrainConfig,
    seeds: Sequence[int],
    folder: str | Path,
    jobs: int = -1,
    checkpoints: Sequence[int] = (),
) -> list[Training]:
    """One `train_once` for each seed, `jobs` at a time; kept in `folder` as a file each and reused.

    train: the data of all of them, or of each its own. A file made with another configuration, or without one of the
    `checkpoints`, is replaced; a damaged one is reported, kept aside and its model trained again.
    """
    trains = [train] * len(seeds) if isinstance(train, ImageData) else list(train)
    if len(trains) != len(seeds):
        raise ValueError(f"{len(trains)} data sets for {len(seeds)} seeds: pass one for each seed, or one for all")
    start = Path(folder) / config.model.lower()
    tasks = [
        (data, dataclasses.replace(config, seed=seed), Path(f"{start}-{data.fingerprint}-seed-{seed}.safetensors"))
        for data, seed in zip(trains, seeds)
    ]
    trainings = [_read_training(*task, checkpoints) for task in tasks]
    left = [i for i, training in enumerate(trainings) if training is None]
    finished = joblib.Parallel(n_jobs=jobs, return_as="generator")(
        joblib.delayed(_train_and_save)(*tasks[i], checkpoints) for i in left
    )
    for training, i in zip(tqdm(finished, "training", len(left), leave=False, unit="model", disable=not left), left):
        trainings[i] = training
    return [training for training in trainings if training is not None]


def _train_and_save(train: ImageData, config: TrainConfig, path: Path, checkpoints: Sequence[int]) -> Training:
    training = train_once(train, config, checkpoints=checkpoints)
    save_checkpoint(path, training, _identity(training.model, train, config))
    return training


def _read_training(train: ImageData, config: TrainConfig, path: Path, checkpoints: Sequence[int]) -> Training | None:
    """What `_train_and_save` left at `path`; None when there is none that fits."""
    saved, model = read_if_whole(path, read_checkpoint), config.new_model()
    if saved is None or saved.lacks(_identity(model, train, config), checkpoints):
        return None
    return saved.restored(model, checkpoints)


def retrain_all(
    train: ImageData,
    test: ImageData,
    plan: Sequence[Planned],
    config: TrainConfig,
    path: str | Path,
    jobs: int = -1,
) -> Retrainings:
    """Train a model once for each entry of `plan` and ask it about every image of `test`; the cache at `path` helps.

    Every finished training is written to `path` at once, under a key made of the data, the configuration, the images
    kept and the seed: a run that was killed goes on where it stopped, and nothing made otherwise is ever used. A
    damaged cache is reported, kept aside and computed again. `jobs` trainings run at a time through joblib (−1: one
    a core), so that a joblib backend (Dask, Ray) spreads them over a cluster. Bit for bit the same in any order.
    """
    trainings = [(np.sort(as_indices(kept, len(train), "the plan's").numpy()), seed) for kept, seed in plan]
    keys = [_training_key(train, test, config, *training) for training in trainings]
    identity = model_identity(config.new_model(), train.images[0])
    done, found = read_if_whole(Path(path), _read_retrainings) or ({}, identity)
    if differing := _differing(found, identity):
        print(f"training again: {path} was made with another {', '.join(differing)} of {config.model}")
        done = {}
    left = {key: training for key, training in zip(keys, trainings) if key not in done}
    tasks = (joblib.delayed(_train_and_ask)(train, test, config, key, *left[key]) for key in left)
    finished = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(tasks)
    for key, margins, correct in tqdm(finished, "retraining", len(left), leave=False, unit="model", disable=not left):
        done[key] = (margins, correct)
        _write_retrainings(path, done, identity)
    chosen = {key: done[key] for key in keys}
    if left:
        _write_retrainings(path, chosen, identity)  # in the order of the plan, whatever finished first
    return Retrainings(*(np.stack(parts) for parts in zip(*(chosen[key] for key in keys))))


def _training_key(train: ImageData, test: ImageData, config: TrainConfig, kept: NDArray[np.int64], seed: int) -> str:
    """Name of one training: the same for the same data, configuration, images kept (sorted) and seed only."""
    about = {**config.numbers(), "seed": seed, "train": train.fingerprint, "test": test.fingerprint}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    digest.update(kept.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _train_and_ask(
    train: ImageData, test: ImageData, config: TrainConfig, key: str, kept: NDArray[np.int64], seed: int
) -> tuple[str, NDArray[np.float16], NDArray[np.bool_]]:
    """One training; its key, and the margins (m,) and the right answers (m,) on `test`."""
    result = evaluate(train_once(train, dataclasses.replace(config, seed=seed), kept).model, test)
    margins = MEASURES["margin"].values(result.logits, result.labels).numpy().astype(np.float16)
    return key, margins, (result.predictions == result.labels).numpy()


Finished = dict[str, tuple[NDArray[Any], NDArray[Any]]]
"""Key of a training → its margins and its right answers."""


def _write_retrainings(path: str | Path, done: Finished, identity: Mapping[str, Any]) -> None:
    keys, margins, correct = list(done), *(np.stack(parts) for parts in zip(*done.values()))
    about, packed = np.array(json.dumps(identity)), np.packbits(correct, axis=1)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, identity=about, keys=np.array(keys), margins=margins, correct=packed)


def _read_retrainings(path: Path) -> tuple[Finished, dict[str, Any]]:
    """What is finished, and which model it is of."""
    with np.load(path, allow_pickle=False) as file:
        identity = json.loads(str(file["identity"]))
        keys, margins = file["keys"].tolist(), file["margins"]
        correct = np.unpackbits(file["correct"], axis=1, count=margins.shape[1]).astype(np.bool_)
    if not len(keys) == len(margins) == len(correct):
        raise ValueError("its parts differ in length")
    return dict(zip(keys, zip(margins, correct))), identity


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Wrong labels, and what finds them                                                                            ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


def corrupt_labels(
    labels: Tensor, classes: int, fraction: float, seed: int = 0, swaps: Sequence[tuple[int, int]] = ()
) -> tuple[Tensor, NDArray[np.int64]]:
    """Labels (n,), round(fraction · n) of them wrong on purpose, and the sorted indices of those.

    Any image may be flipped, to any of the other `classes` with equal chance. With `swaps`, pairs of classes, only
    images of these classes are, each to the other class of its pair.
    Raises ValueError for a fraction outside 0..1, a class with no other class to flip to, or too few images to flip.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie in 0..1, not {fraction}")
    check_labels(labels, classes)
    partners = _swap_partners(classes, swaps)
    given, generator = labels.numpy(), np.random.default_rng(seed)
    eligible = np.flatnonzero(np.isin(given, list(partners))) if partners else np.arange(len(given))
    count = round(fraction * len(given))
    if count > len(eligible):
        raise ValueError(f"{count} labels are to be flipped, but only {len(eligible)} images are of these classes")
    flipped, wrong = np.sort(generator.choice(eligible, count, replace=False)), given.copy()
    if partners:
        wrong[flipped] = [partners[label] for label in given[flipped].tolist()]
    else:
        wrong[flipped] = (given[flipped] + generator.integers(1, classes, count)) % classes
    return torch.from_numpy(wrong), flipped


def _swap_partners(classes: int, swaps: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Class → the class that it is swapped with, both ways."""
    if classes < 2:
        raise ValueError("there is one class only: its labels have no other class to flip to")
    for first, second in swaps:
        if first == second or not (0 <= first < classes and 0 <= second < classes):
            raise ValueError(f"a swap must name two different classes in 0..{classes - 1}, not {(first, second)}")
    partners = {a: b for first, second in swaps for a, b in ((first, second), (second, first))}
    if len(partners) < 2 * len(swaps):
        raise ValueError(f"each class can be in one swap only, not {tuple(swaps)}")
    return partners


def out_of_fold_probabilities(
    trains: Sequence[ImageData],
    config: TrainConfig,
    folder: str | Path,
    folds: int = 3,
    jobs: int = -1,
    checkpoints: Sequence[int] = (),
) -> list[NDArray[np.float32]]:
    """For each data set (n, C) probabilities of each image, by a model that has not seen it.

    Cross-validation, each fold with its share of every label: `folds` models a data set, trained on the other folds,
    all `train_models`. Pass all data sets at once, so that no core waits between them. Each answer is the mean of
    `mean_probabilities`, over the epochs `checkpoints`.
    """
    splitter = StratifiedKFold(folds, shuffle=True, random_state=config.seed)
    splits = [list(splitter.split(np.zeros(len(train)), train.labels.numpy())) for train in trains]
    parts = [train.subset(kept) for train, split in zip(trains, splits) for kept, _ in split]
    trainings = iter(train_models(parts, config, [config.seed] * len(parts), folder, jobs, checkpoints))
    probabilities = [np.zeros((len(train), len(train.class_names)), np.float32) for train in trains]
    for train, split, found in zip(trains, splits, probabilities):
        for _, left_out in split:
            found[left_out] = mean_probabilities(next(trainings), train.subset(left_out), config)
    return probabilities


def mean_probabilities(training: Training, data: ImageData, config: TrainConfig) -> NDArray[np.float32]:
    """(n, C) mean over the training's checkpoints (its model, where it has none); with `mirror`, of both ways round."""
    views = (data, data.mirrored) if config.mirror else (data,)
    models = training.checkpoints.values() or (training.model,)
    with torch.autocast(pick_device().type, torch.bfloat16, enabled=config.mixed):
        asked = [evaluate(model, view) for model in models for view in views]
    return torch.stack([one.logits.float().softmax(1) for one in asked]).mean(0).numpy()


def suspicion_scores(
    training: Training, train: ImageData, validation: ImageData, probabilities: NDArray[Any], seed: int = 0
) -> pd.DataFrame:
    """How suspicious the label of each training image is, by several scores: n rows, larger = more suspicious.

    training was on `train`, wrong labels and all; `validation` has labels that can be trusted, and is used by
    "influence" only; `probabilities` (n, C) are of models that have not seen the image they are of
    (`out_of_fold_probabilities`), used by the two last. `.attrs["seconds"]`: what each took, trainings left out.

    self-influence (Koh & Liang 2017, section 5.4) · influence: the mean on all of `validation`, negated · gradient norm
    and loss of the image · margin: largest other logit less that of the label · out of fold: the confidence in the
    label that the other models have, negated, as cleanlab scores it (Northcutt et al. 2021, arXiv:1911.00068), and
    confident learning: the same after subtracting the mean confidence of each class · "on the way": the mean over the
    training's checkpoints, where it has any (for the margin: Pleiss et al. 2020, arXiv:2001.10528).
    """
    if probabilities.shape != (len(train), len(train.class_names)):
        raise ValueError(f"probabilities must be {(len(train), len(train.class_names))}, not {probabilities.shape}")
    given, model, early = train.labels.numpy(), training.model, [*training.checkpoints.values()]
    ways: dict[str, Callable[[], NDArray[Any]]] = {
        "random": lambda: np.random.default_rng(seed).random(len(train)),
        "self-influence": lambda: self_influences(model, train, measure="loss", seed=seed),
        "influence": lambda: -mean_influences(model, train, validation, measure="loss", seed=seed),
        "gradient norm": lambda: (len(train) * self_influences(model, train, solver="identity", measure="loss")) ** 0.5,
        "loss": lambda: evaluate(model, train).losses.numpy(),
        "margin": lambda: label_margins(predict(model, train), train.labels),
        "out of fold": lambda: -get_label_quality_scores(given, probabilities),
        "confident learning": lambda: -get_label_quality_scores(given, probabilities, adjust_pred_probs=True),
    }
    on_the_way: dict[str, Callable[[], NDArray[Any]]] = {
        "self-influence": lambda: self_influences(early, train, measure="loss", seed=seed),
        "influence": lambda: -mean_influences(early, train, validation, measure="loss", seed=seed),
        "loss": lambda: np.mean([evaluate(one, train).losses.numpy() for one in early], axis=0),
        "margin": lambda: np.mean([label_margins(predict(one, train), train.labels) for one in early], axis=0),
    }
    ways |= {f"{name}, on the way": score for name, score in on_the_way.items() if early}
    table, seconds = pd.DataFrame(index=pd.RangeIndex(len(train), name="index")), {}
    for name, score in ways.items():
        start = time.perf_counter()
        table[name] = score()
        seconds[name] = time.perf_counter() - start
    table.attrs["seconds"] = seconds
    return table


def label_margins(logits: Tensor, labels: Tensor) -> NDArray[Any]:
    """(n,) the largest logit (n, C) of another class less that of the label: above 0, the model says something else.

    Logarithms of probabilities do as well: a softmax changes no difference of logits.
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    return (logits.scatter(1, labels[:, None], -math.inf).max(1).values - own).numpy()


def list_suspects(
    train: ImageData,
    suspicion: pd.DataFrame,
    probabilities: NDArray[Any],
    pairs: pd.DataFrame,
    by: str,
    count: int = 500,
) -> pd.DataFrame:
    """The `count` images whose label is most suspicious by the score called `by`, one row each, worst first.

    suspicion: of `suspicion_scores`; probabilities (n, C): of models that have not seen the image; pairs: as
    in near-duplicates.csv. Columns: index (torchvision's), given and suggested label, probability of each (0..1),
    score, reason in plain words, and the rank (1 = most suspicious) under every score, as in "rank loss".
    """
    chosen = np.argsort(-suspicion[by].to_numpy(), kind="stable")[:count]
    given, suggested = train.labels.numpy()[chosen], probabilities[chosen].argmax(1)
    names = np.array(train.class_names)
    table = pd.DataFrame({"index": chosen, "given": names[given], "suggested": names[suggested]})
    table["given_probability"] = probabilities[chosen, given].round(4)
    table["suggested_probability"] = probabilities[chosen, suggested].round(4)
    table["score"] = suspicion[by].to_numpy()[chosen]
    twins = _twins_with_another_label(pairs)
    table["reason"] = [_reason(row, twins) for _, row in table.iterrows()]
    ranks = suspicion.rank(ascending=False, method="first").astype(int).iloc[chosen].add_prefix("rank ")
    return pd.concat([table, ranks.reset_index(drop=True)], axis=1)


def _twins_with_another_label(pairs: pd.DataFrame) -> dict[int, str]:
    """Training index → "train #7, a cat", its near-duplicate with another label."""
    differing = pairs[pairs["label_a"] != pairs["label_b"]]
    sides = (("a", "b"), ("b", "a"))
    return {
        int(pair[f"index_{one}"]): f"{pair[f'set_{other}']} #{pair[f'index_{other}']}, a {pair[f'label_{other}']}"
        for _, pair in differing.iterrows()
        for one, other in sides
        if pair[f"set_{one}"] == "train"
    }


def _reason(suspect: pd.Series, twins: Mapping[int, str], sure: float = 0.8) -> str:
    """Why a label is suspicious, from what is known without looking at the image."""
    if twin := twins.get(int(suspect["index"])):
        return f"near-duplicate of {twin}"
    if suspect["suggested"] == suspect["given"]:
        return "unusual: the label is believed, but the image is hard"
    if suspect["suggested_probability"] >= sure:
        return f"wrong label? looks like: {suspect['suggested']}"
    return f"ambiguous: {suspect['suggested']} or another"


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Plots: helpers take an axes and return it; nothing here computes an influence                                ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝

HELPFUL_COLOUR, HARMFUL_COLOUR = "#0072B2", "#D55E00"  # Okabe & Ito: told apart by colour-blind readers too


def use_style() -> None:
    """The one look of every figure: 7 inches at most, quiet axes."""
    plt.rc("figure", figsize=(7, 3), dpi=100)
    plt.rc("figure.constrained_layout", use=True)
    plt.rc("font", size=9)
    plt.rc("axes", titlesize=10)
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("image", interpolation="nearest")


def show_figure(figure: Figure, path: str | Path) -> None:
    """Save `figure` to `path` as PNG and display that very file, so that notebook and folder cannot disagree.

    A chart is drawn at 200 dpi as long as its file stays under 60 kB, anything with photographs in it at 100 dpi, so
    that notebooks stay below 1 MB; either is displayed at the width that it has at 100 dpi.
    """
    chart = not any(ax.images for ax in figure.axes)
    drawn = _png(figure, 200) if chart else b""
    sharp = 0 < len(drawn) < 60_000
    if not sharp:
        drawn = _png(figure, 100)
    plt.close(figure)
    with atomic_path(path) as temporary:
        temporary.write_bytes(drawn)
    display(Image(data=drawn, retina=sharp))


def _png(figure: Figure, dpi: int) -> bytes:
    """The figure as PNG, reduced to the 256 colours that suit it best: a third of the size."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    whole = PIL.Image.open(drawn).convert("RGB")
    # The default palette may miss a rare colour by 100 levels (red horses); this one is refined until it does not.
    cover = PIL.Image.Quantize.MAXCOVERAGE
    reduced = whole.quantize(256, method=cover, kmeans=1, dither=PIL.Image.Dither.NONE)
    reduced.save(small, format="PNG", optimize=True)
    return small.getvalue()


def show_image(ax: Axes, image: Tensor, title: str = "", colour: str = "black") -> Axes:
    """One uint8 image (3, 32, 32) in its natural colours, with a title above."""
    ax.imshow(image.permute(1, 2, 0).numpy())
    ax.set_title(title, color=colour, fontsize=7.5)
    ax.set_axis_off()
    return ax


def signed(value: float, decimals: int) -> str:
    """A number with its sign, as a figure prints it: "+0.50", "−0.50" with a real minus, "0.00" without any."""
    text = f"{value:+.{decimals}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


def small_panel(ax: Axes, title: str) -> Axes:
    """A histogram of scores, small enough to stand beside others: zero marked, small letters."""
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_title(title, fontsize=8)
    ax.tick_params(labelsize=6)
    ax.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    ax.xaxis.get_offset_text().set_fontsize(6)
    return ax


def plot_influential(
    influences: Influences, i: int, images: tuple[ImageData, ImageData], says: str, counts: pd.DataFrame | None = None
) -> Figure:
    """Test image i at the left (with what the model `says`), its 5 most helpful and 5 most harmful at the right.

    images: (train, test). counts: of `count_top_images`; then below each image stands how many of the other trainings
    have it in their top 10 as well, and an image that at least half of them have is framed: it holds.
    """
    (train, test), k = images, 5
    figure = plt.figure(figsize=(7, 3.4))
    grid = figure.add_gridspec(2, k + 1, width_ratios=[1.7] + [1] * k)
    index = int(influences.test_indices[i])
    left = show_image(figure.add_subplot(grid[:, 0]), test.images[index])
    left.set_title(f"test image {test.number_of(index)}\nlabel: {test.class_of(index)}\nmodel: {says}", fontsize=8)
    rows = (
        ("helpful", influences.helpful(i, k), HELPFUL_COLOUR),
        ("harmful", influences.harmful(i, k), HARMFUL_COLOUR),
    )
    largest = max(abs(influences.scores[i, j]) for _, chosen, _ in rows for j in chosen)
    decimals = max(0, 1 - math.floor(math.log10(largest or 1)))  # two digits of the largest
    for row, (kind, chosen, colour) in enumerate(rows):
        found = None if counts is None else found_by(counts, index, kind)
        for column, j in enumerate(chosen):
            title = f"{signed(influences.scores[i, j], decimals)}\n{train.class_of(j)}\n#{train.number_of(j)}"
            ax = show_image(figure.add_subplot(grid[row, column + 1]), train.images[j], title, colour)
            if counts is not None and found is not None:
                _show_stability(ax, found.get(int(j), 0), int(counts["models"].iloc[0]), colour)
            if column == 0:
                look: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center", "color": colour}
                ax.text(-0.12, 0.5, f"most {kind}", transform=ax.transAxes, **look)
    return figure


def _show_stability(ax: Axes, found: int, models: int, colour: str) -> None:
    """Write below an image by how many of how many it is found; what half of them find is framed."""
    holds = 2 * found >= models
    look: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 7.5, "color": "black" if holds else "#777777"}
    ax.text(0.5, -0.09, f"{found} of {models}", transform=ax.transAxes, weight="bold" if holds else "normal", **look)
    if holds:
        frame = Rectangle((0, 0), 1, 1, transform=ax.transAxes, fill=False, linewidth=2.5)
        frame.set(edgecolor=colour, clip_on=False)
        ax.add_patch(frame)


def plot_image_row(
    data: ImageData, indices: Sequence[int] | NDArray[Any], titles: Sequence[str], colour: str
) -> Figure:
    """Images side by side, each with its title, class and index above."""
    figure, axes = plt.subplots(1, len(indices), figsize=(2.2 * len(indices), 2.9), squeeze=False)
    for ax, index, title in zip(axes[0], indices, titles):
        show_image(ax, data.images[int(index)])
        ax.set_title(f"{title}\n{data.class_of(int(index))} #{data.number_of(int(index))}", color=colour, fontsize=10)
    return figure


def plot_image_grid(
    data: ImageData, indices: Tensor | NDArray[Any], row_names: Sequence[str] = (), titles: Sequence[str] = ()
) -> Figure:
    """Images of `data` at `indices` (rows, columns), 7 inches wide; a name left of each row, a title above each image.

    titles: row after row. An index below 0 leaves its place empty.
    """
    rows, columns = np.shape(indices)
    width = 7 / (columns + 1.2 * bool(row_names))
    figure, axes = plt.subplots(rows, columns, figsize=(7, rows * (width + 0.26 * bool(titles))), squeeze=False)
    for place, (ax, index) in enumerate(zip(axes.flat, np.asarray(indices).ravel())):
        ax.set_axis_off()
        if index >= 0:
            show_image(ax, data.images[int(index)], titles[place] if titles else "")
    for ax, name in zip(axes[:, 0], row_names):
        ax.text(-0.12, 0.5, name, ha="right", va="center", transform=ax.transAxes)
    return figure


SCORE_COLOURS = {
    "self-influence": "#332288",
    "influence": "#AA3377",
    "gradient norm": "#117733",
    "loss": "#222222",
    "margin": "#CCAA00",
    "out of fold": "#66AADD",
    "confident learning": "#999933",
    "random": "#777777",
}


def score_look(name: str) -> dict[str, Any]:
    """How a score is drawn as a line: its colour, thicker for influence, dashed "on the way", dotted for chance."""
    kind, *late = name.split(", ")
    style = ":" if kind == "random" else "--" if late else "-"
    return {"color": SCORE_COLOURS[kind], "linewidth": 2.2 if "influence" in kind else 1.2, "linestyle": style}


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Results on disk                                                                                              ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


def read_results(path: str | Path) -> dict[str, Any]:
    """The whole of results.json, {} when there is none yet; CorruptFileError names a damaged file."""
    if not Path(path).exists():
        return {}
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is not JSON ({error}); restore it: git checkout -- {path}") from error
    if not isinstance(results, dict):
        raise CorruptFileError(f"{path} must hold one JSON object; restore it: git checkout -- {path}")
    return results


def record_results(path: str | Path, chapter: str, values: Mapping[str, Any]) -> None:
    """Replace `chapter` in results.json, keep the others; README and slides read their numbers from there."""
    results = {**read_results(path), chapter: dict(values)}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def write_table(path: str | Path, table: pd.DataFrame, made_for: str) -> None:
    """Write `table` as CSV below a comment line that says what it was made for."""
    with atomic_path(path) as temporary:
        temporary.write_text(f"# {made_for}\n{table.to_csv(index=False)}", encoding="utf-8")


def read_table(path: str | Path) -> tuple[pd.DataFrame, str] | None:
    """The CSV that `write_table` left at `path`, and what it was made for; None when there is none."""
    if not Path(path).exists():
        return None
    try:
        about, _, rest = Path(path).read_text(encoding="utf-8").partition("\n")
        if not about.startswith("# "):
            raise ValueError("its first line does not say what it was made for")
        return pd.read_csv(io.StringIO(rest)), about.removeprefix("# ")
    except ValueError as error:  # undecodable text and unreadable tables alike
        raise CorruptFileError(f"{path} is damaged ({error}); restore it: git checkout -- {path}") from error


def read_or_make_table(path: str | Path, make: Callable[[], pd.DataFrame], made_for: str) -> pd.DataFrame:
    """The CSV that `write_table` left at `path` for this very purpose, else what `make()` returns, written there.

    A damaged file is reported, kept aside and made again.
    """
    found = read_if_whole(Path(path), read_table)
    if found is not None and found[1] == made_for:
        return found[0]
    table = make()
    write_table(path, table, made_for)
    return table
