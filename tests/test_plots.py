"""Plots: helpers draw on the axes they are given, and what is saved is what is shown."""

import matplotlib

matplotlib.use("Agg")

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import notebook_support as ns
from influence_functions import Influences
from influence_functions.metrics import LDS


@pytest.fixture(scope="module")
def digits():
    return ns.load_data("digits")


def test_what_is_saved_is_what_is_displayed(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(ns, "display", shown.append)
    figure, ax = plt.subplots(figsize=(3, 2))
    ax.plot([1, 2])
    ns.show_figure(figure, tmp_path / "images/figure.png")
    assert shown[0].data == (tmp_path / "images/figure.png").read_bytes()
    assert Image.open(tmp_path / "images/figure.png").mode == "P"
    assert not plt.fignum_exists(figure.number)


def test_an_image_is_drawn_in_its_natural_colours():
    red = torch.zeros(3, 32, 32, dtype=torch.uint8)
    red[0] = 255
    ax = ns.show_image(plt.subplots()[1], red, "red")
    assert ax.images[0].get_array()[5, 5].tolist() == [255, 0, 0]
    plt.close("all")


def test_channels_are_annotated_with_every_value(digits):
    figure = ns.plot_channels(digits[0].images[3])
    for ax, channel in zip(figure.axes, digits[0].images[3].numpy()):
        assert [int(text.get_text()) for text in ax.texts] == channel.ravel().tolist()
    plt.close("all")


def test_counts_and_confusion_show_the_true_numbers(digits):
    ax = ns.plot_class_counts(plt.subplots()[1], *digits)
    heights = [bar.get_height() for bar in ax.patches]
    assert heights[:10] == torch.bincount(digits[0].labels).tolist()
    assert sum(heights) == 1797
    logits = torch.eye(3)[[0, 1, 1]]
    result = ns.Evaluation(logits, torch.tensor([0, 1, 2]), ("a", "b", "c"))
    ax = ns.plot_confusion(plt.subplots()[1], result)
    assert [text.get_text() for text in ax.texts] == ["1", "0", "0", "0", "1", "0", "0", "1", "0"]
    plt.close("all")


def test_influential_images_are_labelled_with_score_class_and_index(digits):
    train, test = digits
    scores = np.linspace(-1, 1, len(train))[None]
    influences = Influences(scores, np.array([2]), test.labels[2:3].numpy(), train.labels.numpy(), {}, None)
    figure = ns.plot_influential(influences, 0, digits, "digit 1 (90%)")
    titles = [ax.get_title() for ax in figure.axes]
    last = len(train) - 1
    assert titles[0] == f"test image 2\nlabel: {test.class_of(2)}\nmodel: digit 1 (90%)"
    assert titles[1] == f"+1\n{train.class_of(last)}\n#{last}"
    assert titles[6] == f"-1\n{train.class_of(0)}\n#0"
    assert len(titles) == 11
    assert not any(ax.patches for ax in figure.axes)
    plt.close("all")


def test_stability_is_written_below_each_image_and_unstable_ones_are_framed(digits):
    train, test = digits
    scores = np.linspace(-1, 1, len(train))[None]
    influences = Influences(scores, np.array([2]), test.labels[2:3].numpy(), train.labels.numpy(), {}, None)
    counts = pd.DataFrame(
        {"test_index": 2, "kind": "helpful", "train_index": [len(train) - 1, len(train) - 2], "found_by": [4, 1]}
    ).assign(models=5)
    figure = ns.plot_influential(influences, 0, digits, "digit 1 (90%)", counts)
    texts = [[text.get_text() for text in ax.texts if "found" in text.get_text()] for ax in figure.axes[1:]]
    assert texts == [["found by 80%"], ["found by 20%"], *[["found by 0%"]] * 8]
    assert [bool(ax.patches) for ax in figure.axes] == [False, False, *[True] * 9]
    other = dataclasses.replace(influences, test_indices=np.array([3]))
    figure = ns.plot_influential(other, 0, digits, "digit 1 (90%)", counts)
    assert not any("found" in text.get_text() for ax in figure.axes for text in ax.texts), "never measured"
    plt.close("all")


def test_predictions_removals_and_scores_are_drawn_as_given():
    pairs = {"a": (np.array([1.0, 2.0]), np.array([1.5, 2.5])), "b": (np.array([-1.0]), np.array([0.0]))}
    ax = ns.plot_predicted_actual(plt.subplots()[1], pairs)
    assert ax.collections[0].get_offsets().tolist() == [[1.0, 1.5], [2.0, 2.5]]
    assert ax.lines[0].get_xydata().tolist() == [[-1.0, -1.0], [2.5, 2.5]]
    outcomes = pd.DataFrame(
        [(kind, k, k * sign + d) for kind, sign in (("helpful", 1), ("harmful", -1), ("random", 0))
         for k in (10, 50) for d in (-1, 1)], columns=["kind", "k", "change"],
    )  # fmt: skip
    ax = ns.plot_removals(plt.subplots()[1], outcomes, noise=0.5)
    assert [container[0].get_ydata().tolist() for container in ax.containers] == [[10, 50], [-10, -50], [0, 0]]
    score = LDS(0.3, 0.2, 0.4, np.array([0.3]), np.array([0.3]))
    ax = ns.plot_scores_with_interval(plt.subplots()[1], [1, 2], [score, score], "x", "red")
    assert ax.lines[0].get_ydata().tolist() == [0.3, 0.3]
    plt.close("all")


def test_histogram_and_row(digits):
    own = np.arange(100) < 30
    ax = ns.plot_score_histogram(plt.subplots()[1], np.linspace(-1, 1, 100), own, "title")
    assert ax.get_yscale() == "log"
    figure = ns.plot_image_row(digits[0], [4, 5], ["first", "second"], "black")
    assert figure.axes[1].get_title() == f"second\n{digits[0].class_of(5)} #5"
    plt.close("all")
