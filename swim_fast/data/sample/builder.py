"""Record to training sample: tokens, labels, pixels, and which token should look where."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from swim_fast.data.sample.conversation import Conversation, ConversationRenderer
from swim_fast.data.sample.encoding import Encoder, Encoding, clip_of, find_noun
from swim_fast.data.sample.media import MediaReader, at, read_masks
from swim_fast.data.sample.sampling import choose_frames, plan_frames, supervised_patches
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.masks import Mask
from swim_fast.data.source.records import Record
from swim_fast.data.source.tags import TokenRanges
from swim_fast.data.video.reader import MediaInfo
from swim_fast.errors import printable
from swim_fast.frame_shares import FrameShare
from swim_fast.options import Decoding, Sampling, Supervision

MAX_MASK_PIXELS = 1 << 31  # of all masks of a sample together


class Row(NamedTuple):
    """One row of attention: a token that is asked where it looks, see `NounQueries`."""

    position: int
    key_start: int
    key_end: int
    key_set: int


class Pair(NamedTuple):
    """One row and one supervised temporal patch with its mask, see `MaskTargets`."""

    row: int
    start: int
    height: int
    width: int
    mask: int


@dataclass
class Sample:
    """One training sample, not yet padded. L tokens, R rows, P pairs, N visual tokens.

    Attributes:
        name: file, record index and the record's own name.
        inputs: `input_ids`, `labels`, `mm_token_type_ids` [L] int64 and, of a video or image, what the family's layout
            makes of it, such as Qwen2.5-VL's `pixel_values_videos`, a `PackedFrames`, `video_grid_thw` [1, 3] int64 and
            `second_per_grid_ts` [1] fp32; or `pixel_values` and `image_grid_thw`.
        rows: R rows of attention: one for each token of a noun, or if the softmax runs over one patch, for each such
            token and temporal patch with a mask of the noun.
        key_sets: positions of the readout keys, [N] int64 each: one for all rows, or one a patch. Empty without rows.
        over: see `NounQueries`.
        patches: indices of the temporal patches to which the readout keys belong, in their order.
        pairs: P pairs of row and patch.
        masks: uint8 [Hm, Wm] each, one per object and supervised temporal patch; all rows of its nouns share them.
        tags: index of the tag that each row belongs to, R integers.
        tags_without_mask: number of tagged nouns without a mask in the frames taken, whose attention is not trained.
        cells: position of the token of each cell of each temporal patch, int64 [patches, h, w], −1 where a cell has
            none; None for text.
        grids: what the vision tower sees, see `VisualLayout.tower_grids`.
        questions: positions of the questions' tokens behind the video or image, if they are asked for.
        tokens_before: tokens before the first question.
        frames: frame indices in the source video, padding included.
        notes: remarks for the user, such as on a video that was thinned.
    """

    name: str
    inputs: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    key_sets: list[Tensor] = field(default_factory=list)
    over: str = "range"
    patches: list[int] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    tags: list[int] = field(default_factory=list)
    tags_without_mask: int = 0
    cells: Tensor | None = None
    grids: tuple[tuple[int, int, int], ...] = ()
    questions: list[int] = field(default_factory=list)
    tokens_before: int = 0
    frames: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def patch(self, pair: Pair) -> int:
        """Return the temporal patch of a pair."""
        return self.patches[self.rows[pair.row].key_set + pair.start // (pair.height * pair.width)]


@dataclass(frozen=True)
class Plan:
    """Frames and token count chosen for one record."""

    conversation: Conversation
    length: int  # tokens
    info: MediaInfo | None = None  # None without video or image
    frames: Sequence[int] = ()
    notes: Sequence[str] = ()
    max_pixels: int | None = None  # of a frame of this video, below the processor's own limit
    masks: Sequence[dict[int, Mask]] = ()  # of each tag, by frame index, also of frames that are not taken


@contextmanager
def _in_record(record: Record) -> Iterator[None]:
    """Say in which record the block's errors are."""
    try:
        yield
    except DataError as error:
        raise error.within(source=record.source, record=record.number, name=record.name) from error


