"""Part the documents of a corpus into those to train on and those to judge by.

Decides which are held out: by a hash of their content, so that neither their order nor the rank nor the run's seed matters (a
student is never judged on what another run, such as its teacher's, has trained on), and two equal documents never end up on
both sides.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from datasets import Dataset

Part = Literal["train", "held_out"]
RULES = 1
"""Counts changes of what is held out of a text."""
_NEAR = 0.5
"""How far before the place asked for a text may be cut, in parts of what is held out."""
_SALT = b"0 "
"""Decides what is held out. With another one, students trained before would be judged on what they have read."""


def select_part(documents: Dataset, *, part: Part, held_out_fraction: float) -> Dataset:
    """Return the documents of one part, in their order; the parts share no document and leave none out.

    Documents are held out in the order of their hash while they fit into `held_out_fraction` of all characters (one
    that does not fit is passed over; the shortest is held out if none fits). Of a corpus of one document the end is held out,
    cut off near the place asked for, at a blank line or a line's end where one is near.

    Args:
        documents: a data set with a column `text`.
        part: which side.
        held_out_fraction: share of the characters to hold out, 0 up to but not including 1; 0 holds out nothing.
    """
    if held_out_fraction > 0 and len(documents) == 1:
        train, held_out = _cut_in_two(documents["text"][0], held_out_fraction)
        text = train if part == "train" else held_out
        return type(documents).from_dict({**documents.to_dict(), "text": [text]})
    digests: list[bytes] = []
    sizes: dict[bytes, int] = {}
    for text in documents["text"]:
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        digests.append(digest)
        sizes[digest] = sizes.get(digest, 0) + len(text)
    held_out = _choose(sizes, held_out_fraction)
    return documents.select([i for i, d in enumerate(digests) if (d in held_out) == (part == "held_out")])


def _choose(sizes: dict[bytes, int], fraction: float) -> set[bytes]:
    """Choose the contents to hold out, by their sizes in characters."""
    if fraction <= 0 or len(sizes) < 2:
        return set()
    budget = fraction * sum(sizes.values())
    chosen: set[bytes] = set()
    for digest in sorted(sizes, key=lambda content: hashlib.blake2b(_SALT + content).digest()):
        if sizes[digest] <= budget:
            chosen.add(digest)
            budget -= sizes[digest]
    return chosen or {min(sizes, key=lambda content: (sizes[content], content))}


def _cut_in_two(text: str, fraction: float) -> tuple[str, str]:
    """Cut a text at a blank line near the place asked for, else at a line's end there, else just there."""
    cut = max(1, int(len(text) * (1 - fraction)))
    # Further away would hold out another share of the text than was asked for.
    nearest = cut - int(_NEAR * fraction * len(text))
    for end in ("\n\n", "\n"):
        place = text.rfind(end, max(0, nearest), cut)
        if place > 0:
            return text[: place + len(end)], text[place + len(end) :]
    return text[:cut], text[cut:]
