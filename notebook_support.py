"""Everything the notebooks of *Influence over Inference* share.

    I(z, z_test) = ∇L(z_test)ᵀ (H + λI)⁻¹ ∇L(z) / n  ≈  L(z_test; θ trained without z) − L(z_test; θ)

THE SIGN: a positive influence is HELPFUL (without z the test loss would rise), a negative one is HARMFUL.
It is stated here once, holds in every function below, and is guarded by a test that retrains.

Words: `params` θ (p of them), n `train` and m `test` samples, `loss` L the per-sample cross-entropy, `damping` λ,
`scores` the (m, n) influence matrix, `directions` the m solutions s = (H + λI)⁻¹∇L(z_test).

The module reads in the order the data flows; a section never calls one below it:
    setup → data → looking at the data → model and training → evaluation → influence → the package → experiments →
    plots → results on disk

Sources: Koh & Liang, "Understanding Black-box Predictions via Influence Functions", ICML 2017, arXiv:1703.04730;
Agarwal, Bullins & Hazan, "Second-Order Stochastic Optimization for Machine Learning in Linear Time" (LiSSA), JMLR
2017; Martens, "New Insights and Perspectives on the Natural Gradient Method", JMLR 2020 (Fisher and Gauss-Newton).
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import joblib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import torch
import torch.nn.functional as F
from cleanlab.rank import get_label_quality_scores
from IPython.display import Image, display
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from pytorch_influence_functions import calc_influence_function as package
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import rankdata
from scipy.stats import t as student_t
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
)
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.data import DataLoader, IterableDataset, Subset, default_collate
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm  # plain text: the widget bars of tqdm.auto leave metadata that GitHub refuses to render

# torch's own jvp raises this on first use; it says nothing about our code.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)

# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Setup: run mode, device, seeds, safe files                                                                   ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


class CorruptFileError(ValueError):
    """A file on disk is damaged or not what its name promises; the message names it and says what to do."""


class NonFiniteError(ValueError):
    """A computation produced NaN or infinity; the message says what to change."""


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


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA, then MPS, then the CPU.

    Raises ValueError when the device asked for is not on this machine.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: use 'auto', 'cpu', 'cuda' or 'mps'") from error
    if not available.get(device.type, False):
        raise ValueError(f"device {name!r} asked for, but torch can use none here; use 'auto' or 'cpu'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} asked for, but there are only {torch.cuda.device_count()}; count from 0")
    return device


def seed_everything(seed: int) -> None:
    """Seed torch on every device (initial weights); whatever else is random here takes a seed of its own."""
    torch.manual_seed(seed)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; rename it to `path` only if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes private files; a result is for everyone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any type on any device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _set_aside(path: Path, error: Exception) -> None:
    """Rename a damaged cache file, and say so: it is never trusted and never thrown away."""
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    print(f"{path} is damaged ({error}); kept as {aside.name}, and what was in it is computed again")


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Data: CIFAR-10, or the loudly announced stand-in                                                             ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DOWNLOAD_PATIENCE_S = 15.0


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labelled images held in memory once; a map-style data set of (normalised image, label).

    `images`: (n, 3, 32, 32) uint8, `labels`: (n,) int64, in the order (and so with the indices) of torchvision.
    """

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return normalise(self.images[index]), int(self.labels[index])

    def __repr__(self) -> str:
        return f"{self.name}: {len(self):,} images {tuple(self.images.shape[1:])}, {len(self.class_names)} classes"

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, 3, 32, 32) float32, normalised, and labels (b,) at `indices`."""
        return normalise(self.images[indices]), self.labels[indices]

    def subset(self, indices: Tensor | NDArray[Any] | Sequence[int]) -> ImageData:
        """The same data restricted to `indices` (which then count from 0)."""
        chosen = torch.as_tensor(indices)
        return dataclasses.replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def with_labels(self, labels: Tensor) -> ImageData:
        """The same images under other `labels` (n,); ValueError when there are more or fewer, or an unknown class."""
        if labels.shape != self.labels.shape:
            raise ValueError(f"labels must have shape {tuple(self.labels.shape)}, not {tuple(labels.shape)}")
        _check_labels(labels, len(self.class_names))
        return dataclasses.replace(self, labels=labels.long())

    def class_of(self, index: int) -> str:
        """Name of the class that image `index` is labelled with."""
        return self.class_names[int(self.labels[index])]

    @cached_property
    def fingerprint(self) -> str:
        """Checksum of images and labels; a checkpoint carries it so that it is never used for other data."""
        images = zlib.crc32(_bytes_of(self.images))
        labels = zlib.crc32(_bytes_of(self.labels), images)
        return f"{self.name.replace(' ', '-')}-{len(self)}-{labels:08x}"


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.is_floating_point() or labels.ndim != 1:
        raise ValueError(f"labels must be whole numbers, one an image, not {labels.dtype} {tuple(labels.shape)}")
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, for {classes} classes (outputs); found {low}..{high}")


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels 0..255 → float32 in [−1, 1]; equals torchvision's ToTensor then Normalize(0.5, 0.5)."""
    return images.to(torch.float32).div_(255).sub_(0.5).div_(0.5)


def load_data(dataset: str = "auto", root: str | Path = "data") -> tuple[ImageData, ImageData]:
    """Train and test data: `root`, then the folder in CIFAR10_DIR, then a download, then (only "auto") the stand-in.

    dataset: "auto", "cifar10" (an error instead of the stand-in) or "digits" (the stand-in itself).
    Raises CorruptFileError when a data file is damaged, FileNotFoundError when "cifar10" cannot be had.
    """
    if dataset not in {"auto", "cifar10", "digits"}:
        raise ValueError(f"unknown dataset {dataset!r}: use 'auto', 'cifar10' or 'digits'")
    if dataset == "digits":
        return _digits()
    folder = _find_cifar10(Path(root)) or _download_cifar10(Path(root))
    if folder is not None:
        return _read_cifar10(folder, train=True), _read_cifar10(folder, train=False)
    if dataset == "cifar10":
        raise FileNotFoundError(
            f"CIFAR-10 is neither in {Path(root)}/ nor in CIFAR10_DIR, and cannot be downloaded. Unpack "
            f"cifar-10-python.tar.gz so that {Path(root) / CIFAR10.base_folder}/ holds its files, or set CIFAR10_DIR."
        )
    print(stand_in_banner())
    return _digits()


def stand_in_banner() -> str:
    """The notice that nobody can overlook when there is no CIFAR-10."""
    lines = (
        "THIS IS NOT CIFAR-10",
        "CIFAR-10 was found neither in data/ nor in CIFAR10_DIR, and cannot be downloaded.",
        "Every cell runs, but on a STAND-IN: scikit-learn's 1,797 handwritten digits, enlarged.",
        "Nothing the text says about planes, cats or dogs applies to what you see.",
    )
    return "\n".join(["!" * 96, *(f"!!  {line:<88}  !!" for line in lines), "!" * 96])


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
    return data.subset(torch.where(~is_test)[0]), data.subset(torch.where(is_test)[0])


def shuffled_batches(data: ImageData, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over `data` in a random order: images (b, 3, 32, 32), normalised, and labels (b,)."""
    for chosen in torch.randperm(len(data), generator=generator).split(batch_size):
        yield data.batch(chosen)


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Looking at the data: statistics, histograms, near-duplicates                                                 ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝

CHANNELS = ("red", "green", "blue")
LOOK_CHUNK = 5_000  # images (or pairs of images) held as floating-point numbers at a time


@dataclass(frozen=True, eq=False)
class ImageMoments:
    """`means` and `deviations` (n, 3) float64: of the `pixels` pixels of each image and channel, on the scale 0..1."""

    means: Tensor
    deviations: Tensor
    pixels: int

    @property
    def brightness(self) -> Tensor:
        """(n,) mean over all pixels and channels of an image."""
        return self.means.mean(1)

    @property
    def contrast(self) -> Tensor:
        """(n,) how far the pixels of an image lie from the mean of their channel (root mean square)."""
        return self.deviations.square().mean(1).sqrt()


def image_moments(images: Tensor) -> ImageMoments:
    """Mean and (population) standard deviation per image and channel of uint8 images (n, 3, 32, 32), in one pass."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images must be uint8 (n, 3, h, w) with n ≥ 1, not {images.dtype} {tuple(images.shape)}")
    parts = [
        torch.std_mean(chunk.flatten(2).double().div_(255), dim=2, correction=0) for chunk in images.split(LOOK_CHUNK)
    ]
    deviations, means = (torch.cat(column) for column in zip(*parts))
    return ImageMoments(means, deviations, images[0, 0].numel())


def channel_statistics(moments: ImageMoments) -> pd.DataFrame:
    """One row a channel, on the scale 0..1: mean and standard deviation over all pixels of all images, and their parts.

    variance of all pixels = mean variance within an image + variance of the image means (law of total variance), so
    the widely copied mean of per-image deviations is the smaller number. That one divides by pixels − 1, as its
    source, torch.std, does.
    """
    unbiased = math.sqrt(moments.pixels / max(moments.pixels - 1, 1))
    within, between = moments.deviations.square().mean(0), moments.means.var(0, correction=0)
    columns = {
        "mean": moments.means.mean(0),
        "deviation of all pixels": (within + between).sqrt(),
        "mean of per-image deviations": moments.deviations.mean(0) * unbiased,
        "deviation of image means": between.sqrt(),
    }
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()}, index=list(CHANNELS))


