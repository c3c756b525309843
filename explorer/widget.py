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

from influence_functions.data import as_source, call, moved
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
    they were computed on; images of any size, with one or three channels. model: the model, or the list of them in the
    order of their influences (which nobody can check), for what they say of the test images: right and wrong answers
    and the confusion matrix need it. Several models of one `Influences`, which averages over them, are averaged too.

    Raises FileNotFoundError for a missing file, ValueError where scores, data and models do not belong together.
    """
    labels, trainings = open_trainings(influences)
    models = [] if model is None else models_of(model)
    if models and len(models) != len(trainings) != 1:
        raise ValueError(f"there are influences of {len(trainings)} trainings and {len(models)} models: one for each")
    said = probabilities_of(models, test, labels.test_indices) if models else None
    if said is not None and len(trainings) == 1:
        said = said.mean(0, keepdims=True)
    return Explorer(gather(influences, train, test, said, extras))


def probabilities_of(models: Sequence[nn.Module], test: Any, indices: NDArray[np.int64]) -> NDArray[np.float32]:
    """(t, m, C) softmax of what each model says of the test samples at `indices`; the models stay as they are."""
    source, found = as_source(test, "test"), []
    for model in models:
        private = private_copy(model, torch.device("cpu"))
        like = next(private.parameters())
        with torch.no_grad():
            parts = torch.from_numpy(indices).split(CHUNK)
            outputs = torch.cat([call(private, moved(source.batch(part)[0], like)) for part in parts])
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise ValueError(
                f"the explorer understands models of two classes or more, which give (samples, classes), not "
                f"{tuple(outputs.shape)}; leave model= out"
            )
        found.append(outputs.float().softmax(1).numpy())
    return np.stack(found)
