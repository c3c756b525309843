"""What the project's own tables say of single images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Note:
    """Of one image: `badge`, in the two words that a card has room for, and `text`, without its full stop."""

    badge: str
    text: str


Notes = dict[int, list[Note]]
"""Number of an image → what is noted of it."""


def near_duplicates_of(pairs: pd.DataFrame | None, role: str) -> Notes:
    """The near-duplicates of train or test images; pairs: as in near-duplicates.csv."""
    notes: Notes = {}
    for pair in [] if pairs is None else pairs.to_dict("records"):
        for one, other in (("a", "b"), ("b", "a")):
            if pair[f"set_{one}"] == role:
                badge, kind = ("copy", "the same") if pair["exact"] else ("near-copy", "nearly the same")
                place = {"train": "training", "test": "test"}[pair[f"set_{other}"]]
                text = f"{kind} picture as {place} image {pair[f'index_{other}']}, labelled {pair[f'label_{other}']}"
                notes.setdefault(int(pair[f"index_{one}"]), []).append(Note(badge, text))
    return notes


def suspects_of(table: pd.DataFrame | None) -> Notes:
    """Why the labels of training images are suspected; table: of `notebook_support.list_suspects`."""
    rows = [] if table is None else table.to_dict("records")
    return {
        int(row["index"]): [Note(f"suspect {place}", f"suspect {place} of {len(rows)}: {row['reason']}")]
        for place, row in enumerate(rows, 1)
    }


def merged(*parts: Mapping[int, list[Note]]) -> Notes:
    """All notes of each image."""
    images = {number for part in parts for number in part}
    return {number: [note for part in parts for note in part.get(number, [])] for number in images}


def to_judge(table: pd.DataFrame | None, count: int) -> list[dict[str, Any]]:
    """The first suspects, for the reader to judge: number, both labels, what the other models said, and why."""
    rows = [] if table is None else table.head(count).to_dict("records")
    names = {"number": "index", "given": "given", "suggested": "suggested", "reason": "reason"}
    chances = {"givenChance": "given_probability", "suggestedChance": "suggested_probability"}
    return [{ours: row[theirs] for ours, theirs in (names | chances).items()} for row in rows]