def channel_histograms(images: Tensor, groups: Tensor, bins: int = 256) -> Tensor:
    """How often each value occurs per group and channel: (number of groups, 3, bins) int64, in one pass.

    images (n, 3, h, w) uint8; groups (n,) whole numbers from 0: the labels, or one number for each image. bins: 256 or
    a smaller power of two, equally wide.
    """
    if bins not in {2**power for power in range(1, 9)}:
        raise ValueError(f"bins must be a power of two from 2 to 256, not {bins}")
    if len(groups) != len(images) or not len(groups) or int(groups.min()) < 0:
        raise ValueError(f"groups must hold one whole number ≥ 0 for each of the {len(images)} images")
    size = 3 * bins * (int(groups.max()) + 1)
    counts = torch.zeros(size, dtype=torch.int64)
    for chunk, group in zip(images.split(LOOK_CHUNK), groups.split(LOOK_CHUNK)):
        offset = (group[:, None] * 3 + torch.arange(3)) * bins  # (b, 3): where the counts of each image begin
        place = chunk.flatten(2).div(256 // bins, rounding_mode="floor") + offset[..., None].int()
        counts += torch.bincount(place.flatten(), minlength=size)
    return counts.view(-1, 3, bins)


def class_means(data: ImageData) -> Tensor:
    """The mean image of each class: (classes, 3, 32, 32) float32, 0..255; a class without images is an error."""
    counts = torch.bincount(data.labels, minlength=len(data.class_names))
    if not counts.all():
        raise ValueError(f"no image is labelled {data.class_names[int(counts.argmin())]!r}, so it has no mean image")
    sums = torch.zeros(len(counts), data.images[0].numel(), dtype=torch.float64)
    for chunk, labels in zip(data.images.split(LOOK_CHUNK), data.labels.split(LOOK_CHUNK)):
        sums.index_add_(0, labels, chunk.flatten(1).double())
    return (sums / counts[:, None]).float().view(-1, *data.images.shape[1:])


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


def exact_copies(images: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Positions (first < second) of all pairs of uint8 images that agree in every pixel, found by a 64-bit hash."""
    flat = images.flatten(1).numpy()
    random = np.random.default_rng(0).integers(1, 2**63, flat.shape[1], dtype=np.uint64)
    starts = range(0, len(flat), LOOK_CHUNK)
    hashes = np.concatenate([flat[s : s + LOOK_CHUNK].astype(np.uint64) @ random for s in starts])  # modulo 2⁶⁴
    table = pd.DataFrame({"hash": hashes, "position": np.arange(len(flat))})
    table = table[table["hash"].duplicated(keep=False)]
    pairs = table.merge(table, on="hash").query("position_x < position_y")
    first, second = pairs["position_x"].to_numpy(), pairs["position_y"].to_numpy()
    same = (flat[first] == flat[second]).all(1)  # equal hashes are a strong hint, equal pixels the proof
    return first[same], second[same]


def similar_pairs(
    details: NDArray[np.float32], threshold: float, components: int = 96
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """All pairs of rows of `details` (n, d) that correlate by at least `threshold`: first < second, correlation.

    Unit rows are √(2 − 2·correlation) apart, and a projection never lengthens a distance: whatever is further apart
    than that in the first principal components is ruled out there, and no pair is missed. The rest is checked in full.
    """
    kept = min(components, *details.shape)
    projected = PCA(kept, svd_solver="covariance_eigh").fit_transform(details).astype(np.float32)
    radius = math.sqrt(2 - 2 * threshold) + 1e-3  # the margin is for rounding
    search = NearestNeighbors(radius=radius, algorithm="brute").fit(projected)
    found = search.radius_neighbors_graph(mode="connectivity").tocoo()
    first, second = found.row[found.row < found.col], found.col[found.row < found.col]
    starts = range(0, len(first), LOOK_CHUNK)
    chunks = [(first[s : s + LOOK_CHUNK], second[s : s + LOOK_CHUNK]) for s in starts]
    correlation = np.concatenate([np.zeros(0), *(np.einsum("ij,ij->i", details[a], details[b]) for a, b in chunks)])
    near = correlation >= threshold
    return first[near], second[near], correlation[near]


def near_duplicates(train: ImageData, test: ImageData, threshold: float = 0.85) -> pd.DataFrame:
    """Pairs of images, within and between train and test, that are the same picture: exactly, or nearly.

    Nearly: their details (`image_details`) correlate by at least `threshold`, 0.5 to 1. One row a pair: set, index and
    label of either image, correlation, RMSE of the pixels (0..255), exact; different labels first, then by correlation.
    """
    if not 0.5 <= threshold <= 1:
        raise ValueError(f"threshold must be a correlation from 0.5 to 1, not {threshold}")
    images, labels = torch.cat([train.images, test.images]), torch.cat([train.labels, test.labels]).numpy()
    same_a, same_b = exact_copies(images)
    first, second, correlation = similar_pairs(image_details(images).numpy(), threshold)
    a, b = np.concatenate([same_a, first]), np.concatenate([same_b, second])
    pairs = pd.DataFrame({"correlation": np.concatenate([np.ones(len(same_a)), correlation])})
    for side, position in (("a", a), ("b", b)):
        of_test = position >= len(train)
        pairs[f"set_{side}"] = np.where(of_test, "test", "train")
        pairs[f"index_{side}"] = position - len(train) * of_test
        pairs[f"label_{side}"] = np.array(train.class_names)[labels[position]]
    pairs["pixel_rmse"] = _pixel_rmse(images, a, b)
    pairs["exact"] = np.arange(len(pairs)) < len(same_a)
    pairs["same_label"] = labels[a] == labels[b]
    pairs = pairs.drop_duplicates(["set_a", "index_a", "set_b", "index_b"])  # an exact copy is found twice: kept once
    order = ["same_label", "correlation", "set_a", "index_a", "set_b", "index_b"]
    columns = ["set_a", "index_a", "label_a", "set_b", "index_b", "label_b", "correlation", "pixel_rmse", "exact"]
    return pairs.sort_values(order, ascending=[True, False] + [True] * 4, ignore_index=True)[columns]


def duplicate_groups(pairs: pd.DataFrame, train: ImageData, test: ImageData) -> NDArray[Any]:
    """A number for each image, train first, then test: (n + m,); equal for images that a chain of `pairs` connects."""
    size = len(train) + len(test)
    ends = [pairs[f"index_{side}"] + len(train) * (pairs[f"set_{side}"] == "test") for side in "ab"]
    links = coo_array((np.ones(len(pairs)), (ends[0].to_numpy(), ends[1].to_numpy())), shape=(size, size))
    return connected_components(links, directed=False)[1]


def _pixel_rmse(images: Tensor, first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """Root mean squared difference, in levels 0..255, of the images at `first` and at `second`."""
    parts = zip(torch.from_numpy(first).split(LOOK_CHUNK), torch.from_numpy(second).split(LOOK_CHUNK))
    squares = [(images[a].float() - images[b].float()).square().mean((1, 2, 3)) for a, b in parts]
    return torch.cat(squares).sqrt().numpy() if squares else np.zeros(0)


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


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the trained weights, apart from the data.

    SGD with Nesterov momentum and a one-cycle learning rate that peaks at `peak_lr` (Smith 2018, arXiv:1708.07120).
    """

    seed: int = 0
    epochs: int = 12
    batch_size: int = 128
    peak_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "peak_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch `model` to eval mode for the block, then every sub-module back to the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def predict(model: nn.Module, data: ImageData, batch_size: int = 1000) -> Tensor:
    """(n, C) logits on the CPU, computed in eval mode."""
    device = next(model.parameters()).device
    with eval_mode(model), torch.no_grad():
        parts = torch.arange(len(data)).split(batch_size)
        return torch.cat([model(data.batch(part)[0].to(device)).cpu() for part in parts])


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters p."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def train_model(
    model: nn.Module, train: ImageData, config: TrainConfig, validation: ImageData | None = None
) -> pd.DataFrame:
    """Train `model` in place on its own device; no augmentation, so that the training set is the training set.

    Returns one row an epoch: epoch, train_loss, train_accuracy (running, while the weights move), seconds; with
    `validation` also validation_loss and validation_accuracy, and a progress bar (without it: silent). The last
    epoch's weights are kept: the validation data decides nothing.
    """
    generator = torch.Generator().manual_seed(config.seed)
    steps = config.epochs * math.ceil(len(train) / config.batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(), config.peak_lr, config.momentum, weight_decay=config.weight_decay, nesterov=True
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.peak_lr, total_steps=steps)
    history, start = [], time.perf_counter()
    epochs = range(1, config.epochs + 1)
    for epoch in tqdm(epochs, desc="training", unit="epoch", leave=False, disable=validation is None):
        batches = shuffled_batches(train, config.batch_size, generator)
        row = {"epoch": epoch, **_train_epoch(model, batches, optimizer, scheduler)}
        if validation is not None:
            logits = predict(model, validation)
            row["validation_loss"] = float(F.cross_entropy(logits, validation.labels))
            row["validation_accuracy"] = float((logits.argmax(1) == validation.labels).float().mean())
        history.append({**row, "seconds": time.perf_counter() - start})
    return pd.DataFrame(history)


def _train_epoch(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> dict[str, float]:
    """One pass over `batches`; mean train_loss and train_accuracy as measured on the way."""
    model.train()
    device = next(model.parameters()).device
    loss_sum, hits, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        loss_sum += loss.detach() * len(labels)
        hits += (logits.detach().argmax(1) == labels).sum()
        seen += len(labels)
    if not torch.isfinite(loss_sum):
        raise NonFiniteError("the training loss became NaN or infinite; lower TrainConfig.peak_lr")
    return {"train_loss": float(loss_sum) / seen, "train_accuracy": float(hits) / seen}


def save_checkpoint(path: str | Path, model: nn.Module, identity: Mapping[str, Any], history: pd.DataFrame) -> None:
    """Write weights as safetensors; `identity` (what they were trained with) and the history ride in its header."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    header = {"identity": json.dumps(identity, sort_keys=True), "history": history.to_json(orient="records")}
    with atomic_path(path) as temporary:
        save_file(weights, str(temporary), metadata=header)


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], pd.DataFrame]:
    """Weights, identity and history of a checkpoint; CorruptFileError names a file that is damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.offset_keys()}
            header = file.metadata() or {}
        return weights, json.loads(header["identity"]), pd.DataFrame(json.loads(header["history"]))
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptFileError(
            f"checkpoint {path} is damaged or not ours ({error}); delete it or restore it: git checkout -- {path}"
        ) from error


def _identity(model: nn.Module, train: ImageData, config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint must have been made with to be used for `model`, `train` and `config`."""
    return {"model": type(model).__name__, "train": train.fingerprint, **asdict(config)}


def train_or_load(
    model: nn.Module, train: ImageData, validation: ImageData, config: TrainConfig, path: str | Path, retrain: bool
) -> pd.DataFrame:
    """Load `path` if it was trained with this very configuration on this very data, else train and save there.

    Returns the training history. A checkpoint of another configuration is replaced, and the reason is printed; a
    damaged one is an error (see `read_checkpoint`), because silently training again would hide it.
    """
    identity = _identity(model, train, config)
    if not retrain and Path(path).exists():
        weights, found, history = read_checkpoint(path)
        if found == identity:
            model.load_state_dict(weights)
            print(f"loaded {path}: trained with this very configuration ({len(history)} epochs)")
            return history
        differing = sorted(key for key in {*found, *identity} if found.get(key) != identity.get(key))
        print(f"training again: the checkpoint {path} was made with another {', '.join(differing)}")
    history = train_model(model, train, config, validation)
    save_checkpoint(path, model, identity, history)
    print(f"trained {config.epochs} epochs in {history['seconds'].iloc[-1]:.0f} s; saved {path}")
    return history


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
    """Run `model` (in eval mode, put back afterwards) over `data`."""
    return Evaluation(predict(model, data), data.labels, data.class_names)


def penultimate_features(model: Net, data: ImageData) -> Tensor:
    """(n, 84) what the last layer of `Net` is given for each image, on the CPU."""
    inputs: list[Tensor] = []
    hook = model.fc3.register_forward_hook(lambda _, given, __: inputs.append(given[0].cpu()))
    try:
        predict(model, data)
    finally:
        hook.remove()
    return torch.cat(inputs)


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
# ║ Influence: measures and per-sample gradients                                                                 ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝

Measure = Callable[[Tensor, Tensor], Tensor]
"""(outputs (b, …), labels (b,)) → (b,) numbers, lower is better; what influence is the influence on."""


def loss_measure(logits: Tensor, labels: Tensor) -> Tensor:
    """(b,) cross-entropy of logits (b, C), in nats."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin_measure(logits: Tensor, labels: Tensor) -> Tensor:
    """(b,) −log(p_y / (1 − p_y)): the margin of TRAK (Park et al. 2023, arXiv:2303.14186), negated: lower is better."""
    right = logits.gather(1, labels[:, None]).squeeze(1)
    others = torch.zeros_like(logits).scatter(1, labels[:, None], -torch.inf)
    return torch.logsumexp(logits + others, dim=1) - right


MEASURES: dict[str, Measure] = {"loss": loss_measure, "margin": margin_measure}


def _per_sample_gradients(
    model: nn.Module, params: dict[str, Tensor], measure: Measure, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """name → (b, *shape): the gradient of the measure with respect to `params`, one a sample."""

    def single(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return measure(functional_call(model, values, (image[None],)), label[None]).sum()

    return vmap(grad(single), in_dims=(None, 0, 0))(params, images, labels)


def flatten_params(tensors: Mapping[str, Tensor]) -> Tensor:
    """name → (k, *shape) becomes (k, p), parameters side by side in the model's order."""
    return torch.cat([tensor.flatten(1) for tensor in tensors.values()], dim=1)


def unflatten_params(matrix: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(k, p) becomes name → (k, *shape): the inverse of `flatten_params`."""
    pieces = matrix.split([param.numel() for param in params.values()], dim=1)
    return {name: piece.unflatten(1, params[name].shape) for name, piece in zip(params, pieces)}


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Influence: settings and inputs                                                                               ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


@dataclass(frozen=True)
class InfluenceSettings:
    """How influence is computed; every field has a working default and is checked.

    solver      how (H + λI)⁻¹ is applied: "kernel", "cg", "lissa" or "identity" (see `SOLVERS`)
    measure     "margin", "loss", or your own `Measure`, on both sides of the formula. The default is what foretells
                retraining best by measurement (retraining.ipynb, section 5): an image learned by heart has almost no
                loss gradient left, but a margin. Only with "loss" is a score an estimated change in nats.
    damping     λ > 0, in units of the curvature; None: the mean diagonal of the Gram matrix of the sampled gradients
                divided by `samples`, that is the mean of the curvature's non-zero eigenvalues
    samples     r: how many training images stand in for all of them in the curvature H
    curvature   of "cg" and "lissa": "gauss_newton" (never negative) or "hessian"
    tolerance   of "cg": relative residual at which it stops;  iterations: of "cg" at most, the depth of "lissa"
    batch_size, scale, repeats   of "lissa": images a step, divisor (None: from the largest eigenvalue), averaged runs
    chunk       training images scored at a time; jobs: joblib workers; device: "auto", "cpu", "cuda" or "mps"
    seed        of everything that is sampled;  progress: show a bar on the terminal
    """

    solver: str = "kernel"
    measure: str | Measure = "margin"
    damping: float | None = None
    samples: int = 2000
    curvature: str = "gauss_newton"
    tolerance: float = 1e-3
    iterations: int = 500
    batch_size: int = 64
    scale: float | None = None
    repeats: int = 1
    chunk: int = 250
    jobs: int = 1
    device: str = "auto"
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("solver", SOLVERS), ("curvature", ("gauss_newton", "hessian")), ("measure", MEASURES)):
            value = getattr(self, name)
            if not callable(value) and value not in allowed:
                raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(allowed)}")
        for name in ("damping", "scale", "tolerance"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ValueError(f"{name} must be a positive number, not {value}")
        for name in ("samples", "iterations", "batch_size", "repeats", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.jobs == 0:
            raise ValueError("jobs must be a number of workers, or −1 for all cores, not 0")

    def describe(self) -> dict[str, Any]:
        """The settings as plain values for JSON; a measure of your own by its name."""
        name = self.measure if isinstance(self.measure, str) else getattr(self.measure, "__name__", "own")
        return {**asdict(self), "measure": name}


SOLVERS = ("kernel", "cg", "lissa", "identity")


@dataclass(frozen=True, eq=False)
class _Source:
    """Uniform access to tensor pairs, `ImageData` and map-style data sets: `batch(indices)` → images, labels."""

    size: int
    batch: Callable[[Tensor], tuple[Tensor, Tensor]]


def _unwrap(loader: DataLoader[Any], role: str) -> tuple[Any, Callable[[list[Any]], Any]]:
    """The data set of a loader, whose order gives the indices however its batches are drawn, and what makes a batch."""
    sampler, data = loader.sampler, loader.dataset
    if isinstance(sampler, Sized) and isinstance(data, Sized) and len(sampler) != len(data):
        raise ValueError(f"{role} draws not every image of its data set once; give the loader a Subset of it instead")
    single = loader.batch_sampler is None  # then its collate_fn is for one sample, and makes no batch
    return data, default_collate if single else loader.collate_fn


def _as_source(data: Any, role: str) -> _Source:
    """Wrap what the caller passed; ValueError when it is empty or of no known kind."""
    if isinstance(data, _Source):
        return data
    collate: Callable[[list[Any]], Any] = default_collate
    if isinstance(data, DataLoader):
        data, collate = _unwrap(data, role)
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        images, labels = data
        if len(images) != len(labels):
            raise ValueError(f"{role}: {len(images)} images but {len(labels)} labels; they must pair up")
        source = _Source(len(labels), lambda chosen: (images[chosen], labels[chosen]))
    elif isinstance(data, ImageData):
        source = _Source(len(data), data.batch)
    elif isinstance(data, Sized) and hasattr(data, "__getitem__") and not isinstance(data, IterableDataset):
        source = _Source(len(data), lambda chosen: tuple(collate([data[int(i)] for i in chosen])))
    else:
        raise ValueError(
            f"{role} must be a pair of tensors (images, labels), a map-style data set or a DataLoader of one, "
            f"not {type(data).__name__}"
        )
    if source.size == 0:
        raise ValueError(f"{role} is empty: influence needs at least one image")
    return source


@dataclass(frozen=True, eq=False)
class _Problem:
    """A private copy of the model with the data and settings: what every solver and the scoring work on."""

    model: nn.Module
    params: dict[str, Tensor]
    train: _Source
    settings: InfluenceSettings
    classes: int

    @property
    def device(self) -> torch.device:
        return next(iter(self.params.values())).device

    @property
    def measure(self) -> Measure:
        return self.settings.measure if callable(self.settings.measure) else MEASURES[self.settings.measure]

    @cached_property
    def sample(self) -> Tensor:
        """(r,) indices of the training images that stand in for all of them in the curvature."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        order = torch.randperm(self.train.size, generator=generator)
        return order[: self.settings.samples].sort().values

    @cached_property
    def rows(self) -> Tensor:
        """(r, p) sampled gradients whose second moment is the Fisher matrix.

        For the loss, each label is drawn from the model's own prediction: the expectation is then the true Fisher,
        which equals the Gauss-Newton matrix (Martens 2020, sec. 9). Other measures use the given labels.
        """
        like = next(iter(self.params.values()))
        matrix = like.new_empty(len(self.sample), sum(param.numel() for param in self.params.values()))
        rows = list(matrix.split(self.settings.chunk))  # views, filled in place: the matrix is held only once
        for row, (images, labels) in zip(rows, self.sampled_batches()):
            row.copy_(self.gradients(images, labels))
        return matrix

    def sampled_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of the sampled images, with the labels whose gradients make up the Fisher matrix (see `rows`)."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        draws = torch.rand(len(self.sample), 1, generator=generator, dtype=torch.float64).split(self.settings.chunk)
        for (images, labels), draw in zip(self.batches(self.train, self.sample), draws):
            yield images, self.draw_labels(images, draw) if self.measure is loss_measure else labels

    @torch.no_grad()
    def draw_labels(self, images: Tensor, draws: Tensor) -> Tensor:
        """(b,) labels from the model's own prediction, by inverting its distribution at `draws` (b, 1) in 0..1.

        One draw belongs to one image, whatever the chunk size; in float64 on the CPU, which not every device offers.
        """
        cumulated = self.model(images).softmax(1).cpu().double().cumsum(1)
        return torch.searchsorted(cumulated, draws).squeeze(1).clamp_max(self.classes - 1).to(images.device)

    @cached_property
    def damping(self) -> float:
        """λ as given, or the mean of the sampled Fisher's non-zero eigenvalues."""
        return self.settings.damping or self.automatic_damping(self.rows.square().sum(1))

    def automatic_damping(self, squared_norms: Tensor) -> float:
        """The mean of the sampled Fisher's non-zero eigenvalues, from the squared norms (r,) of its gradients."""
        automatic = float(squared_norms.mean()) / len(self.sample)
        if automatic <= 0:
            raise ValueError("every sampled gradient is zero, so no damping can be derived; pass damping=")
        return automatic

    def batches(self, source: _Source, indices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Checked chunks of `source` on the model's device, images in the model's float type."""
        like = next(iter(self.params.values()))
        for chosen in indices.split(self.settings.chunk):
            images, labels = source.batch(chosen)
            if isinstance(self.settings.measure, str):
                _check_labels(labels, self.classes)
            images = images.to(like.device, like.dtype if images.is_floating_point() else None)
            yield images, labels.to(like.device, None if labels.is_floating_point() else torch.long)

    def gradients(self, images: Tensor, labels: Tensor) -> Tensor:
        """(b, p) gradient of the measure at each sample, by vmap(grad)."""
        return flatten_params(_per_sample_gradients(self.model, self.params, self.measure, images, labels))


def _make_problem(model: nn.Module, train: Any, settings: InfluenceSettings) -> _Problem:
    """Copy the model (so that the caller's is never touched), move it, and try it on one training image."""
    device = pick_device(settings.device)
    private = copy.deepcopy(model).to(device).eval()
    params = {name: param.detach() for name, param in private.named_parameters() if param.requires_grad}
    if not params:
        raise ValueError("the model has no trainable parameter (requires_grad); influence is about trained parameters")
    if not all(torch.isfinite(param).all() for param in params.values()):
        raise NonFiniteError("the model's weights contain NaN or infinity; train it again or load another checkpoint")
    source = _as_source(train, "train")
    probe = _Problem(private, params, source, settings, classes=sys.maxsize)
    outputs = _try_model(probe, source, torch.zeros(1, dtype=torch.long), "train")
    return dataclasses.replace(probe, classes=outputs.shape[-1])


def _try_model(problem: _Problem, source: _Source, index: Tensor, role: str) -> Tensor:
    """Outputs (1, …) for one image, with the errors a caller can act on when image and model do not fit."""
    (images, _), *_ = problem.batches(source, index)
    try:
        with torch.no_grad():
            outputs = problem.model(images)
    except RuntimeError as error:
        raise ValueError(f"{role}: the model refuses images of shape {tuple(images.shape[1:])}: {error}") from error
    if isinstance(problem.settings.measure, str) and outputs.ndim != 2:
        raise ValueError(f"the model must return logits (b, C), not {tuple(outputs.shape)}; or pass your own measure")
    if not torch.isfinite(outputs).all() and torch.isfinite(images).all():
        raise NonFiniteError(f"{role}: the model returns NaN or infinity for image {int(index)}; train it again")
    return outputs


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Influence: curvature                                                                                         ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


def _curvature_product(problem: _Problem, vectors: Tensor, indices: Tensor) -> Tensor:
    """(k, p) → (k, p): the mean Gauss-Newton matrix or Hessian of the samples at `indices`, times each vector.

    Gauss-Newton is Jᵀ(∂²M/∂outputs²)J: forward mode to the outputs, their small Hessian, reverse mode back.
    """
    total = torch.zeros_like(vectors)
    for images, labels in problem.batches(problem.train, indices):

        def outputs(values: dict[str, Tensor], images: Tensor = images) -> Tensor:
            return functional_call(problem.model, values, (images,))

        def summed(out: Tensor, labels: Tensor = labels) -> Tensor:
            return problem.measure(out, labels).sum()

        def gauss_newton(vector: dict[str, Tensor]) -> dict[str, Tensor]:
            moved: tuple[Tensor, ...] = jvp(outputs, (problem.params,), (vector,))
            curved = jvp(grad(summed), moved[:1], moved[1:])[1]
            return vjp(outputs, problem.params)[1](curved)[0]

        def hessian(vector: dict[str, Tensor]) -> dict[str, Tensor]:
            def whole(values: dict[str, Tensor]) -> Tensor:
                return summed(outputs(values))

            return jvp(grad(whole), (problem.params,), (vector,))[1]

        product = gauss_newton if problem.settings.curvature == "gauss_newton" else hessian
        total += flatten_params(vmap(product)(unflatten_params(vectors, problem.params)))
    return total / len(indices)


def _damped_product(problem: _Problem, vectors: Tensor, indices: Tensor) -> Tensor:
    """(k, p) → (k, p): H + λI, with H of the samples at `indices`, times each vector."""
    return _curvature_product(problem, vectors, indices) + problem.damping * vectors


def largest_eigenvalue(product: Callable[[Tensor], Tensor], like: Tensor, seed: int = 0, steps: int = 30) -> float:
    """Largest |eigenvalue| of a symmetric matrix given as (1, p) → (1, p), by power iteration (to about 1 %)."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(1, like.shape[1], generator=generator).to(like)
    eigenvalue = 0.0
    for _ in range(steps):
        vector = vector / vector.norm()
        image = product(vector)
        previous, eigenvalue = eigenvalue, float(image.norm())
        if eigenvalue == 0 or abs(eigenvalue - previous) < 1e-3 * eigenvalue:
            break
        vector = image
    return eigenvalue


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Influence: solvers of (H + λI) s = v                                                                         ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


@dataclass(frozen=True)
class Health:
    """What a solver says of its own answer.

    residual            largest relative residual ‖(H + λI)s − v‖ / ‖v‖ over the test images, in the solver's own H
    damping             λ, in units of the curvature;  largest_eigenvalue: of that H (None where there is no H)
    iterations          steps taken (0: direct);  samples: training images that H was made of
    seconds_solve, seconds_score   wall time of the two halves of the call
    """

    solver: str
    residual: float
    damping: float
    largest_eigenvalue: float | None
    iterations: int
    samples: int
    seconds_solve: float = math.nan
    seconds_score: float = math.nan


def _relative_residual(residual: Tensor, v: Tensor) -> float:
    """Largest ‖residual‖ / ‖v‖ over the rows; a zero right-hand side has a zero residual."""
    return float((residual.norm(dim=1) / v.norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny)).max())


def _gram(rows: Tensor, blocks: int = 8) -> Tensor:
    """(r, p) → (r, r) inner products of all rows, float64 on the CPU; the lower half is computed and mirrored."""
    gram, start = rows.new_zeros(len(rows), len(rows)), 0
    for block in rows.chunk(blocks):
        gram[start:, start : start + len(block)] = rows[start:] @ block.T
        start += len(block)
    lower = gram.cpu().double().tril()
    return lower + lower.tril(-1).T


def _factorise_gram(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Cholesky factor of K + rλI for the Gram matrix K (r, r), and the largest eigenvalue of K/r."""
    largest = largest_eigenvalue(lambda vector: vector @ gram, gram[:1]) / len(gram)
    factor, failed = torch.linalg.cholesky_ex(gram + len(gram) * damping * torch.eye(len(gram), dtype=gram.dtype))
    if failed or not torch.isfinite(factor).all():
        raise NonFiniteError(f"the Gram matrix with damping {damping:.1e} is singular; raise damping")
    return factor, largest


class _KernelSolver:
    """Direct: the damped Fisher inverse through the r × r Gram matrix of r sampled gradients G (Woodbury).

    (GᵀG/r + λI)⁻¹ v = (v − Gᵀ (GGᵀ + rλI)⁻¹ G v) / λ. No step size, no divergence; factorised once, in float64.
    """

    def __init__(self, problem: _Problem) -> None:
        self.rows, self.damping, self.samples = problem.rows, problem.damping, len(problem.sample)
        self.factor, self.largest = _factorise_gram(_gram(self.rows), self.damping)

    def solve(self, v: Tensor) -> tuple[Tensor, Health]:
        inner = torch.cholesky_solve((self.rows @ v.T).cpu().double(), self.factor).to(v)  # (r, m)
        s = (v - inner.T @ self.rows) / self.damping
        check = (s @ self.rows.T) @ self.rows / self.samples + self.damping * s - v
        health = Health("kernel", _relative_residual(check, v), self.damping, self.largest, 0, self.samples)
        return s, health


def _largest_curvature(problem: _Problem, indices: Tensor) -> float:
    """Largest |eigenvalue| of H (without damping) on the training images at `indices`."""
    like = flatten_params({name: param[None] for name, param in problem.params.items()})
    return largest_eigenvalue(partial(_curvature_product, problem, indices=indices), like)


class _CGSolver:
    """Conjugate gradients on curvature products, all right-hand sides at once (Hestenes & Stiefel 1952)."""

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem
        self.largest = _largest_curvature(problem, problem.sample)

    def multiply(self, vectors: Tensor) -> Tensor:
        """(H + λI) times each row."""
        return _damped_product(self.problem, vectors, self.problem.sample)

    def solve(self, v: Tensor) -> tuple[Tensor, Health]:
        settings = self.problem.settings
        s, residual, step = torch.zeros_like(v), v.clone(), v.clone()
        squared, iteration = residual.square().sum(1), 0
        goal = (settings.tolerance * v.norm(dim=1)).square()
        while iteration < settings.iterations and bool((squared > goal).any()):
            open_rows = squared > goal
            product = self.multiply(step[open_rows])
            bend = (step[open_rows] * product).sum(1)
            if not bool((bend > 0).all()):
                raise NonFiniteError(
                    f"H + λI is not positive along a search direction; raise damping above {self.problem.damping:.1e}, "
                    "or use curvature='gauss_newton'"
                )
            length = (squared[open_rows] / bend)[:, None]
            s[open_rows] += length * step[open_rows]
            residual[open_rows] -= length * product
            renewed = residual[open_rows].square().sum(1)
            step[open_rows] = residual[open_rows] + (renewed / squared[open_rows])[:, None] * step[open_rows]
            squared[open_rows] = renewed
            iteration += 1
        worst = _relative_residual(self.multiply(s) - v, v)
        return s, Health("cg", worst, self.problem.damping, self.largest, iteration, len(self.problem.sample))


class _LissaSolver:
    """The paper's stochastic recursion h ← v + h − (H_batch + λI)h / scale, whose fixed point is scale·(H + λI)⁻¹v.

    Koh & Liang 2017, sec. 3; Agarwal et al. 2017. Unlike in the package, h is fed back, λ is not multiplied by the
    scale, and the result is divided by it. The scale must exceed every eigenvalue of H_batch + λI met on the way: it is
    set to twice the largest one found by power iteration on a few batches.
    """

    def __init__(self, problem: _Problem) -> None:
        self.problem = problem
        self.generator = torch.Generator().manual_seed(problem.settings.seed)
        met = [problem.sample, *(self.draw() for _ in range(4))]
        self.start = self.generator.get_state()  # each solve begins here, so that none depends on those before
        tops = [_largest_curvature(problem, batch) for batch in met[: 1 if problem.settings.scale else None]]
        self.largest = tops[0]
        self.scale = problem.settings.scale or 2 * (max(tops) + problem.damping)

    def changed(self, **changes: Any) -> _LissaSolver:
        """The same solver, its scale, its eigenvalues and its random numbers, with other settings."""
        other = copy.copy(self)
        settings = dataclasses.replace(self.problem.settings, **changes)
        other.problem = dataclasses.replace(self.problem, settings=settings)
        return other

    def draw(self) -> Tensor:
        """Indices of a random batch of the curvature's sample; all of it when the batch is as large."""
        sample, size = self.problem.sample, self.problem.settings.batch_size
        return sample if size >= len(sample) else sample[torch.randint(len(sample), (size,), generator=self.generator)]

    def recursion(self, v: Tensor, depths: Sequence[int]) -> Iterator[Tensor]:
        """The solution after each of `depths` (rising) steps of one recursion."""
        h = v.clone()
        for step in range(1, depths[-1] + 1):
            h = v + h - _damped_product(self.problem, h, self.draw()) / self.scale
            if (step % 20 == 0 or step in depths) and not torch.isfinite(h).all():
                raise NonFiniteError(
                    f"LiSSA diverged at scale {self.scale:.3g} (largest eigenvalue {self.largest:.3g}); raise scale or "
                    "batch_size, or use solver='kernel'"
                )
            if step in depths:
                yield h / self.scale

    def residual(self, s: Tensor, v: Tensor) -> float:
        return _relative_residual(_damped_product(self.problem, s, self.problem.sample) - v, v)

    def residuals(self, v: Tensor, depths: Sequence[int]) -> Iterator[tuple[int, float]]:
        """Each of `depths` and the residual that so many steps leave, without beginning anew for each."""
        self.generator.set_state(self.start)
        for depth, s in zip(depths, self.recursion(v, depths)):
            yield depth, self.residual(s, v)

    def solve(self, v: Tensor) -> tuple[Tensor, Health]:
        depth, repeats = self.problem.settings.iterations, self.problem.settings.repeats
        self.generator.set_state(self.start)
        s = torch.stack([next(self.recursion(v, [depth])) for _ in range(repeats)]).mean(0)
        samples, steps = len(self.problem.sample), depth * repeats
        return s, Health("lissa", self.residual(s, v), self.problem.damping, self.largest, steps, samples)


class _IdentitySolver:
    """H = 0: the plain gradient dot product divided by λ, the baseline that every claim must beat."""

    def __init__(self, problem: _Problem) -> None:
        self.damping = problem.damping

    def solve(self, v: Tensor) -> tuple[Tensor, Health]:
        return v / self.damping, Health("identity", 0.0, self.damping, None, 0, 0)


_Solver = _KernelSolver | _CGSolver | _LissaSolver | _IdentitySolver


def _make_solver(problem: _Problem) -> _Solver:
    """The solver named in the settings, prepared (factorised, scaled) once for any number of right-hand sides."""
    kinds: dict[str, type[_Solver]] = dict(zip(SOLVERS, (_KernelSolver, _CGSolver, _LissaSolver, _IdentitySolver)))
    return kinds[problem.settings.solver](problem)


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Influence: scoring the training set, and the one call                                                        ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


@dataclass(frozen=True, eq=False)
class _Scorer:
    """Callable that turns a chunk of training samples into (m, b) dot products of gradient and direction.

    For the layers in `layers`, the gradient of a sample is never formed in full: it is made of the layer's input a
    and the gradient δ at its output, and δᵀ S a needs only those. All other parameters go through vmap(grad). Each
    call works on its own copy of the model, so joblib may run calls in threads or in processes alike.
    """

    model: nn.Module
    layers: tuple[str, ...]
    measure: Measure
    directions: dict[str, Tensor]

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        m = len(next(iter(self.directions.values())))
        model, scores = copy.deepcopy(self.model), images.new_zeros(m, len(images))
        for name, inputs, deltas in _capture(model, self.layers, self.measure, images, labels):
            layer = model.get_submodule(name)
            weight, bias = self.directions[f"{name}.weight"], self.directions.get(f"{name}.bias")
            product = _linear_products if isinstance(layer, nn.Linear) else _conv_products
            scores += product(layer, inputs, deltas, weight)
            if bias is not None:
                scores += bias @ (_positions(deltas) if isinstance(layer, nn.Linear) else deltas.flatten(2).mT).sum(1).T
        if rest := _uncovered(model, [*self.directions], self.layers):
            gradients = flatten_params(_per_sample_gradients(model, rest, self.measure, images, labels))
            scores += flatten_params({name: self.directions[name] for name in rest}) @ gradients.T
        return scores


def _capture(
    model: nn.Module, layers: Sequence[str], measure: Measure, images: Tensor, labels: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer name, input, gradient at the output) of each call of each layer in one forward and backward pass.

    `model` is left with hooks: pass a copy.
    """
    names, inputs, outputs = [], [], []

    def make_hook(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
            names.append(name)
            inputs.append(given[0].detach())
            outputs.append(out)
            return out.clone()  # so that an in-place activation does not overwrite what was recorded

        return hook

    for name in layers:
        model.get_submodule(name).register_forward_hook(make_hook(name))
    if layers:
        with torch.enable_grad():
            total = measure(model(images), labels).sum()
        deltas = torch.autograd.grad(total, outputs, allow_unused=True)
        yield from ((n, a, d) for n, a, d in zip(names, inputs, deltas) if d is not None)


def _uncovered(model: nn.Module, names: Sequence[str], layers: Sequence[str]) -> dict[str, Tensor]:
    """The parameters among `names` that belong to none of `layers`, detached."""
    covered = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    return {n: param.detach() for n, param in model.named_parameters() if n in {*names} - covered}


def _positions(features: Tensor) -> Tensor:
    """(b, …, f) → (b, t, f): every position that a Linear layer was applied to, t = 1 for plain vectors."""
    return features.reshape(len(features), -1, features.shape[-1])


def _linear_products(layer: nn.Module, inputs: Tensor, deltas: Tensor, weights: Tensor) -> Tensor:
    """δᵀ S a summed over positions: inputs (b, …, i), deltas (b, …, o), weights (m, o, i) → (m, b)."""
    moved = (_positions(inputs) @ weights.flatten(0, 1).T).unflatten(2, weights.shape[:2])  # (b, t, i) → (b, t, m, o)
    return torch.einsum("btmo,bto->mb", moved, _positions(deltas))


def _conv_products(layer: nn.Module, inputs: Tensor, deltas: Tensor, weights: Tensor) -> Tensor:
    """Per-sample weight gradients of a plain convolution times weights (m, o, c, k, l) → (m, b)."""
    gradients = _conv_gradients(layer, inputs, deltas)
    return weights.permute(0, 3, 1, 2, 4).flatten(1) @ gradients.flatten(1).T


def _conv_gradients(layer: nn.Module, inputs: Tensor, deltas: Tensor) -> Tensor:
    """(b, k, o, c·l) weight gradient of a plain convolution, one a sample.

    The input is unfolded along its width only (k-fold instead of k²-fold memory); each kernel row is then one batched
    matrix product with a contiguous window of it.
    """
    assert isinstance(layer, nn.Conv2d)
    assert isinstance(layer.padding, tuple)  # `_fast_layers` lets no padding by name through
    vertical, horizontal = layer.padding
    padded = F.pad(inputs, (horizontal, horizontal, vertical, vertical))  # (b, c, H, W)
    (height, width), (c, k, length) = deltas.shape[2:], layer.weight.shape[1:]
    columns = padded.unfold(3, length, 1).permute(0, 1, 4, 2, 3).reshape(len(inputs), c * length, -1)  # (b, cl, H·w)
    d = deltas.flatten(2)  # (b, o, h·w)
    windows = [columns[:, :, row * width : (row + height) * width].transpose(1, 2) for row in range(k)]
    return torch.stack([torch.bmm(d, window) for window in windows], dim=1)


def _fast_layers(problem: _Problem) -> tuple[str, ...]:
    """Layers whose gradients factor: trainable Linear and plain Conv2d whose parameters nobody shares.

    Proven on two training images against vmap(grad) for a random direction; on any doubt the answer is none, and
    everything goes through vmap(grad), slower but general.
    """
    owners: dict[Tensor, int] = {}
    for _, param in problem.model.named_parameters(remove_duplicate=False):
        owners[param] = owners.get(param, 0) + 1
    names = []
    for name, layer in problem.model.named_modules():
        plain = isinstance(layer, nn.Linear) or (
            isinstance(layer, nn.Conv2d)
            and (layer.stride, layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
            and not isinstance(layer.padding, str)
        )
        own = list(layer.parameters(recurse=False))
        if name and plain and all(param.requires_grad and owners[param] == 1 for param in own):
            names.append(name)
    generator = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(1, *p.shape, generator=generator).to(p) for n, p in problem.params.items()}
    (images, labels), *_ = problem.batches(problem.train, torch.arange(min(2, problem.train.size)))
    slow = _Scorer(problem.model, (), problem.measure, direction)(images, labels)
    try:
        fast = _Scorer(problem.model, tuple(names), problem.measure, direction)(images, labels)
    except (RuntimeError, ValueError, TypeError):
        return ()
    tolerance = 1e-3 if slow.dtype in (torch.float32, torch.float16, torch.bfloat16) else 1e-9
    return tuple(names) if torch.allclose(fast, slow, rtol=tolerance, atol=tolerance * float(slow.abs().max())) else ()


@dataclass(frozen=True, eq=False)
class _Factors:
    """Gradients of b samples, held so that their inner products are cheap.

    The gradient of a Linear layer is δaᵀ, and ⟨δaᵀ, δ'a'ᵀ⟩ = (a·a')(δ·δ'): i + o numbers a sample instead of i·o.
    pairs: (a (b, i), δ (b, o)) of each such layer, a with a 1 appended where there is a bias; rest (b, q): the
    gradients of all other parameters in full.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]
    rest: Tensor

    @property
    def width(self) -> int:
        """Numbers held a sample; an inner product costs as many multiplications."""
        return self.rest.shape[1] + sum(a.shape[1] + delta.shape[1] for a, delta in self.pairs)

    def products(self, other: _Factors) -> Tensor:
        """(b, b') inner products with the gradients of other samples."""
        total = self.rest @ other.rest.T
        for (a, delta), (b, epsilon) in zip(self.pairs, other.pairs, strict=True):
            total += (a @ b.T).mul_(delta @ epsilon.T)
        return total

    def squares(self) -> Tensor:
        """(b,) squared norms."""
        pairs = (a.square().sum(1) * delta.square().sum(1) for a, delta in self.pairs)
        return sum(pairs, self.rest.square().sum(1))

    @staticmethod
    def join(parts: Sequence[_Factors]) -> _Factors:
        """All samples of `parts`, in order."""
        columns = zip(*(part.pairs for part in parts))
        pairs = tuple((torch.cat([a for a, _ in pair]), torch.cat([d for _, d in pair])) for pair in columns)
        return _Factors(pairs, torch.cat([part.rest for part in parts]))


@torch.no_grad()
def _factors(problem: _Problem, layers: Sequence[str], images: Tensor, labels: Tensor) -> _Factors:
    """The gradients of the measure at each sample: Linear layers called once as pairs, everything else in full."""
    model, pairs = copy.deepcopy(problem.model), []
    captured = list(_capture(model, layers, problem.measure, images, labels))
    calls = collections.Counter(name for name, _, _ in captured)
    full: dict[str, Tensor] = {}
    for name, inputs, deltas in captured:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear) and inputs.ndim == 2 and calls[name] == 1:
            pairs.append((inputs if layer.bias is None else F.pad(inputs, (0, 1), value=1.0), deltas))
            continue
        if isinstance(layer, nn.Linear):
            weight, bias = _positions(deltas).mT @ _positions(inputs), _positions(deltas).sum(1)
        else:
            weight, bias = _conv_gradients(layer, inputs, deltas), deltas.flatten(2).sum(2)
        gradient = torch.cat([weight.flatten(1)] + [bias] * (layer.bias is not None), dim=1)
        full[name] = full[name] + gradient if name in full else gradient
    if rest := _uncovered(model, [*problem.params], layers):
        full[""] = flatten_params(_per_sample_gradients(model, rest, problem.measure, images, labels))
    nothing = images.new_zeros(len(images), 0)
    return _Factors(tuple(pairs), torch.cat([nothing, *full.values()], dim=1))


class _DualKernel:
    """The `kernel` solver without any direction s: only inner products of gradients are ever needed.

    With K the products among the r sampled gradients and k those of a test gradient with them,
    gᵀ(GᵀG/r + λI)⁻¹v = (gᵀv − (Gg)ᵀ(K + rλI)⁻¹k) / λ: the scores of `_KernelSolver`, at a price that depends on
    the `width` of the factors instead of p, and hardly on the number of test images.
    """

    def __init__(self, problem: _Problem, layers: Sequence[str]) -> None:
        self.problem, self.layers = problem, layers
        self.sample = _Factors.join([self.factors(*batch) for batch in problem.sampled_batches()])
        self.damping = problem.settings.damping or problem.automatic_damping(self.sample.squares())
        self.gram = self.sample.products(self.sample).cpu().double()
        self.factor, self.largest = _factorise_gram(self.gram, self.damping)

    def factors(self, images: Tensor, labels: Tensor) -> _Factors:
        return _factors(self.problem, self.layers, images, labels)

    def solve(self, tests: _Factors) -> tuple[Tensor, Health]:
        """(m, r) weights (K + rλI)⁻¹k of the sampled gradients, and the health of that solution."""
        k, shift = tests.products(self.sample).cpu().double(), len(self.gram) * self.damping
        weights = torch.cholesky_solve(k.T, self.factor).T
        error = (k - weights @ self.gram - shift * weights) / shift  # of s: the gradients weighted by this
        norms = ((error @ self.gram) * error).sum(1).clamp_min(0).sqrt()
        tiny = torch.finfo(torch.float64).tiny
        residual = float((norms / tests.squares().cpu().double().sqrt().clamp_min(tiny)).max())
        return weights.to(tests.rest), Health("kernel", residual, self.damping, self.largest, 0, len(self.gram))

    def scorer(self, tests: _Factors, weights: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Callable that turns a chunk of training samples into (m, b) scores, times n."""
        return partial(_dual_scores, self.problem, self.layers, (self.sample, tests, weights, self.damping))


def _dual_scores(
    problem: _Problem,
    layers: Sequence[str],
    solved: tuple[_Factors, _Factors, Tensor, float],
    images: Tensor,
    labels: Tensor,
) -> Tensor:
    sample, tests, weights, damping = solved
    chunk = _factors(problem, layers, images, labels)
    return (tests.products(chunk) - weights @ sample.products(chunk)) / damping


def _dual_pays(problem: _Problem, layers: Sequence[str], m: int) -> bool:
    """Whether r + m inner products a training image cost less than m full ones."""
    if problem.settings.solver != "kernel":
        return False
    (images, labels), *_ = problem.batches(problem.train, torch.zeros(1, dtype=torch.long))
    width, p = _factors(problem, layers, images, labels).width, sum(param.numel() for param in problem.params.values())
    return (len(problem.sample) + m) * width < m * p


def _score(problem: _Problem, scorer: Callable[[Tensor, Tensor], Tensor]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """(m, n) influences, streamed in chunks through joblib, from a scorer of chunks; and the training labels (n,)."""
    seen: list[Tensor] = []

    def tasks() -> Iterator[Any]:
        for images, labels in problem.batches(problem.train, torch.arange(problem.train.size)):
            seen.append(labels.cpu())
            yield joblib.delayed(scorer)(images, labels)

    parts = joblib.Parallel(n_jobs=problem.settings.jobs, return_as="generator")(tasks())
    count = math.ceil(problem.train.size / problem.settings.chunk)
    shown = tqdm(parts, total=count, desc="scoring", unit="chunk", leave=False, disable=not problem.settings.progress)
    return _join_scores([part.cpu() for part in shown]), torch.cat(seen).numpy()


def _join_scores(parts: Sequence[Tensor]) -> NDArray[Any]:
    """(m, n) influences from the products of chunks (m, b) of training gradients; NonFiniteError names a bad image."""
    products = torch.cat(list(parts), dim=1)
    scores = products / products.shape[1]
    if not torch.isfinite(scores).all():
        first = int((~torch.isfinite(scores)).any(0).nonzero()[0])
        raise NonFiniteError(f"the score of training image {first} is NaN or infinite; check its pixels, raise damping")
    return scores.cpu().numpy()


@dataclass(frozen=True, eq=False)
class Influences:
    """Scores (m, n), positive = helpful; nats for the measure "loss", else sign and rank; who, how and how well.

    test_indices (m,) and train_labels (n,), test_labels (m,): whole numbers; column j is training image j.
    """

    scores: NDArray[Any]
    test_indices: NDArray[np.int64]
    test_labels: NDArray[np.int64]
    train_labels: NDArray[np.int64]
    settings: dict[str, Any]
    health: Health

    def helpful(self, i: int, k: int = 5) -> NDArray[np.int64]:
        """(k,) training indices with the largest scores for row i, the most helpful first; ties by index."""
        return self._ranked(-self.scores[self._row(i)], k)

    def harmful(self, i: int, k: int = 5) -> NDArray[np.int64]:
        """(k,) training indices with the smallest scores for row i, the most harmful first; ties by index."""
        return self._ranked(self.scores[self._row(i)], k)

    def _row(self, i: int) -> int:
        if not 0 <= i < len(self.scores):
            raise ValueError(f"row {i} does not exist: there are {len(self.scores)} test images, counted from 0")
        return i

    @staticmethod
    def _ranked(keys: NDArray[Any], k: int) -> NDArray[np.int64]:
        if not 1 <= k <= len(keys):
            raise ValueError(f"k must lie in 1..{len(keys)}, the number of training images, not {k}")
        return np.argsort(keys, kind="stable")[:k]

    def mean(self) -> NDArray[Any]:
        """(n,) mean influence of each training image over the test images."""
        return self.scores.mean(0)

    def to_frame(self) -> pd.DataFrame:
        """One row a (test, train) pair: test_index, test_label, train_index, train_label, score; m·n rows."""
        m, n = self.scores.shape
        return pd.DataFrame(
            {
                "test_index": np.repeat(self.test_indices, n),
                "test_label": np.repeat(self.test_labels, n),
                "train_index": np.tile(np.arange(n), m),
                "train_label": np.tile(self.train_labels, m),
                "score": self.scores.ravel(),
            }
        )

    def save(self, path: str | Path) -> None:
        """Write a compressed .npz without pickled objects; settings and health ride along as JSON."""
        about = json.dumps({"settings": self.settings, "health": asdict(self.health)})
        arrays = {name: getattr(self, name) for name in ("scores", "test_indices", "test_labels", "train_labels")}
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, about=np.array(about), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Influences:
        """Read what `save` wrote, or a results file (.json) of pytorch_influence_functions, ours or the original's.

        In such a file influences have the opposite sign: they are turned. Where its helpful and harmful lists are
        swapped, as the original swaps them, a warning says so; ranks here follow the scores, never its lists. It does
        not say what the labels of the training images are: train_labels are −1.
        CorruptFileError names a file that is damaged or neither of the two.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"no influences at {path}; compute them with compute_influences(...).save(path)")
        if Path(path).suffix == ".json":
            return _load_package_results(Path(path))
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            about = json.loads(str(arrays.pop("about")))
            return cls(**arrays, settings=about["settings"], health=Health(**about["health"]))
        except Exception as error:  # zipfile, zlib, numpy and json each have their own ways to say "damaged"
            raise CorruptFileError(
                f"{path} is damaged or not from Influences.save ({error}); compute it again"
            ) from error


def _load_package_results(path: Path) -> Influences:
    """A results file of the package: test index → label, influence, harmful, helpful."""
    try:
        entries = {int(index): entry for index, entry in json.loads(path.read_text(encoding="utf-8")).items()}
        scores = -np.array([entry["influence"] for entry in entries.values()], dtype=np.float32)
        labels = np.array([entry["label"] for entry in entries.values()], dtype=np.int64)
        first = [(entry["harmful"][0], entry["helpful"][0]) for entry in entries.values()]
        if scores.ndim != 2 or not np.isfinite(scores).all():
            raise ValueError("its influences are not as many finite numbers for each test image")
        swapped = sum(row[harmful] > row[helpful] for row, (harmful, helpful) in zip(scores, first))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path} is no results file of pytorch_influence_functions ({error!r})") from error
    if swapped:
        warnings.warn(
            f"{path}: helpful and harmful are swapped in {swapped} of {len(entries)} test images, as "
            "pytorch_influence_functions does; put right here (positive = helpful)",
            stacklevel=3,
        )
    health = Health("pytorch_influence_functions", math.nan, math.nan, None, 0, 0)
    unknown = np.full(scores.shape[1], -1)
    return Influences(scores, np.array(list(entries)), labels, unknown, {"file": path.name}, health)


def _settings(settings: InfluenceSettings | None, changes: Mapping[str, Any]) -> InfluenceSettings:
    """`settings` with `changes`; ValueError for a name that is no setting."""
    known = {entry.name for entry in dataclasses.fields(InfluenceSettings)}
    if unknown := set(changes) - known:
        raise ValueError(f"unknown setting {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return dataclasses.replace(settings or InfluenceSettings(), **changes)


def _check_tests(problem: _Problem, test: _Source, indices: Tensor) -> None:
    """Errors that say what is wrong with the choice of test images, or with the images."""
    if len(indices) == 0:
        raise ValueError("no test image chosen: test_indices is empty")
    if int(indices.min()) < 0 or int(indices.max()) >= test.size:
        raise ValueError(f"test indices must lie in 0..{test.size - 1}; found {indices.tolist()}")
    _try_model(problem, test, indices[:1], "test")


def _check_finite(gradients: Tensor, kind: str = "test") -> None:
    if not torch.isfinite(gradients).all():
        raise NonFiniteError(
            f"the gradient of a {kind} image is NaN or infinite; check the model and the image's pixels"
        )


_Part = TypeVar("_Part")


def _over_tests(
    problem: _Problem, test: _Source, indices: Tensor, what: Callable[[Tensor, Tensor], _Part]
) -> tuple[list[_Part], Tensor]:
    """`what` of each chunk of the chosen test images, and their labels (m,)."""
    _check_tests(problem, test, indices)
    pairs = [(what(images, labels), labels) for images, labels in problem.batches(test, indices)]
    return [part for part, _ in pairs], torch.cat([labels for _, labels in pairs])


def _test_gradients(problem: _Problem, test: _Source, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (m, p) of the measure at the chosen test images, and their labels (m,)."""
    parts, labels = _over_tests(problem, test, indices, problem.gradients)
    gradients = torch.cat(parts)
    _check_finite(gradients)
    return gradients, labels


def _test_factors(problem: _Problem, solver: _DualKernel, test: _Source, indices: Tensor) -> tuple[_Factors, Tensor]:
    """The same gradients as factors, and the labels (m,)."""
    parts, labels = _over_tests(problem, test, indices, solver.factors)
    factors = _Factors.join(parts)
    _check_finite(factors.squares())
    return factors, labels


def _prepare(problem: _Problem, tests: int) -> _Solver | _DualKernel:
    """The solver, ready for any test images. Two roads to the same numbers: directions s, or inner products only.

    The second (`_DualKernel`) is taken where it is cheaper for so many `tests`.
    """
    layers = _fast_layers(problem)
    return _DualKernel(problem, layers) if _dual_pays(problem, layers, tests) else _make_solver(problem)


def _solve(
    problem: _Problem, solver: _Solver | _DualKernel, test: _Source, indices: Tensor
) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Health]:
    """What scores a chunk of training samples for the chosen test images, the labels of these, and the health."""
    if isinstance(solver, _DualKernel):
        tests, labels = _test_factors(problem, solver, test, indices)
        weights, health = solver.solve(tests)
        return solver.scorer(tests, weights), labels, health
    gradients, labels = _test_gradients(problem, test, indices)
    directions, health = solver.solve(gradients)
    return _direction_scorer(problem, directions), labels, health


def _direction_scorer(problem: _Problem, directions: Tensor) -> _Scorer:
    layers = _fast_layers(problem)
    return _Scorer(problem.model, layers, problem.measure, unflatten_params(directions, problem.params))


def compute_influences(
    model: nn.Module,
    train: Any,
    test: Any,
    test_indices: Sequence[int] | NDArray[Any] | Tensor | None = None,
    settings: InfluenceSettings | None = None,
    **changes: Any,
) -> Influences:
    """Influence of every training image on the chosen test images (all of them by default); positive = helpful.

    train, test: `ImageData`, a pair of tensors (images, labels), or any map-style data set of (image, label).
    settings, changes: an `InfluenceSettings`, and single settings to change in it, as in `solver="cg"`.
    The model is copied: its weights, modes and requires_grad flags stay as they are.
    Memory: about m·p + r·p + m·n numbers, or, for many test images of a model with large Linear layers, far less
    (see `_DualKernel`); n × p gradients are never held.

    Koh & Liang 2017, eq. 2, negated and divided by n, so that it estimates what leaving the image out does.
    Raises ValueError (NonFiniteError where a number went bad) saying what was wrong and what to do.
    """
    chosen = _settings(settings, changes)
    problem, source = _make_problem(model, train, chosen), _as_source(test, "test")
    indices = torch.arange(source.size) if test_indices is None else torch.as_tensor(test_indices, dtype=torch.long)
    start = time.perf_counter()
    scorer, labels, health = _solve(problem, _prepare(problem, len(indices)), source, indices)
    solved = time.perf_counter()
    scores, train_labels = _score(problem, scorer)
    health = dataclasses.replace(health, seconds_solve=solved - start, seconds_score=time.perf_counter() - solved)
    return Influences(scores, indices.numpy(), labels.cpu().numpy(), train_labels, chosen.describe(), health)


def mean_influences(
    model: nn.Module, train: Any, test: Any, settings: InfluenceSettings | None = None, **changes: Any
) -> NDArray[Any]:
    """(n,) mean over all of `test` of the influence of each training image, for the price of one test image.

    Influence is linear in the test gradient, so the mean gradient is solved once; the same as `Influences.mean()`.
    """
    problem, source = _make_problem(model, train, _settings(settings, changes)), _as_source(test, "test")
    parts = torch.arange(source.size).split(problem.settings.chunk)
    total = torch.stack([_test_gradients(problem, source, part)[0].sum(0) for part in parts]).sum(0, keepdim=True)
    directions, _ = _make_solver(problem).solve(total / source.size)
    return _score(problem, _direction_scorer(problem, directions))[0][0]


def self_influences(
    model: nn.Module,
    train: Any,
    indices: Sequence[int] | NDArray[Any] | Tensor | None = None,
    settings: InfluenceSettings | None = None,
    **changes: Any,
) -> NDArray[Any]:
    """(k,) influence of each training image on itself, ∇L(z)ᵀ(H + λI)⁻¹∇L(z)/n ≥ 0; large = hard to do without.

    Solves once an image: the diagonal of `compute_influences(model, train, train)` without the rest of that matrix.
    """
    problem = _make_problem(model, train, _settings(settings, changes))
    chosen = torch.arange(problem.train.size) if indices is None else torch.as_tensor(indices, dtype=torch.long)
    solver, parts = _prepare(problem, len(chosen)), []
    for part in chosen.split(problem.settings.chunk):
        if isinstance(solver, _DualKernel):
            factors, _ = _test_factors(problem, solver, problem.train, part)
            products = factors.products(solver.sample)
            parts.append((factors.squares() - (products * solver.solve(factors)[0]).sum(1)) / solver.damping)
        else:
            gradients, _ = _test_gradients(problem, problem.train, part)
            parts.append((gradients * solver.solve(gradients)[0]).sum(1))
    return (torch.cat(parts) / problem.train.size).cpu().numpy()


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ The package everyone starts from, made callable                                                              ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


@dataclass(frozen=True, eq=False)
class PackageRun:
    """One test image through pytorch_influence_functions: its numbers with its own sign, and its own two lists.

    `influence` (n,) is −I in our convention; `harmful` and `helpful` (n,) are named as the package names them.
    """

    influence: NDArray[Any]
    harmful: NDArray[np.int64]
    helpful: NDArray[np.int64]
    seconds_solve: float
    seconds_score: float

    def seconds_for(self, depth: int, images: int, measured_depth: int) -> float:
        """Time of one test image at `depth` recursions over `images`, scaled linearly from what was measured."""
        return self.seconds_solve * depth / measured_depth + self.seconds_score * images / len(self.influence)


def run_package(
    model: nn.Module, train: Any, test: Any, depth: int, scale: float = 25.0, batch_size: int = 1
) -> PackageRun:
    """Call pytorch_influence_functions 0.1.1 for the one sample in `test`, on the model's device, silently.

    train, test: map-style data sets; `batch_size` images a recursion (the whole set when it is as large).
    Its two halves are called by hand because its own driver fixes scale at 25 and the device at GPU 0.
    """
    gpu = 0 if next(model.parameters()).is_cuda else -1
    whole = batch_size >= len(train)
    loader = DataLoader(train, batch_size=batch_size, shuffle=not whole)
    test_loader = DataLoader(test, batch_size=1)
    private = copy.deepcopy(model)  # the package switches the model to eval mode and leaves it there
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls log_softmax without a dimension, once an image
        start = time.perf_counter()
        image, label = next(iter(test_loader))
        solved = package.calc_s_test_single(private, image, label, loader, gpu, 0.01, scale, depth, 1)
        middle = time.perf_counter()
        influence, harmful, helpful, _ = package.calc_influence_single(
            private, loader, test_loader, 0, gpu, depth, 1, s_test_vec=[part.detach() for part in solved]
        )
        end = time.perf_counter()
    values = np.array([float(value) for value in influence])
    return PackageRun(values, np.array(harmful), np.array(helpful), middle - start, end - middle)


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ The package's interface, delivered: its configuration and its test images                                    ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝

CALC_METHODS = ("img_wise", "all_grad_then_test")


@dataclass(frozen=True)
class InfluenceConfig:
    """What pytorch_influence_functions calls `config`: its keys, with the defaults and the meaning of its manual.

    outdir          folder of the result files; it is made when it does not exist
    save_pth        folder to keep s_test and gradients in (see `calc_all_grad_then_test`), or None
    log_filename    file that the log is also written to, or None (see `init_logging`)
    seed            of everything that is sampled;  gpu: −1 for the CPU, else the number of the GPU
    calc_method     "img_wise" or "all_grad_then_test": which of the two `calc_influences` calls
    num_classes     of the test data, for the choice of as many images of each
    test_sample_num   test images a class, or False: all of them
    test_sample_start_per_class   the first of each class to take, or False: from 0; with `test_sample_num` only
    test_start_index  the first test image when all are taken; with `test_sample_num` the same as the line above
    recursion_depth, r_averaging, damp, scale   of solver "lissa": steps, averaged runs, λ (never multiplied by the
                    scale here) and divisor of a step (None: from the largest eigenvalue)
    progress        False: neither a bar nor a line of the log on the terminal
    jobs            test images at once, each in a process of its own
    solver          "lissa", as the package means it, or "kernel": direct, faster, nothing to choose but λ; "cg"
    report          what `tuned` found
    """

    outdir: str | Path = "outdir"
    save_pth: str | Path | None = None
    log_filename: str | Path | None = None
    seed: int = 42
    gpu: int = -1
    calc_method: str = "img_wise"
    num_classes: int = 10
    test_sample_start_per_class: int | bool = False
    test_sample_num: int | bool = False
    test_start_index: int | bool = False
    recursion_depth: int = 5000
    r_averaging: int = 1
    damp: float | None = 0.01
    scale: float | None = 25.0
    progress: bool = True
    jobs: int = 1
    solver: str = "lissa"
    report: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("num_classes", "recursion_depth", "r_averaging"):
            _check_count(name, getattr(self, name), 1)
        for name in ("test_sample_start_per_class", "test_sample_num", "test_start_index"):
            if getattr(self, name) is not False:
                _check_count(name, getattr(self, name), int(name == "test_sample_num"))
        if self.calc_method not in CALC_METHODS:
            raise ValueError(f"unknown calc_method {self.calc_method!r}: use one of {', '.join(CALC_METHODS)}")
        if isinstance(self.gpu, bool) or not isinstance(self.gpu, int) or self.gpu < -1:
            raise ValueError(f"gpu must be −1 (the CPU) or the number of a GPU, not {self.gpu!r}")
        starts = [n for n in (self.test_sample_start_per_class, self.test_start_index) if n is not False]
        if self.test_sample_num and len(set(starts)) > 1:
            raise ValueError("test_sample_start_per_class and test_start_index both say where to start, and differ")
        if not self.test_sample_num and self.test_sample_start_per_class:
            raise ValueError("test_sample_start_per_class needs test_sample_num: how many images of each class")
        _check_kinds(self)
        self.settings()  # the engine checks the values of damp, scale, solver and jobs

    @classmethod
    def from_package(cls, config: Mapping[str, Any]) -> InfluenceConfig:
        """The configuration in a dict of the package, such as its `get_default_config()` returns.

        A key that is missing, or None (but for save_pth and log_filename), has the manual's default. `r`, as the
        manual writes r_averaging, goes before it. "dataset" is dropped, since nothing depends on it. ValueError names
        unknown keys.
        """
        fields = {entry.name for entry in dataclasses.fields(cls)}
        given = dict(config)
        given.pop("dataset", None)
        if "r" in given:
            given["r_averaging"] = given.pop("r")
        if unknown := set(given) - fields:
            raise ValueError(f"unknown key {', '.join(sorted(unknown))}; there are {', '.join(sorted(fields))}")
        return cls(
            **{key: value for key, value in given.items() if value is not None or key in ("save_pth", "log_filename")}
        )

    @property
    def start(self) -> int:
        """Where the test images begin, within each class or in all."""
        return int(self.test_sample_start_per_class or self.test_start_index or 0)

    @property
    def file_stem(self) -> str:
        """`<start>_<number>` as the package names its files, "False" for all images."""
        return f"{self.start}_{self.test_sample_num}"

    def settings(self, batch_size: int = InfluenceSettings.batch_size) -> InfluenceSettings:
        """The same for the engine; batch_size: of the training loader. The measure is the loss, as in the package."""
        return InfluenceSettings(
            solver=self.solver,
            measure="loss",
            damping=self.damp,
            iterations=self.recursion_depth,
            batch_size=batch_size,
            scale=self.scale,
            repeats=self.r_averaging,
            jobs=self.jobs,
            device="cpu" if self.gpu < 0 else f"cuda:{self.gpu}",
            seed=self.seed,
        )

    def tuned(self, model: nn.Module, data: Any, tolerance: float = 0.1) -> InfluenceConfig:
        """This configuration with the scale that the model needs, and no more steps than it needs; says so in `report`.

        scale comes from the largest eigenvalue of the curvature of `data` (the training images, or their loader).
        recursion_depth and r_averaging are doubled from small, never above what they were, until the residual of the
        solutions for four training images is below `tolerance`; where none is, the smallest that comes within 5 % of
        the lowest residual is taken. `report` says so.
        """
        if self.solver != "lissa":
            return dataclasses.replace(self, report=f"solver {self.solver!r} has no scale, depth or r to tune")
        problem = _make_problem(model, data, dataclasses.replace(self.settings(_batch_size(data)), scale=None))
        solver = _LissaSolver(problem)
        probes, _ = _test_gradients(problem, problem.train, problem.sample[:4])
        depth, depths = _enough(solver.residuals(probes, _doubled(self.recursion_depth)), tolerance)
        averaged = (
            (r, solver.changed(iterations=depth, repeats=r).solve(probes)[1].residual)
            for r in _doubled(self.r_averaging)
        )
        repeats, averages = _enough(averaged, tolerance)
        lines = [
            f"scale {self.scale} → {solver.scale:.4g}: twice the largest eigenvalue met + λ, {solver.scale / 2:.4g}",
            f"recursion_depth {self.recursion_depth} → {depth}; residual by depth:\n    {depths}",
            f"r_averaging {self.r_averaging} → {repeats}; residual by r: {averages}",
        ]
        if averages[repeats] > tolerance:
            lines.append(f"a residual of {tolerance} was not reached: allow more steps, raise damp, or use 'kernel'")
        return dataclasses.replace(
            self, scale=solver.scale, recursion_depth=depth, r_averaging=repeats, report="\n".join(lines)
        )


def _as_config(config: InfluenceConfig | Mapping[str, Any]) -> InfluenceConfig:
    return config if isinstance(config, InfluenceConfig) else InfluenceConfig.from_package(config)


def _check_kinds(config: InfluenceConfig) -> None:
    """ValueError where a field is of another kind than it must be."""
    kinds: dict[str, tuple[type | None, ...]] = {
        "outdir": (str, Path),
        "save_pth": (str, Path, None),
        "log_filename": (str, Path, None),
        "seed": (int,),
        "damp": (int, float, None),
        "scale": (int, float, None),
        "progress": (bool,),
        "jobs": (int,),
        "solver": (str,),
    }
    for name, allowed in kinds.items():
        value, types = getattr(config, name), tuple(kind for kind in allowed if kind)
        if value is None and None in allowed:
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in allowed):
            words = " or ".join("None" if kind is None else kind.__name__ for kind in allowed)
            raise ValueError(f"{name} must be of kind {words}, not {value!r}")


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _batch_size(data: Any) -> int:
    """Images a step of the recursion: those of the loader, where there is one."""
    sampler = getattr(data, "batch_sampler", None)
    return getattr(data, "batch_size", None) or getattr(sampler, "batch_size", None) or InfluenceSettings.batch_size


def _doubled(most: int) -> list[int]:
    """`most`, half of it, a quarter, ... down to a 64th, rising."""
    return sorted({max(1, most >> halvings) for halvings in range(7)})


def _enough(tried: Iterable[tuple[int, float]], tolerance: float) -> tuple[int, dict[int, float]]:
    """The smallest value that is as good as needed or as the best, and all residuals up to the first good one."""
    residuals: dict[int, float] = {}
    for value, residual in tried:
        residuals[value] = round(residual, 4)
        if residual <= tolerance:
            break
    limit = max(tolerance, 1.05 * min(residuals.values()))
    return min(value for value, residual in residuals.items() if residual <= limit), residuals


LOG = logging.getLogger("influence")
LOG_FORMAT = logging.Formatter("%(asctime)s: %(message)s")
KEPT_RANKS = 500  # of the harmful and the helpful ones in a results file, as in the package
BLOCK = {"kernel": 500, "identity": 500}  # test images solved at once: m·p numbers are held;
STEPWISE_BLOCK = 10  # by the other solvers, which hold m · batch · activations
SHARD = 1000  # training gradients a file


def _log_file(filename: str | Path) -> logging.FileHandler:
    Path(filename).parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(filename)
    handler.setFormatter(LOG_FORMAT)
    return handler


def init_logging(filename: str | Path | None = None) -> None:
    """Send the log to the terminal, and to `filename` as well when it is given."""
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(LOG_FORMAT)
    LOG.handlers = [terminal, _log_file(filename)] if filename else [terminal]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


def get_default_config() -> dict[str, Any]:
    """The defaults of the manual as a dict, as in the package; `InfluenceConfig.from_package` checks it."""
    config = asdict(InfluenceConfig())
    del config["report"]
    return config


def calc_img_wise(
    config: InfluenceConfig | Mapping[str, Any], model: nn.Module, train_loader: Any, test_loader: Any
) -> tuple[dict[str, Any], list[int], list[int]]:
    """Influence of all training images, one test image after the other (`config.jobs` at once).

    config: an `InfluenceConfig`, or a dict of the package; loaders: DataLoaders of map-style data sets, of any batch
    size, shuffled or not: indices always count the data set. Returns (influences, harmful, helpful): the content of the
    results file, and all training indices by their mean harm and mean help, most first.

    influences: by test index (a string) label, num_in_dataset, time_calc_influence_s, influence (n numbers with the
    sign of the package, −I: positive = harmful), and the 500 most harmful and most helpful indices, rightly named.
    Written to `<outdir>/influence_results_<start>_<number>.json`, with the configuration in
    `influences_results_meta_<start>-<number>.json`. A run that was killed goes on after its last finished test image;
    results of another configuration, model or data set are never mixed in, but renamed.
    """
    return _Run.prepare(config, model, train_loader, test_loader).finish(block=1, stored=False)


def calc_influences(
    config: InfluenceConfig | Mapping[str, Any], model: nn.Module, train_loader: Any, test_loader: Any
) -> tuple[dict[str, Any], list[int], list[int]]:
    """Whichever of the two modes `calc_method` names."""
    own = _as_config(config)
    mode = {"img_wise": calc_img_wise, "all_grad_then_test": calc_all_grad_then_test}[own.calc_method]
    return mode(own, model, train_loader, test_loader)


def calc_all_grad_then_test(
    config: InfluenceConfig | Mapping[str, Any], model: nn.Module, train_loader: Any, test_loader: Any
) -> tuple[dict[str, Any], list[int], list[int]]:
    """The same numbers as `calc_img_wise` (to 1e-5), many test images at a time: faster, the more there are.

    Without `save_pth` nothing is kept and nothing is held: each training gradient is used for a block of test images
    and forgotten. With it, two folders of safetensors files are written there and used again by any later call:

        s_test/<test index>.safetensors     "s_test" (p,)         4·p bytes a test image (in float32)
        grad_z/<first>-<last>.safetensors   "grad_z" (rows, p)    4·p bytes a training image: n·p·4 in all

    That is 12.4 GB for 62,006 parameters and 50,000 images; it pays only where reading is faster than computing
    again. The header names the model, the data and the settings; files of others are refused.
    The test images of a block are finished together (500 with solver "kernel", 10 with "lissa" or "cg"): so many may
    be lost when a run is killed.
    """
    run = _Run.prepare(config, model, train_loader, test_loader)
    block = BLOCK.get(run.config.solver, STEPWISE_BLOCK)
    return run.finish(block, stored=run.config.save_pth is not None)


@dataclass(frozen=True, eq=False)
class _Run:
    """One call of the package's interface: what is asked, and where each finished test image is kept."""

    config: InfluenceConfig
    model: nn.Module
    train: _Source
    test: _Source
    settings: InfluenceSettings
    chosen: NDArray[np.int64]
    labels: NDArray[np.int64]
    keys: dict[str, str]

    @classmethod
    def prepare(cls, config: InfluenceConfig | Mapping[str, Any], model: nn.Module, train: Any, test: Any) -> _Run:
        """Check everything, choose the test images, and name the run by what it is made of."""
        own = _as_config(config)
        settings = own.settings(_batch_size(train))
        sources = _as_source(train, "train_loader"), _as_source(test, "test_loader")
        for source, role in zip(sources, ("train_loader", "test_loader")):
            _check_steady(source, role)
        (train_sum, _), (test_sum, labels) = (_checksum(source) for source in sources)
        gradients = f"{type(model).__name__}-{_model_checksum(model):08x}-{train_sum}"
        about = {**settings.describe(), "jobs": 0}  # how many at once changes nothing
        solved = f"{gradients}-{test_sum}-{zlib.crc32(json.dumps(about, sort_keys=True).encode()):08x}"
        keys = {"grad_z": gradients, "s_test": solved}
        return cls(own, model, *sources, settings, _choose_tests(own, labels), labels, keys)

    @cached_property
    def problem(self) -> _Problem:
        return _make_problem(self.model, self.train, self.settings)

    @cached_property
    def solver(self) -> _Solver:
        """Prepared once: eigenvalues and factors depend on the training images only (see `_prepare` for blocks)."""
        return _make_solver(self.problem)

    def finish(self, block: int, stored: bool) -> tuple[dict[str, Any], list[int], list[int]]:
        """Compute what is left in blocks of test images, put everything together, write it."""
        with self.logging():
            LOG.info("running on %s test images", len(self.chosen))
            left = [int(i) for i in self.chosen if self.read_part(i) is None]
            blocks = [left[start : start + block] for start in range(0, len(left), block)]
            jobs = self.config.jobs if block == 1 else 1
            if left and jobs != 1:
                _ = self.solver  # prepared here, it goes to the processes with everything else
            finished = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(
                joblib.delayed(self.compute)(part, stored) for part in blocks
            )
            hidden = not (self.config.progress and blocks)
            for indices in tqdm(finished, "influence", len(blocks), leave=False, disable=hidden):
                LOG.info("finished test image %s", ", ".join(map(str, indices)))
            return self.assemble()

    @contextmanager
    def logging(self) -> Iterator[None]:
        """For the time of this run, the log goes to `log_filename`, and not to the terminal when it is to be silent."""
        before, level, filename = LOG.handlers, LOG.level, self.config.log_filename
        files = [handler for handler in before if isinstance(handler, logging.FileHandler)]
        LOG.handlers = list(before if self.config.progress else files)
        known = {Path(handler.baseFilename) for handler in files}
        own = _log_file(filename) if filename and Path(filename).absolute() not in known else None
        if own:
            LOG.addHandler(own)
            LOG.setLevel(logging.INFO)
        try:
            yield
        finally:
            LOG.handlers = before
            LOG.setLevel(level)
            if own:
                own.close()

    @property
    def folder(self) -> Path:
        """Where finished test images wait for the rest; its name belongs to this very run, and these test images."""
        asked = zlib.crc32(self.chosen.tobytes(), zlib.crc32(self.keys["s_test"].encode()))
        return Path(self.config.outdir) / f"unfinished-{asked:08x}"

    def part(self, index: int) -> Path:
        return self.folder / f"{index}.json"

    def read_part(self, index: int) -> dict[str, Any] | None:
        """A finished test image; None when it is not, or damaged (which is reported, and kept aside)."""
        if not self.part(index).exists():
            return None
        try:
            return json.loads(self.part(index).read_text(encoding="utf-8"))
        except ValueError as error:
            _set_aside(self.part(index), error)
            return None

    def compute(self, indices: list[int], stored: bool) -> list[int]:
        """Score a block of test images, and keep each in a file of its own."""
        start = time.perf_counter()
        if self.config.save_pth is None:
            solver = self.solver if len(indices) == 1 else _prepare(self.problem, len(indices))
            scorer, _, _ = _solve(self.problem, solver, self.test, torch.tensor(indices))
            scores = _score(self.problem, scorer)[0]
        else:
            scores = self.scores_kept(torch.tensor(indices), stored)
        seconds = (time.perf_counter() - start) / len(indices)
        for index, row in zip(indices, scores):
            about = {"label": int(self.labels[index]), "num_in_dataset": index, "time_calc_influence_s": seconds}
            ranked = np.argsort(row, kind="stable")
            named = {"harmful": ranked[:KEPT_RANKS].tolist(), "helpful": ranked[::-1][:KEPT_RANKS].tolist()}
            with atomic_path(self.part(index)) as temporary:
                temporary.write_text(json.dumps({**about, "influence": (-row).tolist(), **named}), encoding="utf-8")
        return indices

    def scores_kept(self, indices: Tensor, stored: bool) -> NDArray[Any]:
        """(k, n) scores by way of files in `save_pth`: s_test always, the training gradients when `stored`."""
        directions = self.directions(indices)
        if not stored:
            return _score(self.problem, _direction_scorer(self.problem, directions))[0]
        return _join_scores([directions @ rows.T for rows in self.gradients()])

    def directions(self, indices: Tensor) -> Tensor:
        """(k, p) s_test of the test images: from their files, or solved and written there."""
        folder = Path(self.config.save_pth or "") / "s_test"
        files = {int(i): folder / f"{int(i)}.safetensors" for i in indices}
        missing = torch.tensor([i for i, file in files.items() if not file.exists()], dtype=torch.long)
        if len(missing):
            solved, _ = self.solver.solve(_test_gradients(self.problem, self.test, missing)[0])
            for i, row in zip(missing.tolist(), solved):
                self.write_kept(files[i], "s_test", row)
        return torch.stack([self.read_kept(file, "s_test") for file in files.values()]).to(self.problem.device)

    def gradients(self) -> Iterator[Tensor]:
        """Chunks (≤ SHARD, p) of the training gradients: from their files, or computed and written there."""
        folder = Path(self.config.save_pth or "") / "grad_z"
        problem = self.problem
        for chosen in torch.arange(self.train.size).split(SHARD):
            file = folder / f"{int(chosen[0])}-{int(chosen[-1])}.safetensors"
            if not file.exists():
                rows = [problem.gradients(*batch) for batch in problem.batches(problem.train, chosen)]
                self.write_kept(file, "grad_z", torch.cat(rows))
            yield self.read_kept(file, "grad_z").to(problem.device)

    def write_kept(self, file: Path, kind: str, tensor: Tensor) -> None:
        _check_finite(tensor, "test" if kind == "s_test" else "training")
        file.parent.mkdir(parents=True, exist_ok=True)
        size = tensor.numel() * tensor.element_size()
        if size > shutil.disk_usage(file.parent).free:
            raise OSError(f"no room for {file} ({size / 1e9:.1f} GB); choose another save_pth, or None")
        with atomic_path(file) as temporary:
            save_file({kind: tensor.cpu().contiguous()}, str(temporary), metadata={"made_with": self.keys[kind]})

    def read_kept(self, file: Path, kind: str) -> Tensor:
        """The tensor in `file`; ValueError when it is of another model, data set or configuration."""
        try:
            with safe_open(str(file), framework="pt") as content:
                made_with, tensor = (content.metadata() or {}).get("made_with"), content.get_tensor(kind)
        except SafetensorError as error:
            raise CorruptFileError(f"{file} is damaged ({error}); delete it, and it is computed again") from error
        if made_with != self.keys[kind]:
            raise ValueError(
                f"{file} is of another model, data set or configuration; choose another save_pth, or delete the file"
            )
        return tensor

    def assemble(self) -> tuple[dict[str, Any], list[int], list[int]]:
        """All test images in one file, the configuration in another; both as the package calls them."""
        outdir, stem = Path(self.config.outdir), self.config.file_stem
        results = outdir / f"influence_results_{stem}.json"
        meta = outdir / f"influences_results_meta_{stem.replace('_', '-')}.json"
        about = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self.config).items()}
        about |= {"test_sample_index_list": self.chosen.tolist(), "made_with": self.keys["s_test"]}
        total = np.zeros(self.train.size)
        influences: dict[str, Any] = {}
        _keep_previous(results)
        with atomic_path(results) as temporary, temporary.open("w", encoding="utf-8") as file:
            for index in map(int, self.chosen):  # one after the other: a text of all of them could fill the memory
                text = self.part(index).read_text(encoding="utf-8")
                file.write(f'{"," if influences else "{"}\n"{index}": {text}')
                influences[str(index)] = json.loads(text)
                total += influences[str(index)]["influence"]
            file.write("\n}\n")
        _keep_previous(meta)
        with atomic_path(meta) as temporary:
            temporary.write_text(json.dumps(about, indent=2), encoding="utf-8")
        for damaged in self.folder.glob("*.damaged"):
            damaged.replace(outdir / f"{self.folder.name}-{damaged.name}")
        shutil.rmtree(self.folder)
        ranked = np.argsort(-total, kind="stable")
        return influences, ranked.tolist(), ranked[::-1].tolist()


def _keep_previous(path: Path) -> None:
    """Rename a result that is already there, with the time it was written at, as the package does."""
    if path.exists():
        written = time.strftime("%Y-%m-%d-%H-%M-%S", time.localtime(path.stat().st_mtime))
        names = (f"{path.stem}_{written}{more}{path.suffix}" for more in ("", *(f"-{i}" for i in range(2, 10_000))))
        path.replace(next(path.with_name(name) for name in names if not path.with_name(name).exists()))


def _model_checksum(model: nn.Module) -> int:
    """Of the layers, of what is trainable, and of every weight and buffer."""
    about = [(name, str(param.dtype), param.requires_grad) for name, param in model.named_parameters()]
    total = zlib.crc32(f"{model!r} {about}".encode())
    for value in model.state_dict().values():
        total = zlib.crc32(_bytes_of(value), total)
    return total


def _check_steady(source: _Source, role: str) -> None:
    """Refuse random transforms: neither would the numbers mean anything, nor could a run be continued."""
    first = torch.arange(min(source.size, 20))
    once, again = (source.batch(first)[0].double() for _ in range(2))
    if not torch.allclose(once, again, rtol=0, atol=0, equal_nan=True):
        raise ValueError(f"{role} gives other images each time it is read; switch off its augmentation")


def _checksum(source: _Source) -> tuple[str, NDArray[np.int64]]:
    """Size and checksum of all images and labels of a data set, and the labels (n,)."""
    total, labels = 0, []
    for chosen in torch.arange(source.size).split(LOOK_CHUNK):
        images, given = source.batch(chosen)
        total = zlib.crc32(_bytes_of(given), zlib.crc32(_bytes_of(images), total))
        labels.append(given.cpu().numpy())
    return f"{source.size}-{total:08x}", np.concatenate(labels)


def _choose_tests(config: InfluenceConfig, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of the test images asked for: as many of each class, class by class, or all from a start on."""
    if config.test_sample_num is False:
        if config.start >= len(labels):
            raise ValueError(f"test_start_index must lie in 0..{len(labels) - 1}, not {config.start}")
        return np.arange(config.start, len(labels))
    wanted = slice(config.start, config.start + int(config.test_sample_num))
    chosen = [np.flatnonzero(labels == label)[wanted] for label in range(config.num_classes)]
    for label, found in enumerate(chosen):
        if len(found) < config.test_sample_num:
            raise ValueError(
                f"class {label} has fewer than {wanted.stop} test images; lower test_sample_num, "
                "test_sample_start_per_class or num_classes"
            )
    return np.concatenate(chosen)


def influential_loader(
    influence: NDArray[Any],
    train: Any,
    share: float,
    batch_size: int = 128,
    seed: int = 0,
    labels: NDArray[Any] | Tensor | None = None,
) -> DataLoader[Any]:
    """A shuffled DataLoader of the most influential samples only: the `share` (0..1] of `train` that helps most.

    influence (n,): `mean_influences`, a row of `Influences.scores`, or any number where larger is better.
    labels (n,): when given, the share is taken within each class, so that none is lost.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be a fraction above 0 and at most 1, not {share}")
    group = np.zeros(len(train), dtype=int) if labels is None else np.asarray(labels)
    for name, values in (("influence", influence), ("labels", group)):
        if values.shape != (len(train),):
            raise ValueError(f"{name} must be one number a training image, ({len(train)},), not {values.shape}")
    best: list[int] = []
    for members in (np.flatnonzero(group == label) for label in np.unique(group)):
        ranked = members[np.argsort(-influence[members], kind="stable")]
        best += ranked[: max(1, round(share * len(members)))].tolist()
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(Subset(train, best), batch_size, shuffle=True, generator=generator)


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Experiments: what really happens when images are left out                                                    ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


def fit_softmax_regression(features: Tensor, labels: Tensor, l2: float, n: int | None = None) -> nn.Linear:
    """The one minimum of Σ losses / n + l2/2 ‖W‖², as a float64 linear layer without bias: features (k, d) → (k, C).

    n: what the sum is divided by (default k); the full data's n keeps the objective of the others when some are left
    out. Every one of the C ≥ 3 classes must occur in `labels`. Fitted by scikit-learn to a gradient of 1e-10.
    """
    classes = int(labels.max()) + 1
    if classes < 3 or len(labels.unique()) != classes:
        raise ValueError(
            f"labels must contain every class 0..{max(classes, 3) - 1}, at least three; drop no whole class"
        )
    fit = LogisticRegression(C=1 / (l2 * (n or len(labels))), fit_intercept=False, tol=1e-10, max_iter=10_000)
    fit.fit(features.double().numpy(), labels.numpy())
    model = nn.Linear(features.shape[1], classes, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(fit.coef_))
    return model


def removal_effect(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], l2: float, removed: Sequence[int] | NDArray[Any]
) -> float:
    """Mean test loss of a softmax regression refitted without the `removed` images, minus that with all of them.

    Positive: they were helpful. train, test: (features, labels); the objective keeps its 1/n (see above).
    """
    (features, labels), (test_features, test_labels) = train, test
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[torch.as_tensor(np.asarray(removed))] = False
    losses = []
    for chosen in (torch.ones_like(kept), kept):
        model = fit_softmax_regression(features[chosen], labels[chosen], l2, n=len(labels))
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(test_features.double()), test_labels)))
    return losses[1] - losses[0]


def leave_one_out(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], l2: float, left_out: Sequence[int] | NDArray[Any]
) -> NDArray[np.float64]:
    """(k, m) change of each test loss when softmax regression is refitted without one training image; > 0: it helped.

    train, test: (features, labels); the objective of `fit_softmax_regression`, its 1/n kept. Each refit starts at the
    full fit and takes Newton steps with the full fit's Hessian, which one image hardly changes: a handful of steps to
    a gradient of 1e-12, where scikit-learn from scratch needs minutes for what here takes seconds.
    """
    features, labels, n = train[0].double(), train[1], len(train[1])
    weight = fit_softmax_regression(features, labels, l2).weight.detach()

    def objective(weight: Tensor) -> Tensor:
        return F.cross_entropy(features @ weight.T, labels) + l2 / 2 * weight.square().sum()

    def without(index: int) -> Tensor:
        refitted, one = weight.clone(), slice(index, index + 1)
        for _ in range(100):
            errors = (features @ refitted.T).softmax(1) - F.one_hot(labels, len(weight))
            errors[one] = 0
            slope = errors.T @ features / n + l2 * refitted
            if slope.abs().max() < 1e-12:
                return refitted
            refitted -= torch.cholesky_solve(slope.reshape(-1, 1), factor).view_as(slope)
        raise NonFiniteError(f"the refit without image {index} did not converge; raise l2 above {l2:.1e}")

    def losses(weight: Tensor) -> Tensor:
        return F.cross_entropy(test[0].double() @ weight.T, test[1], reduction="none")

    size = weight.numel()
    factor = torch.linalg.cholesky(torch.autograd.functional.hessian(objective, weight).view(size, size))
    before = losses(weight)
    return torch.stack([losses(without(int(index))) - before for index in left_out]).numpy()


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Experiments: training again, many times, and never twice                                                     ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝

