"""What influence is the influence on: one `Measure` object a task.

A measure says how bad the outputs of a model are for each sample, how to draw a target from the model's own
prediction, so that the curvature is the true Fisher matrix (Martens 2020, JMLR, section 9), and which targets it takes.
A task of your own is one more object:

>>> def poisson(outputs, counts):  # a log rate (b, 1) and how often it happened (b,) → nats, up to a constant
...     return outputs[:, 0].exp() - counts * outputs[:, 0]
>>> def draw(outputs, counts, uniform):  # how many counts have a cumulated probability below `uniform` (b, 1)?
...     below = torch.special.gammaincc(torch.arange(1.0, 100.0), outputs.exp()) < uniform
...     return below.sum(1).to(counts)
>>> poisson = Measure("poisson", poisson, draw)
>>> as_measure(poisson).name
'poisson'
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Values = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[Tensor, Tensor, Tensor], Tensor]
Check = Callable[[Tensor, Tensor], None]


def _accept_all(outputs: Tensor, targets: Tensor) -> None:
    pass


@dataclass(frozen=True)
class Measure:
    """What to measure on each sample; lower is better.

    values  (outputs (b, …), targets (b, …)) → (b,)
    draw    (outputs (b, …), targets (b, …), uniform (b, k)) → targets (b, …) drawn from the model's own prediction, by
            inverting its distribution at `uniform`: float64 numbers in 0..1 on the CPU, k of them where a target holds
            k numbers, so that a draw belongs to its sample whatever the batch. None: the given targets are used
    check   (outputs of one sample (1, …), targets (b, …)) → ValueError where these targets are not for such outputs
    """

    name: str
    values: Values
    draw: Draw | None = None
    check: Check = _accept_all


def as_measure(measure: str | Measure | Values) -> Measure:
    """The measure of that name, the measure itself, or one that is made of a function (outputs, targets) → (b,)."""
    if isinstance(measure, Measure):
        return measure
    if isinstance(measure, str):
        if measure not in MEASURES:
            raise ValueError(f"unknown measure {measure!r}: use one of {', '.join(MEASURES)}, or your own Measure")
        return MEASURES[measure]
    if isinstance(measure, type) or not callable(measure):
        raise ValueError(f"measure must be a name, a Measure or a function (outputs, targets) → (b,), not {measure!r}")
    return Measure(getattr(measure, "__name__", "own"), measure)


# ── classes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_labels(labels: Tensor, classes: int) -> None:
    """ValueError unless `labels` are whole numbers (n,) in 0..classes − 1."""
    if labels.is_floating_point() or labels.ndim != 1:
        hint = "; pass labels.squeeze(1)" if labels.ndim == 2 and labels.shape[1] == 1 else ""
        raise ValueError(
            f"labels must be whole numbers, (n,), not {labels.dtype} (n, *{tuple(labels.shape[1:])}){hint}"
        )
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or high >= classes:
        hint = "; leave samples without a label out" if low < 0 else ""
        raise ValueError(
            f"labels must lie in 0..{classes - 1}, for {classes} classes (outputs); found {low}..{high}{hint}"
        )


def _check_classes(outputs: Tensor, targets: Tensor) -> None:
    if outputs.ndim != 2:
        raise ValueError(
            f"the model must return logits (b, C), not {tuple(outputs.shape)}; for numbers, pass "
            "measure='squared_error' or 'binary', for sequences or pixels 'tokens', else a measure of your own"
        )
    if outputs.shape[1] == 1:
        raise ValueError("the model returns one number a sample; pass measure='binary' or 'squared_error'")
    check_labels(targets, outputs.shape[1])


def _check_classes_or_probabilities(outputs: Tensor, targets: Tensor) -> None:
    """As F.cross_entropy takes them: whole numbers (b,), or a probability for each class (b, C)."""
    if not (targets.is_floating_point() and outputs.ndim == 2 and targets.shape[1:] == outputs.shape[1:]):
        _check_classes(outputs, targets)
    elif not bool(((targets >= 0) & (targets <= 1)).all()):
        raise ValueError("labels of one number a class must be probabilities in 0..1")


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(b,) nats: logits (b, C), labels (b,) or probabilities (b, C)."""
    return F.cross_entropy(logits, labels, reduction="none")


def _draw_class(logits: Tensor, uniform: Tensor) -> Tensor:
    """(…,) classes from the softmax of logits (…, C), at uniform (…,); float64 on the CPU, as not all devices can."""
    cumulated = logits.softmax(-1).cpu().double().cumsum(-1)
    drawn = torch.searchsorted(cumulated, uniform[..., None].contiguous()).squeeze(-1)
    return drawn.clamp_max(logits.shape[-1] - 1).to(logits.device)


