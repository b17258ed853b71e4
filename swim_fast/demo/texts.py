"""Questions and answers about the demo's clips, with `<ins>` tags around the nouns whose masks are known."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from swim_fast.demo.drawing import SHADES
from swim_fast.demo.scenes import DIRECTIONS, NOUNS, SIZES, Item

# (question, answer) about one object. The answer follows from the question and the clip, so it can be checked exactly.
Template = tuple[str, str]
SHADE_QUESTIONS: tuple[Template, ...] = (
    ("Is the {noun} light or dark?", "It is {shade}."),
    ("Which shade has the {noun}?", "The {again} is {shade}."),
)
SIZE_QUESTIONS: tuple[Template, ...] = (
    ("Is the {noun} big or small?", "It is {size}."),
    ("How large is the {noun}?", "The {again} is {size}."),
)
MOTION_QUESTIONS: tuple[Template, ...] = (
    ("What is the {noun} doing?", "It {motion}."),
    ("Which way does the {noun} go?", "The {again} {motion}."),
)
DESCRIPTIONS: tuple[Template, ...] = (
    ("Describe the {noun}.", "A {size} {shade} {again} that {motion}."),
    ("What can you say about the {noun}?", "The {size} {shade} {again} {motion}."),
)
QUESTIONS = (SHADE_QUESTIONS, SIZE_QUESTIONS, MOTION_QUESTIONS)


def fill(template: Template, item: Item, *, tag_answer: bool) -> tuple[str, str]:
    """Return question and answer about an object; its noun is tagged in the question, and as wished in the answer."""
    tagged = f"<ins>{item.noun}</ins>"
    motion = f"moves {item.direction}" if item.direction else "stays still"
    question, answer = template
    again = tagged if tag_answer else item.noun
    return question.format(noun=tagged), answer.format(again=again, shade=item.shade, size=item.size, motion=motion)


def pick(rng: np.random.Generator, *kinds: Sequence[Template]) -> Template:
    """Draw a template of one of the kinds, each kind being as likely as the others."""
    templates = kinds[int(rng.integers(len(kinds)))]
    return templates[int(rng.integers(len(templates)))]


def all_texts() -> Iterator[str]:
    """Yield every question and answer there can be, untagged: what the tokenizer learns from."""
    for look in itertools.product(NOUNS, SHADES, SIZES, DIRECTIONS):
        item = Item(*look, radius=0.0, tilt=0.0, start=(0.0, 0.0), end=(0.0, 0.0))
        for template in itertools.chain(*QUESTIONS, DESCRIPTIONS):
            for text in fill(template, item, tag_answer=False):
                yield text.replace("<ins>", "").replace("</ins>", "")
