"""A question in plain words about a clip or image: the spans of its nouns, and what the model reads."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swim_fast.data.sample.builder import SampleBuilder
from swim_fast.data.sample.conversation import PLACEHOLDER, Span
from swim_fast.data.sample.encoding import Encoding
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record, Turn
from swim_fast.data.source.tags import strip_tags
from swim_fast.data.video.reader import MediaInfo
from swim_fast.errors import OptionError

logger = logging.getLogger(__name__)

# A word does not go on in these; Chinese and Japanese write no spaces between theirs.
_LETTER = r"[^\W\u3040-\u9fff]"


@dataclass(frozen=True)
class Prompt:
    """A question about a clip or image, ready for a model.

    Attributes:
        record: the question as a record.
        encoding: tokens and pixels; `encoding.nouns` are the shown nouns.
        frames: indices of the frames that were taken, padding included.
        pixels: those frames as far as the model sees them, uint8 [T, H, W, 3].
        info: number, size and rate of the frames of the clip or image.
        temporal_patch_size: frames of a temporal patch, 1 for an image.
    """

    record: Record
    encoding: Encoding
    frames: list[int]
    pixels: np.ndarray
    info: MediaInfo
    temporal_patch_size: int

    def patches(self) -> list[list[int]]:
        """Return the distinct frame indices of each temporal patch."""
        size = self.temporal_patch_size
        return [sorted(set(self.frames[first : first + size])) for first in range(0, len(self.frames), size)]


def plain_question(text: str) -> str:
    """Return a question without `<ins>` tags, placeholders of the clip and white space around it.

    Raises:
        OptionError: nothing is left.
        DataError: tags that do not match.
    """
    plain = PLACEHOLDER.sub(" ", strip_tags(text)[0]).strip()
    if not plain:
        raise OptionError("the question is empty: ask something, such as 'What happens in the video?'")
    return plain


def find_noun(text: str, noun: str, occurrence: int | None = None) -> Span:
    """Return the half-open range of characters that is a noun in a text, as whole words in any case.

    Args:
        text: the question.
        noun: one or more words.
        occurrence: which one, from 1; None: the last.

    Raises:
        OptionError: it does not occur, or not so often; the words of the text are listed.
    """
    pattern = r"\s+".join(map(re.escape, noun.split()))
    found = [m.span() for m in re.finditer(rf"(?<!{_LETTER}){pattern}(?!{_LETTER})", text, re.IGNORECASE) if pattern]
    if not found:
        words = ", ".join(dict.fromkeys(re.findall(r"\w+(?:['’-]\w+)*", text)))
        raise OptionError(f"{noun!r} does not occur in the question; its words are: {words}")
    if occurrence is None:
        return found[-1]
    if not 1 <= occurrence <= len(found):
        times = "once" if len(found) == 1 else f"{len(found)} times"
        raise OptionError(f"{noun!r} occurs {times} in the question: there is no occurrence {occurrence}")
    return found[occurrence - 1]


def encode_question(builder: SampleBuilder, media: Path, kind: str, question: str, nouns: Sequence[Span]) -> Prompt:
    """Choose and decode the frames as training does, and encode the question up to where the answer begins.

    Args:
        builder: makes the samples of the model.
        media: video, folder of frames, or image.
        kind: "video" or "image".
        question: plain text.
        nouns: spans of the question that are to be found among the tokens.

    Raises:
        DataError: the clip cannot be decoded, or the processor refuses it or the question.
    """
    # Tagged as a whole, the question needs no search in what the template renders; the answer only marks its end.
    turns = (Turn("user", f"<ins>{question}</ins>"), Turn("assistant", "a"))
    record = Record("", 0, "", turns, kind, media, ({},))
    key = "the question"
    try:
        builder.render(record)
        key = None  # what is wrong with the clip names it
        plan = builder.plan(record)
    except DataError as error:
        raise DataError(error.reason, key=key) from error
    (start, _), (end, _) = plan.conversation.nouns[0], plan.conversation.answers[0]
    spans = tuple((start + first, start + last) for first, last in nouns)
    nothing = {"answers": (), "labels": ()}
    conversation = dataclasses.replace(plan.conversation, text=plan.conversation.text[:end], nouns=spans, **nothing)
    for note in plan.notes:
        logger.info("%s", note)
    logger.info("%d of the %d frames are shown to the model", len(set(plan.frames)), plan.info.num_frames)
    pixels = builder.reader.frames(record, plan.frames)
    if kind == "image":
        encoding = builder.encode.image(conversation, pixels[0])
        return Prompt(record, encoding, [0], builder.encode.seen(kind, pixels), plan.info, 1)
    encoding = builder.encode.video(conversation, pixels, plan.frames, plan.info, plan.max_pixels)
    pixels = builder.encode.seen(kind, pixels)
    return Prompt(record, encoding, list(plan.frames), pixels, plan.info, builder.encode.frames_per_patch(kind))
