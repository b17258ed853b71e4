"""Words of referring expressions and their classes, on phrases as data sets have them."""

import pytest

from swim_fast.analysis.words import find_words, tag_words
from swim_fast.data.source.records import Record, Turn
from swim_fast.data.source.tags import strip_tags

pytest.importorskip("HanTa")
SHORT = {"noun": "N", "attribute": "a", "other noun": "n", "function word": "f"}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<video>\nWhat does the small <ins>dog</ins> on the left do?", "the/f small/a dog/N on/f the/f left/a"),
        ("<video>A red <ins>fire truck</ins> with a white roof", "A/f red/a fire truck/N with/f a/f white/a roof/n"),
        ("And the red fire <ins>truck</ins>?", "the/f red/a fire/a truck/N"),
        ("Why is a black and white <ins>cat</ins> asleep?", "a/f black/a and/f white/a cat/N"),
        ("Is the <ins>heart</ins> big or small?", "the/f heart/N"),
        ("What is the <ins>man</ins> in black doing?", "the/f man/N in/f black/a"),
        ("the second <ins>boy</ins> wearing a red jacket", "the/f second/a boy/N wearing/a a/f red/a jacket/n"),
        ("The dog's long <ins>tail</ins> “wags”.", "The/f dog/n long/a tail/N"),
    ],
)  # fmt: skip
def test_words_of_an_expression(text, expected):
    clean, nouns = strip_tags(text)
    words, left_out = find_words(clean, nouns)
    assert " ".join(f"{clean[word.start : word.end]}/{SHORT[word.kind]}" for word in words) == expected
    assert left_out == [] and {word.tag for word in words} == {0}


@pytest.mark.parametrize(
    "text",
    [
        "小<ins>狗</ins>在做什么？",
        "the 小 <ins>dog</ins>",
        "Was macht der kleine <ins>Hund</ins> links?",
        "der <ins>Student</ins> in rot",
        "Où est le petit <ins>chien</ins> noir ?",
        "Perro negro grande <ins>perro</ins> corre",
        "What does the xqzt <ins>dog</ins> do?",
        "Who <ins>runs</ins> fast?",
        "What is <ins>...</ins> here?",
    ],
)
def test_what_is_not_clear_is_not_analysed(text):
    assert find_words(*strip_tags(text)) == ([], [0])


def test_each_word_belongs_to_one_of_several_tags():
    turns = (
        Turn("user", "<video>\nIs the <ins>man</ins> beside the red <ins>ball</ins> old? Or <ins>Hund</ins>?"),
        Turn("assistant", "The young <ins>woman</ins> on the left is."),
    )
    objects = ({0: "man"}, {0: "ball"}, {0: "Hund"}, {0: "woman"})
    tagged, classes, skipped = tag_words(Record("file", 0, "", turns, "video", None, objects))
    assert tagged.turns[0].text == (
        "<video>\nIs <ins>the</ins> <ins>man</ins> <ins>beside</ins> <ins>the</ins> <ins>red</ins> <ins>ball</ins> "
        "old? Or Hund?"
    )
    assert [found[0] for found in tagged.objects] == ["man"] * 3 + ["ball"] * 3 + ["woman"] * 6
    assert "".join(SHORT[kind] for kind in classes) == "fNffaNfaNffa"
    assert skipped == 1 and strip_tags(tagged.turns[1].text)[0] == strip_tags(turns[1].text)[0]