class SampleBuilder:
    """Makes samples of records with a model's own processor; picklable, so that worker processes can use it.

    Args:
        processor: of a family of `swim_fast.families`, with a fast tokenizer and a chat template.
        sampling: text, frames, pixels and tokens of a sample.
        decoding: how videos are decoded.
        supervision: labels, and rows, masks and readout keys of tagged nouns.
        share: of the ranks that share a sample, the one that decodes its temporal patches of each video alone; for
            families with `frames_apart`. Tokens and masks are those of the whole video.

    Raises:
        ProcessorError: a processor that cannot be used, or options that contradict the processor's.
        OptionError: a special token in the system prompt.
    """

    def __init__(
        self,
        processor: Any,
        sampling: Sampling = Sampling(),
        decoding: Decoding = Decoding(),
        supervision: Supervision = Supervision(),
        share: FrameShare | None = None,
    ):
        self.sampling, self.supervision, self._share = sampling, supervision, share
        self.render = ConversationRenderer(processor, sampling.system_prompt, supervision.label_header)
        self.encode = Encoder(processor, sampling)
        self.reader = MediaReader(decoding)

    def replace(self, **changes: Any) -> SampleBuilder:
        """Return a builder with other values of sampling, which shares the decoder of this one.

        Raises:
            OptionError: values that contradict the others.
            ProcessorError: pixel limits that contradict the processor's.
        """
        other = copy.copy(self)
        other.sampling = self.sampling.replace(**changes)
        other.encode = Encoder(self.encode.processor, other.sampling)
        return other

    def __call__(self, record: Record) -> Sample:
        """Build the sample of one record.

        Raises:
            DataError: anything wrong with the record, its clip or its masks, naming file, record and key.
        """
        with _in_record(record):
            return self._build(record)

    def length(self, record: Record) -> int:
        """Return the number of tokens of a record's sample; no frame is decoded for it but the clip's first.

        Of a family that leaves out tokens by what the frames show (VideoLLaMA3) it is the most there can be.

        Raises:
            DataError: anything that keeps the record from becoming a sample, except frames that do not decode.
        """
        with _in_record(record):
            return self.plan(record).length

    def plan(self, record: Record) -> Plan:
        """Choose the frames of a record and count the tokens that they give.

        Raises:
            DataError: as for `length`, without the record.
        """
        conversation = self.render(record)
        if not conversation.answers and not record.objects:
            raise DataError("no assistant turn and no tagged noun: nothing to train on", key="conversations")
        offsets = self.encode.text_offsets(conversation)
        length, ranges = len(offsets), TokenRanges(offsets)
        for tag, noun in enumerate(conversation.nouns):
            find_noun(ranges, noun, tag)
        if record.media is None:
            self._check_length(length, "shorten the text or raise max_tokens")
            return Plan(conversation, length)
        info = self.reader.info(record)
        masks = read_masks(record, info)
        self._check_order(record, conversation, masks)
        if record.kind == "video":
            plan = self._plan_video(conversation, length, info, masks)
        else:
            length = self.encode.count("image", conversation, length, clip_of([0], info))
            self._check_length(length, "lower max_pixels or raise max_tokens")
            plan = Plan(conversation, length, info, [0], masks=masks)
        frames = set(plan.frames)
        pixels = sum(mask.height * mask.width for found in masks for frame, mask in found.items() if frame in frames)
        if pixels > MAX_MASK_PIXELS:
            raise DataError(
                f"its masks have {pixels:,} pixels in the frames taken, more than {MAX_MASK_PIXELS:,}; annotate a "
                "smaller copy of the video, or lower max_frames",
                key="annotation",
            )
        return plan

    def _check_order(self, record: Record, conversation: Conversation, masks: Sequence[dict[int, Mask]]) -> None:
        """Refuse a noun with a mask that comes before the video or image, unless its softmax runs over all tokens."""
        for tag, (noun, found) in enumerate(zip(conversation.nouns, masks, strict=False)):
            if found and noun[0] < conversation.media[0] and self.supervision.softmax != "full":
                raise DataError(
                    f"the noun comes before the {record.kind}, to which it therefore cannot attend; "
                    "move the placeholder to the front",
                    key=f"tag {tag}",
                )

    def _plan_video(
        self, conversation: Conversation, text: int, info: MediaInfo, masks: Sequence[dict[int, Mask]]
    ) -> Plan:
        """Choose the frames of a video, fewer and fewer until max_tokens is kept, beside a text of `text` tokens."""
        annotated = sorted(set().union(*masks))
        patch, limit, first = self.encode.frames_per_patch("video"), self.sampling.max_tokens, None
        with at("video"):
            choice = plan_frames(info, annotated, self.encode.layout.limits["video"], self.sampling)
        frames = choice.frames
        while True:
            length = self.encode.count("video", conversation, text, clip_of(frames, info), choice.max_pixels)
            first = first or (len(frames), length)
            if limit is None or length <= limit:
                break
            # The text stays; what it leaves of max_tokens is shared out among temporal patches of the present size.
            room = (limit - text + 1) // ((length - text + 1) // (len(frames) // patch))
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
        return Plan(conversation, length, info, frames, notes, choice.max_pixels, masks)

    def _build(self, record: Record) -> Sample:
        plan = self.plan(record)
        name = printable(f"{record.source}:{record.number}" + (f" ({record.name})" if record.name else ""))
        if record.media is None:
            return Sample(name, self.encode.text(plan.conversation).inputs, tags_without_mask=len(record.objects))
        if record.kind == "image":
            encoding = self.encode.image(plan.conversation, self.reader.frames(record, plan.frames)[0])
        else:
            pixels = self._read_video(record, plan)
            encoding = self.encode.video(plan.conversation, pixels, plan.frames, plan.info, plan.max_pixels)
        sample = Sample(name, encoding.inputs, frames=list(plan.frames), notes=list(plan.notes))
        sample.cells, sample.grids, known = encoding.cells, encoding.grids, {}
        if self.supervision.question_rows:
            sample.questions, sample.tokens_before = encoding.question_tokens(), encoding.tokens_before_questions()
        for tag in range(len(record.objects)):
            self._add_noun(sample, record, tag, plan.masks[tag], encoding, known)
        if sample.rows:
            self._add_key_sets(sample, encoding.cells.flatten(1))
        return sample

    def _read_video(self, record: Record, plan: Plan) -> np.ndarray:
        """Return the frames that this rank decodes, uint8 [T, H, W, 3]."""
        frames, size = plan.frames, self.encode.frames_per_patch("video")
        if self._share is not None:
            own = self._share.of_clip(len(frames) // size)
            frames = frames[own.start * size : own.stop * size]
            if not frames:
                return np.empty((0, 1, 1, 3), np.uint8)
        resize = self.encode.resizer("video", clip_of(plan.frames, plan.info), plan.max_pixels)
        return self.reader.frames(record, frames, resize)

    def _add_noun(
        self,
        sample: Sample,
        record: Record,
        tag: int,
        masks: dict[int, Mask],
        encoding: Encoding,
        known: dict[tuple, tuple[list[int], int]],
    ) -> None:
        """Append the rows of one tagged noun, its masks, and the pairs of each row with each mask.

        Args:
            known: by an object's masks, the patches with one, and where in `sample.masks` they begin: an object that is
                tagged again is decoded once.
        """
        chosen = {frame: masks[frame] for frame in dict.fromkeys(sample.frames) if frame in masks}
        key = tuple((frame, mask.key) for frame, mask in chosen.items())
        if key not in known:
            pixels = {frame: self.encode.seen(record.kind, mask.decode()) for frame, mask in chosen.items()}
            temporal_patch_size = self.encode.frames_per_patch(record.kind)
            found = supervised_patches(sample.frames, pixels, temporal_patch_size, self.supervision.supervise)
            found = {patch: mask for patch, mask in found.items() if _has_token(mask, encoding.cells[patch])}
            known[key] = list(found), len(sample.masks)
            sample.masks += [torch.from_numpy(np.ascontiguousarray(mask)) for mask in found.values()]
        patches, first_mask = known[key]
        if not patches:
            sample.tags_without_mask += 1
            return
        _, height, width = encoding.cells.shape
        cells, softmax = height * width, self.supervision.softmax
        for token in encoding.noun_tokens(tag):
            position = token - 1 if self.supervision.query_position == "predictor" else token
            key_end = len(encoding) if softmax == "full" else position + 1
            first_row = len(sample.rows)
            if softmax == "frame":
                begins = [(first_row + index, 0) for index in range(len(patches))]
                sample.rows += [Row(position, *_range(encoding.cells[patch]), patch) for patch in patches]
            else:
                begins = [(first_row, patch * cells) for patch in patches]
                span = _range(encoding.cells) if softmax == "visual" else (0, key_end)
                sample.rows.append(Row(position, *span, 0))
            sample.tags += [tag] * (len(sample.rows) - first_row)
            sample.pairs += [Pair(*begin, height, width, mask) for mask, begin in enumerate(begins, start=first_mask)]

    def _add_key_sets(self, sample: Sample, by_patch: Tensor) -> None:
        """Append the keys of the rows and say which patches they are; rows and pairs so far count all patches.

        Args:
            by_patch: position of the token of each cell, [patches, cells].
        """
        cells = by_patch.shape[1]
        sample.over = self.supervision.over
        if self.supervision.softmax == "frame":
            sample.patches = sorted({row.key_set for row in sample.rows})
            index = {patch: i for i, patch in enumerate(sample.patches)}
            sample.rows = [row._replace(key_set=index[row.key_set]) for row in sample.rows]
            sample.key_sets += list(by_patch[sample.patches])
            return
        sample.patches = list(range(len(by_patch)))
        if self.supervision.read_out == "supervised" and sample.over == "range":
            sample.patches = sorted({pair.start // cells for pair in sample.pairs})
        start = {patch: index * cells for index, patch in enumerate(sample.patches)}
        sample.pairs = [pair._replace(start=start[pair.start // cells]) for pair in sample.pairs]
        sample.key_sets.append(by_patch[sample.patches].flatten())

    def _check_length(self, length: int, remedy: str) -> None:
        limit = self.sampling.max_tokens
        if limit is not None and length > limit:
            raise DataError(f"too long: {length:,} tokens > max_tokens {limit:,}; {remedy}")


def _has_token(mask: np.ndarray, cells: Tensor) -> bool:
    """Return True if a mask [Hm, Wm] covers, at least in part, a cell that has a token; cells [h, w]."""
    filled = (cells >= 0).numpy()
    if filled.all():
        return bool(mask.any())
    rows, columns = ((np.arange(size) * count // size) for size, count in zip(mask.shape, cells.shape, strict=True))
    return bool(mask[filled[np.ix_(rows, columns)]].any())


def _range(cells: Tensor) -> tuple[int, int]:
    """Return the half-open range of positions in which the tokens of cells lie."""
    tokens = cells[cells >= 0]
    return int(tokens.min()), int(tokens.max()) + 1
