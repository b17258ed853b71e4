"""Resized frames as bytes, cut to the vision tower's patches and normalised where the model is.

A processor of transformers does this in the loader's worker and in fp32: four times the bytes to make, to hand to the
trainer's process and to copy to the device.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swim_fast.errors import ProcessorError
from swim_fast.families.sizes import Size

SIZES = ("patch_size", "merge_size", "temporal_patch_size")
STEPS = ("do_resize", "do_rescale", "do_normalize")


@dataclass(frozen=True, eq=False)
class PatchLayout:
    """Resizing, normalisation and patches of a processor of Qwen2-VL's kind.

    Attributes:
        patch_size: pixels of a patch's side.
        merge_size: patches of the side of the square that becomes one token; such squares lie together.
        temporal_patch_size: frames of a patch; the last one is repeated to fill it.
        colours: [2, 3] fp32: mean and standard deviation of each colour, in 0 … 255.
        interpolation: torchvision's mode.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    colours: Tensor
    interpolation: Any

    @classmethod
    def from_processor(cls, processor: Any) -> PatchLayout:
        """Return the layout of an image or video processor of transformers.

        Raises:
            ProcessorError: it makes other patches of a picture than this layout.
        """
        from transformers.image_utils import pil_torch_interpolation_mapping

        missing = [name for name in (*SIZES, *STEPS) if not getattr(processor, name, None)]
        if missing:
            raise ProcessorError(
                f"{type(processor).__name__} makes other patches than Qwen2-VL's: it has not {', '.join(missing)}"
            )
        layout = cls(
            *(getattr(processor, name) for name in SIZES),
            torch.tensor([processor.image_mean, processor.image_std]) * (1.0 / processor.rescale_factor),
            pil_torch_interpolation_mapping[processor.resample],
        )
        layout._compare(processor)
        return layout

    @property
    def factor(self) -> int:
        """Pixels of a token's side, of which those of a resized frame are multiples."""
        return self.patch_size * self.merge_size

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the patches of resized frames: in time, vertically, horizontally."""
        return -(-frames // self.temporal_patch_size), height // self.patch_size, width // self.patch_size

    def resize(self, frame: np.ndarray, size: Size) -> np.ndarray:
        """Resize a frame, uint8 [H, W, 3], as the processor does."""
        from torchvision.transforms.v2.functional import resize

        if frame.shape[:2] == size:
            return frame
        planes = torch.from_numpy(frame).permute(2, 0, 1)[None]
        resized = resize(planes, list(size), interpolation=self.interpolation, antialias=True)
        return resized[0].permute(1, 2, 0).numpy()

    def cut(self, frames: Tensor, out: Tensor) -> None:
        """Write the patches of frames to `out`.

        Args:
            frames: uint8 [T, H, W, 3], on the device of `colours`.
            out: [patches, values], of any dtype.
        """
        count, height, width, _ = frames.shape
        if count % self.temporal_patch_size:
            missing = -count % self.temporal_patch_size
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        normalised = frames.sub(self.colours[0]).div_(self.colours[1])  # fp32, in this order, as torchvision's
        time, rows, columns = self.grid(count, height, width)
        merge, side = self.merge_size, self.patch_size
        blocks = (time, self.temporal_patch_size, rows // merge, merge, side, columns // merge, merge, side, 3)
        patches = normalised.view(blocks).permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
        out.view(patches.shape).copy_(patches)

    def _compare(self, processor: Any) -> None:
        """Raise ProcessorError unless a picture becomes the processor's patches."""
        from transformers.video_processing_utils import BaseVideoProcessor

        size = (2 * self.factor + 5, 3 * self.factor - 3)
        picture = (np.arange(size[0] * size[1] * 3, dtype=np.int64) * 7919 % 251).astype(np.uint8).reshape(*size, 3)
        limits = {"shortest_edge": 4 * self.factor**2, "longest_edge": 10 * self.factor**2}
        planes = torch.from_numpy(picture).permute(2, 0, 1)
        about = {"size": limits, "input_data_format": "channels_first", "return_tensors": "pt"}
        if isinstance(processor, BaseVideoProcessor):
            about |= {"do_sample_frames": False}
            if hasattr(processor, "cap_pixels_per_frame"):
                about["cap_pixels_per_frame"] = False
            wanted = processor([planes[None].expand(self.temporal_patch_size, -1, -1, -1)], **about)
            values, grid, count = wanted["pixel_values_videos"], wanted["video_grid_thw"], self.temporal_patch_size
        else:
            wanted = processor([planes], **about)
            values, grid, count = wanted["pixel_values"], wanted["image_grid_thw"], 1
        rows, columns = (int(n) * self.patch_size for n in grid[0][1:])
        found = PackedFrames.of(np.stack([self.resize(picture, (rows, columns))] * count), self)
        same = grid.tolist() == [list(self.grid(*found.sizes[0]))] and values.shape == (len(found), values.shape[-1])
        if not same or not torch.allclose(found.patches(), values, rtol=0, atol=1e-6):
            raise ProcessorError(
                f"{type(processor).__name__} makes other patches than Qwen2-VL's, and no others are known here"
            )


@dataclass(frozen=True, eq=False)
class PackedFrames:
    """Frames of several videos, or several images, one after the other; the loader moves them like a tensor.

    Attributes:
        data: uint8 [bytes], of each video [T, H, W, 3].
        sizes: frames, height and width of each.
        layout: how they become patches; its colours are moved with the frames.
    """

    data: Tensor
    sizes: tuple[tuple[int, int, int], ...]
    layout: PatchLayout

    @classmethod
    def of(cls, frames: np.ndarray, layout: PatchLayout) -> PackedFrames:
        """Hold the resized frames of one video or image, uint8 [T, H, W, 3], without copying them."""
        return cls(torch.from_numpy(np.ascontiguousarray(frames)).flatten(), (frames.shape[:3],), layout)

    @classmethod
    def join(cls, parts: Sequence[PackedFrames]) -> PackedFrames:
        """Concatenate; a single part stays as it is."""
        if len(parts) == 1:
            return parts[0]
        sizes = itertools.chain.from_iterable(part.sizes for part in parts)
        return dataclasses.replace(parts[0], data=torch.cat([part.data for part in parts]), sizes=tuple(sizes))

    def __len__(self) -> int:
        """Return the number of patches."""
        return sum(self._patches_of_each())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedFrames:
        """Return the same frames on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedFrames:
        """Return the same frames in page-locked memory; `torch.utils.data.DataLoader(pin_memory=True)` calls this."""
        return self._map(Tensor.pin_memory)

    def patches(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return what the processor makes of these frames: [patches, values] in `dtype`, on the frames' device.

        The values are those of fp32, rounded once.
        """
        values = 3 * self.layout.temporal_patch_size * self.layout.patch_size**2
        out = torch.empty(len(self), values, dtype=dtype, device=self.data.device)
        videos = self.data.split([3 * frames * height * width for frames, height, width in self.sizes])
        for video, size, own in zip(videos, self.sizes, out.split(self._patches_of_each()), strict=True):
            self.layout.cut(video.view(*size, 3), own)
        return out

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedFrames:
        layout = dataclasses.replace(self.layout, colours=change(self.layout.colours))
        return dataclasses.replace(self, data=change(self.data), layout=layout)

    def _patches_of_each(self) -> list[int]:
        grids = (self.layout.grid(*size) for size in self.sizes)
        return [time * height * width for time, height, width in grids]
