"""The model's own processor: from a rendered conversation and decoded frames to the model's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swim_fast.data.sample.conversation import Conversation, Span
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.tags import TokenRanges
from swim_fast.data.video.reader import MediaInfo
from swim_fast.errors import ProcessorError
from swim_fast.families import Clip, get_layout
from swim_fast.labels import IGNORED_LABEL
from swim_fast.options import Sampling

Resizer = Callable[[np.ndarray], np.ndarray]  # of one frame, uint8 [H, W, 3]


@dataclass(frozen=True)
class Encoding:
    """A conversation in tokens. L tokens.

    Attributes:
        inputs: as those of `Sample`.
        offsets: [L, 2] int64, the half-open character range of each token in the expanded text.
        nouns: character range of each tagged noun in that text, in the order of the tags.
        cells: position of the token of each cell of each temporal patch, int64 [patches, h, w], −1 where a cell has
            none; None for text.
        grids: what the vision tower sees, see `VisualLayout.tower_grids`.
        questions: character range of each text of a user's turn.
    """

    inputs: dict[str, Any]
    offsets: Tensor
    nouns: tuple[Span, ...]
    cells: Tensor | None = None
    grids: tuple[tuple[int, int, int], ...] = ()
    questions: tuple[Span, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])

    @cached_property
    def _ranges(self) -> TokenRanges:
        return TokenRanges(self.offsets)

    def visual(self) -> Tensor:
        """Return the positions of the visual tokens, [N] int64, ascending."""
        return torch.nonzero(self.inputs["mm_token_type_ids"]).flatten()

    def question_tokens(self) -> list[int]:
        """Return the positions of the questions' tokens behind the video or image, in order."""
        last = int(self.visual()[-1])
        return [token for span in self.questions for token in self._ranges.tokens_of(span) if token > last]

    def tokens_before_questions(self) -> int:
        """Return how many tokens stand before the first question, its video or image: the system turn and a header."""
        begin = min([span[0] for span in self.questions] + [int(self.offsets[self.visual()[0], 0])])
        return int((self.offsets[:, 1] <= begin).sum())

    def noun_tokens(self, tag: int) -> list[int]:
        """Return the positions of the tokens of a tagged noun.

        Raises:
            DataError: there are none, such as for a character that the tokenizer drops.
        """
        return find_noun(self._ranges, self.nouns[tag], tag)


def find_noun(ranges: TokenRanges, noun: Span, tag: int) -> list[int]:
    """Return the positions of the tokens of a tagged noun.

    Raises:
        DataError: there are none, such as for a character that the tokenizer drops.
    """
    tokens = ranges.tokens_of(noun)
    if not tokens:
        raise DataError("the noun has no token of its own; tag a visible word", key=f"tag {tag}")
    return tokens


