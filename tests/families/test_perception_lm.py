"""What Perception-LM's layout does beside the suite: images of several tiles, of one, and what is refused."""

import copy

import pytest
import torch

from swim_fast.errors import ProcessorError
from swim_fast.families import find_family, get_layout
from swim_fast.families.layout import Clip
from swim_fast.modeling import attach_noun_attention
from tests.families.test_data import encode
from tests.families.test_models import batch_of, losses_of, sample_of
from tests.families.tiny import tiny

NAME = "Perception-LM"
pytestmark = pytest.mark.needs("timm")


def test_images_of_different_numbers_of_tiles_share_a_batch():
    model = attach_noun_attention(tiny(NAME).build())
    samples = [sample_of(NAME, "image"), sample_of(NAME, "image", height=56, width=112)]
    assert len({len(sample.inputs["pixel_values"][0]) for sample in samples}) == 2
    alone = [losses_of(model, batch_of(NAME, model, sample)).attentions[-1] for sample in samples]
    found = losses_of(model, batch_of(NAME, model, *samples)).attentions[-1]
    for rows, wanted in zip(found.split([len(rows) for rows in alone]), alone, strict=True):
        torch.testing.assert_close(rows[:, : wanted.shape[1]], wanted, atol=2e-6, rtol=1e-4)


def test_the_small_picture_has_no_cells():
    encoding = encode(NAME, "image", 56, 112)[0]
    visual, cells = encoding.visual(), encoding.cells
    assert cells[0, 0, 0] == visual[4] and len(visual) == 4 + cells.numel()


def test_an_image_that_is_not_cut_has_its_own_tokens_as_cells():
    processor = copy.deepcopy(tiny(NAME).processor)
    processor.image_processor.vision_input_type = "vanilla"
    layout, pixels = get_layout(processor), torch.zeros(1, 30, 150, 3, dtype=torch.uint8).numpy()
    clip = Clip((0,), 1.0, 1, 30, 150)
    inputs = layout.prepare("image", pixels, clip)
    assert layout.cells("image", inputs, torch.arange(4)).tolist() == [[[0, 1], [2, 3]]]
    assert layout.expand("image", layout.sketch("image", clip)) == layout.expand("image", inputs)


@pytest.mark.parametrize("kind, name, value", [("image", "vision_input_type", "tile"), ("video", "do_center_crop", 1)])
def test_other_ways_to_cut_are_refused(kind, name, value):
    processor = copy.deepcopy(tiny(NAME).processor)
    setattr(getattr(processor, f"{kind}_processor"), name, value)
    with pytest.raises(ProcessorError, match=f"PerceptionLM.*Processor has {name}"):
        get_layout(processor)


def test_sizes_of_the_tower_are_those_of_timm():
    config = copy.deepcopy(tiny(NAME).build().config)
    config.vision_config.model_args = {"embed_dim": 1024, "depth": 23, "img_size": [448, 448], "global_pool": ""}
    vision = find_family(config).vision(config)  # of Perception-LM 1B
    assert (vision.hidden, vision.depth, vision.heads, vision.intermediate) == (1024, 23, 16, 4096)
    assert vision.patch_values == 3 * 14 * 14
