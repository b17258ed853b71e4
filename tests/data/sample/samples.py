"""Parts of samples that the tests of the builder share."""

import torch

from tests.data.conftest import box
from tests.helpers.clips import read_number

H, W = 64, 96  # of the clips; 2 × 3 visual tokens a patch
TOKENS = 6


def mask(top=0, left=0):
    return box(H, W, top, top + 20, left, left + 30)


def labelled(sample, tokenizer):
    """The stretches of labelled tokens, as text."""
    labels = sample.inputs["labels"]
    chosen = labels != -100
    assert torch.equal(labels[chosen], sample.inputs["input_ids"][chosen])
    edges = torch.diff(chosen.int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero().flatten().tolist()
    return [tokenizer.decode(labels[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def shown_numbers(sample):
    """The numbers drawn on the frames, read back out of the patches that the vision tower gets."""
    frames, height, width = sample.inputs["video_grid_thw"][0].tolist()
    patches = (
        sample.inputs["pixel_values_videos"].patches().reshape(frames, height // 2, width // 2, 2, 2, 3, 2, 14, 14)
    )
    # [patch, row, column, row in block, column in block, colour, frame, y, x] → [frame, y, x, colour]
    pixels = patches.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(2 * frames, height * 14, width * 14, 3)
    std, mean = torch.tensor([0.26862954, 0.26130258, 0.27577711]), torch.tensor([0.48145466, 0.4578275, 0.40821073])
    return [read_number(frame) for frame in ((pixels * std + mean) * 255).numpy()]
