"""The page of a record, made of plain values."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from jinja2 import UndefinedError

from swim_fast.viz.record import COLOURS, Frame, Patch, Piece, RecordView, outline_masks, write_record_page
from swim_fast.viz.report import data_uri, write_page

NASTY = "<script>alert('x')</script> & \"<b>\""


class Elements(HTMLParser):
    """Collects start tags with their attributes, and the text of each `mark`."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.marks, self._open = [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = dict(attributes)["class"].strip() if tag == "mark" else None

    def handle_data(self, data):
        if self._open:
            self.marks.append((self._open, data))
            self._open = None


def view(**changes):
    frame = np.full((48, 64, 3), 120, np.uint8)
    mask = np.zeros((48, 64), np.uint8)
    mask[10:20, 10:20] = 1
    values = {
        "title": NASTY,
        "facts": [(NASTY, NASTY, NASTY)],
        "nouns": ["dog", "小狗", NASTY],
        "text": [Piece(NASTY), Piece("dog", "", 0), Piece(" and\n "), Piece("小狗", "answer", 1)],
        "tokens": [Piece(NASTY, "special", None, "0"), Piece(" dog", "label", 0, "1"), Piece("\n", "", None, "2")],
        "rows": [(0, NASTY, 1, "0 to 1", [0])],
        "patches": [
            Patch("patch 0", "3 to 8", [Frame(frame, NASTY, {0: mask}), Frame(frame)], [0]),
            Patch("patch 1", "9 to 14", [Frame(frame)]),
        ],
        "grid": (2, 3),
        "notes": [NASTY],
    }
    return RecordView(**{**values, **changes})


def page(tmp_path, **changes):
    return write_record_page(tmp_path / "new" / "record.html", view(**changes)).read_text("utf-8")


def test_the_page_needs_nothing_else(tmp_path):
    found = Elements(page(tmp_path))
    assert {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object"} == set()
    addresses = [value for _, attributes in found.tags for key, value in attributes.items() if key in ("src", "href")]
    assert len(addresses) == 3 and all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert not re.search(r"url\(|@import|https?:", page(tmp_path))


def test_all_text_is_escaped(tmp_path):
    text = page(tmp_path)
    assert "<script" not in text and "<b>&#34;" not in text
    escaped = "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;&lt;b&gt;&#34;"
    assert text.count(escaped) >= 9  # title twice, facts, noun, text, row, label, alternative text, note


def test_nouns_have_the_colour_of_their_masks(tmp_path):
    text = page(tmp_path)
    marks = Elements(text).marks
    assert {name for classes, name in marks if classes.split()[0] == "n0"} == {"dog"}
    assert ("n1 answer", "小狗") in marks
    for i, colour in enumerate(COLOURS):
        assert f".n{i} {{ --noun: rgb{colour}; }}" in text
    many = [f"noun {i}" for i in range(9)]
    assert ("n1", "noun 8") in Elements(page(tmp_path, nouns=many)).marks  # the colours start over


def test_white_space_is_kept_in_the_text_and_shown_in_the_tokens(tmp_path):
    text = page(tmp_path)
    (sheet,) = re.findall(r'<div class="sheet text">(.*?)</div>', text, re.S)
    assert re.sub("<[^>]*>", "", sheet).endswith("dog and\n 小狗")
    assert "<code>·dog</code>" in text and "<code>↵</code>" in text


def test_supervised_patches_stand_out(tmp_path):
    classes = [attributes["class"].split() for tag, attributes in Elements(page(tmp_path)).tags if tag == "section"]
    assert classes == [["patch", "supervised"], ["patch"]]


def test_text_alone_has_no_frames(tmp_path):
    text = page(tmp_path, patches=[], rows=[], nouns=[], text=[Piece("a")], tokens=[Piece("a")])
    assert "What the model sees" not in text and "None: no tagged noun" in text and "<img" not in text


def test_long_conversations_fold_their_tokens(tmp_path):
    assert "<details open" in page(tmp_path)
    assert "<details >" in page(tmp_path, tokens=[Piece("a", "", None, str(i)) for i in range(2000)])


def test_outlines_are_where_the_masks_are():
    frame = np.full((48, 64, 3), 120, np.uint8)
    first, second = np.zeros((2, 48, 64), np.uint8)
    first[5:20, 5:20] = second[30:45, 40:60] = 1
    image = outline_masks(Frame(frame, masks={0: first, 8: second}))
    assert image.shape == (420, 560, 3)
    for mask, colour in ((first, COLOURS[0]), (second, COLOURS[1])):
        rows, columns = np.nonzero((image == colour).all(-1))
        inside = np.argwhere(mask) * 8.75
        assert np.abs([rows.min() - inside[:, 0].min(), columns.min() - inside[:, 1].min()]).max() < 8
    assert tuple(image[10 * 8, 10 * 8]) == (120, 120, 120)  # the object keeps its own colours


def test_a_template_names_only_what_it_is_given(tmp_path):
    with pytest.raises(UndefinedError):
        write_page(tmp_path / "a.html", "record.html", view=view(), colours=[])
    assert not list(tmp_path.iterdir())


def test_data_uri():
    import base64
    import io

    from PIL import Image

    address = data_uri(np.full((4, 6, 3), 200, np.uint8))
    with Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (6, 4))
