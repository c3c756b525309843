"""What every room of the package stands on: its errors, the device, safe files, parallel work."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import cloudpickle
import joblib
import numpy as np
import torch
from joblib.parallel import get_active_backend
from numpy.typing import NDArray
from torch import Tensor

Indices = int | Sequence[int] | slice | NDArray[Any] | Tensor | tuple[NDArray[Any], ...]
Task = TypeVar("Task")
Answer = TypeVar("Answer")


class CorruptFileError(ValueError):
    """A file on disk is damaged or not what its name promises; the message names it and says what to do."""


class NonFiniteError(ValueError):
    """A computation produced NaN or infinity; the message says what to change."""


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA, then MPS, then the CPU.

    Raises ValueError when the device asked for is not on this machine.

    >>> pick_device("cpu")
    device(type='cpu')
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


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """None of torch's modes that a caller may be in: inference, autocast, another default device. Also a decorator.

    ValueError where memory runs out, which nobody can exclude whose machine others use, too.
    """
    with torch.inference_mode(False), contextlib.ExitStack() as stack, _told_of_memory():
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def _told_of_memory() -> Iterator[None]:
    """ValueError, with what to do, in the place of whatever says that memory could not be had."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:  # on a CPU torch has no type of its own for it
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        raise ValueError(f"memory ran out: pass a smaller memory=, or stop what else takes memory ({error})") from error


def as_indices(chosen: Indices, size: int, role: str) -> Tensor:
    """(k,) indices from what a caller means by "these samples"; ValueError, with its `role`, for anything else.

    A whole number, a list, range, slice or array of them, a mask of `size` truth values, or what np.where returns.

    >>> as_indices([True, False, True], 3, "left out").tolist(), as_indices(2, 3, "left out").tolist()
    ([0, 2], [2])
    """
    if isinstance(chosen, slice):
        chosen = range(size)[chosen]
    if isinstance(chosen, tuple) and len(chosen) == 1 and isinstance(chosen[0], (np.ndarray, Tensor)):
        chosen = chosen[0]  # as np.where and torch.where return it
    found = np.asarray(chosen.detach().cpu() if isinstance(chosen, Tensor) else chosen)
    if found.dtype == np.bool_ and found.shape == (size,):
        found = np.flatnonzero(found)
    if found.size == 0 and found.dtype != np.bool_:
        found = found.astype(np.int64)
    if found.dtype.kind not in "iu" or found.ndim > 1:
        raise ValueError(
            f"{role} indices must be whole numbers, or a mask of {size} truth values, "
            f"not {found.dtype} of shape {found.shape}"
        )
    if found.size and not 0 <= int(found.min()) <= int(found.max()) < size:
        raise ValueError(f"{role} indices must lie in 0..{size - 1}; found {int(found.min())}..{int(found.max())}")
    return torch.from_numpy(np.array(found, dtype=np.int64).reshape(-1))


def free_bytes(device: torch.device) -> float:
    """Memory that can still be had, of the GPU or of this process; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = [math.inf]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # the limit of a container
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free.append(limit - used)
    with contextlib.suppress(ImportError, OSError, ValueError):  # ulimit -v and -d; not on Windows
        import resource

        pages = [int(word) * resource.getpagesize() for word in Path("/proc/self/statm").read_text().split()]
        for kind, held in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
            if (limit := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY:
                free.append(limit - held)
    return max(min(free), 0.0)


FRACTION = 0.5  # of what is free may be taken, unless told
RUNTIME = 128e6  # bytes that torch takes for itself at work: threads, workspaces, gaps in the heap (100 MB measured)


def allowed_bytes(asked: float | None, device: torch.device) -> float:
    """Memory that may be taken: as much as asked for, as far as it is free, or by default a fraction of what is.

    ValueError where there is not even what torch needs for itself.
    """
    free = free_bytes(device) - RUNTIME
    if free <= 0:
        raise ValueError(f"less than {RUNTIME / 1e6:.0f} MB of memory are free: stop what else takes memory")
    return min(asked, free) if asked else FRACTION * free


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; rename it to `path` only if the block succeeds.

    A link stays one: what it points to is replaced. ValueError for what is no file, and where a folder should be.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; choose another name")
    if other := next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None):
        raise ValueError(f"{other} is a file, where a folder is needed; choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.umask(mask := os.umask(0))  # mkstemp makes private files; a result is as the user wants files to be
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_if_whole(path: Path, read: Callable[[Path], Answer]) -> Answer | None:
    """What `read` makes of a cache file; None where there is none, or a damaged one.

    A damaged one is never trusted and never thrown away: it is renamed, and a line says so.
    """
    if not path.exists():
        return None
    try:
        return read(path)
    except (ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # each library has its own
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        print(f"{path} is damaged ({error}); kept as {aside.name}, and what was in it is computed again")
        return None


def in_use(features: Tensor) -> Tensor | slice:
    """Which columns of features (b, t, n) are ever other than zero; all, where that leaves out less than half."""
    used = features.flatten(0, 1).any(0).nonzero()[:, 0]
    return used if 2 * len(used) < features.shape[-1] else slice(None)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of any type on any device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


# ── parallel work ───────────────────────────────────────────────────────────────────────────────────────────────────


class _Shipped(Generic[Task, Answer]):
    """A callable in a file, read once by each worker process: its tasks stay as small as what they are about."""

    def __init__(self, work: Callable[[Task], Answer], folder: str) -> None:
        self.path = os.path.join(folder, "work.pkl")
        try:
            with open(self.path, "wb") as file:
                cloudpickle.dump(work, file)  # unlike pickle, it takes classes that were defined in a notebook
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise ValueError(f"model or data cannot be sent to other processes ({error}); use jobs=1") from error

    def __call__(self, task: Task) -> Answer:
        return _read_work(self.path)(task)


@lru_cache(maxsize=1)
def _read_work(path: str) -> Callable[[Any], Any]:
    """The callable in a file of `_Shipped`: ours, in a folder that only this user can write to."""
    with open(path, "rb") as file:
        return cloudpickle.load(file)


def in_parallel(
    work: Callable[[Task], Answer], tasks: Iterable[Task], jobs: int, ordered: bool = True
) -> Iterator[Answer]:
    """`work` of each of the `tasks`, `jobs` at a time through joblib, in the order of the tasks unless told otherwise.

    Worker processes get `work`, with whatever data it holds, once, by way of a file; then only the tasks travel. The
    file lies in JOBLIB_TEMP_FOLDER, where that is set: a cluster of several machines needs a folder that all can read.
    """
    pool = joblib.Parallel(n_jobs=jobs, return_as="generator" if ordered else "generator_unordered")
    if jobs == 1 or getattr(get_active_backend()[0], "supports_sharedmem", False):
        yield from pool(joblib.delayed(work)(task) for task in tasks)
        return
    with tempfile.TemporaryDirectory(prefix="influence-", dir=os.environ.get("JOBLIB_TEMP_FOLDER")) as folder:
        shipped = _Shipped(work, folder)
        yield from pool(joblib.delayed(shipped)(task) for task in tasks)
