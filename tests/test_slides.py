"""The slides: the committed PDF is current, every number comes from the results, and everybody can read them."""

import json
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import typst
from pypdf import PdfReader
from pypdf.generic import DictionaryObject

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import slides  # noqa: E402  (the tools are scripts, not a package)

SOURCE = (ROOT / "presentation.typ").read_text(encoding="utf-8")
PDF = ROOT / "presentation.pdf"
LITERAL = [tuple(re.findall(r'"([^"]+)"', keys)) for keys in re.findall(r'\bresult\(((?:"[^"]+"(?:, )?)+)\)', SOURCE)]
COMPUTED = [  # what the slides look up by names that they compute
    ("speed", "engine", "50000 x 200", "median"),
    ("retraining", "right", "without 50 helpful"),
    *(
        ("mislabels", "detection", "any class", score, "found")
        for score in ("influence, on the way", "loss, on the way")
    ),
    *(
        ("label_errors", "steps", "aggregate", step, "found")
        for step in ("loss (one Net)", "ConvNet-8, out of fold, over both")
    ),
    ("mislabels",),
]


@pytest.fixture(scope="module")
def reader() -> PdfReader:
    assert PDF.exists(), "presentation.pdf is missing: run `make slides`"
    return PdfReader(PDF)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What the slides are made of, where a test may change it."""
    shutil.copy(ROOT / "presentation.typ", tmp_path)
    shutil.copytree(ROOT / "images", tmp_path / "images")
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data/results.json", tmp_path / "data")
    return tmp_path


def change_results(folder: Path, keys: tuple[str, ...], value: object = None) -> None:
    """Set one entry of results.json, or remove it when `value` is None."""
    file = folder / "data/results.json"
    results = inner = json.loads(file.read_text(encoding="utf-8"))
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    if value is None:
        del inner[keys[-1]]
    file.write_text(json.dumps(results), encoding="utf-8")


def words(reader: PdfReader) -> str:
    return " ".join(" ".join(page.extract_text() for page in reader.pages).split())


# ── current ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_committed_pdf_is_what_the_sources_give():
    assert PDF.exists(), "presentation.pdf is missing: run `make slides`"
    assert slides.build(ROOT) == PDF.read_bytes(), "presentation.pdf is stale: run `make slides` and look at every page"


@pytest.mark.parametrize("keys", sorted({*LITERAL, *COMPUTED}), ids=" > ".join)
def test_a_missing_number_is_an_error_that_names_it(copy, keys):
    change_results(copy, keys)
    with pytest.raises(typst.TypstError, match=re.escape("data/results.json lacks " + " > ".join(keys))):
        slides.build(copy)


def test_the_tool_says_in_one_line_what_is_missing_and_writes_nothing(copy):
    change_results(copy, ("student", "test_accuracy"))
    command = [sys.executable, str(ROOT / "tools/slides.py"), "--root", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "results.json lacks student > test_accuracy" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (copy / "presentation.pdf").exists()


def test_other_results_give_other_slides(copy, tmp_path):
    change_results(copy, ("student", "test_accuracy"), 0.41)
    for score in ("influence", "out of fold"):  # [mean, half-width]: 0.93 against 0.52 is beyond any doubt
        found = [0.93 if score == "influence" else 0.52, 0.01]
        change_results(copy, ("mislabels", "detection", "any class", score, "found"), found)
    detection = json.loads((copy / "data/results.json").read_text(encoding="utf-8"))["mislabels"]["detection"]
    for score in {*detection["any class"]} - {"influence", "out of fold", "random"}:
        change_results(copy, ("mislabels", "detection", "any class", score, "found"), [0.3, 0.01])
    slides.write(tmp_path / "other.pdf", slides.build(copy))
    text = words(PdfReader(tmp_path / "other.pdf"))
    assert "gets 41 of 100" in text
    assert "one look in 10 finds 93 %." in text
    assert "Influence finds more wrong labels than any other way" in text


def test_a_picture_of_another_size_is_an_error(copy):
    shutil.copy(copy / "images/helpful-hound.png", copy / "images/influence-dog.png")
    with pytest.raises(typst.TypstError, match=re.escape("influence-dog.png is not 700 × 340 pixels")):
        slides.build(copy)


def test_the_sources_name_nothing_that_must_be_downloaded():
    assert "@preview" not in SOURCE
    assert "http" not in SOURCE
    assert all((ROOT / name).exists() for name in re.findall(r'"((?:images|data)/[^" ]+)"', SOURCE))


# ── legible ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_twelve_to_fourteen_pages_none_of_which_overflows(reader):
    outline = slides.outline(ROOT)
    assert 12 <= len(outline) <= 14
    assert len(reader.pages) == len(outline)  # what does not fit on a slide would begin another page
    for page in reader.pages:
        assert round(float(page.mediabox.width / page.mediabox.height), 2) == round(16 / 9, 2)
    assert PDF.stat().st_size <= 3_000_000


def test_few_words_beside_a_picture_and_a_sentence_above_it(reader):
    for slide, page in zip(slides.outline(ROOT), reader.pages):
        assert slide["words"] <= 30, slide
        assert 3 <= len(slide["title"].split()) <= 16, slide
        spoken = [word for word in page.extract_text().split() if unicodedata.category(word[0]) != "Co"]  # no icon
        if slide["key"] == "The data":  # its picture is three tables of numbers
            spoken = [word for word in spoken if not word.isdigit()]
        assert len(spoken) <= (100 if "formula" in slide["key"] else 75), slide


def test_no_letters_smaller_than_18_points(reader):
    smallest: dict[str, float] = {}
    keys = [slide["key"] for slide in slides.outline(ROOT)]
    pages = {key: page for key, page in zip(keys, reader.pages) if "formula" not in key}  # it has subscripts
    for number, page in pages.items():

        def see(text, _, matrix, __, size, number=number):
            if text.strip():
                smallest[number] = min(smallest.get(number, 99), abs(size * matrix[3]))

        page.extract_text(visitor_text=see)
    assert len(smallest) == len(keys) - 1
    assert min(smallest.values()) >= 17.9, smallest


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_words_stand_out_from_what_is_behind_them():
    colours = dict(re.findall(r'^#let ([\w-]+) = rgb\("(#\w{6})"\)', SOURCE, re.M))
    for name in ("ink", "grey", "blue", "vermilion-ink"):  # on white, and white on them
        assert 1.05 / (luminance(colours[name]) + 0.05) >= 4.5, name
    assert not re.search(r"(?:text|caption)\([^)\n]*\b(?:pale|vermilion)\b(?!-)", SOURCE)
    assert (colours["blue"], colours["vermilion"]) == ("#0072B2", "#D55E00")  # as in the figures


def test_every_font_is_embedded(reader):
    fonts = [font.get_object() for page in reader.pages for font in page["/Resources"]["/Font"].values()]
    assert fonts
    for font in fonts:
        for part in font.get("/DescendantFonts", [font]):
            assert {"/FontFile", "/FontFile2", "/FontFile3"} & set(part.get_object()["/FontDescriptor"]), font


def structure(node: object) -> Iterator[DictionaryObject]:
    """All elements of the tree that tells a screen reader what is where."""
    node = node.get_object() if hasattr(node, "get_object") else node
    if isinstance(node, list):
        for child in node:
            yield from structure(child)
    elif isinstance(node, DictionaryObject):
        yield node
        yield from structure(node.get("/K", []))


def test_every_picture_has_words_for_those_who_cannot_see_it(reader):
    figures = [node for node in structure(reader.trailer["/Root"]["/StructTreeRoot"]) if node.get("/S") == "/Figure"]
    assert len(figures) >= 30
    assert all(len(str(figure.get("/Alt", ""))) >= 8 for figure in figures)
    calls = [found.start() for found in re.finditer(r"\bimage\(", SOURCE)]
    assert calls
    assert all("alt: alt" in SOURCE[start : start + 160] for start in calls)


# ── notes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_slide_has_notes_of_two_to_four_sentences_without_numbers():
    _, *parts = re.split(r"^## ", (ROOT / "presentation-notes.md").read_text(encoding="utf-8"), flags=re.M)
    headings, texts = zip(*(part.split("\n", 1) for part in parts))
    assert list(headings) == [f"{number} {slide['key']}" for number, slide in enumerate(slides.outline(ROOT), 1)]
    for heading, text in zip(headings, texts):
        assert 2 <= len(re.findall(r"[.?!](?=\s|$)", text)) <= 4, heading
        assert not re.search(r"\d", text), heading  # a number would go stale: the slides read theirs from the results
