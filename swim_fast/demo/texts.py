"""What is asked and said about a demo clip, with ``<ins>`` tags around the nouns whose masks are known."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from swim_fast.demo.scenes import COLOUR_NAMES, DIRECTIONS, NOUNS, Item

# (question, answer): what the answer is follows from the question and the clip, so that it can be checked exactly.
COLOUR_TEMPLATES = (
    ("What colour is the {noun}?", "The {noun_again} is {colour}."),
    ("Tell me the colour of the {noun}.", "It is {colour}."),
    ("Look at the {noun}. Which colour is it?", "It is {colour}."),
)
MOTION_TEMPLATES = (
    ("Which way does the {noun} go?", "The {noun_again} {motion}."),
    ("What is the {noun} doing?", "It {motion}."),
    ("Watch the {noun}. Where does it move?", "It {motion}."),
)
DESCRIPTION_TEMPLATES = (
    ("Describe the {noun}.", "A {colour} {noun_again} that {motion}."),
    ("What can you say about the {noun}?", "The {colour} {noun_again} {motion}."),
)
WHOLE_CLIP_QUESTIONS = ("Describe the clip.", "What happens in this video?")
WHOLE_CLIP_SENTENCE = "The {colour} {noun} {motion}."


def motion_of(direction: str) -> str:
    """Predicate for a key of ``DIRECTIONS``: "moves up", "stays still"."""
    return f"moves {direction}" if direction else "stays still"


def tagged(noun: str) -> str:
    return f"<ins>{noun}</ins>"


def fill(template: tuple[str, str], noun: str, colour: str, direction: str, tag_answer: bool) -> tuple[str, str]:
    """Question and answer about one object; its noun is tagged in the question, and in the answer if ``tag_answer``."""
    question, answer = template
    again = tagged(noun) if tag_answer else noun
    return (
        question.format(noun=tagged(noun)),
        answer.format(noun_again=again, colour=colour, motion=motion_of(direction)),
    )


def whole_clip_answer(items: Sequence[Item]) -> str:
    """One sentence per object, from left to right as the clip begins."""
    ordered = sorted(items, key=lambda item: item.start[0])
    return " ".join(
        WHOLE_CLIP_SENTENCE.format(colour=i.colour, noun=tagged(i.noun), motion=motion_of(i.direction)) for i in ordered
    )


def all_texts() -> Iterator[str]:
    """Every question and answer there can be, untagged: what the tokenizer learns from."""
    for noun, colour, direction in itertools.product(NOUNS, COLOUR_NAMES, DIRECTIONS):
        for template in COLOUR_TEMPLATES + MOTION_TEMPLATES + DESCRIPTION_TEMPLATES:
            question, answer = fill(template, noun, colour, direction, tag_answer=False)
            yield question.replace("<ins>", "").replace("</ins>", "")
            yield answer
    yield from WHOLE_CLIP_QUESTIONS


def pick(rng: np.random.Generator, *kinds: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """A template of one of the kinds, each kind being as likely as the others."""
    templates = kinds[int(rng.integers(len(kinds)))]
    return templates[int(rng.integers(len(templates)))]
