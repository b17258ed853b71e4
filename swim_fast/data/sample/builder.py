"""One record becomes one training sample: tokens, labels, pixels, and which token should look where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swim_fast.data.sample.conversation import Conversation, ConversationRenderer
from swim_fast.data.sample.encoding import Encoder, Encoding
from swim_fast.data.sample.sampling import choose_frames, plan_frames, supervised_patches
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.masks import decode_segmentation
from swim_fast.data.source.records import Record
from swim_fast.data.video.reader import READERS, FrameReader, MediaInfo

QUERY_POSITIONS = ("noun", "predictor")
SOFTMAXES = ("causal", "full")
READ_OUTS = ("all", "supervised")


@dataclass(frozen=True)
class SampleOptions:
    """How records become samples.

    Attributes:
        max_frames: most frames taken from a video, at least 2.
        fps: frames per second of the video to take, rounded up to an even number; there are never fewer than are
            annotated, nor more than max_frames. None takes max_frames of a video of any length.
        min_pixels, max_pixels: size of a frame or image after the processor's resizing, in pixels; None keeps the
            processor's own.
        total_pixels: pixels of all frames of a video together, after resizing: its frames are made smaller, down to
            min_pixels, then fewer. None sets no limit.
        max_tokens: longest sequence; a longer sample gets fewer frames. None sets no limit.
        query_position: "noun", the rows of the noun's own tokens; "predictor", the rows that predict them.
        softmax: "causal", the model's own softmax; "full", over all tokens of the sequence.
        read_out: visual tokens at which the maps are read out: "all", which the normaliser of the paper's numerics
            needs, or "supervised", those of the temporal patches in which any object has a mask.
        reader: library that decodes video.
        decode_timeout: seconds that a clip may take to open, and again to decode.

    Raises:
        ValueError: for a value outside its range.
    """

    max_frames: int = 32
    fps: float | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    max_tokens: int | None = None
    query_position: str = "noun"
    softmax: str = "causal"
    read_out: str = "all"
    reader: str = "decord"
    decode_timeout: float = 60.0

    def __post_init__(self):
        choices = {"query_position": QUERY_POSITIONS, "softmax": SOFTMAXES, "read_out": READ_OUTS, "reader": READERS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        positive = ("max_frames", "fps", "min_pixels", "max_pixels", "total_pixels", "max_tokens", "decode_timeout")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.max_frames < 2:
            raise ValueError(f"max_frames is {self.max_frames}; two frames make one temporal patch")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        if self.min_pixels and self.total_pixels and 2 * self.min_pixels > self.total_pixels:
            raise ValueError(f"total_pixels {self.total_pixels} is below two frames of min_pixels {self.min_pixels}")


@dataclass
class Sample:
    """One training sample, not yet padded. L tokens, R rows, P pairs, N visual tokens.

    Attributes:
        name: file, record number and the record's own name.
        inputs: ``input_ids``, ``labels``, ``mm_token_type_ids`` [L] int64 and the processor's visual tensors, of which
            none for a text-only record: ``pixel_values_videos`` [patches, values] fp32, ``video_grid_thw`` [1, 3],
            ``second_per_grid_ts`` [1] fp32, or ``pixel_values``, ``image_grid_thw``.
        rows: R × (position, key_start, key_end, key_set), as in ``NounQueries``.
        key_sets: at most one [N] int64: the positions of the visual tokens that are read out. Empty without rows.
        patches: numbers of the temporal patches to which they belong, in their order.
        pairs: P × (row, start, height, width, mask), as in ``MaskTargets``.
        masks: uint8 [Hm, Wm] each, one per noun and supervised temporal patch; all rows of a noun share them.
        tags: number of the tag that each row belongs to, R integers.
        frames: frame numbers in the source video, padding included.
        notes: what a user would want to know, such as a video that was thinned.
    """

    name: str
    inputs: dict[str, Tensor]
    rows: list[tuple[int, int, int, int]] = field(default_factory=list)
    key_sets: list[Tensor] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)
    pairs: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    tags: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Plan:
    """What of a record is used. ``length`` is the number of tokens; without video or image there is no ``info``."""

    conversation: Conversation
    length: int
    info: MediaInfo | None = None
    frames: Sequence[int] = ()
    notes: Sequence[str] = ()
    max_pixels: int | None = None  # of a frame of this video, below the processor's own limit


class MediaReader:
    """Reads the video or image of records; picklable, in each process a decoder of its own.

    Args:
        reader, timeout: as for `FrameReader`.
    """

    def __init__(self, reader: str, timeout: float):
        self._reader = FrameReader(reader, timeout)

    def info(self, record: Record) -> MediaInfo:
        """Number, size and rate of the frames.

        Raises:
            DataError: if the video or image cannot be opened.
        """
        with _at(record.kind):
            return self._reader.info(record.media, record.kind)

    def frames(self, record: Record, numbers: Sequence[int]) -> np.ndarray:
        """The frames of these numbers, uint8 [T, H, W, 3] RGB.

        Raises:
            DataError: if they cannot be decoded.
        """
        with _at(record.kind):
            return self._reader.frames(record.media, numbers, record.kind)

    def close(self) -> None:
        """Stop the decoder; the next request starts another."""
        self._reader.close()


@contextmanager
def _at(key: str) -> Iterator[None]:
    """Say where in the record the block's errors belong."""
    try:
        yield
    except DataError as error:
        raise error.within(key=key) from error