class Encoder:
    """Encodes conversations with a model's processor; picklable if the processor is.

    Args:
        processor: of a family of `swim_fast.families`.
        sampling: limits on the pixels of a frame or image, and seconds per temporal patch.

    Raises:
        ProcessorError: a processor of no family, one whose tokenizer is not a fast one, or limits that contradict the
            processor's.

    Attributes:
        layout: what the processor makes of frames.
    """

    def __init__(self, processor: Any, sampling: Sampling):
        if not getattr(processor.tokenizer, "is_fast", False):
            raise ProcessorError(
                "the tokenizer has no character offsets; nouns can only be located with a fast tokenizer"
            )
        self.processor, self.sampling = processor, sampling
        self.layout = get_layout(processor, sampling.min_pixels, sampling.max_pixels)

    def frames_per_patch(self, kind: str) -> int:
        """Return how many frames share their tokens: 1 for an image."""
        return self.layout.frames_per_patch if kind == "video" else 1

    def seen(self, kind: str, pixels: np.ndarray) -> np.ndarray:
        """Return the part that the model sees of a frame or image [H, W, 3], frames [T, H, W, 3] or a mask [H, W]."""
        sides = slice(0, 2) if pixels.ndim < 4 else slice(1, 3)
        top, bottom, left, right = self.layout.view(kind, *pixels.shape[sides])
        return pixels[..., top:bottom, left:right] if pixels.ndim == 2 else pixels[..., top:bottom, left:right, :]

    def text_offsets(self, conversation: Conversation) -> Tensor:
        """Return the character range of each token of the text, [L, 2]; the placeholder of a video or image is one."""
        return self._tokenize(conversation.text)[1]

    def count(self, kind: str, conversation: Conversation, text: int, clip: Clip, max_pixels: int | None = None) -> int:
        """Return the number of tokens of a conversation with a video or image.

        Args:
            kind: "video" or "image".
            text: number of tokens of the text, the placeholder as one.
            clip: frames that fill whole temporal patches, their rate and size.
            max_pixels: most pixels of a frame of this video, below those of `layout.limits`.

        Raises:
            DataError: the processor refuses the video or image.
        """
        with _refusals():
            short, left_out = self.layout.count(kind, clip, max_pixels)
        token = self.processor.tokenizer.convert_ids_to_tokens(self.layout.visual_token(kind))
        if short != token or token != self.layout.placeholder(kind):  # there is text between the visual tokens
            start, end = conversation.media
            text = len(self._tokenize(conversation.text[:start] + short + conversation.text[end:])[0])
        return text + left_out

    def resizer(self, kind: str, clip: Clip, max_pixels: int | None = None) -> Resizer | None:
        """Return what makes a decoded frame as small as the processor does; None where the processor has to do it.

        Raises:
            DataError: the processor refuses the video or image.
        """
        with _refusals():
            return self.layout.resizer(kind, clip, max_pixels)

    def text(self, conversation: Conversation) -> Encoding:
        """Encode the text alone; a placeholder for video or image stays one token."""
        return self._encode(conversation, "text", {})

    def image(self, conversation: Conversation, pixels: np.ndarray) -> Encoding:
        """Encode with an image, uint8 [H, W, 3] RGB.

        Raises:
            DataError: the processor refuses the image.
        """
        with _refusals():
            clip = Clip((0,), 1.0, 1, *pixels.shape[:2])
            return self._encode(conversation, "image", self.layout.prepare("image", pixels[None], clip))

    def video(
        self,
        conversation: Conversation,
        pixels: np.ndarray,
        frames: Sequence[int],
        info: MediaInfo,
        max_pixels: int | None = None,
    ) -> Encoding:
        """Encode with frames of a video.

        Args:
            conversation: text with a placeholder for the video.
            pixels: uint8 [T, H, W, 3] RGB, as decoded or as `resizer` made them.
            frames: indices of the frames in the source.
            info: the source's number of frames, rate and size.
            max_pixels: most pixels of a frame of this video, below those of `layout.limits`.

        Raises:
            DataError: the processor refuses the video.
        """
        with _refusals():
            inputs = self.layout.prepare("video", pixels, clip_of(frames, info), max_pixels)
        if self.layout.seconds is not None and self.sampling.seconds_per_patch != "measured":
            inputs[self.layout.seconds] = torch.ones(1)
        return self._encode(conversation, "video", inputs)

    def _encode(self, conversation: Conversation, kind: str, prepared: dict[str, Any]) -> Encoding:
        text, growth, end = conversation.text, 0, 0
        if kind != "text":
            start, end = conversation.media
            expanded = self.layout.expand(kind, prepared)
            text, growth = text[:start] + expanded + text[end:], len(expanded) - (end - start)

        def shifted(span: Span) -> Span:
            return (span[0] + growth, span[1] + growth) if span[0] >= end else span

        ids, offsets = self._tokenize(text)
        inputs = {"input_ids": ids, "mm_token_type_ids": torch.zeros_like(ids)}
        inputs["labels"] = label_spans(ids, offsets, [shifted(span) for span in conversation.labels])
        nouns = tuple(shifted(span) for span in conversation.nouns)
        if kind == "text":
            return Encoding(inputs, offsets, nouns)
        visual = ids == self.layout.visual_token(kind)
        inputs["mm_token_type_ids"] = visual.long() * (1 if kind == "image" else 2)  # as transformers numbers them
        cells = self.layout.cells(kind, prepared, torch.nonzero(visual).flatten())
        inputs |= self.layout.keep(kind, prepared)
        grids, questions = self.layout.tower_grids(kind, prepared, cells), map(shifted, conversation.questions)
        return Encoding(inputs, offsets, nouns, cells, tuple(grids), tuple(questions))

    def _tokenize(self, text: str) -> tuple[Tensor, Tensor]:
        """Return tokens [L] and the character range of each [L, 2], int64; the text has its special tokens already."""
        tokens = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = (np.array(tokens[key], np.int64) for key in ("input_ids", "offset_mapping"))
        return torch.from_numpy(ids), torch.from_numpy(offsets.reshape(-1, 2))


def clip_of(frames: Sequence[int], info: MediaInfo) -> Clip:
    """Return frames of a source as layouts take them."""
    return Clip(frames, info.fps, info.num_frames, info.height, info.width)


@contextmanager
def _refusals() -> Iterator[None]:
    """Blame the record for what the processor does not take, such as an extreme aspect ratio."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"the model's processor refuses the record: {error}") from error


def label_spans(input_ids: Tensor, offsets: Tensor, spans: Sequence[Span]) -> Tensor:
    """Return labels [L]: the token where it lies wholly inside a span, elsewhere -100.

    A token that joins the end of the template's header with the beginning of an answer (two newlines, say) is left out:
    at inference the header is tokenised alone, so the model never has to predict it.

    Args:
        input_ids: [L] int64.
        offsets: [L, 2] character range of each token.
        spans: character spans of the answers, end-of-turn token included, ascending and disjoint.
    """
    bounds = torch.tensor([(-1, -1), *spans])  # the first one holds no token
    begin, end = offsets.contiguous().T
    last_end = bounds[torch.searchsorted(bounds[:, 0].contiguous(), begin.contiguous(), right=True) - 1, 1]
    return torch.where((begin < end) & (end <= last_end), input_ids, IGNORED_LABEL)
