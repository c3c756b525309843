"""The explorer without a browser: what it is told equals the scores, and bad input is told what to do."""

import base64
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import explorer
import notebook_support as ns
from explorer.album import pack
from explorer.bundle import WEB, bundle
from explorer.groups import look_alikes, looks
from explorer.pictures import levels_of, read_images, to_pixels
from explorer.rankings import first_of
from influence_functions import CorruptFileError, Influences, compute_influences
from influence_functions.metrics import count_top_images

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import explore  # noqa: E402  (the tools are scripts, not a package)
import removals  # noqa: E402

KINDS = ("helpful", "harmful")


def unpack(packed: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["base64"]), packed["type"]).reshape(packed["shape"])


def page_data(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S)
    return json.loads(found[1])


# ── what is shown equals the scores ──────────────────────────────────────────────────────────────────────────────


def test_every_list_after_any_number_of_trainings_is_that_of_the_mean_of_their_scores(explored):
    data = explored.payload.data
    numbers = unpack(data["trains"]["number"])
    for kind in KINDS:
        trains, scores = (unpack(data["lists"][kind][name]) for name in ("train", "score"))
        for k in range(1, 5):
            mean = np.mean([one.scores for one in explored.influences[:k]], axis=0, dtype=np.float64)
            together = dataclasses.replace(explored.influences[0], scores=mean)
            for row in range(60):
                wanted = getattr(together, kind)(row, 5)
                got = numbers[trains[k - 1, row]]
                np.testing.assert_allclose(mean[row, got], mean[row, wanted], rtol=1e-4)  # rounding may swap two
                np.testing.assert_allclose(scores[k - 1, row], mean[row, got], rtol=1e-4, atol=1e-9)


def test_how_many_trainings_agree_is_what_the_metric_counts(explored):
    data, counts = explored.payload.data, count_top_images(explored.influences, 10)
    numbers, tests = unpack(data["trains"]["number"]), unpack(data["tests"]["number"])
    found = {(r["test_index"], r["kind"], r["train_index"]): r["found_by"] for r in counts.to_dict("records")}
    agreed = []
    for kind in KINDS:
        trains, agree = (unpack(data["lists"][kind][name]) for name in ("train", "agree"))
        for row, test in enumerate(tests):
            wanted = [found.get((test, kind, j), 0) for j in numbers[trains[-1, row]]]
            assert agree[-1, row].tolist() == wanted
            agreed += wanted
    assert 0 < np.mean(agreed) < 4, "a case in which something could go wrong"


def test_steadiness_is_the_share_of_one_half_in_the_other(explored):
    scores = [one.scores for one in explored.influences]
    for k, halves in ((1, (scores[0], scores[1])), (2, (scores[0] + scores[1], scores[2] + scores[3]))):
        shares = []
        for row in range(60):
            first, second = (np.argsort(-half[row], kind="stable") for half in halves)
            shares += [np.isin(first[:5], second[:10]).mean(), np.isin(second[:5], first[:10]).mean()]
        assert explored.payload.data["steady"]["helpful"][k - 1][0] == pytest.approx(np.mean(shares), abs=1e-4)
    assert len(explored.payload.data["steady"]["harmful"]) == 2


def test_whom_a_training_image_moves_is_read_off_its_column(explored):
    data, mean = explored.payload.data, np.mean([one.scores for one in explored.influences], axis=0)
    for kind, sign in (("helpful", -1), ("harmful", 1)):
        rows, scores = (unpack(data["moved"][kind][name]) for name in ("test", "score"))
        for place, number in enumerate(unpack(data["trains"]["number"])):
            assert rows[place].tolist() == np.argsort(sign * mean[:, number], kind="stable")[:5].tolist()
            np.testing.assert_allclose(scores[place], mean[rows[place], number], rtol=1e-5)


def test_choices_are_those_of_the_mean_probability(explored):
    says = {name: unpack(packed) for name, packed in explored.payload.data["says"].items()}
    for k in (1, 4):
        mean = explored.probabilities[:k].mean(0)
        assert (says["choices"][k - 1, :, 0] == mean.argmax(1)).all()
        np.testing.assert_allclose(says["chances"][k - 1], -np.sort(-mean, axis=1)[:, :2], rtol=1e-5)
    assert (says["own"] == explored.probabilities.argmax(2)).all()