@contextmanager
def _in_record(record: Record) -> Iterator[None]:
    """Say in which record the block's errors are."""
    try:
        yield
    except DataError as error:
        raise error.within(source=record.source, record=record.number, name=record.name) from error


def check_frame_number(record: Record, number: int, frame: int, num_frames: int) -> None:
    """Refuse a frame number of object ``number`` that the video or image does not have.

    Raises:
        DataError: naming the number of frames.
    """
    if not 0 <= frame < num_frames:
        raise DataError(
            f"frame number past the end: the {record.kind} has {num_frames} frames, counted from 0; "
            "correct the annotation or the path of the clip",
            key=f"annotation[{number}]['{frame}']",
        )


def decode_mask(record: Record, number: int, frame: int, height: int, width: int) -> np.ndarray | None:
    """Decode the mask of object ``number`` in one frame: uint8 [Hm, Wm], or None if the object is not to be seen.

    Raises:
        DataError: for a segmentation that does not decode, or does not fit a video of ``height`` × ``width``.
    """
    with _at(f"annotation[{number}]['{frame}']"):
        return decode_segmentation(record.objects[number][frame], height, width)


def annotated_frames(record: Record, num_frames: int) -> list[int]:
    """Return the numbers of the frames in which any object has a segmentation, sorted; nothing is decoded.

    Raises:
        DataError: for a frame number past the end of the video, also one without segmentation.
    """
    annotated = set()
    for number, segmentations in enumerate(record.objects):
        for frame, segmentation in segmentations.items():
            check_frame_number(record, number, frame, num_frames)
            if isinstance(segmentation, dict) and "segmentation" in segmentation:
                segmentation = segmentation["segmentation"]
            if segmentation:
                annotated.add(frame)
    return sorted(annotated)


