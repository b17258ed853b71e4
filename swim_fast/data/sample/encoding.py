"""The model's own processor: from a rendered conversation and decoded frames to the model's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swim_fast.data.sample.conversation import Conversation, Span
from swim_fast.data.sample.pixels import PackedFrames, PatchLayout, Size
from swim_fast.data.sample.sampling import PixelLimits
from swim_fast.data.source.errors import DataError, ProcessorError
from swim_fast.data.source.tags import TokenRanges
from swim_fast.data.video.reader import MediaInfo
from swim_fast.labels import IGNORED_LABEL
from swim_fast.options import Sampling

VISUAL = {"image": "pixel_values", "video": "pixel_values_videos"}  # the model's name of the pixels


@dataclass(frozen=True)
class Encoding:
    """A conversation in tokens. L tokens.

    Attributes:
        inputs: as those of `Sample`.
        offsets: [L, 2] int64, the half-open character range of each token in the expanded text.
        nouns: character range of each tagged noun in that text, in the order of the tags.
        patch_grid: height and width of the grid of a temporal patch; None for text.
    """

    inputs: dict[str, Any]
    offsets: Tensor
    nouns: tuple[Span, ...]
    patch_grid: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])

    @cached_property
    def _ranges(self) -> TokenRanges:
        return TokenRanges(self.offsets)

    def visual(self) -> Tensor:
        """Return the positions of the visual tokens, [N] int64, ascending."""
        return torch.nonzero(self.inputs["mm_token_type_ids"]).flatten()

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
        processor: Qwen2.5-VL's processor, or one like it.
        sampling: limits on the pixels of a frame or image, and seconds per temporal patch.

    Raises:
        ProcessorError: the tokenizer is not a fast one, the limits contradict the processor's, or a temporal patch is
            longer than two frames.
    """

    def __init__(self, processor: Any, sampling: Sampling):
        if not getattr(processor.tokenizer, "is_fast", False):
            raise ProcessorError(
                "the tokenizer has no character offsets; nouns can only be located with a fast tokenizer"
            )
        self.processor, self.sampling = processor, sampling
        self.temporal_patch_size: int = processor.video_processor.temporal_patch_size
        if self.temporal_patch_size not in (1, 2):
            raise ProcessorError(f"a temporal patch of {self.temporal_patch_size} frames; only 1 and 2 are supported")
        self._image_layout = PatchLayout.from_processor(processor.image_processor)
        self._video_layout = PatchLayout.from_processor(processor.video_processor)
        self._image_limits = _pixel_limits(processor.image_processor, sampling)
        self._video_limits = _pixel_limits(processor.video_processor, sampling)

    def text_offsets(self, conversation: Conversation) -> Tensor:
        """Return the character range of each token of the text, [L, 2]; the placeholder of a video or image is one."""
        return self._tokenize(conversation.text)[1]

    def image_tokens(self, height: int, width: int) -> int:
        """Return the number of visual tokens of an image of this size in pixels.

        Raises:
            DataError: the processor refuses the image.
        """
        height, width = self.image_size(height, width)
        return height * width // self._image_layout.factor**2

    def image_size(self, height: int, width: int) -> Size:
        """Return the size that an image of this size is given. Errors as for `image_tokens`."""
        with _refusals():
            return self._image_layout.choose_size(height, width, *self._image_limits)

    def video_tokens(self, num_frames: int, height: int, width: int, max_pixels: int | None = None) -> int:
        """Return the number of visual tokens of so many frames of this size in pixels.

        Args:
            num_frames: frames that fill whole temporal patches.
            height, width: size of a frame.
            max_pixels: lower limit than that of `frame_limits` for this video.

        Raises:
            DataError: the processor refuses the video.
        """
        height, width = self.video_size(num_frames, height, width, max_pixels)
        return num_frames // self.temporal_patch_size * height * width // self._video_layout.factor**2

    def video_size(self, num_frames: int, height: int, width: int, max_pixels: int | None = None) -> Size:
        """Return the size that frames of this size are given. Arguments and errors as for `video_tokens`."""
        lowest, highest = self._video_limits
        highest = highest if max_pixels is None else max_pixels
        processor, factor = self.processor.video_processor, self._video_layout.factor
        if getattr(processor, "cap_pixels_per_frame", False):  # as Qwen2-VL's processor: a share of all frames' pixels
            share = int(processor.max_video_tokens * factor**2 * 0.9) * self.temporal_patch_size // num_frames
            highest = max(min(highest, share), int(lowest * 1.05))
        with _refusals():
            return self._video_layout.choose_size(height, width, lowest, highest)

    def resize_frame(self, frame: np.ndarray, size: Size) -> np.ndarray:
        """Resize a frame of a video, uint8 [H, W, 3], to `video_size`, as the processor does."""
        return self._video_layout.resize(frame, size)

    def text(self, conversation: Conversation) -> Encoding:
        """Encode the text alone; a placeholder for video or image stays one token."""
        return self._encode(conversation)

    def image(self, conversation: Conversation, pixels: np.ndarray) -> Encoding:
        """Encode with an image, uint8 [H, W, 3] RGB.

        Raises:
            DataError: the processor refuses the image.
        """
        size = self.image_size(*pixels.shape[:2])
        frames = PackedFrames.of(self._image_layout.resize(pixels, size)[None], self._image_layout)
        return self._encode(conversation, "image", frames)

    @property
    def frame_limits(self) -> PixelLimits:
        """Sizes that frames of a video are given."""
        return PixelLimits(self._video_layout.factor, *self._video_limits)

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
            pixels: uint8 [T, H, W, 3] RGB, as decoded or of `video_size`.
            frames: indices of the frames in the source.
            info: the source's number of frames, rate and size.
            max_pixels: lower limit than that of `frame_limits` for this video.

        Raises:
            DataError: the processor refuses the video.
        """
        size = self.video_size(len(pixels), info.height, info.width, max_pixels)
        if pixels.shape[1:3] != size:
            pixels = np.stack([self.resize_frame(frame, size) for frame in pixels])
        encoding = self._encode(conversation, "video", PackedFrames.of(pixels, self._video_layout))
        if "second_per_grid_ts" in self.processor.model_input_names:
            measured = self.sampling.seconds_per_patch == "measured"
            seconds = seconds_per_patch(frames, info.fps, self.temporal_patch_size) if measured else 1.0
            encoding.inputs["second_per_grid_ts"] = torch.tensor([seconds], dtype=torch.float32)
        return encoding

    def _encode(self, conversation: Conversation, kind: str = "", frames: PackedFrames | None = None) -> Encoding:
        visual: dict[str, Any] = {}
        replacements: list[dict[str, Any]] = []
        text = conversation.text
        if frames is not None:
            processor = self.processor
            visual = {VISUAL[kind]: frames, f"{kind}_grid_thw": torch.tensor([frames.layout.grid(*frames.sizes[0])])}
            replace = getattr(processor, f"replace_{kind}_token")
            expanded = {f"{kind}s_replacements": [replace(visual, 0)]}
            (text,), (replacements,) = processor.get_text_with_replacements([text], **expanded)
        ids, offsets = self._tokenize(text)
        inputs = {"input_ids": ids, "mm_token_type_ids": self._kinds(ids), **visual}
        spans = [_shifted(span, replacements) for span in conversation.labels]
        inputs["labels"] = label_spans(ids, offsets, spans)
        nouns = tuple(_shifted(span, replacements) for span in conversation.nouns)
        return Encoding(inputs, offsets, nouns, self._patch_grid(inputs))

    def _tokenize(self, text: str) -> tuple[Tensor, Tensor]:
        """Return tokens [L] and the character range of each [L, 2], int64; the text has its special tokens already."""
        tokens = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = (np.array(tokens[key], np.int64) for key in ("input_ids", "offset_mapping"))
        return torch.from_numpy(ids), torch.from_numpy(offsets.reshape(-1, 2))

    def _kinds(self, ids: Tensor) -> Tensor:
        """Return which tokens stand for an image (1) or a video (2), [L] int64."""
        processor = self.processor
        image, video = (torch.tensor(known) for known in (processor.image_token_ids, processor.video_token_ids))
        return torch.isin(ids, image).long() + 2 * torch.isin(ids, video).long()

    def _patch_grid(self, inputs: dict[str, Tensor]) -> tuple[int, int] | None:
        """Return the grid that the vision tower's merging leaves of its patches."""
        for key, layout in (("video_grid_thw", self._video_layout), ("image_grid_thw", self._image_layout)):
            if key in inputs:
                _, height, width = inputs[key][0].tolist()
                return height // layout.merge_size, width // layout.merge_size
        return None


