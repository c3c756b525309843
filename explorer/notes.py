"""What the project's own tables say of single images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def a(noun: str) -> str:
    """The noun with its article: "an automobile"."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def near_duplicates_of(pairs: pd.DataFrame | None, role: str) -> dict[int, list[str]]:
    """Number of a train or test image → what its near-duplicates are; pairs: as in near-duplicates.csv."""
    notes: dict[int, list[str]] = {}
    for pair in [] if pairs is None else pairs.to_dict("records"):
        for one, other in (("a", "b"), ("b", "a")):
            if pair[f"set_{one}"] == role:
                kind = "the same picture as" if pair["exact"] else "nearly the same picture as"
                place = {"train": "training", "test": "test"}[pair[f"set_{other}"]]
                twin = f"{place} image {pair[f'index_{other}']}, {a(pair[f'label_{other}'])}"
                notes.setdefault(int(pair[f"index_{one}"]), []).append(f"{kind} {twin}")
    return notes


def suspects_of(table: pd.DataFrame | None) -> dict[int, list[str]]:
    """Number of a training image → why its label is suspected; table: of `notebook_support.list_suspects`."""
    rows = [] if table is None else table.to_dict("records")
    return {
        int(row["index"]): [f"suspect {place} of {len(rows)}: {row['reason'].removesuffix('?')}"]
        for place, row in enumerate(rows, 1)
    }


def merged(*parts: dict[int, list[str]]) -> dict[int, list[str]]:
    """All notes of each image."""
    return {key: [note for part in parts for note in part.get(key, [])] for key in {*parts[0], *parts[-1]}}


def to_judge(table: pd.DataFrame | None, count: int) -> list[dict[str, Any]]:
    """The first suspects, for the reader to judge: number, both labels, what the other models said, and why."""
    rows = [] if table is None else table.head(count).to_dict("records")
    names = {"number": "index", "given": "given", "suggested": "suggested", "reason": "reason"}
    chances = {"givenChance": "given_probability", "suggestedChance": "suggested_probability"}
    return [{ours: row[theirs] for ours, theirs in (names | chances).items()} for row in rows]