def test_a_confusion_is_pushed_by_what_harms_most_on_the_mean_of_its_photographs(explored):
    data, mean = explored.payload.data, np.mean([one.scores for one in explored.influences], axis=0)
    labels, said = unpack(data["tests"]["label"]), explored.probabilities.mean(0).argmax(1)
    numbers, kinds = unpack(data["trains"]["number"]), unpack(data["trains"]["label"])
    assert {(c["label"], c["said"]) for c in data["confusions"]} == {(a, b) for a, b in zip(labels, said) if a != b}
    for cell in data["confusions"]:
        assert cell["tests"] == np.flatnonzero((labels == cell["label"]) & (said == cell["said"])).tolist()
        pushed = mean[cell["tests"]].mean(0)
        members = [place for group in cell["groups"] for place in group["trains"]]
        assert sorted(numbers[members]) == sorted(np.argsort(pushed, kind="stable")[:15])
        sums = [sum(group["scores"]) for group in cell["groups"]]
        assert sums == sorted(sums)
        assert all(len({*kinds[group["trains"]]}) == 1 for group in cell["groups"])


def test_the_pixels_of_the_sheets_are_those_of_the_data(explored):
    for role, sheets, data in (
        ("test", explored.payload.test, explored.test),
        ("train", explored.payload.train, explored.train),
    ):
        layout = explored.payload.data[f"{role}s"]["layout"]
        numbers = unpack(explored.payload.data[f"{role}s"]["number"])
        sheet = explored.folder / f"explorer-{role}-0.jpg"
        assert sheet.read_bytes() == sheets.files[0]
        with Image.open(sheet) as opened:
            picture = np.asarray(opened.convert("RGB"))
        for place in (0, 1, len(numbers) - 1):
            x, y = place % layout["columns"] * layout["pitchX"], place // layout["columns"] * layout["pitchY"]
            shown = picture[y : y + layout["height"], x : x + layout["width"]].astype(float)
            assert np.abs(shown - data.images[numbers[place]].permute(1, 2, 0).numpy()).mean() < 2


def test_the_tables_become_notes_and_suspects(explored):
    data, suspects = explored.payload.data, explored.extras.suspects
    assert [one["number"] for one in data["suspects"]] == suspects["index"].head(30).tolist()
    numbers = unpack(data["trains"]["number"])
    assert all(numbers[one["train"]] == one["number"] for one in data["suspects"])
    noted = {int(numbers[int(place)]): notes for place, notes in data["trains"]["notes"].items()}
    first = int(suspects["index"][0])
    assert any(note["text"].startswith("suspect 1 of 40: ") for note in noted[first])
    pairs = explored.extras.near_duplicates
    assert len(pairs), "a case in which there are near-duplicates"
    twins = {int(p["index_a"]) for p in pairs.to_dict("records") if p["set_a"] == "train"} & {*numbers.tolist()}
    assert twins
    assert all(any("picture as" in note["text"] for note in noted[twin]) for twin in twins)


def test_the_same_input_gives_the_same_bytes(explored, tmp_path):
    again = explorer.gather(explored.influences, explored.train, explored.test, explored.probabilities, explored.extras)
    for file in explorer.write_page(again, tmp_path):
        assert file.read_bytes() == (explored.folder / file.name).read_bytes()


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_first_of_ranks_as_influences_do_ties_included(seed):
    random = np.random.default_rng(seed)
    keys = random.integers(0, 4, (5, 20)).astype(float)
    for k in (1, 3, 20, 30):
        assert (first_of(keys, k) == np.argsort(keys, axis=1, kind="stable")[:, :k]).all()


# ── other data ───────────────────────────────────────────────────────────────────────────────────────────────────


