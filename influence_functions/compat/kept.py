"""What a run keeps on the way: finished test samples until all are done, and with `save_pth` s_test and gradients."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._support import CorruptFileError, NonFiniteError, atomic_path, read_if_whole

KEPT_RANKS = 500  # of the harmful and the helpful ones in a results file, as in the package


def entry_text(entry: dict[str, Any]) -> str:
    """An entry as JSON: influences in as few digits as give back the very same numbers, 15 bytes each in float32."""
    about = json.dumps({name: value for name, value in entry.items() if name != "influence"})
    return f'{{"influence": [{", ".join(map(str, entry["influence"]))}], {about[1:]}'


@dataclass(frozen=True)
class Parts:
    """A folder of finished test samples, a file each: 4 bytes a training sample (in float32)."""

    folder: Path

    def path(self, index: int) -> Path:
        return self.folder / f"{index}.npz"

    def write(self, index: int, label: int, seconds: float, residual: float, influence: NDArray[Any]) -> None:
        """`influence` (n,) has the package's sign."""
        with atomic_path(self.path(index)) as temporary, temporary.open("wb") as file:
            np.savez(file, influence=influence, label=label, seconds=seconds, residual=residual)

    def finished(self, index: int) -> bool:
        """Whether a test sample is there, whole."""
        return read_if_whole(self.path(index), _arrays) is not None

    def read(self, index: int) -> dict[str, Any] | None:
        """The entry of a finished test sample, as the package names its parts; None when it is not, or damaged.

        Beyond the package's: "residual", the relative residual of its solution; "influence" is an array (n,).
        """
        found = read_if_whole(self.path(index), _arrays)
        if found is None:
            return None
        influence = found["influence"]
        return {
            "label": found["label"].item(),
            "num_in_dataset": index,
            "time_calc_influence_s": found["seconds"].item(),
            "residual": found["residual"].item(),
            "influence": influence,
            "harmful": np.argsort(-influence, kind="stable")[:KEPT_RANKS].tolist(),
            "helpful": np.argsort(influence, kind="stable")[:KEPT_RANKS].tolist(),
        }

    def clear(self) -> None:
        """Remove the folder; what was damaged is put beside it."""
        for damaged in self.folder.glob("*.damaged"):
            damaged.replace(self.folder.with_name(f"{self.folder.name}-{damaged.name}"))
        shutil.rmtree(self.folder)


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in ("influence", "label", "seconds", "residual")}


@dataclass(frozen=True)
class Kept:
    """A folder of safetensors files that hold a tensor called `name` each, all `made_with` the same.

    `made_with` names the model, the data and the settings; files of others are refused.
    """

    folder: Path
    name: str
    made_with: str

    def path(self, stem: object) -> Path:
        return self.folder / f"{stem}.safetensors"

    def write(self, stem: object, tensor: Tensor, role: str, **about: object) -> None:
        """`role`: test or training, for messages; `about`: plain values that ride in the header."""
        file, size = self.path(stem), tensor.numel() * tensor.element_size()
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(f"the gradient of a {role} sample is NaN or infinite; check the sample's values")
        file.parent.mkdir(parents=True, exist_ok=True)
        if size > shutil.disk_usage(file.parent).free:
            raise OSError(f"no room for {file} ({size / 1e9:.1f} GB); choose another save_pth, or None")
        header = {"made_with": self.made_with, **{key: str(value) for key, value in about.items()}}
        with atomic_path(file) as temporary:
            save_file({self.name: tensor.cpu().contiguous()}, str(temporary), metadata=header)

    def read(self, stem: object) -> tuple[Tensor, dict[str, str]]:
        """The tensor, and its header; ValueError when it is of another model, data set or configuration."""
        file = self.path(stem)
        try:
            with safe_open(str(file), framework="pt") as content:
                header, tensor = content.metadata() or {}, content.get_tensor(self.name)
        except SafetensorError as error:
            raise CorruptFileError(f"{file} is damaged ({error}); delete it, and it is computed again") from error
        if header.get("made_with") != self.made_with:
            raise ValueError(
                f"{file} is of another model, data set or configuration; choose another save_pth, or delete the file"
            )
        return tensor, header
