"""Looking at the data: statistics on images that can be computed by hand, and duplicates planted to be found."""

import io

import numpy as np
import pytest
import torch
from conftest import of_notebook
from torch import Tensor

import notebook_support as ns

EDA = of_notebook("EDA.ipynb")


def flat(*values: int) -> Tensor:
    """Images (n, 3, 32, 32) of one grey each."""
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 32, 32)


def halves(low: int, high: int) -> Tensor:
    """One image whose left half is `low` and whose right half is `high`."""
    image = flat(low)
    image[..., 16:] = high
    return image


def scenes(n: int, seed: int = 0) -> Tensor:
    """n unrelated pictures (n, 3, 32, 32) with soft shapes, as photographs have, values 20..200."""
    small = torch.rand(n, 3, 11, 11, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(small, size=(32, 32), mode="bicubic").clamp(0, 1)
    return (20 + 180 * large).round().to(torch.uint8)


def data(images: Tensor, labels: list[int] | None = None) -> ns.ImageData:
    labels = labels or [i % 10 for i in range(len(images))]
    return ns.ImageData("test", images, torch.tensor(labels), ns.CLASS_NAMES)


# ── statistics ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_moments_brightness_and_contrast_by_hand():
    images = torch.cat([flat(51), halves(0, 255)])
    images[1, 2] = 0  # no blue
    moments = EDA.image_moments(images)
    assert moments.means[0].tolist() == pytest.approx([0.2] * 3)
    assert moments.means[1].tolist() == pytest.approx([0.5, 0.5, 0])
    assert moments.deviations.tolist() == [[0, 0, 0], [0.5, 0.5, 0]]
    assert moments.brightness.tolist() == pytest.approx([0.2, 1 / 3])
    assert moments.contrast.tolist() == pytest.approx([0, np.sqrt(0.5 / 3)])


def test_the_deviation_of_all_pixels_is_not_the_mean_of_the_deviations():
    images = torch.cat([flat(0), halves(0, 255)])  # 3/4 of the pixels are black
    table = EDA.channel_statistics(EDA.image_moments(images))
    assert table.index.tolist() == ["red", "green", "blue"]
    assert table["mean"].tolist() == pytest.approx([0.25] * 3)
    assert table["deviation of all pixels"].tolist() == pytest.approx([np.sqrt(3 / 16)] * 3)
    assert table["mean of per-image deviations"].tolist() == pytest.approx([0.25 * np.sqrt(1024 / 1023)] * 3)
    assert table["deviation of image means"].tolist() == pytest.approx([0.25] * 3)


def test_statistics_of_many_chunks_equal_those_of_all_pixels_at_once(monkeypatch):
    monkeypatch.setattr(ns, "LOOK_CHUNK", 7)
    images = scenes(30)
    table = EDA.channel_statistics(EDA.image_moments(images))
    pixels = images.double() / 255
    assert table["mean of per-image deviations"].tolist() == pytest.approx(pixels.std((2, 3)).mean(0).tolist())
    assert table["mean"].tolist() == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert table["deviation of all pixels"].tolist() == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())


def test_the_known_statistics_of_cifar10(cifar):
    table = EDA.channel_statistics(EDA.image_moments(cifar[0].images))
    assert np.allclose(table["mean"], [0.4914, 0.4822, 0.4465], atol=5e-5)
    assert np.allclose(table["deviation of all pixels"], [0.2470, 0.2435, 0.2616], atol=5e-5)
    assert np.allclose(table["mean of per-image deviations"], [0.2023, 0.1994, 0.2010], atol=5e-5)


def test_histograms_count_every_pixel_in_its_group_and_channel(monkeypatch):
    monkeypatch.setattr(ns, "LOOK_CHUNK", 2)
    images = torch.cat([flat(7), halves(0, 255), flat(7)])
    images[2, 1] = 200
    counts = EDA.channel_histograms(images, torch.tensor([2, 0, 2]))
    assert counts.shape == (3, 3, 256)
    assert counts.sum((1, 2)).tolist() == [3 * 1024, 0, 6 * 1024]
    assert counts[0, :, [0, 255]].tolist() == [[512, 512]] * 3
    assert counts[2, :, 7].tolist() == [2048, 1024, 2048]
    assert counts[2, 1, 200] == 1024
    wide = EDA.channel_histograms(images, torch.tensor([2, 0, 2]), bins=4)
    assert wide[2].tolist() == [[2048, 0, 0, 0], [1024, 0, 0, 1024], [2048, 0, 0, 0]]


