"""The modules of web/ joined to one, which a page can hold and a widget can load."""

from __future__ import annotations

import re
from pathlib import Path

WEB = Path(__file__).parent / "web"
IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w-]+\.js)";\n', re.M)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|class) )", re.M)
NAME = re.compile(r"^(?:export )?(?:async )?(?:function|const|let|class) (\w+)", re.M)


def bundle(entry: str) -> str:
    """`entry` and every module it needs as one ES module, what is needed first; the entry keeps its exports.

    Modules may say `import { a, b } from "./name.js";` and export functions, classes and constants by their names, no
    more; and no two may give the same name to different things, for which there is an error: their text is joined.
    """
    order: list[str] = []
    _visit(entry, order, ())
    texts = {name: (WEB / name).read_text(encoding="utf-8") for name in order}
    owners: dict[str, str] = {}
    for name, text in texts.items():
        for top in NAME.findall(text):
            if owners.setdefault(top, name) != name:
                raise ValueError(f"{top} is a name of both {owners[top]} and {name}; rename one")
    parts = []
    for name, text in texts.items():
        text = IMPORT.sub("", text)
        if left := re.search(r"^import .*", text, re.M):
            raise ValueError(f"{name}: {left[0]!r} is not of the form that can be joined")
        parts.append(f"// ── {name}\n{text if name == entry else EXPORT.sub('', text)}")
    return "\n".join(parts)


def _visit(name: str, order: list[str], above: tuple[str, ...]) -> None:
    if name in above:
        raise ValueError(f"modules import each other: {' → '.join((*above, name))}")
    if name not in order:
        for needed in IMPORT.findall((WEB / name).read_text(encoding="utf-8")):
            _visit(needed, order, (*above, name))
        order.append(name)