Training = tuple[NDArray[np.int64], int]
"""What one retraining is made of: the indices of the training images kept, and the seed."""


@dataclass(frozen=True, eq=False)
class Retrainings:
    """What t models, trained one after the other, say of m test images.

    margins (t, m) float16: −log(p_y / (1 − p_y)) as in `margin_measure`, from which the loss follows exactly;
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


def train_once(train: ImageData, config: TrainConfig, kept: NDArray[np.int64] | None = None) -> Net:
    """A new `Net` trained on the images `kept` (default: all), on one thread of the CPU or on the GPU, silently.

    One thread: many small trainings at once use the cores better than one training on all cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seed_everything(config.seed)
        model = Net().to(pick_device())
        train_model(model, train if kept is None else train.subset(kept), config)
        return model
    finally:
        torch.set_num_threads(threads)


def train_models(
    train: ImageData | Sequence[ImageData],
    config: TrainConfig,
    seeds: Sequence[int],
    folder: str | Path,
    jobs: int = -1,
) -> list[Net]:
    """One `train_once` model for each seed, `jobs` at a time; kept in `folder` as a checkpoint each and reused.

    train: the data of all of them, or of each its own. A checkpoint made with another configuration is replaced; a
    damaged one is reported, kept aside and its model trained again.
    """
    trains = [train] * len(seeds) if isinstance(train, ImageData) else list(train)
    if len(trains) != len(seeds):
        raise ValueError(f"{len(trains)} data sets for {len(seeds)} seeds: pass one for each seed, or one for all")
    tasks = [
        (data, dataclasses.replace(config, seed=seed), Path(folder) / f"net-{data.fingerprint}-seed-{seed}.safetensors")
        for data, seed in zip(trains, seeds)
    ]
    models = [_read_model(*task) for task in tasks]
    left = [i for i, model in enumerate(models) if model is None]
    finished = joblib.Parallel(n_jobs=jobs, return_as="generator")(
        joblib.delayed(_train_and_save)(*tasks[i]) for i in left
    )
    for model, i in zip(tqdm(finished, "training", len(left), leave=False, unit="model", disable=not left), left):
        models[i] = model
    return [model for model in models if model is not None]