@contextmanager
def _refusals() -> Iterator[None]:
    """Blame the record for what the processor does not take, such as an extreme aspect ratio."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"the model's processor refuses the record: {error}") from error


def seconds_per_patch(frames: Sequence[int], fps: float, temporal_patch_size: int) -> float:
    """Return the time from one temporal patch to the next, in seconds, of the frames that were really sampled.

    The model knows one spacing per video, so for frames that are not uniformly spaced it is the mean spacing: the time
    covered by n distinct frames, each lasting until the next one, over n, times the frames of a patch. Repeated padding
    frames take no time. A single frame lasts 1 / fps.

    It is handed over exactly. `swim_fast.position_ids`, as transformers 5.17 itself, then cuts it to whole seconds, so
    that patches less than a second apart share one temporal position. Later releases of transformers do not
    (https://github.com/huggingface/transformers/pull/48669).
    """
    distinct = sorted(set(frames))
    spacing = (distinct[-1] - distinct[0]) / (len(distinct) - 1) if len(distinct) > 1 else 1
    return temporal_patch_size * spacing / fps


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


def _shifted(span: Span, replacements: Sequence[dict[str, Any]]) -> Span:
    """Return where a span of the rendered text is once the placeholder before it has grown into one token per patch."""
    growth = sum(len(r["replacement"]) - len(r["text"]) for r in replacements if r["span"][1] <= span[0])
    return span[0] + growth, span[1] + growth


def _pixel_limits(processor: Any, sampling: Sampling) -> tuple[int, int]:
    """Return the least and most pixels of a frame or image."""
    lowest = sampling.min_pixels or processor.size["shortest_edge"]
    highest = sampling.max_pixels or processor.size["longest_edge"]
    if lowest > highest:
        raise ProcessorError(
            f"min_pixels {lowest} is above max_pixels {highest}, one of which is {type(processor).__name__}'s own; "
            "give both"
        )
    return lowest, highest
