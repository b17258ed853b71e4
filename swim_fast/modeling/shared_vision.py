"""The vision tower's work divided among the ranks that share a sample.

A rank encodes a P-th of the temporal patches of each clip, and needs the pixels of no others. Where positions come with
the batch, the tokens are cut before they are embedded, and each feature is sent to the rank that has its token: no rank
holds the embeddings, or the features, of the whole sequence. Elsewhere every rank gathers all features.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swim_fast.families.layout import BatchError
from swim_fast.frame_shares import FrameShare, divide_patches
from swim_fast.modeling.sequence_group import SequenceGroup

_KINDS = (("pixel_values", "image_grid_thw", 1), ("pixel_values_videos", "video_grid_thw", 2))  # types of their tokens


@dataclass(frozen=True)
class _Pass:
    """One pass of the tower: what becomes of the features, of N tokens in all.

    Attributes:
        counts: tokens whose features each rank encodes.
        order: in which this rank's features are sent, int64; None: every rank gathers all.
        sent, received: features for each rank and from each.
        back: order that makes what arrives that of the tokens, int64.
    """

    counts: list[int]
    order: Tensor | None
    sent: list[int]
    received: list[int]
    back: Tensor


class SharedVision:
    """Hooks of one model: a context of the base model's forward, and both sides of the tower's.

    Args:
        group: the ranks.
        merge: patches on the side of the square that becomes one token.
    """

    def __init__(self, group: SequenceGroup, merge: int):
        self._group, self._merge = group, merge
        self._expected: deque[tuple[Tensor, Tensor]] = deque()  # grids and tokens of the passes to come
        self._pass: _Pass | None = None

    @contextlib.contextmanager
    def embed_part(self, base: nn.Module, kwargs: dict) -> Iterator[None]:
        """Let the base model embed this rank's part of the tokens, if it is told the positions of all.

        The model divides a tower's features by the grids of its clips, so it is given one grid of the part's tokens.
        """
        ids, types = kwargs.get("input_ids"), kwargs.get("mm_token_type_ids")
        self._expected.clear()
        if ids is not None and types is not None and kwargs.get("position_ids") is not None:
            kwargs |= {"input_ids": self._group.get_part(ids, 1), "whole_length": ids.shape[1]}
            for pixels, name, number in _KINDS:
                if kwargs.get(pixels) is not None:
                    tokens = types == number
                    self._expected.append((kwargs[name], tokens))
                    own = int(self._group.get_part(tokens, 1).sum())
                    kwargs[name] = kwargs[name].new_tensor([[own, self._merge, self._merge]])
        yield

    def before_tower(self, visual: nn.Module, args: tuple, kwargs: dict):
        """Give the tower this rank's patches [n, values] and their `grid_thw`, a row for each temporal patch."""
        name = None if args else next(iter(kwargs))
        pixels = args[0] if args else kwargs[name]
        grid, tokens = self._expected.popleft() if self._expected else (kwargs["grid_thw"], None)
        clips, rank = grid.tolist(), self._group.rank
        shares = divide_patches((clip[0] for clip in clips), self._group.ranks)
        runs, grids = [], []
        for (_, height, width), of_clip in zip(clips, shares, strict=True):
            runs.append([len(own) * height * width // self._merge**2 for own in of_clip])
            grids += [(1, height, width)] * len(of_clip[rank])  # GLM's tower takes no longer ones
        self._pass = self._plan(runs, tokens, grid.device)
        pixels = self._select(pixels, clips, shares)
        if not grids:  # it takes part in the backward pass of the tower all the same
            pixels = pixels.new_zeros(self._merge**2, pixels.shape[1])
            grids = [(1, self._merge, self._merge)]
        kwargs = kwargs | {"grid_thw": grid.new_tensor(grids)}
        return ((pixels, *args[1:]), kwargs) if args else (args, kwargs | {name: pixels})

    def after_tower(self, visual: nn.Module, args: tuple, output: Any):
        """Return the features of this rank's part of the tokens, or of all."""
        output.pooler_output = self._send(output.pooler_output)
        if output.get("deepstack_features"):  # Qwen3-VL's, for some layers of the decoder
            output.deepstack_features = [self._send(features) for features in output.deepstack_features]
        return output

    def _select(self, pixels: Tensor, clips: list[list[int]], shares: list[list[range]]) -> Tensor:
        """Return the patches that this rank encodes, of those of all clips, or of its own share of each."""
        group = self._group
        whole = [range(time) for time, _, _ in clips]
        share = [FrameShare(group.ranks, group.rank).of_clip(time) for time, _, _ in clips]
        sizes = [height * width for _, height, width in clips]
        for held in (whole, share):
            if len(pixels) == sum(len(times) * size for times, size in zip(held, sizes, strict=True)):
                break
        else:
            raise BatchError(
                f"{len(pixels)} patches are neither all of clips of {clips} nor the share of rank {group.rank} of "
                f"{group.ranks} that share a sample"
            )
        parts, first = [], 0
        for times, size, of_clip in zip(held, sizes, shares, strict=True):
            own = of_clip[group.rank]
            begin = first + (own.start - times.start) * size
            parts.append(pixels[begin : begin + len(own) * size])
            first += len(times) * size
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _plan(self, runs: list[list[int]], tokens: Tensor | None, device: torch.device) -> _Pass:
        """Return where the features go. Waits for the device.

        Args:
            runs: tokens of each clip that each rank encodes.
            tokens: [B, L] bool, the tokens of the pass; None: all features go to all ranks.
        """
        group, counts = self._group, [sum(column) for column in zip(*runs, strict=True)]
        ranks = torch.arange(group.ranks, device=device)
        sources = ranks.repeat(len(runs)).repeat_interleave(torch.tensor(runs, device=device).flatten())
        if tokens is None:
            return _Pass(counts, None, [], [], sources.argsort(stable=True).argsort())
        owners = tokens.nonzero()[:, 1] // group.count_part(tokens.shape[1])
        if len(owners) != len(sources):
            raise BatchError(f"{len(owners)} tokens are of images or videos whose grids have {len(sources)}")
        receivers, senders = owners[sources == group.rank], sources[owners == group.rank]
        sent, received = (torch.bincount(of_row, minlength=group.ranks).tolist() for of_row in (receivers, senders))
        back = senders.argsort(stable=True).argsort()
        return _Pass(counts, receivers.argsort(stable=True), sent, received, back)

    def _send(self, features: Tensor) -> Tensor:
        """Return the features of this rank's tokens in their order, or those of all."""
        group, plan = self._group, self._pass
        features = features[: plan.counts[group.rank]]
        if plan.order is None:
            return group.gather_rows(features, plan.counts)[plan.back]
        return group.exchange_rows(features[plan.order], plan.sent, plan.received)[plan.back]