def _train_and_save(train: ImageData, config: TrainConfig, path: Path) -> Net:
    model = train_once(train, config)
    save_checkpoint(path, model, _identity(model, train, config), pd.DataFrame())
    return model


def _read_model(train: ImageData, config: TrainConfig, path: Path) -> Net | None:
    """The model that `_train_and_save` left at `path`; None when there is none that fits."""
    if not path.exists():
        return None
    try:
        weights, found, _ = read_checkpoint(path)
    except CorruptFileError as error:
        _set_aside(path, error)
        return None
    model = Net().to(pick_device())
    if found != _identity(model, train, config):
        return None
    model.load_state_dict(weights)
    return model


def retrain_all(
    train: ImageData,
    test: ImageData,
    plan: Sequence[Training],
    config: TrainConfig,
    path: str | Path,
    jobs: int = -1,
) -> Retrainings:
    """Train `Net` once for each entry of `plan` and ask it about every image of `test`; the cache at `path` helps.

    Every finished training is written to `path` at once, under a key made of the data, the configuration, the images
    kept and the seed: a run that was killed goes on where it stopped, and nothing made otherwise is ever used. A
    damaged cache is reported, kept aside and computed again. `jobs` trainings run at a time through joblib (−1: one
    a core), so that a joblib backend (Dask, Ray) spreads them over a cluster. Bit for bit the same in any order.
    """
    keys = [_training_key(train, test, config, training) for training in plan]
    done = _read_retrainings(Path(path))
    left = {key: training for key, training in zip(keys, plan) if key not in done}
    tasks = (joblib.delayed(_train_and_ask)(train, test, config, key, *left[key]) for key in left)
    finished = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(tasks)
    for key, margins, correct in tqdm(finished, "retraining", len(left), leave=False, unit="model", disable=not left):
        done[key] = (margins, correct)
        _write_retrainings(path, done)
    chosen = {key: done[key] for key in keys}
    if left:
        _write_retrainings(path, chosen)  # in the order of the plan, whatever finished first
    return Retrainings(*(np.stack(parts) for parts in zip(*(chosen[key] for key in keys))))


