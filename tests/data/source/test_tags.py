import time

import numpy as np
import pytest
import torch

from swim_fast.data.source.errors import DataError
from swim_fast.data.source.tags import TokenRanges, strip_tags


@pytest.mark.parametrize(
    ("text", "clean", "nouns"),
    [
        ("no tags", "no tags", []),
        ("", "", []),
        ("<ins>dog</ins>", "dog", ["dog"]),
        ("the <ins>dog</ins> and the <ins>dog</ins>", "the dog and the dog", ["dog", "dog"]),
        ("the <ins> brown dog\n</ins>.", "the  brown dog\n.", ["brown dog"]),
        ("<ins>a</ins><ins>b</ins>", "ab", ["a", "b"]),
        ("“<ins>Löwe</ins>”, <ins>🐶</ins>", "“Löwe”, 🐶", ["Löwe", "🐶"]),
        ("is a<b and b>c, </in> <insert>?", "is a<b and b>c, </in> <insert>?", []),
    ],
)
def test_strip_tags(text, clean, nouns):
    got, spans = strip_tags(text)
    assert got == clean
    assert [got[start:end] for start, end in spans] == nouns


def test_spans_of_a_repeated_noun_are_those_of_the_tags():
    clean, spans = strip_tags("dog, dog, <ins>dog</ins>, dog, <ins>dog</ins>")
    assert spans == [(10, 13), (20, 23)]
    assert clean == "dog, dog, dog, dog, dog"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a <ins>big <ins>dog</ins></ins>", "a <ins> tag inside another one, at 'a <ins>big <ins>dog</ins></ins>'"),
        ("a dog</ins> runs", "</ins> without <ins> before it, at 'a dog</ins> runs'"),
        ("a <ins>dog</ins></ins>", "</ins> without <ins> before it"),
        ("a <ins>dog runs", "<ins> is never closed in 'a <ins>dog runs'"),
        ("a <ins></ins> runs", "an <ins> tag with nothing in it, at 'a <ins></ins> runs'"),
        ("a <ins> \n</ins> runs", "an <ins> tag with nothing in it"),
    ],
)
def test_bad_tags(text, reason):
    with pytest.raises(DataError) as error:
        strip_tags(text)
    assert str(error.value).startswith(reason)


def test_every_overlapping_token_belongs_to_a_span_and_no_empty_one():
    offsets = torch.tensor([[0, 3], [3, 5], [5, 8], [5, 8], [6, 6], [8, 9], [0, 0]])
    assert TokenRanges(offsets).tokens_of((3, 5)) == [1]
    assert TokenRanges(offsets).tokens_of((4, 7)) == [1, 2, 3]
    assert TokenRanges(offsets).tokens_of((2, 4)) == [0, 1]
    assert TokenRanges(offsets).tokens_of((7, 9)) == [2, 3, 5]
    assert TokenRanges(offsets).tokens_of((9, 12)) == []


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("Is the <ins>dog</ins> a dog, or is the other dog the <ins>dog</ins>?", [" dog", " dog"]),
        ("(<ins>dog</ins>)", ["dog"]),  # some tokens hold the bracket too: see the assertion
        ("the <ins>dog</ins>'s ball", [" dog"]),
        ("two  <ins>dogs</ins>!", [" dogs"]),
        ("<ins>dog</ins>\n\ncat", ["dog"]),
        ("ein <ins>Löwenbändiger</ins> läuft", [" Löwenbändiger"]),
        ("das cafe\u0301 <ins>cafe\u0301</ins>.", [" cafe\u0301"]),  # Qwen's tokenizer composes the accent
        ("看<ins>小狗</ins>跑", ["小狗"]),
        ("a <ins>🐶</ins> and a 🐶🏽", [" 🐶"]),
        ("the <ins>👨‍👩‍👧</ins> family", [" 👨‍👩‍👧"]),
        ("x<ins>y</ins>z", ["y"]),
    ],
)
def test_tokens_of_a_noun_spell_it(tokenizer, text, nouns):
    import unicodedata

    clean, spans = strip_tags(text)
    encoding = tokenizer(clean, return_offsets_mapping=True, return_tensors="pt", add_special_tokens=False)
    ids, offsets = encoding["input_ids"][0], encoding["offset_mapping"][0]
    for span, noun in zip(spans, nouns, strict=True):
        tokens = TokenRanges(offsets).tokens_of(span)
        assert tokens == list(range(tokens[0], tokens[-1] + 1))
        spelt = tokenizer.decode(ids[tokens])
        assert unicodedata.normalize("NFC", noun.strip()) in spelt
        # With the first or last token left out it is no longer spelt: none of them is too many.
        assert all(noun.strip() not in tokenizer.decode(ids[part]) for part in (tokens[1:], tokens[:-1]))
        before, after = tokenizer.decode(ids[: tokens[0]]), tokenizer.decode(ids[tokens[-1] + 1 :])
        assert before + spelt + after == unicodedata.normalize("NFC", clean)
        assert len(before) <= len(unicodedata.normalize("NFC", clean[: span[0]]))


@pytest.mark.parametrize("seed", range(5))
def test_tokens_of_random_spans_are_those_of_a_full_search(seed):
    generator = np.random.default_rng(seed)
    ends = np.sort(generator.integers(0, 60, 40))
    starts = np.maximum(np.concatenate(([0], ends[:-1])) - generator.integers(0, 2, 40), 0)
    offsets = np.stack((np.maximum.accumulate(np.minimum(starts, ends)), ends), axis=1)
    offsets[generator.integers(0, 40, 5)] = 0  # tokens without characters
    ranges = TokenRanges(torch.from_numpy(offsets))
    for start in range(60):
        for end in range(start + 1, 62):
            expected = [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > start]
            assert ranges.tokens_of((start, end)) == expected


def test_many_tags_take_linear_time():
    def seconds(count):
        begin = time.perf_counter()
        _, spans = strip_tags("the <ins>dog</ins> " * count)
        ranges = TokenRanges(torch.tensor([(4 * i, 4 * i + 4) for i in range(2 * count)]))
        assert sum(len(ranges.tokens_of(span)) for span in spans) >= count
        return time.perf_counter() - begin

    assert seconds(40_000) < 2.5  # took minutes when each tag went through all text and all tokens