def test_class_means_by_hand(monkeypatch):
    monkeypatch.setattr(ns, "LOOK_CHUNK", 2)
    two = ns.ImageData("test", torch.cat([flat(0, 100, 200), halves(0, 50)]), torch.tensor([0, 1, 1, 0]), ("a", "b"))
    means = EDA.class_means(two)
    assert means.shape == (2, 3, 32, 32)
    assert (means[1] == 150).all()
    assert (means[0, :, :, :16] == 0).all()
    assert (means[0, :, :, 16:] == 25).all()


# ── near-duplicates ──────────────────────────────────────────────────────────────────────────────────────────────


def test_details_ignore_brightness_contrast_and_slopes_but_not_content():
    image = scenes(1).float()
    slope = torch.linspace(0, 40, 32).expand(1, 3, 32, 32)
    variants = torch.cat([image, image * 0.5 + 60, image + slope]).round().to(torch.uint8)
    details = ns.image_details(torch.cat([variants, scenes(1, seed=5), flat(90)]))
    assert details.shape == (5, 3 * 24 * 24)
    assert details.norm(dim=1).tolist() == pytest.approx([1, 1, 1, 1, 0], abs=1e-5)
    correlation = details @ details[0]
    assert correlation[1] > 0.99
    assert correlation[2] > 0.99
    assert abs(correlation[3]) < 0.5


def test_planted_duplicates_are_found_and_different_labels_come_first():
    images = scenes(60)
    images[41] = images[3]  # an exact copy with another label
    images[25] = (images[5] * 0.6 + 50).to(torch.uint8)  # a paler print with the same label
    train, test = data(images[:50]), data(scenes(12, seed=9))
    test.images[4] = train.images[20]  # an exact copy in the other set: label 4 against label 0
    test.images[7] = (train.images[17].float() + torch.randn(3, 32, 32)).round().to(torch.uint8)
    found = EDA.near_duplicates(train, test)
    names = found[["set_a", "index_a", "set_b", "index_b"]].to_numpy().tolist()
    assert sorted(names[:2]) == [["train", 3, "train", 41], ["train", 20, "test", 4]]
    assert sorted(names[2:]) == [["train", 5, "train", 25], ["train", 17, "test", 7]]
    assert found["exact"].tolist() == [True, True, False, False]
    assert found["pixel_rmse"][:2].tolist() == [0, 0]
    assert found["pixel_rmse"].iloc[names.index(["train", 17, "test", 7])] == pytest.approx(1.04, abs=0.05)
    first = found.iloc[names.index(["train", 3, "train", 41])]
    assert (first["label_a"], first["label_b"]) == ("cat", "automobile")


def test_featureless_images_are_duplicates_only_when_they_are_equal():
    ramp = torch.arange(32).expand(1, 3, 32, 32)
    ramps = torch.cat([ramp * 3, ramp * 7]).to(torch.uint8)  # only rounding is left of their details
    found = EDA.near_duplicates(data(torch.cat([flat(10, 90, 10), ramps, scenes(20)])), data(scenes(5, seed=2)))
    assert found[["index_a", "index_b", "exact"]].to_numpy().tolist() == [[0, 2, True]]
    assert (ns.image_details(ramps) == 0).all()


def test_the_search_in_few_components_misses_no_pair():
    rows = torch.nn.functional.normalize(torch.randn(300, 40, generator=torch.Generator().manual_seed(0)), dim=1)
    all_pairs = np.triu(rows @ rows.T, 1)
    for components in (2, 40):
        first, second, correlation = EDA.similar_pairs(rows.numpy(), 0.5, components)
        found = set(zip(first.tolist(), second.tolist()))
        assert found == set(zip(*(part.tolist() for part in np.nonzero(all_pairs >= 0.5))))
        assert len(found) > 10
        assert correlation == pytest.approx(all_pairs[first, second], abs=1e-5)


def test_no_duplicate_gives_an_empty_table_with_all_columns():
    found = EDA.near_duplicates(data(scenes(20)), data(scenes(5, seed=2)))
    assert found.empty
    assert found.columns.tolist() == [
        "set_a", "index_a", "label_a", "set_b", "index_b", "label_b", "correlation", "pixel_rmse", "exact",
    ]  # fmt: skip
    assert len(EDA.plot_pairs(data(scenes(2)), data(scenes(2)), found).texts) == 1


def test_equal_hashes_of_different_images_are_no_copies(monkeypatch):
    class Zeros:
        def integers(self, low: int, high: int, size: int, dtype: type) -> np.ndarray:
            return np.zeros(size, dtype)  # every hash is 0: all images collide

    monkeypatch.setattr(ns.np.random, "default_rng", lambda seed: Zeros())
    first, second = EDA.exact_copies(torch.cat([halves(1, 2), halves(1, 3), flat(2), halves(1, 3)]))
    assert (first.tolist(), second.tolist()) == ([1], [3])


