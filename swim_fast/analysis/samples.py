"""Samples whose rows are the words of referring expressions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from swim_fast.analysis.words import tag_words
from swim_fast.data.sample.builder import Row, Sample, SampleBuilder
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record


@dataclass
class WordSample(Sample):
    """A sample of words, whose further rows read the model's own causal softmax.

    Attributes:
        classes: class of each tag, see `swim_fast.analysis.words`.
        not_analysed: number of tagged nouns whose expression is not clear.
        words: tag and token position of each token of a word with a mask, W pairs. Behind the rows of the maps, `rows`
            holds C rows for each: the causal softmax, read out on tokens 0 … length in C blocks.
        first_causal: index of the first of those rows.
        length: tokens that are read out.
    """

    classes: list[str] = field(default_factory=list)
    not_analysed: int = 0
    words: list[tuple[int, int]] = field(default_factory=list)
    first_causal: int = 0
    length: int = 0


def build_word_sample(builder: SampleBuilder, record: Record) -> WordSample:
    """Build the sample of a record's words; one without rows if there is nothing to analyse.

    Raises:
        DataError: as of the builder; the visual tokens of a temporal patch are no block.
        MissingLibraryError: HanTa is not installed.
    """
    if not record.objects:
        return WordSample(record.name, {})
    tagged, classes, skipped = tag_words(record)
    if not tagged.objects:
        return WordSample(record.name, {}, not_analysed=skipped)
    sample = WordSample(**vars(builder(tagged)), classes=classes, not_analysed=skipped)
    if not sample.rows:
        return sample
    if sample.over == "set":  # the causal rows are over ranges, and a batch has one kind
        for row in sample.rows:
            if row.key_end - row.key_start != len(sample.key_sets[row.key_set]):
                reason = "its visual tokens are no block; analyse it with --softmax causal"
                raise DataError(reason, source=record.source, record=record.number, name=record.name)
        sample.over = "range"
    sample.words = list(dict.fromkeys((tag, row.position) for tag, row in zip(sample.tags, sample.rows, strict=True)))
    sample.first_causal, first_set = len(sample.rows), len(sample.key_sets)
    sample.length = 1 + max(position for _, position in sample.words)
    # In blocks as long as the other key sets, so that these are not padded to the length of the sequence.
    sample.key_sets += torch.arange(sample.length).split(max(map(len, sample.key_sets)))
    for _, position in sample.words:
        sets = range(first_set, len(sample.key_sets))
        sample.rows += [Row(position, 0, position + 1, key_set) for key_set in sets]
    return sample


def name_token(sample: WordSample, position: int, tokenizer: Any) -> str:
    """Name a token that is a sink: the first, a cell of a temporal patch, or a text token as it is written."""
    if position == 0:
        return "first token"
    kinds = sample.inputs["mm_token_type_ids"]
    if not kinds[position]:
        return f"text {tokenizer.decode([int(sample.inputs['input_ids'][position])])!r}"
    found = torch.nonzero(sample.cells == position).tolist()
    if not found:
        return "visual, of no cell"
    patch, row, column = found[0]
    return f"visual, patch {patch}, row {row}, column {column}"