class Pictures(torch.utils.data.Dataset):
    """A map-style data set that knows nothing of us."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images_, self.labels_, self.classes = images, labels, ["left", "right", "up"]

    def __len__(self) -> int:
        return len(self.labels_)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images_[index], int(self.labels_[index])


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((1, 28, 28), "pair"),
        ((3, 17, 23), "data set"),
        ((28, 28), "pair"),
        ((3, 150, 300), "pair"),
        ((1, 8, 8), "data set"),
    ],
    ids=str,
)
def test_images_of_any_size_with_one_or_three_channels(shape, kind, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(40, *shape, generator=generator), torch.arange(40) % 3
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 3))
    data = Pictures(images, labels) if kind == "data set" else (images, labels)
    shown = ns.explore(compute_influences(model, data, data, range(7)), data, data, model)
    layout = shown.data["tests"]["layout"]
    height, width = shape[-2:]
    assert max(layout["height"], layout["width"]) == min(max(height, width), 128)
    assert layout["pitchX"] % 8 == layout["pitchY"] % 8 == 0
    assert shown.data["classes"] == (
        ["left", "right", "up"] if kind == "data set" else ["class 0", "class 1", "class 2"]
    )
    assert shown.data["sizes"] == {"train": 40, "trainings": 1, "top": 0, "shown": 5}
    assert shown.data["steady"] == {"helpful": [], "harmful": []}
    pixels = to_pixels(read_images(data, np.arange(2), "train"), (0.0, 1.0))
    assert pixels.dtype == np.uint8
    if max(height, width) <= 128:
        wanted = (images[:2] * 255).round().reshape(2, -1, height, width).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
        assert np.abs(pixels.astype(float) - wanted.numpy()).max() <= 1


@pytest.mark.parametrize(
    ("images", "levels"),
    [
        (torch.linspace(0, 1, 64), (0, 1)),
        (torch.linspace(-1, 1, 64), (-1, 1)),
        (torch.linspace(0, 255, 64), (0, 255)),
        (torch.arange(64), (0, 255)),
        (torch.arange(64) % 2, (0, 1)),
        (torch.arange(64) * 1000, (0, 65_535)),
        (torch.tensor([*np.linspace(-2, 2, 999).tolist(), 1e6]), (-2, 2)),
    ],
    ids=["0..1", "−1..1", "0..255 floats", "bytes", "mask", "16 bits", "standardised, an outlier"],
)
def test_levels_are_found(images, levels):
    assert levels_of([images, images[:5]]) == pytest.approx(levels, abs=0.05)


def test_pixels_of_nan_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity in their pixels"):
        levels_of([torch.tensor([0.0, np.nan])])


def test_noise_can_be_packed():
    """Pillow gives up where a JPEG is larger than it expects."""
    images, labels = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    data = images, labels
    assert explorer.gather(compute_influences(model, data, data, range(100)), data, data).test.files


def test_of_a_few_images_there_are_short_lists_and_no_counts():
    data = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    shown = explorer.gather(compute_influences(model, data, data), data, data)
    assert unpack(shown.data["lists"]["helpful"]["train"]).shape == (1, 3, 3)
    assert shown.data["sizes"]["top"] == 0, "the first ten of three mean nothing"


def test_a_model_is_called_as_the_engine_calls_it():
    """Whole numbers stay whole, and logits may come in a dict."""

    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 3)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            assert x.dtype == torch.uint8
            return {"logits": self.linear(x.flatten(1) / 255)}

    torch.manual_seed(0)
    model, images = Careful(), torch.randint(0, 256, (120, 1, 8, 8), dtype=torch.uint8)
    data = images, torch.arange(120) % 3
    shown = ns.explore(compute_influences(model, data, data, [4, 2]), data, data, model)
    wanted = model(images[[4, 2]])["logits"].softmax(1).detach().numpy()
    np.testing.assert_allclose(unpack(shown.data["says"]["chances"])[0], -np.sort(-wanted, axis=1)[:, :2], rtol=1e-5)


def test_a_part_in_a_loader_keeps_names_and_numbers():
    images, labels = torch.rand(40, 1, 4, 4), torch.arange(40) % 3
    whole = Pictures(images, labels)
    part = torch.utils.data.Subset(torch.utils.data.Subset(whole, range(10, 40)), range(5, 25))
    loader = torch.utils.data.DataLoader(part, batch_size=4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    shown = ns.explore(compute_influences(model, loader, part, [3]), loader, part, model)
    assert shown.data["classes"] == ["left", "right", "up"]
    assert unpack(shown.data["tests"]["number"]).tolist() == [18]
    assert 15 <= unpack(shown.data["trains"]["number"]).min()


def test_outputs_beyond_the_labels_and_names_that_are_none():
    data = Pictures(torch.rand(30, 1, 4, 4), torch.arange(30) % 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
    found = compute_influences(model, data, data, [0])
    with pytest.raises(ValueError, match="names 3 classes, but the model has 10 outputs"):
        ns.explore(found, data, data, model)
    for odd in (7, {"a": 0}, np.array([1, 2])):
        data.classes = odd
        assert ns.explore(found, data, data, model).data["classes"] == [f"class {k}" for k in range(10)]
    data.classes = np.array(["a", "b"])
    assert ns.explore(found, data, data).data["classes"] == ["a", "b"]
    data.labels = ["x"] * 30
    assert ns.explore(found, data, data).data["classes"] == ["a", "b"], "labels that are no numbers are not its labels"


def test_models_that_one_result_averages_over_are_averaged(explored):
    both = compute_influences(explored.models[:2], explored.train, explored.test, [5, 9])
    shown = ns.explore(both, explored.train, explored.test, explored.models[:2])
    wanted = torch.stack([ns.evaluate(m, explored.test).probabilities[[5, 9]] for m in explored.models[:2]]).mean(0)
    np.testing.assert_allclose(unpack(shown.data["says"]["chances"])[0], wanted.topk(2).values.numpy(), rtol=1e-4)


def test_numbers_that_do_not_fit_are_not_wrapped():
    with pytest.raises(ValueError, match="must lie in"):
        pack(np.array([-1]))
    with pytest.raises(ValueError, match="must lie in"):
        pack(np.array([2**33]))


def test_a_part_of_a_data_set_shows_the_numbers_of_the_whole(explored):
    part = explored.train.subset(range(300, 600))
    shown = explorer.gather(compute_influences(explored.models[0], part, explored.test, [3]), part, explored.test)
    assert unpack(shown.data["trains"]["number"]).min() >= 300
    assert shown.data["says"] is None
    assert shown.data["confusions"] == []


def test_files_do_as_well_as_what_is_in_memory(explored, tmp_path):
    for j, one in enumerate(explored.influences):
        one.save(tmp_path / f"{j}.npz")
    files = [tmp_path / f"{j}.npz" for j in range(4)]
    again = explorer.gather(files, explored.train, explored.test, explored.probabilities, explored.extras)
    assert again.data == explored.payload.data


def test_look_alikes_do_not_mind_which_way_a_ship_sails():
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (6, 9, 11, 3), dtype=np.uint8)
    np.testing.assert_allclose(looks(images), looks(images[:, :, ::-1]))
    found = look_alikes(np.concatenate([images[:4], images[:4, :, ::-1]]), np.zeros(8))
    assert found[:4].tolist() == found[4:].tolist()
    assert len({*found.tolist()}) == 4
    assert len({*look_alikes(images, np.arange(6)).tolist()}) == 6, "never two labels in one group"


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────


def scores_with(explored: SimpleNamespace, **changes: object) -> Influences:
    return dataclasses.replace(explored.influences[0], **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda e: (Path("nowhere.npz"), e.train, e.test), "no influences at nowhere.npz"),
        (lambda e: ([], e.train, e.test), "a list of them"),
        (
            lambda e: (e.influences, e.train.subset(range(500)), e.test),
            "600 training images, the training data has 500",
        ),
        (lambda e: (e.influences, e.train, e.test.subset(range(100))), "test image 179, the test data has 100"),
        (lambda e: (e.influences, e.test.subset([*range(200)] * 3), e.test), "computed on other data"),
        (lambda e: (e.influences, e.train.with_labels((e.train.labels + 1) % 10), e.test), "or on other labels"),
        (
            lambda e: ([e.influences[0], scores_with(e, test_indices=np.arange(60))], e.train, e.test),
            "test_indices differ",
        ),
        (lambda e: (scores_with(e, scores=e.influences[0].scores * np.nan), e.train, e.test), "NaN or infinity"),
        (lambda e: (scores_with(e, train_labels=np.zeros(600)), e.train, e.test), "shows classes"),
        (lambda e: (e.influences, e.train, e.test, e.probabilities[:2]), "probabilities must be (4, 60)"),
        (lambda e: (e.influences, e.train, e.test, e.probabilities * 2), "sum to 1"),
        (
            lambda e: (scores_with(e, test_indices=np.full(60, 7)), e.train, e.test),
            "image 7 was asked about twice",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_belong_together_is_told_so(explored, make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        explorer.gather(*make(explored))


def test_a_damaged_file_is_named(explored, tmp_path):
    explored.influences[0].save(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFileError, match=r"a\.npz is damaged"):
        explorer.gather(tmp_path / "a.npz", explored.train, explored.test)


def test_models_must_be_one_for_each_training(explored):
    with pytest.raises(ValueError, match="4 trainings and 1 models: one for each"):
        ns.explore(explored.influences, explored.train, explored.test, explored.models[0])


def test_what_cannot_be_shown_is_told_so():
    model = nn.Linear(6, 3)
    data = torch.randn(20, 6), torch.arange(20) % 3
    with pytest.raises(ValueError, match="with one or three channels"):
        ns.explore(compute_influences(model, data, data, [0]), data, data, model)


def test_names_for_too_few_classes_are_told_so():
    data = Pictures(torch.rand(20, 1, 4, 4), torch.arange(20) % 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    with pytest.raises(ValueError, match="the data names 3 classes, but there are labels up to 3"):
        ns.explore(compute_influences(model, data, data, [0]), data, data)


# ── the page and its modules ─────────────────────────────────────────────────────────────────────────────────────


def test_the_page_needs_nothing_from_elsewhere_and_no_text_breaks_it(explored):
    page = (explored.folder / "index.html").read_text("utf-8")
    assert not re.search(r"""(?:src|href)=["'](?!data:,")""", page)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert page.count("</script>") == 2
    assert page_data(explored.folder / "index.html")["words"]["about"] == explored.extras.words["about"]
    assert "<title>Digits &lt;b&gt;&amp; others&lt;/b&gt;</title>" in page


def test_a_page_takes_the_place_of_an_older_one(explored, tmp_path):
    (tmp_path / "explorer-train-9.jpg").write_bytes(b"old")
    (tmp_path / "running.md").write_text("stays")
    explorer.write_page(explored.payload, tmp_path)
    assert not (tmp_path / "explorer-train-9.jpg").exists()
    assert (tmp_path / "running.md").exists()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            {"a.js": 'import { b } from "./b.js";\n', "b.js": 'import { a } from "./a.js";\n'},
            "import each other: a.js → b.js",
        ),
        (
            {"a.js": 'import { b } from "./b.js";\nconst x = 1;\n', "b.js": "export const x = 2;\n"},
            "x is a name of both",
        ),
        ({"a.js": 'import React from "react";\n'}, "not of the form"),
    ],
    ids=["cycle", "name", "form"],
)
def test_what_cannot_be_joined_is_an_error(modules, message, tmp_path, monkeypatch):
    for name, text in modules.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("explorer.bundle.WEB", tmp_path)
    with pytest.raises(ValueError, match=message):
        bundle("a.js")


def test_every_module_is_small_and_used():
    used = bundle("page.js")
    for module in WEB.glob("*.js"):
        text = module.read_text("utf-8")
        assert f"── {module.name}\n" in used
        assert len(text.splitlines()) <= 200
        assert "innerHTML" not in text, "text of a data set must stay text"


# ── the committed page ───────────────────────────────────────────────────────────────────────────────────────────

COMMITTED = ROOT / "docs/index.html"


def test_the_committed_page_is_current():
    page = COMMITTED.read_text("utf-8")
    assert bundle("page.js") in page, "docs/index.html is stale: run `make explore`"
    assert (WEB / "style.css").read_text("utf-8") in page


def test_the_committed_page_holds_what_it_promises():
    data, files = page_data(COMMITTED), [COMMITTED, *ROOT.glob("docs/explorer-*.jpg")]
    assert {file.name for file in files[1:]} == {*data["sheets"]["test"], *data["sheets"]["train"]}
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    labels, numbers = unpack(data["tests"]["label"]), unpack(data["tests"]["number"])
    assert np.bincount(labels).min() >= 50
    assert len({*numbers.tolist()}) == len(numbers) >= 500
    assert data["sizes"] == {"train": 50_000, "trainings": 10, "top": 10, "shown": 5}
    kinds = {(cell["label"], cell["said"]) for cell in data["confusions"]}
    answers = unpack(data["says"]["choices"])[-1, :, 0]
    assert kinds == {(a, b) for a, b in zip(labels.tolist(), answers.tolist()) if a != b}
    assert len(kinds) == 90, "every kind of mistake that ten classes allow"
    assert len(data["suspects"]) == 30
    assert {one["test"] for one in data["removals"]} <= {*numbers.tolist()}
    assert {0, 9, 10, 12, 22, 25} <= {*numbers.tolist()}


def test_the_committed_page_shows_what_the_engine_computes(cifar):
    data = page_data(COMMITTED)
    numbers, trains = unpack(data["tests"]["number"]), unpack(data["trains"]["number"])
    rows = [0, len(numbers) // 2, len(numbers) - 1]
    model = ns.Net()
    model.load_state_dict(ns.read_checkpoint(ROOT / "data/net.safetensors").states[0])
    found = compute_influences(model, *cifar, numbers[rows])
    for kind in KINDS:
        listed, scores = (unpack(data["lists"][kind][name])[0, rows] for name in ("train", "score"))
        own = np.take_along_axis(found.scores, trains[listed], axis=1)
        np.testing.assert_allclose(scores, own, rtol=0.02)  # another processor rounds otherwise
    chances = ns.evaluate(model, cifar[1].subset(numbers[rows])).probabilities.numpy()
    np.testing.assert_allclose(unpack(data["says"]["chances"])[0, rows], -np.sort(-chances, axis=1)[:, :2], rtol=1e-3)


def test_what_retraining_gave_is_what_the_notebook_recorded():
    told = json.loads((ROOT / "data/results.json").read_text("utf-8"))["retraining"]
    records = page_data(COMMITTED)["removals"]
    loss = lambda odds: np.log1p(np.exp(-np.array(odds)))  # noqa: E731
    whole = [one for one in records if one["of"] == 50_000]
    assert sorted(str(one["test"]) for one in whole) == sorted(told["all_images"]["loss"])
    for one in whole:
        for kind in ("helpful", "harmful", "random"):
            mean = told["all_images"]["loss"][str(one["test"])][kind][0]
            assert loss(one[kind]["measured"]).mean() == pytest.approx(mean, abs=0.01)
    for name, row in told["removal_signs"].items():
        kind, size = name.split()
        part = [one for one in records if one["of"] == 5_000 and one["removed"] == int(size)]
        assert len(part) == row["of"] == 6
        pairs = [(loss(one[kind]["measured"]), loss(one["random"]["measured"])) for one in part]
        changes = [(own - at_random[: len(own)]).mean() for own, at_random in pairs]  # of the same seeds
        assert np.mean(changes) == pytest.approx(row["change"][0], abs=0.02)
        assert all(one[kind]["foretold"] * (-1 if kind == "helpful" else 1) > 0 for one in part)


def test_what_is_foretold_is_the_sum_of_the_scores_left_out():
    rows = [(7, kind, rank, 3 * rank + (kind == "helpful")) for kind in ("harmful", "helpful") for rank in range(4)]
    table = pd.DataFrame(rows, columns=["test_index", "kind", "rank", "train_index"])
    seeds = {(kind, size): range(2) for kind in ("helpful", "harmful", "random") for size in (1, 3)}
    trials = removals.trials_of(table, (1, 3), seeds | {("nothing", 0): range(3)}, 20)
    assert len(trials) == 2 * (2 + 2 + 2) + 3
    scores = np.random.default_rng(0).normal(size=20)
    found = removals.foretold(trials, {7: scores})
    assert found[7, "helpful", 3] == pytest.approx(-scores[[1, 4, 7]].sum(), abs=1e-4)
    assert found[7, "harmful", 1] == pytest.approx(-scores[0], abs=1e-4)
    picked = [np.random.default_rng(seed).choice(20, 3, replace=False) for seed in range(2)]
    assert found[7, "random", 3] == pytest.approx(-np.mean([scores[one].sum() for one in picked]), abs=1e-4)
    measured = removals.outcomes(trials, np.arange(len(trials))[:, None], [7])
    assert measured[7, "nothing", 0] == [12, 13, 14]
    assert measured[7, "harmful", 1] == [0, 1]


def test_readme_and_results_tell_what_the_page_measures():
    data = page_data(COMMITTED)
    told = json.loads((ROOT / "data/results.json").read_text("utf-8"))["explorer"]
    assert told["steady"] == data["steady"]
    readme = (ROOT / "README.md").read_text("utf-8")
    one, five = ([told["steady"][kind][k][0] for kind in KINDS] for k in (0, 4))
    assert f"of the pictures one network shows, another has {one[0]:.0%} of the helpful and {one[1]:.0%}" in readme
    assert f"five others together have {five[0]:.0%} and {five[1]:.0%}" in readme
    assert f"{told['tests']} test images" in readme


# ── the tool ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tests_are_chosen_by_rule():
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 2_000)
    said = np.where(random.random(2_000) < 0.6, labels, random.choice(4, 2_000, p=[0.7, 0.1, 0.1, 0.1]))
    chosen = explore.choose_tests(labels, said, 20, wanted=[1_999, 1_500])
    assert {1_999, 1_500} <= {*chosen.tolist()}
    assert np.bincount(labels[chosen]).tolist() == [20] * 4
    for label in range(4):
        for answer in {*said[labels == label].tolist()} - {label}:
            assert ((labels[chosen] == label) & (said[chosen] == answer)).sum() >= 2
    assert (chosen == np.sort(chosen)).all()
    own = labels[chosen] == 1
    assert (said[chosen][own] == 0).sum() > (said[chosen][own] == 2).sum(), "more of a commoner mistake"


def test_a_class_with_too_few_images_gives_what_it_has():
    chosen = explore.choose_tests(np.array([0, 0, 1]), np.array([0, 1, 1]), 5)
    assert chosen.tolist() == [0, 1, 2]


def test_missing_data_is_told_and_nothing_written(tmp_path):
    nowhere = {"PATH": "/usr/bin", "CIFAR10_DIR": str(tmp_path), "HOME": str(tmp_path)}
    (tmp_path / "cifar-10-batches-py").mkdir()
    command = [sys.executable, ROOT / "tools/explore.py", "--to", tmp_path / "page"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=nowhere, cwd=tmp_path, timeout=100)
    assert done.returncode == 1
    assert "is missing; restore it" in done.stderr
    assert "nothing was written" in done.stderr
    assert not (tmp_path / "page").exists()


# ── the widget ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_widget_shows_a_picture_where_nothing_moves(explored):
    shown = ns.explore(explored.influences, explored.train, explored.test, explored.models)
    bundle_, _ = shown._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle_
    picture = base64.b64decode(bundle_["image/png"])
    assert picture.startswith(b"\x89PNG")
    np.testing.assert_allclose(
        unpack(shown.data["says"]["chances"]), unpack(explored.payload.data["says"]["chances"]), rtol=1e-4
    )
    assert explored.models[0].training, "the models stay as they were"


def test_the_models_modes_and_weights_stay_as_they_are(explored):
    model = explored.models[0].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ns.explore(explored.influences[0], explored.train, explored.test, model)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
