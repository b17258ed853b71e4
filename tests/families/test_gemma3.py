"""What Gemma 3 needs beside the suite: layers of two kinds, images that see themselves, no video."""

import copy

import pytest
import torch

from swim_fast.data.batch.collation import model_inputs
from swim_fast.data.sample.builder import SampleBuilder
from swim_fast.data.source.errors import DataError
from swim_fast.data.source.records import Record
from swim_fast.errors import OptionError, ProcessorError
from swim_fast.families import get_default_layers, get_eligible_layers, get_layout
from swim_fast.modeling import attach_noun_attention
from tests.families.test_data import QUESTION, encode
from tests.families.test_models import batch_of, sample_of
from tests.families.tiny import tiny

NAME = "Gemma 3"


def test_sliding_layers_are_not_eligible():
    model = tiny(NAME).build()
    assert get_eligible_layers(model) == [0, 2]
    with pytest.raises(OptionError, match=r"layer 1 does not see the whole sequence .* choose of 0, 2"):
        attach_noun_attention(model, [0, 1])


def test_default_layers_are_those_that_see_the_whole_sequence():
    assert get_default_layers(range(5, 34, 6)) == [5, 11, 17, 23, 29]  # of Gemma 3 4B
    assert get_default_layers(range(3, 32, 4)) == [7, 15, 23, 31]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_maps_behind_sdpa_are_those_of_eager_attention(fused, padded):
    """Tokens of an image see each other, also later ones: not so the noun, whose row ends at itself."""
    model, sample = tiny(NAME).build(), sample_of(NAME)
    longer = copy.copy(sample)
    longer.inputs = {k: torch.cat([v, v[-4:]]) if k in ("input_ids", "labels", "mm_token_type_ids") else v
                     for k, v in sample.inputs.items()}  # fmt: skip
    batch = batch_of(NAME, model, *([sample, longer] if padded else [sample]))
    inputs = model_inputs(batch)
    plain = model(**inputs, use_cache=False, output_attentions=True)
    keys = sample.key_sets[0]
    image = plain.attentions[2][0, :, keys][:, :, keys]
    assert (image > 0).all()  # both ways
    model.set_attn_implementation("sdpa")
    attach_noun_attention(model, [0, 2], fused=fused)
    found = model(**inputs, noun_queries=batch["noun_queries"])
    torch.testing.assert_close(found.logits, plain.logits, atol=1e-4, rtol=1e-4)
    for layer, maps in zip((0, 2), found.attentions, strict=True):
        wanted = plain.attentions[layer][:, :, [row.position for row in sample.rows]][..., keys].mean(1).flatten(0, 1)
        torch.testing.assert_close(maps, wanted, atol=2e-6, rtol=1e-4)


def test_crops_are_refused():
    processor = copy.deepcopy(tiny(NAME).processor)
    processor.image_processor.do_pan_and_scan = True
    with pytest.raises(ProcessorError, match="Gemma3ImageProcessor has do_pan_and_scan, which shows parts of an image"):
        get_layout(processor)


def test_videos_are_refused():
    builder = SampleBuilder(tiny(NAME).processor)
    with pytest.raises(DataError, match="this model takes no video"):
        builder.render(Record("", 0, "", QUESTION, "video", "a", ({},)))


def test_text_around_the_image_is_counted():
    encoding, conversation = encode(NAME, "image")
    ids = encoding.inputs["input_ids"]
    tokens = tiny(NAME).processor.tokenizer.convert_ids_to_tokens(ids)
    first = int(encoding.visual()[0])
    assert tokens[first - 1] == "<start_of_image>" and tokens[int(encoding.visual()[-1]) + 1] == "<end_of_image>"
    assert conversation.text.count("<start_of_image>") == 1
