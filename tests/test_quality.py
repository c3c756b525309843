"""The driver of the quality benchmark, without the libraries it compares: those live in an environment of their own."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import notebook_support as ns
from influence_functions.members import average
from influence_functions.metrics import LDS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import peers
import quality


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("INFLUENCE_OUT", str(tmp_path))
    net = dataclasses.replace(quality.GROUNDS["Net"], config=ns.TrainConfig(epochs=2))
    monkeypatch.setitem(quality.GROUNDS, "Net", net)
    monkeypatch.setattr(quality, "FOLDER", tmp_path)
    train, _ = ns.load_data("digits")
    return train.subset(range(200))


def test_the_checkpoints_come_with_their_learning_rates(small, monkeypatch):
    monkeypatch.setattr(quality, "CHECKPOINTS", (1, 2))
    ((final, one),) = quality.load_models(small, 1)
    (first, high), (last, low) = quality.load_models(small, 1, checkpoints=True)
    assert one == 1
    assert torch.equal(final.fc3.bias, last.fc3.bias)
    assert not torch.equal(first.fc3.bias, last.fc3.bias)
    assert 0 < low < high <= ns.TrainConfig().peak_lr
    assert len(quality.load_models(small, 2, checkpoints=True)) == 4


def test_ours_is_the_mean_over_models(small):
    torch.manual_seed(0)
    models = [(ns.Net().eval(), 1.0) for _ in range(2)]
    test = small.subset([5, 6])
    both = peers.ours(models, small, samples=50)(test, 0.1)
    single = [peers.ours([model], small, samples=50)(test, 0.1) for model in models]
    np.testing.assert_allclose(both, average(single), rtol=1e-5)


def test_tuning_reports_what_fails_and_picks_the_best(monkeypatch):
    monkeypatch.setattr(quality, "lds", lambda scores, _: LDS(float(scores.mean()), 0, 0, scores, scores))

    def score(test, value):
        if value == 2.0:
            raise RuntimeError("too large")
        return np.full((2, 3), np.nan if value == 1.0 else value, dtype=np.float32)

    method = quality.Method("any", "ours", values=(0.25, 0.5, 1.0, 2.0))
    value, tried = quality.tune(method, score, part=None)
    assert value == 0.5
    assert tried["0.25"] == 0.25
    assert "NaN" in tried["1.0"]
    assert tried["2.0"] == "RuntimeError: too large"


def test_a_process_that_fails_stays_in_the_table(small, monkeypatch):
    method = quality.Method("no such method", "ours")
    record = quality.in_own_process(method)
    assert "StopIteration" in record["reason"]
    assert quality.in_own_process(method) == record, "what was measured is kept"
    assert quality.row(method, record)["reason"] == record["reason"]


def test_best_within_a_budget():
    rows = [
        {"method": "ours", "lds": 0.3, "seconds": 20.0},
        {"method": "ours, fast", "lds": 0.2, "seconds": 5.0},
        {"method": "dattri CG", "lds": 0.4, "seconds": 500.0},
        {"method": "pyDVL CG", "reason": "not finished"},
    ]
    assert quality.best_within(rows, 10, own=True).startswith("0.200 (ours, fast")
    assert quality.best_within(rows, 30, own=True).startswith("0.300 (ours,")
    assert quality.best_within(rows, 30, own=False) == "nothing"
