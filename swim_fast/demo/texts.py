"""Questions and answers about the demo's clips, with `<ins>` tags around the nouns whose masks are known."""

import itertools
from collections.abc import Iterator

from swim_fast.data.source.tags import strip_tags
from swim_fast.demo.scenes import NOUNS, STATES

QUESTION, ANSWER = "What does the {noun} do?", "The {noun} {state}."


def ask(noun: str, state: str, *, tag_answer: bool) -> tuple[str, str]:
    """Return question and answer about an object; its noun is tagged in the question, and as wished in the answer."""
    tagged = f"<ins>{noun}</ins>"
    return QUESTION.format(noun=tagged), ANSWER.format(noun=tagged if tag_answer else noun, state=state)


def all_texts() -> Iterator[str]:
    """Yield every question and answer there can be, untagged: what the tokenizer learns from."""
    for noun, state in itertools.product(NOUNS, STATES):
        for text in ask(noun, state, tag_answer=False):
            yield strip_tags(text)[0]
