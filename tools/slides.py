"""Build presentation.pdf from presentation.typ, images/ and data/results.json: what `make slides` does.

    python tools/slides.py
    python tools/slides.py --to build/presentation.pdf

Needs no network. The same inputs give the same bytes. Words on the pages are set in Manrope, icons come from Font
Awesome Free; both fonts are packages of requirements-dev.txt.
Some slides show parts of a picture, given in pixels: look at every page after a picture has changed.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import font_manrope
import fontawesomefree
import typst

ROOT = Path(__file__).resolve().parent.parent


def settings(root: Path) -> dict[str, Any]:
    """What typst needs in order to depend on nothing of this machine: its fonts, and a root for all paths."""
    icons = Path(fontawesomefree.__file__).parent / "static/fontawesomefree/webfonts"
    fonts = [font_manrope.font_directory, str(icons)]
    return {"root": str(root), "font_paths": fonts, "ignore_system_fonts": True}


def build(root: Path) -> bytes:
    """The slides of the project in folder `root` as PDF/UA, which demands alternative text for every picture.

    TypstError when results.json lacks a number, a picture is missing or another size, or a slide has too many words.
    """
    pdf = typst.compile(str(root / "presentation.typ"), pdf_standards="ua-1", **settings(root))
    assert isinstance(pdf, bytes)
    return pdf


def outline(root: Path) -> list[dict[str, Any]]:
    """What each slide says of itself: key (its name in the notes), title, words (beside the picture)."""
    found = typst.query(str(root / "presentation.typ"), "<slide>", field="value", **settings(root))
    return json.loads(found)


def write(target: Path, pdf: bytes) -> None:
    """Write to a temporary name, then rename, so that a stop never leaves half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=target.parent, suffix=".pdf", delete=False) as file:
        file.write(pdf)
    Path(file.name).chmod(0o644)
    os.replace(file.name, target)


def main() -> int:
    """Build the slides; exit status 1 and one line that says what is missing when that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the project (default: this one)")
    parser.add_argument("--to", type=Path, help="file to write (default: presentation.pdf in that folder)")
    options = parser.parse_args()
    target = options.to or options.root / "presentation.pdf"
    try:
        pdf, slides = build(options.root), outline(options.root)
    except typst.TypstError as error:
        print(f"presentation.typ: {error}\n{target} was not written", file=sys.stderr)
        return 1
    write(target, pdf)
    print(f"wrote {target}: {len(slides)} slides, {len(pdf) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