# ── bad input and pictures ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: EDA.image_moments(torch.rand(2, 3, 32, 32)), r"images must be uint8 .* not torch.float32 \(2, 3"),
        (lambda: EDA.image_moments(flat(1)[0]), r"images must be uint8 \(n, 3, h, w\)"),
        (lambda: EDA.image_moments(flat(1)[:0]), "n ≥ 1"),
        (lambda: EDA.channel_histograms(flat(1), torch.tensor([0]), bins=10), "power of two from 2 to 256, not 10"),
        (lambda: EDA.channel_histograms(flat(1, 2), torch.tensor([0])), "for each of the 2 images"),
        (lambda: EDA.channel_histograms(flat(1), torch.tensor([-1])), "whole number ≥ 0"),
        (lambda: EDA.class_means(data(flat(1, 2), [0, 2])), "no image is labelled 'automobile'"),
        (lambda: EDA.near_duplicates(data(flat(1)), data(flat(2)), 0.2), "correlation from 0.5 to 1, not 0.2"),
        (lambda: EDA.near_duplicates(data(flat(1)), data(flat(2)), float("nan")), "not nan"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_grid_and_pairs_show_the_right_images():
    ns.use_style()
    train, test = data(scenes(12)), data(scenes(12, seed=1))
    figure = ns.plot_image_grid(train, np.array([[0, 1, 2], [3, -1, 5]]), ["a", "b"], list("uvwxyz"))
    shown = [ax.images[0].get_array() if ax.images else None for ax in figure.axes]
    assert [ax.get_title() for ax in figure.axes] == ["u", "v", "w", "x", "", "z"]
    assert shown[4] is None
    assert (shown[5] == train.images[5].permute(1, 2, 0).numpy()).all()
    test.images[3] = train.images[2]
    figure = EDA.plot_pairs(train, test, EDA.near_duplicates(train, test))
    assert [ax.get_title() for ax in figure.axes] == ["train\n#2\nbird", "test\n#3\ncat"]
    assert all((ax.images[0].get_array() == train.images[2].permute(1, 2, 0).numpy()).all() for ax in figure.axes)


def test_histogram_lines_are_shares_in_per_cent():
    figure = ns.plt.figure()
    ax = EDA.plot_channel_histogram(figure.add_subplot(), EDA.channel_histograms(halves(0, 255), torch.tensor([0]))[0])
    assert [line.get_ydata()[[0, 1, 255]].tolist() for line in ax.lines] == [[50, 0, 50]] * 3


def test_a_saved_figure_keeps_the_colours_of_photographs(cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(ns, "display", lambda picture: None)
    ns.use_style()
    figure = ns.plot_image_grid(cifar[0], np.random.default_rng(1).choice(50_000, (6, 12)))
    with io.BytesIO() as drawn:
        figure.savefig(drawn, format="png")
        whole = np.asarray(ns.PIL.Image.open(drawn).convert("RGB")).astype(int)
    ns.show_figure(figure, tmp_path / "a.png")
    saved = np.asarray(ns.PIL.Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    error = np.abs(saved - whole).max(2)
    assert error.max() < 60  # of 255; the default palette is off by 95
    assert saved[0, 0].tolist() == [255, 255, 255]


def test_groups_follow_chains_of_pairs_across_the_sets():
    train, test = data(scenes(5)), data(scenes(3))
    pairs = ns.pd.DataFrame(
        {"set_a": ["train", "train"], "index_a": [0, 3], "set_b": ["train", "test"], "index_b": [3, 1]}
    )
    group = EDA.duplicate_groups(pairs, train, test)
    assert group.shape == (8,)
    assert group[0] == group[3] == group[6]
    assert len(set(group.tolist())) == 6
    assert len(set(EDA.duplicate_groups(pairs.head(0), train, test).tolist())) == 8


def test_colour_features_are_means_deviations_and_a_constant_of_the_first_images_of_each_class():
    images = torch.cat([flat(0, 255, 51, 102), halves(0, 255)])
    data = ns.ImageData("five", images, torch.tensor([2, 0, 2, 2, 0]), ("a", "b", "c"))
    features, labels = ns.colour_features(data, (0, 2), per_class=2)
    assert labels.tolist() == [0, 0, 1, 1]
    means = [1.0, 0.0, -1.0, -0.6]  # 255, half of either, 0, 51
    deviation = (1024 / 1023) ** 0.5  # half the pixels at −1, half at 1
    expected = [[mean] * 3 + [spread] * 3 + [1] for mean, spread in zip(means, (0, deviation, 0, 0))]
    np.testing.assert_allclose(features, expected, atol=1e-6)
