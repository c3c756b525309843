"""The explorer as a page: index.html with everything but the images, and the sheets of images beside it."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

from influence_functions._support import atomic_path

from .bundle import WEB, bundle
from .payload import Payload

SHEET = re.compile(r"explorer-(test|train)-\d+\.jpg")


def write_page(payload: Payload, folder: str | Path) -> list[Path]:
    """Write index.html and sheets into `folder`; the files. Whatever else lies there, but for older sheets, stays.

    Opens from the file system: modules and data are in the page, since browsers refuse to load either from a file,
    and images beside it, since these they load.
    """
    target, written = Path(folder), []
    target.mkdir(parents=True, exist_ok=True)
    names: dict[str, list[str]] = {}
    for role, sheets in (("test", payload.test), ("train", payload.train)):
        names[role] = [f"explorer-{role}-{k}.jpg" for k in range(len(sheets.files))]
        for name, content in zip(names[role], sheets.files):
            with atomic_path(target / name) as temporary:
                temporary.write_bytes(content)
            written.append(target / name)
    page = (WEB / "page.html").read_text(encoding="utf-8")
    for mark, text in (
        ("/* style */", (WEB / "style.css").read_text(encoding="utf-8")),
        ("/* modules */", bundle("page.js")),
        ("/* data */", _in_script({**payload.data, "sheets": names})),
        ("<!-- title -->", html.escape(str(payload.data["words"].get("title", "Influence explorer")))),
    ):
        before, found, after = page.partition(mark)
        if not found:
            raise ValueError(f"web/page.html lacks its mark {mark}")
        page = before + text + after
    with atomic_path(target / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    for old in {file for file in target.iterdir() if SHEET.fullmatch(file.name)} - {*written}:
        old.unlink()
    return [target / "index.html", *written]


def _in_script(data: object) -> str:
    """JSON that no text in it can end: "<" is escaped."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
