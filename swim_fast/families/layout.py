"""Output of a family's processor for a clip or image: pixels, the text of its tokens, each patch's token positions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from swim_fast.errors import ProcessorError, UserError
from swim_fast.families.sizes import FixedSize, Limits


class BatchError(UserError, ValueError):
    """Samples that a model does not take in one batch."""


class Clip(NamedTuple):
    """A clip or image as far as its tokens depend on it.

    Attributes:
        frames: indices of the frames taken, as many as fill whole temporal patches; (0,) for an image.
        fps: frame rate of the source.
        num_frames: frames of the source.
        height, width: size of a frame of the source, in pixels.
    """

    frames: Sequence[int]
    fps: float
    num_frames: int
    height: int
    width: int

    def metadata(self) -> Any:
        """Return what transformers' processors are told about a video."""
        from transformers.video_utils import VideoMetadata

        return VideoMetadata(
            total_num_frames=self.num_frames,
            fps=self.fps,
            width=self.width,
            height=self.height,
            duration=self.num_frames / self.fps,
            frames_indices=list(self.frames),
        )


class VisualLayout:
    """Turns frames into a model's inputs by its processor; picklable if the processor is.

    A subclass for each kind of processor says what differs; this class runs the processor's own image and video
    processors, and takes the tokens of a patch for one block, row by row.

    Args:
        processor: of the family.
        min_pixels, max_pixels: limits on the pixels of a frame or image, in place of the processor's own.

    Raises:
        ProcessorError: limits that the processor does not have or that contradict its own.

    Attributes:
        kinds: media that the family takes.
        frames_per_patch: frames of a video that share their tokens.
        seconds: argument of the model's forward that tells the time between temporal patches; None: it has none.
        token_types: argument of the model's forward that tells visual tokens from text; None: it has none.
        padded: inputs [n, tiles, …] that are filled up with zeros where the samples of a batch have fewer tiles.
        flattened: inputs [n, pictures, …] of which the model takes all pictures alike: those of a batch become one row.
    """

    kinds: tuple[str, ...] = ("image", "video")
    frames_per_patch: int = 1
    seconds: str | None = None
    token_types: str | None = None
    padded: tuple[str, ...] = ()
    flattened: tuple[str, ...] = ()

    def __init__(self, processor: Any, min_pixels: int | None = None, max_pixels: int | None = None):
        self.processor = processor
        self.limits: dict[str, Limits] = {kind: self.find_limits(kind, min_pixels, max_pixels) for kind in self.kinds}

    def find_limits(self, kind: str, min_pixels: int | None, max_pixels: int | None) -> Limits:
        """Return the sizes that frames of a kind are given.

        Raises:
            ProcessorError: as for the class.
        """
        self.refuse_limits(kind, min_pixels, max_pixels)
        size = self.setting(kind, "size")
        side = size.get("shortest_edge")
        return FixedSize(*((side, side) if side else (size["height"], size["width"])))

    def refuse_limits(self, kind: str, min_pixels: int | None, max_pixels: int | None) -> None:
        """Raise ProcessorError if there is a limit on the pixels of a kind."""
        for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if value is not None:
                processor = type(self.visual_processor(kind)).__name__
                raise ProcessorError(
                    f"{name} is {value}, but {processor} takes no limit on the size of {kind}s; remove it"
                )

    def visual_processor(self, kind: str) -> Any:
        """Return the image or video processor."""
        return getattr(self.processor, f"{kind}_processor")

    def options(self, kind: str) -> dict[str, Any]:
        """Return what the processor tells its image or video processor, beside its own settings."""
        name = f"{kind}s_kwargs"
        defaults = getattr(type(self.processor).valid_processor_kwargs, "_defaults", {})
        return {**getattr(self.processor, name, {}), **defaults.get(name, {})}  # from transformers 5.23 on, and before

    def setting(self, kind: str, name: str) -> Any:
        """Return a setting of the image or video processor; None if it has none of this name."""
        return self.options(kind).get(name, getattr(self.visual_processor(kind), name, None))

    def view(self, kind: str, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the part of a frame of this size that the model sees: top, bottom, left, right, in pixels."""
        return 0, height, 0, width

    def placeholder(self, kind: str) -> str:
        """Return the token that the chat template writes for a video or image."""
        return getattr(self.processor, f"{kind}_token")

    def visual_token(self, kind: str) -> int:
        """Return the id of the token that features of a video or image replace."""
        return self.processor.tokenizer.convert_tokens_to_ids(self.placeholder(kind))

    def resizer(
        self, kind: str, clip: Clip, max_pixels: int | None = None
    ) -> Callable[[np.ndarray], np.ndarray] | None:
        """Return what resizes one frame, uint8 [H, W, 3], as the processor does; None: frames stay as decoded.

        Raises:
            ValueError: a shape that the processor does not take.
        """
        return None

    def prepare(self, kind: str, pixels: np.ndarray, clip: Clip, max_pixels: int | None = None) -> dict[str, Any]:
        """Return what the processor makes of frames: the model's inputs and what `expand` needs beside them.

        Args:
            kind: "image" or "video".
            pixels: uint8 [T, H, W, 3], one frame for an image.
            clip: the frames' place in the source.
            max_pixels: most pixels of a frame of this clip, below the processor's.
        """
        planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
        about = {**self.options(kind), "input_data_format": "channels_first", "return_tensors": "pt"}
        if kind == "image":
            return dict(self.visual_processor(kind)([planes[0]], **about))
        about |= {"do_sample_frames": False, "return_metadata": True, "video_metadata": [clip.metadata()]}
        return dict(self.visual_processor(kind)([planes], **about))

    def sketch(self, kind: str, clip: Clip, max_pixels: int | None = None) -> dict[str, Any]:
        """Return what `expand` needs of `prepare`, without any pixel."""
        raise NotImplementedError

    def expand(self, kind: str, inputs: dict[str, Any]) -> str:
        """Return the text that takes the place of the placeholder."""
        return getattr(self.processor, f"replace_{kind}_token")(inputs, 0)

    def keep(self, kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs that the model's forward takes."""
        return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}

    def grid(self, kind: str, inputs: dict[str, Any]) -> tuple[int, int, int]:
        """Return the temporal patches of a clip or image, and the rows and columns of cells of each."""
        raise NotImplementedError

    def cells(self, kind: str, inputs: dict[str, Any], visual: Tensor) -> Tensor:
        """Return the token of each cell of each temporal patch.

        Args:
            inputs: of `prepare`.
            visual: positions of the visual tokens, [N] int64, ascending.

        Returns:
            int64 [patches, h, w], −1 where a cell has no token. Cell (0, 0) is the upper left of what the model sees.
        """
        return visual.view(self.grid(kind, inputs))

    def tower_grids(self, kind: str, inputs: dict[str, Any], cells: Tensor) -> list[tuple[int, int, int]]:
        """Return what the vision tower sees: pictures that it takes apart, and the rows and columns of their cells.

        A cell is as many patches as `Vision.patches_per_cell` says.
        """
        frames, height, width = cells.shape
        return [(frames, height, width)]

    @classmethod
    def join(cls, name: str, values: list[Tensor]) -> Any:
        """Join an input of several samples; a single one stays as it is, for a long video's are tens of megabytes.

        Raises:
            BatchError: clips of different numbers of frames, where the model takes only equal ones.
        """
        if len(values) == 1:
            return values[0]
        if name in cls.flattened:
            return torch.cat(values, dim=1)
        if name in cls.padded:  # [n, tiles, …]
            most = max(value.shape[1] for value in values)
            values = [pad(v, (0, 0) * (v.ndim - 2) + (0, most - v.shape[1])) for v in values]
        if len({value.shape[1:] for value in values}) > 1:
            shapes = " and ".join(str(list(value.shape[1:])) for value in values)
            raise BatchError(
                f"the samples of a batch have {name} of {shapes}, and this model takes only equal ones together: set "
                "training.per_device_train_batch_size to 1 and leave out data.max_tokens_per_batch; or, if every clip "
                "is long enough, set data.fps to null, so that each gives max_frames"
            )
        return torch.cat(values)

    def count(self, kind: str, clip: Clip, max_pixels: int | None = None) -> tuple[str, int]:
        """Return the text of `expand` with one visual token for each run, and how many were left out.

        Raises:
            ValueError: a shape that the processor does not take.
        """
        text = self.expand(kind, self.sketch(kind, clip, max_pixels))
        token = self.processor.tokenizer.convert_ids_to_tokens(self.visual_token(kind))
        short = re.sub(f"(?:{re.escape(token)})+", lambda run: token, text)
        return short, (len(text) - len(short)) // len(token)


def join_tiles(tokens: Tensor, rows: int, columns: int, height: int, width: int) -> Tensor:
    """Return the tokens of tiles, each row by row, as they lie in the image: [1, rows · height, columns · width]."""
    tiles = tokens.view(rows, columns, height, width)
    return tiles.transpose(1, 2).reshape(1, rows * height, columns * width)


def square_side(count: int, what: str) -> int:
    """Return the side of a square of `count` cells.

    Raises:
        ProcessorError: it is no square.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise ProcessorError(f"{what} has {count} tokens, which are no square: where each one lies is not known")
    return side


def shape_only(*sizes: int) -> np.ndarray:
    """Return an array of a shape that takes no memory, for what reads the shape alone."""
    return np.broadcast_to(np.float32(0), sizes)
