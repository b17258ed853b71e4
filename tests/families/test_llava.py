"""What LLaVA-OneVision's and LLaVA-NeXT-Video's layouts do beside the suite."""

import copy

import numpy as np
import pytest

from swim_fast.data.sample.builder import SampleBuilder
from swim_fast.errors import ProcessorError
from swim_fast.families import get_layout
from tests.families.test_data import encode
from tests.families.tiny import tiny


def test_masks_are_cropped_as_frames_are():
    encode_next = SampleBuilder(tiny("LLaVA-NeXT-Video").processor).encode
    mask = np.zeros((40, 100), np.uint8)
    mask[:, 29:31] = mask[:, 70] = 1
    assert encode_next.seen("video", mask).shape == (40, 40)
    assert encode_next.seen("video", mask)[0].nonzero()[0].tolist() == [0]
    assert np.array_equal(encode_next.seen("image", mask), mask)
    assert encode_next.seen("video", np.zeros((3, 70, 40, 3))).shape == (3, 40, 40, 3)


@pytest.mark.parametrize("name, height, width", [("LLaVA-OneVision", 112, 168), ("LLaVA-NeXT-Video", 112, 56)])
def test_rows_of_an_image_end_with_a_newline(name, height, width):
    encoding = encode(name, "image", height, width)[0]
    visual, cells = encoding.visual(), encoding.cells[0]
    side = get_layout(tiny(name).processor).side("image")
    assert cells[0, 0] == visual[side**2] and cells[-1, -1] == visual[-2]
    assert (cells[1:, 0] - cells[:-1, -1] == 2).all() and (cells.diff(dim=1) == 1).all()


def test_other_crops_are_refused():
    processor = copy.deepcopy(tiny("LLaVA-NeXT-Video").processor)
    processor.video_processor.crop_size = {"height": 28, "width": 28}
    with pytest.raises(ProcessorError, match=r"resizes videos to .*56.* and crops \(28, 28\); only a crop of the side"):
        get_layout(processor)
    processor.video_processor.crop_size = processor.video_processor.size = {"height": 56, "width": 56}
    with pytest.raises(ProcessorError, match="only a crop of the side that the shorter one is resized to"):
        get_layout(processor)
    processor.video_processor.do_center_crop = False
    with pytest.raises(ProcessorError, match="and crops None"):
        get_layout(processor)


def test_frames_that_cannot_be_pooled_are_refused():
    processor = copy.deepcopy(tiny("LLaVA-NeXT-Video").processor)
    processor.patch_size = 11
    with pytest.raises(ProcessorError, match="frames of 5 × 5 patches, which cannot be pooled by 2"):
        get_layout(processor)


def test_frames_that_are_no_square_of_tokens_are_refused():
    processor = copy.deepcopy(tiny("LLaVA-OneVision").processor)
    processor.num_image_tokens = 26
    with pytest.raises(ProcessorError, match="has 26 tokens, which are no square"):
        get_layout(processor)
