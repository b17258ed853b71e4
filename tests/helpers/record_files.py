"""Records of the kind that the files hold, for tests."""

from __future__ import annotations

from swim_fast.data.source.errors import DataError

MASK = {"size": [4, 6], "counts": "04000"}
TRICKY = [
    'plain',
    'quotes " and \\" and \\\\" inside',
    'brackets ][}{ , "x": [1, {',
    "ends in a backslash \\",
    "many \\\\\\\\\\ of them \\\\",
    "Ünïcödé 熊 🐻 \u2028 \x7f",
    "controls \n \t \r \b",
    "RLE [m]\\n^Y0O2N`{|}",
    "",
]  # fmt: skip


def make_entry(number, text="Describe the <ins>cub</ins>.", **changes):
    """A VideoRefer-style record with one tagged noun; ``changes`` replace fields, or remove them with ``...``."""
    entry = {
        "index": f"clip_{number}",
        "video": f"clips/{number}.mp4",
        "conversations": [{"from": "human", "value": f"<video>\n{text}"}, {"from": "gpt", "value": f"It is {number}."}],
        "annotation": [{"36": {"segmentation": MASK}, "52": {"segmentation": None}}],
    }
    entry.update(changes)
    return {key: value for key, value in entry.items() if value is not ...}


def make_entries(count=40):
    """Records whose texts hold everything that a careless scan stumbles over."""
    texts = [f"{TRICKY[i % len(TRICKY)]} the <ins>cub</ins>" for i in range(count)]
    return [make_entry(i, text, nested=[[{"id": [i]}], []]) for i, text in enumerate(texts)]


def names_of(file):
    """The names of all records of a RecordFile, None for those that are malformed."""
    names = []
    for number in range(len(file)):
        try:
            names.append(file[number].name)
        except DataError:
            names.append(None)
    return names
