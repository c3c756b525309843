"""Plots: helpers draw on the axes they are given, and what is saved is what is shown."""

import matplotlib

matplotlib.use("Agg")

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import of_notebook
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


@pytest.mark.parametrize(("content", "dots"), [("chart", 200), ("photograph", 100), ("crowded chart", 100)])
def test_a_chart_is_sharp_unless_its_file_grows_large(content, dots, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(ns, "display", shown.append)
    figure, ax = plt.subplots(figsize=(3, 2))
    random = np.random.default_rng(0)
    if content == "photograph":
        ax.imshow(random.random((4, 4)))
    else:
        many = 30_000 if content == "crowded chart" else 3
        ax.scatter(*random.random((2, many)), s=1, c=random.random((many, 3)))
    ns.show_figure(figure, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size == (3 * dots, 2 * dots)
    assert shown[0].width == (300 if dots == 200 else None)  # a sharp one is not displayed larger


def test_an_image_is_drawn_in_its_natural_colours():
    red = torch.zeros(3, 32, 32, dtype=torch.uint8)
    red[0] = 255
    ax = ns.show_image(plt.subplots()[1], red, "red")
    assert ax.images[0].get_array()[5, 5].tolist() == [255, 0, 0]
    plt.close("all")


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [(0.0057, 4, "+0.0057"), (-0.006, 4, "−0.0060"), (-0.00004, 4, "0.0000"), (0, 1, "0.0"), (-4.71, 1, "−4.7")],
)
def test_a_signed_number_has_a_real_minus_and_its_digits(value, decimals, text):
    assert ns.signed(value, decimals) == text


def test_influential_images_are_labelled_with_score_class_and_index(digits):
    train, test = digits
    scores = np.linspace(-1, 1, len(train))[None]
    influences = Influences(scores, np.array([2]), test.labels[2:3].numpy(), train.labels.numpy(), {}, None)
    figure = ns.plot_influential(influences, 0, digits, "digit 1 (90%)")
    titles = [ax.get_title() for ax in figure.axes]
    last = len(train) - 1
    assert titles[0] == f"test image 2\nlabel: {test.class_of(2)}\nmodel: digit 1 (90%)"
    assert titles[1] == f"+1.0\n{train.class_of(last)}\n#{last}"
    assert titles[6] == f"−1.0\n{train.class_of(0)}\n#0"
    assert len(titles) == 11
    assert not any(ax.patches for ax in figure.axes)
    plt.close("all")


def test_below_each_image_stands_who_else_finds_it_and_what_holds_is_framed(digits):
    train, test = digits
    scores = np.linspace(-1, 1, len(train))[None]
    influences = Influences(scores, np.array([2]), test.labels[2:3].numpy(), train.labels.numpy(), {}, None)
    counts = pd.DataFrame(
        {"test_index": 2, "kind": "helpful", "train_index": [len(train) - 1, len(train) - 2], "found_by": [3, 2]}
    ).assign(models=5)
    figure = ns.plot_influential(influences, 0, digits, "digit 1 (90%)", counts)
    texts = [[text.get_text() for text in ax.texts if " of " in text.get_text()] for ax in figure.axes[1:]]
    assert texts == [["3 of 5"], ["2 of 5"], *[["0 of 5"]] * 8]
    assert [bool(ax.patches) for ax in figure.axes] == [False, True, *[False] * 9]
    other = dataclasses.replace(influences, test_indices=np.array([3]))
    figure = ns.plot_influential(other, 0, digits, "digit 1 (90%)", counts)
    assert not any(" of " in text.get_text() for ax in figure.axes for text in ax.texts), "never measured"
    plt.close("all")


def test_scores_are_drawn_as_given():
    score = LDS(0.3, 0.2, 0.4, np.array([0.3]), np.array([0.3]))
    ax = plt.subplots()[1]
    of_notebook("retraining.ipynb").plot_scores_with_interval(ax, [1, 2], [score, score], "x", "red")
    assert ax.lines[0].get_ydata().tolist() == [0.3, 0.3]
    plt.close("all")


def test_a_row_of_images_names_each(digits):
    figure = ns.plot_image_row(digits[0], [4, 5], ["first", "second"], "black")
    assert figure.axes[1].get_title() == f"second\n{digits[0].class_of(5)} #5"
    plt.close("all")
