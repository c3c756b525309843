"""Retrainings that nothing can lose, metrics against numbers worked out by hand, and stability counts."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import notebook_support as ns
from influence_functions import Influences, compute_influences
from influence_functions.exact import fit_softmax_regression, leave_one_out, removal_effect, removal_effects
from influence_functions.metrics import count_top_images, found_by, linear_datamodeling_score, noise_ceiling

CONFIG = ns.TrainConfig(epochs=1, batch_size=32, peak_lr=0.02)


@pytest.fixture(scope="module")
def little():
    train, test = ns.load_data("digits")
    return train.subset(range(100)), test.subset(range(20))


def make_plan(count):
    halves = ns.random_halves(100, count)
    return [(np.flatnonzero(half), 10 + number) for number, half in enumerate(halves)]


@pytest.fixture
def trained(monkeypatch):
    """The seeds of all trainings that this process itself carries out."""
    seeds, original = [], ns.train_once

    def counted(train, config, *rest, **named):
        seeds.append(config.seed)
        return original(train, config, *rest, **named)

    monkeypatch.setattr(ns, "train_once", counted)
    return seeds


# ── the metrics ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lds_by_hand():
    masks = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=bool)
    scores = np.array([[4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    # sums of the scores kept: 7, 6, 4, 3 and 0, 0, 1, 1; the predicted order of the losses is their reverse
    outcomes = np.array([[0.1, 0.5], [0.4, 0.6], [0.3, 0.7], [0.9, 0.2]])
    found = linear_datamodeling_score(scores, masks, outcomes)
    # ranks of −7, −6, −4, −3: 1 2 3 4; of the outcomes: 1 3 2 4: Spearman 1 − 6·2/(4·15) = 0.8
    assert found.per_test[0] == pytest.approx(0.8)
    # predictions 0 0 −1 −1 have ranks 3.5 3.5 1.5 1.5, outcomes ranks 2 3 4 1: both sides' products cancel
    assert found.per_test[1] == pytest.approx(0.0, abs=1e-12)
    assert found.mean == pytest.approx(0.4)
    assert found.low <= found.mean <= found.high


def test_lds_is_scipys_spearman_with_our_sign():
    generator = np.random.default_rng(0)
    masks, scores = ns.random_halves(30, 40), generator.normal(size=(5, 30))
    outcomes = generator.normal(size=(40, 5)).round(1)  # with ties
    found = linear_datamodeling_score(scores, masks, outcomes)
    expected = [spearmanr(-(masks @ row), column).statistic for row, column in zip(scores, outcomes.T)]
    np.testing.assert_allclose(found.per_test, expected, atol=1e-9)
    perfect = linear_datamodeling_score(scores, masks, -(masks @ scores.T))
    swapped = linear_datamodeling_score(-scores, masks, -(masks @ scores.T))
    assert perfect.mean == pytest.approx(1)
    assert swapped.mean == pytest.approx(-1)


def test_lds_interval_covers_the_truth_and_shrinks_with_data():
    generator = np.random.default_rng(1)
    widths = []
    for count in (20, 200):
        masks, scores = ns.random_halves(50, count), generator.normal(size=(40, 50))
        found = linear_datamodeling_score(scores, masks, generator.normal(size=(count, 40)))
        assert found.low < 0 < found.high, "no relation: the interval must hold 0"
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2
    assert found.minus(found) == (0, 0, 0)


def test_lds_of_a_constant_is_zero_and_wrong_shapes_are_named():
    masks = ns.random_halves(10, 6)
    assert linear_datamodeling_score(np.zeros((2, 10)), masks, np.random.rand(6, 2)).mean == 0  # noqa: NPY002
    with pytest.raises(ValueError, match=r"masks must be \(h, n\)"):
        linear_datamodeling_score(np.zeros((2, 11)), masks, np.zeros((6, 2)))
    with pytest.raises(ValueError, match="outcomes"):
        linear_datamodeling_score(np.zeros((2, 10)), masks, np.zeros((2, 6)))


def test_noise_ceiling_by_hand():
    one = np.array([[1.0], [2.0], [3.0], [4.0]])
    other = np.array([[1.0], [3.0], [2.0], [4.0]])  # Spearman 0.8 with `one`
    agreement, ceiling = noise_ceiling(np.stack([one, other]))
    assert agreement == pytest.approx(0.8)
    assert ceiling == pytest.approx((2 * 0.8 / 1.8) ** 0.5)
    assert noise_ceiling(np.stack([one, one, one])) == pytest.approx((1, 1))
    assert noise_ceiling(np.stack([one, -one])) == (0, 0)
    with pytest.raises(ValueError, match="at least two"):
        noise_ceiling(one[None])


def test_noise_ceiling_is_what_the_perfect_prediction_reaches():
    generator = np.random.default_rng(0)
    masks, scores = ns.random_halves(60, 400), generator.normal(size=(100, 60))
    signal_part = -(masks @ scores.T)
    repeats = signal_part + 2 * signal_part.std() * generator.normal(size=(3, *signal_part.shape))
    reached = linear_datamodeling_score(scores, masks, repeats.mean(0)).mean
    assert reached == pytest.approx(noise_ceiling(repeats)[1], abs=0.03)


def test_an_image_that_alone_bends_the_objective_is_left_out_just_as_well():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 4, generator=generator, dtype=torch.float64), torch.arange(60) % 3
    features[0] *= 300
    data = features, labels
    found, expected = (
        leave_one_out(data, data, 1e-3, [0, 1]).mean(1),
        [removal_effect(data, data, 1e-3, [i]) for i in (0, 1)],
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_leave_one_out_equals_refitting_from_scratch():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    labels = (features[:, :3] + torch.randn(200, 3, generator=generator)).argmax(1)
    test = torch.randn(7, 6, generator=generator, dtype=torch.float64), torch.arange(7) % 3
    found = leave_one_out((features, labels), test, 0.01, [3, 50, 199])
    assert found.shape == (3, 7)
    expected = [removal_effect((features, labels), test, 0.01, [index]) for index in (3, 50, 199)]
    np.testing.assert_allclose(found.mean(1), expected, atol=1e-8)


@pytest.mark.parametrize("classes", [2, 3])
def test_groups_left_out_equal_refitting_from_scratch(classes):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    labels = (features[:, :classes] + torch.randn(200, classes, generator=generator)).argmax(1)
    test = torch.randn(7, 6, generator=generator, dtype=torch.float64), torch.arange(7) % classes
    groups = [[3], range(20), range(50, 150)]
    found = removal_effects((features, labels), test, 0.01, groups)
    assert found.shape == (3, 7)
    expected = [removal_effect((features, labels), test, 0.01, group) for group in groups]
    np.testing.assert_allclose(found.mean(1), expected, atol=1e-6)
    np.testing.assert_array_equal(found[:1], leave_one_out((features, labels), test, 0.01, [3]))


def test_of_two_classes_the_fit_is_the_minimum_and_influence_foretells_the_refits():
    generator = torch.Generator().manual_seed(0)
    features, l2 = torch.randn(300, 4, generator=generator, dtype=torch.float64), 0.02
    labels = (features[:, 0] + torch.randn(300, generator=generator) > 0).long()
    fit = fit_softmax_regression(features, labels, l2)
    objective = torch.nn.functional.cross_entropy(fit(features), labels) + l2 / 2 * fit.weight.square().sum()
    slope = torch.autograd.grad(objective, fit.weight)[0]
    assert slope.abs().max() < 1e-8
    data = (features, labels)
    scores = compute_influences(fit, data, data, solver="cg", measure="loss", damping=l2, tolerance=1e-10).scores
    change = leave_one_out(data, data, l2, range(300))
    assert np.corrcoef(scores.T.ravel(), change.ravel())[0, 1] > 0.999
    assert np.polyfit(change.ravel(), scores.T.ravel(), 1)[0] == pytest.approx(1, abs=0.05)


# ── what is trained ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_subsets_are_balanced_and_halves_are_halves(little):
    train, _ = ns.load_data("digits")
    chosen = ns.balanced_subset(train.labels, 7)
    assert torch.bincount(train.labels[chosen]).tolist() == [7] * 10
    assert (np.diff(chosen) > 0).all()
    assert (chosen == ns.balanced_subset(train.labels, 7)).all()
    assert (chosen != ns.balanced_subset(train.labels, 7, seed=1)).any()
    with pytest.raises(ValueError, match="the smallest class"):
        ns.balanced_subset(train.labels, 5_000)
    halves = ns.random_halves(11, 30)
    assert (halves.sum(1) == 5).all()
    assert len(np.unique(halves, axis=0)) > 20


def test_test_images_are_chosen_by_the_rule():
    labels = torch.tensor([0, 1, 0, 1, 2, 2])
    said = torch.tensor([1, 1, 0, 0, 0, 0])
    result = ns.Evaluation(torch.nn.functional.one_hot(said, 3).float(), labels, ("a", "b", "c"))
    assert ns.choose_test_images(result) == [2, 1, 4, 0, 3]  # no c is right: the first c stands in
    with pytest.raises(ValueError, match="no image of class d"):
        ns.choose_test_images(dataclasses.replace(result, class_names=("a", "b", "c", "d")))


def test_retraining_asks_the_model_that_training_gives(little, tmp_path):
    (train, test), (plan) = little, make_plan(3)
    found = ns.retrain_all(train, test, plan, CONFIG, tmp_path / "cache.npz", jobs=1)
    kept, seed = plan[1]
    result = ns.evaluate(ns.train_once(train.subset(kept), dataclasses.replace(CONFIG, seed=seed)).model, test)
    np.testing.assert_allclose(found.losses[1], result.losses, atol=5e-3)  # float16 in the cache
    assert found.correct[1].tolist() == (result.predictions == result.labels).tolist()
    assert found.rows([1]).margins.shape == (1, 20)


def test_nothing_is_trained_twice_and_nothing_is_mixed(little, tmp_path, trained):
    (train, test), plan, path = little, make_plan(3), tmp_path / "cache.npz"
    first = ns.retrain_all(train, test, [*plan, plan[0]], CONFIG, path, jobs=1)
    assert trained == [10, 11, 12]
    assert (first.margins[0] == first.margins[3]).all()
    again = ns.retrain_all(train, test, plan[::-1], CONFIG, path, jobs=1)
    assert trained == [10, 11, 12], "all were in the cache"
    assert (again.margins[::-1] == first.margins[:3]).all()
    ns.retrain_all(train, test, plan[:1], dataclasses.replace(CONFIG, peak_lr=0.03), path, jobs=1)
    ns.retrain_all(train.subset(torch.arange(99, -1, -1)), test, plan[:1], CONFIG, path, jobs=1)
    assert trained == [10, 11, 12, 10, 10], "another configuration and other data are other trainings"


def test_threads_are_put_back_and_make_no_difference(little, tmp_path):
    (train, test), plan, before = little, make_plan(2), torch.get_num_threads()
    alone = ns.retrain_all(train, test, plan, CONFIG, tmp_path / "a.npz", jobs=1)
    assert torch.get_num_threads() == before
    together = ns.retrain_all(train, test, plan, CONFIG, tmp_path / "b.npz", jobs=2)
    assert (alone.margins == together.margins).all()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text"])
def test_a_damaged_cache_is_reported_kept_aside_and_made_again(little, tmp_path, trained, capsys, damage):
    (train, test), plan, path = little, make_plan(2), tmp_path / "cache.npz"
    good = ns.retrain_all(train, test, plan, CONFIG, path, jobs=1)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes({"truncated": content[:-40], "flipped": content, "text": b"not a cache"}[damage])
    again = ns.retrain_all(train, test, plan, CONFIG, path, jobs=1)
    assert trained == [10, 11, 10, 11], "nothing in a damaged file is trusted"
    assert "damaged" in capsys.readouterr().out
    assert (tmp_path / "cache.npz.damaged").exists()
    assert (again.margins == good.margins).all()


def test_a_killed_run_goes_on_where_it_was(little, root, tmp_path, trained):
    train, test = little
    path, plan = tmp_path / "cache.npz", make_plan(8)
    script = f"""
        import sys; sys.path[:0] = [{str(root)!r}, {str(root / "tests")!r}]
        import test_retraining as here, notebook_support as ns
        train, test = ns.load_data("digits")
        small, asked = train.subset(range(100)), test.subset(range(20))
        ns.retrain_all(small, asked, here.make_plan(8), here.SLOWER, {str(path)!r}, jobs=2)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], start_new_session=True)
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished, _ = ns._read_retrainings(path)
    assert 1 <= len(finished) < 8
    resumed = ns.retrain_all(train, test, plan, SLOWER, path, jobs=1)
    assert len(trained) == 8 - len(finished), "what was finished is not trained again"
    whole = ns.retrain_all(train, test, plan, SLOWER, tmp_path / "whole.npz", jobs=1)
    assert (resumed.margins == whole.margins).all()
    assert (resumed.correct == whole.correct).all()
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()