def _training_key(train: ImageData, test: ImageData, config: TrainConfig, training: Training) -> str:
    """Name of one training: the same for the same data, configuration, images kept and seed only."""
    kept, seed = training
    about = {**asdict(dataclasses.replace(config, seed=seed)), "train": train.fingerprint, "test": test.fingerprint}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    digest.update(np.sort(kept).astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _train_and_ask(
    train: ImageData, test: ImageData, config: TrainConfig, key: str, kept: NDArray[np.int64], seed: int
) -> tuple[str, NDArray[np.float16], NDArray[np.bool_]]:
    """One training; its key, and the margins (m,) and the right answers (m,) on `test`."""
    result = evaluate(train_once(train, dataclasses.replace(config, seed=seed), np.sort(kept)), test)
    margins = margin_measure(result.logits, result.labels).numpy().astype(np.float16)
    return key, margins, (result.predictions == result.labels).numpy()


def _write_retrainings(path: str | Path, done: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]) -> None:
    keys, margins, correct = list(done), *(np.stack(parts) for parts in zip(*done.values()))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, keys=np.array(keys), margins=margins, correct=np.packbits(correct, axis=1))


def _read_retrainings(path: Path) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """key → (margins, correct) of what is finished; a damaged file is reported and renamed, never trusted."""
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            keys, margins = file["keys"].tolist(), file["margins"]
            correct = np.unpackbits(file["correct"], axis=1, count=margins.shape[1]).astype(np.bool_)
        if not len(keys) == len(margins) == len(correct):
            raise ValueError("its parts differ in length")
        return dict(zip(keys, zip(margins, correct)))
    except Exception as error:  # zipfile, zlib and numpy each have their own ways to say "damaged"
        _set_aside(path, error)
        return {}


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Experiments: prediction against what really happened                                                         ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


