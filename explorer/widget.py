"""The explorer in a notebook: the very modules of the page, fed by the kernel."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import anywidget
import numpy as np
import torch
import traitlets
from numpy.typing import NDArray
from torch import nn

from influence_functions.data import as_source
from influence_functions.private import private_copy
from influence_functions.scores import Models, models_of

from .bundle import WEB, bundle
from .payload import Extras, Payload, gather
from .pictures import CHUNK
from .sources import Given, open_trainings


class Explorer(anywidget.AnyWidget):
    """A `Payload` to click in; where no JavaScript runs, its still picture.

    state: what is shown, as the address of the page says it ("view=photograph&test=25"); read it, or set it.
    """

    _esm = bundle("widget.js")
    _css = (WEB / "style.css").read_text(encoding="utf-8")
    data = traitlets.Dict().tag(sync=True)
    test_sheets = traitlets.List(traitlets.Bytes()).tag(sync=True)
    train_sheets = traitlets.List(traitlets.Bytes()).tag(sync=True)
    state = traitlets.Unicode("").tag(sync=True)

    def __init__(self, payload: Payload, **options: Any) -> None:
        super().__init__(
            data=payload.data,
            test_sheets=payload.test.files,
            train_sheets=payload.train.files,
            **options,
        )
        self.still = payload.still

    def _repr_mimebundle_(self, **options: Any) -> Any:
        found = super()._repr_mimebundle_(**options)
        views, about = found if isinstance(found, tuple) else (found or {}, {})
        still = {"image/png": base64.b64encode(self.still).decode(), "text/plain": "influence explorer"}
        return {**views, **still}, about


def explore(
    influences: Given | Sequence[Given],
    train: Any,
    test: Any,
    model: Models | None = None,
    extras: Extras | None = None,
) -> Explorer:
    """The explorer of some influences, in the notebook: click a test image, see which training images taught it.

    influences: of `compute_influences`; or a list of them (or of files that `Influences.save` wrote), one for each of
    several trainings, which adds the slider and the counts of how many trainings agree. train, test: the data that
    they were computed on; images of any size, with one or three channels. model: the model, or the list of them, for
    what they say of the test images, which right and wrong answers and the confusion matrix need.

    Raises FileNotFoundError for a missing file, ValueError where scores, data and models do not belong together.
    """
    labels, trainings = open_trainings(influences)
    models = [] if model is None else models_of(model)
    if models and len(models) != len(trainings):
        raise ValueError(
            f"there are influences of {len(trainings)} trainings and {len(models)} models: pass one for each"
        )
    said = probabilities_of(models, test, labels.test_indices) if models else None
    return Explorer(gather(influences, train, test, said, extras))


def probabilities_of(models: Sequence[nn.Module], test: Any, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    """(t, m, C) softmax of what each model says of the test samples at `indices`; the models stay as they are."""
    source, found = as_source(test, "test"), []
    for model in models:
        private = private_copy(model, torch.device("cpu"))
        with torch.no_grad():
            parts = [_outputs(private, source.batch(part)[0]) for part in torch.from_numpy(indices).split(CHUNK)]
        found.append(torch.cat(parts).softmax(1).numpy())
    return np.stack(found)


def _outputs(model: nn.Module, inputs: Any) -> torch.Tensor:
    """(b, C) logits of images."""
    if not isinstance(inputs, torch.Tensor):
        raise ValueError(f"test inputs must be one image each, to be shown, not {type(inputs).__name__}")
    outputs = model(inputs.to(next(model.parameters()).dtype))
    if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2:
        raise ValueError("the explorer understands models that give a tensor (samples, classes); leave model= out")
    return outputs.float()