SLOWER = dataclasses.replace(CONFIG, epochs=20)  # so that a kill comes in time


def test_models_are_kept_reused_and_replaced(little, tmp_path, trained, capsys):
    train, _ = little
    first = ns.train_models(train, CONFIG, [3, 4], tmp_path, jobs=1)
    again = ns.train_models(train, CONFIG, [4, 3], tmp_path, jobs=1)
    assert trained == [3, 4]
    assert torch.equal(first[0].model.fc3.weight, again[1].model.fc3.weight)
    assert not torch.equal(first[0].model.fc3.weight, first[1].model.fc3.weight)
    ns.train_models(train, dataclasses.replace(CONFIG, epochs=2), [3], tmp_path, jobs=1)
    assert trained == [3, 4, 3]
    (file,) = tmp_path.glob("net-*-seed-4.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    ns.train_models(train, CONFIG, [4], tmp_path, jobs=1)
    assert trained == [3, 4, 3, 4]
    assert "damaged" in capsys.readouterr().out
    assert file.with_name(f"{file.name}.damaged").exists()


def test_checkpoints_of_kept_trainings_come_back_and_are_made_where_they_lack(little, tmp_path, trained):
    train, config = little[0], dataclasses.replace(CONFIG, epochs=3)
    plain, *_ = ns.train_models(train, config, [3], tmp_path, jobs=1)
    assert plain.checkpoints == {}
    first, *_ = ns.train_models(train, config, [3], tmp_path, jobs=1, checkpoints=(1, 2))
    again, *_ = ns.train_models(train, config, [3], tmp_path, jobs=1, checkpoints=(2,))
    assert trained == [3, 3], "the file without checkpoints did not fit, the one with more than asked for does"
    assert list(first.checkpoints) == [1, 2]
    assert list(again.checkpoints) == [2]
    assert torch.equal(first.checkpoints[2].fc3.weight, again.checkpoints[2].fc3.weight)
    assert torch.equal(plain.model.fc3.weight, first.model.fc3.weight), "keeping weights changes nothing"


# ── stability and tables ────────────────────────────────────────────────────────────────────────────────────────────


def influences(rows, tests=(7,)):
    scores = np.array(rows, dtype=float)
    return Influences(scores, np.array(tests), np.zeros(len(scores), int), np.zeros(scores.shape[1], int), {}, None)


def test_stability_counts_models_by_hand():
    models = [influences([[5, 4, 0, -4, -5]]), influences([[5, 0, 4, -5, -4]]), influences([[-9, 4, 5, 6, 0]])]
    counts = count_top_images(models, k=2)
    assert found_by(counts, 7, "helpful") == {0: 2, 1: 1, 2: 2, 3: 1}
    assert found_by(counts, 7, "harmful") == {0: 1, 3: 2, 4: 3}
    assert counts["models"].tolist() == [3] * len(counts)
    assert found_by(counts, 8, "helpful") is None, "never measured is not the same as found by none"
    with pytest.raises(ValueError, match="same test images"):
        count_top_images([models[0], influences([[1, 2, 3, 4, 5]], tests=[8])])


def test_a_table_is_made_once_and_only_used_for_what_it_was_made_for(tmp_path, capsys):
    path, made = tmp_path / "table.csv", []

    def make():
        made.append(1)
        return pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})

    first = ns.read_or_make_table(path, make, "purpose one")
    again = ns.read_or_make_table(path, make, "purpose one")
    assert first.equals(again)
    assert len(made) == 1
    ns.read_or_make_table(path, make, "purpose two")
    assert len(made) == 2
    path.write_bytes(b"# purpose two\n\xff\xfe")
    assert ns.read_or_make_table(path, make, "purpose two").equals(first)
    assert "damaged" in capsys.readouterr().out


def test_models_of_several_data_sets_are_trained_on_their_own(little, tmp_path):
    train, _ = little
    halves = [train.subset(range(50)), train.subset(range(50, 100))]
    found = ns.train_models(halves, CONFIG, [7, 7], tmp_path, jobs=1)
    for half, training in zip(halves, found):
        expected = ns.train_once(half, dataclasses.replace(CONFIG, seed=7)).model
        assert torch.equal(training.model.fc3.bias, expected.fc3.bias)
    with pytest.raises(ValueError, match="2 data sets for 3 seeds"):
        ns.train_models(halves, CONFIG, [1, 2, 3], tmp_path)
