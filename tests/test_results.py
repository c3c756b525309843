"""`Influences`: ranks, tables, files."""

import numpy as np
import pytest

from influence_functions import (
    CorruptFileError,
    Health,
    Influences,
)

# ── the result ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def result() -> Influences:
    health = Health("kernel", 1e-6, 0.1, 3.0, 0, 5, 0.5, 0.25)
    table = np.array([[0.5, -1.0, 0.0, 2.0], [1.0, 1.0, -3.0, 0.25]], dtype=np.float32)
    return Influences(table, np.array([7, 9]), np.array([0, 1]), np.array([0, 1, 1, 0]), {"solver": "kernel"}, health)


def test_helpful_and_harmful_are_sorted_and_break_ties_by_index(result):
    assert result.helpful(0, 2).tolist() == [3, 0]
    assert result.harmful(0, 2).tolist() == [1, 2]
    assert result.helpful(1, 2).tolist() == [0, 1]
    assert result.harmful(1, 4).tolist() == [2, 3, 0, 1]
    assert result.mean().tolist() == [0.75, 0.0, -1.5, 1.125]


@pytest.mark.parametrize(("row", "k", "words"), [(2, 1, "row 2"), (-1, 1, "row -1"), (0, 5, "1..4"), (0, 0, "1..4")])
def test_rows_and_counts_that_do_not_exist_are_errors(result, row, k, words):
    with pytest.raises(ValueError, match=words):
        result.helpful(row, k)


def test_the_frame_has_one_row_a_pair(result):
    frame = result.to_frame()
    assert len(frame) == 8
    assert frame.iloc[6].to_dict() == {
        "test_index": 9, "test_label": 1, "train_index": 2, "train_label": 1, "score": -3.0,
    }  # fmt: skip


def test_save_and_load_keep_everything(result, tmp_path):
    path = tmp_path / "deep" / "influences.npz"
    result.save(path)
    again = Influences.load(path)
    assert np.array_equal(again.scores, result.scores)
    assert again.scores.dtype == np.float32
    assert again.health == result.health
    assert again.settings == result.settings
    assert [entry.name for entry in path.parent.iterdir()] == ["influences.npz"]


def test_a_damaged_or_foreign_file_is_named_and_left_alone(result, tmp_path):
    path = tmp_path / "influences.npz"
    result.save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not a zip file", b""):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=r"influences\.npz"):
            Influences.load(path)
        assert path.read_bytes() == damaged
    with pytest.raises(FileNotFoundError, match="no influences"):
        Influences.load(tmp_path / "missing.npz")