class SampleBuilder:
    """Turns records into samples with a model's own processor; picklable, so that it can work in worker processes.

    Args:
        processor: Qwen2.5-VL's processor, or one like it, with a fast tokenizer and a chat template.
        options: see `SampleOptions`.

    Raises:
        ValueError: for a processor that cannot be used, or pixel limits that contradict the processor's.
    """

    def __init__(self, processor: Any, options: SampleOptions | None = None):
        self.options = options or SampleOptions()
        self.render = ConversationRenderer(processor)
        self.encode = Encoder(processor, self.options.min_pixels, self.options.max_pixels)
        self.reader = MediaReader(self.options.reader, self.options.decode_timeout)

    def __call__(self, record: Record) -> Sample:
        """Build the sample of one record.

        Raises:
            DataError: for whatever is wrong with the record, its clip or its masks, naming file, record and place.
        """
        with _in_record(record):
            return self._build(record)

    def length(self, record: Record) -> int:
        """Number of tokens that the sample of a record has; no frame is decoded for it but the clip's first.

        Raises:
            DataError: for whatever keeps the record from becoming a sample, as far as it shows without its frames and
                masks.
        """
        with _in_record(record):
            return self._plan(record).length

    def _plan(self, record: Record) -> _Plan:
        """Decide what of a record is used: which frames, and how many tokens that gives."""
        conversation = self.render(record)
        if not conversation.answers and not record.objects:
            raise DataError("no assistant turn and no tagged noun: nothing to train on", key="conversations")
        length = self.encode.text_length(conversation)
        if record.media is None:
            self._check_length(length, "shorten the text or raise max_tokens")
            return _Plan(conversation, length)
        info = self.reader.info(record)
        annotated = annotated_frames(record, info.num_frames)
        text = length - 1  # the placeholder makes room for the visual tokens
        if record.kind == "video":
            return self._plan_video(conversation, text, info, annotated)
        length = text + self.encode.image_tokens(info.height, info.width)
        self._check_length(length, "lower max_pixels or raise max_tokens")
        return _Plan(conversation, length, info, [0])

    def _plan_video(self, conversation: Conversation, text: int, info: MediaInfo, annotated: Sequence[int]) -> _Plan:
        """Choose the frames of a video, fewer and fewer until max_tokens is kept, beside ``text`` other tokens."""
        patch, options, first = self.encode.temporal_patch_size, self.options, None
        limit = options.max_tokens
        with _at("video"):
            choice = plan_frames(
                info,
                annotated,
                self.encode.frame_limits,
                max_frames=options.max_frames,
                fps=options.fps,
                total_pixels=options.total_pixels,
            )
        frames = choice.frames
        while True:
            visual = self.encode.video_tokens(len(frames), info.height, info.width, choice.max_pixels)
            length = text + visual
            first = first or (len(frames), length)
            if limit is None or length <= limit:
                break
            # The text stays; what it leaves of max_tokens is shared out among temporal patches of the present size.
            room = (limit - text) // (visual // (len(frames) // patch))
            max_frames = min(patch * room, len(frames) - patch)
            if max_frames < patch:
                raise DataError(
                    f"too long: {length:,} tokens with {len(frames)} frames, and even {patch} frames do not fit "
                    f"into max_tokens {limit:,}; lower max_pixels, shorten the text or raise max_tokens"
                )
            frames = choose_frames(info.num_frames, annotated, max_frames)
        notes = list(choice.notes)
        if len(frames) < first[0]:
            notes.append(f"thinned from {first[0]} to {len(frames)} frames: {first[1]:,} tokens > max_tokens {limit:,}")
        return _Plan(conversation, length, info, frames, notes, choice.max_pixels)

    def _build(self, record: Record) -> Sample:
        plan = self._plan(record)
        name = f"{record.source}:{record.number}" + (f" ({record.name})" if record.name else "")
        if record.media is None:
            return Sample(name, self.encode.text(plan.conversation).inputs)
        pixels = self.reader.frames(record, plan.frames)
        if record.kind == "image":
            encoding = self.encode.image(plan.conversation, pixels[0])
        else:
            encoding = self.encode.video(plan.conversation, pixels, plan.frames, plan.info, plan.max_pixels)
        sample = Sample(name, encoding.inputs, frames=list(plan.frames), notes=list(plan.notes))
        for number in range(len(record.objects)):
            self._add_noun(sample, record, number, plan.info, encoding)
        if sample.rows:
            self._add_key_set(sample, encoding)
        return sample

    def _add_noun(self, sample: Sample, record: Record, number: int, info: MediaInfo, encoding: Encoding) -> None:
        """Append the rows of one tagged noun, its masks, and the pairs of each row with each mask."""
        frames = [frame for frame in dict.fromkeys(sample.frames) if frame in record.objects[number]]
        masks = {frame: decode_mask(record, number, frame, info.height, info.width) for frame in frames}
        temporal_patch_size = self.encode.temporal_patch_size if record.kind == "video" else 1
        with _at(f"annotation[{number}]"):
            patches = supervised_patches(sample.frames, masks, temporal_patch_size)
        if not patches:
            return
        height, width = encoding.patch_grid
        first_mask = len(sample.masks)
        sample.masks += [torch.from_numpy(np.ascontiguousarray(mask, dtype=np.uint8)) for mask in patches.values()]
        last_visual = int(encoding.visual()[-1])
        for token in encoding.noun_tokens(number):
            position = token - 1 if self.options.query_position == "predictor" else token
            key_end = len(encoding) if self.options.softmax == "full" else position + 1
            if key_end <= last_visual:
                raise DataError(
                    f"the noun comes before the {record.kind}, to which it therefore cannot attend; "
                    "move the placeholder to the front",
                    key=f"tag {number}",
                )
            for mask, patch in enumerate(patches, start=first_mask):
                sample.pairs.append((len(sample.rows), patch * height * width, height, width, mask))
            sample.rows.append((position, 0, key_end, 0))
            sample.tags.append(number)

    def _add_key_set(self, sample: Sample, encoding: Encoding) -> None:
        """Append the keys of all rows, one set for the sample; the pairs' patches are then counted within it."""
        height, width = encoding.patch_grid
        by_patch = encoding.visual().view(-1, height * width)
        sample.patches = list(range(len(by_patch)))
        if self.options.read_out == "supervised":
            sample.patches = sorted({start // (height * width) for _, start, *_ in sample.pairs})
        place = {patch: number * height * width for number, patch in enumerate(sample.patches)}
        sample.pairs = [(row, place[start // (height * width)], *rest) for row, start, *rest in sample.pairs]
        sample.key_sets.append(by_patch[sample.patches].flatten())

    def _check_length(self, length: int, remedy: str) -> None:
        limit = self.options.max_tokens
        if limit is not None and length > limit:
            raise DataError(f"too long: {length:,} tokens > max_tokens {limit:,}; {remedy}")
