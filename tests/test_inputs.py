"""Bad input: every mistake gets a ValueError that says what was wrong and what to do."""

import numpy as np
import pytest
import torch
from torch import nn

import notebook_support as ns
from influence_functions import InfluenceSettings, NonFiniteError, compute_influences
from influence_functions.exact import fit_softmax_regression

IMAGES, LABELS = torch.rand(6, 3, 32, 32), torch.arange(6)
DATA = (IMAGES, LABELS)


def influences(model=None, train=DATA, test=DATA, indices=(0,), **changes):
    return compute_influences(model or ns.Net(), train, test, indices, **{"device": "cpu", "samples": 6, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"damping": -0.1}, "damping must be a positive number, not -0.1"),
        ({"damping": 0.0}, "damping must be a positive"),
        ({"damping": float("nan")}, "damping must be a positive"),
        (
            {"solver": "magic"},
            "unknown solver 'magic': use one of auto, cg, ekfac, ekfac_kernel, identity, kernel, lissa",
        ),
        ({"measure": "accuracy"}, "unknown measure 'accuracy': use one of loss, margin"),
        ({"curvature": "round"}, "unknown curvature"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"jobs": 0}, "jobs must be"),
        ({"iteration": 5}, "unknown setting iteration; there are average, batch_size"),
        ({"indices": [6]}, r"test indices must lie in 0\.\.5"),
        ({"indices": [-1]}, r"test indices must lie in 0\.\.5"),
        ({"indices": []}, "no sample chosen"),
        ({"device": "toaster"}, "unknown device 'toaster'"),
        ({"train": (IMAGES[:0], LABELS[:0])}, "train is empty"),
        ({"test": (IMAGES[:0], LABELS[:0])}, "test is empty"),
        ({"train": (IMAGES, LABELS[:3])}, "6 inputs but 3 targets"),
        ({"train": (IMAGES, LABELS + 5)}, r"labels must lie in 0\.\.9, for 10 classes \(outputs\); found 5\.\.10"),
        ({"test": (IMAGES, LABELS - 1)}, "found -1"),
        ({"train": (IMAGES, LABELS.float())}, "labels must be whole numbers"),
        ({"train": (IMAGES[:, :1], LABELS)}, r"the model refuses inputs of shape \(1, 32, 32\)"),
        ({"test": (IMAGES[:, :, :20, :20], LABELS)}, r"test: the model refuses inputs of shape \(3, 20, 20\)"),
        ({"train": 3}, "train must be a pair of tensors"),
    ],
)
def test_each_mistake_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        influences(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_cuda_device_where_there_is_none():
    with pytest.raises(ValueError, match="device 'cuda' asked for"):
        influences(device="cuda")


def test_a_model_with_nan_weights():
    model = ns.Net()
    with torch.no_grad():
        model.fc2.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="weights contain NaN"):
        influences(model)


def test_a_model_that_returns_nan():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3072, 10)

        def forward(self, x):
            return torch.log(self.fc(x.flatten(1)) * 0 - 1)

    with pytest.raises(NonFiniteError, match="the model returns NaN"):
        influences(Broken())


def test_one_bad_image_is_named_by_its_index():
    images = IMAGES.clone()
    images[4, 0, 3, 3] = torch.inf
    with pytest.raises(NonFiniteError, match="training sample 4"):
        influences(train=(images, LABELS), samples=1, damping=1.0, solver="identity")
    with pytest.raises(NonFiniteError, match="gradient of a test sample"):
        influences(test=(images, LABELS), indices=[4], damping=1.0)


def test_a_model_with_nothing_to_train():
    with pytest.raises(ValueError, match="no trainable parameter"):
        influences(ns.Net().requires_grad_(False))


def test_a_model_whose_output_is_not_a_row_of_logits():
    model = nn.Sequential(nn.Conv2d(3, 10, 3))
    with pytest.raises(ValueError, match="must return logits"):
        influences(model)


def test_a_training_configuration_that_makes_no_sense():
    for wrong in ({"epochs": 0}, {"batch_size": -1}, {"peak_lr": 0.0}):
        with pytest.raises(ValueError, match="must be positive"):
            ns.TrainConfig(**wrong)


def test_a_softmax_regression_without_one_of_its_classes():
    with pytest.raises(ValueError, match="every class"):
        fit_softmax_regression(torch.rand(4, 2), torch.tensor([0, 2, 2, 0]), 0.1)


def test_a_training_that_diverges_says_what_to_lower():
    train, _ = ns.load_data("digits")
    with pytest.raises(NonFiniteError, match="lower TrainConfig"):
        ns.train_model(ns.Net(), train, ns.TrainConfig(epochs=1, peak_lr=1e12))


def test_settings_describe_themselves_for_json():
    def my_measure(outputs, labels):
        return outputs.sum(1)

    assert InfluenceSettings(measure=my_measure).describe()["measure"] == "my_measure"
    assert InfluenceSettings().describe()["measure"] == "margin"
    assert np.isfinite(influences(measure="margin").scores).all()


class Stubborn(nn.Sequential):
    """A model whose eval() does nothing."""

    def train(self, mode: bool = True) -> "Stubborn":
        return self


FLAT = (nn.Flatten(), nn.Linear(3072, 4))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(*FLAT, nn.BatchNorm1d(4, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(3, 3, 3), nn.Tanh(), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(),
                      nn.Linear(2700, 4)),
        Stubborn(*FLAT, nn.BatchNorm1d(4)),
    ],
)  # fmt: skip
def test_batch_statistics_are_refused_by_the_name_of_their_layer(model):
    brightness = torch.arange(1.0, 13.0)[:, None, None, None] ** 2  # no two samples have statistics alike
    data = (torch.randn(12, 3, 32, 32) * brightness + brightness, torch.arange(12) % 4)
    with pytest.raises(ValueError, match=r": '2' normalise by the statistics of the batch; train with track_running"):
        compute_influences(model, data, data, [0])


def test_batch_statistics_are_left_alone_where_no_sample_meets_them():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.spare = nn.Sequential(*FLAT), nn.BatchNorm1d(4, track_running_stats=False)

        def forward(self, x):
            return self.layers(x)

    data = (torch.randn(12, 3, 32, 32), torch.arange(12) % 4)
    assert compute_influences(Unused(), data, data, [0]).scores.shape == (1, 12)
