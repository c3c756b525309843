"""Labels made wrong on purpose, what finds them, and every mistake named."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

import notebook_support as ns
from influence_functions import metrics

CONFIG = ns.TrainConfig(epochs=1, batch_size=32, peak_lr=0.02)


@pytest.fixture(scope="module")
def digits():
    train, test = ns.load_data("digits")
    return train.subset(range(300)), test.subset(range(60))


# ── making labels wrong ─────────────────────────────────────────────────────────────────────────────────────────────


def test_exactly_the_listed_labels_are_wrong():
    labels = torch.arange(1000) % 10
    wrong, flipped = ns.corrupt_labels(labels, 10, 0.1, seed=3)
    assert len(flipped) == 100
    assert torch.where(wrong != labels)[0].tolist() == flipped.tolist() == sorted(set(flipped.tolist()))
    assert labels.tolist() == (torch.arange(1000) % 10).tolist(), "the labels passed in must stay as they are"
    again, _ = ns.corrupt_labels(labels, 10, 0.1, seed=3)
    other, _ = ns.corrupt_labels(labels, 10, 0.1, seed=4)
    assert torch.equal(again, wrong)
    assert not torch.equal(other, wrong)


def test_a_flip_goes_to_every_other_class_alike():
    wrong, flipped = ns.corrupt_labels(torch.zeros(9000, dtype=torch.long), 4, 1.0)
    assert len(flipped) == 9000
    counts = torch.bincount(wrong, minlength=4).tolist()
    assert counts[0] == 0
    assert all(abs(count - 3000) < 200 for count in counts[1:])  # 200 are more than four standard deviations


def test_swaps_touch_their_classes_only_and_go_to_the_partner():
    labels = torch.arange(1000) % 10
    wrong, flipped = ns.corrupt_labels(labels, 10, 0.1, swaps=((3, 5), (9, 1)))
    pairs = set(zip(labels[flipped].tolist(), wrong[flipped].tolist()))
    assert len(flipped) == 100
    assert pairs == {(3, 5), (5, 3), (9, 1), (1, 9)}


def test_nothing_and_everything_can_be_wrong():
    labels = torch.arange(20) % 2
    assert torch.equal(ns.corrupt_labels(labels, 2, 0.0)[0], labels)
    assert torch.equal(ns.corrupt_labels(labels, 2, 1.0)[0], 1 - labels)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fraction": 1.5}, r"fraction must lie in 0\.\.1, not 1\.5"),
        ({"fraction": -0.1}, r"fraction must lie in 0\.\.1"),
        ({"fraction": float("nan")}, r"fraction must lie in 0\.\.1"),
        ({"classes": 1, "labels": torch.zeros(9, dtype=torch.long)}, "one class only"),
        ({"classes": 2}, r"labels must lie in 0\.\.1"),
        ({"labels": torch.ones(9)}, "whole numbers"),
        ({"swaps": ((1, 1),)}, "two different classes"),
        ({"swaps": ((1, 7),)}, r"classes in 0\.\.2"),
        ({"swaps": ((0, 1), (1, 2))}, "one swap only"),
        ({"fraction": 0.9, "swaps": ((0, 1),)}, "only 6 images are of these classes"),
    ],
)
def test_each_mistake_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        ns.corrupt_labels(**{"labels": torch.arange(9) % 3, "classes": 3, "fraction": 0.5, **arguments})


def test_labels_of_the_wrong_length_or_kind(digits):
    train, _ = digits
    changed = train.with_labels((train.labels + 1) % 10)
    assert changed.images is train.images
    assert changed.fingerprint != train.fingerprint
    with pytest.raises(ValueError, match=r"shape \(300,\), not \(299,\)"):
        train.with_labels(train.labels[1:])
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.9"):
        train.with_labels(train.labels + 1)


# ── what finds them ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_detection_by_hand():
    suspicion, flipped = np.array([0.1, 0.9, 0.5, 0.8, 0.2]), np.array([1, 2])
    inspected, found = metrics.detection_curve(suspicion, flipped)  # in the order 1, 3, 2, 4, 0
    assert inspected.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert found.tolist() == [0, 0.5, 0.5, 1, 1, 1]
    quality = metrics.detection_quality(suspicion, flipped, inspected=0.2)
    # pairs (wrong, right) in the right order: 0.9 beats three, 0.5 beats two of 3; precision 1/1 and 2/3 at the hits
    assert quality == pytest.approx({"ROC AUC": 5 / 6, "average precision": (1 + 2 / 3) / 2, "found": 0.5})


def test_detection_by_chance_and_by_an_oracle():
    generator, flipped = np.random.default_rng(0), np.arange(0, 5000, 10)
    chance = metrics.detection_quality(generator.random(5000), flipped)
    assert chance == pytest.approx({"ROC AUC": 0.5, "average precision": 0.1, "found": 0.1}, abs=0.05)
    oracle = np.isin(np.arange(5000), flipped).astype(float)
    assert metrics.detection_quality(oracle, flipped) == {"ROC AUC": 1, "average precision": 1, "found": 1}
    assert metrics.detection_quality(-oracle, flipped)["ROC AUC"] == 0


@pytest.mark.parametrize(
    ("suspicion", "flipped", "words"),
    [
        (np.array([1.0, np.nan]), np.array([0]), "finite"),
        (np.zeros((2, 2)), np.array([0]), "one finite number an image"),
        (np.zeros(2), np.array([], dtype=int), "at least one index"),
        (np.zeros(2), np.array([2]), r"must lie in 0\.\.1"),
        (np.zeros(2), np.array([0, 1]), "every label is flipped"),
    ],
)
def test_detection_needs_something_to_rank_and_to_find(suspicion, flipped, words):
    with pytest.raises(ValueError, match=words):
        metrics.detection_quality(suspicion, flipped)


def test_inspecting_a_share_that_is_none():
    with pytest.raises(ValueError, match="inspected must be a fraction"):
        metrics.detection_quality(np.arange(3.0), np.array([0]), inspected=0)


def test_the_interval_of_a_mean_by_hand():
    mean, half = metrics.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t of 2 degrees of freedom
    with pytest.raises(ValueError, match="two runs"):
        metrics.mean_interval([1.0])


def test_out_of_fold_models_have_not_seen_what_they_judge(digits, tmp_path, monkeypatch):
    train, _ = digits
    seen, original = [], ns.train_models

    def watched(trains, *rest):
        seen.extend(trains)
        return original(trains, *rest)

    monkeypatch.setattr(ns, "train_models", watched)
    (found,) = ns.out_of_fold_probabilities([train], CONFIG, tmp_path, folds=3, jobs=1)
    assert found.shape == (300, 10)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    # every image is missing from exactly one fold's training data, and its row is that fold's model's answer
    hashes = [{image.numpy().tobytes() for image in part.images} for part in seen]
    for index in (0, 7, 299):
        image = train.images[index].numpy().tobytes()
        (fold,) = [number for number, part in enumerate(hashes) if image not in part]
        (training,) = original(seen[fold], CONFIG, [0], tmp_path)
        answer = ns.evaluate(training.model, train.subset([index])).probabilities[0].numpy()
        np.testing.assert_allclose(found[index], answer, rtol=1e-4)


def test_probabilities_are_the_mean_over_epochs_and_over_both_ways_round(digits):
    train, _ = digits
    config = ns.TrainConfig(epochs=2, batch_size=32, model="ConvNet-8", mirror=True)
    training = ns.train_once(train.subset(range(100)), config, checkpoints=(1, 2))
    part = train.subset(range(100, 120))
    found = ns.mean_probabilities(training, part, config)
    answers = [
        training.checkpoints[epoch](ns.normalise(images)).softmax(1)
        for epoch in (1, 2)
        if training.checkpoints[epoch].eval()
        for images in (part.images, part.images.flip(3))
    ]
    np.testing.assert_allclose(found, torch.stack(answers).mean(0).detach().numpy(), rtol=1e-4, atol=1e-6)
    assert np.abs(found - answers[0].detach().numpy()).max() > 1e-3, "one answer alone is another"
    plain = dataclasses.replace(config, mirror=False)
    alone = ns.mean_probabilities(ns.Training(training.model, training.history), part, plain)
    np.testing.assert_allclose(alone, ns.evaluate(training.model, part).probabilities, rtol=1e-5)


def test_probabilities_of_a_mixed_training_are_asked_in_bfloat16(digits):
    train, config = digits[0].subset(range(64)), ns.TrainConfig(epochs=1, model="ConvNet-8", mixed=True)
    training = ns.train_once(train, config)
    mixed = ns.mean_probabilities(training, train, config)
    exact = ns.evaluate(training.model, train).probabilities.numpy()
    assert mixed.dtype == np.float32
    assert 0 < np.abs(mixed - exact).max() < 0.05
    np.testing.assert_allclose(mixed.sum(1), 1, rtol=1e-5)


def test_margins_by_hand_of_logits_and_of_probabilities_alike():
    logits = torch.tensor([[2.0, 0.5, 1.0], [0.0, 3.0, 4.0]])
    labels = torch.tensor([0, 1])
    np.testing.assert_allclose(ns.label_margins(logits, labels), [-1.0, 1.0])
    np.testing.assert_allclose(ns.label_margins(logits.softmax(1).log(), labels), [-1.0, 1.0], rtol=1e-5)


def test_every_score_of_a_trained_model_finds_wrong_labels_better_than_chance(digits, tmp_path):
    train, test = digits
    wrong, flipped = ns.corrupt_labels(train.labels, 10, 0.1)
    noisy, config = train.with_labels(wrong), ns.TrainConfig(epochs=10, batch_size=32, peak_lr=0.02)
    training = ns.train_once(noisy, config, checkpoints=(6, 8))
    (probabilities,) = ns.out_of_fold_probabilities([noisy], config, tmp_path, jobs=1)
    table = ns.suspicion_scores(training, noisy, test, probabilities)
    assert len(table.columns) == 12
    assert set(table.attrs["seconds"]) == set(table.columns)
    found = {name: metrics.detection_quality(table[name].to_numpy(), flipped)["ROC AUC"] for name in table}
    assert found.pop("random") < 0.65
    assert min(found.values()) > 0.65, found  # the signs are right: turned round, these would be below 0.35
    result = ns.evaluate(training.model, noisy)
    np.testing.assert_array_equal(table["margin"] > 0, result.predictions != result.labels)


def test_probabilities_of_other_data_are_refused(digits):
    train, test = digits
    with pytest.raises(ValueError, match=r"probabilities must be \(300, 10\), not \(299, 10\)"):
        ns.suspicion_scores(ns.Training(ns.Net(), pd.DataFrame()), train, test, np.full((299, 10), 0.1))


def test_suspects_are_ranked_and_say_why(digits):
    train, _ = digits
    train = train.subset(range(5)).with_labels(torch.tensor([0, 1, 2, 3, 4]))
    suspicion = pd.DataFrame({"loss": [1.0, 5.0, 4.0, 3.0, 2.0], "margin": [5.0, 1.0, 2.0, 3.0, 4.0]})
    probabilities = np.eye(10)[[0, 7, 8, 3, 9]] * 0.9 + 0.01
    probabilities[2] = [0.04, 0.02, 0.3, 0.02, 0.02, 0.02, 0.02, 0.02, 0.5, 0.04]
    pair = {"set_a": "test", "index_a": 3, "label_a": "digit 9", "set_b": "train", "index_b": 4, "label_b": "digit 4"}
    same = {**pair, "set_a": "train", "index_a": 1, "label_a": "digit 4"}
    table = ns.list_suspects(train, suspicion, probabilities, pd.DataFrame([pair, same]), "loss", 4)
    assert table["index"].tolist() == [1, 2, 3, 4]
    assert table["given"].tolist() == ["digit 1", "digit 2", "digit 3", "digit 4"]
    assert table["suggested"].tolist() == ["digit 7", "digit 8", "digit 3", "digit 9"]
    assert table["score"].tolist() == [5, 4, 3, 2]
    assert table["rank loss"].tolist() == [1, 2, 3, 4]
    assert table["rank margin"].tolist() == [5, 4, 3, 2]
    assert table["given_probability"].tolist() == pytest.approx([0.01, 0.3, 0.91, 0.01])
    for reason, words in zip(
        table["reason"],
        ("wrong label? looks like: digit 7", "ambiguous", "unusual", "near-duplicate of test #3, a digit 9"),
    ):
        assert words in reason


def test_each_score_has_a_look_of_its_own():
    names = [*ns.SCORE_COLOURS, "loss, on the way", "influence, on the way"]
    looks = {name: ns.score_look(name) for name in names}
    assert len({(look["color"], look["linestyle"]) for look in looks.values()}) == len(names)
    assert looks["loss, on the way"]["color"] == looks["loss"]["color"]
    assert looks["influence"]["linewidth"] > looks["loss"]["linewidth"]
    assert not {ns.HELPFUL_COLOUR, ns.HARMFUL_COLOUR} & {*ns.SCORE_COLOURS.values()}  # kept for help and harm