@dataclass(frozen=True, eq=False)
class LDS:
    """Linear datamodeling score: its mean over the test images, a 95 % interval, and each test image's own (m,)."""

    mean: float
    low: float
    high: float
    per_test: NDArray[np.float64]
    resampled: NDArray[np.float64]

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def minus(self, other: LDS) -> tuple[float, float, float]:
        """Difference of the means and its 95 % interval; both must come from the same resampling (same seed)."""
        gaps = self.resampled - other.resampled
        return self.mean - other.mean, *np.quantile(gaps, [0.025, 0.975]).tolist()


def linear_datamodeling_score(
    scores: NDArray[Any], masks: NDArray[np.bool_], outcomes: NDArray[Any], repeats: int = 1000, seed: int = 0
) -> LDS:
    """How well `scores` foretell which halves of the training data give a test image a low loss.

    scores (m, n), positive = helpful; masks (h, n): images kept in each of h retrainings; outcomes (h, m): the loss
    (or margin) each of them ended with. The sum of the scores of the images kept, negated, predicts the outcome; their
    Spearman correlation over the h halves is the score of one test image, −1..1 (Ilyas et al. 2022, arXiv:2202.00622;
    Park et al. 2023, arXiv:2303.14186, definition 2.3). A prediction that never changes scores 0.
    The interval is a bootstrap over halves and test images at once, ranks kept as they are.
    """
    m, n = scores.shape
    if masks.shape[1:] != (n,) or outcomes.shape != (len(masks), m):
        raise ValueError(
            f"scores {scores.shape} are (m, n), so masks must be (h, n) and outcomes (h, m), not {masks.shape}, "
            f"{outcomes.shape}"
        )
    predicted, actual = _standard_ranks(-(masks.astype(scores.dtype) @ scores.T)), _standard_ranks(outcomes)
    generator = np.random.default_rng(seed)
    halves = generator.multinomial(len(masks), np.full(len(masks), 1 / len(masks)), size=repeats) / len(masks)
    images = generator.multinomial(m, np.full(m, 1 / m), size=repeats) / m
    resampled = (_weighted_correlation(halves, predicted, actual) * images).sum(1)
    per_test = _weighted_correlation(np.full((1, len(masks)), 1 / len(masks)), predicted, actual)[0]
    low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
    return LDS(float(per_test.mean()), low, high, per_test, resampled)


