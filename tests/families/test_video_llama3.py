"""What VideoLLaMA3's layout does beside the suite: tokens of what does not move are left out."""

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from swim_fast.data.sample.builder import SampleBuilder
from swim_fast.data.source.records import Record
from swim_fast.loss.mask_loss import mask_alignment_loss
from swim_fast.modeling.prepare import prepare_model
from tests.data.conftest import rle
from tests.families.test_data import FPS, QUESTION, encode
from tests.families.test_models import batch_of, losses_of
from tests.families.tiny import tiny
from tests.helpers.clips import write_clip

NAME = "VideoLLaMA3"
SIDE, CELLS = 28, (2, 3)  # of a cell in pixels; and the cells of a frame


def frame(column):
    """A still scene with a square in the second row of cells."""
    pixels = np.full((CELLS[0] * SIDE, CELLS[1] * SIDE, 3), 60, np.uint8)
    pixels[SIDE:, SIDE * column : SIDE * (column + 1)] = 230
    return pixels


COLUMNS = [0, 1, 1, 2]  # of the square in each frame
KEPT = [
    [1, 1, 1, 1, 1, 1],
    [0, 0, 0, 1, 1, 0],
    [1, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 1, 1],
]  # the first cell for want of any
CLIP = np.stack([frame(column) for column in COLUMNS])


@pytest.fixture
def record(tmp_path):
    """The square is annotated in every frame."""
    path = write_clip(tmp_path / "a.mkv", CLIP, FPS, options={"qp": "0"}, pix_fmt="yuv444p")
    masks = {index: rle((pixels[..., 0] > 100).astype(np.uint8)) for index, pixels in enumerate(CLIP)}
    return Record("", 0, "", QUESTION, "video", path, (masks,))


def test_tokens_of_what_stands_still_are_left_out():
    found, conversation = encode(NAME, "video", *CLIP.shape[1:3], range(4), CLIP)
    planes, metadata = (
        torch.from_numpy(CLIP).permute(0, 3, 1, 2),
        VideoMetadata(24, FPS, 84, 56, 6.0, None, [*range(4)]),
    )
    about = {"do_sample_frames": False, "video_metadata": [metadata]}
    wanted = tiny(NAME).processor(text=[conversation.text], videos=[[planes]], videos_kwargs=about, return_tensors="pt")
    assert found.inputs["input_ids"].tolist() == wanted["input_ids"][0].tolist()
    assert torch.equal(found.inputs["video_compression_mask"], wanted["video_compression_mask"])
    assert (found.cells.flatten(1) >= 0).long().tolist() == KEPT


def test_the_count_without_decoding_is_the_most_there_can_be(record):
    """A batch is never longer than packing takes it to be, and an object whose cells have no token is left out."""
    builder = SampleBuilder(tiny(NAME).processor)
    sample, most = builder(record), builder.length(record)
    left_out = sum(row.count(0) for row in KEPT)
    assert most - len(sample.inputs["input_ids"]) == left_out == 13
    assert sorted({sample.patch(pair) for pair in sample.pairs}) == [0, 1, 3]
    assert builder.replace(max_tokens=most)(record).notes == []
    assert "thinned from 4 to 2 frames" in builder.replace(max_tokens=most - 1)(record).notes[0]

    model = tiny(NAME).build()
    prepare_model(model, packed=True)
    alone = losses_of(model, batch_of(NAME, model, sample))
    packed = batch_of(NAME, model, sample, sample, pack=True)
    assert packed["input_ids"].shape[1] <= 2 * most
    found = losses_of(model, packed)
    for one, wanted in zip(found.attentions, alone.attentions, strict=True):
        torch.testing.assert_close(one, torch.cat([wanted, wanted]), atol=2e-6, rtol=1e-4)
        assert (one == 0).sum() == 2 * sum(row.count(0) for i, row in enumerate(KEPT) if i != 2)
    loss = mask_alignment_loss(found.attentions, packed["mask_targets"])
    loss.backward()
    gradient = model.get_parameter("model.language_model.layers.0.self_attn.q_proj.weight").grad
    assert loss.isfinite() and gradient.isfinite().all() and gradient.any()