def _draw_label(logits: Tensor, labels: Tensor, uniform: Tensor) -> Tensor:
    drawn = _draw_class(logits, uniform[:, 0])
    return F.one_hot(drawn, logits.shape[1]).to(labels) if labels.is_floating_point() else drawn


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """(b,) −log(p_y / (1 − p_y)): the margin of TRAK (Park et al. 2023, arXiv:2303.14186), negated: lower is better."""
    right = logits.gather(1, labels[:, None]).squeeze(1)
    others = torch.zeros_like(logits).scatter(1, labels[:, None], -torch.inf)
    return torch.logsumexp(logits + others, dim=1) - right


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _like(outputs: Tensor, targets: Tensor) -> Tensor:
    """Outputs (b, k) or (b, 1) in the shape of targets (b, k) or (b,)."""
    return outputs.reshape(targets.shape)


def _check_numbers(outputs: Tensor, targets: Tensor) -> None:
    if outputs.ndim == 0 or len(outputs) != 1:
        raise ValueError("for a batch of one sample the model drops the batch axis; let it squeeze(-1), not squeeze()")
    wanted, given = ([size for size in part.shape[1:] if size > 1] for part in (outputs, targets))
    if wanted != given and len(targets):
        counts = math.prod(wanted), math.prod(given)
        what = f"{counts[0]} numbers" if counts[0] != counts[1] else f"numbers of shape {tuple(outputs.shape[1:])}"
        held = counts[1] if counts[0] != counts[1] else f"them as {tuple(targets.shape[1:])}"
        raise ValueError(f"the model returns {what} a sample, but each target holds {held}; they must pair up")


def _check_binary(outputs: Tensor, targets: Tensor) -> None:
    _check_numbers(outputs, targets)
    if not bool(((targets >= 0) & (targets <= 1)).all()):
        raise ValueError(f"binary targets must lie in 0..1; found {float(targets.min())}..{float(targets.max())}")


def _squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """(b,) Σ (output − target)² / 2: the negative log-likelihood of a Gaussian of variance 1, less a constant."""
    squares = (_like(outputs, targets) - targets).square() / 2
    return squares.reshape(len(squares), -1).sum(1)


def _draw_number(outputs: Tensor, targets: Tensor, uniform: Tensor) -> Tensor:
    noise = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12)).to(outputs)
    return _like(outputs, targets) + noise.reshape(targets.shape)


def _binary(outputs: Tensor, targets: Tensor) -> Tensor:
    """(b,) nats: cross-entropy of logits (b,), (b, 1) or (b, k) with targets (b,) or (b, k) in 0..1, summed over k."""
    logits = _like(outputs, targets)
    losses = F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="none")
    return losses.reshape(len(losses), -1).sum(1)


def _draw_binary(outputs: Tensor, targets: Tensor, uniform: Tensor) -> Tensor:
    heads = uniform.reshape(targets.shape) < _like(outputs, targets).sigmoid().cpu().double()
    return heads.to(targets)


# ── sequences ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_tokens(ignore_index: int, outputs: Tensor, targets: Tensor) -> None:
    if outputs.ndim != 3 or targets.ndim != 2:
        shapes = f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"the measure 'tokens' wants logits (b, t, V) and targets (b, t), not {shapes}")
    check_labels(targets[targets != ignore_index], outputs.shape[2])


def _token_loss(ignore_index: int, logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.mT, targets, reduction="none", ignore_index=ignore_index)  # (b, V, t) → (b, t)
    return losses.sum(1)


def _draw_tokens(ignore_index: int, logits: Tensor, targets: Tensor, uniform: Tensor) -> Tensor:
    return torch.where(targets == ignore_index, targets, _draw_class(logits, uniform))


def tokens_measure(ignore_index: int = -100) -> Measure:
    """Cross-entropy in nats of logits (b, t, V) with targets (b, t), summed over the positions that are not ignored.

    Nothing is shifted: for a model that foretells the next token, pass as targets the inputs moved by one, the last
    position ignored. A class for each pixel is this measure after logits.flatten(2).mT and labels.flatten(1).

    >>> tokens_measure(ignore_index=0).name
    'tokens'
    """
    return Measure(
        "tokens",
        partial(_token_loss, ignore_index),
        partial(_draw_tokens, ignore_index),
        partial(_check_tokens, ignore_index),
    )


MEASURES: dict[str, Measure] = {
    "loss": Measure("loss", _cross_entropy, _draw_label, _check_classes_or_probabilities),
    # No draw: the second moment of the margin's gradients at the given labels foretells retraining best (measured).
    "margin": Measure("margin", _margin, None, _check_classes),
    "squared_error": Measure("squared_error", _squared_error, _draw_number, _check_numbers),
    "binary": Measure("binary", _binary, _draw_binary, _check_binary),
    "tokens": tokens_measure(),
}
"""By name: loss and margin (classes), squared_error, binary (numbers), tokens (sequences)."""