def _standard_ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """(h, m) → ranks within each column (ties share their mean), to mean 0 and variance 1; 0 where all are equal."""
    ranks = rankdata(values, axis=0)
    ranks -= ranks.mean(0)
    return ranks / np.maximum(ranks.std(0), 1e-12)


def _weighted_correlation(
    weights: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(k, h) weights that sum to 1, (h, m) and (h, m) → (k, m) correlations over h; 0 where one side is constant."""
    mean_a, mean_b = weights @ a, weights @ b
    spread = np.sqrt((weights @ a**2 - mean_a**2).clip(0) * (weights @ b**2 - mean_b**2).clip(0))
    return np.where(spread > 1e-9, (weights @ (a * b) - mean_a * mean_b) / np.maximum(spread, 1e-9), 0)


def noise_ceiling(outcomes: NDArray[Any]) -> tuple[float, float]:
    """(r, h, m) outcomes of r repeated trainings of each half → agreement of two trainings, and the LDS ceiling.

    The agreement is the mean Spearman correlation between two repeats. The mean of r repeats has the reliability
    R = r·agreement / (1 + (r − 1)·agreement) (Spearman-Brown), and √R is the most that a perfect prediction of the
    noise-free outcome could score against it.
    """
    if len(outcomes) < 2:
        raise ValueError("a noise ceiling needs at least two repeated trainings of each half")
    ranks, whole = [_standard_ranks(repeat) for repeat in outcomes], np.full((1, outcomes.shape[1]), 1.0)
    whole /= outcomes.shape[1]
    pairs = [_weighted_correlation(whole, a, b).mean() for a, b in itertools.combinations(ranks, 2)]
    agreement, r = max(float(np.mean(pairs)), 0.0), len(outcomes)
    return agreement, math.sqrt(r * agreement / (1 + (r - 1) * agreement))


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Experiments: how stable is a picture?                                                                        ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝


def count_top_images(models: Sequence[Influences], k: int = 10) -> pd.DataFrame:
    """In how many of several models' results is a training image among the k most helpful, or most harmful?

    One row for each (test_index, kind, train_index) that occurs at all: `found_by` of `models` models. All results
    must be about the same test images.
    """
    if not models or any(one.test_indices.tolist() != models[0].test_indices.tolist() for one in models):
        raise ValueError("pass the influences of at least one model, all for the same test images")
    rows = [
        {"test_index": int(index), "kind": kind, "train_index": int(j)}
        for one in models
        for i, index in enumerate(one.test_indices)
        for kind, ranked in (("helpful", one.helpful(i, k)), ("harmful", one.harmful(i, k)))
        for j in ranked
    ]
    counts = pd.DataFrame(rows).groupby(["test_index", "kind", "train_index"]).size().rename("found_by").reset_index()
    return counts.assign(models=len(models))


def stability_of(counts: pd.DataFrame, test_index: int, kind: str) -> dict[int, float] | None:
    """train_index → share of the models that have it in their top; None when that test image was not measured."""
    measured = counts[counts["test_index"] == test_index]
    if measured.empty:
        return None
    chosen = measured[measured["kind"] == kind]
    return dict(zip(chosen["train_index"].tolist(), (chosen["found_by"] / chosen["models"]).tolist()))


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Experiments: wrong labels, and what finds them                                                               ║
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
    _check_labels(labels, classes)
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
    trains: Sequence[ImageData], config: TrainConfig, folder: str | Path, folds: int = 3, jobs: int = -1
) -> list[NDArray[np.float32]]:
    """For each data set (n, C) probabilities of each image, by a model that has not seen it.

    Cross-validation, each fold with its share of every label: `folds` models a data set, trained on the other folds,
    all `train_models`. Pass all data sets at once, so that no core waits between them.
    """
    splitter = StratifiedKFold(folds, shuffle=True, random_state=config.seed)
    splits = [list(splitter.split(np.zeros(len(train)), train.labels.numpy())) for train in trains]
    parts = [train.subset(kept) for train, split in zip(trains, splits) for kept, _ in split]
    models = iter(train_models(parts, config, [config.seed] * len(parts), folder, jobs))
    probabilities = [np.zeros((len(train), len(train.class_names)), np.float32) for train in trains]
    for train, split, found in zip(trains, splits, probabilities):
        for _, left_out in split:
            found[left_out] = evaluate(next(models), train.subset(left_out)).probabilities.numpy()
    return probabilities


def suspicion_scores(
    model: nn.Module, train: ImageData, validation: ImageData, probabilities: NDArray[Any], seed: int = 0
) -> pd.DataFrame:
    """How suspicious the label of each training image is, by several scores: n rows, larger = more suspicious.

    model was trained on `train`, wrong labels and all; `validation` has labels that can be trusted, and is used by
    "influence" only; `probabilities` (n, C) are of models that have not seen the image they are of
    (`out_of_fold_probabilities`), used by the two last. `.attrs["seconds"]`: what each took, trainings left out.

    self-influence (Koh & Liang 2017, section 5.4) · influence: the mean on all of `validation`, negated · gradient norm
    and loss of the image · margin: largest other logit less that of the label · out of fold: the confidence in the
    label that the other models have, negated, as cleanlab scores it (Northcutt et al. 2021, arXiv:1911.00068), and
    confident learning: the same after subtracting the mean confidence of each class.
    """
    if probabilities.shape != (len(train), len(train.class_names)):
        raise ValueError(f"probabilities must be {(len(train), len(train.class_names))}, not {probabilities.shape}")
    given = train.labels.numpy()
    ways: dict[str, Callable[[], NDArray[Any]]] = {
        "random": lambda: np.random.default_rng(seed).random(len(train)),
        "self-influence": lambda: self_influences(model, train, measure="loss", seed=seed),
        "influence": lambda: -mean_influences(model, train, validation, measure="loss", seed=seed),
        "gradient norm": lambda: (len(train) * self_influences(model, train, solver="identity", measure="loss")) ** 0.5,
        "loss": lambda: evaluate(model, train).losses.numpy(),
        "margin": lambda: _logit_margins(evaluate(model, train)),
        "out of fold": lambda: -get_label_quality_scores(given, probabilities),
        "confident learning": lambda: -get_label_quality_scores(given, probabilities, adjust_pred_probs=True),
    }
    table, seconds = pd.DataFrame(index=pd.RangeIndex(len(train), name="index")), {}
    for name, score in ways.items():
        start = time.perf_counter()
        table[name] = score()
        seconds[name] = time.perf_counter() - start
    table.attrs["seconds"] = seconds
    return table


def _logit_margins(result: Evaluation) -> NDArray[Any]:
    """(n,) the largest logit of another class less that of the label: above 0, the model says something else."""
    own = result.logits.gather(1, result.labels[:, None])[:, 0]
    others = result.logits.scatter(1, result.labels[:, None], -math.inf)
    return (others.max(1).values - own).numpy()


def detection_curve(suspicion: NDArray[Any], flipped: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """What inspecting the most suspicious images first finds: (n + 1,) fraction inspected, fraction of `flipped` found.

    suspicion (n,), larger = more suspicious, ties in the order of the images; flipped: indices of the wrong labels.
    """
    wrong = _wrong_mask(suspicion, flipped)
    found = np.cumsum(wrong[np.argsort(-suspicion, kind="stable")])
    return np.linspace(0, 1, len(wrong) + 1), np.concatenate([[0.0], found / len(flipped)])


def detection_quality(suspicion: NDArray[Any], flipped: NDArray[Any], inspected: float = 0.1) -> dict[str, float]:
    """ROC AUC and average precision of a suspicion (n,), and the fraction of `flipped` found in the first `inspected`.

    0.5, the share of wrong labels, and `inspected` itself are what guessing gets. (scikit-learn's metrics.)
    """
    wrong = _wrong_mask(suspicion, flipped)
    if not 0 < inspected <= 1:
        raise ValueError(f"inspected must be a fraction above 0 and at most 1, not {inspected}")
    if wrong.all():
        raise ValueError("every label is flipped: there is nothing to tell apart")
    _, found = detection_curve(suspicion, flipped)
    return {
        "ROC AUC": float(roc_auc_score(wrong, suspicion)),
        "average precision": float(average_precision_score(wrong, suspicion)),
        "found": float(found[round(inspected * len(wrong))]),
    }


def _wrong_mask(suspicion: NDArray[Any], flipped: NDArray[Any]) -> NDArray[np.bool_]:
    """(n,) whether each label is flipped; an error when there is nothing to rank by or nothing to find."""
    if suspicion.ndim != 1 or not np.isfinite(suspicion).all():
        raise ValueError(f"suspicion must be one finite number an image, not {suspicion.shape} with NaN or infinity")
    if not len(flipped) or flipped.min() < 0 or flipped.max() >= len(suspicion):
        raise ValueError(f"flipped must hold at least one index, all in 0..{len(suspicion) - 1}")
    wrong = np.zeros(len(suspicion), np.bool_)
    wrong[flipped] = True
    return wrong


def list_suspects(
    train: ImageData,
    suspicion: pd.DataFrame,
    probabilities: NDArray[Any],
    pairs: pd.DataFrame,
    by: str,
    count: int = 500,
) -> pd.DataFrame:
    """The `count` images whose label is most suspicious by the score called `by`, one row each, worst first.

    suspicion: of `suspicion_scores`; probabilities (n, C): of models that have not seen the image; pairs: of
    `near_duplicates`. Columns: index (torchvision's), given and suggested label, probability of each (0..1), score,
    reason in plain words, and the rank (1 = most suspicious) under every score, as in "rank loss".
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


def mean_interval(values: Sequence[float] | NDArray[Any]) -> tuple[float, float]:
    """Mean of independent runs and the half-width of its 95 % interval (Student's t: wide for few runs)."""
    if len(values) < 2:
        raise ValueError("an interval needs at least two runs")
    spread = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(np.mean(values)), float(student_t.ppf(0.975, len(values) - 1)) * spread


# ╔══════════════════════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ Plots: helpers take an axes and return it; nothing here computes an influence                                ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════════════════════╝

HELPFUL_COLOUR, HARMFUL_COLOUR = "#0072B2", "#D55E00"  # Okabe & Ito: told apart by colour-blind readers too


def use_style() -> None:
    """The one look of every figure: 7 inches at most, 100 dpi, quiet axes."""
    plt.rcParams.update(
        {
            "figure.figsize": (7, 3),
            "figure.dpi": 100,
            "savefig.dpi": 100,
            "figure.constrained_layout.use": True,
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "image.interpolation": "nearest",
        }
    )


def show_figure(figure: Figure, path: str | Path) -> None:
    """Save `figure` to `path` as PNG and display that very file, so that notebook and folder cannot disagree.

    Reduced to the 256 colours that suit it best: a third of the size, so that notebooks stay below 1 MB.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    plt.close(figure)
    whole = PIL.Image.open(drawn).convert("RGB")
    # The default palette may miss a rare colour by 100 levels (red horses); this one is refined until it does not.
    cover = PIL.Image.Quantize.MAXCOVERAGE
    reduced = whole.quantize(256, method=cover, kmeans=1, dither=PIL.Image.Dither.NONE)
    with atomic_path(path) as temporary:
        reduced.save(temporary, format="PNG", optimize=True)
    display(Image(data=Path(path).read_bytes()))


def show_image(ax: Axes, image: Tensor, title: str = "", colour: str = "black") -> Axes:
    """One uint8 image (3, 32, 32) in its natural colours, with a title above."""
    ax.imshow(image.permute(1, 2, 0).numpy())
    ax.set_title(title, color=colour, fontsize=7.5)
    ax.set_axis_off()
    return ax


def plot_sample_grid(data: ImageData, per_class: int = 8) -> Figure:
    """The first `per_class` images of each class, a row a class."""
    classes = len(data.class_names)
    figure, axes = plt.subplots(classes, per_class, figsize=(7, 0.75 * classes))
    for row, name in enumerate(data.class_names):
        for ax, index in zip(axes[row], torch.where(data.labels == row)[0].tolist()):
            show_image(ax, data.images[index])
        axes[row, 0].text(-4, 16, name, ha="right", va="center")
    return figure


def plot_class_counts(ax: Axes, train: ImageData, test: ImageData) -> Axes:
    """Train and test images of each class as paired bars."""
    positions = np.arange(len(train.class_names))
    for data, label, shift, colour in ((train, "train", -0.2, "#0072B2"), (test, "test", 0.2, "#E69F00")):
        counts = torch.bincount(data.labels, minlength=len(positions)).numpy()
        bars = ax.bar(positions + shift, counts, width=0.4, label=f"{label}: {len(data):,} images", color=colour)
        ax.bar_label(bars, labels=[f"{count:,}" for count in counts], fontsize=6, padding=1)
    ax.set_xticks(positions, train.class_names, rotation=30, ha="right", rotation_mode="anchor")
    ax.set_ylabel("images")
    ax.margins(y=0.25)
    ax.legend(loc="upper center", ncols=2, frameon=False)
    return ax


def plot_history(axes: Sequence[Axes], history: pd.DataFrame) -> Sequence[Axes]:
    """Loss and accuracy per epoch, training (running) and validation, on two axes."""
    for ax, quantity in zip(axes, ("loss", "accuracy")):
        for part, colour in (("train", "#0072B2"), ("validation", "#E69F00")):
            ax.plot(history["epoch"], history[f"{part}_{quantity}"], marker="o", markersize=3, color=colour, label=part)
        ax.set(xlabel="epoch", ylabel=quantity)
        ax.legend(frameon=False)
    return axes


def plot_confusion(ax: Axes, result: Evaluation) -> Axes:
    """Row = true class, column = predicted class; each row's share of its images, in per cent, in colour."""
    counts = result.confusion()
    share = counts / counts.sum(1, keepdims=True).clip(1)
    picture = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if share[row, column] > 0.5 else "black"
        ax.text(column, row, str(count), ha="center", va="center", fontsize=7, color=colour)
    ticks = range(len(counts))
    ax.set_xticks(ticks, result.class_names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(ticks, result.class_names)
    ax.set(xlabel="the model says", ylabel="the label says")
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(picture, ax=ax, label="share of the class", shrink=0.8)
    return ax


def plot_channels(image: Tensor) -> Figure:
    """The red, green and blue channel of a uint8 image (3, 32, 32), each pixel annotated with its value 0..255."""
    figure, axes = plt.subplots(1, 3, figsize=(24, 8.7))
    for ax, channel, name in zip(axes, image.numpy(), ("red", "green", "blue")):
        ax.imshow(channel, cmap="gray", vmin=0, vmax=255)
        for (row, column), value in np.ndenumerate(channel):
            colour = "white" if value < 128 else "black"
            # Hard-edged digits stay readable at this size and shrink the file to a third.
            ax.text(column, row, str(value), ha="center", va="center", fontsize=7, color=colour, antialiased=False)
        ax.set_title(f"{name} channel", fontsize=22)
        ax.set_axis_off()
    return figure


def plot_score_histogram(ax: Axes, scores: NDArray[Any], own: NDArray[np.bool_], title: str) -> Axes:
    """Scores (n,) of one test image: training images with its `own` label (n,) against all others, log counts."""
    limit = float(np.quantile(np.abs(scores), 0.999))
    bins = np.linspace(-limit, limit, 41).tolist()
    for chosen, label, colour in ((~own, "other labels", "#BBBBBB"), (own, "own label", HELPFUL_COLOUR)):
        clipped = scores[chosen].clip(-limit, limit)
        ax.hist(clipped, bins=bins, histtype="stepfilled", alpha=0.8, label=label, color=colour)
    ax.set_yscale("log")
    return _small_panel(ax, title)


def _small_panel(ax: Axes, title: str) -> Axes:
    """A histogram of scores, small enough to stand beside others: zero marked, small letters."""
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_title(title, fontsize=8)
    ax.tick_params(labelsize=6)
    ax.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    ax.xaxis.get_offset_text().set_fontsize(6)
    return ax


def plot_label_influence(ax: Axes, table: pd.DataFrame) -> Axes:
    """A table of influences, one row a test image, one column a training label, blue = helpful, red = harmful."""
    values = table.to_numpy()
    limit = float(np.abs(values).max())
    picture = ax.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    ax.set_xticks(range(table.shape[1]), table.columns, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(table.shape[0]), table.index)
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(picture, ax=ax, label="share of its total influence")
    return ax


def plot_influential(
    influences: Influences, i: int, images: tuple[ImageData, ImageData], says: str, counts: pd.DataFrame | None = None
) -> Figure:
    """Test image i at the left (with what the model `says`), its 5 most helpful and 5 most harmful at the right.

    images: (train, test). counts: of `count_top_images`; then each title ends with the share of the models that have
    the image in their top 10, and an image that fewer than half of them have is framed with dashes: unstable.
    """
    (train, test), k = images, 5
    figure = plt.figure(figsize=(7, 3.4))
    grid = figure.add_gridspec(2, k + 1, width_ratios=[1.7] + [1] * k)
    index = int(influences.test_indices[i])
    left = show_image(figure.add_subplot(grid[:, 0]), test.images[index])
    left.set_title(f"test image {index}\nlabel: {test.class_of(index)}\nmodel: {says}", fontsize=8)
    rows = (
        ("helpful", influences.helpful(i, k), HELPFUL_COLOUR),
        ("harmful", influences.harmful(i, k), HARMFUL_COLOUR),
    )
    for row, (kind, chosen, colour) in enumerate(rows):
        shares = None if counts is None else stability_of(counts, index, kind)
        for column, j in enumerate(chosen):
            title = f"{influences.scores[i, j]:+.2g}\n{train.class_of(j)}\n#{j}"
            ax = show_image(figure.add_subplot(grid[row, column + 1]), train.images[j], title, colour)
            if shares is not None:
                _show_stability(ax, shares.get(int(j), 0.0), colour)
            if column == 0:
                ax.text(
                    -0.12,
                    0.5,
                    f"most {kind}",
                    rotation=90,
                    ha="right",
                    va="center",
                    transform=ax.transAxes,
                    color=colour,
                )
    return figure


def _show_stability(ax: Axes, share: float, colour: str) -> None:
    """Write below an image in what share of other models it is found; a dashed frame marks fewer than half."""
    unstable = share < 0.5
    ax.text(
        0.5, -0.06, f"found by {share:.0%}", ha="center", va="top", transform=ax.transAxes, fontsize=7,
        color="#555555" if unstable else "black", style="italic" if unstable else "normal",
    )  # fmt: skip
    if unstable:
        frame = Rectangle((0, 0), 1, 1, transform=ax.transAxes, fill=False, linestyle="--", linewidth=2.5)
        frame.set(edgecolor=colour, clip_on=False)
        ax.add_patch(frame)


def plot_image_row(
    data: ImageData, indices: Sequence[int] | NDArray[Any], titles: Sequence[str], colour: str
) -> Figure:
    """Images side by side, each with its title, class and index above."""
    figure, axes = plt.subplots(1, len(indices), figsize=(2.2 * len(indices), 2.9), squeeze=False)
    for ax, index, title in zip(axes[0], indices, titles):
        show_image(ax, data.images[int(index)])
        ax.set_title(f"{title}\n{data.class_of(int(index))} #{index}", color=colour, fontsize=10)
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


def plot_pairs(train: ImageData, test: ImageData, pairs: pd.DataFrame, columns: int = 4) -> Figure:
    """Pairs of `near_duplicates` side by side, each image with set, index and label; labels that differ in red."""
    rows = max(1, math.ceil(len(pairs) / columns))
    figure = plt.figure(figsize=(7, max(1.6, 1.4 * rows)))
    grid = figure.add_gridspec(rows, 3 * columns - 1, width_ratios=([1, 1, 0.12] * columns)[:-1])
    for place, pair in enumerate(pairs.itertuples()):
        row, column = divmod(place, columns)
        colour = "black" if pair.label_a == pair.label_b else HARMFUL_COLOUR
        for side in (0, 1):
            part, index, label = (getattr(pair, f"{name}_{'ab'[side]}") for name in ("set", "index", "label"))
            ax = figure.add_subplot(grid[row, 3 * column + side])
            show_image(ax, (train if part == "train" else test).images[index], f"{part}\n#{index}\n{label}", colour)
    if pairs.empty:
        figure.text(0.5, 0.5, "no such pair in this data", ha="center", va="center")
    return figure


def plot_channel_histogram(ax: Axes, counts: Tensor) -> Axes:
    """Share of the pixels (in per cent) at each value 0..255, red, green and blue, from `counts` (3, 256)."""
    share = 100 * counts / counts.sum(1, keepdim=True)
    for values, name, colour in zip(share, CHANNELS, ("#CC3311", "#228833", "#0072B2")):
        ax.plot(np.arange(256), values, color=colour, linewidth=1, label=name)
    ax.set(xlim=(-3, 258), ylim=(0, None), xticks=(0, 128, 255))
    return ax


def plot_torched_pie(ax: Axes, shares: Mapping[str, float], seed: int = 0) -> Axes:
    """A pie chart that stayed under the torch too long: `shares` by name, drawn as toast, charred at rim and cuts."""
    names = sorted(shares, key=lambda name: -shares[name])
    toast = LinearSegmentedColormap.from_list("toast", ["#f2d096", "#c98a3d", "#7a431a"])
    total = sum(shares.values())
    ax.pie(
        [shares[name] for name in names],
        labels=[f"{name} {shares[name] / total:.0%}" for name in names],
        colors=[toast(value) for value in np.linspace(0, 1, len(names))],
        startangle=90,
        counterclock=False,
        wedgeprops={"edgecolor": "#2b1408", "linewidth": 2.5},
        textprops={"fontsize": 11},
    )
    grid = torch.linspace(-1, 1, 300)
    radius = torch.hypot(grid[:, None], grid[None, :])
    generator = torch.Generator().manual_seed(seed)
    # Smooth noise at three scales: blisters, spots and crumbs.
    coarse = [torch.rand(1, 1, size, size, generator=generator) for size in (9, 28, 90)]
    noise = torch.stack([F.interpolate(field, 300, mode="bicubic")[0, 0] for field in coarse]).mean(0)
    burnt = ((radius - 0.72) / 0.28).clamp(0, 1) ** 1.5 * 0.75 + ((noise - 0.5) * 2.4).clamp(0, 0.75)
    char = torch.cat([torch.tensor([0.10, 0.04, 0.01]).expand(300, 300, 3), burnt.clamp(0, 0.9)[..., None]], dim=2)
    picture = ax.imshow(char.numpy(), extent=(-1, 1, -1, 1), interpolation="bilinear", zorder=3)
    picture.set_clip_path(Circle((0, 0), 1, transform=ax.transData))
    ax.set(xlim=(-1.5, 1.5), ylim=(-1.15, 1.15))
    return ax


def plot_predicted_actual(ax: Axes, groups: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]) -> Axes:
    """Scatter of (predicted, actual) changes of a loss, one colour a group, with the line where both are equal."""
    for (name, (predicted, actual)), colour in zip(groups.items(), (HELPFUL_COLOUR, HARMFUL_COLOUR, "#777777")):
        ax.scatter(predicted, actual, s=10, color=colour, alpha=0.6, linewidths=0, label=name)
    values = np.concatenate([np.concatenate(pair) for pair in groups.values()])
    ends = [values.min(), values.max()]
    ax.plot(ends, ends, color="black", linewidth=0.8, label="equal", zorder=0)
    ax.set(xlabel="predicted change of the loss (nats)", ylabel="actual change (nats)")
    ax.legend(frameon=False, fontsize=8)
    return ax


def plot_removals(ax: Axes, outcomes: pd.DataFrame, noise: float) -> Axes:
    """Mean change of one test image's loss against the number k of images removed, with ± 2 standard errors.

    outcomes: columns kind ("helpful", "harmful", "random"), k, change, a row each retraining; noise: the standard
    error of as many retrainings from which nothing was removed, drawn as a grey band of ± 2.
    """
    ax.axhspan(-2 * noise, 2 * noise, color="#DDDDDD", label="seed noise, nothing removed")
    colours = {"helpful": HELPFUL_COLOUR, "harmful": HARMFUL_COLOUR, "random": "#555555"}
    for kind, colour in colours.items():
        groups = outcomes[outcomes["kind"] == kind].groupby("k")["change"]
        error = 2 * groups.std() / groups.size() ** 0.5
        ax.errorbar(
            error.index,
            groups.mean(),
            error,
            color=colour,
            marker="o",
            markersize=3,
            capsize=2,
            label=f"{kind} removed",
        )
    ax.set_xscale("log")
    ax.set_xticks(error.index, [str(k) for k in error.index])
    ax.set_yscale(
        "symlog", linthresh=1
    )  # −1 … 1 linear: what can fall is the loss there was, what can rise is not bound
    ax.set_yticks([-1, 0, 1, 3, 10, 30], ["−1", "0", "1", "3", "10", "30"])
    ax.minorticks_off()
    return ax


def plot_scores_with_interval(ax: Axes, x: Sequence[float], scores: Sequence[LDS], label: str, colour: str) -> Axes:
    """A line of linear datamodeling scores with their 95 % intervals as a band."""
    ax.plot(x, [score.mean for score in scores], color=colour, marker="o", markersize=3, label=label)
    ax.fill_between(
        x, [score.low for score in scores], [score.high for score in scores], color=colour, alpha=0.2, linewidth=0
    )
    return ax


def plot_quality_against_time(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> Axes:
    """LDS (with its interval) against seconds, a point a method: "ours…" in blue, all others in red.

    rows: mappings with method, lds, low, high, seconds.
    """
    ax.set(xscale="log", xlabel="seconds for all test images", ylabel="LDS")
    for row in rows:
        colour = HELPFUL_COLOUR if row["method"].startswith("ours") else HARMFUL_COLOUR
        spread = [[row["lds"] - row["low"]], [row["high"] - row["lds"]]]
        ax.errorbar(row["seconds"], row["lds"], spread, color=colour, marker="o", markersize=4, elinewidth=0.8)
    ax.margins(x=0.12)
    _label_points(ax, {row["method"]: (row["seconds"], row["lds"]) for row in rows})
    return ax


def _label_points(ax: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each name beside its point, where it covers no point and no other name."""
    ax.figure.canvas.draw()  # positions on the paper are known only now
    places = [tuple(ax.transData.transform(point)) for point in points.values()]
    taken = [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in places]
    options = [(x, y) for y in (0, 9, -9, 18, -18, 27, -27, 36, -36) for x in (6, -6)]
    for name, point in sorted(points.items(), key=lambda item: -item[1][1]):
        for x, y in options:
            label = ax.annotate(
                name,
                point,
                (x, y),
                textcoords="offset points",
                fontsize=6.5,
                ha="left" if x > 0 else "right",
                va="center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#777777"} if abs(y) > 9 else None,
            )
            label.set_in_layout(False)  # or the axes would shrink, and the points move
            box = label.get_window_extent()
            inside = box.x0 > ax.bbox.x0 and box.x1 < ax.figure.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            if (x, y) != options[-1]:
                label.remove()
        taken.append(box)


SCORE_COLOURS = {
    "self-influence": HELPFUL_COLOUR,
    "influence": "#56B4E9",
    "gradient norm": "#009E73",
    "loss": HARMFUL_COLOUR,
    "margin": "#E69F00",
    "out of fold": "#CC79A7",
    "confident learning": "#882255",
    "random": "#777777",
}


def plot_detection(ax: Axes, curves: Mapping[str, Sequence[tuple[NDArray[Any], NDArray[Any]]]]) -> Axes:
    """Share of the wrong labels found against the share of images inspected, by name of the score: mean of its runs.

    curves: name → one `detection_curve` for each run, all of one length. Influence is drawn as a thicker line.
    """
    for name, runs in curves.items():
        width, style = (2.2 if "influence" in name else 1.2), (":" if name == "random" else "-")
        found = np.mean([found for _, found in runs], axis=0)
        ax.plot(100 * runs[0][0], 100 * found, color=SCORE_COLOURS[name], linewidth=width, linestyle=style, label=name)
    ax.set(xlabel="images inspected (%)", ylabel="wrong labels found (%)", xlim=(0, 50), ylim=(0, 101))
    return ax


def plot_flipped_histogram(ax: Axes, influence: NDArray[Any], wrong: NDArray[np.bool_], title: str) -> Axes:
    """Influence of images with a `wrong` label and of all others: the share of each group in each bin."""
    limit = float(np.quantile(np.abs(influence), 0.99))
    bins = np.linspace(-limit, limit, 41)
    for chosen, label, colour in ((~wrong, "label right", HELPFUL_COLOUR), (wrong, "label flipped", HARMFUL_COLOUR)):
        clipped = influence[chosen].clip(-limit, limit)
        weights = np.full(len(clipped), 1 / max(len(clipped), 1))
        ax.hist(clipped, bins=bins.tolist(), weights=weights, alpha=0.6, label=label, color=colour)
    return _small_panel(ax, title)


def plot_repair(ax: Axes, outcomes: pd.DataFrame, levels: Mapping[str, float]) -> Axes:
    """Test accuracy against the share of images inspected, a line a score: mean of the runs ± standard error.

    outcomes: columns score, inspected (0..1), accuracy (0..1), a row each run; levels: horizontal lines by name.
    """
    for name, rows in outcomes.groupby("score", sort=False):
        runs = rows.groupby("inspected")["accuracy"]
        error = 100 * runs.std() / runs.size() ** 0.5
        colour = SCORE_COLOURS[str(name)]
        ax.errorbar(
            100 * error.index, 100 * runs.mean(), error, color=colour, marker="o", markersize=3, capsize=2, label=name
        )
    for (name, level), style in zip(levels.items(), ("--", ":", "-.")):
        ax.axhline(100 * level, color="black", linewidth=0.8, linestyle=style, label=name)
    shares = sorted(100 * outcomes["inspected"].unique())
    ax.set(xlabel="images inspected (%)", ylabel="test accuracy (%)", xticks=shares)
    return ax


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
    """The CSV that `write_table` left at `path` and what it was made for; None when there is none."""
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
    try:
        found = read_table(path)
    except CorruptFileError as error:
        _set_aside(Path(path), error)
        found = None
    if found is not None and found[1] == made_for:
        return found[0]
    table = make()
    write_table(path, table, made_for)
    return table
